r"""DLR, DeepLatent Reasoning (arXiv 2601.17275), in one file. Read lepo.py first.

    python dlr.py                            # a frozen small model on a laptop CPU, two minutes
    python dlr.py --policy prompt            # a control: one learned prompt for all problems
    python dlr.py --model Qwen2.5-1.5B-Instruct --assistant Qwen2.5-0.5B    # GSM8K on one GPU

A large model stays as it is, to the bit. A small model, the assistant, reads the problem and
writes T latents into the prompt of the large one. The large one then answers greedily. RL explores
latents, and not the words of an answer. It trains the assistant, so that latents which lead to
right answers become likelier.

For a problem x and a group of G trajectories i:

  (1)  latents:      z_it ~ pi(. | x) = N(mu_t(x), sigma_t(x)^2) in R^d, for t = 1 .. T
                     mu and sigma are read off the assistant's states at T learned queries, which
                     stand behind the problem.
  (2)  text:         y_i = greedy M([E(x); f(z_i1) .. f(z_iT); E(cue)])
                     M is the frozen model, E its embeddings. f(z) = softmax(W z) E, W is fixed.
  (3)  reward:       R_i = R_corr + lambda R_form, each 1 or -1: a right answer, and the form that
                     the task asked for
  (4)  advantage:    A_i = (R_i - mean R) / (std R + 1e-6), over a group
  (5)  objective:    J = mean_i A_i log pi(z_i | x) / d - beta KL(pi || pi_ref) / d
                     pi_ref is the policy at the start.
  (6)  contrastive:  L_cl = -mean_kt log(exp(s z_kt . z_kt) / sum_j exp(s z_kt . z_jt))
                     k and j are trajectories of one group, s = 1 / (d sigma^2) with the sigma of
                     the start.
  (7)  loss:         -J + gamma L_cl + mean_i (U(z_i) - R_i)^2
                     The last term trains the value head U alone.

The large model takes no part in an update. A latent is scored by the policy that drew it, so no
text is replayed. A step costs greedy texts, and a few passes of the small model over the prompts.

With `--filter prescreen` M decodes only 18 % of the G latents: those of which U expects most, and
a few others at random. That is how the paper saves most of its cost.

Why is f a mixture of words? The main model of chains was pretrained with notes in half of its
prompts. Behind the note `mind+` it forgets no carry. Random mixtures of words often contain such a
note: before training .36 of the groups have both right and wrong answers. Gaussian noise in the
space of embeddings hardly ever comes near a note: .05 to .08 of the groups.

When it does not learn. Accuracy stays at .5, and `averaged` is near `greedy`: the assistant says
one thing to everybody, which helps half of the problems. Take more prompts, or a larger group.
`mixed_groups` is 0 from the start: no draw changes an answer. Take fewer `--latent_steps`, and not
`--projection identity`. After training, `model/` is the assistant alone: to evaluate a finished run
again, --resume it.

What the paper reports, one run each: 55.4 on GSM8K against 46.2 of GRPO, 18 % decoded, and
4.7 points from (6) on MATH. README.md says what of it is seen in small.

No public code was found, and the paper leaves much open. A paragraph that begins with "Open in the
paper" says what, and what is done here.
"""

import math
import time
from argparse import Namespace
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import common
import tasks
from tasks import encoding, settings

# --- 1. Settings ----------------------------------------------------------------------------------
# The defaults of the method's own flags are the paper's where it gives them. Sizes are for one GPU:
# the paper has 64 trajectories a group, and up to 32 latents of 512 numbers. All other flags are in
# tasks/settings.py. A built-in task needs other values.
# Open in the paper: lambda of (3), the standard deviation in (4), how many updates a batch gets.
# Here: 0.2, that of the population, and one.
PRESETS = {
    "chains": dict(
        model="chains",
        assistant="chains",
        cue=" <think>",  # its words carry their space
        kind="single",  # chains of one sign, each of which one note would help
        latent_steps=4,  # with six, the other latents drown the right word
        latent_dim=32,  # enough to name one of 70 words
        max_new_tokens=40,
        steps=100,
        lr=3e-3,  # 1e-3 is too slow, 6e-3 no better
        lr_assistant=1e-3,
        contrast=0.01,  # at the paper's .1 noise grows: .69 of the samples are right and not .98
        eval_problems=512,
    ),
}


