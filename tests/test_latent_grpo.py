"""Proofs of latent_grpo.py, to be read beside it: every formula against something that does not
share its code, in the order of its sections.

    pytest tests/test_latent_grpo.py            # a quarter of a minute
    pytest tests/test_latent_grpo.py -m slow    # whole runs

Monte-Carlo tests have fixed seeds and bounds of 4 standard errors or more; tests of fit p = .001.
"""

import collections
import contextlib
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test needs a network
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported: runs are equal on a CPU only

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Gumbel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
from transformers.generation import TopPLogitsWarper

import common
import latent_grpo
import test_lepo
import tasks
from tasks import encoding, gsm8k
from test_lepo import assert_close, rows_of, seed_all, watch

HERE = Path(__file__).parents[1]
START = HERE / "tasks/models/chains_latent"
SHARED = HERE.parent / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no real tokenizer and data there")
PI = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])  # a policy over five tokens
EXIT = 2
PROMPTS = test_lepo.PROMPTS  # three, of different lengths


def settings(**changed):
    """What the functions of latent_grpo.py read: the paper's method on four candidates."""
    values = dict(top_k=4, top_p=0.95, noise="one_sided", noise_scale=1.0, surrogate="mean")
    values |= dict(overlong="exclude", first_token="off", max_new_tokens=10, max_draws=1)
    values |= dict(group_size=4, prompts_per_step=3, device="cpu")
    return SimpleNamespace(**values | changed)


def random_model(vocabulary=12, seed=0, scale=6.0):
    """A small Qwen2 whose attention depends on what it sees; its only table is frozen."""
    lm = test_lepo.random_model(vocabulary, seed, scale)
    for name, weight in lm.model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            weight.data.mul_(8)
    lm.embedding.requires_grad = False
    lm.exit_id = EXIT
    return lm


def roll_out(lm, args, group_size=4, prompts=PROMPTS, latent_steps=10, noise_free=False, seed=0):
    torch.manual_seed(seed)
    return latent_grpo.rollout(lm, prompts, group_size, latent_steps, args, noise_free)


def masks(roll):
    """Executed steps and latents, (N, T) bool each"""
    step = torch.arange(roll.ids.shape[1])
    return step < roll.length[:, None], step < roll.latents[:, None]


