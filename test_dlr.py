"""Proofs of dlr.py: every formula against something that does not share its code. In the order of dlr.py.

    pytest test_dlr.py            # a third of a minute
    pytest test_dlr.py -m slow    # runs to the end, a killed one, two processes, real tokenizer and data
"""

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test depends on a network
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported: what tests compare is equal on a CPU only

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Independent, Normal, kl_divergence
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

import common
import dlr
from common import Problem

HERE = Path(__file__).parent
SHARED = HERE.parent / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the Qwen2.5 tokenizer and data in ../shared")
T, D = 3, 5  # latents, and numbers per latent
PROMPTS = [[5, 6, 7], [8], [3, 4, 5, 6, 9, 10]]  # of different lengths
PROBLEMS = [Problem(" ".join(map(str, ids)) + " <think>", str(i), "think") for i, ids in enumerate(PROMPTS)]
CUE, STOP_IDS = [3, 4], [1, 4]
NUMBERS = SimpleNamespace(  # a tokenizer whose words are numbers
    chat_template=None, encode=lambda text, **_: [int(word) for word in text.replace("<think>", "3 4").split()],
    decode=lambda ids: " ".join(map(str, ids)), batch_decode=lambda rows, **_: [" ".join(map(str, ids)) for ids in rows],
)  # fmt: skip


def settings(**changed):
    """What the functions of dlr.py read of its arguments."""
    values = dict(
        policy="parallel", projection="words", latent_steps=T, latent_dim=D, sigma=0.7, filter="all", share=0.5,
        group_size=4, prompts_per_step=3, max_new_tokens=12, eval_samples=4, updates_per_batch=1, clip=0.2,
        kl_coef=0.05, contrast=0.1, micro_batch=64, data="none", device="cpu",
    )  # fmt: skip
    return SimpleNamespace(**values | changed)


def random_model(seed, width, vocabulary):
    """A small random Qwen2 whose attention depends on what is seen -> lm"""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, eos_token_id=STOP_IDS,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(8.0 if "q_proj" in name or "k_proj" in name or "embed" in name else 1.0)
    return common.LanguageModel(model, NUMBERS, model.model.embed_tokens.weight, model.lm_head.weight, STOP_IDS)


def build(args, stirred=True):
    """A policy before a frozen main model of another size. Stirred, it is no longer what it is at the start."""
    main_lm, lm = random_model(7, 16, 12), random_model(2, 24, 14)
    main_lm.model.requires_grad_(False)
    torch.manual_seed(0)
    policy = dlr.LatentPolicy(lm, main_lm, args)
    with torch.no_grad():
        for weight in [*policy.mu.parameters(), *policy.log_std.parameters()] if stirred else []:
            weight.add_(0.1 * torch.randn(weight.shape))
    return policy


def roll_out(policy, args, seed=0):
    return dlr.rollout(policy, PROBLEMS, args, torch.Generator().manual_seed(seed))


def some(roll, seed=0):
    """(P, K), of both signs"""
    return torch.randn(roll.z.shape[:2], generator=torch.Generator().manual_seed(seed))


def optimizer_of(policy, lr, kind=torch.optim.SGD, **options):
    heads = [policy.queries, *policy.norm.parameters(), *policy.mu.parameters(), *policy.log_std.parameters()]
    groups = heads, policy.assistant.parameters(), policy.value.parameters()
    return kind([{"params": group} for group in groups], lr=lr, **options)


def gradients(policy, roll, advantages, args, ref=None, rewards=None, lr=0.0):
    """What dlr.update computes before norms are bounded, in its last pass -> gradients by name, metrics"""
    bound, torch.nn.utils.clip_grad_norm_ = torch.nn.utils.clip_grad_norm_, lambda *_: torch.ones(())
    try:
        metrics = dlr.update(policy, ref, optimizer_of(policy, lr), roll, rewards, advantages, args)
    finally:
        torch.nn.utils.clip_grad_norm_ = bound
    return {name: weight.grad.clone() for name, weight in policy.named_parameters()}, metrics


