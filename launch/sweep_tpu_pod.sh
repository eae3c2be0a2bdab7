#!/usr/bin/env bash
# A sweep on the hosts of a TPU pod slice: each host trains its share of the runs on its own chips.
# Usage: bash launch/sweep_tpu_pod.sh [--dry_run] NAME ZONE HOSTS --config=experiments/isoflop.py:smdm --workdir=/shared/smdm
# NAME is an existing TPU VM; /shared is a file system that its hosts have mounted (Filestore or another NFS). Prints what
# it runs. After a preemption run it again with the new VM: finished runs are kept, others continue.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.sh
print_help "$@"
take_options "dry_run" "" "$@"
set -- ${words[@]+"${words[@]}"}
if [ $# -lt 5 ] || ! [[ "$3" =~ ^[1-9][0-9]*$ ]]; then
  refuse "usage: bash launch/sweep_tpu_pod.sh [--dry_run] NAME ZONE HOSTS --config=... --workdir=... (HOSTS a number)"
fi
name="$1" zone="$2" hosts="$3"
shift 3
read_training "$@"
check_experiment shipped

archive=$(mktemp -t llada.XXXXXX.tar.gz)
trap 'rm -f "$archive"' EXIT
run git archive --format=tar.gz --output="$archive" HEAD
run gcloud compute tpus tpu-vm scp "$archive" "$name:llada.tar.gz" --zone="$zone" --worker=all
for ((i = 1; i <= hosts; i++)); do
  job=$(shell_quoted bash launch/sweep_job.sh "$i" "$hosts" "$@")
  run gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker="$((i - 1))" --command \
    "mkdir -p llada && tar -xzf llada.tar.gz -C llada && cd llada && (nohup $job > ../sweep.log 2>&1 < /dev/null &)"
done
run gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=0 --command "tail -n 20 sweep.log"
