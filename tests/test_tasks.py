r"""Proofs of tasks/: problems, verifiers, demonstrations, and the small models made of them.

    pytest tests/test_tasks.py            # half a minute
    pytest tests/test_tasks.py -m slow    # formulas that take for ever, all of GSM8K and MATH-500
"""

import argparse
import gzip
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test depends on a network

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import tasks
from tasks import Problem, UserError, chains, trees

HERE = Path(__file__).parent.parent
SHARED = HERE.parent / "shared"
MODELS = HERE / "tasks/models"


def settings(task, **others):
    defaults = {"task": str(task), "kind": "mixed", "seed": 3, "prompt": "Think."}
    return argparse.Namespace(**defaults | others)


def load(name):
    model = AutoModelForCausalLM.from_pretrained(MODELS / name)
    return model.eval(), AutoTokenizer.from_pretrained(MODELS / name)


# --- 1. Chains of sums ----------------------------------------------------------------------------


def test_chains_training_and_held_out_streams_share_no_problem():
    """Whatever the seeds, and the demonstrations of the pretraining are of training problems."""
    train, held_out = set(), set()
    for i in range(1500):
        held_out.add(chains.chain_text(*chains.make_problem(i, "test")))
        for seed in (0, 1):
            train.add(chains.chain_text(*chains.make_problem(i, "train", seed)))
    rng = random.Random(0)
    for _ in range(3000):
        prompt, _ = chains.pretraining_example(rng)
        train.add(prompt.split("?")[0].strip())
    assert len(held_out) > 1400
    assert not train & held_out


@pytest.mark.parametrize("kind", ["mixed", "plus", "minus", "single"])
def test_chains_are_what_was_asked_for(kind):
    allowed = {"plus": {"+"}, "minus": {"-"}}.get(kind, {"+", "-"})
    seen = set()
    for i in range(300):
        start, steps = chains.make_problem(i, kind=kind)
        signs = {sign for sign, _ in steps}
        seen |= signs
        total = start + sum(digit if sign == "+" else -digit for sign, digit in steps)
        assert len(steps) in (2, 3, 4, 5)
        assert signs <= allowed
        assert kind != "single" or len(signs) == 1
        assert 0 <= total == chains.true_answer(start, steps) <= 49
    assert seen == allowed


def test_chains_problems_follow_from_their_index():
    """They are the stream of make_problem; what a model reads is what it was pretrained on."""
    args = settings("chains")
    found = chains.problems(args, "train", 10, 20)
    assert chains.problems(args, "train", 15, 1) == found[5:6]
    assert chains.problems(settings("chains", seed=4), "train", 10, 20) != found
    other_seed = chains.problems(settings("chains", seed=4), "test", 0, 20)
    assert chains.problems(args, "test", 0, 20) == other_seed  # all seeds are judged by the same
    for i, problem in enumerate(found, 10):
        chain = chains.make_problem(i, "train", 3)
        assert chains.read_chain(problem.question) == chain
        assert chains.request(problem.question, args) == chains.problem_text(*chain)
        assert chains.read_chain(chains.problem_text(*chain)) == chain
        assert problem.answer == str(chains.true_answer(*chain))
    assert chains.problem_text(16, [("+", 5), ("-", 9)]) == " 16 + 5 - 9 ? <think>"


@pytest.mark.parametrize("module", [chains, trees])
@pytest.mark.parametrize(
    "text, scores",
    [
        (" 17 + 5 = 22 </think> 22", (1, 1)),
        (" 22", (1, 1)),
        (" 022 ", (1, 1)),
        ("", (0, 0)),
        (" 22 22", (0, 1)),
        (" = 22", (0, 1)),
        (" 22 </think> 12", (0, 0)),
        (" </think> 12 </think> 22", (1, 1)),
        (" 22 </think>", (0, 1)),
        (" </think> " + "2" * 5000, (0, 0)),
    ],
)
def test_scores_of_chains_and_trees(module, text, scores):
    assert module.verify(text, Problem("?", "22")) == scores


