"""Speed and memory of one training step, side by side in one run with what one would use instead.

    python bench.py                                          # the tiny model, parts a to d; a few minutes on two cores
    python bench.py --shape qwen --parts rollout,update      # Qwen2.5-0.5B's shape, random weights
    python bench.py --shape qwen --device cuda               # the same on a GPU: 256 rows x 512 tokens

  rollout  latent tokens and ordinary ones, against `model.generate` and against the loop one writes first: every row's
           prompt run for itself, a cache that grows by concatenation, no row leaves before all have ended
  update   against the update one writes first: all logits of all rows at once; seconds, peak memory, and how far apart
           the gradients are
  step     a whole LEPO and GRPO step against a step of TRL's GRPOTrainer, where trl is installed (pip install trl)
  scaling  seconds of rollout and update, rows x tokens

Machines are noisy, so contestants take turns, a figure is the median over the turns after the first, and what to look
at is the ratio of two of them in one run. The last line is JSON.
"""

import contextlib
import io
import json
import math
import multiprocessing
import resource
import statistics
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoTokenizer, DynamicCache, Qwen2Config, Qwen2ForCausalLM

import common
import lepo
from common import UserError

QWEN = dict(
    vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
    num_key_value_heads=2, tie_word_embeddings=True, rope_theta=1e6, max_position_embeddings=32768,
)  # fmt: skip


def parse_args(argv=None):
    parser = common.Parser(description="Speed and memory, side by side. The first page of the file explains the parts.")
    parser.add_argument("--shape", default="tiny", choices=["tiny", "qwen"],
                        help="the shipped model, or Qwen2.5-0.5B's shape with random weights [tiny]")  # fmt: skip
    parser.add_argument("--parts", default=None, help="some of rollout,update,step,scaling [all; step: tiny only]")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--prompts", type=int, help="prompts, of 8 rollouts each [tiny, GPU: 32; qwen on a CPU: 1]")
    parser.add_argument("--tokens", type=int, help="cap on new tokens [tiny: 40; qwen: 256 on a CPU, 512 on a GPU]")
    parser.add_argument("--repeats", type=int, default=None, help="turns, the first not counted [tiny: 9; qwen: 3]")
    parser.add_argument("--micro_batch", type=int, default=None, help="of the update [lepo.py's]")
    args = parser.parse_args(argv)
    known = ["rollout", "update", "step", "scaling"]
    args.parts = args.parts.split(",") if args.parts else known[: 4 if args.shape == "tiny" else 2]
    small = args.shape == "qwen" and args.device == "cpu"
    args.prompts = args.prompts or (1 if small else 32)
    args.tokens = args.tokens or (40 if args.shape == "tiny" else 256 if small else 512)
    args.repeats = args.repeats or (9 if args.shape == "tiny" else 3)
    for fine, message in (
        (set(args.parts) <= set(known), f"--parts takes some of {','.join(known)}"),
        (args.repeats >= 2, "--repeats must be at least 2: the first turn is warm-up"),
        (args.prompts >= 1 and args.tokens >= 2, "--prompts must be at least 1 and --tokens at least 2"),
        (args.shape == "tiny" or "step" not in args.parts, "the part step takes the tiny model's data: --shape tiny"),
        (args.device == "cpu" or torch.cuda.is_available(), "--device cuda: no GPU found; use --device cpu"),
    ):
        if not fine:
            raise UserError(message)
    return args


# ----------------------------------------------------------------------------------------------------------------------
# Measuring.


def seconds(function, device):
    """-> seconds that function() takes, the GPU's work included, and what it returns."""
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    result = function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began, result


def take_turns(contestants, repeats, device):
    """{name: function} -> {name: [(seconds, result), …]} of all turns but the first."""
    turns = {name: [] for name in contestants}
    for _ in tqdm(range(repeats), desc=" / ".join(contestants), leave=False, disable=None):
        for name, function in contestants.items():
            turns[name].append(seconds(function, device))
    return {name: values[1:] for name, values in turns.items()}


