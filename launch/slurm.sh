#!/usr/bin/env bash
#SBATCH --job-name=dinalrm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --signal=TERM@300
#SBATCH --requeue
# Trains on a Slurm cluster of GPU hosts, one process a GPU; preprocesses with MODULE=dinalrm_jax.preprocess.
#
#   CONFIG=configs/hpdv3.py WORKDIR=/shared/runs/hpdv3 sbatch launch/slurm.sh [--config.data=/shared/hpdv3 ...]
#   MODULE=dinalrm_jax.preprocess sbatch launch/slurm.sh --dataset hpdv3 --source /shared/HPDv3 --output /shared/hpdv3 \
#       --base-model /shared/stable-diffusion-3.5-medium
#
# WORKDIR and the data must lie where all hosts see them. Five minutes before the time limit Slurm
# sends SIGTERM: the run saves and stops, and goes on when the job is queued again. PYTHON and
# JAX_COMPILATION_CACHE_DIR are taken from the environment where they are set; override the
# resources above on sbatch's command line.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
module=${MODULE:-dinalrm_jax.train}
flags=()
if [ "$module" = dinalrm_jax.train ]; then
    : "${CONFIG:?set CONFIG to a file under configs/}"
    flags+=(--config "$CONFIG")
    if [ -n "${WORKDIR:-}" ]; then flags+=(--workdir "$WORKDIR"); fi
fi
# Nothing else is on these GPUs, and JAX alone would leave a quarter of their memory; and gradients are summed while other
# work goes on, which XLA does where it is told to.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
export XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_latency_hiding_scheduler=true"
exec srun --kill-on-bad-exit=1 "${PYTHON:-python}" -m "$module" "${flags[@]}" --distributed "$@"
