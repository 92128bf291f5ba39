r"""DeepLatent Reasoning, DLR (arXiv 2601.17275), in one file. No other public code was found.

    python dlr.py                               # a frozen chains model on a laptop CPU, a minute or two
    python dlr.py --policy prompt               # a control: one learned prompt for all problems
    python dlr.py --model Qwen/Qwen2.5-1.5B-Instruct --assistant Qwen2.5-0.5B          # GSM8K, one GPU

A large model stays as it is, to the bit. A small one, the assistant, reads the problem and writes T latents into the
prompt of the large one, which then answers greedily. RL explores latents, not words of the answer: it trains the
assistant, so that latents which lead to right answers become likelier.

For a problem x and a group of G trajectories i:

  (1)  latents:     z_i ~ pi(. | x) = prod_t N(mu_t(x), sigma_t(x)^2),  z_it in R^d; mu and sigma are read off the
                    assistant's states at T learned queries behind the problem
  (2)  text:        y_i = greedy M([E(x); f(z_i1) ... f(z_iT); E(cue)]),  M frozen,  f(z) = softmax(W z) E,  W fixed
  (3)  reward:      R_i = R_corr + lambda R_form,  each 1 or -1: a right answer, the form that was asked for
  (4)  advantage:   A_i = (R_i - mean_group R) / (std_group R + 1e-6)
  (5)  objective:   J = mean_i [min(rho_i A_i, clip(rho_i, 1-eps, 1+eps) A_i) - beta KL(pi || pi_ref) / d],
                    rho_i = exp((log pi(z_i) - log pi_old(z_i)) / d),  pi_ref: the policy at the start
  (6)  contrastive: L_cl = -mean_tk log(exp(s z_kt . z_kt) / sum_j exp(s z_kt . z_jt)),  k and j in one group,
                    s = 1 / (d sigma^2) with the sigma of the start
  (7)  loss:        -J + gamma L_cl,  and with a pre-screen (value(z_i) - R_i)^2, which trains the value head alone

With --filter prescreen M decodes only 18 % of the G latents: those of which a value head expects most, and, for a
quarter of the places and one at least, others at random.

What the paper leaves open, and what is done here:
  1. *f*: a latent has 512 numbers, the main model's embeddings 4,096; the map between them is not given. Here a latent
     becomes a soft token, a mixture of the main model's words. --projection identity is the literal reading: z is the
     embedding, and d its width. RL trains neither W nor E: the action is z, before f.
  2. *The density* in rho and KL is not defined: here the Gaussian of (1), whose KL has a closed form.
  3. *The exponent* of rho: a sum over T d numbers moves so far in one AdamW step that exp overflows. So log rho and KL
     are divided by d (by T d, log rho would hardly move), and log rho is held within 5.
  4. *Filtering*: its Algorithm 1 decodes all G, its section on cost decodes 18 %, by a score that it does not define.
     What the pre-screen takes is no fair draw of pi, so its gradient is biased.
  5. *"Bidirectional"*: the scores of (6) are symmetric, so both directions are equal. Its sum over k is a mean here.
     Its s is 1, where (6) is exactly 0 in float32 for d = 512. On draws, which are constants, (6) has no gradient: it
     gets one through mu + sigma noise.
  6. *Place*: the latents stand behind the question, before the cue <think>. T is fixed. In evaluations z is mu.
  7. Not reported and chosen here: lambda .2, eps .2, one update per batch, the population's standard deviation in (4).
  8. Numbers of the paper: 55.4 on GSM8K against GRPO's 46.2, 18 % decoded at no loss, 4.7 points from (6) on MATH; one
     run each. README says what of it is seen in small.

Why words? The chains main model was pretrained with notes in half of its prompts: behind `mind+` it forgets no carry.
Mixtures of words often contain such a note: before training .36 of the groups have right and wrong answers. Gaussian
noise in embedding space hardly ever comes near one: .05 to .08.
"""

import argparse
import hashlib
import math
import re
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

import engine as common

