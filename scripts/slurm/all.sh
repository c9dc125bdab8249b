#!/bin/bash
# Every job of k-SeqRF as a chain of Slurm jobs, each of which waits until the one before has ended well:
#
#     NDIV=4 WORKDIR=/scratch/$USER/cifar10 bash scripts/slurm/all.sh [--config.SETTING=VALUE ...]
#     SBATCH="--nodes=1 --gpus-per-node=2 --ntasks-per-node=2" ...       # other machines than job.sbatch asks for
#
# Read it and change it. A job that fails takes those after it out of the queue; one that is preempted keeps them waiting.
set -euo pipefail
cd "$(dirname "$0")/../.."

CONFIG=${CONFIG:-configs/rf/cifar10_rf_continuous.py}
WORKDIR=${WORKDIR:?a folder that all nodes see}
PAIRS=${PAIRS:-}  # a folder on another disk for the pairs, in the place of samples/reflow_batch
NDIV=${NDIV:-4}
TRAIN=${TRAIN:-512} EVAL=${EVAL:-2048}  # batch sizes, over all nodes
read -ra options <<< "${SBATCH:-}"
settings=("$@")
before=""

if [ -n "$PAIRS" ]; then
    case $WORKDIR in *://*) echo "PAIRS=$PAIRS: only for a WORKDIR on a disk, not $WORKDIR" >&2; exit 2 ;; esac
    mkdir -p "$PAIRS" "$WORKDIR/samples"
    ln -sfnT "$(realpath "$PAIRS")" "$WORKDIR/samples/reflow_batch"  # fails where pairs are already
fi

submit() {
    before=$(sbatch --parsable --kill-on-invalid-dep=yes ${before:+--dependency=afterok:$before} "${options[@]}" \
        scripts/slurm/job.sbatch --config="$CONFIG" --workdir="$WORKDIR" --config.training.reflow_t="$NDIV" \
        --config.training.batch_size="$TRAIN" --config.eval.batch_size="$EVAL" "$@" "${settings[@]}")
}

fixed=(--config.sampling.method=pc --config.model.num_scales="$NDIV")

submit --mode=train --config.model.rf_phase=1
submit --mode=train --config.training.reflow_mode=gen_reflow --config.sampling.tol=1e-4
submit --mode=train --config.training.reflow_mode=train_reflow
submit --mode=train --config.training.reflow_mode=train_distill "${fixed[@]}"
submit --mode=eval --eval_folder=distilled --config.eval.reflow_mode=eval_distill "${fixed[@]}"
echo "submitted, the last one is $before"
