"""Table and figures of finished runs.

    python tools/plot.py runs/*                                # a table: mean ± std over seeds
    python tools/plot.py runs/* --figure curves.png            # and learning curves
    python tools/plot.py runs/lepo-seed0 --thought thought.png # a thought, before and after training
    python tools/plot.py runs/* --jsonl runs.jsonl             # one line per run, to be read again
    python tools/plot.py runs.jsonl --only '^dlr' --over texts --figure curves.png

Runs whose names differ only in `-seed<n>` form a group, and must not differ in anything else. Each
group is also compared with the first one, seed by seed. `--figure` and `--thought` may name the
same file: then both are in one picture.

For runs of lepo.py on trees, `held` is the share of held-out problems whose answer has at least 2 %
of the last latent, noise-free; `right_held` and `right_lost` are the accuracies on these problems
and on the others.
"""

import argparse
import json
import re
import statistics
import sys
from collections import Counter, defaultdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # this file is run as a script from the root
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
    """A file with JSON in every line -> list; blank lines are skipped"""
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError:
            raise UserError(f"{path}, line {number}: no JSON, or only half of it") from None
    return rows


def read_folder(folder):
    """A run folder -> its result with name and curve, or None while the run is not finished

    A curve has a point for each noise-free evaluation: steps, texts sampled, accuracy.
    """
    if not (folder / "result.json").exists():
        return None
    result = read_lines(folder / "result.json")[0]
    rows = read_lines(folder / "log.jsonl")
    args = result["args"]
    if rows and rows[-1]["step"] + 1 != args["steps"]:  # it was resumed with more steps
        return None
    curve, texts = [], 0
    if rows and "reward" in rows[0]:  # not in those of latent_sft.py
        curve.append({"step": 0, "texts": 0, "greedy": result["greedy_before"]})
        rows[-1]["greedy"] = result["greedy"]
        share = statistics.mean(row["zero_advantage"] for row in rows)
        result["zero_advantage"] = round(share, 4)
    for row in rows:
        texts += row.get("rollouts", args["prompts_per_step"] * args.get("group_size", 1))
        if curve and "greedy" in row:
            curve.append({"step": row["step"] + 1, "texts": texts, "greedy": row["greedy"]})
    run = {"name": folder.resolve().name, "seed": args["seed"], "steps": args["steps"]}
    return {**run, **result, "curve": curve, "folder": str(folder)}


def read_runs(paths, only):
    """Run folders and .jsonl files -> runs; a folder given twice, or with its line, is one run"""
    runs = {}
    for path in map(Path, paths):
        found = read_lines(path) if path.suffix == ".jsonl" else [read_folder(path)]
        for run in filter(None, found):
            known = runs.get(run["name"], run)
            if known["args"] != run["args"] or known["curve"] != run["curve"]:
                raise UserError(f"two different runs are named {run['name']}: rename one")
            runs[run["name"]] = known | run
    runs = [run for run in runs.values() if only.search(run["name"])]
    if not runs:
        raise UserError("no finished run: give folders with result.json, or lines of a .jsonl file")
    return runs


def grouped(runs):
    """-> {name without its seed: runs}"""
    groups = defaultdict(list)
    for run in runs:
        name = re.sub(r"-seed\d+", "", run["name"])
        groups[name].append(run)
        ours, theirs = run["args"], groups[name][0]["args"]
        unlike = {key for key in ours | theirs if ours.get(key) != theirs.get(key)} - MAY_DIFFER
        if unlike:
            raise UserError(f"runs named {name} differ in {', '.join(unlike)}: rename some")
    return groups


# --- 2. Thoughts about held-out problems, without noise -------------------------------------------
def lepo_thoughts(args, start, count):
    task = tasks.find(args.task)
    problems = task.problems(args, "test", start, count)
    lm = common.load_model(args)
    encoded = prompts.encode(lm, task, problems, args)
    roll = lepo.rollout(lm, encoded, 1, args.latent_steps, args, noise_free=True)
    latents = roll.length.clamp(max=args.latent_steps)  # (P,)
    texts = lepo.texts_of(lm, roll)
    right, _ = lepo.rewards_of(lm, task, roll, problems)  # (P, 1)
    return in_words(lm, problems, roll.ids, roll.weights, latents, texts, right)


