"""Two trees, the second built-in task, and its small model: a soft token is worth more than a word.

    python -m tasks.trees    # remake tasks/models/trees: 15 minutes on 2 CPU cores

    # a model for trees of depth 3, from the one for depth 2
    python -m tasks.trees --kind 3,2,4 --start tasks/models/trees --steps 900 --lr 0.01 \\
        --out models/trees3

**The task.** Two binary trees of depth 2 as a shuffled list of edges, then four exits and the
entrance, which is the root of one tree. Exactly one exit is a leaf of that tree. Which one?

    problem         6 24 ; 2 33 ; 25 21 ; 33 40 ; … ; ? 38 40 17 29 = 2 <think>
    demonstration   2 25 21 </think> 17 <eos>

The student who wrote the demonstrations walks down at random. A leaf that is an exit is the answer;
from any other leaf the student guesses. A walk sees one leaf of four, so the student is right in
1/4 + 3/4 * 1/4 = .44 of the problems, and so is a model that thinks in words like this student.

**A soft token walks everywhere at once.** Fed with the entrance, the model gives both children the
probability 1/2, since the student might go to either. A soft token is a mixture of both, and fed
with the mixture the model gives weight to the leaves of both: in .89 of the problems the exit is
among them (results/README.md). Nobody has taught it mixtures. The same weights do one walk in words
and a breadth-first search in soft tokens.

**Finished, or useless** (chains.py says why). The loss of the answer has a floor, 3/4 ln 4 = 1.04,
the guess after three walks of four. Looking an edge up is what is hard to learn: for 350 steps
nothing happens, and then it is there.
"""

import argparse
import random
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tasks import Problem, UserError, chains

# --- 1. Problems. As in chains.py an index names one, and its text decides whether it is held out -


