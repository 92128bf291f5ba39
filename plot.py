"""Table and figure of finished runs.

    python plot.py runs/*                             # a table: mean ± std over the seeds of each group of runs
    python plot.py runs/* --figure curves.png         # and learning curves
    python plot.py runs/* --figure curves.png --over rollouts      # over texts sampled, not over steps

A run folder holds log.jsonl and result.json. Folders whose names differ only in `-seed<n>` form a group, and their runs
must differ in nothing else.
"""

import json
import re
import statistics
from pathlib import Path

from common import Parser, UserError, run_main


def read_groups(folders):
    """-> {group name: [(log rows, result)]}; folders without a result (unfinished runs) are passed over."""
    groups = {}
    for folder in map(Path, folders):
        if (folder / "result.json").exists():
            rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
            name = re.sub(r"-seed\d+", "", folder.name)
            groups.setdefault(name, []).append((rows, json.loads((folder / "result.json").read_text())))
    if not groups:
        raise UserError("none of these folders holds a finished run (result.json)")
    for name, runs in groups.items():
        settings = [result["args"] for _, result in runs]
        unlike = {key for one in settings for key in one if key != "seed" and one[key] != settings[0].get(key)}
        if unlike:
            raise UserError(f"runs named {name} differ in {', '.join(sorted(unlike))}: give each setting its own name")
    return groups


def spread(values):
    """'0.981 ± 0.004' over seeds, the unbiased standard deviation; a single run has none."""
    mean = f"{statistics.mean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def table(groups):
    """Markdown: a row per group, before -> after of each accuracy."""
    first = next(iter(groups.values()))[0][1]
    passes = [key for key in first if re.fullmatch(r"pass@\d+", key)]
    keys = ["greedy", "sampled", *passes, "greedy_flexible", "greedy_no_latents", "exit_rate", "greedy_heaviest",
            "zeroed", "averaged", "swapped"]  # fmt: skip
    keys = [key for key in keys if any(key in result for runs in groups.values() for _, result in runs)]
    lines = ["| runs | seeds | steps | seconds | " + " | ".join(keys) + " | length |", "|---" * (len(keys) + 5) + "|"]
    for name, runs in sorted(groups.items()):
        results = [result for _, result in runs]
        seconds = f"{statistics.mean(r['seconds'] for r in results):.0f}"
        cells = [f"{statistics.mean(r[f'{key}_before'] for r in results):.3f} → {spread([r[key] for r in results])}"
                 if all(key in r for r in results) else "" for key in keys]  # fmt: skip
        length = spread([r["length"] for r in results])
        lines.append(f"| {name} | {len(runs)} | {results[0]['steps']} | {seconds} | {' | '.join(cells)} | {length} |")
    return "\n".join(lines)


def sampled_texts(rows, result):
    """How many texts a run had sampled after each step, 0, 1, … -> list. Steps of a stage 1 sample none."""
    counts, batch = [0], result["args"]["prompts_per_step"] * result["args"]["group_size"]
    for row in rows:
        counts.append(row.get("main_decodes", counts[-1] + row.get("rollouts", batch)))
    return counts


def figure(groups, path, over):
    """Two panels, mean and ± one std over seeds: noise-free accuracy and the reward of the rollouts. `over` steps or
    rollouts."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [("greedy", "noise-free accuracy, held-out"), ("reward", "reward of training rollouts (mean of 5 steps)")]
    picture, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True, layout="constrained")
    for (key, title), axis in zip(panels, axes, strict=True):
        for name, runs in sorted(groups.items()):
            curves = []
            for rows, result in runs:
                curve = {row["step"] + 1: row[key] for row in rows if key in row}
                if key == "greedy":
                    curve |= {0: result["greedy_before"], result["steps"]: result["greedy"]}
                else:
                    values = [curve[step] for step in sorted(curve)]
                    curve = {i + 1: statistics.mean(values[max(0, i - 4) : i + 1]) for i in range(len(values))}
                if over == "rollouts":
                    counts = sampled_texts([row for row in rows if "reward" in row], result)
                    curve = {counts[step]: value for step, value in curve.items() if step >= 0}
                curves.append(curve)
            steps = sorted(set.intersection(*(set(curve) for curve in curves)))
            means = [statistics.mean(curve[s] for curve in curves) for s in steps]
            axis.plot(steps, means, label=f"{name} ({len(runs)} seeds)")
            if len(curves) > 1:
                stds = [statistics.stdev(curve[s] for curve in curves) for s in steps]
                low, high = ([m + sign * s for m, s in zip(means, stds, strict=True)] for sign in (-1, 1))
                axis.fill_between(steps, low, high, alpha=0.15)
        axis.set(title=title, xlabel=over, ylim=(0, 1.02))
        axis.grid(alpha=0.3)
    picture.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    picture.savefig(path, dpi=120)


def main(argv=None):
    parser = Parser(description="Table and figure of finished runs: mean ± std over the seeds of each group.")
    parser.add_argument("folders", nargs="+", help="run folders")
    parser.add_argument("--figure", help="picture to write, .png or .pdf")
    parser.add_argument("--over", default="steps", choices=["steps", "rollouts"], help="of the figure [steps]")
    args = parser.parse_args(argv)
    if args.figure and Path(args.figure).suffix not in (".png", ".pdf"):
        raise UserError("--figure must end in .png or .pdf")
    groups = read_groups(args.folders)
    print(table(groups))
    if args.figure:
        figure(groups, args.figure, args.over)
        print(f"wrote {args.figure}")


if __name__ == "__main__":
    run_main(main)
