"""Proofs of dlr.py: every formula against something that does not share its code.

    pytest test_dlr.py                      # the formulas and short runs, less than a minute
    pytest test_dlr.py -m slow              # two minutes: learning, processes, interrupts, controls, real data
    pytest test_dlr.py -k contrastive       # one subject

In the order of dlr.py: the policy and the projection, decoding, rewards and the filter, densities and losses, the
update, evaluation, the warm-up, and runs of the script.
"""

import copy
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
from safetensors.torch import load_file, save_file
from torch.distributions import Independent, Normal, kl_divergence
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

import dlr
import engine
import tiny
from engine import SLOT

HERE = Path(__file__).parent
SHARED = HERE.parent / "shared"
PAD, STOP = 0, 1
T, D = 3, 5  # latents, and numbers per latent
ASKED = [[5, 6, 7] + [SLOT] * T, [8] + [SLOT] * T, [3, 4, 5, 6, 9, 10] + [SLOT] * T]  # of different lengths
PROMPTS = [prompt + [4, 5] for prompt in ASKED]


def settings(**changed):
    """The fields of dlr.py's arguments that its functions read."""
    values = dict(
        latent_steps=T, latent_dim=D, policy="parallel", projection="words", starts=1, sigma=0.7, filter="all",
        share=0.18, screen="top", screen_sees="latents", explore=0.25, imitate=0.1, format_weight=0.2, group_size=4,
        prompts_per_step=3,
        max_new_tokens=8, updates_per_batch=1, clip=0.2, norm="dim", kl_coef=0.01, contrast=0.1, lr=1e-3,
        lr_assistant=1e-3, lr_value=1e-3, sft_lr=1e-3, sft_batch=3, weight_decay=0.0, grad_clip=1e9, micro_batch=64,
        gradient_checkpointing=False, device="cpu", eval_samples=2, max_prompt_tokens=99, warmup=0, steps=10,
    )  # fmt: skip
    return SimpleNamespace(**values | changed)


def random_model(vocabulary=12, seed=0, width=16, scale=6.0):
    """A small random Qwen2 whose attention depends on who is seen from how far -> lm"""
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocabulary, hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=False, eos_token_id=STOP,
        )  # no pad token: transformers would set its embedding to 0
    ).eval()  # fmt: skip
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(scale)
        for name, weight in model.named_parameters():
            weight.mul_(8.0 if any(x in name for x in ("q_proj", "k_proj", "v_proj", "o_proj")) else 1.0)
    tokenizer = SimpleNamespace(batch_decode=lambda rows, **_: [str(row) for row in rows])
    return engine.LanguageModel(model, tokenizer, [STOP], PAD)


def build(args, seed=0):
    """-> frozen main model, policy, projection"""
    main = random_model(seed=7)
    main.model.requires_grad_(False)
    assistant = random_model(seed=2, width=24)
    torch.manual_seed(seed)
    return main, dlr.LatentPolicy(assistant, main, args), dlr.Projection(main, args)


def roll(policy, args, seed=0, rewards=None):
    """A batch of the three prompts whose rewards are random, or as given."""
    generator = torch.Generator().manual_seed(seed)
    eps = dlr.noise(len(ASKED), args.group_size, args, generator)
    with torch.no_grad():
        z, _, _, h = policy.sample(ASKED, eps)
    chosen, seen = torch.arange(args.group_size).expand(len(ASKED), -1), z.new_zeros(*z.shape[:2], 0)
    if args.filter == "prescreen":
        seen = dlr.evidence(None, None, PROMPTS, z, h, args)
        chosen = dlr.prescreen(policy.value(seen)[..., 0], torch.rand(eps.shape[:2], generator=generator), args)
    if rewards is None:
        rewards = torch.randint(2, chosen.shape, generator=generator) * 2.0 - 1
    rewarded = rewards, dlr.group_advantages(rewards), dlr.at(seen, chosen), [None] * len(ASKED)
    return dlr.Batch(ASKED, PROMPTS, eps, z, chosen, *rewarded)


def update(main, policy, projection, batch, args, optimizer=None, reference=None):
    optimizer = optimizer or torch.optim.SGD(groups_of(policy, projection), lr=0.0)
    reference = reference or copy.deepcopy(policy).requires_grad_(False)
    metrics = dlr.update(main, policy, projection, reference, optimizer, batch, args)
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in policy.named_parameters()}, metrics


def groups_of(policy, projection):
    return [{"params": group["params"]} for group in dlr.make_optimizer(policy, projection, policy.args).param_groups]


def assert_close_gradients(ours, theirs, tolerance=1e-5):
    scale = max(g.abs().max() for g in theirs.values())
    assert scale > 0 and ours.keys() == theirs.keys()
    for name in theirs:
        assert (ours[name] - theirs[name]).abs().max() <= tolerance * scale, name


# ----------------------------------------------------------------------------------------------------------------------
# 3. The policy and the projection.


@pytest.mark.parametrize("kind", ["parallel", "autoregressive"])
def test_latents_of_a_prompt_depend_on_it_alone(kind):
    """Not on padding, on neighbours in the batch or on their number."""
    args = settings(policy=kind, starts=2)
    _, policy, _ = build(args)
    eps = dlr.noise(3, 4, args, torch.Generator().manual_seed(0))
    together = policy.sample(ASKED, eps)
    for i, prompt in enumerate(ASKED):
        for ours, alone in zip(together, policy.sample([prompt], eps[i : i + 1]), strict=True):
            torch.testing.assert_close(ours[i], alone[0], atol=1e-5, rtol=1e-5)
    assert (together[1][0] - together[1][1]).abs().max() > 1e-3  # and it does depend on the prompt


def test_states_are_the_assistants_own_at_the_queries():
    """Against the plain model of transformers on [E(prompt); queries]."""
    args = settings()
    _, policy, _ = build(args)
    for i, prompt in enumerate(ASKED):
        words = policy.lm.table[torch.tensor(prompt[:-T])]
        embeds = torch.cat([words, policy.queries[0]])[None]
        theirs = policy.assistant.base_model(inputs_embeds=embeds).last_hidden_state[0, -T:]
        torch.testing.assert_close(policy.states(ASKED, 2, None)[i, 1], theirs, atol=1e-5, rtol=1e-5)


def test_trajectories_take_starts_in_turn():
    args = settings(starts=3, group_size=7)
    _, policy, _ = build(args)
    mu = policy(ASKED, 7)[0]
    for i, j in itertools.product(range(7), repeat=2):
        assert torch.equal(mu[:, i], mu[:, j]) == (i % 3 == j % 3)


def test_autoregressive_latents_depend_on_earlier_ones_only():
    args = settings(policy="autoregressive")
    _, policy, _ = build(args)
    z = torch.randn(3, 2, T, D, generator=torch.Generator().manual_seed(0))
    mu = policy(ASKED, 2, z)[0]
    for t in range(T):
        changed = z.clone()
        changed[:, :, t] += 1
        other = policy(ASKED, 2, changed)[0]
        torch.testing.assert_close(other[:, :, : t + 1], mu[:, :, : t + 1])
        assert t == T - 1 or ((other - mu)[:, :, t + 1].abs().amax((1, 2)) > 1e-5).all()


@pytest.mark.parametrize("kind", ["parallel", "autoregressive", "prompt"])
def test_a_draw_is_mean_plus_sigma_eps_of_the_policy_that_scores_it(kind):
    """Teacher-forced on its own draw, the policy gives the noise back; and reparameterised, the draw, to the bit."""
    args = settings(policy=kind)
    _, policy, _ = build(args)
    eps = dlr.noise(3, 4, args, torch.Generator().manual_seed(0))
    z, *_ = policy.sample(ASKED, eps)
    mu, log_std, _ = policy(ASKED, 4, z)
    torch.testing.assert_close((z - mu) / log_std.exp(), eps, atol=1e-5, rtol=1e-5)
    if kind != "autoregressive":
        assert torch.equal(mu + log_std.exp() * eps, z)
    assert torch.equal(policy.sample(ASKED, eps * 0)[0], policy(ASKED, 4, policy.sample(ASKED, eps * 0)[0])[0])


def test_one_prompt_for_all_problems_does_not_see_them():
    _, policy, _ = build(settings(policy="prompt"))
    mu = policy(ASKED, 2)[0]
    assert torch.equal(mu[0], mu[1]) and torch.equal(mu[0], mu[2])
    assert (mu[0, 0, 0] - mu[0, 0, 1]).abs().max() > 0  # its latents differ from each other


def test_sigma_at_the_start_and_its_bounds():
    _, policy, _ = build(settings(sigma=0.7))
    log_std = policy(ASKED, 2)[1]
    torch.testing.assert_close(log_std.exp(), torch.full_like(log_std, 0.7))
    for bias, bound in ((50.0, 1.0), (-50.0, -4.0)):
        torch.nn.init.constant_(policy.log_std.bias, bias)
        assert (policy(ASKED, 2)[1] == math.log(0.7) + bound).all()


