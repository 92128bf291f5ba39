"""Proofs of lepo.py, a chapter to read beside it: every formula against something that does not
share its code, in the order of its sections.

    pytest test_lepo.py            # a quarter of a minute
    pytest test_lepo.py -m slow    # whole runs

Monte-Carlo tests have fixed seeds and bounds of 4 standard errors or more; tests of fit p = .001.
"""

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test needs a network
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported: runs are equal on a CPU only

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import RelaxedOneHotCategorical
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.generation import TopKLogitsWarper, TopPLogitsWarper

import common
import lepo
from tasks import chains

seed_all = torch.manual_seed
MODELS = Path(__file__).parent / "tasks/models"
PI = torch.tensor([0.51, 0.23, 0.15, 0.08, 0.03])  # a policy over five tokens
STOP = 1
PROMPTS = [[5, 6, 7], [8], [3, 4, 5, 6, 9, 10]]  # of different lengths


def settings(**changed):
    """What the functions of lepo.py read of its arguments; nothing is cut off."""
    values = dict(tau=0.5, noise="gumbel", top_k=12, top_p=2.0, text_only=False, device="cpu")
    values |= dict(latent_steps=3, max_new_tokens=6)
    return SimpleNamespace(**values | changed)


def random_model(vocabulary=12, seed=0, scale=6.0):
    """A small Qwen2 whose logits are spread: its mixtures are neither flat nor one-hot."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        eos_token_id=STOP,
    )
    model = Qwen2ForCausalLM(config).eval()
    table = model.get_input_embeddings().weight
    table.data.mul_(scale)
    return common.LanguageModel(model, None, table, table, torch.tensor([STOP]))


def roll_out(lm, args, group_size=4, seed=0, prompts=PROMPTS, noise_free=False):
    torch.manual_seed(seed)
    return lepo.rollout(lm, prompts, group_size, args.latent_steps, args, noise_free)


def executed(roll):
    return torch.arange(roll.ids.shape[1]) < roll.length[:, None]  # (N, T)


def dense(roll, n):
    """Row n as weights over the vocabulary of 12 -> (steps executed, V)"""
    steps = roll.length[n]
    ids, weights = roll.ids[n, :steps], roll.weights[n, :steps]  # (steps, K)
    return torch.zeros(steps, 12).scatter_add(-1, ids, weights)


def gradients(lm, roll, advantages, args):
    """What lepo.update computes before it bounds the norm. The weights stay as they are."""
    lm.model.zero_grad()
    sgd = torch.optim.SGD(lm.model.parameters(), lr=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.ones(()))
        lepo.update(lm, sgd, roll, advantages, args)
    return {name: weight.grad.clone() for name, weight in lm.model.named_parameters()}


def assert_close(ours, theirs, tolerance=1e-5):
    scale = max(gradient.abs().max() for gradient in theirs.values())
    assert scale > 0
    for name in theirs:
        assert (ours[name] - theirs[name]).abs().max() <= tolerance * scale, name


def some_advantages(groups=3):
    return torch.randn(groups, 4, generator=torch.Generator().manual_seed(0))


# --- 2. The soft token ----------------------------------------------------------------------------


@pytest.mark.parametrize("top_k, top_p", [(5, 2.0), (20, 0.7), (8, 0.6), (1, 0.9), (20, 1e-6)])
def test_candidates_are_those_of_the_usual_filters(top_k, top_p):
    """Equation (1) against transformers' own warpers, which leave the full vocabulary in place."""
    logits = torch.randn(50, 20, generator=torch.Generator().manual_seed(0)) * 2
    expected = TopKLogitsWarper(top_k)(None, logits)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    ids, log_probs = lepo.candidates(logits, settings(top_k=top_k, top_p=top_p))
    ours = torch.full_like(logits, -math.inf).scatter(-1, ids, log_probs)
    assert torch.equal(ours.isinf(), expected.isinf())
    assert torch.allclose(ours.softmax(-1), expected.softmax(-1), atol=1e-6)


