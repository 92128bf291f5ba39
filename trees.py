"""The second built-in task, two trees, and the tiny model for it: here a soft token is worth more than a discrete one.

    python trees.py                          # remake tiny_trees/ (about 15 minutes on 2 CPU cores)
    python trees.py --kind 3,2,4 --start tiny_trees --steps 900 --lr 0.01 --out tiny_trees3    # another depth
    python plot_trees.py runs/*              # what the thoughts of finished runs of lepo.py hold

**The task.** Two binary trees of depth 2 as a shuffled list of edges, then four exits and the entrance, which is the
root of one tree. Exactly one exit is a leaf of that tree. Which one?

    problem         6 24 ; 2 33 ; 25 21 ; 33 40 ; … ; ? 38 40 17 29 = 2 <think>
    demonstration   2 25 21 </think> 17 <eos>

The student who wrote the demonstrations walks down at random. A leaf that is an exit is the answer; from any other
leaf the student guesses. A walk sees one leaf of four, so the student is right in 1/4 + 3/4 * 1/4 = .44 of the
problems, and so is a model that thinks in words like this student.

**A soft token walks everywhere at once.** Fed with the entrance, the model gives both children the probability 1/2,
since the student might go to either. As a soft token that is a mixture of both, and fed with the mixture the model
gives weight to the leaves of both: in .89 of the problems the exit is among them (results/README.md). Nobody has
taught it mixtures. The same weights do one walk in words and a breadth-first search in soft tokens.

**Finished, or useless** (tiny.py says why). The loss of the answer has a floor, 3/4 ln 4 = 1.04, the guess after three
walks of four. Looking an edge up is what is hard to learn: for 350 steps nothing happens, and then it is there.
"""

import argparse
import random
import time
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

import tiny