# --- 1. Flags: the method's are the paper's where it gives them, sizes are for one GPU; TINY is for the chains model --
TINY = dict(
    assistant="chains", data="chains", latent_dim=32, max_new_tokens=40, steps=100, eval_problems=512, eval_every=10,
    micro_batch=32,  # all prompts of a step
    kind="single",  # chains of one sign, each of which one note would help
    latent_steps=4,  # with six, the other latents drown the right word
    lr=3e-3, lr_assistant=1e-3,  # 1e-3 is too slow, 6e-3 no better; a third of it for the assistant
    contrast=0.01,  # at the paper's .1 noise grows: .69 of the samples are right instead of .98
)  # fmt: skip


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        prog="dlr.py", usage=argparse.SUPPRESS, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="DeepLatent Reasoning: an assistant whispers to a frozen model. The first page explains it.",
        epilog=f"The chains model has defaults of its own: {TINY}",
    )  # fmt: skip
    add, at_least = parser.add_argument, common.at_least
    add("--assistant", default="Qwen2.5-0.5B", help="the model that learns to write latents; --model is frozen")
    add("--policy", default="parallel", choices=["parallel", "prompt"], help="all latents from one pass of the "
        "assistant; or, a control, one learned prompt for all problems")  # fmt: skip
    add("--projection", default="words", choices=["words", "identity"], help="f of (2): mixtures of words, or z itself")
    add("--latent_steps", type=at_least(1), default=16, help="T, latents per problem (paper: at most 32)")
    add("--latent_dim", type=at_least(1), default=128, help="d, numbers per latent (paper: 512)")
    add("--sigma", type=at_least(1e-3, float), default=1.0, help="deviation at the start; identity: in embeddings' rms")
    add("--format_weight", type=at_least(0, float), default=0.2, help="lambda of (3)")
    add("--filter", default="all", choices=["all", "prescreen"], help="decode all latents of a group, or a share")
    add("--share", type=at_least(0, float), default=0.18, help="of the group that is decoded after a pre-screen")
    add("--updates_per_batch", type=at_least(1), default=1, help="passes over a batch; from the second on, (5) clips")
    add("--clip", type=at_least(0, float), default=0.2, help="eps of (5)")
    add("--kl_coef", type=at_least(0, float), default=0.01, help="beta of (5); above 0 keeps a second assistant")
    add("--contrast", type=at_least(0, float), default=0.1, help="gamma of (7)")
    add("--lr_assistant", type=at_least(0, float), default=3e-5, help="peak rate of the assistant; --lr: of the rest")
    common.add_shared_flags(parser)
    parser.set_defaults(lr=1e-4, steps=200, group_size=16, max_new_tokens=256)
    args = common.parse_args(parser, argv, TINY)
    if not 2 <= decodes(args) <= args.group_size:  # an advantage compares texts
        parser.error(f"--share must leave 2 to {args.group_size} of --group_size {args.group_size}: change one of them")
    return args


