"""Proofs of lepo.py: every formula against something that does not share its code.

    pytest test_lepo.py              # everything, about two minutes
    pytest test_lepo.py -k density   # one subject

In the order of lepo.py: the latent token, the rollout and its replay, advantages, log-probabilities, the update, and
runs of the script. Monte-Carlo tests use fixed seeds, bounds of 4 standard errors or more, tests of fit p = .001.
"""

import itertools
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
from safetensors.torch import load_file
from torch.distributions import Categorical, RelaxedOneHotCategorical, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, TopKLogitsWarper, TopPLogitsWarper

import common
import lepo

HERE = Path(__file__).parent
SHARED = HERE.parent / "shared"
PI = torch.tensor([0.51, 0.23, 0.15, 0.08, 0.03], dtype=torch.float64)
PAD, STOP = 0, 1


def settings(**changed):
    """The fields of lepo.py's arguments that its functions read, at the paper's values, unfiltered."""
    values = dict(tau=0.5, noise="gumbel", draws=3, estimator="soft", temperature=1.0, top_k=0, top_p=1.0,
                  latent_steps=3, max_new_tokens=6, clip=0.2, kl_coef=0.0, micro_batch=64, updates_per_batch=1,
                  grad_clip=1e9, gradient_checkpointing=False, verifier_reads="written")  # fmt: skip
    return SimpleNamespace(**values | changed)


def random_model(vocabulary=12, seed=0, scale=6.0):
    """A small random Qwen2 whose logits are spread enough for its mixtures to be neither flat nor one-hot -> lm"""
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=True, eos_token_id=STOP,
        )  # no pad token: transformers would set its embedding to 0
    ).eval()  # fmt: skip
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(scale)
    tokenizer = SimpleNamespace(batch_decode=lambda rows, **_: rows)  # "texts" are lists of ids
    return common.LanguageModel(model, tokenizer, [STOP], PAD)


PROMPTS = [[5, 6, 7], [8], [3, 4, 5, 6, 9, 10]]  # of different lengths


def roll_out(lm, args, group_size=4, seed=0, prompts=PROMPTS, noisy=True):
    return lepo.rollout(lm, prompts, group_size, args, torch.Generator().manual_seed(seed), noisy=noisy)


def sgd(lm, lr=0.0):
    return torch.optim.SGD(lm.model.parameters(), lr=lr)


def gradients(lm, roll, advantages, args):
    """Gradients that lepo.update computes; the weights stay as they are (learning rate 0)."""
    lm.model.zero_grad()
    metrics = lepo.update(lm, lm, sgd(lm), roll, advantages, args)
    named = lm.model.named_parameters()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in named}, metrics


def assert_close_gradients(ours, theirs, tolerance=1e-5):
    scale = max(g.abs().max() for g in theirs.values())
    assert scale > 0
    for name in theirs:
        assert (ours[name] - theirs[name]).abs().max() <= tolerance * scale, name


# ----------------------------------------------------------------------------------------------------------------------
# 3. The latent token.


@pytest.mark.parametrize("top_k, top_p", [(5, 1.0), (0, 0.7), (8, 0.6), (1, 0.9), (0, 1e-6)])
def test_support_is_that_of_the_usual_filters(top_k, top_p):
    logits = torch.randn(50, 20, generator=torch.Generator().manual_seed(0)) * 2
    expected = logits / 0.8
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    expected = TopPLogitsWarper(top_p)(None, expected).log_softmax(-1)
    ids, log_probs = lepo.support(logits, 0.8, top_k, top_p)
    full = torch.full_like(logits, -math.inf).scatter(-1, ids, log_probs)
    assert torch.equal(full.isinf(), expected.isinf())
    assert torch.allclose(full.exp(), expected.exp(), atol=1e-6)


def sample(n, args, pi=PI, seed=0):
    """n draws of the latent token at one state -> (log_probs (n, m), SoftToken), float64."""
    generator = torch.Generator().manual_seed(seed)
    log_probs = pi.log().expand(n, -1)
    gumbel = -torch.empty(n, len(pi), dtype=torch.float64).exponential_(generator=generator).log()
    ids = torch.arange(len(pi)).expand(n, -1)
    return log_probs, lepo.latent_token(ids, log_probs, gumbel, generator, args)


def test_gumbel_softmax_has_the_concrete_density():
    """Draws of z_1 against draws from torch's own Concrete distribution (Kolmogorov-Smirnov)."""
    _, token = sample(4000, settings(tau=0.5), PI[:2] / PI[:2].sum())
    theirs = RelaxedOneHotCategorical(torch.tensor(0.5, dtype=torch.float64), probs=PI[:2] / PI[:2].sum())
    torch.manual_seed(0)
    reference = theirs.sample((4000,))[:, 0].sort().values
    ours = token.weights[:, 0].sort().values
    grid = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    gap = (torch.searchsorted(ours, grid) - torch.searchsorted(reference, grid)).abs().max() / 4000
    assert gap < 1.95 * math.sqrt(2 / 4000)  # Kolmogorov-Smirnov at p = .001


@pytest.mark.parametrize("tau", [1e-3, 0.5])
def test_argmax_of_the_mixture_is_a_draw_from_the_policy(tau):
    _, token = sample(20_000, settings(tau=tau))
    counts = token.heaviest().bincount(minlength=5)
    chi2 = ((counts - 20_000 * PI) ** 2 / (20_000 * PI)).sum()
    assert chi2 < 18.47  # 4 degrees of freedom, p = .001


NOISES = ["gumbel", "gaussian", "dirichlet", "multinomial", "none"]


@pytest.mark.parametrize("noise", NOISES)
def test_every_noise_gives_a_mixture(noise):
    n = 20_000
    log_probs, token = sample(n, settings(noise=noise))
    assert torch.allclose(token.weights.sum(-1), torch.ones(n, dtype=torch.float64))
    assert (token.weights >= 0).all()
    if noise in ("dirichlet", "multinomial"):  # their mean is pi
        error = token.weights.mean(0) - PI
        assert (error.abs() < 4 * token.weights.std(0) / math.sqrt(n)).all()
    if noise == "multinomial":
        assert torch.allclose(token.weights * 3, (token.weights * 3).round())
        covariance = (PI[0] * (1 - PI[0]) / 3).sqrt()
        assert abs(token.weights[:, 0].std() / covariance - 1) < 0.03
    if noise == "none":
        assert torch.allclose(token.weights, (log_probs / 0.5).softmax(-1))


def test_weights_off_the_support_are_zero_for_every_noise():
    log_probs = torch.tensor([[math.log(0.7), math.log(0.3), -math.inf, -math.inf]])
    for noise in NOISES:
        generator = torch.Generator().manual_seed(0)
        token = lepo.latent_token(torch.arange(4)[None], log_probs, torch.zeros(1, 4), generator, settings(noise=noise))
        assert (token.weights[:, 2:] == 0).all() and torch.isfinite(token.weights).all(), noise


# ----------------------------------------------------------------------------------------------------------------------
# 4. The rollout and its replay.


def record_rollout(lm, args, **kwargs):
    """roll_out, and the logits it saw: (N, T, V), NaN where a row had ended."""
    seen, original = [], common.decode

    def spy(lm, prompts, group_size, cap, choose):
        def watch(logits, t, rows):
            seen.append((rows.clone(), logits.clone()))
            return choose(logits, t, rows)

        return original(lm, prompts, group_size, cap, watch)

    lepo.common.decode = spy
    try:
        roll = roll_out(lm, args, **kwargs)
    finally:
        lepo.common.decode = original
    logits = torch.full((len(roll.length), len(seen), seen[0][1].shape[-1]), math.nan)
    for t, (rows, values) in enumerate(seen):
        logits[rows, t] = values
    return roll, logits


