#!/usr/bin/env bash
# From a folder of pictures to a model that draws more of them in K network calls:
#
#     bash scripts/own_images.sh FOLDER [WORKDIR]
#
# It prepares the pictures, trains a first flow, makes pairs with it, trains and distils K-SeqRF, and evaluates. WORKDIR
# (runs/own) then has report.html, the model in model/ and samples of it in drawn/. Killed, it goes on with the same
# command. It prints what it chooses; the environment may say otherwise: SIZE=32 UPDATES=20000 bash scripts/own_images.sh
# ...; so may settings of main.py in OPTIONS.
set -euo pipefail
folder="${1:?give the folder of the pictures}" workdir="${2:-}"
absolute() { case $1 in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac; }
folder="$(absolute "$folder")"
[ -z "$workdir" ] || workdir="$(absolute "$workdir")"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
workdir="${workdir:-runs/own}"
bash scripts/requirements.sh
[ ! -f .venv/bin/activate ] || source .venv/bin/activate

mkdir -p "$workdir"
if [ ! -f "$workdir/chosen.sh" ]; then # once: a run that goes on keeps them
  chosen="$(python -m scripts.own_images "$folder")"
  printf '%s\n' "$chosen" > "$workdir/chosen.sh.tmp" && mv "$workdir/chosen.sh.tmp" "$workdir/chosen.sh"
fi
source "$workdir/chosen.sh"
echo "chosen: $(tr '\n' ' ' < "$workdir/chosen.sh")"

if [ ! -f "$workdir/data/images/1.0.0/contents.json" ]; then # which is written last
  rm -rf "$workdir/data/images/1.0.0"
  python -m scripts.prepare_dataset images --from "$folder" --to "$workdir/data" --size "$SIZE" --test "$TEST" \
    ${GREY:+--grey}
fi

# Two reflows of half the updates of the first flow, and a distillation of a quarter.
reflow=$((UPDATES / 2)) distill=$((UPDATES / 4)) channels=$([ -n "$GREY" ] && echo 1 || echo 3)
read -ra options <<< "${OPTIONS:-}"
job() {
  python main.py --config=configs/rf/small_32_rf_continuous.py --workdir="$workdir" \
    --config.data.data_dir="$workdir/data" --config.data.image_size="$SIZE" --config.data.num_channels="$channels" \
    --config.training.batch_size="$BATCH" --config.training.snapshot_freq="$UPDATES" \
    --config.training.reflow_t="$K" --config.eval.feature_network="$FEATURES" \
    --config.training.n_reflow_data="$PAIRS" "$@" ${options[@]+"${options[@]}"}
}
fixed=(--config.sampling.method=pc --config.model.num_scales="$K")
second=(--config.model.rf_phase=2)

job --mode=train --config.model.rf_phase=1 --config.training.n_iters="$UPDATES"
job --mode=train "${second[@]}" --config.training.reflow_mode=gen_reflow
job --mode=train "${second[@]}" --config.training.reflow_mode=train_reflow --config.training.n_iters="$reflow"
job --mode=train "${second[@]}" --config.training.reflow_mode=train_distill --config.training.n_iters="$distill" "${fixed[@]}"

teacher=--config.eval.teacher="$workdir/1_rf"
job --mode=eval --eval_folder=first --config.model.rf_phase=1 --config.eval.begin_step="$UPDATES" "$teacher" \
  --config.eval.samplers="ode;euler:$K"
job --mode=eval --eval_folder=distilled "${second[@]}" --config.eval.reflow_mode=eval_distill "$teacher" \
  --config.eval.begin_step="$distill" "${fixed[@]}"
job --mode=sample --eval_folder=drawn "${second[@]}" --config.eval.reflow_mode=eval_distill "${fixed[@]}"
python -m report --html "$workdir"
if [ ! -f "$workdir/model/README.md" ]; then # which is written last
  rm -rf "$workdir/model"
  python -m scripts.export "$workdir/2_distill" "$workdir/model" --name "Own pictures in $K calls" --license other
fi
echo "done: $workdir/report.html, the model in $workdir/model, samples in $workdir/drawn"
