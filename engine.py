"""Temporary: what latent_sft.py, latent_grpo.py and dlr.py share, until they move to common.py.
P prompts, G rollouts a prompt, N = P * G, B rows, L columns, T steps, K candidates, V vocabulary, D width."""

import argparse
import atexit
import ctypes
import functools
import json
import logging
import multiprocessing
import os
import random
import re
import sys
import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, StaticCache

from tasks import chains, trees

# 1. Flags, errors, and ranks: the processes that torchrun starts, one for each GPU ------------------------------------
BUILT_IN = "chains", "chains_latent", "trees"  # models in tasks/models
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
progress = functools.partial(tqdm, disable=RANK > 0 or None)  # a bar, on a terminal


class UserError(Exception):
    """What the user can put right: printed as one line that says what to do, with exit code 2."""


def at_least(low, kind=int):  # the type of a flag that checks itself: at_least(2)("1") is an error of argparse
    def number(text):
        if not kind(text) >= low:
            raise argparse.ArgumentTypeError(f"must be at least {low}")
        return kind(text)
    return number


def parse_args(parser, argv, built_in):
    """Defaults are those of the run to resume; else `built_in`: a built-in model, chains, or what a run on it made"""
    first, _ = parser.parse_known_args(argv)
    try:
        made_on = json.loads((Path(first.model).parent / "result.json").read_text())["args"]["data"]
    except (OSError, ValueError, KeyError, TypeError):  # not in a run folder
        made_on = None
    applies = first.model in BUILT_IN or first.data == "chains"
    applies = applies or Path(first.model).name == "model" and made_on == "chains"
    parser.set_defaults(**(load_checkpoint(first.resume)["args"] if first.resume else built_in if applies else {}))
    return parser.parse_args(argv)


def add_shared_flags(parser, rl=True):
    add, devices = parser.add_argument, ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    add("--model", default="chains", help="chains, chains_latent, trees, a local folder, a hub id, or a bare Qwen "
        "name; the three names, and model/ in the folder of a run on chains, bring the built-in settings")  # fmt: skip
    add("--data", default="gsm8k", help="chains (brings the built-in settings), trees, gsm8k, or a folder with "
        "train.jsonl and test.jsonl")  # fmt: skip
    add("--kind", default="mixed", help="of chains: mixed, plus, minus or single; of trees: depth,branching,exits")
    add("--steps", type=at_least(0), default=100, help="training steps; 0 only evaluates")
    add("--prompts_per_step", type=at_least(RANKS), default=32, help="P, problems in a batch, one per rank at least")
    add("--max_new_tokens", type=at_least(1), default=512, help="cap on the steps of a rollout, latent ones included")
    add("--lr", type=at_least(0, float), default=1e-6, help="peak learning rate of AdamW: 3 %% warm-up, cosine decay")
    add("--micro_batch", type=at_least(1), default=4, help="rows in a backward pass: memory, not results")
    add("--eval_problems", type=at_least(RANKS), default=256, help="held-out problems; at 256, standard error 3 points")
    add("--eval_every", type=at_least(0), default=20, help="steps between noise-free evaluations; 0: none")
    add("--save_every", type=at_least(1), default=20, help="steps between checkpoints")
    add("--seed", type=int, default=0, help="of noise and of the order of problems")
    add("--device", default=devices[0], choices=devices, help="cuda computes in bfloat16, cpu in float32")
    add("--compile", action="store_true", help="decode fixed shapes with torch.compile: for GPUs, not for Qwen3")
    if rl:
        add("--group_size", type=at_least(2), default=8, help="G, rollouts of a problem: an advantage compares them")
        add("--eval_samples", type=at_least(1), default=8, help="samples of a held-out problem, k of pass@k")
    add("--out", help="run folder; default: a new one under runs/")
    add("--resume", metavar="FOLDER", help="continue a run in its folder; flags beside it replace saved ones")


def run_main(main):
    try:
        main()
    except (UserError, OSError, ImportError, torch.OutOfMemoryError) as error:  # OSError: a full disk
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"interrupted; --resume {getattr(Run, 'folder', 'FOLDER')} goes on from its checkpoint", file=sys.stderr)
        sys.exit(130)


