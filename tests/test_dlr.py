"""Proofs of dlr.py: every formula against something that does not share its code. In the order of dlr.py.

    pytest tests/test_dlr.py -m slow    # runs to the end, a killed one, two processes, real tokenizer and data
"""

import io
import itertools
import json
import math
import os
import subprocess
import sys
import time
from types import SimpleNamespace
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test depends on a network
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported: what tests compare is equal on a CPU only

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Independent, Normal, kl_divergence
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

import dlr
import engine as common
from engine import Problem
from test_latent_grpo import PROMPTS, assert_close, random_model
from test_latent_sft import HERE, SHARED, needs_shared, rows_of

T, D, CUE, STOP_IDS = 3, 5, [3, 4], [6, 8]  # latents, numbers per latent, token ids
PROBLEMS = [Problem(" ".join(map(str, ids)) + " <think>", str(i), "think") for i, ids in enumerate(PROMPTS)]
NUMBERS = SimpleNamespace(  # a tokenizer whose words are numbers
    chat_template=None, encode=lambda text, **_: [int(word) for word in text.replace("<think>", "3 4").split()],
    decode=lambda ids: " ".join(map(str, ids)), batch_decode=lambda rows, **_: [NUMBERS.decode(ids) for ids in rows],
)  # fmt: skip


def settings(**changed):
    """What the functions of dlr.py read of its arguments."""
    values = dict(
        policy="parallel", projection="words", latent_steps=T, latent_dim=D, sigma=0.7, filter="all", share=0.5,
        group_size=4, prompts_per_step=2, max_new_tokens=12, eval_samples=4, updates_per_batch=1, clip=0.05,
        kl_coef=0.05, contrast=0.1, micro_batch=64, data="none", device="cpu",
    )  # fmt: skip
    return SimpleNamespace(**values | changed)


def build(args, stirred=True):
    """A policy before a frozen main model. Stirred, it is no longer what it is at the start."""
    main_lm, lm = random_model(), random_model(seed=2, vocabulary=14)
    main_lm.head = main_lm.model.lm_head.weight = torch.nn.Parameter(torch.randn(12, 16))  # tied, it repeats itself
    for each in (main_lm, lm):
        each.tokenizer, each.stop_ids = NUMBERS, STOP_IDS
        each.model.requires_grad_(each is lm)
    policy = dlr.LatentPolicy(lm, main_lm, args)
    with torch.no_grad():
        for name, weight in main_lm.model.named_parameters():
            weight.mul_(5.0 if "v_proj" in name or "o_proj" in name else 1.0)  # what it says depends on what it sees
        for weight in [*policy.mu.parameters(), *policy.log_std.parameters()] if stirred else []:
            weight.add_(0.1 * torch.randn(weight.shape))
    return policy


def roll_out(policy):
    """-> rollout of the three problems; rewards and advantages of both signs, (P, K) each"""
    generator = torch.Generator().manual_seed(0)
    roll = dlr.rollout(policy, PROBLEMS, policy.args, generator)
    return roll, *torch.randn(2, *roll.z.shape[:2], generator=generator)


def update(policy, ref, batch, lr=0.0, bound=lambda *_: torch.ones(())):
    """dlr.update without a bound on norms -> gradients of its last pass by name, metrics"""
    heads = [policy.queries, *policy.norm.parameters(), *policy.mu.parameters(), *policy.log_std.parameters()]
    groups = heads, policy.assistant.parameters(), policy.value.parameters()
    adamw = torch.optim.AdamW([{"params": group} for group in groups], lr=lr, weight_decay=0)
    with mock.patch("torch.nn.utils.clip_grad_norm_", bound):
        metrics = dlr.update(policy, ref, adamw, *batch, policy.args)
    return {name: weight.grad.clone() for name, weight in policy.named_parameters()}, metrics


# --- 2. to 4. The latent policy, the rollout, rewards and advantages --------------------------------------------------


