#!/usr/bin/env bash
#SBATCH --job-name=llada-sweep
#SBATCH --output=sweep-%A-%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@120
# A sweep as a Slurm array: every task trains its share of the runs, in one directory on a shared file system.
# Usage: sbatch --array=1-8 --gres=gpu:1 launch/sweep_slurm.sh --config=experiments/isoflop.py:smdm --workdir=/shared/smdm
# A preempted task is requeued and continues from its checkpoints. Run it from the checkout.
set -euo pipefail
case "${1:-}" in --help | -h) sed -n '2,12s/^# //p' "$0" && exit 0 ;; esac
if [ -z "${SLURM_ARRAY_TASK_ID:-}" ]; then
  echo "this is a Slurm array job: sbatch --array=1-8 $0 --config=... --workdir=..." >&2
  exit 2
fi
# shellcheck disable=SC2153
task=$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN + 1))
# Slurm runs a copy of this file from its spool directory; the checkout is where sbatch was called.
srun --ntasks=1 bash "$SLURM_SUBMIT_DIR/launch/sweep_job.sh" "$task" "$SLURM_ARRAY_TASK_COUNT" "$@"