def start_ranks(device):
    if RANKS > 1:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # what "cuda" means from here on
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    sys.stdout = open(os.devnull, "w") if RANK > 0 else sys.stdout  # rank 0 speaks for all


def all_reduce(tensor):  # -> the same tensor, now the sum over ranks
    if RANKS > 1:
        dist.all_reduce(tensor)
    return tensor


def reduce_gradients(model):
    for weight in filter(lambda weight: weight.requires_grad, model.parameters()):
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad  # where no row of a rank teaches
        all_reduce(weight.grad)


def mean(values):  # of a tensor's values, over all ranks -> float, NaN of nothing
    total, count = all_reduce(torch.stack([values.float().sum(), torch.ones_like(values).float().sum()]))
    return (total / count).item()


# 2. Problems, and the verifier of their answers, the only source of reward --------------------------------------------
@dataclass(frozen=True)
class Problem:
    question: str
    answer: str
    form: str = "boxed"  # "boxed": \boxed{answer} is asked for; "think": the built-in task, a number after </think>
    solution: str = ""  # all that the data says of the answer: to learn from in latent_sft.py, not to judge by


@functools.cache
def read_problems(name, split, seed):
    """Rows with `question` or `problem`, and `answer` (of GSM8K: what follows its ####) -> shuffled list of Problem"""
    if name == "gsm8k":
        from datasets import load_dataset  # here, because only GSM8K needs it
        rows = load_dataset("openai/gsm8k", "main", split=split)
    else:
        rows = Path(f"{name}/{split}.jsonl").read_text(encoding="utf-8").strip().split("\n")
    problems = []
    for i, row in enumerate(rows, 1):
        try:
            row = json.loads(row) if isinstance(row, str) else row
            question, answer = row.get("question") or row["problem"], str(row["answer"])
            problems.append(Problem(question.strip(), answer.rsplit("####", 1)[-1].strip(), solution=answer))
        except (ValueError, KeyError, AttributeError):
            raise UserError(f"{name}/{split}.jsonl, line {i}: needs `question` or `problem`, and `answer`") from None
    return random.Random(seed).sample(problems, len(problems))


def take_problems(args, split, start, count):
    """-> list of problems start, start + 1, … of an endless sequence: a checkpoint holds no place in the data"""
    seed = args.seed if split == "train" else 0
    task = {"chains": chains, "trees": trees}.get(args.data)
    if task is None:
        rows = read_problems(args.data, split, seed)
        return [rows[i % len(rows)] for i in range(start, start + min(count, len(rows)))]
    try:
        found = [task.make_problem(i, split, seed, kind=args.kind) for i in range(start, start + count)]
    except (KeyError, ValueError):
        raise UserError(f"--data {args.data} has no --kind {args.kind}: see --help") from None
    return [Problem(task.problem_text(*problem), str(task.true_answer(*problem)), "think") for problem in found]


def encode_prompt(tokenizer, problem, ending=""):
    """-> token ids of the prompt, with the chat template where the tokenizer has one, and then those of `ending`"""
    boxed = "\nPlease reason step by step, and put your final answer within \\boxed{}.\n"
    text = problem.question + boxed * (problem.form == "boxed")
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": text.strip()}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids = tokenizer.encode(text, add_special_tokens=not tokenizer.chat_template)
    if len(tokenizer.decode(ids)) < len(text) / 2:  # letters without a token are dropped
        raise UserError("this model's tokenizer cannot spell these problems (the built-in ones know only their task)")
    return ids + tokenizer.encode(ending, add_special_tokens=False)


NUMBER = re.compile(r"-?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+|/0*[1-9]\d*)?|-?\$?\.\d+", re.ASCII)  # not "1,2"
BRACES = functools.reduce(lambda inside, _: rf"(?:[^{{}}]|\{{{inside}*\}})", range(6), "[^{}]")  # balanced, six deep
BOX = re.compile(rf"\\boxed\{{({BRACES}*)\}}")
POOL = []  # the process that runs math_verify, once there is one
atexit.register(POOL.clear)


