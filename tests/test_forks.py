"""Proofs of forks/: every patch applies and trains, and what it changes is compared with something
that does not share its code. Monte-Carlo bounds are 4 standard errors or more.
"""

import functools
import importlib.util
import json
import math
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test needs a network
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported: tests are about the CPU

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import (
    Categorical,
    Gumbel,
    Multinomial,
    MultivariateNormal,
    Normal,
    RelaxedOneHotCategorical,
    kl_divergence,
)

import lepo
from tasks import chains
from test_lepo import (
    PI,
    PROMPTS,
    assert_close,
    dense,
    executed,
    random_model,
    settings,
    smooth_reward,
    some_advantages,
    watch,
)

ROOT = Path(__file__).parents[1]
NAMES = sorted(path.stem for path in ROOT.glob("forks/*.patch"))
LOG_PI = PI.double().log()


@pytest.fixture(scope="session")
def fork(tmp_path_factory):
    """-> function: name -> lepo.py with that patch, as a module"""

    @functools.cache
    def patched(name):
        folder = tmp_path_factory.mktemp(name)
        shutil.copy(ROOT / "lepo.py", folder)
        subprocess.run(["git", "apply", ROOT / f"forks/{name}.patch"], cwd=folder, check=True)
        spec = importlib.util.spec_from_file_location(f"fork_{name}", folder / "lepo.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return patched


def model_for(module, **changed):
    lm = random_model(**changed)
    lm.stop_ids = torch.tensor([1, 4, 7]) if not changed else torch.tensor([99])
    if hasattr(module, "Gate"):
        lm.model.gate = module.Gate(16)
    return lm


def gradients(module, lm, roll, advantages, args, *reference):
    """What update computes before it bounds the norm"""
    lm.model.zero_grad()
    sgd = torch.optim.SGD(lm.model.parameters(), lr=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.ones(()))
        module.update(lm, sgd, roll, advantages, args, *reference)
    return {name: weight.grad.clone() for name, weight in lm.model.named_parameters()}


def is_zero_on_average(draws):
    return (draws.mean(0).abs() < 4.5 * draws.std(0) / math.sqrt(len(draws)) + 1e-6).all()


# --- 1. Every patch -------------------------------------------------------------------------------


def test_the_table_counts_the_changed_lines():
    """At most 40, and every patch says in its first lines what it is."""
    page = (ROOT / "forks/README.md").read_text()
    rows = page.partition("\n## ")[0].splitlines()  # the first table
    table = {row.split("`")[1]: row.split("|")[-2] for row in rows if row.startswith("| `")}
    assert sorted(table) == NAMES
    for name in NAMES:
        lines = (ROOT / f"forks/{name}.patch").read_text().splitlines()[4:]
        changed = [line[1:] for line in lines if line[0] in "+-"]
        assert len(changed) == int(table[name]) <= 40, name
        assert changed[0].startswith("# Fork: ") and max(map(len, changed)) <= 100


@pytest.fixture(scope="session")
def two_steps(fork, tmp_path_factory):
    """-> function: name, task -> what a run of two steps handed from function to function"""

    @functools.cache
    def run(name, task):
        module, seen = fork(name), []
        folder = tmp_path_factory.mktemp("runs") / "run"
        rewards_of, update = module.rewards_of, module.update

        def watched_rewards(lm, task, roll, problems):
            rewards = rewards_of(lm, task, roll, problems)
            seen.append(SimpleNamespace(roll=roll, problems=problems, strict=rewards[0]))
            return rewards

        def watched_update(lm, optimizer, roll, advantages, *rest):
            weights = lm.model.named_parameters()
            seen[-1].gate = [w.detach().clone() for name, w in weights if name.startswith("gate.")]
            seen[-1].advantages, seen[-1].embedding = advantages, lm.embedding.detach().clone()
            seen[-1].reference = [model.embedding.detach().clone() for model in rest[1:]]
            return update(lm, optimizer, roll, advantages, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "rewards_of", watched_rewards)
            patch.setattr(module, "update", watched_update)
            flags = "--steps 2 --prompts_per_step 4 --group_size 4 --eval_problems 1 --eval_every 0"
            module.main([*flags.split(), "--task", task, "--out", str(folder)])
        rows = [json.loads(row) for row in (folder / "log.jsonl").read_text().splitlines()]
        assert len(rows) == 2 and (folder / "result.json").exists()
        assert all(0 < row["grad_norm"] < math.inf for row in rows)
        seen = [step for step in seen if hasattr(step, "advantages")]
        for step, row in zip(seen, rows, strict=True):
            step.row = row
        return seen

    return run


@pytest.mark.parametrize("name", [name for name in NAMES if name != "heal"])
def test_two_steps_of_training(two_steps, name):
    assert len(two_steps(name, "trees")) == 2


# What the replay of a latent step must be. All take (logits (V,), rollout, row, step, tau).


def soft_label(logits, roll, n, t, tau):
    return (roll.weights[n, t] * logits.log_softmax(-1)[roll.ids[n, t]]).sum()


def chosen_token(logits, roll, n, t, tau):
    return Categorical(logits=logits).log_prob(roll.tokens[n, t])


def sharp(logits, roll, n, t, tau):
    weights = dense(roll, n)[t] ** 2
    return logits.log_softmax(-1) @ weights / weights.sum()


def concrete(logits, roll, n, t, tau):
    """Without the constant, which depends on the number of candidates alone"""
    kept = roll.weights[n, t] > 0
    z, log_l = roll.weights[n, t][kept], logits[roll.ids[n, t][kept]]
    if len(z) == 1:
        return torch.zeros(())
    density = RelaxedOneHotCategorical(torch.tensor(tau), logits=log_l).log_prob(z)
    return density - math.lgamma(len(z)) - (len(z) - 1) * math.log(tau)


def gumbel(logits, roll, n, t, tau):
    kept = roll.scores[n, t].isfinite()
    log_l = logits[roll.ids[n, t][kept]].log_softmax(-1)
    return Gumbel(log_l, torch.ones_like(log_l)).log_prob(roll.scores[n, t][kept]).sum()


def gaussian(logits, roll, n, t, tau):
    table = random_model().embedding.detach()
    mean = (2 * logits).softmax(-1) @ table
    covariance = 0.3**2 * table.square().mean() * torch.eye(16)
    return MultivariateNormal(mean, covariance).log_prob(roll.fed[n, t])


def multinomial(logits, roll, n, t, tau):
    counts = (dense(roll, n)[t] * 5).round()
    orders = math.lgamma(6) - (counts + 1).lgamma().sum()
    return Multinomial(5, logits=logits).log_prob(counts) - orders


SCORES = dict(hard_label=chosen_token, hrpo=chosen_token, concrete=concrete, soft_grpo=gumbel)
SCORES |= dict(soft_tokens=gaussian, multiplex=multinomial, sharp_estimator=sharp)


@pytest.mark.parametrize("name", NAMES)
def test_a_replay_equals_its_rollout(fork, name, monkeypatch):
    """It feeds what the rollout fed, and scores it by the logits that the decoder gave.

    Prompts differ in length, rows end early, and candidates are cut.
    """
    module = fork(name)
    args = settings(top_k=1 if name == "hrpo" else 5, top_p=0.7, max_new_tokens=8)
    lm, inputs, seen = model_for(module), [], watch(monkeypatch)
    torch.manual_seed(0)
    roll = module.rollout(lm, PROMPTS, 8, 3, args)
    assert name == "hrpo" or (roll.weights[:, 0] == 0).any()
    hidden_states = lm.hidden_states

    def watched(embeds, cache):
        inputs.append(embeds)
        return hidden_states(embeds, cache)

    monkeypatch.setattr(lm, "hidden_states", watched)
    parts = [module.replay(lm, roll, group, 8, args) for group in range(3)]
    ours = torch.cat([F.pad(part, (0, 8 - part.shape[1])) for part in parts]).detach()
    replayed = torch.cat([F.pad(part, (0, 0, 0, 7 - part.shape[1])) for part in inputs[1::2]])
    assert (ours[~executed(roll)] == 0).all() and roll.length.unique().numel() > 3
    for t, (fed, logits) in enumerate(seen[:-1]):
        rows = (roll.length > t + 1).nonzero().squeeze(-1)
        assert torch.allclose(replayed[rows, t], fed[:, 0], atol=1e-5)
        score = SCORES.get(name, soft_label) if t + 1 < 3 else chosen_token
        pairs = zip(logits, rows, strict=True)
        expected = [score(row, roll, n, t + 1, args.tau) for row, n in pairs]
        assert torch.allclose(ours[rows, t + 1], torch.stack(expected), rtol=1e-4, atol=5e-4)
    if name == "heal":
        pi = seen[4][1].softmax(-1)
        entropy = -(pi * pi.log()).sum(-1)
        assert torch.allclose(roll.entropy[roll.length > 5, 5], entropy, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_noise_free_rollouts_of_a_prompt_are_equal(fork, name):
    module, args = fork(name), settings(top_k=1 if name == "hrpo" else 5)
    lm = model_for(module)
    lm.stop_ids = torch.tensor([99])
    roll = module.rollout(lm, PROMPTS[:1], 4, 3, args, noise_free=True)
    fed = getattr(roll, "fed", roll.weights)
    assert (roll.tokens == roll.tokens[:1]).all() and (fed == fed[:1]).all()
    args.noise = "none"  # then thoughts are equal, and HRPO's are tokens
    roll = module.rollout(lm, PROMPTS[:1], 16, 3, args)
    fed = getattr(roll, "fed", roll.weights if name != "hrpo" else roll.h)
    assert (fed[:, 0] == fed[:1, 0]).all() and not (roll.tokens == roll.tokens[:1]).all()


# --- 2. Exact densities: Concrete and SofT-GRPO ---------------------------------------------------


def draw(n, tau):
    """n soft tokens at one state -> scores (n, m), weights (n, m)"""
    generator = torch.Generator().manual_seed(0)
    noise = torch.empty(n, 5, dtype=torch.float64).exponential_(generator=generator)
    scores = LOG_PI - noise.log()
    return scores, (scores / tau).softmax(-1)


def score_of(density, scores, *tau):
    """The gradient with respect to the logits, (n, m)"""
    logits = LOG_PI.expand_as(scores).clone().requires_grad_()
    value = density(logits.log_softmax(-1), scores, *tau)
    return torch.autograd.grad(value.sum(), logits)[0]


def true_gradient(reward_at):
    """Finite differences of an expected reward in the logits, with common random numbers"""
    truth = torch.zeros(5)
    for k in range(5):
        for sign in (1, -1):
            torch.manual_seed(0)
            logits = PI.log() + sign * 0.01 * F.one_hot(torch.tensor(k), 5)
            truth[k] += sign * reward_at(logits).mean() / 0.02
    torch.manual_seed(0)
    return truth


def assert_unbiased(samples, truth):
    """samples (n, m): advantage times score"""
    error = samples.std(0) / math.sqrt(len(samples))
    assert ((samples.mean(0) - truth).abs() < 4 * error + 1e-2 * truth.norm()).all()


@pytest.mark.parametrize("name, tau", [("concrete", 0.5), ("soft_grpo", 0.1), ("soft_grpo", 0.5)])
def test_the_density_gives_the_gradient_of_the_expected_reward(fork, name, tau):
    """And what SofT-GRPO's released code takes, a mean over clamped noise, gives a fifth of it."""
    module, args, n = fork(name), settings(tau=tau, top_k=5), 100_000

    def soft_tokens(logits):
        return module.soft_token(logits.expand(n, -1), args, False)[1:]

    truth = true_gradient(lambda logits: smooth_reward(soft_tokens(logits)[0]))
    z, scores = soft_tokens(PI.log())
    reward = smooth_reward(z)
    advantage = (reward - reward.mean())[:, None]
    if name == "concrete":
        return assert_unbiased(advantage * score_of(module.concrete_log_prob, scores, tau), truth)
    exact = score_of(module.gumbel_log_prob, scores)
    assert_unbiased(advantage * exact, truth)
    clamped = PI.log() + (scores - PI.log()).clamp(-1.5, 3)
    released = advantage * score_of(module.gumbel_log_prob, clamped) / 5
    assert released.mean(0).norm() < 0.25 * truth.norm()
    assert is_zero_on_average(exact) and not is_zero_on_average(released / advantage)


def test_only_the_sum_gives_importance_ratios(fork):
    """The mean ratio of two policies is 1 under the older one. Released SofT-GRPO: below 1."""
    scores, z = draw(200_000, 0.5)
    newer = (LOG_PI + torch.tensor([0.3, -0.2, 0.1, -0.3, 0.2])).log_softmax(-1)
    log_prob = fork("soft_grpo").gumbel_log_prob
    difference = log_prob(newer, scores) - log_prob(LOG_PI, scores)
    assert is_zero_on_average(difference.exp() - 1)
    ratio = (difference / 5).exp()
    assert ratio.mean() - 1 < -10 * ratio.std() / math.sqrt(len(ratio))
    log_prob = fork("concrete").concrete_log_prob
    difference = log_prob(newer, scores, 0.5) - log_prob(LOG_PI, scores, 0.5)
    assert is_zero_on_average(difference.exp() - 1)


@pytest.mark.parametrize("tau", [0.1, 0.5])
def test_scores_are_a_chain_of_conditional_means(fork, tau):
    """Concrete is gumbel given the mixture; the heaviest candidate's score is concrete given it.

    So each is unbiased where it sees all that the reward depends on, and the variance falls.
    """
    scores, z = draw(100_000, tau)
    gumbel = score_of(fork("soft_grpo").gumbel_log_prob, scores)
    concrete = score_of(fork("concrete").concrete_log_prob, scores, tau)
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
        assert abs(squares.mean() - second_moment) <= 5 * error + 1e-6
    v = 1 - (LOG_PI - scores).exp()
    assert torch.allclose(gumbel, v - PI * v.sum(-1, keepdim=True), atol=1e-6)


@pytest.mark.parametrize("name", ["concrete", "soft_grpo"])
def test_tiny_mixtures_and_single_candidates_give_no_nan(fork, name):
    module, advantages = fork(name), some_advantages()
    for args in (settings(tau=1e-3), settings(top_p=1e-6), settings(top_p=0.7)):
        lm = model_for(module)
        torch.manual_seed(0)
        roll = module.rollout(lm, PROMPTS, 4, 3, args)
        assert (roll.weights == 0).any()
        grads = gradients(module, lm, roll, advantages, args).values()
        assert all(gradient.isfinite().all() for gradient in grads)


# --- 3. Soft Tokens, Multiplex, HRPO, and Gaussian noise ------------------------------------------


def test_the_gaussian_gives_the_gradient_of_the_expected_reward(fork):
    module, n = fork("soft_tokens"), 100_000
    table = torch.randn(5, 3, generator=torch.Generator().manual_seed(5))

    def reward_of(e):
        return torch.tanh(e).sum(-1) + 0.5 * e[..., 0] ** 2

    def fed(logits):
        return module.gaussian(logits.expand(n, -1), table).sample()

    truth = true_gradient(lambda logits: reward_of(fed(logits)))
    logits = PI.log().expand(n, -1).clone().requires_grad_()
    e = fed(PI.log())
    log_prob = module.gaussian(logits, table).log_prob(e).sum()
    score = torch.autograd.grad(log_prob, logits)[0]
    reward = reward_of(e)
    assert_unbiased((reward - reward.mean())[:, None] * score, truth)


def test_soft_tokens_learn_through_the_mean_and_all_its_embeddings(fork):
    """The whole gradient, by hand from the model's logits; what was fed is a constant.

    And what was fed has the noise that it is scored by.
    """
    module, args, advantages = fork("soft_tokens"), settings(), some_advantages()
    lm = model_for(module)
    torch.manual_seed(0)
    roll = module.rollout(lm, PROMPTS, 4, 3, args)
    variance, residuals = (0.3**2 * lm.embedding.square().mean()).detach(), []
    lm.model.zero_grad()
    for n, advantage in enumerate(advantages.flatten()):
        steps, prompt = roll.length[n], roll.prompts[n // 4]
        latents, text = min(3, steps), roll.tokens[n, 3:steps]
        inputs = [lm.embedding[prompt], roll.fed[n, :latents], lm.embedding[text]]
        logits = lm.model(inputs_embeds=torch.cat(inputs)[None]).logits[0, len(prompt) - 1 : -1]
        distance = roll.fed[n, :latents] - (2 * logits[:latents]).softmax(-1) @ lm.embedding
        residuals += [distance.detach().flatten() / variance.sqrt()]
        log_prob = -distance.square().sum() / (2 * variance)
        log_prob = log_prob - F.cross_entropy(logits[latents:], text, reduction="sum")
        (-advantage * log_prob / roll.length.sum()).backward()
    expected = {name: weight.grad.clone() for name, weight in lm.model.named_parameters()}
    assert_close(gradients(module, lm, roll, advantages, args), expected, 1e-4)
    squares = torch.cat(residuals).square()
    assert abs(squares.mean() - 1) < 4 * math.sqrt(2 / len(squares))


def test_multiplex_draws_are_independent_and_equal_ones_are_merged(fork):
    torch.manual_seed(0)
    args, n = settings(top_k=3), 50_000
    ids, weights = fork("multiplex").soft_token(PI.log().expand(n, -1), args, False)
    shares = torch.zeros(n, 5).scatter_add(-1, ids, weights)
    assert is_zero_on_average(shares - PI)
    pairs = shares[:, :, None] * shares[:, None]  # E z z^T of a multinomial
    expected = 2 / 3 * PI[:, None] * PI + torch.diag(PI) / 3
    assert is_zero_on_average((pairs - expected).flatten(1))
    assert torch.allclose(weights.max(-1).values, shares.max(-1).values)
    assert ((3 * shares).round() - 3 * shares).abs().max() < 1e-5


def exact_gradient(module, lm, roll, chance, value, args):
    """All outcomes as one group, each with its chance: no sampling, so no error"""
    advantages = (chance.detach() * value)[None]
    ours = gradients(module, lm, roll, advantages, args)
    return {name: -roll.length.sum() * gradient for name, gradient in ours.items()}


def true_gradients(lm, expected_reward):
    names, weights = zip(*lm.model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(expected_reward, weights), strict=True))


def two_step_chain(lm, prompt, embeds):
    """log pi of the first step (V,) and of the second, after each of these embeddings (n, V)"""
    start = lm.embedding[torch.tensor(prompt)]
    first = lm.model(inputs_embeds=start[None]).logits[0, -1].log_softmax(-1)
    whole = torch.cat([start.expand(len(embeds), -1, -1), embeds[:, None]], 1)
    return first, lm.model(inputs_embeds=whole).logits[:, -1].log_softmax(-1)


def test_multiplex_is_exact(fork):
    """By enumeration of 5^3 draws and 5 tokens: the gradient of the expected reward."""
    module, args = fork("multiplex"), settings(latent_steps=1, max_new_tokens=2, top_k=3)
    lm = model_for(module, vocabulary=5, seed=2, scale=3.0)
    outcomes = torch.cartesian_prod(*[torch.arange(5)] * 4)  # (625, 4)
    draws, last = outcomes[:, :3], outcomes[:, 3:]
    value = torch.randn(625)
    first, second = two_step_chain(lm, [2, 3], lm.embedding[draws].mean(1))
    chance = (first[draws].sum(-1) + second.gather(-1, last).squeeze(-1)).exp()
    assert abs(chance.sum() - 1) < 1e-5
    truth = true_gradients(lm, (chance * value).sum())

    ids = torch.stack([draws, last.expand(-1, 3)], 1)
    weights = torch.tensor([[1 / 3] * 3, [1, 0, 0]]).expand(625, -1, -1)
    roll = module.Rollout([[2, 3]], ids, weights, ids[:, :, 0], torch.full((625,), 2))
    assert_close(exact_gradient(module, lm, roll, chance, value, args), truth, 1e-4)


def gate_by_hand(gate, token, h):
    """A gate of the paper: a = sigmoid(decay)^(8 r), as in a gated linear recurrence"""
    r = torch.sigmoid(token @ gate.r.weight.T + gate.r.bias)
    i = torch.sigmoid(token @ gate.i.weight.T + gate.i.bias)
    a = torch.sigmoid(gate.decay) ** (8 * r)
    return a * token + torch.sqrt(1 - a**2 + 1e-8) * i * h


def test_hrpo_is_exact_for_the_token(fork):
    """By enumeration of 5 x 5 tokens; h is a constant. The gate learns, too."""
    module, args = fork("hrpo"), settings(latent_steps=1, max_new_tokens=2, top_k=1)
    lm = model_for(module, vocabulary=5, seed=2, scale=3.0)
    share = torch.sigmoid(lm.model.gate.decay) ** 8
    assert 0.99 < share.min() and share.max() < 0.999
    outcomes = torch.cartesian_prod(*[torch.arange(5)] * 2)  # (25, 2)
    value = torch.randn(25)
    first, _ = two_step_chain(lm, [2, 3], lm.embedding[:1])
    pi = first.exp()
    h = (pi @ lm.embedding / pi.square().sum().sqrt()).detach()
    embeds = gate_by_hand(lm.model.gate, lm.embedding[outcomes[:, 0]], h)
    first, second = two_step_chain(lm, [2, 3], embeds)
    chance = (first[outcomes[:, 0]] + second.gather(-1, outcomes[:, 1:]).squeeze(-1)).exp()
    truth = true_gradients(lm, (chance * value).sum())
    assert truth["gate.decay"].abs().max() > 0 and truth["gate.i.weight"].abs().max() > 0

    roll = module.rollout(lm, [[2, 3]], 25, 1, args)
    assert torch.allclose(roll.h[:, 0], h.expand(25, -1), atol=1e-5)
    roll.ids, roll.tokens = outcomes[:, :, None], outcomes
    assert_close(exact_gradient(module, lm, roll, chance, value, args), truth, 1e-4)


def test_the_gate_of_hrpo_follows_from_the_seed_and_learns(fork, two_steps):
    torch.manual_seed(0)
    expected = fork("hrpo").Gate(128).parameters()
    first, second = (step.gate for step in two_steps("hrpo", "trees"))
    for at_start, ours, later in zip(expected, first, second, strict=True):
        assert torch.equal(at_start, ours) and not torch.equal(ours, later)


def test_the_noise_is_gaussian(fork):
    """Equation (2) undone: the difference of two standard normals, in 20 equally likely bins"""
    torch.manual_seed(0)
    args = settings(top_k=5)
    z = fork("gaussian_noise").soft_token(PI.log().expand(20_000, -1), args, False)[1]
    difference = 0.5 * (z[:, 0] / z[:, 1]).log() - (PI[0] / PI[1]).log()
    counts = torch.histc(Normal(0, math.sqrt(2)).cdf(difference), 20, 0, 1)
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.82  # chi-square, 19 degrees of freedom


# --- 4. Rewards and advantages --------------------------------------------------------------------


def standardised(rewards):
    spread = rewards - rewards.mean(1, keepdim=True)
    return spread / (rewards.std(1, keepdim=True) + 1e-4)


def test_short_solutions_are_worth_more(two_steps):
    for step in two_steps("short_reward", "trees"):
        worth = 2 - step.roll.length.view_as(step.strict) / 8
        expected = standardised(step.strict * worth)
        assert torch.allclose(step.advantages, expected, atol=1e-5)


def test_soft_tokens_compares_with_the_others(two_steps):
    for step in two_steps("soft_tokens", "trees"):
        for i in range(4):
            others = step.strict[:, [j for j in range(4) if j != i]]
            expected = step.strict[:, i] - others.mean(1)
            assert torch.allclose(step.advantages[:, i], expected, atol=1e-6)


def group_of_100_tries():
    """Three attempts, with chances .3, .5, .2: each outcome as often as it is likely, (1, 300)"""
    tries = []
    for a, b, c in torch.cartesian_prod(*[torch.tensor([0, 1])] * 3).tolist():
        count = 100 * (0.3 if a else 0.7) * 0.5 * (0.2 if c else 0.8)
        tries += [[a, b, c]] * round(count)
    return torch.tensor(tries).float().view(1, 300)


def test_pass_at_k_is_the_gradient_of_the_chance_to_succeed(fork, monkeypatch):
    """By enumeration, against autograd; the numbers of equal weights are others."""
    module = fork("pass_at_k")
    monkeypatch.setattr(module, "ATTEMPTS", 3)
    p = torch.tensor([0.3, 0.5, 0.2])
    logits = p.logit().requires_grad_()
    success = 1 - (1 - logits.sigmoid()).prod()
    truth = torch.autograd.grad(success, logits)[0]
    assert torch.allclose(truth, torch.tensor([0.084, 0.140, 0.056]), atol=1e-6)
    rewards = group_of_100_tries()
    score = rewards.view(100, 3) - p  # of a Bernoulli with that logit
    advantages = module.attempt_advantages(rewards).view(100, 3)
    assert torch.allclose((advantages * score).mean(0), truth, atol=1e-6)
    unweighted = advantages / torch.tensor([0.4, 0.8, 1.0])
    expected = torch.tensor([0.210, 0.175, 0.056])
    assert torch.allclose((unweighted * score).mean(0), expected, atol=1e-6)


def test_pass_at_k_by_hand(fork, two_steps):
    """Of the tries 1 0, 0 1, 0 0, 0 0: p is 1/4 and 1/3, the weights 2/3 and 1."""
    module = fork("pass_at_k")
    rewards = torch.tensor([[1.0, 0, 0, 1, 0, 0, 0, 0], [1, 1, 1, 0, 1, 1, 1, 0]])
    ours = module.attempt_advantages(rewards)
    expected = torch.tensor([3 / 6, 0, -1 / 6, 2 / 3, -1 / 6, -1 / 3, -1 / 6, -1 / 3])
    assert torch.allclose(ours[0], expected, atol=1e-6)
    assert (ours[1] == 0).all()
    for step in two_steps("pass_at_k", "trees"):
        assert torch.equal(step.advantages, module.attempt_advantages(step.strict))


# --- 5. KL ----------------------------------------------------------------------------------------


def test_k3_by_hand_and_by_enumeration(fork):
    """Its mean is KL(pi | reference), and its mean gradient that of KL(reference | pi)."""
    k3 = fork("kl").k3
    by_hand = k3(torch.tensor([0.5, 0.25]).log(), torch.tensor([0.25, 0.25]).log())
    assert torch.allclose(by_hand, torch.tensor([0.193147, 0.0]), atol=1e-6)
    reference = torch.tensor([0.3, 0.3, 0.2, 0.1, 0.1])
    logits = PI.log().requires_grad_()
    ours = k3(logits.log_softmax(-1), reference.log())
    pi, other = Categorical(logits=logits), Categorical(reference)
    assert torch.allclose((PI * ours).sum(), kl_divergence(pi, other), atol=1e-6)
    mean_gradient = torch.autograd.grad((PI * ours).sum(), logits)[0]
    truth = torch.autograd.grad(kl_divergence(other, pi), logits)[0]
    assert torch.allclose(mean_gradient, truth, atol=1e-6)


def test_the_objective_with_kl(fork):
    """Against the formula on lepo.py's own replay, also in a group without advantage."""
    module, args = fork("kl"), settings()
    lm, reference, advantages = model_for(module), random_model(seed=1), some_advantages()
    advantages[2] = 0
    torch.manual_seed(0)
    roll = module.rollout(lm, PROMPTS, 4, 3, args)
    lm.model.zero_grad()
    for group in range(3):
        ours, theirs = (lepo.replay(model, roll, group, 4, args) for model in (lm, reference))
        ratio = theirs.detach() - ours
        penalty = 0.01 * (torch.expm1(ratio) - ratio)
        objective = advantages[group, :, None] * ours - penalty
        (-objective.sum() / roll.length.sum()).backward()
    expected = {name: weight.grad.clone() for name, weight in lm.model.named_parameters()}
    assert_close(gradients(module, lm, roll, advantages, args, reference), expected)
    assert all(weight.grad is None for weight in reference.model.parameters())
    plain = gradients(lepo, lm, roll, advantages, args)
    assert_close(gradients(module, lm, roll, advantages, args, lm), plain)


def test_the_reference_is_the_model_that_training_began_with(two_steps):
    first, second = two_steps("kl", "trees")
    for reference in first.reference + second.reference:
        assert torch.equal(reference, first.embedding)
    assert second.reference and not torch.equal(second.embedding, first.embedding)


# --- 6. HEAL --------------------------------------------------------------------------------------


def distances(fork, *curves):
    length = torch.tensor([len(curve) for curve in curves])
    entropy = torch.zeros(len(curves), 9)
    for n, curve in enumerate(curves):
        entropy[n, : len(curve)] = torch.tensor(curve)
    return fork("heal").distances(entropy, length)


def test_distances_by_hand(fork):
    """Softmax over time of (0, log 3) is (1/4, 3/4). A shift of the whole curve is not seen."""
    ours = distances(fork, [0.0, math.log(3)], [0.0, 0.0], [7.0, 7 + math.log(3)])
    there = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    back = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    expected = torch.tensor([[0, there, 0], [back, 0, back], [0, there, 0]])
    assert torch.allclose(ours, expected, atol=1e-6)


def test_distances_of_curves_of_different_length(fork):
    """Stretched to the longer by nearest neighbours, as by torch's interpolation"""
    torch.manual_seed(0)
    curves = [torch.randn(length).tolist() for length in (2, 3, 4, 6, 8, 9)]
    ours = distances(fork, *curves)
    for i, a in enumerate(curves):
        for j, b in enumerate(curves):
            pair = [torch.tensor(x, dtype=torch.float64)[None, None] for x in (a, b)]
            size = max(len(a), len(b))
            p, q = (F.interpolate(x, size).log_softmax(-1) for x in pair)
            expected = F.kl_div(q, p, log_target=True, reduction="sum")
            assert abs(ours[i, j] - expected) < 1e-5


def test_eda_pays_for_likeness_with_the_other_domain(fork, monkeypatch):
    """Rows 0 to 2 are of the target domain, 3 and 4 of the general one. Row 0 is like row 3.

    Rows 1 and 2 are like each other; row 4 is nearer to row 0 than to row 3.
    """
    module = fork("heal")
    curves = torch.tensor([[0.0, 1, 0], [3, 0, 0], [3.1, 0, 0], [0, 1.1, 0], [0, 0.2, 0]])
    roll = SimpleNamespace(entropy=curves, length=torch.full((5,), 3))
    is_target = torch.tensor([True, True, True, False, False])
    assert (module.eda_rewards(roll, is_target) == 0).all()  # too short
    monkeypatch.setattr(module, "SHORTEST", 2)
    assert module.eda_rewards(roll, is_target).tolist() == [1, 0, 0, 1, 1]


def test_heal_trains_on_few_problems_and_many_of_another_domain(two_steps, fork, monkeypatch):
    """Half of a batch are few problems again and again, the other half chains of one sign."""
    module, domains, pattern = fork("heal"), [], torch.arange(16.0) % 3
    assert (module.TARGETS, module.EDA) == (32, 1)
    monkeypatch.setattr(module, "TARGETS", 3)
    monkeypatch.setattr(module, "EDA", 0.5)
    eda_rewards = "eda_rewards", lambda _, is_target: domains.append(is_target) or pattern
    monkeypatch.setattr(module, *eda_rewards)

    def chain_of(i, kind):
        return chains.chain_text(*chains.make_problem(i, "train", 0, kind))

    for i, step in enumerate(two_steps("heal", "chains")):
        questions = [problem.question for problem in step.problems]
        assert questions[:2] == [chain_of((2 * i + j) % 3, "mixed") for j in range(2)]
        assert questions[2:] == [chain_of(2 * i + j, "single") for j in range(2)]
        assert domains[i].tolist() == [True] * 8 + [False] * 8
        expected = standardised(step.strict + 0.5 * pattern.view(4, 4))
        assert torch.allclose(step.advantages, expected, atol=1e-5)
        executed = torch.arange(step.roll.entropy.shape[1]) < step.roll.length[:, None]
        mean_entropy = step.roll.entropy[executed].mean().item()
        assert step.row["entropy"] == pytest.approx(mean_entropy, rel=1e-4)
