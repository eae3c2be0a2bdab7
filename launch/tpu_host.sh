#!/usr/bin/env bash
# On a TPU host, over ssh: starts training in the background, follows its log, stops it, reports its exit status.
# Usage: bash llada/launch/tpu_host.sh start SETUP --config=... --workdir=... | follow | status | stop
# Files in the home directory: llada/ (the checkout), training.log, training.lock (held while training), training.status.
set -uo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
print_help "$@"
cd || exit 1

# Whether training holds the lock. A shared lock for an instant: queries do not block each other, and a start waits.
training() { ! flock --shared --nonblock training.lock true; }

case "${1:-}" in
  start)
    [ $# -ge 3 ] || refuse "usage: bash llada/launch/tpu_host.sh start SETUP --config=... --workdir=..."
    setup="$2"
    shift 2
    if training; then
      echo "$(hostname) is training already"
      exit 0
    fi
    rm -f training.status
    if [ -n "$setup" ]; then bash -c "$setup" || exit 1; fi
    # In its own session: it survives the end of ssh, and can be signalled as one group.
    nohup setsid flock --wait 60 training.lock bash llada/launch/tpu_host.sh train "$@" >> training.log 2>&1 < /dev/null &
    echo "$!" > training.pid
    for _ in $(seq 50); do
      if training || [ -e training.status ]; then exit 0; fi
      sleep 0.1
    done
    ;;
  train)
    shift
    trap : TERM
    bash llada/launch/keep_training.sh bash llada/launch/train_job.sh "$@"
    status=$?
    # 143: the machine is shutting down and training continues on another; or `stop` writes the status itself.
    [ "$status" -eq 143 ] || echo "$status" > training.status
    ;;
  follow)
    tail -n 50 -F training.log 2> /dev/null &
    tail=$!
    while training; do sleep 1; done
    sleep 1
    kill "$tail"
    ;;
  status) cat training.status 2> /dev/null || true ;;
  stop)
    if ! training; then
      echo "$(hostname) is not training"
      exit 0
    fi
    kill -TERM -- "-$(cat training.pid)"
    while training; do sleep 1; done
    [ -e training.status ] || echo 143 > training.status
    ;;
  *)
    echo "usage: bash llada/launch/tpu_host.sh start SETUP --config=... --workdir=... | follow | status | stop" >&2
    exit 2
    ;;
esac
