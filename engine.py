"""Temporary: the shared engine of latent_grpo.py and dlr.py, until these are rewritten on common.py as lepo.py is.

What the two methods share and what is not the method: problems, verifier, models, decoding, logs, checkpoints.
Read a method script first; come here for the details that it takes for granted. In order:
1. errors, interrupts and several processes, 2. problems, 3. the verifier, 4. models, 5. decoding from embeddings, its
exact replay and the log-probabilities of what was executed, 6. pass@k, run folders and checkpoints.

Shapes: P prompts, G rollouts a prompt, N = P * G, B rows, T steps, K candidates of a soft token, V vocabulary, D width.
"""

import argparse
import atexit
import contextlib
import copy
import ctypes
import functools
import importlib.util
import json
import math
import multiprocessing
import os
import random
import re
import signal
import socket
import sys
import time
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import huggingface_hub
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache

import tiny

HERE = Path(__file__).parent

# ----------------------------------------------------------------------------------------------------------------------
# 1. Errors and interrupts. A mistake of the user is a UserError: one line that says what to do, and exit code 2.


class UserError(Exception):
    """Something the user can put right. `run_main` prints it as one line and exits with code 2."""


class Parser(argparse.ArgumentParser):
    """argparse, but a bad flag is a UserError like any other: one line instead of a page of usage."""

    def error(self, message):
        raise UserError(f"{message} (see --help)")


def run_main(main):
    """Run a script's main(); turn user errors into one line and exit code 2, an interrupt into exit code 130."""
    try:
        code = main()
        if dist.is_initialized():  # after an error the others are not there to say goodbye to: torchrun ends them
            dist.destroy_process_group()
    except (UserError, OSError) as error:  # OSError: a full disk, a folder without permission
        if dist.is_initialized() and process()[0]:
            print(f"error in process {process()[0]}: {error}", file=sys.stderr)
        elif os.environ.get("RANK", "0") == "0":  # before they have met, all find the same mistakes
            print(f"error: {error}", file=sys.stderr)
        code = 2
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print("error: out of memory; lower --micro_batch, --prompts_per_step or --max_new_tokens,"
              " or add --gradient_checkpointing", file=sys.stderr)  # fmt: skip
        code = 2
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def is_out_of_memory(error):
    """A GPU's OutOfMemoryError, Python's MemoryError, or a plain RuntimeError of torch's CPU allocator or cuBLAS."""
    said = str(error)
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or "can't allocate memory" in said or "CUBLAS_STATUS_ALLOC_FAILED" in said


