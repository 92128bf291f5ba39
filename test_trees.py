"""Proofs of trees.py and plot_trees.py: the second built-in task, its model, and what lepo.py makes of both.

    pytest test_trees.py            # a few seconds
    pytest test_trees.py -m slow    # runs to the end
"""

import argparse
import json
import os
import random

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test depends on a network
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported

import pytest
import torch
import torch.nn.functional as F

import common
import lepo
import plot_trees
import tiny
import trees

KINDS = ["2,2,4", "3,2,4", "2,3,10", "1,2,2"]
QUICK = ["--data", "trees", "--steps", "2", "--prompts_per_step", "4", "--eval_problems", "8", "--eval_samples", "2"]


@pytest.fixture(scope="module")
def lm():
    return common.load_model(argparse.Namespace(model="tiny_trees", device="cpu", compile=False))


def token(lm, node):
    return lm.tokenizer.encode(f" {node}")[0]


# --- 1. Problems ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_problems_are_what_was_asked_for(kind):
    depth, branching, count = trees.read_kind(kind)
    for i in range(100):
        edges, entrance, exits = problem = trees.make_problem(i, "test", kind=kind)
        assert trees.read_problem(trees.problem_text(*problem)) == problem
        children = {child for _, child in edges}
        (other,) = {parent for parent, _ in edges} - children - {entrance}
        assert len(children) == len(edges) and entrance not in children  # one parent each: two trees
        for root in (entrance, other):
            assert [len(level) for level in trees.levels(edges, root)] == [branching**d for d in range(depth + 1)]
        below = [node for node in exits if node in trees.levels(edges, entrance)[-1]]
        assert below == [trees.true_answer(*problem)] and len(set(exits)) == count
        assert set(exits) - set(below) <= set(trees.levels(edges, other)[-1])
    places = [trees.make_problem(i, kind=kind) for i in range(200)]
    assert {exits.index(trees.true_answer(*p)) for *p, exits in [(*q, q[2]) for q in places]} == set(range(count))


def test_training_and_held_out_streams_share_no_problem():
    held_out = {trees.problem_text(*trees.make_problem(i, "test")) for i in range(300)}
    training = {trees.problem_text(*trees.make_problem(i, "train", seed)) for i in range(150) for seed in (0, 1)}
    assert len(held_out) == 300 and len(training) == 300 and not held_out & training
    assert trees.make_problem(7) == trees.make_problem(7)
    ids, prompt = trees.training_batch(tiny.build_tokenizer(), random.Random(0), (2, 2, 4), 100, 1)
    texts = tiny.build_tokenizer().batch_decode(ids[:, :prompt])
    assert not any(trees.is_held_out(trees.read_problem(text)) for text in texts)


def test_the_student_is_right_in_7_of_16_problems():
    """1/4 + 3/4 * 1/4 by counting; the walk follows edges, and a leaf that is an exit is the answer."""
    rng, right, ends = random.Random(0), 0, set()
    for i in range(4000):
        edges, entrance, exits = problem = trees.make_problem(i % 500)
        *walk, mark, answer = trees.demonstration(rng, *problem).removesuffix("<eos>").split()
        walk, answer = [int(node) for node in walk], int(answer)
        assert walk[0] == entrance and mark == "</think>" and answer in exits
        assert set(zip(walk, walk[1:], strict=False)) <= set(edges) and walk[-1] in trees.levels(edges, entrance)[-1]
        assert walk[-1] not in exits or answer == walk[-1]
        right += answer == trees.true_answer(*problem)
        ends |= {(i % 500, walk[-1])}
    assert abs(right / 4000 - 7 / 16) < 4 * (7 / 16 * 9 / 16 / 4000) ** 0.5
    assert len(ends) > 0.85 * 500 * 4  # a walk may end at any leaf: 1 - (3/4)^8 = .90 of them have been seen


# --- 2. The model -----------------------------------------------------------------------------------------------------


def test_packed_walks_are_as_if_alone():
    """Logits of three walks in one row, under positions and mask of separate_walks, equal those of three rows."""
    model, tokenizer = trees.build_model(0).eval(), tiny.build_tokenizer()
    ids, prompt = trees.training_batch(tokenizer, random.Random(0), (2, 2, 4), 5, 3)
    position, mask = trees.separate_walks(ids.shape[1], prompt, 3)
    with torch.no_grad():
        packed = model(ids, position_ids=position, attention_mask=mask.expand(5, -1, -1, -1)).logits[:, prompt:]
        for i, walk in enumerate(ids[:, prompt:].chunk(3, dim=1)):
            alone = model(torch.cat([ids[:, :prompt], walk], 1)).logits[:, prompt:]
            assert torch.allclose(packed.chunk(3, dim=1)[i], alone, atol=1e-5)


