"""Proofs of common.py, and of settings and prompts in tasks/: what all methods rely on.

    pytest tests/test_common.py            # half a minute
    pytest tests/test_common.py -m slow    # two processes; a real tokenizer and GSM8K
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test needs a network
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported: tests are about the CPU

import pytest
import torch
from safetensors.torch import save_file
from tokenizers.processors import TemplateProcessing
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen2Config
from transformers import Qwen2ForCausalLM

import common
import lepo
import test_lepo as t
from common import UserError
from tasks import Problem, encoding, find, settings

HERE = Path(__file__).parents[1]
CHAINS = HERE / "tasks/models/chains"
SHARED = HERE.parent / "shared"
REAL = Path(os.environ.get("REAL_MODELS", HERE.parent / "models"))  # Hugging Face folders
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no real tokenizer and data there")


# --- Ranks ----------------------------------------------------------------------------------------

TWO_RANKS = """
import glob, sys, torch, common
common.start_ranks("cpu")
import lepo, test_lepo as t
lm, args = t.random_model(), t.settings()
whole, advantages = t.roll_out(lm, args), t.some_advantages()
mine = torch.arange(3)[common.RANK :: 2]  # prompts 0 and 2, prompt 1
rows = torch.arange(12).view(3, 4)[mine].flatten()
parts = [x[rows] for x in (whole.ids, whole.weights, whole.tokens, whole.length)]
roll = lepo.Rollout(t.PROMPTS[common.RANK :: 2], *parts)
for name in ("all", "idle"):
    gradients = t.gradients(lm, roll, advantages[mine], args)
    torch.save(gradients, f"{sys.argv[1]}/{name}{common.RANK}")
    advantages[1] = 0  # and now rank 1 has nothing to learn
