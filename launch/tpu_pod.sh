#!/usr/bin/env bash
# Trains on every host of a TPU pod slice from your own machine, through gcloud.
#
#   TPU=my-slice ZONE=us-central2-b CONFIG=configs/hpdv3.py WORKDIR=gs://my-bucket/runs/hpdv3 \
#       launch/tpu_pod.sh [--config.data=/mnt/my-bucket/hpdv3 ...]
#
#   MODULE=dinalrm_jax.preprocess TPU=... ZONE=... launch/tpu_pod.sh --dataset hpdv3 --source ... --output ...
#
# The hosts need this repository at DIRECTORY (default ~/dinalrm_jax) and `pip install -e '.[tpu,gcs]'` done
# there. WORKDIR is in a bucket that their service account may write, or on a file system that all of them
# see. Records are read from a file system: Filestore, or a bucket mounted on every host, with a cache of
# files, as they are read at random places. Mount it with gcsfuse, once that is installed
# (https://cloud.google.com/storage/docs/cloud-storage-fuse/install):
#
#   MOUNT='sudo install -d -o "$USER" /mnt/my-bucket /var/tmp/gcsfuse && gcsfuse --implicit-dirs \
#       --cache-dir /var/tmp/gcsfuse --file-cache-max-size-mb -1 --file-cache-cache-file-for-range-read \
#       my-bucket /mnt/my-bucket'
#   gcloud compute tpus tpu-vm ssh my-slice --zone us-central2-b --worker=all --command "$MOUNT"
#
# PROJECT, PYTHON and JAX_COMPILATION_CACHE_DIR (else WORKDIR/programs) are passed on where they are set.
# Stop it with: gcloud compute tpus tpu-vm ssh TPU --zone ZONE --worker=all --command 'pkill -TERM -f dinalrm_jax.train'
set -euo pipefail
: "${TPU:?set TPU to the name of the slice}" "${ZONE:?set ZONE to its zone}"
module=${MODULE:-dinalrm_jax.train}
flags=(--distributed)
if [ "$module" = dinalrm_jax.train ]; then
    : "${CONFIG:?set CONFIG to a file under configs/}"
    : "${WORKDIR:?set WORKDIR to gs://BUCKET/DIRECTORY, or a directory that all hosts see}"
    flags=(--config "$CONFIG" --workdir "$WORKDIR" --distributed)
fi
quoted=$(printf ' %q' "${flags[@]}" "$@")
environment=${JAX_COMPILATION_CACHE_DIR:+JAX_COMPILATION_CACHE_DIR=$(printf '%q' "$JAX_COMPILATION_CACHE_DIR") }
# DIRECTORY is expanded on the hosts, where ~ means their home.
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" ${PROJECT:+--project "$PROJECT"} --worker=all \
    --command "cd ${DIRECTORY:-~/dinalrm_jax} && ${environment}${PYTHON:-python3} -m $module$quoted"