def test_pretraining_learns_what_each_walk_says_next(monkeypatch):
    """Its first loss is that of the model's own next-token loss, row by row and walk by walk; then it falls."""
    model, tokenizer, losses = trees.build_model(0), tiny.build_tokenizer(), []
    ids, prompt = trees.training_batch(tokenizer, random.Random("trees 0"), (2, 2, 4), 4, 2)
    rows = [torch.cat([ids[:, :prompt], walk], 1) for walk in ids[:, prompt:].chunk(2, dim=1)]
    with torch.no_grad():
        words = [torch.where(torch.arange(row.shape[1]) < prompt, -100, row) for row in rows]  # -100: not learnt
        expected = sum(model(row, labels=label).loss for row, label in zip(rows, words, strict=True))
    backward = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: losses.append(loss.item()) or backward(loss))
    args = argparse.Namespace(seed=0, lr=0.02, steps=30, batch_size=4, walks=2, kind=(2, 2, 4), start="separate walks")
    trees.pretrain(model, tokenizer, args)
    assert losses[0] == pytest.approx(expected.item() / 2, abs=1e-4) and losses[-1] < 0.8 * losses[0]


def test_the_shipped_model_walks_at_random_in_words_and_everywhere_in_soft_tokens(lm):
    """Fed with the entrance it gives each child one half; fed with both children it gives weight to all four leaves."""
    children_weight, leaves_weight, balance = [], [], []
    for i in range(64):
        edges, entrance, exits = problem = trees.make_problem(i, "test")
        _, children, leaves = ([token(lm, node) for node in level] for level in trees.levels(edges, entrance))
        prompt = torch.tensor([lm.tokenizer.encode(trees.problem_text(*problem)) + [token(lm, entrance)]])
        both = lm.table[children].mean(0)[None, None]  # (1, 1, D)
        with torch.no_grad():
            embeds = torch.cat([F.embedding(prompt, lm.table), both], 1)
            probs = lm.model(inputs_embeds=embeds).logits[0, -2:].softmax(-1)  # after the entrance, after the mixture
        children_weight.append(probs[0, children])
        leaves_weight.append(probs[1, leaves].sum())
        balance.append(probs[1, leaves[:2]].sum())
    children_weight = torch.stack(children_weight)
    assert children_weight.sum(1).min() > 0.97 and (children_weight - 0.5).abs().mean() < 0.05
    assert torch.stack(leaves_weight).mean() > 0.8 and 0.3 < torch.stack(balance).mean() < 0.6


def test_before_training_soft_tokens_are_worth_more_than_words(lm):
    args = lepo.parse_args(["--data", "trees"])
    problems = common.take_problems(args, "test", 0, 256)
    prompts = [common.encode_prompt(lm.tokenizer, problem) for problem in problems]
    rolls = [lepo.rollout(lm, prompts, 1, args, None, latent_steps, noise_free=True) for latent_steps in (0, 3)]
    words, thoughts = (lepo.score(lm, roll, problems)[1].mean().item() for roll in rolls)
    assert words < 0.53 and thoughts > words + 0.2


def test_a_model_is_made_and_started_from(tmp_path, monkeypatch, capsys):
    quick = ["--steps", "2", "--batch_size", "4", "--walks", "2", "--out", str(tmp_path / "tiny_trees")]
    monkeypatch.setattr("sys.argv", ["trees.py", "--kind", "1,2,2", *quick])
    trees.main()
    monkeypatch.setattr("sys.argv", ["trees.py", "--kind", "3,2,4", "--start", str(tmp_path / "tiny_trees"), *quick])
    trees.main()
    assert capsys.readouterr().out.count("loss of each word of a walk") == 2
    assert lepo.parse_args(["--model", str(tmp_path / "tiny_trees")]).data == "trees"
    lepo.main([*QUICK, "--model", str(tmp_path / "tiny_trees"), "--out", str(tmp_path / "run"), "--kind", "3,2,4"])


# --- 3. lepo.py on it -------------------------------------------------------------------------------------------------


def test_the_task_brings_its_model_and_its_settings():
    args = lepo.parse_args(["--data", "trees"])
    assert (args.model, args.latent_steps, args.filter, args.kind) == ("tiny_trees", 3, "latent", "2,2,4")
    assert lepo.parse_args(["--data", "trees", "--tau", "1"]).tau == 1
    assert lepo.parse_args(["--model", "runs/lepo-tiny_trees-seed0/model"]).data == "trees"
    assert lepo.parse_args([]).data == "tiny" and lepo.parse_args(["--model", "x"]).filter == "all"


@pytest.mark.parametrize("kind", ["2,2", "2,2,6", "4,2,4", "mixed"])
def test_an_impossible_kind_is_one_line(kind, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        common.run_main(lambda: lepo.main([*QUICK, "--kind", kind, "--out", str(tmp_path / "run")]))
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and f"--kind {kind}" in error and "\n" not in error
    assert not (tmp_path / "run").exists()


def test_text_drawn_from_the_full_softmax_has_no_drift():
    """By enumeration of a text token whose rewards are all equal: with --filter latent its mean gradient is 0. With a
    filter, a constant negative advantage raises the words that are never drawn."""
    args = lepo.parse_args(["--data", "trees", "--top_k", "3", "--top_p", "1", "--latent_steps", "0"])
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0]], requires_grad=True)
    means = {}
    for args.filter in ("latent", "all"):
        candidates, log_l = lepo.support(logits.detach(), args, is_latent=False)
        log_pi = logits.log_softmax(-1)[0, candidates[0]]  # (K,) of the candidates, unfiltered: equation (5)
        expected = -(log_l[0].exp() * log_pi).sum()  # advantage -1
        (means[args.filter],) = torch.autograd.grad(expected, logits)
    assert means["latent"].abs().max() < 1e-6
    assert means["all"][0, 3:].min() > 0.01 and means["all"][0, :3].max() < 0  # gradient ascent
    assert lepo.support(logits, args, is_latent=True)[0].shape == (1, 3)