def test_states_are_the_assistants_own_at_the_queries_and_depend_on_the_prompt_alone_or_on_none(monkeypatch):
    """Against transformers' model on [E(prompt); queries], one by one. One for all does not reach the assistant."""
    policy = build(settings())
    mu, log_std, states = policy(PROMPTS)
    assert mu.shape == log_std.shape == (3, 1, T, D) and (mu[0] - mu[1]).abs().max() > 0.01
    for i, prompt in enumerate(PROMPTS):
        embeds = torch.cat([policy.lm.table[torch.tensor(prompt)], policy.queries])[None]
        theirs = policy.assistant(inputs_embeds=embeds, output_hidden_states=True).hidden_states[-1][0, -T:]
        theirs = F.layer_norm(theirs, (16,), policy.norm.weight, policy.norm.bias)
        for ours, expected in ((states, theirs), (mu, policy.mu(theirs)), (log_std, policy.log_std(theirs))):
            assert torch.allclose(ours[i, 0], expected, atol=1e-4)
    monkeypatch.setattr(common.LanguageModel, "autocast", lambda self: torch.autocast("cpu", torch.bfloat16))
    assert all(each.dtype == torch.float32 for each in policy(PROMPTS))  # densities are float32 on a GPU too
    policy = build(settings(policy="prompt"))
    mu, (ours, _) = policy(PROMPTS)[0], update(policy, None, roll_out(policy))
    assert torch.equal(mu, mu[:1].expand_as(mu)) and (mu[0, 0, 0] - mu[0, 0, 1]).abs().max() > 0.01
    assert {name.split(".")[0] for name in ours if ours[name].any()} == {"queries", "norm", "mu", "log_std"}


def test_the_policy_at_the_start():
    """Noise of the size that was asked for, everywhere, and far larger than the mean; W with rows of one norm."""
    policy = build(settings(), stirred=False)
    mu, log_std, _ = policy(PROMPTS)
    assert torch.allclose(log_std.exp(), torch.tensor(0.7)) and mu.square().mean().sqrt() < 0.2 * 0.7
    assert torch.allclose(policy.words.norm(dim=-1), torch.tensor(1.4 * math.sqrt(2 * math.log(12))))
    assert 0.7 < policy.queries.std() / policy.lm.table.std() < 1.3
    for bias, bound in ((50.0, 1.0), (-50.0, -4.0)):
        torch.nn.init.constant_(policy.log_std.bias, bias)
        assert torch.allclose(policy(PROMPTS)[1], torch.tensor(math.log(0.7) + bound))


def test_a_latent_is_a_mixture_of_a_few_words_of_the_main_model():
    """The sum over words, written out; in more rows than are made at a time. As few, whatever the vocabulary."""
    policy = build(settings())
    z = torch.randn(300, 2, T, D, generator=torch.Generator().manual_seed(0))
    weights = torch.einsum("...d,vd->...v", z, policy.words).exp()
    expected = torch.einsum("...v,vd->...d", weights / weights.sum(-1, keepdim=True), policy.main_lm.table)
    assert torch.allclose(policy.project(z), expected, atol=1e-5)
    for vocabulary, d in ((70, 32), (20_000, 128)):
        main_lm = SimpleNamespace(table=torch.randn(vocabulary, 4))  # of another width than the assistant
        policy = dlr.LatentPolicy(random_model(), main_lm, settings(latent_dim=d))
        assert 1.3 < (1 / policy.mixture(torch.randn(400, d)).square().sum(-1)).median() < 6
        assert policy.project(policy(PROMPTS)[0]).shape == (3, 1, T, 4) and policy.value(torch.ones(T * d + 16)).any()
    policy = build(settings(projection="identity"))  # a number of z is one of the embedding, in its size
    z, table = torch.randn(500, 16), policy.main_lm.table
    assert policy(PROMPTS)[0].shape == (3, 1, T, 16) and torch.allclose(policy.project(z) / z, table.norm() / 192**0.5)


def test_decoding_is_generate():
    """Row by row: prompts of different lengths, K thoughts each, rows that end early, and what the cap cuts."""
    policy, how = build(settings()), dict(max_new_tokens=12, do_sample=False, eos_token_id=STOP_IDS, pad_token_id=0)
    main_lm, z = policy.main_lm, torch.randn(3, 8, T, D, generator=torch.Generator().manual_seed(0))
    def generate(prompt, thought):
        embeds = torch.cat([main_lm.table[torch.tensor(prompt)], thought, main_lm.table[torch.tensor(CUE)]])[None]
        return main_lm.model.generate(inputs_embeds=embeds, **how)[0].tolist()
    thoughts = policy.project(3 * z)
    texts, length, ended = dlr.decode(main_lm, PROBLEMS, thoughts, settings())
    assert length.unique().numel() > 3 and ended.any() and not ended.all() and len(set(texts[:8])) > 1
    for text, (i, k) in zip(texts, itertools.product(range(3), range(8)), strict=True):
        theirs = generate(PROMPTS[i], thoughts[i, k])
        assert text == NUMBERS.decode(theirs) and length[i, k] == len(theirs)  # the end token counts
        assert ended[i, k] == (theirs[-1] in STOP_IDS) and (ended[i, k] or len(theirs) == 12)
    bare, *_ = dlr.decode(main_lm, PROBLEMS, policy.project(z[:, :1, :0]), settings())  # the main model alone
    assert bare == [NUMBERS.decode(generate(prompt, thoughts[0, 0, :0])) for prompt in PROMPTS]