# --- 2. The latent policy, (1): the only thing that learns ------------------------------------------------------------
class LatentPolicy(torch.nn.Module):
    """pi(z | x): assistant, T queries, two heads; the fixed map W of (2), and the value head of the pre-screen.

    At the start sigma is the same everywhere and far larger than mu. It stays within e^-4 and e times that.
    """

    def __init__(self, lm, main_lm, args):
        super().__init__()
        self.lm, self.assistant, self.main_lm, self.args = lm, lm.model, main_lm, args
        width, (vocabulary, main_width) = lm.table.shape[1], main_lm.table.shape
        d = main_width if args.projection == "identity" else args.latent_dim
        queries = torch.randn(args.latent_steps, width) * lm.table.detach().std().cpu()  # as large as an embedding
        self.queries = torch.nn.Parameter(queries)  # (T, h)
        self.norm = torch.nn.LayerNorm(width)
        self.mu, self.log_std = torch.nn.Linear(width, d), torch.nn.Linear(width, d)
        with torch.no_grad():
            self.mu.weight.mul_(0.1)
            self.mu.bias.zero_()
            self.log_std.weight.zero_()
            self.log_std.bias.fill_(math.log(args.sigma))
        seen = args.latent_steps * d + width  # numbers in the value head's view of a trajectory
        layers = torch.nn.Linear(seen, 64), torch.nn.GELU(), torch.nn.Linear(64, 1)
        self.value = torch.nn.Sequential(torch.nn.LayerNorm(seen), *layers)
        # W. Below a deviation of sqrt(2 ln V) a softmax over V random logits is spread over all, above it over few: at
        # 1.4 times that, most draws mix two to five words. All rows have one norm, so all words are equally likely.
        if args.projection == "words":
            directions = F.normalize(torch.randn(vocabulary, d), dim=-1)
            self.register_buffer("words", 1.4 * math.sqrt(2 * math.log(vocabulary)) * directions)  # (V, d)
        self.to(args.device)

    def forward(self, prompts):
        """P prompts -> mean and log standard deviation (P, 1, T, d), states (P, 1, T, h): one pass for a whole group"""
        states = self.queries.expand(len(prompts), -1, -1)  # (P, T, h)
        if self.args.policy == "parallel":
            ids, mask = common.left_pad(prompts, self.queries.device)  # (P, L) each
            embeds = torch.cat([self.lm.table[ids], states], 1)  # (P, L + T, h)
            with self.lm.autocast():
                hidden = self.lm.hidden_states(embeds, F.pad(mask, (0, states.shape[1]), value=1))  # (P, L + T, h)
            states = hidden[:, -states.shape[1] :].float()
        states, start = self.norm(states)[:, None], math.log(self.args.sigma)
        return self.mu(states), self.log_std(states).clamp(start - 4, start + 1), states

    def mixture(self, z):
        """softmax(W z): latents (..., d) -> weights of the main model's words (..., V)"""
        return F.linear(z, self.words).softmax(-1)

    def project(self, z):
        """f of (2): latents (..., d) -> embeddings of the main model (..., D)"""
        table = self.main_lm.table.detach()  # (V, D)
        if self.args.projection == "identity":
            return z * table.square().mean().sqrt()
        parts = [self.mixture(part) @ table for part in z.flatten(0, -2).split(256)]  # (256, V) is large
        return torch.cat(parts).unflatten(0, z.shape[:-1])


def load_policy(main_lm, args):
    """The policy at the start, which follows from the seed. It is also pi_ref."""
    lm = common.load_model(argparse.Namespace(**vars(args) | {"model": args.assistant, "compile": False}))
    torch.manual_seed(args.seed)
    return LatentPolicy(lm, main_lm, args)


# --- 3. Rollout, (2): draw latents, choose which to decode, let the frozen model answer -------------------------------
FORMAT = "Reason between <think> and </think>, then give only the final answer between <answer> and </answer>."


def encode(tokenizer, problems):
    """-> prompts, lists of token ids, that end where the latents begin; token ids of the cue behind these"""
    cue, prompts = " <think>" if problems[0].form == "think" else "<think>", []
    for problem in problems:  # the built-in task's questions end in the cue, to others the form is added
        question = problem.question.removesuffix(cue) if problem.form == "think" else f"{problem.question}\n{FORMAT}\n"
        prompts.append(common.encode_prompt(tokenizer, common.Problem(question, "", "tags")))  # no \boxed{}
    return prompts, tokenizer.encode(cue, add_special_tokens=False)


