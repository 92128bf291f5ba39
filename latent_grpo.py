r"""Latent-GRPO (arXiv 2604.27998): RL of a model that thinks in few, dense latents. Read lepo.py first.

    python latent_grpo.py                                    # the chains_latent model, on a laptop CPU: two minutes
    python latent_sft.py --model Qwen2.5-0.5B --out sft      # GSM8K, one GPU: first a model learns to think in latents,
    python latent_grpo.py --model sft/model                  # then RL; several GPUs: torchrun, as with lepo.py

lepo.py takes a model as it is. Latent-GRPO starts from one that latent_sft.py has taught to think in mixtures that
stand for several words each, and to leave its thought by itself, by the exit token `</think>`. RL then improves the
thoughts, with three fixes for what goes wrong. Problems are drawn until P groups have both right and wrong rollouts.
At step t the model has seen the prompt q and the embeddings e_<t; l_k = log pi_theta(k | q, e_<t).

  (1)  noise:           xi_k = sigma (clip(g_k, -1.5, 3) + 1.5),  g_k ~ Gumbel(0, 1) iid;  the + 1.5 is fix 1
  (2)  latent:          the K largest scores s_k = l_k + xi_k in the nucleus of pi,  w = softmax(s)
  (3)  next input:      e_t = sum_k w_k E[k]
       The thought ends where the exit token is the heaviest candidate; where it is the likeliest, there is no noise.
       This step is the exit token alone, later ones are draws from pi. An end token ends a rollout, also in a thought.
  (4)  advantage:       A_i = (r_i - mean r) / (std r + 1e-6) over the rollouts of the group that ended before the cap
       Fix 2: the others, the overlong, are left out of mean and std and get 0. Fix 3: at the first step, where all
       rollouts of a group are in one state, of the right ones only the likeliest keeps A_i.
  (5)  log-probability: L_t = sum_k c_k f(d_k),  d_k = s_k - l_k(theta),  f(d) = -d - exp(-d),  c_k = 1/K
       f is the log-density of Gumbel(0, 1). Of a discrete token L_t is log pi_theta(token), as usual.
  (6)  objective:       J = 1/(steps of the batch) sum_it min(rho_t A_it, clip(rho_t, 1-eps, 1+eps) A_it),
       rho_t = exp(L_t(theta) - L_t(theta_old)).  E and head are frozen, w is a constant.

Why one-sided: the slope of f(d_k) in l_k is 1 - exp(-d_k), so a candidate with a negative margin d_k is pushed the
wrong way round, down by a right rollout. With two-sided noise this happens to a third of them (chains: .36). The
+ 1.5 is the same for all candidates: it changes no mixture and no rollout, but leaves no margin negative.

What the mean over K costs: a right rollout pushes each candidate up by nearly the same (.78 of c_k, on chains, sigma
1), whatever its weight, and a wrong one down. That tells little about which mixture was good, and flattens the policy.
With `--surrogate weighted`, c_k = w_k, the push is w - pi, LEPO's soft label, where the K hold all the mass, one-sided
or not: w_k exp(-d_k) is pi_k / sum_j exp(s_j). The chains model learns with it. test_latent_grpo.py proves both.

A real vocabulary: noise, nucleus and draws live on the 256 likeliest tokens, whose l_k are those of the full softmax.
So a step costs one top-k and one logsumexp over the vocabulary, and no sort; what is less likely is never drawn.

Differences from the official code (github.com/DJC-GO-SOLO/Latent-GRPO, a fork of verl and SGLang):
  1. First-token selection there silences the wrong rollouts too; here, as in the paper, the other right ones.
  2. Its GSM8K script masks overlong rollouts only after they counted in mean and std; here, as in the paper, before.
  3. Where A <= 0 and d < 0 it means to reverse the slope of f, and a wrong sign only weakens it. Here it stays.
  4. Its "no noise where the exit is the likeliest" is for token 524, Llama's `</`: Qwen models leave by chance.
  5. Discrete tokens there are the heaviest of (2), scored at temperature .6; here, drawn from the pi that scores them.
  6. The verifier there reads the heaviest candidates of latents, too: an answer that is only thought counts.
  7. Where A < 0 ratios end at 3 there. Each of its updates has a part of the batch, and means are over one or two
     rollouts and then over those. The rate is constant. Its maths script adds .001 of a k3 KL term.
"""

