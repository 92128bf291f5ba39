"""Proofs of latent_grpo.py: every formula against something that does not share its code.

    pytest test_latent_grpo.py               # the formulas and short runs, half a minute
    pytest test_latent_grpo.py -m slow       # two minutes: learning, processes, interrupts, real data
    pytest test_latent_grpo.py -k mask       # one subject

In the order of latent_grpo.py: the latent token, the rollout and its replay, advantages, the surrogate, the update,
evaluation, stage 1, and runs of the script. Monte-Carlo tests use fixed seeds and bounds of 4 standard errors or more.
"""

import copy
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may depend on a network
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported: what tests compare is equal on a CPU only

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.distributions import Gumbel
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

import engine
import latent_grpo

HERE = Path(__file__).parent
SHARED = HERE.parent / "shared"
PAD, STOP, EXIT = 0, 1, 2
PROMPTS = [[5, 6, 7], [8], [3, 4, 5, 6, 9, 10]]  # of different lengths


def settings(**changed):
    """The fields of latent_grpo.py's arguments that its functions read."""
    values = dict(
        top_k=4, top_p=0.95, tau=1.0, noise="one_sided", noise_scale=1.0, delta=0.0, exit_id=EXIT, exit_guard="on",
        answers="categorical", temperature=1.0, verifier_reads="written", surrogate="mean", flip="off",
        first_token="off", overlong="exclude", clip=0.2, dual_clip=3.0, kl_coef=0.0, loss_mean="steps", minibatches=1,
        max_new_tokens=8, grad_clip=1e9, micro_batch=64, gradient_checkpointing=False, device="cpu", ablate=0,
        max_draws=1, group_size=4, prompts_per_step=3, max_prompt_tokens=99, think_text="<think>",
        exit_text="</think>", labels="chunk", chunk=[2], sft_steps=10, label_steps=9, label_lr=1e-3, sft_batch=4,
        sft_lr=1e-3, sft_warmup=1, sft_noise=1.0,
    )  # fmt: skip
    return SimpleNamespace(**values | changed)


def random_model(vocabulary=12, seed=0, scale=6.0, tied=True, sharp=1.0):
    """A small random Qwen2 with logits spread enough for its mixtures to be neither flat nor one-hot; the table and the
    head frozen, as in the script. `sharp` above 1: its attention, nearly uniform otherwise, depends on who is seen
    from how far -> lm"""
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=tied, eos_token_id=STOP,
        )  # no pad token: transformers would set its embedding to 0
    ).eval()  # fmt: skip
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(scale)
        for name, weight in model.named_parameters():
            weight.mul_(sharp if "q_proj" in name or "k_proj" in name else 1.0)
    for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        table.requires_grad_(False)
    tokenizer = SimpleNamespace(batch_decode=lambda rows, **_: rows)  # "texts" are lists of ids
    return engine.LanguageModel(model, tokenizer, [STOP], PAD)


def roll_out(lm, args, group_size=4, seed=0, prompts=PROMPTS, noisy=True):
    return latent_grpo.rollout(lm, prompts, group_size, args, torch.Generator().manual_seed(seed), noisy)


def sgd(lm, lr=0.0):
    return torch.optim.SGD([p for p in lm.model.parameters() if p.requires_grad], lr=lr)


def every(roll):
    """The places of groups when one process has them all."""
    return torch.arange(len(roll.prompts))


def gradients(lm, roll, advantages, args, old=None, start=None):
    """Gradients that latent_grpo.update computes; the weights stay as they are (learning rate 0)."""
    lm.model.zero_grad()
    metrics = latent_grpo.update(lm, start, sgd(lm), roll, every(roll), advantages, old, 0.0, args)
    named = [(n, p) for n, p in lm.model.named_parameters() if p.requires_grad]
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in named}, metrics


def assert_close_gradients(ours, theirs, tolerance=1e-5):
    scale = max(g.abs().max() for g in theirs.values())
    assert scale > 0 and ours.keys() == theirs.keys()
    for name in theirs:
        assert (ours[name] - theirs[name]).abs().max() <= tolerance * scale, name


def random_advantages(roll, seed=0):
    """(N, T), of both signs, the same at every step of a row."""
    return torch.randn(len(roll.length), 1, generator=torch.Generator().manual_seed(seed)).expand(roll.ids.shape[:2])


# ----------------------------------------------------------------------------------------------------------------------
# 3. The latent token.


def test_noise_is_gumbel_clipped_to_its_interval_and_shifted():
    gumbel = latent_grpo.gumbel_noise((200_000,), torch.Generator().manual_seed(0), "cpu")
    two = latent_grpo.latent_noise(gumbel, settings(noise="two_sided"))
    one = latent_grpo.latent_noise(gumbel, settings())
    assert two.min() == -1.5 and two.max() == 3 and one.min() == 0 and one.max() == 4.5
    for value, mass in ((-1.5, math.exp(-math.exp(1.5))), (3.0, 1 - math.exp(-math.exp(-3.0)))):  # 1.1 %, 4.9 %
        assert abs((two == value).float().mean() - mass) < 4 * math.sqrt(mass / 200_000)
    inside = two[(two > -1.5) & (two < 3)]
    low, high = (Gumbel(0.0, 1.0).cdf(torch.tensor(x)) for x in (-1.5, 3.0))
    for x in (-1.0, 0.0, 1.0, 2.0):
        expected = (Gumbel(0.0, 1.0).cdf(torch.tensor(x)) - low) / (high - low)
        assert abs((inside <= x).float().mean() - expected) < 4 * 0.5 / math.sqrt(len(inside))
    assert torch.allclose(latent_grpo.latent_noise(gumbel, settings(noise_scale=0.5, delta=1e-3)), 0.5 * (one + 1e-3))


@pytest.mark.parametrize("top_p, seed", [(0.95, 0), (0.5, 1), (1.0, 2), (1e-6, 3)])
def test_candidates_are_the_k_best_noisy_scores_of_the_nucleus(top_p, seed):
    """Against one row at a time, spelled out."""
    generator = torch.Generator().manual_seed(seed)
    log_p = (3 * torch.randn(50, 20, generator=generator)).log_softmax(-1)
    gumbel = latent_grpo.gumbel_noise((50, 20), generator, "cpu")
    args = settings(top_p=top_p, tau=0.7, noise="two_sided", exit_guard="off")
    token = latent_grpo.latent_token(log_p, gumbel, args)
    for n in range(50):
        order, mass, allowed = sorted(range(20), key=lambda i, n=n: -log_p[n, i]), 0.0, []
        for rank, i in enumerate(order):
            if mass < top_p or rank < 4:
                allowed.append(i)
            mass += log_p[n, i].exp().item()
        noisy = {i: (log_p[n, i] + gumbel[n, i].clamp(-1.5, 3)).item() for i in allowed}
        best = sorted(noisy, key=lambda i, noisy=noisy: -noisy[i])[:4]
        assert token.ids[n].tolist() == best
        scores = torch.tensor([noisy[i] for i in best])
        assert torch.allclose(token.scores[n], scores, atol=1e-6)
        assert torch.allclose(token.weights[n], (scores / 0.7).softmax(-1), atol=1e-6)


@pytest.mark.parametrize("noise, gumbel", [("none", torch.zeros(30, 20)), ("one_sided", None)])
def test_without_noise_a_latent_is_the_softmax_of_the_k_best(noise, gumbel):
    logits = torch.randn(30, 20, generator=torch.Generator().manual_seed(0)) * 3
    token = latent_grpo.latent_token(logits.log_softmax(-1), gumbel, settings(noise=noise, tau=0.5))
    values, ids = logits.topk(4)
    assert torch.equal(token.ids, ids) and torch.allclose(token.weights, values.softmax(-1), atol=1e-6)


def test_guard_makes_the_exit_certain_where_it_is_likeliest():
    logits = torch.zeros(500, 12)
    logits[:, EXIT] = 0.5
    generator = torch.Generator().manual_seed(0)
    gumbel = latent_grpo.gumbel_noise((500, 12), generator, "cpu")
    exits = {
        guard: latent_grpo.latent_token(logits.log_softmax(-1), gumbel, settings(exit_guard=guard)).ids[:, 0] == EXIT
        for guard in ("on", "off")
    }
    assert exits["on"].all() and 0.05 < exits["off"].float().mean() < 0.5
    logits[:, 5] = 0.6  # no longer the likeliest: noise is back, and may lift it
    lifted = latent_grpo.latent_token(logits.log_softmax(-1), gumbel, settings()).ids[:, 0] == EXIT
    assert 0.02 < lifted.float().mean() < 0.5


def test_one_sided_and_two_sided_noise_give_the_same_rollouts_and_scores_that_differ_by_the_shift():
    for scale in (0.5, 1.0):
        lm = random_model()
        one, two = (roll_out(lm, settings(noise=noise, noise_scale=scale)) for noise in ("one_sided", "two_sided"))
        assert torch.equal(one.ids, two.ids) and torch.equal(one.length, two.length)
        assert torch.allclose(one.weights, two.weights, atol=1e-5)
        latent = latent_grpo.is_latent(one)
        assert latent.sum() > 20
        assert torch.allclose((one.scores - two.scores)[latent], torch.tensor(1.5 * scale), atol=1e-5)
        assert (one.scores[latent] > -math.inf).all()


# ----------------------------------------------------------------------------------------------------------------------
# 4. The rollout and its replay.


def record_rollout(lm, args, **kwargs):
    """roll_out, and the logits it saw: (N, T, V), NaN where a row had ended."""
    seen, original = [], engine.decode

    def spy(lm, prompts, group_size, cap, choose):
        def watch(logits, t, rows):
            seen.append((rows.clone(), logits.clone()))
            return choose(logits, t, rows)

        return original(lm, prompts, group_size, cap, watch)

    latent_grpo.engine.decode = spy
    try:
        roll = roll_out(lm, args, **kwargs)
    finally:
        latent_grpo.engine.decode = original
    logits = torch.full((len(roll.length), len(seen), seen[0][1].shape[-1]), math.nan)
    for t, (rows, values) in enumerate(seen):
        logits[rows, t] = values
    return roll, logits


