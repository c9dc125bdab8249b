#!/usr/bin/env bash
# Exports what scripts/quickstart.sh trained into model_zoo/: scripts/make_model_zoo.sh [WORKDIR] (default runs/digits)
#
# One folder a model: EMA weights, config.json and a card with the evaluations found in WORKDIR; under 8 MB each.
set -euo pipefail
workdir=$(realpath "${1:-runs/digits}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."

model() { # model RUN FOLDER NAME EXPORT_OPTION...
  local run="$1" folder="$2" name="$3"; shift 3
  .venv/bin/python scripts/export.py "$run" "model_zoo/$folder" --name "$name" "$@"
}

digits=(--data "scikit-learn's digits (8 x 8, from UCI's Optical Recognition of Handwritten Digits, CC BY 4.0)"
        --command "bash scripts/quickstart.sh" --command "bash scripts/make_model_zoo.sh")
model "$workdir/1_rf" digits_1rf "1-RF on digits" "${digits[@]}"
model "$workdir/2_rf" digits_2seqrf "2-SeqRF on digits" "${digits[@]}"
model "$workdir/2_distill" digits_2seqrf_distill "2-SeqRF-Distill on digits" "${digits[@]}"
# Other models have a line of the same kind here: model RUN FOLDER NAME --data DATA --command HOW_IT_WAS_TRAINED
