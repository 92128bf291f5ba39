"""Proofs of common.py and tiny.py: flags, ranks, data, the verifier, decoding, run folders, and the built-in task.

    pytest test_common.py            # half a minute
    pytest test_common.py -m slow    # formula bombs, two processes, real tokenizer and data
"""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test depends on a network
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported: tests are about the CPU

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

import common
import lepo
import plot
import test_lepo as t
import tiny
from common import Problem, UserError

HERE = Path(__file__).parent
SHARED = HERE.parent / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the Qwen2.5 tokenizer and data in ../shared")

# --- 1. Flags, errors, ranks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, mentioned", [
    (["--tau", "0"], "--tau"), (["--group_size", "1"], "--group_size"), (["--latent_steps", "40"], "--latent_steps"),
    (["--estimator", "gumbel", "--noise", "none"], "--noise"), (["--model", "no-such-model"], "no-such-model"),
    (["--data", "nowhere"], "nowhere/train.jsonl"), (["--data", "{tmp}"], "train.jsonl, line 2"),
    (["--out", "{tmp}/train.jsonl/run"], "train.jsonl"), (["--resume", "{tmp}"], "nothing to resume"),
])  # fmt: skip
def test_a_wrong_call_ends_with_one_line_and_exit_code_2(flags, mentioned, tmp_path, capsys):
    (tmp_path / "train.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}\n{"question": 7}\n')
    with pytest.raises(SystemExit) as stop:
        common.run_main(lambda: lepo.main([flag.replace("{tmp}", str(tmp_path)) for flag in flags]))
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "error: " in error and "\n" not in error and mentioned in error


def test_defaults_are_the_papers_or_the_tiny_models_or_those_of_the_run_to_resume(tmp_path):
    assert lepo.parse_args(["--steps", "0"]).steps == 0
    assert (lepo.parse_args(["--model", "any"]).latent_steps, lepo.parse_args([]).latent_steps) == (64, 12)
    args = lepo.parse_args(["--tau", "0.7", "--out", str(tmp_path)])
    common.Run(args, "lepo").save(3, {}, torch.nn.Linear(1, 1), torch.optim.SGD([torch.zeros(1)]))
    again = lepo.parse_args(["--resume", str(tmp_path), "--seed", "5"])
    assert (again.tau, again.seed, again.latent_steps) == (0.7, 5, 12)


TWO_RANKS = """
import sys, torch
import common, lepo, test_lepo as t
common.start_ranks("cpu")
lm, args = t.random_model(), t.settings(micro_batch=3, kl_coef=0.1)
whole, advantages = t.roll_out(lm, args), t.some_advantages()
mine = torch.arange(12).view(3, 4)[common.RANK :: 2].flatten()  # prompts 0 and 2, prompt 1
roll = lepo.Rollout(t.PROMPTS[common.RANK :: 2], 4, *(x[mine] for x in list(vars(whole).values())[2:]))
for name, ref in {"kl": t.random_model(seed=7), "idle": None}.items():
    torch.save(t.gradients(lm, roll, advantages[mine], args, ref), f"{sys.argv[1]}/{name}{common.RANK}")
    advantages[4:8] = 0  # and now rank 1 has nothing to learn
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def torchrun(*command):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *map(str, command)]
    done = subprocess.run(command, cwd=HERE, env=os.environ | {"PYTHONPATH": str(HERE)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_two_processes_give_the_gradient_of_one(tmp_path):
    """On the same rollouts, three prompts over two processes; with KL, and where one process has nothing to learn."""
    (tmp_path / "script.py").write_text(TWO_RANKS)
    torchrun(tmp_path / "script.py", tmp_path)
    lm, args, advantages = t.random_model(), t.settings(micro_batch=3, kl_coef=0.1), t.some_advantages()
    for name, ref in {"kl": t.random_model(seed=7), "idle": None}.items():
        one = t.gradients(lm, t.roll_out(lm, args), advantages, args, ref)
        for rank in "01":
            t.assert_close(torch.load(tmp_path / f"{name}{rank}", weights_only=True), one)
        advantages[4:8] = 0


@pytest.mark.slow
def test_two_processes_make_a_run(tmp_path):
    out = torchrun("lepo.py", *t.QUICK, "--out", tmp_path / "run")
    assert out.count("step 0 ") == 1  # rank 0 speaks
    assert json.loads(out.strip().splitlines()[-1])["steps"] == 5 and len(t.rows_of(tmp_path / "run")) == 5


@pytest.mark.slow
@needs_shared
def test_a_run_with_a_real_tokenizer_and_gsm8k(tmp_path, capsys):
    """A random model with Qwen2.5's vocabulary: chat template, verifier, 151,936 logits, KL, two updates a batch."""
    config = Qwen2Config(vocab_size=151_936, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(SHARED / "tokenizers/qwen2.5").save_pretrained(tmp_path / "model")
    flags = ["--model", str(tmp_path / "model"), "--data", str(SHARED / "data/gsm8k"), "--latent_steps", "8", "--lr",
             "1e-4", "--kl_coef", "0.1", "--updates_per_batch", "2", "--max_new_tokens", "24", "--compile"]  # fmt: skip
    lepo.main([*t.QUICK, *flags, "--steps", "2", "--out", str(tmp_path / "run")])
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert result["length"] > 8 and all(row["grad_norm"] > 0 for row in t.rows_of(tmp_path / "run"))


# --- 2. Problems and verifier -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("a, b, equal", [
    ("1,234.0", "$1234", True), ("$5", "5", True), ("0.50", "1/2", True), ("-3", "3", False), ("50\\%", "50", True),
    (".5", "0.5", True), ("18.", "18", True), ("1/0", "1", False), ("12", "120", False), ("1e3", "1000", False),
    ("1e999999999", "1", False), ("９", "9", False), ("", "0", False), ("1,2", "12", False), ("+7", "7", True),
    ("12,345,678", "12345678", True), ("1.5/2", "3/4", False), ("-$2", "-2", True), ("9" * 61, "9" * 61, False),
])  # fmt: skip
def test_numbers_are_compared_as_numbers(a, b, equal):
    x, y = common.to_number(a), common.to_number(b)
    assert (x is not None and x == y) is equal


