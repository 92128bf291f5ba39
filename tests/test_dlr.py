"""Proofs of dlr.py: every formula against something that does not share its code, in its order.

    pytest tests/test_dlr.py            # a quarter of a minute
    pytest tests/test_dlr.py -m slow    # learning, two processes, a real tokenizer and GSM8K

The models of most tests are random and know 12 and 14 tokens. Their words are numbers.
"""

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
from torch.distributions import Independent, Normal
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

import common
import dlr
from tasks import Problem, chains
from test_lepo import PROMPTS, assert_close, random_model, rows_of

HERE = Path(__file__).parents[1]
SHARED = HERE.parent / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no real tokenizer and data there")
seed_all = torch.manual_seed
T, D = 3, 5  # latents of a problem, numbers of a latent
CUE, STOPS = [3, 4], [0, 1, 2, 11]
PROBLEMS = [Problem(" ".join(map(str, ids)), str(i)) for i, ids in enumerate(PROMPTS)]
TASK = SimpleNamespace(
    request=lambda question, args: question, FORM=chains.FORM, verify=chains.verify
)


class Numbers:
    """A tokenizer whose words are numbers"""

    chat_template = None

    def encode(self, text, **_):
        return [int(word) for word in text.split()]

    def decode(self, ids):
        return " ".join(map(str, torch.as_tensor(ids).flatten().tolist()))

    def batch_decode(self, rows, **_):
        return [self.decode(row) for row in rows]


def settings(**changed):
    """What the functions of dlr.py read of its arguments"""
    values = dict(policy="parallel", projection="words", filter="all", share=0.5, device="cpu")
    values |= dict(cue="3 4", latent_steps=T, latent_dim=D, sigma=0.7, max_new_tokens=12)
    values |= dict(group_size=4, prompts_per_step=2, kl_coef=0.05, contrast=0.1)
    return SimpleNamespace(**values | changed)


def frozen_model():
    """A main model: with a head of its own it seldom repeats itself, and it listens to latents"""
    lm = random_model(scale=1.0)
    lm.head = lm.model.lm_head.weight = torch.nn.Parameter(torch.randn(12, 16))
    for name, weight in lm.model.named_parameters():
        if "v_proj" in name or "o_proj" in name:
            weight.data *= 5
    lm.model.requires_grad_(False)
    return lm


def build(stirred=True, **changed):
    """A policy. Stirred, it is no longer what it is at the start."""
    main_lm, lm = frozen_model(), random_model(vocabulary=14, seed=2, scale=1.0)
    for each in (main_lm, lm):
        each.tokenizer, each.stop_ids = Numbers(), torch.tensor(STOPS)
    policy = dlr.LatentPolicy(lm, main_lm, settings(**changed))
    if stirred:
        for weight in [*policy.mu.parameters(), *policy.log_std.parameters()]:
            weight.data += 0.1 * torch.randn(weight.shape)
    return policy


def roll_out(policy, seed=0):
    torch.manual_seed(seed)
    return dlr.rollout(policy, TASK, PROBLEMS, policy.args)


def batch_of(policy):
    """-> rollout of the three problems; rewards and advantages of both signs, (P, K) each"""
    roll = roll_out(policy)
    return roll, torch.randn(roll.ended.shape), torch.randn(roll.ended.shape)


def decode(policy, thoughts):
    return dlr.decode(policy.main_lm, TASK, PROBLEMS, thoughts, policy.args)


def gradients(policy, ref, batch):
    """What dlr.update computes before it bounds norms -> gradients by name, metrics"""
    sgd = torch.optim.SGD(policy.parameter_groups(), lr=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.ones(()))
        metrics = dlr.update(policy, ref, sgd, *batch, policy.args)
    return {name: weight.grad.clone() for name, weight in policy.named_parameters()}, metrics


# --- 2. The latent policy -------------------------------------------------------------------------


def test_states_are_the_assistants_own_at_the_queries():
    """Against transformers' model on [E(prompt); queries], one prompt at a time"""
    policy = build()
    pi, states = policy(PROMPTS)
    assert pi.mean.shape == pi.stddev.shape == (3, 1, T, D)
    assert (pi.mean[0] - pi.mean[1]).abs().max() > 0.01
    for i, prompt in enumerate(PROMPTS):
        embeds = torch.cat([policy.lm.embedding[prompt], policy.queries])[None]
        out = policy.assistant(inputs_embeds=embeds, output_hidden_states=True)
        theirs = out.hidden_states[-1][0, -T:]  # (T, h)
        theirs = F.layer_norm(theirs, (16,), policy.norm.weight, policy.norm.bias)
        assert torch.allclose(states[i, 0], theirs, atol=1e-4)
        assert torch.allclose(pi.mean[i, 0], policy.mu(theirs), atol=1e-4)
        assert torch.allclose(pi.stddev[i, 0].log(), policy.log_std(theirs), atol=1e-4)