def test_latents_stand_between_question_and_cue():
    spell = SimpleNamespace(chat_template=None, encode=lambda text, **_: [*text.encode()], decode=bytes)
    (prompt,), cue = dlr.encode(spell, [Problem("How many?", "2")])
    assert bytes(prompt + cue).decode() == f"How many?\n{dlr.FORMAT}\n<think>"
    tokenizer = AutoTokenizer.from_pretrained(HERE / "tasks/models/chains")
    for template, prompt in ((None, " 17 + 5 ?"), (" hm {{ messages[0]['content'] }} so", " hm 17 + 5 ? so")):
        tokenizer.chat_template = template
        prompts, cue = dlr.encode(tokenizer, [Problem(" 17 + 5 ? <think>", "22", "think")] * 2)
        assert [tokenizer.decode(ids) for ids in (*prompts, cue)] == [prompt, prompt, " <think>"]


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
    args.group_size, ranks = 12, guesses[0, :12].argsort(descending=True).tolist()  # of two, the second is drawn
    assert {dlr.prescreen(guesses[:1, :12], args, generator)[0, 1].item() for _ in range(200)} == {*ranks[1:]}


@pytest.mark.parametrize("how, decoded, best", [("all", 12, 0), ("prescreen", 6, 4)])
def test_what_is_decoded_and_learnt_from_is_mean_plus_sigma_noise_of_the_chosen(how, decoded, best, monkeypatch):
    policy, written, decode = build(settings(filter=how, group_size=12)), [], dlr.decode
    monkeypatch.setattr(dlr, "decode", lambda *given: written.append(given[2]) or decode(*given))
    (roll, *_), (mu, log_std, states) = roll_out(policy), policy(PROMPTS)
    z = mu + log_std.exp() * roll.noise  # (P, G, T, d)
    assert torch.equal(roll.noise, torch.randn(3, 12, T, D, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(written[0], policy.project(roll.z)) and roll.z.shape[:2] == roll.ended.shape == (3, decoded)
    for i in range(3):
        seen = torch.stack([torch.cat([*latents, states[i, 0].sum(0) / T]) for latents in z[i]])  # (G, F)
        distance, chosen = torch.cdist(roll.z[i].flatten(1), z[i].flatten(1)).min(1)  # (K,)
        assert distance.max() < 1e-3 and torch.allclose(roll.seen[i], seen[chosen], atol=1e-4)
        assert chosen[:best].tolist() == policy.value(seen).squeeze(-1).topk(best).indices.tolist()


@pytest.mark.parametrize("form, reward, texts", [
    ("think", 1.2, [" 7 + 5 = 12 </think> 12"]), ("think", -0.8, [" 7 </think> 2", " 12 </think> 2"]),
    ("think", 0.8, [" 7 + 5 = 12", " 7 </think> 12 12", " 7 </think> </think> 12", " <think> 7 </think> 12"]),
    ("think", -1.2, [" 7 + 5 = 1", ""]), ("boxed", -1.2, ["no idea", "12 or 7", "12 or \\boxed{3}"]),
    ("boxed", 1.2, ["a</think> <answer>12.0</answer>", "\na < b\n</think>\n<answer>\n$12 or so\n</answer>\n"]),
    ("boxed", -0.8, ["a</think><answer>7</answer>", "12</think><answer>7 m</answer>"]),  # it counts, not the thought
    ("boxed", 0.8, ["I say \\boxed{12}", "7 or 12", "<answer>12</answer>a</think>", "a<answer>12</answer>",
                    "a</think>b</think><answer>12</answer>", "<think>a</think><answer>12</answer>",
                    "a</think><answer>7</answer><answer>12</answer>", "a</think><answer>12", "a</think>12</answer>",
                    "a</think>.<answer>12</answer>", "a</think><answer>12</answer>.", "12</think><answer> </answer>"]),
])  # fmt: skip
def test_rewards(form, reward, texts):
    """The last ones: no tags, swapped, left out, twice, unclosed, something around them, a blank answer."""
    for text, end in itertools.product(texts, (True, False)):  # a text that has not ended has no form
        correct, in_form = dlr.score([text], torch.tensor([[end]]), [Problem("", "12", form)])
        expected = reward > 0, end and reward in (1.2, -0.8)
        assert (correct.item() > 0, in_form.item() > 0) == expected and abs(correct) == abs(in_form) == 1, text


def test_rewards_go_to_their_problems_and_become_advantages():
    texts = [f"a</think><answer>{answer}</answer>" for answer in ("$5", "1,234.0", "5", "1234", "$1,234", "5.0")]
    ended = torch.tensor([[True, True, False], [True, False, True]])
    correct, form = dlr.score(texts, ended, [Problem("", "5"), Problem("", "1234")])
    assert correct.tolist() == [[1, -1, 1], [1, 1, -1]] and form.tolist() == [[1, 1, -1], [1, -1, 1]]
    assert dlr.score(["a</think><answer> x </answer>"], ended[:1, :1], [Problem("", "x")])[0] == 1  # not a number
    ours = dlr.group_advantages(torch.tensor([[1.2, -0.8, -1.2, 0.8]]))
    assert torch.allclose(ours, torch.tensor([[1.176696, -0.784464, -1.176696, 0.784464]]), atol=2e-6)
    assert torch.allclose(dlr.group_advantages(correct * 7 + 3), dlr.group_advantages(correct), atol=1e-5)
    for value in (1.2, 0.8, -0.8, -1.2):  # the rounding of a mean, divided by 1e-6, would be an advantage of .06
        assert all((dlr.group_advantages(torch.full((2, size), value)) == 0).all() for size in (3, 12, 16))


# --- 5. and 6. Densities, the contrastive loss, and the update --------------------------------------------------------


def test_worked_numbers():
    z, mu = torch.tensor([[0.5, -1.0], [0.0, 2.0]]), torch.tensor([[0.0, -1.0], [1.0, 1.0]])
    log_std, zero = torch.tensor([[1.0, 0.5], [2.0, 1.0]]).log(), torch.zeros(2, 2)
    assert abs(dlr.log_density(z, mu, log_std) + 4.425754) < 1e-5
    assert abs(dlr.gaussian_kl(mu, log_std, zero, zero) - 2.625) < 1e-5
    three = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 2.0]])  # .712067, 1.250600 and .103489, so .688719
    cases = (three, 1, 0.688719), (torch.eye(2), 1, math.log(1 + math.exp(-1))), (torch.ones(8, 5), 0.3, math.log(8))
    assert all(abs(dlr.contrastive(z[None, :, None], scale).item() - value) < 1e-5 for z, scale, value in cases)
    for ratio, advantage, value in ((1.5, 1.0, 1.2), (1.5, -1.0, -1.5), (0.5, 1.0, 0.5), (0.5, -1.0, -0.8)):
        log_ratio = torch.tensor([[math.log(ratio), 100.0, -100.0]]).requires_grad_()  # at +-100 nothing explodes
        gain, clipped = dlr.clipped_objective(log_ratio, torch.tensor([[advantage]]), 0.2)
        assert abs(gain[0, 0] - value) < 1e-6 and clipped[0, 0] == (value in (1.2, -0.8))
        assert gain.abs().max() < 149 and torch.autograd.grad(gain.sum(), log_ratio)[0].isfinite().all()


