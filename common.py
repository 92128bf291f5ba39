"""What the three methods share and what is not the method: problems, verifier, models, decoding, logs, checkpoints.

Read a method script first (lepo.py); come here for the details that it takes for granted. In order:
1. errors and interrupts, 2. problems, 3. the verifier, 4. models, 5. decoding from embeddings and its exact replay,
6. pass@k, run folders and checkpoints.

Shapes: P prompts, G rollouts a prompt, N = P * G, B rows, T steps, K candidates of a soft token, V vocabulary, D width.
"""

import argparse
import atexit
import contextlib
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
import urllib.parse
import urllib.request
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import huggingface_hub
import torch
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

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
    except (UserError, OSError) as error:  # OSError: a full disk, a folder without permission
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
    """A GPU's OutOfMemoryError, Python's MemoryError, or the plain RuntimeError of torch's CPU allocator."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


class StopSignal:
    """`with StopSignal() as stop:` the first Ctrl-C or SIGTERM only sets stop.requested, so that the step in progress
    can end and be saved; a second one interrupts at once."""

    def __enter__(self):
        self.requested = False
        self.previous = {s: signal.signal(s, self.handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def handle(self, signum, frame):
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("\nstopping: this step will be finished and saved (once more to stop at once)", file=sys.stderr)

    def __exit__(self, *exc):
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)


# ----------------------------------------------------------------------------------------------------------------------
# 2. Problems. A problem is a question, its true answer and the form in which the answer is asked for. A stream
#    of problems is addressed by a running index, so the data position in a checkpoint is one integer.

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True)
class Problem:
    question: str
    answer: str
    form: str = "boxed"  # "boxed": \boxed{answer} is asked for; "think": the built-in task, a number after </think>


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
    """A GSM8K row (`question`, `answer` ending in `#### n`) or a `problem`/`answer` row -> Problem."""
    question = row.get("question", row.get("problem")) if isinstance(row, dict) else None
    answer = row.get("answer") if isinstance(row, dict) else None
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        answer = str(answer)
    if not isinstance(question, str) or not isinstance(answer, str):
        raise UserError(f"{where}: expected an object with `question` or `problem`, and `answer`, both text")
    final = answer.rsplit("####", 1)[-1].strip()
    if not question.strip() or not final or "\n" in final:
        raise UserError(f"{where}: needs a question and an answer that ends in `#### n` or is one line")
    return Problem(question.strip(), final)


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
            return Problem(tiny.problem_text(*chain), str(tiny.true_answer(*chain)), form="think")

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


def encode_prompt(tokenizer, problem):
    """Token ids of the prompt: the chat template where the tokenizer has one, else plain text. -> list of int"""
    if problem.form == "think":
        text = problem.question  # already ends in <think>
    elif tokenizer.chat_template:
        chat = [{"role": "user", "content": f"{problem.question}\n{BOXED}"}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    else:
        text = f"{problem.question}\n{BOXED}\n"
    ids = tokenizer.encode(text, add_special_tokens=not tokenizer.chat_template)
    if len(tokenizer.decode(ids)) < len(text) / 2:  # letters without a token are dropped
        raise UserError("this model's tokenizer cannot spell these problems (the tiny model knows only --data tiny)")
    return ids


def take(stream, position, count, tokenizer, max_tokens):
    """The next `count` problems whose prompts fit -> (problems, their prompts as token ids, new position).

    Fewer than `count` when a finite set has been gone through once: nothing is returned twice.
    """
    problems, prompts, end = [], [], position + (stream.size or 1000 * count)
    while len(problems) < count and position < end:
        ids = encode_prompt(tokenizer, stream[position])
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
    a, b = to_number(prediction), to_number(truth)
    if a is not None and b is not None:
        return a == b
    if prediction.strip() == truth.strip():
        return True
    return 0 < len(prediction) <= 200 and judge.equal(prediction, truth)


def verify(text, problem):
    """(strict, flexible) scores, each 0.0 or 1.0, of a completion's text. Nothing in the text is ever executed."""
    if problem.form == "think":
        found = re.fullmatch(r"\s*(\d+)\s*", text.rsplit("</think>", 1)[-1])
        prediction = found and found.group(1)
    else:
        prediction = last_boxed(text)
    strict = bool(prediction) and answers_equal(prediction, problem.answer)
    numbers = NUMBER.findall(text)
    truth = to_number(problem.answer)
    flexible = strict or bool(numbers) and truth is not None and to_number(numbers[-1]) == truth
    return float(strict), float(flexible)


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
    """`tiny`, a local folder, a hub id, or a bare name such as Qwen2.5-0.5B (-> Qwen/Qwen2.5-0.5B)."""
    if name == "tiny":
        return str(HERE / "tiny")
    if Path(name).is_dir():
        return name
    if name.startswith((".", "/", "~")):
        raise UserError(f"no model folder at {name}")
    return f"Qwen/{name}" if name.startswith("Qwen") and "/" not in name else name


@dataclass
class LanguageModel:
    """A model with what one needs to sample from it and to read the samples."""

    model: torch.nn.Module
    tokenizer: object
    stop_ids: list  # any of these ends a text
    pad_id: int

    @property
    def table(self):
        return self.model.get_input_embeddings().weight  # (V, D)


def load_model(name, device):
    """-> LanguageModel in eval mode, float32, without dropout. UserError when the model cannot be had."""
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
    return LanguageModel(model.to(device).eval(), tokenizer, stop_ids, pad_id)