def gradients_of(loss, policy):
    names, weights = zip(*policy.named_parameters(), strict=True)
    found = zip(names, weights, torch.autograd.grad(loss, weights, allow_unused=True), strict=True)
    return {name: torch.zeros_like(weight) if grad is None else grad for name, weight, grad in found}


def assert_close(ours, theirs, tolerance=2e-5):
    scale = max(gradient.abs().max() for gradient in theirs.values())
    assert scale > 0 and ours.keys() == theirs.keys()
    for name in theirs:
        assert (ours[name] - theirs[name]).abs().max() <= tolerance * scale, name


def changed_weights(policy, before):
    return {name for name, weight in policy.state_dict().items() if not torch.equal(weight, before[name])}


# --- 2. The latent policy ---------------------------------------------------------------------------------------------


def test_states_are_the_assistants_own_at_the_queries_and_depend_on_the_prompt_alone():
    """Together and padded, against transformers' model on [E(prompt); queries], one by one."""
    policy = build(settings())
    mu, log_std, states = policy(PROMPTS)
    assert mu.shape == log_std.shape == (3, 1, T, D) and (mu[0] - mu[1]).abs().max() > 0.01
    for i, prompt in enumerate(PROMPTS):
        embeds = torch.cat([policy.lm.table[torch.tensor(prompt)], policy.queries])[None]
        theirs = policy.assistant(inputs_embeds=embeds, output_hidden_states=True).hidden_states[-1][0, -T:]
        theirs = F.layer_norm(theirs, (24,), policy.norm.weight, policy.norm.bias)
        assert torch.allclose(states[i, 0], theirs, atol=1e-4)
        assert torch.allclose(mu[i, 0], theirs @ policy.mu.weight.T + policy.mu.bias, atol=1e-4)
        assert torch.allclose(log_std[i, 0], theirs @ policy.log_std.weight.T + policy.log_std.bias, atol=1e-4)


def test_one_prompt_for_all_problems_does_not_see_them_nor_train_the_assistant():
    args = settings(policy="prompt")
    policy = build(args)
    mu, before = policy(PROMPTS)[0], {name: weight.clone() for name, weight in policy.state_dict().items()}
    assert torch.equal(mu, mu[:1].expand_as(mu)) and (mu[0, 0, 0] - mu[0, 0, 1]).abs().max() > 0.01
    roll = roll_out(policy, args)
    dlr.update(policy, None, optimizer_of(policy, 1e-2, torch.optim.AdamW, weight_decay=0), roll, None, some(roll), args)
    heads = ("queries", "norm.", "mu.", "log_std.")
    assert changed_weights(policy, before) == {name for name in before if name.startswith(heads)}


def test_the_policy_at_the_start():
    """Noise of the size that was asked for, everywhere, and far larger than the mean; W with rows of one norm."""
    policy = build(settings(sigma=0.7), stirred=False)
    mu, log_std, _ = policy(PROMPTS)
    assert torch.allclose(log_std.exp(), torch.tensor(0.7)) and mu.square().mean().sqrt() < 0.2 * 0.7
    assert torch.allclose(policy.words.norm(dim=-1), torch.tensor(1.4 * math.sqrt(2 * math.log(12))))
    assert 0.8 < policy.queries.std() / policy.lm.table.std() < 1.2
    for bias, bound in ((50.0, 1.0), (-50.0, -4.0)):
        torch.nn.init.constant_(policy.log_std.bias, bias)
        assert torch.allclose(policy(PROMPTS)[1], torch.tensor(math.log(0.7) + bound))


def test_draws_are_mean_plus_sigma_noise():
    args = settings(group_size=64)
    policy = build(args)
    roll, (mu, log_std, _) = roll_out(policy, args), policy(PROMPTS)
    assert torch.allclose((roll.z - mu) / log_std.exp(), roll.noise, atol=1e-4) and not roll.z.requires_grad
    assert abs(roll.noise.mean()) < 4 / math.sqrt(2880) and abs(roll.noise.std() - 1) < 4 / math.sqrt(2 * 2880)
    assert len(roll.noise.unique()) > 2800 and not torch.equal(roll.noise, roll_out(policy, args, seed=1).noise)


