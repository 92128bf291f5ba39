r"""Latent SFT, the first stage of Latent-GRPO (arXiv 2604.27998): to think in few, dense latents.

    python latent_sft.py                                     # the chains model, on a laptop CPU
    python latent_sft.py --model Qwen2.5-0.5B --out sft      # GSM8K's equations, on one GPU
    python latent_sft.py --model sft/model --ask "What is 3 times 48 / 2?"      # see it think
    python latent_grpo.py --model sft/model                  # the second stage, RL, goes on from it

lepo.py takes a model as it is and mixes the tokens that it would write anyway, one after the other.
Here the model learns a denser way. A latent stands for several words at once, a thought is a few
latents long, and the model itself says when it is over, by the exit token. All that this needs is
worked solutions, and they may be wrong: those of the built-in task come from a student who forgets
most carries. A solution is cut into chunks, and each chunk becomes a latent:

    17 + 5 = 12 ; 12 - 8 = 4 </think> 4 <eos>       what the student wrote
    {17 + 5}   {= 12 ; 12 - 8}   {= 4}              its chunks: of six tokens, the first of three
    17 .33  + .33  5 .33                            three latents, each token with its weight
    = .17  12 .33  ; .17  - .17  8 .17
    = .5  4 .5
    </think> 4 <eos>                                and then discrete tokens

The model has read the prompt q and the embeddings e_<t. pi is its policy, the softmax of its logits
over the vocabulary.

  (1)  label:   y_i = how often each token occurs in chunk i: weights that sum to 1
  (2)  noise:   w_i = softmax(log y_i + clip(sigma g, -1.5, 3)),  g ~ Gumbel(0, 1) iid.
                sigma grows from 0 to `noise_scale` during the training
  (3)  input:   e_i = sum_k w_ik E[k],  E: the embeddings of the tokens. The model always reads the
                teacher's thought so far, and not its own
  (4)  loss:    KL(w_i || pi(. | q, e_<i)), a mean over the latents of a thought, then over thoughts
                + -log pi(token | q, e_<t), a mean over all tokens of exit, answer and end
       A discrete token is a one-hot w, whose KL divergence is its cross-entropy: one formula.
  (5)  in use:  w = softmax of the top_k largest logits, until the exit token is the largest. From
                there on the text is greedy

Why chunks begin in the middle of a step of the solution: a latent then holds a result and what is
done with it next, and the operands of every result stand in the latent before it. With chunks that
are cut at the steps .17 of the answers are right after 600 steps, here .48 (one seed each).

Why noise (2): RL draws its thoughts with noise. And even without it the model's own mixtures are
never as clean as the teacher's. Trained on clean ones alone, the model is lost among its own: .19
are right after 600 steps.

With GSM8K or a folder, the worked solutions are what stands as <<48/2=24>> in the field `answer`. A
step learns from `ROWS` solutions at a time, which is what its memory depends on.

The shares of right answers are in results/README.md. tests/test_latent_sft.py checks the equations,
in the order of this file. Where it departs from the authors' code
(github.com/DJC-GO-SOLO/Latent-SFT), a paragraph that begins with "Official code" says so, and why.
"""

import collections
import random
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

import common
import tasks
from tasks import encoding, settings

# --- 1. Settings ----------------------------------------------------------------------------------
# The method's own flags are below, all others are in tasks/settings.py. A batch has no groups: it
# is `prompts_per_step` worked solutions. The built-in task needs other values.
PRESETS = {
    "chains": dict(
        model="chains",
        kind="mixed",  # + and -
        exit_text=" </think>",  # a word of this model begins with its space
        chunk=6,  # the tokens of one operation, `17 + 5 = 12 ;`
        max_new_tokens=16,  # at most six latents of a teacher, exit token, answer, end
        steps=1800,  # with the next two nearly those of its pretraining:
        prompts_per_step=128,  # a model that is not finished is useless, says chains.py
        lr=2e-3,
        eval_problems=512,
        eval_every=300,
        save_every=300,
    ),
}
THINK = "<think>"  # what a prompt ends with
ROWS = 16  # worked solutions in a forward pass: a matter of memory, not of results


def parse_args(argv=None):
    about = "A model learns to think in latents. The first page of the file explains it."
    parser = settings.make_parser(
        "latent_sft.py", about, PRESETS,
        steps=2000, prompts_per_step=64, lr=1e-4, max_new_tokens=128, group_size=None,
        eval_every=100,
    )  # fmt: skip
    number, add = parser.add_number, parser.add_argument  # number: name, default, least value, help
    number("chunk", 8, 1, "tokens that a latent stands for; the first one, for half as many")
    number("top_k", 10, 2, "K, candidates of a latent")
    number("noise_scale", 1.0, 0, "sigma of (2) at the end of the training; 0: clean labels")
    add("--exit_text", default="</think>", help="its first token ends a thought")
    args = settings.parse_args(parser, PRESETS, argv)
    if args.chunk > args.top_k:
        parser.error("--chunk must be at most --top_k: a latent has room for so many tokens")
    return args


