"""Speed and memory of a training step, beside what one would use instead.

    python bench.py                                        # the tiny model, all parts; a few minutes on two cores
    python bench.py --shape qwen --parts rollout,update    # Qwen2.5-0.5B's shape with random weights
    python bench.py --shape qwen --device cuda --compile   # the same on a GPU: 256 rows of 512 tokens

  rollout  tokens/s with latent steps and without, against `model.generate` with the same filters
  update   against the update one writes first, all logits at once: seconds, peak memory, distance of the gradients
  step     a whole step of LEPO and of GRPO, against TRL's GRPOTrainer where trl is installed (pip install trl)

Machines are noisy. So contestants take turns, a figure is the median over the turns after the first, and what to look
at is the ratio of two figures of one run. The last line is JSON. Letters in shapes are those of common.py.
"""

import argparse
import contextlib
import importlib.util
import io
import itertools
import json
import mmap
import multiprocessing
import statistics
import tempfile
import threading
import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

import common
import lepo

SPAWN = multiprocessing.get_context("spawn")  # for processes in which nothing else has run
PARTS = {"tiny": ["rollout", "update", "step"], "qwen": ["rollout", "update"]}  # a step needs text, so a tokenizer
QWEN = dict(vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
            num_key_value_heads=2, tie_word_embeddings=True)  # fmt: skip


def parse_args(argv=None):
    """-> the arguments of lepo.py for this shape, and on top those given here"""
    parser = argparse.ArgumentParser(description="Speed and memory. The first page of the file explains the parts.")
    add, at_least = parser.add_argument, common.at_least
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    add("--shape", default="tiny", choices=PARTS, help="the shipped model, or Qwen2.5-0.5B's shape, random weights")
    add("--parts", help="some of rollout,update,step; default: all (step: tiny only)")
    add("--device", default=devices[0], choices=devices)
    add("--compile", action="store_true", dest="try_compile", help="one more contestant: the rollout of lepo --compile")
    add("--prompts", type=at_least(1), help="P, of 8 rollouts each; default: 32, of qwen on a CPU 1")
    add("--tokens", type=at_least(2), help="T, the cap on a rollout; default: of tiny 40, of qwen 512, on a CPU 256")
    add("--repeats", type=at_least(2), help="turns, the first of which is not counted; default: of tiny 9, of qwen 3")
    add("--micro_batch", type=at_least(1), help="of the update; default: lepo.py's")
    given = parser.parse_args(argv)
    tiny, cpu, parts = given.shape == "tiny", given.device == "cpu", PARTS[given.shape]
    given.parts = given.parts.split(",") if given.parts else parts
    if not set(given.parts) <= set(parts):
        parser.error(f"--parts takes some of {','.join(parts)} with --shape {given.shape}")
    args = lepo.parse_args(["--model", "tiny" if tiny else "Qwen2.5-0.5B"])
    args.prompts, args.tokens, args.repeats = (32, 40, 9) if tiny else (1, 256, 3) if cpu else (32, 512, 3)
    vars(args).update({name: value for name, value in vars(given).items() if value is not None})
    args.max_new_tokens, args.rows = args.tokens, args.prompts * args.group_size  # T, N
    args.latent_steps = min(args.latent_steps, max(1, args.tokens // 3))
    args.lr = 1e-6  # so small that all steps are alike
    return args


def load(args):
    """-> model and P prompts; of the qwen shape random ones, without a tokenizer and without an end token"""
    if args.shape == "tiny":
        lm = common.load_model(args)
        problems = common.take_problems(args, "train", 0, args.prompts)
        return lm, [common.encode_prompt(lm.tokenizer, problem) for problem in problems]
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**QWEN)).to(args.device).eval()
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    prompts = torch.randint(len(table), (args.prompts, 100)).tolist()  # GSM8K's are about as long
    return common.LanguageModel(model, None, table, head, stop_ids=[]), prompts