def test_words_are_mixed_and_never_left():
    """A latent is a convex combination of the table's rows: against the sum, written out."""
    args = settings()
    main, _, projection = build(args)
    z = torch.randn(300, 2, T, D, generator=torch.Generator().manual_seed(0))  # more than are made at a time
    weights = torch.einsum("...d,vd->...v", z, projection.weight).exp()
    weights = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(projection(z), torch.einsum("...v,vd->...d", weights, main.table))
    assert projection(z[:, :, :0]).shape == (300, 2, 0, 16)


@pytest.mark.parametrize("vocabulary", [70, 20_000])
def test_a_draw_mixes_a_few_words_whatever_the_vocabulary(vocabulary):
    main = SimpleNamespace(table=torch.randn(vocabulary, 4))
    torch.manual_seed(0)
    projection = dlr.Projection(main, settings(latent_dim=64))
    weights = projection.mixture(torch.randn(400, 64))
    effective = 1 / weights.square().sum(-1)
    assert 1 <= effective.quantile(0.1) and 1.2 < effective.median() < 6


def test_linear_and_identity_latents_have_the_size_of_embeddings():
    main = random_model(vocabulary=200, seed=1, width=64)
    rms = main.table.square().mean().sqrt()
    for kind, d in (("linear", 40), ("identity", 64)):
        torch.manual_seed(0)
        projection = dlr.Projection(main, settings(projection=kind, latent_dim=d))
        e = projection(torch.randn(500, d))
        assert e.shape == (500, 64) and 0.9 < e.square().mean().sqrt() / rms < 1.1
    z = torch.randn(2, 64)
    torch.testing.assert_close(projection(z), z * rms)


def test_mode_e_and_its_unit_have_the_same_ratios():
    """z and c z: density ratio and KL do not see the unit, so identity with a unit is the paper's embedding space."""
    z, mu, other, log_std = torch.randn(4, 7, T, D, generator=torch.Generator().manual_seed(0)).unbind()
    c = 0.1
    plain = dlr.log_density(z, mu, log_std) - dlr.log_density(z, other, log_std)
    scaled = [dlr.log_density(c * z, c * m, log_std + math.log(c)) for m in (mu, other)]
    torch.testing.assert_close(scaled[0] - scaled[1], plain, atol=1e-4, rtol=1e-5)
    kl = dlr.gaussian_kl(mu, log_std, other, 0 * log_std)
    torch.testing.assert_close(
        dlr.gaussian_kl(c * mu, log_std + math.log(c), c * other, 0 * log_std + math.log(c)), kl, atol=1e-4, rtol=1e-5
    )


# ----------------------------------------------------------------------------------------------------------------------
# 4. Decoding.


def test_slots_take_their_embeddings_in_order():
    table, slots = torch.randn(12, 4), torch.randn(2, 2, 4)
    ids = torch.tensor([[5, SLOT, SLOT, 3, 0], [SLOT, 7, SLOT, 0, 0]])
    first = [table[5], slots[0, 0], slots[0, 1], table[3], table[0]]
    second = [slots[1, 0], table[7], slots[1, 1], table[0], table[0]]
    assert torch.equal(engine.embed(table, ids, slots), torch.stack([torch.stack(first), torch.stack(second)]))


def test_decoding_is_generate_on_embeddings_alone_and_together():
    """Each trajectory against transformers' own greedy generate on its embeddings, unpadded; and deterministic."""
    args = settings(max_new_tokens=12)
    main, policy, projection = build(args)
    z, *_ = policy.sample(ASKED, dlr.noise(3, 4, args, torch.Generator().manual_seed(0)) * 3)
    latents = projection(z).detach()
    said = dlr.decode(main, PROMPTS, latents, args)
    for n, (ids, stopped) in enumerate(zip(said.ids, said.stopped, strict=True)):
        prompt, e = PROMPTS[n // 4], latents[n // 4, n % 4]
        words = main.table[torch.tensor([i for i in prompt if i != SLOT])]
        embeds = torch.cat([words[:-2], e, words[-2:]])[None]
        theirs = main.model.generate(
            inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2]), max_new_tokens=12, do_sample=False,
            pad_token_id=PAD,
        )[0].tolist()  # fmt: skip
        assert ids == theirs and stopped == (ids[-1] == STOP)
        alone = dlr.decode(main, [prompt], e[None, None], args)
        assert alone.ids == [ids] and alone.texts == said.texts[n : n + 1]
    assert dlr.decode(main, PROMPTS, latents, args) == said
    assert len({str(ids) for ids in said.ids[:4]}) > 1  # latents matter
    assert {len(ids) for ids in said.ids} - {12} and 12 in {len(ids) for ids in said.ids}  # some stop, some do not


def test_without_latents_the_model_is_as_it_was():
    args = settings()
    main, _, _ = build(args)
    bare = [[i for i in prompt if i != SLOT] for prompt in PROMPTS]
    said = dlr.decode(main, bare, torch.zeros(3, 1, 0, 16), args)
    for prompt, ids in zip(bare, said.ids, strict=True):
        theirs = main.model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, pad_token_id=PAD)
        assert ids == theirs[0, len(prompt) :].tolist()


def test_prompts_of_the_built_in_task_have_their_slots_where_a_note_goes():
    tokenizer = AutoTokenizer.from_pretrained(HERE / "tiny")
    problem = engine.Problem(" 17 + 5 ? <think>", "22", "think")
    words = tokenizer.convert_ids_to_tokens
    ids = dlr.encode_with_slots(tokenizer, problem, 2)
    assert words([i for i in ids if i != SLOT]) == [" 17", " +", " 5", " ?", " <think>"] and ids[4:6] == [SLOT, SLOT]
    assert dlr.encode_with_slots(tokenizer, problem, 2, whole=False) == ids[:-1]
    note = dlr.encode_with_slots(tokenizer, problem, 0)
    assert note == tokenizer.encode(problem.question)


# ----------------------------------------------------------------------------------------------------------------------
# 5. Rewards, advantages, the filter.

TAGS = engine.Problem("q", "1234")


@pytest.mark.parametrize("text, reward", [
    ("<think>a</think> <answer>1,234.0</answer>", 1.2), ("I say \\boxed{1234}", 0.8),
    ("<think>a</think><answer>7</answer>", -0.8), ("no idea", -1.2),
    ("<think>a</think><think>b</think><answer>1234</answer>", 0.8),  # duplicated
    ("<answer>1234</answer><think>a</think>", 0.8),  # swapped
    ("<think>a<answer>1234</answer>", 0.8), ("<think>a</think><answer>1234", 0.8),  # unclosed
    ("<think>a</think><answer> </answer>", -1.2), ("so <think>a</think><answer>1234</answer>", 0.8),
    ("<think>\na\nb\n</think>\n<answer>\n$1234\n</answer>\n", 1.2), ("7 or \\boxed{3} or 1234", -1.2),
    ("7 or 1234", 0.8), ("<answer>5</answer> 1234", -1.2),
])  # fmt: skip
def test_rewards_of_texts(text, reward):
    said = dlr.Said([[1]], [text], [True])
    correct, form, _ = dlr.rewards_of(said, [TAGS], settings())
    assert correct.item() + 0.2 * form.item() == pytest.approx(reward)
    cut = dlr.Said([[1]], [text], [False])  # a text that ran to the cap has no form
    correct, form, _ = dlr.rewards_of(cut, [TAGS], settings())
    assert form.item() == -1


@pytest.mark.parametrize("text, reward", [
    (" 7 + 5 = 12 </think> 12", 1.2), (" 7 + 5 = 2 </think> 2", -0.8), (" 7 + 5 = 12", -1.2), ("12", -1.2),
    (" 7 </think> 12 12", -1.2), (" 7 </think> </think> 12", -1.2), (" <think> 7 </think> 12", -1.2),
])  # fmt: skip
def test_rewards_of_the_built_in_task(text, reward):
    correct, form, _ = dlr.rewards_of(dlr.Said([[1]], [text], [True]), [engine.Problem("", "12", "think")], settings())
    assert correct.item() + 0.2 * form.item() == pytest.approx(reward)


def test_rewards_go_to_their_prompts():
    problems = [engine.Problem("", "1", "think"), engine.Problem("", "2", "think")]
    texts = ["</think> 1", "</think> 2", "</think> 2", "</think> 1"]
    correct, form, answers = dlr.rewards_of(dlr.Said([[1]] * 4, texts, [True, True, True, False]), problems, settings())
    assert correct.tolist() == [[1, -1], [1, -1]] and form.tolist() == [[1, 1], [1, -1]]
    assert answers == ["1", "2", "2", "1"]


