"""Table and figures of finished runs.

    python tools/plot.py runs/*                         # a table: mean ± std over seeds
    python tools/plot.py runs/* --figure curves.png     # and learning curves
    python tools/plot.py runs/* --thought thought.png   # and a thought, before and after training
    python tools/plot.py runs/* --jsonl runs.jsonl      # and one line per run, to be read again
    python tools/plot.py runs.jsonl --only '^dlr' --over texts --figure curves.png

Runs whose names differ only in `-seed<n>` form a group and must not differ in anything else. Below
the table each group is compared with the first one, seed by seed. A thought is that of the first
run of lepo.py or latent_grpo.py; its picture has the learning curves too, and on trees the trees.

For runs of lepo.py on trees, `held` is the share of held-out problems whose answer has at least 2 %
of the last latent, noise-free; `right_held` and `right_lost` are the accuracies on these problems
and on the others.
"""

import argparse
import json
import re
import sys
import textwrap
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the root, since this file is run as a script
import common
import lepo
import tasks
from tasks import UserError, prompts, trees

MAY_DIFFER = {"seed", "out", "resume", "device", "ask"}  # of the flags of one group
SCORES = [
    "greedy",
    "sampled",
    "pass@8",
    "length",
    "exit_rate",
    "greedy_no_latents",
    "greedy_skipped",
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
    try:
        return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except ValueError:
        raise UserError(f"{path} has a line that is no JSON, or only half of it") from None


def read_folder(folder):
    """A run folder -> list of its result, with name and curve; empty while the run is not finished

    A curve has a point for each noise-free evaluation: steps, texts sampled, accuracy.
    """
    if not (folder / "result.json").exists():
        return []
    run = read_lines(folder / "result.json")[0]
    rows = read_lines(folder / "log.jsonl")
    args = run["args"]
    if rows and rows[-1]["step"] + 1 != args["steps"]:  # it goes on with more steps
        return []
    run |= {"name": folder.name, "seed": args["seed"], "steps": args["steps"], "curve": []}
    if rows and "reward" in rows[0]:  # latent_sft.py has none
        run["zero_advantage"] = mean(row["zero_advantage"] for row in rows)
        run["curve"].append({"step": 0, "texts": 0, "greedy": run["greedy_before"]})
        rows[-1]["greedy"] = run["greedy"]
        texts = 0
        for row in rows:
            texts += row.get("rollouts", args["prompts_per_step"] * args["group_size"])
            if "greedy" in row:
                point = {"step": row["step"] + 1, "texts": texts, "greedy": row["greedy"]}
                run["curve"].append(point)
    return [run]


def read_groups(paths, only):
    """Run folders and .jsonl files -> {name without its seed: runs}

    A folder that is given twice, or with its line, is one run.
    """
    runs, groups = {}, defaultdict(list)
    for path in paths:
        for run in read_lines(path) if path.suffix == ".jsonl" else read_folder(path):
            runs[run["name"]] = runs.get(run["name"], {}) | run
    for name, run in runs.items():
        if only.search(name):
            name = re.sub(r"-seed\d+", "", name)
            groups[name].append(run)
            ours, first = run["args"], groups[name][0]["args"]
            unlike = {key for key in ours | first if ours.get(key) != first.get(key)} - MAY_DIFFER
            if unlike:
                raise UserError(f"runs named {name} differ in {', '.join(unlike)}: rename some")
    if not groups:
        raise UserError("none of these is a finished run: a folder with result.json, or a line")
    return groups


# --- 2. Thoughts about held-out problems, without noise -------------------------------------------
def lepo_thoughts(args, count):
    task = tasks.find(args.task)
    problems = task.problems(args, "test", 0, count)
    lm = common.load_model(args)
    encoded = prompts.encode(lm, task, problems, args)
    roll = lepo.rollout(lm, encoded, 1, args.latent_steps, args, noise_free=True)
    roll.latents = roll.length.clamp(max=args.latent_steps)  # (P,)
    right, _ = lepo.rewards_of(lm, task, roll, problems)  # (P, 1)
    return lm, problems, roll, lepo.texts_of(lm, roll), right


def latent_grpo_thoughts(args, count):
    import latent_grpo  # here, until it is rewritten for common.py

    engine = latent_grpo.common
    problems = engine.take_problems(args, "test", 0, count)
    lm = engine.load_model(args)
    encoded = [engine.encode_prompt(lm.tokenizer, item, args.think_text) for item in problems]
    roll = latent_grpo.rollout(lm, encoded, 1, args, None, noise_free=True)
    roll.weights = roll.scores.softmax(-1)  # (P, T, K)
    return lm, problems, roll, *latent_grpo.score(lm, roll, problems)


THINK = {"lepo": lepo_thoughts, "latent_grpo": latent_grpo_thoughts}


def on_trees(run):
    return "trees" in (run["args"].get("task"), run["args"].get("data"))  # data: in older lines


def look(run, folder, number):
    """Puts into a run its thought about problem `number`, each latent as {word: weight}"""
    args = argparse.Namespace(**run["args"])
    count = max(number + 1, args.eval_problems * on_trees(run))
    run["thought"] = {}
    trained = f"{folder}/model"  # not in args.out: the folder may have moved
    for when, suffix, args.model in (("before", "_before", args.model), ("after", "", trained)):
        lm, problems, roll, texts, right = THINK[run["method"]](args, count)
        words = []
        for t in range(roll.latents[number]):
            decoded = map(lm.tokenizer.decode, roll.ids[number, t].tolist())
            words.append(dict(zip(decoded, roll.weights[number, t].tolist())))
        run["thought"][when] = {"latents": words, "text": texts[number].strip()}
        if on_trees(run):
            answers = torch.tensor([lm.tokenizer.encode(f" {item.answer}") for item in problems])
            last = torch.arange(count), roll.latents - 1
            held = (roll.weights[last] * (roll.ids[last] == answers)).sum(1) >= 0.02  # (P,)
            run["held" + suffix] = held.float().mean().item()
            for name, share in (("right_held", right[held]), ("right_lost", right[~held])):
                if len(share):
                    run[name + suffix] = share.mean().item()
    run["thought"] |= {"question": problems[number].question, "answer": problems[number].answer}


# --- 3. Table -------------------------------------------------------------------------------------
def scores_of(group, name):
    """Of each run that has it; `length` is greedy_length in runs of lepo.py"""
    scores = [run.get(name, run.get(name.replace("length", "greedy_length"))) for run in group]
    return [score for score in scores if score is not None]


def print_table(groups):
    """Markdown, a row for each group: the mean before → mean ± standard deviation after"""
    names = [name for name in SCORES if any(scores_of(group, name) for group in groups.values())]
    print("| runs | seeds | steps | seconds |", " | ".join(names), "|")
    print("|---" * (len(names) + 4) + "|")
    for title, group in groups.items():
        seconds = mean(run.get("seconds", 0) for run in group)
        row = f"| {title} | {len(group)} | {group[0]['steps']} | {seconds:.0f} |"
        for name in names:
            before, after = scores_of(group, f"{name}_before"), scores_of(group, name)
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
            base = {run["seed"]: run[score] for run in groups[first] if score in run}
            same = [run for run in groups[name] if score in run and run["seed"] in base]
            gains = [run[score] - base[run["seed"]] for run in same]
            if len(gains) == 5:
                gain = mean(gains)
                half = 2.776 * stdev(gains) / 5**0.5  # Student's t, 4 degrees of freedom
                print(f"{name} - {first}, {score}: {gain:+.3f}, 95 % interval", end=" ")
                print(f"{gain - half:+.3f} to {gain + half:+.3f}")


# --- 4. Figures -----------------------------------------------------------------------------------
def draw_curves(groups, over, axis):
    """Noise-free accuracy: mean over seeds, and a band from the worst to the best"""
    for name, group in groups.items():
        evaluations = list(zip(*(run["curve"] for run in group)))  # each of all seeds
        xs = [mean(point[over] for point in points) for points in evaluations]
        ys = [[point["greedy"] for point in points] for points in evaluations]
        axis.plot(xs, list(map(mean, ys)), label=f"{name} ({len(group)} seeds)")
        axis.fill_between(xs, list(map(min, ys)), list(map(max, ys)), alpha=0.15)
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
        axis.plot(*zip(*map(places.get, edge)), color="0.7", zorder=0)
    for node, place in places.items():
        color = "red" if node in exits else "black"
        axis.text(*place, node, color=color, backgroundcolor="white", ha="center", va="center")


def draw_thought(run, axes):
    """A row for each latent, a column for each word, weights as shades; beside it the problem"""
    thought = run["thought"]
    latents = thought["before"]["latents"] + thought["after"]["latents"]
    words = dict.fromkeys(word for latent in latents for word in latent if latent[word] > 0.02)
    for when in ("before", "after"):
        shades = [[latent.get(word, 0) for word in words] for latent in thought[when]["latents"]]
        axes[when].imshow(shades, cmap="Blues", aspect="auto", vmin=0, vmax=0.6)
        axes[when].set_xticks(range(len(words)), words)
        text = thought[when]["text"][-50:]  # its end, where the answer is
        axes[when].set(yticks=[], ylabel="latents", title=f"{when} training: {text}")
    axes["problem"].set_title(f"the answer is {thought['answer']}")
    axes["problem"].axis("off")
    if on_trees(run):
        draw_trees(*trees.read_problem(thought["question"]), axes["problem"])
    else:
        axes["problem"].text(0, 0.5, textwrap.fill(thought["question"], 40))


def draw(path, groups, over, run=None):
    """Learning curves, and above them the thought of a run"""
    from matplotlib.figure import Figure  # here, because tables do without it

    rows = [["problem", "before", "after"], ["curves"] * 3] if run else [["curves"]]
    figure = Figure(figsize=(12, 4 * len(rows)), layout="constrained")
    axes = figure.subplot_mosaic(rows)
    draw_curves(groups, over, axes["curves"])
    if run:
        draw_thought(run, axes)
    figure.savefig(path, dpi=100)


# --- 5. main --------------------------------------------------------------------------------------
def picture(path):
    if not path.endswith((".png", ".pdf")):
        raise argparse.ArgumentTypeError("a picture ends in .png or .pdf")
    return path


def pattern(text):
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(error) from None


def main(argv=None):
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, help="run folders, and .jsonl files with a run in every line")
    add("--only", type=pattern, default="", help="regular expression for names")
    add("--figure", type=picture, help="learning curves to draw")
    add("--over", default="step", choices=["step", "texts"], help="horizontal axis of the curves")
    add("--thought", type=picture, help="thought to draw")
    add("--problem", type=int, default=0, help="the held-out problem that it is about")
    add("--jsonl", type=Path, help="file to write")
    args = parser.parse_args(argv)
    groups = read_groups(args.runs, args.only)
    runs = [run for group in groups.values() for run in group]
    folders = {folder.name: folder for folder in args.runs}
    for run in runs:
        can_look = run["name"] in folders and run["method"] in THINK and "thought" not in run
        if can_look and (args.thought or on_trees(run)):
            look(run, folders[run["name"]], args.problem)
    thinking = [run for run in runs if "thought" in run]
    print_table(groups)
    print_gains(groups)
    if args.figure:
        draw(args.figure, groups, args.over)
    if args.thought and not thinking:
        raise UserError("--thought needs the folder of a run of lepo.py or latent_grpo.py")
    if args.thought:
        draw(args.thought, groups, args.over, thinking[0])
    if args.jsonl:
        args.jsonl.write_text("\n".join(json.dumps(run) for run in runs))


if __name__ == "__main__":
    common.run_main(main)