import argparse
import math
import time
from dataclasses import dataclass

import torch
from tqdm import tqdm

import engine as common

# --- 1. Flags: the method's are the paper's; TINY is for the chains model, with what was measured on it ---------------

CLIP = -1.5, 3.0  # of the noise in (1)
LIKELIEST = 256  # tokens that noise can lift into a mixture or a text
TINY = dict(
    data="chains", max_new_tokens=16, eval_problems=512, steps=400, save_every=50, micro_batch=256,
    think_text="", exit_text=" </think>",  # its problems end in <think> already; its words carry their space
    lr=3e-4,  # 1.5e-4 is slower, 6e-4 ends in a collapse
    surrogate="weighted",  # from .56 to .80 in 100 steps; mean: to .57, at the best of three rates
    noise_scale=0.5,  # before training samples are right .57 of the time; at scale 1, .44
    overlong="off",  # who is masked is not punished for never ending: in one of five runs the exit rate fell to .86
    first_token="off",  # .789 with it and .795 without, and it costs a forward pass
)  # fmt: skip


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        prog="latent_grpo.py", usage=argparse.SUPPRESS, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Latent-GRPO: RL of a model that latent_sft.py made. The first page of the file explains it.",
        epilog=f"The chains model has defaults of its own: {TINY}",
    )  # fmt: skip
    add, at_least = parser.add_argument, common.at_least
    add("--noise", default="one_sided", choices=["one_sided", "two_sided"], help="(1) with or without the + 1.5")
    add("--noise_scale", type=at_least(0, float), default=1.0, help="s of (1)")
    add("--surrogate", default="mean", choices=["mean", "weighted"], help="c_k of (5): 1/K, or the weights w_k")
    add("--overlong", default="exclude", choices=["exclude", "off"], help="rollouts that reach the cap, in (4)")
    add("--first_token", default="paper", choices=["paper", "off"], help="who keeps A at the first step, in (4)")
    add("--top_k", type=at_least(2), default=10, help="K, candidates of a latent")
    add("--top_p", type=at_least(1e-3, float), default=0.95, help="nucleus of (2); the K likeliest are always in it")
    add("--max_draws", type=at_least(1), default=4, help="times P problems, until P groups have right and wrong ones")
    add("--updates_per_batch", type=at_least(1), default=1, help="passes over a batch; from the second on, (6) clips")
    add("--clip", type=at_least(0, float), default=0.2, help="eps of (6)")
    add("--think_text", default="<think>", help="what the prompt ends with")
    add("--exit_text", default="</think>", help="its first token ends a thought")
    common.add_shared_flags(parser)
    parser.set_defaults(model="chains_latent", max_new_tokens=128)
    return common.parse_args(parser, argv, TINY)


# --- 2. The latent token, (1) and (2): in float32, on the likeliest tokens --------------------------------------------
def gumbel_noise(like, generator):
    """-log Exp(1) is Gumbel(0, 1). Some platforms can draw an exact 0, which would become infinite noise."""
    exponential = torch.empty_like(like).exponential_(generator=generator)
    return -exponential.clamp_(min=torch.finfo(torch.float32).tiny).log()


def latent_token(candidates, log_p, gumbel, args):
    """Equations (1) and (2): all (B, C) -> ids and scores (B, K), the heaviest first; gumbel 0: w without noise"""
    outside = log_p.exp().cumsum(-1) - log_p.exp() >= args.top_p  # (B, C) the mass before a candidate reaches top_p
    outside[:, : args.top_k] = False
    noise = args.noise_scale * (gumbel.clamp(*CLIP) - CLIP[0] * (args.noise == "one_sided"))  # (B, C)
    noise = noise.masked_fill(candidates[:, :1] == args.exit_id, 0)  # else it could prolong what should end here
    scores, place = (log_p + noise).masked_fill(outside, -math.inf).topk(args.top_k)  # (B, K)
    return candidates.gather(-1, place), scores


