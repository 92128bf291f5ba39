"""What the thoughts of lepo.py's runs on two trees hold, and the picture of one of them.

    python plot_trees.py runs/*                                                  # a table, with shares of thoughts
    python plot_trees.py runs/trees-* --problem 3 --figure trees.png             # and a thought, and learning curves
    python plot_trees.py runs/* --jsonl lines.jsonl                              # and one JSON line per run

In the table `held` is the share of held-out problems whose answer has at least 2 % of the last latent, noise-free;
`right_held` and `right_lost` are the accuracies on these problems and on the others. `runs` and `--only` as in plot.py.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch

import common
import lepo
import plot
import trees


def look(run, number):
    """-> shares of the noise-free thoughts of a run, before and after training; its thought about problem `number`"""
    args = argparse.Namespace(**run["args"])
    problems = common.take_problems(args, "test", 0, args.eval_problems)
    found = {"thought": {"question": problems[number].question.strip(), "answer": problems[number].answer}}
    for when, suffix, model in (("before", "_before", args.model), ("after", "", f"{args.out}/model")):
        lm = common.load_model(argparse.Namespace(**run["args"] | {"model": model}))
        prompts = [common.encode_prompt(lm.tokenizer, problem) for problem in problems]
        roll = lepo.rollout(lm, prompts, 1, args, None, args.latent_steps, noise_free=True)
        texts, right, _ = lepo.score(lm, roll, problems)  # right (P, 1)
        answers = torch.tensor([lm.tokenizer.encode(f" {problem.answer}") for problem in problems])  # (P, 1)
        ids, weights = roll.ids[:, : args.latent_steps], roll.weights[:, : args.latent_steps]  # (P, latent steps, K)
        held = (weights[:, -1] * (ids[:, -1] == answers)).sum(1) >= 0.02  # (P,)
        shares = {"held": held.float(), "right_held": right[held], "right_lost": right[~held]}
        found |= {f"{name}{suffix}": round(share.mean().item(), 4) for name, share in shares.items() if len(share)}
        words = [map(str.strip, map(lm.tokenizer.decode, row)) for row in ids[number].tolist()]
        latents = [dict(zip(*pair, strict=True)) for pair in zip(words, weights[number].tolist(), strict=True)]
        found["thought"][when] = {"latents": latents, "text": texts[number].strip()}
    return found


def paired(groups, scores=("greedy", "sampled")):
    """Lines: how far each group is above the first one, seed by seed, with the 95 % interval of the mean of 5 seeds"""
    (base, first), *others = groups.items()
    lines, first = [], {run["seed"]: run for run in first}
    for name, group in others:
        for score in scores:
            gains = [run[score] - first[run["seed"]][score] for run in group if run["seed"] in first]
            if len(gains) == 5:
                mean, half = statistics.mean(gains), 2.776 * statistics.stdev(gains) / 5**0.5  # Student's t, 4 degrees
                interval = f"95 % interval {mean - half:+.3f} to {mean + half:+.3f}"
                lines.append(f"{name} - {base}, {score}: {mean:+.3f}, {interval}")
    return "\n".join(lines)


def draw_tree(axis, edges, entrance, exits):
    """Both trees, the one below the entrance on the left. Exits have a frame."""
    roots = {parent for parent, _ in edges} - {child for _, child in edges}
    for side, root in enumerate(sorted(roots, key=lambda root: root != entrance)):
        places = {}
        for depth, level in enumerate(trees.levels(edges, root)):
            places |= {node: (side + (i + 0.5) / len(level), -depth) for i, node in enumerate(level)}
        for parent, child in edges:
            if parent in places:
                axis.plot(*zip(places[parent], places[child], strict=True), color="0.7", zorder=0)
        for node, (x, y) in places.items():
            frame = {"facecolor": "white", "edgecolor": "black" if node in exits else "white"}
            axis.text(x, y, node, ha="center", va="center", bbox=frame)
    axis.set(title=f"entrance {entrance}, exits {', '.join(map(str, exits))}", ylim=(-depth - 0.3, 0.3))
    axis.axis("off")


def draw(thought, groups, picture):
    """The trees; a thought before and after training, a row per latent and a column per node; learning curves"""
    edges, entrance, exits = trees.read_problem(thought["question"])
    top, bottom = picture.subfigures(2, 1, height_ratios=[1, 1.2])
    axis, *panels = top.subplots(1, 3)
    draw_tree(axis, edges, entrance, exits)
    nodes = [str(node) for level in trees.levels(edges, entrance) for node in level]
    for when, panel in zip(("before", "after"), panels, strict=True):
        latents = thought[when]["latents"]
        others = {word for latent in latents for word, weight in latent.items() if weight > 0.02}
        words = [*nodes, *sorted(others - set(nodes))]  # (columns,)
        shades = [[latent.get(word, 0) for word in words] for latent in latents]  # (latent steps, columns)
        image = panel.imshow(shades, cmap="Blues", vmin=0, vmax=0.6)
        panel.set_xticks(range(len(words)), words)
        panel.set_yticks(range(len(latents)), [f"latent {i + 1}" for i in range(len(latents))])
        answer = thought[when]["text"].split(" </think> ")[-1]
        panel.set_title(f"{when} training: {answer} (right: {thought['answer']})")
        top.colorbar(image, ax=panel, shrink=0.6)
    plot.draw_curves(groups, "step", bottom)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Two trees: what thoughts hold. See the first page of the file.")
    add = parser.add_argument
    add("runs", nargs="+", help="run folders, and .jsonl files with a run in every line")
    add("--only", default="", help="regular expression: runs whose names it matches")
    add("--problem", type=int, default=0, help="number of the held-out problem to draw")
    add("--figure", help="picture to write: a thought of the first run that thinks in latents, and learning curves")
    add("--jsonl", help="file to write, one line per run")
    args = parser.parse_args(argv)
    groups = plot.read_groups(args.runs, args.only)
    runs = [run for group in groups.values() for run in group]
    thinking = [run for run in runs if run["args"]["data"] == "trees" and run["args"].get("latent_steps")]
    for run in common.progress(thinking, desc="looking into thoughts"):
        if "held" not in run:
            run |= look(run, args.problem)
    print(plot.table(groups), paired(groups), sep="\n")
    if args.jsonl:
        Path(args.jsonl).write_text("".join(json.dumps(run) + "\n" for run in runs))
    if args.figure:
        from matplotlib.figure import Figure  # here, because tables do without it

        picture = Figure(figsize=(12, 7), layout="constrained")
        draw(thinking[0]["thought"], groups, picture)
        picture.savefig(args.figure, dpi=100)


if __name__ == "__main__":
    common.run_main(main)
