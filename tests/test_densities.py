"""The exact densities of a latent step, beside lepo.py's soft label: what a fork that wants an
unbiased gradient puts in the place of equation (5), and its proofs.

l are the log-probabilities of a policy, renormalised on the m candidates of (1), g = l + Gumbel
noise, z = softmax(g / tau). The third column is the gradient with respect to the logits, with
v = 1 - exp(l - g) and p = exp(l):

  soft      sum z l          z - p                               lepo.py; biased for tau > 0
  concrete  log p(z)         1 - m w, w = softmax(l - tau log z) Maddison et al. 2017
  gumbel    log p(g)         v - p sum(v)                        as in SofT-GRPO (2511.06411)
"""

import math
import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported: tests are about the CPU

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Gumbel, RelaxedOneHotCategorical

PI = torch.tensor([0.51, 0.23, 0.15, 0.08, 0.03], dtype=torch.float64)


def on_support(log_pi, scores):
    """-> (M, K) which candidates are in (1); l there, 0 elsewhere; scores there, 0 elsewhere"""
    inside = scores > -math.inf
    log_l = log_pi.masked_fill(~inside, -math.inf).log_softmax(-1)
    return inside, log_l.masked_fill(~inside, 0), scores.masked_fill(~inside, 0)


def gumbel_density(log_pi, scores):
    """log p(g) on the support: log_pi, scores (M, K), scores -inf outside -> (M,)"""
    inside, log_l, g = on_support(log_pi, scores)
    return ((log_l - g - (log_l - g).exp()) * inside).sum(-1)


def concrete_density(log_pi, scores, tau):
    """log p(z) on the support -> (M,). From the scores g: z itself would underflow."""
    inside, log_l, g = on_support(log_pi, scores)
    log_z = (g / tau).masked_fill(~inside, -math.inf).log_softmax(-1).masked_fill(~inside, 0)
    m = inside.sum(-1)  # (M,)
    pull = (log_l - tau * log_z).masked_fill(~inside, -math.inf).logsumexp(-1)
    constant = m.double().lgamma() + (m - 1) * math.log(tau)
    return constant + ((log_l - (tau + 1) * log_z) * inside).sum(-1) - m * pull


def draw(n, tau):
    """n soft tokens at one state -> scores (n, m), weights (n, m)"""
    generator = torch.Generator().manual_seed(0)
    noise = torch.empty(n, 5, dtype=torch.float64).exponential_(generator=generator)
    scores = PI.log() - noise.log()
    return scores, (scores / tau).softmax(-1)


def score_of(density, scores, *tau):
    """The gradient with respect to the logits, (n, m)"""
    logits = PI.log().expand_as(scores).clone().requires_grad_()
    value = density(logits.log_softmax(-1), scores, *tau)
    return torch.autograd.grad(value.sum(), logits)[0]


def is_zero_on_average(draws):
    return (draws.mean(0).abs() < 4.5 * draws.std(0) / math.sqrt(len(draws)) + 1e-12).all()


@pytest.mark.parametrize("tau", [0.3, 1.0])
def test_densities_equal_torchs(tau):
    """On a support of five of seven candidates: the policy is renormalised there, as in (1)."""
    scores, weights = draw(500, tau)
    padded = F.pad(scores, (0, 2), value=-math.inf)
    generator = torch.Generator().manual_seed(1)
    log_pi = torch.randn(7, generator=generator, dtype=torch.float64).log_softmax(-1)
    log_l = log_pi[:5].log_softmax(-1)
    temperature = torch.tensor(tau, dtype=torch.float64)
    theirs = RelaxedOneHotCategorical(temperature, logits=log_l).log_prob(weights)
    assert torch.allclose(concrete_density(log_pi.expand(500, -1), padded, tau), theirs, atol=1e-6)
    theirs = Gumbel(log_l, torch.ones_like(log_l)).log_prob(scores).sum(-1)
    assert torch.allclose(gumbel_density(log_pi.expand(500, -1), padded), theirs)


@pytest.mark.parametrize("tau", [0.1, 0.5])
def test_scores_are_a_chain_of_conditional_means(tau):
    """Concrete is gumbel given the mixture; the heaviest candidate's score is concrete given it.

    So each is unbiased where it sees all that the reward depends on, and the variance falls.
    """
    scores, z = draw(100_000, tau)
    gumbel = score_of(gumbel_density, scores)
    concrete = score_of(concrete_density, scores, tau)
    hard = F.one_hot(z.argmax(-1), 5) - PI
    for score in (gumbel, concrete, hard):
        assert is_zero_on_average(score)
    for i in range(5):
        assert is_zero_on_average((concrete - hard)[z.argmax(-1) == i])
    for h in (z[:, 0], z[:, 1] ** 2):
        assert is_zero_on_average(h[:, None] * (concrete - gumbel))
    overlap = PI.square().sum().item()
    expected = {3 + 5 * overlap: gumbel, 5 * 4 / 6: concrete, 1 - overlap: hard}
    for second_moment, score in expected.items():
        squares = score.square().sum(-1)
        error = squares.std() / math.sqrt(len(squares))
        assert abs(squares.mean() - second_moment) <= 5 * error + 1e-9
    v = 1 - (PI.log() - scores).exp()
    assert torch.allclose(gumbel, v - PI * v.sum(-1, keepdim=True), atol=1e-9)


def test_tiny_mixtures_underflow_without_nan():
    scores, z = draw(500, 1e-3)
    assert (z == 0).any()
    assert score_of(concrete_density, scores, 1e-3).isfinite().all()