mean = common.mean_over_ranks(torch.arange(1.0 + common.RANK))  # of 0 and of 0, 1
assert abs(mean - 1 / 3) < 1e-6
torch.distributed.barrier()
torch.distributed.destroy_process_group()
threads = [open(name).read() for name in glob.glob("/proc/self/task/*/comm")]  # on Linux
assert not [name for name in threads if "gloo" in name], threads  # else its end may abort
"""


def torchrun(*command):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launch, *map(str, command)], cwd=HERE, env=os.environ | {"PYTHONPATH": str(HERE)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_two_processes_give_the_gradient_of_one(tmp_path):
    """On the same rollouts, three prompts over two ranks; and where one has nothing to learn."""
    (tmp_path / "script.py").write_text(TWO_RANKS)
    torchrun(tmp_path / "script.py", tmp_path)
    lm, args, advantages = t.random_model(), t.settings(), t.some_advantages()
    for name in ("all", "idle"):
        one = t.gradients(lm, t.roll_out(lm, args), advantages, args)
        for rank in "01":
            t.assert_close(torch.load(tmp_path / f"{name}{rank}", weights_only=True), one)
        advantages[1] = 0


@pytest.mark.slow
def test_two_processes_make_a_run(tmp_path):
    out = torchrun("lepo.py", *t.QUICK, "--out", tmp_path / "run")
    assert out.count("step 0 ") == 1  # rank 0 speaks
    assert len(t.rows_of(tmp_path / "run")) == 5 and json.loads(out.splitlines()[-1])["greedy"] >= 0


def test_each_rank_takes_its_own_problems(monkeypatch, tmp_path):
    seen = {}
    monkeypatch.setattr(common, "RANKS", 2)
    monkeypatch.setattr(common, "start_ranks", lambda device: None)
    monkeypatch.setattr(common, "sum_over_ranks", lambda tensor: tensor)
    monkeypatch.setattr(lepo, "evaluate", lambda *_, **__: {})
    for rank in (1, 0):
        monkeypatch.setattr(common, "RANK", rank)
        seen[rank] = taken = []
        monkeypatch.setattr(encoding, "encode", lambda *given: taken.append(given[2]))
        (tmp_path / str(rank)).mkdir()
        with pytest.raises(TypeError):  # there are no prompts
            lepo.main([*t.QUICK, "--out", str(tmp_path / str(rank) / "run")])
    args = SimpleNamespace(task="chains", kind="mixed", seed=0)
    batch = find("chains").problems(args, "train", 0, 4)
    assert seen == {0: [batch[0::2]], 1: [batch[1::2]]}


# --- Settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, mentioned", [
    (["--tau", "0"], "--tau"), (["--tau", "inf"], "--tau"), (["--group_size", "1"], "--group_size"),
    (["--latent_steps", "40"], "--latent_steps"), (["--seed", "-1"], "--seed"),
    (["--model", "no-such-model"], "no-such-model"), (["--kind", "no"], "mixed, plus"),
    (["--task", "nowhere", "--model", "chains"], "--task nowhere"), (["--lr", "x"], "--lr"),
    (["--task", "{tmp}", "--model", "chains"], "train.jsonl, line 2"),
    (["--out", "{tmp}/train.jsonl/run"], "train.jsonl"), (["--out", "{tmp}"], "--resume"),
    (["--resume", "{tmp}"], "nothing to resume"),
])  # fmt: skip
def test_a_wrong_call_ends_with_one_line_and_exit_code_2(flags, mentioned, tmp_path, capsys):
    (tmp_path / "test.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}\n')
    (tmp_path / "train.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n{"answer": 7}\n')
    flags = [flag.replace("{tmp}", str(tmp_path)) for flag in flags]
    with pytest.raises(SystemExit) as stop:
        common.run_main(lambda: lepo.main(flags))
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "error: " in error and mentioned in error
    assert "\n" not in error


def checkpoint(folder, args):
    """A run folder that can be resumed, of a model of one weight"""
    lm = SimpleNamespace(model=torch.nn.Linear(1, 1))
    run = common.Run(args, "lepo", lm, torch.optim.SGD(lm.model.parameters()))
    run.save(3, {}) or run.log({"step": 0})
    return run


def test_where_a_value_comes_from(tmp_path):
    assert lepo.parse_args([]).latent_steps == 12  # the task's preset
    assert lepo.parse_args(["--model", "any"]).latent_steps == 64  # the default
    assert lepo.parse_args(["--steps", "0", "--lr", "0"]).steps == 0  # the command line
    svamp = lepo.parse_args(["--task", "svamp", "--lr", "3"])
    assert (svamp.latent_steps, svamp.warmup, svamp.lr) == (16, 0.1, 3)
    assert lepo.parse_args(["--model", "trees"]).tau == lepo.parse_args(["--task", "trees"]).tau
    (tmp_path / "result.json").write_text('{"args": {"task": "trees", "tau": 3, "device": "x"}}')
    (tmp_path / "model").mkdir()
    model = ["--model", str(tmp_path / "model")]  # that of a run
    assert (lepo.parse_args(model).task, lepo.parse_args(model).tau) == ("trees", 20)
    asked = lepo.parse_args([*model, "--ask", "?"])  # which thinks as it was trained to
    assert (asked.task, asked.tau, asked.device) == ("trees", 3, "cpu")
    (tmp_path / "result.json").write_text('{"args": {"prompt": "Think!", "tau": 3}}')
    taught = lepo.parse_args(model)  # how it is asked was learnt, too
    assert (taught.prompt, taught.tau, taught.task) == ("Think!", 0.3, "gsm8k")
    assert lepo.parse_args([*model, "--prompt", "Go"]).prompt == "Go"
    for foreign in ("[1]", "{}", '{"args": ', '{"args": 7}'):
        (tmp_path / "result.json").write_text(foreign)
        assert lepo.parse_args(model).task == "gsm8k"
    checkpoint(tmp_path, lepo.parse_args(["--tau", "0.7", "--out", str(tmp_path / "run")]))
    again = lepo.parse_args(["--resume", str(tmp_path / "run"), "--steps", "7"])
    assert (again.tau, again.latent_steps, again.steps) == (0.7, 12, 7)


def test_a_script_changes_a_shared_default_or_has_no_such_flag(capsys):
    presets = {"chains": {"lr": 0.5}}
    for flags, lr in (["--model", "any"], 0.1), ([], 0.5), (["--lr", "2"], 2.0):
        parser = settings.make_parser("x.py", "about", presets, lr=0.1, group_size=None)
        args = settings.parse_args(parser, presets, flags)
        assert args.lr == lr and not hasattr(args, "group_size")
    parser = settings.make_parser("x.py", "about", presets, lr=0.1, group_size=None)
    with pytest.raises(SystemExit):
        settings.parse_args(parser, presets, ["--lr", "-1"])  # its least value stays
    assert "--lr" in capsys.readouterr().err and "group_size" not in parser.format_help()


@pytest.mark.parametrize("model, task", [
    ("chains", "chains"), ("chains_latent", "chains"), ("trees", "trees"), ("Qwen2.5-0.5B", "gsm8k")
])  # fmt: skip
def test_a_model_of_this_repository_names_its_task(model, task):
    assert lepo.parse_args(["--model", model]).task == task


@pytest.mark.parametrize(
    "flags", [["--tau", "1"], ["--seed", "5"], ["--out", "x"], ["--text_only"], ["--ask", "1"]]
)
def test_a_resumed_run_keeps_its_settings(flags, tmp_path, capsys):
    checkpoint(tmp_path, lepo.parse_args(["--out", str(tmp_path / "run")]))
    with pytest.raises(SystemExit):
        lepo.parse_args(["--resume", str(tmp_path / "run"), *flags])
    assert flags[0].strip("-") in capsys.readouterr().err


def test_a_run_of_another_script_is_not_resumed(tmp_path, capsys):
    args = lepo.parse_args(["--out", str(tmp_path / "run")])
    args.think_text = ""
    checkpoint(tmp_path, args)
    with pytest.raises(SystemExit):
        lepo.parse_args(["--resume", str(tmp_path / "run")])
    assert "another script" in capsys.readouterr().err


# --- Prompts --------------------------------------------------------------------------------------


@pytest.fixture
def lm():
    return common.load_model(SimpleNamespace(model="chains", device="cpu", precision="float32"))


def encode(lm, text, max_new_tokens=4):
    return encoding.encode_one(lm, text, SimpleNamespace(max_new_tokens=max_new_tokens))


def test_a_prompt_that_the_model_cannot_take_is_refused(lm):
    assert encode(lm, " 1 + 2 ?") == lm.tokenizer.encode(" 1 + 2 ?")
    for text in ("How many eggs are left?", " 999 + 1 ? <think>", " 16+5 ? <think>"):
        with pytest.raises(UserError, match="cannot spell"):
            encode(lm, text)
    with pytest.raises(UserError, match="512 positions"):
        encode(lm, " 1 + 2 ?", 509)
    encode(lm, " 1 + 2 ?", 508)
    lm.embedding = lm.embedding[:30]
    with pytest.raises(UserError, match="names token"):
        encode(lm, " 49 + 2 ?")


def test_a_tokenizer_that_ends_every_text_does_not_end_the_prompt(lm):
    ending = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    expected = lm.tokenizer.encode(" 1 + 2 ?")
    lm.tokenizer._tokenizer.post_processor = ending
    assert lm.tokenizer.encode(" 1 + 2 ?")[-1] == 1 and encode(lm, " 1 + 2 ?") == expected


TEMPLATE = (
    "{% for m in messages %}{{ ' hm ' + m['content'] + ' <unk>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' so' }}{% endif %}"
)


def test_a_chat_template_frames_the_prompt_and_names_an_end_token(lm, tmp_path):
    lm.tokenizer.chat_template = TEMPLATE.replace("' <unk>'", "'<unk>'")
    assert lm.tokenizer.decode(encode(lm, " 1 + 2 ?")).split() == "hm 1 + 2 ?<unk> so".split()
    assert encoding.end_of_turn(lm.tokenizer) == [2]
    lm.tokenizer.chat_template = TEMPLATE.replace("<unk>", "so")  # an ordinary word ends nothing
    assert encoding.end_of_turn(lm.tokenizer) == []
    lm.tokenizer.chat_template = TEMPLATE.replace("' <unk>'", "'<unk>'")
    lm.model.save_pretrained(tmp_path), lm.tokenizer.save_pretrained(tmp_path)
    args = SimpleNamespace(model=str(tmp_path), device="cpu", precision="float32")
    loaded = common.load_model(args)
    assert loaded.stop_ids.tolist() == [1, 2]
    assert loaded.model.generation_config.eos_token_id == 1  # and stays as it was
    lm.tokenizer.chat_template = "{{ raise_exception('system first') }}"
    with pytest.raises(UserError, match="system first"):
        encode(lm, " 1 + 2 ?")
    lm.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="system first"):
        common.load_model(args)


@pytest.mark.parametrize("opened", ["", " <think>", " <think>\n"])
def test_a_prompt_ends_with_its_ending_once(lm, opened):
    """Also where the chat template has written it."""
    plain = lm.tokenizer.encode(" hm 1 + 2 ? so")
    template = TEMPLATE.replace("' <unk>'", "''")
    lm.tokenizer.chat_template = template.replace("' so'", repr(" so" + opened))
    args = SimpleNamespace(max_new_tokens=4)
    (think,) = lm.tokenizer.encode(" <think>")
    assert encoding.encode_one(lm, "1 + 2 ?", args, " <think>") == [*plain, think]
    if not opened:
        assert encoding.encode_one(lm, "1 + 2 ?", args) == plain


@pytest.mark.parametrize("text", ["1 + 2", "1 + 2<think>", "1 + 2<think>\n "])
def test_nothing_stands_behind_the_ending(text):
    """A tokenizer of bytes knows the line feed that a template writes behind <think>."""
    tokenizer = SimpleNamespace(chat_template=None, decode=lambda ids: bytes(ids).decode())
    tokenizer.encode = lambda text, **_: [*text.encode()]
    lm = SimpleNamespace(tokenizer=tokenizer, stop_ids=[], embedding=range(256))
    lm.model = SimpleNamespace(config=None)
    args = SimpleNamespace(max_new_tokens=4)
    assert bytes(encoding.encode_one(lm, text, args, "<think>")) == b"1 + 2<think>"


def test_a_problem_of_chains_opens_its_thought_itself(lm):
    args, task = SimpleNamespace(max_new_tokens=4), find("chains")
    (ids,) = encoding.encode(lm, task, [Problem("1 + 2", "3")], args, "<think>")
    assert ids == lm.tokenizer.encode(" 1 + 2 ? <think>")


def test_the_exit_is_the_first_token_of_its_text(lm):
    assert [encoding.exit_token(lm, " </think> 4")] == lm.tokenizer.encode(" </think>")
    for text in ("", "<eos>"):
        with pytest.raises(UserError, match="--exit_text"):
            encoding.exit_token(lm, text)


def test_a_local_folder_comes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert encoding.model_path("Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B"
    for name in ("other/model", "gpt2"):
        assert encoding.model_path(name) == name
    assert encoding.model_path("chains") == CHAINS
    for name in ("Qwen2.5-0.5B", "chains"):  # one with a model in it, and one without
        (tmp_path / name).mkdir()
    (tmp_path / "Qwen2.5-0.5B/config.json").touch()
    assert encoding.model_path("chains") == CHAINS
    assert encoding.model_path("Qwen2.5-0.5B") == "Qwen2.5-0.5B"


# --- Model and decoding ---------------------------------------------------------------------------

SMALL = dict(vocab_size=80, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, head_dim=8, pad_token_id=None,
             bos_token_id=None, eos_token_id=[1, 2])  # fmt: skip


def make_folder(folder, damage=None, **kind):
    """A random model of some kind, whose weights and biases all matter, with chains' tokenizer"""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SMALL | kind))
    for weight in model.parameters():
        weight.data.normal_(0, 0.5)
    if damage:
        next(model.parameters()).data[0] = damage
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(CHAINS).save_pretrained(folder)  # its <eos> is 1
    return SimpleNamespace(model=str(folder), device="cpu", precision="float32")


