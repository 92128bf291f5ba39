"""Proofs of latent_sft.py, in the order of its sections, against what does not share its code.

    pytest tests/test_latent_sft.py            # a few seconds
    pytest tests/test_latent_sft.py -m slow    # a third of a training, two processes, GSM8K
"""

import json
import math
import os
import random
import re
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test needs a network
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported: runs are equal on a CPU only

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaConfig, MambaForCausalLM
from transformers import Qwen2Config, Qwen2ForCausalLM

import common
import latent_sft
import test_lepo as t
from tasks import Problem, chains, find
from test_common import torchrun

HERE = Path(__file__).parents[1]
CHAINS = HERE / "tasks/models/chains"
SHARED = HERE.parent / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no real tokenizer and data there")


def settings(**changed):
    """What the functions of latent_sft.py read of its arguments"""
    values = dict(chunk=6, top_k=10, exit_text=" </think>", device="cpu")
    values |= dict(model="chains", precision="float32", kind="mixed", seed=0, max_new_tokens=10)
    return SimpleNamespace(**values | changed)


def frozen_model(**options):
    """That of test_lepo.py, of twelve tokens, as main trains it"""
    lm = t.random_model(**options)
    lm.embedding.requires_grad = lm.head.requires_grad = False
    return lm


# --- 2. Worked solutions --------------------------------------------------------------------------


def test_a_chunk_becomes_the_shares_of_its_tokens():
    """The docstrings' examples: 17 + 5 = 12 ; 12 - 8 = 4, and a chunk that holds 12 twice."""
    solution = "17 + 5 = 12 ; 12 - 8 = 4".split()
    chunks = [" ".join(chunk) for chunk in latent_sft.chunks_of(solution, 6)]
    assert chunks == ["17 + 5", "= 12 ; 12 - 8", "= 4"]
    assert latent_sft.chunks_of([5, 6, 6], 1) == [[5], [6], [6]]
    assert latent_sft.chunks_of(list(range(7)), 2) == [[0], [1, 2], [3, 4], [5, 6]]
    ids, weights = latent_sft.label_of([3, 12, 4, 12, 5, 8], 7)
    assert len(ids) == len(weights) == 7
    assert weights[ids.index(12)] == 1 / 3
    assert [weights[ids.index(token)] for token in (3, 4, 5, 8)] == [1 / 6] * 4
    assert weights[5:] == [0, 0]


def test_a_row_is_the_prompt_and_then_labels_exit_answer_and_end():
    """Read back from the tensors, word by word, and compared with what the student wrote."""
    args = settings()
    lm = common.load_model(args)
    problems = chains.problems(args, "train", 0, 20)
    rows = latent_sft.teacher(lm, chains, problems, args, random.Random(3))
    ids, weights, share = latent_sft.to_tensors(rows, args)
    assert torch.allclose(weights.sum(-1), torch.ones(ids.shape[:2]))
    rng, expected = random.Random(3), {}
    for problem in problems:
        expected[f" {problem.question} ? <think>"] = chains.worked(problem, rng)
    columns = [len(row) for row in rows]
    assert columns == sorted(columns) and columns[0] < columns[-1] == ids.shape[1]
    for n, length in enumerate(columns):
        latent, text = share[n].T > 0  # (L,) each
        first = int(latent.nonzero()[0])
        thought, answer = expected.pop(lm.tokenizer.decode(ids[n, :first, 0]))
        words = thought.split()
        chunks = [words[:3]] + [words[i : i + 6] for i in range(3, len(words), 6)]
        assert latent.nonzero().flatten().tolist() == list(range(first, first + len(chunks)))
        assert text.nonzero().flatten().tolist() == list(range(first + len(chunks), length))
        assert lm.tokenizer.decode(ids[n, text, 0]) == f" </think>{answer}<eos>"
        assert (weights[n, ~latent, 0] == 1).all()
        assert torch.allclose(share[n].sum(0), torch.tensor([1.0, 3.0]))
        assert share[n, latent, 0].unique().numel() == 1
        for i, chunk in enumerate(chunks):
            label = dict(zip(ids[n, first + i].tolist(), weights[n, first + i], strict=True))
            for token, weight in label.items():
                in_chunk = chunk.count(lm.tokenizer.decode([token]).strip()) / len(chunk)
                assert weight == 0 or abs(weight - in_chunk) < 1e-6
    assert not expected


