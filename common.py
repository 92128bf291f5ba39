"""What the methods share and what is not the method: ranks, errors, model, decoding, run folders.

Letters in shapes: P prompts, G rollouts of a prompt (a group), N = P * G rollouts, B rows of a
batch, L columns of a prompt, T steps of a rollout, K candidates of a soft token, M executed steps,
V size of the vocabulary, D width of the model.
"""

import functools
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn  # before init_process_group: a group that it finds stays alive
import torch.nn.functional as F
import transformers
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from tasks import UserError, encoding

# --- 1. Ranks: the processes that torchrun starts, one for each GPU -------------------------------
# Each rank takes its share of the prompts of a step. What they exchange is sums: of gradients, and
# of metrics. A mean over ranks is the sum of all sums divided by the sum of all counts.
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
progress = functools.partial(tqdm, disable=RANK > 0 or None)  # None: a bar on a terminal only


def start_ranks(device):
    if RANKS > 1:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # what "cuda" means from here on
        dist.init_process_group()  # gloo for the tensors of a CPU, NCCL for those of a GPU
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # rank 0 speaks for all


def sum_over_ranks(tensor):
    """-> the same tensor, now the sum"""
    if RANKS > 1:
        dist.all_reduce(tensor)
    return tensor


def sum_gradients_over_ranks(model):
    for weight in model.parameters():
        if weight.requires_grad:
            if weight.grad is None:  # no group of this rank taught anything
                weight.grad = torch.zeros_like(weight)
            sum_over_ranks(weight.grad)


def mean_over_ranks(values):
    """The mean of a tensor's values, over all ranks -> float, NaN of nothing"""
    total = sum_over_ranks(values.sum(dtype=torch.float))
    return (total / sum_over_ranks(torch.ones_like(values).sum(dtype=torch.float))).item()


# --- 2. Errors ------------------------------------------------------------------------------------
def run_main(main):
    """What the user can put right is one line and exit code 2. A bug keeps its traceback."""
    sys.stdout.reconfigure(errors="replace")  # a console that cannot print a character prints ?
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted: --resume goes on from checkpoint.pt, if there is one", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        reason = " ".join(str(error).split())  # in one line
        if "enforce fail" in reason or "os error" in reason:  # of PyTorch; of safetensors
            reason += " (disk or memory is full)"
        elif not isinstance(error, (UserError, OSError, ImportError, torch.OutOfMemoryError)):
            raise
        print("error:", reason, file=sys.stderr)
        sys.exit(2)


# --- 3. Model -------------------------------------------------------------------------------------
@dataclass
class LanguageModel:
    model: torch.nn.Module  # weights in float32: bfloat16 would round an update of 1e-6 away
    tokenizer: object
    embedding: torch.Tensor  # (V, D) E, what goes in
    head: torch.Tensor  # (V, D) hidden states times this are logits; often the same tensor
    stop_ids: torch.Tensor  # any of these ends a text
    dtype: torch.dtype = torch.float32  # or bfloat16, of matrix products

    def autocast(self):
        """One context around a rollout, so that weights are cast once. Not under inference_mode."""
        return torch.autocast(
            self.embedding.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16
        )

    def hidden_states(self, embeds, cache, mask=None):
        """The model without its head: (B, L, D) -> (B, L, D)

        cache: of the columns before, which these ones join. mask (B, all columns): 0 on padding,
        which is on the left, so that positions are counted from the first real token.
        """
        position = None
        if mask is not None:
            position = (mask.cumsum(1)[:, -embeds.shape[1] :] - 1).clamp(min=0)  # (B, L)
        return self.model.base_model(
            inputs_embeds=embeds.to(self.dtype),
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state


def load_model(args):
    """-> LanguageModel without dropout, in the update too: a replay must equal its rollout"""
    transformers.logging.disable_progress_bar()
    path = encoding.model_path(args.model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True
        ).to(args.device).eval()
        lm = LanguageModel(
            model,
            tokenizer,
            embedding=model.get_input_embeddings().weight,
            head=model.get_output_embeddings().weight,
            stop_ids=torch.tensor(encoding.end_tokens(model, tokenizer), device=args.device),
        )
        check_model(lm)
    except Exception as error:  # no such name, no network, a damaged file, an exotic model
        raise UserError(f"cannot use the model {path}: {error}")
    lm.dtype = getattr(torch, args.precision)
    return lm


@torch.no_grad()
def check_model(lm):
    """Try what a rollout and its replay need, against the model's own pass over the whole text.

    Prompts of different length, two rows for each, of which one leaves, then two tokens at once.
    """
    decoder = Decoder(lm, [[4], [2, 3, 4]], 2)
    decoder.keep(torch.arange(4) % 2 == 0)
    ours = decoder.feed(lm.embedding[torch.tensor([[5, 3], [5, 3]])])  # (2, V)
    wholes = torch.tensor([[4, 5, 3]]), torch.tensor([[2, 3, 4, 5, 3]])
    theirs = torch.cat([lm.model(ids.to(ours.device)).logits[:, -1] for ids in wholes])  # (2, V)
    if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3):
        raise ValueError("from embeddings its logits are others; take a plain one, like Qwen2.5")


