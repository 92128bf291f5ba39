r"""Latent-GRPO (arXiv 2604.27998), end to end in one file: latent SFT initialisation, then RL.

    python latent_grpo.py                                    # RL of the tiny latent model, on a laptop CPU
    python latent_grpo.py --model tiny                       # both stages, from the tiny model that thinks in words
    python latent_grpo.py --model Qwen2.5-0.5B --data gsm8k  # both stages, one GPU
    torchrun --nproc_per_node=8 latent_grpo.py --model Qwen2.5-0.5B --data gsm8k     # eight
    python latent_grpo.py --model Qwen2.5-0.5B --data gsm8k --preset gsm8k    # the official settings of stage 2

lepo.py takes a model as it is and mixes the tokens that it would write anyhow. Latent-GRPO first teaches the model to
think in mixtures that stand for several words each (stage 1, "latent SFT"), so that a thought is a few steps long, and
to leave its thought by itself. Then RL improves the thoughts (stage 2), with three fixes for what goes wrong there.

Stage 2. Step t has seen the prompt and the embeddings e_<t; l = log softmax(logits), over the whole vocabulary.

  (1)  scores:     s_k = l_k + xi_k,  xi = scale * (clip(g_k, -1.5, 3) + 1.5 + delta),  g_k ~ Gumbel(0, 1) iid
  (2)  latent:     the K largest s_k within the nucleus of l;  w = softmax(s / tau) over these;  e_t = sum_k w_k E[k]
       The thought ends at the first step whose heaviest candidate is the exit token, `</think>`: that step and all
       later ones are written words, one id with weight 1, drawn from softmax(logits / T).
  (3)  reward:     r_i = 1 if the verifier accepts what was written, else 0
  (4)  advantage:  A_i = (r_i - mean r) / (std r + 1e-6) over the rollouts of the group that ended before the cap; 0 for
       the overlong others. Fix 1, invalid-sample masking. And fix 3, first-token selection: of the right rollouts
       only the likeliest one keeps A_i at the first step (`stepwise_advantages`).
  (5)  log-probability of a step: of a written word as usual; of a latent the surrogate
       L = sum_k c_k f(d_k),  margin d_k = s_k - l_k(theta),  f(d) = -d - exp(-d),  c_k = 1/K
       f is the log-density of Gumbel(0, 1). Its slope in l_k is 1 - exp(-d). Fix 2, one-sided noise: the "+ 1.5" of (1)
       shifts all scores alike, so it changes no mixture and no rollout, only what is stored; but it keeps d >= 0, and a
       rollout with A > 0 then raises all of its candidates and one with A < 0 lowers them. Without it a third of the
       candidates are pushed the wrong way round.
  (6)  objective:  rho_t = exp(L_t(theta) - L_t(theta_old)), per step and for both kinds of step,
       J = mean over steps of min(rho A, clip(rho, 1-eps, 1+eps) A), not under c A where A < 0, minus beta k3,
       k3 = exp(r) - r - 1,  r = L_t(start) - L_t(theta)
       Embeddings and head are frozen, and mixtures are constants: nothing flows back through a thought's inputs.

Stage 1. Every worked solution becomes a thought of n latents, each with K candidates and weights w, and an answer.

  (7)  labels:     `chunk`, cheap: a latent is the superposition of its chunk's tokens, weighted by their frequency.
                   `encoder`, the paper's: an encoder writes the latents so that a decoder which sees only them can
                   tell the next chunk and the answer (`Autoencoder`, `induction_mask`, `supervision_mask`).
                   Learnt in another way than in the paper, and behind `chunk` on the tiny model: README, stage 1.
  (8)  noise:      w' = softmax((log w + clip(scale * g, -1.5, 3)) / tau), two-sided, as input and as target
  (9)  loss:       cross-entropy of `</think>`, answer and end  +  mean over latents of KL(w' || softmax(logits))

Where paper, official code (github.com/DJC-GO-SOLO/Latent-GRPO, a fork of verl and SGLang; stage 1 in Latent-SFT) and
this file differ. `--preset gsm8k` and `--preset math` set what the code's two scripts set; the defaults are what works
best on the built-in task, measured in README:
  - c_k in (5). Published: 1/K. One-sided, each candidate then gets nearly the same push, .8 to 1 of it, whatever its
    weight: A > 0 flattens the policy, A < 0 drives mass off the candidates, and only little is left that tells a good
    mixture from a bad one. Default: c_k = w_k, the executed weights. The push of a draw is then nearly w - pi, LEPO's
    soft label, and almost none of it is common to all draws. test_latent_grpo.py measures both.
  - Noise: scale 1 there; .5 here. delta is above 0 in the paper and 0 in the code and here.
  - Masking (4): the paper's is `--overlong exclude`; the GSM8K script computes mean and std with the overlong rollouts
    and zeroes their advantages afterwards (`include`). Default: `off`. A masked rollout is not punished for never
    ending, so once thoughts begin not to end, nothing pushes back.
  - First-token selection (4): in the paper the other right rollouts lose their first step, in the code the wrong ones
    too. Default: off.
  - The flip: where A <= 0 and d < 0, which takes several updates per batch, the code means to turn the slope of (5)
    round and does not (`latent_log_prob`). All three are here; default off.
  - Exit token: 524 in the code's sampler, which is Llama's `</`, so that its rule "no noise where the exit is the
    likeliest" never acts for Qwen, whose `</` is 522. Here it is the first token of `--exit_text`.
  - Written words: in the code the noisy top-1 of (1) in training, scored at temperature .6. Here drawn at the
    temperature at which they are scored; `--answers noisy` is the code's.
  - What the verifier reads: there all steps, of latents the heaviest candidates, so that an answer which is only
    thought counts. Here what is written after the exit.
  - Mean in (6): there over a micro-batch of one or two rollouts and then over those; here over all steps of the batch.
    `--loss_mean rollouts` is the micro-batch of one.
  - Updates: `--minibatches` 4 in the GSM8K script. Old log-probabilities are the training model's in both.
  - Stage 1 there trains LoRA adapters, on labels stored once. Here all weights but the embeddings, on labels made as
    they are needed, with the teacher's noise growing from 0. Encoder and decoder learn together, from a hint that fades
    and under noise that grows; there in turns and without either (`label_step`). The encoder reads latents off its
    output head; the code multiplies with the input table, which is the same where the two are tied and means nothing
    where they are not.
"""

import copy
import itertools
import json
import math
import os
import re
import time
from dataclasses import replace

import torch
from tqdm import tqdm

import engine
from engine import SoftToken, UserError

# ----------------------------------------------------------------------------------------------------------------------
# 1.-2. Arguments.

TINY = dict(
    data="tiny", exit_text=" </think>", chunk=[6], label_steps=300, label_lr=1e-3, sft_steps=1800, sft_lr=2e-3,
    sft_batch=128, sft_warmup=30, steps=300, prompts_per_step=32, max_new_tokens=16, lr=3e-4, micro_batch=64,
    eval_problems=512, show_every=50, save_every=50, ablate=16,
)  # fmt: skip

# What the two released scripts set for stage 2 (GSM8K with Llama-3.2-1B; mathematics with Qwen2.5-Math-7B). Not in it:
# stage 1, the number of steps (10 and 5 epochs) and the layout of prompts. Flags beside --preset replace its values.
OFFICIAL = dict(
    noise="one_sided", noise_scale=1.0, delta=0.0, tau=1.0, top_k=10, top_p=0.95, exit_guard="on", surrogate="mean",
    flip="code", first_token="code", answers="noisy", temperature=0.6, verifier_reads="all", loss_mean="rollouts",
    clip=0.2, dual_clip=3.0, group_size=8, max_draws=50, lr=1e-6, schedule="constant", warmup=0, weight_decay=0.01,
    grad_clip=1.0, collapse=0.0, eval_every=10, save_every=40,
)  # fmt: skip
PRESETS = {
    "gsm8k": OFFICIAL | dict(overlong="include", prompts_per_step=64, minibatches=4, max_prompt_tokens=192,
                             max_new_tokens=128, kl_coef=0.0),
    "math": OFFICIAL | dict(overlong="exclude", prompts_per_step=32, minibatches=1, max_prompt_tokens=1024,
                            max_new_tokens=4096, kl_coef=0.001, exit_guard="off"),  # the guard looks for Llama's token
}  # fmt: skip


def operations(text):
    """'2-5' -> [2, 5]"""
    low, _, high = text.partition("-")
    return [int(low), int(high or low)]


def sizes(text):
    """'3,6' -> [3, 6]"""
    return [int(size) for size in text.split(",")]


