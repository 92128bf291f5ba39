"""Table and figures of finished runs.

    python plot.py runs/*                                       # a table: mean ± std over the seeds of each setting
    python plot.py runs/* --figure curves.png                   # and learning curves
    python plot.py runs/latent-seed0 --thought thought.png      # heat map of a thought before and after training
    python plot.py runs/* --jsonl runs.jsonl                    # and one JSON line per run, which plot.py reads as well
    python plot.py runs.jsonl --only '^dlr' --over texts --figure curves.png     # over texts sampled, not over steps

Runs whose names differ only in `-seed<n>` form a group, and must not differ in anything else.
"""

import argparse
import json
import re
import statistics
from pathlib import Path

import torch

import common
import latent_grpo


def read_folder(folder):
    """A run folder -> its result, with a name and a curve: at each noise-free evaluation steps, texts and accuracy."""
    rows = [row for row in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if "reward" in row]  # RL
    result = json.loads((folder / "result.json").read_text())
    batch = result["args"]["prompts_per_step"] * result["args"].get("group_size", 1)  # latent_sft.py has no groups
    curve, texts = [{"step": 0, "texts": 0, "greedy": result["greedy_before"]}] if "greedy_before" in result else [], 0
    for row in rows:
        texts += row.get("rollouts", batch)
        if "greedy" in row or row is rows[-1]:
            curve.append({"step": row["step"] + 1, "texts": texts, "greedy": row.get("greedy", result["greedy"])})
    if rows:
        result["zero_advantage"] = round(statistics.mean(row["zero_advantage"] for row in rows), 4)
    return {"name": folder.name} | result | {"curve": curve}


def read_groups(paths, only):
    """Run folders and .jsonl files -> {group: list of runs}; folders of unfinished runs are passed over."""
    runs, groups = [], {}
    for path in map(Path, paths):
        if path.suffix == ".jsonl":
            runs += [json.loads(line) for line in path.read_text().splitlines()]
        elif (path / "result.json").exists():
            runs.append(read_folder(path))
    for run in (run for run in runs if re.search(only, run["name"])):
        groups.setdefault(re.sub(r"-seed\d+", "", run["name"]), []).append(run)
    if not groups:
        raise common.UserError("none of these is a finished run: a folder with result.json, or a line of a .jsonl file")
    for name, group in groups.items():
        unlike = {key for run in group for key in run["args"] if run["args"][key] != group[0]["args"].get(key)}
        unlike -= {"seed", "out", "resume"}
        if unlike:
            raise common.UserError(f"runs named {name} differ in {', '.join(sorted(unlike))}: rename some")
    return groups


def table(groups):
    """Markdown: a row per group; of each accuracy the mean before -> mean ± standard deviation after."""
    keys = ["greedy", "sampled", "pass@8", "length", "exit_rate", "greedy_no_latents", "greedy_skipped", "no_latents",
            "averaged", "swapped", "held", "right_held", "right_lost", "zero_advantage"]  # fmt: skip
    keys = [key for key in keys if any(key in run for group in groups.values() for run in group)]
    lines = ["| runs | seeds | steps | seconds | " + " | ".join(keys) + " |", "|---" * (len(keys) + 4) + "|"]
    for name, group in groups.items():
        cells = [name, len(group), group[0]["steps"], f"{statistics.mean(run.get('seconds', 0) for run in group):.0f}"]
        for key in keys:
            after = [run[key] for run in group if key in run]
            before = [run[f"{key}_before"] for run in group if f"{key}_before" in run]
            arrow = f"{statistics.mean(before):.3f} → " if before else ""
            numbers = [f(after) for f in (statistics.mean, statistics.stdev)[: len(after)]]  # one run has no deviation
            cells.append(arrow + " ± ".join(f"{number:.3f}" for number in numbers))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def draw_curves(groups, over, picture):
    """Noise-free accuracy: mean and ± one standard deviation over seeds."""
    axis = picture.subplots()
    for name, group in groups.items():
        curves = [{point[over]: point["greedy"] for point in run["curve"]} for run in group]
        xs = sorted(set.intersection(*map(set, curves)))
        accuracy = torch.tensor([[curve[x] for x in xs] for curve in curves])  # (seeds, points)
        std, mean = torch.std_mean(accuracy, 0, correction=min(1, len(group) - 1))  # (points,) each
        axis.plot(xs, mean, label=f"{name} ({len(group)} seeds)")
        axis.fill_between(xs, mean - std, mean + std, alpha=0.15)
    axis.set(xlabel=over, ylabel="noise-free accuracy, held-out", ylim=(0, 1.02))
    axis.legend()