# --- 4. Decoding, from embeddings, which serving engines take for a prompt only -------------------
class Decoder:
    """The KV cache of a batch of rollouts. A step is the model's own forward pass."""

    def __init__(self, lm, prompts, group_size):
        """Run P prompts, lists of token ids, each once for its whole group -> self.logits (N, V)

        Shorter prompts are padded on the left, so that all of them end in the same column.
        """
        ids = [torch.tensor(prompt, device=lm.embedding.device) for prompt in prompts]
        ids = pad_sequence(ids, True, padding_value=-1, padding_side="left")  # (P, L)
        mask = (ids >= 0).long()  # (P, L)
        self.lm, self.cache, self.mask = lm, DynamicCache(config=lm.model.config), mask
        self.head = lm.head.to(lm.dtype)  # cast once
        self.logits = self.run(lm.embedding[ids.clamp(min=0)]).repeat_interleave(group_size, 0)
        if not self.logits.isfinite().all():
            raise UserError("logits are not finite: damaged weights, or --lr was too high")
        self.mask = mask.repeat_interleave(group_size, 0)  # (N, columns so far)
        self.cache.batch_repeat_interleave(group_size)

    def run(self, embeds):
        """(B, L, D) -> logits after the last column (B, V)"""
        hidden = self.lm.hidden_states(embeds, self.cache, self.mask)[:, -1]  # (B, D)
        return F.linear(hidden, self.head)

    def feed(self, embeds):
        """The next embeddings of each row, (B, L, D), mostly one -> logits after them (B, V)"""
        self.mask = F.pad(self.mask, (0, embeds.shape[1]), value=1)
        return self.run(embeds)

    def keep(self, rows):
        """The others leave. rows (B,): bool"""
        self.cache.batch_select_indices(rows)
        self.mask = self.mask[rows]


def draw(logits):
    """One token of softmax(logits) for each row: (B, V) -> (B, 1)

    One random number for each row, by the inverse of the distribution function, which float32 knows
    to 1e-7. `multinomial` takes one for each token, and three times the seconds where there are
    152,000.
    """
    cumulated = logits.float().softmax(-1).cumsum(-1)  # (B, V)
    height = torch.rand_like(cumulated[:, :1]) * cumulated[:, -1:]  # (B, 1)
    return torch.searchsorted(cumulated, height, right=True)


