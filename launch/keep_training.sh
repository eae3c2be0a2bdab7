#!/usr/bin/env bash
# Runs a training command and restarts it whenever it crashes; it continues from its newest checkpoint.
# Usage: bash launch/keep_training.sh COMMAND ... --workdir=DIR ...
# It is not restarted when it is done (0), where it would fail again (2 a mistake, 3 diverged, 4 its data), after Ctrl-C
# (130), or after this script has received SIGTERM. After a full disk (5) the pause is longer. After five crashes in a row
# without a new checkpoint (six for the disk) the script gives up, with the last status.
set -uo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
print_help "$@"
patience=5
pause="${PAUSE_SECONDS:-10}"
for word in "$@"; do
  case "$word" in --workdir=*) workdir="${word#--workdir=}" ;; esac
done
[ -n "$workdir" ] || refuse "usage: bash launch/keep_training.sh COMMAND ... --workdir=DIR ..."
command -v -- "$1" > /dev/null || refuse "$1 is no command; usage: bash launch/keep_training.sh COMMAND ... --workdir=DIR ..."

# SIGTERM is not forwarded: a machine that shuts down signals the whole group, and a second signal would end the command
# before it has saved.
stop=""
trap 'stop=yes signalled=yes' TERM
crashes=0
before=$(newest_checkpoint "$workdir")
while :; do
  "$@" &
  wait_for $!
  if is_final "$status"; then exit "$status"; fi
  [ -z "$stop" ] || exit "$status"
  now=$(newest_checkpoint "$workdir")
  [ "$now" = "$before" ] || crashes=0
  before="$now"
  crashes=$((crashes + 1))
  wait_seconds="$pause" most="$patience"
  if [ "$status" -eq "$disk" ]; then wait_seconds="$disk_pause" most="$disk_patience"; fi
  if [ "$crashes" -ge "$most" ]; then
    echo "status $status, $crashes times without a new checkpoint: giving up ($(describe "$status"))" >&2
    exit "$status"
  fi
  echo "status $status; again in $wait_seconds seconds, from step ${now:-0} ($(describe "$status"))" >&2
  sleep "$wait_seconds" &
  wait $!
  [ -z "$stop" ] || exit "$status"
done