def test_a_problem_without_a_worked_solution_is_left_out():
    lm, args = common.load_model(settings()), settings()
    task = SimpleNamespace(
        request=chains.request,
        worked=lambda problem, rng: ("" if problem.answer == "2" else " 2 + 2 = 4", " 4"),
    )
    problems = [Problem("1 + 1", "2"), Problem("2 + 2", "4"), Problem("0 + 2", "2")]
    rows = latent_sft.teacher(lm, task, problems, args, None)
    assert [lm.tokenizer.decode(chunk) for chunk, _ in rows[0][:3]] == [" 2", " +", " 2"]
    assert len(rows) == 1
    assert latent_sft.teacher(lm, task, problems[:1], args, None) == []


def test_a_chat_template_that_opens_the_thought_gives_it_once():
    lm, args = common.load_model(settings()), settings()
    template = "{{ ' ' + messages[0]['content'].removesuffix('<think>') }}"
    for end in ("<think>", "<think>\n"):
        lm.tokenizer.chat_template = template + end
        problems = chains.problems(args, "train", 0, 1)
        row = latent_sft.teacher(lm, chains, problems, args, random.Random(0))[0]
        prompt = lm.tokenizer.decode([chunk[0] for chunk, share in row if share == (0, 0)])
        assert prompt.count("<think>") == 1 and prompt.endswith("? <think>")


# --- 3. Noise -------------------------------------------------------------------------------------


def test_noise_on_the_teacher():
    """The log of the ratio of two weights moves by a difference of two clipped Gumbels.

    That is logistic where none is clipped: at scale .3 one in a million below, 4e-5 above.
    """
    weights = torch.tensor([0.6, 0.3, 0.1, 0.0]).repeat(40_000, 1, 1)
    noisy, moved = {}, {}
    for scale in (0.0, 0.3, 1.0):
        torch.manual_seed(0)
        w = noisy[scale] = latent_sft.noisy_labels(weights, scale)
        moved[scale] = ((w[..., 0] / w[..., 1]).log() - math.log(2)).flatten()
        assert (w[..., 3] == 0).all()
        assert torch.allclose(w.sum(-1), torch.tensor(1.0))
    assert torch.allclose(noisy[0.0], weights)
    for x in (-2.0, -0.5, 0.0, 1.0):
        logistic = 1 / (1 + math.exp(-x))
        assert abs((moved[0.3] / 0.3 <= x).float().mean() - logistic) < 4 * 0.5 / math.sqrt(40_000)
    assert 4.4 < moved[1.0].abs().max() <= 4.5 + 1e-4
    assert 1.2 < moved[1.0].std() < math.pi / math.sqrt(3)  # that of the logistic
    one_hot = torch.eye(4)[:1].expand(5, 3, 4)
    assert torch.equal(latent_sft.noisy_labels(one_hot, 1.0), one_hot)


def test_the_noise_is_clipped_at_different_heights():
    """Scaled by 100 nearly all noise is -1.5 or 3. Gumbel noise is negative with chance 1 / e."""
    torch.manual_seed(0)
    w = latent_sft.noisy_labels(torch.full((20_000, 1, 2), 0.5), 100.0)
    ratio = (w[..., 0] / w[..., 1]).log().round(decimals=3).flatten()
    negative = 1 / math.e
    up = negative * (1 - negative)  # one is high and the other low
    for jump, chance in ((4.5, up), (-4.5, up), (0.0, 1 - 2 * up)):
        assert abs((ratio == jump).float().mean() - chance) < 0.03