class StopSignal:
    """`with StopSignal() as stop:` the first Ctrl-C or SIGTERM only sets stop.requested, so that the step in progress
    can end and be saved; a second one interrupts at once."""

    def __enter__(self):
        self.requested = False
        self.previous = {s: signal.signal(s, self.handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def handle(self, signum, frame):
        if not self.requested:
            self.requested, self.since = True, time.monotonic()
            if process()[0] == 0:
                print("\nstopping: this step will be finished and saved (once more to stop at once)", file=sys.stderr)
        elif time.monotonic() > self.since + 1:  # sooner, it is torchrun passing on what the terminal has sent already
            raise KeyboardInterrupt

    def __exit__(self, *exc):
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)


# Several processes, one for each GPU, started by torchrun: each takes its share of the prompts and sees the noise that
# one process alone would have given it; what they find is summed. All keep equal weights and equal generators, so
# process 0 can write the log and the checkpoint for all. Without torchrun these functions change nothing.


def start_processes(device):
    """Join the other processes when torchrun started this one. Only process 0 prints."""
    if "WORLD_SIZE" in os.environ:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # what "cuda" means from here on
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        if dist.get_rank():
            sys.stdout = open(os.devnull, "w")


def process():
    """-> (number of this process, number of processes)"""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share(count):
    """The part of range(count) that falls to this process, as a slice. Parts differ by at most one."""
    number, total = process()
    return slice(count * number // total, count * (number + 1) // total)


def all_reduce(tensor, op="SUM"):
    """Sum (or MAX …) of a tensor over all processes, in place -> the same tensor, on whatever device it is."""
    if dist.is_initialized():
        wire = tensor.to(torch.cuda.current_device()) if dist.get_backend() == "nccl" else tensor
        dist.all_reduce(wire, getattr(dist.ReduceOp, op))
        tensor.copy_(wire)
    return tensor


def reduce_gradients(model):
    """Sum every trained weight's gradient over all processes, one that has none counting as 0."""
    if dist.is_initialized():
        for weight in filter(lambda weight: weight.requires_grad, model.parameters()):
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            all_reduce(weight.grad)


def progress(*args, **kwargs):
    """A tqdm bar, shown by process 0 on a terminal."""
    return tqdm(*args, disable=True if process()[0] else None, **kwargs)


def mean(values):
    """Mean of a tensor's values over all processes -> float; NaN when there are none."""
    total, count = all_reduce(torch.tensor([values.sum(), values.numel()], dtype=torch.float64)).tolist()
    return total / count if count else math.nan


def synchronise(generator, steps):
    """Make the generators of all processes equal again after a rollout. One that took fewer steps than others has
    drawn less noise: all go on from the one that took the most, as a single process would."""
    number, total = process()
    if total > 1:
        taken = torch.zeros(total, dtype=torch.long)
        taken[number] = steps
        state = generator.get_state()
        if number != int(all_reduce(taken).argmax()):
            state.zero_()
        generator.set_state(all_reduce(state))


# ----------------------------------------------------------------------------------------------------------------------
# 2. Problems. A problem is a question, its true answer and the form in which the answer is asked for. A stream
#    of problems is addressed by a running index, so the data position in a checkpoint is one integer.

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True)
class Problem:
    question: str
    answer: str
    form: str = "boxed"  # "boxed": \boxed{answer} is asked for; "think": the built-in task, a number after </think>
    solution: str = field(default="", compare=False)  # somebody's, if the data has one: to learn from, not to judge by


class Problems:
    """stream[i] for i = 0, 1, 2, …: endless. A list is reshuffled in every epoch; the built-in task never ends.

    `size` is the number of different problems, or None when they are unlimited.
    """

    def __init__(self, source, seed, size=None):
        self.source, self.seed, self.size, self.epoch = source, seed, size, None

    def __getitem__(self, i):
        if self.size is None:
            return self.source(i)
        epoch, offset = divmod(i, self.size)
        if epoch != self.epoch:
            self.order = random.Random(f"{self.seed} {epoch}").sample(range(self.size), self.size)
            self.epoch = epoch
        return self.source[self.order[offset]]


def parse_row(row, where):
    """A GSM8K row (`question`, `answer` ending in `#### n`) or a `problem`/`answer` row -> Problem. Its solution is
    `solution` where the row has that, else all of `answer`."""
    question = row.get("question", row.get("problem")) if isinstance(row, dict) else None
    answer = row.get("answer") if isinstance(row, dict) else None
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        answer = str(answer)
    if not isinstance(question, str) or not isinstance(answer, str):
        raise UserError(f"{where}: expected an object with `question` or `problem`, and `answer`, both text")
    final = answer.rsplit("####", 1)[-1].strip()
    if not question.strip() or not final or "\n" in final:
        raise UserError(f"{where}: needs a question and an answer that ends in `#### n` or is one line")
    solution = row.get("solution")
    return Problem(question.strip(), final, solution=solution if isinstance(solution, str) else answer)


def read_jsonl(path):
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # splitlines() would also split at U+2028 in a text
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    problems = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{number}: not JSON ({error.msg})") from None
            problems.append(parse_row(row, f"{path}:{number}"))
    if not problems:
        raise UserError(f"{path}: holds no problems")
    return problems


def offline_without_network():
    """Without a network the hub's libraries retry for a minute, even for what lies in their cache. Spare us that."""
    host = urllib.parse.urlsplit(huggingface_hub.constants.ENDPOINT).hostname
    try:
        if not urllib.request.getproxies():
            socket.getaddrinfo(host, 443)
    except OSError:
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"  # datasets, which is imported later, reads this one


def load_hub_problems(path, config, split):
    offline_without_network()
    try:
        from datasets import load_dataset  # here and not above: the built-in task and local files do without it

        rows = load_dataset(path, config, split=split)
    except Exception as error:  # the hub's errors are many (no network, no such set, no cache); all mean the same here
        raise UserError(
            f"cannot load the data set {path} ({type(error).__name__}): check the network and that the package "
            "datasets is installed, or give a local .jsonl file"
        ) from None
    return [parse_row(row, f"{path}[{i}]") for i, row in enumerate(rows)]


def load_problems(name, split, seed, ops=(2, 5), kind="mixed"):
    """`tiny`, `gsm8k`, `math500`, a .jsonl file, or a folder with train.jsonl and test.jsonl -> Problems.

    Of a single .jsonl file every tenth row is held out as its test split. `ops` and `kind` shape the built-in task.
    """
    if name == "tiny":
        def make(i):  # fmt: skip
            chain = tiny.make_problem(i, split, seed, ops, kind)
            solution = tiny.demonstration(random.Random(f"student {split} {seed} {i}"), *chain)
            return Problem(tiny.problem_text(*chain), str(tiny.true_answer(*chain)), "think", solution)

        return Problems(make, seed)
    if name == "gsm8k":
        rows = load_hub_problems("openai/gsm8k", "main", split)
    elif name == "math500":
        if split != "test":
            raise UserError("math500 is a test set: use it as --eval_data, and train on another --data")
        rows = load_hub_problems("HuggingFaceH4/MATH-500", None, "test")
    elif Path(name).is_dir():
        rows = read_jsonl(Path(name) / f"{split}.jsonl")
    elif Path(name).suffix == ".jsonl":
        rows = [row for i, row in enumerate(read_jsonl(name)) if (i % 10 == 9) == (split == "test")]
        if not rows:
            raise UserError(f"{name}: too few rows to hold out every tenth; give a file of at least 10")
    else:
        raise UserError(f"no data set '{name}': use tiny, gsm8k, math500, a .jsonl file or a folder of them")
    if not MathJudge.available and any(to_number(row.answer) is None for row in rows):
        raise UserError(f"{name} has answers that are formulas; judging them needs: pip install math-verify")
    return Problems(rows, seed, len(rows))


def encode_prompt(tokenizer, problem, ending=""):
    """Token ids of the prompt: the chat template where the tokenizer has one, else plain text; and then `ending`, if
    it does not end so already. -> list of int"""
    if problem.form == "think":
        text = problem.question  # already ends in <think>
    elif tokenizer.chat_template:
        chat = [{"role": "user", "content": f"{problem.question}\n{BOXED}"}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    else:
        text = f"{problem.question}\n{BOXED}\n"
    text += "" if text.rstrip().endswith(ending.rstrip()) else ending
    ids = tokenizer.encode(text, add_special_tokens=not tokenizer.chat_template)
    if len(tokenizer.decode(ids)) < len(text) / 2:  # letters without a token are dropped
        raise UserError("this model's tokenizer cannot spell these problems (the tiny model knows only --data tiny)")
    return ids


def take(stream, position, count, tokenizer, max_tokens, *how, encode=encode_prompt):
    """The next `count` problems whose prompts fit -> (problems, their prompts as token ids, new position). A prompt is
    encode(tokenizer, problem, *how).

    Fewer than `count` when a finite set has been gone through once: nothing is returned twice.
    """
    problems, prompts, end = [], [], position + (stream.size or 1000 * count)
    while len(problems) < count and position < end:
        ids = encode(tokenizer, stream[position], *how)
        if len(ids) <= max_tokens:
            problems.append(stream[position])
            prompts.append(ids)
        position += 1
    if not problems:
        raise UserError(f"no problem fits into --max_prompt_tokens {max_tokens}")
    return problems, prompts, position


# ----------------------------------------------------------------------------------------------------------------------
# 3. The verifier: the only source of reward. Two scores side by side: strict wants the answer in the form that was
#    asked for, flexible takes the last number. If the strict score alone rises, a run has learnt the form.

DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)"  # commas only between thousands: "1,2" is two numbers
NUMBER = re.compile(rf"-?\$?{DIGITS}(?:\.\d+)?(?:/\d+)?|-?\$?\.\d+", re.ASCII)


def to_number(text):
    """'$1,234.0' -> Fraction(1234); None when the text is not one plain number. Exponents are not accepted: the
    exact value of '1e999999999' would fill the memory."""
    text = re.sub(r"[\s$%]|\\[$%!]", "", text).rstrip(".")
    if len(text) > 60 or not re.fullmatch(rf"[+-]?({DIGITS}\.?\d*|\.\d+)(/0*[1-9]\d*)?", text, re.ASCII):
        return None
    numerator, _, denominator = text.replace(",", "").partition("/")
    return Fraction(numerator) / Fraction(denominator or 1)


def last_boxed(text):
    """Content of the last complete \\boxed{…}, braces balanced; None without one. One pass, whatever the text."""
    stack, start, content = [], -1, None
    for brace in re.finditer(r"\\boxed\{|[{}]", text):
        if brace.group() != "}":
            stack.append(brace)
        elif stack and len((opening := stack.pop()).group()) > 1 and opening.end() > start:
            start, content = opening.end(), text[opening.end() : brace.start()].strip()
    return content


def _math_verify(prediction, truth):
    from math_verify import parse, verify

    wrap = "\\boxed{{{}}}".format
    return bool(verify(parse(wrap(truth), parsing_timeout=None), parse(wrap(prediction), parsing_timeout=None),
                       timeout_seconds=None))  # fmt: skip


class MathJudge:
    """math-verify in a process of its own: an answer such as 9^{9^{9^9}} keeps any in-process timeout waiting inside
    one big-integer power, but a process can be ended. Its worker starts with the first formula it has to judge."""

    pool, seconds = None, 5
    available = importlib.util.find_spec("math_verify") is not None  # without it, formulas count as wrong

    def equal(self, prediction, truth):
        if not self.available:
            return False
        if self.pool is None:
            # "spawn": a forked copy of a process that holds GPU contexts and thread pools may hang.
            self.pool = multiprocessing.get_context("spawn").Pool(
                1, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)
            )
            atexit.register(self.pool.terminate)
            self.pool.apply(_math_verify, ("1", "1"))  # its imports are not to count as thinking time
        try:
            return self.pool.apply_async(_math_verify, (prediction, truth)).get(self.seconds)
        except multiprocessing.TimeoutError:
            self.pool.terminate()
            self.pool = None
            return False
        except Exception:  # whatever a formula does to the parser, it was not a right answer
            return False