@pytest.mark.parametrize(
    "task, kind",
    [
        ("chains", "2,2,4"),
        ("chains", ""),
        ("trees", "mixed"),
        ("trees", "2,2"),
        ("trees", "2,2,6"),  # a tree of depth 2 has four leaves, and one exit is in the other
        ("trees", "4,2,4"),
        ("trees", "2,2,0"),
        ("trees", "-1,2,2"),
        ("trees", "2,0,1"),
        ("trees", "1000000,2,4"),
    ],
)
def test_a_kind_that_is_not_there_is_one_line(task, kind):
    with pytest.raises(UserError) as error:
        tasks.find(task).problems(settings(task, kind=kind), "train", 0, 1)
    assert f"--task {task} has no --kind {kind}: " in str(error.value)
    assert "\n" not in str(error.value)


def test_the_student_forgets_only_carries_and_borrows_and_only_where_not_mindful():
    rng = random.Random(0)
    slips = {"+": [], "-": []}
    for i in range(2000):
        start, steps = chains.make_problem(i)
        mindful = chains.demonstration(rng, start, steps, "+-")
        assert mindful.split()[-1] == f"{chains.true_answer(start, steps)}<eos>"
        thought = chains.demonstration(rng, start, steps).split(" </think>")[0]
        for line in thought.split(";"):
            before, sign, digit, _, after = line.split()
            true = chains.apply_sign(int(before), sign, int(digit))
            if true // 10 == int(before) // 10:
                assert int(after) == true
            else:
                assert int(after) in (true, true - 10 if sign == "+" else true + 10)
                slips[sign].append(int(after) != true)
    for wrong in slips.values():
        # To start over after a slip that leaves 0..49 shifts the share a little.
        assert abs(sum(wrong) / len(wrong) - chains.FORGET) < 0.06


def test_a_worked_solution_is_a_thought_and_its_answer():
    """Of a student who forgets .6 of the carries, so some answers are wrong."""
    rng, right = random.Random(0), 0
    for i in range(200):
        chain = chains.make_problem(i)
        problem = Problem(chains.chain_text(*chain), str(chains.true_answer(*chain)))
        thought, answer = chains.worked(problem, rng)
        assert thought.startswith(f" {chain[0]} ") and thought.split()[-1] == answer.strip()
        assert thought.count(";") == len(chain[1]) - 1
        right += chains.verify(f"{thought} </think>{answer}", problem)[0]
    assert 40 < right < 160


def test_the_shipped_chains_model_is_steerable_and_in_need_of_rl():
    """Its tokenizer has a token for each word, and the methods build on these three numbers."""
    model, tokenizer = load("chains")
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(chains.pretraining_example(rng))
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert len(ids) == len(text.replace("<eos>", " <eos>").split())
    assert 0.35 < chains.accuracy(model, tokenizer, "mixed", []) < 0.6
    assert chains.accuracy(model, tokenizer, "plus", ["mind+"] * 3) > 0.97
    assert chains.accuracy(model, tokenizer, "plus", ["mind-"] * 3) < 0.3


@pytest.mark.slow
def test_chains_pretraining_learns_the_students_words(monkeypatch):
    """Its first loss is the model's own next-token loss, one unsorted demonstration at a time."""
    monkeypatch.setitem(chains.SHAPE, "hidden_size", 64)
    losses = []
    backward = torch.Tensor.backward
    monkeypatch.setattr(
        torch.Tensor, "backward", lambda loss: losses.append(loss.item()) or backward(loss)
    )
    model, tokenizer = chains.build_model(0), chains.build_tokenizer()
    rng = random.Random("pretrain 0")
    total = count = 0
    with torch.no_grad():
        for _ in range(16):
            prompt, solution = map(tokenizer.encode, chains.pretraining_example(rng))
            ids = torch.tensor([prompt + solution])  # (1, L)
            labels = torch.tensor([[-100] * len(prompt) + solution])  # (1, L)
            total += model(ids, labels=labels).loss.item() * len(solution)
            count += len(solution)
    chains.pretrain(model, tokenizer, 30, batch_size=16)
    assert sum(losses[:4]) == pytest.approx(total / count, abs=1e-4)
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])


