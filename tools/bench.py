"""Speed and memory of a training step of lepo.py, beside what one would use instead.

    python tools/bench.py                        # the chains model, all parts
    python tools/bench.py --model FOLDER --task FOLDER --max_new_tokens 160 --parts rollout
    python tools/bench.py --model FOLDER --task FOLDER --max_new_tokens 160 --parts step --rows 8 16
    python tools/bench.py --model FOLDER --task FOLDER --prompts_per_step 2 --parts update

  rollout  tokens/s with soft tokens and without, beside `model.generate` of transformers
  update   lepo.update beside the update that one writes first: seconds, peak memory, and how far
           the two gradients are apart
  step     a whole step of LEPO and of GRPO, beside TRL's GRPOTrainer (pip install trl)

All other flags are those of lepo.py. Machines are noisy. So contestants take turns, a figure is the
median over the turns after the first, and what counts are ratios within one run. The last line is
JSON. Letters in shapes are those of common.py.

All logits at once are large: with a real vocabulary 80 GB for 256 rows of 512 steps. So the update
of a real model is measured with few prompts.
"""

import argparse
import importlib.util
import itertools
import json
import multiprocessing
import re
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, f"{Path(__file__).parents[1]}")  # the root, since this file is run as a script
import common
import lepo
import tasks
from tasks import encoding, settings


def parse_args(argv=None):
    """The settings of lepo.py, with three more"""
    about = "Speed and memory of a training step. All other flags are those of lepo.py."
    parser = settings.Parser(description=about)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_number("repeats", 5, 2, "turns, of which the first does not count")
    parser.add_argument(
        "--rows", nargs="+", type=int, default=[32, 64, 256], help="TRL: divides a batch"
    )
    own, others = parser.parse_known_args(argv)
    args = lepo.parse_args(others)
    args.lr = 1e-6  # so small that all steps are alike
    return argparse.Namespace(**vars(args) | vars(own))


def without_latents(args):
    """What lepo.py makes of --latent_steps 0"""
    return argparse.Namespace(**vars(args) | {"latent_steps": 0, "top_k": 1})


def take_turns(contestants, args):
    """{name: function} -> {name: [(seconds, what it returned), ...]}, without the first turn"""
    turns = {name: [] for name in contestants}
    for _ in common.progress(range(args.repeats)):
        for name, function in contestants.items():
            began = time.perf_counter()
            result = function()  # its last line is .item(), which waits for a GPU
            turns[name].append((time.perf_counter() - began, result))
    return {name: values[1:] for name, values in turns.items()}


def median_seconds(turns):
    return {name: median(s for s, _ in values) for name, values in turns.items()}


def in_its_own_process(function, *inputs):
    """In which nothing else has run"""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *inputs).result()


def report(title, figures):
    """Prints and returns {name: figure}"""
    first = next(iter(figures.values()))
    print(f"\n| {title} | | relative to the first |\n|---|---|---|")
    for name, figure in figures.items():
        print(f"| {name} | {figure:,.4g} | {figure / first:.2f} |")
    return figures


# --- 1. Rollout -----------------------------------------------------------------------------------
def left_pad(rows, device):
    """Lists of token ids -> ids (B, L) and their mask (B, L)"""
    rows = [torch.tensor(row, device=device) for row in rows]
    ids = pad_sequence(rows, True, padding_value=-1, padding_side="left")  # (B, L)
    return ids.clamp(min=0), (ids >= 0).long()


def generate(model, lm, encoded, args):
    """transformers' own decoding, from the full softmax as in lepo.text_token -> tokens made"""
    ids, mask = left_pad(encoded, args.device)  # (P, L)
    made = model.generate(
        ids,
        attention_mask=mask,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        num_return_sequences=args.group_size,
        max_new_tokens=args.max_new_tokens,
        eos_token_id=lm.stop_ids.tolist(),
    )[:, ids.shape[1] :]  # (N, T)
    stops = torch.isin(made, lm.stop_ids).long()  # (N, T)
    return (stops.cumsum(1) - stops == 0).sum().item()  # an end token counts, what follows does not


def bench_rollout(args, lm, encoded):
    def ours(args):
        roll = lepo.rollout(lm, encoded, args.group_size, args.latent_steps, args)
        return roll.length.sum().item()

    model = deepcopy(lm.model).to(lm.dtype)  # as its users have it
    contestants = {
        "latent": lambda: ours(args),
        "ordinary": lambda: ours(without_latents(args)),
        "model.generate": lambda: generate(model, lm, encoded, args),
    }
    turns = take_turns(contestants, args)
    rates = {name: median(made / s for s, made in values) for name, values in turns.items()}
    return report("rollout, tokens/s", rates)


# --- 2. Update: at a learning rate of 0, since what an optimiser does is the same for both --------
def naive_update(lm, optimizer, roll, advantages, args):
    """lepo.update as one writes it first: all rows in one pass, and all logits at once"""
    optimizer.zero_grad()
    steps = int(roll.length.max())  # T
    ids, weights = roll.ids[:, :steps], roll.weights[:, :steps]  # (N, T, K)
    rows = [prompt for prompt in roll.prompts for _ in range(advantages.shape[1])]
    prompt, mask = left_pad(rows, args.device)  # (N, L)
    mask = F.pad(mask, (0, steps - 1), value=1)  # (N, L + T - 1)
    with lm.autocast():
        thought = lepo.mix(lm.embedding, ids, weights)  # (N, T, D)
        embeds = torch.cat([lm.embedding[prompt], thought], 1)[:, :-1]  # (N, L + T - 1, D)
        made = lm.model(inputs_embeds=embeds, attention_mask=mask, logits_to_keep=steps)
    logits = made.logits.float()  # (N, T, V)
    log_pi = logits.log_softmax(-1).gather(-1, ids)  # (N, T, K)
    log_probs = (weights * log_pi).sum(-1)  # (N, T), 0 where nothing was executed
    objective = (advantages.view(-1, 1) * log_probs).sum() / roll.length.sum()
    (-objective).backward()
    norm = torch.nn.utils.clip_grad_norm_(lm.model.parameters(), 1.0)
    optimizer.step()
    return norm.item()


