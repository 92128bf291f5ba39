"""Proofs of common.py and tiny.py: the verifier, the data, pass@k, checkpoints, and the built-in task.

    pytest test_common.py
"""

import itertools
import json
import os
import random
import signal
import time
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may depend on a network
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported: tests are about the CPU

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import common
import tiny
from common import Problem, UserError

SHARED = Path(__file__).parent.parent / "shared"
needs_tokenizer = pytest.mark.skipif(
    not (SHARED / "tokenizers/qwen2.5").is_dir(), reason="needs the Qwen2.5 tokenizer in ../shared/tokenizers"
)
needs_data = pytest.mark.skipif(not (SHARED / "data/gsm8k").is_dir(), reason="needs the data in ../shared/data")

# ----------------------------------------------------------------------------------------------------------------------
# The verifier.


@pytest.mark.parametrize("a, b, equal", [
    ("1,234.0", "$1234", True), ("$5", "5", True), ("0.50", "1/2", True), ("-3", "3", False), ("50\\%", "50", True),
    (".5", "0.5", True), ("18.", "18", True), ("1/0", "1", False), ("12", "120", False), ("1e3", "1000", False),
    ("1e999999999", "1", False), ("９", "9", False), ("", "0", False), ("1,2", "12", False),
    ("12,345,678", "12345678", True),
])  # fmt: skip
def test_numbers_are_compared_as_numbers(a, b, equal):
    x, y = common.to_number(a), common.to_number(b)
    assert (x is not None and x == y) is equal


def test_last_boxed():
    assert common.last_boxed(r"so \boxed{1} or \boxed{\frac{1}{2}} it is") == r"\frac{1}{2}"
    assert common.last_boxed(r"\boxed{7} and then \boxed{8") == "7"
    assert common.last_boxed(r"\boxed{\boxed{3}} }") == "3"
    assert common.last_boxed("no box") is None
    assert common.last_boxed(r"\boxed{" * 100_000) is None  # in no time


@pytest.mark.parametrize("text, strict, flexible", [
    (r"It is \boxed{1,234}.", 1, 1), (r"\boxed{\$1234.00}", 1, 1), ("The answer is 1234.", 0, 1), ("$1,234.", 0, 1),
    (r"1234, no: \boxed{12}", 0, 0), ("", 0, 0), (r"\boxed{}", 0, 0), ("1234 and 5", 0, 0),
])  # fmt: skip
def test_strict_and_flexible_scores(text, strict, flexible):
    assert common.verify(text, Problem("?", "1234")) == (strict, flexible)


@pytest.mark.parametrize("text, strict, flexible", [
    (" 17 + 5 = 22 </think> 22", 1, 1), (" 22", 1, 1), ("", 0, 0), (" 22 22", 0, 1), (" = 22", 0, 1),
    (" 22 </think> 12", 0, 0), (" </think> 12 </think> 22", 1, 1),
])  # fmt: skip
def test_scores_of_the_built_in_task(text, strict, flexible):
    assert common.verify(text, Problem("?", "22", "think")) == (strict, flexible)


def test_formulas_are_judged_by_math_verify():
    pytest.importorskip("math_verify")
    assert common.answers_equal(r"\frac{2}{4}", "0.5")
    assert common.answers_equal(r"\left(3, \frac{\pi}{2}\right)", r"(3,\pi/2)")
    assert common.answers_equal(r"2\sqrt{3}", r"\sqrt{12}")
    assert not common.answers_equal(r"\sqrt{3}", r"\sqrt{2}")
    assert not common.answers_equal(r"\frac{", "1")


BOMBS = ["9^{9^{9^{9^9}}}", "{" * 150, "(" * 199, r"\sqrt" * 39, "10!!!!!!!!", "__import__('os').abort()"]


@pytest.mark.parametrize("bomb", BOMBS)
def test_no_answer_can_hang_or_run_anything(bomb, monkeypatch):
    pytest.importorskip("math_verify")
    monkeypatch.setattr(common.judge, "seconds", 1)
    began = time.time()
    assert not common.answers_equal(bomb, "7")
    assert time.time() - began < 60  # most of it, if any, is the start of a new process
    assert common.answers_equal(r"\frac{14}{2}", "7")  # and the judge still answers


# ----------------------------------------------------------------------------------------------------------------------
# Problems.