def test_a_latent_is_a_mixture_of_the_main_models_words():
    """The sum over words, written out; in more rows than are made at a time."""
    policy = build(settings())
    z = torch.randn(300, 2, T, D, generator=torch.Generator().manual_seed(0))
    weights = torch.einsum("...d,vd->...v", z, policy.words).exp()
    weights = weights / weights.sum(-1, keepdim=True)
    assert torch.allclose(policy.project(z), torch.einsum("...v,vd->...d", weights, policy.main_lm.table), atol=1e-5)
    policy = build(settings(projection="identity"))  # a number of z is one of the embedding, in its size
    z, table = torch.randn(500, 16), policy.main_lm.table
    assert policy(PROMPTS)[0].shape == (3, 1, T, 16) and torch.allclose(policy.project(z) / z, table.norm() / 192**0.5)


@pytest.mark.parametrize("vocabulary, d", [(70, 32), (20_000, 128)])
def test_a_draw_mixes_a_few_words_whatever_the_vocabulary(vocabulary, d):
    torch.manual_seed(0)
    main_lm = SimpleNamespace(table=torch.randn(vocabulary, 4))
    policy = dlr.LatentPolicy(random_model(2, 24, 14), main_lm, settings(latent_dim=d))
    effective = 1 / policy.mixture(torch.randn(400, d)).square().sum(-1)
    assert 1.3 < effective.median() < 6


# --- 3. Rollout -------------------------------------------------------------------------------------------------------


def test_decoding_is_generate():
    """Row by row: prompts of different lengths, K thoughts each, rows that end early, and what the cap cuts."""
    args, generator = settings(), torch.Generator().manual_seed(0)
    policy = build(args)
    thoughts = policy.project(3 * torch.randn(3, 8, T, D, generator=generator))
    main_lm = policy.main_lm

    def generate(prompt, thought):
        embeds = torch.cat([main_lm.table[torch.tensor(prompt)], thought, main_lm.table[torch.tensor(CUE)]])[None]
        out = main_lm.model.generate(inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2]), pad_token_id=0,
                                     max_new_tokens=12, do_sample=False)  # fmt: skip
        return out[0].tolist()

    texts, length, ended = dlr.decode(main_lm, PROBLEMS, thoughts, args)
    assert length.unique().numel() > 3 and ended.any() and not ended.all()
    for n, text in enumerate(texts):
        i, k = divmod(n, 8)
        theirs = generate(PROMPTS[i], thoughts[i, k])
        assert text == NUMBERS.decode(theirs) and length[i, k] == len(theirs)  # the end token counts
        assert ended[i, k] == (theirs[-1] in STOP_IDS) and (ended[i, k] or len(theirs) == 12)
    assert len(set(texts[:8])) > 1  # latents matter
    bare, *_ = dlr.decode(main_lm, PROBLEMS, policy.project(torch.zeros(3, 1, 0, D)), args)  # the main model alone
    assert bare == [NUMBERS.decode(generate(prompt, thoughts[0, 0, :0])) for prompt in PROMPTS]


def test_latents_stand_between_question_and_cue():
    tokenizer = AutoTokenizer.from_pretrained(HERE / "tiny")
    for template, prompt in ((None, " 17 + 5 ?"), ("hm {{ messages[0]['content'] }} so", "hm 17 + 5 ? so")):
        tokenizer.chat_template = template and f" {template}"
        prompts, cue = dlr.encode(tokenizer, [Problem(" 17 + 5 ? <think>", "22", "think")] * 2)
        assert [tokenizer.decode(ids).strip() for ids in (*prompts, cue)] == [prompt.strip()] * 2 + ["<think>"]


