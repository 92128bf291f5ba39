r"""LEPO, Latent Reasoning Policy Optimization (arXiv 2604.17892), in one file to read from the top.

    python lepo.py                           # a tiny model learns on a laptop CPU, two minutes
    python lepo.py --task trees              # where soft tokens are worth more than words
    python lepo.py --latent_steps 0          # the baseline: plain GRPO
    python lepo.py --model Qwen2.5-0.5B      # GSM8K on one GPU
    python lepo.py --model runs/X/model --ask "16 + 5 - 9"      # see a trained model think

A language model usually thinks in words: at every step it commits to one token. LEPO lets it think
its first `latent_steps` steps in *soft tokens* and only then write text. A soft token is a random
mixture of token embeddings. It is drawn with Gumbel noise, so the rollouts of one prompt, a group,
explore different latent thoughts. A verifier reads each rollout and pays 1 or 0. Then one policy
gradient, with the same formula at latent and at text steps, makes the thoughts and the texts of the
better rollouts likelier.

At step t the model has seen the prompt q and the embeddings e_<t. It gives logits a_t over the
vocabulary. pi_t = softmax(a_t) is its policy.

  (1)  candidates:      C_t = the top_k likeliest tokens, cut to the fewest that hold the share
                        top_p of their probability
  (2)  soft token:      z_t = softmax((a_t + g) / tau) on C_t,  g_k ~ Gumbel(0, 1) iid
       A text step draws one token from all of pi_t, and its z_t is one-hot. Without (1) that would
       be (2) for tau -> 0.
  (3)  next input:      e_t = sum_k z_tk E[k],  E: the embeddings of the tokens
  (4)  advantage:       A_i = (r_i - mean r) / (std r + 1e-4),  r_i: reward of rollout i of a group
  (5)  log-probability: L_it = sum_k z_tk log pi_t(k)
  (6)  objective:       J = sum_it A_i L_it / (number of steps of the batch)

(5) is the paper's unification. The mixture that was executed is a soft label: the gradient of L_it
with respect to the logits a_t is z_t - pi_t. For a one-hot z_t that is the gradient of an ordinary
token's log-probability. z_t is a constant, so nothing is differentiated through the sampling. The
rest is ordinary backpropagation.

What (5) is and is not. For tau > 0, or where (1) cuts, it is not the log of a density: z - pi is
not a score, so the policy gradient is biased. On small vocabularies with nothing cut its direction
is nearly right (cosine above .99 where the reward is a smooth function of z), and its length is .8
of the true one at tau .3. The exact density of z, the Gumbel-Softmax or Concrete distribution, has
no bias, but the squared length of its gradient grows by about 1 with each candidate, however
improbable that is. test_lepo.py checks these statements, in the order of this file.

The code follows the paper's abstract and its authors' code (github.com/YuyanZhou/lepo, on TRL).
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
PRESETS = {
    "chains": dict(
        model="chains",
        kind="mixed",  # + and -
        latent_steps=12,  # two operations of six tokens each; a chain has two to five
        max_new_tokens=40,
        tau=0.5,  # within the paper's .3 to .6
        lr=3e-4,  # the best of 1e-4, 3e-4, 6e-4: a small model takes larger steps
        eval_problems=512,
    ),
    "trees": dict(
        model="trees",
        kind="2,2,4",  # depth, branching, exits
        latent_steps=3,  # a walk: entrance, one of two children, one of four leaves
        max_new_tokens=8,
        tau=20.0,  # so that the nodes in reach weigh nearly the same
        top_k=6,  # room for the four leaves; 8 was no better
        top_p=0.995,
        lr=2e-4,
        steps=150,
        eval_problems=1024,
    ),
    "svamp": dict(latent_steps=16),
}


def parse_args(argv=None):
    about = "LEPO and, with --latent_steps 0, GRPO. The first page of the file explains both."
    parser = settings.make_parser("lepo.py", about, PRESETS)
    number, add = parser.add_number, parser.add_argument  # number: name, default, least value, help
    number("latent_steps", 64, 0, "soft tokens before the text; 0 is plain GRPO")
    number("tau", 0.3, 1e-3, "of (2); smaller is nearer to discrete tokens")
    number("top_k", 30, 1, "most candidates of a soft token, in (1)")
    number("top_p", 0.95, 1e-3, "probability mass of the candidates, in (1)")
    add("--noise", default="gumbel", choices=["gumbel", "none"], help="of soft tokens, in (2)")
    add("--text_only", action="store_true", help="latents count in (6), but only text is trained")
    args = settings.parse_args(parser, PRESETS, argv)
    if args.latent_steps >= args.max_new_tokens:
        parser.error("--latent_steps must be below --max_new_tokens: text needs room")
    if args.latent_steps == 0:
        args.top_k = 1  # K: a discrete token has one candidate
    return args


# --- 2. The soft token: equations (1) and (2) -----------------------------------------------------
# Two functions turn the logits of a step into what is executed: ids (B, K) and weights (B, K) that
# sum to 1. One serves latent steps, the other text steps. The rest of the file need not know which
# of them made a step. The weights are constants from here on.
# The noise is what makes the thoughts of one prompt differ. Without it (--noise none) all rollouts
# of a group think the same, and as advantages sum to 0 the latents get no gradient of their own.
def candidates(logits, args):
    """Equation (1): logits (B, V) -> ids (B, K), log-probabilities among the top_k (B, K)

    In descending order, and -inf for what is cut: of .6, .3, .1 at top_p .8 two candidates stay.
    """
    values, ids = logits.topk(args.top_k, dim=-1)  # (B, K)
    log_probs = values.float().log_softmax(-1)  # (B, K)
    probs = log_probs.exp()  # (B, K)
    mass_before = probs.cumsum(-1) - probs  # (B, K) what the likelier candidates hold together
    return ids, log_probs.masked_fill(mass_before >= args.top_p, -torch.inf)


def soft_token(logits, args, noise_free):
    """Equation (2): logits (B, V) -> ids (B, K), weights (B, K)

    For probabilities .6 and .3, tau .5 and noise that happens to be 0 the weights are .8 and .2.
    """
    ids, log_probs = candidates(logits, args)  # (B, K)
    if args.noise == "gumbel" and not noise_free:
        exponential = torch.empty_like(log_probs).exponential_()  # (B, K)
        gumbel = -exponential.clamp(min=1e-30).log()  # (B, K); a platform may draw an exact 0
        log_probs = log_probs + gumbel
    return ids, (log_probs / args.tau).softmax(-1)


def text_token(logits, args, noise_free):
    """An ordinary token in the form of a soft one: logits (B, V) -> ids (B, K), weights (B, K)

    All its weight is in the first of K slots. It is drawn from the full softmax, which (5) scores.

    Official code: (1) filters text too. Each draw that is punished then pushes up all other tokens,
    also those that are never drawn and so never punished. Where the model has to guess and is
    mostly wrong, they win in the end. test_lepo.py shows this drift.
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
    ids: torch.Tensor  # (N, T, K) the candidates of each step
    weights: torch.Tensor  # (N, T, K) z: one-hot at text steps, 0 after the end
    tokens: torch.Tensor  # (N, T) the heaviest candidate, which stands for a step in the text
    length: torch.Tensor  # (N,) steps executed, the end token included


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

    noise_free: soft tokens without noise and greedy text. All rollouts of a prompt are then equal.

    Official code: a latent step appears in the text as the likeliest token before noise, which was
    not what the model executed.
    """
    shape = len(prompts) * group_size, args.max_new_tokens, args.top_k
    ids = torch.zeros(shape, dtype=torch.long, device=args.device)  # (N, T, K)
    weights = torch.zeros(shape, device=args.device)  # (N, T, K)
    tokens = torch.zeros_like(ids[:, :, 0])  # (N, T)
    length = torch.full_like(tokens[:, 0], args.max_new_tokens)  # (N,)
    rows = torch.arange(len(length), device=args.device)  # (B,) the rollouts that go on
    with lm.autocast():
        decoder = common.Decoder(lm, prompts, group_size)
        logits = decoder.logits  # (N, V)
        for t in range(args.max_new_tokens):
            sample = soft_token if t < latent_steps else text_token
            z_ids, z = sample(logits, args, noise_free)  # (B, K)
            heaviest = z_ids.gather(-1, z.argmax(-1, keepdim=True)).squeeze(-1)  # (B,)
            ids[rows, t], weights[rows, t], tokens[rows, t] = z_ids, z, heaviest

            stops = torch.isin(heaviest, lm.stop_ids)  # (B,)
            length[rows[stops]] = t + 1
            if stops.all():
                break
            if stops.any():  # rows that have ended leave the decoder
                rows, z_ids, z = rows[~stops], z_ids[~stops], z[~stops]
                decoder.keep(~stops)
            embeds = mix(lm.embedding, z_ids, z)  # equation (3), (B, D)
            logits = decoder.feed(embeds[:, None])  # (B, V)
    return Rollout(prompts, ids, weights, tokens, length)


def texts_of(lm, roll):
    """-> N texts, the thought included: a latent step is its heaviest candidate"""
    executed = [tokens[:length] for tokens, length in zip(roll.tokens, roll.length, strict=True)]
    return lm.tokenizer.batch_decode(executed, skip_special_tokens=True)


# --- 4. Reward and advantages: equation (4) -------------------------------------------------------
# The verifier reads a rollout as text, in which each latent step is its heaviest candidate. A group
# that is all right or all wrong teaches nothing.
# Official code: math-verify also accepts an answer outside of \boxed{}. Here that is the flexible
# reward, which is logged and not trained on. Where it is higher, only the form was wrong.
def rewards_of(lm, task, roll, problems):
    """-> strict rewards (P, G) and flexible ones (P, G)"""
    texts = texts_of(lm, roll)
    group_size = len(texts) // len(problems)
    verdicts = [task.verify(text, problems[n // group_size]) for n, text in enumerate(texts)]
    verdicts = torch.tensor(verdicts, device=roll.ids.device)  # (N, 2)
    return verdicts.view(-1, group_size, 2).unbind(-1)


def group_advantages(rewards):
    """Equation (4): rewards (P, G) -> advantages (P, G), with the unbiased standard deviation

    Rewards 1, 1, 0, 0 give .87, .87, -.87, -.87. The only right rollout of four gets 1.5 and the
    others -.5: what succeeds rarely is pushed harder. Equal rewards give exactly 0, though the
    float32 mean of eight times 7.7 is not 7.7.
    """
    rewards = rewards - rewards[:, :1]  # changes no advantage, and equal rewards become zeros
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)


# --- 5. Log-probability: equation (5) -------------------------------------------------------------
# A rollout is replayed: the prompt and the stored mixtures run through the model in one pass, with
# gradients. The logits are those of the rollout, up to rounding. A group has one prompt, so the
# prompt runs once. Shorter rollouts are padded on the right, where causal attention never looks, so
# there is no mask.
# Official code: e_t is a constant. Here it is mixed anew, so that E learns as an input as well.
def replay(lm, roll, group, group_size, args):
    """Equation (5) for the rollouts of one group -> L (G, T), 0 at steps that do not count"""
    rows = slice(group * group_size, (group + 1) * group_size)
    length = roll.length[rows, None]  # (G, 1)
    steps = max(2, int(length.max()))  # T, here of this group; 2, so that something is fed below
    ids, weights = roll.ids[rows, :steps], roll.weights[rows, :steps]  # (G, T, K)
    step = torch.arange(steps, device=ids.device)  # (T,)
    trained_from = args.latent_steps if args.text_only else 0
    scored = (step >= trained_from) & (step < length)  # (G, T), of which M are true
    prompt = torch.tensor([roll.prompts[group]], device=ids.device)  # (1, L)
    with lm.autocast():
        cache = DynamicCache(config=lm.model.config)  # hidden_states reads it and adds to it
        prompt_end = lm.hidden_states(lm.embedding[prompt], cache)[:, -1:]  # (1, 1, D)
        cache.batch_repeat_interleave(group_size)
        thought = mix(lm.embedding, ids, weights)[:, :-1]  # (G, T - 1, D), the last is never fed
        later = lm.hidden_states(thought, cache)  # (G, T - 1, D)
        hidden = torch.cat([prompt_end.expand(group_size, -1, -1), later], 1)  # (G, T, D)
        log_pi = common.log_probs_at(hidden[scored], lm.head, ids[scored])  # (M, K)
    log_probs = torch.zeros(scored.shape, device=ids.device)  # (G, T)
    log_probs[scored] = (weights[scored] * log_pi).sum(-1)  # equation (5)
    return log_probs


# --- 6. Update: equation (6) ----------------------------------------------------------------------
# Group by group, so that the activations of one group are in memory at a time. All steps of the
# batch share one denominator, so an update does not depend on how the batch is cut.
# Official code: as it was run, a mean for each rollout first, which favours steps of short ones.
# PPO's clipped ratio at text steps: with one update for a batch, as in its settings, the ratio is
# always 1 and its gradient is that of (5). And a KL term, which its settings switch off.
def update(lm, optimizer, roll, advantages, args):
    """One optimiser step; advantages (P, G) -> norm of the gradient, before it is bounded by 1"""
    optimizer.zero_grad()
    all_steps = common.sum_over_ranks(roll.length.sum().float())
    for group, advantage in enumerate(advantages):  # (G,) each
        if not advantage.any():  # nothing to learn, though its steps count
            continue
        log_probs = replay(lm, roll, group, len(advantage), args)  # (G, T)
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
        ("greedy", 1, args.latent_steps, True),
        ("sampled", args.group_size, args.latent_steps, False),
        ("greedy_no_latents", 1, 0, True),
    ]
    scores = {}
    for name, samples, latent_steps, noise_free in ways if full else ways[:1]:
        parts = []
        size = args.prompts_per_step * args.group_size // samples // common.RANKS  # as in training
        for start in common.progress(range(0, len(mine), size), desc=name, leave=False):
            part = mine[start : start + size]
            encoded = encoding.encode(lm, task, part, args)
            roll = rollout(lm, encoded, samples, latent_steps, args, noise_free)
            strict, flexible = rewards_of(lm, task, roll, part)
            parts.append(torch.stack([strict, flexible, roll.length.view_as(strict)]))
        strict, flexible, length = torch.cat(parts, 1)  # (problems of this rank, samples) each
        scores |= {name: strict, f"{name}_flexible": flexible, f"{name}_length": length}
        if samples > 1:
            scores[f"pass@{samples}"] = strict.amax(1)  # any of the samples is right
    return {name: round(common.mean_over_ranks(value), 4) for name, value in scores.items()}


def describe(lm, roll, n, args):
    """Rollout n: each latent as its heaviest candidates with their weights, then the text -> str"""
    steps = min(args.latent_steps, roll.length[n])
    lines = encoding.describe_thought(lm.tokenizer, roll.ids[n, :steps], roll.weights[n, :steps])
    return "\n    ".join([*lines, f"text       {texts_of(lm, roll)[n].strip()!r}"])


def ask(lm, task, args):
    """What the model thinks about a question: without noise, and three times with it"""
    encoded = encoding.encode(lm, task, [tasks.Problem(args.ask, "")], args)
    torch.manual_seed(args.seed)
    for noise_free in (True, False, False, False):
        roll = rollout(lm, encoded, 1, args.latent_steps, args, noise_free)
        print("without noise" if noise_free else "with noise")
        print("    " + describe(lm, roll, 0, args))


def metrics_of(roll, strict, flexible, advantages, args):
    """What a batch of rollouts looked like -> dict of means over all ranks"""
    metrics = {
        "reward": strict,
        "flexible": flexible,
        "length": roll.length,
        "ended": roll.length < args.max_new_tokens,
        "zero_advantage": advantages == 0,
    }
    if args.latent_steps:
        z = roll.weights[:, : args.latent_steps]  # (N, latent steps, K)
        executed = z.sum(-1) > 0  # (N, latent steps)
        metrics["effective_k"] = 1 / z.square().sum(-1)[executed]  # 1 if one-hot, 2 if two halves
    return {name: common.mean_over_ranks(value) for name, value in metrics.items()}


# --- 8. main: evaluate, train, evaluate -----------------------------------------------------------
def main(argv=None):
    args = parse_args(argv)
    common.start_ranks(args.device)
    task = tasks.find(args.task)
    lm = common.load_model(args)
    args.top_k = min(args.top_k, len(lm.embedding))
    if args.ask is not None:
        return ask(lm, task, args)
    held_out = task.problems(args, "test", 0, args.eval_problems)
    task.problems(args, "train", 0, 1)  # a malformed line ends the run here, before it begins
    optimizer = torch.optim.AdamW(
        lm.model.parameters(), betas=(0.9, 0.99), weight_decay=0.1, fused=True
    )
    run = common.Run(args, "lepo" if args.latent_steps else "grpo", lm, optimizer)
    first, before = run.start()
    before = before or evaluate(lm, task, held_out, args, full=True)
    print("before:", before)
    for step in common.progress(range(first, args.steps), initial=first, total=args.steps):
        if step % args.save_every == 0:
            run.save(step, before)
        # Problems and noise follow from seed, step and rank: a resumed run goes on as it would have
        began, count = time.time(), args.prompts_per_step
        batch = task.problems(args, "train", step * count, count)
        problems = batch[common.RANK :: common.RANKS]
        torch.manual_seed(hash((args.seed, step, common.RANK)))

        encoded = encoding.encode(lm, task, problems, args)
        roll = rollout(lm, encoded, args.group_size, args.latent_steps, args)
        strict, flexible = rewards_of(lm, task, roll, problems)  # (P, G)
        if args.eval_every and step % args.eval_every == 0:
            tqdm.write(f"{problems[0].question}\n    {describe(lm, roll, 0, args)}")
            tqdm.write(f"    reward {strict[0, 0]:.0f}, the answer is {problems[0].answer}")
        advantages = group_advantages(strict)  # (P, G)
        optimizer.param_groups[0]["lr"] = settings.learning_rate(args, step)
        grad_norm = update(lm, optimizer, roll, advantages, args)

        row = {"step": step, **metrics_of(roll, strict, flexible, advantages, args)}
        row |= {"grad_norm": grad_norm, "seconds": round(time.time() - began, 3)}
        if args.eval_every and (step + 1) % args.eval_every == 0:
            row |= evaluate(lm, task, held_out, args, full=False)
        run.log(row)
    run.save(max(first, args.steps), before)
    after = evaluate(lm, task, held_out, args, full=True) if first + args.steps else before
    run.finish(before, after)


if __name__ == "__main__":
    common.run_main(main)