# --- 3. Rollout, (3): latents until the exit token, then text until an end token or the cap ---------------------------
# What was executed is stored, for an exact replay. lm.table is E; the decoder holds the KV cache, as in lepo.py.
@dataclass
class Rollout:
    """N = P * G trajectories of at most T steps; row n continues prompt n // G."""

    prompts: list  # P lists of token ids
    group_size: int  # G
    ids: torch.Tensor  # (N, T, K) candidates, the heaviest first; a discrete token uses one slot
    scores: torch.Tensor  # (N, T, K) l + xi of (2), whose softmax is w; of a discrete token 0, and -inf beside it
    latents: torch.Tensor  # (N,) steps of the thought; the exit token is behind it
    length: torch.Tensor  # (N,) steps executed, the end token included


def rollout(lm, prompts, group_size, args, generator, noise_free=False):
    """G trajectories for each of P prompts -> Rollout; noise_free: g is 0 and text greedy, all of a prompt are equal"""
    shape = len(prompts) * group_size, args.max_new_tokens, args.top_k  # (N, T, K)
    discrete = torch.eye(1, args.top_k, device=args.device).log()  # (1, K) the scores of a discrete token: 0, -inf, …
    ids, scores = torch.zeros(shape, dtype=torch.long, device=args.device), discrete.repeat(*shape[:2], 1)
    rows = torch.arange(shape[0], device=args.device)  # (B,) the trajectories that go on
    latents, length, thinking = torch.zeros_like(rows), torch.zeros_like(rows), torch.ones_like(rows).bool()  # (N,)
    stop_ids = torch.tensor(lm.stop_ids, device=args.device)
    with torch.no_grad(), lm.autocast():
        decoder = common.Decoder(lm, prompts, group_size, args.max_new_tokens)
        logits = decoder.logits  # (N, V)
        for t in range(args.max_new_tokens):
            values, candidates = logits.float().topk(min(LIKELIEST, logits.shape[1]))  # (B, C) each, descending
            log_p = values - logits.float().logsumexp(-1, keepdim=True)  # (B, C) of the softmax over all V
            gumbel = torch.zeros_like(log_p) if noise_free else gumbel_noise(log_p, generator)  # (B, C)
            z_ids, z_scores = latent_token(candidates, log_p, gumbel, args)  # (B, K) each
            token = candidates.gather(-1, (log_p + gumbel).argmax(-1, keepdim=True))  # (B, 1) a draw from pi
            exits = thinking & (z_ids[:, 0] == args.exit_id)  # (B,)
            token, thinking = token.masked_fill(exits[:, None], args.exit_id), thinking & ~exits
            z_ids = torch.where(thinking[:, None], z_ids, token)  # (B, K)
            z_scores = torch.where(thinking[:, None], z_scores, discrete)  # (B, K)
            ids[rows, t], scores[rows, t] = z_ids, z_scores
            latents[rows] += thinking
            length[rows] = t + 1
            going = (~torch.isin(z_ids[:, 0], stop_ids)).nonzero().squeeze(-1)  # (B',) of the B rows
            if len(going) == 0 or t + 1 == args.max_new_tokens:
                break
            if len(going) < len(rows):
                rows, thinking, z_ids, z_scores = rows[going], thinking[going], z_ids[going], z_scores[going]
                decoder.keep(going)
            logits = decoder.feed(common.mix_embeddings(lm.table, z_ids, z_scores.softmax(-1)))  # (3), (B', V)
    return Rollout(prompts, group_size, ids, scores, latents, length)