@pytest.mark.parametrize("noise", ["one_sided", "two_sided", "none"])
def test_replayed_logits_equal_rollout_logits(noise):
    """With prompts of different lengths, thoughts of different lengths, and rows that end early."""
    lm = random_model(sharp=8.0)
    roll, seen = record_rollout(lm, settings(noise=noise, exit_guard="off", max_new_tokens=10), group_size=16)
    latents, exited = latent_grpo.thought_lengths(roll)
    if noise != "none":  # without noise all thoughts of this model run to the cap
        assert roll.length.unique().numel() > 3 and roll.stopped.any() and not roll.stopped.all()
        assert latents.unique().numel() > 3 and exited.any() and not exited.all()
    replayed = torch.full_like(seen, math.nan)
    with torch.no_grad():
        for rows, hidden in engine.replays(lm, roll, torch.arange(48), micro_batch=7):
            replayed[rows, : hidden.shape[1]] = hidden @ lm.head.T
    valid = roll.mask()
    assert torch.equal(valid, ~seen[..., 0].isnan())
    assert (replayed - seen)[valid].abs().max() < 2e-5 * seen[valid].abs().max()
    # What is stored is what the logits and the noise made: margins are the noise.
    log_p = replayed.log_softmax(-1).gather(-1, roll.ids)
    margin = (roll.scores - log_p)[latent_grpo.is_latent(roll)]
    low, high = {"one_sided": (0.0, 4.5), "two_sided": (-1.5, 3.0), "none": (0.0, 0.0)}[noise]
    assert margin.min() > low - 1e-4 and margin.max() < high + 1e-4


def test_thoughts_come_first_and_end_with_the_exit_token_written():
    lm = random_model()
    roll = roll_out(lm, settings(exit_guard="off", max_new_tokens=10), group_size=64)
    latent, mask = latent_grpo.is_latent(roll), roll.mask()
    latents, exited = latent_grpo.thought_lengths(roll)
    assert torch.equal(latent, torch.arange(latent.shape[1]) < latents[:, None])  # a prefix
    heaviest = roll.heaviest()
    assert (heaviest[latent] != EXIT).all()
    assert (heaviest[exited, latents[exited]] == EXIT).all()
    assert torch.equal(roll.ids[..., 0][latent], heaviest[latent])  # the heaviest stands first
    hard = mask & ~latent
    assert (roll.weights[hard][:, 0] == 1).all() and (roll.weights[hard][:, 1:] == 0).all()
    assert hard.sum() > exited.sum() > 20  # words after exits
    overlong = ~exited & ~roll.stopped
    assert overlong.any() and (roll.length[overlong] == 10).all()


def test_end_of_text_as_heaviest_candidate_ends_the_rollout_without_an_answer():
    lm = random_model()
    args = settings(exit_guard="off", max_new_tokens=10)
    roll = roll_out(lm, args, group_size=64)
    latents, exited = latent_grpo.thought_lengths(roll)
    silent = roll.stopped & ~exited
    assert silent.any() and (latents[silent] == roll.length[silent]).all()
    assert (roll.heaviest()[silent, roll.length[silent] - 1] == STOP).all()
    written, all_of_it = (latent_grpo.texts_of(lm, roll, settings(verifier_reads=what)) for what in ("written", "all"))
    for n in range(len(written)):
        assert written[n] == all_of_it[n][latents[n] :] and len(all_of_it[n]) == roll.length[n]
        assert (written[n] == []) == (not exited[n])


def test_written_tokens_are_drawn_from_the_policy_that_scores_them():
    """The token after an exit, against its probabilities at that temperature (chi-square)."""
    lm, n = random_model(seed=4, scale=2.0), 6000
    args = settings(max_new_tokens=2, temperature=0.6)
    lm.stop_ids = [99]
    args.exit_id = int(lm.model(torch.tensor([[3, 4]])).logits[0, -1].argmax())  # an exit at once, by the guard
    with torch.no_grad():
        expected = (lm.model(torch.tensor([[3, 4, args.exit_id]])).logits[0, -1] / 0.6).softmax(-1)
    roll = roll_out(lm, args, n, prompts=[[3, 4]])
    assert (roll.ids[:, 0, 0] == args.exit_id).all() and not latent_grpo.is_latent(roll).any()
    counts = roll.heaviest()[:, 1].bincount(minlength=12)
    chi2 = ((counts - n * expected) ** 2 / (n * expected)).sum()
    assert chi2 < 31.3  # 11 degrees of freedom, p = .001
    ((rows, hidden),) = list(engine.replays(lm, roll, torch.arange(8), 8))
    log_probs, _ = latent_grpo.trajectory_log_probs(lm, roll, rows, hidden, torch.zeros(8, 2), args)
    assert torch.allclose(log_probs[:, 1].exp(), expected[roll.heaviest()[rows, 1]], atol=1e-5)


def test_noisy_answers_are_the_top_1_of_the_scores():
    lm = random_model()
    roll, seen = record_rollout(lm, settings(answers="noisy", exit_guard="off", top_p=1.0), group_size=64)
    words = roll.mask() & ~latent_grpo.is_latent(roll)
    words[torch.arange(192), latent_grpo.thought_lengths(roll)[0].clamp(max=words.shape[1] - 1)] = False  # exits
    rank = (seen > seen.gather(-1, roll.heaviest()[..., None])).sum(-1)[words]
    assert words.sum() > 50 and 0.2 < (rank == 0).float().mean() < 1
    gap = seen.amax(-1) - seen.gather(-1, roll.heaviest()[..., None]).squeeze(-1)
    assert gap[words].max() < 4.5  # clipped noise lifts nothing by more


def test_join_takes_groups_of_several_rollouts():
    lm = random_model()
    first, second = (roll_out(lm, settings(max_new_tokens=cap), seed=cap) for cap in (5, 9))
    both = latent_grpo.join([(first, torch.tensor([2])), (second, torch.tensor([0, 1]))])
    assert both.prompts == [PROMPTS[2], PROMPTS[0], PROMPTS[1]] and both.group_size == 4
    for roll, rows, place in ((first, slice(8, 12), slice(0, 4)), (second, slice(0, 8), slice(4, 12))):
        steps, width = roll.ids.shape[1:]
        assert torch.equal(both.length[place], roll.length[rows])
        mask = both.mask()[place, :steps]
        assert torch.equal(mask, roll.mask()[rows])
        assert torch.equal(both.ids[place, :steps, :width][mask], roll.ids[rows][mask])
        assert torch.equal(both.scores[place, :steps, :width][mask], roll.scores[rows][mask])
        assert torch.equal(latent_grpo.is_latent(both)[place, :steps], latent_grpo.is_latent(roll)[rows])


# ----------------------------------------------------------------------------------------------------------------------
# 5. Advantages.

REWARDS = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
OVERLONG = torch.tensor([[False, False, True, False]])


def steps_of(rewards, too_long, log_probs=None, **changed):
    """Advantages (P, G, T = 3) after everything."""
    args = settings(**changed)
    advantages = latent_grpo.group_advantages(rewards, too_long, args.overlong)
    log_probs = torch.zeros_like(rewards) if log_probs is None else log_probs
    return latent_grpo.stepwise_advantages(advantages, too_long, log_probs, 3, args).view(*rewards.shape, 3)


@pytest.mark.parametrize("overlong, expected, final", [
    ("exclude", [0.577, 0.577, 0, -1.155], [0.577, 0.577, 0, -1.155]),
    ("include", [0.866, 0.866, -0.866, -0.866], [0.866, 0.866, 0, -0.866]),
    ("off", [0.866, 0.866, -0.866, -0.866], [0.866, 0.866, -0.866, -0.866]),
])  # fmt: skip
def test_advantages_of_a_group_with_an_overlong_rollout(overlong, expected, final):
    advantages = latent_grpo.group_advantages(REWARDS, OVERLONG, overlong)
    assert torch.allclose(advantages, torch.tensor([expected]), atol=1e-3)
    steps = steps_of(REWARDS, OVERLONG, overlong=overlong)
    assert torch.allclose(steps, torch.tensor(final)[None, :, None].expand(1, 4, 3), atol=1e-3)


def test_advantages_where_nothing_is_left_to_compare_with():
    rewards = torch.tensor([[1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 1.0]])
    overlong = torch.tensor([[False, True, True, True], [False] * 4, [True] * 4])
    advantages = latent_grpo.group_advantages(rewards, overlong, "exclude")
    assert torch.allclose(advantages, torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]), atol=1e-5)
    assert (advantages[1:] == 0).all()


@pytest.mark.parametrize("how, first_step", [
    ("off", [0.866, 0.866, -0.866, -0.866]),
    ("paper", [0.0, 0.866, -0.866, -0.866]),
    ("code", [0.0, 0.866, 0.0, 0.0]),
])  # fmt: skip
def test_first_token_selection_in_both_readings(how, first_step):
    nobody = torch.zeros(1, 4, dtype=torch.bool)
    log_probs = torch.tensor([[-2.0, -1.0, -0.5, -3.0]])  # of the right ones, the second is likelier
    steps = steps_of(REWARDS, nobody, log_probs, first_token=how)[0]
    assert torch.allclose(steps[:, 0], torch.tensor(first_step), atol=1e-3)
    assert torch.allclose(steps[:, 1:], torch.tensor([0.866, 0.866, -0.866, -0.866])[:, None].expand(4, 2), atol=1e-3)
    all_wrong = steps_of(torch.zeros(1, 4), nobody, log_probs, first_token=how)
    assert (all_wrong == 0).all()


