r"""DeepLatent Reasoning, DLR (arXiv 2601.17275), end to end in one file; no other public code was found.

    python dlr.py                                # a frozen tiny model on a laptop CPU, a minute and a half
    python dlr.py --controls                     # and then everything that its result must be compared with
    python dlr.py --model Qwen/Qwen2.5-1.5B-Instruct --assistant Qwen2.5-0.5B         # one GPU
    torchrun --nproc_per_node=8 dlr.py --model Qwen/Qwen2.5-1.5B-Instruct --prompts_per_step 32       # eight

A large model stays as it is, to the bit. A small one, the assistant, reads the problem and writes T latents into a
slot of the large one's prompt; the large one answers, greedily. What is explored is not the answer's words but the
latents, and RL trains the assistant so that those which lead to right answers become likelier.

For a prompt x, and a group of G trajectories i:

  (1)  latents:      z_i ~ pi(z | x) = prod_t N(mu_t(x), sigma_t(x)^2),  z_it in R^d, from the assistant's states at
                     T learned queries behind the prompt; phi and theta are its weights and those of the heads
  (2)  text:         y_i = greedy M([E(x); f(z_i1) ... f(z_iT); E(cue)]),  M frozen, f the projection
  (3)  reward:       R_i = R_corr + lambda R_form, both 1 or -1;  A_i = (R_i - mean_group R) / (std_group R + 1e-6)
  (4)  loss:         L = L_GRPO + gamma L_cl
  (5)  GRPO:         L_GRPO = -mean_i [ min(rho_i A_i, clip(rho_i, 1-eps, 1+eps) A_i) - beta KL(pi || pi_start) ],
                     log rho_i = clamp((log pi(z_i) - log pi_old(z_i)) / N, -5, 5)
  (6)  contrastive:  L_cl = -mean_k log( exp(s z_k . z_k) / sum_j exp(s z_k . z_j) ), step by step over the group

What the paper leaves open or says in two ways, and what is done here:
  - *The density* in rho and KL is never defined: the diagonal Gaussian of (1), whose KL has a closed form. All T
    latents come from one pass (`--policy parallel`), or each sees the last one (`autoregressive`). T is fixed: no
    rule for stopping is given.
  - *From 512 numbers to a 4,096-wide model*, and where they go: z is the action and f a fixed map behind it, so f gets
    no gradient from RL (`--projection linear`, mode L), or d is the model's width and f the identity (`identity`,
    mode E, the literal reading; theta is then queries, norm and heads). The default is a third: a latent becomes a
    soft token, f(z) = softmax(W z) E, a mixture of the main model's words. See below. Latents stand behind the
    question, before what asks for the answer: SoftCoT's place (2502.12134).
  - *Is it filtered before or after decoding?* Both are written. `--filter all` decodes everything (its Algorithm 1);
    `prescreen` decodes the share of which a value head expects most (its section on cost: 18 %, and no score);
    `postfilter` decodes everything and imitates a right text of each prompt as well. None of them takes wrong ones
    out of (3), which would leave no negatives. A pre-screen's K are not draws of pi: its gradient is biased.
  - *"Bidirectional"*: scores of one view with itself are symmetric, so both directions of (6) are equal (`contrastive`
    takes a second view). The mean over k instead of the sum, which would be G times gamma; s = 1 / (d sigma^2), with
    the sigma of the start: with the paper's s = 1 and d = 512 a latent's product with itself is so much larger than
    with others that (6) is exactly 0 in float32. On draws, which are constants, (6) has no gradient: it gets one
    through mu + sigma eps. In parallel mode all draws of a prompt share one mu, so (6) mostly raises sigma: an entropy
    bonus. With several `--starts` there are several mu.
  - *N and the clamp* in (5) are not in the paper. A sum over T d numbers moves so far in one AdamW step that exp
    overflows; N = d by default (`--norm exact`: 1). With one pass per batch the ratio is 1, and N scales the gradient
    and no more. The KL has the same N.
  - *Not reported* and chosen here: lambda .2, eps .2, one pass per batch, std of the population, the prompt, the latent
    in evaluations (the mean), no warm-up. The clipping norm 1 is the paper's for its projection; here the assistant
    has it too.
  - *Numbers*: 55.4 on GSM8K against 46.2 for GRPO, 18 % decoded at no loss, 4.7 points from (6) on MATH, one run each,
    with a frozen Llama-2-7B. Whether the mechanism reproduces in small is measured in README, with controls.

What made RL work here without a single solution is the projection. A fitting note would steer the main model of the
built-in task (README), and Gaussian noise in its embedding space is hardly ever one: at sizes from .3 to 2.7 times the
embeddings', .05 to .09 of groups have right and wrong answers, about the .07 of problems that it solves without. With
the widest, RL finds one note, which is right for half of the problems, and in 300 steps gets from there to between .54
and .84. With noise projected onto mixtures of words .37 are mixed, and in 40 steps RL has found the other note as well,
provided that all words are equally likely (`Projection`).
"""

import copy
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

import engine
import tiny
from engine import SLOT, SoftToken, UserError

# ----------------------------------------------------------------------------------------------------------------------
# 1.-2. Arguments. Defaults are the paper's where it gives them and the first page does not say otherwise; sizes are for
#       one GPU. The tiny model needs other values, which TINY lists and `--help` shows.

TINY = dict(
    assistant="tiny", data="tiny", latent_steps=4, latent_dim=32, group_size=16, steps=100, prompts_per_step=32,
    max_new_tokens=40, contrast=0.01, lr=3e-3, lr_assistant=1e-3, sft_lr=1e-3, warmup=5, micro_batch=64,
    eval_problems=512, eval_every=10, show_every=20, sft_batch=64,
)  # fmt: skip


def operations(text):
    """'2-5' -> [2, 5]"""
    low, _, high = text.partition("-")
    return [int(low), int(high or low)]