def to_number(text):
    """'$1,234.0' -> Fraction(1234); None if it is not one plain number. '1e999999999' would fill the memory: no e."""
    text = re.sub(r"[\s$%]|\\[$%!]|^\+(?!-)", "", text).rstrip(".")
    return Fraction(text.replace(",", "")) if len(text) <= 60 and NUMBER.fullmatch(text) else None


def math_verify(prediction, truth):
    from math_verify import parse, verify
    logging.disable()  # it comments on what it cannot read
    truth, prediction = (parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (truth, prediction))
    return bool(verify(truth, prediction, timeout_seconds=None))


@functools.lru_cache(maxsize=4096)  # rollouts of a group often say the same
def answers_equal(prediction, truth):
    """Numbers are compared as numbers, other formulas by math-verify in a process that can be ended: 9^{9^{9^9}}"""
    a, b = to_number(prediction), to_number(truth)
    if prediction == truth or a is not None and b is not None:
        return prediction == truth or a == b
    if not POOL:
        POOL.append(multiprocessing.get_context("spawn").Pool(1))  # a fork of a process with threads may hang
        POOL[0].apply_async(math_verify, ("1", "1")).wait(120)  # its imports are not thinking time
    try:
        return len(prediction) <= 200 and POOL[0].apply_async(math_verify, (prediction, truth)).get(timeout=10)
    except Exception as error:  # timed out, unreadable, or math-verify is missing: not known to be right
        if isinstance(error, multiprocessing.TimeoutError):
            POOL.pop().terminate()
        return False


def verify(text, problem):
    """-> (strict, flexible), 0.0 or 1.0: strict wants the form that was asked for, flexible takes the last number"""
    found, numbers, truth = BOX.findall(text), NUMBER.findall(text), to_number(problem.answer)
    if problem.form == "think":
        found = re.findall(r"(?:</think>|^)\s*(\d+)\s*$", text)
    if found and found[-1].strip() and answers_equal(found[-1].strip(), problem.answer):
        return 1.0, 1.0
    return 0.0, float(bool(numbers) and truth is not None and to_number(numbers[-1]) == truth)


# 3. Model and decoding, from embeddings: no serving engine takes a fresh one at every step ----------------------------
@dataclass
class LanguageModel:
    model: torch.nn.Module  # float32: a bfloat16 weight would round an update of 1e-6 away
    tokenizer: object
    table: torch.Tensor  # (V, D) input embeddings
    head: torch.Tensor  # (V, D) output embeddings; often the same tensor
    stop_ids: list  # any of these ends a text
    compiled: object = None  # --compile: the model's body, and the cache that it is compiled for
    static: StaticCache = None

    def autocast(self):
        """bfloat16 on a GPU; one context around a rollout, so that weights are cast once. Not under inference_mode."""
        return torch.autocast(self.table.device.type, torch.bfloat16, enabled=self.table.is_cuda)

    def hidden_states(self, embeds, mask, cache=None):
        """The model without its head: embeddings (B, L, D) of the last L columns of mask (B, columns) -> (B, L, D)"""
        position = (mask.cumsum(1)[:, -embeds.shape[1] :] - 1).clamp(min=0)  # (B, L)
        embeds = embeds.bfloat16() if torch.is_autocast_enabled(embeds.device.type) else embeds
        body = self.model.base_model
        if cache is not None and cache is self.static:  # columns to come are masked by their position
            body, mask = self.compiled, F.pad(mask, (0, cache.get_max_length() - mask.shape[1]), value=1)
        inputs = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": position, "past_key_values": cache}
        return body(**inputs, use_cache=cache is not None).last_hidden_state


