#!/usr/bin/env bash
# Sourced by the launchers: printing what is run, options, and what llada train has to be told.
# Usage: source launch/say.sh

dry_run=""   # with any value: say prints and calls nothing
workdir=""   # set by read_training
words=()     # set by take_options
status=0     # set by wait_for
heard=""     # set by a trap during wait_for

# Words as one would type them: 'in quotes' where a shell would split or expand them.
typed() {
  local word line="" quote="'\\''"
  for word in "$@"; do
    if ! [[ "$word" =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then word="'${word//\'/$quote}'"; fi
    line+="${line:+ }$word"
  done
  printf '%s' "$line"
}

# The command, as one would type it.
show() { printf '$ %s\n' "$(typed "$@")"; }

# The same, and then the command itself.
say() {
  show "$@"
  if [ -z "$dry_run" ]; then "$@"; fi
}

# A mistake in the arguments: one line, status 2.
refuse() {
  echo "$(basename "$0"): $*" >&2
  exit 2
}

# take_options "dry_run spot" "slices" "$@": --dry_run sets $dry_run, --slices=2 sets $slices; what follows goes to $words.
take_options() {
  local flags=" $1 " values=" $2 " name allowed=()
  for name in $1; do allowed+=("--$name"); done
  for name in $2; do allowed+=("--$name=..."); done
  shift 2
  while [[ "${1:-}" == --* ]]; do
    name="${1#--}"
    name="${name%%=*}"
    if [[ "$flags" == *" $name "* && "$1" != *=* ]]; then
      printf -v "$name" yes
    elif [[ "$values" == *" $name "* && "$1" == *=?* ]]; then
      printf -v "$name" '%s' "${1#*=}"
    else
      refuse "$1 is no option here; before the first plain word go ${allowed[*]}"
    fi
    shift
  done
  # shellcheck disable=SC2034
  words=("$@")
}

# Flags of llada train, of which a launcher needs the workdir.
read_training() {
  local word
  for word in "$@"; do
    case "$word" in
      --workdir=*) workdir="${word#--workdir=}" ;;
      --?*) ;;
      *) refuse "$word is no flag of llada train; flags look like --name=value" ;;
    esac
  done
  case "$workdir" in
    "") refuse "--workdir=DIR is missing: a directory on a file system that all hosts have mounted" ;;
    *://*) refuse "--workdir=$workdir is no directory; mount the bucket (gcsfuse), or Filestore, and give the path" ;;
    /*) ;;
    *) refuse "--workdir=$workdir must begin with /: hosts have working directories of their own" ;;
  esac
}

# The step of the newest checkpoint of a workdir, or nothing.
newest_checkpoint() {
  local path newest=""
  for path in "$1"/checkpoints/*; do
    path="${path##*/}"
    if [[ "$path" =~ ^[0-9]+$ ]] && [ "$path" -gt "${newest:--1}" ]; then newest="$path"; fi
  done
  echo "$newest"
}

# Sets $status to that of a process of ours, however many trapped signals come in between; their traps set $heard.
wait_for() {
  local code
  status=0
  wait "$1" || status=$?
  while [ -n "$heard" ] || kill -0 "$1" 2> /dev/null; do
    heard="" code=0
    wait "$1" || code=$?
    # Bash may have lost sight of it during the signal (127, or -1): then the signal's status stands.
    case "$code" in
      127 | -1) sleep 0.1 ;;
      *) status="$code" ;;
    esac
  done
}