@needs_shared
def test_a_prompt_of_gsm8k():
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers/qwen2.5")
    prompts, cue = dlr.encode(tokenizer, [Problem("How many eggs?", "2"), Problem("How many hens?", "3")])
    for what, prompt in zip(("eggs", "hens"), prompts, strict=True):
        text = tokenizer.decode(prompt + cue)
        end = f"How many {what}?\n{dlr.FORMAT}<|im_end|>\n<|im_start|>assistant\n<think>"
        assert text.endswith(f"<|im_start|>user\n{end}") and "boxed" not in text


def test_a_prescreen_decodes_the_9_best_and_3_others_of_64():
    args, drawn = settings(filter="prescreen", share=0.18, group_size=64), []
    guesses, generator = torch.rand(3, 64, generator=torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
    for _ in range(200):
        for row, guess in zip(dlr.prescreen(guesses, args, generator).tolist(), guesses, strict=True):
            ranks = guess.argsort(descending=True).tolist()
            assert len(row) == len(set(row)) == 12 and row[:9] == ranks[:9]
            drawn += [ranks.index(i) for i in row[9:]]
    counts, expected = torch.tensor(drawn).bincount(minlength=64), 1800 / 55
    assert (counts[:9] == 0).all() and ((counts[9:] - expected) ** 2 / expected).sum() < 91.9  # 54 degrees of freedom


def test_what_is_decoded_and_learnt_from_is_what_was_chosen(monkeypatch):
    written, decode = [], dlr.decode
    monkeypatch.setattr(dlr, "decode", lambda *given: written.append(given[2]) or decode(*given))
    args = settings(filter="prescreen", group_size=12)
    policy = build(args)
    roll, (mu, log_std, states) = roll_out(policy, args), policy(PROMPTS)
    z = mu + log_std.exp() * roll.noise  # (P, G, T, d)
    assert roll.noise.shape == (3, 12, T, D) and roll.z.shape == (3, 6, T, D) and len(roll.texts) == 18
    assert torch.equal(written[0], policy.project(roll.z)) and roll.ended.shape == roll.length.shape == (3, 6)
    for i in range(3):
        seen = torch.stack([torch.cat([*latents, states[i, 0].sum(0) / T]) for latents in z[i]])  # (G, F)
        distance = torch.cdist(roll.z[i].flatten(1), z[i].flatten(1))  # (K, G)
        chosen = distance.argmin(1)
        assert distance.amin(1).max() < 1e-3 and torch.allclose(roll.seen[i], seen[chosen], atol=1e-4)
        assert chosen[:4].tolist() == policy.value(seen).squeeze(-1).topk(4).indices.tolist()


# --- 4. Reward and advantages -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form, text, reward", [
    ("think", " 7 + 5 = 12 </think> 12", 1.2), ("think", " 7 + 5 = 12", 0.8), ("think", " 7 </think> 2", -0.8),
    ("think", " 7 + 5 = 1", -1.2), ("think", " 7 </think> 12 12", 0.8), ("think", " 7 </think> </think> 12", 0.8),
    ("think", " <think> 7 </think> 12", 0.8), ("think", " 12 </think> ", 0.8), ("think", " 12 </think> 2", -0.8),
    ("boxed", "a</think> <answer>12.0</answer>", 1.2), ("boxed", "I say \\boxed{12}", 0.8), ("boxed", "12 or 7", -1.2),
    ("boxed", "a</think><answer>7</answer>", -0.8), ("boxed", "\na < b\n</think>\n<answer>\n$12\n</answer>\n", 1.2),
    ("boxed", "a</think>b</think><answer>12</answer>", 0.8), ("boxed", "<think>a</think><answer>12</answer>", 0.8),
    ("boxed", "a</think><answer>7</answer><answer>12</answer>", 0.8), ("boxed", "<answer>12</answer>a</think>", 0.8),
    ("boxed", "a</think><answer><answer>12</answer>", 0.8), ("boxed", "a<answer>12</answer>", 0.8),
    ("boxed", "a</think><answer>12", 0.8), ("boxed", "a</think>12</answer>", 0.8), ("boxed", "7 or 12", 0.8),
    ("boxed", "a</think><answer> </answer>", -1.2), ("boxed", "12</think><answer>\n</answer>", 0.8),  # blank
    ("boxed", "a</think> so <answer>12</answer>", 0.8), ("boxed", "a</think><answer>12</answer>.", 0.8),
    ("boxed", "12</think><answer>7</answer>", -0.8), ("boxed", "12 or \\boxed{3}", -1.2),
])  # fmt: skip
def test_rewards(form, text, reward):
    """Right or wrong, in form or not: tags twice, swapped, unclosed, blank; the answer counts and not the thought."""
    for end in (True, False):  # a text that has not ended has no form
        correct, in_form = dlr.score([text], torch.tensor([[end]]), [Problem("", "12", form)])
        assert correct.item() == (1 if reward > 0 else -1)
        assert in_form.item() == (1 if end and reward in (1.2, -0.8) else -1)


