"""Proofs of latent_grpo.py: every formula against something that does not share its code. In the order of the script.

Whole runs of latent_grpo.py are tested in test_latent_sft.py, behind those of latent_sft.py. Monte-Carlo tests have
fixed seeds and bounds of 4 standard errors or more; tests of fit p = .001.
"""

import math
import os
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test depends on a network
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported: what tests compare is equal on a CPU only

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Gumbel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2Config, Qwen2ForCausalLM

import engine as common
import latent_grpo

STOP, EXIT = 1, 2
PROMPTS = [[5, 6, 7], [8], [3, 4, 5, 6, 9, 10]]  # of different lengths


def settings(**changed):
    """What the functions of latent_grpo.py read of its arguments: the paper's method, on four candidates."""
    values = dict(
        top_k=4, top_p=0.95, noise="one_sided", noise_scale=1.0, exit_id=EXIT, surrogate="mean", overlong="exclude",
        first_token="off", clip=0.2, max_new_tokens=10, micro_batch=64, updates_per_batch=1, max_draws=1, group_size=4,
        prompts_per_step=3, steps=10, think_text="", data="chains", device="cpu",
    )  # fmt: skip
    return SimpleNamespace(**values | changed)


def random_model(vocabulary=12, seed=0, scale=6.0):
    """A small random Qwen2 whose logits are spread enough for its mixtures to be neither flat nor one-hot, and whose
    attention depends on what is seen; table and head frozen, as in the script -> lm"""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, eos_token_id=STOP,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(scale)
        for name, weight in model.named_parameters():
            weight.mul_(8.0 if "q_proj" in name or "k_proj" in name else 1.0)
    table = model.get_input_embeddings().weight.requires_grad_(False)
    tokenizer = SimpleNamespace(batch_decode=lambda rows, **_: rows)  # "texts" are lists of ids
    return common.LanguageModel(model, tokenizer, table, table, [STOP])


def roll_out(lm, args, group_size=4, seed=0, prompts=PROMPTS, noise_free=False):
    return latent_grpo.rollout(lm, prompts, group_size, args, torch.Generator().manual_seed(seed), noise_free)


def masks(roll):
    """Executed steps and latents, (N, T) bool each"""
    steps = torch.arange(roll.ids.shape[1])
    return steps < roll.length[:, None], steps < roll.latents[:, None]


def gradients(lm, roll, advantages, args, rows=None):
    """What latent_grpo.update computes before its norm is bounded; the weights stay as they are."""
    lm.model.zero_grad()
    weights = {name: weight for name, weight in lm.model.named_parameters() if weight.requires_grad}
    rows = torch.arange(len(roll.length)) if rows is None else rows
    bound, torch.nn.utils.clip_grad_norm_ = torch.nn.utils.clip_grad_norm_, lambda *_: torch.ones(())
    try:
        latent_grpo.update(lm, torch.optim.SGD(weights.values(), lr=0.0), roll, advantages, rows, args)
    finally:
        torch.nn.utils.clip_grad_norm_ = bound
    return {name: weight.grad.clone() for name, weight in weights.items()}


def assert_close(ours, theirs, tolerance=1e-5):
    scale = max(gradient.abs().max() for gradient in theirs.values())
    assert scale > 0 and ours.keys() == theirs.keys()
    for name in theirs:
        assert (ours[name] - theirs[name]).abs().max() <= tolerance * scale, name


def some_advantages(roll, seed=0):
    """(N, T), of both signs, another one at the first step"""
    advantages = torch.randn(len(roll.length), 1, generator=torch.Generator().manual_seed(seed))
    advantages = advantages.repeat(1, roll.ids.shape[1])
    advantages[:, 0] = 0.5
    return advantages


# --- 2. The latent token ----------------------------------------------------------------------------------------------