def draw(n, tau, pi=PI):
    """n soft tokens at one state -> weights (n, m), in the order of pi, which is descending"""
    args = settings(tau=tau, top_k=len(pi))
    return lepo.soft_token(pi.log().expand(n, -1), args, noise_free=False)[1]


def test_a_worked_soft_token():
    """The docstring's: .6 and .3 at tau .5, without noise, are weighted .8 and .2, as 36 to 9."""
    logits = torch.tensor([[0.1, 0.6, 0.3]]).log()
    args = settings(top_k=2)
    for noise_free, args.noise in ((True, "gumbel"), (False, "none")):
        ids, weights = lepo.soft_token(logits, args, noise_free)
        assert ids.tolist() == [[1, 2]]
        assert torch.allclose(weights, torch.tensor([[0.8, 0.2]]))


def test_the_noise_is_gumbel():
    """The difference of two Gumbels is logistic: equation (2) undone, in 20 equally likely bins."""
    torch.manual_seed(0)
    z = draw(20_000, 0.5).double()
    z_ratio, pi_ratio = z[:, 0] / z[:, 1], PI[0] / PI[1]
    difference = 0.5 * z_ratio.log() - pi_ratio.log()
    counts = torch.histc(difference.sigmoid().float(), 20, 0, 1)  # uniform, if logistic
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.82  # chi-square, 19 degrees of freedom


@pytest.mark.parametrize("kind", ["soft", "text"])
def test_the_heaviest_candidate_is_a_draw_from_the_policy(kind):
    """Gumbel-max for a soft token. Text is drawn from all five tokens, though top_k is 2."""
    torch.manual_seed(1)
    logits = PI.log().expand(20_000, -1)
    if kind == "soft":
        ids, weights = lepo.soft_token(logits, settings(top_k=5), False)
    else:
        ids, weights = lepo.text_token(logits, settings(top_k=2), False)
    assert torch.allclose(weights.sum(-1), torch.ones(20_000))
    counts = ids.gather(-1, weights.argmax(-1, keepdim=True)).flatten().bincount(minlength=5)
    assert ((counts - 20_000 * PI) ** 2 / (20_000 * PI)).sum() < 18.47  # 4 degrees of freedom


def test_filtered_text_would_drift():
    """By enumeration of one text token whose rewards are all the same, so nothing is to be learnt.

    Drawn from the full softmax, the mean gradient of (5) is 0. Drawn from three candidates, a
    negative advantage raises the tokens that are never drawn.
    """
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0]], requires_grad=True)
    ids, log_probs = lepo.candidates(logits.detach(), settings(top_k=3))
    filtered = torch.zeros(1, 5).scatter(-1, ids, log_probs.exp())
    means = []
    for drawn_from in (logits.detach().softmax(-1), filtered):
        objective = -(drawn_from * logits.log_softmax(-1)).sum()
        means += torch.autograd.grad(objective, logits)
    assert means[0].abs().max() < 1e-6
    assert means[1][0, 3:].min() > 0.01
    assert means[1][0, :3].max() < 0


# --- 3. Rollout -----------------------------------------------------------------------------------


def watch(monkeypatch):
    """-> list that collects (embeddings fed, logits they gave) of every step of a rollout"""
    seen, feed = [], common.Decoder.feed

    def watched(decoder, embeds):
        seen.append((embeds, feed(decoder, embeds)))
        return seen[-1][1]

    monkeypatch.setattr(common.Decoder, "feed", watched)
    return seen