def parse_args(argv=None):
    about = "DLR: an assistant whispers to a frozen model. The first page of the file explains it."
    changed = dict(steps=200, group_size=16, max_new_tokens=256, lr=1e-4, ask=None)
    parser = settings.make_parser("dlr.py", about, PRESETS, **changed)
    number, add = parser.add_number, parser.add_argument  # number: name, default, least value, help
    add("--assistant", default="Qwen2.5-0.5B", help="the model that is trained; --model is frozen")
    policies, projections = ["parallel", "prompt"], ["words", "identity"]
    add("--policy", default="parallel", choices=policies, help="prompt: one for all problems")
    add("--projection", default="words", choices=projections, help="f of (2); identity: z itself")
    add("--cue", default="<think>", help="what stands behind the latents, in (2)")
    number("latent_steps", 16, 1, "T, latents of a problem")
    number("latent_dim", 128, 1, "d, numbers of a latent")
    number("sigma", 1.0, 1e-3, "of (1) at the start; with identity in units of an embedding's rms")
    number("format_weight", 0.2, 0.0, "lambda of (3)")
    add("--filter", default="all", choices=["all", "prescreen"], help="which latents are decoded")
    number("share", 0.18, 0.0, "of a group that is decoded after a pre-screen")
    number("kl_coef", 0.01, 0.0, "beta of (5)")
    number("contrast", 0.1, 0.0, "gamma of (7)")
    number("lr_assistant", 3e-5, 0.0, "peak rate of the assistant; --lr is that of the rest")
    args = settings.parse_args(parser, PRESETS, argv)
    if not 2 <= decoded(args) <= args.group_size:  # an advantage compares texts
        parser.error(f"--share must leave 2 to {args.group_size} of --group_size: change one")
    return args