def latent_grpo_thoughts(args, start, count):
    import engine  # both here, until latent_grpo.py is rewritten for common.py
    import latent_grpo

    problems = engine.take_problems(args, "test", start, count)
    lm = engine.load_model(args)
    encoded = [engine.encode_prompt(lm.tokenizer, item, args.think_text) for item in problems]
    roll = latent_grpo.rollout(lm, encoded, 1, args, None, noise_free=True)
    weights = roll.scores.softmax(-1)  # (P, T, K)
    texts, right = latent_grpo.score(lm, roll, problems)
    return in_words(lm, problems, roll.ids, weights, roll.latents, texts, right)


def in_words(lm, problems, ids, weights, latents, texts, right):
    """-> for each problem a dictionary, in it each latent as {word: weight}"""
    thoughts = []
    for n, problem in enumerate(problems):
        words = [Counter() for _ in range(latents[n])]
        for t, latent in enumerate(words):
            for token, weight in zip(ids[n, t].tolist(), weights[n, t].tolist()):
                latent[lm.tokenizer.decode(token).strip()] += weight
        thought = {"latents": words, "text": texts[n].strip(), "right": right[n].item()}
        thoughts.append(thought | {"question": problem.question, "answer": problem.answer})
    return thoughts


def can_look(run):
    return "folder" in run and run["method"] in ("lepo", "latent_grpo")


def thoughts_of(run, start, count):
    """-> thoughts before training, thoughts after it"""
    think = latent_grpo_thoughts if run["method"] == "latent_grpo" else lepo_thoughts
    args = argparse.Namespace(**run["args"])
    args.device = "cuda" if torch.cuda.is_available() else "cpu"  # maybe not that of the training
    before = think(args, start, count)
    args.model = f"{run['folder']}/model"  # not in args.out: the folder may have moved
    return before, think(args, start, count)


def add_shares(run):
    """The columns held, right_held and right_lost of a run on trees"""
    both = thoughts_of(run, 0, run["args"]["eval_problems"])
    for suffix, thoughts in zip(("_before", ""), both):
        right = [], []  # of the problems whose answer is lost, and of those whose answer is held
        for thought in thoughts:
            weight = thought["latents"][-1][thought["answer"]]
            right[weight >= 0.02].append(thought["right"])
        run["held" + suffix] = len(right[True]) / len(thoughts)
        for name, values in zip(("right_lost", "right_held"), right):
            if values:
                run[name + suffix] = statistics.mean(values)


# --- 3. Table -------------------------------------------------------------------------------------
def scores_of(group, name):
    """Of each run that has it; `length` is greedy_length in runs of lepo.py"""
    scores = [run.get(name, run.get(name.replace("length", "greedy_length"))) for run in group]
    return [score for score in scores if score is not None]


def table(runs, groups):
    """Markdown, a row for each group: the mean before → mean ± standard deviation after"""
    names = [name for name in SCORES if scores_of(runs, name)]
    rows = [["runs", "seeds", "steps", "seconds", *names]]
    rows.append(["---" for _ in rows[0]])
    for name, group in groups.items():
        seconds = statistics.mean(run.get("seconds", 0) for run in group)
        row = [name, str(len(group)), str(group[0]["steps"]), f"{seconds:.0f}"]
        for name in names:
            before, after = scores_of(group, f"{name}_before"), scores_of(group, name)
            cell = f"{statistics.mean(before):.3f} → " if before else ""
            cell += f"{statistics.mean(after):.3f}" if after else ""
            cell += f" ± {statistics.stdev(after):.3f}" if len(after) > 1 else ""
            row.append(cell)
        rows.append(row)
    return [f"| {' | '.join(row)} |" for row in rows]


def paired(groups):
    """How far each group is above the first: the mean over 5 seeds and its 95 % interval -> lines"""
    base = next(iter(groups))
    lines = []
    for name, group in groups.items():
        for score in ("greedy", "sampled"):
            theirs = {run["seed"]: run[score] for run in groups[base] if score in run}
            ours = [run for run in group if score in run and run["seed"] in theirs]
            gains = [run[score] - theirs[run["seed"]] for run in ours]
            if name != base and len(gains) == 5:
                mean = statistics.mean(gains)
                half = 2.776 * statistics.stdev(gains) / 5**0.5  # Student's t, 4 degrees of freedom
                interval = f"95 % interval {mean - half:+.3f} to {mean + half:+.3f}"
                lines.append(f"{name} - {base}, {score}: {mean:+.3f}, {interval}")
    return lines


# --- 4. Figures -----------------------------------------------------------------------------------
def draw_curves(groups, over, picture):
    """Noise-free accuracy: mean and ± one standard deviation over seeds"""
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


