#!/usr/bin/env bash
# The reversal curse on two CPU cores: trains a small LLaDA and an ARM of the same size on the same statements "A is B",
# in the same order and with two seeds, asks both forward (A is ...) and backward (B is ...), and writes a page,
# RUN_DIR/reversal.md, about made-up facts; where their files are given, about couplets and a dictionary too:
#   COUPLETS=FILE  JSON list of {"first": ..., "second": ...}
#   WORDNET=DIR    directory of WordNet's data.noun: apt-get download wordnet-base && dpkg-deb -x wordnet-base*.deb .
# Usage: bash launch/quickstart_reversal.sh [RUN_DIR]      After Ctrl-C, run it again to continue.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
print_help "$@"
one_directory "$@"
run_dir="${1:-runs/quickstart_reversal}"
run_dir="${run_dir/#\~\//$HOME/}"
checkout="$(cd "$(dirname "$0")/.." && pwd)"
# Relative to the caller's directory; inside the checkout as typed, since the page quotes it.
case "$run_dir" in /*) ;; *) [ "$PWD" = "$checkout" ] || run_dir="$PWD/$run_dir" ;; esac
couplets="${COUPLETS:+$(realpath "$COUPLETS")}"
wordnet="${WORDNET:-/usr/share/wordnet}"
if [ -d "$wordnet" ]; then wordnet="$(realpath "$wordnet")"; fi
cd "$checkout"
source launch/setup.sh
make_environment requirements.txt requirements-plots.txt
use_large_pages

# The command goes to stderr: some outputs are kept.
run() { printf '\n\033[1m$ %s\033[0m\n' "$*" >&2; "$@"; }

# study KIND SCORING LENGTH [flags of reversal_data.py]: data, four runs, what they answer.
study() {
  local kind="$1" scoring="$2" dir="$run_dir/$1" write=() forward backward
  local seed family tokenizer arm questions scoring_blank
  # A statement was always padded to so many tokens: with a longer canvas LLaDA writes on.
  if [ "$scoring" != likelihood ]; then write=(--gen_length="$3"); fi
  shift 3
  run python experiments/reversal_data.py --kind="$kind" --out="$dir/data" "$@"
  forward="$(cat "$dir/data/forward.txt")" backward="$(cat "$dir/data/backward.txt")"
  for seed in 0 1; do
    for family in llada arm; do
      # Twins read the same rows: prepared once, and from the same tokenizer.
      tokenizer=() arm=""
      if [ "$family-$seed" != llada-0 ]; then tokenizer=(--config.data.tokenizer="$dir/llada-0/tokenizer.model"); fi
      if [ $family = arm ]; then arm=_arm; fi
      run llada train "--config=experiments/reversal.py:$kind$arm" --workdir="$dir/$family-$seed" --config.seed=$seed \
        --config.data.source="dialogues:$dir/data/train.jsonl" \
        --config.data.holdout_source="dialogues:$dir/data/held_out.jsonl" \
        --config.dialogues.template="$dir/data/statement.jinja" --config.data.directory="$dir/data/rows" \
        "${tokenizer[@]}"
      questions=(--forward="$forward" --backward="$backward" "${write[@]}")
      ask "$dir/$family-$seed" asked asked "${questions[@]}" --scoring="$scoring"
      # A form that is known to the one and not to the other would be no comparison.
      ask "$dir/$family-$seed" both both "${questions[@]}" --scoring="${scoring/both/generation}"
      # Not the question but the statement itself, with a gap: an ARM can only score it.
      if [ $family = arm ]; then scoring_blank=likelihood; else scoring_blank="$scoring"; fi
      ask "$dir/$family-$seed" blank asked --ask=blank --scoring="$scoring_blank" --forward="$forward"
    done
  done
}

# ask WORKDIR NAME PAIRS [flags]: WORKDIR-NAME.json.
ask() {
  local workdir="$1" name="$2" pairs="$3"
  shift 3
  # Written anew where it is missing only: what is half written has another name.
  if [ -e "$workdir-$name.json" ]; then return; fi
  run llada evaluate --task=reversal --workdir="$workdir" --facts="$(dirname "$workdir")/data/$pairs.json" --draws=16 \
    "$@" > "$workdir-$name.json.part"
  mv "$workdir-$name.json.part" "$workdir-$name.json"
}

study facts both 6
if [ -n "$couplets" ]; then
  study couplets both 8 --pairs="$couplets"
else
  echo "couplets are skipped: COUPLETS=FILE, a JSON list of {\"first\": ..., \"second\": ...}, is not given" >&2
fi
if [ -e "$wordnet/data.noun" ]; then
  study dictionary likelihood 0 --wordnet="$wordnet"
else
  echo "the dictionary is skipped: there is no $wordnet/data.noun; WORDNET=DIR says where WordNet's data files are" >&2
fi
run python experiments/reversal_report.py --run_dir="$run_dir"
