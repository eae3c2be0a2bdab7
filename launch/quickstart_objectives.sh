#!/usr/bin/env bash
# Training objectives ranked on two CPU cores: trains plain LLaDA and every variant of experiments/objectives.py with
# three seeds, the first of the ranking beside the ARM under several budgets, and an ARM that judges what they write;
# measures why they differ and writes a page, RUN_DIR/page/report.md.
# Usage: bash launch/quickstart_objectives.sh [RUN_DIR]      After Ctrl-C, run it again to continue.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
print_help "$@"
one_directory "$@"
run_dir="${1:-runs/objectives}"
run_dir="${run_dir/#\~\//$HOME/}"
checkout="$(cd "$(dirname "$0")/.." && pwd)"
# Relative to the caller's directory; inside the checkout as typed, since the page quotes it.
case "$run_dir" in /*) ;; *) [ "$PWD" = "$checkout" ] || run_dir="$PWD/$run_dir" ;; esac
cd "$checkout"
source launch/setup.sh
make_environment requirements.txt requirements-plots.txt
use_large_pages

run() { printf '\n\033[1m$ %s\033[0m\n' "$*"; "$@"; }

# The page gives the time of all calls together, without that of making the environment.
mkdir -p "$run_dir"
SECONDS=0
trap 'echo "$SECONDS" >> "$run_dir/seconds.txt"' EXIT

config=experiments/objectives.py
echo "132 runs that rank ten variants, then 28 of the first one beside plain LLaDA and the ARM; each sweep tells its time"
run llada sweep --config=$config:quick --workdir="$run_dir/ranking"
winner="$(python experiments/objectives_report.py --run_dir="$run_dir" --winner)"
run llada sweep --config=$config:"$winner" --workdir="$run_dir/$winner"
run llada train --config=$config:judge --workdir="$run_dir/judge" --config.data.directory="$run_dir/ranking/data" \
  --config.data.tokenizer="$run_dir/ranking/tokenizer.model"
run python experiments/objectives_measure.py --ranking="$run_dir/ranking" --judge="$run_dir/judge" \
  --out="$run_dir/measured.json"
seconds=$SECONDS
if [ -e "$run_dir/seconds.txt" ]; then
  while read -r before; do seconds=$((seconds + before)); done < "$run_dir/seconds.txt"
fi
run python experiments/objectives_report.py --run_dir="$run_dir" --seconds="$seconds"