def take_turns(contestants, args):
    """{name: function} -> {name: [(seconds, what the function returned), …]} of all turns but the first"""
    turns = {name: [] for name in contestants}
    wait = torch.cuda.synchronize if args.device == "cuda" else lambda: None  # a GPU works on after a call returns
    for _ in common.progress(range(args.repeats), desc=" / ".join(contestants), leave=False):
        for name, function in contestants.items():
            start = time.perf_counter()
            result = function()
            wait()
            turns[name].append((time.perf_counter() - start, result))
    return {name: values[1:] for name, values in turns.items()}


def peak_memory(function, args):
    """-> the most bytes in use while function() runs, in total and above those at its start. On a CPU, what Linux has
    given to this process, looked up every 2 ms; 0 on other systems."""
    statm, done = Path("/proc/self/statm"), threading.Event()

    def resident():
        return int(statm.read_text().split()[1]) * mmap.PAGESIZE if statm.exists() else 0

    def watch():
        while not done.wait(0.002):
            seen.append(resident())
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        seen = [torch.cuda.memory_allocated()]
        function()
        seen.append(torch.cuda.max_memory_allocated())
    else:
        seen = [resident()]
        threading.Thread(target=watch, daemon=True).start()
        function()
        done.set()
    return {"total": max(seen), "above": max(seen) - seen[0]}


# --- Rollout ----------------------------------------------------------------------------------------------------------


def generate(model, stop_ids, prompts, args):
    """transformers' own decoding -> tokens made"""
    ids, mask = common.left_pad(prompts, args.device)  # (P, L) each
    out = model.generate(
        ids, attention_mask=mask, do_sample=True, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
        num_return_sequences=args.group_size, max_new_tokens=args.tokens, eos_token_id=stop_ids or None, pad_token_id=0,
    )[:, ids.shape[1] :]  # (N, T)  # fmt: skip
    stop = torch.isin(out, torch.tensor(stop_ids, device=out.device)).long()  # (N, T)
    return int((stop.cumsum(1) - stop == 0).sum())  # the end token counts, what follows does not


def bench_rollout(args, lm, prompts):
    generator, peak = torch.Generator(args.device).manual_seed(0), None

    def ours(lm, latent_steps):
        return int(lepo.rollout(lm, prompts, args.group_size, args, generator, latent_steps).length.sum())
    if args.device == "cuda":  # first, while nothing but the model is there
        peak = peak_memory(lambda: ours(lm, args.latent_steps), args)
        print(f"\nPeak memory of a rollout: {peak['total'] / 1e9:.2f} GB, {peak['above'] / 1e9:.2f} above the weights")
    contestants = {"latent": lambda: ours(lm, args.latent_steps), "ordinary": lambda: ours(lm, 0)}
    if args.try_compile:
        how = {"mode": "reduce-overhead"} if args.device == "cuda" else {"backend": "eager"}  # as in common.load_model
        compiled = replace(lm, compiled=torch.compile(lm.model.base_model, **how))
        contestants["latent, --compile"] = lambda: ours(compiled, args.latent_steps)
    plain = deepcopy(lm.model).bfloat16() if args.device == "cuda" else lm.model  # as its users have it
    contestants["model.generate"] = lambda: generate(plain, lm.stop_ids, prompts, args)
    turns = take_turns(contestants, args)
    rate = {name: statistics.median(made / seconds for seconds, made in values) for name, values in turns.items()}
    print(f"\nRollout, {args.rows} rows of up to {args.tokens} tokens, {args.latent_steps} of them latent\n")
    print("| | tokens/s | latent is faster by |\n|---|---|---|")
    for name, value in rate.items():
        print(f"| {name} | {value:,.0f} | {rate['latent'] / value:.2f} |")
    return {"tokens_per_second": rate, "peak": peak}


# --- Update, with a learning rate of 0: what the optimiser does with a gradient is the same for both ------------------


