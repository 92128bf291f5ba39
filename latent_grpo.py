r"""Latent-GRPO (arXiv 2604.27998): RL of a model that thinks in few, dense latents. After lepo.py.

    python latent_grpo.py                    # a tiny model learns on a laptop CPU, fourteen minutes
    python latent_grpo.py --surrogate mean   # the objective as published
    python latent_sft.py --model Qwen2.5-0.5B --out sft   # GSM8K on one GPU: a model learns latents
    python latent_grpo.py --model sft/model               # and then RL improves them

latent_sft.py has taught a model to think in mixtures that stand for several words each, and to end
its thought itself, by the exit token `</think>`. RL improves the thoughts, with three fixes for
what goes wrong. Embeddings and head are frozen: the space of latents stands still.

At step t the model has seen the prompt q and the embeddings e_<t. It gives logits a_t over the
vocabulary. pi_t = softmax(a_t) is its policy.

  (1)  candidates:      C_t = of the 256 likeliest tokens the nucleus, top_p, and at least K
  (2)  soft token:      s_k = log pi_t(k) + sigma (clip(g_k, -1.5, 3) + 1.5) on C_t,
                        g_k ~ Gumbel(0, 1) iid;  z_t = softmax(s) on the K tokens of largest s_k
       Fix 1 is the + 1.5, the one-sided noise. Where the exit token is the likeliest there is no
       noise. Where it is the heaviest of the K the thought ends. It is scored as a draw from pi.
  (3)  next input:      e_t = sum_k z_tk E[k],  E: the embeddings of the tokens
  (4)  advantage:       A_i = (r_i - mean r) / (std r + 1e-6),  r_i: reward of rollout i of a group
       Fix 2: rollouts that reach the cap are left out of mean and std and get 0. Fix 3: at step 1,
       where a group is still in one state, only the likeliest right rollout keeps its A_i.
  (5)  log-probability: L_it = sum_k c_k f(s_k - log pi_t(k)),  f(d) = -d - exp(-d),  c_k = 1/K
       f is the log-density of Gumbel(0, 1), s a constant. Of text, L_it is log pi_t of the token.
  (6)  objective:       J = sum_it A_i L_it / (number of steps of the batch)

Why one-sided. The slope of f in log pi_t(k) is 1 - exp(-d_k). A candidate with a negative margin
d_k is pushed the wrong way round: down by a right rollout. With two-sided noise that happens to .36
of them on chains. The + 1.5 changes no rollout and, up to rounding, leaves no margin < 0.

What the mean over K costs. All candidates of a right rollout are pushed up by nearly the same (.78
of c_k on chains at sigma 1), and those of a wrong one down. That tells little about which mixture
was good. With `--surrogate weighted`, c_k = z_k, the push is z - pi wherever the K candidates hold
all the mass: LEPO's soft label, with one-sided noise or without. test_latent_grpo.py proves both.

The code follows the paper's abstract and its authors' code (github.com/DJC-GO-SOLO/Latent-GRPO).
Where it departs from that code, a paragraph that begins with "Official code" says so, and why.
"""

import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import DynamicCache

import common
import tasks
from tasks import encoding, settings

# --- 1. Settings ----------------------------------------------------------------------------------
# The defaults of the method's own flags are from the paper's runs. Others: tasks/settings.py.
# A built-in task needs other values.
THINK = "<think>"  # what a prompt ends with
LIKELIEST = 256  # tokens that noise can lift into a mixture: a top-k is cheaper than a sort of all
PRESETS = {
    "chains": dict(
        model="chains_latent",
        kind="mixed",  # + and -
        max_new_tokens=16,
        steps=500,
        exit_text=" </think>",  # its words carry their space
        lr=2e-4,  # at 3e-4 some thoughts stop ending, in one of eleven runs nearly half of them
        surrogate="weighted",  # from .56 to .80 in 100 steps; mean: to .57, at the best of three
        noise_scale=0.5,  # before training .57 of the samples are right; at scale 1 .44
        overlong="off",  # who is masked is not punished for never ending: exit rates fell to .86
        first_token="off",  # no effect: .789 with it, .795 without
        eval_problems=512,
        eval_every=20,
    ),
}


