#!/usr/bin/env bash
# The figures of README.md and of this folder, from runs.jsonl
set -euo pipefail
cd "$(dirname "$0")/.."
lines="python tools/plot.py results/runs.jsonl"

$lines --only '^(grpo|lepo|latent-default)-seed' --figure results/curves.png
$lines --only '^qwen320' --figure results/qwen.png
$lines --only '^latent-default-seed0' --thought results/thought.png
$lines --only '^trees-(grpo|lepo)-seed' --thought results/trees.png
$lines --only '^(lepo|grpo)' --figure results/lepo.png
$lines --only '^latent-(default-|mean|weighted)' --figure results/latent.png
$lines --only '^dlr-(seed|one|identity|grpo|.*_300)' --over texts --figure results/dlr.png
$lines --only '^(grpo|lepo|forks-chains-[^-]*)-seed' --figure results/forks_chains.png
$lines --only '^(trees-(grpo|lepo)|forks-trees-[^-]*)-seed' --figure results/forks_trees.png
