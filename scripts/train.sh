#!/usr/bin/env bash
# Trains privately on this machine: ./scripts/train.sh [Hydra overrides], for example sharding=fully_shard privacy.target_epsilon=3.
# NPROC sets the number of processes (default: one a GPU, or 2 without any). EXTRAS=data,hf also installs what recipes other than
# quickstart need. Output goes to the directory you call it from.
set -euo pipefail
# shellcheck source=scripts/_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

ensure_environment "${EXTRAS:-runtime}"
processes="${NPROC:-$("$python" -c 'import torch; print(torch.cuda.device_count() or 2)')}"
# Ranks share the cores; torchrun's own default is one thread each, with a warning.
cores="$("$python" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}"

say "training with $processes processes: fsdp_dp.train $*"
exec "$python" -m fsdp_dp.launch --standalone --nproc-per-node="$processes" -m fsdp_dp.train "$@"
