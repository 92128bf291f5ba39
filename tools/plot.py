"""Table and figures of finished runs.

    python tools/plot.py runs/*                         # a table: mean ± std over seeds
    python tools/plot.py runs/* --figure curves.png     # and learning curves
    python tools/plot.py runs/* --thought thought.png   # and a thought, before and after training
    python tools/plot.py runs/* --jsonl runs.jsonl      # and one line per run, to be read again
    python tools/plot.py runs.jsonl --only '^dlr' --over texts --figure curves.png

Runs whose names differ only in `-seed<n>` form a group and must not differ in anything else. Below
the table each group is compared with the first one, seed by seed. `--only` is a regular expression
for names. `--over texts` draws curves over texts sampled instead of steps. `--thought` is about the
held-out problem `--problem`, of the first run of lepo.py or latent_grpo.py whose folder, or a line
with its thought, is given; the picture has the learning curves too, and on trees both trees.

For runs of lepo.py on trees, `held` is the share of held-out problems whose answer has at least 2 %
of the last latent, noise-free; `right_held` and `right_lost` are the accuracies on these problems
and on the others.
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

import torch

sys.path.insert(0, f"{Path(__file__).parents[1]}")  # the root, since this file is run as a script
import common
import latent_grpo
import lepo
import tasks
from tasks import UserError, encoding, trees

SCORES = [
    "greedy",
    "sampled",
    "pass@8",
    "length",
    "exit_rate",
    "greedy_no_latents",
    "no_latents",
    "averaged",
    "swapped",
    "held",
    "right_held",
    "right_lost",
    "zero_advantage",
]


# --- 1. Runs --------------------------------------------------------------------------------------
def read_lines(path):
    """A file with JSON in every line -> list"""
    # What some scripts call greedy_length and greedy_exit_rate is length and exit_rate in others.
    text = re.sub("greedy_(length|exit_rate)", r"\1", path.read_text())
    try:
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError:
        raise UserError(f"{path} has a line that is no JSON, or only half of it")


def read_folder(folder):
    """A run folder -> list of its result, with name and curve; empty while the run is not finished

    A curve has a point for each noise-free evaluation: steps, texts sampled, accuracy.
    """
    if not (folder / "result.json").exists():
        return []
    run = read_lines(folder / "result.json")[0]
    rows = read_lines(folder / "log.jsonl")
    args = run["args"]
    if len(rows) != args["steps"]:  # the run goes on, with more steps than it had
        return []
    curve = []
    run |= {
        "name": folder.name,
        "folder": f"{folder}",
        "seed": args["seed"],
        "steps": args["steps"],
        "curve": curve,
    }
    if rows and "reward" in rows[0]:  # latent_sft.py has none
        if "zero_advantage" in rows[0]:
            run["zero_advantage"] = mean(row["zero_advantage"] for row in rows)
        curve.append({"step": 0, "texts": 0, "greedy": run["greedy_before"]})
        rows[-1]["greedy"] = run["greedy"]
        texts = 0
        for row in rows:
            draw = args["prompts_per_step"] * args["group_size"]
            texts += row.get("rollouts", draw * row.get("draws", 1))
            if "greedy" in row:
                curve.append({"step": row["step"] + 1, "texts": texts, "greedy": row["greedy"]})
    return [run]


def read_groups(paths, only):
    """Run folders and .jsonl files -> {name without its seed: runs}; given twice, it is one run"""
    runs, groups = {}, defaultdict(list)
    for path in paths:
        for run in read_lines(path) if path.suffix == ".jsonl" else read_folder(path):
            runs[run["name"]] = run
    for name, run in runs.items():
        if only.search(name):
            name = re.sub(r"-seed\d+", "", name)
            groups[name].append(run)
            ours, first = run["args"], groups[name][0]["args"]
            unlike = {key for key in ours | first if ours.get(key) != first.get(key)}
            unlike -= {"seed", "out", "resume", "device", "ask", "save_every"}
            if unlike:
                raise UserError(f"runs named {name} differ in {', '.join(unlike)}: rename some")
    return groups


# --- 2. Thoughts about held-out problems, without noise -------------------------------------------
def lepo_thoughts(lm, task, problems, args):
    encoded = encoding.encode(lm, task, problems, args)
    roll = lepo.rollout(lm, encoded, 1, args.latent_steps, args, noise_free=True)
    roll.latents = roll.length.clamp(max=args.latent_steps)  # (P,)
    return roll, lepo.texts_of(lm, roll)


def latent_grpo_thoughts(lm, task, problems, args):
    lm.exit_id = encoding.exit_token(lm, args.exit_text)
    encoded = encoding.encode(lm, task, problems, args, latent_grpo.THINK)
    roll = latent_grpo.rollout(lm, encoded, 1, args.max_new_tokens, args, noise_free=True)
    return roll, latent_grpo.texts_of(lm, roll)


THINK = {"lepo": lepo_thoughts, "latent_grpo": latent_grpo_thoughts}


def look(run, number, on_trees):
    """Puts into a run its thought about problem `number`, and on trees what its thoughts hold"""
    args = argparse.Namespace(**run["args"])
    count = max(number + 1, args.eval_problems * on_trees)
    thought = {}
    trained = f"{run['folder']}/model"  # not in args.out: the folder may have moved
    task = tasks.find(args.task)
    problems = task.problems(args, "test", 0, count)
    for when, suffix, args.model in (("before", "_before", args.model), ("after", "", trained)):
        lm = common.load_model(args)
        roll, texts = THINK[run["method"]](lm, task, problems, args)
        right = torch.tensor([task.verify(*pair)[0] for pair in zip(texts, problems)])  # (P,)
        latents = zip(roll.ids[number].tolist(), roll.weights[number].tolist())
        words = [dict(zip(map(lm.tokenizer.decode, ids), weights)) for ids, weights in latents]
        thought[when] = {"latents": words[: roll.latents[number]], "text": texts[number]}
        if on_trees:
            answers = torch.tensor([lm.tokenizer.encode(f" {item.answer}") for item in problems])
            last = torch.arange(count), roll.latents - 1
            held = (roll.weights[last] * (roll.ids[last] == answers)).sum(1) >= 0.02  # (P,)
            run[f"held{suffix}"] = held.float().mean().item()
            run[f"right_held{suffix}"] = right[held].mean().item()  # NaN of none
            run[f"right_lost{suffix}"] = right[~held].mean().item()
    run["thought"] = thought | vars(problems[number])


# --- 3. Table -------------------------------------------------------------------------------------
def print_table(runs, groups):
    """Markdown, a row for each group: the mean before → mean ± standard deviation after"""
    names = [name for name in SCORES if any(name in run for run in runs)]
    header = f"| runs | seeds | steps | seconds | {' | '.join(names)} |"
    print(header)
    print(re.sub("[^|]+", "---", header))
    for title, group in groups.items():
        seconds = mean(run.get("seconds", 0) for run in group)
        row = f"| {title} | {len(group)} | {group[0]['steps']} | {seconds:.0f} |"
        for name in names:
            before = [run[f"{name}_before"] for run in group if f"{name}_before" in run]
            after = [run[name] for run in group if name in run]
            row += f" {mean(before):.3f} →" if before else ""
            row += f" {mean(after):.3f}" if after else ""
            row += f" ± {stdev(after):.3f}" if len(after) > 1 else ""
            row += " |"
        print(row)


def print_gains(groups):
    """How far each group is above the first: the mean over 5 seeds and its 95 % interval"""
    first, *others = groups
    for name in others:
        for score in ("greedy", "sampled"):
            gains = [
                run[score] - other[score]
                for run, other in zip(groups[name], groups[first])  # in the order of their seeds
                if score in run.keys() & other.keys() and run["seed"] == other["seed"]
            ]
            if len(gains) == 5:
                half = 2.776 * stdev(gains) / 5**0.5  # Student's t, 4 degrees of freedom
                interval = f"{mean(gains) - half:+.3f} to {mean(gains) + half:+.3f}"
                print(f"{name} - {first}, {score}: {mean(gains):+.3f}, 95 % interval {interval}")


# --- 4. Figures -----------------------------------------------------------------------------------
def draw_curves(groups, over, axis):
    """Noise-free accuracy, the mean over seeds; how far they spread is in the table"""
    for name, group in groups.items():
        evaluations = list(zip(*(run["curve"] for run in group)))  # each of all seeds
        xs = [mean(point[over] for point in points) for points in evaluations]
        ys = [mean(point["greedy"] for point in points) for points in evaluations]
        axis.plot(xs, ys, label=name)
    axis.set(xlabel=over, ylabel="noise-free accuracy, held-out", ylim=(0, 1.02))
    axis.legend()


def draw_trees(edges, entrance, exits, axis):
    """The tree below the entrance on the left, the other one on the right, exits red"""
    roots = {parent for parent, _ in edges} - {child for _, child in edges}
    places = {}
    for side, root in enumerate([entrance, *roots - {entrance}]):
        for depth, level in enumerate(trees.levels(edges, root)):
            for i, node in enumerate(level):
                places[node] = side + (i + 0.5) / len(level), -depth
    for edge in edges:
        axis.plot(*zip(*map(places.get, edge)), color="0.7")
    for node, place in places.items():
        axis.text(
            *place,
            node,
            color="red" if node in exits else "black",
            backgroundcolor="white",
            ha="center",
            va="center",
        )
    axis.axis("off")


def draw(path, groups, over, run):
    """Learning curves, and above them the thought of a run before and after training

    A row for each latent, a column for each word, weights as shades. The right answer has a tick.
    """
    from matplotlib.figure import Figure  # here, because tables do without it

    figure = Figure(figsize=(12, 8), layout="constrained")
    rows = "tba;ccc" if "held" in run else "ba;cc"  # the trees, before, after; the curves
    axes = figure.subplot_mosaic(rows if run else "c")
    draw_curves(groups, over, axes["c"])
    if run:
        thought = run["thought"]
        figure.suptitle(f"{thought['question']}   (answer: {thought['answer']})", wrap=True)
        latents = thought["before"]["latents"] + thought["after"]["latents"]
        words = dict.fromkeys(word for latent in latents for word in latent if latent[word] > 0.1)
        columns = [f"{word}\n✓" if word.strip() == thought["answer"] else word for word in words]
        for when in "before", "after":
            latents = thought[when]["latents"]
            axis = axes[when[0]]
            axis.pcolormesh(
                columns,
                [f"latent {t}" for t, _ in enumerate(latents, 1)],
                [[latent.get(word, 0) for word in words] for latent in latents],
                cmap="Blues",
                vmax=0.6,
            )
            axis.invert_yaxis()
            axis.set_title(f"{when} training: {thought[when]['text'][-60:]}")  # its end: the answer
    if "t" in axes:
        draw_trees(*trees.read_problem(thought["question"]), axes["t"])
    try:
        figure.savefig(path)
    except ValueError as error:  # a type of picture that is not known
        raise UserError(error)


# --- 5. main --------------------------------------------------------------------------------------
def main(argv=None):
    parser = argparse.ArgumentParser(description="The first page of the file explains the flags.")
    add = parser.add_argument
    add("runs", nargs="+", type=Path)
    add("--only", default="", type=re.compile)
    add("--figure")
    add("--over", default="step", choices=["step", "texts"])
    add("--thought")
    add("--problem", type=int, default=0)
    add("--jsonl", type=Path)
    try:
        args = parser.parse_args(argv)
    except re.error:
        raise UserError("--only takes a regular expression, and this is none")
    groups = read_groups(args.runs, args.only)
    runs = sum(groups.values(), [])
    # Those whose thought is known, or whose model is there
    thinking = [
        run for run in runs if "thought" in run or "folder" in run and run["method"] in THINK
    ]
    if not runs or args.thought and not thinking:
        raise UserError("no finished run, or for --thought none of lepo.py or latent_grpo.py")
    for run in thinking:
        on_trees = run["args"].get("task") == "trees"
        if "thought" not in run and (on_trees or args.thought and run is thinking[0]):
            look(run, args.problem, on_trees)
    print_table(runs, groups)
    print_gains(groups)
    if args.jsonl:
        args.jsonl.write_text("".join(f"{json.dumps(run)}\n" for run in runs))
    if args.figure:
        draw(args.figure, groups, args.over, {})
    if args.thought:
        draw(args.thought, groups, args.over, thinking[0])


if __name__ == "__main__":
    common.run_main(main)
