#!/usr/bin/env bash
# Runs a training command, and again whenever it dies: it goes on from its newest checkpoint.
# Usage: bash launch/keep_training.sh COMMAND ... --workdir=DIR ...
# Not again after its end (0), a mistake in what it was told (2), Ctrl-C (130), or once this script has had a SIGTERM itself.
# After five deaths in a row without a new checkpoint it gives up, with the last status.
set -uo pipefail
# shellcheck source=launch/say.sh
source "$(dirname "$0")/say.sh"
patience=5
pause="${PAUSE_SECONDS:-10}"
for word in "$@"; do
  case "$word" in --workdir=*) workdir="${word#--workdir=}" ;; esac
done
[ -n "$workdir" ] || refuse "usage: bash launch/keep_training.sh COMMAND ... --workdir=DIR ..."

# The signal is not passed on: whoever stops a machine or a group tells the command too, and a second one would kill it unsaved.
stop=""
trap 'stop=yes heard=yes' TERM
deaths=0
before=$(newest_checkpoint "$workdir")
while :; do
  "$@" &
  wait_for $!
  case "$status" in 0 | 2 | 130) exit "$status" ;; esac
  [ -z "$stop" ] || exit "$status"
  now=$(newest_checkpoint "$workdir")
  [ "$now" = "$before" ] || deaths=0
  before="$now"
  deaths=$((deaths + 1))
  if [ "$deaths" -ge "$patience" ]; then
    echo "status $status, $deaths times without a new checkpoint: giving up" >&2
    exit "$status"
  fi
  echo "status $status; again in $pause seconds, from step ${now:-0}" >&2
  sleep "$pause" &
  wait $!
  [ -z "$stop" ] || exit "$status"
done