def parse_args(argv=None):
    about = "Latent-GRPO, after latent_sft.py. The first page of the file explains it."
    parser = settings.make_parser("latent_grpo.py", about, PRESETS, max_new_tokens=128, ask=None)
    number, add = parser.add_number, parser.add_argument  # number: name, default, least value, help
    number("top_k", 10, 2, "K, candidates of a latent")
    number("top_p", 0.95, 1e-3, "probability mass of the candidates, in (1)")
    add("--noise", default="one_sided", choices=["one_sided", "two_sided"], help="fix 1, in (2)")
    number("noise_scale", 1.0, 0, "sigma of (2)")
    add("--overlong", default="exclude", choices=["exclude", "off"], help="fix 2, in (4)")
    add("--first_token", default="paper", choices=["paper", "off"], help="fix 3, in (4)")
    add("--surrogate", default="mean", choices=["mean", "weighted"], help="c of (5): 1/K or z")
    number("max_draws", 4, 1, "times P problems, until P groups have right and wrong rollouts")
    add("--exit_text", default="</think>", help="its first token ends a thought")
    return settings.parse_args(parser, PRESETS, argv)


# --- 2. The soft token: equations (1) and (2) -----------------------------------------------------
# Official code: text is the heaviest of (2), scored at temperature .6. "No noise where the exit is
# the likeliest" is there for 524, the first token of Llama's `</think>`; Qwen leaves by chance.
def candidates(logits, args):
    """Equation (1): logits (B, V) -> ids (B, C), log pi (B, C)

    In descending order, and -inf for what is cut. The K likeliest always stay.
    """
    logits = logits.float()
    values, ids = logits.topk(min(LIKELIEST, logits.shape[-1]), dim=-1)  # (B, C)
    log_probs = values - logits.logsumexp(-1, keepdim=True)  # (B, C)
    probs = log_probs.exp()  # (B, C)
    mass_before = probs.cumsum(-1) - probs  # (B, C) what the likelier candidates hold together
    mass_before[:, : args.top_k] = 0  # these stay
    return ids, log_probs.masked_fill(mass_before >= args.top_p, -torch.inf)


def soft_token(logits, exit_id, args, noise_free):
    """Equation (2): logits (B, V) -> ids (B, K), scores (B, K), the heaviest first"""
    ids, log_probs = candidates(logits, args)  # (B, C)
    exponential = torch.empty_like(log_probs).exponential_()  # (B, C)
    noise = (-exponential.log()).clamp(-1.5, 3)  # (B, C) -log of an exponential is Gumbel
    if args.noise == "one_sided":
        noise = noise + 1.5
    quiet = (ids[:, :1] == exit_id) | noise_free  # (B, 1) noise could only prolong such a thought
    noise = (args.noise_scale * noise).masked_fill(quiet, 0)  # (B, C)
    scores, place = (log_probs + noise).topk(args.top_k, dim=-1)  # (B, K)
    return ids.gather(-1, place), scores


def text_token(logits, args, noise_free):
    """An ordinary token in the form of a soft one: logits (B, V) -> ids (B, K), weights (B, K)

    All its weight is in the first of K slots. It is drawn from the full softmax, which (5) scores.
    """
    if noise_free:
        token = logits.argmax(-1, keepdim=True)  # (B, 1)
    else:
        token = common.draw(logits)  # (B, 1)
    weights = torch.zeros(len(logits), args.top_k, device=logits.device)  # (B, K)
    weights[:, 0] = 1
    return token.expand_as(weights), weights