def test_contrastive():
    """At the start far from 0 and log G, where the paper's scale of 1 gives exactly 0; whatever the order in a group.
    On draws it has no gradient, and through mean + sigma noise it asks for a larger sigma."""
    for d, sigma in ((32, 1.0), (512, 1.0), (512, 0.3)):
        z = sigma * torch.randn(1, 64, 8, d, generator=torch.Generator().manual_seed(0))
        ours, other = (dlr.contrastive(each, 1 / (sigma**2 * d)) for each in (z, z.flip(1)))
        assert torch.allclose(ours, other) and 0.5 < math.log(64) - ours < 1.1
        assert sigma * d < 512 or dlr.contrastive(z, 1.0) == 0
    policy = build(settings(), stirred=False)
    (roll, *_), (mu, log_std, _) = roll_out(policy), policy(PROMPTS)
    apart = dlr.contrastive(mu + log_std.exp() * roll.noise, 1.0).sum()
    slopes = torch.autograd.grad(apart, [policy.log_std.bias, policy.mu.bias])
    assert not roll.z.requires_grad and slopes[0].sum() < 0 and slopes[1].abs().max() > 1e-3


def test_an_update_is_the_gradient_of_the_expected_reward():
    """Of sin z, whose mean is exp(-sigma^2 / 2) sin mu. The draws are 2,000 quantiles, so a mean is an integral."""
    policy = build(settings(policy="prompt", latent_steps=1, latent_dim=1, contrast=0.0))
    noise = Normal(0.0, 1.0).icdf((torch.arange(2000) + 0.5) / 2000).view(1, 2000, 1, 1)
    mu, log_std, _ = policy(PROMPTS[:1])
    z = (mu + log_std.exp() * noise).detach()
    ours, _ = update(policy, None, (dlr.Rollout(PROMPTS[:1], noise, z, *[None] * 4), None, z[..., 0, 0].sin()))
    mu, variance = mu.item(), log_std.exp().item() ** 2
    assert abs(ours["mu.bias"].item() + math.exp(-variance / 2) * math.cos(mu)) < 2e-3
    assert abs(ours["log_std.bias"].item() - variance * math.exp(-variance / 2) * math.sin(mu)) < 2e-3


