#!/usr/bin/env bash
# Trains on one TPU VM: creates it or uses the existing one, copies the committed checkout, starts training, follows its log.
# Usage: bash launch/tpu_vm.sh [OPTIONS] NAME ZONE TYPE --config=experiments/llada_1b.py --workdir=/shared/run [flags of llada train]
# TYPE is gcloud's: v6e-8, v5litepod-8, v5p-8 ... OPTIONS: --dry_run prints and calls nothing; --spot; --runtime=VERSION;
# --setup=COMMAND runs on every host first ('sudo mount 10.0.0.2:/share /shared'). Prints what it runs. Training
# survives the loss of ssh; run this again to follow it. A preempted VM is deleted and created again: with --spot keep the
# workdir elsewhere.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.sh
print_help "$@"
spot="" runtime="" setup=""
take_options "dry_run spot" "runtime setup" "$@"
set -- ${words[@]+"${words[@]}"}
[ $# -ge 3 ] || refuse "usage: bash launch/tpu_vm.sh [OPTIONS] NAME ZONE TYPE --config=... --workdir=..."
kind=tpu-vm name="$1" zone="$2" type="$3" field=state delete=(--quiet)
all=(--worker=all) first=(--worker=0)
shift 3
source launch/tpu_hosts.sh
read_tpu_type
read_training "$@"
check_experiment shipped
check_flags "$@"

request() {
  gcloud_tpus create "$name" --accelerator-type="$type" --version="$runtime" ${spot:+--spot}
}

keep_on_hosts "$@"