def test_advantages():
    ours = dlr.group_advantages(torch.tensor([[1.2, -0.8, -1.2, 0.8]]))
    torch.testing.assert_close(ours, torch.tensor([[1.176696, -0.784464, -1.176696, 0.784464]]), atol=2e-6, rtol=0)
    rewards = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    scaled = dlr.group_advantages(rewards * 7 + 3)
    torch.testing.assert_close(scaled, dlr.group_advantages(rewards), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("value", [1.2, 0.8, -0.8, -1.2])
def test_equal_rewards_give_zeros_exactly(value):
    """-0.8 has no exact mean in float32: its rounding, divided by 1e-6, would be an advantage of .06."""
    for size in (3, 12, 16):
        assert (dlr.group_advantages(torch.full((2, size), value)) == 0).all()


@pytest.mark.parametrize("screen", ["top", "spread"])
def test_prescreen_decodes_12_of_64(screen):
    args = settings(filter="prescreen", group_size=64, screen=screen)
    guesses, dice = torch.rand(2, 3, 64, generator=torch.Generator().manual_seed(0)).unbind()
    chosen = dlr.prescreen(guesses, dice, args)
    assert chosen.shape == (3, 12) == (3, dlr.decoded(args)) and dlr.decoded(settings(group_size=64)) == 64
    for row, guess, luck in zip(chosen.tolist(), guesses, dice, strict=True):
        assert len(set(row)) == 12
        ranks = guess.argsort(descending=True).tolist()
        best = ranks[:9] if screen == "top" else ranks[:5] + ranks[-4:]
        assert row[:9] == best
        rest = sorted(set(range(64)) - set(best), key=lambda i: -luck[i])
        assert row[9:] == rest[:3]  # a quarter, by luck
    everybody = [dlr.prescreen(guesses, torch.rand(3, 64), args)[:, 9:] for _ in range(200)]
    counts = torch.cat(everybody, 1)[0].bincount(minlength=64)
    assert (counts > 0).sum() == 55  # whom the value head does not pick comes up all the same


def test_what_the_value_head_sees():
    """The latents and the assistant's mean state, or the main model's state at the prompt's last token."""
    args = settings(filter="prescreen", group_size=12)
    main, policy, projection = build(args)
    z, _, _, h = policy.sample(ASKED, dlr.noise(3, 12, args, torch.Generator().manual_seed(0)))
    ours = dlr.evidence(main, projection, PROMPTS, z, h, args)
    theirs = [torch.cat([*z[2, 7], (h[2, 7, 0] + h[2, 7, 1] + h[2, 7, 2]) / 3]), z[2, 7]]
    torch.testing.assert_close(ours[2, 7], theirs[0])
    ours = dlr.evidence(main, projection, PROMPTS, z, h, settings(screen_sees="state"))
    for i, j in itertools.product(range(3), (0, 7)):
        words = main.table[torch.tensor([token for token in PROMPTS[i] if token != SLOT])]
        embeds = torch.cat([words[:-2], projection(z[i, j]), words[-2:]])[None]
        state = main.model.base_model(inputs_embeds=embeds).last_hidden_state[0, -1]
        torch.testing.assert_close(ours[i, j], state, atol=1e-5, rtol=1e-5)
    assert policy.value[0].normalized_shape == (T * D + 24,)
    assert build(settings(filter="prescreen", screen_sees="state"))[1].value[0].normalized_shape == (16,)


# ----------------------------------------------------------------------------------------------------------------------
# 6. Densities and losses.


def test_gaussian_density_and_kl():
    z, mu = torch.tensor([[0.5, -1.0], [0.0, 2.0]]), torch.tensor([[0.0, -1.0], [1.0, 1.0]])
    log_std = torch.tensor([[1.0, 0.5], [2.0, 1.0]]).log()
    assert dlr.log_density(z, mu, log_std).item() == pytest.approx(-4.425754, abs=1e-6)
    assert dlr.gaussian_kl(mu, log_std, torch.zeros(2, 2), torch.zeros(2, 2)).item() == pytest.approx(2.625, abs=1e-6)
    z, mu, log_std, ref_mu, ref_log_std = torch.randn(5, 6, T, D, generator=torch.Generator().manual_seed(0)).unbind()
    ours, ref = (Independent(Normal(m, s.exp()), 2) for m, s in ((mu, log_std), (ref_mu, ref_log_std)))
    torch.testing.assert_close(dlr.log_density(z, mu, log_std), ours.log_prob(z))
    torch.testing.assert_close(dlr.gaussian_kl(mu, log_std, ref_mu, ref_log_std), kl_divergence(ours, ref))
    assert (dlr.gaussian_kl(mu, log_std, mu, log_std) == 0).all()


def test_policy_gradient_is_that_of_the_expected_reward():
    """E[R(z) grad log pi(z)] against finite differences of E[R] with common random numbers, and R is not smooth."""
    mu, log_std = torch.tensor([[0.3, -0.2]]), torch.tensor([[-0.3, 0.1]])
    eps = torch.randn(400_000, 1, 2, generator=torch.Generator().manual_seed(0))

    def expected(mu, log_std):
        z = mu + log_std.exp() * eps
        return ((z[..., 0] * z[..., 1] > 0.1) * 2.0 - 1).mean()

    mu.requires_grad_(), log_std.requires_grad_()
    z = (mu + log_std.exp() * eps).detach()
    rewards = (z[..., 0] * z[..., 1] > 0.1) * 2.0 - 1  # (N, 1)
    (rewards[:, 0] * dlr.log_density(z, mu, log_std)).mean().backward()
    h = 0.05
    for parameter, which in ((mu, 0), (log_std, 1)):
        for i in range(2):
            shift = torch.zeros(1, 2)
            shift[0, i] = h
            moved = [[mu.detach(), log_std.detach()] for _ in range(2)]
            moved[0][which], moved[1][which] = moved[0][which] + shift, moved[1][which] - shift
            theirs = (expected(*moved[0]) - expected(*moved[1])) / (2 * h)
            assert parameter.grad[0, i].item() == pytest.approx(theirs.item(), abs=0.012)


THREE = torch.tensor([[[1.0, 0.0]], [[0.6, 0.8]], [[0.0, 2.0]]])  # (G, 1, 2)


def test_contrastive_numbers():
    cross_entropy = F.cross_entropy(THREE[:, 0] @ THREE[:, 0].T, torch.arange(3), reduction="none")
    torch.testing.assert_close(cross_entropy, torch.tensor([0.712067, 1.250600, 0.103489]), atol=1e-6, rtol=0)
    assert dlr.contrastive(THREE, 1.0).item() == pytest.approx(0.688719, abs=1e-6)
    assert dlr.contrastive(F.normalize(THREE, dim=-1), 2.0).item() == pytest.approx(0.600849, abs=1e-6)
    assert dlr.contrastive(torch.eye(2)[:, None], 1.0).item() == pytest.approx(0.313262, abs=1e-6)
    assert dlr.contrastive(torch.ones(8, T, D), 0.3).item() == pytest.approx(math.log(8), abs=1e-5)


def test_contrastive_of_two_views_is_the_mean_of_both_directions():
    a, b = torch.randn(2, 6, 1, 4, generator=torch.Generator().manual_seed(0)).unbind()
    scores, own = a[:, 0] @ b[:, 0].T, torch.arange(6)
    rows, columns = F.cross_entropy(scores, own), F.cross_entropy(scores.T, own)
    assert abs(rows - columns) > 1e-3
    torch.testing.assert_close(dlr.contrastive(a, 1.0, b), (rows + columns) / 2)
    one_view = a[:, 0] @ a[:, 0].T  # the paper's: symmetric, so both directions are the same
    torch.testing.assert_close(F.cross_entropy(one_view, own), F.cross_entropy(one_view.T, own))


def test_contrastive_is_step_by_step_within_groups():
    z = torch.randn(2, 6, T, D, generator=torch.Generator().manual_seed(0))
    own = torch.arange(6)
    losses = [F.cross_entropy(0.3 * group[:, t] @ group[:, t].T, own) for group in z for t in range(T)]
    for order in (slice(None), [3, 1, 5, 0, 2, 4]):
        torch.testing.assert_close(dlr.contrastive(z[:, order], 0.3), torch.stack(losses).mean())


@pytest.mark.parametrize("d, sigma", [(32, 1.0), (512, 1.0), (512, 0.3)])
def test_contrastive_is_not_saturated_at_the_start(d, sigma):
    """With the paper's scale 1 it is exactly 0; with that of the update it is far from 0 and from log G."""
    z = sigma * torch.randn(64, 8, d, generator=torch.Generator().manual_seed(0))
    assert 0.5 < math.log(64) - dlr.contrastive(z, 1 / (sigma**2 * d)) < 1.1
    if d * sigma**2 > 400:
        assert dlr.contrastive(z, 1.0) == 0


def test_contrastive_has_no_gradient_on_draws():
    args = settings()
    _, policy, _ = build(args)
    eps = dlr.noise(3, 4, args, torch.Generator().manual_seed(0))
    z, *_ = policy.sample(ASKED, eps)
    assert not dlr.contrastive(z.detach(), 1.0).requires_grad
    gradient = torch.autograd.grad(dlr.contrastive(z, 1.0), policy.log_std.bias)[0]
    assert (gradient < 0).all()  # it raises sigma


def test_contrastive_pushes_latents_apart():
    z = 1 + 0.05 * torch.randn(8, 1, D, generator=torch.Generator().manual_seed(0))
    z.requires_grad_()
    optimizer, apart = torch.optim.Adam([z], lr=0.05), ~torch.eye(8, dtype=torch.bool)

    def cosine():
        unit = F.normalize(z.detach()[:, 0], dim=-1)
        return (unit @ unit.T)[apart].mean().item()

    before = cosine()
    for _ in range(100):
        optimizer.zero_grad()
        dlr.contrastive(z, 0.25).backward()
        optimizer.step()
    assert before > 0.98 and cosine() < 0.3


def test_contrastive_gradient_reaches_the_policy():
    args = settings(kl_coef=0.0)
    main, policy, projection = build(args)
    even = roll(policy, args, rewards=torch.ones(3, 4))  # no advantage: all that is left is the contrastive loss
    ours, _ = update(main, policy, projection, even, args)
    assert all(ours[name].abs().max() > 0 for name in ("mu.weight", "log_std.weight", "queries"))
    off, _ = update(main, policy, projection, even, settings(kl_coef=0.0, contrast=0.0))
    assert all((gradient == 0).all() for gradient in off.values())


@pytest.mark.parametrize("ratio, advantage, value", [(1.5, 1, 1.2), (1.5, -1, -1.5), (0.5, 1, 0.5), (0.5, -1, -0.8)])
def test_clip(ratio, advantage, value):
    gain, clipped = dlr.surrogate(torch.tensor([[ratio]]).log(), torch.tensor([[float(advantage)]]), 0.2)
    assert gain.item() == pytest.approx(value) and clipped.item() == (value in (1.2, -0.8))


@pytest.mark.parametrize("shift, advantage", list(itertools.product((100.0, -100.0), (1.0, -1.0))))
def test_exploding_ratio_stays_finite(shift, advantage):
    log_ratio = torch.tensor([[shift]], requires_grad=True)
    gain, _ = dlr.surrogate(log_ratio, torch.tensor([[advantage]]), 0.2)
    gain.sum().backward()
    assert gain.abs().item() <= 149 and math.isfinite(log_ratio.grad.item())
    free = torch.tensor([[shift]], requires_grad=True)  # what the bound is for
    ratio = free.exp()
    torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).sum().backward()
    assert shift < 0 or not math.isfinite(free.grad.item())