@pytest.mark.parametrize("latent_steps, top_p", [(0, 2.0), (3, 2.0), (3, 0.9)])
def test_a_replay_equals_its_rollout(latent_steps, top_p, monkeypatch):
    """What is stored was executed. Prompts differ in length, and rows end early.

    Log-probabilities of the replay are those of the logits that the decoder gave, and the stored
    mixtures times E are the embeddings that it was fed: equations (3) and (5).
    """
    args = settings(latent_steps=latent_steps, top_k=5, top_p=top_p, max_new_tokens=8)
    lm = random_model()
    lm.stop_ids = torch.tensor([STOP, 4, 7])
    seen = watch(monkeypatch)
    roll = roll_out(lm, args, group_size=8)
    mask = executed(roll)
    assert roll.length.unique().numel() > 3
    assert (roll.length == 8).any()
    assert torch.allclose(roll.weights.sum(-1), mask.float())
    assert (roll.weights[:, latent_steps:].amax(-1)[mask[:, latent_steps:]] == 1).all()
    replayed = [lepo.replay(lm, roll, group, 8, args).detach() for group in range(3)]
    ours = torch.cat([F.pad(part, (0, 8 - part.shape[1])) for part in replayed])  # (N, T)
    assert (ours[~mask] == 0).all()
    assert len(seen) == 8
    for t, (embeds, logits) in enumerate(seen[:-1]):
        rows = (roll.length > t + 1).nonzero().squeeze(-1)  # those that step t was fed to
        now = torch.stack([dense(roll, n)[t] for n in rows])  # (rows, V)
        after = torch.stack([dense(roll, n)[t + 1] for n in rows])
        assert torch.allclose(now @ lm.embedding, embeds[:, 0], atol=1e-5)
        expected = (after * logits.log_softmax(-1)).sum(-1)
        assert torch.allclose(ours[rows, t + 1], expected, atol=2e-5)


def test_a_rollout_does_not_depend_on_padding_or_neighbours():
    """A prompt alone, and among longer ones and rows that leave: the same noise-free rollout."""
    lm, args = random_model(), settings(max_new_tokens=10)
    lm.stop_ids = torch.tensor([STOP, 4, 7])
    together = roll_out(lm, args, group_size=2, noise_free=True)
    assert together.length.unique().numel() > 1
    for i, prompt in enumerate(PROMPTS):
        alone = roll_out(lm, args, group_size=1, prompts=[prompt], noise_free=True)
        for n in (2 * i, 2 * i + 1):
            assert torch.equal(alone.tokens[0], together.tokens[n])
            assert alone.length[0] == together.length[n]


def test_greedy_without_latents_is_generate():
    lm, prompt = random_model(seed=3), torch.tensor([[3, 4, 5]])
    args = settings(latent_steps=0, max_new_tokens=10)
    roll = roll_out(lm, args, 1, prompts=prompt.tolist(), noise_free=True)
    mask = torch.ones_like(prompt)
    out = lm.model.generate(prompt, attention_mask=mask, max_new_tokens=10, do_sample=False)
    assert roll.tokens[0, : roll.length[0]].tolist() == out[0, 3:].tolist()


def test_an_end_token_in_a_thought_ends_the_rollout():
    lm, args = random_model(), settings(latent_steps=5)
    lm.stop_ids = torch.arange(6)
    roll = roll_out(lm, args, group_size=8)
    early = roll.length < 5
    assert early.any() and (roll.weights[early, 5:] == 0).all()
    last = roll.tokens[torch.arange(24), roll.length - 1]
    assert (torch.isin(last, lm.stop_ids) | (roll.length == 6)).all()


def test_without_noise_thoughts_are_equal_and_texts_are_not():
    args = settings(noise="none", latent_steps=2)
    roll = roll_out(random_model(), args, group_size=16, prompts=[[5, 6, 7]])
    assert (roll.weights[:, :2] == roll.weights[:1, :2]).all()
    assert not (roll.tokens == roll.tokens[:1]).all()


# --- 4. Reward and advantages ---------------------------------------------------------------------


def test_advantages():
    rewards = torch.tensor([[1.0, 1, 0, 0], [1, 0, 0, 0]])
    ours = lepo.group_advantages(rewards)
    usual = torch.tensor([[0.866025] * 2 + [-0.866025] * 2, [1.5, -0.5, -0.5, -0.5]])
    std = torch.tensor([[0.577350], [0.5]])
    assert torch.allclose(ours, usual * std / (std + 1e-4), atol=1e-5)
    assert ours.sum(1).abs().max() < 1e-6
    assert torch.allclose(lepo.group_advantages(3 + rewards), ours, atol=1e-6)


