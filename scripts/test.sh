#!/usr/bin/env bash
# Sets up everything and runs the tests: scripts/test.sh [PYTEST ARGUMENT...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/requirements.sh any
unset PYTHONDONTWRITEBYTECODE  # modules are compiled once, not by each of the processes that tests start
# Each worker compiles on one core, and as many workers as cores; a second start finds most programs compiled.
exec .venv/bin/python -m pytest -q -n "${TEST_WORKERS:-2}" --dist loadscope --no-loadscope-reorder --durations=40 "$@"