@pytest.mark.parametrize("latent_steps, noise", [(0, "gumbel"), *((3, noise) for noise in NOISES)])
def test_replayed_logits_equal_rollout_logits(latent_steps, noise):
    """With prompts of different lengths, run once for a group, and rows that end early; for every kind of latent."""
    lm, args = random_model(), settings(latent_steps=latent_steps, noise=noise, max_new_tokens=8)
    lm.stop_ids = [STOP, 4, 7]
    roll, seen = record_rollout(lm, args, group_size=8)
    assert roll.length.unique().numel() > 3 and roll.stopped.any() and not roll.stopped.all()
    replayed = torch.full_like(seen, math.nan)
    with torch.no_grad():
        for rows, hidden in common.replays(lm, roll, torch.arange(24), micro_batch=7):
            replayed[rows, : hidden.shape[1]] = hidden @ lm.head.T
    valid = roll.mask()
    assert torch.equal(valid, ~seen[..., 0].isnan())
    assert (replayed - seen)[valid].abs().max() < 2e-5 * seen[valid].abs().max()


def test_rollout_does_not_depend_on_padding_or_neighbours():
    """A prompt alone, and the same prompt among longer ones: the same noise-free trajectory."""
    lm, args = random_model(), settings()
    together = roll_out(lm, args, group_size=1, noisy=False)
    for i, prompt in enumerate(PROMPTS):
        alone = roll_out(lm, args, group_size=1, prompts=[prompt], noisy=False)
        n = int(alone.length[0])
        assert int(together.length[i]) == n
        assert torch.equal(alone.heaviest()[0, :n], together.heaviest()[i, :n])


def test_greedy_without_latents_is_generate():
    lm = random_model(seed=3)
    roll = roll_out(lm, settings(latent_steps=0, max_new_tokens=10), group_size=1, noisy=False)
    for i, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt])
        out = lm.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
        assert roll.heaviest()[i, : roll.length[i]].tolist() == out[0, len(prompt) :].tolist()


def graph_shaped(monkeypatch):
    """What a GPU does, on the CPU: rounded shapes, fixed addresses, a function that is made once and then replayed.
    Only the capturing itself is left out. -> the shapes that were captured, the shapes that were replayed"""
    captured, replayed, original = [], [], common.Decoder.__init__

    def start(self, *args):
        original(self, *args)
        self.graphs = {}

    def capture(self, rows, width):
        hidden, addresses = torch.empty(rows, self.embeds.shape[2]), (self.embeds.data_ptr(), self.position.data_ptr())
        captured.append((rows, width))

        def replay():
            assert addresses == (self.embeds.data_ptr(), self.position.data_ptr())
            replayed.append((rows, width))
            hidden.copy_(self.forward(rows, width))

        return replay, hidden

    monkeypatch.setattr(common.Decoder, "__init__", start)
    monkeypatch.setattr(common.Decoder, "capture", capture)
    return captured, replayed


@pytest.mark.parametrize("latent_steps", [0, 5])
def test_graph_shaped_decoding_gives_the_same_rollouts(latent_steps, monkeypatch):
    """Every rollout on a line of its own, attention over 128 columns and more, few batch sizes: the same tokens."""
    args = settings(latent_steps=latent_steps, max_new_tokens=150, top_k=5)
    plain = roll_out(random_model(), args, group_size=8)
    captured, replayed = graph_shaped(monkeypatch)
    lm = random_model()
    roll = roll_out(lm, args, group_size=8)
    assert roll.length.max() > 20 and roll.length.unique().numel() > 8
    assert torch.equal(roll.length, plain.length) and torch.equal(roll.stopped, plain.stopped)
    assert torch.equal(roll.heaviest()[roll.mask()], plain.heaviest()[plain.mask()])
    assert torch.allclose(roll.weights, plain.weights, atol=1e-4)
    rows, widths = map(set, zip(*captured, strict=True))
    assert rows <= {24, 16, 12, 8, 6, 4, 3, 2} and len(rows) > 2 and widths <= {128, 192}
    assert len(captured) == len(set(captured)) < len(replayed)
    captured.clear()
    roll_out(lm, args, group_size=8)  # the next rollout finds its graphs
    assert not captured


def test_decoding_goes_on_without_graphs_where_they_do_not_work(monkeypatch, capsys):
    plain = roll_out(random_model(), settings())
    graph_shaped(monkeypatch)

    def capture(self, rows, width):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(common.Decoder, "capture", capture)
    monkeypatch.setattr(common.Decoder, "capturable", True)
    lm = random_model()
    roll = roll_out(lm, settings())
    assert torch.equal(roll.heaviest()[roll.mask()], plain.heaviest()[plain.mask()])
    assert capsys.readouterr().out.count("CUDA graphs do not work here") == 1 and lm.decoder.graphs is None
    assert not common.Decoder.capturable  # the next decoder will not try again


def test_fork():
    one = torch.ones(4, 1)
    before, line, ids, weights = common.fork(torch.tensor([0, 0, 0, 1]), torch.tensor([[5], [8], [5], [5]]), one)
    assert before.tolist() == [0, 0, 1] and line.tolist() == [0, 1, 0, 2] and ids.flatten().tolist() == [5, 8, 5]
    assert torch.equal(weights, torch.ones(3, 1))
    ids = torch.tensor([[151_935, 7], [7, 151_935], [151_935, 7], [151_935, 7], [151_935, 8]])
    mixed = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.9999999, 0.0000001], [1.0, 0.0]])
    before, line, new_ids, new_weights = common.fork(torch.tensor([3, 3, 3, 3, 2]), ids, mixed)
    assert before.tolist() == [2, 3, 3, 3] and line.tolist() == [2, 1, 2, 3, 0]  # the smallest difference counts
    assert torch.equal(new_ids[line][:, 0], ids[:, 0]) and torch.equal(new_weights[line], mixed)


@pytest.mark.parametrize("latent_steps", [0, 4])
def test_rollouts_on_a_shared_line_are_what_they_would_be_alone(latent_steps, monkeypatch):
    """A support of one candidate at many steps, as in a model that is sure: fewer lines than rollouts, same texts."""
    args = settings(latent_steps=latent_steps, max_new_tokens=12, top_p=0.5, temperature=0.5)
    lines, step = [], common.Decoder.step
    monkeypatch.setattr(common.Decoder, "step", lambda self, embeds: lines.append(len(embeds)) or step(self, embeds))
    shared, shared_lines = roll_out(random_model(), args, group_size=16), lines.copy()
    lines.clear()
    monkeypatch.setattr(common, "fork", lambda line, ids, weights: (line, torch.arange(len(line)), ids, weights))
    alone = roll_out(random_model(), args, group_size=16)
    assert lines[0] == 48 and shared_lines[0] < 48 and sum(shared_lines) < 0.8 * sum(lines)
    assert torch.equal(shared.length, alone.length)
    assert torch.equal(shared.heaviest()[shared.mask()], alone.heaviest()[alone.mask()])
    assert torch.allclose(shared.weights, alone.weights, atol=1e-5)