def build_parser():
    about = "Latent-GRPO: latent SFT initialisation, then RL. The first page of the file explains both."
    parser = engine.Parser(usage="%(prog)s [flags]", description=about)

    def flag(name, default, text, **options):
        tiny_too = f"; tiny: {TINY[name]}" if name in TINY else ""
        options = {"type": type(default)} | options
        group.add_argument(f"--{name}", default=default, help=f"{text} [{default}{tiny_too}]", **options)

    group = parser.add_argument_group("model and data")
    flag("model", "tiny_latent", "tiny_latent, tiny, a local folder, a hub id, or a bare Qwen name")
    flag("data", "gsm8k", "tiny, gsm8k, a .jsonl file, or a folder with train.jsonl and test.jsonl")
    group.add_argument("--eval_data", help="as --data, or math500 [the test split of --data]")
    flag("ops", "2-5", "built-in task: operations per chain, low-high", type=operations)
    flag("kind", "mixed", "built-in task: signs in a chain", choices=["mixed", "plus", "minus", "single"])
    flag("max_prompt_tokens", 512, "problems with longer prompts are passed over")
    group.add_argument("--preset", choices=list(PRESETS), help="the official settings of stage 2, sizes included")

    group = parser.add_argument_group("stage 1, latent SFT")
    flag("sft_steps", 2000, "updates in which the model learns to think in latents; 0: it can do so already")
    flag("labels", "chunk", "what a latent is to be: its chunk's tokens, mixed, or what an encoder makes of them",
         choices=["chunk", "encoder"])  # fmt: skip
    flag("chunk", [8], "tokens per latent; several sizes, such as 3,6: a curriculum", type=sizes)
    flag("label_steps", 2000, "--labels encoder: updates of encoder and decoder before that")
    flag("label_lr", 1e-4, "their peak learning rate")
    flag("sft_batch", 64, "worked solutions per update")
    flag("sft_lr", 1e-4, "peak learning rate of latent SFT; both decay linearly")
    flag("sft_warmup", 50, "steps of linear warm-up of both")
    flag("sft_noise", 1.0, "scale of the Gumbel noise on teacher mixtures at the end of stage 1; it grows from 0")

    group = parser.add_argument_group("latent tokens")
    flag("top_k", 10, "K, candidates of a mixture")
    flag("top_p", 0.95, "mass of the nucleus that noise may lift into a mixture; the K most likely always may")
    flag("tau", 1.0, "Gumbel-Softmax temperature in (2)")
    flag("noise", "one_sided", "xi in (1)", choices=["one_sided", "two_sided", "none"])
    flag("noise_scale", 0.5, "s in (1); 1 in the official code")
    flag("delta", 0.0, "further shift of one-sided noise; above 0 in the paper, 0 in its code")
    flag("think_text", "<think>", "the prompt ends with it, by itself or by this")
    flag("exit_text", "</think>", "its first token, as the heaviest of a mixture, ends the thought")
    flag("exit_guard", "on", "no noise where the exit is the likeliest token: on, off", choices=["on", "off"])
    flag("answers", "categorical", "written tokens in training: drawn at --temperature, or the noisy top-1 of (1)",
         choices=["categorical", "noisy"])  # fmt: skip
    flag("temperature", 1.0, "of the log-probability of written tokens, and of drawing them")
    flag("verifier_reads", "written", "the text that is judged: what is written, or the heaviest candidates of "
         "latents, too", choices=["written", "all"])  # fmt: skip

    group = parser.add_argument_group("objective")
    flag("surrogate", "weighted", "(5): candidates count alike (mean, as published), or by their executed weights",
         choices=["mean", "weighted"])  # fmt: skip
    flag("flip", "off", "gradient of (5) at A <= 0 and negative margin", choices=["code", "intended", "off"])
    flag("first_token", "off", "which rollouts keep their advantage at step 1", choices=["paper", "code", "off"])
    flag("overlong", "off", "rollouts that reach the cap", choices=["exclude", "include", "off"])
    flag("clip", 0.2, "eps in (6)")
    flag("dual_clip", 3.0, "c in (6)")
    flag("kl_coef", 0.0, "beta in (6); above 0 keeps a second model in memory")
    flag("loss_mean", "steps", "average over all steps of the batch, or over a rollout's steps and then over rollouts",
         choices=["steps", "rollouts"])  # fmt: skip

    group = parser.add_argument_group("stage 2, optimisation")
    flag("steps", 300, "batches; 0 only evaluates, after stage 1")
    flag("prompts_per_step", 32, "P, prompts in a batch")
    flag("group_size", 8, "G, rollouts per prompt")
    flag("max_draws", 4, "times P prompts are drawn for P groups with both right and wrong rollouts; 1 takes any group")
    flag("minibatches", 1, "parts of a batch, an optimiser step each; above 1, clipping acts")
    flag("max_new_tokens", 128, "cap on steps, latent ones included")
    flag("lr", 1e-6, "peak learning rate of AdamW")
    flag("schedule", "cosine", "of the learning rate", choices=["cosine", "constant"])
    flag("warmup", 5, "steps of linear warm-up")
    flag("weight_decay", 0.01, "of AdamW, decoupled")
    flag("grad_clip", 1.0, "largest gradient norm")
    flag("micro_batch", 4, "rollouts per backward pass: memory, not results")
    group.add_argument("--gradient_checkpointing", action="store_true", help="less memory in the update, more time")

    group = parser.add_argument_group("evaluation and run")
    flag("eval_problems", 256, "held-out problems; the standard error is 3 points at 256")
    flag("eval_samples", 8, "samples per problem, k of pass@k")
    flag("eval_every", 20, "steps between noise-free evaluations; 0: none between")
    flag("ablate", 0, "rollouts of a step that answer again with ablated latents; takes about a rollout's time")
    flag("collapse", 0.5, "training ends when so few of the last ten steps' rollouts leave the latent phase; 0: never")
    flag("show_every", 10, "steps between printed rollouts; 0: none")
    flag("save_every", 20, "steps between checkpoints; Ctrl-C and SIGTERM save too")
    flag("seed", 0, "of noise and training problems")
    flag("device", "cuda" if torch.cuda.is_available() else "cpu", "cuda: bfloat16 compute; cpu: float32",
         choices=["cuda", "cpu"])  # fmt: skip
    group.add_argument("--out", help="run folder [a new one under runs/]")
    group.add_argument("--resume", metavar="FOLDER", help="continue a run; flags beside it replace saved ones")
    return parser


def is_latent_model(name):
    """A model that this script has saved, which says so in its config: stage 1 is behind it."""
    try:
        return "thinks_in_latents" in json.loads((engine.Path(engine.resolve_model(name)) / "config.json").read_text())
    except (OSError, ValueError):
        return False


def parse_args(argv=None):
    """-> (args, state of the checkpoint to resume or None). Raises UserError on values that cannot work."""
    parser = build_parser()
    first, _ = parser.parse_known_args(argv)
    state = engine.read_checkpoint_state(f"{first.resume}/checkpoint.safetensors") if first.resume else None
    defaults = TINY if engine.is_tiny(first.model) else {}
    defaults = defaults | ({"sft_steps": 0} if is_latent_model(first.model) else {}) | PRESETS.get(first.preset, {})
    parser.set_defaults(**(state["args"] if state else defaults))
    args = parser.parse_args(argv)
    done, begun = (state["step"], state["args"]) if state else (-math.inf, vars(args))
    processes = int(os.environ.get("WORLD_SIZE", 1))  # from torchrun
    at_least_1 = ["prompts_per_step", "micro_batch", "minibatches", "max_draws", "sft_batch", "eval_samples",
                  "eval_problems"]  # fmt: skip
    not_negative = ["steps", "sft_steps", "label_steps", "label_lr", "sft_noise", "noise_scale", "delta", "clip", "lr",
                    "sft_lr", "weight_decay", "kl_coef", "warmup", "sft_warmup", "ablate", "eval_every", "show_every",
                    "save_every"]  # fmt: skip
    fixed = ["model", "labels", "label_steps", "sft_steps"]
    checks = [
        ("sft_steps" in begun, f"{args.resume} holds a run of another script"),
        (not (state and first.preset), "--preset sets the flags of a new run: leave it away beside --resume"),
        *((getattr(args, name) >= 1, f"--{name} must be at least 1") for name in at_least_1),
        *((getattr(args, name) >= 0, f"--{name} cannot be negative") for name in not_negative),
        *((getattr(args, name) == begun.get(name), f"--{name} cannot change in a run") for name in fixed),
        (args.steps >= done, f"this run has done {done} steps: --steps must be at least that"),
        (not (state and args.out), "--resume goes on in its own folder: leave --out away"),
        (args.device == begun["device"], "--device cannot change in a run: each has a random generator of its own"),
        (min(args.prompts_per_step, args.sft_batch) >= processes,
         f"--prompts_per_step and --sft_batch must be at least the number of processes, {processes}"),
        (args.group_size >= 2, "--group_size must be at least 2: an advantage compares rollouts"),
        (args.top_k >= 2, "--top_k must be at least 2: a latent of one candidate is a word"),
        (args.max_new_tokens >= 2, "--max_new_tokens must leave room for a thought and an answer"),
        (min(args.chunk) >= 1, "--chunk must be at least 1"),
        (not args.sft_steps or args.labels == "encoder" or max(args.chunk) <= args.top_k,
         "--chunk must be at most --top_k: a mixture has room for so many tokens"),
        (args.labels == "chunk" or len(args.chunk) == 1, "--labels encoder takes one --chunk size"),
        (args.labels == "chunk" or args.label_steps >= 1, "--labels encoder needs --label_steps"),
        (args.noise != "none" or args.answers != "noisy", "without noise --answers noisy makes all rollouts alike"),
        (args.tau > 0 and args.temperature > 0, "--tau and --temperature must be above 0"),
        (0 < args.top_p <= 1, "--top_p must be in (0, 1]"),
        (args.dual_clip > 1, "--dual_clip must be above 1"),
        (args.grad_clip > 0, "--grad_clip must be above 0"),
        (0 <= args.collapse < 1, "--collapse must be in [0, 1)"),
        (1 <= args.ops[0] <= args.ops[1] <= 8, "--ops must be low-high between 1 and 8, such as 2-5"),
        (args.device == "cpu" or torch.cuda.is_available(), "--device cuda: no GPU found; use --device cpu"),
    ]  # fmt: skip
    for fine, message in checks:
        if not fine:
            raise UserError(message)
    return args, state