def test_latents_are_float32_under_bfloat16():
    policy = build()
    exact, _ = policy(PROMPTS)
    policy.lm.dtype = torch.bfloat16
    pi, states = policy(PROMPTS)
    assert pi.mean.dtype == pi.stddev.dtype == states.dtype == torch.float32
    assert 0 < (pi.mean - exact.mean).abs().max() < 0.1


def test_one_prompt_for_all_does_not_reach_the_assistant():
    policy = build(policy="prompt")
    mean = policy(PROMPTS)[0].mean
    assert torch.equal(mean, mean[:1].expand_as(mean))
    assert (mean[0, 0, 0] - mean[0, 0, 1]).abs().max() > 0.01
    ours, _ = gradients(policy, build(policy="prompt"), batch_of(policy))
    learning = {name.split(".")[0] for name in ours if ours[name].any()}
    assert learning == {"queries", "norm", "mu", "log_std", "value"}


def test_the_policy_at_the_start():
    """Noise of the size that was asked for, far larger than the mean; W with rows of one norm"""
    policy = build(stirred=False)
    pi, _ = policy(PROMPTS)
    assert torch.allclose(pi.stddev, torch.tensor(0.7))
    assert pi.mean.square().mean().sqrt() < 0.2 * 0.7
    norm = 1.4 * math.sqrt(2 * math.log(12))
    assert torch.allclose(policy.words.norm(dim=-1), torch.tensor(norm))
    assert 0.7 < policy.queries.std() / policy.lm.embedding.std() < 1.3
    for bias, bound in ((50.0, 1.0), (-50.0, -4.0)):
        torch.nn.init.constant_(policy.log_std.bias, bias)
        assert torch.allclose(policy(PROMPTS)[0].stddev, torch.tensor(0.7 * math.exp(bound)))


def test_a_latent_is_a_mixture_of_words():
    """The sum over words, written out; in more rows than are made at a time"""
    policy = build()
    z = torch.randn(300, 2, T, D)
    weights = torch.einsum("...d,vd->...v", z, policy.words).exp()
    weights /= weights.sum(-1, keepdim=True)
    assert "words" in policy.state_dict()  # W is saved with the policy
    expected = torch.einsum("...v,vd->...d", weights, policy.main_lm.embedding)
    assert torch.allclose(policy.project(z), expected, atol=1e-4)


@pytest.mark.parametrize("vocabulary, d", [(70, 32), (20_000, 128)])
def test_a_latent_mixes_few_words_whatever_the_vocabulary(vocabulary, d):
    main_lm = SimpleNamespace(embedding=torch.randn(vocabulary, 4))  # of another width
    policy = dlr.LatentPolicy(random_model(), main_lm, settings(latent_dim=d))
    effective = 1 / policy.mixture(torch.randn(400, d)).square().sum(-1)
    assert 1.3 < effective.median() < 6
    pi, _ = policy(PROMPTS)
    assert policy.project(pi.mean).shape == (3, 1, T, 4)
    assert policy.value(torch.ones(T * d + 16)).shape == (1,)


def test_with_identity_a_latent_is_an_embedding():
    policy = build(projection="identity")
    z, embedding = torch.randn(500, 16), policy.main_lm.embedding
    assert policy(PROMPTS)[0].mean.shape == (3, 1, T, 16)
    rms = embedding.norm() / math.sqrt(12 * 16)
    assert torch.allclose(policy.project(z), z * rms)
    assert "words" not in policy.state_dict()


def test_every_weight_of_the_policy_is_in_one_group_and_none_of_the_main_model_is():
    policy = build()
    groups = [group["params"] for group in policy.parameter_groups()]
    ids = [id(weight) for group in groups for weight in group]
    assert sorted(ids) == sorted(id(weight) for weight in policy.parameters())
    assert not set(ids) & {id(weight) for weight in policy.main_lm.model.parameters()}


# --- 3. Rollout -----------------------------------------------------------------------------------


def test_decoding_is_generate():
    """Row by row: prompts of different length, K thoughts each, early ends, and the cap"""
    policy = build()
    main_lm = policy.main_lm
    how = dict(max_new_tokens=12, do_sample=False, eos_token_id=STOPS, pad_token_id=0)

    def generate(prompt, thought):
        parts = main_lm.embedding[prompt], thought, main_lm.embedding[CUE]
        embeds = torch.cat(parts)[None]
        return main_lm.model.generate(inputs_embeds=embeds, **how)[0].tolist()

    torch.manual_seed(0)
    thoughts = policy.project(3 * torch.randn(3, 8, T, D))
    texts, length, ended = decode(policy, thoughts)
    assert length.unique().numel() > 3
    assert len(set(texts[:8])) > 1
    assert ended.any() and not ended.all()
    for n, text in enumerate(texts):
        i, k = divmod(n, 8)
        theirs = generate(PROMPTS[i], thoughts[i, k])
        assert text == Numbers().decode(theirs)
        assert length[i, k] == len(theirs)  # the end token counts
        assert ended[i, k] == (theirs[-1] in STOPS)
    bare, *_ = decode(policy, thoughts[:, :1, :0])  # the main model alone
    nothing = thoughts[0, 0, :0]
    assert bare == [Numbers().decode(generate(prompt, nothing)) for prompt in PROMPTS]