@pytest.mark.parametrize("kind", [
    dict(model_type="llama"), dict(model_type="qwen3"), dict(model_type="gpt2", n_embd=32),
    dict(model_type="mistral", sliding_window=3),
])  # fmt: skip
def test_a_plain_model_is_loaded_with_all_its_end_tokens(kind, tmp_path):
    lm = common.load_model(make_folder(tmp_path, **kind))
    assert lm.stop_ids.tolist() == [1, 2] and lm.model.dtype == torch.float32
    assert not lm.model.training


@pytest.mark.parametrize("kind", [
    dict(model_type="gemma2", final_logit_softcapping=1.0),  # caps its logits
    dict(model_type="gemma3_text"),  # scales embeddings when it looks them up
    dict(model_type="granite", logits_scaling=3.0), dict(model_type="phi"),  # a head with a bias
    dict(model_type="mamba", state_size=4),  # caches of another kind
    dict(model_type="lfm2", layer_types=["conv", "full_attention"]),
])  # fmt: skip
def test_a_model_that_cannot_be_decoded_from_embeddings_is_refused(kind, tmp_path):
    with pytest.raises(UserError, match="cannot use the model"):
        common.load_model(make_folder(tmp_path, **kind))


def test_the_reason_is_the_real_one(tmp_path):
    with pytest.raises(UserError, match="not finite"):
        common.load_model(make_folder(tmp_path / "nan", damage=float("nan"), model_type="llama"))
    args = make_folder(tmp_path / "bin", model_type="llama")
    (tmp_path / "bin/model.safetensors").rename(tmp_path / "bin/pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        common.load_model(args)


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])  # relative positions, and learned ones
def test_the_decoder_gives_the_models_own_logits(kind, tmp_path):
    """Three prompts of different length, twice each. Fed token 9, row 1 leaves, fed token 10."""
    lm = common.load_model(make_folder(tmp_path, model_type=kind, n_embd=32))
    keep = torch.tensor([True, False, True, True, True, True])
    with torch.no_grad():
        decoder = common.Decoder(lm, [[5, 6, 7], [8], [3, 4, 5, 6]], 2)
        steps = [decoder.logits[keep], decoder.feed(lm.embedding[torch.full((6, 1), 9)])[keep]]
        decoder.keep(keep)
        steps.append(decoder.feed(lm.embedding[torch.full((5, 1), 10)]))
    for row, prompt in enumerate([[5, 6, 7], [8], [8], [3, 4, 5, 6], [3, 4, 5, 6]]):
        theirs = lm.model(torch.tensor([[*prompt, 9, 10]])).logits[0, -3:]
        assert torch.allclose(torch.stack([logits[row] for logits in steps]), theirs, atol=1e-4)