# ----------------------------------------------------------------------------------------------------------------------
# 3. The latent token, equations (1) and (2). Scores, and with them the margins of (5), are float32 and taken from the
#    softmax over the whole vocabulary.

CLIP = -1.5, 3.0  # of the Gumbel noise: a and b in (1)


def gumbel_noise(shape, generator, device):
    """-log Exp(1) is Gumbel(0, 1). Some platforms can draw an exact 0 here, which would become infinite noise."""
    exponential = torch.empty(shape, device=device).exponential_(generator=generator)
    return -exponential.clamp_(min=torch.finfo(torch.float32).tiny).log()


def latent_noise(gumbel, args):
    """xi of (1): Gumbel(0, 1) noise, any shape -> the noise on log-probabilities, the same shape.

    One- and two-sided noise differ by a constant common to all candidates: the mixtures of (2) are the same, bit for
    bit nearly, and so are rollouts. Only the stored scores differ, hence the margins, hence the gradient.
    """
    noise = gumbel.clamp(*CLIP)
    return args.noise_scale * (noise - CLIP[0] + args.delta if args.noise == "one_sided" else noise)


def latent_token(log_p, gumbel, args):
    """Equations (1) and (2): log_p (B, V), gumbel (B, V) -> SoftToken with K candidates, the heaviest first.

    `gumbel` None, or --noise none: the noise-free mixture of the K most likely tokens, by their probabilities.
    """
    if gumbel is None or args.noise == "none":
        scores, ids = log_p.topk(args.top_k)  # (B, K)
        return SoftToken(ids, scores.softmax(-1), scores)
    ordered, ids = log_p.sort(dim=-1, descending=True)  # (B, V)
    probs = ordered.exp()  # (B, V)
    outside = probs.cumsum(-1) - probs >= args.top_p  # the mass before a token already reaches top_p
    outside[:, : args.top_k] = False
    noise = latent_noise(gumbel.gather(-1, ids), args)  # (B, V)
    if args.exit_guard == "on":  # without it, noise makes the model break off its thought, or think on
        noise = noise.masked_fill(ids[:, :1] == args.exit_id, 0.0)
    scores, place = (ordered + noise).masked_fill(outside, -math.inf).topk(args.top_k)  # (B, K)
    return SoftToken(ids.gather(-1, place), (scores / args.tau).softmax(-1), scores)


def soft_or_hard(soft, hard, is_soft):
    """Row by row the mixture, or the id hard (B,) with weight 1 and nothing beside it. is_soft (B,) -> SoftToken"""
    alone = torch.zeros_like(soft.weights)  # (B, K)
    alone[:, 0] = 1.0
    is_soft = is_soft[:, None]
    return SoftToken(
        torch.where(is_soft, soft.ids, hard[:, None]),
        torch.where(is_soft, soft.weights, alone),
        torch.where(is_soft, soft.scores, alone.log()),  # 0, -inf, …: one candidate, which is how `is_latent` knows it
    )


# ----------------------------------------------------------------------------------------------------------------------
# 4. Rollout: every row thinks in mixtures until the exit token is the heaviest of one; that step, and all that follow
#    it, are written. Nothing else ends a thought but the cap, or an end of text as heaviest candidate.


def rollout(lm, prompts, group_size, args, generator, noisy=True):
    """group_size trajectories for each of P prompts -> engine.Rollout with N = P * group_size rows. Of several
    processes, each takes its share of the prompts."""
    own, total, steps = engine.share(len(prompts)), len(prompts) * group_size, 0
    thinking = torch.ones(len(prompts[own]) * group_size, dtype=torch.bool, device=args.device)  # (N,)

    def choose(logits, t, rows):
        nonlocal steps
        steps = t + 1
        log_p = logits.float().log_softmax(-1)  # (B, V)
        # Noise is drawn for the rows of all processes, running or not: a row's luck does not depend on when others
        # end, nor on who computes it.
        mine = rows + own.start * group_size
        gumbel = gumbel_noise((total, log_p.shape[1]), generator, logits.device)[mine] if noisy else None  # (B, V)
        soft = latent_token(log_p, gumbel, args)
        written = soft.ids[:, 0]  # (B,) without noise the likeliest token; with it, the noisy top-1 of `answers noisy`
        if noisy and args.answers == "categorical":
            written = (log_p / args.temperature + gumbel).argmax(-1)  # Gumbel-max: an exact draw
        exits = thinking[rows] & (soft.ids[:, 0] == args.exit_id)  # (B,)
        thinking[rows] &= ~exits
        return soft_or_hard(soft, torch.where(exits, args.exit_id, written), thinking[rows])

    roll = engine.decode(lm, prompts[own], group_size, args.max_new_tokens, choose)
    engine.synchronise(generator, steps)
    return roll


def is_latent(roll):
    """-> (N, T) bool: executed mixtures. They come first in a row; the exit token is not among them. (K >= 2 likeliest
    tokens are always candidates: a step with a single one is a written one.)"""
    return ((roll.scores > -math.inf).sum(-1) > 1) & roll.mask()


def thought_lengths(roll):
    """-> latents (N,), exited (N,) bool: a thought that was left is followed by a written step."""
    latents = is_latent(roll).sum(1)
    return latents, latents < roll.length


def join(parts):
    """Some groups of each of several rollouts as one rollout. parts: [(roll, groups (P,) index)] -> Rollout"""
    shape = [max(roll.ids.shape[i] for roll, _ in parts) for i in (1, 2)]
    columns = []
    for roll, groups in parts:
        members = torch.arange(roll.group_size, device=groups.device)
        rows = (groups[:, None] * roll.group_size + members).flatten()  # (N,)
        grow = (0, shape[1] - roll.ids.shape[2], 0, shape[0] - roll.ids.shape[1])
        wide = [(roll.ids, 0), (roll.weights, 0.0), (roll.scores, -math.inf)]
        columns.append([
            *(torch.nn.functional.pad(tensor[rows], grow, value=value) for tensor, value in wide),
            roll.length[rows], roll.stopped[rows],
        ])  # fmt: skip
    prompts = [roll.prompts[i] for roll, groups in parts for i in groups.tolist()]
    return engine.Rollout(prompts, parts[0][0].group_size, *map(torch.cat, zip(*columns, strict=True)))


# ----------------------------------------------------------------------------------------------------------------------
# 5. Reward and advantages, equation (4), with two of the paper's three fixes: overlong rollouts and the first token.


def texts_of(lm, roll, args):
    """The text of each rollout that the verifier reads -> list of N str."""
    ids, lengths = roll.heaviest().tolist(), roll.length.tolist()
    first = [0] * len(ids) if args.verifier_reads == "all" else thought_lengths(roll)[0].tolist()
    texts = [row[i:n] for row, i, n in zip(ids, first, lengths, strict=True)]
    return lm.tokenizer.batch_decode(texts, skip_special_tokens=True) if texts else []


