#!/usr/bin/env bash
# Sourced by the launchers: printing what is run, options, what llada has to be told, and what its exit status means.
# Usage: source launch/common.sh; print_help "$@"

dry_run=""   # with any value: say prints and calls nothing
workdir=""   # set by read_training
config=""    # likewise
words=()     # set by take_options
status=0     # set by wait_for
signalled=""     # set by a trap during wait_for

# Exit statuses of llada (src/llada/errors.py). After these the same command would end the same way: it is not run again.
final_statuses=(2 3 4)
disk=5                                     # worth another try, once there may be room
disk_pause="${DISK_PAUSE_SECONDS:-600}"
disk_patience=6                            # tries in a row without a new checkpoint

# A status in words.
describe() {
  case "$1" in
    0) echo "done" ;;
    2) echo "a mistake in what it was told" ;;
    3) echo "training diverged" ;;
    4) echo "data damaged, or not those that the run was trained on" ;;
    5) echo "the disk is full or fails" ;;
    129 | 130 | 143) echo "stopped by a signal" ;;
    *) echo "it died" ;;
  esac
}

# Whether that was its end: done, no use, or Ctrl-C.
is_final() { [[ " 0 ${final_statuses[*]} 130 " == *" $1 "* ]]; }

# Words as one would type them: 'in quotes' where a shell would split or expand them.
shell_quoted() {
  local word line="" quote="'\\''"
  for word in "$@"; do
    if ! [[ "$word" =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then word="'${word//\'/$quote}'"; fi
    line+="${line:+ }$word"
  done
  printf '%s' "$line"
}

# The command, as one would type it.
show() { printf '$ %s\n' "$(shell_quoted "$@")"; }

# The same, and then the command itself.
run() {
  show "$@"
  if [ -z "$dry_run" ]; then "$@"; fi
}

# A mistake in the arguments: one line, status 2.
refuse() {
  echo "$(basename "$0"): $*" >&2
  exit 2
}

# Prints the head of the launcher where it is asked for help.
print_help() {
  case "${1:-}" in
    --help | -h)
      sed -n -e 2,20p "$0" | sed -n -e '/^#/!q' -e '/^#SBATCH/d' -e 's/^# \{0,1\}//p'
      exit 0
      ;;
  esac
}

# Refuses arguments of a script that takes one directory at most.
one_directory() {
  [ $# -le 1 ] || refuse "one directory at most, not $*"
  case "${1:-}" in
    -*) refuse "$1 is no option here; give a directory, or nothing (--help says more)" ;;
    *://*) refuse "$1 is no directory; mount the bucket (gcsfuse), and give the path" ;;
  esac
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

# Flags of llada train or sweep, of which a launcher needs the workdir and the experiment.
read_training() {
  local word
  for word in "$@"; do
    case "$word" in
      --workdir=*) workdir="${word#--workdir=}" ;;
      --config=*) config="${word#--config=}" ;;
      --?*) ;;
      *) refuse "$word is no flag of llada; flags look like --name=value" ;;
    esac
  done
  case "$workdir" in
    "") refuse "--workdir=DIR is missing: a directory on a file system that all hosts have mounted" ;;
    *://*) refuse "--workdir=$workdir is no directory; mount the bucket (gcsfuse), or Filestore, and give the path" ;;
    /*) ;;
    *) refuse "--workdir=$workdir must begin with /: hosts have working directories of their own" ;;
  esac
}

# Refuses, before a machine is made, an experiment file that is not there; with "shipped" also one that is not committed as
# it is, for hosts get the committed checkout.
check_experiment() {
  local file="$config" changed
  if [ -z "$config" ]; then
    # A workdir that holds a run, or an imported model, needs none; seen from here only where it is mounted.
    if [ -e "$workdir/config.json" ] || [ -e "$workdir/sweep.json" ]; then return; fi
    refuse "--config=FILE is missing: an experiment file of the checkout, such as experiments/llada_1b.py"
  fi
  if [ ! -f "$file" ]; then file="${config%:*}"; fi
  case "$config" in *://*) refuse "--config=$config is no file of the checkout" ;; esac
  case "$file" in
    /*)
      if [ -n "${1:-}" ]; then echo "# $file must be there on every host"; fi
      return
      ;;
  esac
  [ -f "$file" ] || refuse "--config=$config: there is no file $file in $PWD"
  if [ -z "${1:-}" ] || ! git rev-parse --is-inside-work-tree > /dev/null 2>&1; then return; fi
  changed=$(git status --porcelain --ignored -- "$file")
  [ -z "$changed" ] || refuse "--config=$config: $file is not committed as it is, and hosts get what is: git add, git commit"
  changed=$(git status --porcelain | grep -c '' || true)
  if [ "$changed" -gt 0 ]; then echo "# what is not committed stays here: $changed files (git status)"; fi
}

# Asks llada train itself what is wrong with its flags, where it is installed here and more than printing is meant.
check_flags() {
  if [ -z "$dry_run" ] && [ -x .venv/bin/llada ]; then .venv/bin/llada train "$@" --print_config > /dev/null || exit 2; fi
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

# Sets $status to that of a process of ours, however many trapped signals come in between; their traps set $signalled.
wait_for() {
  local code
  status=0
  wait "$1" || status=$?
  while [ -n "$signalled" ] || kill -0 "$1" 2> /dev/null; do
    signalled="" code=0
    wait "$1" || code=$?
    # Bash may have lost sight of it during the signal (127, or -1): then the signal's status stands.
    case "$code" in
      127 | -1) sleep 0.1 ;;
      *) status="$code" ;;
    esac
  done
}