def test_rows():
    assert common.parse_row({"question": " q ", "answer": "so\n#### 1,000"}, "x") == Problem("q", "1,000")
    assert common.parse_row({"problem": "q", "answer": r"\pi", "solution": "…"}, "x") == Problem("q", r"\pi")
    assert common.parse_row({"question": "q", "answer": 4}, "x").answer == "4"
    assert common.parse_row({"question": "q", "answer": "so\n#### 4"}, "x").solution == "so\n#### 4"
    assert common.parse_row({"problem": "q", "answer": "4", "solution": "<<2+2=4>>"}, "x").solution == "<<2+2=4>>"
    answers = [{"question": "q", "answer": answer} for answer in (None, "", "two\nlines", True, ["1"])]
    for row in [{}, [], "text", {"question": "q"}, {"question": "", "answer": "1"}, *answers]:
        with pytest.raises(UserError, match="here:7"):
            common.parse_row(row, "here:7")


def test_malformed_files_name_the_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = '{"question": "q", "answer": "1"}'
    cases = {f"{good}\n\n{{oops": "rows.jsonl:3: not JSON", "": "holds no problems", "[1]": "rows.jsonl:1"}
    for content, message in cases.items():
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            common.read_jsonl(path)
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match="cannot read"):
        common.read_jsonl(path)


def test_a_single_file_is_split_and_every_epoch_is_a_permutation(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": f"q{i}", "answer": str(i)}) + "\n" for i in range(30)))
    train, test = (common.load_problems(str(path), split, seed=3) for split in ("train", "test"))
    assert (train.size, test.size) == (27, 3)
    epochs = [[train[i].question for i in range(e * 27, (e + 1) * 27)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]
    assert not {test[i] for i in range(3)} & {train[i] for i in range(27)}
    assert [train[i].question for i in range(27)] == epochs[0]  # going back gives the same again: resume relies on it


def test_the_hub_path_with_the_real_library(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "train.jsonl").write_text('{"question": "q", "answer": "#### 3"}\n')
    assert common.load_hub_problems(str(tmp_path), None, "train") == [Problem("q", "3")]
    with pytest.raises(UserError, match="cannot load the data set"):
        common.load_hub_problems(str(tmp_path / "absent"), None, "train")


@needs_data
def test_every_real_answer_is_accepted_by_the_verifier():
    pytest.importorskip("math_verify")
    for name in ("gsm8k", "math500"):
        rows = common.load_problems(str(SHARED / "data" / name), "test", 0)
        assert rows.size == {"gsm8k": 1319, "math500": 500}[name]
        for i in range(rows.size):
            assert common.verify(f"It is \\boxed{{{rows[i].answer}}}.", rows[i])[0] == 1, rows[i]


@needs_data
@needs_tokenizer
def test_prompts_use_the_chat_template_and_long_ones_are_passed_over():
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers/qwen2.5")
    rows = common.load_problems(str(SHARED / "data/gsm8k"), "test", 0)
    text = tokenizer.decode(common.encode_prompt(tokenizer, rows[0]))
    assert rows[0].question in text and "\\boxed{}" in text and text.endswith("<|im_start|>assistant\n")
    for ending in ("<think>", "\n"):  # added where the prompt does not end so by itself
        text = tokenizer.decode(common.encode_prompt(tokenizer, rows[0], ending))
        assert text.endswith("assistant\n<think>" if ending == "<think>" else "assistant\n")
    problems, prompts, position = common.take(rows, 0, 20, tokenizer, 100)
    assert len(problems) == 20 < position and max(map(len, prompts)) <= 100
    everything, _, _ = common.take(rows, 0, 5000, tokenizer, 100)
    assert 20 < len(everything) == len(set(everything)) < 1319  # nothing twice
    with pytest.raises(UserError, match="max_prompt_tokens"):
        common.take(rows, 0, 1, tokenizer, 3)


@needs_tokenizer
def test_stop_ids_of_qwen_unite_what_config_and_tokenizer_say():
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers/qwen2.5")
    one, several = SimpleNamespace(eos_token_id=151643), SimpleNamespace(eos_token_id=[151643])
    model = SimpleNamespace(config=one, generation_config=several)
    tokenizer.eos_token = "<|im_end|>"
    assert common.find_stop_ids(model, tokenizer) == [151643, 151645]


SMALL = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8)  # fmt: skip


@pytest.mark.parametrize("kind, fine", [
    (dict(model_type="llama"), True), (dict(model_type="qwen3"), True), (dict(model_type="gpt2", n_embd=32), True),
    (dict(model_type="mistral", sliding_window=4), False),  # attends to the last four only
    (dict(model_type="qwen2", use_sliding_window=True, sliding_window=64, max_window_layers=0), False),
    (dict(model_type="gemma2", final_logit_softcapping=1.0), False),  # caps its logits and scales its embeddings
    (dict(model_type="granite", logits_scaling=3.0), False), (dict(model_type="phi"), False),  # a head with a bias
    (dict(model_type="mamba"), False),
])  # fmt: skip
def test_models_that_compute_something_else_are_recognised(kind, fine):
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**SMALL, **kind})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)  # biases too, which start at 0
    assert common.decodes_alike(common.LanguageModel(model, None, [1], 0)) is fine