# --- 2. Worked solutions: equation (1) ------------------------------------------------------------
# A solution is cut into chunks and becomes a row of columns: the prompt, a latent for each chunk,
# then exit token, answer and end token. Each column has K candidates and their weights. A discrete
# token is a column too, with all its weight in the first slot: one formula reads and scores both.
# Official code: an encoder writes the latents, such that a decoder can tell each chunk from the
# latent before it, and the answer from all of them. That takes three more trainings. Here a label
# is the chunk's own tokens: nothing to train, and better on the chains model (.543 against .344
# after 600 steps, former code, results/archive). For large models nobody has compared the two.
# Official code: a chunk has 2 tokens (GSM8K) or 16, also the first one.
# Official code: the exit token is the first one of `</think>`, as here. The rest of it is fed by
# force there. Here the model has to write it.
def chunks_of(ids, size):
    """Token ids of a thought -> a list of them for each latent. Size 6 cuts 11 into 3, 6 and 2."""
    first = max(1, size // 2)
    return [ids[:first]] + [ids[i : i + size] for i in range(first, len(ids), size)]


def label_of(chunk, top_k):
    """Equation (1): token ids -> lists of K candidates and of their weights

    Of the chunk 3, 12, 4, 12, 5, 8 the token 12 gets the weight 1/3 and each other one 1/6. Slots
    that are left over have no weight.
    """
    counts = collections.Counter(chunk)
    unused = [0] * (top_k - len(counts))
    weights = [count / len(chunk) for count in counts.values()]  # equation (1)
    return [*counts, *unused], weights + unused


def teacher(lm, task, problems, args, rng):
    """Worked solutions -> rows of columns, the shorter ones first

    A column is (chunk, share). Its share in the two means of (4) is 1/3 and 0 for each of three
    latents, 0 and 1 for a discrete token that is learnt, 0 and 0 for the prompt.
    """
    rows = []
    prompts = encoding.encode(lm, task, problems, args, THINK)
    end = lm.tokenizer.eos_token_id or int(lm.stop_ids[0])
    for prompt, problem in zip(prompts, problems, strict=True):
        thought, answer = task.worked(problem, rng)
        texts = [thought, args.exit_text, answer]
        thought_ids, exit_ids, answer_ids = lm.tokenizer(texts, add_special_tokens=False).input_ids
        if thought_ids:  # there is a worked solution
            chunks = chunks_of(thought_ids, args.chunk)
            row = [([token], (0, 0)) for token in prompt]
            row += [(chunk, (1 / len(chunks), 0)) for chunk in chunks]
            row += [([token], (0, 1)) for token in exit_ids + answer_ids + [end]]
            rows.append(row)
    return sorted(rows, key=len)


def to_tensors(rows, args):
    """B rows, padded on the right -> ids (B, L, K), weights (B, L, K), share (B, L, 2)"""
    ids, weights, shares = [], [], []
    for row in rows:
        padding = [([0], (0, 0))] * (len(rows[-1]) - len(row))
        for chunk, share in row + padding:
            candidates, label = label_of(chunk, args.top_k)
            ids.append(candidates)
            weights.append(label)
            shares.append(share)
    return [
        torch.tensor(columns, device=args.device).unflatten(0, (len(rows), -1))
        for columns in (ids, weights, shares)
    ]


# --- 3. Noise on the teacher: equation (2) --------------------------------------------------------
# The teacher's thought is another one each time, near its label. The model reads the noisy mixture
# and is taught to predict it, so it meets in training what it will meet among its own mixtures. The
# clip bounds how far: the ratio of two weights changes by e^4.5 at the most.
# Official code: the noise has its full scale from the first step on. It is drawn again where the
# exit token comes out as the heaviest, but here no label holds that token.
def noisy_labels(weights, scale):
    """Equation (2): weights (B, L, K) -> (B, L, K)

    What has weight 0 keeps it, so that a discrete token stays one. If the noise of two tokens that
    weigh .5 each happens to be 0 and .69, the logarithm of 2, they weigh .33 and .67.
    """
    exponential = torch.empty_like(weights).exponential_()  # (B, L, K)
    gumbel = -exponential.clamp(min=1e-30).log()  # (B, L, K); a platform may draw an exact 0
    return (weights.log() + (scale * gumbel).clamp(-1.5, 3.0)).softmax(-1)


# --- 4. Update: equations (3) and (4) -------------------------------------------------------------
# One forward pass sees prompts and teachers' thoughts as embeddings. Rows are padded on the right,
# where causal attention never looks, so there is no mask.
# Embeddings and head are frozen: the space of latents stands still while the model learns to move
# in it.
# Official code: LoRA adapters. Here all weights but embeddings and head are trained.
def mix(embedding, ids, weights):
    """Equation (3): embedding (V, D), ids and weights (…, K) -> (…, D), without a (…, K, D) tensor

    .62 of the token 21 and .38 of the token 11 make .62 E[21] + .38 E[11].
    """
    mixed = F.embedding_bag(
        ids.flatten(0, -2), embedding, per_sample_weights=weights.flatten(0, -2), mode="sum"
    )
    return mixed.unflatten(0, ids.shape[:-1])


def divergence(lm, ids, weights, scored):
    """KL(w || pi) of (4) in M columns: ids, weights (B, L, K), scored (B, L) -> (M,)

    For a one-hot w it is -log pi. The first column of a row has nothing before it and is never one.
    """
    with lm.autocast():
        embeds = mix(lm.embedding, ids, weights)[:, :-1]  # equation (3), (B, L - 1, D)
        hidden = lm.hidden_states(embeds, cache=None)  # (B, L - 1, D), each predicts the next one
        log_pi = common.log_probs_at(hidden[scored[:, 1:]], lm.head, ids[scored])  # (M, K)
    w = weights[scored]  # (M, K)
    return (torch.xlogy(w, w) - w * log_pi).sum(-1)


def update(lm, optimizer, rows, scale, args):
    """One optimiser step towards the teacher's rows, with noise of this scale -> dict of metrics

    A few rows at a time are in memory. The denominators are those of the whole batch over all
    ranks, so an update does not depend on how it is cut. The gradient's norm is bounded by 1.
    """
    optimizer.zero_grad()
    shares = torch.tensor([share for row in rows for _, share in row], device=args.device)
    totals = common.sum_over_ranks(shares.view(-1, 2).sum(0))  # (2,) thoughts, discrete tokens
    losses = torch.zeros_like(totals)
    for start in range(0, len(rows), ROWS):
        ids, weights, share = to_tensors(rows[start : start + ROWS], args)
        scored = share.any(-1)  # (B, L)
        weights = noisy_labels(weights, scale)  # equation (2), (B, L, K)
        kl = divergence(lm, ids, weights, scored)  # (M,)
        loss = kl @ share[scored] / totals  # (2,), the two summands of equation (4)
        loss.sum().backward()
        losses += loss.detach()
    common.sum_gradients_over_ranks(lm.model)
    grad_norm = torch.nn.utils.clip_grad_norm_(lm.model.parameters(), 1.0)
    if not grad_norm.isfinite():
        raise common.UserError("the gradient is not finite: --resume the run with a lower --lr")
    optimizer.step()
    kl, cross_entropy = common.sum_over_ranks(losses).tolist()
    return {"kl": kl, "cross_entropy": cross_entropy, "grad_norm": grad_norm.item()}


# --- 5. In use: equation (5) ----------------------------------------------------------------------
# The model thinks by itself, without noise and without a teacher. What it mixes is what it reads at
# the next step. It has to find the exit itself: a thought that never ends has no answer.
@dataclass
class Rollout:
    """N thoughts and texts of at most T steps. What a row does after its end counts nothing."""

    ids: torch.Tensor  # (N, T, K) candidates of each step, the likeliest first
    weights: torch.Tensor  # (N, T, K) w: one-hot at text steps
    latents: torch.Tensor  # (N,) steps of the thought, the exit token not included
    length: torch.Tensor  # (N,) all steps, the end token included


@torch.no_grad()
def think(lm, prompts, args):
    """A thought and a text for each of N prompts -> Rollout"""
    ids, weights = [], []
    latents = torch.zeros(len(prompts), dtype=torch.long, device=args.device)  # (N,)
    length = torch.zeros_like(latents)  # (N,)
    going = torch.ones_like(latents).bool()  # (N,) has not ended
    with lm.autocast():
        decoder = common.Decoder(lm, prompts, 1)
        logits = decoder.logits  # (N, V)
        for t in range(args.max_new_tokens):
            values, candidates = logits.float().topk(args.top_k, dim=-1)  # (N, K)
            # Where all steps so far were latents, and the exit is not the likeliest
            thinking = going & (latents == t) & (candidates[:, 0] != lm.exit_id)  # (N,)
            values[~thinking, 1:] = -torch.inf  # text is greedy: the likeliest token alone
            w = values.softmax(-1)  # equation (5), (N, K)
            ids.append(candidates)
            weights.append(w)
            latents += thinking
            length += going
            going = going & ~torch.isin(candidates[:, 0], lm.stop_ids)
            if not going.any():
                break
            embeds = mix(lm.embedding, candidates, w)  # equation (3), (N, D)
            logits = decoder.feed(embeds[:, None])  # (N, V)
    return Rollout(torch.stack(ids, 1), torch.stack(weights, 1), latents, length)


# --- 6. Evaluation --------------------------------------------------------------------------------
def texts_of(lm, roll):
    """-> N texts, from the exit token on: the verifier does not see the thought"""
    executed = [roll.ids[n, roll.latents[n] : roll.length[n], 0] for n in range(len(roll.ids))]
    return lm.tokenizer.batch_decode(executed, skip_special_tokens=True)


def evaluate(lm, task, problems, args):
    """Always the same held-out problems -> dict of means over all ranks. Prints a thought.

    length counts all steps, latents those of the thought. exit_rate: how many thoughts ended.
    """
    mine = problems[common.RANK :: common.RANKS]  # all at once: a matter of memory, too
    encoded = encoding.encode(lm, task, mine, args, THINK)
    roll = think(lm, encoded, args)
    tqdm.write(f"{mine[0].question}\n    {describe(lm, roll, 0)}, the answer is {mine[0].answer}")
    right = [task.verify(text, mine[n])[0] for n, text in enumerate(texts_of(lm, roll))]
    scores = {
        "greedy": torch.tensor(right, device=args.device),
        "length": roll.length,
        "latents": roll.latents,
        "exit_rate": roll.latents < roll.length,
    }
    return {name: round(common.mean_over_ranks(value), 4) for name, value in scores.items()}


def describe(lm, roll, n):
    """Rollout n: each latent as its heaviest candidates with their weights, then the text -> str"""
    steps = roll.latents[n]
    lines = encoding.describe_thought(lm.tokenizer, roll.ids[n, :steps], roll.weights[n, :steps])
    return "\n    ".join([*lines, f"text       {texts_of(lm, roll)[n].strip()!r}"])


def ask(lm, task, args):
    """What the model thinks about a question, and what it then says"""
    encoded = encoding.encode(lm, task, [tasks.Problem(args.ask, "")], args, THINK)
    print("    " + describe(lm, think(lm, encoded, args), 0))


# --- 7. main: train, evaluate ---------------------------------------------------------------------
def main(argv=None):
    args = parse_args(argv)
    common.start_ranks(args.device)
    task = tasks.find(args.task)
    if not hasattr(task, "worked"):
        raise common.UserError(f"--task {args.task} has no worked solutions to learn from")
    lm = common.load_model(args)
    args.top_k = min(args.top_k, len(lm.embedding))
    lm.exit_id = encoding.exit_token(lm, args.exit_text)  # it is needed where lm is
    if len(lm.stop_ids) == 0:
        raise common.UserError("the model names no token that ends a text")
    if args.ask is not None:
        return ask(lm, task, args)
    held_out = task.problems(args, "test", 0, args.eval_problems)
    problems = task.problems(args, "train", 0, args.prompts_per_step)
    if not teacher(lm, task, problems, args, random.Random(0)):  # here, before the run begins
        raise common.UserError("the first problems have no worked solution, like <<48/2=24>>")
    lm.embedding.requires_grad = lm.head.requires_grad = False
    optimizer = torch.optim.AdamW(lm.model.parameters(), fused=True)
    run = common.Run(args, "latent_sft", lm, optimizer)
    first, before = run.start()  # before: {}, since a model that has not learnt it cannot do it
    for step in common.progress(range(first, args.steps), initial=first, total=args.steps):
        if step % args.save_every == 0:
            run.save(step, before)
        # Problems and noise follow from seed, step and rank: a resumed run goes on as it would have
        began, count = time.time(), args.prompts_per_step
        batch = task.problems(args, "train", step * count, count)
        problems = batch[common.RANK :: common.RANKS]
        seed = hash((args.seed, step, common.RANK))
        torch.manual_seed(seed)

        solutions = teacher(lm, task, problems, args, random.Random(seed))
        scale = args.noise_scale * step / args.steps
        optimizer.param_groups[0]["lr"] = settings.learning_rate(args, step)
        metrics = update(lm, optimizer, solutions, scale, args)

        row = {"step": step, "noise": scale, **metrics, "seconds": round(time.time() - began, 3)}
        if args.eval_every and (step + 1) % args.eval_every == 0:
            row |= evaluate(lm, task, held_out, args)
        run.log(row)
    run.save(max(first, args.steps), before)
    run.finish({}, evaluate(lm, task, held_out, args))


if __name__ == "__main__":
    common.run_main(main)