@contextlib.contextmanager
def peak_memory(device):
    """`with peak_memory(device) as peak:` then peak["above"] bytes above the start and peak["total"] in all. On a CPU
    this is resident memory, looked at every 2 ms (Linux), or the process's maximum so far (elsewhere)."""
    peak, done = {}, threading.Event()
    status = Path("/proc/self/statm")

    def resident():
        if status.exists():
            return int(status.read_text().split()[1]) * resource.getpagesize()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, where there is no /proc

    def watch():
        while not done.wait(0.002):
            peak["total"] = max(peak["total"], resident())

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        yield peak
        peak["total"] = torch.cuda.max_memory_allocated()
    else:
        start = peak["total"] = resident()
        watcher = threading.Thread(target=watch)
        watcher.start()
        yield peak
        done.set()
        watcher.join()
    peak["above"] = peak["total"] - start


def ceilings():
    """What this GPU reaches at best: bytes/s of a large copy, FLOP/s of a large bfloat16 matrix product."""
    a, b = torch.empty(2, 2**30, dtype=torch.uint8, device="cuda").random_()
    x, y = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    turns = take_turns({"copy": lambda: b.copy_(a), "product": lambda: x @ y}, 20, "cuda")
    copy, product = (statistics.median(t for t, _ in turns[name]) for name in ("copy", "product"))
    return 2 * a.numel() / copy, 2 * 8192**3 / product


# ----------------------------------------------------------------------------------------------------------------------
# The contestants.


def setup(args):
    """-> model, prompts, arguments of lepo.py. The stop token of a random model would end rows at random: none is
    watched for, and every row has --tokens steps."""
    lepo_args, _ = lepo.parse_args(["--model", "tiny", "--device", args.device])
    lepo_args.max_new_tokens, lepo_args.prompts_per_step = args.tokens, args.prompts
    if args.shape == "tiny":
        lm = common.load_model("tiny", args.device)
    else:
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(Qwen2Config(**QWEN)).to(args.device).eval()
        lm = common.LanguageModel(model, None, stop_ids=[], pad_id=0)
        lepo_args.latent_steps, lepo_args.tau, lepo_args.micro_batch = args.tokens // 8, 0.3, 4
    lepo_args.micro_batch = args.micro_batch or lepo_args.micro_batch
    return lm, make_prompts(args, lm, args.prompts), lepo_args


def make_prompts(args, lm, count):
    if args.shape == "tiny":
        return common.take(common.load_problems("tiny", "train", 0), 0, count, lm.tokenizer, 512)[1]
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(60, 140, (count,), generator=generator).tolist()  # GSM8K's are about 100 with the template
    return [torch.randint(0, QWEN["vocab_size"], (n,), generator=generator).tolist() for n in lengths]


def left_pad(lm, prompts):
    """-> ids (N, L), mask (N, L), as `generate` wants them"""
    width, device = max(map(len, prompts)), lm.model.device
    ids = torch.tensor([[lm.pad_id] * (width - len(p)) + p for p in prompts], device=device)  # (N, L)
    return ids, torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)  # (N, L)