# --- 4. Reward and advantages, (4) ------------------------------------------------------------------------------------
# The verifier reads what is written after the thought, and nothing else.
def score(lm, roll, problems):
    """-> N texts and their rewards (P, G), 1 for an answer that is right and in the form that was asked for"""
    spans = zip(roll.ids[:, :, 0].tolist(), roll.latents.tolist(), roll.length.tolist(), strict=True)
    texts = lm.tokenizer.batch_decode([ids[first:end] for ids, first, end in spans], skip_special_tokens=True)
    rewards = [common.verify(text, problems[n // roll.group_size])[0] for n, text in enumerate(texts)]
    return texts, torch.tensor(rewards, device=roll.ids.device).view(len(problems), roll.group_size)


def group_advantages(rewards, valid):
    """Equation (4): rewards (P, G), valid (P, G) bool -> advantages (P, G), with the unbiased standard deviation.

    Rewards 1, 1, 0, 0, the third invalid: .58, .58, 0, -1.15; all valid: .87, .87, -.87, -.87. With one rollout left
    there is nothing to compare: its reward is its advantage, as in the official code.
    """
    count = valid.sum(1, keepdim=True)  # (P, 1)
    deviation = (rewards - (rewards * valid).sum(1, keepdim=True) / count.clamp(min=1)) * valid  # (P, G)
    std = (deviation.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()  # (P, 1)
    return torch.where(count > 1, deviation / (std + 1e-6), rewards * valid)


def step_advantages(lm, roll, rewards, args):
    """Equation (4): rewards (P, G) -> advantages (N, T), equal at all steps of a rollout but for fix 3

    Several right rollouts would pull the one mixture of the first step towards several thoughts at once, perhaps
    towards a mean that is none of them. Only the likeliest, on average over its steps, keeps its advantage there.
    """
    valid = (roll.length < args.max_new_tokens).view(rewards.shape) | (args.overlong == "off")  # (P, G)
    advantages = group_advantages(rewards, valid)  # (P, G)
    steps = advantages.flatten()[:, None].repeat(1, args.max_new_tokens)  # (N, T)
    if args.first_token == "paper":
        right, likelihood = advantages > 0, torch.full_like(advantages, -math.inf)  # (P, G) each
        with torch.no_grad():
            for rows in right.flatten().nonzero().squeeze(-1).split(args.micro_batch) if right.any() else ():  # (B,)
                likelihood.view(-1)[rows] = replay(lm, roll, rows, args)[0].sum(1) / roll.length[rows]
        others = right.scatter(1, likelihood.argmax(1, keepdim=True), False)  # (P, G)
        steps[others.flatten(), 0] = 0
    return steps


# --- 5. Log-probability, (5) ------------------------------------------------------------------------------------------
# A forward pass over prompt and executed embeddings: the same logits as in the rollout, if the model is the same.
def step_log_probs(log_p, scores, is_latent, args):
    """Equation (5): log pi of the candidates and their scores (M, K), is_latent (M,) bool -> (M,)"""
    share = scores.softmax(-1) if args.surrogate == "weighted" else 1 / scores.shape[1]  # c of (5), (M, K) or number
    margin = (scores - log_p).masked_fill(~is_latent[:, None], 0).clamp(min=-10)  # d of (5), (M, K), bounded before exp
    return torch.where(is_latent, (share * (-margin - (-margin).exp())).sum(-1), log_p[:, 0])


def replay(lm, roll, rows, args):
    """Log-probabilities (B, T) of the executed steps of rows (B,), and their mask (B, T); a prompt runs once."""
    steps = int(roll.length[rows].max())  # T in use
    ids, scores = roll.ids[rows, :steps], roll.scores[rows, :steps]  # (B, T, K)
    mask, is_latent = (torch.arange(steps, device=ids.device) < x[rows, None] for x in (roll.length, roll.latents))
    prompts, which = (rows // roll.group_size).unique(return_inverse=True)  # (p,) distinct, (B,) the one of each row
    prompt, prompt_mask = common.left_pad([roll.prompts[i] for i in prompts.tolist()], ids.device)  # (p, L)
    cache = common.DynamicCache(config=lm.model.config)
    with lm.autocast():
        hidden = lm.hidden_states(lm.table[prompt], prompt_mask, cache)[which, -1:]  # (B, 1, D) before step 0
        cache.batch_select_indices(which)
        if steps > 1:
            thought = common.mix_embeddings(lm.table, ids, scores.softmax(-1))[:, :-1]  # (B, T - 1, D), none after T
            later = lm.hidden_states(thought, torch.cat([prompt_mask[which], mask], 1)[:, :-1], cache)  # (B, T - 1, D)
            hidden = torch.cat([hidden, later], 1)  # (B, T, D)
        log_p = common.candidate_log_probs(hidden[mask], lm.head, ids[mask], 1.0)  # (M, K), M executed
    log_probs = step_log_probs(log_p, scores[mask], is_latent[mask], args)  # (M,)
    return torch.zeros(mask.shape, device=ids.device).masked_scatter(mask, log_probs), mask


# --- 6. Update, (6) ---------------------------------------------------------------------------------------------------
# Gradients add up over micro-batches and ranks. One denominator: however a batch is cut, its update is the same.
def clipped_objective(log_probs, old_log_probs, advantages, clip):
    """The summand of (6), and where clipping acts: all (B, T) -> (B, T) each. Ratios end at e^20, as in lepo.py."""
    ratio = (log_probs - old_log_probs).clamp(max=20).exp()  # (B, T)
    plain, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages  # (B, T)
    return torch.minimum(plain, clipped), clipped < plain


def update(lm, optimizer, roll, advantages, rows, args):
    """`updates_per_batch` optimiser steps on rows (M,) of a rollout; advantages (N, T) -> metrics

    Rows without advantage have no gradient: they are left out, but count in the denominator.
    """
    denominator = common.all_reduce(roll.length[rows].sum().float())
    rows = rows[advantages[rows].any(1)]
    rows = rows[roll.length[rows].argsort(stable=True)]  # rows of similar length share a micro-batch
    batches = rows.split(args.micro_batch) if len(rows) else ()  # (B,) each
    old, sums = {}, torch.zeros(2, device=roll.length.device)
    for _ in range(args.updates_per_batch):
        optimizer.zero_grad()
        for i, micro in enumerate(batches):
            log_probs, mask = replay(lm, roll, micro, args)  # (B, T) each
            old.setdefault(i, log_probs.detach())  # the first pass runs at theta_old: its ratio is 1
            mine = advantages[micro, : mask.shape[1]]  # (B, T)
            gain, clipped = clipped_objective(log_probs, old[i], mine, args.clip)  # (B, T)
            loss = -(gain * mask).sum() / denominator
            loss.backward()
            sums += torch.stack([(clipped & mask).sum(), mask.sum()])
        common.reduce_gradients(lm.model)
        grad_norm = torch.nn.utils.clip_grad_norm_(lm.model.parameters(), 1.0)  # the official bound
        if not grad_norm.isfinite():
            raise common.UserError("the gradient is not finite and was not applied; --resume with a lower --lr")
        optimizer.step()
    clipped, steps = common.all_reduce(sums).tolist()
    return {"grad_norm": grad_norm.item(), "clipped": clipped / max(steps, 1)}


# --- 7. Evaluation and samples: always the same held-out problems, with noise of their own ----------------------------
def answer_again(lm, roll, problems, how, args):
    """Rewards (P, 1) of noise-free texts after the damaged latents of P rollouts and the exit token. skipped: no latent
    at all; shuffled: each in its neighbour's place; heaviest: each as its heaviest token."""
    rows = []  # of embeddings (L, D)
    for n, count in enumerate(roll.latents.tolist()):
        ids, weights = roll.ids[n, :count], roll.scores[n, :count].softmax(-1)  # (count, K)
        thought, heaviest = common.mix_embeddings(lm.table, ids, weights), lm.table[ids[:, 0]]  # (count, D) each
        thought = {"skipped": thought[:0], "shuffled": thought.roll(1, 0), "heaviest": heaviest}[how]
        rows.append(torch.cat([lm.table[roll.prompts[n // roll.group_size]], thought, lm.table[[args.exit_id]]]))
    embeds = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")  # (N, L, D)
    inputs = {"inputs_embeds": embeds, "attention_mask": embeds.any(-1).long(), "max_new_tokens": args.max_new_tokens}
    plain = dict(do_sample=False, repetition_penalty=1.0, eos_token_id=lm.stop_ids, pad_token_id=lm.stop_ids[0])
    with torch.no_grad(), lm.autocast():
        out = lm.model.generate(**inputs, **plain)
    pairs = zip(lm.tokenizer.batch_decode(out, skip_special_tokens=True), problems, strict=True)
    return torch.tensor([[common.verify(*pair)[0]] for pair in pairs], device=args.device)  # (P, 1)


def evaluate(lm, problems, args, full):
    """Noise-free accuracy, lengths and exit rate; `full`: also sampled, and noise-free with damaged latents -> dict"""
    generator = torch.Generator(args.device).manual_seed(12345 + common.RANK)
    mine = problems[common.RANK :: common.RANKS]

    def numbers(name, samples, noise_free, damages=()):
        """-> (4 and one for each damage, problems of this rank, samples)"""
        size, parts = max(1, args.prompts_per_step * args.group_size // samples // common.RANKS), []  # as in training
        for i in common.progress(range(0, len(mine), size), desc=f"evaluating: {name}", leave=False):
            part = mine[i : i + size]
            prompts = [common.encode_prompt(lm.tokenizer, problem, args.think_text) for problem in part]
            roll = rollout(lm, prompts, samples, args, generator, noise_free)
            _, rewards = score(lm, roll, part)
            spans = [x.view(rewards.shape).float() for x in (roll.length, roll.latents, roll.latents < roll.length)]
            parts.append(torch.stack([rewards, *spans, *(answer_again(lm, roll, part, how, args) for how in damages)]))
        return torch.cat(parts, 1)

    damages = ["skipped", "shuffled", "heaviest"] if full else []
    names = ["greedy", "length", "latents", "exit_rate", *(f"greedy_{how}" for how in damages)]
    scores = dict(zip(names, map(common.mean, numbers("noise-free", 1, True, damages)), strict=True))
    if full:
        sampled = numbers("sampled", args.eval_samples, False)[0]  # (problems, samples)
        scores |= {"sampled": common.mean(sampled), f"pass@{args.eval_samples}": common.mean(sampled.amax(1))}
    return {key: round(value, 4) for key, value in scores.items()}


def describe(lm, roll, problems, texts, rewards):
    """The rollout with the longest thought: each latent as its heaviest candidates with their weights -> str"""
    n = int(roll.latents.argmax())
    problem, lines = problems[n // roll.group_size], []
    for t in range(int(roll.latents[n])):
        pairs = zip(roll.ids[n, t].tolist(), roll.scores[n, t].softmax(-1).tolist(), strict=True)
        pairs = [f"{lm.tokenizer.decode([i])!r} {w:.2f}" for i, w in pairs if w > 0.005]
        lines.append(f"latent {t + 1:2d}  " + "  ".join(pairs[:6]))
    lines += [f"text       {texts[n].strip()!r}", f"reward {rewards.flatten()[n]:.0f}, the answer is {problem.answer}"]
    return "\n    ".join([problem.question, *lines])


# --- 8. main: evaluate, train, evaluate -------------------------------------------------------------------------------
def draw(lm, args, generator, step):
    """Dynamic sampling: P problems at a time, until P groups have both right and wrong rollouts, at most max_draws
    times. -> all problems, their rollouts as one, texts and rewards, the rows (M,) to learn from, P groups at most"""
    problems, prompts, texts, parts, found = [], [], [], [], 0
    while found < args.prompts_per_step and len(parts) < args.max_draws:
        start = (step * args.max_draws + len(parts)) * args.prompts_per_step
        batch = common.take_problems(args, "train", start, args.prompts_per_step)[common.RANK :: common.RANKS]
        asked = [common.encode_prompt(lm.tokenizer, problem, args.think_text) for problem in batch]
        roll = rollout(lm, asked, args.group_size, args, generator)
        written, rewards = score(lm, roll, batch)
        mixed = (rewards.amax(1) > rewards.amin(1)) | (args.max_draws == 1)  # (P,)
        problems, prompts, texts = problems + batch, prompts + asked, texts + written
        parts.append([roll.ids, roll.scores, roll.latents, roll.length, rewards, mixed])
        found += int(common.all_reduce(mixed.sum()))
    *tensors, rewards, mixed = map(torch.cat, zip(*parts, strict=True))
    mixed &= mixed.cumsum(0) <= len(batch)  # (all problems,) surplus groups are dropped
    rows = mixed.repeat_interleave(args.group_size).nonzero().squeeze(-1)  # (M,)
    return problems, Rollout(prompts, args.group_size, *tensors), texts, rewards, rows


def measure(roll, rewards, args):
    """What the rollouts of a step looked like -> their number, and means over all ranks"""
    is_latent = torch.arange(args.max_new_tokens, device=args.device) < roll.latents[:, None]  # (N, T)
    row = dict(reward=rewards, zero_advantage=rewards.amax(1) == rewards.amin(1), length=roll.length,
               overlong=roll.length == args.max_new_tokens, latents=roll.latents, exit_rate=roll.latents < roll.length,
               effective_k=1 / roll.scores.softmax(-1).square().sum(-1)[is_latent])  # fmt: skip
    return {"rollouts": rewards.numel() * common.RANKS} | {name: common.mean(value) for name, value in row.items()}


def main(argv=None):
    args = parse_args(argv)
    common.start_ranks(args.device)
    lm = common.load_model(args)
    lm.table.requires_grad = lm.head.requires_grad = False  # the space of latents stands still while a thought moves
    exit_ids = lm.tokenizer.encode(args.exit_text, add_special_tokens=False)
    if not exit_ids or exit_ids[0] in lm.stop_ids:
        raise common.UserError(f"--exit_text {args.exit_text!r} has no token, or one that ends a text: name another")
    args.exit_id, args.top_k = exit_ids[0], min(args.top_k, LIKELIEST, len(lm.table))
    optimizer = torch.optim.AdamW(lm.model.parameters(), betas=(0.9, 0.999), weight_decay=0.01, fused=True)
    generator = torch.Generator(args.device)
    common.take_problems(args, "train", 0, 1)  # a malformed line ends the run here, before it begins
    held_out = common.take_problems(args, "test", 0, args.eval_problems)
    run = common.Run(args, "latent_grpo")
    first, before = run.restore(lm.model, optimizer) if args.resume else (0, None)
    before = before or evaluate(lm, held_out, args, full=True)
    print(f"{sum(p.numel() for p in lm.model.parameters()):,} parameters, run folder {run.folder}\nbefore {before}")
    for step in common.progress(range(first, args.steps), initial=first, total=args.steps, desc="training"):
        if step % args.save_every == 0:
            run.save(step, before, lm.model, optimizer)
        # --- rollout, reward. Noise and data follow from seed, step and rank: a resumed run goes on as it would have.
        start = time.time()
        generator.manual_seed(args.seed * 10**9 + step * 10**3 + common.RANK)
        problems, roll, texts, rewards, rows = draw(lm, args, generator, step)
        # --- advantages
        advantages = step_advantages(lm, roll, rewards, args)  # (N, T)
        # --- update
        warmup = min(1, (step + 1) / max(1, 0.03 * args.steps))
        optimizer.param_groups[0]["lr"] = args.lr * warmup * (1 + math.cos(math.pi * step / args.steps)) / 2
        metrics = update(lm, optimizer, roll, advantages, rows, args)
        # --- log
        row = {"step": step, **measure(roll, rewards, args), **metrics, "seconds": round(time.time() - start, 3)}
        if args.eval_every and (step + 1) % args.eval_every == 0:
            row = row | evaluate(lm, held_out, args, full=False) | row  # the length stays that of the rollouts
            tqdm.write(describe(lm, roll, problems, texts, rewards))
        run.log(row)
        tqdm.write("  ".join(f"{name} {value:.4g}" for name, value in row.items()))
    run.save(max(first, args.steps), before, lm.model, optimizer)
    after = evaluate(lm, held_out, args, full=True) if args.steps else before
    run.finish(lm, after | {f"{name}_before": value for name, value in before.items()})


if __name__ == "__main__":
    common.run_main(main)