class Largest(TorchDispatchMode):
    """The most elements of any tensor made inside."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.numel())
        return out


def test_a_draw_is_the_inverse_of_the_distribution_function(monkeypatch):
    """Heights on a grid: each token gets its share of them. One without probability gets none."""
    logits = torch.tensor([0, 0.5, 0, 0.125, 0.375, 0]).log()
    middles, ends = (torch.arange(1024) + 0.5) / 1024, torch.tensor([0, 1 - 2**-24])
    for heights, shares in ((middles, [0, 512, 0, 128, 384, 0]), (ends, [0, 1, 0, 0, 1, 0])):
        monkeypatch.setattr(torch, "rand_like", lambda like, heights=heights: heights[:, None])
        tokens = common.draw(logits.expand(len(heights), -1))
        assert tokens.flatten().bincount(minlength=6).tolist() == shares
    logits = torch.randn(200, 999, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(torch, "rand_like", lambda like: torch.full_like(like, 1 - 2**-24))
    assert (logits.softmax(-1).cumsum(-1)[:, -1] < 1 - 2**-24).any()  # by rounding
    assert (common.draw(logits) < 999).all()


def test_log_probs_are_those_of_the_full_softmax_without_all_of_its_logits():
    """Values and both gradients, over chunk borders, with a token that occurs twice."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(200, 2, generator=generator).requires_grad_()
    head = torch.randn(2**18, 2, generator=generator).requires_grad_()
    ids = torch.randint(0, 2**18, (200, 4), generator=generator)
    upstream = torch.randn(200, 4, generator=generator)
    ids[:, 3] = ids[:, 0]
    expected = (hidden.double() @ head.double().T).log_softmax(-1).gather(-1, ids)
    theirs = torch.autograd.grad((expected * upstream).sum(), (hidden, head))
    with Largest() as largest:
        ours = common.log_probs_at(hidden, head, ids)
        gradients = torch.autograd.grad((ours * upstream).sum(), (hidden, head))
    assert largest.size == 2**25  # logits of 128 of the 200 steps
    assert torch.allclose(ours.double(), expected, atol=1e-4)
    for a, b in zip(gradients, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-3 * b.abs().max())