def distribution(policy):
    mu, log_std, _ = policy(PROMPTS)
    return Independent(Normal(mu[:, 0], log_std[:, 0].exp()), 2)


def by_hand(policy, ref, batch, old):
    """(5) to (7) and the value head's loss, with torch's distributions -> their sum, and the parts"""
    (roll, rewards, advantages), pi, args = batch, distribution(policy), policy.args
    ratios = ((pi.log_prob(roll.z.transpose(0, 1)).T - old) / D).exp()  # (P, K)
    gain = torch.min(ratios * advantages, ratios.clamp(1 - args.clip, 1 + args.clip) * advantages).mean()
    kl = kl_divergence(pi, distribution(ref)).mean() / D if ref else torch.zeros(())
    draws = pi.mean + pi.stddev * roll.noise.transpose(0, 1)  # (G, P, T, d)
    scores = [z @ z.T / (D * args.sigma**2) for of_prompt in draws.unbind(1) for z in of_prompt.unbind(1)]
    apart = torch.stack([F.cross_entropy(each, torch.arange(len(each))) for each in scores]).mean()
    value_loss = F.mse_loss(policy.value(roll.seen)[..., 0], rewards) * (args.filter == "prescreen")
    parts = {"kl": kl, "contrastive": apart, "value_loss": value_loss, "sigma": pi.stddev.mean()}
    return -gain + args.kl_coef * kl + args.contrast * apart + value_loss, parts


@pytest.mark.parametrize("other", [{}, dict(filter="prescreen", group_size=12, micro_batch=2), dict(micro_batch=1),
                                   dict(kl_coef=0.0, contrast=0.0)])  # fmt: skip
def test_the_whole_loss_by_hand(other, monkeypatch):
    """Its gradient in the second of two passes, at a policy that has moved away from the one that drew and from pi_ref;
    however it is cut. Of a pre-screened group what is decoded is in (5), and all of it in (6)."""
    moved, policy = build(settings(**other)), build(settings(**other, updates_per_batch=2))
    ref = build(moved.args, stirred=False) if moved.args.kl_coef else None
    batch, ratios, original = roll_out(policy), [], dlr.clipped_objective
    old = distribution(policy).log_prob(batch[0].z.transpose(0, 1)).T.detach()
    monkeypatch.setattr(dlr, "clipped_objective", lambda ratio, *rest: ratios.append(ratio) or original(ratio, *rest))
    monkeypatch.setattr(common, "all_reduce", lambda x: x.mul_(2))  # as if another rank did the same: no difference
    _, first = update(moved, ref, batch, lr=0.02)
    assert all((ratio == 0).all() for ratio in ratios)  # exactly: nothing has moved yet
    ours, both = update(policy, ref, batch, lr=0.02)
    loss, parts = by_hand(moved, ref, batch, old)
    theirs = torch.autograd.grad(loss, list(moved.parameters()), allow_unused=True, materialize_grads=True)
    assert_close(ours, dict(zip(ours, theirs, strict=True)), 1e-4)
    _, second = update(moved, ref, batch)
    assert 0.1 < both["clipped"] < 0.5 and first["clipped"] == second["clipped"] == 0  # old is of the first pass
    assert abs(second["mu_rms"] - distribution(moved).mean.square().mean().sqrt()) < 1e-5
    for name, value in parts.items():  # metrics are means over passes
        assert abs(second[name] - value) < 1e-5 and abs(both[name] - (first[name] + second[name]) / 2) < 1e-5


