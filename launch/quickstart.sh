#!/usr/bin/env bash
# Trains a small LLaDA and an ARM of the same size on the same tokens, evaluates both, writes samples, curves and a report,
# and exports the LLaDA for PyTorch.
# Usage: bash launch/quickstart.sh [RUN_DIR]      After Ctrl-C, run it again to continue.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
print_help "$@"
one_directory "$@"
run_dir="${1:-runs/quickstart}"
run_dir="${run_dir/#\~\//$HOME/}"
case "$run_dir" in /*) ;; *) run_dir="$PWD/$run_dir" ;; esac
cd "$(dirname "$0")/.."
source launch/setup.sh
make_environment requirements.txt requirements-plots.txt requirements-hf.txt
use_large_pages

run() { printf '\n\033[1m$ %s\033[0m\n' "$*"; "$@"; }

run llada train --config=experiments/quickstart.py:llada --workdir="$run_dir/llada"
# The ARM gets LLaDA's tokenizer: nats per token compare only over the same tokens.
run llada train --config=experiments/quickstart.py:arm --workdir="$run_dir/arm" \
  --config.data.tokenizer="$run_dir/llada/tokenizer.model"
run llada evaluate --workdir="$run_dir/llada" --draws=8 --batches=64
run llada evaluate --workdir="$run_dir/arm" --batches=64
run llada compare --llada="$run_dir/llada" --arm="$run_dir/arm" --out="$run_dir"
run llada export --workdir="$run_dir/llada" --out="$run_dir/export" --overwrite