# --- 4. Update ------------------------------------------------------------------------------------


def row_of(prompt, chunks, text):
    return (
        [([token], (0, 0)) for token in prompt]
        + [(chunk, (1 / len(chunks), 0)) for chunk in chunks]
        + [([token], (0, 1)) for token in text]
    )


SOLUTIONS = [  # prompt, chunks, text: three thoughts and eight discrete tokens
    ([8], [[5]], [2, 6, 6, 1]),
    (t.PROMPTS[0], [[3, 4, 4], [8, 9, 10, 8]], [2, 1]),
    (t.PROMPTS[2], [[3, 3], [7, 8], [4], [9, 10, 11]], [2, 1]),
]
ROWS = [row_of(*solution) for solution in SOLUTIONS]


def gradients(lm, rows, scale=0.0):
    """What latent_sft.update computes before it bounds the norm. The weights stay as they are."""
    lm.model.zero_grad()
    trained = {name: w for name, w in lm.model.named_parameters() if w.requires_grad}
    sgd = torch.optim.SGD(trained.values(), lr=0.0)
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.ones(()))
        metrics = latent_sft.update(lm, sgd, rows, scale, settings(top_k=5))
    return {name: weight.grad.clone() for name, weight in trained.items()}, metrics


@pytest.mark.parametrize("scale", [0.0, 0.7])
def test_the_loss_is_kl_at_latents_and_cross_entropy_behind_them(scale, monkeypatch):
    """By hand: one row at a time, kl_div and cross_entropy of torch, no padding, nothing cut.

    The noisy mixtures are taken as they were drawn. The model reads them and has to predict them.
    """
    drawn, noisy_labels = [], latent_sft.noisy_labels
    monkeypatch.setattr(
        latent_sft, "noisy_labels", lambda *given: drawn.append(noisy_labels(*given)) or drawn[-1]
    )
    lm = frozen_model()
    ours, metrics = gradients(lm, ROWS, scale)
    ids, labels, _ = latent_sft.to_tensors(ROWS, settings(top_k=5))
    assert torch.allclose(drawn[0], labels) == (scale == 0)
    lm.model.zero_grad()
    kl = cross_entropy = 0.0
    for n, (prompt, chunks, text) in enumerate(SOLUTIONS):
        dense = torch.zeros(len(ids[n]), 12).scatter_add(-1, ids[n], drawn[0][n])  # (L, V)
        w = dense[len(prompt) : len(prompt) + len(chunks)]
        embeds = torch.cat([lm.embedding[prompt], w @ lm.embedding, lm.embedding[text]])
        logits = lm.model(inputs_embeds=embeds[None]).logits[0, len(prompt) - 1 : -1]
        log_pi = logits.log_softmax(-1)
        kl += F.kl_div(log_pi[: len(w)], w, reduction="sum") / len(w) / 3
        cross_entropy += F.nll_loss(log_pi[len(w) :], torch.tensor(text), reduction="sum") / 8
    (kl + cross_entropy).backward()
    trained = {name: weight for name, weight in lm.model.named_parameters() if weight.requires_grad}
    t.assert_close(ours, {name: weight.grad for name, weight in trained.items()})
    assert abs(metrics["kl"] - kl) < 1e-4
    assert abs(metrics["cross_entropy"] - cross_entropy) < 1e-4
    assert lm.embedding.grad is None


@pytest.mark.parametrize("size", [1, 2])
def test_an_update_does_not_depend_on_how_it_is_cut(size, monkeypatch):
    whole, metrics = gradients(frozen_model(), ROWS)
    monkeypatch.setattr(latent_sft, "ROWS", size)
    cut, also = gradients(frozen_model(), ROWS)
    t.assert_close(cut, whole)
    assert also == pytest.approx(metrics, abs=1e-5)


