"""Proofs of lepo.py: every formula against something that does not share its code. In the order of lepo.py.

    pytest test_lepo.py            # a quarter of a minute
    pytest test_lepo.py -m slow    # runs to the end

Monte-Carlo tests have fixed seeds and bounds of 4 standard errors or more; tests of fit p = .001.
"""

import contextlib
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test depends on a network
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported: what tests compare is equal on a CPU only

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Gumbel, RelaxedOneHotCategorical
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.generation import TopKLogitsWarper, TopPLogitsWarper

import common
import lepo

HERE = Path(__file__).parent
PI = torch.tensor([0.51, 0.23, 0.15, 0.08, 0.03], dtype=torch.float64)
ESTIMATORS = ["soft", "concrete", "gumbel"]
STOP = 1
PROMPTS = [[5, 6, 7], [8], [3, 4, 5, 6, 9, 10]]  # of different lengths


def settings(**changed):
    """What the functions of lepo.py read of its arguments; nothing is filtered."""
    values = dict(
        tau=0.5, noise="gumbel", estimator="soft", temperature=1.0, top_k=0, top_p=1.0, filter="all",
        latent_steps=3, max_new_tokens=6, clip=0.2, kl_coef=0.0, micro_batch=64, updates_per_batch=1, device="cpu",
    )  # fmt: skip
    return SimpleNamespace(**values | changed)


def random_model(vocabulary=12, seed=0, scale=6.0):
    """A small random Qwen2 whose logits are spread enough for its mixtures to be neither flat nor one-hot -> lm"""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, eos_token_id=STOP,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(scale)
    table = model.get_input_embeddings().weight
    return common.LanguageModel(model, None, table, table, [STOP])


def roll_out(lm, args, group_size=4, seed=0, prompts=PROMPTS, noise_free=False):
    generator = torch.Generator().manual_seed(seed)
    return lepo.rollout(lm, prompts, group_size, args, generator, args.latent_steps, noise_free)


def executed(roll):
    return torch.arange(roll.ids.shape[1]) < roll.length[:, None]  # (N, T)


def gradients(lm, roll, advantages, args, ref=None):
    """What lepo.update computes before its norm is bounded; the weights stay as they are."""
    lm.model.zero_grad()
    bound, torch.nn.utils.clip_grad_norm_ = torch.nn.utils.clip_grad_norm_, lambda *_: torch.ones(())
    try:
        lepo.update(lm, ref, torch.optim.SGD(lm.model.parameters(), lr=0.0), roll, advantages, args)
    finally:
        torch.nn.utils.clip_grad_norm_ = bound
    return {name: weight.grad.clone() for name, weight in lm.model.named_parameters()}


def assert_close(ours, theirs, tolerance=1e-5):
    scale = max(gradient.abs().max() for gradient in theirs.values())
    assert scale > 0
    for name in theirs:
        assert (ours[name] - theirs[name]).abs().max() <= tolerance * scale, name


def some_advantages(count=12):
    return torch.randn(count, generator=torch.Generator().manual_seed(0))


# --- 2. The soft token ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k, top_p", [(5, 1.0), (0, 0.7), (8, 0.6), (1, 0.9), (0, 1e-6)])
def test_support_is_that_of_the_usual_filters(top_k, top_p):
    logits = torch.randn(50, 20, generator=torch.Generator().manual_seed(0)) * 2
    expected = TopKLogitsWarper(top_k)(None, logits / 0.8) if top_k else logits / 0.8
    expected = TopPLogitsWarper(top_p)(None, expected).log_softmax(-1)
    ids, log_probs = lepo.support(logits, settings(temperature=0.8, top_k=top_k, top_p=top_p))
    full = torch.full_like(logits, -math.inf).scatter(-1, ids, log_probs)
    assert torch.equal(full.isinf(), expected.isinf())
    assert torch.allclose(full.exp(), expected.exp(), atol=1e-6)