def test_what_is_not_finite_stops_before_the_weights_change_and_norms_are_bounded_by_group():
    policy, bound = build(settings(filter="prescreen", group_size=12)), torch.nn.utils.clip_grad_norm_
    roll, rewards, advantages = roll_out(policy)
    for broken in ((rewards * math.nan, advantages), (rewards, advantages * math.nan)):  # of the value head, of others
        with pytest.raises(common.UserError, match="not finite"):
            update(policy, None, (roll, *broken), 1.0, bound)
    assert all(map(torch.equal, policy.state_dict().values(), build(policy.args).state_dict().values()))
    ours, _ = update(policy, None, (roll, 1e3 * rewards, 1e3 * advantages), bound=bound)
    for group in ("assistant.", "value.", ("queries", "norm.", "mu.", "log_std.")):
        assert abs(torch.nn.utils.get_total_norm([g for name, g in ours.items() if name.startswith(group)]) - 1) < 1e-3


# --- 7. and 8. Evaluation and runs ------------------------------------------------------------------------------------


def test_evaluation_gives_each_problem_the_latents_that_it_says(monkeypatch):
    policy, given = build(settings()), []
    torch.nn.init.constant_(policy.log_std.bias, -2.0)
    def decode(main_lm, problems, z, args):  # it says 1, and of further samples 2, 3 and 4
        given.append(z)
        texts = [f"</think> {k}" for _ in problems for k in range(1, z.shape[1] + 1)]
        return texts, torch.full(z.shape[:2], 5), torch.ones(z.shape[:2], dtype=torch.bool)
    monkeypatch.setattr(dlr, "decode", decode)
    monkeypatch.setattr(policy, "project", lambda z: z)
    random_state = torch.get_rng_state()
    scores, (mu, log_std, _) = dlr.evaluate(policy, PROBLEMS, policy.args, full=True), policy(PROMPTS)
    assert torch.equal(random_state, torch.get_rng_state())
    greedy, first, last, averaged, swapped, nothing = given  # samples of two problems, and of one
    noise = (torch.cat([first, last]) - mu) / log_std.exp()
    assert noise.shape == (3, 4, T, D) and abs(noise.mean()) < 0.3 and abs(noise.std() - 1) < 0.22
    assert torch.allclose(greedy, mu, atol=1e-5) and torch.allclose(averaged, mu.mean(0).expand_as(mu), atol=1e-5)
    assert torch.allclose(swapped, mu[[2, 0, 1]], atol=1e-5) and nothing.shape == (3, 1, 0, D)
    expected = dict.fromkeys(["greedy", "averaged", "swapped", "no_latents"], 0.3333)
    assert scores == expected | {"form": 1.0, "length": 5.0, "sampled": 0.1667, "pass@4": 0.6667}


def test_what_is_logged_and_shown_of_a_batch():
    policy, z = build(settings(latent_dim=12)), torch.zeros(2, 2, 1, 12)
    policy.words, z[1, 0, 0, 7], z[1, 0, 0, 3] = torch.eye(12), 9.0, 8.0
    length, ended = torch.tensor([[1, 2], [3, 6]]), torch.tensor([[True, True], [True, False]])
    roll = dlr.Rollout([], None, z, None, ["a", "b", " c ", "d"], length, ended)
    correct, form, advantages = torch.tensor([[[1.0, 1], [1, -1]], [[-1, -1], [1, -1]], [[0, 0], [1, 0]]])
    expected = {"reward": 0.75, "form": 0.25, "length": 3.0, "ended": 0.75, "zero_advantage": 0.75, "mixed_groups": 0.5}
    assert dlr.measure(roll, correct, form, advantages) == {"rollouts": 4} | expected
    lines = dlr.describe(policy, roll, PROBLEMS, correct + 0.2 * form, advantages).split("\n    ")
    assert lines == ["8 <think>", "latent  1  '7' 0.73  '3' 0.27", "text       'c'", "reward 1.2, the answer is 1"]
    policy, roll.z = build(settings(projection="identity")), random_model().table[5].expand(2, 2, 1, 16)  # by cosine
    assert "latent  1  '5' 1.00" in dlr.describe(policy, roll, PROBLEMS, correct, advantages)


QUICK = ["--steps", "2", "--prompts_per_step", "2", "--group_size", "8", "--eval_problems", "8", "--eval_samples", "2",
         "--eval_every", "1", "--save_every", "1", "--lr", "0.1", "--lr_assistant", "0.01"]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """-> folder, output, what was loaded, which problems were taken"""
    folder, loaded, load = tmp_path_factory.mktemp("runs") / "run", [], dlr.load
    with mock.patch.object(dlr, "load", lambda args: loaded.append(load(args)) or loaded[-1]), \
         mock.patch.object(common, "take_problems", wraps=common.take_problems) as take, \
         mock.patch("sys.stdout", io.StringIO()) as out:  # fmt: skip
        dlr.main([*QUICK, "--out", str(folder)])
    return folder, out.getvalue(), loaded[0], [call.args[1:] for call in take.call_args_list]


