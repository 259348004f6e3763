#!/usr/bin/env bash
# Trains on all accelerators of this machine (GPUs, the chips of one TPU VM, or the CPU).
#
#   CONFIG=configs/quickstart.py WORKDIR=runs/quickstart launch/one_host.sh [--config.seed=1 ...]
#
# PYTHON and JAX_COMPILATION_CACHE_DIR are taken from the environment where they are set.
set -euo pipefail
: "${CONFIG:?set CONFIG to a file under configs/}"
cd "$(dirname "$0")/.."
if command -v nvidia-smi > /dev/null; then
    # Nothing else is on these GPUs, and JAX alone would leave a quarter of their memory; and gradients are summed while
    # other work goes on, which XLA does where it is told to.
    export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
    export XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_latency_hiding_scheduler=true"
fi
exec "${PYTHON:-python}" -m dinalrm_jax.train --config "$CONFIG" ${WORKDIR:+--workdir "$WORKDIR"} "$@"