def decode(main_lm, problems, thoughts, args):
    """Equation (2): embeddings (P, K, T, D) -> P * K texts, their lengths and whether they ended, (P, K) each

    The decoder holds the KV cache and runs a prompt once for its K thoughts: feed(embeddings) gives the next logits,
    keep(rows) drops the other rows.
    """
    prompts, cue = encode(main_lm.tokenizer, problems)
    with torch.no_grad(), main_lm.autocast():
        thought = thoughts.flatten(0, 1)  # (N, T, D)
        before_text = torch.cat([thought, main_lm.table[cue].expand(len(thought), -1, -1)], 1)  # (N, T + cue, D)
        tokens = torch.zeros(len(thought), args.max_new_tokens, dtype=torch.long, device=args.device)  # (N, columns)
        length, rows = torch.zeros_like(tokens[:, 0]), torch.arange(len(tokens), device=args.device)  # (N,), (B,)
        ended, stop_ids = torch.zeros_like(length, dtype=torch.bool), torch.tensor(main_lm.stop_ids, device=args.device)
        decoder = common.Decoder(main_lm, prompts, thoughts.shape[1], before_text.shape[1] + args.max_new_tokens)
        for embeds in before_text.unbind(1):  # (N, D)
            logits = decoder.feed(embeds)  # (N, V)
        for t in range(args.max_new_tokens):
            best = logits.argmax(-1)  # (B,)
            tokens[rows, t], length[rows], ended[rows] = best, t + 1, torch.isin(best, stop_ids)
            going = (~ended[rows]).nonzero().squeeze(-1)  # (B',) of the B rows
            if len(going) == 0 or t + 1 == args.max_new_tokens:
                break
            if len(going) < len(rows):
                rows, best = rows[going], best[going]
                decoder.keep(going)
            logits = decoder.feed(main_lm.table[best])  # (B', V)
    written = [ids[:count] for ids, count in zip(tokens.tolist(), length.tolist(), strict=True)]
    texts = main_lm.tokenizer.batch_decode(written, skip_special_tokens=True)
    return texts, length.view(thoughts.shape[:2]), ended.view(thoughts.shape[:2])


def decodes(args):
    """K, the trajectories of a group that the main model decodes"""
    return round(args.share * args.group_size) if args.filter == "prescreen" else args.group_size


def prescreen(guesses, args, generator):
    """Expected rewards (P, G) -> which K to decode (P, K): the best, and a quarter at random among the others, from
    which the value head learns what it would have missed. Of 64 these are 9 and 3."""
    wild = max(1, round(0.25 * decodes(args)))
    best = guesses.topk(decodes(args) - wild, dim=1).indices  # (P, K - wild)
    lots = torch.rand(guesses.shape, generator=generator, device=guesses.device).scatter(1, best, -1.0)  # (P, G)
    return torch.cat([best, lots.topk(wild, dim=1).indices], 1)


@dataclass
class Rollout:
    """G trajectories for each of P prompts, of which K were decoded."""

    prompts: list  # P lists of the assistant's token ids
    noise: torch.Tensor  # (P, G, T, d) of all trajectories, for (6)
    z: torch.Tensor  # (P, K, T, d) latents
    seen: torch.Tensor  # (P, K, F) what the value head sees: latents, and the mean state at the queries
    texts: list  # P * K
    length: torch.Tensor  # (P, K) tokens of the text, the end token included
    ended: torch.Tensor  # (P, K) bool, by an end token and not by the cap


def rollout(policy, problems, args, generator):
    prompts, _ = encode(policy.lm.tokenizer, problems)
    with torch.no_grad():
        mu, log_std, states = policy(prompts)  # (P, 1, T, d) twice, (P, 1, T, h)
        shape = len(prompts), args.group_size, *mu.shape[2:]  # (P, G, T, d)
        noise = torch.randn(shape, generator=generator, device=args.device)
        z = mu + log_std.exp() * noise  # equation (1), (P, G, T, d)
        seen = torch.cat([z.flatten(2), states.mean(2).expand(-1, args.group_size, -1)], -1)  # (P, G, F)
        if args.filter == "prescreen":
            chosen = prescreen(policy.value(seen).squeeze(-1), args, generator)  # (P, K)
            groups = torch.arange(len(prompts), device=args.device)[:, None]  # (P, 1)
            z, seen = z[groups, chosen], seen[groups, chosen]
        texts, length, ended = decode(policy.main_lm, problems, policy.project(z), args)
    return Rollout(prompts, noise, z, seen, texts, length, ended)


