#!/usr/bin/env bash
# The study, then its page: scripts/study.sh [BENCH] [WORKDIR]
#
# Trains and measures every cell that study/results.jsonl lacks, and writes docs/choosing_k.md. Stopped at any point, it
# goes on with the cells that are missing.
set -euo pipefail
workdir="${2:-}"
case $workdir in "" | /* | *://*) ;; *) workdir="$PWD/$workdir" ;; esac  # of the folder that it is given in
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/requirements.sh

export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"  # less time in page faults (docs/accelerators.md)
workdir="${workdir:-runs/study}"
.venv/bin/python -m study.run "${1:-fashion_mnist_14}" --workdir "$workdir"
.venv/bin/python -m study.page --workdir "$workdir"
