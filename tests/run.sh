#!/usr/bin/env bash
# Installs what the tests need into .venv-test/ of the checkout, then checks the code and runs the tests:
#
#   bash tests/run.sh [arguments of pytest]            all of them
#   bash tests/run.sh --quick [arguments of pytest]    those that are not marked slow, two files at a time: some two minutes
#
# PYTHON and TORCH_SPEC: see launch/venv.sh.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
quick=()
if [[ "${1:-}" == --quick ]]; then
    shift
    quick=(-q -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder)
fi
bash launch/venv.sh .venv-test test
# shellcheck source=/dev/null
source .venv-test/bin/activate

# The tests make every file that they need; no model hub is asked for anything.
export HF_HUB_OFFLINE=1
# Ranks that run side by side have a core each.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
ruff check .
ruff format --check .
mypy &
types=$!
mypy --strict --cache-dir .mypy_cache/strict lopt_pp
wait "$types"
python -m pytest "${quick[@]}" "$@"
