#!/usr/bin/env bash
# Scaling laws of LLaDA and ARM on two CPU cores: trains the grid of experiments/isoflop.py:quick, fits, plots, reports.
# Usage: bash launch/quickstart_sweep.sh [SWEEP_DIR]      After Ctrl-C, run it again to continue.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
print_help "$@"
one_directory "$@"
sweep_dir="${1:-runs/isoflop}"
sweep_dir="${sweep_dir/#\~\//$HOME/}"
checkout="$(cd "$(dirname "$0")/.." && pwd)"
# Relative to the caller's directory; inside the checkout as typed, since the report quotes it.
case "$sweep_dir" in /*) ;; *) [ "$PWD" = "$checkout" ] || sweep_dir="$PWD/$sweep_dir" ;; esac
cd "$checkout"
source launch/setup.sh
make_environment requirements.txt requirements-plots.txt
use_large_pages

run() { printf '\n\033[1m$ %s\033[0m\n' "$*"; "$@"; }

run llada sweep --config=experiments/isoflop.py:quick --workdir="$sweep_dir" --predict=1e13
