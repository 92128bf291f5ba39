r"""LEPO, Latent Reasoning Policy Optimization (arXiv 2604.17892), in one file that is read from the top to the bottom.

    python lepo.py                              # the tiny model on a laptop CPU, about a minute
    python lepo.py --data trees                 # a task on which soft tokens are worth more than words (trees.py)
    python lepo.py --model Qwen2.5-0.5B         # GSM8K, one GPU; several: torchrun --nproc_per_node=8 lepo.py …
    python lepo.py --latent_steps 0             # the baseline: plain GRPO, exactly

A language model usually thinks in words: at every step it commits to one token. LEPO lets it think its first
`latent_steps` steps in *soft tokens*, random mixtures of token embeddings, and only then write text. The mixtures come
from a Gumbel-Softmax, so the rollouts of one prompt explore different latent thoughts. A verifier reads the text, and
one policy gradient, the same formula at latent and at text steps, makes the better thoughts likelier.

At step t the model has seen the prompt q and the embeddings e_<t. It gives logits a_t over the vocabulary.

  (1)  support:         C_t = top-k, then top-p of softmax(a_t / T);  l_k = log-probability of k, renormalised on C_t
  (2)  soft token:      z_t = softmax((l + g) / tau),  g_k ~ Gumbel(0, 1) iid
       A discrete token is the limit tau -> 0: all weight on argmax(l + g), which is an exact draw from softmax(l).
  (3)  next input:      e_t = sum_k z_tk E[k]
  (4)  advantage:       A_i = (r_i - mean_group r) / (std_group r + 1e-4),  r_i = 1 if the verifier accepts, else 0
  (5)  log-probability: L_t(theta) = sum_k z_tk log pi_theta(k | q, e_<t),  pi_theta = softmax(a_t / T), unfiltered
  (6)  objective:       J = 1/(steps of the batch) sum_it [min(rho_t A_i, clip(rho_t, 1-eps, 1+eps) A_i) - beta KL_t],
       rho_t = exp(L_t(theta) - L_t(theta_old)),  KL_t = (L_t(theta) - L_t(ref))^2 / 2,  ref: the model at the start

(5) is the paper's unification: the executed mixture is a soft label. Its gradient with respect to a_t / T is
z_t - pi_t, and with a one-hot z_t it is the log-probability of an ordinary token.

What (5) is and is not. For tau > 0 it is not the log of a density: its gradient has mean E[z] - pi, not 0, so the
policy gradient is biased. On small vocabularies its direction is nearly right (cosine > .99 for smooth rewards), and
it is too short: by a factor of 0.8 at tau .3. The exact densities (`--estimator concrete|gumbel`) are unbiased; they
pay about one unit of variance per candidate, however improbable it is. test_lepo.py proves each statement.

Differences from the official code (github.com/YuyanZhou/lepo, a TRL 0.21 trainer), and why:
  1. The text of a latent step is the heaviest candidate of what was executed; there, the noise-free argmax.
  2. The verifier wants the answer in \boxed{}. There, math-verify also takes "the answer is 42".
  3. Latent steps have the ratio of (6), a z-weighted geometric mean of token ratios. There, they have none.
  4. Old and reference log-probabilities are those of the executed mixtures; there, of the tokens that stand for them.
  5. KL, off by default like there, is KL_t of (6), whose mean gradient at unfiltered text steps is the KL's; there, k3.
  6. One loss denominator for the batch; there, a mean per rollout, which gives steps of short rollouts more weight.
  7. e_t is rebuilt in the graph with z_t constant, so E learns as an input too; there, e_t is a constant.
  8. (5) has T at all steps; there, latent steps have T = 1.
Like there, (5) takes the full softmax although (1) samples from a filtered one. At text steps this drives up words that
are never drawn, wherever the model has to guess and is often wrong; `--filter latent` draws text from the full softmax.
"""

import argparse
import math
import time
from dataclasses import dataclass

import torch
from tqdm import tqdm

import common

