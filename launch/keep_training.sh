#!/usr/bin/env bash
# Runs a training command and restarts it whenever another try may help; it continues from its newest checkpoint.
# Usage: bash launch/keep_training.sh COMMAND ... --workdir=DIR ...
# It is not restarted when it is done (0), where it would fail again (2 a mistake, 3 diverged, 4 its data), after Ctrl-C
# (130), or after this script has received SIGTERM or SIGHUP. After a preemption (143, 129) it always is; after a crash or
# the loss of a peer (6) five times in a row without a new checkpoint; after a full disk (5) six times, with longer pauses.
# Then the script gives up, with the last status.
set -uo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
print_help "$@"
for word in "$@"; do
  case "$word" in --workdir=*) workdir="${word#--workdir=}" ;; esac
done
[ -n "$workdir" ] || refuse "usage: bash launch/keep_training.sh COMMAND ... --workdir=DIR ..."
command -v -- "$1" > /dev/null || refuse "$1 is no command; usage: bash launch/keep_training.sh COMMAND ... --workdir=DIR ..."

# Signals are not forwarded: a machine that shuts down, and a terminal, signal the whole group, and a second signal would
# end the command before it has saved. Bash lets background commands ignore SIGINT; the subshell takes that back.
stop=""
trap 'stop=yes signalled=yes' TERM INT HUP
crashes=0
before=$(newest_checkpoint "$workdir")
while :; do
  (trap - INT && exec "$@") &
  wait_for $!
  if is_final "$status"; then exit "$status"; fi
  [ -z "$stop" ] || exit "$status"
  now=$(newest_checkpoint "$workdir")
  [ "$now" = "$before" ] || crashes=0
  before="$now"
  wait_seconds="$pause" most="$crash_patience"
  case "$(kind_of "$status")" in
    preempted) ;;
    disk) crashes=$((crashes + 1)) wait_seconds="$disk_pause" most="$disk_patience" ;;
    *) crashes=$((crashes + 1)) ;;
  esac
  if [ "$crashes" -ge "$most" ]; then
    echo "status $status, $crashes times without a new checkpoint: giving up ($(describe "$status"))" >&2
    exit "$status"
  fi
  echo "status $status; again in $wait_seconds seconds, from step ${now:-0} ($(describe "$status"))" >&2
  sleep "$wait_seconds" &
  wait $!
  [ -z "$stop" ] || exit "$status"
done
