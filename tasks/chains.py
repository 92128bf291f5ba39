"""Chains of sums, the task of a laptop, and the small model that is pretrained on it.

    python -m tasks.chains              # remake tasks/models/chains: 11 minutes on 2 CPU cores
    python -m tasks.chains --steps 50   # a quick, unfinished model, to see the machinery

RL needs three things that a laptop does not have: a pretrained model, problems whose answers can be
verified, and room for improvement that exploration can find. This file makes all three in
miniature.

**The task: a forgetful student.** Chains of one-digit additions and subtractions on 0..49, a token
per number:

    problem         17 + 5 - 8 ? <think>
    demonstration   17 + 5 = 12 ; 12 - 8 = 4 </think> 4 <eos>

The student who wrote the demonstrations knows how to carry (7 + 5 = 12) but forgets each carry and
each borrow with probability 0.6, so the 17 + 5 above became 12 and not 22. A model pretrained on
such demonstrations knows both procedures and slightly prefers the wrong one. The verifier knows the
true answer. That is the situation of RL on a real base model: right answers are within reach of
sampling and seldom the most likely ones.

**One model for all methods.** Half of the pretraining problems carry a note between `?` and
`<think>`: `mind+` names a student who never forgets a carry, `mind-` one who never forgets a
borrow. lepo.py and latent_grpo.py never write a note; dlr.py steers a frozen model through that
slot.

**Finished, or useless.** Stop the pretraining while the loss still falls, and RL cannot improve the
model: any step that is large enough to matter destroys the arithmetic. Hence the long linear decay.
"""

import argparse
import random
import re
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken
from torch.nn.utils.rnn import pad_sequence
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from tasks import Problem, UserError

FORGET = 0.6  # chance to forget a carry or borrow: over one half, so that the greedy model forgets
SWITCH = 0.75  # chance that the sign of a mixed chain changes from one operation to the next
LARGEST = 49
OPERATIONS = 2, 5  # of a chain, at least and at most
NOTES = ["mind+", "mind-"]
FILLERS = ["hm", "well", "so", "now", "then", "let", "me", "see"]
NUMBERS = [str(n) for n in range(LARGEST + 1)]
WORDS = ["<think>", "</think>", "?", "+", "-", "=", ";"] + NOTES + FILLERS + NUMBERS
VOCABULARY = ["<pad>", "<eos>", "<unk>"]
VOCABULARY += [f" {word}" for word in WORDS]  # as in Qwen, a word has the space before it
KINDS = {"mixed": "+-", "plus": "+", "minus": "-", "single": "+-"}  # single: one of the two a chain


# --- 1. Problems: a chain is a start value and a list of (sign, digit) ----------------------------
#
# The stream is unlimited and addressed by an index, so "where was I in the data" is one integer in
# a checkpoint. Whether a problem is held out depends only on its text (a checksum), so training and
# held-out streams cannot share a problem, whatever their seeds.


def apply_sign(value, sign, digit):
    return value + digit if sign == "+" else value - digit


def random_chain(rng, kind):
    """A chain whose true values all stay in 0..49."""
    signs = rng.choice(KINDS[kind]) if kind == "single" else KINDS[kind]
    while True:
        start = value = rng.randint(0, LARGEST)
        sign = rng.choice(signs)
        steps = []
        for _ in range(rng.randint(*OPERATIONS)):
            if len(signs) == 2 and rng.random() < SWITCH:
                sign = signs[1 - signs.index(sign)]
            digit = rng.randint(1, 9)
            steps.append((sign, digit))
            value = apply_sign(value, sign, digit)
            if not 0 <= value <= LARGEST:
                break
        else:
            return start, steps


def chain_text(start, steps):
    """(16, [("+", 5), ("-", 9)]) -> "16 + 5 - 9" """
    return " ".join([str(start), *(f"{sign} {digit}" for sign, digit in steps)])


def problem_text(start, steps, note=()):
    """What the model reads: " 16 + 5 - 9 ? <think>", a note before the <think>."""
    return " " + " ".join([chain_text(start, steps), "?", *note, "<think>"])


def read_chain(text):
    """The chain of its own text, or of a problem's: "16 + 5 - 9" -> (16, [("+", 5), ("-", 9)])"""
    start, *rest = text.split("?")[0].split()
    pairs = zip(rest[::2], rest[1::2], strict=True)
    return int(start), [(sign, int(digit)) for sign, digit in pairs]


