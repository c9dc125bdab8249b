#!/usr/bin/env bash
# Recipes for few network calls, side by side on digits: scripts/compare_recipes.sh [WORKDIR] [SEED...]
#
# For each seed: a teacher (1-RF), plain reflow and its N-step distillation, k-SeqRF and its distillation, off and on
# policy, each at NFE 1, 2 and 4; then a table of the distance to the teacher's samples and FID. docs/recipes.md lists
# the commands. Run again, it skips what is finished; killed, it goes on where it was.
#
# Environment: NFES="1 2 4", the columns; TEACHER=runs/digits/1_rf, a trained 1-RF in place of one for each seed;
# NOISES, REFLOW, DISTILL, LONG: the sizes below; COMPARED=512, noises behind the distance.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/requirements.sh "${ACCELERATOR:-cpu}"

workdir="${1:-runs/recipes}"
seeds=("${@:2}")
nfes="${NFES:-1 2 4}"
noises="${NOISES:-8192}"  # that the teacher solves, for every k
reflow="${REFLOW:-1500}"  # updates of reflow ...
distill="${DISTILL:-600}" # ... of distillation ...
long="${LONG:-1110}"      # ... and of distillation at the cost of the on-policy one

job() { # job MODE FOLDER OVERRIDE...
  printf '\n== %s %s\n' "$1" "$2"
  .venv/bin/python main.py --config=configs/rf/digits_rf_continuous.py --mode="$1" --workdir="$2" \
    --config.seed="$seed" "${@:3}"
}

train() { # train FOLDER STAGE UPDATES OVERRIDE...
  [ -d "$1/$2/checkpoints/$3" ] ||
    job train "$1" --config.training.n_iters="$3" --config.training.snapshot_freq="$3" "${@:4}"
}

evaluate() { # evaluate FOLDER NFE STEP OVERRIDE...: the checkpoint of update STEP
  compgen -G "$1/euler_$2/step_*/metrics.json" > /dev/null ||
    job eval "$1" --eval_folder="euler_$2" --config.eval.begin_step="$3" --config.model.num_scales="$2" "${euler[@]}" \
      --config.eval.teacher="$teacher" --config.eval.straightness_samples="${COMPARED:-512}" "${@:4}"
}

euler=(--config.sampling.method=pc --config.sampling.predictor=rf_solver)
ema=(--config.model.ema_rate=0.995 --config.model.variable_ema_rate=False)
reflow_options=(--config.training.reflow_mode=train_reflow --config.optim.lr=2e-3 "${ema[@]}")
distill_options=(--config.training.reflow_mode=train_distill --config.optim.lr=1e-3 "${ema[@]}")

train_student() { # train_student K: k-SeqRF, of which k = 1 is plain reflow
  local folder="$base/k$1" from=(--config.training.reflow_t="$1" --config.training.import_flax="$teacher")
  [ -d "$folder/2_rf/checkpoints/$reflow" ] && return
  job train "$folder" "${from[@]}" --config.training.reflow_mode=gen_reflow --config.training.n_reflow_data=$((noises * $1))
  train "$folder" 2_rf "$reflow" "${from[@]}" "${reflow_options[@]}"
}

distil() { # distil K M NAME UPDATES OVERRIDE...: k-SeqRF to m Euler steps a segment, in a folder of its own
  local folder="$base/k$1_m$2_$3" steps=(--config.training.reflow_t="$1" --config.training.distill_steps="$2")
  mkdir -p "$folder"
  ln -sfn "../k$1/samples" "$folder/samples"
  train "$folder" "2_distill$([ "$2" -eq 1 ] || echo "_$2")" "$4" "${steps[@]}" "${distill_options[@]}" \
    --config.training.import_flax="$base/k$1/2_rf" "${@:5}"
  evaluate "$folder" $(($1 * $2)) "$4" "${steps[@]}" --config.eval.reflow_mode=eval_distill
}

compare() { # compare K M: every recipe of k segments and m steps a segment
  local nfe=$(($1 * $2))
  train_student "$1"
  evaluate "$base/k$1" "$nfe" "$reflow" --config.training.reflow_t="$1"
  distil "$1" "$2" distill "$distill"
  [ "$nfe" -gt 1 ] || return 0
  distil "$1" "$2" distill_long "$long"
  # The teacher's states at the boundaries. An on-policy update costs 3 network calls and (nfe - 1) / 2 more.
  grep -qs '"complete": true' "$base/k$1/samples/trajectories/manifest.json" ||
    job train "$base/k$1" --config.training.reflow_mode=gen_reflow --config.training.reflow_pairs=trajectory \
      --config.training.reflow_t="$1" --config.training.import_flax="$teacher" --config.training.n_reflow_data="$noises"
  distil "$1" "$2" on_policy $((long * 6 / (5 + nfe))) --config.training.on_policy=1
}

for seed in "${seeds[@]:-0}"; do
  base="$workdir/seed_$seed"
  teacher="${TEACHER:-$base/teacher/1_rf}"
  [ -n "${TEACHER:-}" ] || train "$base/teacher" 1_rf 1400 --config.model.rf_phase=1
  for n in $nfes; do
    compare 1 "$n"
    [ "$n" -eq 1 ] || compare "$n" 1
  done
done
.venv/bin/python scripts/recipes_table.py "$workdir"