def test_an_overlong_winner_leaves_the_first_step_to_nobody_in_the_official_order():
    overlong = torch.tensor([[False, True, False, False]])
    log_probs = torch.tensor([[-2.0, -1.0, -0.5, -3.0]])
    included = steps_of(REWARDS, overlong, log_probs, first_token="code", overlong="include")[0]
    assert (included[:, 0] == 0).all() and included[0, 1] > 0 and (included[1] == 0).all()
    excluded = steps_of(REWARDS, overlong, log_probs, first_token="code", overlong="exclude")[0]
    assert excluded[0, 0] > 0


# ----------------------------------------------------------------------------------------------------------------------
# 6. The surrogate.


def test_surrogate_by_hand():
    """Margins 1 and 2: f = -1 - 1/e = -1.367879 and -2 - 1/e^2 = -2.135335."""
    log_p, margins = torch.tensor([[-0.5, -1.5]]), torch.tensor([[1.0, 2.0]])
    weights, zero = torch.tensor([[0.75, 0.25]]), torch.zeros(1)
    for how, expected in (("mean", -1.751607), ("weighted", -1.559743)):
        value = latent_grpo.latent_log_prob(log_p, weights, log_p + margins, zero, settings(surrogate=how))
        assert abs(value.item() - expected) < 1e-5
    torchs = Gumbel(log_p, torch.ones(1, 2)).log_prob(log_p + margins).mean()
    assert abs(torchs.item() + 1.751607) < 1e-5


@pytest.mark.parametrize("how", ["mean", "weighted"])
def test_slope_of_the_surrogate_is_one_minus_exp_minus_margin(how):
    """Against the closed form, against autograd through torch's Gumbel density, and against finite differences."""
    generator = torch.Generator().manual_seed(0)
    log_p = torch.randn(6, 4, generator=generator, dtype=torch.float64).requires_grad_()
    scores = log_p.detach() + torch.randn(6, 4, generator=generator, dtype=torch.float64) * 2
    weights = torch.randn(6, 4, generator=generator, dtype=torch.float64).softmax(-1)
    share = weights if how == "weighted" else torch.full_like(weights, 0.25)
    args, zero = settings(surrogate=how), torch.zeros(6)

    def ours(x):
        return latent_grpo.latent_log_prob(x, weights, scores, zero, args).sum()

    (gradient,) = torch.autograd.grad(ours(log_p), log_p)
    assert torch.allclose(gradient, share * (1 - (log_p - scores).exp()), atol=1e-12)
    density = (share * Gumbel(log_p, torch.ones_like(log_p)).log_prob(scores)).sum()
    assert torch.allclose(gradient, torch.autograd.grad(density, log_p)[0], atol=1e-9)
    for i in range(3):
        nudge = torch.zeros_like(log_p)
        nudge[i, i] = 1e-6
        difference = (ours(log_p + nudge) - ours(log_p - nudge)) / 2e-6
        assert abs(difference - gradient[i, i]) < 1e-6


@pytest.mark.parametrize("flip, advantage, slope", [
    ("off", -1.0, 1 - math.exp(2)),  # -6.39: a descent step at A = -1 raises what was bad
    ("code", -1.0, math.exp(-2) - 1),  # -0.86: raises it, only less
    ("intended", -1.0, 1 - math.exp(-2)),  # +0.86: lowers it
    ("code", 0.0, math.exp(-2) - 1),
    ("intended", 0.0, 1 - math.exp(-2)),
    ("off", 1.0, 1 - math.exp(2)), ("code", 1.0, 1 - math.exp(2)), ("intended", 1.0, 1 - math.exp(2)),
])  # fmt: skip
def test_the_flips_true_sign(flip, advantage, slope):
    """Margins -2 and 1: the gradient of the first depends on the switch, that of the second and the value do not."""
    log_p = torch.tensor([[-1.0, -2.0]]).requires_grad_()
    scores, weights = torch.tensor([[-3.0, -1.0]]), torch.tensor([[0.5, 0.5]])
    value = latent_grpo.latent_log_prob(log_p, weights, scores, torch.tensor([advantage]), settings(flip=flip))
    expected = Gumbel(log_p.detach(), torch.ones(1, 2)).log_prob(scores).mean()
    assert torch.allclose(value, expected)
    (gradient,) = torch.autograd.grad(value.sum(), log_p)
    assert torch.allclose(gradient, torch.tensor([[slope, 1 - math.exp(-1)]]) / 2, atol=1e-5)
    moved = log_p.detach() + 0.01 * advantage * gradient  # a step of gradient ascent on A log pi
    if advantage < 0:
        assert (moved[0, 0] < log_p[0, 0]) == (flip == "intended")


def draws(noise, n=100_000, pi=(0.4, 0.3, 0.15, 0.1, 0.05)):
    """n latents at one state whose candidates are the whole vocabulary -> log_p, weights, scores (n, 5) by id"""
    log_p = torch.tensor(pi).log().expand(n, -1)
    gumbel = latent_grpo.gumbel_noise((n, 5), torch.Generator().manual_seed(0), "cpu")
    token = latent_grpo.latent_token(log_p, gumbel, settings(top_k=5, top_p=1.0, noise=noise, exit_guard="off"))
    place = token.ids.argsort(-1)
    return log_p, *(x.gather(-1, place) for x in (token.weights, token.scores))


def test_the_published_mean_pushes_every_candidate_up_and_the_weighted_one_hardly_pushes_at_all():
    """Expected gradient with respect to the logits, at equal advantages: the part that teaches nothing. One-sided: the
    mean's is near uniform(K) - pi, which flattens the policy; weighting takes most of it away, and what is left of
    each draw is nearly LEPO's z - pi."""
    pulls = {}
    for how in ("mean", "weighted"):
        log_p, weights, scores = draws("one_sided")
        logits = log_p.clone().requires_grad_()
        value = latent_grpo.latent_log_prob(
            logits.log_softmax(-1), weights, scores, torch.ones(len(logits)), settings(surrogate=how)
        )
        (pulls[how],) = torch.autograd.grad(value.sum(), logits)
    pi = log_p[0].exp()
    flat = 0.2 - pi
    mean = pulls["mean"].mean(0)
    assert F.cosine_similarity(mean, flat, dim=0) > 0.99 and 0.75 < mean.norm() / flat.norm() < 1
    assert pulls["weighted"].mean(0).norm() < 0.35 * mean.norm()
    lepos = weights - pi
    assert F.cosine_similarity(pulls["weighted"], lepos, dim=-1).mean() > 0.95
    assert abs(F.cosine_similarity(pulls["mean"], lepos, dim=-1).mean()) < 0.5


def test_margins_are_never_negative_one_sided_and_often_two_sided():
    for noise, low, high in (("one_sided", 0.0, 0.0), ("two_sided", 0.25, 0.5)):
        log_p, _, scores = draws(noise)
        assert low <= (scores - log_p < -1e-5).float().mean() <= high


# ----------------------------------------------------------------------------------------------------------------------
# 7. The update.