def test_a_text_that_ends_with_its_last_token_has_ended():
    policy = build()
    torch.manual_seed(0)
    thoughts = policy.project(3 * torch.randn(3, 8, T, D))
    _, length, ended = decode(policy, thoughts)
    policy.args.max_new_tokens = int(length[ended].max())
    last = ended & (length == policy.args.max_new_tokens)
    _, again, ended_again = decode(policy, thoughts)
    assert last.any() and torch.equal(ended, ended_again)
    assert torch.equal(length[ended], again[ended])


@pytest.mark.parametrize("template, expected", [
    (None, " 17 + 5 ?"),
    (" hm {{ messages[0]['content'] }} so", " hm 17 + 5 ? <think> so"),
    (" hm {{ messages[0]['content'] }} so <think>", " hm 17 + 5 ? <think> so"),
    (" hm {{ messages[0]['content'] }} so <think>\n", " hm 17 + 5 ? <think> so"),
])  # fmt: skip
def test_latents_stand_before_the_cue_which_comes_once(template, expected):
    """Also where a chat template has opened <think> already. What is inside the question stays."""
    tokenizer = AutoTokenizer.from_pretrained(HERE / "tasks/models/chains")
    tokenizer.chat_template = template
    lm = random_model(vocabulary=80)
    lm.tokenizer = tokenizer
    args = settings(cue=" <think>")
    prompts, cue = dlr.encode(lm, chains, [Problem("17 + 5", "22")] * 2, args)
    texts = [tokenizer.decode(ids) for ids in (*prompts, cue)]
    assert texts == [expected, expected, " <think>"]


def test_a_prescreen_decodes_the_9_best_and_3_others_of_64():
    args, drawn = settings(filter="prescreen", share=0.18, group_size=64), []
    torch.manual_seed(0)
    expected = torch.rand(3, 64)
    ranks = expected.argsort(1, descending=True).argsort(1)  # (P, G), 0: the best
    for _ in range(200):
        chosen = dlr.prescreen(expected, args)
        assert chosen.shape == (3, 12)
        rank = ranks.gather(1, chosen)
        assert (rank[:, :9] == torch.arange(9)).all()
        assert all(len(set(row.tolist())) == 12 for row in rank)
        drawn.append(rank[:, 9:])
    counts = torch.stack(drawn).flatten().bincount(minlength=64)
    assert (counts[:9] == 0).all()
    mean = 1800 / 55
    assert ((counts[9:] - mean) ** 2 / mean).sum() < 91.9  # chi-square, 54 degrees of freedom
    args.group_size = 12  # of two, the second is drawn
    others = {dlr.prescreen(expected[:1, :12], args)[0, 1].item() for _ in range(200)}
    assert others == set(range(12)) - {expected[0, :12].argmax().item()}


@pytest.mark.parametrize("how, count, best", [("all", 12, 0), ("prescreen", 6, 5)])
def test_what_is_decoded_is_mean_plus_sigma_noise_of_the_chosen(how, count, best, monkeypatch):
    policy = build(filter=how, group_size=12)
    written, original = [], dlr.decode

    def watched(*arguments):
        written.append(arguments[3])
        return original(*arguments)

    monkeypatch.setattr(dlr, "decode", watched)
    roll, (pi, states) = roll_out(policy), policy(PROMPTS)
    torch.manual_seed(0)
    assert torch.equal(roll.noise, torch.randn(3, 12, T, D))
    z = pi.mean + pi.stddev * roll.noise  # (P, G, T, d)
    assert torch.equal(written[0], policy.project(roll.z))
    assert roll.z.shape[:2] == roll.seen.shape[:2] == roll.ended.shape == (3, count)
    assert not roll.z.requires_grad and not roll.seen.requires_grad
    for i in range(3):
        mean_state = states[i, 0].sum(0) / T  # (h,)
        seen = torch.stack([torch.cat([*latents, mean_state]) for latents in z[i]])  # (G, F)
        distance, chosen = torch.cdist(roll.z[i].flatten(1), z[i].flatten(1)).min(1)  # (K,)
        assert distance.max() < 1e-3 and len(set(chosen.tolist())) == count
        assert torch.allclose(roll.seen[i], seen[chosen], atol=1e-4)
        first = policy.value(seen).squeeze(-1).topk(best).indices
        assert chosen[:best].tolist() == first.tolist()


# --- 4. Reward and advantages ---------------------------------------------------------------------


@pytest.mark.parametrize("text, right, form", [
    (" 7 + 5 = 12 </think> 12", 1, 1),
    (" 7 </think> 2", -1, 1),
    (" 12 </think> 2", -1, 1),  # the answer counts, and not the thought
    (" 7 + 5 = 12", 1, -1),  # no form: the last number
    (" 7 </think> 12 12", 1, -1),
    (" 7 + 5 = 1", -1, -1),
    ("", -1, -1),
])  # fmt: skip
def test_rewards_on_chains(text, right, form):
    for end in (True, False):  # a text that has not ended has no form
        ours = dlr.rewards_of(chains, [Problem("", "12")], [text], torch.tensor([[end]]))
        assert [part.item() for part in ours] == [right, form if end else -1]


