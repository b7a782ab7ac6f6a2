#!/usr/bin/env bash
# A recipe for a model of 70 billion weights. Not run at that size here: docs/scale.md says what has been measured.
#
#     examples/large_model.sh MODEL OUT
set -euo pipefail
model=$1 out=$2

# The plan: memory of each GPU and of the machine, and the time; nothing is changed.
surgeon prune "$model" "$out" --dry-run --gpus 8 --offload cpu

# One GPU, weights and factors streamed through main memory; --resume begins the run, or goes on after a kill.
surgeon prune "$model" "$out" --offload cpu --gpu-memory 80GB --eval wikitext2 --resume

# In its place, eight GPUs of one machine:
#     torchrun --nproc-per-node 8 -m llm_surgeon prune "$model" "$out" --offload cpu --resume

surgeon pack "$out" "$out-packed"