def true_answer(start, steps):
    for sign, digit in steps:
        start = apply_sign(start, sign, digit)
    return start


def is_held_out(start, steps):
    return zlib.crc32(problem_text(start, steps).encode()) % 8 == 0


def make_problem(index, split="train", seed=0, kind="mixed"):
    """Problem `index` of the unlimited stream named by (split, seed, kind)."""
    rng = random.Random(f"{split} {seed} {OPERATIONS} {kind} {index}")
    while True:
        start, steps = random_chain(rng, kind)
        if is_held_out(start, steps) == (split == "test"):
            return start, steps


def problems(args, split, start, count):
    if args.kind not in KINDS:
        raise UserError(f"--task {args.task} has no --kind {args.kind}: take {', '.join(KINDS)}")
    seed = args.seed if split == "train" else 0
    chains = [make_problem(i, split, seed, args.kind) for i in range(start, start + count)]
    return [Problem(chain_text(*chain), str(true_answer(*chain))) for chain in chains]


def request(question, args):
    return f" {question} ? <think>"


FORM = re.compile(r"(?:</think>|^)\s*([0-9]+)\s*$")


def verify(text, problem):
    """-> (strict, flexible): strict wants one number after </think>, or nothing but one number.

    Of the answer 22: " 17 + 5 = 22 </think> 22" -> (1.0, 1.0), " 22 22" -> (0.0, 1.0).
    """
    truth = [float(problem.answer)]  # an int() of 5000 digits would be an error
    both = FORM.findall(text), re.findall(r"[0-9]+", text)
    strict, flexible = ([float(number) for number in found[-1:]] == truth for found in both)
    return float(strict), float(flexible)


# --- 2. Demonstrations: the forgetful student at work ---------------------------------------------


def student_step(rng, value, sign, digit, mindful):
    """One operation in the student's head.

    Forgetting the carry of 17 + 5 gives 12, forgetting the borrow of 22 - 8 gives 24.
    """
    result = apply_sign(value, sign, digit)
    if result // 10 != value // 10 and sign not in mindful and rng.random() < FORGET:
        result += -10 if sign == "+" else 10
    return result


def demonstration(rng, start, steps, mindful=""):
    """The student's solution as text; `mindful` holds the signs at which nothing is forgotten.

    A slip can lead out of 0..49, where there are no tokens: the student notices and starts over.
    """
    while True:
        value, lines = start, []
        for sign, digit in steps:
            result = student_step(rng, value, sign, digit, mindful)
            lines.append(f"{value} {sign} {digit} = {result}")
            value = result
            if not 0 <= value <= LARGEST:
                break
        else:
            return f" {' ; '.join(lines)} </think> {value}<eos>"


def worked(problem, rng):
    """The student's solution of a problem -> (thought, answer) as texts"""
    text = demonstration(rng, *read_chain(problem.question))
    return text.removesuffix("<eos>").split(" </think>")


def random_note(rng):
    """(note tokens, signs at which the student is mindful)

    No note 50 %, fillers 15 %, both notes 5 %, and 30 % one note with a filler here and there.
    """
    draw, length = rng.random(), rng.randint(1, 6)
    if draw < 0.50:
        return [], ""
    if draw < 0.65:
        return rng.choices(FILLERS, k=length), ""
    if draw < 0.70:
        return rng.sample(NOTES, 2) + rng.choices(NOTES + FILLERS, k=rng.randint(0, 4)), ""
    note = rng.choice(NOTES)
    tokens = [rng.choice(FILLERS) if rng.random() < 0.2 else note for _ in range(length)]
    return tokens, note[-1] if note in tokens else ""


def pretraining_example(rng):
    """(prompt, demonstration) of a training problem. Half of the chains mix signs."""
    while True:
        start, steps = random_chain(rng, rng.choice(["mixed", "single"]))
        if not is_held_out(start, steps):
            break
    note, mindful = random_note(rng)
    return problem_text(start, steps, note), demonstration(rng, start, steps, mindful)


# --- 3. The model and its tokenizer: ordinary Hugging Face objects, so that no method treats them
#        specially --------------------------------------------------------------------------------


