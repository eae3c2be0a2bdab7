#!/usr/bin/env bash
# Runs llada train on this machine, in an environment that it creates.
# Usage: bash launch/train_job.sh --config=... --workdir=... [flags of llada train]
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
print_help "$@"
[[ "${1:-}" == --* ]] || refuse "usage: bash launch/train_job.sh --config=... --workdir=..."
cd "$(dirname "$0")/.."
source launch/setup.sh
make_environment requirements.txt
add_accelerator
use_large_pages
set -x
exec llada train "$@"