def test_rewards_go_to_their_problems():
    texts = [f"a</think><answer>{answer}</answer>" for answer in ("$5", "1,234.0", "5", "1234", "$1,234", "5.0")]
    ended = torch.tensor([[True, True, False], [True, False, True]])
    correct, form = dlr.score(texts, ended, [Problem("", "5"), Problem("", "1234")])
    assert correct.tolist() == [[1, -1, 1], [1, 1, -1]] and form.tolist() == [[1, 1, -1], [1, -1, 1]]


def test_advantages():
    ours = dlr.group_advantages(torch.tensor([[1.2, -0.8, -1.2, 0.8]]))
    assert torch.allclose(ours, torch.tensor([[1.176696, -0.784464, -1.176696, 0.784464]]), atol=2e-6)
    rewards = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    ours = dlr.group_advantages(rewards)
    assert torch.allclose(dlr.group_advantages(rewards * 7 + 3), ours, atol=1e-4) and ours.sum(1).abs().max() < 1e-5
    for value in (1.2, 0.8, -0.8, -1.2):  # the rounding of a mean, divided by 1e-6, would be an advantage of .06
        assert all((dlr.group_advantages(torch.full((2, size), value)) == 0).all() for size in (3, 12, 16))


# --- 5. Densities and the contrastive loss ----------------------------------------------------------------------------


def test_density_and_kl_are_torchs():
    z, mu = torch.tensor([[0.5, -1.0], [0.0, 2.0]]), torch.tensor([[0.0, -1.0], [1.0, 1.0]])
    log_std, zero = torch.tensor([[1.0, 0.5], [2.0, 1.0]]).log(), torch.zeros(2, 2)
    assert abs(dlr.log_density(z, mu, log_std) + 4.425754) < 1e-5
    assert abs(dlr.gaussian_kl(mu, log_std, zero, zero) - 2.625) < 1e-5
    z, mu, log_std, ref_mu, ref_log_std = torch.randn(5, 6, T, D, generator=torch.Generator().manual_seed(0)).unbind()
    ours, ref = (Independent(Normal(m, s.exp()), 2) for m, s in ((mu, log_std), (ref_mu, ref_log_std)))
    assert torch.allclose(dlr.log_density(z, mu, log_std), ours.log_prob(z), rtol=1e-4)
    assert torch.allclose(dlr.gaussian_kl(mu, log_std, ref_mu, ref_log_std), kl_divergence(ours, ref), rtol=1e-4)
    assert (dlr.gaussian_kl(mu, log_std, mu, log_std) == 0).all()