def test_rollouts_of_a_decoder_that_is_kept_do_not_see_the_last_ones():
    """Long prompts first; then short ones, in the same buffers: as in fresh ones."""
    lm, args = random_model(), settings(max_new_tokens=8)
    roll_out(lm, args, group_size=8, prompts=[[3, 4, 5, 6, 9, 10, 11, 2, 3, 4], [7, 7, 7, 7, 7]])
    kept = lm.decoder
    again = roll_out(lm, args)
    fresh = roll_out(random_model(), args)
    assert lm.decoder is kept and torch.equal(again.ids, fresh.ids) and torch.allclose(again.weights, fresh.weights)


def test_rows_that_stop_at_once():
    """A batch whose replay has no step to feed back, and max_new_tokens 1."""
    lm, advantages = random_model(), torch.linspace(-1, 1, 12)
    for args in (settings(latent_steps=0, max_new_tokens=1), settings(micro_batch=1, latent_steps=0)):
        lm.stop_ids = list(range(12))
        roll = roll_out(lm, args)
        assert (roll.length == 1).all()
        assert_close_gradients(gradients(lm, roll, advantages, args)[0], grpo_gradients(lm, roll, advantages))


@pytest.mark.parametrize("noise", NOISES)
def test_archive_is_complete(noise):
    lm = random_model()
    for top_k in (0, 4):
        roll = roll_out(lm, settings(top_k=top_k, top_p=0.9, noise=noise))
        valid = roll.mask()
        assert torch.allclose(roll.weights.sum(-1)[valid], torch.ones(int(valid.sum())), atol=1e-6)
        assert roll.ids.shape[-1] <= (top_k or 12)
        assert ((roll.weights > 0) <= (roll.scores > -math.inf)).all()
        written = roll.weights[:, 3:][valid[:, 3:]]
        assert torch.equal(written.max(-1).values, torch.ones(len(written)))
        rebuilt = (roll.weights[..., None] * lm.table[roll.ids]).sum(-2)
        assert torch.allclose(common.mix_embeddings(lm.table, roll.ids, roll.weights), rebuilt, atol=1e-5)


def test_written_tokens_are_sampled_from_the_policy():
    """All 16 two-token texts of a 4-word vocabulary, against their exact probabilities."""
    lm = random_model(vocabulary=4, seed=1, scale=2.0)
    n = 8000
    roll = roll_out(lm, settings(latent_steps=0, max_new_tokens=2), group_size=n, prompts=[[2, 3]])
    counts = {}
    for row, length in zip(roll.heaviest().tolist(), roll.length.tolist(), strict=True):
        counts[tuple(row[:length])] = counts.get(tuple(row[:length]), 0) + 1
    chi2, cells = 0.0, 0
    with torch.no_grad():
        first = lm.model(torch.tensor([[2, 3]])).logits[0, -1].softmax(-1)
        for a in range(4):
            second = lm.model(torch.tensor([[2, 3, a]])).logits[0, -1].softmax(-1)
            for text, p in [((a,), first[a])] if a == STOP else [((a, b), first[a] * second[b]) for b in range(4)]:
                chi2 += (counts.get(text, 0) - n * p) ** 2 / (n * p)
                cells += 1
    assert cells == 13 and chi2 < 32.9  # 12 degrees of freedom, p = .001


@pytest.mark.parametrize("estimator", ["soft", "hard", "concrete", "gumbel"])
def test_a_stop_inside_the_latent_prefix_ends_the_row_and_what_follows_has_no_weight(estimator):
    lm, args = random_model(), settings(latent_steps=5, max_new_tokens=7, estimator=estimator)
    roll = roll_out(lm, args, group_size=16)
    early = (roll.length < 5) & roll.stopped
    assert early.any()
    after = ~roll.mask()
    assert (roll.weights[after] == 0).all()
    assert all(lepo.texts_of(lm, roll, args)[n] == [] for n in early.nonzero().flatten())
    args.verifier_reads = "all"
    assert all(len(text) == n for text, n in zip(lepo.texts_of(lm, roll, args), roll.length, strict=True))
    advantages = torch.randn(48, generator=torch.Generator().manual_seed(0))
    before, _ = gradients(lm, roll, advantages, args)
    roll.ids[after] = 7  # anything at all may stand there
    roll.scores[after] = 0.0
    afterwards, _ = gradients(lm, roll, advantages, args)
    assert_close_gradients(afterwards, before, 1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# 5. Advantages.


def test_advantages():
    rewards = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    advantages = lepo.group_advantages(rewards)
    assert torch.allclose(advantages[0], torch.tensor([0.8659, 0.8659, -0.8659, -0.8659]), atol=1e-4)
    assert torch.allclose(advantages.sum(1), torch.zeros(4), atol=1e-6)
    assert (advantages[2:] == 0).all()


def test_equal_rewards_give_exactly_zero_gradient():
    lm, args = random_model(), settings()
    roll = roll_out(lm, args)
    for reward in (0.0, 1.0):
        advantages = lepo.group_advantages(torch.full((3, 4), reward)).flatten()
        grads, metrics = gradients(lm, roll, advantages, args)
        assert metrics["grad_norm"] == 0 and all((g == 0).all() for g in grads.values())


# ----------------------------------------------------------------------------------------------------------------------
# 6. Log-probability of a latent step: what each estimator is, exactly.

ESTIMATORS = ["soft", "hard", "concrete", "gumbel"]


def scores_of(estimator, tau, n=200_000, pi=PI, seed=0):
    """Gradient of the estimator's log-probability with respect to the logits, for n draws -> ((n, m), SoftToken)."""
    log_probs, token = sample(n, settings(tau=tau), pi, seed)
    logits = log_probs.clone().requires_grad_()
    log_p = lepo.latent_log_prob(logits.log_softmax(-1), token.weights, token.scores, estimator, tau)
    return torch.autograd.grad(log_p.sum(), logits)[0], token


def test_logit_gradient_of_a_latent_step_is_advantage_times_z_minus_pi():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 9, generator=generator, dtype=torch.float64).requires_grad_()
    z = torch.randn(6, 9, generator=generator, dtype=torch.float64).softmax(-1)
    advantages = torch.randn(6, generator=generator, dtype=torch.float64)
    log_p = lepo.latent_log_prob(logits.log_softmax(-1), z, z.log(), "soft", 0.5)
    (gradient,) = torch.autograd.grad((advantages * log_p).sum(), logits)
    assert torch.allclose(gradient, advantages[:, None] * (z - logits.softmax(-1)), atol=1e-12)


def test_one_hot_weights_give_the_token_log_probability_bit_for_bit():
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    log_p = logits.log_softmax(-1)
    for token in range(9):
        one_hot = F.one_hot(torch.full((5,), token), 9).float()
        assert torch.equal(lepo.latent_log_prob(log_p, one_hot, one_hot.log(), "soft", 0.5), log_p[:, token])


@pytest.mark.parametrize("estimator", ["hard", "concrete", "gumbel"])
@pytest.mark.parametrize("tau", [0.1, 0.5, 1.0])
def test_true_scores_have_mean_zero(estimator, tau):
    score, _ = scores_of(estimator, tau)
    assert (score.mean(0).abs() < 4 * score.std(0) / math.sqrt(len(score))).all()


def test_soft_label_score_has_mean_z_minus_pi_and_that_is_not_zero():
    score, token = scores_of("soft", 0.5)
    assert torch.allclose(score.mean(0), token.weights.mean(0) - PI, atol=1e-9)
    assert -0.045 < score.mean(0)[0] < -0.02  # the mixture is flatter than the policy: about -.03 at its mode


