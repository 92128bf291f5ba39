#!/usr/bin/env bash
# Qwen2.5-0.5B on GSM8K, one GPU with 24 GB: plain GRPO, LEPO and Latent-GRPO from the same start, one table at the end.
#
#   bash train_gsm8k.sh                  # GRPO, LEPO, latent SFT and then Latent-GRPO; seed 0
#   SEED=1 bash train_gsm8k.sh           # another seed: the table then has mean ± std
#   bash train_gsm8k.sh --steps 20       # flags are passed on to all four runs
#   GPUS=8 bash train_gsm8k.sh           # eight GPUs share the prompts of each step
#
# Each run evaluates on the whole test set, RL before and after. A run that was stopped is continued by starting the
# script again, with the flags it began with. No GPU was at hand when this was written: the memory figures are
# arithmetic, not readings.
set -euo pipefail
cd "$(dirname "$0")"
seed=${SEED:-0}

shared=(
  --eval_problems 1319          # all test problems: standard error 1.4 points at 50 % accuracy
  --eval_every 0                # a noise-free evaluation costs the rollouts of five steps
  --seed "$seed"
)
rl=(
  "${shared[@]}"
  --prompts_per_step 32         # x 8 rollouts = 256 rows. The paper's 128 x 8 is steadier and slower
  --group_size 8                # the paper's G
  --steps 200                   # 6,400 of the 7,473 training problems; latent_grpo.py draws more often
  --lr 1e-6                     # the paper's, with 3 % warm-up
  --save_every 20
)
base=Qwen2.5-0.5B               # base model, 494M parameters; the papers start at 1B and 3B
# Memory: float32 weights, gradients and Adam's two moments of 494M parameters 7.9 GB, their bf16 copy
# in a rollout 1 GB, KV cache of 256 rows x 700 positions x 24 layers x 256 numbers x 2 bytes 2.2 GB.
# The update adds about 8 GB: activations of a group of eight rows 6 GB, logits of 220 steps and the
# head's gradient 1 to 2 GB.

launch=(python)
if [ "${GPUS:-1}" -gt 1 ]; then launch=(torchrun --standalone --nproc_per_node="$GPUS"); fi

run() {  # run <script> <folder> <flags>: start it, or continue it, or leave it when it is done
  if [ -f "$2/result.json" ]; then echo "$2 is done"
  elif [ -f "$2/checkpoint.pt" ]; then "${launch[@]}" "$1" --resume "$2"
  else "${launch[@]}" "$1" --out "$2" "${@:3}"
  fi
}

# A GSM8K solution takes 100 to 300 tokens. LEPO's latent steps count in the cap: equal compute.
# Baseline: the same code with no latent steps, which is GRPO exactly.
lepo=("${rl[@]}" --model "$base" --task gsm8k --max_new_tokens 400)
run lepo.py "runs/gsm8k-grpo-seed$seed" "${lepo[@]}" --latent_steps 0 "$@"
# The paper's 3B setting has 64 latent steps at tau .3.
run lepo.py "runs/gsm8k-lepo-seed$seed" "${lepo[@]}" --latent_steps 64 --tau 0.3 "$@"
# Latent SFT on GSM8K's own equations, 17 times through the training set, a latent for 8 tokens; then
# RL of that model. Thoughts and answers are short: the official cap of 128 steps.
sft=runs/gsm8k-latent_sft-seed$seed
run latent_sft.py "$sft" --task gsm8k "${shared[@]}" --model "$base" --steps 2000 \
  --save_every 200 --eval_problems 256 "$@"    # which it reads all at once
run latent_grpo.py "runs/gsm8k-latent_grpo-seed$seed" --task gsm8k "${rl[@]}" --model "$sft/model" \
  --max_new_tokens 128 "$@"

python tools/plot.py runs/gsm8k-* --figure runs/gsm8k.png