def test_solution_loss_is_that_of_transformers():
    """Against the model's own loss with labels -100 elsewhere, row by row; and its gradient on the latents."""
    args = settings()
    main, _, _ = build(args)
    targets, e = [[4, 5, 6, STOP], [7], [8, 9, STOP]], torch.randn(3, T, 16)
    ours, theirs = e.clone().requires_grad_(), e.clone().requires_grad_()
    losses = dlr.solution_loss(main, PROMPTS, ours, targets, args)
    losses.sum().backward()
    theirs_by_row = []
    for prompt, target, latents in zip(PROMPTS, targets, theirs, strict=True):
        words_in = main.table[torch.tensor([i for i in prompt if i != SLOT] + target)]
        n = len(prompt) - T - 2
        embeds = torch.cat([words_in[:n], latents, words_in[n:]])[None]
        labels = torch.tensor([[-100] * len(prompt) + target])
        theirs_by_row.append(main.model(inputs_embeds=embeds, labels=labels).loss * len(target))
    sum(theirs_by_row).backward()
    torch.testing.assert_close(losses, torch.stack(theirs_by_row), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-4)
    assert all(p.grad is None for p in main.model.parameters())


# ----------------------------------------------------------------------------------------------------------------------
# 7. The update.


@pytest.mark.parametrize("norm", ["exact", "dim", "all"])
def test_the_first_update_is_the_policy_gradient(norm):
    """At ratio 1: the gradient of -mean(A log pi) / N, with log pi from torch.distributions."""
    args = settings(norm=norm, kl_coef=0.0, contrast=0.0)
    main, policy, projection = build(args)
    batch = roll(policy, args)
    ours, metrics = update(main, policy, projection, batch, args)
    assert metrics["clipped"] == 0
    policy.zero_grad()
    mu, log_std, _ = policy(ASKED, 4)
    log_prob = Independent(Normal(mu, log_std.exp()), 2).log_prob(batch.z)
    size = {"exact": 1, "dim": D, "all": T * D}[norm]
    (-(batch.advantages * log_prob).mean() / size).backward()
    theirs = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in policy.named_parameters()}
    assert_close_gradients(ours, theirs)


def test_the_ratio_is_exactly_1_at_the_first_pass(monkeypatch):
    seen, original = [], dlr.surrogate
    monkeypatch.setattr(dlr, "surrogate", lambda ratio, *rest: seen.append(ratio) or original(ratio, *rest))
    args = settings(micro_batch=2, updates_per_batch=2)
    main, policy, projection = build(args)
    optimizer = torch.optim.SGD(groups_of(policy, projection), lr=0.1)
    update(main, policy, projection, roll(policy, args), args, optimizer)
    assert all((ratio == 0).all() for ratio in seen[:2]) and len(seen) == 4
    assert all((ratio != 0).any() for ratio in seen[2:])


def test_every_pass_is_compared_with_the_policy_that_sampled(monkeypatch):
    """pi_old is not the policy of the last pass."""
    given, made, original = [], [], dlr.losses

    def losses(*inputs):
        given.append(inputs[5])
        made.append(original(*inputs))
        return made[-1]

    monkeypatch.setattr(dlr, "losses", losses)
    args = settings(updates_per_batch=3)
    main, policy, projection = build(args)
    optimizer = torch.optim.SGD(groups_of(policy, projection), lr=0.1)
    update(main, policy, projection, roll(policy, args), args, optimizer)
    assert given[0] is None and all((old == made[0][1]).all() for old in given[1:])
    assert (made[1][1] != made[0][1]).any()


def test_the_whole_loss_by_hand():
    """Equations (4) to (6) at a policy that has moved away from the one that sampled, and from the reference."""
    args = settings(updates_per_batch=1)
    main, policy, projection = build(args)
    batch, reference = roll(policy, args), copy.deepcopy(policy)
    with torch.no_grad():
        old = torch.stack([Independent(Normal(m, s.exp()), 2).log_prob(z)
                           for m, s, z in zip(*policy(ASKED, 4)[:2], batch.z, strict=True)])  # fmt: skip
        for weight in policy.mu.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)))
        policy.log_std.bias.add_(0.2)
    loss, _, _ = dlr.losses(main, policy, projection, reference, batch, old, args)
    total = 0.0
    for i in range(3):
        mu, log_std, _ = (x[i] for x in policy(ASKED, 4))
        ref_mu, ref_log_std, _ = (x[i] for x in reference(ASKED, 4))
        now, then = Independent(Normal(mu, log_std.exp()), 2), Independent(Normal(ref_mu, ref_log_std.exp()), 2)
        for j in range(4):
            ratio = math.exp(max(-5, min(5, (now.log_prob(batch.z[i])[j] - old[i, j]).item() / D)))
            a = batch.advantages[i, j].item()
            total -= min(ratio * a, max(0.8, min(1.2, ratio)) * a) / 4
        total += 0.01 * kl_divergence(now, then).mean().item() / D
        z = mu + log_std.exp() * batch.eps[i]
        steps = [F.cross_entropy(z[:, t] @ z[:, t].T / (D * 0.7**2), torch.arange(4)) for t in range(T)]
        total += 0.1 * torch.stack(steps).mean().item()
    assert loss.item() == pytest.approx(total, abs=1e-5)


@pytest.mark.parametrize("kind, filtered", [("parallel", "all"), ("autoregressive", "all"), ("parallel", "prescreen"),
                                            ("parallel", "postfilter")])  # fmt: skip
def test_cutting_into_micro_batches_and_checkpointing_change_nothing(kind, filtered):
    args = dict(policy=kind, filter=filtered, group_size=12, starts=2)
    main, policy, projection = build(settings(**args))
    batch = roll(policy, settings(**args))
    batch.right = [(0, [4, 5, STOP]), None, (1, [7, STOP])]
    whole, metrics = update(main, policy, projection, batch, settings(**args))
    for change in (dict(micro_batch=1), dict(micro_batch=2, gradient_checkpointing=True)):
        policy.zero_grad()
        policy.args = settings(**args | change)
        cut, theirs = update(main, policy, projection, batch, settings(**args | change))
        assert_close_gradients(cut, whole, 1e-4)
        for key in ("kl", "contrastive", "sigma", "mu_rms"):
            assert metrics[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6)


