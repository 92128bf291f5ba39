r"""GSM8K, and any folder with train.jsonl and test.jsonl: questions in words, answers in \boxed{}.

    python lepo.py --model Qwen2.5-0.5B --task gsm8k       # from the hub
    python lepo.py --model Qwen2.5-0.5B --task my_folder   # a JSON object a line, as below

    {"question": "How many eggs are left?", "answer": "16 - 3 - 4 = 9\n#### 9"}
    {"problem": "What is half of $\\pi$?", "answer": "\\frac{\\pi}{2}"}

The verifier reads text and executes nothing. Numbers are compared here, exactly; other formulas by
math-verify, in judge.py.
"""

import functools
import json
import random
import re
import subprocess
import sys
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

from tasks import Problem, UserError

if find_spec("math_verify") is None:  # now, and not as a reward of 0 for every formula
    raise UserError("--task gsm8k and folders need math-verify: pip install math-verify")


# --- 1. Problems ----------------------------------------------------------------------------------
HUB = {"gsm8k": ("openai/gsm8k", "main"), "svamp": ["ChilleD/SVAMP"]}


def read_lines(name, split):
    """-> (where it stands, row) of each row: of the hub a dictionary, of a file a line of JSON."""
    if name in HUB:
        from datasets import load_dataset  # here, because a folder does not need it

        rows = load_dataset(*HUB[name], split=split)
        return [(f"{name}, {split} row {i}", row) for i, row in enumerate(rows, 1)]
    path = Path(name, f"{split}.jsonl")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text in UTF-8") from None
    return [(f"{path}, line {i}", line) for i, line in enumerate(lines, 1) if line.strip()]


def to_problem(row):
    """Raises one of several errors where a row is not as it should be: read_problems says which."""
    if isinstance(row, str):
        row = json.loads(row, parse_int=str, parse_float=str)  # 0.00001 stays as it is written
    if "Body" in row:  # SVAMP
        row = {"question": f"{row['Body']} {row['Question']}", "answer": f"{row['Answer']}"}
    question = row["question"] if "question" in row else row["problem"]
    answer = row["answer"].rsplit("####", 1)[-1].strip()
    if not question.strip() or not answer:
        raise ValueError
    (question + row["answer"]).encode()  # ValueError: half of a character, "\ud83d" in JSON
    return Problem(question.strip(), answer, solution=row["answer"])


@functools.cache
def read_problems(name, split, seed):
    """All problems of a split, shuffled. A row that cannot be used ends the run at its start."""
    problems = []
    for where, row in read_lines(name, split):
        try:
            problems.append(to_problem(row))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            wanted = "`question` or `problem`, and `answer`, a text or a number"
            raise UserError(f"{where}: needs {wanted}") from None
    if not problems:
        raise UserError(f"{name}: no problem in its {split} split")
    return random.Random(seed).sample(problems, len(problems))


def problems(args, split, start, count):
    """After the last problem comes the first again, but none twice in one call."""
    rows = read_problems(args.task, split, args.seed if split == "train" else 0)
    return [rows[i % len(rows)] for i in range(start, start + min(count, len(rows)))]


def request(question, args):
    return f"{question}\n{args.prompt}\n"


def worked(problem, rng):
    """GSM8K's equations stand as <<48/2=24>> in its prose -> (thought, answer) as texts"""
    return " ".join(re.findall("<<[^<>]+>>", problem.solution)), f"\\boxed{{{problem.answer}}}"


# --- 2. Numbers. What stands around a number may go only if its value stays -----------------------