class Casts(TorchDispatchMode):
    """Which weights of a model are cast inside."""

    def __init__(self, model):
        super().__init__()
        self.weights, self.seen = list(model.parameters()), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "_to_copy" in str(function) and any(args[0] is weight for weight in self.weights):
            self.seen.append(id(args[0]))
        return function(*args, **(kwargs or {}))


def test_a_rollout_in_bfloat16_casts_every_weight_once():
    """Under torch.inference_mode autocast would cast them anew at every step."""
    lm, args = t.random_model(), t.settings(max_new_tokens=6)
    lm.stop_ids, lm.dtype = torch.tensor([99]), torch.bfloat16
    lm.embedding.requires_grad_(False)  # autocast keeps no copy of what is not trained
    with Casts(lm.model) as casts:
        t.roll_out(lm, args)
    matrices = sum(weight.dim() == 2 for weight in lm.model.parameters())
    assert len(casts.seen) == len(set(casts.seen)) >= matrices


def test_the_learning_rate_warms_up_and_falls():
    args = SimpleNamespace(steps=100, lr=1.0, warmup=0.03)
    rates = [round(settings.learning_rate(args, step), 2) for step in (0, 1, 2, 50, 99)]
    assert rates == [0.33, 0.67, 1.0, 0.5, 0.0]
    args.warmup = 0.1
    assert [round(settings.learning_rate(args, step), 2) for step in (0, 9)] == [0.1, 0.98]
    for warmup in (0, 0.03):
        assert settings.learning_rate(SimpleNamespace(steps=1, lr=1.0, warmup=warmup), 0) == 1