# --- 1. Flags: the method's are the paper's (its Qwen2.5-3B run); TINY is for the tiny model --------------------------
TINY = dict(
    data="tiny", max_new_tokens=40, eval_problems=512, eval_every=10, micro_batch=32,
    latent_steps=12,  # an operation takes six tokens, so the first two operations of two to five are latent
    tau=0.5,  # within the paper's .3 to .6
    lr=3e-4,  # the best of 1e-4, 3e-4, 6e-4: a small model takes larger steps
)  # fmt: skip
TREES = TINY | dict(
    model="tiny_trees", data="trees", kind="2,2,4", max_new_tokens=8, eval_problems=1024, steps=150, lr=2e-4,
    latent_steps=3, tau=20, top_k=6, top_p=0.995,  # a walk; breadth: all nodes in reach, with nearly equal weights
    filter="latent",  # else unlucky guesses drift to words that are no answer
)  # fmt: skip


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        prog="lepo.py", usage=argparse.SUPPRESS, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="LEPO and, with --latent_steps 0, GRPO. The first page of the file explains both.",
        epilog=f"The tiny models have defaults of their own: {TINY}; with --data trees {TREES}",
    )  # fmt: skip
    add, at_least = parser.add_argument, common.at_least
    add("--latent_steps", type=at_least(0), default=64, help="soft tokens before the text; 0 is plain GRPO")
    add("--tau", type=at_least(1e-3, float), default=0.3, help="of (2); smaller is nearer to discrete tokens")
    add("--noise", default="gumbel", choices=["gumbel", "none"], help="none: latent steps are deterministic")
    add("--estimator", default="soft", choices=["soft", "concrete", "gumbel", "none"], help="of latent steps: (5), an "
        "exact density, or none: only text is trained")  # fmt: skip
    add("--temperature", type=at_least(1e-3, float), default=1.0, help="T of (1)")
    add("--top_k", type=at_least(0), default=30, help="candidates in (1); 0: all of a small vocabulary")
    add("--top_p", type=at_least(1e-3, float), default=0.95, help="probability mass in (1)")
    add("--filter", default="all", choices=["all", "latent"], help="steps at which top_k and top_p hold")
    add("--updates_per_batch", type=at_least(1), default=1, help="passes over a batch; from the second on, (6) clips")
    add("--clip", type=at_least(0, float), default=0.2, help="eps of (6)")
    add("--kl_coef", type=at_least(0, float), default=0.0, help="beta of (6); above 0 keeps a second model")
    common.add_shared_flags(parser)
    args = common.parse_args(parser, argv, TINY, TREES)
    if args.latent_steps >= args.max_new_tokens:
        parser.error("--latent_steps must be below --max_new_tokens: there has to be room for text")
    if args.noise == "none" and args.estimator in ("concrete", "gumbel"):
        parser.error(f"--estimator {args.estimator} is the density of noise: it needs --noise gumbel")
    return args


# --- 2. The soft token, (1) and (2): only K candidates, in float32; topk alone sees the vocabulary --------------------
def support(logits, args, is_latent=True):
    """Equation (1). logits (B, V) -> candidates (B, K) and their log-probabilities (B, K), descending, -inf outside.

    The smallest set whose mass reaches top_p survives: .6, .3, .1 at top_p .8 keep two, renormalised to .67 and .33.
    """
    top_k, top_p = (args.top_k, args.top_p) if is_latent or args.filter == "all" else (0, 1)
    values, candidates = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]), dim=-1)  # (B, K)
    values = values.float() / args.temperature  # (B, K)
    probs = values.softmax(-1)  # (B, K)
    outside = probs.cumsum(-1) - probs >= top_p  # (B, K) the mass before a candidate already reaches top_p
    return candidates, values.masked_fill(outside, -math.inf).log_softmax(-1)


def gumbel_noise(like, generator):
    """-log Exp(1) is Gumbel(0, 1). Some platforms can draw an exact 0, which would become infinite noise."""
    exponential = torch.empty_like(like).exponential_(generator=generator)
    return -exponential.clamp_(min=torch.finfo(torch.float32).tiny).log()


def soft_token(candidates, log_probs, gumbel, tau):
    """Equation (2), at tau 0 its limit. All (B, K) -> ids, weights and scores l + g, (B, K) each; (B, 1) at tau 0.

    Weights are constants from here on: the gradient is that of (5), not one through the sampling.
    """
    scores = log_probs + gumbel  # (B, K)
    if tau == 0:
        best = scores.argmax(-1, keepdim=True)  # (B, 1)
        return candidates.gather(-1, best), torch.ones_like(scores[:, :1]), scores.gather(-1, best)
    return candidates, (scores / tau).softmax(-1), scores