def sample(n, tau, pi=PI, seed=0):
    """n soft tokens at one state -> (log_probs, weights, scores), (n, m) each, float64"""
    log_probs = pi.log().expand(n, -1)
    gumbel = lepo.gumbel_noise(log_probs, torch.Generator().manual_seed(seed))
    _, weights, scores = lepo.soft_token(torch.arange(len(pi)).expand(n, -1), log_probs, gumbel, tau)
    return log_probs, weights, scores


@pytest.mark.parametrize("tau", [0, 0.5])
def test_heaviest_candidate_is_a_draw_from_the_policy(tau):
    """Gumbel-max: at tau 0 a discrete token, above it the argmax of the mixture (chi-square, 4 degrees of freedom)."""
    log_probs = PI.log().expand(20_000, -1)
    gumbel = lepo.gumbel_noise(log_probs, torch.Generator().manual_seed(0))
    ids, weights, _ = lepo.soft_token(torch.arange(5).expand(20_000, -1), log_probs, gumbel, tau)
    assert ids.shape[1] == (5 if tau else 1) and (weights.sum(-1) - 1).abs().max() < 1e-12
    counts = ids.gather(-1, weights.argmax(-1, keepdim=True)).flatten().bincount(minlength=5)
    assert ((counts - 20_000 * PI) ** 2 / (20_000 * PI)).sum() < 18.47


# --- 3. The rollout and its replay ------------------------------------------------------------------------------------


def watch(monkeypatch):
    """-> list that collects (logits, embeddings fed) of every step of the next rollout"""
    seen, support, feed = [], lepo.support, common.Decoder.feed
    monkeypatch.setattr(lepo, "support", lambda a, *of: seen.append([a.clone()]) or support(a, *of))
    monkeypatch.setattr(common.Decoder, "feed", lambda self, e: seen[-1].append(e.clone()) or feed(self, e))
    return seen


@pytest.mark.parametrize("latent_steps, top_p", [(0, 1.0), (3, 0.9)])
def test_what_is_stored_was_executed_and_its_replay_equals_the_rollout(latent_steps, top_p, monkeypatch):
    """Log-probabilities and embeddings of every step, with prompts of different lengths and rows that end early."""
    args = settings(latent_steps=latent_steps, top_k=5, top_p=top_p, max_new_tokens=8, temperature=0.7)
    lm = random_model()
    lm.stop_ids = [STOP, 4, 7]
    seen = watch(monkeypatch)
    roll = roll_out(lm, args, group_size=8)
    mask = executed(roll)
    assert roll.length.unique().numel() > 3 and roll.ended.any() and not roll.ended.all()
    assert torch.allclose(roll.weights.sum(-1), mask.float()) and roll.ids.shape[2] == (5 if latent_steps else 1)
    assert ((roll.weights > 0).sum(-1)[:, latent_steps:] <= 1).all()
    ours, _ = lepo.replay(lm, roll, torch.arange(24), args)
    for t, (logits, *fed) in enumerate(seen):
        rows = mask[:, t].nonzero().squeeze(-1)
        dense = torch.zeros(len(rows), 12).scatter_add(-1, roll.ids[rows, t], roll.weights[rows, t])
        assert torch.allclose(ours[rows, t], (dense * (logits / 0.7).log_softmax(-1)).sum(-1), atol=2e-5)
        if fed:
            assert torch.allclose(dense[mask[rows, t + 1]] @ lm.table, fed[0], atol=1e-5)
    assert t + 1 == roll.length.max() and (ours[~mask[:, : t + 1]] == 0).all()


def test_a_rollout_does_not_depend_on_padding_or_neighbours():
    """A prompt alone, and the same prompt among longer ones and rows that leave: the same noise-free trajectory."""
    lm, args = random_model(), settings(max_new_tokens=10)
    lm.stop_ids = [STOP, 4, 7]
    together = roll_out(lm, args, group_size=2, noise_free=True)
    assert together.length.unique().numel() > 1
    for i, prompt in enumerate(PROMPTS):
        alone = roll_out(lm, args, group_size=1, prompts=[prompt], noise_free=True)
        for n in (2 * i, 2 * i + 1):
            assert torch.equal(alone.tokens[0], together.tokens[n]) and alone.length[0] == together.length[n]


