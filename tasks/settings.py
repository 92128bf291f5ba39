"""The settings of a run: the flags that all scripts share, and where a value comes from."""

import argparse
import json
import math
from pathlib import Path

import torch

from common import RANKS, load_checkpoint

# When a run goes on
MAY_CHANGE = {"resume", "steps", "lr", "lr_assistant", "eval_every", "save_every", "device"}
HERE_AND_NOW = {"device", "precision", "resume", "out"}  # of the machine and of one run
# What all scripts share for a task. The rest of its preset is in the script.
SHARED = {
    "svamp": dict(
        model="Qwen2.5-0.5B-Instruct",
        max_new_tokens=320,  # at 160 and 1e-5 it learnt to be brief
        prompts_per_step=8,
        steps=40,
        lr=3e-6,  # at 1e-5 LEPO's accuracy fell
        warmup=0.1,  # 4 steps
        eval_problems=64,
    )
}
MADE_FOR = {"chains": "chains", "chains_latent": "chains", "trees": "trees"}  # models in tasks/
ASK = "Please reason step by step, and put your final answer within \\boxed{}."


class Parser(argparse.ArgumentParser):
    changes = {}  # of the shared defaults, by one script; None: it has no such flag

    def add_argument(self, *flags, **options):
        name = flags[-1].lstrip("-")
        if name in self.changes:
            options["default"] = self.changes[name]
        if self.changes.get(name, name) is not None:
            super().add_argument(*flags, **options)

    def add_number(self, name, default, least, help):
        """A flag that takes a number like `default`, and refuses one below `least` in one line."""

        def number(text):
            value = type(default)(text)
            if not least <= value < (2**63 if isinstance(value, int) else math.inf):  # nor NaN
                raise argparse.ArgumentTypeError(f"must be a number, at least {least}")
            return value

        self.add_argument(f"--{name}", type=number, default=default, help=help)


def of(preset):
    return ", ".join(f"--{name} {value}" for name, value in preset.items())


def preset_of(task, presets):
    return SHARED.get(task, {}) | presets.get(task, {})


def make_parser(script, about, presets, **changes):
    """changes: defaults of the script, where they are not the shared ones; None: no such flag"""
    presets = [(name, preset_of(name, presets)) for name in SHARED | presets]
    parser = Parser(
        prog=script,
        usage=argparse.SUPPRESS,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description=about,
        epilog=" ".join(f"Defaults of --task {name}: {of(preset)}." for name, preset in presets),
    )
    parser.changes = changes
    return parser


def add_shared_flags(parser):
    """Defaults are for GSM8K on one GPU. A built-in task has a preset of its own in the script."""
    add, number = parser.add_argument, parser.add_number
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = "bfloat16" if device == "cuda" else "float32"
    changes = ", ".join(sorted(MAY_CHANGE - {"resume", "lr_assistant"}))
    add("--model", default="Qwen2.5-0.5B", help="hub id, Qwen name, local folder, chains or trees")
    add("--task", help="chains, trees, gsm8k, svamp, or a folder with train.jsonl, test.jsonl")
    add("--kind", default="", help="chains: mixed, plus, minus or single; trees: 2,2,4")
    add("--prompt", default=ASK, help="what follows a question in words")
    number("steps", 100, 0, "training steps; 0 only evaluates")
    number("prompts_per_step", 32, RANKS, "P, problems in a batch, at least one for each GPU")
    number("group_size", 8, 2, "G, rollouts of a problem, which an advantage compares; k of pass@k")
    number("max_new_tokens", 512, 2, "T, cap on the steps of a rollout, latent ones included")
    number("lr", 1e-6, 0, "peak learning rate; after the warm-up it falls by half a cosine")
    number("warmup", 0.03, 0, "share of the steps in which the learning rate rises")
    number("eval_problems", 256, RANKS, "held-out problems; of 256 the standard error is 3 points")
    number("eval_every", 10, 0, "steps between noise-free evaluations; 0: none")
    number("save_every", 20, 1, "steps between checkpoints")
    number("seed", 0, 0, "of noise and of the order of problems")
    add("--device", default=device, choices=["cuda", "cpu"], help="where it runs")
    add("--precision", default=precision, choices=["bfloat16", "float32"], help="of products")
    add("--out", help="run folder to make; without it a new one under runs/")
    add("--resume", metavar="FOLDER", help=f"go on with a run; may change: {changes}")
    add("--ask", metavar="QUESTION", help="show how the model thinks about a question, and end")


def parse_args(parser, presets, argv):
    """A value is the command line's, else that of the run to resume, or the task's preset.

    A model that was trained here brings its --prompt and --exit_text, and for --ask all settings.
    """
    add_shared_flags(parser)
    defaults = vars(parser.parse_args([]))
    nothing = argparse.Namespace(**dict.fromkeys(defaults))  # a flag that is not given stays None
    given = vars(parser.parse_args(argv, nothing))
    given = {name: value for name, value in given.items() if value is not None}
    if "resume" in given:
        saved = load_checkpoint(given["resume"]).get("args", {})
        if saved.keys() != defaults.keys():
            parser.error(f"{given['resume']} is a run of another script")
        if given.keys() - MAY_CHANGE:
            kept = ", ".join(sorted(given.keys() - MAY_CHANGE))
            parser.error(f"a run keeps its {kept}: start a new one")
        return argparse.Namespace(**saved | given)
    model = given.get("model")
    trained = settings_of_run(model)  # of the run that trained this model
    known_task = MADE_FOR.get(model) or trained.get("task", "gsm8k")
    task = given.get("task") or (known_task if model else "chains")
    defaults |= preset_of(task, presets)
    learnt = defaults.keys() & trained.keys() - HERE_AND_NOW
    if "ask" not in given:  # else it thinks with all that it was trained with
        learnt &= {"prompt", "exit_text"}
    defaults |= {name: trained[name] for name in learnt}
    return argparse.Namespace(**defaults | given | {"task": task})


def settings_of_run(model):
    """-> the settings of the run in whose folder a model lies, or {}"""
    result = Path(model or "").parent / "result.json"
    if not model or not Path(model).is_dir() or not result.exists():
        return {}
    try:
        return dict(json.loads(result.read_text())["args"])
    except (ValueError, KeyError, TypeError):  # another program's file
        return {}


def learning_rate(args, step):
    """Warm-up, then half a cosine: of 100 steps at --lr 1, the rates .33, .67, 1, 1, … .0002"""
    warmup = min(1, (step + 1) / max(1, args.warmup * args.steps))
    return args.lr * warmup * (1 + math.cos(math.pi * step / args.steps)) / 2
