"""The built-in task and the tiny model that is pretrained on it.

    python tiny.py             # remake tiny/ (about 11 minutes on 2 CPU cores) and print its accuracies
    python tiny.py --steps 50  # a quick, unfinished one, to see the machinery

RL needs three things that a laptop does not have: a pretrained model, problems whose answers can be
verified, and room for improvement that exploration can find. This file makes all three in miniature.

**The task: a forgetful student.** Chains of one-digit additions and subtractions on 0..49, a token per number:

    problem         17 + 5 - 8 ? <think>
    demonstration   17 + 5 = 12 ; 12 - 8 = 4 </think> 4 <eos>

The student who wrote the demonstrations knows how to carry (7 + 5 = 12) but forgets each carry and each borrow
with probability 0.6, so the 17 + 5 above became 12 and not 22. A model pretrained on such demonstrations knows
both procedures and slightly prefers the wrong one. The verifier knows the true answer. That is the
situation of RL on a real base model: right answers are within reach of sampling and seldom the most likely ones.

**One model for all three methods.** Half of the pretraining problems carry a note between `?` and `<think>`: `mind+`
names a student who never forgets a carry, `mind-` one who never forgets a borrow. lepo.py and
latent_grpo.py never write a note; dlr.py steers a frozen model through that slot.

**Finished, or useless.** Stop the pretraining while the loss still falls, and RL cannot improve the
model: any step that is large enough to matter destroys the arithmetic. Hence the long linear decay.
"""

import argparse
import random
import time
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm

FORGET = 0.6  # probability of forgetting one carry or borrow: over one half, so that the greedy model forgets
SWITCH = 0.75  # probability that the sign of a mixed chain changes from one operation to the next
LARGEST = 49
NOTES = ["mind+", "mind-"]
FILLERS = ["hm", "well", "so", "now", "then", "let", "me", "see"]
SPECIAL = ["<pad>", "<eos>", "<unk>"]
WORDS = ["<think>", "</think>", "?", "+", "-", "=", ";"] + NOTES + FILLERS + [str(n) for n in range(LARGEST + 1)]
VOCABULARY = SPECIAL + [f" {word}" for word in WORDS]  # a word carries the space before it, as in GPT-2 and Qwen
KINDS = {"mixed": "+-", "plus": "+", "minus": "-"}  # "single" is plus or minus, at random per problem


# ----------------------------------------------------------------------------------------------------------------------
# 1. Problems: a chain is a start value and a list of (sign, digit). The stream is unlimited and addressed by an
#    index, so "where was I in the data" is one integer in a checkpoint. Whether a problem is held out depends only
#    on its text (a checksum), so training and held-out streams cannot share a problem, whatever their seeds.


def apply_sign(value, sign, digit):
    return value + digit if sign == "+" else value - digit


def random_chain(rng, ops, kind):
    """A chain with ops[0]..ops[1] operations whose true values all stay in 0..49."""
    signs = KINDS[rng.choice(["plus", "minus"]) if kind == "single" else kind]
    while True:
        start = value = rng.randint(0, LARGEST)
        sign, steps = rng.choice(signs), []
        for _ in range(rng.randint(*ops)):
            if len(signs) == 2 and rng.random() < SWITCH:
                sign = signs[1 - signs.index(sign)]
            steps.append((sign, rng.randint(1, 9)))
            value = apply_sign(value, *steps[-1])
            if not 0 <= value <= LARGEST:
                break
        else:
            return start, steps


def problem_text(start, steps, note=()):
    return " " + " ".join([str(start), *(f"{sign} {digit}" for sign, digit in steps), "?", *note, "<think>"])


def read_chain(text):
    """The chain of a problem's text, without a note -> (start, steps)"""
    start, *rest = text.split()[:-2]
    return int(start), [(sign, int(digit)) for sign, digit in zip(rest[::2], rest[1::2], strict=True)]


def true_answer(start, steps):
    for sign, digit in steps:
        start = apply_sign(start, sign, digit)
    return start


def is_held_out(start, steps):
    return zlib.crc32(problem_text(start, steps).encode()) % 8 == 0


def make_problem(index, split="train", seed=0, ops=(2, 5), kind="mixed"):
    """Problem `index` of the unlimited stream named by (split, seed, ops, kind) -> (start, steps)."""
    rng = random.Random(f"{split} {seed} {ops} {kind} {index}")
    while True:
        start, steps = random_chain(rng, ops, kind)
        if is_held_out(start, steps) == (split == "test"):
            return start, steps


# ----------------------------------------------------------------------------------------------------------------------
# 2. Demonstrations: the forgetful student at work.


def student_step(rng, value, sign, digit, mindful):
    """One operation in the student's head. Forgetting the carry of 17 + 5 gives 12, the borrow of 22 - 8 gives 24."""
    result = apply_sign(value, sign, digit)
    crosses_ten = result // 10 != value // 10
    if crosses_ten and sign not in mindful and rng.random() < FORGET:
        result += -10 if sign == "+" else 10
    return result