def test_a_rollout_filters_latents_and_not_text(lm):
    """With top_k 1 all rollouts of a prompt are equal; with --filter latent their latents are, and texts differ."""
    problems = common.take_problems(lepo.parse_args(["--data", "trees"]), "test", 0, 4)
    prompts = [common.encode_prompt(lm.tokenizer, problem) for problem in problems]
    for chosen in ("all", "latent"):
        args = lepo.parse_args(["--data", "trees", "--top_k", "1", "--filter", chosen])
        roll = lepo.rollout(lm, prompts, 8, args, torch.Generator().manual_seed(0), 3)
        tokens = roll.tokens.view(4, 8, -1)
        assert (tokens[:, :, :3] == tokens[:, :1, :3]).all() and (roll.weights[:, :3] == 1).all()
        assert (tokens == tokens[:, :1]).all() == (chosen == "all")


def test_thoughts_are_looked_into(tmp_path, lm, capsys):
    for name, flags in (("grpo", ["--latent_steps", "0"]), ("lepo", [])):
        lepo.main([*QUICK, "--eval_problems", "24", *flags, "--out", str(tmp_path / f"{name}-seed0")])
    capsys.readouterr()
    lines, picture = tmp_path / "lines.jsonl", tmp_path / "trees.png"
    folders = [str(tmp_path / "grpo-seed0"), str(tmp_path / "lepo-seed0")]
    plot_trees.main([*folders, "--problem", "5", "--figure", str(picture), "--jsonl", str(lines)])
    printed = capsys.readouterr().out
    grpo, run = map(json.loads, lines.read_text().splitlines())
    assert "held" not in grpo and "| held |" in printed and picture.stat().st_size > 10_000
    args, held, right = lepo.parse_args(QUICK), [], []
    for i in range(24):  # the shipped model's thoughts, one by one and as words
        problem = common.take_problems(args, "test", i, 1)[0]
        roll = lepo.rollout(lm, [common.encode_prompt(lm.tokenizer, problem)], 1, args, None, 3, noise_free=True)
        words = [lm.tokenizer.decode([k]).strip() for k in roll.ids[0, 2].tolist()]
        weights = dict(zip(words, roll.weights[0, 2].tolist(), strict=True))
        held.append(weights.get(problem.answer, 0) >= 0.02)
        right.append(lepo.score(lm, roll, [problem])[1].item())
        if i == 5:
            assert run["thought"]["before"]["latents"][2] == pytest.approx(weights, abs=1e-5)
            assert run["thought"]["answer"] == problem.answer
    assert run["held_before"] == pytest.approx(sum(held) / 24, abs=1e-4)
    assert run["greedy_before"] == pytest.approx(sum(right) / 24, abs=1e-4)
    kept = [r for r, h in zip(right, held, strict=True) if h]
    assert run["right_held_before"] == pytest.approx(sum(kept) / len(kept), abs=1e-4)
    plot_trees.main([str(lines), "--figure", str(picture)])
    assert capsys.readouterr().out == printed


def test_paired_interval():
    """Gains .1, .2, .3, .4, .5: mean .3, standard error .0707, and Student's t for 95 % and 4 degrees is 2.776."""
    def group(*values):
        return [{"seed": seed, "greedy": value, "sampled": 0.5} for seed, value in enumerate(values)]

    lines = plot_trees.paired({"grpo": group(*[0.4] * 5), "lepo": group(0.5, 0.6, 0.7, 0.8, 0.9), "few": group(0.5)})
    assert lines.splitlines()[0] == "lepo - grpo, greedy: +0.300, 95 % interval +0.104 to +0.496"
    assert len(lines.splitlines()) == 2


@pytest.mark.slow
def test_lepo_ends_far_above_grpo(tmp_path, capsys):
    scores = []
    for name, flags in (("grpo", ["--latent_steps", "0"]), ("lepo", [])):
        lepo.main(["--data", "trees", "--steps", "60", "--eval_problems", "512", *flags, "--out", str(tmp_path / name)])
        scores.append(json.loads(capsys.readouterr().out.strip().splitlines()[-1]))
    grpo, thinking = scores
    assert grpo["greedy"] < 0.6 and thinking["greedy"] > grpo["greedy"] + 0.14
    assert thinking["sampled"] > grpo["sampled"] + 0.14 and thinking["sampled"] > thinking["sampled_before"] + 0.2