# --- 3. Rollout, (3) --------------------------------------------------------------------------------------------------
# Soft tokens, then discrete ones until an end token or the cap. What was executed is stored, for an exact replay.
# lm.table is E. The decoder holds the KV cache and runs a prompt once for its G rollouts: .logits are those of step 0,
# feed(embeddings) gives the next ones, keep(rows) drops the other rows.
@dataclass
class Rollout:
    """N = P * G trajectories of at most T steps; row n continues prompt n // G."""

    prompts: list  # P lists of token ids
    group_size: int  # G
    ids: torch.Tensor  # (N, T, K) candidates; a discrete token uses one slot
    weights: torch.Tensor  # (N, T, K) z of (2), 0 in unused slots
    scores: torch.Tensor  # (N, T, K) l + g of (2), -inf in unused slots
    tokens: torch.Tensor  # (N, T) the heaviest candidate of each step, which stands for it in the text
    length: torch.Tensor  # (N,) steps executed, the end token included
    ended: torch.Tensor  # (N,) bool, by an end token and not by the cap


def rollout(lm, prompts, group_size, args, generator, latent_steps, noise_free=False):
    """G trajectories for each of P prompts -> Rollout

    noise_free: g is 0, so a soft token is softmax(l / tau), text is greedy, and all rollouts of a prompt are equal.
    """
    slots = min(args.top_k or len(lm.table), len(lm.table)) if latent_steps else 1  # K
    shape = len(prompts) * group_size, args.max_new_tokens, slots  # (N, T, K)
    ids = torch.zeros(shape, dtype=torch.long, device=args.device)
    weights = torch.zeros(shape, device=args.device)
    scores = torch.full(shape, -math.inf, device=args.device)
    tokens, length = torch.zeros_like(ids[:, :, 0]), torch.zeros_like(ids[:, 0, 0])  # (N, T), (N,)
    ended = torch.zeros_like(length, dtype=torch.bool)  # (N,)
    rows = torch.arange(shape[0], device=args.device)  # (B,) the trajectories that go on
    stop_ids = torch.tensor(lm.stop_ids, device=args.device)
    with torch.no_grad(), lm.autocast():
        decoder = common.Decoder(lm, prompts, group_size, args.max_new_tokens)
        logits = decoder.logits  # (N, V)
        for t in range(args.max_new_tokens):
            is_latent = t < latent_steps
            candidates, log_probs = support(logits, args, is_latent)  # (B, K) each
            noisy = not noise_free and (args.noise == "gumbel" or not is_latent)
            gumbel = gumbel_noise(log_probs, generator) if noisy else torch.zeros_like(log_probs)  # (B, K)
            z_ids, z, z_scores = soft_token(candidates, log_probs, gumbel, args.tau if is_latent else 0)
            heaviest = z_ids.gather(-1, z.argmax(-1, keepdim=True)).squeeze(-1)  # (B,)
            k = z.shape[1]
            ids[rows, t, :k], weights[rows, t, :k], scores[rows, t, :k] = z_ids, z, z_scores
            tokens[rows, t] = heaviest
            ended[rows] = torch.isin(heaviest, stop_ids)
            length[rows] = t + 1
            going = (~ended[rows]).nonzero().squeeze(-1)  # (B',) of the B rows
            if len(going) == 0 or t + 1 == args.max_new_tokens:
                break
            if len(going) < len(rows):
                rows, z_ids, z = rows[going], z_ids[going], z[going]
                decoder.keep(going)
            logits = decoder.feed(common.mix_embeddings(lm.table, z_ids, z))  # equation (3), (B', V)
    return Rollout(prompts, group_size, ids, weights, scores, tokens, length, ended)