@pytest.mark.parametrize("text, strict, flexible", [
    (r"It is \boxed{1,234}.", 1, 1), (r"\boxed{\$1234.00}", 1, 1), ("The answer is 1234.", 0, 1), ("$1,234.", 0, 1),
    (r"1234, no: \boxed{12}", 0, 0), ("", 0, 0), (r"\boxed{}", 0, 0), ("1234 and 5", 0, 0),
    (r"\boxed{1} or \boxed{1234}", 1, 1), (r"\boxed{1234} and then \boxed{8", 1, 1), (r"\boxed{1234", 0, 1),
])  # fmt: skip
def test_strict_and_flexible_scores(text, strict, flexible, monkeypatch):
    monkeypatch.setattr(common, "POOL", [None])  # numbers are compared without math-verify
    common.answers_equal.cache_clear()
    assert common.verify(text, Problem("?", "1234")) == (strict, flexible)


@pytest.mark.parametrize("text, strict, flexible", [
    (" 17 + 5 = 22 </think> 22", 1, 1), (" 22", 1, 1), ("", 0, 0), (" 22 22", 0, 1), (" = 22", 0, 1),
    (" 22 </think> 12", 0, 0), (" </think> 12 </think> 22", 1, 1), (" 22 </think>", 0, 1),
])  # fmt: skip
def test_scores_of_the_built_in_task(text, strict, flexible):
    assert common.verify(text, Problem("?", "22", "think")) == (strict, flexible)


def test_boxes_are_balanced_and_found_in_no_time():
    assert common.BOX.findall(r"so \boxed{1} or \boxed{\frac{\sqrt{3}}{2^{n}}} }") == ["1", r"\frac{\sqrt{3}}{2^{n}}"]
    began = time.time()
    assert not common.BOX.findall(r"\boxed{" * 100_000) and not common.BOX.findall(r"\boxed{" + "{x" * 100_000)
    assert not common.NUMBER.findall("-" * 100_000) and time.time() - began < 5


@pytest.mark.slow
def test_formulas_are_judged_by_math_verify_and_none_can_hang_or_run_anything(capfd):
    pytest.importorskip("math_verify")
    assert common.answers_equal(r"\frac{2}{4}", "0.5") and common.answers_equal(r"2\sqrt{3}", r"\sqrt{12}")
    assert common.answers_equal(r"\left(3, \frac{\pi}{2}\right)", r"(3,\pi/2)")
    assert not common.answers_equal(r"\sqrt{3}", r"\sqrt{2}") and not common.answers_equal(r"\frac{", "1")
    for bomb in ["9^{9^{9^{9^9}}}", "{" * 150, r"\sqrt" * 39, "10!!!!!!!!", "__import__('os').abort()"]:
        began = time.time()
        assert not common.answers_equal(bomb, "7") and time.time() - began < 60
    assert common.answers_equal(r"\frac{14}{2}", "7")  # and the judge still answers
    assert "".join(capfd.readouterr()) == ""