def naive_update(lm, ref, optimizer, roll, advantages, args):
    """lepo.update as one writes it first: all rows in one pass, and the log-probabilities of the whole vocabulary"""
    optimizer.zero_grad()
    steps = int(roll.length.max())  # T
    ids, weights = roll.ids[:, :steps], roll.weights[:, :steps]  # (N, T, K) each
    prompts = [prompt for prompt in roll.prompts for _ in range(roll.group_size)]
    prompt, prompt_mask = common.left_pad(prompts, args.device)  # (N, L) each
    mask = torch.arange(steps, device=args.device) < roll.length[:, None]  # (N, T)
    with lm.autocast():
        thought = common.mix_embeddings(lm.table, ids, weights)  # (N, T, D)
        embeds = torch.cat([lm.table[prompt], thought], 1)[:, :-1]  # (N, L + T - 1, D)
        hidden = lm.hidden_states(embeds, torch.cat([prompt_mask, mask], 1)[:, :-1])  # (N, L + T - 1, D)
        logits = F.linear(hidden[:, -steps:], lm.head)  # (N, T, V)
    log_p = (logits.float() / args.temperature).log_softmax(-1)  # (N, T, V)
    log_probs = (weights * log_p.gather(-1, ids)).sum(-1)  # (N, T)
    ratio = (log_probs - log_probs.detach()).exp()  # (N, T) all 1
    loss = -(ratio * advantages[:, None] * mask).sum() / roll.length.sum()
    loss.backward()
    grad_norm = torch.nn.utils.clip_grad_norm_(lm.model.parameters(), 1.0)
    optimizer.step()
    return {"grad_norm": grad_norm.item()}


def update_memory(update, roll, advantages, args):
    lm, _ = load(args)
    optimizer = torch.optim.SGD(lm.model.parameters(), lr=0.0)
    return peak_memory(lambda: update(lm, None, optimizer, roll, advantages, args), args)


def bench_update(args, lm, prompts):
    prompts = prompts[:2] if args.shape == "qwen" else prompts  # of 256 rows of 512 steps, logits alone take 80 GB
    generator, optimizer = torch.Generator(args.device).manual_seed(0), torch.optim.SGD(lm.model.parameters(), lr=0.0)
    roll = lepo.rollout(lm, prompts, args.group_size, args, generator, args.latent_steps)
    advantages = torch.randn(len(roll.length), device=args.device, generator=generator)  # (N,) none is 0
    updates = {"all logits at once": naive_update, f"lepo.update, micro-batches of {args.micro_batch}": lepo.update}
    contestants, peaks = {}, {}
    for name, update in updates.items():
        contestants[name] = lambda f=update: f(lm, None, optimizer, roll, advantages, args)
        if args.device == "cpu":
            with SPAWN.Pool(1) as pool:
                peaks[name] = pool.apply(update_memory, (update, roll, advantages, args))
        else:
            lm.model.zero_grad()
            peaks[name] = peak_memory(contestants[name], args)
    turns = take_turns(contestants, args)
    times = {name: statistics.median(seconds for seconds, _ in values) for name, values in turns.items()}
    gradients = []
    for update in contestants.values():
        unclipped = max(1, update()["grad_norm"])  # an update clips this norm to 1
        gradients.append(torch.cat([weight.grad.flatten() for weight in lm.model.parameters()]) * unclipped)
    naive, ours = gradients  # (number of weights,) each
    apart, size = (torch.linalg.vector_norm(x, dtype=torch.double).item() for x in (ours - naive, naive))
    print(f"\nUpdate, {len(roll.length)} rows of {roll.length.float().mean():.0f} steps\n")
    print("| | seconds | peak, GB | above the weights, GB |\n|---|---|---|---|")
    for name, seconds in times.items():
        print(f"| {name} | {seconds:.3f} | {peaks[name]['total'] / 1e9:.2f} | {peaks[name]['above'] / 1e9:.2f} |")
    print(f"\nRelative distance of the two gradients: {apart / size:.1e}")
    return {"seconds": times, "peaks": peaks, "gradient_distance": apart / size}


# --- A whole step -----------------------------------------------------------------------------------------------------


