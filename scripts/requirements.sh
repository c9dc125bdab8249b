#!/usr/bin/env bash
# Makes .venv and installs into it what SeqRF needs; quick when nothing changed:
#
#     scripts/requirements.sh [--minimal] [--show] [cpu|cuda|tpu|any]
#
# Without an accelerator's name: for the one that .venv is for already, else for the one of this machine (an NVIDIA
# driver, a TPU). any: whatever .venv is for, else cpu; tests ask so. --minimal: what training on the digits, pairs and
# sampling need: no PyTorch, TensorFlow or wandb. --show prints what would be installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

all="requirements-minimal.txt requirements.txt requirements-dev.txt"
files="$all" set=full show="" accelerator=""
for argument in "$@"; do
  case "$argument" in
    --minimal) files=requirements-minimal.txt set=minimal ;;
    --show) show=1 ;;
    cpu | cuda | tpu | any) accelerator="$argument" ;;
    *) echo "error: unknown argument '$argument'; use --minimal, --show, cpu, cuda, tpu or any" >&2; exit 2 ;;
  esac
done

here="${SEQRF_MACHINE:-}"  # the root folder of the machine that is looked at, for tests

machine() { # the accelerator of this machine
  if [ -e "$here/proc/driver/nvidia/version" ] || [ -e "$here/dev/nvidiactl" ] || [ -e "$here/dev/nvidia0" ] ||
    { [ -e "$here/dev/dxg" ] && [ -x "$here/usr/lib/wsl/lib/nvidia-smi" ]; }; then
    echo cuda
  elif [ -e "$here/dev/accel0" ] || [ -n "${TPU_ACCELERATOR_TYPE:-}${TPU_NAME:-}" ] || has_tpu_chip; then
    echo tpu
  else
    echo cpu
  fi
}

has_tpu_chip() { # whether a PCI device is of Google and one of its TPUs, as JAX looks for them
  local device
  for device in "$here"/sys/bus/pci/devices/*; do
    if grep -qs 0x1ae0 "$device/vendor" && grep -qsE '0x00(27|56|5e|62|63|6f|76)' "$device/device"; then return 0; fi
  done
  return 1
}

stamp=.venv/seqrf-requirements  # ACCELERATOR SET HASH; SET is missing where an earlier version wrote it
read -r had had_set had_hash 2>/dev/null < "$stamp" || true
case "${had_set:-full}" in full | minimal) ;; *) had_hash="$had_set" had_set=full ;; esac
case "$accelerator" in
  "") accelerator="${had:-$(machine)}" ;;
  any) accelerator="${had:-cpu}" ;;
esac
if [ "${had:-}" = "$accelerator" ] && [ "${had_set:-}" = full ]; then # which holds the minimal one
  files="$all" set=full
fi
case "$accelerator" in cpu) extra="" ;; cuda) extra="jax[cuda12]" ;; tpu) extra="jax[tpu]" ;; esac
if [ -n "$show" ]; then echo "$accelerator $set${extra:+ $extra}"; exit 0; fi

python="${PYTHON:-python3}"
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "error: SeqRF needs Python 3.11 or newer, $python is $("$python" --version 2>&1); set PYTHON" >&2
  exit 2
fi

# shellcheck disable=SC2086
hash="$(cat $all | sha256sum)"
if [ "${had:-} ${had_set:-} ${had_hash:-}" = "$accelerator $set ${hash%% *}" ]; then exit 0; fi

[ -x .venv/bin/python ] || "$python" -m venv .venv
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }
size="about 4 GB"; [ $set = full ] || size="about 1 GB"
echo "installing $files for $accelerator into .venv ($size)"

# PyTorch only reads and writes checkpoints here. Its wheel on PyPI for Linux brings a CUDA of its own, some 3 GB, beside
# JAX's; its own index has one without. In a call of its own with that index alone: as an extra index it could give any
# package.
index=https://download.pytorch.org/whl/cpu
answers() { timeout 8 .venv/bin/python -c "import urllib.request; urllib.request.urlopen('$index/torch/', timeout=5)" 2>/dev/null; }
if [ $set = full ] && [ "$(uname -s)" = Linux ] && ! .venv/bin/python -c 'import torch' 2>/dev/null && answers; then
  pip install --quiet --no-compile --no-deps --index-url "$index" "$(grep '^torch==' requirements.txt)" ||
    echo "PyTorch's own index has failed; its wheel of PyPI is taken"
fi
# --no-compile: a minute less. What is used is compiled below, also where PYTHONDONTWRITEBYTECODE is set (as in Python's
# container images): there every start would compile its imports again.
# shellcheck disable=SC2046,SC2086
pip install --quiet --no-compile $(printf -- '-r %s ' $files) ${extra:+"$extra"}
pip check
imported="jax, matplotlib.pyplot, run_lib, scipy.stats, sklearn"
[ $set = minimal ] || imported="$imported, tensorflow, tensorflow_datasets, torch, wandb"
env -u PYTHONDONTWRITEBYTECODE JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=3 .venv/bin/python -c "import $imported" 2>/dev/null || true
echo "$accelerator $set ${hash%% *}" > "$stamp"