def build_parser():
    about = "DeepLatent Reasoning: an assistant learns to whisper to a frozen model. The file's first page explains it."
    parser = engine.Parser(usage="%(prog)s [flags]", description=about)

    def flag(name, default, text, **options):
        tiny_too = f"; tiny: {TINY[name]}" if name in TINY else ""
        options = {"type": type(default)} | options
        group.add_argument(f"--{name}", default=default, help=f"{text} [{default}{tiny_too}]", **options)

    group = parser.add_argument_group("models and data")
    flag("model", "tiny", "the frozen main model: tiny, a local folder, a hub id, or a bare Qwen name")
    flag("assistant", "Qwen2.5-0.5B", "the model that learns to write latents, named likewise")
    flag("data", "gsm8k", "tiny, gsm8k, a .jsonl file, or a folder with train.jsonl and test.jsonl")
    group.add_argument("--eval_data", help="as --data, or math500 [the test split of --data]")
    flag("ops", "2-5", "built-in task: operations per chain, low-high", type=operations)
    flag("kind", "single", "built-in task: signs in a chain", choices=["mixed", "plus", "minus", "single"])
    flag("max_prompt_tokens", 512, "problems with longer prompts are passed over")

    group = parser.add_argument_group("latents")
    flag("policy", "parallel", "the assistant writes all latents at once, or each after the last one, in T passes; or, "
         "a control, no assistant: one learned prompt for all problems",
         choices=["parallel", "autoregressive", "prompt"])  # fmt: skip
    flag("latent_steps", 16, "T, latents per prompt (paper: at most 32)")
    flag("latent_dim", 128, "d, numbers per latent (paper: 512); --projection identity has as many as an embedding")
    flag("projection", "words", "from a latent to the main model's embeddings: a mixture of its words, a linear map, "
         "or nothing (mode E)", choices=["words", "linear", "identity"])  # fmt: skip
    flag("sigma", 1.0, "standard deviation at the start; with linear and identity in units of the embeddings' rms")
    flag("starts", 1, "C, sets of queries, which the trajectories of a group take in turn")

    group = parser.add_argument_group("reward and filter")
    flag("format_weight", 0.2, "lambda in (3)")
    flag("filter", "all", "what is decoded: all; a share, which a value head picks; or all, and a right text of each "
         "prompt is imitated too", choices=["all", "prescreen", "postfilter"])  # fmt: skip
    flag("share", 0.18, "prescreen: share of the group that is decoded (the paper's)")
    flag("screen", "top", "prescreen: the best by the value head, or half best and half worst",
         choices=["top", "spread"])  # fmt: skip
    flag("screen_sees", "latents", "prescreen: the value head judges by latents and assistant, or by the main model's "
         "state after the prompt, which costs a prefill of all G", choices=["latents", "state"])  # fmt: skip
    flag("explore", 0.25, "prescreen: share of those that is picked at random instead")
    flag("imitate", 0.1, "postfilter: weight of the cross-entropy")

    group = parser.add_argument_group("optimisation")
    flag("steps", 200, "RL updates; 0 only evaluates (paper: 3 epochs)")
    flag("prompts_per_step", 4, "P (paper: 4 on each of 8 GPUs)")
    flag("group_size", 16, "G, trajectories per prompt (paper: 64)")
    flag("max_new_tokens", 256, "cap on the main model's text")
    flag("updates_per_batch", 1, "passes over a batch; above 1, clipping acts")
    flag("clip", 0.2, "eps in (5)")
    flag("norm", "dim", "log-ratio and KL are divided by 1 (exact), d (dim) or T d (all)",
         choices=["exact", "dim", "all"])  # fmt: skip
    flag("kl_coef", 0.01, "beta in (5); above 0 keeps a second assistant in memory")
    flag("contrast", 0.1, "gamma in (4)")
    flag("lr", 1e-4, "peak learning rate of queries, norm and heads; cosine decay")
    flag("lr_assistant", 3e-5, "of the assistant")
    flag("lr_value", 1e-3, "of the value head")
    flag("warmup", 3, "steps of linear warm-up of these rates")
    flag("weight_decay", 0.0, "of AdamW, decoupled")
    flag("grad_clip", 1.0, "largest gradient norm, of the assistant and of queries and heads")
    flag("micro_batch", 4, "prompts per backward pass: memory, not results")
    group.add_argument("--gradient_checkpointing", action="store_true", help="less memory in the update, more time")

    group = parser.add_argument_group("warm-up: cross-entropy through the frozen model (steps below 0)")
    flag("sft_steps", 0, "updates on right solutions before RL; RL needs none of them here")
    flag("sft_batch", 16, "solutions per update")
    flag("sft_lr", 1e-4, "learning rate, constant, of everything but the main model")

    group = parser.add_argument_group("evaluation and run")
    flag("eval_problems", 256, "held-out problems; the standard error is 3 points at 256")
    flag("eval_samples", 8, "N, sampled latents per problem, for majority@N and pass@N")
    flag("eval_every", 20, "steps between evaluations of the mean latent; 0: none between")
    flag("show_every", 10, "steps between printed rollouts; 0: none")
    flag("save_every", 20, "steps between checkpoints; Ctrl-C and SIGTERM save too")
    flag("seed", 0, "of noise, new weights and training problems")
    flag("device", "cuda" if torch.cuda.is_available() else "cpu", "cuda: bfloat16 compute; cpu: float32",
         choices=["cuda", "cpu"])  # fmt: skip
    group.add_argument("--controls", action="store_true", help="then train what the result must be compared with")
    group.add_argument("--out", help="run folder [a new one under runs/]")
    group.add_argument("--resume", metavar="FOLDER", help="continue a run; flags beside it replace saved ones")
    return parser


def parse_args(argv=None):
    """-> (args, state of the checkpoint to resume or None). Raises UserError on values that cannot work."""
    parser = build_parser()
    first, _ = parser.parse_known_args(argv)
    state = engine.read_checkpoint_state(f"{first.resume}/checkpoint.safetensors") if first.resume else None
    parser.set_defaults(**(state["args"] if state else TINY if engine.is_tiny(first.model) else {}))
    args = parser.parse_args(argv)
    done, begun = (state["step"], state["args"]) if state else (-args.sft_steps, vars(args))
    processes = int(os.environ.get("WORLD_SIZE", 1))  # from torchrun
    at_least_1 = ["prompts_per_step", "micro_batch", "updates_per_batch", "latent_steps", "latent_dim", "starts",
                  "eval_samples", "eval_problems", "sft_batch", "max_new_tokens"]  # fmt: skip
    not_negative = ["steps", "sft_steps", "format_weight", "clip", "lr", "lr_assistant", "lr_value", "sft_lr",
                    "imitate", "weight_decay", "kl_coef", "contrast", "warmup", "eval_every", "show_every",
                    "save_every"]  # fmt: skip
    fixed = ["model", "assistant", "device", "policy", "latent_steps", "latent_dim", "projection", "starts", "filter",
             "screen_sees", "sft_steps"]  # fmt: skip
    checks = [
        *((getattr(args, name) >= 1, f"--{name} must be at least 1") for name in at_least_1),
        *((getattr(args, name) >= 0, f"--{name} cannot be negative") for name in not_negative),
        ("format_weight" in begun, f"{args.resume} holds a run of another script"),
        *((getattr(args, name) == begun.get(name), f"--{name} cannot change in a run") for name in fixed),
        (args.steps >= done, f"this run has done {done} steps: --steps must be at least that"),
        (not state or bool(args.kl_coef) == bool(begun.get("kl_coef")), "--kl_coef cannot turn to or from 0 in a run"),
        (not (state and args.out), "--resume goes on in its own folder: leave --out away"),
        (args.prompts_per_step >= processes,
         f"--prompts_per_step must be at least the number of processes, {processes}"),
        ("WORLD_SIZE" not in os.environ or not args.controls, "--controls runs without torchrun"),
        (args.group_size >= 2, "--group_size must be at least 2: an advantage compares trajectories"),
        (args.sigma > 0, "--sigma must be above 0"),
        (args.grad_clip > 0, "--grad_clip must be above 0"),
        (args.starts <= args.group_size, "--starts must be at most --group_size: some would never be taken"),
        (0 < args.share <= 1 and 0 <= args.explore <= 1, "--share and --explore must be in (0, 1] and [0, 1]"),
        (args.filter != "prescreen" or decoded(args) >= 2,
         f"--share {args.share} of --group_size {args.group_size} leaves less than 2 to compare: raise one of them"),
        (1 <= args.ops[0] <= args.ops[1] <= 8, "--ops must be low-high between 1 and 8, such as 2-5"),
        (args.device == "cpu" or torch.cuda.is_available(), "--device cuda: no GPU found; use --device cpu"),
    ]  # fmt: skip
    for fine, message in checks:
        if not fine:
            raise UserError(message)
    return args, state


# ----------------------------------------------------------------------------------------------------------------------
# 3. The latent. The assistant reads a problem, followed by T learned queries, and from its states at the queries two
#    linear heads read a Gaussian, (1). Its draw z is the action; (2) takes z into the main model's embedding space.