def policy(lm, roll, n, group_size=4):
    """log pi of row n by the model's own pass over its mixtures, alone -> (steps executed, V)"""
    steps = roll.length[n]
    ids, weights = roll.ids[n, :steps], roll.weights[n, :steps]  # (steps, K)
    dense = torch.zeros(steps, 12).scatter_add(-1, ids, weights)
    prompt = roll.prompts[n // group_size]
    embeds = torch.cat([lm.embedding[prompt], dense[:-1] @ lm.embedding])[None]
    return lm.model(inputs_embeds=embeds).logits[0, len(prompt) - 1 :].log_softmax(-1)


def log_prob(lm, roll, n, how="mean", group_size=4):
    """Equation (5) for row n by torch's Gumbel density -> (steps executed,)"""
    steps = roll.length[n]
    log_pi = policy(lm, roll, n, group_size).gather(-1, roll.ids[n, :steps])  # (steps, K)
    latent = torch.arange(steps) < roll.latents[n]
    scores = torch.where(latent[:, None], roll.scores[n, :steps], 0)
    density = Gumbel(log_pi, torch.ones(4)).log_prob(scores)
    share = roll.weights[n, :steps] if how == "weighted" else 0.25
    return torch.where(latent, (share * density).sum(-1), log_pi[:, 0])


def groups_of(roll, seed=0):
    """What dynamic sampling hands on, with made-up advantages: a list of groups of four"""
    length = roll.length.view(-1, 4)
    advantages = torch.randn(length.shape, generator=torch.Generator().manual_seed(seed))
    return [(roll, n, advantages[n], length[n]) for n in range(len(length))]


def trained(lm):
    return {name: weight for name, weight in lm.model.named_parameters() if weight.requires_grad}


def optimizer_of(lm, lr):
    return torch.optim.SGD(trained(lm).values(), lr=lr)


def gradients(lm, groups, args):
    """What latent_grpo.update computes before it bounds the norm. The weights stay as they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.ones(()))
        latent_grpo.update(lm, optimizer_of(lm, 0.0), groups, args)
    return {name: weight.grad.clone() for name, weight in trained(lm).items()}


def by_hand(lm, groups, how="mean", silent=()):
    """The gradient of (6), a row at a time. silent: (group, rollout) without their first step"""
    lm.model.zero_grad()
    all_steps = sum(int(length.sum()) for *_, length in groups)
    for i, (roll, group, advantage, _) in enumerate(groups):
        for n in range(4):
            steps = log_prob(lm, roll, 4 * group + n, how)
            counted = steps[1:] if (i, n) in silent else steps
            (-advantage[n] * counted.sum() / all_steps).backward()
    return {name: weight.grad.clone() for name, weight in trained(lm).items()}


# --- 2. The soft token ----------------------------------------------------------------------------


def draws(n=100_000, **changed):
    """n soft tokens at one state, with all five tokens -> log pi, scores (n, 5), ordered as PI"""
    torch.manual_seed(0)
    log_pi = PI.log().expand(n, -1)
    args = settings(top_k=5, top_p=1.0, **changed)
    ids, scores = latent_grpo.soft_token(log_pi + 7, 99, args, noise_free=False)
    assert (scores.diff() <= 0).all()  # the heaviest first
    return log_pi, scores.gather(-1, ids.argsort(-1))


def noise_of(**changed):
    log_pi, scores = draws(**changed)
    return (scores - log_pi).double().round(decimals=4).flatten()


def test_the_noise_is_gumbel_clipped_and_shifted():
    one, two = noise_of(noise="one_sided"), noise_of(noise="two_sided")
    assert (two.min(), two.max(), one.min(), one.max()) == (-1.5, 3, 0, 4.5)
    assert torch.allclose(one, two + 1.5, atol=1e-3)
    assert torch.allclose(noise_of(noise_scale=0.5), one / 2, atol=1e-3)
    chance = Gumbel(0.0, 1.0).cdf(torch.tensor([-1.5, -1.0, 0.0, 1.0, 2.0, 2.999]))
    share = [(two <= x).double().mean() for x in (-1.5, -1.0, 0.0, 1.0, 2.0, 2.999)]
    error = (chance * (1 - chance) / len(two)).sqrt()
    assert ((torch.tensor(share) - chance).abs() < 4 * error).all()


@pytest.mark.parametrize("top_p, likeliest", [(0.95, 20), (0.5, 20), (1e-6, 20), (1.0, 8)])
def test_candidates_are_those_of_the_usual_filter(top_p, likeliest, monkeypatch):
    """Equation (1) against transformers' own warper, which works on all of the vocabulary."""
    monkeypatch.setattr(latent_grpo, "LIKELIEST", likeliest)
    logits = torch.randn(50, 20, generator=torch.Generator().manual_seed(0)) * 2
    ids, log_probs = latent_grpo.candidates(logits, settings(top_p=top_p))
    ours = torch.full_like(logits, -math.inf).scatter(-1, ids, log_probs)
    kept = TopPLogitsWarper(top_p, min_tokens_to_keep=4)(None, logits) if top_p < 1 else logits
    least = logits.sort(-1, descending=True).values[:, likeliest - 1 : likeliest]
    kept = kept.isfinite() & (logits >= least)
    expected = logits.log_softmax(-1).masked_fill(~kept, -math.inf)
    assert torch.equal(ours.isinf(), expected.isinf())
    assert torch.allclose(ours, expected, atol=1e-5)
    assert (log_probs[:, 1:] <= log_probs[:, :-1]).all()


@pytest.mark.parametrize("top_p, likeliest", [(0.95, 20), (0.5, 20), (1e-6, 20), (1.0, 8)])
def test_a_soft_token_is_the_k_best_noisy_scores(top_p, likeliest, monkeypatch):
    """A row at a time, over the whole vocabulary, with the same noise in the order of pi."""
    monkeypatch.setattr(latent_grpo, "LIKELIEST", likeliest)
    logits = torch.randn(50, 20, generator=torch.Generator().manual_seed(1)) * 2
    torch.manual_seed(0)
    ids, scores = latent_grpo.soft_token(logits, 99, settings(top_p=top_p), noise_free=False)
    torch.manual_seed(0)
    gumbel = -torch.empty(50, likeliest).exponential_().log()
    for n, pi in enumerate(logits.softmax(-1)):
        mass, noisy = 0.0, {}
        for rank, token in enumerate(pi.argsort(descending=True).tolist()[:likeliest]):
            if mass < top_p or rank < 4:
                noise = min(max(gumbel[n, rank].item(), -1.5), 3) + 1.5
                noisy[token] = pi[token].log().item() + noise
            mass += pi[token].item()
        best = sorted(noisy, key=noisy.get, reverse=True)[:4]
        assert ids[n].tolist() == best
        assert torch.allclose(scores[n], torch.tensor([noisy[i] for i in best]), atol=1e-5)


def test_there_is_no_noise_where_the_exit_is_the_likeliest():
    """Token 0 is the likeliest of every second row. And in a noise-free rollout there is none."""
    peaked = torch.tensor([[0.5, *[0.0] * 11], [0.0, 0.5, *[0.0] * 10]])
    logits, args = peaked.repeat(500, 1), settings()
    torch.manual_seed(0)
    ids, scores = latent_grpo.soft_token(logits, 0, args, noise_free=False)
    log_pi = logits.log_softmax(-1).gather(-1, ids)
    margins = (scores - log_pi).view(500, 2, 4)
    assert margins[:, 0].abs().max() < 1e-5 < margins[:, 1].abs().amax(-1).min()
    first = ids[:, 0].view(500, 2)
    assert (first[:, 0] == 0).all()
    assert 0.02 < (first[:, 1] == 0).float().mean() < 0.2  # noise may lift it, too
    ids, scores = latent_grpo.soft_token(logits, 0, args, noise_free=True)
    assert torch.allclose(scores, logits.log_softmax(-1).gather(-1, ids), atol=1e-5)


def test_text_is_one_token_of_the_whole_vocabulary():
    """Drawn from all five, though K is 2; or the likeliest. In K slots, the weight in the first."""
    torch.manual_seed(1)
    logits, args = PI.flip(0).log().expand(20_000, -1), settings(top_k=2)
    ids, weights = latent_grpo.text_token(logits, args, noise_free=False)
    assert (weights == torch.tensor([1.0, 0.0])).all()
    assert torch.equal(ids[:, 0], ids[:, 1])
    expected = 20_000 * PI.flip(0)
    counts = ids[:, 0].bincount(minlength=5)
    assert ((counts - expected) ** 2 / expected).sum() < 18.47  # chi-square, 4 degrees of freedom
    ids, weights = latent_grpo.text_token(logits, args, noise_free=True)
    assert (ids == 4).all() and (weights == torch.tensor([1.0, 0.0])).all()


# --- 3. Rollout -----------------------------------------------------------------------------------


def test_a_worked_mixture():
    table = torch.randn(30, 5)
    ids, weights = torch.tensor([[[21, 11]]]), torch.tensor([[[0.62, 0.38]]])
    mixed = latent_grpo.mix(table, ids, weights)  # (1, 1, 5)
    assert torch.allclose(mixed[0, 0], 0.62 * table[21] + 0.38 * table[11], atol=1e-6)


@pytest.mark.parametrize("noise, how, low, high", [
    ("one_sided", "mean", 0, 4.5), ("two_sided", "weighted", -1.5, 3)
])  # fmt: skip
def test_a_replay_equals_its_rollout(noise, how, low, high, monkeypatch):
    """What is stored was executed: the model's own pass over it gives the logits that the rollout
    saw, margins that are noise, and the log-probabilities of the replay, group by group.

    Prompts differ in length, rows end early, and the candidates are not the whole vocabulary.
    """
    monkeypatch.setattr(latent_grpo, "LIKELIEST", 8)
    lm, seen, args = random_model(), watch(monkeypatch), settings(noise=noise, surrogate=how)
    roll = roll_out(lm, args, group_size=16)
    executed, is_latent = masks(roll)
    assert roll.length.unique().numel() > 3
    assert roll.latents.unique().numel() > 3
    assert (roll.latents < roll.length).any()
    assert (roll.length == 10).any()
    z = roll.scores.softmax(-1)
    assert torch.allclose(roll.weights[is_latent], z[is_latent], atol=1e-6)
    assert torch.allclose(roll.weights.sum(-1), executed.float())
    replayed = [latent_grpo.replay(lm, roll, group, 16, args).detach() for group in range(3)]
    ours = torch.cat([F.pad(part, (0, 10 - part.shape[1])) for part in replayed])  # (N, T)
    assert (ours[~executed] == 0).all()
    with torch.no_grad():
        log_pi = [policy(lm, roll, n, 16) for n in range(48)]
        expected = [log_prob(lm, roll, n, how, 16) for n in range(48)]
    for n, steps in enumerate(roll.latents.tolist()):
        assert torch.allclose(ours[n, : roll.length[n]], expected[n], atol=2e-4)
        margins = roll.scores[n, :steps] - log_pi[n][:steps].gather(-1, roll.ids[n, :steps])
        assert ((low - 1e-4 < margins) & (margins < high + 1e-4)).all()
    assert len(seen) == 10
    for t, (_, logits) in enumerate(seen[:-1]):
        rows = (roll.length > t + 1).nonzero().squeeze(-1)  # those that step t was fed to
        now = torch.stack([log_pi[n][t + 1] for n in rows])
        assert torch.allclose(logits.log_softmax(-1), now, atol=1e-4)


@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_the_sides_of_the_noise_give_the_same_rollouts(scale):
    """And scores that differ by the shift."""
    one = roll_out(random_model(), settings(noise_scale=scale))
    two = roll_out(random_model(), settings(noise_scale=scale, noise="two_sided"))
    assert torch.equal(one.ids, two.ids)
    assert torch.equal(one.length, two.length)
    assert torch.allclose(one.weights, two.weights, atol=1e-5)
    _, is_latent = masks(one)
    shift = (one.scores - two.scores)[is_latent]
    assert len(shift) > 20
    assert torch.allclose(shift, torch.tensor(1.5 * scale), atol=1e-5)


def test_thoughts_come_first_and_end_with_the_exit_token():
    roll = roll_out(random_model(), settings(), group_size=64)
    executed, is_latent = masks(roll)
    exited = roll.latents < roll.length
    assert exited.sum() > 20
    assert torch.equal(roll.tokens, roll.ids[:, :, 0])
    assert (roll.tokens[is_latent] != EXIT).all()
    assert (roll.tokens[exited, roll.latents[exited]] == EXIT).all()
    text = roll.weights[executed & ~is_latent]
    assert (text == torch.tensor([1.0, 0, 0, 0])).all()
    assert (roll.weights[is_latent].amax(-1) < 1).all()
    is_stop = roll.tokens == test_lepo.STOP
    last = roll.tokens[torch.arange(192), roll.length - 1]
    assert ((last == test_lepo.STOP) | (roll.length == 10)).all()
    assert ((is_stop & executed).sum(1) <= 1).all()  # nothing comes after an end token
    assert (~exited & (roll.length < 10)).any()  # one may end a thought, too


def test_the_exit_can_be_forced():
    lm, args = random_model(), settings()
    for most in (0, 2):
        roll = roll_out(lm, args, group_size=16, latent_steps=most)
        assert roll.latents.max() == most
        forced = (roll.latents == most) & (roll.length > most)
        assert forced.sum() > 5
        assert (roll.tokens[forced, most] == EXIT).all()
        assert roll.length.max() > most + 2  # text follows
        assert (roll.weights[forced, most:, 1:] == 0).all()


def test_text_is_drawn_from_the_policy_that_scores_it():
    """The token behind an exit, which comes at once where it is the likeliest."""
    lm, n = random_model(seed=4, scale=2.0), 6000
    lm.stop_ids = torch.tensor([99])
    lm.exit_id = lm.model(torch.tensor([[3, 4]])).logits[0, -1].argmax().item()
    logits = lm.model(torch.tensor([[3, 4, lm.exit_id]])).logits[0, -1]
    pi, args = logits.softmax(-1).detach(), settings(max_new_tokens=2)
    roll = roll_out(lm, args, n, prompts=[[3, 4]])
    assert (roll.tokens[:, 0] == lm.exit_id).all()
    assert (roll.latents == 0).all()
    counts = roll.tokens[:, 1].bincount(minlength=12)
    assert ((counts - n * pi) ** 2 / (n * pi)).sum() < 31.26  # chi-square, 11 degrees of freedom
    log_probs = latent_grpo.replay(lm, roll, 0, n, args)
    assert torch.allclose(log_probs[:, 1].exp(), pi[roll.tokens[:, 1]], atol=1e-5)


def test_without_noise_a_rollout_is_the_softmax_of_the_k_best_and_greedy_text():
    """By hand, a prompt at a time: padding, neighbours and rows that leave do not matter either."""
    lm, args = random_model(seed=5), settings()
    lm.stop_ids, lm.exit_id = torch.tensor([0]), 4
    roll = roll_out(lm, args, group_size=2, noise_free=True)
    assert roll.length.unique().numel() > 1
    assert (roll.latents < roll.length).any()
    for i, prompt in enumerate(PROMPTS):
        embeds, thinking = lm.embedding[prompt], True
        for t in range(roll.length[2 * i]):
            values, ids = lm.model(inputs_embeds=embeds[None]).logits[0, -1].topk(4)
            thinking = thinking and ids[0] != 4
            weights = values.softmax(-1) if thinking else torch.eye(4)[0]
            for n in (2 * i, 2 * i + 1):
                assert roll.tokens[n, t] == ids[0]
                assert thinking == (t < roll.latents[n])
                assert torch.allclose(roll.weights[n, t], weights, atol=1e-5)
            embeds = torch.cat([embeds, (weights @ lm.embedding[ids])[None]])
        assert ids[0] == 0 or t == 9


class Watch(TorchDispatchMode):
    """Counts the operations on tensors with an axis of V numbers, and all top-k."""

    def __init__(self, tables):
        super().__init__()
        self.tables, self.large, self.top_k = tables, collections.Counter(), 0

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        out = function(*arguments, **(kwargs or {}))
        name = function.overloadpacket.__name__
        self.top_k += name == "topk"
        tensors = [x for x in [*arguments, out] if isinstance(x, torch.Tensor)]
        if any(301 in x.shape for x in tensors if not any(x is table for table in self.tables)):
            self.large[name] += 1
        return out


def test_what_a_step_costs(monkeypatch):
    """Over the vocabulary one top-k, one logsumexp and a draw; and a top-k of the likeliest."""
    monkeypatch.setattr(latent_grpo, "LIKELIEST", 8)
    lm = random_model(vocabulary=301)
    lm.head = lm.embedding.clone()  # so that a look-up in E is not one over the head
    with Watch((lm.embedding, lm.head)) as counts:
        steps = roll_out(lm, settings()).length.max().item()
    each = {name for name, times in counts.large.items() if times >= steps}
    head = {"mm", "t", "view", "slice"}
    once = {"topk", "logsumexp", "_softmax", "cumsum", "searchsorted"}
    assert once <= each <= once | head
    assert "sort" not in counts.large
    assert counts.large["topk"] == counts.large["logsumexp"] == steps
    assert counts.top_k == 2 * steps


# --- 4. Reward and advantages ---------------------------------------------------------------------


def test_each_rollout_is_judged_by_its_own_problem_and_its_text():
    """Two problems, two rollouts each: what stands behind the thought, up to the end."""
    words = ["<pad>", "<eos>", "a", "b"]
    tokenizer = SimpleNamespace(
        batch_decode=lambda rows, **_: [" ".join(words[i] for i in row) for row in rows]
    )
    tokens = torch.tensor([[3, 2, 3], [2, 2, 2], [3, 3, 2], [2, 2, 3]])
    latents, length = torch.tensor([1, 3, 0, 2]), torch.tensor([2, 3, 2, 3])
    roll = SimpleNamespace(tokens=tokens, length=length, latents=latents, ids=tokens)
    lm = SimpleNamespace(tokenizer=tokenizer)
    assert latent_grpo.texts_of(lm, roll) == ["a", "", "b b", "b"]
    task = SimpleNamespace(verify=lambda text, problem: (float(text == problem), len(text) / 2))
    strict, flexible = latent_grpo.rewards_of(lm, task, roll, ["a", "b"])
    assert strict.tolist() == [[1, 0], [0, 1]]
    assert flexible.tolist() == [[0.5, 0], [1.5, 0.5]]


@pytest.mark.parametrize("rewards, valid, expected, std", [
    ([1, 1, 0, 0], [1, 1, 1, 1], [0.866025, 0.866025, -0.866025, -0.866025], 0.577350),
    ([1, 1, 0, 0], [1, 1, 0, 1], [0.577350, 0.577350, 0, -1.154701], 0.577350),
    ([1, 0, 0, 0], [1, 1, 1, 1], [1.5, -0.5, -0.5, -0.5], 0.5),
    ([1, 1, 0, 1], [0, 1, 0, 1], [0, 0, 0, 0], 1),
    ([0, 1, 0, 1], [0, 1, 0, 0], [0, 1, 0, 0], 1),  # one left alone gets its reward
    ([1, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0], 1),
])  # fmt: skip
def test_advantages_of_a_group_with_overlong_rollouts(rewards, valid, expected, std):
    rewards, expected = torch.tensor(rewards).float(), torch.tensor(expected).float()
    ours = latent_grpo.group_advantages(rewards, torch.tensor(valid).bool())
    exact = expected if sum(valid) == 1 else expected * std / (std + 1e-6)
    assert torch.allclose(ours, exact, rtol=0, atol=6e-7)


@pytest.mark.parametrize("reward", [0.0, 1.0, 1.975, 7.7, 0.1, -3.3, 1e6 / 3])
def test_equal_rewards_give_exactly_no_advantage(reward):
    for group_size in (2, 3, 7, 8, 64):
        rewards = torch.full((group_size,), reward)
        valid = torch.ones(group_size).bool()
        assert (latent_grpo.group_advantages(rewards, valid) == 0).all()
        rewards[0], valid[0] = 5.0, False
        assert group_size == 2 or (latent_grpo.group_advantages(rewards, valid) == 0).all()


def sample(monkeypatch, step, rewards, length=3, **changed):
    """Dynamic sampling of problems that are numbers -> its groups as (problem, advantages), the
    number of draws, the problems of each. rewards: of a problem, four numbers
    """
    seen, args = [], settings(**changed)

    def problems(given, split, start, count):
        assert given is args and split == "train"
        return list(range(start, start + count))

    def encode(lm, task, batch, args, ending):
        assert ending == "<think>"
        return batch

    def rollout(lm, prompts, group_size, latent_steps, args):
        assert (group_size, latent_steps) == (4, 10)
        lengths = torch.tensor([length, 3, 3, 3]).repeat(len(prompts))
        return SimpleNamespace(prompts=prompts, length=lengths)

    def rewards_of(lm, task, roll, batch):
        seen.append(batch)
        each = torch.tensor([rewards(problem) for problem in batch]).float()
        return each, each + 10

    monkeypatch.setattr(encoding, "encode", encode)
    monkeypatch.setattr(latent_grpo, "rollout", rollout)
    monkeypatch.setattr(latent_grpo, "rewards_of", rewards_of)
    task = SimpleNamespace(problems=problems)
    found = latent_grpo.dynamic_sampling(None, task, step, args)
    groups, draw, last, roll, strict, flexible = found
    assert last == seen[-1] == roll.prompts and draw == len(seen) - 1
    assert strict.tolist() == [rewards(problem) for problem in last]
    assert torch.equal(flexible, strict + 10)
    assert all(lengths.tolist() == [length, 3, 3, 3] for *_, lengths in groups)
    return [(roll.prompts[n], advantage) for roll, n, advantage, _ in groups], seen


def test_problems_are_drawn_until_enough_groups_teach(monkeypatch):
    """Problem 13 teaches and all from 18 on. What is beyond P is dropped."""

    def rewards(problem):
        return [1, 0, 0, 0] if problem == 13 or problem >= 18 else [1, 1, 1, 1]

    groups, seen = sample(monkeypatch, 1, rewards, max_draws=4)
    assert seen == [[12, 13, 14], [15, 16, 17], [18, 19, 20]]
    assert [problem for problem, _ in groups] == [13, 18, 19]
    expected = torch.tensor([1.5, -0.5, -0.5, -0.5])
    assert all(torch.allclose(advantage, expected, atol=1e-5) for _, advantage in groups)
    groups, seen = sample(monkeypatch, 1, rewards, max_draws=2, prompts_per_step=7)
    assert len(seen) == 2 and len(groups) == 7  # 13, 18 to 27
    groups, seen = sample(monkeypatch, 3, rewards, max_draws=4)
    assert len(seen) == 1 and seen[0] == [36, 37, 38]


def test_no_problem_comes_twice_and_draws_have_an_end(monkeypatch):
    seen = []
    for step in range(3):
        groups, batches = sample(monkeypatch, step, lambda problem: [0, 0, 0, 0], max_draws=4)
        assert groups == [] and len(batches) == 4
        seen += batches
    assert sum(seen, []) == list(range(36))


@pytest.mark.parametrize("overlong, teaches", [("exclude", False), ("off", True)])
def test_a_group_without_advantage_does_not_count(overlong, teaches, monkeypatch):
    """Its only wrong rollout has reached the cap, or has not."""
    rewards = [0, 1, 1, 1]
    for length, expected in ((10, teaches), (9, True)):
        groups, seen = sample(
            monkeypatch, 0, lambda problem: rewards, length, overlong=overlong, max_draws=3
        )
        assert (len(groups), len(seen)) == ((3, 1) if expected else (0, 3))


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_draws_its_own_problems(rank, monkeypatch):
    monkeypatch.setattr(common, "RANKS", 2)
    monkeypatch.setattr(common, "RANK", rank)
    groups, seen = sample(
        monkeypatch, 0, lambda problem: [problem >= 4, 0, 0, 0], prompts_per_step=4, max_draws=3
    )
    assert seen == [[rank, rank + 2], [rank + 4, rank + 6]]
    assert [problem for problem, _ in groups] == [rank + 4, rank + 6]


# --- 5. Log-probability ---------------------------------------------------------------------------


def surrogate(log_pi, scores, how):
    args = settings(surrogate=how, top_k=log_pi.shape[-1])
    return latent_grpo.latent_log_prob(log_pi, scores, scores.softmax(-1), args)


def test_surrogate_by_hand():
    """Margins 1 and 2: -1 - 1/e = -1.3679 and -2 - 1/e^2 = -2.1353. Their scores differ by 1."""
    log_pi = torch.tensor([[-0.5, -0.5]])
    scores = log_pi + torch.tensor([[1.0, 2.0]])
    f = torch.tensor([-1.367879, -2.135335])
    assert torch.allclose(surrogate(log_pi, scores, "mean"), f.mean(), atol=1e-5)
    weights = torch.tensor([0.268941, 0.731059])  # 1 / (1 + e), e / (1 + e)
    assert torch.allclose(surrogate(log_pi, scores, "weighted"), weights @ f, atol=1e-5)


@pytest.mark.parametrize("how", ["mean", "weighted"])
def test_slope_of_the_surrogate_is_one_minus_exp_minus_margin(how):
    """The closed form, and torch's Gumbel density."""
    generator = torch.Generator().manual_seed(0)
    log_pi = torch.randn(6, 4, generator=generator, dtype=torch.float64).requires_grad_()
    noise = torch.randn(6, 4, generator=generator, dtype=torch.float64) * 2
    scores = log_pi.detach() + noise
    share = scores.softmax(-1) if how == "weighted" else torch.full_like(scores, 0.25)
    (gradient,) = torch.autograd.grad(surrogate(log_pi, scores, how).sum(), log_pi)
    assert torch.allclose(gradient, share * (1 - (-noise).exp()), atol=1e-12)
    density = Gumbel(log_pi, torch.ones_like(log_pi)).log_prob(scores)
    (expected,) = torch.autograd.grad((share * density).sum(), log_pi)
    assert torch.allclose(gradient, expected, atol=1e-9)


@pytest.mark.parametrize("noise, low, high", [("one_sided", 0, 0), ("two_sided", 0.25, 0.5)])
def test_one_sided_noise_pushes_no_candidate_the_wrong_way(noise, low, high):
    """Where the slope is negative, a right rollout pushes down and a wrong one up."""
    log_pi, scores = draws(noise=noise)
    moving = log_pi.clone().requires_grad_()
    (slope,) = torch.autograd.grad(surrogate(moving, scores, "mean").sum(), moving)
    wrong = slope < -1e-5
    assert low <= wrong.float().mean() <= high
    assert torch.equal(wrong, scores - log_pi < -5e-5)


@pytest.mark.parametrize("noise, low, high", [("one_sided", -0.5, 0.5), ("two_sided", 0.6, 0.8)])
def test_the_mean_flattens_and_the_weighted_one_is_lepos_soft_label(noise, low, high):
    """Gradients with respect to the logits, where the K candidates hold all the mass.

    The weighted one is z - pi in every draw. The mean's direction is far from that; with equal
    advantages it is on average that of uniform - pi.
    """
    log_pi, scores = draws(noise=noise)
    pi, pulls = log_pi.exp(), {}
    for how in ("mean", "weighted"):
        logits = log_pi.clone().requires_grad_()
        value = surrogate(logits.log_softmax(-1), scores, how).sum()
        (pulls[how],) = torch.autograd.grad(value, logits)
    soft_label = scores.softmax(-1) - pi
    assert torch.allclose(pulls["weighted"], soft_label, atol=1e-5)
    assert low < F.cosine_similarity(pulls["mean"], soft_label, dim=-1).mean() < high
    if noise == "one_sided":
        mean, flat = pulls["mean"].mean(0), 0.2 - PI
        assert F.cosine_similarity(mean, flat, dim=0) > 0.99
        assert mean.norm() / flat.norm() == pytest.approx(0.78, abs=0.1)
        assert pulls["weighted"].mean(0).norm() < 0.35 * mean.norm()


# --- 6. Update ------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["mean", "weighted"])
def test_the_gradient_of_an_update_is_that_by_hand(how):
    """Of groups out of two draws. All their steps, and no others, are the denominator.

    Nothing flows through the mixtures or into the table.
    """
    lm, args = random_model(), settings(surrogate=how)
    first, second = (groups_of(roll_out(lm, args, seed=seed), seed) for seed in (0, 1))
    groups = [first[0], first[2], second[1]]
    latents = torch.cat([roll.latents[4 * n : 4 * n + 4] for roll, n, *_ in groups])
    length = torch.cat([length for *_, length in groups])
    assert (latents > 0).any()
    assert (latents < length).any()
    assert length.unique().numel() > 2
    ours = gradients(lm, groups, args)
    assert lm.embedding.grad is None
    assert_close(ours, by_hand(lm, groups, how))


def test_first_token_selection_by_hand():
    """The docstring's: of two right ones with means -2 and -1 the first one's step 1 is silent."""
    length, later = torch.tensor([2, 4, 10, 3]), torch.tensor([-3.0, -3, -9, -8])
    before = torch.stack([torch.ones(4) * -1, later], 1)  # sums -4, -4, -10, -9
    log_probs = before.clone()
    advantage = torch.tensor([0.87, 0.87, -0.87, -0.87])
    latent_grpo.first_token_selection(advantage, log_probs, length)
    assert log_probs[:, 0].tolist() == [0, -1, -1, -1]
    assert torch.equal(log_probs[:, 1], later)
    for nobody in (-advantage.abs(), torch.tensor([0.0, 1.0, 0.0, -1.0])):  # or only one
        log_probs = before.clone()
        latent_grpo.first_token_selection(nobody, log_probs, length)
        assert torch.equal(log_probs, before)


def test_first_token_selection_in_an_update():
    """By hand: of the right ones only the likeliest has a first step, in each group for itself."""
    lm, args = random_model(), settings(first_token="paper")
    roll = roll_out(lm, args)
    groups, silent = groups_of(roll), set()
    with torch.no_grad():
        for group, (*_, advantage, _) in enumerate(groups):
            mean = torch.stack([log_prob(lm, roll, 4 * group + n).mean() for n in range(4)])
            right = {n for n in range(4) if advantage[n] > 0}
            best = max(right, key=lambda n, mean=mean: mean[n])
            silent |= {(group, n) for n in right - {best}}
    assert len(silent) == 2
    expected = by_hand(lm, groups, silent=silent)
    assert_close(gradients(lm, groups, args), expected)
    plain = gradients(lm, groups, settings())
    with pytest.raises(AssertionError):
        assert_close(plain, expected, 1e-2)


def test_shares_of_several_ranks_add_up(monkeypatch):
    """Each rank has its groups and the steps of all: its gradients are its share."""
    lm, args = random_model(), settings()
    groups = groups_of(roll_out(lm, args))
    whole = gradients(lm, groups, args)
    steps = sum(int(length.sum()) for *_, length in groups)
    total = torch.tensor(float(steps))
    monkeypatch.setattr(common, "sum_over_ranks", lambda x: x if x.dim() else total)
    one, two = (gradients(lm, groups[part], args) for part in (slice(1), slice(1, 3)))
    assert_close({name: one[name] + two[name] for name in whole}, whole)
    idle = gradients(lm, [], args)  # a rank that drew nothing that teaches
    assert idle.keys() == whole.keys()
    assert all((gradient == 0).all() for gradient in idle.values())


@pytest.mark.parametrize("how", ["mean", "weighted"])
@pytest.mark.parametrize("latent_steps", [0, 10])
def test_extremes_give_no_nan(how, latent_steps):
    """Weights that underflow to exact zeros, and certain tokens, as latents and as text."""
    lm, args = random_model(scale=3000.0), settings(surrogate=how, first_token="paper")
    groups = groups_of(roll_out(lm, args, latent_steps=latent_steps))
    grads = gradients(lm, groups, args)
    assert all(gradient.isfinite().all() for gradient in grads.values())


def test_bfloat16():
    """Matrix products in half precision, as on a GPU; weights and gradients in float32."""
    lm, args = random_model(), settings()
    groups = groups_of(roll_out(lm, args))
    plain = gradients(lm, groups, args)
    lm.dtype = torch.bfloat16
    roll = roll_out(lm, args)
    assert roll.scores.dtype == roll.weights.dtype == torch.float32 == lm.model.dtype
    coarse = gradients(lm, groups, args)
    a, b = (torch.cat([x.flatten() for x in each.values()]) for each in (plain, coarse))
    assert b.dtype == torch.float32
    assert not torch.equal(a, b)
    assert F.cosine_similarity(a, b, dim=0) > 0.98


def test_the_gradient_is_bounded_by_1():
    lm, args = random_model(), settings()
    before = [weight.clone() for weight in lm.model.parameters()]
    groups = groups_of(roll_out(lm, args))
    groups = [(roll, n, 1e3 * advantage, length) for roll, n, advantage, length in groups]
    norm = latent_grpo.update(lm, optimizer_of(lm, 1.0), groups, args)
    moves = [(a - b).norm() for a, b in zip(before, lm.model.parameters(), strict=True)]
    assert norm > 100 and abs(torch.stack(moves).norm() - 1) < 1e-3


def test_an_update_follows_its_own_gradient_and_goes_up():
    """Two updates with the same optimiser: the second does not contain the first."""
    lm, args = random_model(), settings()
    groups = groups_of(roll_out(lm, args))
    whole = gradients(lm, groups, args)
    assert_close(gradients(lm, groups, args), whole)
    before = {name: weight.detach().clone() for name, weight in trained(lm).items()}
    norm = latent_grpo.update(lm, optimizer_of(lm, 1e-3), groups, args)
    moved = {name: 1e3 * (before[name] - weight) for name, weight in trained(lm).items()}
    bounded = {name: gradient / max(norm, 1) for name, gradient in whole.items()}
    assert_close(moved, bounded, 1e-2)


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change():
    lm, args = random_model(), settings()
    before = [weight.clone() for weight in lm.model.parameters()]
    ((roll, n, advantage, length), *_) = groups_of(roll_out(lm, args))
    groups = [(roll, n, advantage * math.nan, length)]
    with pytest.raises(common.UserError, match="not finite"):
        latent_grpo.update(lm, optimizer_of(lm, 1.0), groups, args)
    for a, b in zip(before, lm.model.parameters(), strict=True):
        assert torch.equal(a, b)


# --- 7. Evaluation and samples --------------------------------------------------------------------


def test_metrics_by_hand():
    """Two rollouts: a latent of two halves and a text of two tokens; three latents to the cap."""
    weights = torch.zeros(2, 3, 4)
    weights[0] = torch.tensor([[0.5, 0.5, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]])
    weights[1] = 0.25
    weights[1, 0] = torch.tensor([0.5, 0.5, 0, 0])
    length, latents = torch.tensor([3, 5]), torch.tensor([1, 5])
    roll = SimpleNamespace(weights=weights, length=length, latents=latents)
    strict, flexible = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 1.0]])
    metrics = latent_grpo.metrics_of(roll, strict, flexible, settings(max_new_tokens=5))
    names = "reward", "flexible", "length", "ended", "exit_rate", "effective_k"
    assert metrics == dict(zip(names, (0.5, 1, 4, 0.5, 0.5, 3), strict=True))


