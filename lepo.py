r"""LEPO, Latent Reasoning Policy Optimization (arXiv 2604.17892), end to end in one file.

    python lepo.py                                       # the tiny model on a laptop CPU, under a minute
    python lepo.py --model Qwen2.5-0.5B --data gsm8k     # one GPU
    torchrun --nproc_per_node=8 lepo.py --model Qwen2.5-0.5B --data gsm8k     # eight
    python lepo.py --latent_steps 0                      # the baseline: plain GRPO, exactly

A language model usually thinks in words: at every step it commits to one token. LEPO lets it think its first
`latent_steps` steps in *soft tokens*, random mixtures of token embeddings, and only then write. The mixtures come
from a Gumbel-Softmax, so a group of rollouts of one prompt explores different latent thoughts; a verifier reads
the written part; and one policy gradient, the same formula at latent and written steps, makes the better ones likelier.

At step t the model has seen the prompt q and the embeddings e_<t, and gives logits a_t over the vocabulary.

  (1)  support:    C_t = top-k, then top-p of softmax(a_t / T);  l_k = log-probability of k, renormalised on C_t
  (2)  soft token: z_t = softmax((l + g) / tau),  g_k ~ Gumbel(0, 1) iid
  (3)  next input: e_t = sum_k z_tk E[k]
       A written step is the limit tau -> 0 of (2): z_t is one-hot at argmax(l + g), which is an exact draw from
       softmax(l) (the Gumbel-max trick), and e_t is that token's embedding.
  (4)  advantage:  A_i = (r_i - mean_group r) / (std_group r + 1e-4),  r_i = 1 if the verifier accepts, else 0
  (5)  log-probability of a step:  L_t(theta) = sum_k z_tk log pi_theta(k | q, e_<t)
  (6)  objective:  rho_t = exp(L_t(theta) - L_t(theta_old)),
       J = 1/(steps in the batch) sum_i sum_t min(rho_t A_i, clip(rho_t, 1-eps, 1+eps) A_i) - beta KL(pi, pi_start)

(5) is the paper's unification: the executed mixture serves as a soft label. Its gradient with respect to the logits
is A (z_t - pi_t), and with a one-hot z_t (5) is the log-probability of an ordinary token.

What (5) is and is not. For tau > 0 it is not the log of a density: its mean score is E[z] - pi, not 0, so the
gradient is biased. Measured on small vocabularies its direction is nearly right (cosine > .99 for smooth rewards)
and only its scale shrinks with tau (0.8 at tau .3), while the exact densities, offered here as `--estimator
concrete|gumbel`, are unbiased and pay about one unit of variance per candidate, however improbable. test_lepo.py
proves each of these statements; `latent_log_prob` below is where to compare them line by line.

Differences from the official code (github.com/YuyanZhou/lepo, a TRL 0.21 trainer), and why:
  - What the verifier reads. There, the argmax of the clean scores stands in as the "token" of a latent step: it is
    parsed with the answer and its EOS ends the rollout, although the model may have been fed quite another mixture.
    Here the heaviest candidate of the executed mixture stands in, for both. Reading only what was written
    (`--verifier_reads written`) was measured: the same to the last digit where thoughts end before the answer, and far
    worse where they can contain it (README), since a thought that ends with the right answer is called wrong. And
    only with the stand-ins is the limit tau -> 0 plain GRPO in the reward, too.
  - The ratio in (6). There, latent steps have none, and with the released settings it is 1 everywhere: on-policy
    REINFORCE. Here both kinds of step use (6), which is the same at the first update of a batch and clips the later
    ones when `--updates_per_batch` > 1. At latent steps rho is a pseudo-ratio (a geometric mean under z), no true one.
  - Old and reference probabilities, where used, are computed from the executed mixtures; there, from the stand-ins.
  - Temperature: (5) uses a_t / T at all steps; there, raw logits at latent steps. Equal at the paper's T = 1.
  - Normaliser: one count of steps over the whole batch; there, a mean per rollout and then over rollouts, which
    gives a step of a short rollout more weight.
  - The embeddings e_t are rebuilt inside the graph with z_t constant, so E gets its gradient as an input as in any
    language model; there, e_t is a cached constant.
  - KL, off by default as in the released settings, is exact over the vocabulary; there, an estimate on stand-ins.
  - Gaussian noise is scaled by the rms of log-probabilities; there, of logits, which depends on their arbitrary shift.
Like there, (5) is scored by the full softmax although (1) samples from a filtered one.
"""

import copy
import itertools
import json
import math
import os
import time
from dataclasses import replace