class LatentPolicy(torch.nn.Module):
    """pi(z | x): assistant, queries and heads; without an assistant, `--policy prompt`, the queries are the states.

    Prompts are token ids of the assistant that end in T SLOTs. With C starts, trajectory i of a group takes queries
    i mod C, and its density is that component's. In parallel mode, one pass per start serves a whole group.
    """

    def __init__(self, assistant, main, args):
        super().__init__()
        self.lm, self.args, self.assistant = assistant, args, assistant.model
        self.start = math.log(args.sigma)  # sigma stays within e^-4 and e times its start
        width = assistant.table.shape[1]
        queries = torch.randn(args.starts, args.latent_steps, width) * assistant.table.detach().std().cpu()
        self.queries = torch.nn.Parameter(queries)  # (C, T, h)
        self.norm = torch.nn.LayerNorm(width)
        self.mu, self.log_std = torch.nn.Linear(width, args.latent_dim), torch.nn.Linear(width, args.latent_dim)
        if args.policy == "autoregressive":
            self.back = torch.nn.Linear(args.latent_dim, width)  # a latent as the assistant's next input
        with torch.no_grad():  # at the start the noise is far larger than the mean and equal everywhere
            self.mu.weight.mul_(0.1)
            self.mu.bias.zero_()
            self.log_std.weight.zero_()
            self.log_std.bias.fill_(self.start)
        if args.filter == "prescreen":
            seen = args.latent_steps * args.latent_dim + width  # see section 5
            seen = main.table.shape[1] if args.screen_sees == "state" else seen
            layers = torch.nn.Linear(seen, 64), torch.nn.GELU(), torch.nn.Linear(64, 1)
            self.value = torch.nn.Sequential(torch.nn.LayerNorm(seen), *layers)
        self.to(args.device)

    def states(self, prompts, group_size, z):
        """P prompts -> the assistant's states at the queries (P, G, T, h); z (P, G, T, d) is seen by later latents in
        autoregressive mode only."""
        args, device = self.args, self.queries.device
        auto = args.policy == "autoregressive"
        rows = group_size if auto else min(args.starts, group_size)  # that differ
        start = torch.arange(group_size, device=device) % args.starts  # (G,)
        slots = self.queries[start[:rows]].expand(len(prompts), -1, -1, -1)  # (P, rows, T, h)
        if auto:
            slots = slots + F.pad(self.back(z[:, :, :-1]), (0, 0, 1, 0))
        if args.policy != "prompt":
            ids, _ = engine.right_pad([prompt for prompt in prompts for _ in range(rows)], self.lm.pad_id, device)
            place = torch.arange(ids.shape[1], device=device)  # (L,)
            embeds = engine.embed(self.lm.table, ids, slots.flatten(0, 1))  # (P * rows, L, h)
            hidden = engine.run_body(
                self.lm, args.gradient_checkpointing, inputs_embeds=embeds,
                attention_mask=(place <= place[:, None])[None, None],
            )  # (P * rows, L, h)  # fmt: skip
            slots = hidden[ids == SLOT].view(slots.shape).float()
        return slots if auto else slots[:, start]

    def forward(self, prompts, group_size, z=None):
        """-> mean, log standard deviation (P, G, T, d) twice, and normalised states (P, G, T, h)"""
        h = self.norm(self.states(prompts, group_size, z))
        return self.mu(h), self.log_std(h).clamp(self.start - 4, self.start + 1), h

    def sample(self, prompts, eps):
        """Equation (1), reparameterised: eps (P, G, T, d) ~ N(0, 1), or 0 for the mean -> z and what forward gives."""
        z = torch.zeros_like(eps)
        for _ in range(eps.shape[2] if self.args.policy == "autoregressive" else 1):  # pass t finishes z_t
            mu, log_std, h = self(prompts, eps.shape[1], z)
            z = mu + log_std.exp() * eps  # (P, G, T, d)
        return z, mu, log_std, h


class Projection(torch.nn.Module):
    """Equation (2), f: latents (…, d) -> embeddings of the main model (…, D). Only the warm-up trains it.

    The scale of `words` is that of a random energy model: at a standard deviation of sqrt(2 ln V) a softmax over V
    random logits turns from a mean of everything into a choice of few. At 1.4 times that, most draws mix two to five
    words. All words have weights of one norm, so each is as likely as any other to be the heaviest.
    """

    def __init__(self, main, args):
        super().__init__()
        self.kind, self.table = args.projection, main.table.detach()  # (V, D), no part of what is trained or saved
        vocabulary, wide = self.table.shape
        rms, d = self.table.square().mean().sqrt().cpu(), args.latent_dim
        self.weight = None  # identity: d = D, and a latent is the embedding but for its unit, the rms of the table
        if args.projection == "words":
            directions = F.normalize(torch.randn(vocabulary, d), dim=-1)
            self.weight = torch.nn.Parameter(1.4 * math.sqrt(2 * math.log(vocabulary)) * directions)
        elif args.projection == "linear":
            self.weight = torch.nn.Parameter(torch.randn(wide, d) * rms / math.sqrt(d))
        self.rms = rms.item()
        self.to(args.device)

    def mixture(self, z):
        """The weights of all words in latents (…, d) -> (…, V)"""
        return F.linear(z, self.weight).softmax(-1)

    def forward(self, z):
        if self.kind == "identity":
            return z * self.rms
        if self.kind == "linear":
            return F.linear(z, self.weight)
        parts = z.flatten(0, -2).split(256)  # (·, V) is large
        return torch.cat([self.mixture(part) @ self.table for part in parts]).unflatten(0, z.shape[:-1])


# ----------------------------------------------------------------------------------------------------------------------
# 4. Rollout: a prompt with T slots, the latents in them, and one greedy pass of the frozen main model.

FORMAT = (
    "Reason step by step between <think> and </think>, then give only the final answer between <answer> and </answer>."
)