def score(texts, problems, group_size):
    """(strict, flexible) rewards (P, G) of N = P * G texts, on the CPU."""
    pairs = [engine.verify(text, problems[n // group_size]) for n, text in enumerate(texts)]
    return torch.tensor(pairs).reshape(-1, 2).T.reshape(2, len(problems), group_size)


def group_advantages(rewards, overlong, how):
    """Equation (4): rewards (P, G), overlong (P, G) bool -> advantages (P, G), unbiased (n - 1) standard deviation.

    Rewards 1, 1, 0, 0 of which the third is overlong. `exclude`, the paper: it does not count in mean and deviation
    and gets 0: .58, .58, 0, -1.15. Otherwise it does: .87, .87, -.87, -.87; with `include`, the official GSM8K script,
    it loses its own afterwards (`stepwise_advantages`). Where one rollout or none is left to compare with, `exclude`
    takes the reward itself, as the official code does.
    """
    valid = ~overlong if how == "exclude" else torch.ones_like(overlong)  # (P, G)
    count = valid.sum(1, keepdim=True)  # (P, 1)
    mean = (rewards * valid).sum(1, keepdim=True) / count.clamp(min=1)  # (P, 1)
    square = ((rewards - mean).square() * valid).sum(1, keepdim=True)  # (P, 1)
    std = (square / (count - 1).clamp(min=1)).sqrt()  # (P, 1)
    mean, std = mean.where(count > 1, 0.0), std.where(count > 1, 1.0)  # (P, 1)
    return (rewards - mean) / (std + 1e-6) * valid


def stepwise_advantages(advantages, overlong, mean_log_probs, count, args):
    """Advantages (P, G) -> (N, T = count): the same at every step, but for the first one.

    All rollouts of a group share the state of step 1, where several right ones pull its one mixture towards several
    thoughts at once, perhaps towards a mean that is none of them. First-token selection leaves one of them there: of
    those with A > 0 the one that was likeliest on average, mean_log_probs (P, G). `paper` takes step 1 from the
    other right ones; `code` from everybody else, the wrong ones too, which stops the push away from their thoughts.
    """
    steps = advantages[..., None].repeat(1, 1, count)  # (P, G, T)
    if args.first_token != "off":
        right = advantages > 0  # (P, G)
        winner = mean_log_probs.masked_fill(~right, -math.inf).argmax(1, keepdim=True)  # (P, 1)
        others = torch.arange(advantages.shape[1], device=advantages.device) != winner  # (P, G)
        silenced = others & right if args.first_token == "paper" else others & right.any(1, keepdim=True)
        steps[..., :1] = steps[..., :1].masked_fill(silenced[..., None], 0.0)
    if args.overlong == "include":  # last, as in the official code: an overlong winner leaves step 1 to nobody
        steps = steps.masked_fill(overlong[..., None], 0.0)
    return steps.flatten(0, 1)


# ----------------------------------------------------------------------------------------------------------------------
# 6. The log-probability of a trajectory's steps, equation (5).


def latent_log_prob(log_p, weights, scores, advantages, args):
    """Equation (5), the surrogate of executed mixtures. log_p, weights, scores (M, K), advantages (M,) -> (M,)

    f(d) = -d - exp(-d) is the log-density of Gumbel(0, 1) at the margin d = score - log pi. Its slope in log pi is
    1 - exp(-d): at margins above 0 it is positive and a positive advantage raises the candidate; below 0 it turns
    round. One-sided noise keeps margins above 0 as long as the policy is the one that drew them.
    The flip is for those that get there later, with A <= 0, where the slope's sign would raise what was bad:
    `intended` is 1 - exp(d) > 0, the mirror image; `code` is what the official code computes, exp(d) - 1 < 0, which has
    the sign it wanted to be rid of and is only smaller.
    """
    share = weights if args.surrogate == "weighted" else 1 / log_p.shape[-1]
    margin = (scores - log_p.detach()).clamp(-10, 10)  # (M, K), bounded before exp
    value, slope = -margin - (-margin).exp(), 1 - (-margin).exp()  # (M, K)
    if args.flip != "off":
        mirrored = 1 - margin.exp()  # (M, K)
        turn = (margin < 0) & (advantages[:, None] <= 0)  # (M, K)
        slope = torch.where(turn, mirrored if args.flip == "intended" else -mirrored, slope)
    return (share * (value + slope * (log_p - log_p.detach()))).sum(-1)  # the value of f, the gradient of choice


def trajectory_log_probs(lm, roll, rows, hidden, advantages, args):
    """Log-probabilities (B, T) of the steps of rows (B,), replayed as hidden (B, T, D), and the margins (M, K) of their
    M latents; 0 behind a row's end. advantages (B, T)."""
    steps = hidden.shape[1]
    latent = is_latent(roll)[rows, :steps]  # (B, T)
    written = roll.mask()[rows, :steps] & ~latent  # (B, T)
    ids, weights, scores = (x[rows, :steps][latent] for x in (roll.ids, roll.weights, roll.scores))  # (M, K)
    log_p = engine.candidate_log_probs(lm, hidden[latent], ids, 1.0)  # (M, K)
    thoughts = latent_log_prob(log_p, weights, scores, advantages[:, :steps][latent], args)  # (M,)
    ids = roll.ids[rows, :steps, :1][written]  # (W, 1)
    words = engine.candidate_log_probs(lm, hidden[written], ids, args.temperature).squeeze(-1)  # (W,)
    log_probs = words.new_zeros(latent.shape).masked_scatter(latent, thoughts).masked_scatter(written, words)
    return log_probs, (scores - log_p).detach()


# ----------------------------------------------------------------------------------------------------------------------
# 7. Update, equation (6).


def clipped_gain(log_probs, old_log_probs, advantages, clip, dual_clip):
    """The summand of (6) and where clipping acts: log_probs, old_log_probs, advantages (B, T) -> (B, T) twice

    With eps .2 and c 3, ratio 1.5 and A = 1 give 1.2 without a gradient: encouraged enough. Ratio 1.5 and A = -1 give
    -1.5, pulled back in full; but ratio 5 and A = -1 give -3 without a gradient, so that a step which has become far
    likelier cannot throw the whole update.
    """
    # Bounded before exp: an overflow would turn into inf * 0 = NaN in the masked sum.
    ratio = (log_probs - old_log_probs).clamp(-10, 10).exp()  # (B, T)
    plain, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages  # (B, T)
    gain = torch.minimum(plain, clipped)
    floor = torch.where(advantages < 0, dual_clip * advantages, -math.inf)
    return torch.maximum(gain, floor), (clipped < plain) | (gain < floor)


@torch.no_grad()
def current_log_probs(lm, roll, advantages, args):
    """Log-probabilities (N, T) under the policy as it is now."""
    log_probs = torch.zeros(roll.ids.shape[:2], device=roll.ids.device)
    for rows, hidden in engine.replays(lm, roll, torch.arange(len(roll.ids)), args.micro_batch):
        log_probs[rows, : hidden.shape[1]] = trajectory_log_probs(lm, roll, rows, hidden, advantages[rows], args)[0]
    return log_probs


def apply_gradient(model, optimizer, lr, args):
    """An optimiser step -> gradient norm; UserError, before anything changes, when it is not finite."""
    engine.reduce_gradients(model)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip).item()
    if not math.isfinite(norm):
        raise UserError("the gradient is not finite and was not applied; the run is saved: --resume it, "
                        "with a lower --lr or --sft_lr, and it goes on with the next batch")  # fmt: skip
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return norm


def update(lm, start, optimizer, roll, places, advantages, old_log_probs, lr, args):
    """An optimiser step on each of `minibatches` parts of a batch; places (P,) are the numbers of roll's groups in it,
    among those of all processes; advantages (N, T); old_log_probs (N, T), or None for those of the policy as it is when
    a part is reached; `start` is the KL's reference. -> metrics

    Rows without advantage have gradient 0 and are left out of the arithmetic (not of the normaliser), unless a KL term
    needs them. Raises UserError, before it is applied, when a gradient is not finite.
    """
    mask, group = roll.mask(), places.repeat_interleave(roll.group_size)  # (N, T), (N,)
    groups = int(engine.all_reduce(torch.tensor(len(places))))
    latent, teaches = is_latent(roll), advantages.any(1).cpu() | bool(args.kl_coef)  # (N, T), (N,)
    # Of clipped steps, used steps, KL, surprise, written steps, margins, their negatives, their number; summed.
    sums, grad_norm = torch.zeros(8, device=advantages.device), 0.0
    for part in torch.arange(groups).tensor_split(args.minibatches):
        inside = torch.isin(group, part)  # (N,)
        rows = (inside & teaches).nonzero().squeeze(-1)  # (M,)
        counts = torch.tensor([int(roll.length[inside].sum()), int(inside.sum()), len(rows)])
        steps, rollouts, used = engine.all_reduce(counts).tolist()  # whatever process executed them
        if not used:
            continue
        weight = 1 / (roll.length * rollouts if args.loss_mean == "rollouts" else torch.full_like(roll.length, steps))
        optimizer.zero_grad()
        replays = engine.replays(lm, roll, rows, args.micro_batch, args.gradient_checkpointing)
        at_start = engine.replays(start, roll, rows, args.micro_batch) if args.kl_coef else itertools.repeat((0, 0))
        for (micro, hidden), (_, start_hidden) in zip(replays, at_start, strict=False):
            count, mine = hidden.shape[1], advantages[micro]  # mine (B, T)
            log_probs, margins = trajectory_log_probs(lm, roll, micro, hidden, mine, args)  # (B, T), (L, K)
            valid, old = mask[micro, :count], log_probs.detach()  # (B, T)
            if old_log_probs is not None:
                old = old_log_probs[micro, :count]  # (B, T)
            gain, clipped = clipped_gain(log_probs, old, mine[:, :count], args.clip, args.dual_clip)  # (B, T)
            kl = torch.zeros_like(log_probs)  # (B, T)
            if args.kl_coef:
                with torch.no_grad():
                    reference, _ = trajectory_log_probs(start, roll, micro, start_hidden, mine, args)  # (B, T)
                r = (reference - log_probs).clamp(-20, 20)
                kl = (r.exp() - r - 1).clamp(max=10)  # (B, T) >= 0: the k3 estimate, bounded as in verl
            loss = ((args.kl_coef * kl - gain) * valid).sum(1) @ weight[micro]
            loss.backward()
            written = valid & ~latent[micro, :count]  # (B, T)
            numbers = [clipped & valid, valid, kl * valid, -log_probs * written, written, margins, margins < -1e-3,
                       torch.ones_like(margins)]  # fmt: skip
            sums += torch.stack([number.detach().sum().float() for number in numbers])
        grad_norm = apply_gradient(lm.model, optimizer, lr, args)
    clipped, valid, kl, surprise, written, margin, negative, count = engine.all_reduce(sums).tolist()

    def ratio(total, count):
        return total / count if count else None

    return {
        "grad_norm": grad_norm, "surprise": ratio(surprise, written), "clipped": ratio(clipped, valid),
        "kl": ratio(kl, valid), "margin": ratio(margin, count), "margin_negative": ratio(negative, count),
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# 8. Evaluation, always on the same held-out problems and with its own noise: noise-free pass@1, sampled pass@1 and
#    pass@k, and what becomes of noise-free answers when their latents are taken away or damaged.

ABLATIONS = ["skipped", "zeroed", "shuffled", "heaviest"]


def answer_again(lm, roll, how, args):
    """Noise-free answers after the executed latents of a rollout, damaged. -> Rollout, one row for each of roll's

    skipped: none at all.  zeroed: zero vectors.  shuffled: each in its neighbour's place.  heaviest: each as the word
    that weighs most in it. A thought that was never left is not left here either.
    """
    latents, exited = thought_lengths(roll)  # (N,)
    count = latents.masked_fill(exited, 0) if how == "skipped" else latents  # (N,)
    place = torch.arange(roll.ids.shape[1], device=count.device).expand(len(count), -1)  # (N, T)
    if how == "shuffled":
        place = torch.where(place < count[:, None], (place + 1) % count[:, None].clamp(min=1), place)
    place = place[..., None].expand_as(roll.ids)
    ids, weights, scores = (x.gather(1, place) for x in (roll.ids, roll.weights, roll.scores))  # (N, T, K)
    if how == "zeroed":
        weights = torch.zeros_like(weights)
    if how == "heaviest":
        weights = torch.zeros_like(weights).scatter(-1, weights.argmax(-1, keepdim=True), 1.0)

    def choose(logits, t, rows):
        at = min(t, ids.shape[1] - 1)
        thought = SoftToken(ids[rows, at], weights[rows, at], scores[rows, at])
        word = torch.where(t == count[rows], args.exit_id, logits.argmax(-1))  # (B,)
        return soft_or_hard(thought, word, t < count[rows])

    prompts = [roll.prompts[n // roll.group_size] for n in range(len(count))]
    return engine.decode(lm, prompts, 1, args.max_new_tokens, choose)


def evaluate(lm, held_out, args, full):
    """held_out: (problems, prompts). `full` adds the sampled scores and those with ablated latents. -> dict"""
    problems, prompts = held_out
    generator = torch.Generator(args.device).manual_seed(12345)

    def run(name, group_size, noisy, ablations=()):
        # As many rows at once as a training rollout has: a KV cache that fits there fits here.
        size, parts = max(1, args.prompts_per_step * args.group_size // group_size), []
        for i in engine.progress(range(0, len(prompts), size), desc=f"evaluating: {name}", leave=False):
            batch = problems[i : i + size]
            roll = rollout(lm, prompts[i : i + size], group_size, args, generator, noisy)
            own = batch[engine.share(len(batch))]
            latents, exited = thought_lengths(roll)
            again = [texts_of(lm, answer_again(lm, roll, how, args), args) for how in ablations]
            parts.append(torch.cat([
                score(texts_of(lm, roll, args), own, group_size),
                torch.stack([roll.length, latents, exited]).cpu().float().view(3, len(own), group_size),
                *(score(texts, own, group_size)[:1] for texts in again),
            ]))  # fmt: skip
        return torch.cat(parts, 1)  # (numbers, P, G), of this process's share

    numbers = map(engine.mean, run("noise-free", 1, False, ABLATIONS if full else ()))
    names = ["greedy", "greedy_flexible", "length", "latents", "exit_rate", *(f"greedy_{how}" for how in ABLATIONS)]
    result = dict(zip(names, numbers, strict=False))
    if full:
        k = args.eval_samples
        sampled = run("sampled", k, True)  # (numbers, P, k)
        counts = sampled[0].sum(1).int().tolist()
        result |= {"sampled": engine.mean(sampled[0]), "sampled_flexible": engine.mean(sampled[1])}
        result[f"pass@{k}"] = engine.mean(torch.tensor([engine.pass_at_k(k, c, k) for c in counts]))
        result["sampled_exit_rate"] = engine.mean(sampled[4])
    return result


def describe(lm, roll, n, latents, problem, verdict):
    """A rollout that a person can read: each latent token as its heaviest candidates with their weights. -> str"""
    lines = [f"    {problem.question}"]
    for t in range(latents):
        pairs = sorted(zip(roll.weights[n, t].tolist(), roll.ids[n, t].tolist(), strict=True), reverse=True)[:6]
        candidates = "  ".join(f"{lm.tokenizer.decode([i])!r} {w:.2f}" for w, i in pairs if w >= 0.005)
        lines.append(f"    latent {t + 1:2d}  {candidates}")
    text = lm.tokenizer.decode(roll.heaviest()[n, latents : roll.length[n]].tolist())
    return "\n".join([*lines, f"    text       {text.strip()!r}", f"    {verdict}, the answer is {problem.answer}"])


# ----------------------------------------------------------------------------------------------------------------------
# 9. Stage 1. A worked solution becomes a rollout that a teacher wrote, and the model learns to do likewise: at each
#    step the KL divergence from the teacher's mixture to the policy, which for a written token is its cross-entropy.


def worked(problem):
    """(thought, answer) of a problem as texts; an empty thought where the data has no worked solution.

    The built-in task's student writes both, and may be wrong. GSM8K's annotations are <<48/2=24>> within prose.
    """
    if problem.form == "think":
        thought, _, answer = problem.solution.partition(" </think>")
        return thought, answer.removesuffix("<eos>")
    return " ".join(re.findall(r"<<[^<>]+>>", problem.solution)), f"\\boxed{{{problem.answer}}}"


def chunks(ids, size, first):
    """Cut a thought into the pieces that a latent each stands for, the first of which may have another size.

    A step `17 + 5 = 12 ;` has six tokens: size 6, first 3 gives `17 + 5`, then `= 12 ; 12 - 8`. A latent then holds a
    result and what is done with it next, and the operands of a result stand in the latent before it.
    """
    return [ids[:first], *(ids[i : i + size] for i in range(first, len(ids), size))]


def first_chunk(size, args):
    """Cheap labels begin with half a chunk of the last size, also in the sizes before it: each then consists of whole
    smaller ones. The encoder's chunks are all alike."""
    return size if args.labels == "encoder" else max(1, args.chunk[-1] // 2)


def superposition(chunk, k):
    """Token ids of a chunk -> [(id, weight)]: how often each occurs in it, as shares; the k most frequent."""
    counts = sorted(((chunk.count(i), i) for i in set(chunk)), reverse=True)[:k]
    total = sum(count for count, _ in counts)
    return [(i, count / total) for count, i in counts]


def take_worked(lm, stream, position, args):
    """The next sft_batch problems with a worked solution -> (problems, prompts, thoughts, tails, new position).

    Lists of token ids: a tail is what is written after the thought, from the exit token to the end of the text.
    """
    def encode(text):  # fmt: skip
        return lm.tokenizer.encode(text, add_special_tokens=False)

    rows, end = [], position + (stream.size or 10**9)
    while len(rows) < args.sft_batch and position < end:
        problem = stream[position]
        position += 1
        thought, answer = worked(problem)
        prompt = engine.encode_prompt(lm.tokenizer, problem, args.think_text)
        tail = [*encode(args.exit_text), *encode(answer), lm.stop_ids[0]]
        thought = encode(thought)
        if thought and len(prompt) <= args.max_prompt_tokens:
            rows.append((problem, prompt, thought, tail))
    if not rows:
        raise UserError("stage 1 needs worked solutions, `<<48/2=24>>` as in GSM8K, and this data has none: "
                        "give other --data, or a model that is latent already and --sft_steps 0")  # fmt: skip
    return *map(list, zip(*rows, strict=True)), position


def label_noise(weights, gumbel, scale, args):
    """Equation (8): teacher mixtures with noise inside their own candidates; weights, gumbel (M, K) -> (M, K).

    The official code draws again where the exit token comes out heaviest. Here no label holds it.
    """
    return ((weights.log() + (scale * gumbel).clamp(*CLIP)) / args.tau).softmax(-1)


def teacher_rollout(lm, prompts, labels, tails, args):
    """labels: for each problem (ids (n, K), weights (n, K)) of its n latents -> Rollout with group size 1."""
    counts = [len(ids) + len(tail) for (ids, _), tail in zip(labels, tails, strict=True)]
    length = torch.tensor(counts, dtype=torch.long)  # (N,)
    shape = len(labels), max(length.tolist(), default=0), args.top_k
    ids, weights = torch.full(shape, lm.pad_id), torch.zeros(shape)  # (N, T, K)
    for n, ((label_ids, label_weights), tail) in enumerate(zip(labels, tails, strict=True)):
        count = len(label_ids)
        ids[n, :count], weights[n, :count] = label_ids, label_weights
        ids[n, count : length[n], 0], weights[n, count : length[n], 0] = torch.tensor(tail), 1.0
    ids, weights, length = (x.to(args.device) for x in (ids, weights, length))
    return engine.Rollout(prompts, 1, ids, weights, weights.log(), length, torch.ones_like(length, dtype=torch.bool))


def chunk_labels(thoughts, size, args):
    """The cheap label: a latent is the superposition of its chunk's tokens. -> [(ids (n, K), weights (n, K))]"""
    labels = []
    for thought in thoughts:
        parts = [superposition(chunk, args.top_k) for chunk in chunks(thought, size, first_chunk(size, args))]
        ids, weights = torch.zeros(len(parts), args.top_k, dtype=torch.long), torch.zeros(len(parts), args.top_k)
        for i, pairs in enumerate(parts):
            ids[i, : len(pairs)], weights[i, : len(pairs)] = map(torch.tensor, zip(*pairs, strict=True))
        labels.append((ids, weights))
    return labels


class Autoencoder(torch.nn.Module):
    """The paper's labels: an encoder, a copy of the start model, writes a thought as latents from which a decoder, the
    model itself, can tell what comes next. It learns to as long as `--label_steps` says; then the encoder labels.

    `compress` is the embedding of the token C that asks the encoder for a latent; no word of the vocabulary is spent.
    It starts as the exit token's, behind which the model writes its result so far: that is what a latent must hold.
    """

    def __init__(self, lm, exit_id):
        super().__init__()
        self.decoder, self.encoder = lm.model, copy.deepcopy(lm.model)
        self.compress = torch.nn.Parameter(lm.table[exit_id].detach().clone())  # (D,)


def induction_mask(is_compress):
    """Who sees whom in the encoder. is_compress (B, L) bool -> (B, L, L) bool, rows see columns.

    All that came before, except the C of others: a latent is made of the prompt and of the thought up to its chunk, and
    not of other latents. For `q a b C c d C`, sees itself counting:
        q  1......
        a  11.....
        b  111....
        C  1111...
        c  111.1..
        d  111.11.
        C  111.111
    """
    place = torch.arange(is_compress.shape[1], device=is_compress.device)
    return (place <= place[:, None]) & (~is_compress[:, None] | (place == place[:, None]))


PROMPT, LATENT, TEXT, TAIL = range(4)


def supervision_mask(kind, chunk):
    """Who sees whom in the decoder. kind (B, L), one of the four above; chunk (B, L), the number of the latent that a
    latent is or a text continues -> (B, L, L) bool, rows see columns.

    A chunk's text sees the one latent before it and nothing else of the past, not even the prompt: all that it needs
    must be in there. Latents and tail see the prompt and the latents, and no text. For `q z1 b c z2 </think> a`:
        q         1......
        z1        11.....
        b         .11....
        c         .111...
        z2        11..1..
        </think>  11..11.
        a         11..111
    """
    place = torch.arange(kind.shape[1], device=kind.device)
    is_text = kind == TEXT  # (B, L)
    own = (chunk[:, :, None] == chunk[:, None]) & ((kind == LATENT) | is_text)[:, None]  # (B, L, L)
    return (place <= place[:, None]) & torch.where(is_text[:, :, None], own, ~is_text[:, None])


def pad(rows, value, device):
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, value).to(device)  # (B, L)


def latent_log_probs(lm, auto, prompts, thoughts, size, args):
    """What the encoder would write at each C, one behind every `size` tokens of a thought -> (M, V) log-probabilities
    for the M latents of all rows. None for the tokens that end a thought or a text, which no label may hold.

    Read off through the output head: in a model whose head is not its embedding table, products with that table mean
    nothing, though the official code takes them.
    """
    rows = []
    for prompt, thought in zip(prompts, thoughts, strict=True):
        rows.append(prompt + sum(([*chunk, -1] for chunk in chunks(thought, size, size)), []))
    ids = pad(rows, 0, args.device)  # (B, L)
    is_compress = ids < 0  # (B, L)
    embeds = torch.nn.functional.embedding(ids.clamp(min=0), lm.table)  # (B, L, D)
    embeds = torch.where(is_compress[..., None], auto.compress, embeds)
    hidden = engine.run_body(
        replace(lm, model=auto.encoder), args.gradient_checkpointing, inputs_embeds=embeds,
        attention_mask=induction_mask(is_compress)[:, None],
    )  # (B, L, D)  # fmt: skip
    logits = (hidden[is_compress] @ lm.head.to(hidden.dtype).T).float()  # (M, V)
    logits[:, [*endings(lm, args)]] = -math.inf
    return logits.log_softmax(-1)


def endings(lm, args):
    """Ids that are signals and no content: a latent that is mostly one of them ends a thought or a rollout."""
    return {args.exit_id, lm.pad_id, *lm.stop_ids}


def encode_thoughts(lm, auto, prompts, thoughts, size, args):
    """The encoder's labels: the K likeliest of each latent and their softmax. -> [(ids (n, K), weights (n, K))]"""
    values, ids = latent_log_probs(lm, auto, prompts, thoughts, size, args).topk(args.top_k)  # (M, K)
    counts = [len(chunks(thought, size, size)) for thought in thoughts]
    return list(zip(ids.split(counts), values.softmax(-1).split(counts), strict=True))


def hints(lm, thoughts, tails, size, args):
    """(M, V): what follows each latent as a superposition, of the next chunk's tokens or at last of the tail's."""
    banned, rows = endings(lm, args), []
    for thought, tail in zip(thoughts, tails, strict=True):
        for text in [*chunks(thought, size, size)[1:], tail]:
            row = torch.zeros(len(lm.head))
            for i, weight in superposition([token for token in text if token not in banned], args.top_k):
                row[i] = weight
            rows.append(row)
    return torch.stack(rows).to(args.device)


def reconstruction(lm, ids_of_latents, weights, prompts, thoughts, tails, size, args):
    """Cross-entropies (S,) with which the decoder, who sees the latents (M, K) of these thoughts, predicts what follows
    each of them: the text of the next chunk, and after the last one the tail."""
    rows = []
    for prompt, thought, tail in zip(prompts, thoughts, tails, strict=True):
        p, row = len(prompt), [(token, PROMPT, 0, i) for i, token in enumerate(prompt)]  # (id, kind, chunk, position)
        following = [*chunks(thought, size, size)[1:], []]
        for i, text in enumerate(following):  # the first chunk's text is only ever seen by the encoder
            row.append((0, LATENT, i, p + i))  # positions as if no text stood between the latents
            row += [(token, TEXT, i, p + i + 1 + j) for j, token in enumerate(text)]
        rows.append(row + [(token, TAIL, -1, p + len(following) + j) for j, token in enumerate(tail)])
    ids, kind, chunk, position = (
        pad([[entry[i] for entry in row] for row in rows], fill, args.device) for i, fill in enumerate([0, -1, -2, 0])
    )  # (B, L) each
    mixed = engine.mix_embeddings(lm.table, ids_of_latents, weights)  # (M, D)
    embeds = torch.nn.functional.embedding(ids, lm.table).masked_scatter((kind == LATENT)[..., None], mixed)
    hidden = engine.run_body(
        lm, args.gradient_checkpointing, inputs_embeds=embeds, position_ids=position,
        attention_mask=supervision_mask(kind, chunk)[:, None],
    )  # (B, L, D)  # fmt: skip
    wanted = kind[:, 1:] >= TEXT  # (B, L-1): a state predicts the text or tail that stands right behind it
    return -engine.candidate_log_probs(lm, hidden[:, :-1][wanted], ids[:, 1:][wanted][:, None], 1.0).squeeze(-1)


def stage1_rate(peak, done, total, args):
    """Learning rate of one of stage 1's two parts: linear warm-up and decay."""
    return peak * min((done + 1) / max(1, args.sft_warmup), (total - done) / total)


def teacher_gumbel(thoughts, own, size, first, generator, args):
    """Noise (M, K) for the latents of the thoughts that this process has: drawn for all processes, as in a rollout."""
    lengths = [len(chunks(thought, size, first)) for thought in thoughts]
    mine = slice(sum(lengths[: own.start]), sum(lengths[: own.stop]))
    return gumbel_noise((sum(lengths), args.top_k), generator, args.device)[mine]


def label_step(lm, auto, optimizer, stream, state, args, generator):
    """An update of encoder and decoder -> (log row, readable sample); advances `state`.

    The paper trains first the encoder, against a decoder that has never read a mixture, then the decoder, then both.
    From this start the softmax of the first of these runs into one-hot latents, which have no gradient. Here both learn
    from the beginning, with two helps. A hint, which fades within two thirds of the steps: KL divergence from the
    superposition of what follows to the latent, whose gradient is there for one-hot latents too. And the noise of (8),
    which grows as the hint fades: what a latent tells by weights of a hundredth is lost to the student.
    """
    done, size = state["step"] + args.sft_steps + args.label_steps, args.chunk[0]
    _, prompts, thoughts, tails, position = take_worked(lm, stream, state["position"], args)
    own = engine.share(len(prompts))
    gumbel = teacher_gumbel(thoughts, own, size, size, generator, args)  # (M, K)
    total = sum(len(thought[size:]) + len(tail) for thought, tail in zip(thoughts, tails, strict=True))
    latents = sum(len(chunks(thought, size, size)) for thought in thoughts)
    hint = max(0.0, 1 - 1.5 * done / args.label_steps)
    optimizer.zero_grad()
    sums = torch.zeros(3, device=args.device)
    prompts, thoughts, tails = (x[own] for x in (prompts, thoughts, tails))
    for i in range(0, len(prompts), args.micro_batch):
        part = [x[i : i + args.micro_batch] for x in (prompts, thoughts, tails)]
        log_p = latent_log_probs(lm, auto, *part[:2], size, args)  # (m, V)
        values, ids = log_p.topk(args.top_k)  # (m, K)
        weights = values.softmax(-1).clamp(min=torch.finfo(torch.float32).tiny)  # the logarithm of 0 has no gradient
        noise, gumbel = gumbel.split([len(ids), len(gumbel) - len(ids)])
        noisy = label_noise(weights, noise, args.sft_noise * (1 - hint), args)  # (m, K)
        target = hints(lm, *part[1:], size, args)  # (m, V)
        kl = (torch.xlogy(target, target) - target * log_p.where(target > 0, 0.0)).sum() / latents
        loss = reconstruction(lm, ids, noisy, *part, size, args).sum() / total
        (loss + hint * kl).backward()
        effective_k = (1 / weights.square().sum(-1)).sum() / latents
        sums += torch.stack([loss, kl, effective_k]).detach()
    state |= {"step": state["step"] + 1, "position": position}
    lr = stage1_rate(args.label_lr, done, args.label_steps, args)
    norm = apply_gradient(auto, optimizer, lr, args)
    loss, kl, effective_k = engine.all_reduce(sums).tolist()
    row = {"step": state["step"] - 1, "reconstruction": loss, "hint": kl, "effective_k": effective_k}
    return row | {"lr": lr, "grad_norm": norm}, ""


def sft_step(lm, auto, optimizer, stream, state, args, generator):
    """An update towards teacher rollouts -> (log row, readable sample); advances `state`.

    Cross-entropy of exit, answer and end, a mean over tokens, plus KL divergence at latents, a mean over a rollout's
    latents and then over rollouts. Noise on the teacher makes the model ready for that of stage 2.
    """
    done = state["step"] + args.sft_steps
    problems, prompts, thoughts, tails, position = take_worked(lm, stream, state["position"], args)
    count, tokens, own = len(problems), sum(map(len, tails)), engine.share(len(problems))
    size = args.chunk[len(args.chunk) * done // args.sft_steps]
    scale = args.sft_noise * done / args.sft_steps
    gumbel = None
    if scale:
        gumbel = teacher_gumbel(thoughts, own, size, first_chunk(size, args), generator, args)  # (M, K)
    problems, prompts, thoughts, tails = (x[own] for x in (problems, prompts, thoughts, tails))
    if args.labels == "chunk":
        labels = chunk_labels(thoughts, size, args)
    else:
        with torch.no_grad():
            labels = []
            for i in range(0, len(prompts), args.micro_batch):
                part = slice(i, i + args.micro_batch)
                labels += encode_thoughts(lm, auto, prompts[part], thoughts[part], size, args)
    roll = teacher_rollout(lm, prompts, labels, tails, args)
    latents = torch.tensor([len(ids) for ids, _ in labels], device=args.device)[:, None]  # (N, 1)
    latent = torch.arange(roll.ids.shape[1], device=args.device) < latents  # (N, T)
    if scale:
        roll.weights[latent] = label_noise(roll.weights[latent], gumbel, scale, args)
    factor = torch.where(latent, 1 / (latents * count), 1 / tokens)  # (N, T)

    optimizer.zero_grad()
    sums = torch.zeros(2, device=args.device)
    rows = torch.arange(len(prompts))
    for micro, hidden in engine.replays(lm, roll, rows, args.micro_batch, args.gradient_checkpointing):
        executed = roll.mask()[micro, : hidden.shape[1]]  # (B, T)
        ids, weights = (x[micro, : hidden.shape[1]][executed] for x in (roll.ids, roll.weights))  # (M, K)
        log_q = engine.candidate_log_probs(lm, hidden[executed], ids, 1.0)  # (M, K)
        kl = (torch.xlogy(weights, weights) - weights * log_q).sum(-1)  # (M,)
        kl = kl * factor[micro, : hidden.shape[1]][executed]
        kl.sum().backward()
        soft = latent[micro, : hidden.shape[1]][executed]  # (M,)
        sums += torch.stack([(kl * soft).sum(), (kl * ~soft).sum()]).detach()
    state |= {"step": state["step"] + 1, "position": position}
    lr = stage1_rate(args.sft_lr, done, args.sft_steps, args)
    norm = apply_gradient(lm.model, optimizer, lr, args)
    kl, cross_entropy = engine.all_reduce(sums).tolist()
    sample = describe(lm, roll, 0, len(labels[0][0]), problems[0], "a teacher's") if problems else ""
    row = {"step": state["step"] - 1, "kl": kl, "cross_entropy": cross_entropy, "lr": lr, "grad_norm": norm}
    return row, sample


# ----------------------------------------------------------------------------------------------------------------------
# 10. main: stage 1, evaluate, stage 2, evaluate. One clock counts the steps of both: stage 1 ends and stage 2 begins at
#     step 0. State that must survive an interruption is the weights, the optimiser, the generator and the numbers in
#     `state`; everything else follows from the arguments.


def learning_rate(step, args):
    """Linear warm-up, then constant, or cosine towards 0 after the last step."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    if args.schedule == "constant":
        return args.lr
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - args.warmup) / max(1, args.steps - args.warmup)))


def collect(lm, stream, state, args, generator):
    """Dynamic sampling: draw prompts until there are P groups with both right and wrong rollouts, at most max_draws
    times; what is too many is left. Late in training, when most groups are all right, this keeps batches from
    shrinking. -> (problems, their rollouts, rewards (P, G), places (P,), numbers of all that was drawn, (problems,
    rollouts) of a few that were); advances the position in `state`.

    Groups are counted through all processes in their order, so that any number of them keeps the same: `places` are
    the numbers of those that this one has.
    """
    number, processes = engine.process()
    kept, parts, rewards, places, drawn, found, rollouts = [], [], [], [], [], 0, 0
    for _ in range(args.max_draws):
        problems, prompts, state["position"] = engine.take(
            stream, state["position"], args.prompts_per_step, lm.tokenizer, args.max_prompt_tokens, args.think_text
        )
        roll = rollout(lm, prompts, args.group_size, args, generator)
        problems = problems[engine.share(len(problems))]
        strict, flexible = score(texts_of(lm, roll, args), problems, args.group_size)  # (P, G) each
        latents, exited = thought_lengths(roll)
        effective_k = (1 / roll.weights.square().sum(-1))[is_latent(roll)]
        drawn.append([strict, flexible, roll.length, roll.length == args.max_new_tokens, latents, exited, effective_k])
        rollouts += len(prompts) * args.group_size
        informative = (strict.amax(1) > strict.amin(1)) | (args.max_draws == 1)  # (P,)
        counts = torch.zeros(processes, dtype=torch.long)
        counts[number] = informative.sum()
        engine.all_reduce(counts)
        place = found + int(counts[:number].sum())
        chosen = informative.nonzero().squeeze(-1)[: max(0, args.prompts_per_step - place)]  # (p,)
        places.append(place + torch.arange(len(chosen)))
        kept += [problems[i] for i in chosen.tolist()]
        parts.append((join([(roll, chosen.to(args.device))]), torch.arange(len(chosen), device=args.device)))
        rewards.append(strict[chosen])
        found += int(counts.sum())
        if found >= args.prompts_per_step:
            break
    names = ["reward", "flexible", "length", "overlong", "latents", "exit_rate", "effective_k"]
    columns = [torch.cat([x.flatten().float().cpu() for x in column]) for column in zip(*drawn, strict=True)]
    numbers = {name: engine.mean(column) for name, column in zip(names, columns, strict=True)} | {"rollouts": rollouts}
    if math.isnan(numbers["effective_k"]):  # no latent in any rollout
        numbers["effective_k"] = None
    few = range(args.ablate)[engine.share(args.ablate)]
    few = problems[: len(few)], one_each(roll, len(few))
    return kept, join(parts), torch.cat(rewards), torch.cat(places), numbers, few


def one_each(roll, count):
    """The first rollout of each of the first prompts."""
    rows = slice(0, count * roll.group_size, roll.group_size)
    tensors = (roll.ids, roll.weights, roll.scores, roll.length, roll.stopped)
    return engine.Rollout(roll.prompts[:count], 1, *(tensor[rows] for tensor in tensors))


def rl_step(lm, start, optimizer, stream, state, args, generator):
    """One round of sections 4 to 7 -> (log row, readable sample); advances `state`."""
    step, lr = state["step"], learning_rate(state["step"], args)
    problems, roll, rewards, places, numbers, (few_problems, few) = collect(lm, stream, state, args, generator)
    shape, rewards = (len(problems), args.group_size), rewards.to(args.device)  # (P, G)
    overlong = (roll.length == args.max_new_tokens).view(shape)  # (P, G)
    advantages = group_advantages(rewards, overlong, args.overlong)  # (P, G)
    old_log_probs, mean_log_probs = None, None
    if args.minibatches > 1 or args.first_token != "off":
        nothing = torch.zeros(roll.ids.shape[:2], device=args.device)  # the flip changes gradients and no values
        old_log_probs = current_log_probs(lm, roll, nothing, args)  # (N, T)
        mean_log_probs = (old_log_probs.sum(1) / roll.length).view(shape)  # (P, G)
    advantages = stepwise_advantages(advantages, overlong, mean_log_probs, roll.ids.shape[1], args)  # (N, T)
    damaged = {}
    for how in ABLATIONS if args.ablate else []:
        texts = texts_of(lm, answer_again(lm, few, how, args), args)
        damaged[how] = engine.mean(score(texts, few_problems, 1)[0])
    state["step"] = step + 1  # before the update: one that fails is not tried again
    metrics = update(lm, start, optimizer, roll, places, advantages, old_log_probs, lr, args)
    teaching = int(engine.all_reduce(advantages.any(1).sum().cpu()))
    numbers["zero_advantage"] = 1 - teaching / numbers["rollouts"]
    row = {"step": step} | numbers | {"lr": lr} | metrics | damaged
    if not problems:  # so few are left that other processes have them
        return row, ""
    latents, _ = thought_lengths(roll)
    n = int(latents.argmax())  # the longest thought is shown
    verdict = f"reward {rewards.flatten()[n]:.0f}"
    return row, describe(lm, roll, n, int(latents[n]), problems[n // args.group_size], verdict)


def line(row, seconds):
    """What is printed of a step."""
    formats = {
        "reward": ".3f", "exit_rate": ".3f", "latents": ".1f", "length": ".1f", "zero_advantage": ".2f",
        "effective_k": ".2f", "margin": ".2f", "reconstruction": ".4f", "kl": ".4f", "cross_entropy": ".4f",
        "grad_norm": ".3f", "greedy": ".3f",
    }  # fmt: skip
    shown = "  ".join(f"{name} {row[name]:{how}}" for name, how in formats.items() if row.get(name) is not None)
    return f"step {row['step']:4d}  {shown}  {seconds:.2f} s"


def train(stage, end, take_step, lm, held_out, run, args):
    """Steps of one stage until its end, a collapse or an interrupt. -> True when the stage is over"""
    state = run.state
    state["stage"] = stage
    run.over = state["collapsed"] is not None
    for _ in run.steps(end, args.save_every, stage):
        began = time.time()
        # With one update per batch, weights are as they were until a step's last act: it can be taken back.
        with run.attempt(undo=args.minibatches == 1 or stage != "rl"):
            row, sample = take_step(run.optimizer)
        seconds, done = time.time() - began, state["step"]
        if args.eval_every and stage != "labels" and done % args.eval_every == 0 and done < end:
            row["greedy"] = evaluate(lm, held_out, args, full=False)["greedy"]
        run.write(row, {"step": row["step"], "seconds": seconds})
        if sample and args.show_every and row["step"] % args.show_every == 0:
            tqdm.write(sample)
        tqdm.write(line(row, seconds))
        if stage == "rl":
            watch_for_collapse(row, state, args)
            run.over = state["collapsed"] is not None
    return not run.interrupted or stage == "rl" and state["step"] >= end


def watch_for_collapse(row, state, args):
    """A model that no longer leaves its thoughts gets no reward from which it could learn to: say so, and end."""
    state["exits"] = [*state["exits"], row["exit_rate"]][-10:]
    rate = sum(state["exits"]) / len(state["exits"])
    if rate < args.collapse and len(state["exits"]) == 10:
        state["collapsed"] = row["step"]
        tqdm.write(
            f"COLLAPSED: {rate:.0%} of the last ten steps' thoughts were left, {row['overlong']:.0%} of rollouts fill "
            "the cap; training ends here. Start again with a lower --lr or --noise_scale (or go on with --collapse 0)"
        )
    elif rate < 0.95 and row["step"] % 10 == 9:
        tqdm.write(f"warning: only {rate:.0%} of the last ten steps' thoughts were left: a collapse begins so")


def exit_token(lm, args):
    """Id of the token that ends a thought: the first of --exit_text, which may be several."""
    ids = lm.tokenizer.encode(args.exit_text, add_special_tokens=False)
    if not ids:
        raise UserError(f"this model's tokenizer has no token for --exit_text {args.exit_text!r}: name another")
    if ids[0] in lm.stop_ids:
        raise UserError(f"--exit_text {args.exit_text!r} would end the text and not only the thought: name another")
    return ids[0]


def save_model(lm, folder):
    lm.model.config.thinks_in_latents = True
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)


def main(argv=None):
    args, state = parse_args(argv)
    began = time.time()
    engine.start_processes(args.device)
    number, processes = engine.process()
    lm = engine.load_model(args.model, args.device)
    args.exit_id = exit_token(lm, args)
    if args.top_k > len(lm.table):
        raise UserError(f"--top_k must be at most the size of this model's vocabulary, {len(lm.table)}")
    for table in (lm.table, lm.head):
        table.requires_grad_(False)  # the space of latents stands still while the model learns to move in it
    generator = torch.Generator(args.device).manual_seed(args.seed)
    training = args.steps or args.sft_steps
    stream = engine.load_problems(args.data, "train", args.seed, tuple(args.ops), args.kind) if training else None
    test = engine.load_problems(args.eval_data or args.data, "test", 0, tuple(args.ops), args.kind)
    held_out = engine.take(test, 0, args.eval_problems, lm.tokenizer, args.max_prompt_tokens, args.think_text)[:2]

    name = f"latent_grpo-{engine.Path(args.model).name}-seed{args.seed}"
    folder = engine.Path(args.resume) if args.resume else engine.open_run(args.out, name) if number == 0 else None
    size = sum(p.numel() for p in lm.model.parameters())
    devices = f"{processes} x {args.device}" if processes > 1 else args.device
    print(f"{args.model}: {size:,} parameters on {devices}; run folder {folder}")
    encoder_steps = args.label_steps if args.sft_steps and args.labels == "encoder" else 0
    resumed = state is not None
    if resumed:
        began -= state["seconds"]
        print(f"resuming {state['stage']} at step {state['step']} of {args.steps}")
        state["collapsed"] = state["collapsed"] if args.collapse else None
    else:
        state = {"step": -args.sft_steps - encoder_steps, "position": 0, "exits": [], "collapsed": None}
    state["args"] = vars(args) | {"resume": None, "out": None}
    auto = Autoencoder(lm, args.exit_id) if encoder_steps and state.get("stage") != "rl" else None
    start = None

    stages = {  # name: (its last step, what it does in a step)
        "labels": (-args.sft_steps, lambda o: label_step(lm, auto, o, stream, state, args, generator)),
        "sft": (0, lambda o: sft_step(lm, auto, o, stream, state, args, generator)),
        "rl": (args.steps, lambda o: rl_step(lm, start, o, stream, state, args, generator)),
    }
    for stage, (end, take_step) in stages.items():
        saved = resumed and state.get("stage") == stage
        if not saved and state["step"] >= end and stage != "rl":
            continue
        auto = None if stage == "rl" else auto  # its work is done
        whole = auto or lm.model
        trained = [weight for weight in whole.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.999), weight_decay=args.weight_decay, fused=True)
        if stage == "rl" and args.sft_steps and not saved and number == 0:
            save_model(lm, folder / "latent")  # the KL's reference, also after a resume; and a start for other runs
        if stage == "rl" and args.kl_coef:
            at_start = engine.load_model(f"{args.resume}/latent", args.device) if saved and args.sft_steps else lm
            start = replace(lm, model=copy.deepcopy(at_start.model).requires_grad_(False))
        if saved:
            engine.load_checkpoint(f"{args.resume}/checkpoint.safetensors", whole, optimizer, generator)
        if stage == "rl" and "before" not in state:
            state["before"] = evaluate(lm, held_out, args, full=True)
            print("before  " + "  ".join(f"{key} {value:.3f}" for key, value in state["before"].items()))
        with engine.Run(folder, whole, optimizer, generator, state, began) as run:
            if not train(stage, end, take_step, lm, held_out, run, args):
                print(f"stopped at step {state['step']}; continue with: python latent_grpo.py --resume {folder}")
                return 130
    after = evaluate(lm, held_out, args, full=True) if state["step"] else state["before"]
    if number:
        return 0
    print("after   " + "  ".join(f"{key} {value:.3f}" for key, value in after.items()))
    save_model(lm, folder / "model")
    result = {"method": "latent_grpo", "model": args.model, "seed": args.seed, "steps": args.steps}
    result |= {"collapsed": state["collapsed"], "seconds": time.time() - began} | after
    result |= {f"{key}_before": value for key, value in state["before"].items()}
    result = {key: round(value, 4) if isinstance(value, float) else value for key, value in result.items()}
    (folder / "result.json").write_text(json.dumps(result | {"args": state["args"]}) + "\n")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    engine.run_main(main)
