#!/usr/bin/env bash
# Runs the tests in .venv, installing what they need first. Usage: bash launch/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh
make_environment requirements.txt requirements-plots.txt requirements-hf.txt requirements-test.txt
install_beside transformers4 requirements-transformers4.txt
install_beside tpu requirements-tpu.txt
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
ruff check .
ruff format --check --quiet .
exec python -m pytest "$@"