def by_hand(lm, roll, advantages, args, share):
    """Gradients at ratio 1 as anybody would write them: one row at a time, mixtures as constant input embeddings,
    torch's Gumbel density, no padding. share (N,): the weight of a step of each row."""
    model, table = lm.model, lm.table.detach()
    model.zero_grad()
    latent = latent_grpo.is_latent(roll)
    for n, count in enumerate(roll.length.tolist()):
        prompt = roll.prompts[n // roll.group_size]
        mixed = torch.einsum("tk,tkd->td", roll.weights[n, :count], table[roll.ids[n, :count]])
        embeds = torch.cat([table[torch.tensor(prompt)], mixed])[None]
        logits = model(inputs_embeds=embeds).logits[0, len(prompt) - 1 : -1]
        for t in range(count):
            if latent[n, t]:
                log_p = logits[t].log_softmax(-1)[roll.ids[n, t]]
                densities = Gumbel(log_p, torch.ones_like(log_p)).log_prob(roll.scores[n, t])
                weighted = args.surrogate == "weighted"
                log_prob = (densities * roll.weights[n, t]).sum() if weighted else densities.mean()
            else:
                log_prob = (logits[t] / args.temperature).log_softmax(-1)[roll.ids[n, t, 0]]
            (-advantages[n, t] * share[n] * log_prob).backward(retain_graph=True)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("how", ["mean", "weighted"])
@pytest.mark.parametrize("loss_mean", ["steps", "rollouts"])
def test_gradient_of_an_update_is_that_by_hand(how, loss_mean):
    """No gradient through mixtures or into the table; both normalisers; temperature of written tokens."""
    lm, args = random_model(), settings(surrogate=how, loss_mean=loss_mean, temperature=0.6, micro_batch=5)
    roll = roll_out(lm, args)
    assert latent_grpo.is_latent(roll).any() and latent_grpo.thought_lengths(roll)[1].any()
    advantages = random_advantages(roll).clone()
    advantages[:, 0] = 0.5  # another one at the first step
    share = 1 / roll.length / 12 if loss_mean == "rollouts" else torch.ones(12) / roll.length.sum()
    assert_close_gradients(gradients(lm, roll, advantages, args)[0], by_hand(lm, roll, advantages, args, share))
    assert lm.table.grad is None and lm.head.grad is None


def test_rows_without_advantage_count_in_the_normaliser_only():
    lm, args = random_model(), settings()
    roll = roll_out(lm, args)
    advantages = random_advantages(roll).clone()
    advantages[[1, 4, 5]] = 0.0
    whole, _ = gradients(lm, roll, advantages, args)
    advantages[[1, 4, 5]] = 1e-12
    assert_close_gradients(gradients(lm, roll, advantages, args)[0], whole)
    nothing, metrics = gradients(lm, roll, torch.zeros_like(advantages), args)
    assert metrics["grad_norm"] == 0 and all((g == 0).all() for g in nothing.values())


@pytest.mark.parametrize("ratio, advantage, value", [
    (1.5, 1, 1.2), (1.5, -1, -1.5), (0.5, 1, 0.5), (0.5, -1, -0.8), (5.0, -1, -3.0), (5.0, 1, 1.2),
])  # fmt: skip
def test_clip_and_dual_clip(ratio, advantage, value):
    new = torch.tensor([[math.log(ratio)]]).requires_grad_()
    gain, clipped = latent_grpo.clipped_gain(new, torch.zeros(1, 1), torch.tensor([[float(advantage)]]), 0.2, 3.0)
    assert abs(gain.item() - value) < 1e-5
    assert clipped.item() == (value in (1.2, -0.8, -3.0))
    (gradient,) = torch.autograd.grad(gain.sum(), new)
    assert (gradient.item() == 0) == clipped.item()


def test_exploding_ratio_stays_finite():
    new = torch.tensor([[1e4, -1e4]]).requires_grad_()
    for advantage in (1.0, -1.0):
        gain, _ = latent_grpo.clipped_gain(new, torch.zeros(1, 2), torch.full((1, 2), advantage), 0.2, 3.0)
        (gradient,) = torch.autograd.grad(gain.sum(), new)
        assert torch.isfinite(gain).all() and torch.isfinite(gradient).all()


def test_minibatches_take_a_step_each_and_later_ones_see_the_first_ones_log_probabilities():
    """Three parts by hand: the same rollouts cut by prompt, scored before anything moved."""
    args = settings(minibatches=3, temperature=0.6)
    lm, other = random_model(), random_model()
    roll = roll_out(lm, args)
    advantages = random_advantages(roll)
    old = latent_grpo.current_log_probs(lm, roll, torch.zeros(roll.ids.shape[:2]), args)
    metrics = latent_grpo.update(lm, None, sgd(lm), roll, every(roll), advantages, old, 3.0, args)
    one, optimizer = settings(temperature=0.6), sgd(other)
    for i in range(3):
        part, rows = latent_grpo.join([(roll, torch.tensor([i]))]), slice(4 * i, 4 * i + 4)
        latent_grpo.update(other, None, optimizer, part, every(part), advantages[rows], old[rows], 3.0, one)
    for a, b in zip(lm.model.parameters(), other.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert metrics["clipped"] > 0.1
    fresh = random_model()
    assert latent_grpo.update(fresh, None, sgd(fresh), roll, every(roll), advantages, old, 0.0, args)["clipped"] == 0


def test_scores_before_the_update_are_its_log_probabilities():
    lm, args = random_model(), settings(temperature=0.6)
    roll = roll_out(lm, args)
    old = latent_grpo.current_log_probs(lm, roll, torch.zeros(roll.ids.shape[:2]), args)
    ((rows, hidden),) = list(engine.replays(lm, roll, torch.arange(12), 64))
    log_probs, _ = latent_grpo.trajectory_log_probs(lm, roll, rows, hidden, random_advantages(roll)[rows], args)
    assert torch.allclose(old[rows], log_probs, atol=1e-5) and (old[~roll.mask()] == 0).all()


def test_kl_is_k3_on_the_stored_scores():
    lm, start, args = random_model(), random_model(seed=7), settings(kl_coef=1.0)
    roll = roll_out(lm, args)
    nothing = torch.zeros(roll.ids.shape[:2])
    ours, reference = (latent_grpo.current_log_probs(m, roll, nothing, args) for m in (lm, start))
    r = (reference - ours)[roll.mask()].double()
    _, metrics = gradients(lm, roll, nothing, args, start=start)
    assert abs(metrics["kl"] - (r.exp() - r - 1).clamp(max=10).mean()) < 1e-4 * metrics["kl"]
    assert gradients(lm, roll, nothing, args, start=copy.deepcopy(lm))[1]["kl"] < 1e-9
    optimizer = torch.optim.Adam([p for p in lm.model.parameters() if p.requires_grad])
    kl = []
    for _ in range(30):
        kl.append(latent_grpo.update(lm, start, optimizer, roll, every(roll), nothing, None, 3e-3, args)["kl"])
    assert kl[0] > 0.05 and kl[-1] < 0.5 * kl[0]


def test_cutting_into_micro_batches_and_checkpointing_change_nothing():
    lm, args = random_model(), settings()
    roll = roll_out(lm, args)
    advantages = random_advantages(roll)
    whole, metrics = gradients(lm, roll, advantages, args)
    for changed in (dict(micro_batch=1), dict(micro_batch=5), dict(gradient_checkpointing=True)):
        ours, others = gradients(lm, roll, advantages, settings(**changed))
        assert_close_gradients(ours, whole)
        assert all(abs(others[key] - metrics[key]) < 1e-4 for key in metrics)


def test_margin_statistics():
    lm = random_model()
    roll = roll_out(lm, settings(noise="two_sided"))
    _, metrics = gradients(lm, roll, random_advantages(roll), settings())
    latent = latent_grpo.is_latent(roll)
    log_p = torch.zeros_like(roll.scores)
    with torch.no_grad():
        for rows, hidden in engine.replays(lm, roll, torch.arange(12), 64):
            log_p[rows, : hidden.shape[1]] = (hidden @ lm.head.T).log_softmax(-1).gather(-1, roll.ids[rows])
    margins = (roll.scores - log_p)[latent]
    assert abs(metrics["margin"] - margins.mean()) < 1e-4
    assert abs(metrics["margin_negative"] - (margins < -1e-3).float().mean()) < 1e-6 and metrics["margin_negative"] > 0


def test_non_finite_gradient_stops_before_the_weights_change():
    lm, args = random_model(), settings()
    roll = roll_out(lm, args)
    before = [p.clone() for p in lm.model.parameters()]
    with pytest.raises(engine.UserError, match="not finite"):
        nan = torch.full(roll.ids.shape[:2], math.nan)
        latent_grpo.update(lm, None, sgd(lm), roll, every(roll), nan, None, 1.0, args)
    assert all(torch.equal(a, b) for a, b in zip(before, lm.model.parameters(), strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# 8. Evaluation with ablated latents.


@pytest.mark.parametrize("how", [*latent_grpo.ABLATIONS, "intact"])
def test_ablated_latents_are_what_their_name_says(how):
    """The first words, against the model run on embeddings that are put together here."""
    lm, args = random_model(), settings(max_new_tokens=10)
    roll = roll_out(lm, settings(max_new_tokens=10, exit_guard="off"), group_size=16)
    latents, exited = latent_grpo.thought_lengths(roll)
    again = latent_grpo.answer_again(lm, roll, how, args)
    checked, table = 0, lm.table
    for n in (exited & (latents > 1) & (roll.length > latents + 1)).nonzero().flatten().tolist():
        count = int(latents[n])
        thoughts = torch.einsum("tk,tkd->td", roll.weights[n, :count], table[roll.ids[n, :count]])
        thoughts = {
            "intact": thoughts, "skipped": thoughts[:0], "zeroed": thoughts * 0, "shuffled": thoughts.roll(-1, 0),
            "heaviest": table[roll.ids[n, torch.arange(count), roll.weights[n, :count].argmax(-1)]],
        }[how]  # fmt: skip
        prompt = table[torch.tensor(roll.prompts[n // 16])]
        with torch.no_grad():
            logits = lm.model(inputs_embeds=torch.cat([prompt, thoughts, table[[EXIT]]])[None]).logits[0, -1]
        assert int(again.heaviest()[n, len(thoughts)]) == EXIT
        assert int(again.heaviest()[n, len(thoughts) + 1]) == int(logits.argmax())
        if how == "shuffled":
            assert torch.equal(again.weights[n, :count], roll.weights[n, :count].roll(-1, 0))
        checked += 1
    assert checked > 5
    if how == "intact":  # what was answered after these thoughts is answered after them again
        once_more = latent_grpo.answer_again(lm, again, how, args)
        assert torch.equal(once_more.heaviest(), again.heaviest()) and torch.equal(once_more.length, again.length)


# ----------------------------------------------------------------------------------------------------------------------
# 9. Stage 1: labels, masks, losses.


def test_worked_solutions():
    student = engine.Problem(" 17 + 5 ? <think>", "22", "think", " 17 + 5 = 12 </think> 12<eos>")
    assert latent_grpo.worked(student) == (" 17 + 5 = 12", " 12")  # what the student wrote, right or not
    prose = "He sold 48/2 = $<<48/2=24>>24.00.\nIn all <<48+24=72>>72 < 100.\n#### 72"
    assert latent_grpo.worked(engine.Problem("?", "72", solution=prose)) == ("<<48/2=24>> <<48+24=72>>", "\\boxed{72}")
    assert latent_grpo.worked(engine.Problem("?", "72", solution="72"))[0] == ""


def test_the_demonstrations_never_see_a_true_answer():
    stream = engine.load_problems("tiny", "train", 0)
    wrong = [latent_grpo.worked(stream[i])[1].strip() != stream[i].answer for i in range(300)]
    assert 0.3 < sum(wrong) / 300 < 0.7
    assert stream[7].solution == stream[7].solution  # the same demonstration every time: a resumed run sees it again


def test_data_without_worked_solutions_is_refused():
    lm = SimpleNamespace(tokenizer=SimpleNamespace(encode=lambda text, **_: [3] * len(text), chat_template=None,
                                                   decode=lambda ids: "x" * len(ids)), stop_ids=[STOP])  # fmt: skip
    bare = [engine.Problem("1 + 1?", "2", solution="2")] * 5
    with pytest.raises(engine.UserError, match="worked solutions"):
        latent_grpo.take_worked(lm, engine.Problems(bare, 0, 5), 0, settings())
    some = [*bare, engine.Problem("1 + 1?", "2", solution="<<1+1=2>>2")]
    stream = engine.Problems(some, 0, 6)
    problems, *_, position = latent_grpo.take_worked(lm, stream, 0, settings(max_prompt_tokens=200))
    assert [problem.solution for problem in problems] == ["<<1+1=2>>2"] and position == 6  # once through the data


def test_chunks_and_their_superpositions():
    thought = "17 + 5 = 12 ; 12 - 8 = 4".split()
    parts = latent_grpo.chunks(thought, 6, 3)
    assert parts == ["17 + 5".split(), "= 12 ; 12 - 8".split(), "= 4".split()]
    assert latent_grpo.chunks(thought, 1, 1) == [[token] for token in thought]
    ids = [3, 12, 4, 12, 5, 8]
    pairs = dict(latent_grpo.superposition(ids, 10))
    assert pairs == {12: 2 / 6, 3: 1 / 6, 4: 1 / 6, 5: 1 / 6, 8: 1 / 6}
    kept = latent_grpo.superposition(ids, 2)
    assert kept[0] == (12, 2 / 3) and len(kept) == 2


def picture(mask):
    return ["".join(".1"[int(x)] for x in row) for row in mask]


def test_induction_mask_against_the_printed_example():
    is_compress = torch.tensor([[False, False, False, True, False, False, True]])  # q a b C c d C
    assert picture(latent_grpo.induction_mask(is_compress)[0]) == [
        "1......", "11.....", "111....", "1111...", "111.1..", "111.11.", "111.111",
    ]  # fmt: skip


def test_supervision_mask_against_the_printed_example():
    prompt, latent, text, tail = range(4)
    kind = torch.tensor([[prompt, latent, text, text, latent, tail, tail]])  # q z1 b c z2 </think> a
    chunk = torch.tensor([[0, 0, 0, 0, 1, -1, -1]])
    assert picture(latent_grpo.supervision_mask(kind, chunk)[0]) == [
        "1......", "11.....", ".11....", ".111...", "11..1..", "11..11.", "11..111",
    ]  # fmt: skip


def autoencoder(**changed):
    lm = random_model(vocabulary=30, sharp=8.0, **changed)
    return lm, latent_grpo.Autoencoder(lm, EXIT)


def reconstruct(lm, labels, *rest):
    ids, weights = (torch.cat(x) for x in zip(*labels, strict=True))
    return latent_grpo.reconstruction(lm, ids, weights, *rest)


THOUGHTS = [[10, 11, 12, 13, 14], [15, 16], [17, 18, 19, 20]]
TAILS = [[EXIT, 21, STOP], [EXIT, 22, STOP], [EXIT, 23, 24, STOP]]


def test_a_latent_of_the_encoder_knows_its_chunk_and_what_came_before_and_no_later_text():
    """Change one token at a time and see which latents move."""
    lm, auto = autoencoder()
    args = settings()

    def latents(prompt, thought):
        ((ids, weights),) = latent_grpo.encode_thoughts(lm, auto, [prompt], [thought], 2, args)
        return torch.zeros(len(ids), 30).scatter(-1, ids, weights.detach())  # (3, V)

    before = latents([5, 6], THOUGHTS[0])
    assert before.shape[0] == 3 and torch.allclose(before.sum(-1), torch.ones(3))
    for place, moves in ((0, [1, 1, 1]), (2, [0, 1, 1]), (4, [0, 0, 1])):
        thought = list(THOUGHTS[0])
        thought[place] = 25
        moved = (latents([5, 6], thought) - before).abs().amax(-1) > 1e-5
        assert moved.tolist() == [bool(x) for x in moves]
    assert ((latents([7, 6], THOUGHTS[0]) - before).abs().amax(-1) > 1e-5).all()


def test_latents_of_the_encoder_do_not_depend_on_padding_or_on_each_other():
    lm, auto = autoencoder()
    together = latent_grpo.encode_thoughts(lm, auto, PROMPTS, THOUGHTS, 2, settings())
    for i in range(3):
        ((ids, weights),) = latent_grpo.encode_thoughts(lm, auto, [PROMPTS[i]], [THOUGHTS[i]], 2, settings())
        assert torch.equal(ids, together[i][0]) and torch.allclose(weights, together[i][1], atol=1e-5)
    # The first latent by the model itself, with C's vector behind the first chunk.
    embeds = torch.cat([lm.table[torch.tensor([*PROMPTS[0], 10, 11])], auto.compress[None]])[None]
    logits = auto.encoder(inputs_embeds=embeds).logits[0, -1]
    logits[[PAD, STOP, EXIT]] = -math.inf
    values, ids = logits.topk(4)
    assert torch.equal(ids, together[0][0][0]) and torch.allclose(values.softmax(-1), together[0][1][0], atol=1e-5)


def test_reconstruction_by_hand():
    """One row at a time: embeddings, positions, mask and targets spelled out, for rows such as `q q z1 c3 c4 z2 c5 z3
    </think> a end`."""
    lm, auto = autoencoder()
    labels = latent_grpo.encode_thoughts(lm, auto, PROMPTS, THOUGHTS, 2, settings())
    losses = reconstruct(lm, labels, PROMPTS, THOUGHTS, TAILS, 2, settings())
    expected = []
    for prompt, thought, tail in zip(PROMPTS, THOUGHTS, TAILS, strict=True):
        ((ids, weights),) = latent_grpo.encode_thoughts(lm, auto, [prompt], [thought], 2, settings())
        latents = torch.einsum("tk,tkd->td", weights, lm.table[ids])
        p, n = len(prompt), len(latents)
        entries = [("prompt", lm.table[token], i, None) for i, token in enumerate(prompt)]  # what, vector, position, id
        owner = [None] * p
        for i in range(n):
            entries.append(("latent", latents[i], p + i, None))
            owner.append(i)
            for j, token in enumerate(thought[2 * i + 2 : 2 * i + 4]):
                entries.append(("text", lm.table[token], p + i + 1 + j, token))
                owner.append(i)
        entries += [("tail", lm.table[token], p + n + j, token) for j, token in enumerate(tail)]
        owner += [None] * len(tail)
        size = len(entries)
        mask = torch.zeros(size, size, dtype=torch.bool)
        for i in range(size):
            for j in range(i + 1):
                if entries[i][0] == "text":
                    mask[i, j] = entries[j][0] in ("latent", "text") and owner[j] == owner[i]
                else:
                    mask[i, j] = entries[j][0] != "text"
        logits = lm.model(
            inputs_embeds=torch.stack([vector for _, vector, _, _ in entries])[None], attention_mask=mask[None, None],
            position_ids=torch.tensor([[position for _, _, position, _ in entries]]),
        ).logits[0]  # fmt: skip
        for i in range(1, size):
            if entries[i][3] is not None:
                expected.append(F.cross_entropy(logits[i - 1], torch.tensor(entries[i][3])))
    assert torch.allclose(losses, torch.stack(expected), atol=1e-4)


def test_a_chunks_text_depends_on_its_own_latent_and_not_on_the_text_of_others():
    lm, auto = autoencoder()
    prompt, tail, args = [5, 6], [EXIT, 21, STOP], settings()
    labels = latent_grpo.encode_thoughts(lm, auto, [prompt], [THOUGHTS[0]], 2, args)

    def losses(thought, labels=labels):
        return reconstruct(lm, labels, [prompt], [thought], [tail], 2, args).detach()  # the latents stay as they are

    before = losses(THOUGHTS[0])  # of 12 13 | 14 | tail, after the latents of (10 11), (12 13), (14)
    changed = losses([10, 11, 25, 13, 14])  # another first word of the second chunk
    moved = (changed - before).abs() > 1e-5
    assert moved.tolist() == [True, True, False, False, False, False]
    assert torch.equal(losses([29, 28, 12, 13, 14]), before)  # the first chunk's text is not there at all
    ids, weights = labels[0]
    other = [(torch.cat([ids[:1].flip(-1), ids[1:]]), weights)]  # another first latent: all that sees it moves
    assert ((losses(THOUGHTS[0], other) - before).abs() > 1e-6).all()


def test_reconstruction_teaches_encoder_decoder_and_compress_vector_and_leaves_the_table():
    lm, auto = autoencoder(tied=False)
    labels = latent_grpo.encode_thoughts(lm, auto, PROMPTS, THOUGHTS, 2, settings())
    reconstruct(lm, labels, PROMPTS, THOUGHTS, TAILS, 2, settings()).sum().backward()
    assert auto.compress.grad.abs().sum() > 0
    for model in (auto.encoder, auto.decoder):
        body = [p for p in model.parameters() if p.requires_grad]
        assert body and all(p.grad is not None and p.grad.abs().sum() > 0 for p in body)
        assert model.get_input_embeddings().weight.grad is None and model.get_output_embeddings().weight.grad is None


def test_teacher_noise_is_two_sided_inside_the_candidates():
    gumbel = latent_grpo.gumbel_noise((20_000, 4), torch.Generator().manual_seed(0), "cpu")
    weights = torch.tensor([[0.5, 0.3, 0.2, 0.0]]).expand(20_000, -1)
    noisy = latent_grpo.label_noise(weights, gumbel, 1.0, settings())
    assert torch.allclose(noisy, (weights.log() + gumbel.clamp(-1.5, 3)).softmax(-1)) and (noisy[:, 3] == 0).all()
    assert 0.25 < (noisy.argmax(-1) == 1).float().mean() < 0.35  # nearly a Gumbel-max draw: clipping costs little


def test_no_label_of_the_encoder_holds_a_token_that_ends_something():
    """Where each of them is what the encoder likes best."""
    lm, auto = autoencoder()
    for signal_id in (PAD, STOP, EXIT):
        with torch.no_grad():
            log_p = latent_grpo.latent_log_probs(lm, auto, PROMPTS, THOUGHTS, 2, settings())
            lm.head[signal_id] = 9 * lm.head[log_p.argmax(-1)[0]]
        labels = latent_grpo.encode_thoughts(lm, auto, PROMPTS, THOUGHTS, 2, settings())
        assert not any(torch.isin(ids, torch.tensor([PAD, STOP, EXIT])).any() for ids, _ in labels)
        assert all(torch.allclose(weights.sum(-1), torch.ones(len(weights))) for _, weights in labels)


def test_compress_starts_as_the_exit_token_and_is_a_weight_of_its_own():
    lm, auto = autoencoder()
    assert torch.equal(auto.compress, lm.table[EXIT]) and auto.compress.requires_grad
    assert auto.compress.data_ptr() != lm.table[EXIT].data_ptr()


def test_hints_are_superpositions_of_what_follows_each_latent():
    lm, _ = autoencoder()
    tails = [[EXIT, 21, 21, 22, STOP], [EXIT, 23, STOP]]
    rows = latent_grpo.hints(lm, [[10, 11, 12, 13, 12], [15]], tails, 2, settings())
    expected = [{12: 1 / 2, 13: 1 / 2}, {12: 1.0}, {21: 2 / 3, 22: 1 / 3}, {23: 1.0}]
    assert rows.shape == (4, 30)
    for row, pairs in zip(rows, expected, strict=True):
        assert {i: w for i, w in enumerate(row.tolist()) if w} == pytest.approx(pairs)


def test_a_step_of_stage_1_is_kl_at_latents_and_cross_entropy_after_them(monkeypatch):
    """Losses and gradients by hand: one row at a time, torch's kl_div."""
    lm, args = random_model(vocabulary=30), settings(sft_noise=0.0, micro_batch=2)
    lm.tokenizer = SimpleNamespace(decode=lambda ids: str(ids))
    problems = [engine.Problem(str(i), "1", "think") for i in range(3)]
    monkeypatch.setattr(latent_grpo, "take_worked", lambda *_: (problems, PROMPTS, THOUGHTS, TAILS, 3))
    state = {"step": -5, "position": 0}
    before = [p.clone() for p in lm.model.parameters()]
    row, _ = latent_grpo.sft_step(lm, None, sgd(lm), None, state, args, None)
    ours = {name: p.grad.clone() for name, p in lm.model.named_parameters() if p.requires_grad}
    assert state == {"step": -4, "position": 3} and row["step"] == -5
    for weight, old in zip(lm.model.parameters(), before, strict=True):
        with torch.no_grad():
            weight.copy_(old)
    lm.model.zero_grad()
    kl, cross_entropy = 0.0, 0.0
    for prompt, thought, tail in zip(PROMPTS, THOUGHTS, TAILS, strict=True):
        parts = [[thought[0]], *(thought[i : i + 2] for i in range(1, len(thought), 2))]
        targets = torch.stack([F.one_hot(torch.tensor(part), 30).double().mean(0) for part in parts])  # (n, V)
        embeds = torch.cat([lm.table[torch.tensor(prompt)], targets.float() @ lm.table, lm.table[torch.tensor(tail)]])
        log_q = lm.model(inputs_embeds=embeds[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        kl = kl + F.kl_div(log_q[: len(parts)], targets.float(), reduction="sum") / len(parts) / 3
        cross_entropy = cross_entropy + F.cross_entropy(
            log_q[len(parts) :], torch.tensor(tail), reduction="sum"
        ) / sum(map(len, TAILS))
    assert abs(row["kl"] - kl) < 1e-4 and abs(row["cross_entropy"] - cross_entropy) < 1e-4
    (kl + cross_entropy).backward()
    theirs = {name: p.grad for name, p in lm.model.named_parameters() if p.requires_grad}
    assert_close_gradients(ours, theirs)


def test_curriculum_and_noise_ramp(monkeypatch):
    lm, seen = random_model(vocabulary=30), []
    lm.tokenizer = SimpleNamespace(decode=lambda ids: str(ids))
    problems = [engine.Problem(str(i), "1", "think") for i in range(3)]
    monkeypatch.setattr(latent_grpo, "take_worked", lambda *_: (problems, PROMPTS, THOUGHTS, TAILS, 3))
    monkeypatch.setattr(latent_grpo, "label_noise", lambda w, noise, scale, _: seen[-1].append(scale) or w)
    original = latent_grpo.chunk_labels
    monkeypatch.setattr(latent_grpo, "chunk_labels", lambda t, size, a: seen.append([size]) or original(t, size, a))
    args = settings(chunk=[2, 4], sft_noise=0.8)
    state = {"step": -10, "position": 0}
    for _ in range(10):
        latent_grpo.sft_step(lm, None, sgd(lm), None, state, args, torch.Generator())
    assert [step[0] for step in seen] == [2] * 5 + [4] * 5
    assert len(seen[0]) == 1  # no noise at first
    assert [step[1] for step in seen[1:]] == pytest.approx([0.08 * i for i in range(1, 10)])


@pytest.mark.parametrize("done, hint", [(0, 1.0), (3, 0.5), (7, 0.0)])
def test_a_label_step_is_reconstruction_under_noise_and_a_hint_that_fades(monkeypatch, done, hint):
    """Of nine steps; loss and gradients by hand, all rows at once. Encoder, decoder and C move in every one of them."""
    lm, auto = autoencoder()
    args = settings(micro_batch=2, sft_noise=0.8)
    monkeypatch.setattr(latent_grpo, "take_worked", lambda *_: (PROMPTS, PROMPTS, THOUGHTS, TAILS, 3))
    trained = {name: p for name, p in auto.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    state = {"step": done - 19, "position": 0}
    optimizer = torch.optim.SGD(trained.values(), lr=1.0)
    row, _ = latent_grpo.label_step(lm, auto, optimizer, None, state, args, torch.Generator().manual_seed(0))
    assert state == {"step": done - 18, "position": 3}
    moved = {name.split(".")[0] for name, p in trained.items() if not torch.equal(p, before[name])}
    assert moved == {"encoder", "decoder", "compress"}
    ours = {name: p.grad.clone() for name, p in trained.items()}
    for name, p in trained.items():
        p.data.copy_(before[name])
    auto.zero_grad()

    log_p = latent_grpo.latent_log_probs(lm, auto, PROMPTS, THOUGHTS, 2, args)
    values, ids = log_p.topk(4)
    clean = values.softmax(-1)
    gumbel = latent_grpo.gumbel_noise(ids.shape, torch.Generator().manual_seed(0), "cpu")
    weights = (clean.log() + (0.8 * (1 - hint) * gumbel).clamp(-1.5, 3)).softmax(-1)
    loss = latent_grpo.reconstruction(lm, ids, weights, PROMPTS, THOUGHTS, TAILS, 2, args).mean()
    target = latent_grpo.hints(lm, THOUGHTS, TAILS, 2, args)
    kl = F.kl_div(log_p.clamp(min=-1e9), target, reduction="sum") / len(ids)
    (loss + hint * kl).backward()
    assert row["reconstruction"] == pytest.approx(loss.item(), rel=1e-5)
    assert row["hint"] == pytest.approx(kl.item(), rel=1e-5)
    assert row["effective_k"] == pytest.approx((1 / clean.square().sum(-1)).mean().item(), rel=1e-5)
    assert_close_gradients(ours, {name: p.grad for name, p in trained.items()})


def test_a_hint_teaches_latents_that_are_one_hot():
    """What the paper's first third lacks: a gradient where the softmax over the candidates has none."""
    lm, auto = autoencoder()
    with torch.no_grad():
        auto.encoder.base_model.norm.weight.mul_(100.0)
    log_p = latent_grpo.latent_log_probs(lm, auto, PROMPTS, THOUGHTS, 2, settings())
    values, ids = log_p.topk(4)
    weights = values.softmax(-1)
    loss = latent_grpo.reconstruction(lm, ids, weights, PROMPTS, THOUGHTS, TAILS, 2, settings()).mean()
    target = latent_grpo.hints(lm, THOUGHTS, TAILS, 2, settings())
    kl = -(target * log_p.where(target > 0, 0.0)).sum()
    stuck, taught = (torch.autograd.grad(x, auto.compress, retain_graph=True)[0].norm() for x in (loss, kl))
    assert weights.max(-1).values.min() > 0.999 and stuck < 1e-3 * taught


def test_a_label_step_survives_weights_that_underflow(monkeypatch):
    lm, auto = autoencoder()
    with torch.no_grad():
        auto.encoder.base_model.norm.weight.mul_(1e4)
    ((_, weights), *_) = latent_grpo.encode_thoughts(lm, auto, PROMPTS, THOUGHTS, 2, settings())
    assert (weights == 0).any()
    monkeypatch.setattr(latent_grpo, "take_worked", lambda *_: (PROMPTS, PROMPTS, THOUGHTS, TAILS, 3))
    optimizer = torch.optim.SGD([p for p in auto.parameters() if p.requires_grad], lr=1.0)
    state = {"step": -12, "position": 0}  # a gradient that is not finite would raise UserError
    latent_grpo.label_step(lm, auto, optimizer, None, state, settings(), torch.Generator())


# ----------------------------------------------------------------------------------------------------------------------
# 10. The script: dynamic sampling, collapse, both stages reproducible and resumable, kind, and it learns.


def test_dynamic_sampling_draws_until_there_are_enough_informative_groups(monkeypatch):
    lm, drawn = random_model(), []
    stream = SimpleNamespace(size=None)
    monkeypatch.setattr(engine, "take", lambda stream, position, count, *_: (
        [engine.Problem(str(position + i), "", "think") for i in range(3)], PROMPTS, position + 3))  # fmt: skip

    def score(texts, problems, group_size):
        """Problems 1, 2, 6 and 7 have both right and wrong rollouts; all of the others are right."""
        drawn.extend(int(problem.question) for problem in problems)
        right = torch.ones(len(problems), group_size)
        for i, problem in enumerate(problems):
            right[i, 0] = float(problem.question not in "1267")
        return torch.stack([right, right])

    monkeypatch.setattr(latent_grpo, "score", score)
    for max_draws, expected, used in ((9, "126", 9), (2, "12", 6), (1, "012", 3)):
        drawn.clear()
        state = {"step": 0, "position": 0}
        args = settings(max_draws=max_draws, ablate=2)
        problems, roll, rewards, places, numbers, few = latent_grpo.collect(
            lm, stream, state, args, torch.Generator().manual_seed(0)
        )
        assert "".join(problem.question for problem in problems) == expected and len(drawn) == used
        assert places.tolist() == list(range(len(expected)))
        assert roll.prompts == [PROMPTS[int(question) % 3] for question in expected]
        assert len(roll.length) == 4 * len(expected) and rewards.shape == (len(expected), 4)
        assert state["position"] == used and numbers["rollouts"] == 4 * used
        assert few[1].prompts == PROMPTS[:2] and few[1].group_size == 1 and len(few[0]) == 2


def test_exit_token_is_the_first_of_its_text():
    lm = engine.load_model("tiny", "cpu")
    assert latent_grpo.exit_token(lm, settings(exit_text=" </think>")) == 4
    with pytest.raises(engine.UserError, match="no token"):
        latent_grpo.exit_token(lm, settings(exit_text="</think>"))
    with pytest.raises(engine.UserError, match="end the text"):
        latent_grpo.exit_token(lm, settings(exit_text="<eos>"))


def test_presets_are_the_official_scripts():
    """Against the table of the two released scripts, value by value; flags beside --preset replace them."""
    same = dict(
        group_size=8, lr=1e-6, schedule="constant", warmup=0, weight_decay=0.01, grad_clip=1.0, top_k=10, tau=1.0,
        noise="one_sided", noise_scale=1.0, delta=0.0, top_p=0.95, temperature=0.6, answers="noisy", clip=0.2,
        dual_clip=3.0, surrogate="mean", flip="code", first_token="code", verifier_reads="all", loss_mean="rollouts",
        max_draws=50, eval_every=10, save_every=40, collapse=0.0,
    )  # fmt: skip
    gsm8k = dict(prompts_per_step=64, minibatches=4, max_prompt_tokens=192, max_new_tokens=128, kl_coef=0.0,
                 overlong="include", exit_guard="on")  # fmt: skip
    math_ = dict(prompts_per_step=32, minibatches=1, max_prompt_tokens=1024, max_new_tokens=4096, kl_coef=0.001,
                 overlong="exclude", exit_guard="off")  # fmt: skip
    for name, own in (("gsm8k", gsm8k), ("math", math_)):
        args = vars(latent_grpo.parse_args(["--model", "Qwen2.5-0.5B", "--preset", name])[0])
        assert latent_grpo.PRESETS[name] == same | own and args == args | same | own
    assert latent_grpo.parse_args(["--preset", "math", "--lr", "3e-5"])[0].lr == 3e-5


QUICK = ["--steps", "4", "--prompts_per_step", "4", "--group_size", "4", "--eval_problems", "8", "--eval_samples", "2",
         "--eval_every", "2", "--save_every", "2", "--show_every", "0", "--warmup", "1", "--max_draws", "2",
         "--ablate", "3"]  # fmt: skip
# A little of stage 1 on a model that is latent already, so that stage 2 has rewards to learn from.
BOTH = [*QUICK, "--model", "tiny_latent", "--sft_steps", "4", "--sft_batch", "6", "--sft_lr", "1e-6",
        "--kl_coef", "0.01"]  # fmt: skip
ENCODER = [*BOTH, "--labels", "encoder", "--label_steps", "4"]


def rows_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def last_line(capsys):
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_same_seed_same_log_and_the_contract_of_the_last_line(tmp_path, capsys):
    results = []
    for name in ("a", "b"):
        assert latent_grpo.main([*QUICK, "--out", str(tmp_path / name)]) == 0
        results.append(last_line(capsys))
    rows = rows_of(tmp_path / "a")
    assert (tmp_path / "a/log.jsonl").read_bytes() == (tmp_path / "b/log.jsonl").read_bytes() and len(rows) == 4
    keys = "method model seed steps seconds greedy_before greedy sampled_before sampled pass@2 length exit_rate latents"
    assert set(keys.split()) <= set(results[0])
    logged = "reward exit_rate latents effective_k margin margin_negative zero_advantage overlong skipped zeroed"
    assert {"shuffled", "heaviest", *logged.split()} <= set(rows[0]) <= set(rows[0])
    assert {**results[0], "seconds": 0} == {**results[1], "seconds": 0}
    latent_grpo.main([*QUICK, "--out", str(tmp_path / "c"), "--seed", "1"])
    assert (tmp_path / "a/log.jsonl").read_bytes() != (tmp_path / "c/log.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("how, rows", [
    (signal.SIGKILL, 3), (signal.SIGTERM, 1), (signal.SIGTERM, 5), (signal.SIGINT, 9), (signal.SIGKILL, 11),
])  # fmt: skip
def test_killed_and_resumed_equals_uninterrupted(tmp_path, how, rows, capsys):
    """In every stage: encoder and decoder, latent SFT, RL."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    latent_grpo.main([*ENCODER, "--out", str(whole)])
    expected = last_line(capsys)
    process = subprocess.Popen([sys.executable, "latent_grpo.py", *ENCODER, "--out", broken], cwd=HERE,
                               stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # fmt: skip
    log = broken / "log.jsonl"
    while process.poll() is None:
        if log.exists() and log.read_text().count("\n") >= rows:
            process.send_signal(how)
            break
        time.sleep(0.002)
    output = process.communicate()
    assert process.returncode == (-signal.SIGKILL if how == signal.SIGKILL else 130), output
    if how != signal.SIGKILL:
        assert "--resume" in output[0] and "Traceback" not in output[1]
    assert log.read_text().count("\n") < 12
    assert all(row["grad_norm"] > 0 for row in rows_of(whole)) and rows_of(whole)[-1]["kl"] > 0
    latent_grpo.main(["--resume", str(broken)])
    resumed = last_line(capsys)
    assert log.read_bytes() == (whole / "log.jsonl").read_bytes()
    assert (broken / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()
    assert {**resumed, "seconds": 0} == {**expected, "seconds": 0}


def test_stopping_between_the_stages_loses_nothing(tmp_path, capsys, monkeypatch):
    """Resume where stage 1 had just ended: stage 2 begins with an optimiser of its own."""
    latent_grpo.main([*BOTH, "--out", str(tmp_path / "whole")])
    expected = last_line(capsys)
    monkeypatch.setattr(latent_grpo, "evaluate", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        latent_grpo.main([*BOTH, "--eval_every", "0", "--out", str(tmp_path / "broken")])
    monkeypatch.undo()
    assert engine.read_checkpoint_state(tmp_path / "broken/checkpoint.safetensors")["step"] == 0
    latent_grpo.main(["--resume", str(tmp_path / "broken"), "--eval_every", "2"])
    assert {**last_line(capsys), "seconds": 0} == {**expected, "seconds": 0}


UNEVEN = ["--prompts_per_step", "3", "--eval_problems", "7", "--sft_batch", "5", "--minibatches", "2", "--first_token",
          "code", "--lr", "1e-5"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[*BOTH, *UNEVEN], [*ENCODER, *UNEVEN, "--label_steps", "3"]])
def test_two_processes_are_one(flags, tmp_path, capsys):
    """All stages, over numbers that two cannot share evenly; equal but for the order in which numbers were added."""
    latent_grpo.main([*flags, "--out", str(tmp_path / "one")])
    one = last_line(capsys)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "latent_grpo.py"]
    process = subprocess.Popen([*command, *flags, "--out", str(tmp_path / "two")], cwd=HERE, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    out, err = process.communicate()
    assert process.returncode == 0, err
    logs = [rows_of(tmp_path / name) for name in ("one", "two")]
    assert len(logs[0]) == len(logs[1]) >= 8 and logs[0][-1]["grad_norm"] > 0
    for a, b in zip(*logs, strict=True):
        assert a.keys() == b.keys()
        assert all(a[key] == b[key] or math.isclose(a[key], b[key], rel_tol=1e-3, abs_tol=1e-5) for key in a), (a, b)
    two = json.loads(out.strip().splitlines()[-1])
    assert one.keys() == two.keys() and one["greedy"] == two["greedy"]


def test_the_end_of_stage_1_can_be_interrupted(tmp_path, capsys, monkeypatch):
    """A signal in its last step: saved, said, and not swallowed by the start of stage 2."""
    original = latent_grpo.sft_step

    def sft_step(*arguments):
        row = original(*arguments)
        if row[0]["step"] == -1:
            os.kill(os.getpid(), signal.SIGINT)
        return row

    latent_grpo.main([*BOTH, "--out", str(tmp_path / "whole")])
    monkeypatch.setattr(latent_grpo, "sft_step", sft_step)
    assert latent_grpo.main([*BOTH, "--out", str(tmp_path / "run")]) == 130
    assert len(rows_of(tmp_path / "run")) == 4 and "stopped at step 0" in capsys.readouterr().out
    assert latent_grpo.main(["--resume", str(tmp_path / "run")]) == 0
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "whole")


def test_collapse_ends_the_training_aloud(tmp_path, capsys, monkeypatch):
    original = latent_grpo.collect

    def collect(*arguments):
        *rest, numbers, few = original(*arguments)
        return *rest, numbers | {"exit_rate": 0.3, "overlong": 0.7}, few

    monkeypatch.setattr(latent_grpo, "collect", collect)
    assert latent_grpo.main([*QUICK, "--steps", "30", "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "COLLAPSED: 30% of the last ten steps' thoughts were left, 70% of rollouts fill the cap" in out
    result = json.loads(out.strip().splitlines()[-1])
    assert result["collapsed"] == 9 and len(rows_of(tmp_path / "run")) == 10
    assert "greedy" in result  # evaluated all the same
    latent_grpo.main(["--resume", str(tmp_path / "run"), "--steps", "12", "--collapse", "0"])
    assert last_line(capsys)["collapsed"] is None and len(rows_of(tmp_path / "run")) == 12


BAD_INPUTS = {  # case: (flags, what the line must mention)
    "unknown model": (["--model", "no-such-model-anywhere"], "no-such-model-anywhere"),
    "bare name, no network": (["--model", "Qwen2.5-0.5B", "--data", "gsm8k"], "Qwen/Qwen2.5-0.5B"),
    "missing file": (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
    "words it cannot spell": (["--data", "{tmp}/words.jsonl"], "spell"),
    "exit that is no token": (["--exit_text", "</think>"], "--exit_text"),
    "more candidates than words": (["--top_k", "100"], "--top_k"),
    "encoder that never learns": (["--labels", "encoder", "--label_steps", "0"], "--label_steps"),
    "nothing random": (["--noise", "none", "--answers", "noisy"], "--answers noisy"),
    "preset of a resumed run": (["--resume", "{tmp}/run", "--preset", "math"], "--preset"),
    "run of another script": (["--resume", "{tmp}/other"], "another script"),
    "one rollout": (["--group_size", "1"], "--group_size"),
    "one candidate": (["--top_k", "1"], "--top_k"),
    "chunk without room": (["--sft_steps", "1", "--chunk", "20"], "--chunk"),
    "chunk 0": (["--chunk", "0"], "--chunk"),
    "not sizes": (["--chunk", "many"], "--chunk"),
    "curriculum of encoders": (["--labels", "encoder", "--chunk", "2,4"], "--labels encoder"),
    "unknown choice": (["--flip", "both"], "--flip"),
    "unknown preset": (["--preset", "nonsense"], "--preset"),
    "dual clip": (["--dual_clip", "0.5"], "--dual_clip"),
    "temperature 0": (["--temperature", "0"], "--temperature"),
    "negative": (["--noise_scale", "-1"], "--noise_scale"),
    "nothing to resume": (["--resume", "{tmp}"], "nothing to resume"),
    "unwritable folder": (["--out", "{tmp}/bare.jsonl/run"], "cannot write"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_one_line_and_exit_code_2(case, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "words.jsonl").write_text('{"question": "How many eggs?", "answer": "2"}\n' * 10)
    (tmp_path / "bare.jsonl").write_text('{"question": " 1 + 1 ?", "answer": "2"}\n' * 10)
    flags, mentioned = BAD_INPUTS[case]
    for name, args in (("run", vars(latent_grpo.parse_args([])[0])), ("other", {"model": "tiny", "device": "cpu"})):
        (tmp_path / name).mkdir()
        metadata = {"state": json.dumps({"step": 0, "stage": "rl", "collapsed": None, "args": args})}
        save_file({"x": torch.zeros(1)}, tmp_path / name / "checkpoint.safetensors", metadata)
    with pytest.raises(SystemExit) as stop:
        engine.run_main(lambda: latent_grpo.main([flag.replace("{tmp}", str(tmp_path)) for flag in flags]))
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2
    assert error.startswith("error: ") and "\n" not in error and mentioned in error, error


def test_out_of_memory_saves_and_resume_repeats_the_step(tmp_path, capsys, monkeypatch):
    original, calls = latent_grpo.update, []

    def update(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(*arguments)

    latent_grpo.main([*QUICK, "--out", str(tmp_path / "whole")])
    monkeypatch.setattr(latent_grpo, "update", update)
    with pytest.raises(SystemExit) as stop:
        engine.run_main(lambda: latent_grpo.main([*QUICK, "--out", str(tmp_path / "run")]))
    assert stop.value.code == 2 and "--micro_batch" in capsys.readouterr().err
    latent_grpo.main(["--resume", str(tmp_path / "run")])
    assert (tmp_path / "run/log.jsonl").read_bytes() == (tmp_path / "whole/log.jsonl").read_bytes()


def test_stages_and_model_of_a_run_cannot_change(tmp_path, capsys):
    latent_grpo.main([*BOTH, "--out", str(tmp_path / "run")])
    assert latent_grpo.parse_args(["--model", str(tmp_path / "run/model")])[0].sft_steps == 0  # it is latent now
    assert latent_grpo.parse_args(["--model", "tiny"])[0].sft_steps > 0
    for flags in (["--sft_steps", "9"], ["--labels", "encoder"], ["--model", "tiny"]):
        with pytest.raises(engine.UserError, match="cannot change"):
            latent_grpo.main(["--resume", str(tmp_path / "run"), *flags])


@pytest.mark.slow
def test_every_switch_runs(tmp_path, capsys):
    """Settings that no other test runs through the script."""
    for i, flags in enumerate((
        ["--noise", "none"], ["--noise", "two_sided", "--delta", "0.1"], ["--preset", "gsm8k", "--lr", "1e-5"],
        ["--flip", "intended", "--minibatches", "2", "--kl_coef", "0.01"], ["--overlong", "off"],
        ["--first_token", "paper", "--overlong", "include"], ["--max_new_tokens", "4"],
        ["--model", "tiny", "--sft_steps", "0"],
        [*ENCODER, "--gradient_checkpointing", "--sft_batch", "3"],
        ["--gradient_checkpointing", "--answers", "noisy", "--verifier_reads", "all", "--loss_mean", "rollouts"],
    )):  # fmt: skip
        small = ["--prompts_per_step", "4", "--steps", "2"]
        assert latent_grpo.main([*QUICK, *flags, *small, "--max_draws", "2", "--out", str(tmp_path / str(i))]) == 0
        assert math.isfinite(last_line(capsys)["greedy"])


@pytest.mark.slow
def test_the_shipped_latent_model_learns(tmp_path, capsys):
    """A short run of the default settings, far from enough for README's numbers and enough to see the sign."""
    latent_grpo.main(["--steps", "60", "--lr", "2e-4", "--eval_problems", "256", "--eval_samples", "2", "--show_every",
                      "0", "--eval_every", "0", "--ablate", "0", "--out", str(tmp_path / "run")])  # fmt: skip
    result = last_line(capsys)
    assert result["greedy_before"] > 0.45 and result["greedy"] > result["greedy_before"] + 0.05
    assert result["exit_rate"] > 0.98


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "tokenizers/qwen2.5").is_dir() or not (SHARED / "data/gsm8k").is_dir(),
                    reason="needs the Qwen2.5 tokenizer and GSM8K beside the checkout, in ../shared")  # fmt: skip
@pytest.mark.parametrize("labels", ["chunk", "encoder"])
def test_real_tokenizer_and_gsm8k(labels, tmp_path, capsys, monkeypatch):
    """Both stages with the real vocabulary, chat template and data. A random model is never right, so the verifier is
    asked, and then every second rollout is called right."""
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers/qwen2.5")
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=151936, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
                         eos_token_id=151643)  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    honest = latent_grpo.score

    def score(texts, problems, group_size):
        assert honest(texts, problems, group_size).sum() == 0
        return (torch.arange(len(texts)) % 2).float().reshape(len(problems), group_size).expand(2, -1, -1)

    monkeypatch.setattr(latent_grpo, "score", score)
    argv = ["--model", str(tmp_path / "model"), "--data", str(SHARED / "data/gsm8k"), "--prompts_per_step", "2",
            "--group_size", "2", "--max_new_tokens", "12", "--steps", "2", "--eval_problems", "2", "--eval_samples",
            "2", "--save_every", "1", "--kl_coef", "0.01", "--device", "cpu", "--sft_steps", "2", "--sft_batch", "2",
            "--labels", labels, "--label_steps", "3"]  # fmt: skip
    latent_grpo.main([*argv, "--out", str(tmp_path / "run")])
    out = capsys.readouterr().out
    assert json.loads(out.strip().splitlines()[-1])["latents"] > 0
    rows = [json.loads(row) for row in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert len(rows) == (4 if labels == "chunk" else 7)
    assert all(row["grad_norm"] > 0 for row in rows)


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "tokenizers/qwen2.5").is_dir() or not (SHARED / "data/gsm8k").is_dir(),
                    reason="needs the Qwen2.5 tokenizer and GSM8K beside the checkout, in ../shared")  # fmt: skip
def test_worked_examples_of_gsm8k_and_the_prompts_ending():
    lm = SimpleNamespace(tokenizer=AutoTokenizer.from_pretrained(SHARED / "tokenizers/qwen2.5"), stop_ids=[151643])
    stream = engine.load_problems(str(SHARED / "data/gsm8k"), "train", 0)
    args = settings(sft_batch=200, max_prompt_tokens=512)
    problems, prompts, thoughts, tails, _ = latent_grpo.take_worked(lm, stream, 0, args)
    for problem, prompt, thought, tail in zip(problems, prompts, thoughts, tails, strict=True):
        assert lm.tokenizer.decode(prompt).endswith("<|im_start|>assistant\n<think>")
        assert lm.tokenizer.decode(tail) == f"</think>\\boxed{{{problem.answer}}}<|endoftext|>" and tail[0] == 522
        text = lm.tokenizer.decode(thought)
        assert text.startswith("<<") and text.count("<<") == problem.solution.count("<<")
        assert engine.verify(lm.tokenizer.decode(tail[:-1]), problem) == (1.0, 1.0)