def find_stop_ids(model, tokenizer):
    """Every id that may end a text: generation config, config and tokenizer united, for they disagree. Qwen2.5 base
    names <|endoftext|> in its config and the tokenizer of its chat template <|im_end|>; watching for only one of
    them lets half of the completions run on to the cap."""
    stop = set()
    for ids in (model.generation_config.eos_token_id, model.config.eos_token_id, tokenizer.eos_token_id):
        stop.update(ids if isinstance(ids, (list, tuple)) else [ids])
    return sorted(stop - {None})


def autocast(device):
    """bfloat16 compute on a GPU, plain float32 elsewhere."""
    on_gpu = torch.device(device).type == "cuda"
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


def left_pad(prompts, pad_id, device):
    """-> ids (B, L), mask (B, L). Left, so that every row's last prompt token sits in the last column."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts], device=device)  # (B, L)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)  # (B, L)
    return ids, mask


def positions_of(mask):
    """Position ids under padding: a row's first real token is at 0, however much padding stands before it."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
def decode(lm, prompts, group_size, max_new_tokens, choose):
    """Sample group_size completions of every prompt with a KV cache.

    choose(logits (B, V) float32, t, rows (B,)) -> SoftToken: the method's decision at step t for the rows of the
    batch that are still running. A row ends when its heaviest candidate is a stop id. Each prompt is prefilled once
    and its cache shared out to the group; only the last position's logits are made; rows that have ended leave
    the batch. -> Rollout
    """
    device = lm.model.device
    stop = torch.tensor(lm.stop_ids, device=device)  # (stop ids,)
    total = len(prompts) * group_size
    prompt_ids, mask = left_pad(prompts, lm.pad_id, device)  # (P, L)
    cache = DynamicCache(config=lm.model.config)
    tokens = []  # per step: (rows, SoftToken)
    length = torch.full((total,), max_new_tokens, device=device)  # (N,)
    stopped = torch.zeros(total, dtype=torch.bool, device=device)  # (N,)

    with autocast(device):
        logits = lm.model(
            input_ids=prompt_ids, attention_mask=mask, position_ids=positions_of(mask),
            past_key_values=cache, use_cache=True, logits_to_keep=1,
        ).logits  # (P, 1, V)  # fmt: skip
        cache.batch_repeat_interleave(group_size)
        logits = logits.repeat_interleave(group_size, 0)  # (N, 1, V)
        mask = mask.repeat_interleave(group_size, 0)  # (N, L)
        rows = torch.arange(total, device=device)  # (B,) the rows still running
        for t in range(max_new_tokens):
            token = choose(logits[:, -1].float(), t, rows)
            tokens.append((rows, token))
            ended = torch.isin(token.heaviest(), stop)  # (B,)
            length[rows[ended]] = t + 1
            stopped[rows[ended]] = True
            if t + 1 == max_new_tokens or ended.all():
                break
            ids, weights = token.ids, token.weights
            if ended.any():
                running = (~ended).nonzero().squeeze(-1)
                rows, mask, ids, weights = rows[running], mask[running], ids[running], weights[running]
                cache.batch_select_indices(running)
            position = mask.sum(-1, keepdim=True)  # (B, 1)
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
            logits = lm.model(
                inputs_embeds=mix_embeddings(lm.table, ids, weights)[:, None], attention_mask=mask,
                position_ids=position, past_key_values=cache, use_cache=True, logits_to_keep=1,
            ).logits  # (B, 1, V)  # fmt: skip
    return pack_rollout(prompts, group_size, tokens, length, stopped, lm.pad_id)


def pack_rollout(prompts, group_size, tokens, length, stopped, pad_id):
    """Put the steps' tokens, whose rows dwindle, into full tensors; K is cut to the widest support that occurred."""
    shape = (len(length), len(tokens), max(int((token.scores > -math.inf).sum(-1).max()) for _, token in tokens))
    ids = torch.full(shape, pad_id, device=length.device)
    weights = torch.zeros(shape, device=length.device)
    scores = torch.full(shape, -math.inf, device=length.device)
    scores[..., 0] = 0.0
    for t, (rows, token) in enumerate(tokens):
        width = min(shape[2], token.ids.shape[1])
        ids[rows, t, :width] = token.ids[:, :width]
        weights[rows, t, :width] = token.weights[:, :width]
        scores[rows, t, :width] = token.scores[:, :width]
    return Rollout(prompts, group_size, ids, weights, scores, length.clamp(max=len(tokens)), stopped)


def replay_logits(lm, rollout, rows):
    """The logits that decode() saw at every step of rows (B,), in one parallel pass with gradients.

    -> (B, T, V) float32, T the longest of these rows. The executed embeddings are rebuilt from (ids, weights) inside
    the graph: the weights are constants of the trajectory, the embedding table is a parameter like any other.
    """
    rows = rows.tolist()
    steps = int(rollout.length[rows].max())
    prompts = [rollout.prompts[n // rollout.group_size] for n in rows]
    prompt_ids, prompt_mask = left_pad(prompts, lm.pad_id, lm.model.device)  # (B, L)
    # The last step's own embedding is never an input: nothing follows it.
    inputs = mix_embeddings(lm.table, rollout.ids[rows, : steps - 1], rollout.weights[rows, : steps - 1])  # (B, T-1, D)
    mask = torch.cat([prompt_mask, rollout.mask()[rows, : steps - 1].long()], 1)  # (B, L+T-1)
    embeds = torch.cat([F.embedding(prompt_ids, lm.table), inputs], 1)  # (B, L+T-1, D)
    with autocast(lm.model.device):
        logits = lm.model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions_of(mask),
            use_cache=False, logits_to_keep=steps,
        ).logits  # (B, T, V)  # fmt: skip
    return logits.float()


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