import torch
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import common
from common import SoftToken, UserError

# ----------------------------------------------------------------------------------------------------------------------
# 1.-2. Arguments. The method's defaults are the paper's (its Qwen2.5-3B run); sizes are for one GPU, with the paper's
#       in the help. The tiny model needs other values, which TINY lists and `--help` shows.

TINY = dict(
    data="tiny", latent_steps=12, tau=0.5, steps=100, prompts_per_step=32, max_new_tokens=40, lr=3e-4, warmup=5,
    micro_batch=64, eval_problems=512, eval_every=10, show_every=20,
)  # fmt: skip


def operations(text):
    """'2-5' -> [2, 5]"""
    low, _, high = text.partition("-")
    return [int(low), int(high or low)]


def build_parser():
    about = "LEPO and, with --latent_steps 0, GRPO. The first page of the file explains both."
    parser = common.Parser(usage="%(prog)s [flags]", description=about)

    def flag(name, default, text, **options):
        tiny_too = f"; tiny: {TINY[name]}" if name in TINY else ""
        options = {"type": type(default)} | options
        group.add_argument(f"--{name}", default=default, help=f"{text} [{default}{tiny_too}]", **options)

    group = parser.add_argument_group("model and data")
    flag("model", "tiny", "tiny, a local folder, a hub id, or a bare Qwen name")
    flag("data", "gsm8k", "tiny, gsm8k, a .jsonl file, or a folder with train.jsonl and test.jsonl")
    group.add_argument("--eval_data", help="as --data, or math500 [the test split of --data]")
    flag("ops", "2-5", "built-in task: operations per chain, low-high", type=operations)
    flag("kind", "mixed", "built-in task: signs in a chain", choices=["mixed", "plus", "minus", "single"])
    flag("max_prompt_tokens", 512, "problems with longer prompts are passed over")

    group = parser.add_argument_group("latent tokens")
    flag("latent_steps", 64, "soft tokens before the written ones; 0 is plain GRPO")
    flag("tau", 0.3, "Gumbel-Softmax temperature in (2), .3 to .6 in the paper; smaller is nearer to discrete tokens; "
         "the strength of other noise")  # fmt: skip
    flag("noise", "gumbel", "what makes latent steps random",
         choices=["gumbel", "gaussian", "dirichlet", "multinomial", "none"])  # fmt: skip
    flag("draws", 3, "tokens averaged by --noise multinomial")
    flag("estimator", "soft", "log-probability of a latent step: (5), that of its argmax, or an exact density",
         choices=["soft", "hard", "concrete", "gumbel"])  # fmt: skip
    flag("verifier_reads", "all", "the text that is judged: of all steps (of a latent one its heaviest candidate), or "
         "the written ones only", choices=["all", "written"])  # fmt: skip
    flag("temperature", 1.0, "T in (1)")
    flag("top_k", 30, "candidates kept in (1); 0 keeps the vocabulary")
    flag("top_p", 0.95, "probability mass kept in (1)")

    group = parser.add_argument_group("optimisation")
    flag("steps", 100, "updates (paper: about 99); 0 only evaluates")
    flag("prompts_per_step", 32, "P (paper: 128)")
    flag("group_size", 8, "G, rollouts per prompt")
    flag("max_new_tokens", 512, "cap on steps, latent ones included (paper: 2048)")
    flag("updates_per_batch", 1, "passes over a batch; above 1, clipping acts")
    flag("clip", 0.2, "eps in (6)")
    flag("kl_coef", 0.0, "beta in (6); above 0 keeps a second model in memory")
    flag("lr", 1e-6, "peak learning rate of AdamW; cosine decay")
    flag("warmup", 3, "steps of linear warm-up (paper: 3 %% of all)")
    flag("weight_decay", 0.1, "of AdamW, decoupled")
    flag("grad_clip", 1.0, "largest gradient norm")
    flag("micro_batch", 4, "rollouts per backward pass: memory, not results")
    group.add_argument("--gradient_checkpointing", action="store_true", help="less memory in the update, more time")

    group = parser.add_argument_group("evaluation and run")
    flag("eval_problems", 256, "held-out problems; the standard error is 3 points at 256")
    flag("eval_samples", 8, "samples per problem, k of pass@k")
    flag("eval_every", 20, "steps between noise-free evaluations; 0: none between")
    flag("show_every", 10, "steps between printed rollouts; 0: none")
    flag("save_every", 20, "steps between checkpoints; Ctrl-C and SIGTERM save too")
    flag("seed", 0, "of noise and training problems")
    flag("device", "cuda" if torch.cuda.is_available() else "cpu", "cuda: bfloat16 compute; cpu: float32",
         choices=["cuda", "cpu"])  # fmt: skip
    group.add_argument("--out", help="run folder [a new one under runs/]")
    group.add_argument("--resume", metavar="FOLDER", help="continue a run; flags beside it replace saved ones")
    return parser