def test_greedy_without_latents_is_generate():
    lm, prompt = random_model(seed=3), torch.tensor([[3, 4, 5]])
    roll = roll_out(lm, settings(latent_steps=0, max_new_tokens=10), 1, prompts=[[3, 4, 5]], noise_free=True)
    out = lm.model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=10, do_sample=False)
    assert roll.tokens[0, : roll.length[0]].tolist() == out[0, 3:].tolist()


def test_an_end_token_in_a_thought_ends_the_rollout():
    lm, args = random_model(), settings(latent_steps=5)
    lm.stop_ids = list(range(6))
    roll = roll_out(lm, args, group_size=8)
    early = roll.length < 5
    assert early.any() and roll.ended[early].all() and (roll.weights[early, 5:] == 0).all()
    last = roll.tokens[torch.arange(24), roll.length - 1]
    assert torch.equal(roll.ended, torch.isin(last, torch.arange(6)))


def test_without_noise_thoughts_are_equal_and_texts_are_not():
    roll = roll_out(random_model(), settings(noise="none", latent_steps=2), group_size=16, prompts=[[5, 6, 7]])
    assert (roll.weights[:, :2] == roll.weights[:1, :2]).all() and not (roll.tokens == roll.tokens[:1]).all()


# --- 4. Reward and advantages -----------------------------------------------------------------------------------------