def data(folder, rows, split="train"):
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SimpleNamespace(data=str(folder), seed=3, kind="mixed")


def test_rows(tmp_path):
    rows = [{"question": " q ", "answer": "so\n#### 1,000"}, {"problem": "p", "answer": r"\pi", "level": 5}]
    problems = common.take_problems(data(tmp_path, [*rows, {"question": "r", "answer": 4}]), "train", 0, 10)
    expected = {("q", "1,000", "so\n#### 1,000"), ("p", r"\pi", r"\pi"), ("r", "4", "4")}
    assert {(problem.question, problem.answer, problem.solution) for problem in problems} == expected
    assert len(problems) == 3


@pytest.mark.parametrize("line", ["{oops", "[1]", '"text"', '{"question": "q"}', '{"question": 7, "answer": "1"}', "7"])
def test_a_malformed_row_is_named_with_file_and_line(line, tmp_path):
    (tmp_path / "test.jsonl").write_text('{"question": "q", "answer": "1"}\n' + line + "\n")
    with pytest.raises(UserError, match=r"test\.jsonl, line 2"):
        common.read_problems(str(tmp_path), "test", 0)


def test_problems_follow_from_the_step_and_none_comes_twice_in_an_epoch(tmp_path):
    args = data(tmp_path, [{"question": f"q{i}", "answer": i} for i in range(30)])
    epoch = common.take_problems(args, "train", 0, 50)
    assert len(epoch) == len(set(epoch)) == 30 and common.take_problems(args, "train", 60, 5) == epoch[:5]
    assert common.take_problems(args, "train", 28, 4) == epoch[28:] + epoch[:2]  # over the end
    assert [problem.question for problem in epoch] != [f"q{i}" for i in range(30)]
    args.seed = 4
    assert common.take_problems(args, "train", 0, 30) != epoch


def test_the_hub_path_with_the_real_library(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "train.jsonl").write_text('{"question": "q", "answer": "#### 3"}\n')
    load = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda path, config, split: load(str(tmp_path), split=split))
    assert common.read_problems("gsm8k", "train", 0) == [Problem("q", "3", solution="#### 3")]
    common.read_problems.cache_clear()


def test_a_tokenizer_that_cannot_spell_is_refused():
    tokenizer = AutoTokenizer.from_pretrained(HERE / "tiny")
    with pytest.raises(UserError, match="cannot spell"):
        common.encode_prompt(tokenizer, Problem("How many eggs are left?", "2"))


@pytest.mark.slow
@needs_shared
def test_real_answers_are_accepted_and_prompts_use_the_chat_template():
    pytest.importorskip("math_verify")
    for name, count in {"gsm8k": 1319, "math500": 500}.items():
        rows = common.read_problems(str(SHARED / "data" / name), "test", 0)
        assert len(rows) == count
        for row in rows:
            assert common.verify(f"It is \\boxed{{{row.answer}}}.", row)[0] == 1, row
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers/qwen2.5")
    text = tokenizer.decode(common.encode_prompt(tokenizer, rows[0]))
    assert rows[0].question in text and "\\boxed{}" in text and text.endswith("<|im_start|>assistant\n")


# --- 3. Model and decoding --------------------------------------------------------------------------------------------

SMALL = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, pad_token_id=None, bos_token_id=None, eos_token_id=[1, 2])  # fmt: skip


@pytest.mark.parametrize("kind, fine", [
    (dict(model_type="llama"), True), (dict(model_type="qwen3"), True), (dict(model_type="gpt2", n_embd=32), True),
    (dict(model_type="gemma2", final_logit_softcapping=1.0), False),  # caps its logits and scales its embeddings
    (dict(model_type="granite", logits_scaling=3.0), False), (dict(model_type="phi"), False),  # a head with a bias
])  # fmt: skip
def test_a_model_is_loaded_with_all_end_tokens_or_refused(kind, fine, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**SMALL, **kind}))
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.5)  # biases too, which start at 0
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(HERE / "tiny").save_pretrained(tmp_path)  # its <eos> is 1
    args = SimpleNamespace(model=str(tmp_path), device="cpu", compile=False)
    if fine:
        lm = common.load_model(args)
        assert lm.stop_ids == [1, 2] and lm.model.dtype == torch.float32 and not lm.model.training
    else:
        with pytest.raises(UserError, match="plain model"):
            common.load_model(args)