def encode_with_slots(tokenizer, problem, slots, whole=True):
    """A prompt that has T SLOTs after the question -> list of ids. `whole`: and then what asks for the answer. The
    assistant's is not whole: it ends with its queries."""
    mark = "\N{OBJECT REPLACEMENT CHARACTER}"
    if problem.form == "think":  # the built-in task has room for a note before ` <think>`
        text = problem.question.replace(" <think>", f"{mark} <think>")
    elif tokenizer.chat_template:
        chat = [{"role": "user", "content": f"{problem.question}\n{FORMAT}\n{mark}"}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    else:
        text = f"{problem.question}\n{FORMAT}\n{mark}\n"
    before, _, after = text.partition(mark)
    ids = tokenizer.encode(before, add_special_tokens=not tokenizer.chat_template)
    if len(tokenizer.decode(ids)) < len(before) / 2:  # letters without a token are dropped
        raise UserError("this model's tokenizer cannot spell these problems (the tiny model knows only --data tiny)")
    return ids + [SLOT] * slots + (tokenizer.encode(after, add_special_tokens=False) if whole else [])


def greedy(logits, t, rows):
    """engine.decode's `choose`: equation (2)'s main model is deterministic."""
    best = logits.argmax(-1, keepdim=True)  # (B, 1)
    one = torch.ones_like(best, dtype=torch.float32)
    return SoftToken(best, one, torch.zeros_like(one))


@dataclass
class Said:
    """What the main model wrote for N = P * K latents."""

    ids: list  # N lists of token ids, the stop token included
    texts: list  # N str
    stopped: list  # N bool


def decode(main, prompts, embeddings, args):
    """P prompts with T slots, embeddings (P, K, T, D) -> Said. With T = 0 no slot is filled."""
    rows = [prompt for prompt in prompts for _ in range(embeddings.shape[1])]
    roll = engine.decode(main, rows, 1, args.max_new_tokens, greedy, embeddings.flatten(0, 1))
    ids = [row[:n] for row, n in zip(roll.heaviest().tolist(), roll.length.tolist(), strict=True)]
    texts = main.tokenizer.batch_decode(ids, skip_special_tokens=True) if ids else []
    return Said(ids, texts, roll.stopped.tolist())


# ----------------------------------------------------------------------------------------------------------------------
# 5. Reward, advantages and the filter. The verifier reads text; (3) pays for a right answer and for the right form.


def read_answer(text, problem):
    """-> (answer or None, whether the text is of the form that was asked for)

    `think`, the built-in task: the thought, one </think> and a number. Otherwise <think>, </think>, <answer> and
    </answer>, each once and in this order, with nothing but space around them and an answer inside. There an answer
    counts without its form: what stands in <answer>, else in the last \\boxed{}, else the last number.
    """
    if problem.form == "think":
        found = re.fullmatch(r"[^<>]*</think>\s*(\d+)\s*", text)
        return (found.group(1), True) if found else (None, False)
    tags = re.findall(r"</?(?:think|answer)>", text)
    found = re.fullmatch(r"\s*<think>.*</think>\s*<answer>(.*)</answer>\s*", text, re.DOTALL)
    inside = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    valid = found is not None and len(tags) == 4 and bool(found.group(1).strip())
    numbers = engine.NUMBER.findall(text)
    answer = inside[-1].strip() if inside else engine.last_boxed(text) or (numbers[-1] if numbers else None)
    return answer or None, valid


def rewards_of(said, problems, args):
    """-> R_corr, R_fmt (P, K), each 1 or -1, and the P * K answers, str or None. A text without an end has no form."""
    group = len(said.texts) // max(1, len(problems))
    answers, rewards = [], []
    for n, (text, stopped) in enumerate(zip(said.texts, said.stopped, strict=True)):
        problem = problems[n // group]
        answer, valid = read_answer(text, problem)
        right = answer is not None and engine.answers_equal(answer, problem.answer)
        answers.append(answer)
        rewards.append((2.0 * right - 1, 2.0 * (valid and stopped) - 1))
    correct, form = torch.tensor(rewards).reshape(-1, 2).T.reshape(2, len(problems), group)
    return correct, form, answers


def group_advantages(rewards):
    """Equation (3): rewards (P, K) -> advantages (P, K), with the population's standard deviation.

    Equal rewards give zeros: exactly, and not what is left of -0.8 minus a mean of -0.8 that has been rounded.
    """
    centred = rewards - rewards.mean(1, keepdim=True)  # (P, K)
    equal = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)  # (P, 1)
    return (centred / (rewards.std(1, keepdim=True, unbiased=False) + 1e-6)).masked_fill(equal, 0)


def decoded(args):
    """K, the trajectories of each group that the main model decodes."""
    return round(args.share * args.group_size) if args.filter == "prescreen" else args.group_size


@torch.no_grad()
def evidence(main, projection, prompts, z, h, args):
    """What the value head sees of each trajectory, latents (P, G, T, d) and states (P, G, T, h) -> (P, G, F): those, or
    the frozen main model's last state before it would write."""
    if args.screen_sees == "latents":
        return torch.cat([z.flatten(-2), h.mean(-2)], -1)
    rows = [prompt for prompt in prompts for _ in range(z.shape[1])]
    ids, length = engine.right_pad(rows, main.pad_id, z.device)  # (N, L), (N,)
    place = torch.arange(ids.shape[1], device=z.device)  # (L,)
    hidden = engine.run_body(
        main, False, inputs_embeds=engine.embed(main.table, ids, projection(z).flatten(0, 1)),
        attention_mask=(place <= place[:, None])[None, None],
    )  # (N, L, D)  # fmt: skip
    return hidden[torch.arange(len(ids)), length - 1].float().view(*z.shape[:2], -1)


def prescreen(guess, dice, args):
    """Which K of G latents to decode, guesses of R (P, G) -> (P, K). dice (P, G), uniform, picks a share of them at
    random, so that the value head goes on seeing what it would not have picked."""
    count = decoded(args)
    wild = round(args.explore * count)
    order = guess.argsort(1, descending=True)  # (P, G)
    low = (count - wild) // 2 if args.screen == "spread" else 0
    high = count - wild - low
    best = torch.cat([order[:, :high], order[:, order.shape[1] - low :]], 1)  # (P, K - wild)
    return torch.cat([best, dice.scatter(1, best, -1.0).topk(wild, 1).indices], 1)


# ----------------------------------------------------------------------------------------------------------------------
# 6. Densities and the contrastive loss, all in float32.


def log_density(z, mu, log_std):
    """log pi(z | x) of (1), (…, T, d) -> (…)"""
    numbers = -0.5 * ((z - mu) / log_std.exp()).square() - log_std - 0.5 * math.log(2 * math.pi)
    return numbers.sum((-2, -1))


def gaussian_kl(mu, log_std, ref_mu, ref_log_std):
    """KL(pi || pi_ref) in closed form, (…, T, d) -> (…)"""
    ratio, shift = (log_std - ref_log_std).exp(), (mu - ref_mu) / ref_log_std.exp()
    return (ref_log_std - log_std + 0.5 * (ratio.square() + shift.square() - 1)).sum((-2, -1))


def contrastive(a, scale, b=None):
    """Equation (6), the mean over steps, groups and anchors: a (…, G, T, d). With a second view b, as in SoftCoT++,
    both directions count; the paper's has one view, whose scores are symmetric. Unit vectors make it InfoNCE."""
    a, b = (x.transpose(-3, -2) for x in (a, a if b is None else b))  # (…, T, G, d)
    scores = scale * a @ b.transpose(-1, -2)  # (…, T, G, G)
    own = scores.diagonal(dim1=-2, dim2=-1)  # (…, T, G)
    return ((scores.logsumexp(-1) + scores.logsumexp(-2)) / 2 - own).mean()


def surrogate(log_ratio, advantages, clip):
    """The min of (5) and where clipping acts, (P, K) -> (P, K) twice.

    With eps .2, ratio 1.5 and A = 1 give 1.2; ratio 1.5 and A = -1 give -1.5. Nothing bounds that second branch but
    the log-ratio's own bound, to 148 |A|; without it, at a log-ratio of 100 the gradient is NaN or infinite."""
    ratio = log_ratio.clamp(-5, 5).exp()
    plain, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    return torch.minimum(plain, clipped), clipped < plain


def solution_loss(main, prompts, embeddings, targets, args):
    """Cross-entropies (N,) of target texts, lists of ids, summed over each text, given prompts whose slots hold
    embeddings (N, T, D), which the gradient reaches through the frozen main model."""
    device = embeddings.device
    ids, _ = engine.right_pad([p + t for p, t in zip(prompts, targets, strict=True)], main.pad_id, device)  # (N, L)
    place = torch.arange(ids.shape[1], device=device)  # (L,)
    hidden = engine.run_body(
        main, args.gradient_checkpointing, inputs_embeds=engine.embed(main.table, ids, embeddings),
        attention_mask=(place <= place[:, None])[None, None],
    )  # (N, L, D)  # fmt: skip
    begin = torch.tensor([len(prompt) for prompt in prompts], device=device)[:, None]  # (N, 1)
    end = begin + torch.tensor([len(target) for target in targets], device=device)[:, None]  # (N, 1)
    learnt = (place >= begin) & (place < end)  # (N, L)
    log_p = engine.candidate_log_probs(main, hidden[:, :-1][learnt[:, 1:]], ids[learnt][:, None], 1.0)  # (M, 1)
    return log_p.new_zeros(len(ids)).index_add(0, learnt.nonzero()[:, 0], -log_p[:, 0])


# ----------------------------------------------------------------------------------------------------------------------
# 7. Update.


@dataclass
class Batch:
    """What was rolled out, of this process's prompts."""

    asked: list  # P prompts of the assistant, list of ids
    prompts: list  # P prompts of the main model
    eps: torch.Tensor  # (P, G, T, d) noise
    z: torch.Tensor  # (P, G, T, d) latents
    chosen: torch.Tensor  # (P, K) numbers of those that were decoded
    rewards: torch.Tensor  # (P, K)
    advantages: torch.Tensor  # (P, K)
    seen: torch.Tensor  # (P, K, F) by the value head; F = 0 without one
    right: list  # per prompt, (its place in the group, ids) of the first right text, or None; for the postfilter

    def part(self, rows):
        """The batch of some prompts (p,)."""
        asked, prompts, right = ([x[i] for i in rows.tolist()] for x in (self.asked, self.prompts, self.right))
        tensors = (x[rows] for x in (self.eps, self.z, self.chosen, self.rewards, self.advantages, self.seen))
        return Batch(asked, prompts, *tensors, right)


def at(x, chosen):
    """x (P, G, …) at chosen (P, K) -> (P, K, …)"""
    return x[torch.arange(len(x), device=x.device)[:, None], chosen]


def losses(main, policy, projection, reference, batch, old, args):
    """Equations (4) to (6) for p prompts -> (loss summed over prompts, log-densities (p, K), numbers (6,) summed)

    The stored z is a constant of the policy gradient. The contrastive loss gets its gradient through mu + sigma eps:
    on constants it has none.
    """
    d = batch.z.shape[-1]
    norm = {"exact": 1, "dim": d, "all": d * batch.z.shape[2]}[args.norm]  # N in (5)
    # (5). The density of the stored action under the present policy; in the first pass over a batch that is pi_old.
    mu, log_std, _ = policy(batch.asked, batch.z.shape[1], batch.z)
    log_prob = at(log_density(batch.z, mu, log_std), batch.chosen)  # (p, K)
    old = log_prob.detach() if old is None else old
    gain, clipped = surrogate((log_prob - old) / norm, batch.advantages, args.clip)  # (p, K)
    # (6) on all G, decoded or not: it needs no reward.
    fresh = mu + log_std.exp() * batch.eps  # (p, G, T, d)
    apart = contrastive(fresh, 1 / (args.sigma**2 * d)) * len(mu)
    # (4), and the KL of (5).
    loss, kl = args.contrast * apart - gain.mean(1).sum(), torch.zeros_like(apart)
    if args.kl_coef:
        with torch.no_grad():
            ref_mu, ref_log_std, _ = reference(batch.asked, batch.z.shape[1], batch.z)
        kl = at(gaussian_kl(mu, log_std, ref_mu, ref_log_std), batch.chosen).mean(1).sum() / norm
        loss = loss + args.kl_coef * kl
    guess = torch.zeros_like(apart)
    if args.filter == "prescreen":
        guess = (policy.value(batch.seen)[..., 0] - batch.rewards).square().mean(1).sum()
        loss = loss + guess  # `seen` is a constant: this reaches the value head and nothing else
    rows = [i for i, right in enumerate(batch.right) if right]
    if args.filter == "postfilter" and rows:
        latents = torch.stack([fresh[i, batch.right[i][0]] for i in rows])  # (n, T, d)
        targets = [batch.right[i][1] for i in rows]
        entropies = solution_loss(main, [batch.prompts[i] for i in rows], projection(latents), targets, args)  # (n,)
        loss = loss + args.imitate * (entropies / entropies.new_tensor([len(ids) for ids in targets])).sum()
    numbers = torch.stack([clipped.float().mean(1).sum(), kl, apart, guess, log_std.exp().mean((1, 2, 3)).sum(),
                           mu.square().mean((1, 2, 3)).sum()])  # fmt: skip
    return loss, log_prob.detach(), numbers.detach()


def apply_gradient(policy, projection, optimizer, args):
    """One optimiser step after clipping -> gradient norms: of queries, norm and heads (in the warm-up with the
    projection), of the assistant, of the value head, which is not clipped. UserError, before the step, when one is not
    finite."""
    for module in (policy, projection):
        engine.reduce_gradients(module)
    bounds = args.grad_clip, args.grad_clip, math.inf
    groups = zip(optimizer.param_groups, bounds, strict=False)
    norms = [torch.nn.utils.clip_grad_norm_(group["params"], bound).item() for group, bound in groups]
    if not all(map(math.isfinite, norms)):
        raise UserError("the gradient is not finite and was not applied; the run is saved: --resume it, "
                        "with a lower --lr, and it goes on with the next batch")  # fmt: skip
    optimizer.step()
    return norms


def update(main, policy, projection, reference, optimizer, batch, args):
    """`updates_per_batch` optimiser steps on one batch -> metrics"""
    count = int(engine.all_reduce(torch.tensor(len(batch.asked))))  # prompts of all processes
    old, sums = {}, torch.zeros(6, device=args.device)
    for _ in range(args.updates_per_batch):
        optimizer.zero_grad()
        for i, rows in enumerate(torch.arange(len(batch.asked), device=args.device).split(args.micro_batch)):
            loss, log_prob, numbers = losses(main, policy, projection, reference, batch.part(rows), old.get(i), args)
            old.setdefault(i, log_prob)
            (loss / count).backward()
            sums += numbers
        norms = apply_gradient(policy, projection, optimizer, args)
    clipped, kl, apart, guess, sigma, mu_rms = (engine.all_reduce(sums) / count / args.updates_per_batch).tolist()
    metrics = {"grad_norm": norms[0], "grad_norm_assistant": norms[1], "clipped": clipped, "kl": kl}
    metrics |= {"contrastive": apart, "sigma": sigma, "mu_rms": math.sqrt(mu_rms)}
    if args.filter == "prescreen":
        moments = torch.stack([batch.rewards.mean(1).sum(), batch.rewards.square().mean(1).sum()])
        first, second = (engine.all_reduce(moments) / count).tolist()
        metrics["explained"] = 1 - guess / (second - first**2) if second > first**2 else None
    return metrics


# ----------------------------------------------------------------------------------------------------------------------
# 8. Evaluation: the mean latent of each prompt, the same with latents that carry less, and sampled ones with a vote.
#    Always on the same held-out problems and with its own noise.


def noise(count, group_size, args, generator):
    """eps (P, G, T, d) for the prompts of all processes: a prompt's luck does not depend on who computes it."""
    shape = count, group_size, args.latent_steps, args.latent_dim
    return torch.randn(shape, generator=generator, device=args.device)


def asked_of(policy, problems, args):
    """The assistant's prompts."""
    return [encode_with_slots(policy.lm.tokenizer, problem, args.latent_steps, whole=False) for problem in problems]


def right_note(main, problems, args):
    """The built-in task's oracle: the note that fits each problem, as embeddings (P, 1, T, D)."""
    notes = [" mind+" if "+" in problem.question else " mind-" for problem in problems]
    ids = torch.tensor([main.tokenizer.encode(note) for note in notes], device=args.device)  # (P, 1)
    return F.embedding(ids[:, :, None].expand(-1, -1, args.latent_steps), main.table)


def vote(answers):
    """The most frequent answer, the earliest of equals; None where nobody has one. Numbers count as numbers."""
    numbers = [engine.to_number(answer) if answer is not None else None for answer in answers]
    keys = [a if n is None else n for a, n in zip(answers, numbers, strict=True)]
    counts = Counter(key for key in keys if key is not None)
    return answers[keys.index(counts.most_common(1)[0][0])] if counts else None


@torch.no_grad()
def evaluate(main, policy, projection, held_out, args, full):
    """held_out: (problems, prompts). `full` adds all but the mean latent. -> dict of shares of right answers

    zeroed, averaged and swapped show what a prompt's own latents are worth: all zero, the mean of all prompts', and
    another prompt's. no_latents is the frozen main model alone. Means are those of the first of several starts.
    """
    own = engine.share(len(held_out[0]))
    problems, prompts = held_out[0][own], held_out[1][own]
    size = max(1, args.prompts_per_step * decoded(args))  # rows of a training rollout: what fits there fits here

    def run(name, z, prompts=prompts, embed=projection):
        """Latents (P, K, T, d) -> right, formed (P, K), length (P * K,), answers"""
        parts, count = [], max(1, size // z.shape[1])  # prompts at once
        for i in engine.progress(range(0, len(problems), count), desc=f"evaluating: {name}", leave=False):
            part = slice(i, i + count)
            said = decode(main, prompts[part], embed(z[part]), args)
            lengths = torch.tensor([len(ids) for ids in said.ids], dtype=torch.float)
            correct, form, answers = rewards_of(said, problems[part], args)
            parts.append(((correct > 0).float(), (form > 0).float(), lengths, answers))
        if not parts:  # another process has all problems
            return torch.zeros(0, z.shape[1]), *torch.zeros(2, 0), []
        correct, form, lengths = (torch.cat(column) for column in list(zip(*parts, strict=True))[:3])
        return correct, form, lengths, [answer for part in parts for answer in part[3]]

    asked = asked_of(policy, held_out[0], args)
    zero = torch.zeros(len(asked), 1, args.latent_steps, args.latent_dim, device=args.device)
    # Means for the problems of all processes: another prompt's may be another process's.
    means = torch.cat([policy.sample(asked[i : i + size], zero[i : i + size])[0] for i in range(0, len(asked), size)])
    correct, form, lengths, _ = run("mean latent", means[own])
    result = {"greedy": engine.mean(correct), "form": engine.mean(form), "length": engine.mean(lengths)}
    if not full:
        return result
    k = args.eval_samples
    eps, mine = noise(len(asked), k, args, torch.Generator(args.device).manual_seed(12345))[own], asked[own]
    count = max(1, size // k)
    drawn = [policy.sample(mine[i : i + count], eps[i : i + count])[0] for i in range(0, len(mine), count)]
    correct, _, _, answers = run("sampled", torch.cat([eps[:0], *drawn]))
    votes = [vote(answers[i * k : i * k + k]) for i in range(len(problems))]
    agreed = [v is not None and engine.answers_equal(v, p.answer) for v, p in zip(votes, problems, strict=True)]
    passed = [engine.pass_at_k(k, int(c), k) for c in correct.sum(1)]
    result |= {"sampled": engine.mean(correct), f"majority@{k}": engine.mean(torch.tensor(agreed, dtype=torch.float))}
    result |= {f"pass@{k}": engine.mean(torch.tensor(passed))}
    bare = [[token for token in prompt if token != SLOT] for prompt in prompts]
    controls = {
        "no_latents": (means[own][:, :, :0], bare),
        "zeroed": (means[own], prompts, lambda z: projection(z) * 0),
        "averaged": (means.mean(0, keepdim=True).expand_as(means)[own],),
        "swapped": (means.roll(1, 0)[own],),
    }
    if engine.is_tiny(args.model):
        controls["right_note"] = right_note(main, problems, args), prompts, lambda embeddings: embeddings
    return result | {name: engine.mean(run(name, *given)[0]) for name, given in controls.items()}


def describe(main, projection, problem, latents, text, verdict):
    """A rollout that a person can read: of each latent (T, d) the words that it mixes, or, where it is no mixture, the
    words nearest to it by their cosine. -> str"""
    if projection.kind == "words":
        shares = projection.mixture(latents)  # (T, V)
    else:
        shares = F.normalize(projection(latents), dim=-1) @ projection.table.T / projection.table.norm(dim=-1)  # (T, V)
    lines = [f"    {problem.question}"]
    for t, row in enumerate(shares):
        best = zip(*(x.tolist() for x in row.topk(4)), strict=True)
        words = "  ".join(f"{main.tokenizer.decode([i])!r} {w:.2f}" for w, i in best if w >= 0.005)
        lines.append(f"    latent {t + 1:2d}  {words}")
    return "\n".join([*lines, f"    text       {text.strip()!r}", f"    {verdict}, the answer is {problem.answer}"])


# ----------------------------------------------------------------------------------------------------------------------
# 9. The two kinds of step, and main.


def right_solution(problem):
    """A solution with the right answer, as the main model should write it; None where the data has none.

    The built-in task's comes from a student who forgets nothing; GSM8K's is its own, without the annotations.
    """
    if problem.form == "think":
        return tiny.demonstration(None, *tiny.read_chain(problem.question), mindful="+-").removesuffix("<eos>")
    thought = re.sub(r"<<[^<>]*>>", "", problem.solution.rsplit("####", 1)[0]).strip()
    return f"<think>{thought}</think><answer>{problem.answer}</answer>" if thought != problem.answer else None


def take(stream, state, count, main, args):
    """The next problems and the main model's prompts; advances the position in `state`."""
    problems, prompts, state["position"] = engine.take(
        stream, state["position"], count, main.tokenizer, args.max_prompt_tokens, args.latent_steps,
        encode=encode_with_slots,
    )  # fmt: skip
    return problems, prompts


def sft_step(main, policy, projection, optimizer, stream, state, args, generator):
    """An update of the warm-up: right solutions become likelier under latents that are drawn anew -> (row, sample)"""
    step = state["step"]
    problems, prompts = take(stream, state, args.sft_batch, main, args)
    eps = noise(len(problems), 1, args, generator)
    own = [i for i in range(len(problems))[engine.share(len(problems))] if right_solution(problems[i])]
    encode = main.tokenizer.encode
    # The token with which this model ends an answer: after a chat template, <|im_end|> and not <|endoftext|>.
    end = main.stop_ids[0] if main.tokenizer.eos_token_id is None else main.tokenizer.eos_token_id
    targets = {i: [*encode(right_solution(problems[i]), add_special_tokens=False), end] for i in own}
    words = int(engine.all_reduce(torch.tensor(sum(map(len, targets.values())))))
    if not words:
        raise UserError("the warm-up needs solutions and this data has none: --sft_steps 0")
    optimizer.zero_grad()
    total = torch.zeros((), device=args.device)
    for i in range(0, len(own), args.micro_batch):
        rows = own[i : i + args.micro_batch]
        z = policy.sample(asked_of(policy, [problems[j] for j in rows], args), eps[rows])[0]  # (n, 1, T, d)
        given = [prompts[j] for j in rows], projection(z[:, 0]), [targets[j] for j in rows]
        loss = solution_loss(main, *given, args).sum()
        (loss / words).backward()
        total += loss.detach()
    state["step"] = step + 1
    norms = apply_gradient(policy, projection, optimizer, args)
    row = {"step": step, "cross_entropy": engine.all_reduce(total).item() / words}
    return row | {"grad_norm": norms[0], "grad_norm_assistant": norms[1], "lr": args.sft_lr}, ""


def learning_rate(step, args):
    """The share of the peak: linear warm-up, then cosine towards 0 after the last step."""
    if step < args.warmup:
        return (step + 1) / args.warmup
    return 0.5 * (1 + math.cos(math.pi * (step - args.warmup) / max(1, args.steps - args.warmup)))


def rl_step(main, policy, projection, reference, optimizer, stream, state, args, generator):
    """One round of sections 3 to 7 -> (log row, readable sample); advances `state`."""
    step, scale = state["step"], learning_rate(state["step"], args)
    problems, prompts = take(stream, state, args.prompts_per_step, main, args)
    if len(problems) < engine.process()[1]:
        raise UserError(f"only {len(problems)} problems fit, and each process needs one: start fewer processes")
    eps = noise(len(problems), args.group_size, args, generator)
    dice = torch.rand(eps.shape[:2], generator=generator, device=args.device)
    own = engine.share(len(problems))
    problems, prompts, eps = problems[own], prompts[own], eps[own]
    asked = asked_of(policy, problems, args)
    with torch.no_grad():  # (1), what of it is decoded, and (2)
        z, _, _, h = policy.sample(asked, eps)  # (P, G, T, d), (P, G, T, h)
        chosen = torch.arange(args.group_size, device=args.device).expand(len(problems), -1)  # (P, K)
        seen = z.new_zeros(*z.shape[:2], 0)  # (P, G, F)
        if args.filter == "prescreen":
            seen = evidence(main, projection, prompts, z, h, args)
            chosen = prescreen(policy.value(seen)[..., 0], dice[own], args)
        said = decode(main, prompts, projection(at(z, chosen)), args)
    # (3). Groups of equal rewards get advantages of 0: the surrogate learns nothing from them.
    correct, form, _ = rewards_of(said, problems, args)  # (P, K) twice, on the CPU
    rewards = correct + args.format_weight * form  # (P, K)
    advantages = group_advantages(rewards)  # (P, K)
    first = correct.argmax(1).tolist()  # of each group, the first that is right, if one is
    right = [(j, said.ids[i * correct.shape[1] + j]) if correct[i, j] > 0 else None for i, j in enumerate(first)]
    device = args.device
    rewarded = rewards.to(device), advantages.to(device), at(seen, chosen), right
    batch = Batch(asked, prompts, eps, z, chosen, *rewarded)
    # What it has cost, in rows through a model: the budget at which methods are compared.
    passes = {"parallel": args.starts, "autoregressive": args.group_size * args.latent_steps, "prompt": 0}
    cost = torch.tensor([len(said.ids), sum(map(len, said.ids)), len(asked) * passes[args.policy]])
    for name, number in zip(("main_decodes", "main_tokens", "assistant_passes"), engine.all_reduce(cost), strict=True):
        state[name] += int(number)
    for group, peak in zip(optimizer.param_groups, (args.lr, args.lr_assistant, args.lr_value), strict=False):
        group["lr"] = peak * scale
    state["step"] = step + 1  # before the update: one that fails is not tried again
    sample = ""
    if args.show_every and step % args.show_every == 0:  # the largest advantage: a rare success
        n = int(advantages.flatten().argmax())
        p, latents = n // chosen.shape[1], z[n // chosen.shape[1], chosen.flatten()[n]]  # (T, d)
        verdict = f"reward {rewards.flatten()[n]:.1f}"
        sample = describe(main, projection, problems[p], latents, said.texts[n], verdict)
    lengths = torch.tensor([len(ids) for ids in said.ids], dtype=torch.float)
    row = {
        "step": step,
        "reward": engine.mean((correct > 0).float()),
        "form": engine.mean((form > 0).float()),
        "length": engine.mean(lengths),
        "stopped": engine.mean(torch.tensor(said.stopped, dtype=torch.float)),
        "zero_advantage": engine.mean((advantages == 0).float()),
        "mixed_groups": engine.mean((correct.amax(1) > correct.amin(1)).float()),
        "lr": args.lr * scale,
        **update(main, policy, projection, reference, optimizer, batch, args),
        **{name: state[name] for name in ("main_decodes", "main_tokens", "assistant_passes")},
    }
    return row, sample


def line(row, seconds):
    """What is printed of a step."""
    formats = {
        "reward": ".3f", "form": ".3f", "length": ".1f", "zero_advantage": ".2f", "sigma": ".2f", "mu_rms": ".2f",
        "kl": ".3f", "contrastive": ".3f", "explained": ".2f", "cross_entropy": ".4f", "grad_norm": ".3f",
        "main_decodes": "d", "greedy": ".3f",
    }  # fmt: skip
    shown = "  ".join(f"{name} {row[name]:{how}}" for name, how in formats.items() if row.get(name) is not None)
    return f"step {row['step']:4d}  {shown}  {seconds:.2f} s"


def train(end, take_step, test, run, state, args, description):
    """Steps of one stage until its end or an interrupt. -> True when the stage is over"""
    for _ in run.steps(end, args.save_every, description):
        began = time.time()
        with run.attempt(undo=args.updates_per_batch == 1):
            row, sample = take_step()
        seconds, done = time.time() - began, state["step"]
        if args.eval_every and done % args.eval_every == 0 and 0 < done < end:
            row["greedy"] = test(full=False)["greedy"]
        run.write(row, {"step": row["step"], "seconds": seconds})
        if sample:
            tqdm.write(sample)
        tqdm.write(line(row, seconds))
    return state["step"] >= end and not (run.interrupted and end < args.steps)


def make_optimizer(policy, projection, args):
    """AdamW over what is theta, phi and, for the pre-screen, the value head: three groups, each with its own rate."""
    heads = [w for name, w in policy.named_parameters() if not name.startswith(("assistant.", "value."))]
    groups = [[*heads, *projection.parameters()], list(policy.assistant.parameters())]
    groups += [list(policy.value.parameters())] if args.filter == "prescreen" else []
    groups = [{"params": weights} for weights in groups]
    return torch.optim.AdamW(groups, lr=args.sft_lr, betas=(0.9, 0.999), weight_decay=args.weight_decay, fused=True)


def fingerprint(model):
    """SHA-256 over all tensors of a model, to the bit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def run_controls(args, result, folder):
    """Train and print what a result of this method has to be held against: one learned prompt for all problems; no
    filter, but only as many samples as the pre-screen decodes; GRPO on the main model itself, which decodes as often
    (with no reward for the form; on GSM8K it is asked for \\boxed{}). Those that are done already are not run again.
    """
    def flags(names):  # fmt: skip
        given = {name: getattr(args, name) for name in names} | {"ops": "-".join(map(str, args.ops))}
        given = [x for name, value in given.items() if value is not None for x in (f"--{name}", str(value))]
        return given + ["--gradient_checkpointing"] * args.gradient_checkpointing

    same = flags(sorted(vars(args).keys() - {"controls", "out", "resume", "gradient_checkpointing"}))
    few = max(2, round(args.share * args.group_size))
    shared = ["model", "data", "kind", "seed", "device", "eval_problems", "eval_samples", "eval_every",
              "max_new_tokens", "prompts_per_step"]  # fmt: skip
    shared = [x for name in shared for x in (f"--{name}", str(getattr(args, name)))]
    updates = round(result["main_decodes"] / (args.prompts_per_step * 8))
    commands = {
        "one_prompt": ["dlr.py", *same, "--policy", "prompt"],
        f"plain_{few}": ["dlr.py", *same, "--filter", "all", "--group_size", str(few)],
        "grpo": ["lepo.py", *shared, "--latent_steps", "0", "--group_size", "8", "--steps", str(updates)],
    }
    rows = {"this run": result}
    for name, (script, *given) in commands.items():
        path = folder / name
        if not (path / "result.json").exists():
            begun = any(path.glob("checkpoint.*"))
            command = [script, "--resume", path] if begun else [script, *given, "--out", path]
            print("control:", "python", *command, flush=True)
            # Not subprocess.run: after Ctrl-C that would kill the control before it has saved itself.
            with subprocess.Popen([sys.executable, engine.HERE / command[0], *command[1:]]) as control:
                pass
            if control.returncode:
                raise UserError(f"the control {name} ended with code {control.returncode}; "
                                f"--resume {folder} --controls goes on with it")  # fmt: skip
        rows[name] = json.loads((path / "result.json").read_text())
    rows["grpo"]["main_decodes"] = updates * args.prompts_per_step * 8
    print(f"{'':<12}  greedy  sampled  main decodes")
    for name, row in rows.items():
        print(f"{name:<12}  {row['greedy']:6.3f}  {row['sampled']:7.3f}  {row['main_decodes']:12,}")
    for name in ("no_latents", "zeroed", "averaged", "swapped", "greedy_untrained"):
        print(f"{name:<12}  {result[name]:6.3f}".replace("greedy_", ""))


def load(args):
    """-> frozen main model, policy, projection, and where there is a KL a copy of the policy, its pi_start"""
    main_lm = engine.load_model(args.model, args.device)
    main_lm.model.requires_grad_(False)
    assistant = engine.load_model(args.assistant, args.device)
    if args.projection == "identity":
        args.latent_dim = main_lm.table.shape[1]
    torch.manual_seed(args.seed)  # of the new weights
    policy, projection = LatentPolicy(assistant, main_lm, args), Projection(main_lm, args)
    reference = copy.deepcopy(policy).requires_grad_(False) if args.kl_coef else None
    return main_lm, policy, projection, reference


def say(name, scores):
    print(f"{name:<8}" + "  ".join(f"{key} {value:.3f}" for key, value in scores.items()), flush=True)


def conclude(args, state, after, seconds, folder):
    """Say what warm-up and RL have given each -> result, as it is in result.json"""
    say("after", after)
    start, warm, end = (scores["greedy"] for scores in (state["untrained"], state["before"], after))
    print(f"the warm-up gave {warm - start:+.3f}, RL {end - warm:+.3f}; the main model is unchanged, to the bit")
    result = {"method": "dlr", "model": args.model, "seed": args.seed, "steps": args.steps}
    result |= {"seconds": seconds, "main_unchanged": True}
    result |= {name: state[name] for name in ("main_decodes", "main_tokens", "assistant_passes")} | after
    result |= {f"{key}_before": value for key, value in state["before"].items()} | {"greedy_untrained": start}
    result = {key: round(value, 4) if isinstance(value, float) else value for key, value in result.items()}
    (folder / "result.json").write_text(json.dumps(result | {"args": state["args"]}) + "\n")
    return result


def run(args, state):
    """Load, evaluate, warm up, train, evaluate -> (result, run folder); no result where it was stopped, and in all
    processes but the first."""
    began = time.time()
    number, processes = engine.process()
    main_lm, policy, projection, reference = load(args)
    whole = torch.nn.ModuleDict({"policy": policy, "projection": projection})
    if reference:
        whole["reference"] = reference  # saved, too: after a warm-up it is not what the seed gives
    generator = torch.Generator(args.device).manual_seed(args.seed)
    steps = args.steps or args.sft_steps
    stream = engine.load_problems(args.data, "train", args.seed, tuple(args.ops), args.kind) if steps else None
    test_set = engine.load_problems(args.eval_data or args.data, "test", 0, tuple(args.ops), args.kind)
    held_out = take(test_set, {"position": 0}, args.eval_problems, main_lm, args)

    name = f"dlr-{engine.Path(args.model).name}-seed{args.seed}"
    folder = engine.Path(args.resume) if args.resume else engine.open_run(args.out, name) if number == 0 else None
    sizes = [f"{sum(p.numel() for p in module.parameters()):,}" for module in (main_lm.model, policy)]
    devices = f"{processes} x {args.device}" if processes > 1 else args.device
    print(f"{args.model}: {sizes[0]} frozen parameters, {args.assistant}: {sizes[1]} trained, on {devices}")
    print(f"run folder {folder}")

    def test(full=True):
        return evaluate(main_lm, policy, projection, held_out, args, full)

    stages = {"warm-up": 0, "training": args.steps}  # name: its last step
    saved = state and state["stage"]
    if state:
        began -= state["seconds"]
        print(f"resuming {state['stage']} at step {state['step']} of {args.steps}")
        if fingerprint(main_lm.model) != state["main_sha256"]:
            raise UserError(f"{args.model} is not the main model that this run began with: its weights differ")
    else:
        state = {"step": -args.sft_steps, "position": 0, "main_decodes": 0, "main_tokens": 0, "assistant_passes": 0}
        state |= {"main_sha256": fingerprint(main_lm.model), "untrained": test()}
        say("before", state["untrained"])
    state["args"] = vars(args) | {"resume": None, "out": None, "controls": False}
    for stage, end in stages.items():
        warming = stage == "warm-up"
        if warming and (saved == "training" or not saved and not args.sft_steps):
            continue
        projection.requires_grad_(warming)
        optimizer = make_optimizer(policy, projection, args)  # a new one for RL: the warm-up's moments are not RL's
        if saved == stage:
            engine.load_checkpoint(f"{args.resume}/checkpoint.safetensors", whole, optimizer, generator)
        elif not warming:
            if reference:
                reference.load_state_dict(policy.state_dict())  # pi_start is what the warm-up leaves
            state["before"] = test() if state["step"] + args.sft_steps else state["untrained"]
            if args.sft_steps:
                say("warm", state["before"])
        state["stage"] = stage

        def take_step(warming=warming, optimizer=optimizer):
            if warming:
                return sft_step(main_lm, policy, projection, optimizer, stream, state, args, generator)
            return rl_step(main_lm, policy, projection, reference, optimizer, stream, state, args, generator)

        with engine.Run(folder, whole, optimizer, generator, state, began) as this:
            if not train(end, take_step, test, this, state, args, stage):
                print(f"stopped at step {state['step']}; continue with: python dlr.py --resume {folder}")
                return None, folder
    after = test() if state["step"] else state["before"]
    if fingerprint(main_lm.model) != state["main_sha256"]:
        raise RuntimeError("the frozen main model has changed")
    if number:
        return {}, folder
    return conclude(args, state, after, time.time() - began, folder), folder


def main(argv=None):
    args, state = parse_args(argv)
    engine.start_processes(args.device)
    result, folder = run(args, state)
    if result is None:
        return 130
    if args.controls:
        if args.device == "cuda":
            torch.cuda.empty_cache()  # the controls need the memory that this run has left
        run_controls(args, result, folder)
    if result:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    engine.run_main(main)
