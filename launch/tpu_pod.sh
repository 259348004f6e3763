#!/usr/bin/env bash
# Trains on every host of a TPU pod slice from your own machine, through gcloud.
#
#   TPU=my-slice ZONE=us-central2-b CONFIG=configs/hpdv3.py WORKDIR=/mnt/shared/runs/hpdv3 \
#       launch/tpu_pod.sh [--config.data=/mnt/shared/hpdv3 ...]
#
#   MODULE=dinalrm_jax.preprocess TPU=... ZONE=... launch/tpu_pod.sh --dataset hpdv3 --source ... --output ...
#
# The hosts need this repository at DIRECTORY (default ~/dinalrm_jax), `pip install -e '.[tpu]'` done
# there, and one file system that all of them see (Filestore, or a mounted bucket) for WORKDIR and the
# data. PROJECT, PYTHON and JAX_COMPILATION_CACHE_DIR (else WORKDIR/programs) are passed on where they are set.
# Stop it with: gcloud compute tpus tpu-vm ssh TPU --zone ZONE --worker=all --command 'pkill -TERM -f dinalrm_jax.train'
set -euo pipefail
: "${TPU:?set TPU to the name of the slice}" "${ZONE:?set ZONE to its zone}"
module=${MODULE:-dinalrm_jax.train}
flags=(--distributed)
if [ "$module" = dinalrm_jax.train ]; then
    : "${CONFIG:?set CONFIG to a file under configs/}" "${WORKDIR:?set WORKDIR to a directory that all hosts see}"
    flags=(--config "$CONFIG" --workdir "$WORKDIR" --distributed)
fi
quoted=$(printf ' %q' "${flags[@]}" "$@")
environment=${JAX_COMPILATION_CACHE_DIR:+JAX_COMPILATION_CACHE_DIR=$(printf '%q' "$JAX_COMPILATION_CACHE_DIR") }
# DIRECTORY is expanded on the hosts, where ~ means their home.
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" ${PROJECT:+--project "$PROJECT"} --worker=all \
    --command "cd ${DIRECTORY:-~/dinalrm_jax} && ${environment}${PYTHON:-python3} -m $module$quoted"
