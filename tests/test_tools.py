"""Proofs of tools/: table and figures of runs, and what bench.py compares; a quarter of a minute"""

import json
import os
import shutil
import statistics
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test depends on a network
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported: gradients are compared on a CPU

import matplotlib.figure
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import latent_grpo
import lepo
from tasks import encoding, trees
from tools import bench, plot

HERE = Path(__file__).parent.parent
QUICK = ["--steps", "1", "--prompts_per_step", "2", "--group_size", "2", "--eval_every", "0"]
TREES = ["--task", "trees", "--eval_problems", "24", "--lr", "0.001", *QUICK]


@pytest.fixture
def axes(monkeypatch):
    """What is drawn: {place in the picture: axis} of the last figure"""
    seen = {}
    original = matplotlib.figure.Figure.subplot_mosaic

    def subplot_mosaic(figure, *inputs):
        found = original(figure, *inputs)
        seen.clear()
        seen.update(found)
        return found

    monkeypatch.setattr(matplotlib.figure.Figure, "subplot_mosaic", subplot_mosaic)
    return seen


def make_run(folder, name, greedy, method="grpo", **changed):
    """A run folder with an evaluation before training, after two steps of three, and at the end"""
    args = {"prompts_per_step": 2, "group_size": 4, "seed": int(name[-1]), "steps": 3, "lr": 1}
    scores = {"greedy_before": 0.125, "greedy": greedy, "sampled": 0.5, "greedy_length": 8.0}
    result = {"method": method, "seconds": 7, **scores, "args": args | changed}
    rows = [{"step": step, "reward": 0.5, "zero_advantage": 0.25} for step in range(3)]
    rows[1]["greedy"] = 0.25
    run = folder / name
    run.mkdir(parents=True)
    (run / "log.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (run / "result.json").write_text(json.dumps(result))
    return str(run)


@pytest.fixture
def folders(tmp_path):
    scores = {"a-seed0": 0.5, "a-seed1": 0.75, "a-seed2": 1.0, "b-seed0": 0.375}
    return [make_run(tmp_path, name, greedy) for name, greedy in scores.items()]


def stop_of(capsys, *argv):
    """Exit code and what plot.py says when it refuses something"""
    with pytest.raises(SystemExit) as stop:
        common.run_main(lambda: plot.main([str(word) for word in argv]))
    return stop.value.code, capsys.readouterr().err.strip()


# --- 1. Runs and the table ------------------------------------------------------------------------


def test_the_table_is_that_of_the_runs(folders, tmp_path, capsys):
    lines = tmp_path / "runs.jsonl"
    plot.main([*folders, "--jsonl", str(lines)])
    printed = capsys.readouterr().out
    header, _, a, b = printed.splitlines()
    names = "runs | seeds | steps | seconds | greedy | sampled | length | zero_advantage"
    assert header == f"| {names} |"
    a_greedy = "0.125 → 0.750 ± 0.250"
    assert a == f"| a | 3 | 3 | 7 | {a_greedy} | 0.500 ± 0.000 | 8.000 ± 0.000 | 0.250 ± 0.000 |"
    assert b == "| b | 1 | 3 | 7 | 0.125 → 0.375 | 0.500 | 8.000 | 0.250 |"
    plot.main([str(lines)])
    assert capsys.readouterr().out == printed
    plot.main([str(lines), "--only", "^b"])
    assert "| a |" not in capsys.readouterr().out


def test_the_curve_has_steps_texts_and_accuracy(folders, tmp_path, axes):
    lines, picture = tmp_path / "runs.jsonl", tmp_path / "curves.png"
    flags = ["--jsonl", str(lines), "--figure", str(picture)]
    plot.main([*folders, *flags, "--over", "texts"])
    run = json.loads(lines.read_text().splitlines()[1])
    assert [tuple(point.values()) for point in run["curve"]] == [
        (0, 0, 0.125),
        (2, 16, 0.25),
        (3, 24, 0.75),
    ]
    a, b = axes["c"].lines
    assert a.get_xydata().tolist() == [[0, 0.125], [16, 0.25], [24, 0.75]]  # the mean of three
    assert b.get_xydata().tolist() == [[0, 0.125], [16, 0.25], [24, 0.375]]
    assert picture.stat().st_size > 5000


def test_lines_of_old_runs_are_read(tmp_path, capsys):
    """They say length, and their flags name data instead of a task."""
    lines, names = str(HERE / "results/archive/former.jsonl"), "^former/(grpo|trees-lepo)-seed"
    plot.main([lines, "--only", names])
    printed = capsys.readouterr().out
    assert "| former/grpo | 5 | 100 | 61 | 0.506 → 1.000 ± 0.000 |" in printed
    assert "| 22.672 → 22.672 ± 0.000 |" in printed
    assert "| 0.885 → 0.924 ± 0.008 | 0.834 → 0.918 ± 0.001 | 0.161 → 0.112 ± 0.023 |" in printed


def test_a_run_that_is_given_twice_counts_once(folders, tmp_path, capsys):
    lines = tmp_path / "runs.jsonl"
    plot.main([*folders, "--jsonl", str(lines)])
    once = capsys.readouterr().out
    for twice in ([*folders, *folders], [*folders, lines], [lines, *folders], [lines, lines]):
        plot.main(list(map(str, twice)))
        assert capsys.readouterr().out == once
    plot.main([f"{folders[3]}/", folders[3]])
    assert "| b | 1 |" in capsys.readouterr().out


def test_an_unfinished_run_is_passed_over(folders, tmp_path, capsys):
    """One without a result, and one whose result is older than its log."""
    (tmp_path / "a-seed3").mkdir()
    (tmp_path / "a-seed3/log.jsonl").write_text('{"step": 0}\n')
    with open(f"{folders[2]}/log.jsonl", "a") as log:
        print('{"step": 3, "reward": 0.5, "zero_advantage": 0.5}', file=log)
    plot.main([*folders, str(tmp_path / "a-seed3")])
    assert "| a | 2 | 3 | 7 | 0.125 → 0.625 ± 0.177 |" in capsys.readouterr().out


def test_a_run_of_no_steps_is_finished(tmp_path, capsys):
    run = make_run(tmp_path, "a-seed0", 0.5, steps=0)
    (tmp_path / "a-seed0/log.jsonl").write_text("")
    plot.main([run])
    assert "| a | 1 | 0 | 7 | 0.125 → 0.500 |" in capsys.readouterr().out


def test_runs_of_one_name_must_not_differ(folders, tmp_path, capsys):
    alike = dict(out="elsewhere", resume="x", device="cuda", ask="?", save_every=5)
    same = make_run(tmp_path, "a-seed4", 0.5, **alike)
    plot.main([*folders, same])
    assert "| a | 4 |" in capsys.readouterr().out
    other = make_run(tmp_path, "a-seed5", 0.5, lr=2)
    code, error = stop_of(capsys, *folders, other)
    assert code == 2 and "runs named a differ in lr" in error
    more = make_run(tmp_path, "a-seed6", 0.5, tau=1)
    assert "differ in tau" in stop_of(capsys, *folders, more)[1]
    assert "differ in tau" in stop_of(capsys, more, *folders)[1]


def test_blank_lines_are_skipped_and_half_a_line_is_one_line(folders, tmp_path, capsys):
    lines = tmp_path / "runs.jsonl"
    plot.main([*folders, "--jsonl", str(lines)])
    printed = capsys.readouterr().out
    text = lines.read_text()
    assert text.endswith("}\n")
    lines.write_text(text.replace("\n", "\n\n \n"))
    plot.main([str(lines)])
    assert capsys.readouterr().out == printed
    lines.write_text(text[:-20])
    code, error = stop_of(capsys, lines)
    assert code == 2 and "\n" not in error and f"{lines} has a line" in error
    log = Path(folders[0]) / "log.jsonl"
    log.write_text(log.read_text()[:-9])
    code, error = stop_of(capsys, *folders)
    assert code == 2 and "\n" not in error and f"{log} has a line" in error


@pytest.mark.parametrize(
    "flags, part",
    [
        (["--only", "(a"], "regular expression"),
        (["--only", "^c"], "no finished run"),
        (["--figure", "curves.jpgg"], "jpgg"),
        (["--thought", "thought.png"], "--thought"),
    ],
)
def test_what_cannot_be_done_is_one_line(folders, flags, part, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, error = stop_of(capsys, *folders, *flags)
    assert code == 2 and "\n" not in error and part in error


def test_gains_are_paired_by_seed(capsys):
    """.1 to .5: mean .3, standard error .0707, and Student's t for 95 % and 4 degrees is 2.776."""

    def group(*scores):
        return [{"seed": i, "greedy": score, "sampled": 0.5} for i, score in enumerate(scores)]

    base = group(0.4, 0.5, 0.4, 0.4, 0.4)
    ours = group(0.5, 0.7, 0.7, 0.8, 0.9)
    others = [run | {"seed": run["seed"] + 1} for run in ours]
    without = [{"seed": i, "greedy": 0.4} for i in range(5)]
    groups = {"grpo": base, "lepo": ours, "few": ours[:4], "others": others, "sft": without}
    plot.print_gains(groups)
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == "lepo - grpo, greedy: +0.300, 95 % interval +0.104 to +0.496"
    assert [line.split(":")[0] for line in rest] == ["lepo - grpo, sampled", "sft - grpo, greedy"]
    plot.print_gains({"bench": [{"name": "bench"}]} | groups)
    assert "bench" not in capsys.readouterr().out


# --- 2. Thoughts ----------------------------------------------------------------------------------


@pytest.fixture
def trees_run(tmp_path):
    """Its folder, which has moved since the training"""
    lepo.main([*TREES, "--out", str(tmp_path / "there")])
    return shutil.move(tmp_path / "there", tmp_path / "lepo-seed0")


def one_by_one(model):
    """Held-out trees alone, each as a dictionary: the last latent in words, and if it is right"""
    args = lepo.parse_args([*TREES, "--model", str(model)])
    lm = common.load_model(args)
    found = []
    for i in range(24):
        problem = trees.problems(args, "test", i, 1)[0]
        encoded = encoding.encode(lm, trees, [problem], args)
        roll = lepo.rollout(lm, encoded, 1, 3, args, noise_free=True)
        words = [lm.tokenizer.decode([k]).strip() for k in roll.ids[0, 2].tolist()]
        latent = dict(zip(words, roll.weights[0, 2].tolist(), strict=True))
        (text,) = lepo.texts_of(lm, roll)
        held = latent.get(problem.answer, 0) >= 0.02
        right = trees.verify(text, problem)[0]
        found.append({"latent": latent, "text": text, "held": held, "right": right})
    return found


def test_thoughts_on_trees_are_looked_into(trees_run, tmp_path, axes, capsys):
    grpo = make_run(tmp_path, "grpo-seed0", 0.5)
    lines, picture = tmp_path / "lines.jsonl", tmp_path / "trees.png"
    plot.main([grpo, str(trees_run), "--problem", "5", "--jsonl", str(lines)])
    printed = capsys.readouterr().out
    other, run = map(json.loads, lines.read_text().splitlines())
    assert "held" not in other and "| held | right_held | right_lost |" in printed
    models = {"_before": HERE / "tasks/models/trees", "": trees_run / "model"}
    for suffix, model in models.items():
        alone = one_by_one(model)
        held = [thought["right"] for thought in alone if thought["held"]]
        lost = [thought["right"] for thought in alone if not thought["held"]]
        assert 0 < len(lost) < 24
        assert run[f"held{suffix}"] == pytest.approx(len(held) / 24, abs=1e-4)
        assert run[f"right_held{suffix}"] == pytest.approx(statistics.mean(held), abs=1e-4)
        assert run[f"right_lost{suffix}"] == pytest.approx(statistics.mean(lost), abs=1e-4)
        thought = run["thought"]["before" if suffix else "after"]
        latent = {word.strip(): weight for word, weight in thought["latents"][2].items()}
        assert latent == pytest.approx(alone[5]["latent"], abs=1e-5)
        assert thought["text"] == alone[5]["text"]
    problem = trees.problems(lepo.parse_args(TREES), "test", 5, 1)[0]
    assert run["thought"]["question"] == problem.question
    assert run["thought"]["answer"] == problem.answer
    assert run["thought"]["before"]["latents"] != run["thought"]["after"]["latents"]
    shutil.rmtree(trees_run)  # a line with its thought needs no folder
    plot.main([str(lines), "--thought", str(picture)])
    assert capsys.readouterr().out == printed
    check_trees(problem.question, axes["t"])
    assert len(axes["c"].lines) == 2 and picture.stat().st_size > 10_000


def check_trees(question, axis):
    """Every node once, children below their parents, exits red, the entrance on the left"""
    edges, entrance, exits = trees.read_problem(question)
    places = {int(text.get_text()): text.get_position() for text in axis.texts}
    red = {int(text.get_text()) for text in axis.texts if text.get_color() == "red"}
    assert set(places) == {node for edge in edges for node in edge} and len(axis.texts) == 14
    assert red == set(exits)
    for parent, child in edges:
        assert places[child][1] == places[parent][1] - 1
    assert sorted(places, key=lambda node: (-places[node][1], places[node][0]))[0] == entrance
    lines = {tuple(map(tuple, line.get_xydata().tolist())) for line in axis.lines}
    assert lines == {(places[parent], places[child]) for parent, child in edges}


def test_a_thought_of_lepo_on_chains_is_a_picture(tmp_path, axes):
    """After a training that has made the chains model into chains_latent"""
    args = vars(lepo.parse_args(["--steps", "3"])) | {"device": "cpu"}
    run = make_run(tmp_path, "lepo-seed0", 0.5, method="lepo", **args)
    shutil.copytree(HERE / "tasks/models/chains_latent", f"{run}/model")
    lines, picture = tmp_path / "lines.jsonl", tmp_path / "thought.pdf"
    plot.main([run, "--thought", str(picture), "--jsonl", str(lines)])
    run = json.loads(lines.read_text())
    assert "held" not in run and "t" not in axes and picture.read_bytes()[:4] == b"%PDF"
    for when, count in (("before", 12), ("after", 6)):  # the second ends its text while it thinks
        latents = run["thought"][when]["latents"]
        assert len(latents) == count
        words = [label.get_text() for label in axes[when[0]].get_xticklabels()]
        shades = axes[when[0]].collections[0].get_array().tolist()
        heavy = {word for latent in latents for word in latent if latent[word] > 0.1}
        ticks = [word for word in words if "\u2713" in word]
        words = [word.removesuffix("\n\u2713") for word in words]
        assert [tick.split()[0] for tick in ticks] == [run["thought"]["answer"]]
        assert heavy <= set(words) and len(words) == len(set(words))
        for row, latent in zip(shades, latents, strict=True):
            assert row == pytest.approx([latent.get(word, 0) for word in words])


def test_a_thought_of_latent_grpo_is_a_picture(tmp_path, axes):
    """What plot.py says of it is checked against the model's own first step behind the prompt."""
    folder = tmp_path / "latent-seed0"
    latent_grpo.main([*QUICK, "--eval_problems", "2", "--max_draws", "1", "--out", str(folder)])
    lines, picture = tmp_path / "lines.jsonl", tmp_path / "thought.png"
    flags = ["--thought", str(picture), "--problem", "3", "--jsonl", str(lines)]
    plot.main([str(folder), *flags])
    thought = json.loads(lines.read_text())["thought"]
    assert picture.stat().st_size > 5000 and set(axes) == {"a", "b", "c"}
    models = {"before": HERE / "tasks/models/chains_latent", "after": folder / "model"}
    for when, path in models.items():
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path).eval()
        ids = torch.tensor([tokenizer.encode(f" {thought['question']} ? <think>")])
        with torch.no_grad():
            logits = model(ids).logits[0, -1]  # (V,)
        probs, ids = logits.softmax(-1).topk(10)
        latent = dict(zip(map(tokenizer.decode, ids), (probs / probs.sum()).tolist(), strict=True))
        assert thought[when]["latents"][0] == pytest.approx(latent, abs=1e-5)
        assert "</think>" in thought[when]["text"]
        heaviest = [max(row, key=row.get) for row in thought[when]["latents"]]
        assert " </think>" not in heaviest  # that would have been the end of the thought
    assert thought["before"]["latents"] != thought["after"]["latents"]


# --- 3. bench.py ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench_inputs():
    """Settings, model, and the prompts of three problems of different lengths"""
    args = bench.parse_args(["--prompts_per_step", "3", "--group_size", "3", "--repeats", "3"])
    lm = common.load_model(args)
    problems = bench.tasks.find("chains").problems(args, "train", 0, 3)
    encoded = encoding.encode(lm, bench.tasks.find("chains"), problems, args)
    assert len(set(map(len, encoded))) > 1
    return args, lm, encoded


def test_both_updates_have_one_gradient(bench_inputs):
    args, lm, encoded = bench_inputs
    torch.manual_seed(0)
    roll = lepo.rollout(lm, encoded, 3, args.latent_steps, args)
    advantages = torch.randn(3, 3)
    ours = bench.make_update(lepo.update, lm, roll, advantages, args)
    naive = bench.make_update(bench.naive_update, lm, roll, advantages, args)
    assert len(set(roll.length.tolist())) > 1  # so there is padding on the right, too
    assert bench.gradient_distance(lm, ours, naive) < 1e-3
    other = bench.make_update(bench.naive_update, lm, roll, advantages.roll(1, 0), args)
    assert bench.gradient_distance(lm, ours, other) > 0.1
    large = bench.make_update(lepo.update, lm, roll, 100 * advantages, args)
    ratio = bench.gradient(lm, large).norm() / bench.gradient(lm, ours).norm()
    assert ratio.item() == pytest.approx(100, rel=1e-3)  # not that of the bounded gradients


def test_generate_makes_what_it_counts(bench_inputs, monkeypatch):
    """Draws from the full softmax, as ours; the end token counts, what is behind it does not."""
    args, lm, encoded = bench_inputs
    original, seen = lm.model.generate, []

    def generate(*inputs, **flags):
        seen.append(original(*inputs, **flags))
        return seen[-1]

    monkeypatch.setattr(lm.model, "generate", generate)
    count = bench.generate(lm.model, lm, encoded, args)
    columns = max(map(len, encoded))
    lengths = []
    for row in seen[0][:, columns:].tolist():
        ends = [t for t, token in enumerate(row) if token in lm.stop_ids.tolist()]
        lengths.append(ends[0] + 1 if ends else len(row))
    assert len(lengths) == 9 and count == sum(lengths)


def test_the_figure_is_the_median_of_the_turns_after_the_first(bench_inputs, monkeypatch, capsys):
    clock = iter([0, 9, 0, 1, 0, 2, 0, 1, 0, 4, 0, 1])  # a takes 9, 2, 4 seconds, b always 1
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    turns = bench.take_turns({"a": lambda: "x", "b": lambda: "y"}, bench_inputs[0])
    assert turns == {"a": [(2, "x"), (4, "x")], "b": [(1, "y"), (1, "y")]}
    assert bench.report("step", bench.median_seconds(turns)) == {"a": 3, "b": 1}
    assert "| a | 3 | 1.00 |\n| b | 1 | 0.33 |" in capsys.readouterr().out


def test_flags_are_those_of_lepo(capsys):
    args = bench.parse_args(["--task", "trees", "--tau", "3", "--parts", "update", "step"])
    assert (args.task, args.tau, args.parts, args.repeats) == ("trees", 3, ["update", "step"], 5)
    assert bench.without_latents(args).latent_steps == 0
    for wrong in (["--parts", "all"], ["--repeats", "1"], ["--nonsense", "1"]):
        with pytest.raises(SystemExit):
            bench.parse_args(wrong)
