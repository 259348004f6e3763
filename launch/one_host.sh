#!/usr/bin/env bash
# Trains on all accelerators of this machine (GPUs, the chips of one TPU VM, or the CPU).
#
#   CONFIG=configs/quickstart.py WORKDIR=runs/quickstart launch/one_host.sh [--config.seed=1 ...]
#
# PYTHON and JAX_COMPILATION_CACHE_DIR are taken from the environment where they are set.
set -euo pipefail
: "${CONFIG:?set CONFIG to a file under configs/}"
cd "$(dirname "$0")/.."
exec "${PYTHON:-python}" -m dinalrm_jax.train --config "$CONFIG" ${WORKDIR:+--workdir "$WORKDIR"} "$@"