def test_contrastive_numbers():
    """By hand, and for random groups step by step; whatever the order in a group."""
    three = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 2.0]])
    each = F.cross_entropy(three @ three.T, torch.arange(3), reduction="none")
    assert torch.allclose(each, torch.tensor([0.712067, 1.250600, 0.103489]), atol=1e-6)
    assert abs(dlr.contrastive(three[None, :, None], 1.0).item() - 0.688719) < 1e-6
    assert abs(dlr.contrastive(torch.eye(2)[None, :, None], 1.0).item() - math.log(1 + math.exp(-1))) < 1e-6
    assert abs(dlr.contrastive(torch.ones(1, 8, T, D), 0.3).item() - math.log(8)) < 1e-5
    z = torch.randn(2, 6, T, D, generator=torch.Generator().manual_seed(0))
    losses = [[F.cross_entropy(0.3 * group[:, t] @ group[:, t].T, torch.arange(6)) for t in range(T)] for group in z]
    for order in ([0, 1, 2, 3, 4, 5], [3, 1, 5, 0, 2, 4]):
        assert torch.allclose(dlr.contrastive(z[:, order], 0.3), torch.tensor(losses).mean(1), atol=1e-5)


def test_contrastive_is_not_saturated_at_the_start_and_reaches_mean_and_sigma_but_not_draws():
    for d, sigma in ((32, 1.0), (512, 1.0), (512, 0.3)):
        z = sigma * torch.randn(1, 64, 8, d, generator=torch.Generator().manual_seed(0))
        assert 0.5 < math.log(64) - dlr.contrastive(z, 1 / (sigma**2 * d)) < 1.1
        assert sigma * d < 512 or dlr.contrastive(z, 1.0) == 0  # with the paper's scale it is exactly 0
    policy = build(settings())
    roll, (mu, log_std, _) = roll_out(policy, settings()), policy(PROMPTS)
    assert not dlr.contrastive(roll.z, 1.0).requires_grad
    apart = dlr.contrastive(mu + log_std.exp() * roll.noise, 1.0).sum()
    slopes = torch.autograd.grad(apart, [policy.log_std.bias, policy.mu.bias])
    assert slopes[0].sum() < 0 and slopes[1].abs().max() > 1e-3  # a larger sigma lowers it


# --- 6. Update --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio, advantage, value", [(1.5, 1, 1.2), (1.5, -1, -1.5), (0.5, 1, 0.5), (0.5, -1, -0.8)])
def test_clip(ratio, advantage, value):
    gain, clipped = dlr.clipped_objective(torch.tensor([[ratio]]).log(), torch.tensor([[float(advantage)]]), 0.2)
    assert abs(gain.item() - value) < 1e-6 and clipped.item() == (value in (1.2, -0.8))
    shift = torch.tensor([[100.0, -100.0]]).requires_grad_()
    gain, _ = dlr.clipped_objective(shift, torch.tensor([[float(advantage)]]), 0.2)
    assert gain.abs().max() < 149 and torch.autograd.grad(gain.sum(), shift)[0].isfinite().all()


def test_an_update_is_the_gradient_of_the_expected_reward():
    """Of sin z, whose mean is exp(-sigma^2 / 2) sin mu. The draws are 2,000 quantiles, so a mean is an integral."""
    args = settings(policy="prompt", latent_steps=1, latent_dim=1, contrast=0.0)
    policy = build(args)
    noise = Normal(0.0, 1.0).icdf((torch.arange(2000) + 0.5) / 2000).view(1, 2000, 1, 1)
    mu, log_std, _ = policy(PROMPTS[:1])
    z = (mu + log_std.exp() * noise).detach()
    ours, _ = gradients(policy, dlr.Rollout(PROMPTS[:1], noise, z, *[None] * 4), z[..., 0, 0].sin(), args)
    mu, variance = mu.item(), log_std.exp().item() ** 2
    assert abs(ours["mu.bias"].item() + math.exp(-variance / 2) * math.cos(mu)) < 2e-3
    assert abs(ours["log_std.bias"].item() - variance * math.exp(-variance / 2) * math.sin(mu)) < 2e-3


def distributions(policy):
    return [Independent(Normal(mu[:, 0], log_std[:, 0].exp()), 2) for mu, log_std, _ in [policy(PROMPTS)]][0]


def log_probs(policy, roll):
    return distributions(policy).log_prob(roll.z.transpose(0, 1)).T  # (P, K)