def make_update(update, lm, roll, advantages, args):
    """-> a function that does one update, and returns the norm of the gradient"""
    optimizer = torch.optim.SGD(lm.model.parameters(), lr=0.0)
    return lambda: update(lm, optimizer, roll, advantages, args)


def gradient(lm, update):
    """-> (number of weights,), as it was before the update bounded its norm by 1"""
    norm = update()
    return max(1, norm) * torch.cat([weight.grad.flatten() for weight in lm.model.parameters()])


def gradient_distance(lm, ours, naive):
    """Relative to the second"""
    ours, naive = gradient(lm, ours), gradient(lm, naive)
    return ((ours - naive).norm() / naive.norm()).item()


def peak_memory(update, roll, advantages, args):
    """Gigabytes at the peak, of the model and an update; on a CPU what Linux gave to the process"""
    make_update(update, common.load_model(args), roll, advantages, args)()
    if args.device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1e6


def bench_update(args, lm, encoded):
    roll = lepo.rollout(lm, encoded, args.group_size, args.latent_steps, args)
    advantages = torch.randn(len(encoded), args.group_size, device=args.device)  # none is 0
    peaks, contestants = {}, {}
    for name, update in {"lepo.update": lepo.update, "all logits at once": naive_update}.items():
        peaks[name] = in_its_own_process(peak_memory, update, roll, advantages, args)
        contestants[name] = make_update(update, lm, roll, advantages, args)
    turns = take_turns(contestants, args)
    return {
        "seconds": report("update, seconds", median_seconds(turns)),
        "gigabytes": report("update, peak memory in GB", peaks),
        "gradient_distance": gradient_distance(lm, *contestants.values()),
    }


# --- 3. A whole step ------------------------------------------------------------------------------
def make_step(args, lm, optimizer):
    """-> a function for one training step: the lines of lepo.main, with random advantages"""
    task = tasks.find(args.task)
    numbers = itertools.count()

    def step():
        start = next(numbers) * args.prompts_per_step
        problems = task.problems(args, "train", start, args.prompts_per_step)
        encoded = encoding.encode(lm, task, problems, args)
        roll = lepo.rollout(lm, encoded, args.group_size, args.latent_steps, args)
        strict, _ = lepo.rewards_of(lm, task, roll, problems)
        # Not zero: lepo.update would skip the group, and TRL does not
        lepo.update(lm, optimizer, roll, torch.randn_like(strict), args)

    return step


def trl_seconds(args, rows):
    """GRPOTrainer with our model, prompts, lengths and reward -> seconds between ends of steps"""
    from datasets import Dataset  # all here, since lepo.py does without them
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    lm, task = common.load_model(args), tasks.find(args.task)
    model = lm.model.to(lm.dtype)  # weights and Adam, as its users have them
    problems = task.problems(args, "train", 0, args.prompts_per_step * args.repeats)
    texts = [task.request(problem.question, args) for problem in problems]
    if lm.tokenizer.chat_template:
        texts = [[{"role": "user", "content": text.strip()}] for text in texts]
    data = Dataset.from_dict({"prompt": texts, "index": range(len(texts))})

    def reward(completions, index, **_):
        if lm.tokenizer.chat_template:
            completions = [turns[0]["content"] for turns in completions]
        return [task.verify(text, problems[i])[0] for text, i in zip(completions, index)]

    clock, ends = TrainerCallback(), []
    clock.on_step_end = lambda *_, **__: ends.append(time.perf_counter())
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            folder,
            use_cpu=args.device == "cpu",
            bf16=args.precision == "bfloat16",
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=args.prompts_per_step * args.group_size // rows,
            num_generations=args.group_size,
            max_completion_length=args.max_new_tokens,
            learning_rate=args.lr,
            max_steps=args.repeats,
            gradient_checkpointing=False,
            save_strategy="no",
        )
        trainer = GRPOTrainer(
            model, reward, config, data, processing_class=lm.tokenizer, callbacks=[clock]
        )
        trainer.train()
    return median(end - start for start, end in itertools.pairwise(ends))


def our_seconds(args):
    lm = common.load_model(args)
    optimizer = torch.optim.AdamW(lm.model.parameters(), args.lr, fused=True)
    return median_seconds(take_turns({
        "LEPO": make_step(args, lm, optimizer),
        "GRPO": make_step(without_latents(args), lm, optimizer),
    }, args))  # fmt: skip


def bench_step(args, lm, encoded):
    seconds = in_its_own_process(our_seconds, args)
    if importlib.util.find_spec("trl"):
        for rows in args.rows:
            seconds[f"TRL, {rows} rows a pass"] = in_its_own_process(trl_seconds, args, rows)
    return report("a whole step, seconds", seconds)


PARTS = {"rollout": bench_rollout, "update": bench_update, "step": bench_step}


def main(argv=None):
    args = parse_args(argv)
    lm = common.load_model(args)
    task = tasks.find(args.task)
    problems = task.problems(args, "train", 0, args.prompts_per_step)
    encoded = encoding.encode(lm, task, problems, args)
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    result = {"device": f"{device}, {torch.get_num_threads()} threads", "args": vars(args)}
    for part in args.parts:
        result[part] = PARTS[part](args, lm, encoded)
    print(json.dumps(result))


if __name__ == "__main__":
    common.run_main(main)
