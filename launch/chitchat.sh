#!/usr/bin/env bash
# Dialogues of people on two CPU cores: pre-trains a small LLaDA and an ARM of the same size on what people wrote to each
# other, fine-tunes both on the same answers, evaluates both on held-out ones before and after, has both talk to the
# users of five held-out dialogues, and writes a report.
# Usage: bash launch/chitchat.sh [RUN_DIR]      After Ctrl-C, run it again to continue.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
print_help "$@"
one_directory "$@"
run_dir="${1:-runs/chitchat}"
run_dir="${run_dir/#\~\//$HOME/}"
checkout="$(cd "$(dirname "$0")/.." && pwd)"
# Relative to the caller's directory; inside the checkout as typed, since the report quotes it.
case "$run_dir" in /*) ;; *) [ "$PWD" = "$checkout" ] || run_dir="$PWD/$run_dir" ;; esac
cd "$checkout"
source launch/setup.sh
make_environment requirements.txt requirements-plots.txt requirements-chitchat.txt
use_large_pages

# The command goes to stderr: some outputs are kept.
run() { printf '\n\033[1m$ %s\033[0m\n' "$*" >&2; "$@"; }

config=experiments/chitchat.py
data="$run_dir/data"
run python experiments/chitchat_data.py --out="$data"
# Twins read the same rows: prepared once, and from the same tokenizer.
text=(--config.data.source="text:$data/text.jsonl" --config.data.directory="$data/text")
run llada train --config=$config:base --workdir="$run_dir/base_llada" "${text[@]}"
run llada train --config=$config:base_arm --workdir="$run_dir/base_arm" "${text[@]}" \
  --config.data.tokenizer="$run_dir/base_llada/tokenizer.model"
for family in llada arm; do
  run llada train --config=$config:sft --init="$run_dir/base_$family" --workdir="$run_dir/$family" \
    --config.data.source="dialogues:$data/train.jsonl" --config.data.holdout_source="dialogues:$data/held_out.jsonl" \
    --config.data.directory="$data/dialogues"
done
evaluate=(llada evaluate --task=dialogues --draws=4 --batches=128)
chat=(llada chat --json --gen_length=32 --temperature=0.7 --trim)
for family in llada arm; do
  options=()
  if [ $family = llada ]; then options=(--block_length=8); fi
  # Step 0 is the base model behind the template of the dialogues.
  run "${evaluate[@]}" --workdir="$run_dir/$family" --step=0 > "$run_dir/$family-before.json"
  run "${evaluate[@]}" --workdir="$run_dir/$family" > "$run_dir/$family-after.json"
  run "${chat[@]}" "${options[@]}" --workdir="$run_dir/$family" < "$data/questions.txt" > "$run_dir/$family-replies.jsonl"
done
run python experiments/chitchat_report.py --run_dir="$run_dir" --chat="${chat[*]}"
