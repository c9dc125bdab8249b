#!/bin/bash
# Every job, one after the other, on the TPU VM it is started on (one host) or, through pod.sh, on all hosts of a slice:
#
#     bash scripts/tpu/jobs.sh [JOB ...]       jobs: rf pairs reflow distill evaluate; without one, all of them
#
# Read it and change it. A job that fails or is preempted ends it; the same command resumes there.
set -euo pipefail
cd "$(dirname "$0")/../.."
source .venv/bin/activate

CONFIG=${CONFIG:-configs/rf/cifar10_rf_continuous.py}
WORKDIR=${WORKDIR:-gs://YOUR_BUCKET/cifar10}  # or a folder on a disk; several hosts need one that all of them see
PAIRS=${PAIRS:-}                              # a folder on an attached disk for the pairs; only for a WORKDIR on a disk
NDIV=${NDIV:-4}                               # k, the number of segments
TRAIN=${TRAIN:-512} EVAL=${EVAL:-2048}        # over all hosts. v3-8: 512, 2048; v2-8: 512, 1024; 256 x 256 on v3-8: 64, 256
JOBS=${*:-rf pairs reflow distill evaluate}

if [ -n "$PAIRS" ]; then  # the attached disk, in the place of samples/reflow_batch
    case $WORKDIR in *://*) echo "PAIRS=$PAIRS: only for a WORKDIR on a disk, not $WORKDIR" >&2; exit 2 ;; esac
    mkdir -p "$PAIRS" "$WORKDIR/samples"
    ln -sfnT "$(realpath "$PAIRS")" "$WORKDIR/samples/reflow_batch"  # fails where pairs are already
fi

run() {
    python main.py --config="$CONFIG" --workdir="$WORKDIR" --config.training.reflow_t="$NDIV" \
        --config.training.batch_size="$TRAIN" --config.eval.batch_size="$EVAL" "$@"
}

for job in $JOBS; do
    case $job in
    rf) run --mode=train --config.model.rf_phase=1 ;;
    pairs) run --mode=train --config.training.reflow_mode=gen_reflow --config.training.n_reflow_data=1000000 \
        --config.sampling.method=ode --config.sampling.tol=1e-4 --config.training.gen_reflow_size=1024 ;;
    reflow) run --mode=train --config.training.reflow_mode=train_reflow ;;
    distill) run --mode=train --config.training.reflow_mode=train_distill \
        --config.sampling.method=pc --config.model.num_scales="$NDIV" ;;
    evaluate) run --mode=eval --eval_folder=distilled --config.eval.reflow_mode=eval_distill \
        --config.sampling.method=pc --config.model.num_scales="$NDIV" ;;
    *) echo "unknown job $job" >&2; exit 2 ;;
    esac
done