def load_model(args):
    """-> LanguageModel without dropout, in the update too: a replay must equal its rollout"""
    transformers.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    path = f"Qwen/{args.model}" if args.model.startswith("Qwen") and "/" not in args.model else args.model
    path = str(Path(__file__).parent / "tasks/models" / path) if path in BUILT_IN else path
    if sys.platform == "linux":  # freed memory is kept: to fetch every page anew costs a tenth of a step on a CPU
        for option, value in ((-1, 2**31 - 1), (-3, 2**25)):  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc
            ctypes.CDLL(None).mallopt(option, value)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, use_safetensors=True)
    except Exception as error:  # no such name, no network, a damaged file: many types
        raise UserError(f"cannot load the model {path} ({type(error).__name__}): check name and network") from None
    model = model.to(args.device).eval()
    # Three places name end tokens and disagree, so all count: with one of Qwen2.5's two, half of the texts never end.
    named = [model.generation_config.eos_token_id, model.config.eos_token_id, tokenizer.eos_token_id]
    stop_ids = sorted({i for ids in named for i in (ids if isinstance(ids, list) else [ids])} - {None})
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    lm = LanguageModel(model, tokenizer, table, head, stop_ids)
    with torch.no_grad():
        ids = torch.arange(6, device=args.device)[None]  # (1, L)
        ours = F.linear(lm.hidden_states(F.embedding(ids, table), torch.ones_like(ids)), head)  # (1, L, V)
        if not stop_ids or not torch.allclose(ours, model(ids).logits, rtol=1e-3, atol=1e-3):
            raise UserError(f"{path} names no end token, or scales or caps logits: give a plain model, such as Qwen2.5")
    if args.compile:
        how = {"mode": "reduce-overhead"} if args.device == "cuda" else {"backend": "eager"}  # that needs no compiler
        lm.compiled = torch.compile(model.base_model, **how)
    return lm


def left_pad(prompts, device):
    """Lists of token ids -> ids (P, L) and mask (P, L), 0 on padding. Left, so that all prompts end in one column."""
    ids = [torch.tensor(prompt, device=device) for prompt in prompts]
    ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-1, padding_side="left")  # (P, L)
    return ids.clamp(min=0), (ids >= 0).long()


def mix_embeddings(table, ids, weights):
    """sum_k w_k E[id_k]: table (V, D), ids and weights (…, K) -> (…, D). Never holds a (…, K, D) tensor."""
    flat = F.embedding_bag(ids.flatten(0, -2), table, per_sample_weights=weights.flatten(0, -2), mode="sum")
    return flat.view(*ids.shape[:-1], table.shape[1])