def think(run, number):
    """What a run of latent_grpo.py thinks of a held-out problem, noise-free. -> dict, a latent as {word: weight}"""
    if run["method"] != "latent_grpo":
        raise common.UserError(f"--thought: {run['name']} is no run of latent_grpo.py")
    args = argparse.Namespace(**run["args"])
    problem = common.take_problems(args, "test", number, 1)[0]
    thought = {"question": problem.question.strip(), "answer": problem.answer}
    for when, model in (("before", args.model), ("after", f"{args.out}/model")):
        lm = common.load_model(argparse.Namespace(**run["args"] | {"model": model}))
        prompt = common.encode_prompt(lm.tokenizer, problem, args.think_text)
        roll = latent_grpo.rollout(lm, [prompt], 1, args, None, noise_free=True)
        words = [map(lm.tokenizer.decode, ids) for ids in roll.ids[0, : roll.latents[0]].tolist()]  # (T, K)
        weights = roll.scores[0, : roll.latents[0]].softmax(-1).tolist()  # (T, K)
        latents = [dict(zip(*pair, strict=True)) for pair in zip(words, weights, strict=True)]
        thought[when] = {"latents": latents, "text": latent_grpo.score(lm, roll, [problem])[0][0].strip()}
    return thought


def draw_thought(thought, picture):
    """Before and after training: a row per latent, a column per word that some latent holds, weights as shades."""
    thoughts = [(when, thought[when]["latents"]) for when in ("before", "after")]
    words = {word for _, latents in thoughts for latent in latents for word, weight in latent.items() if weight > 0.02}
    words = sorted(words, key=lambda word: word.strip().zfill(3))  # (columns,)
    picture.suptitle(f"{thought['question']}   (answer: {thought['answer']})")
    for (when, latents), axis in zip(thoughts, picture.subplots(1, 2), strict=True):
        shades = [[latent.get(word, 0) for word in words] for latent in latents]  # (T, columns)
        picture.colorbar(axis.imshow(shades, cmap="Blues", aspect="auto", vmin=0, vmax=0.6))
        axis.set_xticks(range(len(words)), words)
        axis.set(yticks=[], ylabel="latents, the first on top", title=f"{when} training: {thought[when]['text']}")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Table and figures of finished runs: mean ± std over seeds.")
    add = parser.add_argument
    add("runs", nargs="+", help="run folders, and .jsonl files with a run in every line")
    add("--only", default="", help="regular expression: runs whose names it matches")
    add("--figure", help="learning curves to write, .png or .pdf")
    add("--over", default="step", choices=["step", "texts"], help="horizontal axis of the curves")
    add("--thought", help="heat map to write: a thought of the first run, before and after training")
    add("--problem", type=int, default=0, help="number of the held-out problem that it is about")
    add("--jsonl", help="file to write, one line per run")
    args = parser.parse_args(argv)
    groups = read_groups(args.runs, args.only)
    print(table(groups))
    first = next(iter(groups.values()))[0]
    if args.thought and "thought" not in first:
        first["thought"] = think(first, args.problem)
    if args.jsonl:
        Path(args.jsonl).write_text("".join(json.dumps(run) + "\n" for group in groups.values() for run in group))
    figures = [(args.figure, draw_curves, groups, args.over), (args.thought, draw_thought, first.get("thought"))]
    for path, draw, *what in figures:
        if path:
            from matplotlib.figure import Figure  # here, because tables do without it
            picture = Figure(figsize=(10, 4), layout="constrained")
            draw(*what, picture)
            picture.savefig(path, dpi=100)


if __name__ == "__main__":
    common.run_main(main)