def log_probs_at(hidden, head, ids):
    """log softmax(hidden head^T) at ids: hidden (M, D), head (V, D), ids (M, K) -> (M, K) float32

    Logits are by far the largest thing in an update: 62 GB for 256 rollouts of 400 steps and a
    vocabulary of 152,000. So they exist for a few hundred steps at a time, 2^25 numbers, and the
    backward pass makes them again.
    """

    def log_probs(hidden, ids):
        logits = F.linear(hidden, head).float()  # (chunk, V)
        return logits.log_softmax(-1).gather(-1, ids)  # (chunk, K)

    chunk = 2**25 // len(head)
    if len(ids) <= chunk:  # few enough to be kept
        return log_probs(hidden, ids)
    return torch.cat([
        checkpoint(log_probs, *part, use_reentrant=False, preserve_rng_state=False)
        for part in zip(hidden.split(chunk), ids.split(chunk))
    ])  # fmt: skip


# --- 5. The run folder: log.jsonl with a row per step, checkpoint.pt, result.json, model/ ---------
def load_checkpoint(folder):
    try:
        return torch.load(
            f"{folder}/checkpoint.pt", map_location="cpu", weights_only=True, mmap=True
        )
    except Exception as error:  # none there, or a damaged one
        raise UserError(f"nothing to resume in {folder} ({type(error).__name__})")


class Run:
    def __init__(self, args, method, lm, optimizer):
        self.args, self.method, self.began = args, method, time.time()
        self.lm, self.optimizer = lm, optimizer
        name = f"runs/{method}-{Path(args.task).name}-seed{args.seed}-%m%d-%H%M%S"
        self.folder = Path(args.resume or args.out or time.strftime(name))
        if RANK == 0 and not args.resume:
            if self.folder.exists():
                raise UserError(f"{self.folder} is there already: --resume it, or give a new --out")
            self.folder.mkdir(parents=True)
            (self.folder / "log.jsonl").touch()

    def start(self):
        """-> first step, scores before training or None; of a resumed run from its checkpoint"""
        size = sum(w.numel() for w in self.lm.model.parameters() if w.requires_grad)
        print(f"run folder {self.folder}, settings {vars(self.args)}")
        print(f"{size:,} weights learn: {16 * size / 1e9:.1f} GB with their gradients and Adam")
        if not self.args.resume:
            self.save(0, None)  # from here on a run that was killed can go on
            return 0, None
        saved = load_checkpoint(self.folder)
        self.lm.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if RANK == 0:
            (self.folder / "result.json").unlink(missing_ok=True)  # that of the shorter run
            log = self.folder / "log.jsonl"
            rows = log.read_text().splitlines(keepends=True)
            log.write_text("".join(rows[: saved["step"]]))  # what came later comes again
        return saved["step"], saved["before"]

    def save(self, step, before):
        """Written aside and renamed: a crash leaves the old checkpoint or the new one."""
        if RANK == 0:
            aside = self.folder / "checkpoint.tmp"
            torch.save(
                {
                    "step": step,
                    "before": before,
                    "args": vars(self.args),
                    "model": self.lm.model.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                },
                aside,
            )
            aside.replace(self.folder / "checkpoint.pt")

    def log(self, row):
        if self.args.device == "cuda":
            row["gigabytes"] = torch.cuda.max_memory_allocated() / 1e9  # the most so far
        if RANK == 0:
            if row.get("ended", 1) < 0.7:
                tqdm.write(f"{1 - row['ended']:.0%} of the texts were cut: raise --max_new_tokens")
            with open(self.folder / "log.jsonl", "a") as file:
                print(json.dumps(row), file=file)
            tqdm.write("  ".join(f"{name} {value:.4g}" for name, value in row.items()))

    def finish(self, before, after):
        """The model as a Hugging Face folder; as the last line of the run one JSON object."""
        result = {"method": self.method, "seconds": round(time.time() - self.began, 1), **after}
        result |= {f"{name}_before": value for name, value in before.items()}
        if RANK == 0:
            self.lm.model.save_pretrained(self.folder / "model")
            self.lm.tokenizer.save_pretrained(self.folder / "model")
            print(json.dumps(result))
            with_args = json.dumps(result | {"args": vars(self.args)})
            (self.folder / "result.json").write_text(with_args)
        if RANKS > 1:
            dist.barrier()  # a rank that ends before the others may abort
            dist.destroy_process_group()  # so may one whose group outlives this
