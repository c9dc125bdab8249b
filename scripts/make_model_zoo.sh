#!/usr/bin/env bash
# Exports trained models into model_zoo/: scripts/make_model_zoo.sh [WORKDIR] [STUDY]
#
# WORKDIR (default runs/digits): of scripts/quickstart.sh. STUDY, if given: the workdir of
# `python -m study.run fashion_mnist_14 --seeds 0 --workdir STUDY`, whose models are evaluated first.
# One folder a model: EMA weights, config.json and a card with the evaluations found beside it; under 8 MB each.
set -euo pipefail
workdir=$(realpath "${1:-runs/digits}")
study="${2:+$(realpath "$2")}"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

model() { # model RUN FOLDER NAME EXPORT_OPTION...
  local run="$1" folder="$2" name="$3"; shift 3
  .venv/bin/python -m scripts.export "$run" "model_zoo/$folder" --name "$name" "$@"
}

studied() { # studied RECIPE K STEPS FOLDER NAME: a distilled model of the study, for K * STEPS calls
  local recipe="$1" k="$2" steps="$3" run="$study/fashion_mnist_14/seed_0/$1" stage=2_distill
  [ "$steps" = 1 ] || stage="2_distill_$steps"
  .venv/bin/python main.py --config=configs/rf/fashion_mnist_14_rf_continuous.py --workdir="$run" --mode=eval \
    --eval_folder=euler --config.training.reflow_t="$k" --config.training.distill_steps="$steps" \
    --config.eval.reflow_mode=eval_distill --config.sampling.method=pc --config.model.num_scales=$((k * steps)) \
    --config.eval.begin_step=1 --config.eval.num_samples=4096 --config.eval.teacher=model_zoo/fashion_mnist_14_1rf
  model "$run/$stage" "$4" "$5" --data "the 60,000 training images of Fashion-MNIST (MIT), resized to 14 x 14" \
    --command "python -m study.run fashion_mnist_14 --only $recipe/euler_$((k * steps))/seed_0 --workdir runs/study" \
    --command "bash scripts/make_model_zoo.sh runs/digits runs/study"
}

if [ -d "$workdir/1_rf" ]; then
  digits=(--data "scikit-learn's digits (8 x 8, from UCI's Optical Recognition of Handwritten Digits, CC BY 4.0)"
          --command "bash scripts/quickstart.sh" --command "bash scripts/make_model_zoo.sh")
  model "$workdir/1_rf" digits_1rf "1-RF on digits" "${digits[@]}"
  model "$workdir/2_rf" digits_2seqrf "2-SeqRF on digits" "${digits[@]}"
  model "$workdir/2_distill" digits_2seqrf_distill "2-SeqRF-Distill on digits" "${digits[@]}"
fi
if [ -n "$study" ]; then
  studied k1_m4 1 4 fashion_mnist_14_reflow_distill_4 "Plain reflow on Fashion-MNIST 14 x 14, distilled to 4 steps"
  studied k2_m1 2 1 fashion_mnist_14_2seqrf_distill "2-SeqRF-Distill on Fashion-MNIST 14 x 14"
  studied k4_m1 4 1 fashion_mnist_14_4seqrf_distill "4-SeqRF-Distill on Fashion-MNIST 14 x 14"
fi
[ -d "$workdir/1_rf" ] || [ -n "$study" ] || { echo "no model in $workdir: run scripts/quickstart.sh first" >&2; exit 2; }
# Other models have a line of the same kind here: model RUN FOLDER NAME --data DATA --command HOW_IT_WAS_TRAINED