def test_what_is_not_decoded_has_no_advantage():
    """Of 12 trajectories 2 are decoded: the policy gradient is theirs alone; the contrastive loss is everybody's."""
    args = settings(filter="prescreen", group_size=12, kl_coef=0.0, contrast=0.0)
    main, policy, projection = build(args)
    batch = roll(policy, args, rewards=torch.tensor([[1.0, -1], [-1, 1], [1, -1]]))
    assert batch.chosen.shape == (3, 2)
    ours, metrics = update(main, policy, projection, batch, args)
    policy.zero_grad()
    mu, log_std, h = policy(ASKED, 12)
    log_prob = Independent(Normal(mu, log_std.exp()), 2).log_prob(batch.z)
    places = [(i, k, n) for i in range(3) for k, n in enumerate(batch.chosen[i].tolist())]
    sum(-batch.advantages[i, k] * log_prob[i, n] / D / 6 for i, k, n in places).backward()
    theirs = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in policy.named_parameters()}
    mine = {n: g for n, g in ours.items() if not n.startswith("value.")}
    assert_close_gradients(mine, {n: theirs[n] for n in mine})
    error = (policy.value(batch.seen)[..., 0] - batch.rewards).square().mean().item()
    assert metrics["explained"] == pytest.approx(1 - error, abs=1e-5) and ours["value.1.weight"].abs().max() > 0


def test_the_value_head_learns_and_moves_nothing_else():
    args = settings(filter="prescreen", group_size=12, kl_coef=0.0, contrast=0.0)
    main, policy, projection = build(args)
    batch = roll(policy, args)
    batch.rewards = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    batch.advantages.zero_()
    before = {n: p.clone() for n, p in policy.named_parameters()}
    optimizer = torch.optim.AdamW(groups_of(policy, projection), lr=1e-2, weight_decay=0.0)
    explained = [update(main, policy, projection, batch, args, optimizer)[1]["explained"] for _ in range(60)]
    assert explained[0] < 0.5 and explained[-1] > 0.99
    for name, weight in policy.named_parameters():
        assert torch.equal(weight, before[name]) != name.startswith("value."), name


def test_frozen_is_frozen_and_the_rest_learns():
    args = settings(filter="postfilter", lr=1e-2)
    main, policy, projection = build(args)
    projection.requires_grad_(False)
    batch = roll(policy, args)
    batch.right = [(0, [4, 5, STOP]), None, (1, [7, STOP])]
    before = dlr.fingerprint(main.model), dlr.fingerprint(projection), dlr.fingerprint(policy.assistant)
    logits = main.model(torch.tensor([[3, 4, 5]])).logits
    optimizer = torch.optim.AdamW(groups_of(policy, projection), lr=1e-2)
    main_ids = {id(weight) for weight in main.model.parameters()}
    assert not main_ids & {id(w) for group in optimizer.param_groups for w in group["params"]}
    for _ in range(20):
        update(main, policy, projection, batch, args, optimizer)
    after = dlr.fingerprint(main.model), dlr.fingerprint(projection), dlr.fingerprint(policy.assistant)
    assert after[:2] == before[:2] and after[2] != before[2]
    assert torch.equal(main.model(torch.tensor([[3, 4, 5]])).logits, logits)
    assert all(weight.grad is None for weight in [*main.model.parameters(), *projection.parameters()])
    assert all(policy.get_parameter(name).grad.abs().max() > 0 for name in ("queries", "mu.weight", "norm.weight"))


def test_a_changed_bit_changes_the_fingerprint():
    model = torch.nn.Linear(3, 2)
    before = dlr.fingerprint(model)
    with torch.no_grad():
        model.weight.view(torch.int32)[0, 0] ^= 1
    assert dlr.fingerprint(model) != before


def test_imitation_makes_the_right_text_likelier():
    args = settings(filter="postfilter", imitate=1.0, kl_coef=0.0, contrast=0.0)
    main, policy, projection = build(args)
    batch = roll(policy, args, rewards=torch.ones(3, 4))
    batch.right = [(2, [4, 5, STOP]), None, None]
    optimizer = torch.optim.AdamW(groups_of(policy, projection), lr=3e-3)

    def loss():
        mu, log_std, _ = policy(ASKED, 4)
        e = projection((mu + log_std.exp() * batch.eps)[0, 2:3])
        return dlr.solution_loss(main, PROMPTS[:1], e, [[4, 5, STOP]], args).item()

    before = loss()
    for _ in range(20):
        update(main, policy, projection, batch, args, optimizer)
    assert loss() < before - 0.1


def test_what_is_imitated_is_the_first_right_text_of_the_group(tmp_path, monkeypatch):
    """A verifier that likes the third and fourth of each group."""
    spoken, batches, honest = [], [], dlr.update

    def rewards_of(said, problems, args):
        spoken.append(said)
        correct = torch.full((len(problems), len(said.ids) // max(1, len(problems))), -1.0)
        correct[:, 2:] = 1
        return correct, correct, [None] * len(said.ids)

    def update(main, policy, projection, reference, optimizer, batch, args):
        batches.append((spoken[-1], batch))
        return honest(main, policy, projection, reference, optimizer, batch, args)

    monkeypatch.setattr(dlr, "rewards_of", rewards_of)
    monkeypatch.setattr(dlr, "update", update)
    dlr.main([*QUICK, "--steps", "1", "--filter", "postfilter", "--out", str(tmp_path / "run")])
    ((said, batch),) = batches
    assert batch.right == [(2, said.ids[4 * i + 2]) for i in range(4)]
    assert any(said.ids[4 * i + 2] != said.ids[4 * i] for i in range(4))  # or the test could not tell


def test_metrics_are_means_over_passes():
    args = [settings(updates_per_batch=n, filter="prescreen", share=0.5) for n in (1, 3)]
    (main, policy, projection), reference = build(args[0]), build(args[0], seed=1)[1].requires_grad_(False)
    batch = roll(policy, args[0])
    once, thrice = (update(main, policy, projection, batch, one, reference=reference)[1] for one in args)  # rate 0
    assert once["kl"] > 0 and once["contrastive"] > 0 and once["sigma"] > 0
    assert {name: pytest.approx(value) for name, value in once.items()} == thrice


@pytest.mark.parametrize("where", ["advantages", "rewards"])  # of the assistant and its heads; of the value head alone
def test_non_finite_gradient_stops_before_the_weights_change(where):
    args = settings(filter="prescreen", share=0.5)
    main, policy, projection = build(args)
    batch = roll(policy, args)
    getattr(batch, where)[0, 0] = math.nan
    before = dlr.fingerprint(policy)
    with pytest.raises(engine.UserError, match="not finite"):
        update(main, policy, projection, batch, args, torch.optim.SGD(groups_of(policy, projection), lr=0.1))
    assert dlr.fingerprint(policy) == before


def test_repeated_updates_raise_the_reward():
    """Learning at its smallest: reward 1 when the first number of the first latent is positive, and no main model."""
    args = settings(group_size=16, contrast=0.0)
    main, policy, projection = build(args)
    reference = copy.deepcopy(policy)
    optimizer = torch.optim.AdamW(groups_of(policy, projection), lr=3e-3)
    rewards = []
    for step in range(60):
        batch = roll(policy, args, seed=step, rewards=torch.zeros(3, 16))
        batch.rewards = (batch.z[..., 0, 0] > 0) * 2.0 - 1
        batch.advantages = dlr.group_advantages(batch.rewards)
        rewards.append(batch.rewards.mean().item())
        update(main, policy, projection, batch, args, optimizer, reference)
    assert sum(rewards[-20:]) / 20 > sum(rewards[:20]) / 20 + 0.3


# ----------------------------------------------------------------------------------------------------------------------
# 8. Evaluation. 9. The warm-up.


def test_vote():
    assert dlr.vote(["1", None, "2", "2", None, None]) == "2" and dlr.vote([None, None]) is None
    assert dlr.vote(["3", "1", "1", "3"]) == "3" and dlr.vote(["17", "17", "18.00", "$18", "18"]) == "18.00"
    assert dlr.vote(["x + 1", None, "x + 1", "2"]) == "x + 1"


def test_evaluation_gives_each_prompt_the_latents_that_it_says(monkeypatch):
    args = settings(eval_samples=4, prompts_per_step=1, group_size=4, model="none")  # one or four prompts at once
    main, policy, projection = build(args)
    problems = [engine.Problem(f"q{i}", str(i)) for i in range(3)]
    given, means = [], projection(policy.sample(ASKED, torch.zeros(3, 1, T, D))[0])
    monkeypatch.setattr(dlr, "asked_of", lambda policy, asked, args: [ASKED[int(p.question[1])] for p in asked])

    def decode(main, prompts, embeddings, args):
        given.append((prompts, embeddings))
        count = len(prompts) * embeddings.shape[1]
        return dlr.Said([[1]] * count, [f"<answer>{n % 2}</answer>" for n in range(count)], [True] * count)

    monkeypatch.setattr(dlr, "decode", decode)
    result = dlr.evaluate(main, policy, projection, (problems, PROMPTS), args, full=True)
    runs = [given[0], *given[4:]]  # sampled ones come a prompt at a time, for four times as many rows
    assert [len(prompts) for prompts, _ in given[1:4]] == [1, 1, 1]
    names = ["mean latent", "no_latents", "zeroed", "averaged", "swapped"]
    seen = dict(zip(names, runs, strict=True))
    torch.testing.assert_close(seen["mean latent"][1], means)
    assert seen["no_latents"][1].shape == (3, 1, 0, 16) and SLOT not in sum(seen["no_latents"][0], [])
    assert (seen["zeroed"][1] == 0).all() and seen["zeroed"][0] == PROMPTS
    z = policy.sample(ASKED, torch.zeros(3, 1, T, D))[0]
    torch.testing.assert_close(seen["averaged"][1], projection(z.mean(0, keepdim=True).expand_as(z)))
    torch.testing.assert_close(seen["swapped"][1], means[[2, 0, 1]])
    # answers 0, 1, 0 of the problems 0, 1, 2; sampled 0, 1, 0, 1 for each, where a vote's tie goes to the first
    assert result["greedy"] == pytest.approx(2 / 3) and result["sampled"] == pytest.approx(1 / 3)
    assert result["pass@4"] == pytest.approx(2 / 3) and result["majority@4"] == pytest.approx(1 / 3)
    assert result["form"] == 0 and "right_note" not in result


def test_evaluation_disturbs_nothing(tmp_path):
    args = dlr.parse_args(["--eval_problems", "4", "--eval_samples", "2"])[0]
    main, assistant = engine.load_model("tiny", "cpu"), engine.load_model("tiny", "cpu")
    policy, projection = dlr.LatentPolicy(assistant, main, args), dlr.Projection(main, args)
    stream = engine.load_problems("tiny", "test", 0, (2, 5), "single")
    held_out = dlr.take(stream, {"position": 0}, 4, main, args)
    torch.manual_seed(5)
    first = dlr.evaluate(main, policy, projection, held_out, args, full=True)
    expected = torch.Generator().manual_seed(5)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=expected))
    assert dlr.evaluate(main, policy, projection, held_out, args, full=True) == first