# --- 2. The latent policy: equation (1), and f of (2) ---------------------------------------------
# The only thing that learns. At the start sigma is the same everywhere and far larger than mu, so
# the draws of a group differ and a reward can tell them apart.
# Open in the paper: the density of a latent. Here it is the Gaussian of (1), whose KL has a closed
# form. T is fixed.
# Open in the paper: f. A latent has 512 numbers, an embedding of its main model 4,096. Here a
# latent becomes a soft token, a mixture of the main model's words. `--projection identity` is the
# literal reading: z is the embedding, and d is its width. RL trains neither W nor E, because the
# action is z, before f.
class LatentPolicy(nn.Module):
    """pi(z | x): the assistant, T queries, two heads; and W of (2) and the value head U of (7)"""

    def __init__(self, lm, main_lm, args):
        super().__init__()
        self.args = args
        self.main_lm = main_lm  # a dataclass, so its weights are no parameters of the policy
        self.lm = lm
        self.assistant = lm.model
        width = lm.embedding.shape[1]  # h
        vocabulary, main_width = main_lm.embedding.shape  # V, D
        d = main_width if args.projection == "identity" else args.latent_dim
        queries = torch.randn(args.latent_steps, width)  # (T, h)
        queries *= lm.embedding.detach().std().cpu()  # as large as an embedding
        self.queries = nn.Parameter(queries)
        self.norm = nn.LayerNorm(width)
        self.mu = nn.Linear(width, d)
        self.log_std = nn.Linear(width, d)
        nn.init.zeros_(self.mu.bias)
        nn.init.zeros_(self.log_std.weight)
        nn.init.constant_(self.log_std.bias, math.log(args.sigma))
        self.mu.weight.data *= 0.1
        seen = args.latent_steps * d + width  # F, numbers that U sees of a trajectory
        hidden = nn.Linear(seen, 64)
        self.value = nn.Sequential(nn.LayerNorm(seen), hidden, nn.GELU(), nn.Linear(64, 1))
        # A softmax over V random logits is spread over all words if their deviation is far below
        # sqrt(2 ln V), and is one word if it is far above. At 1.4 times that, most draws mix two to
        # five words, at --sigma 1. All rows of W have one norm, so all words are equally likely.
        if args.projection == "words":
            directions = F.normalize(torch.randn(vocabulary, d), dim=-1)  # (V, d)
            self.register_buffer("words", 1.4 * math.sqrt(2 * math.log(vocabulary)) * directions)
        self.to(args.device)

    def forward(self, prompts):
        """P prompts -> pi, a Gaussian over (P, 1, T, d), and the states below it (P, 1, T, h)

        One pass serves all trajectories of a problem: the 1 stands for its group. Prompts are
        padded on the left. Sigma stays within e^-4 and e times that of the start.
        """
        ids = [torch.tensor(prompt, device=self.args.device) for prompt in prompts]
        ids = pad_sequence(ids, True, padding_value=-1, padding_side="left")  # (P, L)
        latent_steps = len(self.queries)  # T
        states = self.queries.expand(len(ids), -1, -1)  # (P, T, h)
        if self.args.policy == "parallel":
            mask = F.pad((ids >= 0).long(), (0, latent_steps), value=1)  # (P, L + T)
            embeds = torch.cat([self.lm.embedding[ids.clamp(min=0)], states], 1)  # (P, L + T, h)
            with self.lm.autocast():
                hidden = self.lm.hidden_states(embeds, None, mask)  # (P, L + T, h)
            states = hidden[:, -latent_steps:].float()
        states = self.norm(states)[:, None]  # (P, 1, T, h)
        start = math.log(self.args.sigma)
        log_std = self.log_std(states).clamp(start - 4, start + 1)  # (P, 1, T, d)
        return Normal(self.mu(states), log_std.exp(), validate_args=False), states

    def mixture(self, z):
        """softmax(W z): latents (…, d) -> weights of the main model's words (…, V)"""
        return F.linear(z, self.words).softmax(-1)

    def project(self, z):
        """f of (2): latents (…, d) -> embeddings of the main model (…, D)"""
        embedding = self.main_lm.embedding  # (V, D)
        if self.args.projection == "identity":
            return z * embedding.float().square().mean().sqrt()
        few = z.flatten(0, -2).split(256)  # a latent makes V weights: not for all of them at once
        mixed = [self.mixture(latents).to(embedding.dtype) @ embedding for latents in few]
        return torch.cat(mixed).unflatten(0, z.shape[:-1])

    def save_pretrained(self, folder):
        self.assistant.save_pretrained(folder)  # checkpoint.pt has the rest too

    def parameter_groups(self):
        """Heads, assistant, value head: each with its own bound on the gradient"""
        heads = [self.queries, *self.norm.parameters()]
        heads += [*self.mu.parameters(), *self.log_std.parameters()]
        return [
            {"params": heads},
            {"params": self.assistant.parameters()},
            {"params": self.value.parameters()},
        ]


def load_policy(main_lm, args):
    """The policy at the start, which follows from the seed. It is also pi_ref of (5)."""
    lm = common.load_model(Namespace(**vars(args) | {"model": args.assistant}))
    torch.manual_seed(args.seed)
    return LatentPolicy(lm, main_lm, args)


# --- 3. Rollout: equation (2) ---------------------------------------------------------------------
# Draw G latents for each problem, choose which of them to decode, and let the frozen model answer.
# Open in the paper: where latents stand. Here they stand between the question and the cue, as a
# note would.
# Open in the paper: its Algorithm 1 decodes all G. Its section on cost decodes 18 %, by a score
# that it does not define. Here that is the value head U. What it takes is no fair draw of pi, so
# the gradient of a pre-screened run is biased.
@dataclass
class Rollout:
    """G trajectories for each of P prompts, of which K were decoded."""

    prompts: list  # P lists of the assistant's token ids
    noise: torch.Tensor  # (P, G, T, d) of all trajectories, for (6)
    z: torch.Tensor  # (P, K, T, d) latents
    seen: torch.Tensor  # (P, K, F) what U sees: latents, and the mean state at the queries
    texts: list  # P * K
    length: torch.Tensor  # (P, K) tokens of the text, the end token included
    ended: torch.Tensor  # (P, K) bool, by an end token and not by the cap


