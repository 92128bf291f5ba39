"""A task is a module with three functions, all that a method knows of its data and its reward:

    problems(args, split, start, count)   problems start, start + 1, ... of an endless sequence
    request(question, args)               the text that the model reads
    verify(text, problem)                 (strict, flexible), each 0.0 or 1.0

dlr.py also rewards the form, and latent_sft.py learns from solutions that somebody worked out:

    FORM                                  a pattern of an answer in the form that was asked for
    worked(problem, rng)                  (thought, answer) as texts; "" where it is not given

`split` is "train" or "test". A problem follows from its index alone, so a checkpoint that knows its
step knows its place in the data. `strict` wants the answer in the form that was asked for;
`flexible` takes the last number of the text. What lies between the two is a matter of form.
"""

import importlib
from dataclasses import dataclass
from pathlib import Path


class UserError(Exception):
    """What the user can put right: it is printed as one line that says what to do."""


@dataclass(frozen=True)
class Problem:
    question: str
    answer: str
    solution: str = ""  # all that the data says of the answer: to learn from, never to judge by


def find(name):
    """The module of `--task name`. It is imported here, so that chains needs no math-verify."""
    if name not in ("chains", "trees", "gsm8k", "svamp") and not Path(name).is_dir():
        known = "chains, trees, gsm8k, svamp, or a folder with train.jsonl"
        raise UserError(f"--task {name}: take {known}")
    module = name if name in ("chains", "trees") else "gsm8k"
    return importlib.import_module(f"tasks.{module}")