def test_samples_are_readable():
    tokenizer = SimpleNamespace(decode=lambda ids: f"w{ids[0]}")
    main = SimpleNamespace(tokenizer=tokenizer, table=torch.eye(6))
    problem = engine.Problem("1 + 1 ?", "2")
    torch.manual_seed(0)
    words = dlr.Projection(main, settings(latent_dim=6))
    words.weight.data = torch.eye(6)
    shown = dlr.describe(main, words, problem, torch.tensor([[0, 9.0, 8.0, 0, 0, 0]]), " two ", "reward -0.8")
    assert "latent  1  'w1' 0.73  'w2' 0.27\n" in shown and "'two'" in shown and "the answer is 2" in shown
    plain = dlr.Projection(main, settings(projection="identity", latent_dim=6))
    shown = dlr.describe(main, plain, problem, torch.tensor([[3.0, 0, 4.0, 0, 0, 0]]), "", "")
    assert "'w2' 0.80  'w0' 0.60\n" in shown  # cosines


def test_right_solutions_are_right():
    stream = engine.load_problems("tiny", "train", 0, (2, 5), "single")
    for i in range(200):
        assert engine.verify(dlr.right_solution(stream[i]), stream[i]) == (1.0, 1.0)
        assert dlr.read_answer(dlr.right_solution(stream[i]), stream[i]) == (stream[i].answer, True)
        assert tiny.problem_text(*tiny.read_chain(stream[i].question)) == stream[i].question
    row = engine.parse_row({"question": "q", "answer": "She has 48/2 = <<48/2=24>>24.\n#### 24"}, "")
    assert dlr.right_solution(row) == "<think>She has 48/2 = 24.</think><answer>24</answer>"
    assert dlr.read_answer(dlr.right_solution(row), row) == ("24", True)
    assert dlr.right_solution(engine.parse_row({"question": "q", "answer": "24"}, "")) is None


def test_the_right_note_is_right_and_a_wrong_one_is_not():
    """The steerability on which everything else stands: the frozen model is perfect with the right note."""
    args = dlr.parse_args([])[0]
    main = engine.load_model("tiny", "cpu")
    stream = engine.load_problems("tiny", "test", 0, (2, 5), "single")
    problems, prompts = dlr.take(stream, {"position": 0}, 128, main, args)

    def accuracy(notes):
        return (dlr.rewards_of(dlr.decode(main, prompts, notes, args), problems, args)[0] > 0).float().mean().item()

    notes = dlr.right_note(main, problems, args)
    assert notes.shape == (128, 1, 4, 128)
    plus = torch.tensor(["+" in problem.question for problem in problems])
    a, b = notes[plus][:1], notes[~plus][:1]
    wrong = torch.where(plus[:, None, None, None], b, a)
    assert accuracy(notes) > 0.98 and accuracy(wrong) < 0.2 and accuracy(notes * 0) < 0.2
    assert 0.3 < accuracy(a.expand_as(notes)) < 0.7 and 0.3 < accuracy(b.expand_as(notes)) < 0.7


# Mixed chains: half of them are right whatever the latents say, so there are advantages from the first step.
QUICK = ["--steps", "4", "--prompts_per_step", "4", "--group_size", "4", "--eval_problems", "8", "--eval_samples", "2",
         "--eval_every", "2", "--save_every", "2", "--show_every", "0", "--warmup", "1", "--kind", "mixed"]  # fmt: skip
BOTH = [*QUICK, "--sft_steps", "4", "--sft_batch", "6", "--starts", "2", "--updates_per_batch", "2"]


def rows_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def last_line(capsys):
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_the_warm_up_trains_everything_but_the_main_model(tmp_path, capsys, monkeypatch):
    """Gradient routing: the warm-up reaches the projection, RL does not, imitation of right texts included. And RL is
    held to the policy that the warm-up leaves."""
    seen, original = [], dlr.apply_gradient
    starts, original_step = [], dlr.rl_step

    def rl_step(main, policy, projection, reference, *rest):
        ours, theirs = policy.state_dict().values(), reference.state_dict().values()
        starts.append([torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)])
        return original_step(main, policy, projection, reference, *rest)

    def apply_gradient(policy, projection, optimizer, args):
        weight = projection.weight.grad
        seen.append((None if weight is None else weight.abs().max().item(), policy.mu.weight.grad.abs().max().item()))
        return original(policy, projection, optimizer, args)

    monkeypatch.setattr(dlr, "apply_gradient", apply_gradient)
    monkeypatch.setattr(dlr, "rl_step", rl_step)
    dlr.main([*BOTH, "--contrast", "0.1", "--filter", "postfilter", "--out", str(tmp_path / "run")])
    assert all(starts[0]) and not all(starts[1])
    assert all(up > 0 and mu > 0 for up, mu in seen[:4]) and len(seen) == 4 + 8
    assert all(up is None or up == 0 for up, _ in seen[4:]) and all(mu > 0 for _, mu in seen[4:])
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(-4, 4))
    assert rows[0]["cross_entropy"] > 0 and "reward" in rows[4]
    result = last_line(capsys)
    assert result["main_unchanged"] and result["greedy_untrained"] <= 0.5


def test_what_is_loaded_and_what_of_it_learns():
    args = [dlr.parse_args(["--seed", str(seed), "--device", "cpu"])[0] for seed in (0, 0, 1)]
    (main, policy, projection, reference), (_, twin, _, _), (_, other, _, _) = map(dlr.load, args)
    assert not any(weight.requires_grad for lm in (main.model, reference) for weight in lm.parameters())
    assert all(weight.requires_grad for lm in (policy, projection) for weight in lm.parameters())
    assert dlr.fingerprint(policy) == dlr.fingerprint(twin) == dlr.fingerprint(reference) != dlr.fingerprint(other)


def test_what_the_warm_up_and_what_rl_is_credited_with(tmp_path, capsys):
    counts = {"main_decodes": 5, "main_tokens": 6, "assistant_passes": 7}
    state = counts | {"untrained": {"greedy": 0.1}, "before": {"greedy": 0.3}, "args": {"seed": 3}}
    result = dlr.conclude(settings(model="tiny", seed=3), state, {"greedy": 0.9}, 1.5, tmp_path)
    assert "the warm-up gave +0.200, RL +0.600;" in capsys.readouterr().out
    assert [result[key] for key in ("greedy_untrained", "greedy_before", "greedy")] == [0.1, 0.3, 0.9]
    assert counts.items() <= result.items()
    assert json.loads((tmp_path / "result.json").read_text()) == result | {"args": {"seed": 3}}


@pytest.mark.slow
def test_the_warm_up_lowers_the_cross_entropy(tmp_path, capsys):
    dlr.main([*QUICK, "--steps", "0", "--sft_steps", "25", "--sft_batch", "32", "--eval_every", "0", "--out",
              str(tmp_path / "run")])  # fmt: skip
    losses = [row["cross_entropy"] for row in rows_of(tmp_path / "run")]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