def candidate_log_probs(hidden, head, ids, temperature):
    """log softmax(hidden head^T / temperature) at ids: hidden (M, D), head (V, D), ids (M, K) -> (M, K) float32. Logits
    are by far the largest thing in an update, 62 GB for 256 x 400 steps of a 152k vocabulary: they exist for a few
    hundred steps at a time (2^25 numbers), and the backward pass makes them again."""
    def log_probs(hidden, ids):
        logits = F.linear(hidden, head).float() / temperature  # (chunk, V)
        return logits.gather(-1, ids) - logits.logsumexp(-1, keepdim=True)  # (chunk, K)
    chunk = max(1, 2**25 // len(head))
    parts = zip(hidden.split(chunk), ids.split(chunk), strict=True)
    return torch.cat([checkpoint(log_probs, *part, use_reentrant=False) for part in parts])


class Decoder:
    """The KV cache of a batch of rollouts; a step is the model's own forward. With --compile shapes are fixed, since
    each is compiled anew: rows that have ended stay, unused, and the cache is as large as the largest batch so far."""

    def __init__(self, lm, prompts, group_size, steps):
        """Prefill P prompts, each once for its whole group -> self.logits (N, V). At most `steps` embeddings follow."""
        ids, mask = left_pad(prompts, lm.table.device)  # (P, L) each
        self.lm, self.cache = lm, DynamicCache(config=lm.model.config)
        self.head = lm.head.bfloat16() if torch.is_autocast_enabled(ids.device.type) else lm.head  # cast once
        hidden = lm.hidden_states(F.embedding(ids, lm.table), mask, self.cache)[:, -1]  # (P, D)
        self.logits = F.linear(hidden, self.head).repeat_interleave(group_size, 0)
        self.mask = mask.repeat_interleave(group_size, 0)  # (N, columns so far)
        self.cache.batch_repeat_interleave(group_size)
        if lm.compiled is not None:
            self.fix_shapes(steps)

    def feed(self, embeds):
        """One embedding (B, D) for each row -> logits (B, V)"""
        self.mask = F.pad(self.mask, (0, 1), value=1)
        if self.lm.compiled is not None:
            every = embeds.new_zeros(len(self.mask), embeds.shape[1]).index_copy(0, self.rows, embeds)  # (R, D)
            hidden = self.lm.hidden_states(every[:, None], self.mask, self.cache)[self.rows, 0]  # (B, D)
        else:
            hidden = self.lm.hidden_states(embeds[:, None], self.mask, self.cache)[:, 0]  # (B, D)
        return F.linear(hidden, self.head)

    def keep(self, rows):
        if self.lm.compiled is not None:
            self.rows = self.rows[rows]
        else:
            self.cache.batch_select_indices(rows)
            self.mask = self.mask[rows]

    def fix_shapes(self, steps):
        """Move the prompts into the static cache of R rows; those that are not needed repeat the last one."""
        static, (count, columns) = self.lm.static, self.mask.shape
        rows, length = (0, 0) if static is None else (static.batch_size, static.get_max_length())
        if rows < count or length < columns + steps:
            rows, length = max(rows, count), max(length, -(-(columns + steps) // 128) * 128)
            static = StaticCache(config=self.lm.model.config, max_cache_len=length)
        static.reset()
        self.rows = torch.arange(count, device=self.mask.device)  # (B,) the rollouts that go on
        source = torch.arange(rows, device=self.mask.device).clamp(max=count - 1)  # (R,)
        for i, layer in enumerate(self.cache.layers):
            static.update(layer.keys[source], layer.values[source], i)
        self.cache, self.lm.static, self.mask = static, static, self.mask[source]


# 4. The run folder: log.jsonl with a row per step, checkpoint.pt, result.json, model/. Rank 0 writes ------------------
def load_checkpoint(folder):
    try:
        return torch.load(f"{folder}/checkpoint.pt", map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise UserError(f"nothing to resume in {folder} ({type(error).__name__})") from None


class Run:
    def __init__(self, args, method):
        name = f"runs/{method}-{Path(args.model).name}-seed{args.seed}-%m%d-%H%M%S"
        args.out = args.resume or args.out or time.strftime(name)
        self.args, self.method, self.began, Run.folder = args, method, time.time(), Path(args.out)
        if RANK == 0 and (self.folder / "checkpoint.pt").exists() and not args.resume:  # others may be later
            raise UserError(f"{args.out} holds a run: continue it with --resume {args.out}, or give another --out")
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "log.jsonl").touch()

    def restore(self, model, optimizer):
        """-> step and scores before training, as saved; the log is cut to the rows of that time."""
        saved = load_checkpoint(self.folder)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        if RANK == 0:
            rows = (self.folder / "log.jsonl").read_text().splitlines(keepends=True)
            (self.folder / "log.jsonl").write_text("".join(rows[: saved["step"]]))
        return saved["step"], saved["before"]

    def save(self, step, before, model, optimizer):
        """Written aside and renamed: a crash leaves the old checkpoint or the new one."""
        if RANK == 0:
            args = {name: value for name, value in vars(self.args).items() if name != "device"}  # may be another one
            weights = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({"step": step, "before": before, "args": args} | weights, self.folder / "checkpoint.tmp")
            os.replace(self.folder / "checkpoint.tmp", self.folder / "checkpoint.pt")

    def log(self, row):
        if RANK == 0:
            with open(self.folder / "log.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")

    def finish(self, lm, scores):
        """The model as a Hugging Face folder; as the last line of the run one JSON object."""
        result = {"method": self.method} | {name: vars(self.args)[name] for name in ("model", "seed", "steps")}
        result |= {"seconds": round(time.time() - self.began, 1)} | scores
        if RANK == 0:
            lm.model.save_pretrained(self.folder / "model")
            lm.tokenizer.save_pretrained(self.folder / "model")
            (self.folder / "result.json").write_text(json.dumps(result | {"args": vars(self.args)}) + "\n")
            print(json.dumps(result))
        if RANKS > 1:  # a rank that ends without this may abort
            dist.barrier()
            dist.destroy_process_group()