@pytest.mark.parametrize("text, truth, right, form", [
    (r"so \boxed{12}", "12", 1, 1),
    (r"so \boxed{12 eggs}, not 3", "12", 1, 1),
    (r"12, so \boxed{3}", "12", -1, 1),
    (r"\boxed{3} or 12", "12", -1, 1),  # an answer in the form is the only answer
    (r"\boxed{\frac{1}{2}}", "2", -1, 1),  # whose last number is 2
    (r"\boxed{(1, 5)}", "5", -1, 1),
    ("I say 12", "12", 1, -1),  # no form: the last number
    (r"12 \boxed{", "12", 1, -1),
    ("12 or 7", "12", -1, -1),
])  # fmt: skip
def test_rewards_on_gsm8k(text, truth, right, form):
    pytest.importorskip("math_verify")
    from tasks import gsm8k

    ours = dlr.rewards_of(gsm8k, [Problem("", truth)], [text], torch.tensor([[True]]))
    assert [part.item() for part in ours] == [right, form]


def test_rewards_go_to_their_problems():
    texts = [f" </think> {answer}" for answer in (5, 7, 5, 7, 7, 5)]
    ended = torch.tensor([[True, True, False], [True, False, True]])
    problems = [Problem("", "5"), Problem("", "7")]
    right, form = dlr.rewards_of(chains, problems, texts, ended)
    assert right.tolist() == [[1, -1, 1], [1, 1, -1]]
    assert form.tolist() == [[1, 1, -1], [1, -1, 1]]


def test_advantages():
    rewards = torch.tensor([[1.2, -0.8, -1.2, 0.8]])
    ours = dlr.group_advantages(rewards)
    expected = torch.tensor([[1.176696, -0.784464, -1.176696, 0.784464]])
    assert torch.allclose(ours, expected, atol=2e-6)
    assert torch.allclose(dlr.group_advantages(7 * rewards + 3), ours, atol=1e-5)
    for value in (1.2, 0.8, -0.8, -1.2):  # rounding, divided by 1e-6, would be .06
        for size in (3, 12, 16):
            assert not dlr.group_advantages(torch.full((2, size), value)).any()


# --- 5. The contrastive loss ----------------------------------------------------------------------


@pytest.mark.parametrize("z, scale, expected", [
    ([[1.0, 0.0], [0.6, 0.8], [0.0, 2.0]], 1, (0.712067 + 1.250600 + 0.103489) / 3),
    ([[1.0, 0.0], [0.0, 1.0]], 1, math.log(1 + math.exp(-1))),
    ([[1.0] * 5] * 8, 0.3, math.log(8)),
])  # fmt: skip
def test_contrastive_by_hand(z, scale, expected):
    z = torch.tensor(z)[None, :, None]  # one problem, one latent
    assert abs(dlr.contrastive(z, scale).item() - expected) < 1e-5


@pytest.mark.parametrize("d, sigma", [(32, 1.0), (512, 1.0), (512, 0.3)])
def test_contrastive_at_the_start_is_far_from_0_and_log_g(d, sigma):
    """Where the paper's scale of 1 gives exactly 0. The order in a group does not matter."""
    torch.manual_seed(0)
    z = sigma * torch.randn(1, 64, 8, d)
    scale = 1 / (sigma**2 * d)
    ours = dlr.contrastive(z, scale)
    assert 0.5 < math.log(64) - ours < 1.1
    assert torch.allclose(ours, dlr.contrastive(z.flip(1), scale))
    assert sigma * d < 512 or dlr.contrastive(z, 1.0) == 0


# --- 6. Update ------------------------------------------------------------------------------------


def test_an_update_is_the_gradient_of_the_expected_reward():
    """Of sin z, whose mean is exp(-sigma^2 / 2) sin mu

    The draws are 2,000 quantiles, so a mean over them is an integral.
    """
    policy = build(policy="prompt", latent_steps=1, latent_dim=1, contrast=0.0, kl_coef=0.0)
    quantiles = (torch.arange(2000) + 0.5) / 2000
    noise = Normal(0.0, 1.0).icdf(quantiles).view(1, 2000, 1, 1)
    pi, _ = policy(PROMPTS[:1])
    z = (pi.mean + pi.stddev * noise).detach()
    roll = dlr.Rollout(PROMPTS[:1], noise, z, torch.zeros(1, 2000, 17), None, None, None)
    rewards = z[..., 0, 0].sin()  # (1, 2000)
    ours, _ = gradients(policy, policy, (roll, rewards, rewards))
    mu, variance = pi.mean.item(), pi.variance.item()
    shrink = math.exp(-variance / 2)
    assert abs(ours["mu.bias"].item() + shrink * math.cos(mu)) < 2e-3
    assert abs(ours["log_std.bias"].item() - variance * shrink * math.sin(mu)) < 2e-3


