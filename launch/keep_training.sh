#!/usr/bin/env bash
# Runs a training command, and again whenever it dies: it goes on from its newest checkpoint.
# Usage: bash launch/keep_training.sh COMMAND ... --workdir=DIR ...
# Not again after its end (0), where it would end the same way (2 a mistake, 3 diverged, 4 its data), after Ctrl-C (130), or
# once this script has had a SIGTERM itself. A full disk (5) gets longer pauses. After five deaths in a row without a new
# checkpoint (six of the disk) it gives up, with the last status.
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

# The signal is not passed on: whoever stops a machine or a group tells the command too, and a second one would kill it unsaved.
stop=""
trap 'stop=yes signalled=yes' TERM
deaths=0
before=$(newest_checkpoint "$workdir")
while :; do
  "$@" &
  wait_for $!
  if is_final "$status"; then exit "$status"; fi
  [ -z "$stop" ] || exit "$status"
  now=$(newest_checkpoint "$workdir")
  [ "$now" = "$before" ] || deaths=0
  before="$now"
  deaths=$((deaths + 1))
  wait_seconds="$pause" most="$patience"
  if [ "$status" -eq "$disk" ]; then wait_seconds="$disk_pause" most="$disk_patience"; fi
  if [ "$deaths" -ge "$most" ]; then
    echo "status $status, $deaths times without a new checkpoint: giving up ($(describe "$status"))" >&2
    exit "$status"
  fi
  echo "status $status; again in $wait_seconds seconds, from step ${now:-0} ($(describe "$status"))" >&2
  sleep "$wait_seconds" &
  wait $!
  [ -z "$stop" ] || exit "$status"
done