# --- 1. Problems. As in tiny.py one is addressed by an index, and its text alone decides whether it is held out -------
def random_problem(rng, depth, branching, exits):
    """-> edges (parent, child) of both trees, shuffled; entrance; exits, shuffled

    A tree is a list of nodes, level by level: the children of node i are i * branching + 1, + 2, …
    """
    inner = sum(branching**level for level in range(depth))  # nodes above the leaves
    size = inner + branching**depth
    nodes = rng.sample(range(tiny.LARGEST + 1), 2 * size)
    trees = nodes[:size], nodes[size:]
    edges = [(tree[(i - 1) // branching], tree[i]) for tree in trees for i in range(1, size)]
    exits = [rng.choice(trees[0][inner:]), *rng.sample(trees[1][inner:], exits - 1)]
    rng.shuffle(edges)
    rng.shuffle(exits)
    return edges, nodes[0], exits


def problem_text(edges, entrance, exits):
    lines = "".join(f" {parent} {child} ;" for parent, child in edges)
    return f"{lines} ? {' '.join(map(str, exits))} = {entrance} <think>"


def read_problem(text):
    """The inverse of problem_text."""
    lines, exits, entrance = text.removesuffix("<think>").replace("=", "?").split("?")
    edges = [tuple(map(int, line.split())) for line in lines.split(";")[:-1]]
    return edges, int(entrance), [int(node) for node in exits.split()]


def levels(edges, root):
    """The tree below a root, level by level: [[2], [33, 25], [40, 7, 21, 34]]"""
    found = [[root]]
    while level := [child for node in found[-1] for parent, child in edges if parent == node]:
        found.append(level)
    return found


def true_answer(edges, entrance, exits):
    return next(node for node in exits if node in levels(edges, entrance)[-1])


def is_held_out(problem):
    return zlib.crc32(problem_text(*problem).encode()) % 8 == 0


def read_kind(text):
    """`2,2,4` -> (2, 2, 4): depth, branching, number of exits. ValueError: not three, or too few names or leaves"""
    depth, branching, exits = map(int, text.split(","))
    random_problem(random.Random(0), depth, branching, exits)
    return depth, branching, exits


def make_problem(index, split="train", seed=0, kind="2,2,4"):
    """Problem `index` of the unlimited stream named by (split, seed, kind)."""
    rng, sizes = random.Random(f"trees {split} {seed} {kind} {index}"), read_kind(kind)
    while True:
        problem = random_problem(rng, *sizes)
        if is_held_out(problem) == (split == "test"):
            return problem


def demonstration(rng, edges, entrance, exits):
    """The student's walk as text: a random child at each node, then the answer, or a guess if the leaf is no exit."""
    walk = [entrance]
    while children := [child for parent, child in edges if parent == walk[-1]]:
        walk.append(rng.choice(children))
    answer = walk[-1] if walk[-1] in exits else rng.choice(exits)
    return f" {' '.join(map(str, walk))} </think> {answer}<eos>"


# --- 2. The model: tiny.py's tokenizer, and a Qwen3, whose normalised queries and keys learn sooner to look edges up --
def build_model(seed):
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tiny.VOCABULARY), hidden_size=128, intermediate_size=256, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, head_dim=32, initializer_range=0.05, max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},  # prompts are short: quick rotations only
        tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tiny.VOCABULARY.index("<eos>"), pad_token_id=tiny.VOCABULARY.index("<pad>"),
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


def training_batch(tokenizer, rng, kind, count, walks):
    """-> ids (B, L), each row a problem and then `walks` demonstrations of it, all of one length; length of a prompt"""
    rows = []
    for _ in range(count):
        while is_held_out(problem := random_problem(rng, *kind)):
            pass
        prompt = tokenizer.encode(problem_text(*problem))
        rows.append(prompt + tokenizer.encode("".join(demonstration(rng, *problem) for _ in range(walks))))
    return torch.tensor(rows), len(prompt)


def separate_walks(length, prompt, walks):
    """Positions (1, L) and attention mask (1, 1, L, L) with which a walk sees the prompt and itself, as if alone."""
    column, span = torch.arange(length), (length - prompt) // walks
    walk = (column - prompt).div(span, rounding_mode="floor").clamp(min=-1)  # (L,) -1 in the prompt
    position = torch.where(walk < 0, column, prompt + (column - prompt) % span)  # (L,)
    mask = (column[:, None] >= column) & ((walk == -1) | (walk[:, None] == walk))  # (L, L)
    return position[None], mask[None, None]


def pretrain(model, tokenizer, args):
    """Many walks for a problem say more about its edges. In the first part of the training a walk sees those before it:
    to repeat one of them is a first look-up, and easier than the one in the list of edges."""
    rng = random.Random(f"trees {args.seed}")
    matrices = [w for name, w in model.named_parameters() if w.ndim == 2 and "embed" not in name]
    others = [w for name, w in model.named_parameters() if w.ndim == 1 or "embed" in name]  # Muon is for matrices
    optimizers = [torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.1),
                  torch.optim.AdamW(others, lr=0.15 * args.lr, betas=(0.9, 0.95), weight_decay=0.1)]  # fmt: skip
    decay = [LambdaLR(o, lambda i: min((i + 1) / 30, (args.steps - i) / args.steps)) for o in optimizers]
    bar = tqdm(range(args.steps), desc="pretraining", unit="step", disable=None)
    for step in bar:
        ids, prompt = training_batch(tokenizer, rng, args.kind, args.batch_size, args.walks)
        position, mask = separate_walks(ids.shape[1], prompt, args.walks)
        if step < args.steps * 7 // 24 and not args.start:
            position, mask = torch.arange(ids.shape[1])[None], torch.ones_like(mask).tril()
        mask = mask.expand(len(ids), -1, -1, -1)
        hidden = model.model(input_ids=ids, position_ids=position, attention_mask=mask).last_hidden_state
        first = hidden[:, prompt - 1, None, None].expand(-1, args.walks, 1, -1)  # (B, walks, 1, D) predicts first words
        later = hidden[:, prompt:].unflatten(1, (args.walks, -1))  # (B, walks, span, D)
        logits = model.lm_head(torch.cat([first, later[:, :, :-1]], 2))  # (B, walks, span, V)
        losses = F.cross_entropy(logits.flatten(0, 2), ids[:, prompt:].flatten(), reduction="none")
        model.zero_grad()
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in (*optimizers, *decay):
            part.step()
        words = losses.view(-1, later.shape[2]).mean(0).tolist()  # (span,) entrance, nodes, </think>, answer, <eos>
        bar.set_postfix_str(" ".join(f"{loss:.3f}" for loss in words))
    print("loss of each word of a walk:", bar.postfix)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", default=str(Path(__file__).parent / "tiny_trees"), help="folder to write (default: tiny_trees/)")
    add("--kind", type=read_kind, default="2,2,4", help="depth, branching, number of exits")
    add("--start", help="a model to start from; default: random weights")
    add("--steps", type=int, default=2400, help="optimiser steps; fewer leave it unfinished")
    add("--batch_size", type=int, default=64, help="problems per step")
    add("--walks", type=int, default=8, help="demonstrations per problem")
    add("--lr", type=float, default=0.02, help="peak learning rate of the matrices (Muon), decayed linearly to zero")
    add("--seed", type=int, default=0, help="of the initial weights and the demonstrations")
    args = parser.parse_args()

    transformers.logging.disable_progress_bar()
    began, tokenizer = time.time(), tiny.build_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(args.start) if args.start else build_model(args.seed)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tiny.VOCABULARY)} tokens")
    pretrain(model, tokenizer, args)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"wrote {args.out} in {(time.time() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