def loss_by_hand(policy, ref, roll, advantages, old, args):
    """(5) to (7) -> loss, KL, contrastive"""
    pi, gains = distributions(policy), []
    for new, before, advantage in zip(log_probs(policy, roll).flatten(), old.flatten(), advantages.flatten(), strict=True):
        ratio = ((new - before) / D).exp()
        gains.append(torch.min(ratio * advantage, ratio.clamp(1 - args.clip, 1 + args.clip) * advantage))
    kl = kl_divergence(pi, distributions(ref)).mean() / D
    draws = pi.mean + pi.stddev * roll.noise.transpose(0, 1)  # (G, P, T, d)
    own = torch.arange(len(draws))
    cases = [draws[:, i, t] for i in range(3) for t in range(T)]
    apart = sum(F.cross_entropy(z @ z.T / (D * args.sigma**2), own) for z in cases) / len(cases)
    return -sum(gains) / len(gains) + args.kl_coef * kl + args.contrast * apart, kl, apart


@pytest.mark.parametrize("changed", [{}, dict(filter="prescreen", group_size=12), dict(micro_batch=2)])
def test_the_whole_loss_by_hand(changed):
    """Its gradient in the second pass, at a policy that has moved away from the one that drew and from pi_ref. Of a
    pre-screened group what is decoded is in (5), and all of it in (6)."""
    once, twice = (settings(updates_per_batch=n, clip=0.05, **changed) for n in (1, 2))
    moved, policy, ref = build(once), build(twice), build(once, stirred=False).requires_grad_(False)
    roll = roll_out(policy, once)
    advantages, old = some(roll), log_probs(policy, roll).detach()
    _, first = gradients(moved, roll, advantages, once, ref, advantages, lr=0.5)
    ours, both = gradients(policy, roll, advantages, twice, ref, advantages, lr=0.5)
    loss, *parts = loss_by_hand(moved, ref, roll, advantages, old, once)
    theirs = gradients_of(loss, moved)
    assert_close(*({name: each[name] for name in each if "value" not in name} for each in (ours, theirs)))
    _, second = gradients(moved, roll, advantages, once, ref, advantages)
    assert first["clipped"] == second["clipped"] == 0 and both["clipped"] > 0.1  # the old policy is the first pass's
    pi = distributions(moved)
    expected = [*parts, pi.stddev.mean(), pi.mean.square().mean().sqrt()]
    for name, value in zip(("kl", "contrastive", "sigma", "mu_rms"), expected, strict=True):
        assert abs(second[name] - value) < 1e-5 and value > 0
        assert name == "mu_rms" or abs(both[name] - (first[name] + second[name]) / 2) < 1e-5  # means over passes


def test_the_first_pass_has_ratio_1_and_is_the_policy_gradient(monkeypatch):
    """Without KL and contrast, that of -mean(A log pi) / d."""
    args, ratios, original = settings(contrast=0.0, kl_coef=0.0), [], dlr.clipped_objective
    monkeypatch.setattr(dlr, "clipped_objective", lambda ratio, *rest: ratios.append(ratio) or original(ratio, *rest))
    policy = build(args)
    roll = roll_out(policy, args)
    ours, _ = gradients(policy, roll, some(roll), args)
    assert_close(ours, gradients_of(-(some(roll) * log_probs(policy, roll)).mean() / D, policy))
    args.updates_per_batch, args.micro_batch = 2, 2
    gradients(policy, roll, some(roll), args, lr=0.1)
    assert [len(ratio) for ratio in ratios] == [3, 2, 1, 2, 1]
    assert all((ratio == 0).all() for ratio in ratios[:3]) and all((ratio != 0).any() for ratio in ratios[3:])


