#!/usr/bin/env bash
# Instructions on two CPU cores: pre-trains a small LLaDA and an ARM of the same size on made-up text, fine-tunes both on
# the same dialogues, has both answer held-out ones, by diffusion at once and block by block and by the ARM, and writes
# how many answers are exact into a report.
# Usage: bash launch/quickstart_sft.sh [RUN_DIR]      After Ctrl-C, run it again to continue.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
print_help "$@"
one_directory "$@"
run_dir="${1:-runs/quickstart_sft}"
run_dir="${run_dir/#\~\//$HOME/}"
checkout="$(cd "$(dirname "$0")/.." && pwd)"
# Relative to the caller's directory; inside the checkout as typed, since the report quotes it.
case "$run_dir" in /*) ;; *) [ "$PWD" = "$checkout" ] || run_dir="$PWD/$run_dir" ;; esac
cd "$checkout"
source launch/setup.sh
make_environment requirements.txt requirements-plots.txt
use_large_pages

run() { printf '\n\033[1m$ %s\033[0m\n' "$*" >&2; "$@"; }

config=experiments/quickstart_sft.py
run python experiments/instruction_tasks.py --out="$run_dir/data"
# Twins read the same rows: prepared once, and from the same tokenizer.
text=(--config.data.source="text:$run_dir/data/text.jsonl" --config.data.directory="$run_dir/data/text")
run llada train --config=$config:llada --workdir="$run_dir/base_llada" "${text[@]}"
run llada train --config=$config:arm --workdir="$run_dir/base_arm" "${text[@]}" \
  --config.data.tokenizer="$run_dir/base_llada/tokenizer.model"
for family in llada arm; do
  run llada train --config=$config:sft --init="$run_dir/base_$family" --workdir="$run_dir/$family" \
    --config.data.source="dialogues:$run_dir/data/train.jsonl" \
    --config.data.holdout_source="dialogues:$run_dir/data/held_out.jsonl" \
    --config.data.directory="$run_dir/data/dialogues"
done
evaluate=(llada evaluate --task=dialogues --draws=8 --batches=128 --generate=2000 --gen_length=16)
run "${evaluate[@]}" --workdir="$run_dir/llada" > "$run_dir/llada_pure.json"
run "${evaluate[@]}" --workdir="$run_dir/llada" --block_length=4 > "$run_dir/llada_blocks.json"
run "${evaluate[@]}" --workdir="$run_dir/arm" > "$run_dir/arm.json"
run llada compare --llada="$run_dir/llada" --arm="$run_dir/arm" --out="$run_dir"