def draws(noise, n=100_000, pi=(0.4, 0.3, 0.15, 0.1, 0.05), **changed):
    """n latents at one state whose candidates are the whole vocabulary -> log_p, scores (n, 5) by id"""
    log_p = torch.tensor(pi).log().expand(n, -1)
    gumbel = latent_grpo.gumbel_noise(log_p, torch.Generator().manual_seed(0))
    args = settings(top_k=5, top_p=1.0, noise=noise, exit_id=99, **changed)
    ids, scores = latent_grpo.latent_token(torch.arange(5).expand(n, -1), log_p, gumbel, args)
    assert (scores.diff() <= 0).all()  # the heaviest first
    return log_p, scores.gather(-1, ids.argsort(-1))


def test_noise_is_gumbel_clipped_to_its_interval_and_shifted():
    log_p, two = draws("two_sided")
    _, one = draws("one_sided")
    _, half = draws("one_sided", noise_scale=0.5)
    two, one, half = ((scores - log_p).double().round(decimals=5).flatten() for scores in (two, one, half))
    assert two.min() == -1.5 and two.max() == 3 and one.min() == 0 and one.max() == 4.5
    assert torch.allclose(one, two + 1.5, atol=1e-4) and torch.allclose(half, one / 2, atol=1e-4)
    for value, mass in ((-1.5, math.exp(-math.exp(1.5))), (3.0, 1 - math.exp(-math.exp(-3.0)))):  # 1.1 %, 4.9 %
        assert abs((two == value).double().mean() - mass) < 4 * math.sqrt(mass / len(two))
    for x in (-1.0, 0.0, 1.0, 2.0):
        cdf = Gumbel(0.0, 1.0).cdf(torch.tensor(x))
        assert abs((two <= x).double().mean() - cdf) < 4 * 0.5 / math.sqrt(len(two))


@pytest.mark.parametrize("top_p, seed", [(0.95, 0), (0.5, 1), (1.0, 2), (1e-6, 3)])
def test_candidates_are_the_k_best_noisy_scores_of_the_nucleus(top_p, seed):
    """Against one row at a time, spelled out."""
    generator = torch.Generator().manual_seed(seed)
    log_p, candidates = (3 * torch.randn(50, 20, generator=generator)).log_softmax(-1).sort(-1, descending=True)
    gumbel = latent_grpo.gumbel_noise(log_p, generator)
    args = settings(top_p=top_p, noise="two_sided", exit_id=99)
    ids, scores = latent_grpo.latent_token(candidates, log_p, gumbel, args)
    for n in range(50):
        mass, noisy = 0.0, {}
        for rank in range(20):
            if mass < top_p or rank < 4:
                noisy[int(candidates[n, rank])] = (log_p[n, rank] + gumbel[n, rank].clamp(-1.5, 3)).item()
            mass += log_p[n, rank].exp().item()
        best = sorted(noisy, key=lambda i, noisy=noisy: -noisy[i])[:4]
        assert ids[n].tolist() == best
        assert torch.allclose(scores[n], torch.tensor([noisy[i] for i in best]), atol=1e-6)


def test_the_exit_is_certain_where_it_is_likeliest():
    log_p, candidates = torch.tensor([0.5, *[0.0] * 11]).log_softmax(-1).expand(500, -1), torch.arange(12)
    gumbel = latent_grpo.gumbel_noise(log_p, torch.Generator().manual_seed(0))
    for exit_id, low, high in ((0, 1.0, 1.0), (1, 0.02, 0.3)):  # the likeliest; one that noise may lift
        ids, _ = latent_grpo.latent_token(candidates.expand(500, -1), log_p, gumbel, settings(exit_id=exit_id))
        assert low <= (ids[:, 0] == exit_id).float().mean() <= high


# --- 3. The rollout and its replay ------------------------------------------------------------------------------------


