#!/usr/bin/env bash
# Runs the tests in .venv, installing what they need first. Usage: bash launch/test.sh [pytest arguments]
set -euo pipefail
source "$(dirname "$0")/say.sh"
give_help "$@"
cd "$(dirname "$0")/.."
source launch/setup.sh
make_environment requirements.txt requirements-plots.txt requirements-hf.txt requirements-test.txt
install_beside transformers4 requirements-transformers4.txt
install_beside tpu requirements-tpu.txt
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
ruff check .
ruff format --check --quiet .
# Two processes, each with whole files, in the order of tests/conftest.py; PyTorch's threads beside JAX's would wait for
# each other.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder "$@"