def test_model_names():
    assert common.resolve_model("tiny").endswith("tiny") and common.is_tiny("tiny_latent")
    assert common.resolve_model("Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B"
    assert common.resolve_model("meta-llama/Llama-3.2-1B") == "meta-llama/Llama-3.2-1B"


# ----------------------------------------------------------------------------------------------------------------------
# Interrupts, pass@k and checkpoints.


def test_a_second_interrupt_stops_at_once_but_an_echo_of_the_first_does_not(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(common.time, "monotonic", lambda: now[0])
    with common.StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)  # torchrun, which has seen the first, sends this
        assert stop.requested and capsys.readouterr().err.count("stopping") == 1
        now[0] += 2.0
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    for n, c, k in itertools.product([1, 4, 6], range(7), range(1, 7)):
        if c <= n and k <= n:
            subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
            assert common.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def trained(seed):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 3))
    model[1].weight = torch.nn.Parameter(model[0].weight.T.clone())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return model, optimizer, torch.Generator().manual_seed(seed)


def walk(model, optimizer, generator, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(2, 3, generator=generator)).square().sum().backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_checkpoint_restores_weights_optimiser_and_generator(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    first, second = trained(0), trained(1)
    walk(*first, 3)
    common.save_checkpoint(path, *first, {"step": 3})
    expected = walk(*first, 4)
    assert common.read_checkpoint_state(path) == {"step": 3}
    common.load_checkpoint(path, *second)
    assert torch.equal(walk(*second, 4), expected)


def test_a_checkpoint_after_running_out_of_memory_inside_adams_first_step_can_be_used(tmp_path):
    first, second = trained(0), trained(1)
    walk(*first, 1)
    del next(iter(first[1].state.values()))["exp_avg_sq"]  # where it ended
    common.save_checkpoint(tmp_path / "c", *first, {})
    common.load_checkpoint(tmp_path / "c", *second)
    walk(*second, 1)


def test_a_crash_while_saving_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.safetensors"
    run = trained(0)
    common.save_checkpoint(path, *run, {"step": 1})
    monkeypatch.setattr(common, "save_file", lambda tensors, tmp, metadata: Path(tmp).write_bytes(b"half a che"))
    monkeypatch.setattr(common.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(UserError, match="disk full"):
        common.save_checkpoint(path, *run, {"step": 2})
    assert common.read_checkpoint_state(path) == {"step": 1}
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="nothing to resume"):
        common.read_checkpoint_state(path)


def test_log_drops_the_rows_after_the_checkpoint_and_a_torn_line(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"st')
    log = common.RunLog(tmp_path, from_step=2)
    log.write({"step": 2, "new": True}, {"step": 2})
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 0}\n{"step": 1}\n{"step": 2, "new": true}\n'


# ----------------------------------------------------------------------------------------------------------------------
# The built-in task.


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
    stream = common.load_problems("tiny", "train", 0, (3, 4), kind)
    assert stream[5].solution == stream[5].solution != stream[6].solution
    assert stream[5].solution.split()[0] == stream[5].question.split()[0] and stream[5].solution.endswith("<eos>")
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
    tokenizer = AutoTokenizer.from_pretrained(common.resolve_model("tiny"))
    model = AutoModelForCausalLM.from_pretrained(common.resolve_model("tiny")).eval()
    rng = random.Random(0)
    for _ in range(200):
        prompt, solution = tiny.pretraining_example(rng)
        ids = tokenizer.encode(prompt + solution)
        assert tokenizer.decode(ids) == prompt + solution
        assert len(ids) == len((prompt + solution).replace("<eos>", " <eos>").split())
    folder = Path(common.resolve_model("tiny"))
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
    common.load_model(str(tmp_path / "tiny"), "cpu")