def encode(lm, task, problems, args):
    """-> prompts that end where the latents begin, and the cue behind them, as token ids"""
    cue = lm.tokenizer.encode(args.cue, add_special_tokens=False)
    if not cue:
        raise common.UserError(f"--cue {args.cue!r} has no token")
    prompts = encoding.encode(lm, task, problems, args, ending=args.cue)
    return [ids[: len(ids) - len(cue)] for ids in prompts], cue


@torch.no_grad()
def decode(main_lm, task, problems, thoughts, args):
    """Equation (2): f(z) (P, K, T, D) -> P * K texts, their lengths and if they ended, (P, K)"""
    prompts, cue = encode(main_lm, task, problems, args)
    shape = thoughts.shape[:2]
    thoughts = thoughts.flatten(0, 1)  # (N, T, D), N = P * K
    cue = main_lm.embedding[cue].expand(len(thoughts), -1, -1)  # (N, tokens of the cue, D)
    decoder = common.Decoder(main_lm, prompts, shape[1])
    logits = decoder.feed(torch.cat([thoughts, cue], 1))  # (N, V)

    rows = torch.arange(len(thoughts), device=args.device)  # (B,) the texts that go on
    tokens = torch.zeros(len(rows), args.max_new_tokens, dtype=torch.long, device=args.device)
    length = torch.full_like(rows, args.max_new_tokens)  # (N,)
    ended = torch.zeros_like(rows, dtype=torch.bool)  # (N,)
    for t in range(args.max_new_tokens):
        token = logits.argmax(-1)  # (B,)
        tokens[rows, t] = token
        stops = torch.isin(token, main_lm.stop_ids)  # (B,)
        length[rows[stops]] = t + 1
        ended[rows[stops]] = True
        if stops.all():
            break
        if stops.any():  # texts that have ended leave the decoder
            rows, token = rows[~stops], token[~stops]
            decoder.keep(~stops)
        logits = decoder.feed(main_lm.embedding[token][:, None])  # (B, V)
    written = [ids[:count] for ids, count in zip(tokens, length, strict=True)]
    texts = main_lm.tokenizer.batch_decode(written, skip_special_tokens=True)
    return texts, length.view(shape), ended.view(shape)


def decoded(args):
    """K, the trajectories of a group that the main model decodes: 12 of 64 at --share .18"""
    return round(args.share * args.group_size) if args.filter == "prescreen" else args.group_size