def ppo_loss(policy, ref, batch):
    """(7) for the paper's clipped objective, one problem and one latent after the other -> parts"""
    roll, rewards, advantages = batch
    pi, pi_ref = policy(PROMPTS)[0], ref(PROMPTS)[0]
    parts = {name: [] for name in ("gain", "kl", "contrastive", "value_loss")}
    for i in range(len(PROMPTS)):
        mu, sigma = pi.mean[i, 0], pi.stddev[i, 0]  # (T, d)
        density = Independent(Normal(mu, sigma), 2)
        log_prob = density.log_prob(roll.z[i])  # (K,)
        rho = ((log_prob - log_prob.detach()) / mu.shape[-1]).exp()  # 1, with a gradient
        clipped = rho.clamp(0.8, 1.2)
        parts["gain"].append(torch.min(rho * advantages[i], clipped * advantages[i]).mean())
        ref_mu, ref_sigma = pi_ref.mean[i, 0], pi_ref.stddev[i, 0]
        kl = (ref_sigma / sigma).log() - 0.5
        kl = kl + (sigma**2 + (mu - ref_mu) ** 2) / (2 * ref_sigma**2)  # (T, d)
        parts["kl"].append(kl.sum(0).mean())
        draws = mu + sigma * roll.noise[i]  # (G, T, d)
        for z in draws.unbind(1):  # (G, d)
            scores = z @ z.T / (mu.shape[-1] * policy.args.sigma**2)
            parts["contrastive"].append(F.cross_entropy(scores, torch.arange(len(scores))))
        parts["value_loss"].append(F.mse_loss(policy.value(roll.seen[i])[:, 0], rewards[i]))
    parts = {name: torch.stack(values).mean() for name, values in parts.items()}
    args = policy.args
    loss = args.kl_coef * parts["kl"] + args.contrast * parts["contrastive"]
    return loss + parts["value_loss"] - parts["gain"], parts


@pytest.mark.parametrize("changed", [
    {}, dict(filter="prescreen", group_size=12), dict(kl_coef=0.0, contrast=0.0),
    dict(projection="identity"),
])  # fmt: skip
def test_the_whole_loss_by_hand(changed, monkeypatch):
    """Its gradient, and what is logged, where the policy is no longer pi_ref

    It is that of PPO's clipped objective. Of a pre-screened group (5) sees what is decoded, and (6)
    all of it.
    """
    policy, ref = build(**changed), build(**changed, stirred=False)
    batch = batch_of(policy)
    monkeypatch.setattr(common, "sum_over_ranks", lambda x: x.mul_(2))  # another rank, the same
    ours, metrics = gradients(policy, ref, batch)
    loss, parts = ppo_loss(policy, ref, batch)
    names, weights = zip(*policy.named_parameters(), strict=True)
    theirs = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
    assert_close(ours, dict(zip(names, theirs, strict=True)), 1e-4)
    for name in ("kl", "contrastive", "value_loss"):
        assert torch.allclose(metrics[name].mean(), parts[name], atol=1e-5)
    pi, _ = policy(PROMPTS)
    assert torch.allclose(metrics["sigma"].mean(), pi.stddev.mean())
    assert torch.allclose(metrics["mu_rms"], pi.mean.norm() / math.sqrt(pi.mean.numel()))
    assert parts["kl"] > 0.01


def test_contrastive_asks_for_a_larger_sigma():
    """And has a gradient at all: z is mu + sigma noise again, and not a constant."""
    policy = build(stirred=False, contrast=1.0, kl_coef=0.0)
    roll, rewards, _ = batch_of(policy)
    ours, _ = gradients(policy, policy, (roll, rewards, torch.zeros_like(rewards)))
    assert ours["log_std.bias"].sum() < 0 and ours["mu.bias"].abs().max() > 1e-3


def step(policy, batch, lr=1.0):
    sgd = torch.optim.SGD(policy.parameter_groups(), lr=lr)
    return dlr.update(policy, policy, sgd, *batch, policy.args)


def test_what_is_not_finite_stops_before_the_weights_change():
    policy = build()
    before = {name: weight.clone() for name, weight in policy.state_dict().items()}
    roll, rewards, advantages = batch_of(policy)
    for broken in ((rewards * math.nan, advantages), (rewards, advantages * math.nan)):
        with pytest.raises(common.UserError, match="not finite"):
            step(policy, (roll, *broken))
    for name, weight in policy.state_dict().items():
        assert torch.equal(weight, before[name])


def test_each_group_of_weights_has_a_bound_of_its_own():
    policy = build()
    roll, rewards, advantages = batch_of(policy)
    metrics = step(policy, (roll, 1e3 * rewards, 1e3 * advantages), lr=0.0)
    assert metrics["grad_norm"] > 2 and metrics["grad_norm_assistant"] > 2
    assert metrics["grad_norm"] != metrics["grad_norm_assistant"]
    for group in policy.parameter_groups():
        norm = torch.nn.utils.get_total_norm([weight.grad for weight in group["params"]])
        assert abs(norm - 1) < 1e-3


