#!/usr/bin/env bash
# Rehearses a multi-process job on one machine: PROCESSES processes with DEVICES virtual CPU devices each.
#
#   PROCESSES=2 DEVICES=4 launch/local_processes.sh dinalrm_jax.train --config configs/hpdv3.py:smoke \
#       --config.mesh.data=2 --config.mesh.fsdp=2 --config.mesh.tensor=2
#
# The first argument is the command's module, the rest are its flags. PYTHON, PORT and LOGS (a
# directory for the output of all processes but the first) are taken from the environment where set.
# A signal is passed on to all processes; one that fails or is killed ends the others.
set -euo pipefail
: "${1:?name a module, for instance dinalrm_jax.train}"
cd "$(dirname "$0")/.."
processes=${PROCESSES:-2}
logs=${LOGS:-$(mktemp -d)}
mkdir -p "$logs"
export JAX_PLATFORMS=cpu
export JAX_NUM_CPU_DEVICES="${DEVICES:-4}"
export JAX_COORDINATOR_ADDRESS="localhost:${PORT:-12345}"
export JAX_NUM_PROCESSES="$processes"

children=()
for ((id = processes - 1; id >= 0; id--)); do
    if ((id)); then
        JAX_PROCESS_ID=$id "${PYTHON:-python}" -m "$@" --distributed >"$logs/process-$id.log" 2>&1 &
    else
        JAX_PROCESS_ID=$id "${PYTHON:-python}" -m "$@" --distributed &
    fi
    children+=($!)
done
stopping=
trap 'stopping=1; kill -TERM "${children[@]}" 2>/dev/null || true' TERM INT

status=0
running=$processes
while ((running)); do
    code=0
    wait -n || code=$?
    # A signal to this script interrupts `wait` too; count only processes that are gone.
    alive=0
    for child in "${children[@]}"; do
        if kill -0 "$child" 2>/dev/null; then alive=$((alive + 1)); fi
    done
    if ((alive == running)); then continue; fi
    running=$alive
    if ((code && !status)); then
        status=$code
        # Whatever ended one ends all; those that were asked to stop take the time to save.
        if ((running)) && [ -z "$stopping" ] && ((code != 143)); then kill -KILL "${children[@]}" 2>/dev/null || true; fi
    fi
done
if ((status && status < 128)); then
    echo "a process failed; the output of all but the first is in $logs" >&2
fi
exit "$status"