def test_advantages():
    rewards = torch.tensor([[1.0, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    ours = lepo.group_advantages(rewards)
    assert torch.allclose(ours[0], torch.tensor([0.866, 0.866, -0.866, -0.866]), atol=1e-3)
    assert torch.allclose(ours[1], torch.tensor([1.5, -0.5, -0.5, -0.5]), atol=1e-3)
    assert (ours[2:] == 0).all() and ours.sum(1).abs().max() < 1e-6


# --- 5. Log-probabilities ---------------------------------------------------------------------------------------------


def log_density(log_p, weights, scores, estimator, tau):
    return lepo.step_log_probs(log_p, weights, scores, torch.tensor(True), settings(estimator=estimator, tau=tau))


def scores_of(estimator, tau, n=100_000):
    """Gradient of the log-probability with respect to the logits, for n draws -> ((n, m), weights, scores)"""
    log_probs, weights, scores = sample(n, tau)
    logits = log_probs.clone().requires_grad_()
    value = log_density(logits.log_softmax(-1), weights, scores, estimator, tau)
    return torch.autograd.grad(value.sum(), logits)[0], weights, scores


def test_logit_gradient_of_a_latent_step_is_advantage_times_z_minus_pi():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 9, generator=generator, dtype=torch.float64).requires_grad_()
    z = torch.randn(6, 9, generator=generator, dtype=torch.float64).softmax(-1)
    advantages = torch.randn(6, generator=generator, dtype=torch.float64)
    value = advantages * log_density(logits.log_softmax(-1), z, z.log(), "soft", 0.5)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert torch.allclose(gradient, advantages[:, None] * (z - logits.softmax(-1)), atol=1e-12)


@pytest.mark.parametrize("estimator", [*ESTIMATORS, "none"])
def test_a_discrete_token_has_its_log_probability_bit_for_bit(estimator):
    log_p = torch.randn(5, 9, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    for token in range(9):
        one_hot = F.one_hot(torch.full((5,), token), 9).float()
        args = settings(estimator=estimator)
        value = lepo.step_log_probs(log_p, one_hot, one_hot.log(), torch.zeros(5, dtype=torch.bool), args)
        assert torch.equal(value, log_p[:, token])


@pytest.mark.parametrize("tau", [0.1, 0.5])
def test_what_the_docstring_says_of_the_four_scores(tau):
    """Means, second moments and the chain of Rao-Blackwellisations, on the same draws."""
    n, m, overlap = 100_000, len(PI), PI.square().sum().item()
    score = {estimator: scores_of(estimator, tau, n)[0] for estimator in ESTIMATORS}
    _, weights, scores = sample(n, tau)
    score["hard"] = F.one_hot(weights.argmax(-1), m) - PI  # that of the heaviest candidate, as if it were a token

    def is_zero_on_average(draws):
        return (draws.mean(0).abs() < 4.5 * draws.std(0) / math.sqrt(len(draws)) + 1e-12).all()

    assert all(is_zero_on_average(score[estimator]) for estimator in ("hard", "concrete", "gumbel"))
    assert torch.allclose(score["soft"].mean(0), weights.mean(0) - PI, atol=1e-9)
    assert tau == 0.1 or -0.045 < score["soft"].mean(0)[0] < -0.02  # the mixture is flatter than the policy
    v = 1 - (PI.log() - scores).exp()  # the score with respect to l, before normalisation takes a part away
    assert torch.allclose(score["gumbel"], v - PI * v.sum(-1, keepdim=True), atol=1e-9)
    squares = {estimator: each.square().sum(-1) for estimator, each in {**score, "v": v}.items()}
    expected = {"v": m, "gumbel": m - 2 + m * overlap, "concrete": m * (m - 1) / (m + 1), "hard": 1 - overlap}
    for name, value in expected.items():
        assert abs(squares[name].mean() - value) <= 5 * squares[name].std() / math.sqrt(n) + 1e-9, name
    assert squares["soft"].mean() < squares["hard"].mean()
    for i in range(5):  # hard is concrete given the argmax
        assert is_zero_on_average((score["concrete"] - score["hard"])[weights.argmax(-1) == i])
    for h in (weights[:, 0], weights[:, 1] ** 2):  # concrete is gumbel given the mixture
        assert is_zero_on_average(h[:, None] * (score["concrete"] - score["gumbel"]))


@pytest.mark.parametrize("tau", [0.3, 1.0])
def test_densities_equal_torchs(tau):
    """On a support of five of seven candidates: the policy is renormalised there, as in (1)."""
    _, weights, scores = sample(500, tau)
    weights, scores = F.pad(weights, (0, 2)), F.pad(scores, (0, 2), value=-math.inf)
    log_p = torch.randn(7, generator=torch.Generator().manual_seed(1), dtype=torch.float64).log_softmax(-1)
    ours = {name: log_density(log_p.expand(500, -1), weights, scores, name, tau) for name in ("concrete", "gumbel")}
    one, log_l = torch.ones(5, dtype=torch.float64), log_p[:5].log_softmax(-1)
    theirs = RelaxedOneHotCategorical(tau * one[0], logits=log_l).log_prob(weights[:, :5])
    assert torch.allclose(ours["concrete"], theirs, atol=1e-6)
    assert torch.allclose(ours["gumbel"], Gumbel(log_l, one).log_prob(scores[:, :5]).sum(-1))


def smooth_reward(z):
    """A nonlinear reward of the mixed embedding z^T E."""
    table = torch.randn(5, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return torch.tanh(z @ table).sum(-1) + 0.5 * (z @ table)[..., 0] ** 2


@pytest.mark.parametrize("estimator, tau", [("concrete", 0.5), ("gumbel", 0.5), ("soft", 0.3), ("soft", 0.5)])
def test_policy_gradient_against_finite_differences_with_common_random_numbers(estimator, tau):
    n, h = 200_000, 1e-3
    score, weights, scores = scores_of(estimator, tau, n)
    reward = smooth_reward(weights)
    draws = (reward - reward.mean())[:, None] * score  # (n, m)
    estimate, error = draws.mean(0), draws.std(0) / math.sqrt(n)
    noise, truth = scores - PI.log(), torch.zeros(5, dtype=torch.float64)
    for k in range(5):
        for sign in (1, -1):
            logits = PI.log().clone()
            logits[k] += sign * h
            truth[k] += sign * smooth_reward(((logits.log_softmax(-1) + noise) / tau).softmax(-1)).mean() / (2 * h)
    if estimator != "soft":
        assert ((estimate - truth).abs() < 4 * error + 1e-3 * truth.norm()).all()
    else:  # the direction is right, the size is not
        assert F.cosine_similarity(estimate, truth, dim=0) > 0.99
        low, high = {0.3: (0.7, 0.9), 0.5: (0.55, 0.8)}[tau]
        assert low < estimate.norm() / truth.norm() < high


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("changed", [dict(top_k=1), dict(tau=1e-3)])  # a support of one; z underflows to exact zeros
def test_extremes_give_no_nan(estimator, changed):
    lm, args = random_model(), settings(estimator=estimator, **changed)
    grads = gradients(lm, roll_out(lm, args), torch.linspace(-1, 1, 12), args)
    assert all(gradient.isfinite().all() for gradient in grads.values())


def test_gradient_on_a_two_step_chain_matches_finite_differences():
    """A latent step, a discrete token, reward by the token: the update's gradient (concrete density) is the gradient of
    the expected reward, the embedding table included, which acts as output layer, as mixture and as input."""
    args = settings(latent_steps=1, max_new_tokens=2, estimator="concrete", micro_batch=20_000)
    lm, prompt, n = random_model(vocabulary=5, seed=2, scale=3.0), [[2, 3]], 60_000
    lm.stop_ids = [99]
    value = torch.tensor([0.0, 1.0, -1.0, 0.5, 2.0])
    noise = -torch.empty(n, 5).exponential_(generator=torch.Generator().manual_seed(9)).log()

    @torch.no_grad()
    def expected_reward():
        """Independent of lepo.py: the text token is summed out, the noise is common to all calls."""
        first = lm.model(torch.tensor(prompt)).logits[0, -1].log_softmax(-1)
        mixture = ((first + noise) / args.tau).softmax(-1) @ lm.table
        embeds = torch.cat([lm.table[torch.tensor(prompt)].expand(n, -1, -1), mixture[:, None]], 1)
        return (lm.model(inputs_embeds=embeds).logits[:, -1].double().softmax(-1) @ value.double()).mean().item()

    roll = roll_out(lm, args, n, seed=1, prompts=prompt)
    reward = value[roll.tokens[:, 1]]
    ours = gradients(lm, roll, reward - reward.mean(), args)["model.embed_tokens.weight"] * 2  # 2 steps a row
    directions = torch.randn(4, *lm.table.shape, generator=torch.Generator().manual_seed(3))
    truth, start = torch.zeros(4), lm.table.detach().clone()
    for i, direction in enumerate(directions):
        for sign in (1, -1):
            lm.table.data.copy_(start + sign * 1e-2 * direction)
            truth[i] += sign * expected_reward() / 2e-2
    assert ((directions * -ours).sum((1, 2)) - truth).norm() < 0.1 * truth.norm()


# --- 6. The update ----------------------------------------------------------------------------------------------------


def grpo_gradients(lm, roll, advantages, first=0):
    """GRPO at ratio 1 as anybody would write it: token ids, one row at a time, no padding; from step `first` on."""
    lm.model.zero_grad()
    for n, advantage in enumerate(advantages):
        prompt, text = roll.prompts[n // roll.group_size], roll.tokens[n, : roll.length[n]]
        logits = lm.model(torch.cat([torch.tensor(prompt), text])[None]).logits[0, len(prompt) - 1 : -1]
        loss = F.cross_entropy(logits[first:], text[first:], reduction="sum")
        (advantage * loss / roll.length.sum()).backward()
    return {name: weight.grad.clone() for name, weight in lm.model.named_parameters()}


@pytest.mark.parametrize("estimator", [*ESTIMATORS, "none"])
def test_latent_steps_0_is_plain_grpo(estimator):
    lm, args = random_model(), settings(latent_steps=0, estimator=estimator)
    roll, advantages = roll_out(lm, args), some_advantages()
    assert_close(gradients(lm, roll, advantages, args), grpo_gradients(lm, roll, advantages))


@pytest.mark.parametrize("estimator, first", [("soft", 0), ("none", 6)])
def test_tau_to_zero_is_plain_grpo_and_without_an_estimator_only_text_is_trained(estimator, first):
    lm, args = random_model(), settings(tau=1e-3, latent_steps=6, max_new_tokens=10, estimator=estimator)
    roll, advantages = roll_out(lm, args), some_advantages()
    assert (roll.weights.amax(-1)[executed(roll)] > 0.999).float().mean() > 0.95
    assert_close(gradients(lm, roll, advantages, args), grpo_gradients(lm, roll, advantages, first), 2e-3)


@pytest.mark.parametrize("ratio, advantage, value", [(1.5, 1, 1.2), (1.5, -1, -1.5), (0.5, 1, 0.5), (0.5, -1, -0.8)])
def test_clip(ratio, advantage, value):
    new, old = torch.tensor([[math.log(ratio)]]), torch.zeros(1, 1)
    gain, clipped = lepo.clipped_objective(new, old, torch.tensor([[float(advantage)]]), 0.2)
    assert abs(gain.item() - value) < 1e-6 and clipped.item() == (value in (1.2, -0.8))


def test_exploding_ratio_stays_finite():
    new, signs = torch.tensor([[1e4, -1e4]]).requires_grad_(), torch.tensor([[1.0], [-1.0]])
    gain, _ = lepo.clipped_objective(new.expand(2, 2), torch.zeros(2, 2), signs, 0.2)
    assert gain.isfinite().all() and torch.autograd.grad(gain.sum(), new)[0].isfinite().all()


def test_second_pass_uses_the_first_ones_log_probabilities():
    lm, args = random_model(), settings(updates_per_batch=2, clip=1e-6, micro_batch=5)
    roll, advantages = roll_out(lm, args), some_advantages()
    sgd = torch.optim.SGD(lm.model.parameters(), lr=0.1)
    assert lepo.update(lm, None, sgd, roll, advantages, args)["clipped"] > 0.3  # of both passes; none of the first
    sgd.param_groups[0]["lr"] = 0.0
    assert lepo.update(lm, None, sgd, roll, advantages, args)["clipped"] == 0


@pytest.mark.parametrize("estimator", ["soft", "concrete"])
def test_cutting_into_micro_batches_changes_nothing(estimator):
    lm, args, advantages = random_model(), settings(estimator=estimator), some_advantages()
    roll = roll_out(lm, args)
    advantages[[1, 4, 5]] = 0.0  # rows that the update leaves out
    whole = gradients(lm, roll, advantages, args)
    for args.micro_batch in (1, 5):
        assert_close(gradients(lm, roll, advantages, args), whole)
    advantages[[1, 4, 5]] = 1e-12  # and rows that it does not, with as good as no advantage
    assert_close(gradients(lm, roll, advantages, args), whole)


def test_gradient_of_the_kl_estimate_is_that_of_the_kl():
    """By enumeration of a text token: the update's gradients, weighted by pi, are the gradient of KL(pi || pi_ref)."""
    lm, ref, args = random_model(), random_model(seed=7), settings(latent_steps=0, max_new_tokens=1, kl_coef=1.0)
    log_p, log_ref = (each.model(torch.tensor([[5, 6]])).logits[0, -1].log_softmax(-1) for each in (lm, ref))
    kl = (log_p.exp() * (log_p - log_ref.detach())).sum()
    theirs = torch.autograd.grad(kl, list(lm.model.parameters()))
    roll, ours = roll_out(lm, args, group_size=1, prompts=[[5, 6]]), {}
    for token, pi in enumerate(log_p.exp().tolist()):
        roll.ids[0, 0, 0] = roll.tokens[0, 0] = token
        for name, gradient in gradients(lm, roll, torch.zeros(1), args, ref).items():
            ours[name] = ours.get(name, 0) + pi * gradient
    assert_close(ours, dict(zip(ours, theirs, strict=True)))


def test_bfloat16_compute_as_on_a_gpu(monkeypatch):
    """On the CPU, in a GPU's place: rollout and update under autocast, weights and gradients float32."""
    lm, args = random_model(), settings()
    roll, advantages = roll_out(lm, args), some_advantages()
    plain = gradients(lm, roll, advantages, args)
    monkeypatch.setattr(common.LanguageModel, "autocast", lambda self: torch.autocast("cpu", torch.bfloat16))
    assert roll_out(lm, args).weights.dtype == torch.float32 == lm.model.dtype
    coarse = gradients(lm, roll, advantages, args)
    a, b = (torch.cat([gradient.flatten() for gradient in each.values()]) for each in (plain, coarse))
    assert b.dtype == torch.float32 and not torch.equal(a, b) and F.cosine_similarity(a, b, dim=0) > 0.99


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change():
    lm, args = random_model(), settings()
    before = [weight.clone() for weight in lm.model.parameters()]
    with pytest.raises(common.UserError, match="not finite"):
        sgd = torch.optim.SGD(lm.model.parameters(), lr=1.0)
        lepo.update(lm, None, sgd, roll_out(lm, args), torch.full((12,), math.nan), args)
    assert all(torch.equal(a, b) for a, b in zip(before, lm.model.parameters(), strict=True))


# --- 7. and 8. Runs ---------------------------------------------------------------------------------------------------

QUICK = ["--steps", "5", "--prompts_per_step", "4", "--group_size", "4", "--eval_problems", "8", "--eval_samples", "2",
         "--eval_every", "2", "--save_every", "2"]  # fmt: skip


def rows_of(folder):
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{**row, "seconds": 0} for row in rows]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    with open(folder.parent / "stdout", "w") as out, contextlib.redirect_stdout(out):
        lepo.main([*QUICK, "--out", str(folder)])
    return folder


def test_a_run_leaves_a_log_a_result_and_a_model(run):
    result = json.loads((run / "result.json").read_text())
    keys = "method model seed steps seconds greedy_before greedy sampled_before sampled pass@2 length greedy_no_latents"
    assert set(keys.split()) <= set(result) and (result["method"], result["args"]["tau"]) == ("lepo", 0.5)
    assert [row["step"] for row in rows_of(run)] == list(range(5)) and "greedy" in rows_of(run)[1]
    paths = run / "model", HERE / "tiny"
    trained, start = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in paths)
    assert any(not torch.equal(trained[name], start[name]) for name in start)
    out = (run.parent / "stdout").read_text()
    assert json.loads(out.strip().splitlines()[-1]).items() <= result.items()
    assert "? <think>\n    latent  1  ' " in out and "\n    text       '" in out and "the answer is" in out


def test_killed_and_resumed_is_uninterrupted_bit_for_bit(run, tmp_path, monkeypatch, capsys):
    score, calls = lepo.score, []

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 8:  # in step 3, behind the checkpoint of step 2 and its rows of the log
            raise KeyboardInterrupt
        return score(*arguments)

    monkeypatch.setattr(lepo, "score", killed)
    with pytest.raises(SystemExit) as stop:
        common.run_main(lambda: lepo.main([*QUICK, "--out", str(tmp_path / "run")]))
    assert stop.value.code == 130 and f"--resume {tmp_path / 'run'}" in capsys.readouterr().err
    with open(tmp_path / "run/log.jsonl", "a") as file:
        file.write('{"step": 3, "rew')  # a line that was being written
    assert common.load_checkpoint(tmp_path / "run")["step"] == 2
    take, taken = common.take_problems, []
    monkeypatch.setattr(common, "take_problems", lambda *where: taken.append(where[1:]) or take(*where))
    lepo.main(["--resume", str(tmp_path / "run")])
    assert taken[2:] == [("train", 4 * step, 4) for step in (2, 3, 4)]  # every step has problems of its own
    assert rows_of(tmp_path / "run") == rows_of(run)
    ours, theirs = ((path / "model/model.safetensors").read_bytes() for path in (tmp_path / "run", run))
    assert ours == theirs


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--latent_steps", "0"]])
def test_the_tiny_model_learns_to_the_end(flags, tmp_path, capsys):
    lepo.main([*flags, "--out", str(tmp_path / "run")])
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])  # other processors round differently
    assert result["greedy_before"] < 0.6 and result["greedy"] > 0.85 and result["sampled"] > 0.8