judge = MathJudge()


def answers_equal(prediction, truth):
    """Numbers are compared as numbers, equal strings are equal, and only other formulas go to math-verify."""
    if prediction.strip() == truth.strip():
        return True
    a, b = to_number(prediction), to_number(truth)
    if a is not None and b is not None:
        return a == b
    return 0 < len(prediction) <= 200 and judge.equal(prediction, truth)


@functools.lru_cache(maxsize=4096)  # rollouts of a group often say the same
def verify(text, problem):
    """(strict, flexible) scores, each 0.0 or 1.0, of a completion's text. Nothing in the text is ever executed."""
    if problem.form == "think":
        found = re.fullmatch(r"\s*(\d+)\s*", text.rsplit("</think>", 1)[-1])
        prediction = found and found.group(1)
    else:
        prediction = last_boxed(text)
    if prediction and answers_equal(prediction, problem.answer):
        return 1.0, 1.0
    numbers, truth = NUMBER.findall(text), to_number(problem.answer)
    return 0.0, float(bool(numbers) and truth is not None and to_number(numbers[-1]) == truth)


# ----------------------------------------------------------------------------------------------------------------------
# 4. Models: an ordinary Hugging Face causal LM, whose master weights stay float32 whatever the compute dtype is: a
#    bfloat16 weight has 8 bits of precision and rounds an update of 1e-6 away.


def is_tiny(name):
    """The shipped model, or one trained from it: a folder whose vocabulary has the built-in task's size."""
    config = Path(resolve_model(name)) / "config.json"
    try:
        return json.loads(config.read_text())["vocab_size"] == len(tiny.VOCABULARY)
    except (OSError, ValueError, KeyError):
        return False


def resolve_model(name):
    """`tiny`, `tiny_latent`, a local folder, a hub id, or a bare name such as Qwen2.5-0.5B (-> Qwen/Qwen2.5-0.5B)."""
    if name in ("tiny", "tiny_latent"):
        return str(HERE / name)
    if Path(name).is_dir():
        return name
    if name.startswith((".", "/", "~")):
        raise UserError(f"no model folder at {name}")
    return f"Qwen/{name}" if name.startswith("Qwen") and "/" not in name else name


@dataclass
class LanguageModel:
    """A model with what one needs to sample from it and to read the samples."""

    model: torch.nn.Module  # the float32 masters
    tokenizer: object
    stop_ids: list  # any of these ends a text
    pad_id: int
    half: torch.nn.Module = field(default=None, init=False)  # see `player`
    decoder: "Decoder" = field(default=None, init=False)  # of the last rollout, kept for the next

    @property
    def table(self):
        return self.model.get_input_embeddings().weight  # (V, D)

    @property
    def head(self):
        return self.model.get_output_embeddings().weight  # (V, D)

    def player(self):
        """The model that rollouts run on: on a CPU the masters themselves; on a GPU a bfloat16 copy of them, half the
        bytes to read at every step, which this call makes equal to the masters as they are now. The update computes
        with the masters under autocast: on a GPU the two agree to bfloat16 precision only."""
        if compute_dtype(self.model.device) == torch.float32:
            return self.model
        with torch.inference_mode(False), torch.no_grad():  # tensors that may be used anywhere
            if self.half is None:
                self.half = copy.deepcopy(self.model).requires_grad_(False)
                for weight in self.half.parameters():  # parameters only: rotary frequencies must stay float32
                    weight.data = weight.data.bfloat16()
            for weight, master in zip(self.half.parameters(), self.model.parameters(), strict=True):
                if master.requires_grad:  # a frozen one is as it was
                    weight.copy_(master)
        return self.half

    def decoder_for(self, rows, columns):
        """A decoder with room for so many, with the weights of now: the last rollout's where it will do."""
        model, old = self.player(), self.decoder
        if old is None or old.model is not model or old.rows < rows or old.columns < columns:
            self.decoder = old = None  # frees its memory first
            self.decoder = Decoder(model, rows, -(-columns // 64) * 64)
        return self.decoder


def load_model(name, device):
    """-> LanguageModel in eval mode, float32, without dropout. UserError when the model cannot be had."""
    if device == "cpu":
        keep_freed_memory()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    path = resolve_model(name)
    if not Path(path).is_dir():
        print(f"looking for {path} on the hub", flush=True)
        offline_without_network()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, use_safetensors=True)
    except Exception as error:  # no such name, no network, a damaged file: many types, one remedy
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:150]
        raise UserError(
            f"cannot load the model {path}: check the name and the network, or give a local folder ({reason})"
        ) from None
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # a replay must equal its rollout
    stop_ids = find_stop_ids(model, tokenizer)
    if not stop_ids:
        raise UserError(f"the model {path} names no end-of-sequence token; add eos_token_id to its config.json")
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop_ids[0]
    lm = LanguageModel(model.to(device).eval(), tokenizer, stop_ids, pad_id)
    if not decodes_alike(lm):
        raise UserError(
            f"the model {path} computes something that is not supported here (sliding windows, scaled or capped logits"
            " or embeddings, recurrent layers): give a plain one, such as a Qwen2.5 or a Llama"
        )
    return lm