def prescreen(expected, args):
    """Rewards that U expects (P, G) -> which to decode (P, K): the best, and others at random

    From a quarter of the places, at least one, U learns what it would have missed. Of 64
    trajectories the 9 best are decoded and 3 others.
    """
    others = max(1, decoded(args) // 4)
    best = expected.topk(decoded(args) - others, dim=1).indices  # (P, K - others)
    lots = torch.rand(expected.shape, device=expected.device)  # (P, G)
    lots = lots.scatter(1, best, -1.0)  # the best draw no lot
    return torch.cat([best, lots.topk(others, dim=1).indices], 1)


@torch.no_grad()
def rollout(policy, task, problems, args):
    """G trajectories for each of P problems -> Rollout"""
    prompts, _ = encode(policy.lm, task, problems, args)
    pi, states = policy(prompts)
    noise = torch.randn(len(problems), args.group_size, *pi.mean.shape[2:], device=args.device)
    z = pi.mean + pi.stddev * noise  # equation (1), (P, G, T, d)
    mean_state = states.mean(2).expand(-1, args.group_size, -1)  # (P, G, h)
    seen = torch.cat([z.flatten(2), mean_state], -1)  # (P, G, F)
    if args.filter == "prescreen":
        chosen = prescreen(policy.value(seen).squeeze(-1), args)  # (P, K)
        group = torch.arange(len(problems), device=args.device)[:, None]  # (P, 1)
        z = z[group, chosen]
        seen = seen[group, chosen]
    texts, length, ended = decode(policy.main_lm, task, problems, policy.project(z), args)
    return Rollout(prompts, noise, z, seen, texts, length, ended)


# --- 4. Reward and advantages: equations (3) and (4) ----------------------------------------------
# The verifier reads text and nothing else. An answer in the form that was asked for is the answer,
# whatever else the text says. Only where nothing has the form, the last number counts.
# Open in the paper: the form. Its text names tags like <answer>. Here it is the task's: \boxed{},
# or in chains a number behind </think>. A text that has not ended has no form.
def rewards_of(task, problems, texts, ended):
    """The two parts of (3), each 1 or -1: P * K texts, ended (P, K) -> R_corr and R_form (P, K)"""
    right, in_form = [], []
    for n, text in enumerate(texts):
        strict, flexible = task.verify(text, problems[n // ended.shape[1]])
        in_form.append(task.FORM.search(text) is not None)
        right.append(strict if in_form[n] else flexible)
    right = torch.tensor(right, device=ended.device).view_as(ended)
    in_form = torch.tensor(in_form, device=ended.device).view_as(ended)
    return 2 * right - 1, 2.0 * (in_form & ended) - 1


def group_advantages(rewards):
    """Equation (4): rewards (P, K) -> advantages (P, K), with the population's standard deviation

    Rewards 1.2, -.8, -1.2, .8 give 1.18, -.78, -1.18, .78. Equal rewards give exactly 0, and not
    what rounding leaves of -.8 minus the mean of -.8, divided by 1e-6.
    """
    rewards = rewards - rewards[:, :1]  # changes no advantage, and equal rewards become zeros
    std = rewards.std(1, keepdim=True, unbiased=False)  # (P, 1)
    return (rewards - rewards.mean(1, keepdim=True)) / (std + 1e-6)


# --- 5. The contrastive loss: equation (6) --------------------------------------------------------
# It keeps the latents of a group apart, so that a group still has something to compare when a
# reward has found one good latent.
# Open in the paper: its s is 1. Then (6) is exactly 0 in float32 for d = 512 and sigma 1. Its sum
# over k is a mean here. "Bidirectional" changes nothing, because the scores are symmetric.
def contrastive(z, scale):
    """Equation (6): z (P, G, T, d) -> (P,), log G where all agree, 0 where latents lie far apart

    At the start of chains it is 1.9 of log 16 = 2.8. All draws of a problem have one mu. So what
    lowers it is mostly a larger sigma, and it acts like an entropy bonus.
    """
    steps = z.transpose(1, 2)  # (P, T, G, d)
    scores = scale * steps @ steps.transpose(-1, -2)  # (P, T, G, G)
    own = scores.diagonal(dim1=-2, dim2=-1)  # (P, T, G)
    return (scores.logsumexp(-1) - own).mean((1, 2))


# --- 6. Update: equations (5) to (7) --------------------------------------------------------------
# The paper's objective is PPO's: min(rho A, clip(rho, 1 - eps, 1 + eps) A), with the ratio
# rho = (pi(z) / pi_old(z))^(1/d). One update for a batch runs at pi_old. So rho is 1, nothing is
# clipped, and the gradient of rho A is A grad log pi / d, that of (5).
# Open in the paper: the 1/d. Here it sets how much (5) weighs against (6). With several updates for
# a batch rho would need it: a sum over T d numbers moves so far in one step that exp overflows.
# In (5) z is a constant, because a reward cannot be differentiated through greedy text. In (6) it
# must not be, or there would be no gradient: z is mu + sigma noise again, for all G.
def update(policy, ref, optimizer, roll, rewards, advantages, args):
    """One optimiser step; rewards and advantages (P, K), ref: pi_ref -> metrics of this rank"""
    optimizer.zero_grad()
    pi, _ = policy(roll.prompts)
    with torch.no_grad():
        pi_ref, _ = ref(roll.prompts)
    d = pi.mean.shape[-1]
    log_prob = pi.log_prob(roll.z).sum((2, 3))  # log pi(z | x), (P, K)
    kl = kl_divergence(pi, pi_ref).sum((1, 2, 3))  # (P,)
    objective = (advantages * log_prob).mean(1) / d - args.kl_coef * kl / d  # equation (5), (P,)
    draws = pi.mean + pi.stddev * roll.noise  # (P, G, T, d)
    closeness = contrastive(draws, 1 / (d * args.sigma**2))  # equation (6), (P,)
    miss = (policy.value(roll.seen).squeeze(-1) - rewards).square().mean(1)  # (P,)
    loss = -objective + args.contrast * closeness + miss  # equation (7), (P,)

    all_prompts = common.sum_over_ranks(torch.ones_like(loss).sum())
    (loss.sum() / all_prompts).backward()
    common.sum_gradients_over_ranks(policy)
    groups = [group["params"] for group in optimizer.param_groups]
    norms = torch.stack([nn.utils.clip_grad_norm_(group, 1.0) for group in groups])  # (3,)
    if not norms.isfinite().all():
        raise common.UserError("gradient not finite: --resume with lower --lr and --lr_assistant")
    optimizer.step()

    return {
        "kl": kl / d,
        "contrastive": closeness,
        "value_loss": miss,
        "sigma": pi.stddev,
        "mu_rms": pi.mean.square().mean().sqrt(),
        "grad_norm": norms[0],
        "grad_norm_assistant": norms[1],
    }


def set_rates(optimizer, step, args):
    """One schedule; the assistant, the second of three groups, has a peak of its own."""
    peaks = args.lr, args.lr_assistant, args.lr
    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
        group["lr"] = settings.learning_rate(Namespace(**vars(args) | {"lr": peak}), step)


# --- 7. Evaluation and samples --------------------------------------------------------------------
@torch.no_grad()
def evaluate(policy, task, problems, args, full):
    """Always the same held-out problems and the same noise -> dict of means over all ranks

    greedy: z is mu. `full` adds sampled, with the noise of training, and three controls:
    no_latents, the main model alone; averaged, the mean mu of all problems; swapped, the mu of
    another problem. If these are as good as greedy, the latents do not depend on the problem.
    """
    torch.manual_seed(12345 + common.RANK)
    mine = problems[common.RANK :: common.RANKS]
    size = args.prompts_per_step // common.RANKS  # problems, as in training
    parts = []
    for start in range(0, len(mine), size):
        prompts, _ = encode(policy.lm, task, mine[start : start + size], args)
        pi, _ = policy(prompts)
        parts.append(torch.stack([pi.mean, pi.stddev]))
    mu, sigma = torch.cat(parts, 1)  # (problems of this rank, 1, T, d) each
    ways = {"greedy": mu}
    if full:
        noise = torch.randn(len(mine), decoded(args), *mu.shape[2:], device=args.device)
        ways["sampled"] = mu + sigma * noise  # (problems of this rank, K, T, d)
        ways["no_latents"] = mu[:, :, :0]
        ways["averaged"] = mu.mean(0, keepdim=True).expand_as(mu)
        ways["swapped"] = mu.roll(1, 0)
    scores = {}
    for name, z in ways.items():
        parts = []
        count = size * decoded(args) // z.shape[1]  # as many texts at a time as in training
        for start in common.progress(range(0, len(mine), count), desc=name, leave=False):
            part = mine[start : start + count]
            thoughts = policy.project(z[start : start + count])  # (P, samples, T, D)
            texts, length, ended = decode(policy.main_lm, task, part, thoughts, args)
            right, form = rewards_of(task, part, texts, ended)
            parts.append(torch.stack([right > 0, form > 0, length]))
        right, form, length = torch.cat(parts, 1)  # (problems of this rank, samples) each
        scores[name] = right
        if name == "greedy":
            scores |= {"form": form, "length": length}
        if name == "sampled":
            scores[f"pass@{z.shape[1]}"] = right.amax(1)  # any of the samples is right
    return {name: round(common.mean_over_ranks(value), 4) for name, value in scores.items()}


def describe(policy, roll):
    """The first trajectory: each latent as the words that it mixes, then the text -> str

    With `--projection identity` they are the words whose embeddings are nearest, by cosine.
    """
    z = roll.z[0, 0]  # (T, d)
    if policy.args.projection == "words":
        likeness = policy.mixture(z)  # (T, V)
    else:
        embedding = policy.main_lm.embedding.float()
        likeness = F.normalize(z, dim=-1) @ F.normalize(embedding, dim=-1).T  # (T, V)
    weights, ids = likeness.topk(4)  # (T, 4)
    lines = encoding.describe_thought(policy.main_lm.tokenizer, ids, weights)
    return "\n    ".join([*lines, f"text       {roll.texts[0].strip()!r}"])


def metrics_of(roll, right, form, advantages, trained):
    """What a batch looked like, and what `update` says of it -> dict of means over all ranks"""
    metrics = {
        "reward": right > 0,
        "form": form > 0,
        "length": roll.length,
        "ended": roll.ended,
        "zero_advantage": advantages == 0,
        "mixed_groups": right.amax(1) > right.amin(1),  # both right and wrong answers
    }
    metrics |= trained
    return {name: common.mean_over_ranks(value.detach()) for name, value in metrics.items()}


# --- 8. main: evaluate, train, evaluate -----------------------------------------------------------
def main(argv=None):
    args = parse_args(argv)
    common.start_ranks(args.device)
    task = tasks.find(args.task)
    held_out = task.problems(args, "test", 0, args.eval_problems)
    task.problems(args, "train", 0, 1)  # a malformed line ends the run here, before it begins
    main_lm = common.load_model(args)
    main_lm.model.requires_grad_(False).to(main_lm.dtype)  # frozen, so bfloat16 rounds no update
    policy = load_policy(main_lm, args)
    ref = load_policy(main_lm, args)
    optimizer = torch.optim.AdamW(policy.parameter_groups(), weight_decay=0, fused=True)
    whole = Namespace(model=policy, tokenizer=policy.lm.tokenizer)  # what a checkpoint holds
    run = common.Run(args, "dlr", whole, optimizer)
    first, before = run.start()
    before = before or evaluate(policy, task, held_out, args, full=True)
    print("before:", before)
    for step in common.progress(range(first, args.steps), initial=first, total=args.steps):
        if step % args.save_every == 0:
            run.save(step, before)
        # Problems and noise follow from seed, step and rank: a resumed run goes on as it would have
        began, count = time.time(), args.prompts_per_step
        batch = task.problems(args, "train", step * count, count)
        problems = batch[common.RANK :: common.RANKS]
        torch.manual_seed(hash((args.seed, step, common.RANK)))

        roll = rollout(policy, task, problems, args)
        right, form = rewards_of(task, problems, roll.texts, roll.ended)  # (P, K) each
        rewards = right + args.format_weight * form  # equation (3), (P, K)
        if args.eval_every and step % args.eval_every == 0:
            tqdm.write(f"{problems[0].question}\n    {describe(policy, roll)}")
            tqdm.write(f"    reward {rewards[0, 0]:.1f}, the answer is {problems[0].answer}")
        advantages = group_advantages(rewards)  # (P, K)
        set_rates(optimizer, step, args)
        trained = update(policy, ref, optimizer, roll, rewards, advantages, args)

        row = {"step": step, "rollouts": count * decoded(args)}
        row |= metrics_of(roll, right, form, advantages, trained)
        row["seconds"] = round(time.time() - began, 3)
        if args.eval_every and (step + 1) % args.eval_every == 0:
            row["greedy"] = evaluate(policy, task, held_out, args, full=False)["greedy"]
        run.log(row)
    run.save(max(first, args.steps), before)
    after = evaluate(policy, task, held_out, args, full=True) if first + args.steps else before
    run.finish(before, after)


if __name__ == "__main__":
    common.run_main(main)
