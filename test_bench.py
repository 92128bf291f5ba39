"""bench.py measures what it says.

    pytest test_bench.py
"""

import json
import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported: tests are about the CPU

import pytest
import torch

import bench
import common
import lepo


def run(flags, capsys):
    assert bench.main(flags) is None
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_every_part_runs_and_the_last_line_is_json(capsys):
    result = run(["--prompts", "4", "--tokens", "20", "--repeats", "2"], capsys)
    assert {"rollout", "update", "step", "scaling"} <= set(result)
    assert set(result["rollout"]["tokens_per_second"]) == {"latent", "ordinary", "generate", "naive latent loop"}
    assert all(rate > 0 for rate in result["rollout"]["tokens_per_second"].values())
    assert all(peak["gradient_apart"] < 1e-4 for peak in result["update"]["peaks"].values())
    assert set(result["scaling"]) == {f"{rows}x{tokens}" for rows in (8, 16, 32, 64) for tokens in (10, 20, 40)}
    assert result["step"]["lepo_over_grpo"] > 0


def test_contestants_do_the_same_work():
    """The naive loop makes as many tokens as lepo.rollout from equal noise, and its gradients are the same."""
    args = bench.parse_args(["--prompts", "4", "--device", "cpu"])
    lm, prompts, lepo_args = bench.setup(args)
    lepo_args.tau = 1e-3  # nearly discrete: rounding cannot pile up into another path
    ours = lepo.rollout(lm, prompts, 8, lepo_args, torch.Generator().manual_seed(0))
    assert bench.naive_rollout(lm, prompts, lepo_args, torch.Generator().manual_seed(0)) == int(ours.length.sum())
    made = bench.generate(lm, prompts, lepo_args)
    assert 0.7 < made / int(ours.length.sum()) < 1.4  # other dice, the same distribution


def test_peak_memory_sees_what_is_held_and_let_go():
    with bench.peak_memory("cpu") as peak:
        held = torch.ones(2**27)  # 512 MiB
        bench.time.sleep(0.05)
        del held
    assert 0.9 * 2**29 < peak["above"] < 1.3 * 2**29


@pytest.mark.parametrize("flags, mentioned", [
    (["--parts", "nonsense"], "--parts"), (["--repeats", "1"], "--repeats"),
    (["--shape", "qwen", "--parts", "step"], "--shape tiny"),
])  # fmt: skip
def test_bad_flags(flags, mentioned):
    with pytest.raises(common.UserError, match=mentioned):
        bench.parse_args(flags)