# --- 4. Reward and advantages, (3) and (4): the verifier reads text and nothing else ----------------------------------
INSIDE = r"((?:(?!</?(?:think|answer)>).)*)"  # anything but one of the tags
FORMS = {  # of what follows the cue: a thought and an answer, each tag once, with nothing else around them
    "think": rf"{INSIDE}</think>\s*(\d+)\s*",
    "boxed": rf"{INSIDE}</think>\s*<answer>\s*(?=\S)(?!</answer>){INSIDE}</answer>\s*",
}


def score(texts, ended, problems):
    """-> R_corr and R_form, each 1 or -1, (P, K). A text that has not ended has no form.

    An answer counts without its form, too: what stands in the last box, or the last number.
    """
    rewards = []
    for n, (text, end) in enumerate(zip(texts, ended.flatten().tolist(), strict=True)):
        problem = problems[n // ended.shape[1]]
        found = re.fullmatch(FORMS[problem.form], text, re.DOTALL)
        said = found[2].strip() if found else text
        right = any(common.verify(said, problem)) or found is not None and common.answers_equal(said, problem.answer)
        rewards.append([2.0 * right - 1, 2.0 * (bool(found) and end) - 1])
    return torch.tensor(rewards, device=ended.device).T.reshape(2, *ended.shape)


def group_advantages(rewards):
    """Equation (4): rewards (P, K) -> advantages (P, K). 1.2, -0.8, -1.2, 0.8 give 1.18, -.78, -1.18, .78.

    Equal rewards give exactly 0, and not what rounding leaves of -0.8 minus the mean of -0.8.
    """
    equal = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)  # (P, 1)
    std = rewards.std(1, keepdim=True, unbiased=False)  # (P, 1)
    return ((rewards - rewards.mean(1, keepdim=True)) / (std + 1e-6)).masked_fill(equal, 0)


# --- 5. Densities and the contrastive loss, in float32 ----------------------------------------------------------------
def log_density(z, mu, log_std):
    """log pi(z | x) of (1), (..., T, d) -> (...)"""
    terms = -0.5 * ((z - mu) / log_std.exp()).square() - log_std - 0.5 * math.log(2 * math.pi)  # (..., T, d)
    return terms.sum((-2, -1))


def gaussian_kl(mu, log_std, ref_mu, ref_log_std):
    """KL(pi || pi_ref) of (5), in closed form, (..., T, d) -> (...)"""
    ratio, shift = (log_std - ref_log_std).exp(), (mu - ref_mu) / ref_log_std.exp()  # (..., T, d)
    return (ref_log_std - log_std + 0.5 * (ratio.square() + shift.square() - 1)).sum((-2, -1))


def contrastive(z, scale):
    """Equation (6): z (P, G, T, d) -> (P,), near 0 when latents lie far apart, log G when all are equal

    All draws of a problem share one mu, so what lowers it is mostly a larger sigma: it works like an entropy bonus.
    """
    steps = z.transpose(1, 2)  # (P, T, G, d)
    scores = scale * steps @ steps.transpose(-1, -2)  # (P, T, G, G)
    return (scores.logsumexp(-1) - scores.diagonal(dim1=-2, dim2=-1)).mean((1, 2))


# --- 6. Update, (5) to (7) --------------------------------------------------------------------------------------------
# The main model takes no part in it: z is scored by the policy that drew it, so no text is replayed. Gradients add up
# over micro-batches and ranks, with one denominator: however a batch is cut, its update is the same.
def clipped_objective(log_ratio, advantages, clip):
    """The min of (5), and where clipping acts, (P, K) -> (P, K) each

    With eps .2, ratio 1.5 and A = 1 give 1.2, ratio 1.5 and A = -1 give -1.5. Only the bound on the log-ratio keeps
    that second case from growing without end: without it the gradient can be infinite or NaN.
    """
    ratio = log_ratio.clamp(-5, 5).exp()  # (P, K)
    plain, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages  # (P, K)
    return torch.minimum(plain, clipped), clipped < plain