def parse_args(argv=None):
    """-> (args, state of the checkpoint to resume or None). Raises UserError on values that cannot work."""
    parser = build_parser()
    first, _ = parser.parse_known_args(argv)
    state = common.read_checkpoint_state(f"{first.resume}/checkpoint.safetensors") if first.resume else None
    parser.set_defaults(**(state["args"] if state else TINY if common.is_tiny(first.model) else {}))
    args = parser.parse_args(argv)
    done, begun = (state["step"], state["args"]) if state else (0, vars(args))
    processes = int(os.environ.get("WORLD_SIZE", 1))  # from torchrun
    at_least_1 = ["prompts_per_step", "micro_batch", "updates_per_batch", "draws", "eval_samples", "eval_problems"]
    not_negative = ["steps", "latent_steps", "top_k", "clip", "lr", "weight_decay", "kl_coef", "warmup", "eval_every",
                    "show_every", "save_every"]  # fmt: skip
    checks = [
        *((getattr(args, name) >= 1, f"--{name} must be at least 1") for name in at_least_1),
        *((getattr(args, name) >= 0, f"--{name} cannot be negative") for name in not_negative),
        (args.steps >= done, f"this run has done {done} steps: --steps must be at least that"),
        (not (state and args.out), "--resume goes on in its own folder: leave --out away"),
        ("latent_steps" in begun, f"{args.resume} holds a run of another script"),
        (args.model == begun["model"], "--model cannot change in a run"),
        (args.device == begun["device"], "--device cannot change in a run: each has a random generator of its own"),
        (args.prompts_per_step >= processes,
         f"--prompts_per_step must be at least the number of processes, {processes}"),
        (processes == 1 or args.noise in ("gumbel", "none"),
         "several processes share out Gumbel noise only: --noise gumbel, or one process"),
        (args.group_size >= 2, "--group_size must be at least 2: an advantage compares rollouts"),
        (args.latent_steps < args.max_new_tokens, "--latent_steps must leave --max_new_tokens room to write"),
        (args.tau > 0 and args.temperature > 0, "--tau and --temperature must be above 0"),
        (0 < args.top_p <= 1, "--top_p must be in (0, 1]"),
        (args.grad_clip > 0, "--grad_clip must be above 0"),
        (args.noise == "gumbel" or args.estimator in ("soft", "hard"),
         f"--estimator {args.estimator} is the density of Gumbel noise: it needs --noise gumbel"),
        (1 <= args.ops[0] <= args.ops[1] <= 8, "--ops must be low-high between 1 and 8, such as 2-5"),
        (args.device == "cpu" or torch.cuda.is_available(), "--device cuda: no GPU found; use --device cpu"),
    ]  # fmt: skip
    for fine, message in checks:
        if not fine:
            raise UserError(message)
    return args, state


# ----------------------------------------------------------------------------------------------------------------------
# 3. The latent token, equations (1) and (2). Everything here is float32 and holds only the K candidates: the vocabulary
#    is seen once, by topk.


def support(logits, temperature, top_k, top_p):
    """Equation (1). logits (B, V) -> ids (B, K) and log_probs (B, K), descending; -inf off the support.

    The smallest set of top_k whose mass reaches top_p survives: probabilities .6, .3, .1 at top_p .8 keep two, and the
    two are renormalised to .67 and .33. Never empty.
    """
    values, ids = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]), dim=-1)  # (B, K)
    values = values.float() / temperature  # (B, K)
    probs = values.softmax(-1)  # (B, K)
    outside = probs.cumsum(-1) - probs >= top_p  # the mass before a candidate already reaches top_p; never the first
    outside[:, 0] = False
    return ids, values.masked_fill(outside, -math.inf).log_softmax(-1)


def gumbel_noise(shape, generator, device):
    """-log Exp(1) is Gumbel(0, 1). Some platforms can draw an exact 0 here, which would become infinite noise."""
    exponential = torch.empty(shape, device=device).exponential_(generator=generator)
    return -exponential.clamp_(min=torch.finfo(torch.float32).tiny).log()


