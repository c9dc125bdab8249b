#!/usr/bin/env bash
# The main job on real images, from a fresh clone with only Python: scripts/quickstart.sh [WORKDIR]
#
# Trains 1-RF on scikit-learn's digits, makes pairs with it, trains 2-SeqRF on them, distils that, evaluates all three
# and prints the table, then what was won; the exit status is 1 if that is less than it should be. Run again, it skips
# what is finished; killed, it goes on where it was. With BEST=1 it also trains and distils by the recipe `best`.
set -euo pipefail
workdir="${1:-}"
case $workdir in "" | /* | *://*) ;; *) workdir="$PWD/$workdir" ;; esac  # of the folder that it is given in
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/requirements.sh

# On a CPU one device uses little more than one core for small images: as many devices as cores, up to 8, share each
# batch. Accelerators do not look at this flag.
cores=$(getconf _NPROCESSORS_ONLN)
devices=$((cores >= 8 ? 8 : cores >= 4 ? 4 : cores >= 2 ? 2 : 1))
export XLA_FLAGS="${XLA_FLAGS:---xla_force_host_platform_device_count=$devices}"
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"  # less time in page faults (docs/accelerators.md)

workdir="${workdir:-runs/digits}"
config=configs/rf/digits_rf_continuous.py
run=(.venv/bin/python main.py --config="$config" --workdir="$workdir")
best=(.venv/bin/python main.py --config="$config:best" --workdir="$workdir/best")
reflow=(--config.model.rf_phase=2 --config.training.reflow_t=2)

say() { printf '\n== %s\n' "$*"; }

evaluate() { # evaluate FOLDER SAMPLERS STEP OVERRIDE...: the last checkpoint of a stage, into FOLDER_SAMPLER
  .venv/bin/python main.py --config="$config:${recipe:-paper}" --workdir="$workdir" --mode=eval --eval_folder="$1" \
    --config.eval.samplers="$2" --config.eval.begin_step="$3" --config.eval.teacher="$workdir/1_rf" \
    --config.eval.save_trajectory=True "${@:4}"
}

train() { # train FROM JOB...: 2-SeqRF on the pairs and its distillation; FROM: the 1-RF, none: the workdir's
  "${@:2}" "${reflow[@]}" --mode=train --config.training.reflow_mode=train_reflow --config.optim.lr=2e-3 \
    --config.training.snapshot_freq=750 --config.training.import_flax="$1"
  "${@:2}" "${reflow[@]}" --mode=train --config.training.reflow_mode=train_distill --config.training.n_iters=300 \
    --config.optim.lr=1e-3 --config.training.snapshot_freq=300 --config.sampling.method=pc --config.model.num_scales=2
}

say "1/4 train 1-RF"
"${run[@]}" --mode=train --config.model.rf_phase=1
say "2/4 generate pairs for 2 segments"
"${run[@]}" --mode=train "${reflow[@]}" --config.training.reflow_mode=gen_reflow
say "3/4 train 2-SeqRF and distil it to one call a segment"
train none "${run[@]}"
if [ -n "${BEST:-}" ]; then
  say "the same by the recipe 'best'"
  mkdir -p "$workdir/best"
  ln -sfn ../samples "$workdir/best/samples"
  train "$workdir/1_rf" "${best[@]}"
fi

say "4/4 evaluate"
evaluate 1rf 'ode;euler:1,2,4,8' 1400 --config.model.rf_phase=1 --config.training.reflow_t=2
evaluate 2seqrf 'ode;euler:2,4' 750 "${reflow[@]}"
evaluate 2distill 'euler:2' 300 "${reflow[@]}" --config.eval.reflow_mode=eval_distill
if [ -n "${BEST:-}" ]; then
  recipe=best evaluate 2distill_best 'euler:2' 300 "${reflow[@]}" --config.eval.reflow_mode=eval_distill \
    --config.training.import_flax="$workdir/best/2_distill"
fi

.venv/bin/python -m report --html --check "$workdir"
