#!/usr/bin/env bash
# Runs job I of N of a sweep on this machine, in an environment that it creates, with JAX's TPU or GPU support.
# Usage: bash launch/sweep_job.sh I N --config=... --workdir=SHARED_DIR [flags of llada sweep]
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
print_help "$@"
if [ $# -lt 3 ] || ! [[ "$1" =~ ^[1-9][0-9]*$ && "$2" =~ ^[1-9][0-9]*$ ]] || [ "$1" -gt "$2" ]; then
  refuse "usage: bash launch/sweep_job.sh I N --config=... --workdir=... (I and N numbers, I up to N)"
fi
share="$1/$2"
shift 2
cd "$(dirname "$0")/.."
source launch/setup.sh
make_environment requirements.txt requirements-plots.txt
add_accelerator
use_large_pages
# Each host of a pod works alone here, on its own chips only: four on hosts of pods.
if has_tpu; then
  export TPU_PROCESS_BOUNDS=1,1,1 TPU_CHIPS_PER_PROCESS_BOUNDS="${TPU_CHIPS_PER_PROCESS_BOUNDS:-2,2,1}"
fi
set -x
exec llada sweep "$@" --only="$share"
