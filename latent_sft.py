r"""Latent SFT, the first stage of Latent-GRPO (arXiv 2604.27998): teach a model to think in few, dense latents.

    python latent_sft.py                                     # the chains model, on a laptop CPU: five minutes
    python latent_sft.py --model Qwen2.5-0.5B --out sft      # GSM8K's equations, one GPU; several: torchrun, as lepo.py
    python latent_grpo.py --model sft/model                  # the second stage, RL, starts from what this has saved
    (There, the model of a run on chains, as runs/latent_sft-chains-…/model, gets the chains model's flags.)

lepo.py takes a model as it is and mixes the tokens that it would write anyway, one after the other. Here the model
learns a denser way: a latent stands for several words at once, a thought is a few latents long, and the model itself
says when it is over, by the exit token. All that it needs is worked solutions, which may be wrong: the built-in task's
come from a student who forgets most carries. A solution is cut into chunks, and a chunk becomes a latent:

    17 + 5 = 12 ; 12 - 8 = 4 </think> 4 <eos>                what the student wrote
    {17 + 5}   {= 12 ; 12 - 8}   {= 4}                       its chunks: of six tokens, the first of three
    17 .33  + .33  5 .33  |  12 .33  = .17  ; .17  - .17  8 .17  |  = .5  4 .5        three latents, token by weight
                                                             then, as discrete tokens, </think> 4 <eos>

  (1)  label:   y_i = how often each token occurs in chunk i, as shares: K candidates and weights that sum to 1
  (2)  noise:   w_i = softmax(log y_i + clip(s g, -1.5, 3)),  g ~ Gumbel(0, 1) iid,  s grows from 0 to `noise_scale`
  (3)  input:   e_i = sum_k w_ik E[k]: the model always reads the teacher's thought so far, and not its own
  (4)  loss:    KL(w_i || pi(. | q, e_<i)), a mean over the latents of a thought and then over thoughts
                + -log pi(token | q, e_<t), a mean over all tokens of exit, answer and end
       A discrete token is a one-hot w, whose KL divergence is its cross-entropy: the summand is one formula.
  (5)  in use:  w = softmax of the K largest logits, until the exit token is the largest; from there greedy text

Why chunks begin in the middle of a step: a latent then holds a result and what is done with it next, and the operands
of every result stand in the latent before it. With chunks cut at the steps .17 are right after 600 steps, here .48.

Why noise (2): RL draws its thoughts with noise, and even without it the model's own mixtures are never as clean as the
teacher's. Trained on clean ones alone it is lost among its own: .19 are right after 600 steps.

Embeddings and head are frozen: the space of latents stands still while the model learns to move in it.

Differences from the official code (github.com/DJC-GO-SOLO/Latent-SFT), and why:
  1. Labels. There, an encoder writes the latents, such that a decoder can tell each next chunk from the one latent
     before it, and the answer from all; three more trainings. Here a chunk's own tokens: nothing to train, and better
     on the chains model (.543 against .344 after 600 steps, results/README.md). For large models nobody has compared.
  2. Chunks there have 2 tokens (GSM8K) or 16, the first one too.
  3. LoRA adapters there; here all weights but embeddings and head.
  4. The noise has its full scale from the first step on there. It is drawn again where the exit token comes out as the
     heaviest; here no label holds that token.
  5. The exit token is the first one of `</think>` there and here. There, the rest of it is fed by force.
"""

import argparse
import collections
import math
import random
import re
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

import engine as common
from tasks import chains

# --- 1. Flags: a batch is prompts_per_step worked solutions; TINY is for the chains model -----------------------------

CLIP = -1.5, 3.0  # of the noise in (2), when it has been scaled; latent_grpo.py scales what has been clipped
TINY = dict(
    data="chains", max_new_tokens=16, eval_problems=512, eval_every=300, save_every=300, micro_batch=64,
    think_text="",  # its problems end in <think> already
    exit_text=" </think>",
    chunk=6,  # the tokens of one step, `17 + 5 = 12 ;`
    steps=1800, prompts_per_step=128, lr=2e-3,  # those of its pretraining, nearly: finished or useless: chains.py
)  # fmt: skip


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        prog="latent_sft.py", usage=argparse.SUPPRESS, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Latent SFT: a model learns to think in latents. The first page of the file explains it.",
        epilog=f"The chains model has defaults of its own: {TINY}",
    )  # fmt: skip
    add, at_least = parser.add_argument, common.at_least
    add("--chunk", type=at_least(1), default=8, help="tokens that a latent stands for; the first one for half as many")
    add("--top_k", type=at_least(2), default=10, help="K, candidates of a latent")
    add("--noise_scale", type=at_least(0, float), default=1.0, help="s of (2) at the end; 0: clean labels")
    add("--think_text", default="<think>", help="what the prompt ends with")
    add("--exit_text", default="</think>", help="its first token ends a thought")
    common.add_shared_flags(parser, rl=False)
    parser.set_defaults(steps=2000, prompts_per_step=64, lr=1e-4, max_new_tokens=128)
    args = common.parse_args(parser, argv, TINY)
    if args.chunk > args.top_k:
        parser.error("--chunk must be at most --top_k: a latent has room for so many tokens")
    return args


