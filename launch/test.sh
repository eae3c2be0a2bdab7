#!/usr/bin/env bash
# Runs ruff, mypy and the tests in .venv, installing what they need first.
# Usage: bash launch/test.sh [pytest arguments]      -m fast: a sample of every room, in a minute or two
# mypy runs beside the tests where they are all of them, or -m fast. PYTHON=python3.13 makes .venv, where there is none,
# with that Python and the newest packages that setup.cfg admits.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
print_help "$@"
cd "$(dirname "$0")/.."
source launch/setup.sh
make_environment requirements.txt requirements-plots.txt requirements-hf.txt requirements-serve.txt requirements-eval.txt requirements-test.txt
install_beside transformers4 requirements-transformers4.txt
if pinned; then
  install_beside tpu requirements-tpu.txt
else
  echo "libtpu is pinned for the JAX of requirements.txt, and this is another: tests that compile for TPUs are skipped"
fi
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
export LLADA_TEST_EXTRAS=required # all are installed: a file that finds one missing fails, and is not skipped
ruff check .
ruff format --check --quiet .
types=""
if [ $# -eq 0 ] || [ "$*" = "-m fast" ]; then
  mypy src/llada > .venv/mypy.log 2>&1 &
  types=$!
fi
# Two processes, each with whole files, in the order of tests/conftest.py; PyTorch's threads beside JAX's would wait for
# each other.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
status=0
python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder "$@" || status=$?
if [ -n "$types" ]; then
  wait "$types" || { cat .venv/mypy.log; [ "$status" -ne 0 ] || status=1; }
fi
exit "$status"