@pytest.mark.parametrize("tau", [0.1, 1.0])
@pytest.mark.parametrize("pi", [PI, torch.full((5,), 0.2, dtype=torch.float64)])
def test_second_moments(tau, pi):
    m = len(pi)
    squares = {e: scores_of(e, tau, pi=pi)[0].square().sum(-1) for e in ESTIMATORS}
    gumbel, token = scores_of("gumbel", tau, pi=pi)
    unit = 1 - (pi.log() - token.scores).exp()  # the score with respect to l, before normalisation takes a part away
    assert torch.allclose(gumbel, unit - pi * unit.sum(-1, keepdim=True), atol=1e-9)
    squares["unit"] = unit.square().sum(-1)
    overlap = pi.square().sum().item()
    expected = {"unit": m, "gumbel": m - 2 + m * overlap, "concrete": m * (m - 1) / (m + 1), "hard": 1 - overlap}
    for name, value in expected.items():
        assert abs(squares[name].mean() - value) <= 5 * squares[name].std() / math.sqrt(len(unit)) + 1e-9, name
    assert squares["soft"].mean() < squares["hard"].mean()


def test_rao_blackwell_hard_is_concrete_given_the_argmax():
    score, token = scores_of("concrete", 0.5)
    for i in range(5):
        chosen = score[token.heaviest() == i]
        expected = F.one_hot(torch.tensor(i), 5) - PI
        assert ((chosen.mean(0) - expected).abs() < 4.5 * chosen.std(0) / math.sqrt(len(chosen))).all()


def test_rao_blackwell_concrete_is_gumbel_given_the_mixture():
    concrete, token = scores_of("concrete", 0.5)
    gumbel, _ = scores_of("gumbel", 0.5)  # the same draws
    for h in (token.weights[:, 0], token.weights.prod(-1) * 100, token.weights[:, 1] ** 2):
        gap = h[:, None] * (concrete - gumbel)
        assert (gap.mean(0).abs() < 4 * gap.std(0) / math.sqrt(len(gap))).all()
    assert gumbel.var(0).sum() > concrete.var(0).sum()


@pytest.mark.parametrize("tau", [0.3, 1.0])
def test_concrete_density_equals_torch(tau):
    _, token = sample(500, settings(tau=tau))
    log_p = torch.randn(5, generator=torch.Generator().manual_seed(1), dtype=torch.float64).log_softmax(-1)
    ours = lepo.latent_log_prob(log_p.expand(500, -1), token.weights, token.scores, "concrete", tau)
    theirs = RelaxedOneHotCategorical(torch.tensor(tau, dtype=torch.float64), logits=log_p).log_prob(token.weights)
    assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("m", [2, 3])
def test_concrete_density_integrates_to_one(m):
    tau, pi = 0.7, PI[:m] / PI[:m].sum()
    x = torch.linspace(-30, 30, 1501, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(*[x] * (m - 1), indexing="ij"), -1).view(-1, m - 1)
    log_z = torch.cat([grid, torch.zeros(len(grid), 1, dtype=torch.float64)], 1).log_softmax(-1)  # (n, m)
    density = lepo.latent_log_prob(pi.log().expand(len(grid), -1), log_z.exp(), tau * log_z, "concrete", tau)
    volume = (density + log_z.sum(-1)).exp().sum() * (60 / 1500) ** (m - 1)  # |dz / dx| = prod z
    assert abs(volume - 1) < 1e-3


def test_gumbel_density_equals_torch():
    _, token = sample(500, settings())
    ours = lepo.latent_log_prob(PI.log().expand(500, -1), token.weights, token.scores, "gumbel", 0.5)
    theirs = torch.distributions.Gumbel(PI.log(), torch.ones(5, dtype=torch.float64)).log_prob(token.scores).sum(-1)
    assert torch.allclose(ours, theirs)