@torch.no_grad()
def decodes_alike(lm):
    """Does section 5, which takes a model apart into embeddings, body and head, give what the model itself gives?"""
    kinds = set(getattr(lm.model.config, "layer_types", None) or ["full_attention"])
    try:
        ids = torch.arange(6, device=lm.model.device)
        decoder = Decoder(lm.model, 1, 8)
        ours = [decoder.prefill([ids[:-1].tolist()], lm.table, 0), decoder.step(lm.table[ids[-1:]])]
        theirs = lm.model(ids[None]).logits[0, -2:]
    except Exception:  # of models that are built otherwise: attributes that are missing, caches of another kind
        return False
    return kinds == {"full_attention"} and torch.allclose(torch.cat(ours), theirs, atol=1e-3, rtol=1e-3)


def find_stop_ids(model, tokenizer):
    """Every id that may end a text: generation config, config and tokenizer united, for they disagree. Qwen2.5 base
    names <|endoftext|> in its config and the tokenizer of its chat template <|im_end|>; watching for only one of
    them lets half of the completions run on to the cap."""
    stop = set()
    for ids in (model.generation_config.eos_token_id, model.config.eos_token_id, tokenizer.eos_token_id):
        stop.update(ids if isinstance(ids, (list, tuple)) else [ids])
    return sorted(stop - {None})


def compute_dtype(device):
    """bfloat16 on a GPU, float32 elsewhere."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def keep_freed_memory():
    """Ask the C library to keep what is freed. By default glibc returns larger blocks to the system, and a training
    step on a CPU pays for every page it takes back: a tenth of an update of the tiny model. Linux only."""
    trim, mmap, arenas = -1, -3, -8  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX of malloc.h
    with contextlib.suppress(AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        for option, value in ((trim, 2**31 - 1), (mmap, 2**25), (arenas, 1)):
            libc.mallopt(option, value)


def autocast(device):
    """Compute in compute_dtype, with float32 weights."""
    on_gpu = compute_dtype(device) == torch.bfloat16
    return torch.autocast("cuda", torch.bfloat16) if on_gpu else contextlib.nullcontext()


# ----------------------------------------------------------------------------------------------------------------------
# 5. Decoding. Serving engines cannot take a fresh embedding at every step, so the loop is our own. It knows nothing
#    about any method: each step it hands the logits to `choose` and feeds back the soft token that it gets. A soft
#    token is K candidate ids with weights that sum to 1; an ordinary token is one id with weight 1.


@dataclass
class SoftToken:
    """Candidates that can occur stand first; behind them, scores are -inf and weights 0."""

    ids: torch.Tensor  # (B, K) candidate token ids
    weights: torch.Tensor  # (B, K) float32, rows sum to 1
    scores: torch.Tensor  # (B, K) float32: what the weights were made of, for estimators that ask

    def heaviest(self):
        return self.ids.gather(-1, self.weights.argmax(-1, keepdim=True)).squeeze(-1)  # (B,)


@dataclass
class Rollout:
    """What was executed, so that the update can replay it exactly. Row n belongs to prompt n // group_size."""

    prompts: list  # P lists of token ids
    group_size: int
    ids: torch.Tensor  # (N, T, K); unused slots hold the pad id
    weights: torch.Tensor  # (N, T, K) float32; unused slots, and all steps after a stop, are 0
    scores: torch.Tensor  # (N, T, K) float32; unused slots -inf, and (0, -inf, …) after a stop
    length: torch.Tensor  # (N,) steps executed, the stop token included
    stopped: torch.Tensor  # (N,) bool: ended by a stop token and not by the cap

    def heaviest(self):
        return SoftToken(self.ids, self.weights, self.scores).heaviest()  # (N, T)

    def mask(self):
        steps = torch.arange(self.ids.shape[1], device=self.ids.device)
        return steps < self.length[:, None]  # (N, T) bool


def mix_embeddings(table, ids, weights):
    """e = sum_k w_k E[id_k]: table (V, D), ids and weights (…, K) -> (…, D). Never holds the (…, K, D) tensor."""
    if not ids.numel():
        return table.new_zeros(*ids.shape[:-1], table.shape[1])  # a replay of rows that stopped at once mixes nothing
    flat = F.embedding_bag(ids.flatten(0, -2), table, per_sample_weights=weights.flatten(0, -2), mode="sum")
    return flat.view(*ids.shape[:-1], table.shape[1])


SLOT = -1  # stands in a prompt where an embedding goes that is no word's


def embed(table, ids, slots=None):
    """ids (B, L) -> embeddings (B, L, D); slots (B, T, D) go, in their order, where a row holds SLOT, T times."""
    embeds = F.embedding(ids.clamp(min=0), table)  # (B, L, D)
    return embeds if slots is None else embeds.masked_scatter((ids == SLOT)[..., None], slots.to(embeds.dtype))


def right_pad(prompts, pad_id, device):
    """-> ids (P, L), lengths (P,). Right, so that a token's column is its position; nothing ever sees the padding."""
    ids = [torch.tensor(prompt, device=device) for prompt in prompts]
    length = torch.tensor([len(prompt) for prompt in prompts], device=device)  # (P,)
    return torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad_id), length