def test_same_seed_same_log_and_the_contract_of_the_last_line(tmp_path, capsys):
    results = []
    for name in ("a", "b"):
        assert dlr.main([*QUICK, "--out", str(tmp_path / name)]) == 0
        results.append(last_line(capsys))
    rows = rows_of(tmp_path / "a")
    assert (tmp_path / "a/log.jsonl").read_bytes() == (tmp_path / "b/log.jsonl").read_bytes() and len(rows) == 4
    keys = "method model seed steps seconds greedy_before greedy sampled pass@2 majority@2 no_latents zeroed averaged"
    assert {"swapped", "right_note", "main_decodes", *keys.split()} <= set(results[0])
    assert rows[-1]["main_decodes"] == 4 * 16 and rows[-1]["assistant_passes"] == 16
    assert rows[-1]["main_tokens"] == sum(round(row["length"] * 16) for row in rows)
    assert {**results[0], "seconds": 0} == {**results[1], "seconds": 0}
    dlr.main([*QUICK, "--out", str(tmp_path / "c"), "--seed", "1"])
    assert (tmp_path / "a/log.jsonl").read_bytes() != (tmp_path / "c/log.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("how, rows", [(signal.SIGKILL, 3), (signal.SIGTERM, 1), (signal.SIGINT, 5)])
def test_killed_and_resumed_equals_uninterrupted(tmp_path, how, rows, capsys):
    """In the warm-up and in RL, with a value head and a reference."""
    flags = [*BOTH, "--filter", "prescreen", "--share", "0.75", "--group_size", "6"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    dlr.main([*flags, "--out", str(whole)])
    expected = last_line(capsys)
    process = subprocess.Popen([sys.executable, "dlr.py", *flags, "--out", broken], cwd=HERE,
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
    assert log.read_text().count("\n") < 8
    assert engine.read_checkpoint_state(f"{broken}/checkpoint.safetensors")["step"] >= rows - 5  # --save_every 2
    dlr.main(["--resume", str(broken)])
    resumed = last_line(capsys)
    assert log.read_bytes() == (whole / "log.jsonl").read_bytes()
    ours, theirs = (load_file(folder / "checkpoint.safetensors") for folder in (broken, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert {**resumed, "seconds": 0} == {**expected, "seconds": 0}
    rows = rows_of(whole)[4:]
    assert rows[-1]["kl"] > 0 and "explained" in rows[-1] and all(row["zero_advantage"] < 1 for row in rows)


def test_stopping_between_the_stages_loses_nothing(tmp_path, capsys, monkeypatch):
    """A signal in the warm-up's last step."""
    original = dlr.sft_step

    def sft_step(*arguments):
        row = original(*arguments)
        if row[0]["step"] == -1:
            os.kill(os.getpid(), signal.SIGINT)
        return row

    dlr.main([*BOTH, "--out", str(tmp_path / "whole")])
    monkeypatch.setattr(dlr, "sft_step", sft_step)
    assert dlr.main([*BOTH, "--out", str(tmp_path / "run")]) == 130
    assert len(rows_of(tmp_path / "run")) == 4 and "stopped at step 0" in capsys.readouterr().out
    assert dlr.main(["--resume", str(tmp_path / "run")]) == 0
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[*BOTH], [*QUICK, "--filter", "prescreen", "--share", "0.75"],
                                   [*QUICK, "--filter", "postfilter", "--policy", "autoregressive"]])  # fmt: skip
def test_two_processes_are_one(flags, tmp_path, capsys):
    """Over numbers that two cannot share evenly; equal but for the order in which numbers were added."""
    flags = [*flags, "--prompts_per_step", "3", "--group_size", "6", "--eval_problems", "7", "--micro_batch", "2",
             "--lr", "1e-4", "--lr_assistant", "1e-5", "--sft_lr", "1e-5"]  # fmt: skip
    dlr.main([*flags, "--out", str(tmp_path / "one")])
    one = last_line(capsys)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "dlr.py"]
    process = subprocess.Popen([*command, *flags, "--out", str(tmp_path / "two")], cwd=HERE, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    out, err = process.communicate()
    assert process.returncode == 0, err
    logs = [rows_of(tmp_path / name) for name in ("one", "two")]
    assert len(logs[0]) == len(logs[1]) >= 4
    assert sum(row.get("zero_advantage", 1) < 1 and row["reward"] > 0 for row in logs[0]) >= 3
    for a, b in zip(*logs, strict=True):
        assert a.keys() == b.keys()
        assert all(math.isclose(a[key], b[key], rel_tol=1e-3, abs_tol=1e-5) for key in a), (a, b)
    two = json.loads(out.strip().splitlines()[-1])
    assert one.keys() == two.keys() and one["greedy"] == two["greedy"] and one["sampled"] == two["sampled"]


BAD_INPUTS = {  # case: (flags, what the line must mention)
    "unknown model": (["--model", "no-such-model-anywhere"], "no-such-model-anywhere"),
    "unknown assistant": (["--assistant", "no-such-model-anywhere"], "no-such-model-anywhere"),
    "bare name, no network": (["--model", "Qwen2.5-0.5B", "--data", "gsm8k"], "Qwen/Qwen2.5-0.5B"),
    "words it cannot spell": (["--data", "{tmp}/words.jsonl"], "spell"),
    "run of another script": (["--resume", "{tmp}/other"], "another script"),
    "one trajectory": (["--group_size", "1"], "--group_size"),
    "nothing to compare": (["--filter", "prescreen", "--group_size", "4"], "--share"),
    "no latents": (["--latent_steps", "0"], "--latent_steps"),
    "sigma 0": (["--sigma", "0"], "--sigma"),
    "sigma below 0": (["--sigma", "-1"], "--sigma"),
    "starts that nobody takes": (["--starts", "17"], "--starts"),
    "share 2": (["--share", "2"], "--share"),
    "unknown choice": (["--projection", "magic"], "--projection"),
    "negative": (["--contrast", "-1"], "--contrast"),
    "nothing to resume": (["--resume", "{tmp}"], "nothing to resume"),
    "another assistant": (["--resume", "{tmp}/run", "--assistant", "tiny_latent"], "--assistant"),
    "kl in the middle": (["--resume", "{tmp}/run", "--kl_coef", "0"], "--kl_coef"),
    "unwritable folder": (["--out", "{tmp}/words.jsonl/run"], "cannot write"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_one_line_and_exit_code_2(case, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "words.jsonl").write_text('{"question": "How many eggs?", "answer": "2"}\n' * 10)
    flags, mentioned = BAD_INPUTS[case]
    for name, args in (("run", vars(dlr.parse_args([])[0])), ("other", {"model": "tiny", "device": "cpu"})):
        (tmp_path / name).mkdir()
        metadata = {"state": json.dumps({"step": 0, "stage": "training", "args": args})}
        save_file({"x": torch.zeros(1)}, tmp_path / name / "checkpoint.safetensors", metadata)
    with pytest.raises(SystemExit) as stop:
        engine.run_main(lambda: dlr.main([flag.replace("{tmp}", str(tmp_path)) for flag in flags]))
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2
    assert error.startswith("error: ") and "\n" not in error and mentioned in error, error


def test_out_of_memory_saves_and_resume_repeats_the_step(tmp_path, capsys, monkeypatch):
    original, calls = dlr.update, []

    def update(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(*arguments)

    dlr.main([*QUICK, "--out", str(tmp_path / "whole")])
    monkeypatch.setattr(dlr, "update", update)
    with pytest.raises(SystemExit) as stop:
        engine.run_main(lambda: dlr.main([*QUICK, "--out", str(tmp_path / "run")]))
    assert stop.value.code == 2 and "--micro_batch" in capsys.readouterr().err
    dlr.main(["--resume", str(tmp_path / "run")])
    assert (tmp_path / "run/log.jsonl").read_bytes() == (tmp_path / "whole/log.jsonl").read_bytes()


@pytest.mark.slow
def test_every_switch_runs(tmp_path, capsys):
    """Settings that no other test runs through the script."""
    for i, flags in enumerate((
        ["--projection", "linear"], ["--projection", "identity", "--sft_steps", "2"], ["--policy", "prompt"],
        ["--norm", "exact"], ["--norm", "all", "--kl_coef", "0"], ["--kind", "mixed", "--gradient_checkpointing"],
        ["--filter", "prescreen", "--group_size", "12", "--screen", "spread", "--screen_sees", "state"],
        ["--assistant", "tiny_latent"],
    )):  # fmt: skip
        assert dlr.main([*QUICK, "--steps", "2", *flags, "--out", str(tmp_path / str(i))]) == 0
        assert math.isfinite(last_line(capsys)["greedy"])


@pytest.mark.slow
def test_controls(tmp_path, capfd):
    dlr.main([*QUICK, "--group_size", "16", "--controls", "--out", str(tmp_path / "run")])
    out = capfd.readouterr().out.splitlines()
    results = {name: json.loads((tmp_path / "run" / name / "result.json").read_text()) for name in
               ("one_prompt", "plain_3", "grpo")}  # fmt: skip
    assert results["one_prompt"]["args"]["policy"] == "prompt" and results["one_prompt"]["main_decodes"] == 256
    assert results["plain_3"]["args"]["group_size"] == 3 and results["plain_3"]["main_decodes"] == 48
    assert results["grpo"]["method"] == "grpo" and results["grpo"]["args"]["kind"] == "mixed"
    assert results["grpo"]["steps"] * 4 * 8 == 256
    begin = next(i for i, text in enumerate(out) if "main decodes" in text)
    assert [text.split()[0] for text in out[begin + 1 : begin + 10]] == [
        "this", "one_prompt", "plain_3", "grpo", "no_latents", "zeroed", "averaged", "swapped", "untrained"
    ]  # fmt: skip
    assert json.loads(out[-1])["method"] == "dlr"
    # Once more: the two that are done are read, the third is continued.
    (tmp_path / "run/grpo/result.json").unlink()
    dlr.main(["--resume", str(tmp_path / "run"), "--controls"])
    again = capfd.readouterr().out
    assert again.count("control: python") == 1 and "lepo.py --resume" in again
    assert again.splitlines()[-11:-1] == out[-11:-1]


def test_three_learning_rates_warm_up_and_decay(tmp_path, monkeypatch):
    seen, original = [], dlr.apply_gradient

    def apply_gradient(policy, projection, optimizer, args):
        seen.append([group["lr"] for group in optimizer.param_groups])
        return original(policy, projection, optimizer, args)

    monkeypatch.setattr(dlr, "apply_gradient", apply_gradient)
    dlr.main([*QUICK, "--filter", "prescreen", "--group_size", "16", "--lr", "8e-3", "--lr_assistant", "4e-3",
              "--lr_value", "2e-3", "--warmup", "2", "--out", str(tmp_path / "run")])  # fmt: skip
    shares = [0.5, 1, 1, 0.5]  # of the peak: 2 steps up, then (1 + cos) / 2 at 0 and half of the 2 that are left
    assert seen == [pytest.approx([8e-3 * x, 4e-3 * x, 2e-3 * x]) for x in shares]


def test_what_is_decoded_and_learnt_from_is_what_the_value_head_chose(tmp_path, monkeypatch):
    written, batches, decode, original = [], [], dlr.decode, dlr.update

    def spy(main, prompts, embeddings, args):
        written.append(embeddings)
        return decode(main, prompts, embeddings, args)

    @torch.no_grad()
    def update(main, policy, projection, reference, optimizer, batch, args):
        z, _, _, h = policy.sample(batch.asked, batch.eps)
        seen = torch.cat([z.flatten(-2), h.mean(-2)], -1)  # (P, G, F)
        guess = policy.value(seen)[..., 0]  # (P, G)
        batches.append((written[-1], batch, z, seen, guess, projection))
        with torch.enable_grad():
            return original(main, policy, projection, reference, optimizer, batch, args)

    monkeypatch.setattr(dlr, "decode", spy)
    monkeypatch.setattr(dlr, "update", update)
    dlr.main([*QUICK, "--filter", "prescreen", "--group_size", "16", "--explore", "0", "--out", str(tmp_path / "run")])
    assert len(batches) == 4
    for embeddings, batch, z, seen, guess, projection in batches:
        best = guess.topk(3, 1).indices
        assert torch.equal(batch.chosen.sort(1).values, best.sort(1).values)
        torch.testing.assert_close(batch.seen, torch.stack([x[i] for x, i in zip(seen, batch.chosen, strict=True)]))
        picked = torch.stack([x[i] for x, i in zip(z, batch.chosen, strict=True)])
        torch.testing.assert_close(embeddings, projection(picked))


def test_prescreened_decodes_are_counted(tmp_path, capsys):
    dlr.main([*QUICK, "--filter", "prescreen", "--group_size", "16", "--out", str(tmp_path / "run")])
    assert [row["main_decodes"] for row in rows_of(tmp_path / "run")] == [4 * 3 * (step + 1) for step in range(4)]
    dlr.main([*QUICK, "--policy", "autoregressive", "--out", str(tmp_path / "auto")])
    assert rows_of(tmp_path / "auto")[-1]["assistant_passes"] == 4 * 4 * 4 * 4  # steps, prompts, trajectories, latents


def test_a_run_goes_on_with_its_own_main_model_only(tmp_path, capsys):
    dlr.main([*QUICK, "--out", str(tmp_path / "run")])
    main = engine.load_model("tiny", "cpu")
    with torch.no_grad():
        main.head[0, 0] += 1e-3
    main.model.save_pretrained(tmp_path / "changed")
    main.tokenizer.save_pretrained(tmp_path / "changed")
    path = tmp_path / "run/checkpoint.safetensors"
    state = engine.read_checkpoint_state(path)
    state["args"]["model"] = str(tmp_path / "changed")
    save_file(load_file(path), path, {"state": json.dumps(state)})
    with pytest.raises(engine.UserError, match="differ"):
        dlr.main(["--resume", str(tmp_path / "run"), "--steps", "5"])


def test_more_processes_than_problems_is_said(tmp_path, monkeypatch):
    (tmp_path / "few.jsonl").write_text('{"question": " 1 + 1 ?", "answer": "2"}\n' * 10)
    monkeypatch.setattr(engine, "process", lambda: (0, 2))
    args = dlr.parse_args([])[0]
    main = SimpleNamespace(tokenizer=AutoTokenizer.from_pretrained(HERE / "tiny"))
    stream = engine.Problems([engine.Problem(" 1 + 1 ?", "2", "think")], 0, 1)
    with pytest.raises(engine.UserError, match="only 1 problems"):
        dlr.rl_step(main, None, None, None, None, stream, {"step": 0, "position": 0}, args, None)


@pytest.mark.slow
def test_the_default_learns(tmp_path, capsys):
    """A short run of the default settings, enough to see that RL finds more than one note for everybody."""
    dlr.main(["--steps", "30", "--eval_problems", "128", "--eval_samples", "2", "--show_every", "0", "--eval_every",
              "0", "--out", str(tmp_path / "run")])  # fmt: skip
    result = last_line(capsys)
    assert result["greedy_before"] < 0.2 and result["no_latents"] < 0.2 and result["main_unchanged"]
    assert result["greedy"] > 0.4 and result["greedy"] > result["zeroed"] + 0.2


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "tokenizers/qwen2.5").is_dir() or not (SHARED / "data/gsm8k").is_dir(),
                    reason="needs the Qwen2.5 tokenizer and GSM8K beside the checkout, in ../shared")  # fmt: skip
def test_real_tokenizer_and_gsm8k(tmp_path, capsys, monkeypatch):
    """A random main and assistant of other widths with the real vocabulary, chat template and data, warm-up and RL. A
    random model is never right, so the verifier is asked, and then every second text is called right."""
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers/qwen2.5")
    for name, width in (("main", 48), ("assistant", 32)):
        torch.manual_seed(0)
        config = Qwen2Config(vocab_size=151936, hidden_size=width, intermediate_size=64, num_hidden_layers=2,
                             num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
                             eos_token_id=151643)  # fmt: skip
        Qwen2ForCausalLM(config).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    honest = dlr.rewards_of

    def rewards_of(said, problems, args):
        correct, form, answers = honest(said, problems, args)
        assert (correct == -1).all() and (form == -1).all()
        return torch.arange(correct.numel()).view(correct.shape) % 2 * 2.0 - 1, form, answers

    monkeypatch.setattr(dlr, "rewards_of", rewards_of)
    stream = engine.load_problems(str(SHARED / "data/gsm8k"), "train", 0)
    text = tokenizer.decode([max(i, 0) for i in dlr.encode_with_slots(tokenizer, stream[0], 3)])
    assert f"{stream[0].question}\n{dlr.FORMAT}\n!!!<|im_end|>\n<|im_start|>assistant\n" in text  # 0 spells "!"
    dlr.main(["--model", str(tmp_path / "main"), "--assistant", str(tmp_path / "assistant"), "--data",
              str(SHARED / "data/gsm8k"), "--prompts_per_step", "2", "--group_size", "4", "--max_new_tokens", "12",
              "--latent_steps", "3", "--steps", "2", "--eval_problems", "2", "--eval_samples", "2", "--sft_steps", "2",
              "--sft_batch", "2", "--device", "cpu", "--out", str(tmp_path / "run")])  # fmt: skip
    rows = rows_of(tmp_path / "run")
    assert len(rows) == 4 and all(row["grad_norm"] > 0 and row["grad_norm_assistant"] > 0 for row in rows)
    assert last_line(capsys)["main_unchanged"]