SPACE = r"(?:[\s~]|\\[ ,;:!])*"
GROUPS = r"\d{1,3}(?:(?:,|\\,|\{,\}|,\\! ?)\d{3})+"  # 1,234 and, in LaTeX, 1{,}234; but not "1,2"
NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]}])[-−])?"  # the last number of 10-3 is 3
    r"(?:\\?\$|[€£¥])?"
    r"(?:(?P<whole>\d+) +(?=\d+/0*[1-9]))?"  # the 1 of 1 1/2
    rf"(?P<rest>(?:{GROUPS}|\d+)(?:\.\d+|/0*[1-9]\d*)?|\.\d+)",
    re.ASCII,
)
DEGREE = r"\\?%|°|\^\\circ|\^\{\\circ\}"
# but not 18x
UNIT = r"\\(?:text|mathrm|mbox)\{[^{}\\\d]{2,}\}|(?<!\d)[a-z]{4,}(?: (?!and |or )[a-z]+)*"
ANSWER = re.compile(
    rf"(?:\+(?!-))?{NUMBER.pattern}{SPACE}(?:{DEGREE})?{SPACE}(?:{UNIT})?\.?",
    re.ASCII | re.IGNORECASE,
)
COUNTS = re.compile(  # words that are no unit: 18 thousand is not 18
    r"\b(?:(?:hundred|thousand|million|billion|trillion|quadrillion|lakh|crore|dozen)(?:th)?s?"
    r"|half|halves|(?:third|fourth|fifth|sixth|seventh|eighth|ninth|tenth)s|plus|minus|divided"
    r"|factorial|squared|cubed)\b",
    re.IGNORECASE,
)
# math-verify takes 1 8 for 9, and $1$8 for 18
APART = re.compile(r"\d(?:[\s~$%'_{]|\\[ ,;:!$%]|\\q?quad|\\text\{\s*\})+\d")


def to_number(text):
    r"""The value of one plain number, perhaps with a unit, else None.

    "$1,234.0" -> 1234, "-1 1/2" -> -3/2, r"18~\text{cm}" -> 18; "1,2", "18x", "1e9", "1/0" -> None.
    No "e": the digits of 1e999999999 would fill the memory.
    """
    match = ANSWER.fullmatch(text.strip()) if len(text) <= 60 else None
    if not match or COUNTS.search(text):
        return None
    value = Fraction(re.sub(r"[^\d./]", "", match["rest"])) + int(match["whole"] or 0)
    return -value if match["sign"] else value


# --- 3. The verifier ------------------------------------------------------------------------------

INSIDE = r"[^{}]"
for _ in range(6):  # balanced braces, six deep
    INSIDE = rf"(?:[^{{}}]|\{{{INSIDE}*\}})"
FORM = re.compile(rf"\\boxed\{{({INSIDE}*)\}}")


@functools.cache
def start_judge():
    command = [sys.executable, Path(__file__).with_name("judge.py")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    judge = subprocess.Popen(command, **pipes, text=True)
    if not judge.stdout.readline():  # "ready", when its imports are done
        raise UserError("math-verify does not start: `echo | python tasks/judge.py` says why")
    return judge


def ask_judge(prediction, truth):
    """The judge's verdict; False if it ended over this one. The next question gets a new judge."""
    if start_judge().poll() is not None:
        start_judge.cache_clear()
    judge = start_judge()
    print(json.dumps([prediction, truth]), file=judge.stdin, flush=True)
    verdict = judge.stdout.readline()
    if not verdict:
        judge.wait()
    return verdict == "true\n"


def is_right(prediction, truth):
    """Numbers are compared exactly, and go to math-verify as their value: it misreads 1 1/2."""
    if prediction == truth:
        return True
    if len(prediction) > 200:  # as no answer is
        return False
    ours, theirs = to_number(prediction), to_number(truth)
    if ours is not None and theirs is not None:
        return ours == theirs
    if ours is not None:
        return ask_judge(str(ours), truth)
    if APART.search(prediction) or COUNTS.search(prediction):
        return False
    return ask_judge(prediction, truth if theirs is None else str(theirs))


def verify(text, problem):
    r"""-> (strict, flexible): strict wants the last \boxed{} to be right, flexible the last number.

    Of the answer 18: r"\boxed{18 eggs}" -> (1.0, 1.0), "It is 18." -> (0.0, 1.0).
    """
    boxes = FORM.findall(text)
    if boxes and is_right(boxes[-1].strip(), problem.answer):
        return 1.0, 1.0
    numbers = [match[0] for match in NUMBER.finditer(text)]
    last = to_number(numbers[-1]) if numbers else None
    return 0.0, float(last is not None and last == to_number(problem.answer))
