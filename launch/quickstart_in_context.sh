#!/usr/bin/env bash
# In-context learning on two CPU cores: trains a small LLaDA and an ARM of the same size on the same documents, each of
# which has a rule of its own, in the same order and with two seeds; asks both by `llada lm_eval` for what follows from
# 0, 1, 2, 4 and 8 examples of a new rule, and writes a page, RUN_DIR/in_context.md, with accuracy by their number.
# SEEDS="0 1 2" trains other seeds.
# Usage: bash launch/quickstart_in_context.sh [RUN_DIR]      After Ctrl-C, run it again to continue.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
print_help "$@"
one_directory "$@"
run_dir="${1:-runs/quickstart_in_context}"
run_dir="${run_dir/#\~\//$HOME/}"
checkout="$(cd "$(dirname "$0")/.." && pwd)"
# Relative to the caller's directory; inside the checkout as typed, since the page quotes it.
case "$run_dir" in /*) ;; *) [ "$PWD" = "$checkout" ] || run_dir="$PWD/$run_dir" ;; esac
cd "$checkout"
source launch/setup.sh
make_environment requirements.txt requirements-plots.txt requirements-eval.txt
use_large_pages
export HF_HUB_OFFLINE=1 # the tasks are files

tasks() { for shots in "$@"; do printf 'in_context_choice_%s,in_context_write_%s,' "$shots" "$shots"; done; }
all="$(tasks 0 1 2 4 8)"

run python experiments/in_context_data.py --out="$run_dir/data"
tokenizer=()
for seed in ${SEEDS:-0 1}; do
  for family in llada arm; do
    workdir="$run_dir/$family-$seed"
    run llada train "--config=experiments/in_context.py:$family" --workdir="$workdir" --config.seed="$seed" \
      --config.data.source="text:$run_dir/data/train.jsonl" \
      --config.data.holdout_source="text:$run_dir/data/held_out.jsonl" \
      --config.data.directory="$run_dir/data/rows" "${tokenizer[@]}"
    # All read the same rows: prepared once, and from the same tokenizer.
    if [ ${#tokenizer[@]} = 0 ]; then tokenizer=(--config.data.tokenizer="$workdir/tokenizer.model"); fi
    run llada lm_eval --workdir="$workdir" --tasks="${all%,}" --include_path="$run_dir/data" --log_samples \
      --out="$run_dir/lm_eval"
  done
done
run llada lm_eval --workdir="$run_dir" --at=all --tasks=in_context_choice_8 --limit=200 \
  --include_path="$run_dir/data" --out="$run_dir/curves"
run python experiments/in_context_report.py --run_dir="$run_dir"