def latent_token(ids, log_probs, gumbel, generator, args):
    """Equation (2), or another kind of noise: candidates (B, K) -> SoftToken. `gumbel` None: the noise-free mixture.

    The weights are made of a few float32 candidates and stay constants from here on: no gradient ever flows through
    the noise, so the reward needs no derivative.

    gaussian: normal noise on the log-probabilities, std = tau x their rms.  dirichlet: z ~ Dirichlet(tau x probs).
    multinomial: z = token counts of `draws` draws / draws; then (5) times `draws` is exactly unbiased, if nothing was
    filtered in (1).
    """
    probs = log_probs.exp()  # (B, K)
    if args.noise in ("gumbel", "none"):
        scores = log_probs if gumbel is None or args.noise == "none" else log_probs + gumbel
        return SoftToken(ids, (scores / args.tau).softmax(-1), scores)
    if gumbel is None:
        return SoftToken(ids, probs, log_probs)
    if args.noise == "gaussian":
        finite = log_probs > -math.inf
        rms = (log_probs.masked_fill(~finite, 0).square().sum(-1, keepdim=True) / finite.sum(-1, keepdim=True)).sqrt()
        scores = log_probs + args.tau * rms * torch.randn(probs.shape, generator=generator, device=probs.device)
        return SoftToken(ids, scores.softmax(-1), scores)
    if args.noise == "dirichlet":
        # A Dirichlet draw is a normalised Gamma draw; torch's distribution classes would not take our generator.
        gamma = torch._standard_gamma(args.tau * probs, generator=generator).clamp(min=1e-30) * (probs > 0)
        weights = gamma / gamma.sum(-1, keepdim=True)
    else:
        draws = probs.multinomial(args.draws, replacement=True, generator=generator)  # (B, draws)
        share = torch.full_like(draws, 1 / args.draws, dtype=probs.dtype)
        weights = torch.zeros_like(probs).scatter_add_(-1, draws, share)  # (B, K)
    return SoftToken(ids, weights, log_probs)


def written_token(ids, log_probs, gumbel):
    """The limit tau -> 0: one id with weight 1, drawn by Gumbel-max; the most likely one without noise."""
    choice = (log_probs if gumbel is None else log_probs + gumbel).argmax(-1, keepdim=True)  # (B, 1)
    one = torch.ones_like(choice, dtype=torch.float32)
    return SoftToken(ids.gather(-1, choice), one, torch.zeros_like(one))


# ----------------------------------------------------------------------------------------------------------------------
# 4. Rollout: `latent_steps` soft tokens, then written ones until a stop token or the cap. Equation (3) and the KV cache
#    live in common.decode, which asks the function below for each step's token.


def rollout(lm, prompts, group_size, args, generator, latent_steps=None, noisy=True):
    """group_size trajectories for each of P prompts -> common.Rollout with N = P * group_size rows. Of several
    processes, each takes its share of the prompts."""
    latent_steps = args.latent_steps if latent_steps is None else latent_steps
    own, total, steps = common.share(len(prompts)), len(prompts) * group_size, 0

    def choose(logits, t, rows):
        nonlocal steps
        steps = t + 1
        ids, log_probs = support(logits, args.temperature, args.top_k, args.top_p)  # (B, K)
        # Gumbel noise is drawn for the rows of all processes, running or not: a row's luck does not depend on when
        # others end, nor on who computes it.
        rows = rows + own.start * group_size
        gumbel = gumbel_noise((total, ids.shape[1]), generator, logits.device)[rows] if noisy else None  # (B, K)
        if t < latent_steps:
            return latent_token(ids, log_probs, gumbel, generator, args)
        return written_token(ids, log_probs, gumbel)

    roll = common.decode(lm, prompts[own], group_size, args.max_new_tokens, choose)
    common.synchronise(generator, steps)
    return roll


# ----------------------------------------------------------------------------------------------------------------------
# 5. Reward and advantages, equation (4). The verifier reads text and nothing else; a group compares rollouts of one
#    prompt, so a prompt that all or none of them solve teaches nothing (advantage exactly 0).


def texts_of(lm, roll, args, latent_steps=None):
    """The text of each rollout that the verifier reads -> list of N str."""
    latent_steps = args.latent_steps if latent_steps is None else latent_steps
    first = 0 if args.verifier_reads == "all" else latent_steps
    ids, lengths = roll.heaviest().tolist(), roll.length.tolist()
    texts = [row[first:n] for row, n in zip(ids, lengths, strict=True)]
    return lm.tokenizer.batch_decode(texts, skip_special_tokens=True) if texts else []