def test_a_run_leaves_a_log_a_result_and_a_model_and_the_main_model_as_it_was(run):
    folder, out, (main_lm, policy, ref, optimizer), taken = run
    result, rows = json.loads(out.splitlines()[-1]), rows_of(folder)
    names = "greedy form length sampled pass@2 averaged swapped no_latents right_note".split()
    assert common.load_checkpoint(folder)["before"] == {name: result[f"{name}_before"] for name in names}
    names += [*(f"{name}_before" for name in names), *"method model seed steps seconds main_unchanged".split()]
    assert set(result) == set(names) and result["method"] == "dlr" and result["main_unchanged"] is True
    assert result["right_note"] > 0.8 and result["no_latents"] < 0.3  # how far the main model can be steered
    assert "? <think>\n    latent  1  ' " in out and "\n    text       '" in out
    assert [row["step"] for row in rows] == [0, 1] and rows[0]["kl"] == 0 < rows[1]["kl"] and "greedy" in rows[1]
    assert taken == [("train", 0, 1), ("test", 0, 8), ("train", 0, 2), ("train", 2, 2)]
    assert all(map(torch.equal, main_lm.model.parameters(), common.load_model(policy.args).model.parameters()))
    assert all(weight.requires_grad and weight.grad is None for weight in main_lm.model.parameters())  # for autocast
    assert {id(w) for x in optimizer.param_groups for w in x["params"]} == {id(w) for w in policy.parameters()}
    new, old, saved = policy.state_dict(), ref.state_dict(), AutoModelForCausalLM.from_pretrained(folder / "model")
    changed = {name.split(".")[0] for name in new if not torch.equal(new[name], old[name])}
    assert changed == {"queries", "norm", "mu", "log_std", "assistant"}
    assert all(torch.equal(new[f"assistant.{name}"], weight) for name, weight in saved.state_dict().items())


def test_what_a_step_learns_from_and_how_fast(tmp_path):
    """Rewards and advantages of texts; learning rates of steps 0 and 1 of 40, where warm-up takes 1.2."""
    correct, form, noise, rates = torch.ones(2, 8), torch.ones(2, 8), [], []
    correct[:, :3], form[:, 2:5] = -1, -1
    def update(policy, ref, optimizer, roll, rewards, advantages, args):
        assert torch.equal(rewards, correct + 0.2 * form) and torch.equal(advantages, dlr.group_advantages(rewards))
        noise.append(roll.noise), rates.append([group["lr"] for group in optimizer.param_groups])
        return {}
    with mock.patch.multiple(dlr, evaluate=lambda *_, **__: {}, score=lambda *_: (correct, form), update=update), \
         mock.patch.object(common, "progress", lambda steps, **_: steps[:2]):  # fmt: skip
        dlr.main([*QUICK, "--steps", "40", "--eval_every", "0", "--out", str(tmp_path / "run")])
    expected = [[peak * share for peak in (0.1, 0.01, 0.1)] for share in (1 / 1.2, (1 + math.cos(math.pi / 40)) / 2)]
    assert not torch.equal(*noise) and torch.allclose(torch.tensor(rates), torch.tensor(expected), rtol=1e-4)


@pytest.mark.parametrize("flags", [
    [], ["--seed", "1"], ["--kl_coef", "0"], ["--policy", "prompt", "--projection", "identity"],
    ["--filter", "prescreen", "--share", "0.5", "--updates_per_batch", "2"],
])  # fmt: skip
def test_same_seed_same_log_with_evaluations_or_without_and_every_switch_makes_a_difference(flags, run, tmp_path):
    dlr.main([*QUICK, "--eval_every", "0", "--eval_problems", "2", *flags, "--out", str(tmp_path / "run")])
    ours, theirs = rows_of(tmp_path / "run"), rows_of(run[0])
    assert all(row.items() <= other.items() for row, other in zip(ours, theirs, strict=True)) == (not flags)
    assert all(row["rollouts"] == (8 if "prescreen" in flags else 16) and row["grad_norm"] > 0 for row in ours)
    assert all((row["grad_norm_assistant"] == 0) == ("prompt" in flags) for row in ours)
    ours, theirs = (common.load_checkpoint(folder)["model"].get("words") for folder in (tmp_path / "run", run[0]))
    assert ours is None if "identity" in flags else torch.equal(ours, theirs) == ("--seed" not in flags)  # W, fixed