def test_a_chains_model_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["chains", "--steps", "1", "--out", str(tmp_path)])
    monkeypatch.setattr(chains, "accuracy", lambda *_: 0.5)
    chains.main()
    assert "plus mind+ 0.5" in capsys.readouterr().out
    config = AutoModelForCausalLM.from_pretrained(tmp_path).config.to_dict()
    shipped = AutoModelForCausalLM.from_pretrained(MODELS / "chains").config.to_dict()
    assert config | {"_name_or_path": ""} == shipped | {"_name_or_path": ""}
    made, expected = tmp_path / "tokenizer.json", MODELS / "chains/tokenizer.json"
    assert json.loads(made.read_text()) == json.loads(expected.read_text())


# --- 2. Two trees ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["2,2,4", "3,2,4", "2,3,10", "1,2,2"])
def test_trees_are_what_was_asked_for(kind):
    depth, branching, count = trees.read_kind(kind)
    sizes = [branching**level for level in range(depth + 1)]
    places = set()
    for i in range(150):
        edges, entrance, exits = problem = trees.make_problem(i, "test", kind=kind)
        assert trees.read_problem(trees.problem_text(*problem)) == problem
        children = {child for _, child in edges}
        (other,) = {parent for parent, _ in edges} - children - {entrance}
        assert len(children) == len(edges) and entrance not in children  # one parent each
        for root in (entrance, other):
            assert [len(level) for level in trees.levels(edges, root)] == sizes
        below = [node for node in exits if node in trees.levels(edges, entrance)[-1]]
        assert below == [trees.true_answer(*problem)]
        assert len(set(exits)) == count
        assert set(exits) - set(below) <= set(trees.levels(edges, other)[-1])
        places.add(exits.index(below[0]))
    assert places == set(range(count))  # the place of an exit says nothing


def test_trees_problems_follow_from_their_index():
    args = settings("trees", kind="2,2,4")
    found = trees.problems(args, "train", 10, 20)
    assert trees.problems(args, "train", 15, 1) == found[5:6]
    for i, problem in enumerate(found, 10):
        tree = trees.make_problem(i, "train", 3)
        assert trees.read_problem(problem.question) == tree
        assert trees.request(problem.question, args) == trees.problem_text(*tree)
        assert problem.answer == str(trees.true_answer(*tree))
    text = trees.problem_text([(2, 33), (6, 24)], 2, [38, 40])
    assert text == " 2 33 ; 6 24 ; ? 38 40 = 2 <think>"


def test_trees_training_and_held_out_streams_share_no_problem():
    held_out = {trees.problem_text(*trees.make_problem(i, "test")) for i in range(300)}
    training = set()
    for i, seed in itertools.product(range(150), (0, 1)):
        training.add(trees.problem_text(*trees.make_problem(i, "train", seed)))
    assert len(held_out) == len(training) == 300
    assert not held_out & training
    tokenizer = chains.build_tokenizer()
    ids, prompt = trees.training_batch(tokenizer, random.Random(0), (2, 2, 4), 100, 1)
    for text in tokenizer.batch_decode(ids[:, :prompt]):
        assert not trees.is_held_out(trees.read_problem(text))


def test_the_student_is_right_in_7_of_16_problems():
    """1/4 + 3/4 * 1/4; the walk follows edges, and a leaf that is an exit is the answer."""
    rng = random.Random(0)
    right, ends, guesses = 0, set(), set()
    for i in range(4000):
        edges, entrance, exits = problem = trees.make_problem(i % 500)
        text = trees.demonstration(rng, *problem).removesuffix("<eos>")
        thought, answer = text.split("</think>")
        walk = [int(node) for node in thought.split()]
        assert walk[0] == entrance and int(answer) in exits
        assert set(itertools.pairwise(walk)) <= set(edges)
        assert walk[-1] in trees.levels(edges, entrance)[-1]
        if walk[-1] in exits:
            assert int(answer) == walk[-1]
        else:
            guesses.add(exits.index(int(answer)))
        right += int(answer) == trees.true_answer(*problem)
        ends.add((i % 500, walk[-1]))
    assert abs(right / 4000 - 7 / 16) < 4 * (7 / 16 * 9 / 16 / 4000) ** 0.5
    assert guesses == {0, 1, 2, 3}
    assert len(ends) > 0.85 * 2000  # in 8 walks all leaves may be ends: 1 - (3/4)^8 = .90 were


