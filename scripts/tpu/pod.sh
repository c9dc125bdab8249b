#!/bin/bash
# The jobs of jobs.sh on every host of a TPU VM or a pod slice at once; JAX finds the hosts by itself:
#
#     NAME=seqrf ZONE=europe-west4-a bash scripts/tpu/pod.sh reflow distill
#
# CONFIG, WORKDIR, PAIRS, NDIV, TRAIN and EVAL are passed on. After a preemption the same command resumes. Start it in
# tmux: a lost connection can end the jobs. Run with gcloud replaced by a script; there was no TPU.
set -euo pipefail

NAME=${NAME:-seqrf} ZONE=${ZONE:-europe-west4-a}
SETTINGS=""
for name in CONFIG WORKDIR PAIRS NDIV TRAIN EVAL; do
    [ -z "${!name:-}" ] || SETTINGS+="$name=$(printf %q "${!name}") "
done

gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all \
    --command="cd seqrf && $SETTINGS bash scripts/tpu/jobs.sh $*"