def draw_trees(question, axis):
    """The tree below the entrance on the left, the other on the right, exits red -> nodes of both"""
    edges, entrance, exits = trees.read_problem(question)
    roots = {parent for parent, _ in edges} - {child for _, child in edges}
    places = {}
    for side, root in enumerate([entrance, *roots - {entrance}]):
        for depth, level in enumerate(trees.levels(edges, root)):
            for i, node in enumerate(level):
                places[node] = side + (i + 0.5) / len(level), -depth
    for edge in edges:
        axis.plot(*zip(*(places[node] for node in edge)), color="0.7", zorder=0)
    for node, place in places.items():
        color = "tab:red" if node in exits else "black"
        axis.text(*place, node, color=color, backgroundcolor="white", ha="center", va="center")
    axis.axis("off")
    return [str(node) for node in places]


def draw_thought(run, picture):
    """Before and after training: a row for each latent, a column for each word, weights as shades"""
    thought = run["thought"]
    picture.suptitle(f"{thought['question']}   (answer: {thought['answer']})", wrap=True)
    on_trees = "trees" in (run["args"].get("task"), run["args"].get("data"))
    axes = picture.subplots(1, 2 + on_trees)
    latents = thought["before"]["latents"] + thought["after"]["latents"]
    heavy = {word for latent in latents for word in latent if latent[word] > 0.02}
    words = sorted(heavy, key=lambda word: word.strip().zfill(3))  # numbers in their order
    if on_trees:
        nodes = draw_trees(thought["question"], axes[0])
        words.sort(key=lambda word: nodes.index(word))  # from the entrance down
    for when, axis in zip(("before", "after"), axes[-2:]):
        shades = [[latent.get(word, 0) for word in words] for latent in thought[when]["latents"]]
        image = axis.imshow(shades, cmap="Blues", aspect="auto", vmin=0, vmax=0.6)
        picture.colorbar(image, ax=axis)
        axis.set_xticks(range(len(words)), words)
        text = thought[when]["text"][-60:]  # its end, where the answer is
        axis.set(yticks=[], ylabel="latents, the first on top", title=f"{when} training: {text}")


def draw(path, *parts):
    """Parts from the top down: a function that draws, and what it draws"""
    from matplotlib import rcParams  # here, because tables do without it
    from matplotlib.figure import Figure

    rcParams["text.parse_math"] = False  # $ is a dollar
    figure = Figure(figsize=(12, 4 * len(parts)), layout="constrained")
    pictures = figure.subfigures(len(parts), squeeze=False)
    for (draw_part, *what), picture in zip(parts, pictures.flat):
        draw_part(*what, picture)
    figure.savefig(path, dpi=100)


# --- 5. main --------------------------------------------------------------------------------------
def picture_name(text):
    if Path(text).suffix not in (".png", ".pdf", ".svg"):
        raise argparse.ArgumentTypeError("a picture ends in .png, .pdf or .svg")
    return text


def pattern(text):
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"no regular expression: {error}") from None


def parse_args(argv):
    about = "Table and figures of finished runs. The first page of the file explains them."
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=about)
    add = parser.add_argument
    add("runs", nargs="+", help="run folders, and .jsonl files with a run in every line")
    add("--only", type=pattern, default="", help="regular expression that names must match")
    add("--figure", type=picture_name, help="learning curves to draw")
    add("--over", default="step", choices=["step", "texts"], help="horizontal axis of the curves")
    add("--thought", type=picture_name, help="a thought to draw, of the first run with latents")
    add("--problem", type=int, default=0, help="number of the held-out problem that it is about")
    add("--jsonl", help="file to write, one line per run")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    runs = read_runs(args.runs, args.only)
    groups = grouped(runs)
    for run in runs:
        if can_look(run) and run["args"].get("task") == "trees" and "held" not in run:
            add_shares(run)
    print(*table(runs, groups), *paired(groups), sep="\n")
    parts = defaultdict(list)
    if args.thought:
        parts[args.thought].append((draw_thought, think_first(runs, args.problem)))
    if args.figure:
        parts[args.figure].append((draw_curves, groups, args.over))
    for path, drawings in parts.items():
        draw(path, *drawings)
    if args.jsonl:
        lines = [json.dumps({key: run[key] for key in run if key != "folder"}) for run in runs]
        Path(args.jsonl).write_text("\n".join(lines))


if __name__ == "__main__":
    common.run_main(main)