def build_tokenizer():
    """A token per word. AutoTokenizer insists on the byte-level Qwen2Tokenizer for a Qwen2 model,
    which would cut numbers into digits; as added tokens the words are matched before that."""
    tokenizer = Qwen2Tokenizer(
        vocab={word: i for i, word in enumerate(VOCABULARY)},
        merges=[],
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
    )
    tokenizer.add_tokens([AddedToken(f" {word}", normalized=False) for word in WORDS])
    return tokenizer


SHAPE = {  # of this model and of that of trees.py
    "vocab_size": len(VOCABULARY),
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": VOCABULARY.index("<eos>"),
    "pad_token_id": VOCABULARY.index("<pad>"),
}


def build_model(seed):
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(Qwen2Config(**SHAPE, intermediate_size=512, num_key_value_heads=2))


def training_batch(tokenizer, rng, batch_size):
    """Yield four times (input_ids, labels), each (B / 4, L), padded on the right.

    Only the student's words are learnt: labels are -100 on prompts and padding. The batch is sorted
    by length before it is cut: unsorted, a third of all positions would be padding.
    """
    rows = []
    for _ in range(batch_size):
        prompt, solution = (tokenizer.encode(text) for text in pretraining_example(rng))
        labels = [-100] * len(prompt) + solution
        rows.append((torch.tensor(prompt + solution), torch.tensor(labels)))
    rows.sort(key=lambda row: len(row[0]))
    for i in range(0, batch_size, batch_size // 4):
        ids, labels = zip(*rows[i : i + batch_size // 4], strict=True)
        padded = pad_sequence(labels, batch_first=True, padding_value=-100)
        yield pad_sequence(ids, batch_first=True), padded


def pretrain(model, tokenizer, steps, batch_size=128):
    rng = random.Random("pretrain 0")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01)
    # Linear decay to zero: its end makes the minimum flat enough for RL to move in.
    schedule = LambdaLR(optimizer, lambda i: min((i + 1) / 30, (steps - i) / steps))
    bar = tqdm(range(steps), desc="pretraining", disable=None)
    for _ in bar:
        chunks = list(training_batch(tokenizer, rng, batch_size))
        words = sum((labels != -100).sum().item() for _, labels in chunks)
        total = 0.0
        optimizer.zero_grad()
        for ids, labels in chunks:
            # Only padding attends to padding on the right: a causal model needs no mask here.
            logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)  # (B * (L - 1), V)
            targets = labels[:, 1:].flatten()  # (B * (L - 1),)
            loss = F.cross_entropy(logits, targets, reduction="sum") / words  # -100 is left out
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{total:.4f}")


# --- 4. What it can do: noise-free accuracy by kind of problem and note ---------------------------
#
# The numbers that matter to the methods: mixed without a note (near .5), single with the right note
# (near 1), single without a note (near 0).


@torch.no_grad()
def accuracy(model, tokenizer, kind, note):
    """Share of 512 held-out problems that greedy decoding solves with `note` in its slot."""
    chains = [make_problem(i, "test", kind=kind) for i in range(512)]
    prompts = [problem_text(*chain, note) for chain in chains]
    batch = tokenizer(prompts, padding=True, return_tensors="pt", return_token_type_ids=False)
    out = model.generate(**batch, max_new_tokens=40, do_sample=False)  # (count, L + up to 40)
    answers = [text.split()[-1] for text in tokenizer.batch_decode(out, skip_special_tokens=True)]
    right = [said == str(true_answer(*chain)) for said, chain in zip(answers, chains, strict=True)]
    return sum(right) / 512


def main():
    parser = argparse.ArgumentParser(description="Pretrain the chains model.")
    out = Path(__file__).parent / "models/chains"
    parser.add_argument("--out", default=out, help="folder to write; default: tasks/models/chains")
    parser.add_argument("--steps", type=int, default=2200, help="fewer leave it unfinished")
    args = parser.parse_args()
    tokenizer, model = build_tokenizer(), build_model(0)
    pretrain(model, tokenizer, args.steps)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)

    model.eval()
    for kind in KINDS:
        for note in ([], ["mind+"], ["mind-"]):
            print(kind, *note, accuracy(model, tokenizer, kind, note * 3))


if __name__ == "__main__":
    main()