@torch.no_grad()
def naive_rollout(lm, prompts, lepo_args, generator):
    """The loop one writes first. Same tokens as lepo.rollout's, from the same functions. -> tokens made"""
    device, model = lm.model.device, lm.player()
    ids, mask = left_pad(lm, [p for p in prompts for _ in range(8)])  # (N, L)
    embeds, cache = lm.table[ids].to(model.dtype), DynamicCache(config=model.config)
    stop, alive = torch.tensor(lm.stop_ids, device=device), torch.ones(len(ids), dtype=torch.bool, device=device)
    made = 0
    for t in range(lepo_args.max_new_tokens):
        position = (mask.cumsum(-1) - 1).clamp(min=0)[:, -embeds.shape[1] :]
        logits = model(inputs_embeds=embeds, attention_mask=mask, position_ids=position, past_key_values=cache).logits
        ids, log_probs = lepo.support(logits[:, -1], lepo_args.temperature, lepo_args.top_k, lepo_args.top_p)
        gumbel = lepo.gumbel_noise(ids.shape, generator, device)
        latent = t < lepo_args.latent_steps
        token = (lepo.latent_token(ids, log_probs, gumbel, generator, lepo_args) if latent
                 else lepo.written_token(ids, log_probs, gumbel))  # fmt: skip
        made += int(alive.sum())
        alive &= ~torch.isin(token.heaviest(), stop)
        if not alive.any():
            break
        embeds = (token.weights[..., None] * lm.table[token.ids]).sum(1, keepdim=True).to(model.dtype)  # (N, 1, D)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return made


@torch.no_grad()
def generate(lm, prompts, lepo_args):
    """transformers' own, with the same filters -> tokens made"""
    ids, mask = left_pad(lm, prompts)  # (P, L)
    out = lm.player().generate(
        ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=lepo_args.top_k, top_p=lepo_args.top_p,
        max_new_tokens=lepo_args.max_new_tokens, num_return_sequences=8, pad_token_id=lm.pad_id,
        eos_token_id=lm.stop_ids or None,
    )[:, ids.shape[1] :]  # (N, T)  # fmt: skip
    stop = torch.isin(out, torch.tensor(lm.stop_ids, device=out.device))
    return int(((stop.cumsum(1) - stop.long()) == 0).sum())


def naive_gradient(lm, roll, advantages, lepo_args):
    """The update one writes first, up to its gradients: every row at once, all logits, all log-probabilities."""
    ids, prompt_mask = left_pad(lm, [p for p in roll.prompts for _ in range(roll.group_size)])  # (N, L)
    steps = roll.ids.shape[1]
    mask = torch.cat([prompt_mask, roll.mask().long()], 1)[:, :-1]
    latents = (roll.weights[..., None] * lm.table[roll.ids]).sum(2)[:, :-1]  # (N, T-1, D)
    with common.autocast(lm.model.device):
        logits = lm.model(
            inputs_embeds=torch.cat([lm.table[ids], latents], 1), attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0), use_cache=False,
        ).logits[:, -steps:]  # (N, T, V)  # fmt: skip
    log_p = (logits.float() / lepo_args.temperature).log_softmax(-1).gather(-1, roll.ids)  # (N, T, K)
    log_probs = (roll.weights * log_p).sum(-1)  # (N, T)
    ratio = (log_probs - log_probs.detach()).exp()
    (-(ratio * advantages[:, None] * roll.mask()).sum() / roll.length.sum()).backward()


# ----------------------------------------------------------------------------------------------------------------------
# The parts. Each returns its figures and prints its table.