def test_rates_of_the_groups():
    """Of step 0, and of step 20 of 40, where half a cosine is at one half"""
    policy, args = build(), settings(lr=0.1, lr_assistant=0.01, steps=40, warmup=0.03)
    sgd = torch.optim.SGD(policy.parameter_groups(), lr=1.0)
    for at, share in ((0, 1 / 1.2), (20, 0.5)):  # 1.2 steps of warm-up
        dlr.set_rates(sgd, at, args)
        rates = [group["lr"] for group in sgd.param_groups]
        assert rates == pytest.approx([0.1 * share, 0.01 * share, 0.1 * share])


TWO_RANKS = """
import sys, torch
import common, test_dlr as t
common.start_ranks("cpu")
policy, ref = t.build(), t.build(stirred=False)
roll, rewards, advantages = t.batch_of(policy)
mine = torch.arange(3)[common.RANK :: 2]  # prompts 0 and 2, prompt 1
parts = [x[mine] for x in (roll.noise, roll.z, roll.seen)]
roll = t.dlr.Rollout(t.PROMPTS[common.RANK :: 2], *parts, None, None, None)
gradients, _ = t.gradients(policy, ref, (roll, rewards[mine], advantages[mine]))
torch.save(gradients, f"{sys.argv[1]}/{common.RANK}")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def torchrun(*command):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    paths = os.pathsep.join([str(HERE), str(HERE / "tests")])
    done = subprocess.run(
        [*launch, *map(str, command)], cwd=HERE, env=os.environ | {"PYTHONPATH": paths},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_two_processes_give_the_gradient_of_one(tmp_path):
    (tmp_path / "script.py").write_text(TWO_RANKS)
    torchrun(tmp_path / "script.py", tmp_path)
    policy = build()
    one, _ = gradients(policy, build(stirred=False), batch_of(policy))
    for rank in "01":
        assert_close(torch.load(tmp_path / rank, weights_only=True), one)


# --- 7. Evaluation and samples --------------------------------------------------------------------


def test_evaluation_gives_each_problem_the_latents_that_it_says(monkeypatch):
    policy, given = build(), []
    torch.nn.init.constant_(policy.log_std.bias, -2.0)

    def says(main_lm, task, problems, z, args):  # 1, and in further samples 2, 3 and 4
        given.append(z)
        texts = [f"</think> {k}" for _ in problems for k in range(1, z.shape[1] + 1)]
        return texts, torch.full(z.shape[:2], 5), torch.ones(z.shape[:2], dtype=torch.bool)

    monkeypatch.setattr(dlr, "decode", says)
    monkeypatch.setattr(policy, "project", lambda z: z)
    scores = dlr.evaluate(policy, TASK, PROBLEMS, policy.args, full=True)
    dlr.evaluate(policy, TASK, PROBLEMS, policy.args, full=True)
    assert all(torch.equal(a, b) for a, b in zip(given[:6], given[6:], strict=True))  # same noise
    again = dlr.evaluate(policy, TASK, PROBLEMS, policy.args, full=False)
    pi, _ = policy(PROMPTS)
    greedy, first, last, nothing, averaged, swapped = given[:6]  # samples: two problems, one
    noise = (torch.cat([first, last]) - pi.mean) / pi.stddev
    assert noise.shape == (3, 4, T, D)
    assert abs(noise.mean()) < 0.3 and abs(noise.std() - 1) < 0.22
    assert torch.allclose(greedy, pi.mean, atol=1e-5)
    assert torch.allclose(averaged, pi.mean.mean(0).expand_as(pi.mean), atol=1e-5)
    assert torch.allclose(swapped, pi.mean[[2, 0, 1]], atol=1e-5)
    assert nothing.shape == (3, 1, 0, D)
    expected = dict.fromkeys(["greedy", "no_latents", "averaged", "swapped"], 0.3333)
    expected |= {"form": 1.0, "length": 5.0, "sampled": 0.1667, "pass@4": 0.6667}
    assert scores == expected
    assert again == {name: expected[name] for name in ("greedy", "form", "length")}


def a_roll(z):
    length, ended = torch.tensor([[1, 2], [3, 6]]), torch.tensor([[True, True], [True, False]])
    return dlr.Rollout([], None, z, None, [" a ", "b", "c", "d"], length, ended)


def test_what_is_logged_of_a_batch():
    right = torch.tensor([[1.0, 1], [1, -1]])
    form, advantages = torch.tensor([[-1.0, -1], [1, -1]]), torch.tensor([[0.0, 0], [1, 0]])
    trained = {"kl": torch.tensor([1.0, 2.0], requires_grad=True)}
    ours = dlr.metrics_of(a_roll(None), right, form, advantages, trained)
    expected = {"reward": 0.75, "form": 0.25, "length": 3.0, "ended": 0.75}
    assert ours == expected | {"zero_advantage": 0.75, "mixed_groups": 0.5, "kl": 1.5}


def test_a_sample_is_shown_as_words():
    policy, z = build(latent_dim=12), torch.zeros(2, 2, 1, 12)
    policy.words = torch.eye(12)
    z[0, 0, 0, 7], z[0, 0, 0, 3] = 9.0, 8.0
    lines = dlr.describe(policy, a_roll(z)).split("\n    ")
    assert lines == ["latent  1  '7' 0.73  '3' 0.27", "text       'a'"]
    policy = build(projection="identity")  # the nearest by cosine, whatever the length
    z = 3 * policy.main_lm.embedding[5].expand(2, 2, 1, 16)
    assert "latent  1  '5' 1.00" in dlr.describe(policy, a_roll(z))


# --- 8. Runs --------------------------------------------------------------------------------------

QUICK = ["--steps", "3", "--prompts_per_step", "2", "--group_size", "8", "--eval_problems", "3",
         "--eval_every", "2", "--save_every", "2", "--lr", "0.1", "--lr_assistant", "0.01",
         "--max_new_tokens", "12"]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """-> folder, output, main model, problems that were taken"""
    folder, load, policies, taken = tmp_path_factory.mktemp("runs") / "run", dlr.load_policy, [], []
    problems = chains.problems

    def take(args, *where):
        taken.append(where)
        return problems(args, *where)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dlr, "load_policy", lambda *at: policies.append(load(*at)) or policies[-1])
        patch.setattr(chains, "problems", take)
        dlr.main([*QUICK, "--out", str(folder)])
    return folder, policies, taken


def weights_of(folder):
    return common.load_checkpoint(folder)["model"]


def test_the_main_model_stays_as_it_is_to_the_bit(run):
    main_lm = run[1][0].main_lm
    theirs = AutoModelForCausalLM.from_pretrained(HERE / "tasks/models/chains").state_dict()
    for name, weight in main_lm.model.state_dict().items():
        assert torch.equal(weight, theirs[name]), name
    for weight in main_lm.model.parameters():
        assert not weight.requires_grad and weight.grad is None


def test_a_run_trains_the_policy_and_not_the_reference(run):
    folder, (policy, ref), _ = run
    old, saved = ref.state_dict(), weights_of(folder)
    start = dlr.load_policy(policy.main_lm, policy.args).state_dict()
    changed = set()
    for name, weight in policy.state_dict().items():
        assert torch.equal(weight, saved[name]) and torch.equal(old[name], start[name])
        changed |= set() if torch.equal(weight, old[name]) else {name.split(".")[0]}
    assert changed == {"queries", "norm", "mu", "log_std", "value", "assistant"}  # not words
    model = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    assert all(torch.equal(saved[f"assistant.{name}"], model[name]) for name in model)


def test_a_run_leaves_a_log_and_a_result(run):
    folder, _, taken = run
    result = json.loads((folder / "result.json").read_text())
    names = "greedy form length sampled pass@8 no_latents averaged swapped".split()
    names += [f"{name}_before" for name in names]
    assert set(result) == {*names, "method", "seconds", "args"}
    assert result["method"] == "dlr"
    rows = rows_of(folder)
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[0]["kl"] == 0 < rows[1]["kl"]
    assert ["greedy" in row for row in rows] == [False, True, False]
    for row in rows:
        assert row["rollouts"] == 16
        assert row["grad_norm_assistant"] > 0
    assert taken[2:] == [("train", 0, 2), ("train", 2, 2), ("train", 4, 2)]


def test_a_step_learns_from_the_rewards_of_its_texts(tmp_path, monkeypatch):
    """Equations (3) and (4) are what update is given; the noise is new in each step."""
    right, form, noise = torch.ones(2, 8), torch.ones(2, 8), []
    right[:, :3], form[:, 2:5] = -1, -1

    def update(policy, ref, optimizer, roll, rewards, advantages, args):
        assert torch.equal(rewards, right + 0.2 * form)
        assert torch.equal(advantages, dlr.group_advantages(rewards))
        noise.append(roll.noise)
        return {}

    monkeypatch.setattr(dlr, "evaluate", lambda *_, **__: {"greedy": 0})
    monkeypatch.setattr(dlr, "rewards_of", lambda *_: (right, form))
    monkeypatch.setattr(dlr, "update", update)
    dlr.main([*QUICK, "--out", str(tmp_path / "run")])
    assert len(noise) == 3
    assert not torch.equal(noise[0], noise[1]) and not torch.equal(noise[1], noise[2])


@pytest.mark.parametrize("flags", [
    [], ["--policy", "prompt", "--projection", "identity"],
    ["--seed", "1", "--filter", "prescreen", "--share", "0.5"],
])  # fmt: skip
def test_same_seed_same_log_and_every_switch_makes_a_difference(flags, run, tmp_path):
    few = ["--eval_every", "0", "--eval_problems", "2"]  # they change no step
    few += ["--steps", "1"] if flags else []
    dlr.main([*QUICK, *few, *flags, "--out", str(tmp_path / "run")])
    ours, theirs = rows_of(tmp_path / "run"), rows_of(run[0])
    same = [row.items() <= other.items() for row, other in zip(ours, theirs)]
    assert all(same) == (not flags)
    for row in ours:
        assert row["rollouts"] == (8 if "prescreen" in flags else 16)
        assert (row["grad_norm_assistant"] == 0) == ("prompt" in flags)
    ours, theirs = (weights_of(at).get("words") for at in (tmp_path / "run", run[0]))
    assert ours is None or torch.equal(ours, theirs) == ("--seed" not in flags)  # W


def test_killed_and_resumed_is_uninterrupted_bit_for_bit(run, tmp_path, monkeypatch):
    """Killed in the last step, after the checkpoint of step 2"""
    folder, update, calls = tmp_path / "run", dlr.update, []

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return update(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(dlr, "update", killed)
        with pytest.raises(KeyboardInterrupt):
            dlr.main([*QUICK, "--out", str(folder)])
    assert common.load_checkpoint(folder)["step"] == 2
    dlr.main(["--resume", str(folder)])
    assert rows_of(folder) == rows_of(run[0])
    ours, theirs = weights_of(folder), weights_of(run[0])
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ours, theirs = (json.loads((at / "result.json").read_text()) for at in (folder, run[0]))
    assert ours["pass@8_before"] == theirs["pass@8_before"]
    assert ours["greedy"] == theirs["greedy"]


def test_under_bfloat16_the_main_model_is_stored_in_it_and_the_policy_is_not(monkeypatch, tmp_path):
    policies, load = [], dlr.load_policy
    monkeypatch.setattr(dlr, "load_policy", lambda *at: policies.append(load(*at)) or policies[-1])
    flags = ["--steps", "1", "--precision", "bfloat16", "--max_new_tokens", "2"]
    dlr.main([*QUICK, *flags, "--out", str(tmp_path / "run")])
    for weight in policies[0].main_lm.model.parameters():
        assert weight.dtype == torch.bfloat16
    assert policies[0].main_lm.embedding.dtype == torch.bfloat16
    assert all(weight.dtype == torch.float32 for weight in policies[0].parameters())
    assert rows_of(tmp_path / "run")[0]["grad_norm_assistant"] > 0


@pytest.mark.parametrize("flags, mentioned", [
    (["--filter", "prescreen", "--share", "0.05"], "--share"),
    (["--filter", "prescreen", "--share", "2"], "--share"),
    (["--assistant", "no-such-model"], "no-such-model"), (["--cue", "foo"], "--cue"),
    (["--sigma", "0"], "--sigma"), (["--ask", "?"], "--ask"),
])  # fmt: skip
def test_a_wrong_call_ends_with_one_line_and_exit_code_2(flags, mentioned, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        common.run_main(lambda: dlr.main([*flags, "--out", str(tmp_path / "run")]))
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2
    assert "error: " in error and mentioned in error
    assert "\n" not in error


@pytest.mark.slow
def test_two_processes_make_a_run(tmp_path):
    flags = [*QUICK, "--filter", "prescreen", "--share", "0.5"]
    out = torchrun("dlr.py", *flags, "--out", tmp_path / "run")
    assert out.count("step 0 ") == 1  # rank 0 speaks
    assert json.loads(out.splitlines()[-1])["greedy"] >= 0
    assert len(rows_of(tmp_path / "run")) == 3


@pytest.mark.slow
def test_the_assistant_learns_what_to_say(tmp_path, monkeypatch):
    """The first 25 steps of 100: some problems have found their note. At the end all have."""
    monkeypatch.setattr(common, "progress", lambda steps, **_: steps[:25])
    flags = ["--seed", "1", "--eval_every", "0", "--eval_problems", "64"]
    dlr.main([*flags, "--out", str(tmp_path / "run")])
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["greedy_before"] < 0.2
    assert result["no_latents"] < 0.2
    assert result["greedy"] > 0.35
    assert result["sampled"] > result["sampled_before"] + 0.15


@pytest.mark.slow
@needs_shared
def test_a_real_tokenizer_and_gsm8k(tmp_path, monkeypatch):
    """With small random models. They are never right, so every second text is called right."""
    pytest.importorskip("math_verify")
    from tasks import gsm8k

    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers/qwen2.5")
    for name, width in (("main", 48), ("assistant", 32)):
        config = Qwen2Config(vocab_size=151936, hidden_size=width, intermediate_size=64,
                             num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                             eos_token_id=151645)  # fmt: skip
        Qwen2ForCausalLM(config).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    verdicts = itertools.cycle([0.0, 1.0])
    monkeypatch.setattr(gsm8k, "verify", lambda *_: (0.0, next(verdicts)))
    flags = [*QUICK, "--latent_steps", "4", "--latent_dim", "16", "--max_new_tokens", "8"]
    flags += ["--model", str(tmp_path / "main")]
    flags += ["--assistant", str(tmp_path / "assistant")]
    flags += ["--task", str(SHARED / "data/gsm8k"), "--filter", "prescreen", "--share", "0.5"]
    dlr.main([*flags, "--out", str(tmp_path / "run")])
    for row in rows_of(tmp_path / "run"):
        assert row["reward"] == 0.5
        assert row["grad_norm"] > 0 and row["grad_norm_assistant"] > 0