@pytest.mark.parametrize("flags, mentioned", [
    (["--filter", "prescreen", "--share", "0.05", "--group_size", "16"], "--share"), (["--group_size", "1"], "--group"),
    (["--filter", "prescreen", "--share", "2"], "--share"), (["--assistant", "no-such-model"], "no-such-model"),
    (["--sigma", "0"], "--sigma"), (["--data", "nowhere"], "nowhere/train.jsonl"), (["--resume", "nowhere"], "nowhere"),
])  # fmt: skip
def test_a_wrong_call_ends_with_one_line_and_exit_code_2(flags, mentioned, capsys):
    with pytest.raises(SystemExit) as stop:
        common.run_main(lambda: dlr.main(flags))
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "error: " in error and "\n" not in error and mentioned in error


def test_a_main_model_of_which_one_bit_has_changed_is_refused(run, tmp_path, monkeypatch):
    def change(policy, *_):
        policy.main_lm.table.data.view(torch.int32)[5, 5] += 1
        return {}
    change(SimpleNamespace(main_lm=(lm := common.load_model(dlr.parse_args([])))))
    lm.model.save_pretrained(tmp_path / "main"), lm.tokenizer.save_pretrained(tmp_path / "main")
    monkeypatch.setattr(dlr, "update", change)
    for flags in (["--resume", str(run[0]), "--model", str(tmp_path / "main")], ["--out", str(tmp_path / "run")]):
        with pytest.raises(common.UserError, match="main model"):  # at the start; and at the end, after two changes
            dlr.main([*QUICK, *flags])


@pytest.mark.slow
def test_killed_and_resumed_is_uninterrupted_bit_for_bit(run, tmp_path):
    command, log = [sys.executable, "dlr.py", *QUICK, "--out", str(tmp_path / "run")], tmp_path / "run/log.jsonl"
    process = subprocess.Popen(command, cwd=HERE, stdout=subprocess.DEVNULL)
    while process.poll() is None and (not log.exists() or log.stat().st_size == 0):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -9
    dlr.main(["--resume", str(tmp_path / "run")])
    assert rows_of(tmp_path / "run") == rows_of(run[0])
    ours, theirs = (common.load_checkpoint(folder)["model"].values() for folder in (tmp_path / "run", run[0]))
    assert all(map(torch.equal, ours, theirs))


@pytest.mark.slow
def test_two_processes_make_a_run(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "dlr.py"]
    command += [*QUICK, "--filter", "prescreen", "--share", "0.5", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.strip().splitlines()[-1])["main_unchanged"] and len(rows_of(tmp_path / "run")) == 2


@pytest.mark.slow
def test_the_assistant_learns_to_say_the_right_word(tmp_path, capsys):
    """The default run ends at 1.000 with every seed, after 30 to 60 steps; one message for all is right for half."""
    dlr.main(["--eval_every", "0", "--out", str(tmp_path / "run")])
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert result["greedy_before"] < 0.2 and result["greedy"] > 0.8 and result["right_note"] > 0.95
    assert max(result["averaged"], result["swapped"]) < result["greedy"] - 0.2 and result["no_latents"] < 0.2


@pytest.mark.slow
@needs_shared
def test_a_real_tokenizer_and_gsm8k(tmp_path, capsys, monkeypatch):
    """With small random models. These are never right and never in form, so every second text is called right."""
    tokenizer, verdicts = AutoTokenizer.from_pretrained(SHARED / "tokenizers/qwen2.5"), itertools.cycle([0.0, 1.0])
    (prompt,), cue = dlr.encode(tokenizer, [Problem("Why?", "2")])
    assert tokenizer.decode(prompt + cue).endswith(f"\nWhy?\n{dlr.FORMAT}<|im_end|>\n<|im_start|>assistant\n<think>")
    for name, width in (("main", 48), ("assistant", 32)):
        config = Qwen2Config(vocab_size=151936, hidden_size=width, intermediate_size=64, num_hidden_layers=2,
                             num_attention_heads=4, num_key_value_heads=2, eos_token_id=151645)  # fmt: skip
        Qwen2ForCausalLM(config).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    monkeypatch.setattr(common, "verify", lambda text, problem: (0.0, next(verdicts)))
    dlr.main([*QUICK, "--model", str(tmp_path / "main"), "--assistant", str(tmp_path / "assistant"), "--data",
              str(SHARED / "data/gsm8k"), "--max_new_tokens", "12", "--filter", "prescreen", "--share",
              "0.5", "--out", str(tmp_path / "run")])  # fmt: skip
    rows = rows_of(tmp_path / "run")
    assert all(row["grad_norm"] * row["grad_norm_assistant"] > 0 and row["reward"] == 0.5 for row in rows)
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1])["main_unchanged"]