def score(texts, problems, group_size):
    """(strict, flexible) rewards (P, G) of N = P * G texts, on the CPU."""
    pairs = [common.verify(text, problems[n // group_size]) for n, text in enumerate(texts)]
    return torch.tensor(pairs).reshape(-1, 2).T.reshape(2, len(problems), group_size)


def group_advantages(rewards):
    """Equation (4): rewards (P, G) -> advantages (P, G), with the unbiased (n - 1) standard deviation.

    Rewards 1, 1, 0, 0 give .87, .87, -.87, -.87. A single right rollout among four gets 1.5 and the others -.5: what
    succeeds rarely is pushed harder. Four equal rewards give four zeros.
    """
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# 6. The log-probability of a trajectory's steps, equation (5) and its alternatives. The hidden states before each step
#    come from common.replays; log-probabilities of the candidates from common.candidate_log_probs, which never holds
#    the logits of all steps.


def latent_log_prob(log_p, weights, scores, estimator, tau):
    """Log-probability of executed mixtures under the current policy. All (…, K) -> (…).

    log_p: log pi_theta of the candidates; weights: z; scores: l + g at rollout time, -inf off the support of size m.
    Gradient with respect to the logits, w = softmax(l - tau log z) and u = exp(-(scores - l)):
      soft      z - pi                  the paper; biased for tau > 0, least variance
      hard      onehot(argmax z) - pi   zero mean; ignores that the mixture is soft
      concrete  1 - m w                 exact density of z (Maddison et al. 2017, def. 1); E|.|^2 = m (m-1) / (m+1)
      gumbel    v - pi sum(v), v = 1-u  exact density of l + g (SofT-GRPO); E|v|^2 = m
    """
    if estimator == "soft":
        return (weights * log_p).sum(-1)
    if estimator == "hard":
        return log_p.gather(-1, weights.argmax(-1, keepdim=True)).squeeze(-1)
    inside = scores > -math.inf  # (…, K)
    log_p = log_p.masked_fill(~inside, -math.inf).log_softmax(-1).masked_fill(~inside, 0)  # l of (1), (…, K)
    scores = scores.masked_fill(~inside, 0)  # (…, K)
    if estimator == "gumbel":
        margin = scores - log_p  # (…, K)
        return ((-margin - (-margin).exp()) * inside).sum(-1)
    # z itself would underflow where log z does not: log z = scores / tau - const, from the scores.
    log_z = (scores / tau).masked_fill(~inside, -math.inf).log_softmax(-1).masked_fill(~inside, 0)  # (…, K)
    m = inside.sum(-1)  # (…)
    pull = (log_p - tau * log_z).masked_fill(~inside, -math.inf).logsumexp(-1)  # (…)
    constant = m.float().lgamma() + (m - 1) * math.log(tau)  # (…)
    return constant + ((log_p - (tau + 1) * log_z) * inside).sum(-1) - m * pull


def trajectory_log_probs(lm, roll, rows, hidden, args):
    """Log-probabilities (B, T) of the steps of rows (B,), replayed as hidden (B, T, D); 0 behind a row's end."""
    steps = hidden.shape[1]
    executed = roll.mask()[rows, :steps]  # (B, T)
    ids, weights, scores = (x[rows, :steps][executed] for x in (roll.ids, roll.weights, roll.scores))  # (M, K)
    log_p = common.candidate_log_probs(lm, hidden[executed], ids, args.temperature)  # (M, K)
    log_prob = (weights * log_p).sum(-1)  # (M,): (5) for both kinds of step, since a written token is one-hot
    if args.estimator != "soft":
        latent = latent_log_prob(log_p, weights, scores, args.estimator, args.tau)  # (M,)
        is_latent = torch.arange(steps, device=ids.device).expand_as(executed)[executed] < args.latent_steps  # (M,)
        log_prob = torch.where(is_latent, latent, log_prob)
    return log_prob.new_zeros(executed.shape).masked_scatter(executed, log_prob)


# ----------------------------------------------------------------------------------------------------------------------
# 7. Update, equation (6). Gradients accumulate over micro-batches of similar length, and over processes; the normaliser
#    is counted once over the whole batch, so that cutting it differently gives the same update.


def surrogate(log_probs, old_log_probs, advantages, clip):
    """The summand of (6) and where clipping acts: log_probs, old_log_probs (B, T), advantages (B, 1) -> (B, T) twice

    With eps .2, ratio 1.5 and A = 1 give 1.2 without a gradient: this step has been encouraged enough. Ratio 1.5 and
    A = -1 give -1.5, unclipped: it has moved the wrong way and is pulled back in full.
    """
    # Bounded before exp: an overflow would turn into inf * 0 = NaN in the masked sum.
    ratio = (log_probs - old_log_probs).clamp(-10, 10).exp()  # (B, T)
    plain, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages  # (B, T)
    return torch.minimum(plain, clipped), clipped < plain


def exact_kl(lm, hidden, start, start_hidden, temperature):
    """KL(pi_theta || pi_start) at each step, over the whole vocabulary. Hidden states (M, D) twice -> (M,)"""

    def log_softmax(model, hidden):
        hidden = hidden.to(common.compute_dtype(hidden.device))
        return ((hidden @ model.head.to(hidden.dtype).T).float() / temperature).log_softmax(-1)  # (C, V)

    def kl(hidden, start_hidden):
        log_p = log_softmax(lm, hidden)  # (C, V)
        with torch.no_grad():
            log_q = log_softmax(start, start_hidden)  # (C, V)
        return (log_p.exp() * (log_p - log_q)).sum(-1)  # (C,)

    # Not kept for the backward pass but made again in it, a few hundred steps at a time: (M, V) never exists.
    chunks = zip(hidden.split(256), start_hidden.split(256), strict=True)
    return torch.cat([checkpoint(kl, *pair, use_reentrant=False) for pair in chunks])


def update(lm, start, optimizer, roll, advantages, args):
    """`updates_per_batch` optimiser steps on one batch; advantages (N,); `start` is the KL's reference. -> metrics

    Rows with advantage 0 have gradient 0 and are left out of the arithmetic (not of the normaliser), unless a KL term
    needs them. Raises UserError, before it is applied, when a gradient is not finite.
    """
    rows = torch.arange(len(advantages)) if args.kl_coef else advantages.nonzero().squeeze(-1).cpu()  # (M,)
    mask = roll.mask()  # (N, T)
    used, written = mask[rows].sum(), mask[rows][:, args.latent_steps :].sum()  # steps of rows that teach something
    counts = common.all_reduce(torch.stack([roll.length.sum(), used, written]).cpu())
    normaliser, used, written = counts.tolist()  # every executed step of the batch, whatever process executed it
    if not used:
        return {"grad_norm": 0.0, "surprise": None, "clipped": 0.0, "kl": 0.0}
    old = {}  # log-probabilities under theta_old, by micro-batch, kept from the first pass
    sums = torch.zeros(3, device=advantages.device)  # of clipped steps, KL and surprise; read only at the end
    for _ in range(args.updates_per_batch):
        optimizer.zero_grad()
        replays = common.replays(lm, roll, rows, args.micro_batch, args.gradient_checkpointing)
        at_start = common.replays(start, roll, rows, args.micro_batch) if args.kl_coef else itertools.repeat((0, 0))
        for i, ((micro, hidden), (_, start_hidden)) in enumerate(zip(replays, at_start, strict=False)):
            log_probs = trajectory_log_probs(lm, roll, micro, hidden, args)  # (B, T)
            valid = mask[micro, : log_probs.shape[1]]  # (B, T)
            old_log_probs = old.setdefault(i, log_probs.detach())  # (B, T)
            gain, clipped = surrogate(log_probs, old_log_probs, advantages[micro, None], args.clip)  # (B, T)
            loss, kl = -(gain * valid).sum() / normaliser, torch.zeros_like(sums[0])
            if args.kl_coef:
                kl = exact_kl(lm, hidden[valid], start, start_hidden[valid], args.temperature).sum() / normaliser
                loss = loss + args.kl_coef * kl
            loss.backward()
            surprise = -(log_probs * valid)[:, args.latent_steps :].sum()
            sums += torch.stack([(clipped & valid).sum(), kl, surprise]).detach()
        common.reduce_gradients(lm.model)
        grad_norm = torch.nn.utils.clip_grad_norm_(lm.model.parameters(), args.grad_clip).item()
        if not math.isfinite(grad_norm):
            raise UserError("the gradient is not finite and was not applied; the run is saved: --resume it, "
                            "with a lower --lr, and it goes on with the next batch")  # fmt: skip
        optimizer.step()
    passes = args.updates_per_batch
    clipped, kl, surprise = (common.all_reduce(sums) / passes).tolist()
    return {"grad_norm": grad_norm, "surprise": surprise / max(written, 1), "clipped": clipped / used, "kl": kl}


# ----------------------------------------------------------------------------------------------------------------------
# 8. Evaluation, always on the same held-out problems and with its own noise, so that it never disturbs training:
#    noise-free pass@1, sampled pass@1 and pass@k, and noise-free with the latent steps switched off.


def evaluate(lm, held_out, args, full):
    """held_out: (problems, prompts). `full` adds the sampled scores and the run without latents. -> dict"""
    problems, prompts = held_out
    generator = torch.Generator(args.device).manual_seed(12345)

    def run(name, group_size, latent_steps, noisy):
        # As many rows at once as a training rollout has: a KV cache that fits there fits here.
        size, parts = max(1, args.prompts_per_step * args.group_size // group_size), []
        for i in common.progress(range(0, len(prompts), size), desc=f"evaluating: {name}", leave=False):
            batch = problems[i : i + size]
            roll = rollout(lm, prompts[i : i + size], group_size, args, generator, latent_steps, noisy)
            own = batch[common.share(len(batch))]
            scores = score(texts_of(lm, roll, args, latent_steps), own, group_size)  # (2, P, G)
            lengths = roll.length.cpu().float().view(1, len(own), group_size)
            parts.append(torch.cat([scores, lengths]))
        return torch.cat(parts, 1)  # (strict | flexible | length, P, G), of this process's share

    greedy, flexible, length = map(common.mean, run("noise-free", 1, args.latent_steps, False))
    result = {"greedy": greedy, "greedy_flexible": flexible, "length": length}
    if full:
        k = args.eval_samples
        sampled = run("sampled", k, args.latent_steps, True)  # (3, P, k)
        counts = sampled[0].sum(1).int().tolist()
        result |= {"sampled": common.mean(sampled[0]), "sampled_flexible": common.mean(sampled[1])}
        result[f"pass@{k}"] = common.mean(torch.tensor([common.pass_at_k(k, c, k) for c in counts]))
        off = common.mean(run("latents off", 1, 0, False)[0]) if args.latent_steps else greedy
        result["greedy_no_latents"] = off
    return result


def describe(lm, roll, n, problem, text, reward, latent_steps):
    """A rollout that a person can read: each latent token as its heaviest candidates with their weights. -> str"""
    lines = [f"    {problem.question}"]
    for t in range(min(latent_steps, int(roll.length[n]))):
        pairs = sorted(zip(roll.weights[n, t].tolist(), roll.ids[n, t].tolist(), strict=True), reverse=True)[:4]
        candidates = "  ".join(f"{lm.tokenizer.decode([i])!r} {w:.2f}" for w, i in pairs if w >= 0.005)
        lines.append(f"    latent {t + 1:2d}  {candidates}")
    lines.append(f"    text       {text.strip()!r}")
    lines.append(f"    reward {reward:.0f}, the answer is {problem.answer}")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# 9. main: evaluate, train, evaluate. State that must survive an interruption is the weights, the optimiser, the
#    generator and the numbers in `state`; everything else follows from the arguments.


def learning_rate(step, args):
    """Linear warm-up, then cosine towards 0 after the last step."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - args.warmup) / max(1, args.steps - args.warmup)))


def train_step(lm, start, optimizer, stream, state, args, generator):
    """One round of sections 4 to 7 -> (log row, timing row, a readable sample); advances `state`."""
    began, step = time.time(), state["step"]
    problems, prompts, position = common.take(
        stream, state["position"], args.prompts_per_step, lm.tokenizer, args.max_prompt_tokens
    )
    roll = rollout(lm, prompts, args.group_size, args, generator)
    problems = problems[common.share(len(problems))]
    texts = texts_of(lm, roll, args)
    strict, flexible = score(texts, problems, args.group_size)  # (P, G) each
    advantages = group_advantages(strict).flatten().to(args.device)  # (N,)
    rolled = time.time()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, args)
    state |= {"step": step + 1, "position": position}  # before the update: one that fails is not tried again
    metrics = update(lm, start, optimizer, roll, advantages, args)
    is_latent = roll.mask()[:, : args.latent_steps]  # (N, latent steps)
    weights = roll.weights[:, : args.latent_steps]  # (N, latent steps, K)
    effective_k = 1 / weights[is_latent].square().sum(-1)  # (latent steps executed,)
    row = {
        "step": step,
        "reward": common.mean(strict),
        "flexible": common.mean(flexible),
        "length": common.mean(roll.length),
        "stopped": common.mean(roll.stopped),
        "zero_advantage": common.mean(advantages == 0),
        "effective_k": common.mean(effective_k) if args.latent_steps else 1.0,
        "lr": learning_rate(step, args),
        **metrics,
    }
    timing = {
        "step": step,
        "seconds": time.time() - began,
        "rollout_seconds": rolled - began,
        "tokens_per_second": row["length"] * args.prompts_per_step * args.group_size / (rolled - began),
    }
    if not problems:  # so few are left that another process has them
        return row, timing, ""
    n = int(((1 - weights.amax(-1)) * is_latent).sum(1).argmax())  # the rollout with the softest thoughts is shown
    problem, reward = problems[n // args.group_size], strict.flatten()[n].item()
    return row, timing, describe(lm, roll, n, problem, texts[n], reward, args.latent_steps)


def train(lm, start, stream, held_out, run, args):
    """Steps until the last one or an interrupt. -> True when all steps are done"""
    state = run.state
    for _ in run.steps(args.steps, args.save_every, "training"):
        # With one update per batch, weights are as they were until a step's last act: it can be taken back.
        with run.attempt(undo=args.updates_per_batch == 1):
            row, timing, sample = train_step(lm, start, run.optimizer, stream, state, args, run.generator)
        done = state["step"]
        if args.eval_every and done % args.eval_every == 0 and done < args.steps:
            row["greedy"] = evaluate(lm, held_out, args, full=False)["greedy"]
        run.write(row, timing)
        if args.show_every and row["step"] % args.show_every == 0:
            tqdm.write(sample)
        tqdm.write(
            f"step {row['step']:4d}  reward {row['reward']:.3f}  flexible {row['flexible']:.3f}"
            f"  length {row['length']:5.1f}  zero-adv {row['zero_advantage']:.2f}  eff-k {row['effective_k']:.2f}"
            f"  grad {row['grad_norm']:.3f}  {timing['seconds']:.2f} s"
            + (f"  greedy {row['greedy']:.3f}" if "greedy" in row else "")
        )
    return state["step"] >= args.steps


def main(argv=None):
    args, state = parse_args(argv)
    began = time.time()
    common.start_processes(args.device)
    number, processes = common.process()
    lm = common.load_model(args.model, args.device)
    start = replace(lm, model=copy.deepcopy(lm.model).requires_grad_(False)) if args.kl_coef else None
    generator = torch.Generator(args.device).manual_seed(args.seed)
    optimizer = torch.optim.AdamW(
        lm.model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=args.weight_decay, fused=True
    )
    stream = common.load_problems(args.data, "train", args.seed, tuple(args.ops), args.kind) if args.steps else None
    test = common.load_problems(args.eval_data or args.data, "test", 0, tuple(args.ops), args.kind)
    held_out = common.take(test, 0, args.eval_problems, lm.tokenizer, args.max_prompt_tokens)[:2]

    method = "lepo" if args.latent_steps else "grpo"
    name = f"{method}-{common.Path(args.model).name}-seed{args.seed}"
    folder = common.Path(args.resume) if args.resume else common.open_run(args.out, name) if number == 0 else None
    size = sum(p.numel() for p in lm.model.parameters())
    devices = f"{processes} x {args.device}" if processes > 1 else args.device
    print(f"{args.model}: {size:,} parameters on {devices}; run folder {folder}")
    if state:
        common.load_checkpoint(f"{args.resume}/checkpoint.safetensors", lm.model, optimizer, generator)
        began -= state["seconds"]
        print(f"resuming at step {state['step']} of {args.steps}")
    else:
        state = {"step": 0, "position": 0, "before": evaluate(lm, held_out, args, full=True)}
        print("before  " + "  ".join(f"{key} {value:.3f}" for key, value in state["before"].items()))
    state["args"] = vars(args) | {"resume": None, "out": None}

    with common.Run(folder, lm.model, optimizer, generator, state, began) as run:
        if not train(lm, start, stream, held_out, run, args):
            print(f"stopped at step {state['step']}; continue with: python lepo.py --resume {folder}")
            return 130
    after = evaluate(lm, held_out, args, full=True) if state["step"] else state["before"]
    if number:
        return 0
    print("after   " + "  ".join(f"{key} {value:.3f}" for key, value in after.items()))
    lm.model.save_pretrained(folder / "model")
    lm.tokenizer.save_pretrained(folder / "model")
    result = {"method": method, "model": args.model, "seed": args.seed, "steps": args.steps}
    result |= {"seconds": time.time() - began} | after
    result |= {f"{key}_before": value for key, value in state["before"].items()}
    result = {key: round(value, 4) if isinstance(value, float) else value for key, value in result.items()}
    (folder / "result.json").write_text(json.dumps(result | {"args": state["args"]}) + "\n")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    common.run_main(main)