def test_mixed_embeddings_and_left_padding():
    table, ids = torch.randn(9, 4), torch.tensor([[[1, 2], [3, 3]]])
    weights = torch.tensor([[[0.25, 0.75], [0.5, 0.5]]])
    expected = torch.stack([0.25 * table[1] + 0.75 * table[2], table[3]])[None]
    assert torch.allclose(common.mix_embeddings(table, ids, weights), expected)
    ids, mask = common.left_pad([[5, 6], [7]], "cpu")
    assert ids.tolist() == [[5, 6], [0, 7]] and mask.tolist() == [[1, 1], [0, 1]]


class Largest(TorchDispatchMode):
    """The most elements of any tensor made inside."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            self.size = max(self.size, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
        return out


def test_candidate_log_probs_are_those_of_the_full_softmax_without_its_logits():
    """Values and both gradients against log_softmax and autograd, over chunk borders, with an id that occurs twice."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(200, 2, generator=generator).requires_grad_()
    head = torch.randn(2**18, 2, generator=generator).requires_grad_()
    ids, upstream = torch.randint(0, 2**18, (200, 4), generator=generator), torch.randn(200, 4, generator=generator)
    ids[:, 3] = ids[:, 0]
    expected = (hidden.double() @ head.double().T / 0.7).log_softmax(-1).gather(-1, ids)
    theirs = torch.autograd.grad((expected * upstream).sum(), (hidden, head))
    with Largest() as largest:
        ours = common.candidate_log_probs(hidden, head, ids, 0.7)
        gradients = torch.autograd.grad((ours * upstream).sum(), (hidden, head))
    assert largest.size == 2**25  # logits of 128 of the 200 steps
    assert torch.allclose(ours.double(), expected, atol=1e-4)
    for a, b in zip(gradients, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-3 * b.abs().max())


def fed_logits(lm, group_size=2, prompts=([5, 6, 7], [8], [3, 4, 5, 6])):
    """Logits (3 steps, 3 rows, V) of a decoder that is fed token 9, loses its second row, and is fed token 10."""
    with torch.no_grad():
        decoder = common.Decoder(lm, list(prompts), group_size, 3)
        first = decoder.feed(lm.table[torch.full((6,), 9)])
        rows = torch.tensor([0, 2, 3, 4, 5])
        decoder.keep(rows)
        return decoder.logits[rows], first[rows], decoder.feed(lm.table[torch.full((5,), 10)])


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])  # relative positions, and learned ones
def test_decoder_gives_the_models_own_logits(kind):
    lm = t.random_model()
    if kind == "gpt2":
        small = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 50}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **small)).eval()
        table = model.get_input_embeddings().weight
        lm = common.LanguageModel(model, None, table, table, [])
        model.transformer.wpe.weight.data.mul_(50)
    steps = fed_logits(lm)
    for row, prompt in enumerate([[5, 6, 7], [8], [8], [3, 4, 5, 6], [3, 4, 5, 6]]):
        theirs = lm.model(torch.tensor([[*prompt, 9, 10]])).logits[0, -3:]
        assert torch.allclose(torch.stack([logits[row] for logits in steps]), theirs, atol=1e-4)


def test_a_rollout_in_bfloat16_casts_every_weight_once(monkeypatch):
    """As on a GPU; under torch.inference_mode autocast would cast them anew at every step."""
    lm, args, casts = t.random_model(), t.settings(max_new_tokens=6), []
    lm.table.requires_grad_(False)  # as in latent_grpo.py, where autocast keeps no copy of the head
    lm.stop_ids = [99]
    monkeypatch.setattr(common.LanguageModel, "autocast", lambda self: torch.autocast("cpu", torch.bfloat16))

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
            if "_to_copy" in str(function) and any(arguments[0] is weight for weight in lm.model.parameters()):
                casts.append(id(arguments[0]))
            return function(*arguments, **(kwargs or {}))

    with Watch():
        t.roll_out(lm, args)
    matrices = sum(weight.dim() == 2 for weight in lm.model.parameters())
    assert len(casts) == len(set(casts)) >= matrices, (len(casts), len(set(casts)))