def test_texts_that_are_cut_are_said_in_words(tmp_path, capsys):
    run = checkpoint(tmp_path, lepo.parse_args(["--out", str(tmp_path / "run")]))
    run.start()
    assert "2 weights learn" in capsys.readouterr().out
    run.log({"step": 0, "ended": 0.9})
    assert "cut" not in capsys.readouterr().out
    run.log({"step": 1, "ended": 0.14})
    assert "86% of the texts were cut: raise --max_new_tokens" in capsys.readouterr().out


def test_a_thought_is_readable():
    ids = torch.tensor([[36, 25, 7], [4, 5, 6]])
    weights = torch.tensor([[0.3, 0.7, 0.001], [0, 1, 0]])
    lines = encoding.describe_thought(AutoTokenizer.from_pretrained(CHAINS), ids, weights)
    assert lines == ["latent  1  ' 5' 0.70  ' 16' 0.30", "latent  2  ' ?' 1.00"]


# --- Run folders and the ends of a process --------------------------------------------------------


def test_a_crash_while_saving_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    run = checkpoint(tmp_path, lepo.parse_args(["--out", str(tmp_path / "run")]))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", lambda state, path: (path.write_bytes(b"half a che"), 1 / 0))
        with pytest.raises(ZeroDivisionError):
            run.save(4, {})
    assert common.load_checkpoint(tmp_path / "run")["step"] == 3
    (tmp_path / "run/checkpoint.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="nothing to resume"):
        common.load_checkpoint(tmp_path / "run")


def test_two_runs_never_share_a_folder(tmp_path, monkeypatch):
    """Not even one that holds only a log, and not when both start in the same second."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common.time, "strftime", lambda name: "runs/same-second")
    args = lepo.parse_args([])
    common.Run(args, "lepo", None, None)
    with pytest.raises(UserError, match="there already"):
        common.Run(args, "lepo", None, None)


def test_a_longer_run_does_not_leave_the_former_result(tmp_path):
    """Here one that ended before its first step."""
    folder = tmp_path / "run"
    lepo.main([*t.QUICK, "--steps", "0", "--out", str(folder)])
    assert (folder / "result.json").exists()
    stop = pytest.MonkeyPatch()
    stop.setattr(lepo, "rewards_of", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lepo.main(["--resume", str(folder), "--steps", "1"])
    stop.undo()
    assert not (folder / "result.json").exists()
    lepo.main(["--resume", str(folder), "--steps", "1"])
    assert [row["step"] for row in t.rows_of(folder)] == [0] and (folder / "result.json").exists()


@pytest.mark.parametrize("end", [
    lambda path: torch.save({"x": torch.ones(10**5)}, path),  # a checkpoint
    lambda path: save_file({"x": torch.ones(10**5)}, path),  # the weights of model/
    lambda path: path.write_bytes(bytes(10**6)),
    lambda path: torch.empty(10**15),
], ids=["checkpoint", "weights", "file", "memory"])  # fmt: skip
def test_a_full_disk_or_memory_is_one_line(end, tmp_path, capsys):
    """A limit on the size of files stands for the full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, before[1]))
    try:
        with pytest.raises(SystemExit) as stop:
            common.run_main(lambda: end(tmp_path / "file"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1


def test_weights_that_blew_up_are_one_line(tmp_path, capsys):
    flags = [*t.QUICK, "--steps", "2", "--eval_every", "0", "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit):
        common.run_main(lambda: lepo.main([*flags, "--lr", "1e30"]))
    assert "--lr was too high" in capsys.readouterr().err


def test_gpu_memory_and_long_reasons_are_one_line(capsys):
    full = Exception("(os error 28)")
    for error in (torch.OutOfMemoryError("CUDA"), UserError("one\ntwo"), full):
        with pytest.raises(SystemExit):
            common.run_main(lambda: (_ for _ in ()).throw(error))
        assert capsys.readouterr().err.count("\n") == 1


def test_a_bug_keeps_its_traceback():
    for bug in (RuntimeError("shapes"), KeyError("x"), ValueError("y")):
        with pytest.raises(type(bug)):
            common.run_main(lambda: (_ for _ in ()).throw(bug))


def test_ctrl_c_does_not_promise_a_checkpoint(capsys):
    with pytest.raises(SystemExit) as stop:
        common.run_main(lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert stop.value.code == 130 and "if there is one" in capsys.readouterr().err


@pytest.mark.slow
def test_a_console_that_cannot_print_a_character_loses_nothing():
    script = "import common; common.run_main(lambda: print('e = \\u03c0'))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=HERE, capture_output=True, text=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout == "e = ?\n"


# --- A whole run with a real tokenizer, or a real model -------------------------------------------
SVAMP = {"Body": "Tom has 3 pens.", "Question": "And with 4 more?", "Answer": "7.0"}


def needs(name):
    reason = f"no {REAL / name}: set REAL_MODELS to the folder of real models"
    return pytest.mark.skipif(not (REAL / name).is_dir(), reason=reason)


@pytest.mark.slow
@needs("smollm2")
def test_a_real_model_runs_and_says_first_what_it_does(tmp_path, capsys):
    pytest.importorskip("math_verify")
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(f"{json.dumps(SVAMP)}\n" * 2)
    flags = ["--model", str(REAL / "smollm2"), "--task", str(tmp_path), "--latent_steps", "4"]
    flags += ["--max_new_tokens", "12", "--steps", "1", "--prompts_per_step", "2"]
    flags += ["--group_size", "2", "--eval_problems", "2", "--out", str(tmp_path / "run")]
    lepo.main(flags)
    (row,) = t.rows_of(tmp_path / "run")
    assert row["length"] == 12 and row["effective_k"] > 1
    out = capsys.readouterr().out
    order = ["weights learn: 2.2 GB", "before:", "latent  4", "the answer is 7.0", "step 0"]
    places = [out.index(words) for words in order]  # a sample comes before the first update
    assert places == sorted(places)
    assert "100% of the texts were cut" in out


@pytest.mark.slow
@needs("qwen")
def test_a_replay_of_a_real_model_scores_what_it_wrote():
    """Words, in float32: their log-probabilities are those of the model's own pass."""
    args = ["--model", str(REAL / "qwen"), "--task", "chains", "--latent_steps", "0"]
    args = lepo.parse_args([*args, "--max_new_tokens", "6", "--precision", "float32"])
    lm = common.load_model(args)
    prompts = [lm.tokenizer.encode(text) for text in ("17 plus 25 is", "2 3 5 7")]
    torch.manual_seed(0)
    roll = lepo.rollout(lm, prompts, 2, 0, args)
    with torch.no_grad():
        for n in range(4):
            ours = lepo.replay(lm, roll, n // 2, 2, args)[n % 2, : roll.length[n]]  # (T,)
            written = roll.tokens[n, : roll.length[n]].tolist()  # T tokens
            whole = torch.tensor([prompts[n // 2] + written])  # (1, L + T)
            log_pi = lm.model(whole).logits[0].log_softmax(-1)  # (L + T, V)
            at = range(len(prompts[n // 2]) - 1, whole.shape[1] - 1)
            theirs = log_pi[at, written]  # (T,)
            assert torch.allclose(ours, theirs, atol=1e-3)


@pytest.mark.slow
@needs_shared
def test_a_run_with_a_real_tokenizer_and_gsm8k(tmp_path):
    """A random model with Qwen2.5's vocabulary: chat template, verifier, bfloat16."""
    pytest.importorskip("math_verify")
    config = Qwen2Config(vocab_size=151_936, hidden_size=32, intermediate_size=64,
                         num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         tie_word_embeddings=True)  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(SHARED / "tokenizers/qwen2.5").save_pretrained(tmp_path / "model")
    flags = ["--model", str(tmp_path / "model"), "--task", str(SHARED / "data/gsm8k")]
    flags += ["--latent_steps", "8", "--max_new_tokens", "24", "--precision", "bfloat16"]
    flags += ["--steps", "2"]
    prompt = "Answer in \\boxed{}, please."
    lepo.main([*t.QUICK, *flags, "--prompt", prompt, "--out", str(tmp_path / "run")])
    rows = t.rows_of(tmp_path / "run")
    assert len(rows) == 2 and all(row["length"] > 8 for row in rows)
    lm = common.load_model(lepo.parse_args(["--model", str(tmp_path / "model")]))
    task, args = __import__("tasks").find("gsm8k"), SimpleNamespace(prompt=prompt, max_new_tokens=8)
    (ids,) = encoding.encode(lm, task, [Problem("How many eggs?", "2")], args)
    text = lm.tokenizer.decode(ids)
    assert f"How many eggs?\n{prompt}<|im_end|>" in text
    assert text.endswith("<|im_start|>assistant\n")
    assert lm.tokenizer.convert_tokens_to_ids("<|im_end|>") in lm.stop_ids