def update(policy, ref, optimizer, roll, rewards, advantages, args):
    """`updates_per_batch` optimiser steps on one batch; rewards and advantages (P, K); ref: pi_ref or None -> metrics

    A micro-batch is of prompts: one pass of the assistant serves all trajectories of a problem.
    """
    d = roll.z.shape[-1]
    count = common.all_reduce(torch.tensor(float(len(roll.prompts)), device=args.device))  # P of all ranks
    old, sums = {}, torch.zeros(6, device=args.device)
    for _ in range(args.updates_per_batch):
        optimizer.zero_grad()
        for i, rows in enumerate(torch.arange(len(roll.prompts), device=args.device).split(args.micro_batch)):  # (p,)
            prompts = [roll.prompts[row] for row in rows.tolist()]
            mu, log_std, _ = policy(prompts)  # (p, 1, T, d) each
            log_prob = log_density(roll.z[rows], mu, log_std)  # (p, K) the stored z is a constant
            old.setdefault(i, log_prob.detach())  # the first pass runs at pi_old: its ratio is 1
            gain, clipped = clipped_objective((log_prob - old[i]) / d, advantages[rows], args.clip)  # (p, K)
            kl = torch.zeros_like(gain[:, :1])  # (p, 1)
            if ref is not None:
                with torch.no_grad():
                    ref_mu, ref_log_std, _ = ref(prompts)  # (p, 1, T, d) each
                kl = gaussian_kl(mu, log_std, ref_mu, ref_log_std) / d  # (p, 1)
            draws = mu + log_std.exp() * roll.noise[rows]  # (p, G, T, d) of all G: (6) needs no reward
            apart = contrastive(draws, 1 / (args.sigma**2 * d))  # (p,)
            loss = args.contrast * apart - (gain - args.kl_coef * kl).mean(1)  # (p,)
            miss = torch.zeros_like(apart)  # (p,)
            if args.filter == "prescreen":  # what it sees is a constant: this reaches the value head and nothing else
                miss = (policy.value(roll.seen[rows]).squeeze(-1) - rewards[rows]).square().mean(1)
            ((loss + miss).sum() / count).backward()
            of_policy = [log_std.exp().mean((1, 2, 3)), mu.square().mean((1, 2, 3))]  # (p,) each
            parts = [clipped.float().mean(1), kl[:, 0], apart, miss, *of_policy]  # (p,) each
            sums += torch.stack([part.sum() for part in parts]).detach()
        common.reduce_gradients(policy)
        norms = [torch.nn.utils.clip_grad_norm_(group["params"], 1.0) for group in optimizer.param_groups]
        if not torch.stack(norms).isfinite().all():
            raise common.UserError("the gradient is not finite and was not applied; --resume with a lower --lr")
        optimizer.step()
    means = (common.all_reduce(sums) / count / args.updates_per_batch).tolist()
    metrics = dict(zip(["clipped", "kl", "contrastive", "value_loss", "sigma", "mu_rms"], means, strict=True))
    metrics["mu_rms"] = math.sqrt(metrics["mu_rms"])
    return {"grad_norm": norms[0].item(), "grad_norm_assistant": norms[1].item()} | metrics


# --- 7. Evaluation and samples: the mean latent of always the same held-out problems ----------------------------------
def right_note(main_lm, problems, args):
    """The built-in task's best latents: the note that fits each problem, T times -> embeddings (P, 1, T, D)"""
    notes = [" mind+" if "+" in problem.question else " mind-" for problem in problems]
    ids = torch.tensor([main_lm.tokenizer.encode(note) for note in notes], device=args.device)  # (P, 1)
    return main_lm.table[ids[:, :, None].expand(-1, -1, args.latent_steps)]