def smooth_reward(z):
    """A nonlinear reward of the mixed embedding z^T E."""
    table = torch.randn(5, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return torch.tanh(z @ table).sum(-1) + 0.5 * (z @ table)[..., 0] ** 2


def test_infinite_noise_cannot_occur(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self, generator: self.zero_())  # some platforms can
    assert torch.isfinite(lepo.gumbel_noise((3,), None, "cpu")).all()


@pytest.mark.parametrize("estimator, tau", [("concrete", 0.5), ("gumbel", 0.5), ("soft", 0.3), ("soft", 0.5)])
def test_policy_gradient_against_finite_differences_with_common_random_numbers(estimator, tau):
    n, h = 400_000, 1e-3
    score, token = scores_of(estimator, tau, n)
    reward = smooth_reward(token.weights)
    samples = (reward - reward.mean())[:, None] * score  # (n, m)
    estimate, error = samples.mean(0), samples.std(0) / math.sqrt(n)
    noise = token.scores - PI.log()
    truth = torch.zeros(5, dtype=torch.float64)
    for k in range(5):
        for sign in (1, -1):
            logits = PI.log().clone()
            logits[k] += sign * h
            z = ((logits.log_softmax(-1) + noise) / tau).softmax(-1)
            truth[k] += sign * smooth_reward(z).mean() / (2 * h)
    if estimator == "soft":  # the direction is right, the size is not
        assert F.cosine_similarity(estimate, truth, dim=0) > 0.99
        low, high = {0.3: (0.7, 0.9), 0.5: (0.55, 0.8)}[tau]
        assert low < estimate.norm() / truth.norm() < high
    else:
        assert ((estimate - truth).abs() < 4 * error + 1e-3 * truth.norm()).all()


def test_multinomial_latents_make_the_soft_label_exactly_unbiased():
    """K times its expected gradient equals the gradient of the expected reward, by enumeration of all draws."""
    draws = 3
    logits = PI.log().clone().requires_grad_()
    pi = logits.softmax(-1)
    expected_reward, soft = 0.0, torch.zeros(5, dtype=torch.float64)
    for combination in itertools.product(range(5), repeat=draws):
        z = F.one_hot(torch.tensor(combination), 5).double().mean(0)
        probability = pi[list(combination)].prod()
        expected_reward = expected_reward + probability * smooth_reward(z)
        log_p = lepo.latent_log_prob(logits.log_softmax(-1), z, z.log(), "soft", 0.5)
        soft += probability.detach() * smooth_reward(z) * torch.autograd.grad(log_p, logits, retain_graph=True)[0]
    (truth,) = torch.autograd.grad(expected_reward, logits)
    assert torch.allclose(draws * soft, truth, atol=1e-8)


@pytest.mark.parametrize("estimator", ["concrete", "gumbel"])
def test_exact_importance_ratios_average_to_one(estimator):
    n = 200_000
    log_probs, token = sample(n, settings())
    drift = 0.15 * torch.randn(5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    new = (log_probs + drift).log_softmax(-1)
    ratio = (lepo.latent_log_prob(new, token.weights, token.scores, estimator, 0.5)
             - lepo.latent_log_prob(log_probs, token.weights, token.scores, estimator, 0.5)).exp()  # fmt: skip
    assert 0.1 < ratio.std() < 1
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(n)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_support_of_one_token_gives_no_nan(estimator):
    lm, args = random_model(), settings(top_k=1, estimator=estimator)
    roll = roll_out(lm, args)
    assert roll.ids.shape[-1] == 1 and (roll.weights[roll.mask()] == 1).all()
    grads, _ = gradients(lm, roll, torch.linspace(-1, 1, 12), args)
    assert all(torch.isfinite(g).all() for g in grads.values())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_very_small_tau_gives_no_nan(estimator):
    """z underflows to exact zeros; the densities must still be finite."""
    lm, args = random_model(), settings(tau=1e-3, estimator=estimator)
    grads, _ = gradients(lm, roll_out(lm, args), torch.linspace(-1, 1, 12), args)
    assert all(torch.isfinite(g).all() for g in grads.values())


def test_gradient_on_a_two_step_chain_matches_finite_differences():
    """One latent step, one written token, reward by the token: the update's gradient (concrete density) is the gradient
    of the expected reward, the embedding table included, which acts as output layer, as mixture and as input."""
    args = settings(latent_steps=1, max_new_tokens=2, estimator="concrete", micro_batch=50_000)
    lm, prompt, n = random_model(vocabulary=5, seed=2, scale=3.0), [[2, 3]], 100_000
    lm.stop_ids = [99]
    value = torch.tensor([0.0, 1.0, -1.0, 0.5, 2.0])
    model, table = lm.model, lm.table
    noise = -torch.empty(n, 5).exponential_(generator=torch.Generator().manual_seed(9)).log()

    @torch.no_grad()
    def expected_reward():
        """Independent of lepo.py: the written token is summed out, the noise is common to all calls."""
        first = model(torch.tensor(prompt)).logits[0, -1].log_softmax(-1)
        mixture = ((first + noise) / args.tau).softmax(-1) @ table
        embeds = torch.cat([table[torch.tensor(prompt)].expand(n, -1, -1), mixture[:, None]], 1)
        return (model(inputs_embeds=embeds).logits[:, -1].double().softmax(-1) @ value.double()).mean().item()

    roll = roll_out(lm, args, n, seed=1, prompts=prompt)
    reward = value[roll.heaviest()[:, 1]]
    grads, _ = gradients(lm, roll, reward - reward.mean(), args)
    ours = grads["model.embed_tokens.weight"] * 2  # the normaliser counts steps, 2 a row
    directions = torch.randn(6, *table.shape, generator=torch.Generator().manual_seed(3))
    truth = []
    for direction in directions:
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                table.add_(direction, alpha=sign * 1e-2)
                ends.append(expected_reward())
                table.sub_(direction, alpha=sign * 1e-2)
        truth.append((ends[0] - ends[1]) / 2e-2)
    truth, estimate = torch.tensor(truth), (directions * -ours).sum((1, 2))
    assert (estimate - truth).norm() < 0.1 * truth.norm(), (estimate, truth)


# ----------------------------------------------------------------------------------------------------------------------
# 7. The update.


def grpo_gradients(lm, roll, advantages):
    """Plain GRPO at ratio 1 as anybody would write it: token ids, one row at a time, cross-entropy, no padding."""
    model = lm.model
    model.zero_grad()
    total = roll.length.sum()
    for n, advantage in enumerate(advantages):
        prompt, text = roll.prompts[n // roll.group_size], roll.heaviest()[n, : roll.length[n]]
        logits = model(torch.cat([torch.tensor(prompt), text])[None]).logits[0, len(prompt) - 1 : -1]
        (advantage * F.cross_entropy(logits, text, reduction="sum") / total).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_latent_steps_0_is_plain_grpo(estimator):
    lm, args = random_model(), settings(latent_steps=0, estimator=estimator)
    roll = roll_out(lm, args)
    advantages = torch.randn(12, generator=torch.Generator().manual_seed(0))
    assert_close_gradients(gradients(lm, roll, advantages, args)[0], grpo_gradients(lm, roll, advantages))


def test_tau_to_zero_is_plain_grpo():
    """Loss and gradient of latent steps at tau = 1e-4 are those of the tokens argmax z."""
    lm, args = random_model(), settings(tau=1e-4, latent_steps=6)
    roll = roll_out(lm, args)
    assert (roll.weights.max(-1).values[roll.mask()] > 0.999).float().mean() > 0.95
    advantages = torch.randn(12, generator=torch.Generator().manual_seed(0))
    assert_close_gradients(gradients(lm, roll, advantages, args)[0], grpo_gradients(lm, roll, advantages), 1e-3)


class Largest(TorchDispatchMode):
    """The most elements of any tensor made inside."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.numel())
        return out


@pytest.mark.parametrize("frozen", [False, True])
def test_candidate_log_probs_are_those_of_the_full_softmax(frozen, monkeypatch):
    """Values and both gradients against log_softmax and autograd, over chunk borders, with an id that occurs twice."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 16, generator=generator).requires_grad_()
    head = torch.randn(300, 16, generator=generator).requires_grad_(not frozen)
    ids = torch.randint(0, 300, (50, 4), generator=generator)
    ids[:, 3] = ids[:, 0]
    upstream = torch.randn(50, 4, generator=generator)
    expected = (hidden @ head.T / 0.7).log_softmax(-1).gather(-1, ids)
    leaves = (hidden,) if frozen else (hidden, head)
    theirs = torch.autograd.grad((expected * upstream).sum(), leaves)
    monkeypatch.setattr(common.CandidateLogProbs, "numbers", 300 * 7)  # 7 steps a chunk; 50 is no multiple
    with Largest() as largest:
        ours = common.candidate_log_probs(SimpleNamespace(head=head), hidden, ids, 0.7)
        gradients = torch.autograd.grad((ours * upstream).sum(), leaves)
    assert largest.size <= 300 * 16  # the head's gradient: no (50, 300) of logits, forward or backward
    assert torch.allclose(ours, expected, atol=1e-5)
    for a, b in zip(gradients, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-4 * b.abs().max())


def test_an_update_never_holds_all_logits(monkeypatch):
    """Not even with a KL term; a rollout holds them for one step."""
    lm, start = (random_model(vocabulary=5000, seed=seed) for seed in (0, 7))
    args = settings(kl_coef=0.1, top_k=5)
    roll = roll_out(lm, args, group_size=64)
    steps = int(roll.length.sum())
    assert steps > 900
    monkeypatch.setattr(common.CandidateLogProbs, "numbers", 5000 * 256)
    with Largest() as largest:
        lepo.update(lm, start, sgd(lm), roll, torch.ones(192), args)
    assert 5000 * 250 < largest.size <= 5000 * 256 < 0.3 * 5000 * steps
    with Largest() as largest:
        roll_out(lm, args, group_size=64)
    assert largest.size <= 5000 * 192


def test_a_group_at_a_shared_state_is_pulled_by_sum_of_advantage_times_z():
    """At the first latent step sum_i A_i = 0 cancels pi, and with it all that the filter of (1) left out."""
    lm, args = random_model(), settings(latent_steps=1, max_new_tokens=2)
    roll = roll_out(lm, args, group_size=8, prompts=[[5, 6, 7]])
    advantages = lepo.group_advantages(torch.tensor([[1.0, 0, 0, 1, 1, 0, 0, 0]])).flatten()
    ((rows, hidden),) = list(common.replays(lm, roll, torch.arange(8), 8))
    log_probs = lepo.trajectory_log_probs(lm, roll, rows, hidden, args)
    (pull,) = torch.autograd.grad((advantages[rows] * log_probs[:, 0]).sum(), hidden)
    z = torch.zeros(8, 12).scatter(-1, roll.ids[:, 0], roll.weights[:, 0])
    expected = (advantages[:, None] * z).sum(0) @ lm.head  # the pull on the logits, through the head
    assert torch.allclose(pull[:, 0].sum(0), expected, atol=1e-5)


@pytest.mark.parametrize("ratio, advantage, value", [(1.5, 1, 1.2), (1.5, -1, -1.5), (0.5, 1, 0.5), (0.5, -1, -0.8)])
def test_clip(ratio, advantage, value):
    new, old = torch.tensor([[math.log(ratio)]]), torch.zeros(1, 1)
    gain, clipped = lepo.surrogate(new, old, torch.tensor([[float(advantage)]]), 0.2)
    assert abs(gain.item() - value) < 1e-6
    assert clipped.item() == (value in (1.2, -0.8))


def test_exploding_ratio_stays_finite():
    new = torch.tensor([[1e4, -1e4]]).requires_grad_()
    for advantage in (1.0, -1.0):
        gain, _ = lepo.surrogate(new, torch.zeros(1, 2), torch.tensor([[advantage]]), 0.2)
        (gradient,) = torch.autograd.grad(gain.sum(), new)
        assert torch.isfinite(gain).all() and torch.isfinite(gradient).all()


def test_exact_kl_is_torchs():
    """In chunks, value and gradient."""
    lm, start = random_model(), random_model(seed=7)
    hidden, other = torch.randn(2, 600, 16, generator=torch.Generator().manual_seed(0))
    hidden.requires_grad_()
    kl = lepo.exact_kl(lm, hidden, start, other, temperature=0.7)
    a, b = hidden @ lm.head.T / 0.7, other @ start.head.T / 0.7
    expected = kl_divergence(Categorical(logits=a), Categorical(logits=b))
    assert torch.allclose(kl, expected, rtol=1e-4, atol=1e-5)
    assert torch.autograd.grad(kl.sum(), start.head, allow_unused=True, retain_graph=True) == (None,)
    ours, theirs = (torch.autograd.grad(value.sum(), (hidden, lm.head), retain_graph=True) for value in (kl, expected))
    for x, y in zip(ours, theirs, strict=True):
        assert torch.allclose(x, y, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_prompts_that_run_once_for_a_group_get_the_gradient_of_all_its_rows(size):
    """Prompts in parts of `size`, rows in micro-batches of `size`, some rows and one prompt left out."""
    lm, args = random_model(), settings(micro_batch=size, latent_steps=0)
    roll, advantages = roll_out(lm, args), torch.randn(12, generator=torch.Generator().manual_seed(0))
    advantages[4:8] = 0.0
    advantages[1] = 0.0
    runs = []
    lm.model.model.layers[0].register_forward_pre_hook(lambda _, inputs: runs.append(len(inputs[0])))
    ours, _ = gradients(lm, roll, advantages, args)
    assert sum(runs) == 2 + (roll.length[advantages != 0] > 1).sum()  # prompts, rows with inputs: none twice
    assert_close_gradients(ours, grpo_gradients(lm, roll, advantages))


def test_rows_of_similar_length_go_together():
    lm, args = random_model(), settings(max_new_tokens=12)
    roll = roll_out(lm, args, group_size=8)
    batches = [(rows, hidden.shape[1]) for rows, hidden in common.replays(lm, roll, torch.arange(24), 6)]
    assert torch.equal(torch.cat([rows for rows, _ in batches]).sort().values, torch.arange(24))
    steps = [count for _, count in batches]
    assert steps == sorted(steps) and len(set(steps)) > 1
    assert steps == [int(roll.length[rows].max()) for rows, _ in batches]


def test_kl_term_pulls_towards_the_start_model():
    lm, start, args = random_model(), random_model(seed=7), settings(kl_coef=1.0)
    roll = roll_out(lm, args)
    optimizer = torch.optim.Adam(lm.model.parameters(), lr=3e-3)
    kl = [lepo.update(lm, start, optimizer, roll, torch.zeros(12), args)["kl"] for _ in range(30)]
    assert kl[0] > 0.1 and kl[-1] < 0.5 * kl[0]
    assert lepo.update(start, start, sgd(start), roll, torch.zeros(12), args)["kl"] < 1e-6


@pytest.mark.parametrize("estimator", ["soft", "concrete"])
def test_cutting_into_micro_batches_changes_nothing(estimator):
    lm, args = random_model(), settings(estimator=estimator)
    roll = roll_out(lm, args)
    advantages = torch.randn(12, generator=torch.Generator().manual_seed(0))
    advantages[[1, 4, 5]] = 0.0  # rows that the update leaves out
    whole, _ = gradients(lm, roll, advantages, args)
    for size in (1, 5):
        args.micro_batch = size
        assert_close_gradients(gradients(lm, roll, advantages, args)[0], whole)
    advantages[[1, 4, 5]] = 1e-12  # and rows that it does not, with as good as no advantage
    assert_close_gradients(gradients(lm, roll, advantages, args)[0], whole)


def test_gradient_checkpointing_changes_nothing():
    lm, args = random_model(), settings()
    roll, advantages = roll_out(lm, args), torch.randn(12, generator=torch.Generator().manual_seed(0))
    plain, _ = gradients(lm, roll, advantages, args)
    passes = []
    lm.model.model.layers[0].self_attn.register_forward_pre_hook(lambda *_: passes.append(1))
    args.gradient_checkpointing = True
    assert_close_gradients(gradients(lm, roll, advantages, args)[0], plain)
    assert len(passes) == 4  # prompts and rows, forward, and recomputed in backward: it was on
    assert all("forward" not in vars(layer) for layer in lm.model.model.layers)  # and off again
    passes.clear()
    roll_out(lm, args)  # and leaves rollouts, with their cache, alone
    assert len(passes) == 6


def test_bfloat16_compute_as_on_a_gpu(monkeypatch):
    """On the CPU, in a GPU's place: rollouts on a bfloat16 copy that follows the masters, the update under autocast."""
    lm, args = random_model(), settings()
    roll, advantages = roll_out(lm, args), torch.randn(12, generator=torch.Generator().manual_seed(0))
    plain, _ = gradients(lm, roll, advantages, args)
    monkeypatch.setattr(common, "compute_dtype", lambda _: torch.bfloat16)
    monkeypatch.setattr(common, "autocast", lambda _: torch.autocast("cpu", torch.bfloat16))
    assert roll_out(lm, args).weights.dtype == torch.float32
    assert lm.half.dtype == torch.bfloat16 and lm.model.dtype == torch.float32
    assert lm.half.model.rotary_emb.inv_freq.dtype == torch.float32
    coarse, _ = gradients(lm, roll, advantages, args)
    a, b = (torch.cat([g.flatten() for g in each.values()]) for each in (plain, coarse))
    assert b.dtype == torch.float32 and not torch.equal(a, b) and F.cosine_similarity(a, b, dim=0) > 0.99
    lepo.update(lm, lm, sgd(lm, 0.1), roll, advantages, args)
    half = lm.half
    roll_out(lm, args)
    assert lm.player() is lm.half is half  # outside a rollout, too
    for copy, master in zip(half.parameters(), lm.model.parameters(), strict=True):
        assert torch.equal(copy, master.bfloat16())


def test_second_pass_uses_the_first_ones_log_probabilities():
    lm, args = random_model(), settings(updates_per_batch=2, clip=1e-6, micro_batch=5)
    roll, advantages = roll_out(lm, args), torch.randn(12, generator=torch.Generator().manual_seed(0))
    moved = lepo.update(lm, lm, sgd(lm, 0.1), roll, advantages, args)
    assert moved["clipped"] > 0.3  # of both passes; the first one clips nothing
    still = lepo.update(lm, lm, sgd(lm), roll, advantages, args)
    assert still["clipped"] == 0


def test_non_finite_gradient_stops_before_the_weights_change():
    lm, args = random_model(), settings()
    roll = roll_out(lm, args)
    before = [p.clone() for p in lm.model.parameters()]
    with pytest.raises(common.UserError, match="not finite"):
        lepo.update(lm, lm, sgd(lm, 1.0), roll, torch.full((12,), math.nan), args)
    assert all(torch.equal(a, b) for a, b in zip(before, lm.model.parameters(), strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# 8.-9. The script: reproducible, resumable, kind, and it learns.

QUICK = ["--steps", "5", "--prompts_per_step", "4", "--group_size", "4", "--eval_problems", "8", "--eval_samples", "2",
         "--eval_every", "2", "--save_every", "2", "--show_every", "0", "--warmup", "1"]  # fmt: skip


def last_line(capsys):
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_same_seed_same_log_and_the_contract_of_the_last_line(tmp_path, capsys):
    results = []
    for name in ("a", "b"):
        assert lepo.main([*QUICK, "--out", str(tmp_path / name)]) == 0
        results.append(last_line(capsys))
    assert (tmp_path / "a/log.jsonl").read_bytes() == (tmp_path / "b/log.jsonl").read_bytes()
    assert len((tmp_path / "a/log.jsonl").read_text().splitlines()) == 5
    assert common.read_checkpoint_state(tmp_path / "a/checkpoint.safetensors")["position"] == 5 * 4  # no problem twice
    keys = "method model seed steps seconds greedy_before greedy sampled_before sampled pass@2 length greedy_no_latents"
    assert set(keys.split()) <= set(results[0])
    assert {**results[0], "seconds": 0} == {**results[1], "seconds": 0}
    lepo.main([*QUICK, "--out", str(tmp_path / "c"), "--seed", "1"])
    assert (tmp_path / "a/log.jsonl").read_bytes() != (tmp_path / "c/log.jsonl").read_bytes()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_and_resumed_equals_uninterrupted(tmp_path, how, capsys):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    lepo.main([*QUICK, "--out", str(whole)])
    expected = last_line(capsys)
    process = subprocess.Popen([sys.executable, "lepo.py", *QUICK, "--out", broken], cwd=HERE, stderr=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True)  # fmt: skip
    wanted = 3 if how == signal.SIGKILL else 1  # after the checkpoint of step 2, before that of step 4
    while process.poll() is None:
        log = broken / "log.jsonl"
        if log.exists() and len(log.read_text().splitlines()) >= wanted:
            process.send_signal(how)
            break
        time.sleep(0.005)
    output = process.communicate()
    assert process.returncode == (-signal.SIGKILL if how == signal.SIGKILL else 130), output
    if how != signal.SIGKILL:
        assert "--resume" in output[0] and "Traceback" not in output[1]
    assert len((broken / "log.jsonl").read_text().splitlines()) < 5
    lepo.main(["--resume", str(broken)])
    resumed = last_line(capsys)
    assert (broken / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()
    assert (broken / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()
    assert {**resumed, "seconds": 0} == {**expected, "seconds": 0}


# Numbers of prompts and of problems that two processes cannot share evenly; one batch of problems is a single one.
UNEVEN = [*QUICK, "--steps", "4", "--prompts_per_step", "3", "--eval_problems", "7"]


def torchrun(flags, script="lepo.py"):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, *flags]
    return subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def assert_same_run(ours, theirs):
    """Logs and trained weights equal but for the order in which numbers were added (which Adam makes much of where a
    gradient is as good as 0: single weights may differ by a learning rate, all together hardly)."""
    logs = [[json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (ours, theirs)]
    assert [row["step"] for row in logs[0]] == [row["step"] for row in logs[1]]
    for a, b in zip(*logs, strict=True):
        assert a.keys() == b.keys()
        assert all(a[key] == b[key] or math.isclose(a[key], b[key], rel_tol=1e-4, abs_tol=1e-9) for key in a), (a, b)
    flat = [torch.cat([w.flatten() for w in load_file(path).values()]) for path in (
        ours / "model/model.safetensors", theirs / "model/model.safetensors", HERE / "tiny/model.safetensors"
    )]  # fmt: skip
    assert (flat[0] - flat[1]).norm() < 0.01 * (flat[1] - flat[2]).norm()


SHARED_UPDATE = """
import sys
import torch
from safetensors.torch import save_file
import common, lepo, test_lepo as t

common.start_processes("cpu")
lm, args = t.random_model(), t.settings(micro_batch=3, kl_coef=0.1)
roll = t.roll_out(lm, args)
own = common.share(len(t.PROMPTS))
advantages = torch.randn(12, generator=torch.Generator().manual_seed(0))[4 * own.start : 4 * own.stop]
metrics = lepo.update(lm, t.random_model(seed=7), t.sgd(lm, 1.0), roll, advantages, args)
assert roll.prompts == t.PROMPTS[own] and common.process()[1] == 2
save_file(dict(lm.model.named_parameters()), f"{sys.argv[1]}/{common.process()[0]}")
"""


def test_two_processes_make_the_update_that_one_makes(tmp_path):
    """Three prompts over two processes: weights after a step of SGD, on both, and equal to those of one process."""
    (tmp_path / "script.py").write_text(f"import sys; sys.path.insert(0, {str(HERE)!r})\n{SHARED_UPDATE}")
    process = torchrun([str(tmp_path)], script=str(tmp_path / "script.py"))
    _, err = process.communicate()
    assert process.returncode == 0, err
    lm, args = random_model(), settings(micro_batch=3, kl_coef=0.1)
    roll, advantages = roll_out(lm, args), torch.randn(12, generator=torch.Generator().manual_seed(0))
    lepo.update(lm, random_model(seed=7), sgd(lm, 1.0), roll, advantages, args)
    first, second = load_file(tmp_path / "0"), load_file(tmp_path / "1")
    before = dict(random_model().model.named_parameters())
    for name, weight in lm.model.named_parameters():
        assert torch.equal(first[name], second[name])
        assert (first[name] - weight).abs().max() < 1e-5 * (weight - before[name]).abs().max() + 1e-7, name


def test_two_processes_are_one(tmp_path, capsys):
    lepo.main([*UNEVEN, "--out", str(tmp_path / "one")])
    one = last_line(capsys)
    process = torchrun([*UNEVEN, "--out", str(tmp_path / "two")])
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert out.count("step    0") == 1  # only the first process speaks
    assert_same_run(tmp_path / "two", tmp_path / "one")
    two = json.loads(out.strip().splitlines()[-1])
    assert {**one, "seconds": 0} == {**two, "seconds": 0}


def test_two_processes_stop_save_and_one_goes_on(tmp_path, capsys):
    flags = [*UNEVEN, "--eval_every", "1", "--eval_problems", "101"]  # steps slow enough for the signal to arrive
    lepo.main([*flags, "--out", str(tmp_path / "whole")])
    process = torchrun([*flags, "--out", str(tmp_path / "broken")])
    log = tmp_path / "broken/log.jsonl"
    while process.poll() is None:
        if log.exists() and log.read_text().count("\n") >= 1:
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.005)
    process.communicate()
    assert log.read_text().count("\n") < 4
    assert lepo.main(["--resume", str(tmp_path / "broken")]) == 0
    assert_same_run(tmp_path / "broken", tmp_path / "whole")


@pytest.mark.parametrize("flags, said", [
    (["--prompts_per_step", "1"], "--prompts_per_step must be at least the number of processes"),
    (["--noise", "gaussian"], "several processes share out Gumbel noise only"),
])  # fmt: skip
def test_a_mistake_is_said_once_by_several_processes(flags, said, tmp_path):
    process = torchrun([*QUICK, *flags, "--out", str(tmp_path / "run")])
    _, err = process.communicate()
    assert process.returncode != 0 and err.count(f"error: {said}") == 1


def test_shares_cover_everything_once(monkeypatch):
    for total in (1, 2, 3, 8):
        for count in (0, 1, 2, 7, 32):
            covered = []
            for number in range(total):
                monkeypatch.setattr(common, "process", lambda number=number, total=total: (number, total))
                covered += range(count)[common.share(count)]
            assert covered == list(range(count))


BAD_INPUTS = {  # case: (flags, what the line must mention)
    "unknown model": (["--model", "no-such-model-anywhere"], "no-such-model-anywhere"),
    "missing folder": (["--model", "./nowhere"], "no model folder"),
    "bare name, no network": (["--model", "Qwen2.5-0.5B", "--data", "gsm8k"], "Qwen/Qwen2.5-0.5B"),
    "missing file": (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
    "unknown data": (["--data", "nowhere"], "no data set"),
    "data set, no network": (["--data", "gsm8k"], "openai/gsm8k"),
    "malformed row": (["--data", "{tmp}/bad.jsonl"], "bad.jsonl:2"),
    "training on a test set": (["--data", "math500"], "--eval_data"),
    "words it cannot spell": (["--eval_data", "{tmp}/words.jsonl"], "spell"),
    "no room to write": (["--latent_steps", "40"], "--latent_steps"),
    "one rollout": (["--group_size", "1"], "--group_size"),
    "tau 0": (["--tau", "0"], "--tau"),
    "density of other noise": (["--estimator", "concrete", "--noise", "dirichlet"], "--noise gumbel"),
    "unknown flag": (["--nonsense"], "--nonsense"),
    "not a number": (["--steps", "many"], "--steps"),
    "unwritable folder": (["--out", "{tmp}/bad.jsonl/run"], "cannot write"),
    "nothing to resume": (["--resume", "{tmp}"], "nothing to resume"),
    "negative": (["--weight_decay", "-1"], "--weight_decay"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_one_line_and_exit_code_2(case, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "words.jsonl").write_text('{"question": "How many eggs?", "answer": "2"}\n' * 10)
    (tmp_path / "bad.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}\n{"question": 7}\n')
    flags, mentioned = BAD_INPUTS[case]
    with pytest.raises(SystemExit) as stop:
        common.run_main(lambda: lepo.main([flag.replace("{tmp}", str(tmp_path)) for flag in flags]))
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2
    assert error.startswith("error: ") and "\n" not in error and mentioned in error


def test_a_finished_run_is_not_written_over(tmp_path, capsys):
    lepo.main([*QUICK, "--steps", "0", "--out", str(tmp_path / "run")])
    with pytest.raises(common.UserError, match="holds a run already"):
        lepo.main([*QUICK, "--out", str(tmp_path / "run")])


def test_out_of_memory_saves_and_says_what_to_do(tmp_path, capsys, monkeypatch):
    original, calls = lepo.update, []

    def update(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(*arguments)

    lepo.main([*QUICK, "--out", str(tmp_path / "whole")])
    monkeypatch.setattr(lepo, "update", update)
    with pytest.raises(SystemExit) as stop:
        common.run_main(lambda: lepo.main([*QUICK, "--out", str(tmp_path / "run")]))
    assert stop.value.code == 2 and "--micro_batch" in capsys.readouterr().err
    lepo.main(["--resume", str(tmp_path / "run")])
    assert (tmp_path / "run/log.jsonl").read_bytes() == (tmp_path / "whole/log.jsonl").read_bytes()


def test_a_non_finite_gradient_is_saved_and_resume_goes_on_with_the_next_batch(tmp_path, capsys, monkeypatch):
    original, calls = lepo.surrogate, []

    def surrogate(*arguments):
        calls.append(1)
        gain, clipped = original(*arguments)
        return gain * (math.nan if len(calls) == 3 else 1), clipped

    monkeypatch.setattr(lepo, "surrogate", surrogate)
    run = str(tmp_path / "run")
    with pytest.raises(SystemExit) as stop:
        common.run_main(lambda: lepo.main([*QUICK, "--out", run]))
    assert stop.value.code == 2 and "not finite" in capsys.readouterr().err
    lepo.main(["--resume", run, "--lr", "1e-5", "--micro_batch", "5"])
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert len(steps) == 4 and set(steps) < set(range(5))
    with pytest.raises(common.UserError, match="has done 5 steps"):
        lepo.main(["--resume", run, "--steps", "0"])
    before = (tmp_path / "run/result.json").read_text()
    assert lepo.main(["--resume", run]) == 0  # a finished run: evaluated once more, the same
    assert json.loads(before)["greedy"] == json.loads((tmp_path / "run/result.json").read_text())["greedy"]


def test_the_shipped_model_learns(tmp_path, capsys):
    """A short run of the default settings, far from enough for the README's numbers and enough to see the sign."""
    lepo.main(["--steps", "20", "--eval_problems", "256", "--eval_samples", "2", "--show_every", "0", "--warmup", "2",
               "--out", str(tmp_path / "run")])  # fmt: skip
    result = last_line(capsys)
    assert result["greedy"] > result["greedy_before"] + 0.1


@pytest.mark.skipif(not (SHARED / "tokenizers/qwen2.5").is_dir() or not (SHARED / "data/gsm8k").is_dir(),
                    reason="needs the Qwen2.5 tokenizer and GSM8K beside the checkout, in ../shared")  # fmt: skip
def test_real_tokenizer_and_gsm8k(tmp_path, capsys, monkeypatch):
    """Rollout, update, evaluation, checkpoint and resume with the real vocabulary, chat template and data.

    A random model is never right, so the verifier is asked, and then every second rollout is called right.
    """
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers/qwen2.5")
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=151936, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
                         eos_token_id=151643)  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    honest = lepo.score

    def score(texts, problems, group_size):
        assert honest(texts, problems, group_size).sum() == 0
        return (torch.arange(len(texts)) % 2).float().reshape(len(problems), group_size).expand(2, -1, -1)

    monkeypatch.setattr(lepo, "score", score)
    argv = ["--model", str(tmp_path / "model"), "--data", str(SHARED / "data/gsm8k"), "--prompts_per_step", "2",
            "--group_size", "2", "--max_new_tokens", "48", "--latent_steps", "8", "--steps", "2",
            "--eval_problems", "2", "--eval_samples", "2", "--save_every", "1", "--kl_coef", "0.01",
            "--device", "cpu"]  # fmt: skip
    lepo.main([*argv, "--out", str(tmp_path / "whole")])
    expected = last_line(capsys)
    assert expected["length"] > 0 and expected["model"] == str(tmp_path / "model")
    lepo.main([*argv, "--steps", "1", "--out", str(tmp_path / "half")])
    first, second = ((tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("half", "whole"))
    assert json.loads(first[0])["length"] == json.loads(second[0])["length"]
    assert all(json.loads(row)["grad_norm"] > 0 for row in second)
    lepo.main(["--resume", str(tmp_path / "half"), "--steps", "2"])
    assert len((tmp_path / "half/log.jsonl").read_text().splitlines()) == 2