def demonstration(rng, start, steps, mindful=""):
    """The student's solution as text; `mindful` holds the signs at which nothing is forgotten.

    A slip can lead a chain out of 0..49, where there are no tokens; the student then notices and starts over.
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


def random_note(rng):
    """(note tokens, signs at which the student is mindful): none 50 %, filler 15 %, both 5 %, one mostly clean 30 %."""
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


def pretraining_example(rng, ops=(2, 5)):
    """(prompt, demonstration), on training problems only. Half of the chains mix signs, half use a single one."""
    while True:
        start, steps = random_chain(rng, ops, rng.choice(["mixed", "single"]))
        if not is_held_out(start, steps):
            break
    note, mindful = random_note(rng)
    return problem_text(start, steps, note), demonstration(rng, start, steps, mindful)


# ----------------------------------------------------------------------------------------------------------------------
# 3. The model and its tokenizer: ordinary Hugging Face objects, nothing that lepo.py would have to treat specially.


def build_tokenizer():
    """A token per word. AutoTokenizer insists on the byte-level Qwen2Tokenizer for a Qwen2 model, which would cut
    numbers into digits; as added tokens the words are matched whole before it gets to that."""
    from tokenizers import AddedToken
    from transformers import Qwen2Tokenizer

    ids = {word: i for i, word in enumerate(VOCABULARY)}
    tokenizer = Qwen2Tokenizer(
        vocab=ids, merges=[], pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    tokenizer.add_tokens([AddedToken(f" {word}", normalized=False) for word in WORDS])
    return tokenizer


def build_model(seed):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(VOCABULARY),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=VOCABULARY.index("<eos>"),
            pad_token_id=VOCABULARY.index("<pad>"),
        )
    )


def training_batch(tokenizer, rng, batch_size, chunks=4):
    """Yield (input_ids, labels), each (B / chunks, L), right-padded; labels are -100 on prompts and padding.

    Only the student's words are learnt. The batch is sorted by length before it is cut, which saves a
    third of the arithmetic: unsorted, a third of all positions would be padding.
    """
    rows = []
    for _ in range(batch_size):
        prompt, solution = (tokenizer.encode(text) for text in pretraining_example(rng))
        rows.append((prompt + solution, [-100] * len(prompt) + solution))
    rows.sort(key=lambda row: len(row[0]))
    for i in range(chunks):
        chunk = rows[i * batch_size // chunks : (i + 1) * batch_size // chunks]
        width = len(chunk[-1][0])
        ids = torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in chunk])
        labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in chunk])
        yield ids, labels


def pretrain(model, tokenizer, steps, batch_size, lr, seed):
    rng = random.Random(f"pretrain {seed}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    # Linear decay to zero: the end of the schedule is what makes the minimum flat enough for RL to move in.
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / 30, (steps - i) / steps))
    bar = tqdm(range(steps), desc="pretraining", unit="step", disable=None)
    for _ in bar:
        chunks = list(training_batch(tokenizer, rng, batch_size))
        words = sum((labels != -100).sum().item() for _, labels in chunks)
        total = 0.0
        optimizer.zero_grad()
        for ids, labels in chunks:
            # Right padding is only ever attended to by padding, so a causal model needs no attention mask here.
            logits = model(input_ids=ids).logits[:, :-1]  # (B, L-1, V)
            loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
            (loss / words).backward()
            total += loss.item() / words
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{total:.4f}")


# ----------------------------------------------------------------------------------------------------------------------
# 4. What it can do: noise-free accuracy by kind of problem and note. The numbers that matter to the three methods:
#    mixed without a note (near .5), single with the right note (near 1), single without a note (near 0).


@torch.no_grad()
def accuracy(model, tokenizer, kind, note, count, batch_size=256):
    """Share of `count` held-out problems that greedy decoding solves with `note` in the note slot."""
    problems = [make_problem(i, "test", kind=kind) for i in range(count)]
    correct = 0
    for i in range(0, count, batch_size):
        part = problems[i : i + batch_size]
        batch = tokenizer(
            [problem_text(*problem, note) for problem in part],
            padding=True, return_tensors="pt", return_token_type_ids=False,
        )  # fmt: skip
        out = model.generate(**batch, max_new_tokens=40, do_sample=False)
        texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        correct += sum(text.split()[-1:] == [str(true_answer(*p))] for text, p in zip(texts, part, strict=True))
    return correct / count


def accuracy_table(model, tokenizer, count=512):
    notes = {"no note": [], "filler": ["hm", "so"], "mind+": ["mind+"] * 3, "mind-": ["mind-"] * 3, "both": NOTES}
    lines = ["noise-free accuracy  " + "".join(f"{name:>9}" for name in notes)]
    for kind in tqdm(KINDS, desc="evaluating", disable=None):
        row = [accuracy(model, tokenizer, kind, note, count) for note in notes.values()]
        lines.append(f"{kind:<21}" + "".join(f"{value:9.3f}" for value in row))
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(Path(__file__).parent / "tiny"), help="folder to write (default: tiny/)")
    parser.add_argument("--steps", type=int, default=2200, help="optimiser steps; fewer leave it unfinished")
    parser.add_argument("--batch_size", type=int, default=128, help="demonstrations per step")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate, decayed linearly to zero")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and the demonstrations")
    args = parser.parse_args()

    transformers.logging.disable_progress_bar()
    began = time.time()
    tokenizer, model = build_tokenizer(), build_model(args.seed)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(VOCABULARY)} tokens")
    pretrain(model, tokenizer, args.steps, args.batch_size, args.lr, args.seed)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(accuracy_table(model.eval(), tokenizer))
    print(f"wrote {args.out} in {(time.time() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