def evaluate(policy, problems, args, full):
    """Accuracy, form and length with z = mu. `full`: also with drawn latents, and three controls: no_latents, the main
    model alone; averaged, the mean mu of this rank's problems; swapped, the mu of another one of them -> dict"""
    generator = torch.Generator(args.device).manual_seed(12345 + common.RANK)
    mine, main_lm = problems[common.RANK :: common.RANKS], policy.main_lm
    size = max(1, args.prompts_per_step * decodes(args) // common.RANKS)  # rows, as in training
    with torch.no_grad():
        parts = [mine[i : i + args.prompts_per_step] for i in range(0, len(mine), args.prompts_per_step)]
        parts = [policy(encode(policy.lm.tokenizer, part)[0])[:2] for part in parts]
    mu, log_std = (torch.cat(column) for column in zip(*parts, strict=True))  # (n, 1, T, d) each

    def accuracy(name, z, embed=policy.project):
        """Latents (n, K, T, d) -> (3, n, K): right, in form, length"""
        parts, count = [], max(1, size // z.shape[1])
        for i in common.progress(range(0, len(mine), count), desc=f"evaluating: {name}", leave=False):
            some = mine[i : i + count]
            texts, length, ended = decode(main_lm, some, embed(z[i : i + count]), args)
            parts.append(torch.cat([score(texts, ended, some) > 0, length[None]]).float())
        return torch.cat(parts, 1)

    scores = dict(zip(["greedy", "form", "length"], map(common.mean, accuracy("mean latent", mu)), strict=True))
    if full:
        noise = torch.randn((len(mu), args.eval_samples, *mu.shape[2:]), generator=generator, device=args.device)
        right = accuracy("sampled", mu + log_std.exp() * noise)[0]  # (n, samples)
        scores |= {"sampled": common.mean(right), f"pass@{args.eval_samples}": common.mean(right.amax(1))}
        controls = {"averaged": mu.mean(0, keepdim=True).expand_as(mu), "swapped": mu.roll(1, 0)}
        scores |= {name: common.mean(accuracy(name, z)[0]) for name, z in controls.items()}
        scores["no_latents"] = common.mean(accuracy("no latents", mu[:, :, :0])[0])
        if args.data == "chains" and args.kind != "mixed":  # where one note fits a problem
            note = right_note(main_lm, mine, args)
            scores["right_note"] = common.mean(accuracy("right note", note, embed=lambda embeds: embeds)[0])
    return {key: round(value, 4) for key, value in scores.items()}


def measure(roll, correct, form, advantages):
    """What a batch of rollouts looked like -> number of texts, and means over all ranks"""
    mixed = correct.amax(1) > correct.amin(1)  # (P,) both right and wrong answers
    row = {"reward": correct > 0, "form": form > 0, "length": roll.length, "ended": roll.ended}
    row |= {"zero_advantage": advantages == 0, "mixed_groups": mixed}
    return {"rollouts": correct.numel() * common.RANKS} | {name: common.mean(value) for name, value in row.items()}


def describe(policy, roll, problems, rewards, advantages):
    """The rarest success, with the words that each latent mixes, or, if it mixes none, the nearest by cosine -> str"""
    n = int(advantages.argmax())
    problem, z = problems[n // rewards.shape[1]], roll.z.flatten(0, 1)[n]  # (T, d)
    if policy.args.projection == "words":
        likeness = policy.mixture(z)  # (T, V)
    else:
        likeness = F.normalize(z, dim=-1) @ F.normalize(policy.main_lm.table, dim=-1).T  # (T, V)
    top, ids = likeness.topk(4)  # (T, 4) each
    lines = []
    for t, (weights, words) in enumerate(zip(top.tolist(), ids.tolist(), strict=True), 1):
        pairs = zip(words, weights, strict=True)
        pairs = [f"{policy.main_lm.tokenizer.decode([i])!r} {w:.2f}" for i, w in pairs if w > 0.005]
        lines.append(f"latent {t:2d}  " + "  ".join(pairs))
    verdict = f"reward {rewards.flatten()[n]:.1f}, the answer is {problem.answer}"
    return "\n    ".join([problem.question, *lines, f"text       {roll.texts[n].strip()!r}", verdict])


# --- 8. main: evaluate, train, evaluate -------------------------------------------------------------------------------
def check_frozen(main_lm, args):
    """UserError if the main model is not, to the bit, the one that the run began with

    Its fingerprint, SHA-256 over all weights, is kept among the arguments, which are saved with a checkpoint.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(main_lm.model.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    args.main_sha256 = vars(args).get("main_sha256", digest.hexdigest())
    if args.main_sha256 != digest.hexdigest():
        raise common.UserError(f"{args.model} is not, to the bit, the main model that this run began with")


def load(args):
    """-> frozen main model, policy, pi_ref or None, and the optimiser with the groups heads, assistant, value head"""
    main_lm = common.load_model(args)  # frozen: nothing optimises it. autocast keeps casts only of what requires a grad
    check_frozen(main_lm, args)
    policy, ref = load_policy(main_lm, args), load_policy(main_lm, args) if args.kl_coef else None
    heads = [policy.queries, *policy.norm.parameters(), *policy.mu.parameters(), *policy.log_std.parameters()]
    groups = [heads, policy.assistant.parameters(), policy.value.parameters()]
    return main_lm, policy, ref, torch.optim.AdamW([{"params": group} for group in groups], weight_decay=0, fused=True)


def main(argv=None):
    args = parse_args(argv)
    common.start_ranks(args.device)
    main_lm, policy, ref, optimizer = load(args)
    generator = torch.Generator(args.device)
    common.take_problems(args, "train", 0, 1)  # a malformed line ends the run here, before it begins
    held_out = common.take_problems(args, "test", 0, args.eval_problems)
    run = common.Run(args, "dlr")
    first, before = run.restore(policy, optimizer) if args.resume else (0, None)
    before = before or evaluate(policy, held_out, args, full=True)
    print(f"{sum(p.numel() for p in policy.parameters()):,} parameters, run folder {run.folder}\nbefore {before}")
    for step in common.progress(range(first, args.steps), initial=first, total=args.steps, desc="training"):
        if step % args.save_every == 0:
            run.save(step, before, policy, optimizer)
        # --- rollout. Noise and data follow from seed, step and rank: a resumed run goes on as it would have.
        start, count = time.time(), args.prompts_per_step
        generator.manual_seed(args.seed * 10**9 + step * 10**3 + common.RANK)
        problems = common.take_problems(args, "train", step * count, count)[common.RANK :: common.RANKS]
        roll = rollout(policy, problems, args, generator)
        # --- reward and advantages
        correct, form = score(roll.texts, roll.ended, problems)  # (P, K) each
        rewards = correct + args.format_weight * form  # equation (3), (P, K)
        advantages = group_advantages(rewards)  # (P, K)
        # --- update
        warmup = min(1, (step + 1) / max(1, 0.03 * args.steps))
        for group, peak in zip(optimizer.param_groups, [args.lr, args.lr_assistant, args.lr], strict=True):
            group["lr"] = peak * warmup * (1 + math.cos(math.pi * step / args.steps)) / 2
        metrics = update(policy, ref, optimizer, roll, rewards, advantages, args)
        # --- log
        row = {"step": step, **measure(roll, correct, form, advantages), **metrics}
        row["seconds"] = round(time.time() - start, 3)
        if args.eval_every and (step + 1) % args.eval_every == 0:
            row = row | evaluate(policy, held_out, args, full=False) | row  # form and length stay the rollouts'
            tqdm.write(describe(policy, roll, problems, rewards, advantages))
        run.log(row)
        tqdm.write("  ".join(f"{name} {value:.4g}" for name, value in row.items()))
    run.save(max(first, args.steps), before, policy, optimizer)
    after = evaluate(policy, held_out, args, full=True) if args.steps else before
    check_frozen(main_lm, args)
    run.finish(policy.lm, after | {f"{name}_before": before[name] for name in before} | {"main_unchanged": True})


if __name__ == "__main__":
    common.run_main(main)