def test_shares_of_several_ranks_add_up(monkeypatch):
    """Each rank has its rows and the denominators of all; one whose problems have none is idle."""
    lm = frozen_model()
    whole, _ = gradients(lm, ROWS)
    totals = iter([torch.tensor([3.0, 8.0])] * 3)
    sums = []

    def sum_over_ranks(tensor):
        sums.append(tensor)
        return tensor if len(sums) % 2 == 0 else next(totals)  # first the counts, then the losses

    monkeypatch.setattr(common, "sum_over_ranks", sum_over_ranks)
    monkeypatch.setattr(common, "sum_gradients_over_ranks", lambda model: None)
    first, _ = gradients(lm, ROWS[:1])
    rest, _ = gradients(lm, ROWS[1:])
    t.assert_close({name: first[name] + rest[name] for name in whole}, whole)
    monkeypatch.undo()
    idle, metrics = gradients(lm, [])
    assert all((gradient == 0).all() for gradient in idle.values())
    assert metrics["kl"] == metrics["cross_entropy"] == 0


def test_the_loss_is_least_at_the_teachers_weights():
    """KL is 0 where the policy is the teacher: taught its own mixture, nothing is left to learn."""
    lm = frozen_model()
    weights, ids = lm.model(torch.tensor([[5, 6]])).logits[0, -1].softmax(-1).sort(descending=True)
    ids = torch.cat([F.pad(torch.tensor([[5], [6]]), (0, 11)), ids[None]])[None]  # (1, 3, K)
    w = torch.cat([torch.eye(12)[[0, 0]], weights.detach()[None]])[None]
    kl = latent_sft.divergence(lm, ids, w, torch.tensor([[False, False, True]]))
    assert kl.shape == (1,) and kl.abs() < 1e-6


def test_the_gradient_is_bounded_by_1_and_one_that_is_not_finite_is_refused():
    lm = frozen_model()
    trained = [weight for weight in lm.model.parameters() if weight.requires_grad]
    before = [weight.clone() for weight in trained]
    sgd = torch.optim.SGD(trained, lr=1.0)
    with pytest.raises(common.UserError, match="not finite"):
        latent_sft.update(lm, sgd, ROWS, math.nan, settings(top_k=5))
    assert all(map(torch.equal, before, trained))
    metrics = latent_sft.update(lm, sgd, ROWS, 0.0, settings(top_k=5))
    moves = [(a - b).norm() for a, b in zip(before, trained, strict=True)]
    assert metrics["grad_norm"] > 1.2
    assert abs(torch.stack(moves).norm() - 1) < 1e-3


# --- 5. In use ------------------------------------------------------------------------------------


@torch.no_grad()
def think_by_hand(lm, prompt, exit_id, args):
    """Equation (5) for one prompt, without a cache -> mixtures (steps, V), number of latents"""
    embeds, mixtures, latents, thinking = lm.embedding[prompt], [], 0, True
    for _ in range(args.max_new_tokens):
        pi = lm.model(inputs_embeds=embeds[None]).logits[0, -1].softmax(-1)  # (V,)
        thinking = thinking and pi.argmax() != exit_id
        cut = torch.where(pi >= pi.topk(args.top_k).values[-1], pi, 0.0)
        mixtures.append(cut / cut.sum() if thinking else F.one_hot(pi.argmax(), 12).float())
        latents += thinking
        if pi.argmax() in lm.stop_ids:
            break
        embeds = torch.cat([embeds, mixtures[-1][None] @ lm.embedding])
    return torch.stack(mixtures), latents