# --- 2. Worked solutions and their labels, (1) ------------------------------------------------------------------------
def worked(problem, args, rng):
    """(thought, answer) as texts; the thought is empty where the data has no worked solution.

    The built-in task's student writes both, and may be wrong. GSM8K's equations stand as <<48/2=24>> in its prose.
    """
    if problem.form == "think":
        solution = chains.demonstration(rng, *chains.read_chain(problem.question))
        thought, _, answer = solution.removesuffix("<eos>").partition(" </think>")
        return thought, answer
    return " ".join(re.findall(r"<<[^<>]+>>", problem.solution)), f"\\boxed{{{problem.answer}}}"


def chunk_labels(ids, size):
    """Equation (1): token ids of a thought -> a dict {id: weight} for each of its latents

    Size 6 cuts 11 tokens into 3, 6 and 2. The chunk [3, 12, 4, 12, 5, 8] gives 12 the weight 1/3 and the others 1/6.
    """
    first = max(1, size // 2)
    chunks = [ids[:first], *(ids[i : i + size] for i in range(first, len(ids), size))]
    return [{i: count / len(chunk) for i, count in collections.Counter(chunk).items()} for chunk in chunks]


def teacher(lm, problems, args, rng):
    """Worked solutions as thoughts -> N prompts; ids, weights (N, T, K); latents, length (N,), the exit not in latents

    Of a discrete token, and after the end, all weight is in one slot.
    """
    def encode(text):
        return lm.tokenizer.encode(text, add_special_tokens=False)

    prompts, rows, latents = [], [], []
    for problem in problems:
        thought, answer = worked(problem, args, rng)
        if thought:
            labels = chunk_labels(encode(thought), args.chunk)
            tail = [*encode(args.exit_text), *encode(answer), lm.tokenizer.eos_token_id or lm.stop_ids[0]]
            prompts.append(common.encode_prompt(lm.tokenizer, problem, args.think_text))
            rows.append(labels + [{token: 1.0} for token in tail])
            latents.append(len(labels))
    length = [len(row) for row in rows]
    ids = torch.zeros(len(rows), max(length, default=0), args.top_k, dtype=torch.long)  # (N, T, K)
    weights = torch.zeros(ids.shape)  # (N, T, K)
    weights[..., 0] = 1
    for n, row in enumerate(rows):
        for t, label in enumerate(row):
            ids[n, t, : len(label)] = torch.tensor(list(label))
            weights[n, t, : len(label)] = torch.tensor(list(label.values()))
    tensors = ids, weights, torch.tensor(latents, dtype=torch.long), torch.tensor(length, dtype=torch.long)
    return prompts, *(tensor.to(args.device) for tensor in tensors)


# --- 3. Noise on the teacher, (2): the ratio of two weights changes by e^4.5 at the most ------------------------------
def noisy_labels(weights, scale, generator):
    """weights (N, T, K) -> (N, T, K). What has weight 0 keeps it, so a discrete token stays one."""
    exponential = torch.empty_like(weights).exponential_(generator=generator)
    gumbel = -exponential.clamp_(min=torch.finfo(torch.float32).tiny).log()  # (N, T, K), never infinite
    return (weights.log() + (scale * gumbel).clamp(*CLIP)).softmax(-1)


# --- 4. Update, (3) and (4): one forward pass sees the prompt and the teacher's thought as embeddings -----------------
def update(lm, optimizer, prompts, ids, weights, latents, length, args):
    """One optimiser step towards N teachers' thoughts, shapes as `teacher` gives them -> metrics

    Gradients add up over micro-batches and ranks. The denominators are those of the whole batch, so that it does not
    matter how it is cut.
    """
    step = torch.arange(ids.shape[1], device=ids.device)  # (T,)
    totals = torch.stack([torch.ones_like(length).sum(), (length - latents).sum()])
    thoughts, tokens = common.all_reduce(totals)  # the denominators of (4): N, and the discrete tokens of all
    if not thoughts:
        raise common.UserError("no problem of this batch has a worked solution, <<48/2=24>> as in GSM8K: other --data")
    optimizer.zero_grad()
    sums = torch.zeros(2, device=ids.device)
    order = length.argsort(stable=True)  # rows of similar length share a micro-batch
    for rows in order.split(args.micro_batch) if len(order) else ():  # (B,)
        count = int(length[rows].max())  # T of these rows
        prompt, prompt_mask = common.left_pad([prompts[n] for n in rows.tolist()], ids.device)  # (B, L)
        z_ids, z = ids[rows, :count], weights[rows, :count]  # (B, T, K)
        mask, is_latent = (step[:count] < limit[rows, None] for limit in (length, latents))  # (B, T)
        share = torch.where(is_latent, 1 / (thoughts * latents[rows, None]), 1 / tokens)  # (B, T)
        with lm.autocast():
            thought = common.mix_embeddings(lm.table, z_ids, z)  # equation (3), (B, T, D)
            embeds = torch.cat([F.embedding(prompt, lm.table), thought], 1)[:, :-1]  # (B, L + T - 1, D)
            hidden = lm.hidden_states(embeds, torch.cat([prompt_mask, mask], 1)[:, :-1])[:, -count:]  # (B, T, D)
            log_p = common.candidate_log_probs(hidden[mask], lm.head, z_ids[mask], 1.0)  # (M, K), M of B * T executed
        kl = (torch.xlogy(z[mask], z[mask]) - z[mask] * log_p).sum(-1)  # (M,) of (4); for a one-hot z it is -log p
        loss = kl * share[mask]  # (M,)
        loss.sum().backward()
        sums += torch.stack([loss[is_latent[mask]].sum(), loss[~is_latent[mask]].sum()]).detach()
    common.reduce_gradients(lm.model)
    grad_norm = torch.nn.utils.clip_grad_norm_(lm.model.parameters(), 1.0)
    if not grad_norm.isfinite():
        raise common.UserError("the gradient is not finite and was not applied; --resume with a lower --lr")
    optimizer.step()
    kl, cross_entropy = common.all_reduce(sums).tolist()
    return {"kl": kl, "cross_entropy": cross_entropy, "grad_norm": grad_norm.item()}


# --- 5. In use, (5): the model thinks by itself, without noise --------------------------------------------------------
@torch.no_grad()
def think(lm, prompts, exit_id, args):
    """-> ids and weights (N, T, K) of what N prompts' thoughts and texts executed; latents and length (N,)"""
    shape = len(prompts), args.max_new_tokens, args.top_k  # (N, T, K)
    ids, weights = torch.zeros(shape, dtype=torch.long, device=args.device), torch.zeros(shape, device=args.device)
    rows = torch.arange(len(prompts), device=args.device)  # (B,) those that go on
    latents, length, thinking = torch.zeros_like(rows), torch.zeros_like(rows), torch.ones_like(rows).bool()
    stop_ids = torch.tensor(lm.stop_ids, device=args.device)
    with lm.autocast():
        decoder = common.Decoder(lm, prompts, 1, args.max_new_tokens)
        logits = decoder.logits  # (N, V)
        for t in range(args.max_new_tokens):
            values, z_ids = logits.float().topk(args.top_k)  # (B, K) each, the likeliest first
            thinking = thinking & (z_ids[:, 0] != exit_id)  # (B,)
            one_hot = F.one_hot(torch.zeros_like(rows), args.top_k).float()  # (B, K) all weight on the first
            z = torch.where(thinking[:, None], values.softmax(-1), one_hot)  # (B, K)
            ids[rows, t], weights[rows, t] = z_ids, z
            latents[rows] += thinking
            length[rows] = t + 1
            going = (~torch.isin(z_ids[:, 0], stop_ids)).nonzero().squeeze(-1)  # (B',) of the B rows
            if len(going) == 0 or t + 1 == args.max_new_tokens:
                break
            if len(going) < len(rows):
                rows, thinking, z_ids, z = rows[going], thinking[going], z_ids[going], z[going]
                decoder.keep(going)
            logits = decoder.feed(common.mix_embeddings(lm.table, z_ids, z))  # (B', V)
    return ids, weights, latents, length


def evaluate(lm, problems, exit_id, args):
    """Noise-free accuracy, lengths and exit rate on held-out problems -> dict. Prints the last thought."""
    mine, parts = problems[common.RANK :: common.RANKS], []
    for i in common.progress(range(0, len(mine), args.prompts_per_step), desc="evaluating", leave=False):
        part = mine[i : i + args.prompts_per_step]
        prompts = [common.encode_prompt(lm.tokenizer, problem, args.think_text) for problem in part]
        ids, weights, latents, length = think(lm, prompts, exit_id, args)
        spans = zip(ids[..., 0].tolist(), latents.tolist(), length.tolist(), strict=True)
        texts = lm.tokenizer.batch_decode([row[first:end] for row, first, end in spans], skip_special_tokens=True)
        right = torch.tensor([common.verify(*pair)[0] for pair in zip(texts, part, strict=True)], device=args.device)
        parts.append(torch.stack([right, length, latents, latents < length]))
    tqdm.write(describe(lm, part[-1], ids[-1], weights[-1], int(latents[-1]), texts[-1]))
    names = ["greedy", "length", "latents", "exit_rate"]
    return {name: round(common.mean(values), 4) for name, values in zip(names, torch.cat(parts, 1), strict=True)}


def describe(lm, problem, ids, weights, latents, text):
    """A thought that a person can read: each latent as its heaviest candidates with their weights -> str"""
    lines = []
    for t in range(latents):
        pairs = zip(ids[t].tolist(), weights[t].tolist(), strict=True)
        pairs = [f"{lm.tokenizer.decode([i])!r} {w:.2f}" for i, w in pairs if w > 0.005]
        lines.append(f"latent {t + 1:2d}  " + "  ".join(pairs[:6]))
    return "\n    ".join([problem.question, *lines, f"text       {text.strip()!r}, the answer is {problem.answer}"])


# --- 6. main: train, evaluate -----------------------------------------------------------------------------------------
def main(argv=None):
    args = parse_args(argv)
    common.start_ranks(args.device)
    lm = common.load_model(args)
    lm.table.requires_grad = lm.head.requires_grad = False
    args.top_k = min(args.top_k, len(lm.table))
    exit_ids = lm.tokenizer.encode(args.exit_text, add_special_tokens=False)
    if not exit_ids or exit_ids[0] in lm.stop_ids:
        raise common.UserError(f"--exit_text {args.exit_text!r} has no token, or one that ends a text: name another")
    optimizer = torch.optim.AdamW(lm.model.parameters(), betas=(0.9, 0.999), weight_decay=0.01, fused=True)
    generator = torch.Generator(args.device)
    common.take_problems(args, "train", 0, 1)  # a malformed line ends the run here, before it begins
    held_out = common.take_problems(args, "test", 0, args.eval_problems)
    run = common.Run(args, "latent_sft")
    first, _ = run.restore(lm.model, optimizer) if args.resume else (0, None)
    print(f"{sum(p.numel() for p in lm.model.parameters()):,} parameters, run folder {run.folder}")
    for step in common.progress(range(first, args.steps), initial=first, total=args.steps, desc="training"):
        if step % args.save_every == 0:
            run.save(step, None, lm.model, optimizer)
        # --- the teacher. Noise and data follow from seed, step and rank: a resumed run goes on as it would have.
        start, count, seed = time.time(), args.prompts_per_step, args.seed * 10**9 + step * 10**3 + common.RANK
        generator.manual_seed(seed)
        problems = common.take_problems(args, "train", step * count, count)[common.RANK :: common.RANKS]
        prompts, ids, weights, latents, length = teacher(lm, problems, args, random.Random(seed))
        scale = args.noise_scale * step / args.steps
        weights = noisy_labels(weights, scale, generator)  # (N, T, K)
        # --- update
        warmup = min(1, (step + 1) / max(1, 0.03 * args.steps))
        optimizer.param_groups[0]["lr"] = args.lr * warmup * (1 + math.cos(math.pi * step / args.steps)) / 2
        metrics = update(lm, optimizer, prompts, ids, weights, latents, length, args)
        # --- log
        row = {"step": step, "noise": round(scale, 4), **metrics, "seconds": round(time.time() - start, 3)}
        if args.eval_every and (step + 1) % args.eval_every == 0 and step + 1 < args.steps:
            row |= evaluate(lm, held_out, exit_ids[0], args)
        run.log(row)
        tqdm.write("  ".join(f"{name} {value:.4g}" for name, value in row.items()))
    run.save(max(first, args.steps), None, lm.model, optimizer)
    run.finish(lm, evaluate(lm, held_out, exit_ids[0], args))


if __name__ == "__main__":
    common.run_main(main)
