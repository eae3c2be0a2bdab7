#!/usr/bin/env bash
# Sourced by tpu_vm.sh and tpu_pod.sh: keeps training on a TPU resource that may be preempted, until training ends.
# Usage: set the variables checked below, define `request`, source launch/tpu_hosts.sh; keep_on_hosts FLAGS_OF_LLADA_TRAIN

poll="${POLL_SECONDS:-30}"
patience=20   # polls of a resource that is up and does not train, before giving up
ended="" state=""
# kind: gcloud's resource type; field: of its state; all, first: flags that name workers; delete: flags of delete.
: "${kind:?}" "${name:?}" "${zone:?}" "${field:?}" "${all[0]:?}" "${first[0]:?}" "${delete[0]:?}" "${type:?}" "${setup?}"

gcloud_tpus() { run gcloud compute tpus "$kind" "$@" --zone="$zone"; }
show_tpus() { show gcloud compute tpus "$kind" "$@" --zone="$zone"; }

# Checks $type and sets $runtime, the software version of its VMs, unless it is given.
read_tpu_type() {
  [[ "$type" =~ ^[a-z0-9]+-[0-9]+$ ]] || refuse "TYPE $type must be one of gcloud's accelerator types, like v5p-256"
  [ -z "$runtime" ] || return 0
  case "$type" in
    v2-* | v3-* | v4-*) runtime=tpu-ubuntu2204-base ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    *) refuse "TYPE $type: the software version of its VMs is not known; give --runtime=VERSION" ;;
  esac
}

# Sets $state: gcloud's, NONE if there is no such resource, UNKNOWN if gcloud failed. Prints the command once, then changes.
look() {
  local answer before="$state" errors
  local ask=(gcloud compute tpus "$kind" describe "$name" --zone="$zone" --format="value($field)")
  if [ -z "$before" ]; then show "${ask[@]}"; fi
  if [ -n "$dry_run" ]; then return; fi
  errors=$(mktemp -t llada.XXXXXX)
  if answer=$("${ask[@]}" 2> "$errors"); then
    state="$answer"
  elif grep -q -i -e NOT_FOUND -e "not found" "$errors"; then
    state=NONE
  else
    state=UNKNOWN
    cat "$errors" >&2
  fi
  rm -f "$errors"
  [ "$state" = "$before" ] || echo "$name is $state"
}

# Copies the committed checkout to all hosts, starts training where it is not running, follows the log. Sets $ended.
train_on_hosts() {
  local archive host="bash llada/launch/tpu_host.sh" workers=() status
  local unpack="if flock --shared --nonblock training.lock true; then mkdir -p llada && tar -xzf llada.tar.gz -C llada; fi"
  archive=$(mktemp -t llada.XXXXXX.tar.gz)
  run git archive --format=tar.gz --output="$archive" HEAD &&
    gcloud_tpus scp "$archive" "$name:llada.tar.gz" "${all[@]}" &&
    gcloud_tpus ssh "$name" "${all[@]}" --command="$unpack && $host start $(shell_quoted "$setup" "$@")"
  status=$?
  rm -f "$archive"
  [ "$status" -eq 0 ] || return 1
  echo "# Ctrl-C leaves it running; to save and stop:"
  show_tpus ssh "$name" "${all[@]}" --command="$host stop"
  gcloud_tpus ssh "$name" "${first[@]}" --command="$host follow" || true
  workers=("${first[@]}" --command="$host status")
  if [ -n "$dry_run" ]; then
    gcloud_tpus ssh "$name" "${workers[@]}"
    ended=0
  else
    ended=$(gcloud compute tpus "$kind" ssh "$name" --zone="$zone" "${workers[@]}" 2> /dev/null | tail -n 1 | tr -d '\r')
    [[ "$ended" =~ ^[0-9]+$ ]] || ended=""
  fi
}

remove() { gcloud_tpus delete "$name" "${delete[@]}"; }

# Requests the resource, trains there, and requests it again after a preemption, until training has ended.
keep_on_hosts() {
  local idle=0 failed=0 had="" began
  if [ -n "$dry_run" ]; then
    look
    request
    train_on_hosts "$@"
    echo "# when it is preempted (PREEMPTED, TERMINATED, SUSPENDED, FAILED), followed by all of the above again:"
    remove
    exit 0
  fi
  while :; do
    look
    case "$state" in
      NONE)
        if ! request && [ -z "$had" ]; then
          echo "$name was not granted" >&2
          exit 1
        fi
        ;;
      READY | ACTIVE)
        had=yes failed=0 began="$SECONDS"
        train_on_hosts "$@" || true
        if [ -n "$ended" ]; then
          echo "# training ended with status $ended ($(describe "$ended")); $name still exists, to delete it:"
          show_tpus delete "$name" "${delete[@]}"
          exit "$ended"
        fi
        idle=$((SECONDS - began > 600 ? 0 : idle + 1))
        ;;
      PREEMPTED | TERMINATED | SUSPENDED | FAILED)
        idle=0
        if [ "$state" = FAILED ]; then failed=$((failed + 1)); fi
        if [ "$failed" -ge 3 ]; then
          echo "$name FAILED $failed times in a row; gcloud compute tpus $kind describe $name --zone=$zone says why" >&2
          exit 1
        fi
        remove || true
        continue
        ;;
      STOPPED) gcloud_tpus start "$name" || true ;;
      UNKNOWN) idle=$((idle + 1)) ;;
    esac
    if [ "$idle" -ge "$patience" ]; then
      echo "$name is $state and does not train, after $idle tries" >&2
      exit 1
    fi
    sleep "$poll"
  done
}
