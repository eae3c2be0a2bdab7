#!/usr/bin/env bash
#SBATCH --job-name=llada
#SBATCH --output=llada-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@180
# Trains on several nodes under Slurm, one task per GPU; submits itself, and requeues itself until training has ended.
# Usage: bash launch/slurm.sh [--dry_run] [--sbatch='--partition=P --time=24:00:00'] NODES GPUS_A_NODE --config=... --workdir=/shared/run
# GPUS_A_NODE 0: one task per node, on its CPU. Checkout and workdir must be on a file system that all nodes share. Prints
# what it runs. Three minutes before the time limit the run saves and is requeued, as when it is preempted. After a crash it
# is requeued only if it has saved since it started; after the loss of a peer (6) also without, and after a full disk (5),
# some minutes later; not where it would fail again (2 a mistake, 3 diverged, 4 its data), nor after scancel.
set -euo pipefail

if [ -z "${SLURM_JOB_ID:-}" ]; then
  cd "$(dirname "$0")/.."
  source launch/common.sh
  print_help "$@"
  sbatch=""
  take_options "dry_run" "sbatch" "$@"
  set -- ${words[@]+"${words[@]}"}
  if [ $# -lt 3 ] || ! [[ "$1" =~ ^[1-9][0-9]*$ && "$2" =~ ^[0-9]+$ ]]; then
    refuse "usage: bash launch/slurm.sh [--dry_run] [--sbatch=FLAGS] NODES GPUS_A_NODE --config=... --workdir=... (numbers)"
  fi
  resources=(--nodes="$1" --ntasks-per-node="$2" --gpus-per-node="$2")
  [ "$2" -gt 0 ] || resources=(--nodes="$1" --ntasks-per-node=1)
  shift 2
  read_training "$@"
  check_experiment
  check_flags "$@"
  read -r -a more <<< "$sbatch"
  run sbatch "${resources[@]}" ${more[@]+"${more[@]}"} launch/slurm.sh "$@"
  exit
fi

# Slurm runs a copy of this file from its spool directory; the checkout is the directory where sbatch was called.
cd "$SLURM_SUBMIT_DIR"
source launch/common.sh
read_training "$@"
source launch/setup.sh
make_environment requirements.txt
add_accelerator
use_large_pages

before=$(newest_checkpoint "$workdir")
again=""
# Slurm itself signals the tasks of a preempted or cancelled job: nothing to forward.
trap 'signalled=yes' TERM
trap 'signalled=yes again=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
show srun --kill-on-bad-exit=1 llada train "$@"
srun --kill-on-bad-exit=1 llada train "$@" &
wait_for $!
saved=""
if [ "$(newest_checkpoint "$workdir")" != "$before" ]; then saved=yes; fi
if is_final "$status"; then
  again=""
elif [ "$status" -eq "$disk" ] && { [ -n "$saved" ] || [ "${SLURM_RESTART_COUNT:-0}" -lt "$disk_patience" ]; }; then
  echo "$(describe "$status"): requeued in $disk_pause seconds"
  sleep "$disk_pause"
  again=yes
elif [ "$status" -eq "$peer" ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "$crash_patience" ]; then
  again=yes
elif [ "$status" -ne 143 ] && [ -n "$saved" ]; then
  again=yes
fi
if [ -n "$again" ]; then run scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"