def test_it_thinks_until_the_exit_token_and_then_writes():
    """Prompts of different length, some that never leave the thought or end in its midst."""
    lm, args = frozen_model(seed=7), settings(top_k=4)
    lm.stop_ids, lm.exit_id = torch.tensor([0, 2]), 3
    head = torch.nn.Parameter(lm.head[torch.arange(12).roll(5)].detach())
    lm.model.lm_head.weight = lm.head = head  # tied to E, it would write one token again and again
    prompts = [*t.PROMPTS, *([i, j] for i in range(12) for j in range(0, 12, 2))]
    roll = latent_sft.think(lm, prompts, args)
    assert roll.length.unique().numel() > 3 and roll.latents.unique().numel() > 3
    assert (roll.length > roll.latents + 1).any()  # text behind the exit token
    assert (roll.latents == 10).any()
    assert ((roll.latents == roll.length) & (roll.length < 10)).any()
    for n, prompt in enumerate(prompts):
        mixtures, latents = think_by_hand(lm, prompt, 3, args)
        assert roll.latents[n] == latents and roll.length[n] == len(mixtures)
        ids, weights = roll.ids[n, : len(mixtures)], roll.weights[n, : len(mixtures)]
        ours = torch.zeros_like(mixtures).scatter_add(-1, ids, weights)
        assert torch.allclose(ours, mixtures, atol=1e-5)
        assert torch.equal(ids[:, 0], mixtures.argmax(-1))


# --- 6. Evaluation --------------------------------------------------------------------------------


def test_the_verifier_reads_from_the_exit_token_to_the_end(monkeypatch, capsys):
    """Three thoughts: right, wrong, and one that never ends. The first one is printed."""
    lm, args = common.load_model(settings()), settings()
    problems = [Problem("1 + 1", "2"), Problem("2 + 2", "4"), Problem("3 + 3", "6")]
    texts = [" 5 5 </think> 2 9", " 5 </think> 3 9 9", " 5 5 5 5 5"]
    ids = torch.tensor([lm.tokenizer.encode(text) for text in texts])[..., None]  # (3, 5, 1)
    latents, length = torch.tensor([2, 1, 5]), torch.tensor([4, 3, 5])
    roll = latent_sft.Rollout(ids, torch.ones(ids.shape), latents, length)
    assert latent_sft.texts_of(lm, roll) == [" </think> 2", " </think> 3", ""]
    monkeypatch.setattr(latent_sft, "think", lambda *_: roll)
    scores = latent_sft.evaluate(lm, chains, problems, args)
    assert scores == {"greedy": 0.3333, "length": 4.0, "latents": 2.6667, "exit_rate": 0.6667}
    out = capsys.readouterr().out
    assert "1 + 1\n    latent  1  ' 5' 1.00\n    latent  2" in out and "the answer is 2" in out


# --- 7. Runs --------------------------------------------------------------------------------------

QUICK = ["--steps", "5", "--prompts_per_step", "4", "--eval_problems", "8", "--eval_every", "2",
         "--save_every", "2"]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    latent_sft.main([*QUICK, "--out", str(folder)])
    return folder


def test_a_run_leaves_a_log_a_result_and_a_model_with_its_embeddings(run):
    result, rows = json.loads((run / "result.json").read_text()), t.rows_of(run)
    scores = {"greedy", "length", "latents", "exit_rate"}
    assert scores <= set(result) and result["method"] == "latent_sft"
    assert scores <= set(rows[1]) and not scores & set(rows[2])
    assert [row["noise"] for row in rows] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    assert all(row["kl"] > 0 and row["cross_entropy"] > 0 for row in rows)
    ours, start = (
        AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (run / "model", CHAINS)
    )
    changed = {name for name in start if not torch.equal(ours[name], start[name])}
    assert changed and "model.embed_tokens.weight" not in changed