@pytest.mark.parametrize("reward", [0.0, 1.0, 1.975, 7.7, 0.1, -3.3, 1e6 / 3])
def test_equal_rewards_give_exactly_no_advantage(reward):
    for group_size in (2, 3, 7, 8, 64):
        advantages = lepo.group_advantages(torch.full((2, group_size), reward))
        assert torch.equal(advantages, torch.zeros(2, group_size))


def test_each_rollout_is_judged_by_its_own_problem():
    """Two problems, three rollouts each. The verifier reads text up to the end and nothing else."""
    words = ["<pad>", "<eos>", "a", "b"]
    tokenizer = SimpleNamespace(
        batch_decode=lambda rows, **_: [" ".join(words[i] for i in row) for row in rows]
    )
    tokens = torch.tensor([[2, 2, 3], [3, 3, 3], [3, 2, 2], [3, 3, 2], [2, 3, 3], [2, 2, 2]])
    roll = SimpleNamespace(tokens=tokens, length=torch.tensor([1, 1, 1, 1, 2, 3]), ids=tokens)
    task = SimpleNamespace(verify=lambda text, problem: (float(text == problem), len(text) / 2))
    strict, flexible = lepo.rewards_of(SimpleNamespace(tokenizer=tokenizer), task, roll, ["a", "b"])
    assert strict.tolist() == [[1, 0, 0], [1, 0, 0]]
    assert flexible.tolist() == [[0.5, 0.5, 0.5], [0.5, 1.5, 2.5]]


# --- 5. Log-probability ---------------------------------------------------------------------------