# --- 3. Rollout: equation (3) ---------------------------------------------------------------------
# Soft tokens, then text, until an end token or the cap. A thought can end a rollout too: when its
# heaviest candidate is an end token. What was executed is stored, so that the update can replay it.
# The decoder holds the KV cache and runs a prompt once for all its rollouts.
@dataclass
class Rollout:
    """N = P * G rollouts of at most T steps. Row n continues prompt n // G."""

    prompts: list  # P lists of token ids
    ids: torch.Tensor  # (N, T, K) the candidates of each step, the heaviest first
    weights: torch.Tensor  # (N, T, K) z: one-hot at text steps, 0 after the end
    tokens: torch.Tensor  # (N, T) the heaviest candidate, which stands for a step in the text
    length: torch.Tensor  # (N,) steps executed, the end token included
    scores: torch.Tensor  # (N, T, K) s, 0 at text steps
    latents: torch.Tensor  # (N,) steps of the thought; the exit token is the next one


def mix(embedding, ids, weights):
    """Equation (3): embedding (V, D), ids and weights (…, K) -> (…, D), without a (…, K, D) tensor

    .62 of the token 21 and .38 of the token 11 make .62 E[21] + .38 E[11].
    """
    mixed = F.embedding_bag(
        ids.flatten(0, -2), embedding, per_sample_weights=weights.flatten(0, -2), mode="sum"
    )
    return mixed.unflatten(0, ids.shape[:-1])


@torch.no_grad()
def rollout(lm, prompts, group_size, latent_steps, args, noise_free=False):
    """G rollouts for each of P prompts -> Rollout

    latent_steps: where the exit is forced. 0 skips the thought.
    noise_free: soft tokens without noise and greedy text. All rollouts of a prompt are then equal.
    """
    shape = len(prompts) * group_size, args.max_new_tokens, args.top_k
    ids = torch.zeros(shape, dtype=torch.long, device=args.device)  # (N, T, K)
    weights = torch.zeros(shape, device=args.device)  # (N, T, K)
    tokens = torch.zeros_like(ids[:, :, 0])  # (N, T)
    length = torch.full_like(tokens[:, 0], args.max_new_tokens)  # (N,)
    scores = torch.zeros_like(weights)  # (N, T, K)
    latents = torch.zeros_like(length)  # (N,)
    rows = torch.arange(len(length), device=args.device)  # (B,) the rollouts that go on
    thinking = rows >= 0  # (B,) at first all of them
    with lm.autocast():
        decoder = common.Decoder(lm, prompts, group_size)
        logits = decoder.logits  # (N, V)
        for t in range(args.max_new_tokens):
            soft_ids, soft_scores = soft_token(logits, lm.exit_id, args, noise_free)  # (B, K)
            text_ids, text_z = text_token(logits, args, noise_free)  # (B, K)
            exits = thinking & ((soft_ids[:, 0] == lm.exit_id) | (t == latent_steps))  # (B,)
            text_ids = text_ids.masked_fill(exits[:, None], lm.exit_id)
            thinking = thinking & ~exits
            z_ids = torch.where(thinking[:, None], soft_ids, text_ids)  # (B, K)
            z = torch.where(thinking[:, None], soft_scores.softmax(-1), text_z)  # (B, K)
            heaviest = z_ids[:, 0]  # (B,)
            ids[rows, t], weights[rows, t], tokens[rows, t] = z_ids, z, heaviest
            scores[rows, t] = soft_scores.masked_fill(~thinking[:, None], 0)
            latents[rows] += thinking

            stops = torch.isin(heaviest, lm.stop_ids)  # (B,)
            length[rows[stops]] = t + 1
            if stops.all():
                break
            if stops.any():  # rows that have ended leave the decoder
                rows, z_ids, z = rows[~stops], z_ids[~stops], z[~stops]
                thinking = thinking[~stops]
                decoder.keep(~stops)
            embeds = mix(lm.embedding, z_ids, z)  # equation (3), (B, D)
            logits = decoder.feed(embeds[:, None])  # (B, V)
    return Rollout(prompts, ids, weights, tokens, length, scores, latents)


def texts_of(lm, roll):
    """-> N texts, of what is written after the thought"""
    spans = zip(roll.tokens, roll.latents, roll.length, strict=True)
    executed = [tokens[first:last] for tokens, first, last in spans]
    return lm.tokenizer.batch_decode(executed, skip_special_tokens=True)


