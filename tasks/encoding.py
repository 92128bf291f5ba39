"""Between texts and token ids: what a model reads, what ends a text, and thoughts in words."""

import math
from pathlib import Path

from tasks import UserError

MODELS = Path(__file__).parent / "models"


def model_path(name):
    """A local folder comes first, then a model of this repository, then the hub."""
    if Path(name, "config.json").exists() or "/" in name:
        return name
    if (MODELS / name).is_dir():
        return MODELS / name
    return f"Qwen/{name}" if name.startswith("Qwen") else name


def chat(tokenizer, *turns, **options):
    """Turns, as pairs of role and text, in the words of the model's chat template"""
    messages = [{"role": role, "content": text} for role, text in turns]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # whatever a template raises
        raise UserError(f"the chat template of the model refuses the prompt: {error}") from None


def end_tokens(model, tokenizer):
    """All of them: with one of Qwen2.5's two, half of the texts would never end."""
    ids = model.generation_config.eos_token_id
    named = set(ids if isinstance(ids, list) else [ids])
    named |= {tokenizer.eos_token_id, *end_of_turn(tokenizer)}
    return sorted(named - {None})


def end_of_turn(tokenizer):
    """-> ids (none or one) of the token that a chat template puts behind an answer"""
    if not tokenizer.chat_template:
        return []
    after = chat(tokenizer, ("user", "?"), ("assistant", "ANSWER")).rsplit("ANSWER", 1)[-1]
    first = tokenizer.encode(after, add_special_tokens=False)[:1]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return [i for i in first if i in special | set(tokenizer.all_special_ids)]


def encode(lm, task, problems, args, ending=""):
    """Problems -> a list of token ids for each, with the chat template where there is one

    ending: what a prompt has to end with, once. A template may have written it already.
    """
    requests = [task.request(problem.question, args) for problem in problems]
    return [encode_one(lm, text, args, ending) for text in requests]


def encode_one(lm, text, args, ending=""):
    """What the model reads -> token ids. What it could not read is refused in one line."""
    tokenizer = lm.tokenizer
    if tokenizer.chat_template:
        text = chat(tokenizer, ("user", text.strip()), add_generation_prompt=True)
    has_ending = bool(ending) and text.rstrip().endswith(ending)
    if has_ending:
        text = text.rstrip()
    ids = tokenizer.encode(text, add_special_tokens=not tokenizer.chat_template)
    if ids and ids[-1] in lm.stop_ids:  # of a tokenizer that ends every text
        ids = ids[:-1]
    letters, spelled = ("".join(each.split()) for each in (text, tokenizer.decode(ids)))
    if len(spelled) < 0.95 * len(letters):  # letters without a token are dropped
        raise UserError(f"the tokenizer cannot spell {text!r}: give the --task of the model")
    if not has_ending:
        ids += tokenizer.encode(ending, add_special_tokens=False)
    if max(ids) >= len(lm.embedding):
        raise UserError(f"the tokenizer names token {max(ids)}, the model has {len(lm.embedding)}")
    most = getattr(lm.model.config, "max_position_embeddings", math.inf)
    if len(ids) + args.max_new_tokens > most:
        raise UserError(f"{len(ids)} prompt tokens and --max_new_tokens exceed {most} positions")
    return ids


def exit_token(lm, text):
    """-> id of the first token of `text`, which ends a thought in latents"""
    ids = lm.tokenizer.encode(text, add_special_tokens=False)
    if not ids or ids[0] in lm.stop_ids:
        raise UserError(f"--exit_text {text!r} has no token, or one that ends a text: name another")
    return ids[0]


def describe_thought(tokenizer, ids, weights):
    """Latents as text, each as its four heaviest candidates: ids, weights (T, K) -> lines"""
    lines = []
    for t, order in enumerate(weights.argsort(descending=True)):  # (K,)
        heaviest = [k for k in order[:4] if weights[t, k] > 0.005]
        words = [f"{tokenizer.decode(ids[t, k])!r} {weights[t, k]:.2f}" for k in heaviest]
        lines.append(f"latent {t + 1:2d}  " + "  ".join(words))
    return lines
