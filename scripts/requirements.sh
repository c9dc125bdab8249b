#!/usr/bin/env bash
# Makes .venv and installs requirements.txt and requirements-dev.txt into it:
# scripts/requirements.sh [cpu|cuda|tpu]. Quick when nothing changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

accelerator="${1:-cpu}"
case "$accelerator" in
  cpu) extra="" ;;
  cuda) extra="jax[cuda12]" ;;
  tpu) extra="jax[tpu]" ;;
  *) echo "error: unknown accelerator '$accelerator'; use cpu, cuda or tpu" >&2; exit 2 ;;
esac

python="${PYTHON:-python3}"
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "error: SeqRF needs Python 3.11 or newer, $python is $("$python" --version 2>&1); set PYTHON" >&2
  exit 2
fi

wanted="$accelerator $(cat requirements.txt requirements-dev.txt | sha256sum)"
stamp=.venv/seqrf-requirements
if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then exit 0; fi

[ -x .venv/bin/python ] || "$python" -m venv .venv
echo "installing requirements.txt and requirements-dev.txt for $accelerator into .venv (about 4 GB)"
# --no-compile: a minute less. What is used is compiled below, also where PYTHONDONTWRITEBYTECODE is set (as in Python's
# container images): there every start would compile its imports again.
.venv/bin/python -m pip install --quiet --no-compile --disable-pip-version-check -r requirements.txt -r requirements-dev.txt ${extra:+"$extra"}
.venv/bin/python -m pip check --disable-pip-version-check
env -u PYTHONDONTWRITEBYTECODE JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=3 .venv/bin/python -c \
  'import jax, matplotlib.pyplot, run_lib, scipy.stats, sklearn, tensorflow, tensorflow_datasets, torch, wandb' 2>/dev/null || true
echo "$wanted" > "$stamp"