# --- 4. Reward and advantages: equation (4) -------------------------------------------------------
# The verifier reads what is written after the thought.
# Official code: and the heaviest candidates of latents, so an answer that is only thought counts.
# Its GSM8K script masks overlong rollouts after they have counted in mean and std.
def rewards_of(lm, task, roll, problems):
    """-> strict rewards (P, G) and flexible ones (P, G)"""
    texts = texts_of(lm, roll)
    group_size = len(texts) // len(problems)
    verdicts = [task.verify(text, problems[n // group_size]) for n, text in enumerate(texts)]
    verdicts = torch.tensor(verdicts, device=roll.ids.device)  # (N, 2)
    return verdicts.view(-1, group_size, 2).unbind(-1)


def group_advantages(rewards, valid):
    """Equation (4) of a group, with fix 2: rewards and valid (G,) -> advantages (G,)

    Rewards 1, 1, 0, 0 give .87, .87, -.87, -.87. Without the third they give .58, .58, 0, -1.15.
    One that is left alone gets its reward, as in the official code. Equal rewards give exactly 0.
    """
    left = rewards[valid]  # (those in time,)
    if len(left) > 1:
        left = left - left[0]  # changes no advantage, and equal rewards become zeros
        left = (left - left.mean()) / (left.std() + 1e-6)
    return torch.zeros_like(rewards).masked_scatter(valid, left)


# Dynamic sampling: a group that is all right or all wrong teaches nothing, so problems are drawn
# until P groups have advantages. Only their steps count in (6). Official code: up to 50 draws.
def dynamic_sampling(lm, task, step, args):
    """-> P groups, or fewer after `max_draws` draws, as (Rollout, number in it, advantages (G,),
    lengths (G,)). Of the last draw its number, problems, Rollout, strict and flexible rewards."""
    groups = []
    for draw in range(args.max_draws):
        start = (step * args.max_draws + draw) * args.prompts_per_step
        batch = task.problems(args, "train", start, args.prompts_per_step)
        problems = batch[common.RANK :: common.RANKS]
        encoded = encoding.encode(lm, task, problems, args, THINK)
        roll = rollout(lm, encoded, args.group_size, args.max_new_tokens, args)
        strict, flexible = rewards_of(lm, task, roll, problems)  # (P, G)
        length = roll.length.view_as(strict)  # (P, G)
        valid = (length < args.max_new_tokens) | (args.overlong == "off")  # (P, G)
        for n in range(len(problems)):
            advantage = group_advantages(strict[n], valid[n])  # (G,)
            if advantage.any():
                groups.append((roll, n, advantage, length[n]))
        if len(groups) >= len(problems):
            break
    return groups[: len(problems)], draw, problems, roll, strict, flexible


# --- 5. Log-probability: equation (5) -------------------------------------------------------------
# A rollout is replayed: the prompt and the stored mixtures run through the model in one pass, with
# gradients. The logits are those of the rollout, up to rounding. A group has one prompt, so the
# prompt runs once. Shorter rollouts are padded on the right, where causal attention never looks, so
# there is no mask.
# Official code: where A <= 0 and d < 0 it means to reverse the slope, and only weakens it.
def latent_log_prob(log_pi, scores, weights, args):
    """Equation (5) of latents, all (M, K) -> (M,). Margins 1, 2 give f -1.37, -2.14, mean -1.75."""
    share = weights if args.surrogate == "weighted" else 1 / args.top_k  # c of (5)
    margin = scores - log_pi  # (M, K) d of (5)
    return (share * (-margin - (-margin).exp())).sum(-1)


def replay(lm, roll, group, group_size, args):
    """Equation (5) for the rollouts of one group -> L (G, T), 0 at steps that do not count"""
    rows = slice(group * group_size, (group + 1) * group_size)
    length = roll.length[rows, None]  # (G, 1)
    steps = max(2, int(length.max()))  # T, here of this group; 2, so that something is fed below
    ids, weights = roll.ids[rows, :steps], roll.weights[rows, :steps]  # (G, T, K)
    step = torch.arange(steps, device=ids.device)  # (T,)
    scored = step < length  # (G, T), of which M are true
    prompt = torch.tensor([roll.prompts[group]], device=ids.device)  # (1, L)
    with lm.autocast():
        cache = DynamicCache(config=lm.model.config)  # hidden_states reads it and adds to it
        prompt_end = lm.hidden_states(lm.embedding[prompt], cache)[:, -1:]  # (1, 1, D)
        cache.batch_repeat_interleave(group_size)
        thought = mix(lm.embedding, ids, weights)[:, :-1]  # (G, T - 1, D), the last is never fed
        later = lm.hidden_states(thought, cache)  # (G, T - 1, D)
        hidden = torch.cat([prompt_end.expand(group_size, -1, -1), later], 1)  # (G, T, D)
        log_pi = common.log_probs_at(hidden[scored], lm.head, ids[scored])  # (M, K)
    z, scores = weights[scored], roll.scores[rows, :steps][scored]  # (M, K)
    of_latent = latent_log_prob(log_pi, scores, z, args)  # (M,)
    is_latent = z[:, 1] > 0  # (M,) text has one candidate
    log_probs = torch.zeros(scored.shape, device=ids.device)  # (G, T)
    log_probs[scored] = torch.where(is_latent, of_latent, log_pi[:, 0])  # equation (5)
    return log_probs


# --- 6. Update: equation (6) ----------------------------------------------------------------------
# Group by group, so that the activations of one group are in memory at a time. All steps of the
# batch share one denominator, so an update does not depend on how the batch is cut.
# Official code: means over one or two rollouts, then over those. For GSM8K four updates of a fourth
# each, with PPO's clipped ratio, which with one update is always 1. For maths .001 times a KL term.
def first_token_selection(advantage, log_probs, length):
    """Fix 3 for a group: advantage, length (G,); log_probs (G, T), in place

    Several right rollouts would pull the one mixture of the first step towards several thoughts at
    once, perhaps towards a mean that is none of them. Of .87, .87, -.87, -.87 with the mean L of
    -2, -1, -1, -3 the first one's first step does not count.
    Official code: nor do those of the wrong ones. The paper silences only other right ones.
    """
    right = advantage > 0  # (G,)
    mean = log_probs.sum(1) / length  # (G,)
    right[mean.masked_fill(~right, -torch.inf).argmax()] = False
    log_probs[right, 0] = 0


def update(lm, optimizer, groups, args):
    """One optimiser step on the groups -> norm of the gradient, before it is bounded by 1"""
    optimizer.zero_grad()
    steps = sum(length.sum().item() for *_, length in groups)
    all_steps = common.sum_over_ranks(torch.tensor(float(steps), device=args.device))
    for roll, group, advantage, length in groups:
        log_probs = replay(lm, roll, group, len(advantage), args)  # (G, T)
        if args.first_token == "paper":
            first_token_selection(advantage, log_probs, length)
        objective = (advantage[:, None] * log_probs).sum() / all_steps  # equation (6)
        (-objective).backward()
    common.sum_gradients_over_ranks(lm.model)
    grad_norm = torch.nn.utils.clip_grad_norm_(lm.model.parameters(), 1.0)
    if not grad_norm.isfinite():
        raise common.UserError("the gradient is not finite: --resume the run with a lower --lr")
    optimizer.step()
    return grad_norm.item()


# --- 7. Evaluation and samples --------------------------------------------------------------------
def evaluate(lm, task, problems, args, full):
    """Always the same held-out problems and the same noise -> dict of means over all ranks

    greedy: noise-free. `full` adds sampled, with the noise of training, and greedy_no_latents,
    without soft tokens: how much the trained model relies on them.
    """
    torch.manual_seed(12345 + common.RANK)
    mine = problems[common.RANK :: common.RANKS]
    ways = [
        ("greedy", 1, args.max_new_tokens, True),
        ("sampled", args.group_size, args.max_new_tokens, False),
        ("greedy_no_latents", 1, 0, True),
    ]
    scores = {}
    for name, samples, latent_steps, noise_free in ways if full else ways[:1]:
        parts, exits = [], []
        size = args.prompts_per_step * args.group_size // samples // common.RANKS  # as in training
        for start in common.progress(range(0, len(mine), size), desc=name, leave=False):
            part = mine[start : start + size]
            encoded = encoding.encode(lm, task, part, args, THINK)
            roll = rollout(lm, encoded, samples, latent_steps, args, noise_free)
            strict, flexible = rewards_of(lm, task, roll, part)
            parts.append(torch.stack([strict, flexible, roll.length.view_as(strict)]))
            exits.append(roll.latents < roll.length)
        strict, flexible, length = torch.cat(parts, 1)  # (problems of this rank, samples) each
        scores |= {name: strict, f"{name}_flexible": flexible, f"{name}_length": length}
        scores[f"{name}_exit_rate"] = torch.cat(exits)
        if samples > 1:
            scores[f"pass@{samples}"] = strict.amax(1)  # any of the samples is right
    return {name: round(common.mean_over_ranks(value), 4) for name, value in scores.items()}


def describe(lm, roll, n):
    """Rollout n: each latent as its heaviest candidates with their weights, then the text -> str"""
    steps = roll.latents[n]
    lines = encoding.describe_thought(lm.tokenizer, roll.ids[n, :steps], roll.weights[n, :steps])
    return "\n    ".join([*lines, f"text       {texts_of(lm, roll)[n].strip()!r}"])


def metrics_of(roll, strict, flexible, args):
    """What a batch of rollouts looked like -> dict of means over all ranks"""
    metrics = {
        "reward": strict,
        "flexible": flexible,
        "length": roll.length,
        "ended": roll.length < args.max_new_tokens,
        "exit_rate": roll.latents < roll.length,
    }
    z = roll.weights[roll.weights[:, :, 1] > 0]  # (latents of all, K)
    metrics["effective_k"] = 1 / z.square().sum(-1)  # 1 if one-hot, 2 if two halves
    return {name: common.mean_over_ranks(value) for name, value in metrics.items()}


# --- 8. main: evaluate, train, evaluate -----------------------------------------------------------
def main(argv=None):
    args = parse_args(argv)
    common.start_ranks(args.device)
    task = tasks.find(args.task)
    lm = common.load_model(args)
    lm.exit_id = encoding.exit_token(lm, args.exit_text)
    lm.embedding.requires_grad = lm.head.requires_grad = False
    args.top_k = min(args.top_k, LIKELIEST, len(lm.embedding))
    held_out = task.problems(args, "test", 0, args.eval_problems)
    task.problems(args, "train", 0, 1)  # a malformed line ends the run here, before it begins
    optimizer = torch.optim.AdamW(lm.model.parameters(), fused=True)
    run = common.Run(args, "latent_grpo", lm, optimizer)
    first, before = run.start()
    before = before or evaluate(lm, task, held_out, args, full=True)
    print("before:", before)
    for step in common.progress(range(first, args.steps), initial=first, total=args.steps):
        if step % args.save_every == 0:
            run.save(step, before)
        # Problems and noise follow from seed, step and rank: a resumed run goes on as it would have
        began = time.time()
        torch.manual_seed(hash((args.seed, step, common.RANK)))

        groups, draw, problems, roll, strict, flexible = dynamic_sampling(lm, task, step, args)
        if args.eval_every and step % args.eval_every == 0:
            tqdm.write(f"{problems[0].question}\n    {describe(lm, roll, 0)}")
            tqdm.write(f"    reward {strict[0, 0]:.0f}, the answer is {problems[0].answer}")
        optimizer.param_groups[0]["lr"] = settings.learning_rate(args, step)
        grad_norm = update(lm, optimizer, groups, args)

        row = {"step": step, "draws": draw + 1, **metrics_of(roll, strict, flexible, args)}
        row |= {"grad_norm": grad_norm, "seconds": round(time.time() - began, 3)}
        if args.eval_every and (step + 1) % args.eval_every == 0:
            row |= evaluate(lm, task, held_out, args, full=False)
        run.log(row)
    run.save(max(first, args.steps), before)
    after = evaluate(lm, task, held_out, args, full=True) if first + args.steps else before
    run.finish(before, after)


if __name__ == "__main__":
    common.run_main(main)