@pytest.fixture(scope="module")
def lm():
    args = latent_grpo.parse_args([])
    lm = common.load_model(args)
    lm.exit_id = encoding.exit_token(lm, args.exit_text)
    return lm


def evaluate(lm, monkeypatch, full, count=7):
    """-> scores, and of each rollout: prompts, samples, latent steps, noise-free, rewards"""
    flags = ["--prompts_per_step", "2", "--group_size", "3"]
    args, calls = latent_grpo.parse_args(flags), []
    task = tasks.find("chains")
    rollout, rewards_of = latent_grpo.rollout, latent_grpo.rewards_of

    def watched(lm, prompts, samples, latent_steps, args, noise_free):
        calls.append([len(prompts), samples, latent_steps, noise_free])
        return rollout(lm, prompts, samples, latent_steps, args, noise_free)

    def judged(*given):
        strict, flexible = rewards_of(*given)
        calls[-1].append(strict)
        return strict, flexible

    with monkeypatch.context() as patch:
        patch.setattr(latent_grpo, "rollout", watched)
        patch.setattr(latent_grpo, "rewards_of", judged)
        held_out = task.problems(args, "test", 0, count)
        return latent_grpo.evaluate(lm, task, held_out, args, full), calls


def test_an_evaluation_is_three_ways_with_the_same_noise_every_time(lm, monkeypatch):
    """As many rollouts at a time as in training, which are two times three."""
    scores, calls = evaluate(lm, monkeypatch, full=True)
    ways = [(1, 16, True)] * 2 + [(3, 16, False)] * 4 + [(1, 0, True)] * 2
    assert [tuple(call[1:4]) for call in calls] == ways
    assert [call[0] for call in calls] == [6, 1, 2, 2, 2, 1, 6, 1]
    greedy, sampled, without = (
        torch.cat([call[4] for call in part]) for part in (calls[:2], calls[2:6], calls[6:])
    )
    assert scores["greedy"] == round(greedy.mean().item(), 4)
    assert scores["sampled"] == round(sampled.mean().item(), 4)
    assert scores["pass@3"] == round(sampled.any(1).float().mean().item(), 4)
    assert scores["greedy_no_latents"] == round(without.mean().item(), 4)
    assert scores["greedy_exit_rate"] == scores["greedy_no_latents_exit_rate"] == 1
    assert 3 < scores["greedy_no_latents_length"] < scores["greedy_length"] < 9
    torch.manual_seed(99)
    again, _ = evaluate(lm, monkeypatch, full=True)
    assert again == scores
    short, calls = evaluate(lm, monkeypatch, full=False)
    assert len(calls) == 2 and short.items() <= scores.items()