def test_packed_walks_are_as_if_alone():
    """Logits of three walks in one row equal those of three rows; with walks = 1, of one text."""
    model, tokenizer = trees.build_model(0).eval(), chains.build_tokenizer()
    ids, prompt = trees.training_batch(tokenizer, random.Random(0), (2, 2, 4), 5, 3)

    def packed(walks):
        position, mask = trees.separate_walks(ids.shape[1], prompt, walks)
        mask = mask.expand(5, -1, -1, -1)
        return model(ids, position_ids=position, attention_mask=mask).logits[:, prompt:]

    with torch.no_grad():
        for ours, walk in zip(packed(3).chunk(3, 1), ids[:, prompt:].chunk(3, 1), strict=True):
            alone = model(torch.cat([ids[:, :prompt], walk], 1)).logits[:, prompt:]
            assert torch.allclose(ours, alone, atol=1e-5)
        assert torch.allclose(packed(1), model(ids).logits[:, prompt:], atol=1e-5)


@pytest.mark.slow
def test_trees_pretraining_learns_what_each_walk_says_next(monkeypatch):
    """Its first loss is that of the model's own next-token loss, walk by walk; then it falls."""
    monkeypatch.setitem(chains.SHAPE, "hidden_size", 64)
    model, tokenizer, losses = trees.build_model(0), chains.build_tokenizer(), []
    rng = random.Random("trees 0")
    ids, prompt = trees.training_batch(tokenizer, rng, (2, 2, 4), 4, 2)
    expected = 0
    for walk in ids[:, prompt:].chunk(2, 1):
        row = torch.cat([ids[:, :prompt], walk], 1)
        labels = row.clone()
        labels[:, :prompt] = -100  # not learnt
        with torch.no_grad():
            expected += model(row, labels=labels).loss.item() / 2
    backward = torch.Tensor.backward
    monkeypatch.setattr(
        torch.Tensor, "backward", lambda loss: losses.append(loss.item()) or backward(loss)
    )
    args = argparse.Namespace(lr=0.02, steps=20, kind=(2, 2, 4), start="walks are apart")
    before = model.lm_head.weight.detach().clone()
    trees.pretrain(model, tokenizer, args, batch_size=4, walks=2)
    assert losses[0] == pytest.approx(expected, abs=1e-4)
    assert losses[-1] < 0.9 * losses[0]
    assert (model.lm_head.weight - before).abs().mean() > 1e-3  # by AdamW, matrices by Muon


def test_the_shipped_trees_model_walks_in_words_and_everywhere_in_soft_tokens():
    """After the entrance each child has one half; after both children, all four leaves a part."""
    model, tokenizer = load("trees")
    embedding = model.get_input_embeddings().weight
    children_weight, leaves_weight, first_half = [], [], []
    for i in range(64):
        edges, entrance, _ = problem = trees.make_problem(i, "test")
        _, children, leaves = trees.levels(edges, entrance)
        children = [chains.VOCABULARY.index(f" {node}") for node in children]
        leaves = [chains.VOCABULARY.index(f" {node}") for node in leaves]
        ids = tokenizer.encode(f"{trees.problem_text(*problem)} {entrance}")
        mixture = embedding[children].mean(0, keepdim=True)  # (1, D)
        embeds = torch.cat([F.embedding(torch.tensor(ids), embedding), mixture])  # (L, D)
        with torch.no_grad():
            logits = model(inputs_embeds=embeds[None]).logits[0]  # (L, V)
        after_entrance, after_mixture = logits[-2:].softmax(-1)  # (V,) each
        children_weight.append(after_entrance[children])
        leaves_weight.append(after_mixture[leaves].sum())
        first_half.append(after_mixture[leaves[:2]].sum())
    children_weight = torch.stack(children_weight)  # (64, 2)
    assert children_weight.sum(1).min() > 0.97
    assert (children_weight - 0.5).abs().mean() < 0.05
    assert torch.stack(leaves_weight).mean() > 0.8
    assert 0.3 < torch.stack(first_half).mean() < 0.6


