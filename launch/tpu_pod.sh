#!/usr/bin/env bash
# Trains on one or several joined TPU pod slices through queued resources: requests them, waits until ACTIVE, copies the
# committed checkout to all hosts, starts training on all, follows the first host's log; after a preemption, again.
# Usage: bash launch/tpu_pod.sh [OPTIONS] NAME ZONE TYPE --config=experiments/llada_8b.py --workdir=/shared/run [flags of llada train]
# TYPE is gcloud's: v5p-256, v6e-256 ... OPTIONS: --dry_run prints and calls nothing; --slices=N; --spot or --reserved;
# --runtime=VERSION; --setup=COMMAND runs on every host first ('sudo mount 10.0.0.2:/share /shared'). /shared is a file
# system that all hosts mount (Filestore, NFS, gcsfuse). Prints what it runs. Run again, it continues with the existing resource.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.sh
print_help "$@"
spot="" reserved="" slices=1 runtime="" setup=""
take_options "dry_run spot reserved" "slices runtime setup" "$@"
set -- ${words[@]+"${words[@]}"}
[ $# -ge 3 ] || refuse "usage: bash launch/tpu_pod.sh [OPTIONS] NAME ZONE TYPE --config=... --workdir=..."
kind=queued-resources name="$1" zone="$2" type="$3" field=state.state delete=(--quiet --force)
all=(--node=all --worker=all) first=(--node=0 --worker=0)
shift 3
source launch/tpu_hosts.sh
read_tpu_type
[[ "$slices" =~ ^[1-9][0-9]*$ ]] || refuse "--slices=$slices must be a number from 1 on"
[ -z "$spot" ] || [ -z "$reserved" ] || refuse "--spot and --reserved exclude each other"
read_training "$@"
check_experiment shipped
check_flags "$@"
nodes=(--node-id="$name")
if [ "$slices" -gt 1 ]; then nodes=(--node-count="$slices" --node-prefix="$name"); fi

request() {
  gcloud_tpus create "$name" "${nodes[@]}" --accelerator-type="$type" --runtime-version="$runtime" \
    ${spot:+--spot} ${reserved:+--reserved}
}

keep_on_hosts "$@"