OPENED = "{{ ' hm ' + messages[0]['content'] + ' so <think>' }}"


@pytest.mark.parametrize("template", [OPENED, OPENED + "{{ '\\n' }}"])
def test_a_thought_that_a_chat_template_opens_is_opened_once(template, lm, monkeypatch):
    monkeypatch.setattr(lm.tokenizer, "chat_template", template)
    args, task = latent_grpo.parse_args([]), SimpleNamespace(request=lambda text, args: text)
    (ids,) = encoding.encode(lm, task, [tasks.Problem("1 + 2 ?", "3")], args, latent_grpo.THINK)
    assert ids == lm.tokenizer.encode(" hm 1 + 2 ? so <think>")


# --- 8. Runs --------------------------------------------------------------------------------------

QUICK = ["--steps", "3", "--prompts_per_step", "4", "--group_size", "4", "--eval_problems", "8",
         "--eval_every", "2", "--save_every", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    with open(folder.parent / "out", "w") as out, contextlib.redirect_stdout(out):
        latent_grpo.main([*QUICK, "--out", str(folder)])
    return folder


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


def test_a_run_leaves_a_log_a_result_and_a_trained_model(run):
    result, rows = result_of(run), rows_of(run)
    for way in ("greedy", "sampled", "greedy_no_latents"):
        assert {way, f"{way}_before", f"{way}_length", f"{way}_exit_rate"} <= result.keys()
    assert "pass@4" in result and result["method"] == "latent_grpo"
    assert [row["step"] for row in rows] == list(range(3))
    names = "reward flexible length ended exit_rate effective_k draws grad_norm seconds"
    assert all(set(names.split()) <= row.keys() for row in rows)
    assert ["greedy" in row for row in rows] == [False, True, False]
    assert all(row["grad_norm"] > 0 for row in rows)
    assert all(1 <= row["draws"] <= 4 and 1 < row["effective_k"] < 10 for row in rows)
    out = (run.parent / "out").read_text()
    assert json.loads(out.splitlines()[-1]).items() <= result.items()
    assert "\n    latent  1  ' " in out
    assert "\n    text       '" in out
    assert "the answer is" in out


def test_embeddings_are_frozen_and_the_rest_is_trained(run):
    ours, start = (
        AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (run / "model", START)
    )
    changed = {name for name in start if not torch.equal(ours[name], start[name])}
    assert start.keys() - changed == {"model.embed_tokens.weight", "lm_head.weight"}


def random_start(folder, tokenizer, **changed):
    """A folder with a random model, whose head is a table of its own"""
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    shape |= dict(num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)
    shape |= dict(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id) | changed
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_head_of_its_own_is_frozen_too(tmp_path, lm, monkeypatch):
    """A random model is never right, so every third rollout is called right."""
    start = random_start(tmp_path / "start", lm.tokenizer)
    verdicts = itertools.cycle([(0.0, 0.0), (1.0, 1.0), (0.0, 1.0)])
    monkeypatch.setattr(tasks.chains, "verify", lambda text, problem: next(verdicts))
    flags = [*QUICK, "--model", str(start), "--task", "chains", "--top_k", "500", "--steps", "1"]
    flags += ["--max_new_tokens", "4", "--lr", "0.01"]
    latent_grpo.main([*flags, "--out", str(tmp_path / "run")])
    assert result_of(tmp_path / "run")["args"]["top_k"] == len(lm.embedding)  # no more are there
    ours, before = (
        AutoModelForCausalLM.from_pretrained(path).state_dict()
        for path in (tmp_path / "run/model", start)
    )
    move = {name: (ours[name] - before[name]).abs().max().item() for name in before}
    assert max(move.values()) == pytest.approx(0.01, rel=0.05)  # AdamW's first step is --lr
    assert rows_of(tmp_path / "run")[0]["draws"] == 1
    changed = {name for name in before if move[name]}
    assert before.keys() - changed == {"model.embed_tokens.weight", "lm_head.weight"}


def test_killed_and_resumed_is_uninterrupted_bit_for_bit(run, tmp_path, monkeypatch):
    """Killed in step 1, behind its checkpoint and while a row of the log is written."""
    update, calls, folder = latent_grpo.update, [], tmp_path / "run"

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return update(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(latent_grpo, "update", killed)
        with pytest.raises(KeyboardInterrupt):
            latent_grpo.main([*QUICK, "--out", str(folder)])
    with open(folder / "log.jsonl", "a") as file:
        file.write('{"step": 1, "rew')
    assert common.load_checkpoint(folder)["step"] == 1
    seeds, manual_seed = [], seed_all
    monkeypatch.setattr(torch, "manual_seed", lambda seed: seeds.append(seed) or manual_seed(seed))
    latent_grpo.main(["--resume", str(folder)])
    assert len(set(seeds)) == 3  # of two steps and of evaluation
    assert rows_of(folder) == rows_of(run)
    ours, theirs = ((path / "model/model.safetensors").read_bytes() for path in (folder, run))
    assert ours == theirs
    first, second = (result_of(path) | {"seconds": 0, "args": 0} for path in (folder, run))
    assert first == second


@pytest.mark.parametrize("flags, mentioned", [
    (["--exit_text", ""], "--exit_text"),
    (["--exit_text", "<eos>"], "--exit_text"),
    (["--group_size", "1"], "--group_size"),
    (["--top_k", "1"], "--top_k"),
    (["--ask", "1 + 1"], "--ask"),
    (["--task", "nowhere"], "nowhere"),
    (["--resume", "RUN", "--surrogate", "mean"], "keeps its surrogate"),
    (["--resume", "RUN", "--exit_text", "?"], "keeps its exit_text"),
])  # fmt: skip
def test_a_wrong_call_ends_with_one_line_and_exit_code_2(flags, mentioned, run, tmp_path, capsys):
    before = result_of(run)
    flags = [str(run) if flag == "RUN" else flag for flag in flags]
    if "--resume" not in flags:
        flags += ["--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stop:
        common.run_main(lambda: latent_grpo.main(flags))
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "error: " in error
    assert "\n" not in error and mentioned in error
    assert not (tmp_path / "run").exists() and result_of(run) == before


def test_defaults_are_the_papers_or_those_of_chains(run):
    paper = dict(top_k=10, top_p=0.95, noise="one_sided", noise_scale=1.0, surrogate="mean")
    paper |= dict(overlong="exclude", first_token="paper", max_new_tokens=128)
    paper |= dict(task="gsm8k", exit_text="</think>")
    assert paper.items() <= vars(latent_grpo.parse_args(["--model", "any"])).items()
    small = latent_grpo.PRESETS["chains"].items()
    assert small <= vars(latent_grpo.parse_args([])).items()
    made = latent_grpo.parse_args(["--model", str(run / "model")])  # it brings its task along
    assert (made.task, made.surrogate, made.exit_text) == ("chains", "weighted", " </think>")


TWO_RANKS = """
import sys, torch
import common, latent_grpo, test_latent_grpo as t
common.start_ranks("cpu")
lm, args = t.random_model(), t.settings(first_token="paper")
groups = t.groups_of(t.roll_out(lm, args))
for name, mine in (("all", groups[common.RANK :: 2]), ("idle", groups[common.RANK : 1])):
    torch.save(t.gradients(lm, mine, args), f"{sys.argv[1]}/{name}{common.RANK}")
common.start_ranks = lambda device: None  # they have started
latent_grpo.main([*t.QUICK, "--out", f"{sys.argv[1]}/run"])
"""


@pytest.mark.slow
def test_two_processes_are_one(run, tmp_path):
    """They have the gradient of one, also where one has nothing to learn, and then make a run.

    Their noise is not that of one process. What has none is the same.
    """
    (tmp_path / "script.py").write_text(TWO_RANKS)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    path = {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE / "tests")]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, tmp_path / "script.py", tmp_path], env=os.environ | path,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lm, args = random_model(), settings(first_token="paper")
    groups = groups_of(roll_out(lm, args))
    for name, given in (("all", groups), ("idle", groups[:1])):
        one = gradients(lm, given, args)
        for rank in "01":
            assert_close(torch.load(tmp_path / f"{name}{rank}", weights_only=True), one)
    assert done.stdout.count("step 0 ") == 1  # rank 0 speaks
    assert [row["step"] for row in rows_of(tmp_path / "run")] == list(range(3))
    ours, theirs = result_of(tmp_path / "run"), result_of(run)
    for name in ("greedy", "greedy_length", "greedy_exit_rate", "greedy_no_latents"):
        assert ours[f"{name}_before"] == pytest.approx(theirs[f"{name}_before"], abs=1e-4)


@pytest.mark.slow
@needs_shared
def test_a_run_with_a_real_tokenizer_and_gsm8k(tmp_path, monkeypatch):
    """A random model is never right and never ends, so every third rollout is called wrong."""
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers/qwen2.5")
    start = random_start(tmp_path / "start", tokenizer, vocab_size=151_936)
    prompts, rollout = [], latent_grpo.rollout

    def watched(lm, batch, *given):
        prompts.extend(batch)
        return rollout(lm, batch, *given)

    monkeypatch.setattr(latent_grpo, "rollout", watched)
    verdicts = itertools.cycle([(0.0, 0.0), (1.0, 1.0), (1.0, 1.0)])
    monkeypatch.setattr(gsm8k, "verify", lambda text, problem: next(verdicts))
    flags = ["--model", str(start), "--task", str(SHARED / "data/gsm8k"), "--overlong", "off"]
    flags += ["--steps", "2", "--max_new_tokens", "8", "--precision", "bfloat16", "--lr", "1e-4"]
    flags += ["--prompts_per_step", "2", "--eval_problems", "2", "--save_every", "9"]
    latent_grpo.main([*QUICK, *flags, "--out", str(tmp_path / "run")])
    rows = rows_of(tmp_path / "run")
    assert all(row["grad_norm"] > 0 and row["draws"] == 1 for row in rows)
    assert all(row["effective_k"] > 2 for row in rows)
    for prompt in prompts:
        text = tokenizer.decode(prompt)
        assert text.endswith("<|im_start|>assistant\n<think>") and text.count("<think>") == 1
    args = result_of(tmp_path / "run")["args"]
    assert (args["surrogate"], args["top_k"], args["first_token"]) == ("mean", 10, "paper")


@pytest.mark.slow
def test_chains_are_learnt(tmp_path):
    """A seventh of the default run, with fewer draws. It gains about .11."""
    flags = ["--steps", "60", "--eval_every", "0", "--eval_problems", "256"]
    flags += ["--max_draws", "1"]  # half the time
    latent_grpo.main([*flags, "--out", str(tmp_path / "run")])
    result = result_of(tmp_path / "run")
    assert result["greedy_before"] < 0.65
    assert result["greedy"] > result["greedy_before"] + 0.06
    assert result["sampled"] > result["sampled_before"]
    assert result["greedy_exit_rate"] > 0.95
    assert result["greedy_length"] < 8
    assert result["greedy_no_latents"] < 0.2