def test_a_trees_model_is_made_and_started_from(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(chains.SHAPE, "hidden_size", 64)
    monkeypatch.setattr(trees.pretrain, "__defaults__", (4, 2))  # problems a step, walks
    quick = ["trees", "--steps", "2", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", [*quick, "--kind", "1,2,2"])
    trees.main()
    first = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    monkeypatch.setattr("sys.argv", [*quick, "--kind", "3,2,4", "--start", str(tmp_path), "--lr=0"])
    trees.main()
    for name, weight in AutoModelForCausalLM.from_pretrained(tmp_path).state_dict().items():
        assert torch.equal(weight, first[name])
    assert capsys.readouterr().out.count("loss of each word of a walk") == 2


# --- 3. GSM8K and folders: the data ---------------------------------------------------------------


@pytest.fixture
def gsm8k():
    pytest.importorskip("math_verify")
    return tasks.find("gsm8k")


def write(folder, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return settings(folder)


def test_rows(gsm8k, tmp_path):
    args = write(
        tmp_path,
        {"question": " q ", "answer": "so\n#### 1,000"},
        {"problem": "p", "answer": r"\pi", "level": 5},
        "",
        '{"question": "r", "answer": 0.00001}',
        '{"question": "s", "answer": 100000000000000000000000000}\r',
    )
    found = gsm8k.problems(args, "train", 0, 10)
    assert sorted((p.question, p.answer, p.solution) for p in found) == [
        ("p", r"\pi", r"\pi"),
        ("q", "1,000", "so\n#### 1,000"),
        ("r", "0.00001", "0.00001"),
        ("s", "1" + 26 * "0", "1" + 26 * "0"),
    ]
    assert gsm8k.request("How many?", args) == "How many?\nThink.\n"


BAD_ROWS = r"""
{oops
[1]
"text"
7
null
{"question": "q"}
{"answer": "1"}
{"question": ["q"], "answer": "1"}
{"question": " ", "answer": "1"}
{"question": "q", "answer": null}
{"question": "q", "answer": true}
{"question": "q", "answer": NaN}
{"question": "q", "answer": [1]}
{"question": "q", "answer": {"value": 1}}
{"question": "q", "answer": ""}
{"question": "q", "answer": "1 + 1\n#### "}
{"question": "\ud83d", "answer": "1"}
{"question": "q", "answer": "\ud83d #### 1"}
""".strip().splitlines()


@pytest.mark.parametrize("row", [*BAD_ROWS, "[" * 100_000])
def test_a_bad_row_is_named_with_file_and_line(gsm8k, row, tmp_path):
    args = write(tmp_path, '{"question": "q", "answer": "1"}', "", row)
    with pytest.raises(UserError, match=r"train\.jsonl, line 3: needs `question`"):
        gsm8k.problems(args, "train", 0, 1)


ROW = '{"question": "größer als 1?", "answer": "2"}\n'


def test_a_byte_order_mark_is_read(gsm8k, tmp_path):
    (tmp_path / "train.jsonl").write_text(ROW, encoding="utf-8-sig")
    found = gsm8k.problems(settings(tmp_path), "train", 0, 1)
    assert found == [Problem("größer als 1?", "2", "2")]


@pytest.mark.parametrize(
    "content",
    [ROW.encode("latin-1"), ROW.encode("utf-16"), gzip.compress(ROW.encode()), b"", b"\n \n"],
    ids=["latin-1", "utf-16", "gzip", "empty", "blank"],
)
def test_a_file_without_readable_problems_is_named_in_one_line(gsm8k, content, tmp_path):
    (tmp_path / "train.jsonl").write_bytes(content)
    with pytest.raises(UserError) as error:
        gsm8k.problems(settings(tmp_path), "train", 0, 1)
    assert str(tmp_path) in str(error.value) and "train" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named_in_one_line(gsm8k):
    with pytest.raises(OSError, match=r"nowhere.train\.jsonl") as error:
        gsm8k.problems(settings("nowhere"), "train", 0, 1)
    assert "\n" not in str(error.value)


def test_problems_are_shuffled_and_none_comes_twice_in_an_epoch(gsm8k, tmp_path):
    args = write(tmp_path, *({"question": f"q{i}", "answer": f"{i}"} for i in range(30)))
    epoch = gsm8k.problems(args, "train", 0, 50)
    assert len(epoch) == len(set(epoch)) == 30
    assert gsm8k.problems(args, "train", 60, 5) == epoch[:5]
    assert gsm8k.problems(args, "train", 28, 4) == epoch[28:] + epoch[:2]  # over the end
    assert [problem.question for problem in epoch] != [f"q{i}" for i in range(30)]
    args.seed = 4
    assert gsm8k.problems(args, "train", 0, 30) != epoch


def test_held_out_problems_are_the_same_for_every_seed(gsm8k, tmp_path):
    args = write(tmp_path, *({"question": f"q{i}", "answer": f"{i}"} for i in range(30)))
    (tmp_path / "train.jsonl").rename(tmp_path / "test.jsonl")
    held_out = gsm8k.problems(args, "test", 0, 10)
    args.seed = 4
    assert gsm8k.problems(args, "test", 0, 10) == held_out


SVAMP_ROW = {"Body": "A pen costs 3 dollars.", "Question": "And 2 pens?", "Answer": "6.0"}


@pytest.mark.parametrize(("name", "source", "row", "problem"), [
    ("gsm8k", ("openai/gsm8k", "main"), {"question": "q", "answer": "1 + 2\n#### 3"},
     Problem("q", "3", "1 + 2\n#### 3")),
    ("svamp", ("ChilleD/SVAMP",), SVAMP_ROW,
     Problem("A pen costs 3 dollars. And 2 pens?", "6.0", "6.0")),
])  # fmt: skip
def test_the_hub_path_with_the_real_library(
    name, source, row, problem, gsm8k, tmp_path, monkeypatch
):
    datasets = pytest.importorskip("datasets")
    write(tmp_path, row)
    load = datasets.load_dataset

    def from_folder(*path, split):
        assert path == source
        return load(str(tmp_path), split=split)

    monkeypatch.setattr(datasets, "load_dataset", from_folder)
    found = gsm8k.problems(settings(name), "train", 0, 1)
    gsm8k.read_problems.cache_clear()
    assert found == [problem]


def test_a_row_of_svamp_may_have_a_number(gsm8k, tmp_path):
    write(tmp_path, SVAMP_ROW | {"Answer": 6.0})
    found = gsm8k.problems(settings(str(tmp_path)), "train", 0, 1)[0]
    assert gsm8k.verify("\\boxed{6}", found) == (1, 1)
    assert gsm8k.verify("\\boxed{60}", found) == (0, 0)


def test_a_worked_solution_is_its_equations(gsm8k):
    solution = "48/2 = <<48/2=24>>24 in May. Then <<48+24=72>>72.\n#### 72"
    thought, answer = gsm8k.worked(Problem("?", "72", solution), None)
    assert (thought, answer) == ("<<48/2=24>> <<48+24=72>>", "\\boxed{72}")
    assert gsm8k.verify(answer, Problem("?", "72")) == (1, 1)
    assert gsm8k.worked(Problem("?", "72", "72"), None)[0] == ""


# --- 4. GSM8K and folders: the verifier -----------------------------------------------------------

SAME_NUMBER = r"""
1,234.0        $1234
\$1,234.00     1234
1{,}234        1234
10,\!080       10080
12,345,678     12345678
11,\! 111      11111
$5             5
-$2            -2
0.50           1/2
.5             0.5
50\%           50
50\,\%         50
18.            18
+7             7
1 1/2          3/2
-1 1/2         -1.5
1 1/2 cups     1.5
""".strip().splitlines()


@pytest.mark.parametrize("line", SAME_NUMBER)
def test_numbers_are_compared_as_numbers(gsm8k, line):
    a, b = line.rsplit("  ", 1)
    assert gsm8k.to_number(a.strip()) == gsm8k.to_number(b) is not None


def test_different_numbers_are_different(gsm8k):
    for a, b in [("-3", "3"), ("12", "120"), ("1 1/2", "11/2"), ("0.1", "0.10000000001")]:
        assert gsm8k.to_number(a) != gsm8k.to_number(b)


NO_NUMBER = r"""
1/0
1 1/0
1.5/2
1,2
1,2345
1e3
1e999999999
９
18x
18 x
18 xy
18 or 19
18 thousand
18 eggs and nine ducks
18 eggs and half an egg
1 8
$1$8
1%8
+-3
""".strip().splitlines()


@pytest.mark.parametrize("text", [*NO_NUMBER, "", "9" * 61, "1" + " " * 10**6 + "x"])
def test_what_is_no_number(gsm8k, text):
    assert gsm8k.to_number(text) is None


RIGHT = r"""
18 dollars
18 Eggs.
18 miles per hour
18 times
18 third graders
18 cm
€18
£18.00
\$18
$18$
$ 18
18°
18^\circ
18^{\circ}
18\%
18~\text{cm}
18\text{ cm}
18 \mathrm{cm}
18\,\mbox{cups of tea}
\frac{36}{2}
17 2/2
x=18
""".strip().splitlines()

WRONG = r"""
18x
18 x
18k
18 hundred
18 thousand
18 Million
18 billion
18 dozen
18\text{ million}
18\text{ and a half}
18 plus two
18 fifths
18 ninths
18 lakh
18 divided by three
1\quad 8
1'8
1\text{ }8
18_{16}
18 or 19
18 and 19
18,19
1 8
1~8
1\,8
1\ 8
1\!8
$1$8
\$1\$8
1%8
1\%8
-18
18 + 1
""".strip().splitlines()


@pytest.mark.parametrize("answer", RIGHT)
def test_what_is_right_where_18_is_the_answer(gsm8k, answer):
    assert gsm8k.verify(f"It is \\boxed{{{answer}}}.", Problem("?", "18")) == (1, 1)


@pytest.mark.parametrize("answer", WRONG)
def test_what_is_wrong_where_18_is_the_answer(gsm8k, answer):
    assert gsm8k.verify(f"It is \\boxed{{{answer}}}.", Problem("?", "18"))[0] == 0


@pytest.mark.parametrize(
    "prediction, truth, right",
    [
        (r"1\frac{1}{2}", "3/2", True),
        (r"1\frac{1}{2}", "1/2", False),
        (r"1\frac{1}{2}", "11/2", False),
        ("1 4/5", r"1\frac{4}{5}", True),
        (r"\frac{9}{5}", "1 4/5", True),
        (r"\frac{4}{5}", "1 4/5", False),
        ("1 8", "9", False),  # which is what math-verify makes of it
        (r"\frac{2}{4}", "0.5", True),
        (r"2\sqrt{3}", r"\sqrt{12}", True),
        (r"\sqrt{3}", r"\sqrt{2}", False),
        (r"\left(3, \frac{\pi}{2}\right)", r"(3,\pi/2)", True),
        (r"x=1\text{ or }x=2", "1, 2", True),
        (r"\frac{", "1", False),
        ("864", r"864 \mbox{ inches}^2", True),
        ("90°", r"90^\circ", True),
        ("", "0", False),
    ],
)
def test_formulas_are_judged_by_math_verify(gsm8k, prediction, truth, right):
    assert gsm8k.is_right(prediction, truth) is right


@pytest.mark.parametrize(
    "text, scores",
    [
        (r"It is \boxed{1,234}.", (1, 1)),
        ("The answer is 1234.", (0, 1)),
        ("$1,234.", (0, 1)),
        (r"1234, no: \boxed{12}", (0, 0)),
        ("", (0, 0)),
        (r"\boxed{}", (0, 0)),
        ("1234 and 5", (0, 0)),
        (r"\boxed{1} or \boxed{1234}", (1, 1)),
        (r"\boxed{1234} and then \boxed{8", (1, 1)),
        (r"\boxed{1234", (0, 1)),
    ],
)
def test_strict_and_flexible_scores(gsm8k, text, scores):
    assert gsm8k.verify(text, Problem("?", "1234")) == scores


@pytest.mark.parametrize(
    "text, last",
    [
        ("the answer is 10-3", "3"),
        ("x-3", "3"),
        ("f(x)-3", "3"),
        ("x_{2}-3", "3"),
        ("the answer is -3.", "-3"),
        ("$-3$", "-3"),
        ("a loss of -\\$1,003", "-1003"),
        ("it takes 1 1/2", "3/2"),
    ],
)
def test_flexible_takes_the_last_number_with_its_sign(gsm8k, text, last):
    assert gsm8k.verify(text, Problem("?", last)) == (0, 1)


def test_boxes_are_balanced(gsm8k):
    text = r"so \boxed{1} or \boxed{\frac{\sqrt{3}}{2^{n}}} }"
    assert gsm8k.FORM.findall(text) == ["1", r"\frac{\sqrt{3}}{2^{n}}"]


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{" * 100_000,
        r"\boxed{" + "{x" * 100_000,
        r"\boxed{1" + r"\ " * 100_000 + "x}",
        "-" * 100_000,
        "1 " * 100_000,
        "1" + " " * 100_000,
        "1,111" * 30_000,
        "1 1/" + "0" * 100_000,
    ],
)
def test_long_texts_are_judged_in_no_time(gsm8k, text):
    began = time.time()
    assert gsm8k.verify(text, Problem("?", "7")) == (0, 0)
    assert time.time() - began < 5


def test_a_judge_that_ended_is_replaced_and_its_question_may_be_asked_again(gsm8k):
    judge = gsm8k.start_judge()
    os.kill(judge.pid, signal.SIGSTOP)  # it thinks and thinks
    threading.Timer(0.3, judge.kill).start()
    assert not gsm8k.is_right(r"\frac{14}{2}", "7")
    assert gsm8k.is_right(r"\frac{14}{2}", "7")
    gsm8k.start_judge().kill()  # between two questions
    gsm8k.start_judge().wait()
    assert gsm8k.is_right(r"\frac{21}{3}", "7")


SCRIPT = r"""
from tasks import Problem, gsm8k
print(gsm8k.verify(r"\boxed{\frac{14}{2}}", Problem("?", "7")))
"""


@pytest.mark.parametrize("way", ["file", "stdin"])
def test_a_script_without_a_main_guard_judges_formulas(gsm8k, way, tmp_path):
    """And one that comes through stdin."""
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py" if way == "file" else "-"],
        input=SCRIPT if way == "stdin" else None,
        env=os.environ | {"PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == ""
    assert done.stdout == "(1.0, 1.0)\n"


def test_the_judge_ends_with_its_stdin(gsm8k):
    done = subprocess.run(
        [sys.executable, HERE / "tasks/judge.py"],
        input=r'["\\frac{14}{2}", "7"]',
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.stdout == "ready\ntrue\n"


def test_a_missing_math_verify_is_an_error_at_the_start(gsm8k, monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    monkeypatch.delitem(sys.modules, "tasks.gsm8k")
    with pytest.raises(UserError, match="pip install math-verify"):
        tasks.find("gsm8k")


@pytest.mark.slow
def test_no_formula_hangs_or_runs_anything(gsm8k, capfd):
    bombs = ["9^{9^{9^{9^9}}}", "{" * 150, r"\sqrt" * 39, "10!!!!!!!!", "__import__('os').abort()"]
    for bomb in bombs:
        began = time.time()
        assert not gsm8k.is_right(bomb, "7")
        assert time.time() - began < 60
    assert gsm8k.is_right(r"\frac{14}{2}", "7")  # and the judge still answers
    assert "".join(capfd.readouterr()) == ""


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the data in ../shared")
@pytest.mark.parametrize("name, count", [("gsm8k", 1319), ("math500", 500)])
def test_real_answers_are_accepted(gsm8k, name, count):
    rows = gsm8k.problems(settings(SHARED / "data" / name), "test", 0, 10_000)
    assert len(rows) == count
    for row in rows:
        assert gsm8k.verify(f"It is \\boxed{{{row.answer}}}.", row)[0] == 1, row
