"""Table and figure of finished runs.

    python plot.py runs/*                                   # a table: mean ± std over the seeds of each setting
    python plot.py runs/* --figure curves.png               # and learning curves
    python plot.py runs/* --jsonl runs.jsonl                # and one JSON line per run, which plot.py reads as well
    python plot.py runs.jsonl --figure curves.png --over texts      # over texts sampled, not over steps

A run folder holds log.jsonl and result.json. Runs whose names differ only in `-seed<n>` form a group, and must not
differ in anything else.
"""

import argparse
import json
import re
import statistics
from pathlib import Path

from common import UserError, run_main


def read_folder(folder):
    """A run folder -> its result with name, curve and the mean share of rollouts that taught nothing.

    The curve has a point per noise-free evaluation: steps and texts so far, accuracy, and the mean reward since the
    last point.
    """
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "reward" in row]  # steps of RL
    result = json.loads((folder / "result.json").read_text())
    batch = result["args"]["prompts_per_step"] * result["args"].get("group_size", 1)  # latent_sft.py has no groups
    points, rewards, texts = [{"step": 0, "texts": 0, "greedy": result.get("greedy_before", 0.0)}], [], 0
    for row in rows:
        rewards.append(row["reward"])
        texts = row.get("main_decodes", texts + row.get("rollouts", batch))
        if "greedy" in row or row is rows[-1]:
            point = {"step": row["step"] + 1, "texts": texts, "greedy": row.get("greedy", result["greedy"])}
            points.append(point | {"reward": round(statistics.mean(rewards), 4)})
            rewards = []
    if rows:
        result["zero_advantage"] = round(statistics.mean(row["zero_advantage"] for row in rows), 4)
    return {"name": folder.name} | result | {"curve": points}


def read_groups(paths):
    """Run folders and .jsonl files -> {group: list of runs}; folders of unfinished runs are passed over."""
    runs, groups = [], {}
    for path in map(Path, paths):
        if path.suffix == ".jsonl":
            runs += [json.loads(line) for line in path.read_text().splitlines()]
        elif (path / "result.json").exists():
            runs.append(read_folder(path))
    for run in runs:
        groups.setdefault(re.sub(r"-seed\d+", "", run["name"]), []).append(run)
    if not groups:
        raise UserError("none of these is a finished run (a folder with result.json) or a .jsonl file of runs")
    for name, group in groups.items():
        settings = [{**run["args"], "seed": None, "out": None} for run in group]
        unlike = {key for each in settings for key in each if each[key] != settings[0].get(key)}
        if unlike:
            raise UserError(f"runs named {name} differ in {', '.join(sorted(unlike))}: give each setting its own name")
    return groups


def spread(values):
    """'0.981 ± 0.004' over seeds, the unbiased standard deviation; a single run has none."""
    mean = f"{statistics.mean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def table(groups):
    """Markdown: a row per group, before -> after of each accuracy."""
    keys = ["greedy", "sampled", "pass@8", "greedy_no_latents", "exit_rate", "greedy_heaviest", "zeroed", "averaged",
            "swapped", "length", "zero_advantage"]  # fmt: skip
    keys = [key for key in keys if any(key in run for group in groups.values() for run in group)]
    lines = ["| runs | seeds | steps | seconds | " + " | ".join(keys) + " |", "|---" * (len(keys) + 4) + "|"]
    for name, group in groups.items():
        cells = []
        for key in keys:
            after = [run[key] for run in group if key in run]
            before = [run[f"{key}_before"] for run in group if f"{key}_before" in run and key != "length"]
            arrow = f"{statistics.mean(before):.3f} → " if before else ""
            cells.append(arrow + spread(after) if len(after) == len(group) else "")
        seconds = f"{statistics.mean(run['seconds'] for run in group):.0f}"
        lines.append(f"| {name} | {len(group)} | {group[0]['steps']} | {seconds} | {' | '.join(cells)} |")
    return "\n".join(lines)


def figure(groups, path, over):
    """Two panels, mean and ± one std over seeds: noise-free accuracy and the reward of the rollouts."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {"greedy": "noise-free accuracy, held-out", "reward": "reward of training rollouts"}
    picture, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True, layout="constrained")
    for (key, title), axis in zip(panels.items(), axes, strict=True):
        for name, group in groups.items():
            curves = [{point[over]: point[key] for point in run["curve"] if key in point} for run in group]
            xs = sorted(set.intersection(*(set(curve) for curve in curves)))
            means = [statistics.mean(curve[x] for curve in curves) for x in xs]
            axis.plot(xs, means, label=f"{name} ({len(group)} seeds)")
            if len(group) > 1:
                stds = [statistics.stdev(curve[x] for curve in curves) for x in xs]
                low, high = ([m + sign * s for m, s in zip(means, stds, strict=True)] for sign in (-1, 1))
                axis.fill_between(xs, low, high, alpha=0.15)
        axis.set(title=title, xlabel=over, ylim=(0, 1.02))
        axis.grid(alpha=0.3)
    picture.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    picture.savefig(path, dpi=100)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Table and figure of finished runs: mean ± std over seeds.")
    parser.add_argument("runs", nargs="+", help="run folders, and .jsonl files with a run in every line")
    parser.add_argument("--figure", help="picture to write, .png or .pdf")
    parser.add_argument("--over", default="step", choices=["step", "texts"], help="horizontal axis of the figure")
    parser.add_argument("--jsonl", help="file to write, one line per run")
    args = parser.parse_args(argv)
    if args.figure and Path(args.figure).suffix not in (".png", ".pdf"):
        parser.error("--figure must end in .png or .pdf")
    groups = read_groups(args.runs)
    print(table(groups))
    if args.jsonl:
        lines = [json.dumps(run) for group in groups.values() for run in group]
        Path(args.jsonl).write_text("\n".join(lines) + "\n")
    if args.figure:
        figure(groups, args.figure, args.over)


if __name__ == "__main__":
    run_main(main)
