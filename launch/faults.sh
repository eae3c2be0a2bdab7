#!/usr/bin/env bash
# Faults by the hundred (kills, full disks, damaged files, dead peers ...) and what came of them: docs/reliability.md.
# Usage: bash launch/faults.sh [--goals=R1,R4] [--share=0.1] [--seed=0] [--out=docs/reliability.md]
# The page says how long each goal takes. What is known is written as it comes, and lies as JSON beside the page:
# a suite that is stopped keeps it, and --goals replaces single rows. Status 1 where anything is wrong. As root, and with
# strace, it also fills real disks and kills at single file operations.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
print_help "$@"
goals="" share=1 seed=0 out=docs/reliability.md
take_options "" "goals share seed out" "$@"
[ "${#words[@]}" -eq 0 ] || refuse "${words[0]} is no option here; --help lists them"
case "$out" in *.md) ;; *) refuse "--out=$out must be a page, such as docs/reliability.md" ;; esac
# Relative to the caller's directory.
case "$out" in /* | docs/reliability.md) ;; *) out="$PWD/$out" ;; esac
cd "$(dirname "$0")/.."
source launch/setup.sh
make_environment requirements.txt requirements-plots.txt requirements-hf.txt requirements-serve.txt requirements-test.txt
python tests/faults/suite.py --goals="$goals" --share="$share" --seed="$seed" --out="$out"