def test_cutting_into_micro_batches_or_ranks_changes_nothing(monkeypatch):
    args = settings(filter="prescreen", group_size=12)
    policy, ref = build(args), build(args, stirred=False)
    roll = roll_out(policy, args)
    advantages, rewards = some(roll), some(roll, 1)
    whole, metrics = gradients(policy, roll, advantages, args, ref, rewards)
    for args.micro_batch in (1, 2):
        cut, theirs = gradients(policy, roll, advantages, args, ref, rewards)
        assert_close(cut, whole)
        assert all(abs(theirs[name] - metrics[name]) < 1e-4 for name in metrics)
    monkeypatch.setattr(common, "all_reduce", lambda x: torch.tensor(3.0) if x.dim() == 0 else x)  # P of all ranks
    shares = []
    for part in (slice(1), slice(1, 3)):
        mine = dlr.Rollout(*(each[part] for each in (roll.prompts, roll.noise, roll.z, roll.seen)), *[None] * 3)
        shares.append(gradients(policy, mine, advantages[part], args, ref, rewards[part])[0])
    assert_close({name: shares[0][name] + shares[1][name] for name in whole}, whole)


def test_the_value_head_learns_rewards_and_its_loss_moves_nothing_else():
    args = settings(filter="prescreen", group_size=12, contrast=0.0)
    policy = build(args)
    roll = roll_out(policy, args)
    rewards, nothing = some(roll), torch.zeros(3, 6)
    ours, metrics = gradients(policy, roll, nothing, args, None, rewards)
    error = F.mse_loss(policy.value(roll.seen).squeeze(-1), rewards)
    assert_close(ours, gradients_of(error, policy))
    assert abs(metrics["value_loss"] - error.item()) < 1e-5
    before = {name: weight.clone() for name, weight in policy.state_dict().items()}
    adamw = optimizer_of(policy, 1e-2, torch.optim.AdamW, weight_decay=0)
    errors = [dlr.update(policy, None, adamw, roll, rewards, nothing, args)["value_loss"] for _ in range(60)]
    assert errors[-1] < 0.1 * errors[0]
    assert changed_weights(policy, before) == {name for name in before if name.startswith("value.")}


def test_norms_are_bounded_per_group_and_what_is_not_finite_stops_before_the_weights_change():
    args = settings(filter="prescreen", group_size=12)
    policy = build(args)
    roll, sgd = roll_out(policy, args), optimizer_of(policy, 1.0)
    before, large = {name: weight.clone() for name, weight in policy.state_dict().items()}, 1e3 * some(roll)
    for where in range(2):  # of the assistant and its heads; of the value head alone
        broken = [some(roll), some(roll)]
        broken[where][0, 0] = math.nan
        with pytest.raises(common.UserError, match="not finite"):
            dlr.update(policy, None, sgd, roll, *broken, args)
    assert not changed_weights(policy, before)
    ours, _ = gradients(policy, roll, large, args, None, large)
    metrics = dlr.update(policy, None, sgd, roll, large, large, args)
    norms = [torch.cat([w.grad.flatten() for w in group["params"]]).norm() for group in sgd.param_groups]
    assert torch.allclose(torch.stack(norms), torch.ones(3), atol=1e-3)
    of_assistant = torch.cat([grad.flatten() for name, grad in ours.items() if "assistant" in name]).norm()
    assert abs(metrics["grad_norm_assistant"] / of_assistant - 1) < 1e-4 and metrics["grad_norm"] > 1


def test_bfloat16_compute_as_on_a_gpu(monkeypatch):
    """On the CPU, in a GPU's place: rollout and update under autocast, latents, weights and gradients float32."""
    args = settings()
    policy = build(args)
    roll = roll_out(policy, args)
    plain, _ = gradients(policy, roll, some(roll), args)
    monkeypatch.setattr(common.LanguageModel, "autocast", lambda self: torch.autocast("cpu", torch.bfloat16))
    assert roll_out(policy, args).z.dtype == torch.float32 == policy(PROMPTS)[0].dtype
    coarse, _ = gradients(policy, roll, some(roll), args)
    a, b = (torch.cat([gradient.flatten() for gradient in each.values()]) for each in (plain, coarse))
    assert b.dtype == torch.float32 and not torch.equal(a, b) and F.cosine_similarity(a, b, dim=0) > 0.98