def by_hand(lm, roll, advantages):
    """The gradient of (6) in closed form: A (z - pi) / steps at the logits, then backwards.

    One rollout at a time: no cache, no padding, mixtures over the whole vocabulary.
    """
    lm.model.zero_grad()
    for n, advantage in enumerate(advantages.flatten()):
        z = dense(roll, n)
        prompt = roll.prompts[n // advantages.shape[1]]
        embeds = torch.cat([lm.embedding[prompt], z[:-1] @ lm.embedding])[None]
        logits = lm.model(inputs_embeds=embeds).logits[0, len(prompt) - 1 :]  # (steps, V)
        gradient = advantage * (z - logits.softmax(-1)) / roll.length.sum()
        logits.backward(-gradient.detach())
    return {name: weight.grad.clone() for name, weight in lm.model.named_parameters()}


@pytest.mark.parametrize("top_p", [2.0, 0.9])
def test_the_gradient_at_the_logits_is_advantage_times_z_minus_pi(top_p):
    """The paper's unification, for every weight of the model, E as input and mixture included.

    The third group has no advantage: it is left out of the pass, and its steps still count.
    """
    lm, args, advantages = random_model(), settings(top_p=top_p), some_advantages()
    advantages[2] = 0
    roll = roll_out(lm, args)
    assert_close(gradients(lm, roll, advantages, args), by_hand(lm, roll, advantages))


def plain_grpo(lm, roll, advantages, first=0):
    """GRPO at ratio 1 as anybody would write it, on token ids; trained from step `first` on."""
    lm.model.zero_grad()
    for n, advantage in enumerate(advantages.flatten()):
        prompt = torch.tensor(roll.prompts[n // advantages.shape[1]])
        text = roll.tokens[n, : roll.length[n]]
        logits = lm.model(torch.cat([prompt, text])[None]).logits[0, len(prompt) - 1 : -1]
        loss = F.cross_entropy(logits[first:], text[first:], reduction="sum")
        (advantage * loss / roll.length.sum()).backward()
    return {name: weight.grad.clone() for name, weight in lm.model.named_parameters()}


def test_latent_steps_0_is_plain_grpo():
    lm, args, advantages = random_model(), settings(latent_steps=0, top_k=1), some_advantages()
    roll = roll_out(lm, args)
    assert_close(gradients(lm, roll, advantages, args), plain_grpo(lm, roll, advantages))


@pytest.mark.parametrize("text_only, first", [(False, 0), (True, 6)])
def test_tau_to_zero_is_plain_grpo(text_only, first):
    """And with --text_only the GRPO of the text alone."""
    args = settings(tau=1e-3, latent_steps=6, max_new_tokens=10, text_only=text_only)
    lm, advantages = random_model(), some_advantages()
    roll = roll_out(lm, args)
    assert (roll.weights.amax(-1)[executed(roll)] > 0.999).float().mean() > 0.95
    expected = plain_grpo(lm, roll, advantages, first)
    assert_close(gradients(lm, roll, advantages, args), expected, 2e-3)


def test_the_gradient_on_a_two_step_chain_is_that_of_the_expected_reward():
    """By enumeration of 5 x 5 tokens, at tau -> 0, where (5) is exact; E plays all of its parts."""
    args = settings(latent_steps=1, max_new_tokens=2, tau=1e-3, top_k=5)
    lm = random_model(vocabulary=5, seed=2, scale=3.0)
    lm.stop_ids = torch.tensor([99])
    value = torch.randn(5, 5)  # the reward of each chain
    chains = torch.cartesian_prod(torch.arange(5), torch.arange(5))  # (25, 2)
    prompt = torch.tensor([[2, 3]]).expand(25, -1)
    log_pi = lm.model(torch.cat([prompt, chains], 1)).logits[:, 1:3].log_softmax(-1)  # (25, 2, 5)
    chance = log_pi.gather(-1, chains[:, :, None]).sum((1, 2)).exp()  # (25,)
    expected_reward = (chance * value[chains[:, 0], chains[:, 1]]).sum()
    truth = torch.autograd.grad(expected_reward, lm.embedding)[0]

    roll = roll_out(lm, args, 60_000, seed=1, prompts=[[2, 3]])
    rewards = value[roll.tokens[:, 0], roll.tokens[:, 1]]
    advantages = (rewards - expected_reward.detach())[None]  # (1, G)
    ours = -2 * gradients(lm, roll, advantages, args)["model.embed_tokens.weight"]  # 2 steps a row
    assert (ours - truth).norm() < 0.05 * truth.norm()


# What (5) is and is not: against the exact density of z and its score, by torch.distributions.


def score_of_density(z, tau):
    """The gradient of the log-density of z with respect to the logits, (n, m)"""
    logits = PI.log().expand(len(z), -1).clone().requires_grad_()
    z = z.clamp(min=1e-30)
    density = RelaxedOneHotCategorical(torch.tensor(tau), logits=logits).log_prob(z)
    return torch.autograd.grad(density.sum(), logits)[0]


def is_zero_on_average(draws):
    error = draws.std(0) / math.sqrt(len(draws))
    return (draws.mean(0).abs() < 4.5 * error + 1e-6).all()


def test_the_soft_label_is_biased_and_its_variance_is_the_least():
    """Mean E[z] - pi, not 0. The density's score has mean 0 and m (m - 1) / (m + 1) of variance,

    whatever pi and tau. The score of the heaviest candidate lies between, with 1 - sum pi^2.
    """
    torch.manual_seed(0)
    z = draw(100_000, 0.5)
    soft, exact = z - PI, score_of_density(z, 0.5)
    hard = F.one_hot(z.argmax(-1), 5) - PI
    assert is_zero_on_average(exact) and is_zero_on_average(hard)
    assert not is_zero_on_average(soft) and -0.045 < soft.mean(0)[0] < -0.02  # flatter than pi
    squares = [score.square().sum(-1).mean().item() for score in (soft, hard, exact)]
    assert squares[0] < squares[1] == pytest.approx(1 - PI.square().sum().item(), abs=0.01)
    assert squares[2] == pytest.approx(5 * 4 / 6, abs=0.05)


@pytest.mark.parametrize("top_p, mean", [(2.0, [0.5, 0.3, 0.2]), (0.7, [0.625, 0.375, 0.0])])
def test_where_candidates_are_cut_the_mean_of_z_is_not_pi(top_p, mean):
    """At a tau near 0, where z - pi would be a score if nothing were cut"""
    torch.manual_seed(0)
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(20_000, -1)
    ids, z = lepo.soft_token(logits, settings(tau=1e-3, top_k=3, top_p=top_p), noise_free=False)
    drawn = torch.zeros(logits.shape).scatter(1, ids, z)
    assert drawn.mean(0).tolist() == pytest.approx(mean, abs=0.02)


def smooth_reward(z):
    """A nonlinear reward of the mixed embedding z^T E"""
    table = torch.randn(5, 3, generator=torch.Generator().manual_seed(5))
    mixed = z @ table
    return torch.tanh(mixed).sum(-1) + 0.5 * mixed[..., 0] ** 2


@pytest.mark.parametrize("tau, low, high", [(0.3, 0.7, 0.9), (0.5, 0.55, 0.8)])
def test_the_direction_is_right_and_the_length_is_not(tau, low, high):
    """Against finite differences of the expected reward with common random numbers."""
    n, h, truth = 200_000, 1e-2, torch.zeros(5)
    for k in range(5):
        for sign in (1, -1):
            logits = PI.log() + sign * h * F.one_hot(torch.tensor(k), 5)
            torch.manual_seed(0)
            truth[k] += sign * smooth_reward(draw(n, tau, logits.softmax(-1))).mean() / (2 * h)
    torch.manual_seed(0)
    z = draw(n, tau)
    reward = smooth_reward(z)
    advantage = (reward - reward.mean())[:, None]
    soft, exact = advantage * (z - PI), advantage * score_of_density(z, tau)
    error = exact.std(0) / math.sqrt(n)
    assert ((exact.mean(0) - truth).abs() < 4 * error + 1e-2 * truth.norm()).all()
    assert F.cosine_similarity(soft.mean(0), truth, dim=0) > 0.99
    assert low < soft.mean(0).norm() / truth.norm() < high


# --- 6. Update ------------------------------------------------------------------------------------


@pytest.mark.parametrize("changed", [dict(top_k=1), dict(tau=1e-3), dict(top_p=1e-6)])
def test_extremes_give_no_nan(changed):
    """A support of one token, and weights that underflow to exact zeros."""
    lm, args = random_model(), settings(**changed)
    grads = gradients(lm, roll_out(lm, args), some_advantages(), args)
    assert all(gradient.isfinite().all() for gradient in grads.values())


def test_bfloat16():
    """Matrix products in half precision; weights, gradients and mixtures in float32."""
    lm, args, advantages = random_model(), settings(), some_advantages()
    roll = roll_out(lm, args)
    plain = gradients(lm, roll, advantages, args)
    lm.dtype = torch.bfloat16
    assert roll_out(lm, args).weights.dtype == torch.float32 == lm.model.dtype
    coarse = gradients(lm, roll, advantages, args)
    a = torch.cat([gradient.flatten() for gradient in plain.values()])
    b = torch.cat([gradient.flatten() for gradient in coarse.values()])
    assert b.dtype == torch.float32
    assert not torch.equal(a, b)
    assert F.cosine_similarity(a, b, dim=0) > 0.99


def test_the_gradient_is_bounded_by_1():
    lm, args = random_model(), settings()
    before = [weight.clone() for weight in lm.model.parameters()]
    sgd = torch.optim.SGD(lm.model.parameters(), lr=1.0)
    norm = lepo.update(lm, sgd, roll_out(lm, args), 1e3 * some_advantages(), args)
    moves = [(a - b).norm() for a, b in zip(before, lm.model.parameters(), strict=True)]
    assert norm > 100 and abs(torch.stack(moves).norm() - 1) < 1e-3


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change():
    lm, args = random_model(), settings()
    before = [weight.clone() for weight in lm.model.parameters()]
    sgd = torch.optim.SGD(lm.model.parameters(), lr=1.0)
    with pytest.raises(common.UserError, match="not finite"):
        lepo.update(lm, sgd, roll_out(lm, args), torch.full((3, 4), math.nan), args)
    for a, b in zip(before, lm.model.parameters(), strict=True):
        assert torch.equal(a, b)


# --- 7. and 8. Evaluation and runs ----------------------------------------------------------------

QUICK = ["--steps", "5", "--prompts_per_step", "4", "--group_size", "4", "--eval_problems", "8",
         "--eval_every", "2", "--save_every", "2"]  # fmt: skip


def rows_of(folder):
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [row | {"seconds": 0} for row in rows]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    lepo.main([*QUICK, "--out", str(folder)])
    return folder


def test_a_run_leaves_a_log_a_result_and_a_trained_model(run):
    result = json.loads((run / "result.json").read_text())
    assert {"greedy", "greedy_before", "pass@4", "greedy_no_latents"} <= set(result)
    rows = rows_of(run)
    assert [row["step"] for row in rows] == list(range(5))
    assert "greedy" in rows[1]
    ours, start = (
        AutoModelForCausalLM.from_pretrained(path).state_dict()
        for path in (run / "model", MODELS / "chains")
    )
    assert any(not torch.equal(ours[name], start[name]) for name in start)


def test_killed_and_resumed_is_uninterrupted_bit_for_bit(run, tmp_path, monkeypatch):
    """Killed in step 3, behind the checkpoint of step 2 and while a row of the log is written."""
    rewards_of, calls, folder = lepo.rewards_of, [], tmp_path / "run"

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 9:  # five are of the evaluations before and in step 1
            raise KeyboardInterrupt
        return rewards_of(*arguments)

    monkeypatch.setattr(lepo, "rewards_of", killed)
    with pytest.raises(KeyboardInterrupt):
        lepo.main([*QUICK, "--out", str(folder)])
    with open(folder / "log.jsonl", "a") as file:
        file.write('{"step": 3, "rew')
    assert common.load_checkpoint(folder)["step"] == 2
    assert len((folder / "log.jsonl").read_text().splitlines()) == 4
    problems, starts, seeds = chains.problems, [], []
    monkeypatch.setattr(chains, "problems", lambda *at: starts.append(at[2]) or problems(*at))
    monkeypatch.setattr(torch, "manual_seed", lambda seed: seeds.append(seed) or seed_all(seed))
    lepo.main(["--resume", str(folder)])
    assert starts[2:] == [8, 12, 16] and len(set(seeds)) == 4  # of three steps and of evaluation
    assert rows_of(folder) == rows_of(run)
    ours, theirs = ((path / "model/model.safetensors").read_bytes() for path in (folder, run))
    assert ours == theirs


def test_a_trained_model_is_asked(run, capsys):
    """It brings its task along: a noise-free thought and three sampled ones, then the end."""
    lepo.main(["--model", str(run / "model"), "--ask", "16 + 5 - 9"])
    out = capsys.readouterr().out
    assert out.count("with noise") == 3 and out.count("text       '16 + 5 = ") >= 3
    assert "latent  1  ' 16' 1.00\n" in out and "latent 12" in out


@pytest.mark.slow
def test_chains_are_learnt_to_the_end(tmp_path):
    lepo.main(["--eval_every", "0", "--eval_problems", "128", "--out", str(tmp_path / "run")])
    result = json.loads((tmp_path / "run/result.json").read_text())  # processors round differently
    assert result["greedy_before"] < 0.6 and result["greedy"] > 0.85 and result["sampled"] > 0.8


@pytest.mark.slow
def test_on_trees_lepo_ends_far_above_grpo(tmp_path):
    results = []
    grpo = ["--latent_steps", "0", "--steps", "15"]  # which stays where it is
    for name, flags in (("grpo", grpo), ("lepo", ["--steps", "60"])):
        flags += ["--task", "trees", "--eval_problems", "256"]
        lepo.main([*flags, "--eval_every", "0", "--out", str(tmp_path / name)])
        results.append(json.loads((tmp_path / name / "result.json").read_text()))
    grpo, ours = results
    assert grpo["greedy"] < 0.6 and ours["greedy"] > grpo["greedy"] + 0.14
    assert ours["sampled"] > max(grpo["sampled"] + 0.14, ours["sampled_before"] + 0.2)