class Decoder(Cache):
    """A KV cache that stays where it is, and one decoding step over it: what makes rollouts fast.

    Row n's position i is column i of one tensor per layer, preallocated, kept from rollout to rollout and written in
    place; a cache that grows by concatenation copies all it holds at every step, this one only when rows fork or leave.
    Rows start at column 0 without padding: what a shorter prompt leaves unused is overwritten before it can be seen.
    Each prompt runs once, for its whole group. Only a last position ever meets the head.

    On a GPU the step of a small model is a thousand launches, each longer than its work. There it is captured as a
    CUDA graph and replayed in one launch; batch size and attention width are rounded so that few graphs serve a whole
    run. `forward` is all that is captured: it reads and writes at fixed addresses. Where capturing fails, `forward`
    runs as it is.
    """

    capturable = True  # until it has failed once

    def __init__(self, model, rows, columns):
        super().__init__(layers=[])  # the attention layers call `update`, as on any cache of transformers
        self.model, self.rows, self.columns = model, rows, columns
        self.head = model.get_output_embeddings().weight  # (V, D)
        self.keys, self.values = {}, {}  # per layer: (rows, KV heads, columns, head width)
        self.embeds = self.head.new_zeros(rows, 1, self.head.shape[1])
        self.position = torch.zeros(rows, 1, dtype=torch.long, device=model.device)
        self.row = torch.arange(rows, device=model.device)
        self.column = torch.arange(columns, device=model.device)
        on_gpu = model.device.type == "cuda"
        self.graphs = {} if on_gpu and Decoder.capturable else None  # (rows, width) -> what `capture` returns
        self.pool = torch.cuda.graph_pool_handle() if on_gpu else None  # graphs run one at a time and share memory

    def update(self, key, value, layer, *args, **kwargs):
        """Store keys and values (B, H, T, W) of new positions -> the keys and values to attend to."""
        if layer not in self.keys:
            for stored, new in ((self.keys, key), (self.values, value)):
                stored[layer] = new.new_zeros(self.rows, new.shape[1], self.columns, new.shape[3])
        rows, width = self.extent
        for stored, new in ((self.keys[layer], key), (self.values[layer], value)):
            if self.prefilling:
                stored[:rows, :, :width] = new
            else:
                stored[self.row[:rows], :, self.position[:rows, 0]] = new[:, :, 0]
        if self.prefilling:
            return key, value
        return self.keys[layer][:rows, :, :width], self.values[layer][:rows, :, :width]

    def prefill(self, prompts, table, pad_id, slots=None):
        """Start with one line for each prompt -> logits (P, V) after them. slots (P, T, D) as in `embed`."""
        ids, length = right_pad(prompts, pad_id, table.device)  # (P, L), (P,)
        self.prefilling, self.extent, self.width = True, ids.shape, ids.shape[1]
        causal = self.column[: self.width] <= self.column[: self.width, None]  # (L, L)
        hidden = self.model.base_model(
            inputs_embeds=embed(table, ids, slots).to(self.embeds.dtype), attention_mask=causal[None, None],
            position_ids=self.column[None, : self.width], past_key_values=self, use_cache=True,
        ).last_hidden_state  # (P, L, D)  # fmt: skip
        self.prefilling = False
        self.position[: len(prompts), 0] = length
        return F.linear(hidden[self.row[: len(prompts)], length - 1], self.head)  # (P, V)

    def forward(self, rows, width):
        """The step: hidden states (B, D) after the embeddings in self.embeds, for the first B rows, with attention to
        the first `width` columns. Everything it touches stays where it is, so it can be captured."""
        self.extent, position = (rows, width), self.position[:rows]  # (B, 1)
        unseen = self.column[:width] > position  # (B, width)
        mask = torch.zeros_like(unseen, dtype=self.embeds.dtype).masked_fill_(unseen, -math.inf)  # (B, width)
        hidden = self.model.base_model(
            inputs_embeds=self.embeds[:rows], attention_mask=mask[:, None, None], position_ids=position,
            past_key_values=self, use_cache=True,
        ).last_hidden_state  # (B, 1, D)  # fmt: skip
        position += 1
        return hidden[:, 0]

    def step(self, embeds):
        """Feed one embedding (B, D) to each of the first B rows -> logits (B, V)."""
        rows, self.width = len(embeds), self.width + 1
        self.embeds[:rows, 0] = embeds
        if self.graphs is None:
            return F.linear(self.forward(rows, self.width), self.head)
        shape = rows, min(-(-self.width // 128) * 128, self.columns)
        try:
            if shape not in self.graphs:
                self.graphs[shape] = self.capture(*shape)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            print(f"CUDA graphs do not work here ({error}); decoding goes on without them, more slowly")
            self.graphs, Decoder.capturable = None, False
            return F.linear(self.forward(rows, self.width), self.head)
        replay, hidden = self.graphs[shape]
        replay()
        return F.linear(hidden, self.head)

    def capture(self, rows, width):
        """-> (a function that replays `forward` for these shapes, the tensor in which it leaves its result)"""
        graph, position = torch.cuda.CUDAGraph(), self.position.clone()
        stream, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(stream)
        with torch.cuda.stream(side):  # libraries set themselves up in a first run, which must not be captured
            self.forward(rows, width)
            self.position.copy_(position)
        stream.wait_stream(side)
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                hidden = self.forward(rows, width)
        finally:
            torch.cuda.set_stream(stream)  # a capture that fails leaves its own behind
        return graph.replay, hidden

    def batch_size(self, running):
        """Rows to go on with when `running` are left: for graphs 2, 3, 4, 6, 8, 12, … or all, so that they recur."""
        if self.graphs is None:
            return running
        return min(next(base << i for i in range(40) for base in (2, 3) if base << i >= running), self.rows)

    def select(self, rows):
        """Go on with these rows (B,) of the batch, in this order; a row named twice forks."""
        self.position[: len(rows)] = self.position[rows]
        for stored in (*self.keys.values(), *self.values.values()):
            stored[: len(rows), :, : self.width] = stored[rows, :, : self.width]


@torch.inference_mode()  # no_grad, and less bookkeeping: a twentieth of the time on a CPU
def decode(lm, prompts, group_size, max_new_tokens, choose, slots=None):
    """Sample group_size completions of every prompt. -> Rollout. Where prompts hold SLOT, slots (P, T, D) go.

    choose(logits (B, V), t, rows (B,)) -> SoftToken: the method's decision at step t for the rollouts `rows`. Logits
    come in the dtype of the computation: a method takes its candidates first and makes only those float32. A rollout
    ends when its heaviest candidate is a stop id. Those that have ended leave the batch, on a GPU when enough of them
    have: until then they run on, and what they do is not recorded.

    The decoder's batch consists of lines. All rollouts of a prompt start on one line, and `fork` gives those that are
    fed different tokens lines of their own.
    """
    device, total = lm.model.device, len(prompts) * group_size
    if not prompts:  # one process of several may be left without
        nothing = torch.zeros(0, 0, 1, device=device)
        return Rollout([], group_size, nothing.long(), nothing, nothing, *torch.zeros(2, 0, device=device).long())
    decoder = lm.decoder_for(total, max(map(len, prompts)) + max_new_tokens)
    stop = torch.tensor(lm.stop_ids, device=device)  # (stop ids,)
    rows = torch.arange(total, device=device)  # (B,) the rollouts in the batch
    line = rows // group_size  # (B,) the line that each is on
    length = torch.full((total,), max_new_tokens, device=device)  # (N,)
    stopped = torch.zeros(total, dtype=torch.bool, device=device)  # (N,)
    tokens = []  # per step: (rows, SoftToken)

    logits = decoder.prefill(prompts, lm.table, lm.pad_id, slots)  # (lines, V)
    for t in range(max_new_tokens):
        token = choose(logits[line], t, rows)
        tokens.append((rows, token))
        ended = torch.isin(token.heaviest(), stop) & ~stopped[rows]  # (B,)
        length[rows] = length[rows].masked_fill(ended, t + 1)
        stopped[rows] |= ended
        if t + 1 == max_new_tokens:
            break
        fed = line, token.ids, token.weights  # (B,), (B, K), (B, K)
        if decoder.graphs is None or t % 8 == 7:  # to look makes a GPU wait for the CPU
            running = int((~stopped[rows]).sum())
            if not running:
                break
            if (size := decoder.batch_size(running)) < len(rows):
                kept = stopped[rows].byte().argsort(stable=True)[:size]  # the running ones first
                rows, fed = rows[kept], [x[kept] for x in fed]
        if decoder.graphs is None:
            before, line, ids, weights = fork(*fed)
        else:
            (before, ids, weights), line = fed, decoder.row[: len(rows)]  # a line each: fewer gain a GPU little
        if len(before) != len(logits) or decoder.graphs is None and not before.equal(decoder.row[: len(before)]):
            decoder.select(before)
        logits = decoder.step(mix_embeddings(lm.table, ids, weights))  # (lines, V)
    with torch.inference_mode(False):  # what leaves here may become part of a graph
        return pack_rollout(prompts, group_size, tokens, length, stopped, lm.pad_id)


def fork(line, ids, weights):
    """Rollouts on lines (B,) are fed tokens (B, K). Those on one line that are fed the same single id stay on one line:
    a model that is sure of its next tokens takes a whole group through them at the price of one. -> the old line that
    each new line continues (L,), the new line of each rollout (B,), and what to feed to each new line, (L, K) twice.

    Lines 0, 0, 0, fed tokens 5, 8, 5, become two that both continue line 0 and are fed 5 and 8; the rollouts are now
    on lines 0, 1, 0. Real mixtures are never equal, so each gets a line of its own; a single id is one whose weight is
    1 in float32, where what else it may hold is less than rounding.
    """
    row = torch.arange(len(line), device=line.device)
    fed = torch.where(weights[:, 0] == 1, ids[:, 0], 2**31 + row)  # (B,) equal for equal tokens
    new = (line << 32 | fed).unique(return_inverse=True)[1]  # (B,) in the order of the old lines
    one = torch.zeros(int(new.max()) + 1, dtype=torch.long, device=line.device).scatter_(0, new, row)  # (L,) a rollout
    return line[one], new, ids[one], weights[one]


def pack_rollout(prompts, group_size, tokens, length, stopped, pad_id):
    """Put the steps' tokens, whose rows dwindle, into full tensors; K is cut to the widest support that occurred."""
    tokens = tokens[: int(length.max())]
    shape = (len(length), len(tokens), max(int((token.scores > -math.inf).sum(-1).max()) for _, token in tokens))
    length, stopped = length.clone(), stopped.clone()
    ids = torch.full(shape, pad_id, device=length.device)
    weights = torch.zeros(shape, device=length.device)
    scores = torch.full(shape, -math.inf, device=length.device)
    for t, (rows, token) in enumerate(tokens):
        width = min(shape[2], token.ids.shape[1])
        ids[rows, t, :width] = token.ids[:, :width]
        weights[rows, t, :width] = token.weights[:, :width]
        scores[rows, t, :width] = token.scores[:, :width]
    roll = Rollout(prompts, group_size, ids, weights, scores, length, stopped)
    behind = ~roll.mask()  # (N, T) steps of rows that had ended and ran on
    ids[behind], weights[behind], scores[behind] = pad_id, 0.0, -math.inf
    scores[..., 0].masked_fill_(behind, 0.0)
    return roll


def run_body(lm, checkpointing, **inputs):
    """The model without its head -> hidden states. With checkpointing a layer keeps only its input and is run again in
    the backward pass. (The switch that transformers has for this would take the cache away.)"""
    stacks = (module for module in lm.model.base_model.modules() if isinstance(module, torch.nn.ModuleList))
    layers = next(stacks) if checkpointing else []
    for layer in layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        with autocast(lm.model.device):
            return lm.model.base_model(use_cache="past_key_values" in inputs, **inputs).last_hidden_state
    finally:
        for layer in layers:
            del layer.forward  # the class's own is in force again


class PromptPass(Cache):
    """The prompts of a replay, run once for all rows that continue them. As the cache of that run it keeps every
    layer's keys and values; as the cache of the rows' runs it puts them before the rows' own. The rows see copies that
    are cut out of the graph; the gradients that collect there go on through the prompts in `backward`."""

    def __init__(self, lm, prompts, checkpointing):
        super().__init__(layers=[])
        device, self.kept, self.row_prompts = lm.model.device, {}, None
        ids, self.length = right_pad(prompts, lm.pad_id, device)  # (P, L), (P,)
        self.place = torch.arange(ids.shape[1], device=device)  # (L,)
        causal = self.place <= self.place[:, None]  # (L, L)
        hidden = run_body(
            lm, checkpointing, inputs_embeds=F.embedding(ids, lm.table), attention_mask=causal[None, None],
            position_ids=self.place[None], past_key_values=self,
        )  # (P, L, D)  # fmt: skip
        last = hidden[torch.arange(len(prompts), device=device), self.length - 1]  # (P, D)
        # All that rows take from the prompts, in the graph and cut out of it: last states, every layer's keys, values.
        self.made = [last, *(tensor for pair in self.kept.values() for tensor in pair)]
        self.cut = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in self.made]
        self.last, keys, values = self.cut[0], self.cut[1::2], self.cut[2::2]
        self.shared = {layer: pair for layer, *pair in zip(self.kept, keys, values, strict=True)}

    def update(self, key, value, layer, *args, **kwargs):
        if self.row_prompts is None:
            self.kept[layer] = key, value
            return key, value
        old_key, old_value = (tensor.index_select(0, self.row_prompts) for tensor in self.shared[layer])  # (B, H, L, W)
        return torch.cat([old_key, key], 2), torch.cat([old_value, value], 2)

    def backward(self):
        self.row_prompts = None  # checkpointing runs the prompts' layers again
        pairs = [(tensor, leaf.grad) for tensor, leaf in zip(self.made, self.cut, strict=True) if leaf.grad is not None]
        if pairs:
            torch.autograd.backward(*zip(*pairs, strict=True))


def replays(lm, rollout, rows, micro_batch, checkpointing=False):
    """Replay rows (M,) of a rollout, a micro-batch at a time: yields rows (B,), and the hidden states (B, T, D) that
    decode() had before each of their steps, with gradients. T is the longest of these rows; what stands behind a row's
    end means nothing. Run backward on what you make of one micro-batch before you ask for the next.

    Why it is fast: rows of similar length go together, which leaves little padding; and, as in decode(), a prompt runs
    once for its whole group and not once for every row.

    The executed embeddings are rebuilt in the graph from (ids, weights): the weights are constants of the trajectory,
    the table is a parameter like any other.
    """
    if not len(rows):
        return
    lengths, device = rollout.length.cpu()[rows], lm.model.device  # (M,)
    groups, group = (rows // rollout.group_size).unique(return_inverse=True)  # (P,), (M,) index into groups
    mean = group.bincount(lengths.double()) / group.bincount()  # (P,) length of a prompt's rows
    for part in mean.argsort(stable=True).split(micro_batch):  # (p,) so many prompts at a time, then all of their rows
        prompts = PromptPass(lm, [rollout.prompts[i] for i in groups[part].tolist()], checkpointing)
        mine = torch.isin(group, part).nonzero().squeeze(-1)  # (m,)
        for micro in mine[lengths[mine].argsort(stable=True)].split(micro_batch):  # (B,)
            of = (group[micro][:, None] == part).long().argmax(1).to(device)  # (B,) index into part
            steps = int(lengths[micro].max())
            yield rows[micro], replay_rows(lm, rollout, rows[micro], steps, prompts, of, checkpointing)
        prompts.backward()


def replay_rows(lm, rollout, rows, count, prompts, of, checkpointing):
    """Hidden states (B, T, D) before the first `count` steps T of rows (B,), which continue the prompts `of` (B,)."""
    first = prompts.last.index_select(0, of)[:, None]  # (B, 1, D)
    steps = torch.arange(count - 1, device=first.device)  # (T-1,) the last is never fed: nothing follows it
    if not len(steps):
        return first
    prompts.row_prompts = of
    embeds = mix_embeddings(lm.table, rollout.ids[rows, : len(steps)], rollout.weights[rows, : len(steps)])
    length = prompts.length[of][:, None]  # (B, 1)
    in_prompt = (prompts.place < length)[:, None].expand(-1, len(steps), -1)  # (B, T-1, L)
    so_far = (steps <= steps[:, None]).expand(len(rows), -1, -1)  # (B, T-1, T-1)
    later = run_body(
        lm, checkpointing, inputs_embeds=embeds, attention_mask=torch.cat([in_prompt, so_far], 2)[:, None],
        position_ids=length + steps, past_key_values=prompts,
    )  # (B, T-1, D)  # fmt: skip
    return torch.cat([first, later], 1)


class CandidateLogProbs(torch.autograd.Function):
    """log softmax(hidden head^T / temperature) at K ids per step, without a (steps, V) tensor in forward or backward.

    Logits are the largest thing in an update by far: 8 x 256 steps of a 152k vocabulary take 1.2 GB, and autograd keeps
    several such tensors. Here they exist for a few hundred steps at a time, and the backward pass makes them again
    from the normaliser: d log p_k / d logits = onehot(k) - p, so upstream gradients g (K,) give sum_k g_k onehot(k) -
    p sum(g), which for (5) of lepo.py is the z - pi of its docstring.
    """

    numbers = 2**26  # in one chunk of logits; 268 MB in float32

    @staticmethod
    def logits(hidden, head, temperature):
        return F.linear(hidden, head).float().div_(temperature)  # (C, V)

    @staticmethod
    def forward(ctx, hidden, head, ids, temperature):
        ctx.temperature, ctx.rows = temperature, max(1, CandidateLogProbs.numbers // len(head))
        log_p, normaliser = torch.empty(ids.shape, device=ids.device), torch.empty(len(ids), 1, device=ids.device)
        low = head.to(hidden.dtype)  # (V, D)
        for i in range(0, len(ids), ctx.rows):
            part = slice(i, i + ctx.rows)
            logits = CandidateLogProbs.logits(hidden[part], low, temperature)  # (C, V)
            normaliser[part] = logits.logsumexp(-1, keepdim=True)  # (C, 1)
            log_p[part] = logits.gather(-1, ids[part]) - normaliser[part]  # (C, K)
        ctx.save_for_backward(hidden, head, ids, normaliser)
        return log_p  # (steps, K) float32

    @staticmethod
    def backward(ctx, grad):
        hidden, head, ids, normaliser = ctx.saved_tensors
        low, grad_hidden = head.to(hidden.dtype), torch.empty_like(hidden)  # (V, D), (steps, D)
        grad_head = torch.zeros_like(head) if ctx.needs_input_grad[1] else None  # (V, D)
        for i in range(0, len(ids), ctx.rows):
            part = slice(i, i + ctx.rows)
            logits = CandidateLogProbs.logits(hidden[part], low, ctx.temperature)  # (C, V)
            probs = logits.sub_(normaliser[part]).exp_()  # (C, V)
            grad_logits = probs.mul_(-grad[part].sum(-1, keepdim=True)).scatter_add_(-1, ids[part], grad[part])
            grad_logits = grad_logits.div_(ctx.temperature).to(hidden.dtype)  # (C, V)
            grad_hidden[part] = grad_logits @ low
            if grad_head is not None and hidden.dtype == head.dtype:
                grad_head.addmm_(grad_logits.T, hidden[part])  # without another (V, D)
            elif grad_head is not None:
                grad_head += grad_logits.T @ hidden[part]
        return grad_hidden, grad_head, None, None


def candidate_log_probs(lm, hidden, ids, temperature):
    """hidden (steps, D) and ids (steps, K) -> log-probabilities (steps, K) under the full softmax, float32."""
    return CandidateLogProbs.apply(hidden.to(compute_dtype(hidden.device)), lm.head, ids, temperature)


# ----------------------------------------------------------------------------------------------------------------------
# 6. pass@k, run folders, checkpoints.


def pass_at_k(n, c, k):
    """Unbiased estimate of P(at least one of k samples is right) from n samples of which c are (Chen et al. 2021).

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def open_run(out, default_name):
    """Make the run folder and return its path. A folder that holds a run already is never written over."""
    path, number = Path(out or f"runs/{default_name}"), 1
    if out and any((path / name).exists() for name in ("checkpoint.safetensors", "result.json")):
        raise UserError(f"{path} holds a run already: continue it with --resume {path}, or give another --out")
    while True:
        try:
            path.mkdir(parents=True, exist_ok=bool(out))
            (path / "log.jsonl").touch()
            return path
        except FileExistsError as error:
            if out:
                raise UserError(f"cannot write to {path}: {error.strerror}; give another --out") from None
            number += 1  # a default name is claimed by making the folder, so two runs started at once do not share it
            path = Path(f"runs/{default_name}-{number}")
        except OSError as error:
            raise UserError(f"cannot write to {path}: {error.strerror}; give another --out") from None


class Run:
    """A run in its folder. What it is, the weights of `module`, optimiser, generator and `state` (JSON), is saved
    together or not at all, so a resumed run cannot tell that it was interrupted. As a context, it heeds Ctrl-C.
    """

    def __init__(self, folder, module, optimizer, generator, state, began):
        self.folder, self.module, self.optimizer, self.generator = folder, module, optimizer, generator
        self.state, self.began, self.stop, self.over = state, began, StopSignal(), False
        self.writes = process()[0] == 0  # the process that writes, for all
        self.log = RunLog(folder, state["step"]) if self.writes else None

    def __enter__(self):
        self.stop.__enter__()
        return self

    def __exit__(self, *exc):
        self.stop.__exit__(*exc)

    def save(self):
        if self.writes:
            self.state["seconds"] = time.time() - self.began
            path = self.folder / "checkpoint.safetensors"
            save_checkpoint(path, self.module, self.optimizer, self.generator, self.state)

    def steps(self, end, save_every, description):
        """Yields until state["step"] is `end`, `over` is set or an interrupt has come, which makes `interrupted` True
        for all processes, also in the last step. Saves before, in between and after."""
        with progress(total=end, initial=self.state["step"], desc=description, unit="step") as bar:
            self.save()  # what came before is worth keeping
            while not self.hear() and not self.over and self.state["step"] < end:
                yield
                bar.update()
                if save_every and self.state["step"] % save_every == 0:
                    self.save()
            self.save()

    def hear(self):
        self.interrupted = bool(all_reduce(torch.tensor(int(self.stop.requested)), "MAX"))
        return self.interrupted

    @contextlib.contextmanager
    def attempt(self, undo):
        """`with run.attempt(undo):` a step that fails and has not changed the weights is taken back and can be tried
        again: one that ends in a UserError before it advanced state["step"], or, with `undo`, for want of memory."""
        before, dice = dict(self.state), self.generator.get_state()
        try:
            yield
        except (UserError, RuntimeError, MemoryError) as error:
            early = isinstance(error, UserError) and self.state["step"] == before["step"]
            if early or undo and is_out_of_memory(error):
                self.state |= before
                self.generator.set_state(dice)
            if isinstance(error, UserError) or undo and is_out_of_memory(error):
                self.save()
            raise

    def write(self, row, timing):
        if self.writes:
            self.log.write(row, timing)


class RunLog:
    """log.jsonl: a row per step, equal for equal seeds; timing.jsonl beside it: what differs from run to run."""

    def __init__(self, folder, from_step=0):
        """`from_step`: rows of this step and later, written by a run that was killed, are cut off."""
        self.folder = Path(folder)
        for name in ("log.jsonl", "timing.jsonl"):
            path = self.folder / name
            lines = path.read_text().splitlines() if path.exists() else []
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] < from_step]
            write_atomically(path, lambda tmp, kept=kept: tmp.write_text("".join(f"{line}\n" for line in kept)))

    def write(self, row, timing):
        for name, content in (("log.jsonl", row), ("timing.jsonl", timing)):
            with open(self.folder / name, "a") as file:
                file.write(json.dumps(content) + "\n")


def write_atomically(path, write):
    """write(temporary path), then rename: a reader, or a crash, finds the old file or the new one, nothing between."""
    tmp = Path(f"{path}.tmp")
    write(tmp)
    with open(tmp, "r+b") as file:
        os.fsync(file.fileno())
    os.replace(tmp, path)


def save_checkpoint(path, model, optimizer, generator, state):
    """All of a run in one safetensors file: weights, optimiser, RNG, and `state` (JSON: step, data position, …)."""
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}  # tied weights appear once
    for i, slots in optimizer.state_dict()["state"].items():
        if len(slots) < 3:  # Adam has a step and two moments, or less where memory ended in its first step
            continue
        tensors |= {f"optimizer.{i}.{name}": value for name, value in slots.items()}
    tensors["generator"] = generator.get_state()
    metadata = {"state": json.dumps(state)}
    try:
        write_atomically(path, lambda tmp: save_file({k: v.contiguous() for k, v in tensors.items()}, tmp, metadata))
    except Exception as error:
        raise UserError(f"cannot write the checkpoint {path}: {error}") from None


def read_checkpoint_state(path):
    """The JSON part of a checkpoint. UserError when there is none."""
    try:
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["state"])
    except Exception as error:
        raise UserError(f"no usable checkpoint at {path} ({type(error).__name__}): nothing to resume") from None


def load_checkpoint(path, model, optimizer, generator):
    """Put the tensors of a checkpoint back in place."""
    slots = {}
    with safe_open(path, "pt") as file, torch.no_grad():
        parameters = dict(model.named_parameters())
        for key in file.keys():
            kind, _, name = key.partition(".")
            if kind == "model":
                parameters[name].copy_(file.get_tensor(key))
            elif kind == "optimizer":
                index, name = name.split(".")
                slots.setdefault(int(index), {})[name] = file.get_tensor(key)
            else:
                generator.set_state(file.get_tensor(key))
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": slots, "param_groups": groups})