def table(title, rows):
    """Markdown; rows: [{column: text}]"""
    print(f"\n{title}\n\n| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row.values()) + " |")


def bench_rollout(args, lm, prompts, lepo_args):
    generator = torch.Generator(args.device).manual_seed(0)

    def ours(latent_steps):
        return int(lepo.rollout(lm, prompts, 8, lepo_args, generator, latent_steps).length.sum())

    turns = take_turns({
        "latent": lambda: ours(lepo_args.latent_steps),
        "ordinary": lambda: ours(0),
        "generate": lambda: generate(lm, prompts, lepo_args),
        "naive latent loop": lambda: naive_rollout(lm, prompts, lepo_args, generator),
    }, args.repeats, args.device)  # fmt: skip
    rate = {name: statistics.median(made / s for s, made in values) for name, values in turns.items()}
    table(f"Rollout, {8 * args.prompts} rows of up to {args.tokens} tokens", [
        {"": name, "tokens/s": f"{r:,.0f}", "latent is faster by": f"{rate['latent'] / r:.2f}"}
        for name, r in rate.items()
    ])  # fmt: skip
    result = {"tokens_per_second": rate}
    if args.device == "cuda":
        result["share_of_bandwidth"] = bandwidth_share(args, lm, prompts, rate)
    return result


def bandwidth_share(args, lm, prompts, rate):
    """The least a step must read, weights and the keys and values so far, over what it takes, in shares of a copy's."""
    bandwidth, _ = ceilings()
    config, rows = lm.model.config, 8 * len(prompts)
    weights = 2 * sum(p.numel() for p in lm.model.parameters())
    columns = rows * (statistics.mean(map(len, prompts)) + args.tokens / 2)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    read = weights + 2 * 2 * columns * config.num_hidden_layers * config.num_key_value_heads * head
    share = read * rate["ordinary"] / rows / bandwidth
    print(f"\nA copy reaches {bandwidth / 1e9:,.0f} GB/s; the rollout reads at least {share:.0%} of that.")
    return share


def gradient_of(settings, lm, roll, advantages, lepo_args):
    """Leave the gradients of one update in lm.model; settings: what of lepo_args to change, None for the naive one."""
    lm.model.zero_grad()
    if settings is None:
        return naive_gradient(lm, roll, advantages, lepo_args)
    changed = settings | {"grad_clip": math.inf}
    frozen = torch.optim.SGD(lm.model.parameters(), lr=0.0)  # gradients only: the optimisers would be the same
    return lepo.update(lm, None, frozen, roll, advantages, type(lepo_args)(**vars(lepo_args) | changed))


def memory_of(settings, args, roll, advantages, path):
    """In a process of its own: -> the peak memory of one update; its gradients go to `path`."""
    lm, _, lepo_args = setup(args)
    roll, advantages = moved(roll, args.device), advantages.to(args.device)
    with peak_memory(args.device) as peak:
        gradient_of(settings, lm, roll, advantages, lepo_args)
    save_file({name: p.grad.contiguous() for name, p in lm.model.named_parameters()}, path)
    return peak


def moved(roll, device):
    """The rollout with its tensors on another device."""
    return replace(roll, **{k: v.to(device) for k, v in vars(roll).items() if isinstance(v, torch.Tensor)})


def relative_distance(a, b):
    """||a - b|| / ||b|| of two files of tensors, in double precision."""
    with safe_open(a, "pt") as ours, safe_open(b, "pt") as theirs:
        apart = norm = 0.0
        for key in theirs.keys():
            x, y = ours.get_tensor(key).double(), theirs.get_tensor(key).double()
            apart, norm = apart + (x - y).square().sum(), norm + y.square().sum()
    return float((apart / norm).sqrt())


def bench_update(args, lm, prompts, lepo_args):
    if args.shape == "qwen":
        prompts = prompts[:2]  # 16 rows: of 256 rows x 512 tokens the naive update would hold 80 GB of logits, thrice
    roll = lepo.rollout(lm, prompts, 8, lepo_args, torch.Generator(args.device).manual_seed(0))
    lm.decoder = lm.half = None  # the rollout's memory is not the update's
    if args.device == "cuda":
        torch.cuda.empty_cache()
    advantages = torch.randn(len(roll.length), generator=torch.Generator().manual_seed(0))  # none is 0
    naive, size = "all logits at once", lepo_args.micro_batch
    contestants = {
        naive: None,
        f"ours, micro-batches of {size}": {},
        f"ours, of {size}, checkpointing": {"gradient_checkpointing": True},
        "ours, of 1, checkpointing": {"gradient_checkpointing": True, "micro_batch": 1},
    }
    if args.shape == "tiny":  # nothing to save
        del contestants["ours, of 1, checkpointing"]
    peaks, on_cpu = {}, moved(roll, "cpu")
    with tempfile.TemporaryDirectory() as folder:
        for name, settings in tqdm(contestants.items(), desc="memory", leave=False, disable=None):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                peaks[name] = pool.apply(memory_of, (settings, args, on_cpu, advantages, f"{folder}/{name}"))
            peaks[name]["gradient_apart"] = relative_distance(f"{folder}/{name}", f"{folder}/{naive}")
    advantages = advantages.to(args.device)
    turns = take_turns({
        name: lambda s=settings: gradient_of(s, lm, roll, advantages, lepo_args)
        for name, settings in contestants.items()
    }, args.repeats, args.device)  # fmt: skip
    times = {name: statistics.median(s for s, _ in values) for name, values in turns.items()}

    def gigabytes(name, key):
        return f"{peaks[name][key] / 1e9:.2f} ({peaks[name][key] / peaks[naive][key]:.2f})"

    title = f"Update, {len(roll.length)} rows of {roll.length.float().mean():.0f} steps; (share of the first)"
    table(title, [{
        "": name, "s": f"{times[name]:.3f}", "peak, GB": gigabytes(name, "total"),
        "above the weights, GB": gigabytes(name, "above"), "gradient apart": f"{peaks[name]['gradient_apart']:.1e}",
    } for name in contestants])  # fmt: skip
    result = {"seconds": times, "peaks": peaks}
    if args.device == "cuda":
        _, rate = ceilings()
        tokens = int(roll.length.sum()) + sum(map(len, prompts))  # that a model has to see: a prompt once
        result["mfu"] = 6 * sum(p.numel() for p in lm.model.parameters()) * tokens / list(times.values())[1] / rate
        print(f"\nA matrix product reaches {rate / 1e12:,.0f} TFLOP/s; at 6 FLOP a weight and token the update reaches "
              f"{result['mfu']:.0%} of that.")  # fmt: skip
    return result


def bench_step(args, lm, prompts, lepo_args):
    """Everything between one batch of problems and the next; trl with the batch per pass that suits it best."""
    turns = {"LEPO": [], "GRPO": []}
    contestants = {}
    for name, latent_steps in (("LEPO", lepo_args.latent_steps), ("GRPO", 0)):
        own = common.load_model("tiny", args.device)
        own_args = type(lepo_args)(**vars(lepo_args) | {"latent_steps": latent_steps, "lr": 1e-6})
        optimizer = torch.optim.AdamW(own.model.parameters(), lr=1e-6)
        stream, state = common.load_problems("tiny", "train", 0), {"step": 0, "position": 0}
        generator = torch.Generator(args.device).manual_seed(0)
        contestants[name] = lambda a=(own, None, optimizer, stream, state, own_args, generator): lepo.train_step(*a)
    first = take_turns(contestants, args.repeats, args.device)
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # a process of its own, as its users have
        trl = {f"TRL, {rows} rows a pass": pool.apply(trl_steps, (args, rows)) for rows in (32, 64, 256)}
    second = take_turns(contestants, args.repeats, args.device)  # before and after trl, should the machine have changed
    turns = {name: [s for s, _ in first[name] + second[name]] for name in contestants}
    turns |= {name: values for name, values in trl.items() if values}
    times = {name: statistics.median(values) for name, values in turns.items()}
    best = min((times[name] for name in trl if name in times), default=math.nan)
    table(f"A whole step, {args.prompts} prompts x 8 rollouts of up to {args.tokens} tokens", [
        {"": name, "s": f"{s:.3f}", "LEPO is faster by": f"{s / times['LEPO']:.2f}"} for name, s in times.items()
    ])  # fmt: skip
    if math.isnan(best):
        print("\ntrl is not installed: nothing to compare with (pip install trl)")
    return {"seconds": times, "trl_over_lepo": best / times["LEPO"], "lepo_over_grpo": times["LEPO"] / times["GRPO"]}


def trl_steps(args, rows):
    """Seconds between ends of GRPOTrainer's steps, on the same prompts, model, lengths and reward; [] without trl."""
    try:
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, TrainerCallback
        from trl import GRPOConfig, GRPOTrainer
    except ImportError:
        return []
    stream, ends = common.load_problems("tiny", "train", 0), []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(time.perf_counter())

    count, needed = args.prompts * 8, args.prompts * (args.repeats + 1)
    data = Dataset.from_list([{"prompt": stream[i].question, "index": i} for i in range(needed)])
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        config = GRPOConfig(
            output_dir=folder, use_cpu=args.device == "cpu", bf16=args.device == "cuda", report_to=[],
            per_device_train_batch_size=min(rows, count), gradient_accumulation_steps=max(1, count // rows),
            num_generations=8, max_completion_length=args.tokens, top_k=30, top_p=0.95, learning_rate=1e-6,
            max_steps=args.repeats + 1, gradient_checkpointing=False, save_strategy="no", logging_strategy="no",
            disable_tqdm=True, shuffle_dataset=False,
        )  # fmt: skip
        GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(common.resolve_model("tiny"), dtype=torch.float32),
            processing_class=AutoTokenizer.from_pretrained(common.resolve_model("tiny")),
            reward_funcs=lambda completions, index, **_: [
                common.verify(text, stream[i])[0] for text, i in zip(completions, index, strict=True)
            ],
            args=config, train_dataset=data, callbacks=[Clock()],
        ).train()  # fmt: skip
    return [b - a for a, b in zip(ends[1:], ends[2:], strict=False)]


def bench_scaling(args, lm, prompts, lepo_args):
    """Rows that never stop, so that rows x tokens is what it says."""
    rows, figures, stop_ids = [], {}, lm.stop_ids
    lm.stop_ids = []
    for count in (args.prompts // 4, args.prompts // 2, args.prompts, args.prompts * 2):
        for tokens in (args.tokens // 2, args.tokens, args.tokens * 2):
            if not count:
                continue
            some, generator = make_prompts(args, lm, count), torch.Generator(args.device).manual_seed(0)
            size = {"max_new_tokens": tokens, "latent_steps": min(lepo_args.latent_steps, tokens - 1)}
            sized = type(lepo_args)(**vars(lepo_args) | size)
            optimizer = torch.optim.SGD(lm.model.parameters(), lr=0.0)
            roll = lepo.rollout(lm, some, 8, sized, generator)
            ones = torch.ones(8 * count, device=args.device)
            turns = take_turns({
                "rollout": lambda s=sized, p=some, g=generator: lepo.rollout(lm, p, 8, s, g),
                "update": lambda s=sized, r=roll, o=ones, w=optimizer: lepo.update(lm, None, w, r, o, s),
            }, min(args.repeats, 4), args.device)  # fmt: skip
            times = {name: statistics.median(s for s, _ in values) for name, values in turns.items()}
            figures[f"{8 * count}x{tokens}"] = times
            row = {"rows": 8 * count, "tokens": tokens} | {f"{name}, s": f"{s:.3f}" for name, s in times.items()}
            rows.append(row | {f"{n}, µs a token": f"{1e6 * s / (8 * count * tokens):.1f}" for n, s in times.items()})
    lm.stop_ids = stop_ids
    table("What rows and tokens cost", rows)
    return figures


def main(argv=None):
    args = parse_args(argv)
    lm, prompts, lepo_args = setup(args)
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    size = sum(p.numel() for p in lm.model.parameters())
    print(f"{args.shape}: {size:,} parameters, {name}, torch {torch.__version__}")
    parts = {"rollout": bench_rollout, "update": bench_update, "step": bench_step, "scaling": bench_scaling}
    result = {"shape": args.shape, "device": name, "prompts": args.prompts, "tokens": args.tokens}
    for part in args.parts:
        result[part] = parts[part](args, lm, prompts, lepo_args)
    print()
    print(json.dumps(result))


if __name__ == "__main__":
    common.run_main(main)