def watch(monkeypatch):
    """-> list that collects the logits of every step of the next rollout"""
    seen, init, feed = [], common.Decoder.__init__, common.Decoder.feed

    def started(self, *arguments):
        init(self, *arguments)
        seen.append(self.logits.clone())
    def fed(self, embeds):
        seen.append(feed(self, embeds).clone())
        return seen[-1]

    monkeypatch.setattr(common.Decoder, "__init__", started)
    monkeypatch.setattr(common.Decoder, "feed", fed)
    return seen


@pytest.mark.parametrize("noise", ["one_sided", "two_sided"])
def test_what_is_stored_was_executed_and_its_replay_equals_the_rollout(noise, monkeypatch):
    """Margins are the noise, under the model's own forward pass over what is stored; with prompts and thoughts of
    different lengths, rows that end early, and candidates that are not the whole vocabulary."""
    monkeypatch.setattr(latent_grpo, "LIKELIEST", 8)
    lm, seen, args = random_model(), watch(monkeypatch), settings(noise=noise)
    roll = roll_out(lm, args, group_size=16)
    mask, is_latent = masks(roll)
    assert roll.length.unique().numel() > 3 and roll.latents.unique().numel() > 3
    assert (roll.latents < roll.length).any() and (roll.length == 10).any()
    low, high = {"one_sided": (0.0, 4.5), "two_sided": (-1.5, 3.0)}[noise]
    ours, _ = latent_grpo.replay(lm, roll, torch.arange(48), args)
    for n, count in enumerate(roll.length.tolist()):
        weights = roll.scores[n, :count].softmax(-1)
        embeds = torch.einsum("tk,tkd->td", weights, lm.table[roll.ids[n, :count]])
        prompt = roll.prompts[n // 16]
        logits = lm.model(inputs_embeds=torch.cat([lm.table[torch.tensor(prompt)], embeds])[None]).logits[0]
        log_p = logits[len(prompt) - 1 : -1].log_softmax(-1).gather(-1, roll.ids[n, :count])
        margin = (roll.scores[n, :count] - log_p)[is_latent[n, :count]]
        assert len(margin) == 0 or margin.min() > low - 1e-4 and margin.max() < high + 1e-4
        expected = torch.where(is_latent[n, :count], 0, log_p[:, 0])  # of text; of latents below
        expected[: len(margin)] = (-margin - (-margin).exp()).mean(-1)
        assert torch.allclose(ours[n, :count], expected, atol=2e-4)
    for t, logits in enumerate(seen):  # the same logits as while it was rolled out
        rows = mask[:, t].nonzero().squeeze(-1)
        top = logits.topk(8).indices
        assert (top[:, :, None] == roll.ids[rows, t][:, None]).any(1).all()
    assert t + 1 == roll.length.max() and (ours[~mask[:, : t + 1]] == 0).all()


def test_one_and_two_sided_noise_give_the_same_rollouts_and_scores_that_differ_by_the_shift():
    for scale in (0.5, 1.0):
        one, two = (roll_out(random_model(), settings(noise=n, noise_scale=scale)) for n in ("one_sided", "two_sided"))
        assert torch.equal(one.ids, two.ids) and torch.equal(one.length, two.length)
        _, is_latent = masks(one)
        shift = (one.scores - two.scores)[is_latent]
        assert len(shift) > 20 and torch.allclose(shift, torch.tensor(1.5 * scale), atol=1e-5)
        assert torch.allclose(one.scores.softmax(-1), two.scores.softmax(-1), atol=1e-5)


def test_thoughts_come_first_and_end_with_the_exit_token():
    roll = roll_out(random_model(), settings(), group_size=64)
    mask, is_latent = masks(roll)
    heaviest, exited = roll.ids[..., 0], roll.latents < roll.length
    assert exited.sum() > 20 and (heaviest[is_latent] != EXIT).all()
    assert (heaviest[exited, roll.latents[exited]] == EXIT).all()
    weights = roll.scores.softmax(-1)
    assert (weights[mask & ~is_latent][:, 0] == 1).all() and (weights[is_latent].amax(-1) < 1).all()
    assert (roll.length[~exited & (heaviest[torch.arange(192), roll.length - 1] != STOP)] == 10).all()
    ended_in_thought = ~exited & (roll.length < 10)  # an end token as the heaviest: no answer
    assert ended_in_thought.any()
    tokenizer = SimpleNamespace(batch_decode=lambda rows, **_: [str(row) for row in rows])
    texts, _ = latent_grpo.score(SimpleNamespace(tokenizer=tokenizer), roll, [common.Problem("", "")] * 3)
    for n, text in enumerate(texts):  # the verifier reads what is behind the thought
        assert text == str(heaviest[n, roll.latents[n] : roll.length[n]].tolist())


def test_discrete_tokens_are_draws_from_the_policy_that_scores_them():
    """The token behind an exit, against its probabilities (chi-square)."""
    lm, n = random_model(seed=4, scale=2.0), 6000
    lm.stop_ids = [99]
    first = int(lm.model(torch.tensor([[3, 4]])).logits[0, -1].argmax())
    args = settings(max_new_tokens=2, exit_id=first)  # an exit at once, since there is no noise
    expected = lm.model(torch.tensor([[3, 4, first]])).logits[0, -1].softmax(-1).detach()
    roll = roll_out(lm, args, n, prompts=[[3, 4]])
    assert (roll.ids[:, 0, 0] == first).all() and (roll.latents == 0).all()
    counts = roll.ids[:, 1, 0].bincount(minlength=12)
    assert ((counts - n * expected) ** 2 / (n * expected)).sum() < 31.3  # 11 degrees of freedom
    log_probs, _ = latent_grpo.replay(lm, roll, torch.arange(8), args)
    assert torch.allclose(log_probs[:, 1].exp(), expected[roll.ids[:8, 1, 0]], atol=1e-5)


def test_without_noise_a_rollout_is_the_softmax_of_the_k_best_and_greedy_text():
    """By hand, a prompt at a time; so padding, neighbours and rows that leave do not matter either."""
    lm, args = random_model(seed=5), settings(exit_id=4)
    lm.stop_ids = [0]
    roll = roll_out(lm, args, group_size=2, noise_free=True)
    assert roll.length.unique().numel() > 1 and (roll.latents < roll.length).any()
    for i, prompt in enumerate(PROMPTS):
        embeds, thinking = lm.table[torch.tensor(prompt)], True
        for t in range(int(roll.length[2 * i])):
            values, ids = lm.model(inputs_embeds=embeds[None]).logits[0, -1].topk(4)
            thinking = thinking and int(ids[0]) != 4
            weights = values.softmax(-1) if thinking else torch.eye(4)[0]
            for n in (2 * i, 2 * i + 1):
                assert roll.ids[n, t, 0] == ids[0] and thinking == (t < roll.latents[n])
                assert torch.allclose(roll.scores[n, t].softmax(-1), weights, atol=1e-5)
            embeds = torch.cat([embeds, (weights @ lm.table[ids])[None]])
        assert int(ids[0]) in lm.stop_ids or t + 1 == 10


def test_a_step_costs_one_top_k_and_one_logsumexp_over_the_vocabulary(monkeypatch):
    """No operation but these, and the head's product, touches more than the likeliest tokens."""
    monkeypatch.setattr(latent_grpo, "LIKELIEST", 8)
    lm, used = random_model(vocabulary=301), set()
    lm.head = lm.table.clone()  # so that a look-up in E is not one over the head

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
            out = function(*arguments, **(kwargs or {}))
            tensors = [x for x in [*arguments, out] if isinstance(x, torch.Tensor)]
            if any(301 in x.shape for x in tensors if not any(x is table for table in (lm.table, lm.head))):
                used.add(function.overloadpacket.__name__)
            return out

    with Watch():
        roll_out(lm, settings())
    head, group = {"mm", "t", "view"}, {"unsqueeze", "expand", "clone"}  # group: the prefill's logits for all rollouts
    assert {"topk", "logsumexp"} <= used <= {"topk", "logsumexp"} | head | group, used


# --- 4. Advantages ----------------------------------------------------------------------------------------------------


def test_advantages_of_a_group_with_an_overlong_rollout():
    rewards = torch.tensor([[1.0, 1, 0, 0], [1, 0, 1, 1], [1, 1, 1, 1], [1, 0, 0, 1], [1, 0, 0, 0]])
    valid = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    expected = [[0.577, 0.577, 0, -1.155], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [1.5, -0.5, -0.5, -0.5]]
    assert torch.allclose(latent_grpo.group_advantages(rewards, valid), torch.tensor(expected), atol=1e-3)
    everybody = latent_grpo.group_advantages(rewards[:1], torch.ones(1, 4).bool())
    assert torch.allclose(everybody, torch.tensor([[0.866, 0.866, -0.866, -0.866]]), atol=1e-3)


@pytest.mark.parametrize("overlong, first_token, first, later", [
    ("off", "off", [0.866, 0.866, -0.866, -0.866], [0.866, 0.866, -0.866, -0.866]),
    ("off", "paper", [0, 0.866, -0.866, -0.866], [0.866, 0.866, -0.866, -0.866]),  # the second is likelier
    ("exclude", "paper", [0, 0.577, 0, -1.155], [0.577, 0.577, 0, -1.155]),
])  # fmt: skip
def test_masking_and_first_token_selection(overlong, first_token, first, later, monkeypatch):
    length = torch.tensor([2, 4, 10, 3])  # means: -2, -1, -.1, -.1
    totals = torch.tensor([-4.0, -4.0, -1.0, -0.3])
    monkeypatch.setattr(latent_grpo, "replay", lambda lm, roll, rows, args: (totals[rows, None], None))
    roll = SimpleNamespace(length=length)
    args = settings(overlong=overlong, first_token=first_token)
    steps = latent_grpo.step_advantages(None, roll, torch.tensor([[1.0, 1, 0, 0]]), args)
    assert torch.allclose(steps[:, 0], torch.tensor(first), atol=1e-3)
    assert torch.allclose(steps[:, 1:], torch.tensor(later)[:, None].expand(4, 9), atol=1e-3)
    monkeypatch.undo()
    for reward in (torch.zeros(1, 4), torch.ones(1, 4)):  # nobody to select from, nothing to replay
        assert (latent_grpo.step_advantages(None, roll, reward, args) == 0).all()


# --- 5. The surrogate -------------------------------------------------------------------------------------------------


def surrogate(log_p, scores, how):
    return latent_grpo.step_log_probs(log_p, scores, torch.ones(len(log_p)).bool(), settings(surrogate=how))


def test_surrogate_by_hand():
    """Margins 1 and 2: f = -1 - 1/e = -1.367879 and -2 - 1/e^2 = -2.135335; weights e^.5 and e^.5, so .5 each."""
    log_p = torch.tensor([[-0.5, -1.5], [-0.5, -0.5]])
    scores = log_p + torch.tensor([[1.0, 2.0], [1.0, 2.0]])
    assert torch.allclose(surrogate(log_p, scores, "mean"), torch.tensor([-1.751607, -1.751607]), atol=1e-5)
    weights = torch.tensor([[0.5, 0.5], [1 / (1 + math.e), math.e / (1 + math.e)]])
    expected = weights @ torch.tensor([-1.367879, -2.135335])
    assert torch.allclose(surrogate(log_p, scores, "weighted"), expected, atol=1e-5)
    text = latent_grpo.step_log_probs(log_p, torch.tensor([[0, -math.inf]]), torch.zeros(2).bool(), settings())
    assert torch.equal(text, log_p[:, 0])


@pytest.mark.parametrize("how", ["mean", "weighted"])
def test_slope_of_the_surrogate_is_one_minus_exp_minus_margin(how):
    """Against the closed form, autograd through torch's Gumbel density, and finite differences."""
    generator = torch.Generator().manual_seed(0)
    log_p = torch.randn(6, 4, generator=generator, dtype=torch.float64).requires_grad_()
    scores = log_p.detach() + torch.randn(6, 4, generator=generator, dtype=torch.float64) * 2
    share = scores.softmax(-1) if how == "weighted" else torch.full_like(scores, 0.25)
    (gradient,) = torch.autograd.grad(surrogate(log_p, scores, how).sum(), log_p)
    assert torch.allclose(gradient, share * (1 - (log_p - scores).exp()), atol=1e-12)
    density = (share * Gumbel(log_p, torch.ones_like(log_p)).log_prob(scores)).sum()
    assert torch.allclose(gradient, torch.autograd.grad(density, log_p)[0], atol=1e-9)
    for i in range(4):
        nudge = torch.zeros_like(log_p)
        nudge[i, i] = 1e-6
        difference = (surrogate(log_p + nudge, scores, how) - surrogate(log_p - nudge, scores, how)).sum() / 2e-6
        assert abs(difference - gradient[i, i]) < 1e-6


def test_one_sided_noise_lets_no_candidate_be_pushed_the_wrong_way():
    """A step of gradient ascent on A log pi: with A > 0 every candidate rises and with A < 0 every one falls; with
    two-sided noise a third of them do the opposite."""
    for noise, low, high in (("one_sided", 0.0, 0.0), ("two_sided", 0.25, 0.5)):
        log_p, scores = draws(noise)
        wrong = scores - log_p < -1e-5  # negative margins
        assert low <= wrong.float().mean() <= high
        moving = log_p.clone().requires_grad_()
        (slope,) = torch.autograd.grad(surrogate(moving, scores, "mean").sum(), moving)
        assert torch.equal((slope < 0)[(scores - log_p).abs() > 1e-4], wrong[(scores - log_p).abs() > 1e-4])


def test_the_published_mean_flattens_the_policy_and_the_weighted_one_is_lepos_soft_label():
    """Gradients with respect to the logits where the K hold all the mass. The mean's, on average over draws and so at
    equal advantages, is near uniform(K) - pi; the weighted one is w - pi in every draw, one-sided or not."""
    for noise, low, high in (("one_sided", -0.5, 0.5), ("two_sided", 0.6, 0.8)):
        log_p, scores = draws(noise)
        pulls, pi, lepos = {}, log_p[0].exp(), scores.softmax(-1) - log_p.exp()
        for how in ("mean", "weighted"):
            logits = log_p.clone().requires_grad_()
            (pulls[how],) = torch.autograd.grad(surrogate(logits.log_softmax(-1), scores, how).sum(), logits)
        assert torch.allclose(pulls["weighted"], lepos, atol=1e-5)
        assert low < F.cosine_similarity(pulls["mean"], lepos, dim=-1).mean() < high
        if noise == "one_sided":
            mean, flat = pulls["mean"].mean(0), 0.2 - pi
            assert F.cosine_similarity(mean, flat, dim=0) > 0.99 and 0.75 < mean.norm() / flat.norm() < 1
            assert pulls["weighted"].mean(0).norm() < 0.35 * mean.norm()


# --- 6. The update ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["mean", "weighted"])
def test_gradient_of_an_update_is_that_by_hand(how):
    """At ratio 1 as anybody would write it: one row at a time, mixtures as constant embeddings, torch's Gumbel density,
    no padding. Nothing flows through mixtures or into the table."""
    lm, args = random_model(), settings(surrogate=how, micro_batch=5)
    roll = roll_out(lm, args)
    advantages = some_advantages(roll)
    ours = gradients(lm, roll, advantages, args)
    assert (roll.latents > 0).any() and (roll.latents < roll.length).any() and lm.table.grad is None
    lm.model.zero_grad()
    for n, count in enumerate(roll.length.tolist()):
        weights, prompt = roll.scores[n, :count].softmax(-1), torch.tensor(roll.prompts[n // 4])
        thought = torch.einsum("tk,tkd->td", weights, lm.table.detach()[roll.ids[n, :count]])
        logits = lm.model(inputs_embeds=torch.cat([lm.table.detach()[prompt], thought])[None]).logits[0]
        for t, row in enumerate(logits[len(prompt) - 1 : -1].log_softmax(-1)):
            log_prob = row[roll.ids[n, t, 0]]
            if t < roll.latents[n]:
                log_p = row[roll.ids[n, t]]
                density = Gumbel(log_p, torch.ones(4)).log_prob(roll.scores[n, t])
                log_prob = density.mean() if how == "mean" else (density * weights[t]).sum()
            (-advantages[n, t] * log_prob / roll.length.sum()).backward(retain_graph=True)
    assert_close(ours, {name: weight.grad for name, weight in lm.model.named_parameters() if weight.requires_grad})


def test_cutting_into_micro_batches_changes_nothing_and_idle_rows_count_in_the_denominator():
    lm, args = random_model(), settings()
    roll = roll_out(lm, args)
    advantages = some_advantages(roll)
    advantages[[1, 4, 5]] = 0.0  # rows that the update leaves out
    whole = gradients(lm, roll, advantages, args)
    for args.micro_batch in (1, 5):
        assert_close(gradients(lm, roll, advantages, args), whole)
    advantages[[1, 4, 5]] = 1e-12  # and rows that it does not, with as good as no advantage
    assert_close(gradients(lm, roll, advantages, args), whole)
    rows = torch.tensor([0, 2, 3, 7])  # of what was drawn, only these are learnt from
    fewer, advantages[[1, 4, 5, 6, 8, 9, 10, 11]] = gradients(lm, roll, advantages, args, rows), 0.0
    share = roll.length[rows].sum() / roll.length.sum()
    of_all = gradients(lm, roll, advantages, args)
    assert_close({name: gradient * share for name, gradient in fewer.items()}, of_all)


@pytest.mark.parametrize("ratio, advantage, value", [(1.5, 1, 1.2), (1.5, -1, -1.5), (0.5, 1, 0.5), (0.5, -1, -0.8)])
def test_clip(ratio, advantage, value):
    new, old = torch.tensor([[math.log(ratio), 1e4]]), torch.zeros(1, 2)
    gain, clipped = latent_grpo.clipped_objective(new, old, torch.tensor([[float(advantage)]]), 0.2)
    assert abs(gain[0, 0].item() - value) < 1e-6 and clipped[0, 0].item() == (value in (1.2, -0.8))
    assert gain.isfinite().all()


def test_second_pass_uses_the_first_ones_log_probabilities():
    lm, args = random_model(), settings(updates_per_batch=2, clip=1e-6, micro_batch=5)
    roll = roll_out(lm, args)
    sgd = torch.optim.SGD([weight for weight in lm.model.parameters() if weight.requires_grad], lr=0.1)
    update = (lm, sgd, roll, some_advantages(roll), torch.arange(12), args)
    assert latent_grpo.update(*update)["clipped"] > 0.3  # of both passes; none of the first
    sgd.param_groups[0]["lr"] = 0.0
    assert latent_grpo.update(*update)["clipped"] == 0


def test_bfloat16_compute_as_on_a_gpu(monkeypatch):
    """On the CPU, in a GPU's place: rollout and update under autocast, weights and gradients float32."""
    lm, args = random_model(), settings()
    roll = roll_out(lm, args)
    plain = gradients(lm, roll, some_advantages(roll), args)
    monkeypatch.setattr(common.LanguageModel, "autocast", lambda self: torch.autocast("cpu", torch.bfloat16))
    assert roll_out(lm, args).scores.dtype == torch.float32 == lm.model.dtype
    coarse = gradients(lm, roll, some_advantages(roll), args)
    a, b = (torch.cat([gradient.flatten() for gradient in each.values()]) for each in (plain, coarse))
    assert b.dtype == torch.float32 and not torch.equal(a, b) and F.cosine_similarity(a, b, dim=0) > 0.98


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change():
    lm, args = random_model(), settings()
    roll, before = roll_out(lm, args), [weight.clone() for weight in lm.model.parameters()]
    with pytest.raises(common.UserError, match="not finite"):
        sgd = torch.optim.SGD([weight for weight in lm.model.parameters() if weight.requires_grad], lr=1.0)
        latent_grpo.update(lm, sgd, roll, torch.full((12, 10), math.nan), torch.arange(12), args)
    assert all(torch.equal(a, b) for a, b in zip(before, lm.model.parameters(), strict=True))


# --- 7. and 8. Evaluation and dynamic sampling ------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["skipped", "shuffled", "heaviest"])
def test_damaged_latents_are_what_their_name_says(how, monkeypatch):
    """What the model is asked to go on from, against embeddings that are put together here; and the rewards."""
    lm, args = random_model(), settings(max_new_tokens=4)
    roll, generate, asked = roll_out(lm, settings(max_new_tokens=8), group_size=1), lm.model.generate, {}
    monkeypatch.setattr(lm.model, "generate", lambda **inputs: asked.update(inputs) or generate(**inputs))
    monkeypatch.setattr(common, "verify", lambda text, problem: (problem, 0))
    rewards = latent_grpo.answer_again(lm, roll, [0.0, 1.0, 0.0], how, args)
    assert rewards.tolist() == [[0], [1], [0]] and roll.latents.unique().numel() > 1
    for n, count in enumerate(roll.latents.tolist()):
        thought = torch.einsum("tk,tkd->td", roll.scores[n, :count].softmax(-1), lm.table[roll.ids[n, :count]])
        moved = torch.cat([thought[-1:], thought[:-1]])
        thought = {"skipped": thought[:0], "shuffled": moved, "heaviest": lm.table[roll.ids[n, :count, 0]]}[how]
        expected = torch.cat([lm.table[torch.tensor(roll.prompts[n])], thought, lm.table[[EXIT]]])
        assert torch.allclose(asked["inputs_embeds"][n, -len(expected) :], expected, atol=1e-5)
        assert asked["attention_mask"][n].sum() == len(expected) and (asked["attention_mask"][n].diff() >= 0).all()


def test_dynamic_sampling_draws_until_there_are_enough_groups_that_differ(monkeypatch):
    """The groups of problem 13 and of all from 18 on differ. Surplus groups are dropped."""
    lm, args, seen = random_model(), settings(max_draws=4), []
    monkeypatch.setattr(common, "take_problems", lambda args, split, start, count: list(range(start, start + count)))
    monkeypatch.setattr(common, "encode_prompt", lambda tokenizer, problem, ending: [5 + problem % 3])

    def score(lm, roll, problems):
        seen.append(problems)
        mixed = [problem == 13 or problem >= 18 for problem in problems]
        return [f"text {n}" for n in problems for _ in range(4)], torch.tensor([[1.0, 1, 1, 1 - m] for m in mixed])

    monkeypatch.setattr(latent_grpo, "score", score)
    generator = torch.Generator().manual_seed(0)
    problems, roll, texts, rewards, rows = latent_grpo.draw(lm, args, generator, 1)
    assert seen == [[12, 13, 14], [15, 16, 17], [18, 19, 20]] and problems == sum(seen, [])
    places = [problems.index(problem) for problem in (13, 18, 19)]
    assert rows.tolist() == [4 * place + i for place in places for i in range(4)]
    assert len(roll.length) == len(texts) == 36 and texts[-1] == "text 20" and rewards.shape == (9, 4)
    assert roll.prompts == [[5 + problem % 3] for problem in problems]
    args.max_draws = 1  # any group
    problems, *_, rows = latent_grpo.draw(lm, args, generator, 1)
    assert problems == [3, 4, 5] and rows.tolist() == list(range(12))