def test_killed_and_resumed_is_uninterrupted_bit_for_bit(run, tmp_path, monkeypatch):
    """Killed in step 3, behind the checkpoint of step 2. Each step has another student."""
    update, teacher, calls, students = latent_sft.update, latent_sft.teacher, [], []

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return update(*arguments)

    def watched(lm, task, problems, args, rng):
        students.append((problems[0], rng.getstate(), torch.initial_seed()))
        return teacher(lm, task, problems, args, rng)

    monkeypatch.setattr(latent_sft, "update", killed)
    with pytest.raises(KeyboardInterrupt):
        latent_sft.main([*QUICK, "--out", str(tmp_path / "run")])
    assert common.load_checkpoint(tmp_path / "run")["step"] == 2
    monkeypatch.setattr(latent_sft, "teacher", watched)
    latent_sft.main(["--resume", str(tmp_path / "run")])
    assert [len(set(each)) for each in zip(*students[1:], strict=True)] == [3, 3, 3]
    assert t.rows_of(tmp_path / "run") == t.rows_of(run)
    ours, theirs = (
        (path / "model/model.safetensors").read_bytes() for path in (tmp_path / "run", run)
    )
    assert ours == theirs


def test_a_trained_model_is_asked(run, capsys):
    latent_sft.main(["--model", str(run / "model"), "--ask", "16 + 5 - 9"])
    out = capsys.readouterr().out
    assert re.fullmatch(r"(    latent +\d+  ' .*\n)+    text       '.*'\n", out)


def test_more_candidates_than_tokens_are_all_tokens(tmp_path):
    latent_sft.main([*QUICK, "--steps", "1", "--top_k", "100", "--out", str(tmp_path / "run")])
    assert json.loads((tmp_path / "run/result.json").read_text())["args"]["top_k"] == 70


@pytest.mark.parametrize("flags, mentioned", [
    (["--task", "trees"], "--task trees has no worked solutions"), (["--chunk", "11"], "--chunk"),
    (["--exit_text", "<eos>"], "--exit_text"), (["--group_size", "4"], "--group_size"),
    (["--noise_scale", "-1"], "--noise_scale"), (["--kind", "no"], "mixed, plus"),
    (["--task", "unsolved", "--model", "chains", "--prompt", "", "--exit_text", " +"],
     "no worked solution"),
])  # fmt: skip
def test_a_wrong_call_ends_before_the_run_begins(flags, mentioned, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "unsolved").mkdir()
    for split in ("train", "test"):
        problem = {"question": "1" + " + 1" * 20, "answer": "21"}
        (tmp_path / f"unsolved/{split}.jsonl").write_text(json.dumps(problem))
    with pytest.raises(SystemExit) as stop:
        common.run_main(lambda: latent_sft.main(flags))
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "\n" not in error
    assert "error: " in error and mentioned in error
    assert not (tmp_path / "runs").exists()


def test_a_model_that_cannot_decode_is_refused_though_nothing_would_be_evaluated(tmp_path, capsys):
    """A Mamba has no cache of keys and values."""
    flags = ["--model", str(tmp_path / "model"), "--task", "chains", "--eval_every", "0"]
    config = MambaConfig(vocab_size=70, hidden_size=16, num_hidden_layers=1, eos_token_id=1)
    MambaForCausalLM(config).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(CHAINS).save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit):
        common.run_main(lambda: latent_sft.main([*flags, "--out", str(tmp_path / "run")]))
    assert "error: cannot use the model" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_defaults_are_those_of_a_real_model_or_of_the_chains():
    big, small = latent_sft.parse_args(["--model", "any"]), latent_sft.parse_args([])
    assert (big.task, big.steps, big.prompts_per_step, big.lr) == ("gsm8k", 2000, 64, 1e-4)
    assert (big.exit_text, big.max_new_tokens) == ("</think>", 128)
    assert (small.task, small.steps, small.chunk, small.lr) == ("chains", 1800, 6, 2e-3)
    assert not hasattr(big, "group_size")


LEARN = ["--prompts_per_step", "64", "--eval_problems", "256", "--eval_every", "0"]


@pytest.mark.slow
def test_the_chains_model_begins_to_think(tmp_path):
    """It comes from words: its first losses are above 10 and 7, and it never leaves a thought."""
    flags = ["--steps", "80", "--lr", "1e-3", "--out", str(tmp_path / "run")]
    latent_sft.main([*LEARN, *flags])
    row = t.rows_of(tmp_path / "run")[-1]
    assert row["kl"] < 3 and row["cross_entropy"] < 1
    assert json.loads((tmp_path / "run/result.json").read_text())["exit_rate"] > 0.9