def make_stepper(args, latent_steps):
    """-> a function for one training step: the lines of lepo.main, without its log"""
    lm, generator, steps = common.load_model(args), torch.Generator(args.device), itertools.count()
    args = argparse.Namespace(**vars(args) | {"latent_steps": latent_steps})
    optimizer = torch.optim.AdamW(lm.model.parameters(), args.lr, betas=(0.9, 0.99), weight_decay=0.1, fused=True)

    def train_step():
        step, count = next(steps), args.prompts
        generator.manual_seed(args.seed * 10**9 + step * 10**3)
        problems = common.take_problems(args, "train", step * count, count)
        prompts = [common.encode_prompt(lm.tokenizer, problem) for problem in problems]
        roll = lepo.rollout(lm, prompts, args.group_size, args, generator, latent_steps)
        _, strict, _ = lepo.score(lm, roll, problems)
        lepo.update(lm, None, optimizer, roll, lepo.group_advantages(strict).flatten(), args)
    return train_step


def trl_seconds(args, rows):
    """GRPOTrainer on our prompts, model, lengths and reward -> median from the end of a step to that of the next"""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    problems = common.take_problems(args, "train", 0, args.prompts * args.repeats)
    data = Dataset.from_list([{"prompt": problem.question, "index": i} for i, problem in enumerate(problems)])
    lm, clock, ends = common.load_model(args), TrainerCallback(), []
    clock.on_step_end = lambda *_, **__: ends.append(time.perf_counter())

    def reward(completions, index, **_):
        return [common.verify(text, problems[i])[0] for text, i in zip(completions, index, strict=True)]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        config = GRPOConfig(
            output_dir=folder, use_cpu=args.device == "cpu", bf16=args.device == "cuda", report_to=[],
            per_device_train_batch_size=rows, gradient_accumulation_steps=args.rows // rows,
            num_generations=args.group_size, max_completion_length=args.tokens, temperature=args.temperature,
            top_k=args.top_k, top_p=args.top_p, learning_rate=args.lr, max_steps=args.repeats, shuffle_dataset=False,
            gradient_checkpointing=False, save_strategy="no", logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        GRPOTrainer(lm.model, reward, config, data, processing_class=lm.tokenizer, callbacks=[clock]).train()
    return statistics.median(end - start for start, end in itertools.pairwise(ends))


def bench_step(args, lm, prompts):
    """Ours before and after TRL, should the machine change meanwhile"""
    ours = {"LEPO": make_stepper(args, args.latent_steps), "GRPO": make_stepper(args, 0)}
    before, trl = take_turns(ours, args), {}
    if importlib.util.find_spec("trl"):
        for rows in [rows for rows in (32, 64, 256) if args.rows % rows == 0] or [args.rows]:
            with SPAWN.Pool(1) as pool:
                trl[f"TRL, {rows} rows a pass"] = pool.apply(trl_seconds, (args, rows))
    after = take_turns(ours, args)
    times = {name: statistics.median(seconds for seconds, _ in before[name] + after[name]) for name in ours} | trl
    print(f"\nA whole step, {args.rows} rollouts of up to {args.tokens} tokens\n")
    print("| | seconds | LEPO is faster by |\n|---|---|---|")
    for name, seconds in times.items():
        print(f"| {name} | {seconds:.3f} | {seconds / times['LEPO']:.2f} |")
    if not trl:
        print("\ntrl is not installed, so there is nothing to compare with (pip install trl)")
    ratio = min(trl.values()) / times["LEPO"] if trl else None
    return {"seconds": times, "trl_over_lepo": ratio, "lepo_over_grpo": times["LEPO"] / times["GRPO"]}


def main():
    args = parse_args()
    lm, prompts = load(args)
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    size = sum(weight.numel() for weight in lm.model.parameters())
    print(f"{args.shape}: {size:,} parameters, {device}, torch {torch.__version__}")
    parts = {"rollout": bench_rollout, "update": bench_update, "step": bench_step}
    result = {"shape": args.shape, "device": device, "prompts": args.prompts, "tokens": args.tokens}
    result |= {part: bench(args, lm, prompts) for part, bench in parts.items() if part in args.parts}
    print(f"\n{json.dumps(result)}")


if __name__ == "__main__":
    common.run_main(main)