def random_problem(rng, depth, branching, exits):
    """-> edges (parent, child) of both trees, shuffled; entrance; exits, shuffled

    A tree is a list of nodes, level by level: the children of node i are i * branching + 1, + 2, …
    """
    inner = sum(branching**level for level in range(depth))  # nodes above the leaves
    size = inner + branching**depth
    nodes = rng.sample(range(chains.LARGEST + 1), 2 * size)
    trees = nodes[:size], nodes[size:]
    edges = []
    for tree in trees:
        edges += [(tree[(i - 1) // branching], tree[i]) for i in range(1, size)]
    exits = [rng.choice(trees[0][inner:]), *rng.sample(trees[1][inner:], exits - 1)]
    rng.shuffle(edges)
    rng.shuffle(exits)
    return edges, nodes[0], exits


def question_text(edges, entrance, exits):
    """[(6, 24), (2, 33)], 2, [38, 40] -> "6 24 ; 2 33 ; ? 38 40 = 2" """
    lines = " ".join(f"{parent} {child} ;" for parent, child in edges)
    return f"{lines} ? {' '.join(map(str, exits))} = {entrance}"


def problem_text(*problem):
    """What the model reads."""
    return f" {question_text(*problem)} <think>"


def read_problem(text):
    """The inverse of question_text and of problem_text -> edges, entrance, exits"""
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
    """`2,2,4` -> (2, 2, 4): depth, branching, number of exits

    ValueError where it is not three numbers, or there are too few names for two such trees.
    """
    depth, branching, exits = sizes = [int(number) for number in text.split(",")]
    if not 1 <= min(sizes) <= max(sizes) <= chains.LARGEST:
        raise ValueError
    random_problem(random.Random(0), depth, branching, exits)
    return depth, branching, exits


def make_problem(index, split="train", seed=0, kind="2,2,4"):
    """Problem `index` of the unlimited stream named by (split, seed, kind)."""
    rng = random.Random(f"trees {split} {seed} {kind} {index}")
    sizes = read_kind(kind)
    while True:
        problem = random_problem(rng, *sizes)
        if is_held_out(problem) == (split == "test"):
            return problem


def problems(args, split, start, count):
    seed = args.seed if split == "train" else 0
    try:
        found = [make_problem(i, split, seed, args.kind) for i in range(start, start + count)]
    except ValueError:
        raise UserError(
            f"--task {args.task} has no --kind {args.kind}: take depth,branching,exits, such as "
            "2,2,4, with at most 25 nodes in a tree and at most one exit more than it has leaves"
        ) from None
    return [Problem(question_text(*problem), str(true_answer(*problem))) for problem in found]


def request(question, args):
    return f" {question} <think>"


FORM = chains.FORM
verify = chains.verify  # a number after </think>, as there


def demonstration(rng, edges, entrance, exits):
    """The student's walk as text: a random child at each node, then the answer.

    The answer is a guess if the leaf is no exit.
    """
    walk = [entrance]
    while children := [child for parent, child in edges if parent == walk[-1]]:
        walk.append(rng.choice(children))
    answer = walk[-1] if walk[-1] in exits else rng.choice(exits)
    return f" {' '.join(map(str, walk))} </think> {answer}<eos>"


# --- 2. The model: the tokenizer of chains.py and a Qwen3. Its normalised queries and keys learn
#        sooner to look edges up ------------------------------------------------------------------


def build_model(seed):
    torch.manual_seed(seed)
    config = Qwen3Config(
        **chains.SHAPE,
        intermediate_size=256,
        num_key_value_heads=4,
        head_dim=32,
        initializer_range=0.05,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},  # prompts are short
    )
    return Qwen3ForCausalLM(config)


def training_batch(tokenizer, rng, kind, count, walks):
    """-> ids (B, L), each row a problem and then `walks` demonstrations of it; length of a prompt

    All prompts have one length, and all walks.
    """
    rows = []
    for _ in range(count):
        while is_held_out(problem := random_problem(rng, *kind)):
            pass
        prompt = tokenizer.encode(problem_text(*problem))
        solutions = [demonstration(rng, *problem) for _ in range(walks)]
        rows.append(prompt + tokenizer.encode("".join(solutions)))
    return torch.tensor(rows), len(prompt)


def separate_walks(length, prompt, walks):
    """Positions (1, L) and attention mask (1, 1, L, L): a walk sees the prompt and itself only.

    With walks = 1 they are the usual ones, and what follows the prompt is one text.
    """
    column = torch.arange(length)
    span = (length - prompt) // walks
    walk = (column - prompt).div(span, rounding_mode="floor").clamp(min=-1)  # (L,) -1: the prompt
    position = torch.where(walk < 0, column, prompt + (column - prompt) % span)  # (L,)
    is_before = column[:, None] >= column  # (L, L)
    is_visible = (walk == -1) | (walk[:, None] == walk)  # (L, L)
    return position[None], (is_before & is_visible)[None, None]


def pretrain(model, tokenizer, args, batch_size=64, walks=8):
    """Many walks for a problem say more about its edges.

    In the first part of the training a walk sees those before it: to repeat one of them is a first
    look-up, and easier than the one in the list of edges.
    """
    rng = random.Random("trees 0")
    weights = list(model.named_parameters())
    matrices = [w for name, w in weights if w.ndim == 2 and "embed" not in name]
    others = [w for name, w in weights if w.ndim == 1 or "embed" in name]  # Muon is for matrices
    muon = torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.1)
    adam = torch.optim.AdamW(others, lr=0.15 * args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    optimizers = [muon, adam]
    decay = []
    for optimizer in optimizers:
        schedule = LambdaLR(optimizer, lambda i: min((i + 1) / 30, (args.steps - i) / args.steps))
        decay.append(schedule)
    bar = tqdm(range(args.steps), desc="pretraining", unit="step", disable=None)
    for step in bar:
        ids, prompt = training_batch(tokenizer, rng, args.kind, batch_size, walks)  # (B, L)
        is_early = step < args.steps * 7 // 24 and not args.start
        position, mask = separate_walks(ids.shape[1], prompt, 1 if is_early else walks)
        mask = mask.expand(len(ids), -1, -1, -1)
        out = model.model(input_ids=ids, position_ids=position, attention_mask=mask)
        hidden = out.last_hidden_state  # (B, L, D)

        # The end of the prompt predicts the first word of every walk.
        first = hidden[:, prompt - 1, None, None].expand(-1, walks, 1, -1)  # (B, walks, 1, D)
        later = hidden[:, prompt:].unflatten(1, (walks, -1))  # (B, walks, span, D)
        logits = model.lm_head(torch.cat([first, later[:, :, :-1]], 2))  # (B, walks, span, V)
        targets = ids[:, prompt:].flatten()  # (B * walks * span,)
        losses = F.cross_entropy(logits.flatten(0, 2), targets, reduction="none")
        model.zero_grad()
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in (*optimizers, *decay):
            part.step()
        words = losses.view(-1, later.shape[2]).mean(0).tolist()  # (span,) entrance … answer, <eos>
        bar.set_postfix_str(" ".join(f"{loss:.3f}" for loss in words))
    print("loss of each word of a walk:", bar.postfix)


def main():
    parser = argparse.ArgumentParser(description="Pretrain the trees model.")
    add = parser.add_argument
    out = Path(__file__).parent / "models/trees"
    add("--out", default=out, help="folder to write; default: tasks/models/trees")
    add("--kind", type=read_kind, default="2,2,4", help="depth, branching, number of exits")
    add("--start", help="a model to start from; default: random weights")
    add("--steps", type=int, default=2400, help="fewer leave it unfinished")
    add("--lr", type=float, default=0.02, help="peak learning rate of the matrices")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.start) if args.start else build_model(0)
    tokenizer = chains.build_tokenizer()
    pretrain(model, tokenizer, args)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