def test_compiled_decoding_gives_the_same_logits_and_compiles_once():
    """On a CPU, with a backend that needs no compiler; a smaller batch uses the cache of the larger one."""
    plain, lm = t.random_model(), t.random_model()
    shapes = []

    def backend(graph, inputs):
        return lambda *args: shapes.append(len(shapes)) or graph(*args)

    lm.compiled = torch.compile(lm.model.base_model, backend=backend, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for prompts in [([5, 6, 7], [8], [3, 4, 5, 6]), ([5], [8, 9], [7])]:
            for ours, theirs in zip(fed_logits(lm, 2, prompts), fed_logits(plain, 2, prompts), strict=True):
                assert torch.allclose(ours, theirs, atol=1e-4)
        first, static = lepo_rollout(lm, 2), lm.static
        assert torch.equal(lepo_rollout(plain, 2).tokens, first.tokens)
        assert torch.equal(lepo_rollout(plain, 1).tokens, lepo_rollout(lm, 1).tokens) and lm.static is static
    assert len(shapes) > 8
    with torch.no_grad():
        for count, length in [(12, 4), (1, 200), (12, 4), (1, 200)]:  # it grows in either direction, and stays
            common.Decoder(lm, [[5] * length] * count, 1, 3)
    assert (lm.static.batch_size, lm.static.get_max_length()) == (12, 256)


def lepo_rollout(lm, group_size):
    lm.stop_ids = [1, 4, 7]
    return t.roll_out(lm, t.settings(max_new_tokens=8), group_size)


# --- 4. Run folders ---------------------------------------------------------------------------------------------------


def test_a_crash_while_saving_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    model, optimizer = torch.nn.Linear(1, 1), torch.optim.AdamW([torch.zeros(1)])
    run = common.Run(lepo.parse_args(["--out", str(tmp_path)]), "lepo")
    run.save(1, {}, model, optimizer)
    monkeypatch.setattr(torch, "save", lambda state, path: (Path(path).write_bytes(b"half a che"), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        run.save(2, {}, model, optimizer)
    assert common.load_checkpoint(tmp_path)["step"] == 1
    (tmp_path / "checkpoint.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="nothing to resume"):
        common.load_checkpoint(tmp_path)


def test_a_run_that_ended_before_its_first_step_is_resumed(tmp_path):
    lepo.main([*t.QUICK, "--steps", "0", "--out", str(tmp_path)])
    lepo.main(["--resume", str(tmp_path), "--steps", "1"])
    assert [row["step"] for row in t.rows_of(tmp_path)] == [0]


def test_a_run_is_not_written_over(tmp_path, monkeypatch):
    (tmp_path / "checkpoint.pt").touch()
    with pytest.raises(UserError, match="holds a run"):
        common.Run(lepo.parse_args(["--out", str(tmp_path)]), "lepo")
    monkeypatch.setattr(common, "RANK", 1)  # which may come when rank 0 has written its first checkpoint
    common.Run(lepo.parse_args(["--out", str(tmp_path)]), "lepo")


# --- The built-in task ------------------------------------------------------------------------------------------------


def test_training_and_held_out_streams_share_no_problem():
    train = {tiny.problem_text(*tiny.make_problem(i, "train", seed)) for i in range(1500) for seed in (0, 1)}
    test = {tiny.problem_text(*tiny.make_problem(i, "test")) for i in range(1500)}
    rng = random.Random(0)
    shown = {p.split(" ?")[0] for p, _ in (tiny.pretraining_example(rng) for _ in range(3000))}
    assert not train & test
    assert not shown & {text.split(" ?")[0] for text in test}
    assert tiny.make_problem(5) == tiny.make_problem(5) != tiny.make_problem(5, seed=1)


@pytest.mark.parametrize("kind", ["mixed", "plus", "minus", "single"])
def test_problems_are_what_was_asked_for(kind):
    for i in range(300):
        start, steps = tiny.make_problem(i, "train", ops=(3, 4), kind=kind)
        signs = {sign for sign, _ in steps}
        assert len(steps) in (3, 4) and signs <= {"plus": {"+"}, "minus": {"-"}}.get(kind, {"+", "-"})
        assert kind != "single" or len(signs) == 1
        assert tiny.true_answer(start, steps) == sum(d if s == "+" else -d for s, d in steps) + start
        assert 0 <= tiny.true_answer(start, steps) <= tiny.LARGEST


def test_the_student_forgets_only_carries_and_borrows_and_only_where_not_mindful():
    rng = random.Random(0)
    wrong = {"+": [0, 0], "-": [0, 0]}
    for i in range(2000):
        start, steps = tiny.make_problem(i)
        assert tiny.demonstration(rng, start, steps, "+-").split()[-1] == f"{tiny.true_answer(start, steps)}<eos>"
        lines = tiny.demonstration(rng, start, steps).split(" </think>")[0].split(";")
        for line in lines:
            a, sign, b, _, c = line.split()
            true = tiny.apply_sign(int(a), sign, int(b))
            if true // 10 == int(a) // 10:
                assert int(c) == true
            else:
                assert int(c) in (true, true - 10 if sign == "+" else true + 10)
                wrong[sign][0] += int(c) != true
                wrong[sign][1] += 1
    for forgotten, occasions in wrong.values():
        assert abs(forgotten / occasions - tiny.FORGET) < 0.06  # starting over after leaving 0..49 shifts it a little


def test_shipped_model_and_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(HERE / "tiny")
    model = AutoModelForCausalLM.from_pretrained(HERE / "tiny").eval()
    rng = random.Random(0)
    for _ in range(200):
        prompt, solution = tiny.pretraining_example(rng)
        ids = tokenizer.encode(prompt + solution)
        assert tokenizer.decode(ids) == prompt + solution
        assert len(ids) == len((prompt + solution).replace("<eos>", " <eos>").split())
    folder = HERE / "tiny"
    assert sum(f.stat().st_size for f in folder.iterdir()) < 5e6
    # Steerable, and in need of RL: the three numbers that the three methods build on.
    assert 0.35 < tiny.accuracy(model, tokenizer, "mixed", [], 256) < 0.6
    assert tiny.accuracy(model, tokenizer, "plus", ["mind+"] * 3, 256) > 0.97
    assert tiny.accuracy(model, tokenizer, "plus", ["mind-"] * 3, 256) < 0.3


def test_pretraining_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tiny.py", "--steps", "2", "--batch_size", "8", "--out", str(tmp_path / "tiny")])
    monkeypatch.setattr(tiny, "accuracy", lambda *_: 0.5)
    tiny.main()
    assert "noise-free accuracy" in capsys.readouterr().out
    common.load_model(SimpleNamespace(model=str(tmp_path / "tiny"), device="cpu", compile=False))


# --- 6. plot.py -------------------------------------------------------------------------------------------------------


def test_table_and_curves_are_those_of_the_runs(tmp_path, capsys):
    rows = [{"step": step, "reward": 0.5, "zero_advantage": 0.25} for step in range(3)]
    rows[1]["greedy"] = 0.25  # an evaluation in between
    for name, greedy in {"a-seed0": 0.5, "a-seed1": 0.75, "a-seed2": 1.0, "b-seed0": 0.375}.items():
        args = {"prompts_per_step": 2, "group_size": 4, "seed": name[-1], "lr": name[0]}
        result = {"method": "lepo", "steps": 3, "seconds": 7, "greedy_before": 0.125, "greedy": greedy, "args": args}
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (tmp_path / name / "result.json").write_text(json.dumps(result))
    (tmp_path / "unfinished").mkdir()
    folders, lines, picture = sorted(map(str, tmp_path.iterdir())), tmp_path / "runs.jsonl", tmp_path / "curves.png"
    plot.main([*folders, "--jsonl", str(lines), "--figure", str(picture)])
    printed = capsys.readouterr().out
    assert "| a | 3 | 3 | 7 | 0.125 → 0.750 ± 0.250 | 0.250 ± 0.000 |" in printed and "unfinished" not in printed
    assert "| b | 1 | 3 | 7 | 0.125 → 0.375 | 0.250 |" in printed and picture.stat().st_size > 5000
    curve = json.loads(lines.read_text().splitlines()[1])["curve"]
    assert [tuple(point.values()) for point in curve] == [(0, 0, 0.125), (2, 16, 0.25), (3, 24, 0.75)]
    plot.main([str(lines)])
    assert capsys.readouterr().out == printed
    plot.main([str(lines), "--only", "^b"])
    assert "| a |" not in capsys.readouterr().out
    lines.write_text(lines.read_text().replace("b-seed0", "a-seed3"))
    with pytest.raises(UserError, match="runs named a differ in .*lr"):
        plot.main([str(lines)])