# --- 4. Reward and advantages, (4) ------------------------------------------------------------------------------------
# The verifier reads text and nothing else. A prompt that all or none of its rollouts solve teaches nothing.
def score(lm, roll, problems):
    """-> N texts; (P, G) strict rewards, for the form that was asked for; (P, G) flexible ones, for the last number"""
    rows = zip(roll.tokens.tolist(), roll.length.tolist(), strict=True)
    texts = lm.tokenizer.batch_decode([tokens[:length] for tokens, length in rows], skip_special_tokens=True)
    pairs = [common.verify(text, problems[n // roll.group_size]) for n, text in enumerate(texts)]
    strict, flexible = torch.tensor(pairs, device=roll.ids.device).T.reshape(2, len(problems), roll.group_size)
    return texts, strict, flexible


def group_advantages(rewards):
    """Equation (4): rewards (P, G) -> advantages (P, G), with the unbiased standard deviation.

    Rewards 1, 1, 0, 0 give .87, .87, -.87, -.87. A single right rollout among four gets 1.5 and the others -.5: what
    succeeds rarely is pushed harder.
    """
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)


# --- 5. Log-probability, (5) ------------------------------------------------------------------------------------------
# A forward pass over prompt and executed embeddings: the same logits as in the rollout, if the model is the same.
def step_log_probs(log_p, weights, scores, is_latent, args):
    """Equation (5) and its alternatives for latent steps: log pi of the candidates, z, l + g, all (M, K), (M,) -> (M,)

    Gradient with respect to the logits of m candidates; w = softmax(l - tau log z), v = 1 - exp(l - scores), p = e^l:
      soft      z - pi                  the paper: biased for tau > 0, least variance
      concrete  1 - m w                 exact density of z (Maddison et al. 2017); E|.|^2 = m (m - 1) / (m + 1)
      gumbel    v - p sum(v)            exact density of l + g (as in SofT-GRPO); E|v|^2 = m
      none      0                       latent steps are executed, and only text is trained
    """
    soft = (weights * log_p).sum(-1)  # (M,) of a discrete token its log-probability, since its one weight is 1
    if args.estimator == "soft":
        return soft
    inside = scores > -math.inf  # (M, K)
    log_l = log_p.masked_fill(~inside, -math.inf).log_softmax(-1).masked_fill(~inside, 0)  # l of (1), 0 outside, (M, K)
    scores = scores.masked_fill(~inside, 0)
    if args.estimator == "none":
        latent = torch.zeros_like(soft)
    elif args.estimator == "gumbel":
        latent = ((log_l - scores - (log_l - scores).exp()) * inside).sum(-1)
    elif args.estimator == "concrete":  # from the scores: z itself would underflow
        m, tau = inside.sum(-1), args.tau  # (M,), number
        log_z = (scores / tau).masked_fill(~inside, -math.inf).log_softmax(-1).masked_fill(~inside, 0)  # (M, K)
        pull = (log_l - tau * log_z).masked_fill(~inside, -math.inf).logsumexp(-1)  # (M,)
        constant = m.float().lgamma() + (m - 1) * math.log(tau)  # (M,)
        latent = constant + ((log_l - (tau + 1) * log_z) * inside).sum(-1) - m * pull
    return torch.where(is_latent, latent, soft)


def replay(lm, roll, rows, args):
    """Log-probabilities (B, T) of the executed steps of rows (B,) under lm, and their mask (B, T)

    The embeddings are rebuilt in the graph: z is a constant, the table a weight. A prompt runs once for its rows.
    """
    steps, slots = int(roll.length[rows].max()), int((roll.scores[rows] > -math.inf).sum(-1).max())  # T and K in use
    ids, weights, scores = (x[rows, :steps, :slots] for x in (roll.ids, roll.weights, roll.scores))  # (B, T, K)
    mask = torch.arange(steps, device=ids.device) < roll.length[rows, None]  # (B, T)
    is_latent = (torch.arange(steps, device=ids.device) < args.latent_steps).expand_as(mask)  # (B, T)
    prompts, which = (rows // roll.group_size).unique(return_inverse=True)  # (p,) distinct, (B,) the one of each row
    prompt, prompt_mask = common.left_pad([roll.prompts[i] for i in prompts.tolist()], ids.device)  # (p, L)
    cache = common.DynamicCache(config=lm.model.config)
    with lm.autocast():
        hidden = lm.hidden_states(lm.table[prompt], prompt_mask, cache)[which, -1:]  # (B, 1, D) before step 0
        cache.batch_select_indices(which)
        if steps > 1:
            thought = common.mix_embeddings(lm.table, ids, weights)[:, :-1]  # (B, T - 1, D), the last one is never fed
            later = lm.hidden_states(thought, torch.cat([prompt_mask[which], mask], 1)[:, :-1], cache)  # (B, T - 1, D)
            hidden = torch.cat([hidden, later], 1)  # (B, T, D)
        log_p = common.candidate_log_probs(hidden[mask], lm.head, ids[mask], args.temperature)  # (M, K), M executed
    log_probs = step_log_probs(log_p, weights[mask], scores[mask], is_latent[mask], args)  # (M,)
    return torch.zeros(mask.shape, device=ids.device).masked_scatter(mask, log_probs), mask


# --- 6. Update, (6) ---------------------------------------------------------------------------------------------------
# Gradients add up over micro-batches and ranks. One denominator: however a batch is cut, its update is the same.
def clipped_objective(log_probs, old_log_probs, advantages, clip):
    """The summand of (6), and where clipping acts: (B, T), (B, T), (B, 1) -> (B, T) each

    With eps .2, ratio 1.5 and A = 1 give 1.2 without a gradient: this step has been encouraged enough. Ratio 1.5 and
    A = -1 give -1.5: it has moved the wrong way and is pulled back. exp would overflow, so ratios end at e^20.
    """
    ratio = (log_probs - old_log_probs).clamp(max=20).exp()  # (B, T)
    plain, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages  # (B, T)
    return torch.minimum(plain, clipped), clipped < plain


def update(lm, ref, optimizer, roll, advantages, args):
    """`updates_per_batch` optimiser steps on one batch; advantages (N,), ref: the reference model or None -> metrics

    Rows without advantage have no gradient: they are left out, but count in the denominator.
    """
    order = roll.length.argsort(stable=True)  # (N,) rows of similar length share a micro-batch
    rows = order[advantages[order] != 0] if ref is None else order
    batches = rows.split(args.micro_batch) if len(rows) else ()  # (B,) each
    denominator = common.all_reduce(roll.length.sum().float())
    old, sums = {}, torch.zeros(3, device=roll.length.device)
    for _ in range(args.updates_per_batch):
        optimizer.zero_grad()
        for i, micro in enumerate(batches):
            log_probs, mask = replay(lm, roll, micro, args)  # (B, T) each
            old.setdefault(i, log_probs.detach())  # the first pass runs at theta_old: its ratio is 1
            gain, clipped = clipped_objective(log_probs, old[i], advantages[micro, None], args.clip)  # (B, T)
            kl = torch.zeros_like(gain)  # (B, T)
            if ref is not None:
                with torch.no_grad():
                    ref_log_probs, _ = replay(ref, roll, micro, args)  # (B, T)
                kl = (log_probs - ref_log_probs) ** 2 / 2
            loss = -((gain - args.kl_coef * kl) * mask).sum() / denominator
            loss.backward()
            sums += torch.stack([(clipped & mask).sum(), (kl * mask).sum(), mask.sum()]).detach()
        common.reduce_gradients(lm.model)
        grad_norm = torch.nn.utils.clip_grad_norm_(lm.model.parameters(), 1.0)  # the paper's bound
        if not grad_norm.isfinite():
            raise common.UserError("the gradient is not finite and was not applied; --resume with a lower --lr")
        optimizer.step()
    clipped, kl, steps = common.all_reduce(sums).tolist()
    return {"grad_norm": grad_norm.item(), "clipped": clipped / max(steps, 1), "kl": kl / max(steps, 1)}


# --- 7. Evaluation and samples: always the same held-out problems, with noise of their own ----------------------------
def evaluate(lm, problems, args, full):
    """Noise-free accuracy and length; `full`: also sampled, and noise-free without latent steps -> dict"""
    generator = torch.Generator(args.device).manual_seed(12345 + common.RANK)
    mine = problems[common.RANK :: common.RANKS]

    def accuracy(name, samples, latent_steps, noise_free):
        """-> (3, problems of this rank, samples): strict, flexible, length"""
        size, parts = max(1, args.prompts_per_step * args.group_size // samples // common.RANKS), []  # as in training
        for i in common.progress(range(0, len(mine), size), desc=f"evaluating: {name}", leave=False):
            part = mine[i : i + size]
            prompts = [common.encode_prompt(lm.tokenizer, problem) for problem in part]
            roll = rollout(lm, prompts, samples, args, generator, latent_steps, noise_free)
            _, strict, flexible = score(lm, roll, part)
            parts.append(torch.stack([strict, flexible, roll.length.view(len(part), samples).float()]))
        return torch.cat(parts, 1)

    greedy = accuracy("noise-free", 1, args.latent_steps, True)
    scores = dict(zip(["greedy", "greedy_flexible", "length"], map(common.mean, greedy), strict=True))
    if full:
        sampled = accuracy("sampled", args.eval_samples, args.latent_steps, False)
        scores |= {"sampled": common.mean(sampled[0]), "sampled_flexible": common.mean(sampled[1])}
        scores[f"pass@{args.eval_samples}"] = common.mean(sampled[0].amax(1))  # any of the samples
        scores["greedy_no_latents"] = common.mean(accuracy("without latents", 1, 0, True)[0])
    return {key: round(value, 4) for key, value in scores.items()}


def measure(roll, strict, flexible, advantages, args):
    """What a batch of rollouts looked like -> dict of means over all ranks"""
    row = dict(reward=strict, flexible=flexible, length=roll.length, ended=roll.ended, zero_advantage=advantages == 0)
    if args.latent_steps:
        z = roll.weights[:, : args.latent_steps]  # (N, latent steps, K)
        row["effective_k"] = 1 / z.square().sum(-1)[z.sum(-1) > 0]  # (executed latent steps,), 1 if z is one-hot
    return {name: common.mean(value) for name, value in row.items()}


def describe(lm, roll, problems, texts, strict, args):
    """The rollout with the softest thoughts: each latent token as its heaviest candidates with their weights -> str"""
    z = roll.weights[:, : args.latent_steps]  # (N, latent steps, K)
    n = int((z.sum(-1) - z.amax(-1)).sum(1).argmax())
    problem, lines = problems[n // roll.group_size], []
    for t in range(min(args.latent_steps, int(roll.length[n]))):
        top, slots = z[n, t].topk(min(4, z.shape[2]))
        words = [lm.tokenizer.decode([i]) for i in roll.ids[n, t, slots].tolist()]
        pairs = [f"{word!r} {w:.2f}" for word, w in zip(words, top.tolist(), strict=True) if w > 0.005]
        lines.append(f"latent {t + 1:2d}  " + "  ".join(pairs))
    lines += [f"text       {texts[n].strip()!r}", f"reward {strict.flatten()[n]:.0f}, the answer is {problem.answer}"]
    return "\n    ".join([problem.question, *lines])


# --- 8. main: evaluate, train, evaluate -------------------------------------------------------------------------------
def main(argv=None):
    args = parse_args(argv)
    common.start_ranks(args.device)
    lm = common.load_model(args)
    ref = common.load_model(args) if args.kl_coef else None
    optimizer = torch.optim.AdamW(lm.model.parameters(), betas=(0.9, 0.99), weight_decay=0.1, fused=True)  # the paper's
    generator = torch.Generator(args.device)
    common.take_problems(args, "train", 0, 1)  # a malformed line ends the run here, before it begins
    held_out = common.take_problems(args, "test", 0, args.eval_problems)
    run = common.Run(args, "lepo" if args.latent_steps else "grpo")
    first, before = run.restore(lm.model, optimizer) if args.resume else (0, None)
    before = before or evaluate(lm, held_out, args, full=True)
    print(f"{sum(p.numel() for p in lm.model.parameters()):,} parameters, run folder {run.folder}\nbefore {before}")
    for step in common.progress(range(first, args.steps), initial=first, total=args.steps, desc="training"):
        if step % args.save_every == 0:
            run.save(step, before, lm.model, optimizer)
        # --- rollout. Noise and data follow from seed, step and rank: a resumed run goes on as it would have.
        start, count = time.time(), args.prompts_per_step
        generator.manual_seed(args.seed * 10**9 + step * 10**3 + common.RANK)
        problems = common.take_problems(args, "train", step * count, count)[common.RANK :: common.RANKS]
        prompts = [common.encode_prompt(lm.tokenizer, problem) for problem in problems]
        roll = rollout(lm, prompts, args.group_size, args, generator, args.latent_steps)
        # --- reward and advantages
        texts, strict, flexible = score(lm, roll, problems)
        advantages = group_advantages(strict).flatten()  # (N,)
        # --- update
        warmup = min(1, (step + 1) / max(1, 0.03 * args.steps))
        optimizer.param_groups[0]["lr"] = args.lr * warmup * (1 + math.cos(math.pi * step / args.steps)) / 2
        metrics = update(lm, ref, optimizer, roll, advantages, args)
        # --- log
        row = {"step": step, **measure(roll, strict, flexible, advantages, args), **metrics}
        row["seconds"] = round(time.time() - start, 3)
        if args.eval_every and (step + 1) % args.eval_every == 0:
            row = row | evaluate(lm, held_out, args, full=False) | row  # the length stays that of the rollouts
            tqdm.write(describe(lm, roll, problems, texts, strict, args))
        run.log(row)
        tqdm.write("  ".join(f"{name} {value:.4g}" for name, value in row.items()))
    run.save(max(first, args.steps), before, lm.model, optimizer)
    after = evaluate(lm, held_out, args, full=True) if args.steps else before
    run.finish(lm, after | {f"{name}_before": value for name, value in before.items()})


if __name__ == "__main__":
    common.run_main(main)