@pytest.mark.slow
def test_the_model_that_has_learnt_it_goes_on(tmp_path):
    flags = ["--model", "chains_latent", "--steps", "20", "--lr", "1e-4"]
    latent_sft.main([*LEARN, *flags, "--out", str(tmp_path / "run")])
    row = t.rows_of(tmp_path / "run")[0]
    assert row["kl"] < 0.3 and row["cross_entropy"] < 0.01
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["greedy"] > 0.45 and result["length"] < 8


TWO_RANKS = """
import sys, torch
import common, test_latent_sft as t
common.start_ranks("cpu")
gradients, metrics = t.gradients(t.frozen_model(), t.ROWS[common.RANK :: 2])
torch.save([gradients, metrics], f"{sys.argv[1]}/all{common.RANK}")
rows = t.ROWS if common.RANK == 0 else []
torch.save(t.gradients(t.frozen_model(), rows), f"{sys.argv[1]}/idle{common.RANK}")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_give_the_gradient_of_one(tmp_path):
    """Three rows over two ranks; and all of them on the first, so that the other has none."""
    (tmp_path / "script.py").write_text(f"import sys\nsys.path.append('{HERE}/tests')\n{TWO_RANKS}")
    torchrun(tmp_path / "script.py", tmp_path)
    one, metrics = gradients(frozen_model(), ROWS)
    for name in ("all0", "all1", "idle0", "idle1"):
        theirs, their_metrics = torch.load(tmp_path / name, weights_only=True)
        t.assert_close(theirs, one)
        assert their_metrics == pytest.approx(metrics, abs=1e-5)


@pytest.mark.slow
def test_two_processes_make_a_run(tmp_path):
    out = torchrun("latent_sft.py", *QUICK, "--out", tmp_path / "run")
    assert out.count("step 0 ") == 1  # rank 0 speaks
    assert len(t.rows_of(tmp_path / "run")) == 5 and json.loads(out.splitlines()[-1])["length"] > 0


@pytest.mark.slow
@needs_shared
def test_a_run_with_a_real_tokenizer_and_gsm8k(tmp_path):
    """Of a random model: at first its loss is near log 151,936, which is 11.9."""
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers/qwen2.5")
    config = Qwen2Config(
        vocab_size=151936, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, eos_token_id=151645,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    flags = ["--model", str(tmp_path / "start"), "--task", str(SHARED / "data/gsm8k")]
    flags += ["--steps", "2", "--prompts_per_step", "3", "--eval_problems", "2", "--lr", "1e-3"]
    flags += ["--max_new_tokens", "24", "--out", str(tmp_path / "run")]
    latent_sft.main(flags)
    row, last = t.rows_of(tmp_path / "run")
    assert 5 < row["kl"] < 20 and last["cross_entropy"] < row["cross_entropy"] < 20

    args = latent_sft.parse_args(flags)
    lm, task = common.load_model(args), find(args.task)
    problems = task.problems(args, "train", 0, 200)
    rows = latent_sft.teacher(lm, task, problems, args, None)
    assert len(rows) > 190
    for row in rows[:20]:
        prompt, thought, text = (
            [chunk for chunk, share in row if [share[0] > 0, share[1] > 0] == wanted]
            for wanted in ([False, False], [True, False], [False, True])
        )
        assert tokenizer.decode(sum(prompt, [])).endswith("<|im_start|>assistant\n<think>")
        assert re.fullmatch("(<<[^<>]+>> ?)+", tokenizer.decode(sum(thought, [])))
        text = tokenizer.decode(sum(text, []))
        assert re.fullmatch(r"</think>\\boxed\{[\d.,-]+\}<\|im_end\|>", text)
