#!/usr/bin/env bash
# Sourced by the launchers: options, checks of llada's flags, printed commands, exit statuses.
# Usage: source launch/common.sh; print_help "$@"

# shellcheck disable=SC2034  # variables are read by the scripts that source this

dry_run=""   # if set, run prints and calls nothing
workdir=""   # set by read_training
config=""    # set by read_training
words=()     # set by take_options
status=0     # set by wait_for
signalled="" # set by a trap during wait_for

# Exit statuses of llada train (src/llada/errors.py) after which the same command would fail again: it is not repeated.
final_statuses=(2 3 4)
# Worth another try: a full disk later, when there may be room; a dead or hung peer, like a crash, soon.
disk=5 peer=6
pause="${PAUSE_SECONDS:-10}" disk_pause="${DISK_PAUSE_SECONDS:-600}"
crash_patience=5 disk_patience=6 # attempts without a new checkpoint before giving up

# Prints the kind of a status in one word, and its description in more.
kind_of() {
  case "$1" in
    0) echo "done" ;;
    2) echo "mistake" ;;
    3) echo "diverged" ;;
    4) echo "data" ;;
    5) echo "disk" ;;
    6) echo "peer" ;;
    129 | 143) echo "preempted" ;;
    130) echo "interrupted" ;;
    *) echo "crash" ;;
  esac
}
describe() {
  case "$(kind_of "$1")" in
    done) echo "done" ;;
    mistake) echo "a mistake in flags, config or files" ;;
    diverged) echo "training diverged" ;;
    data) echo "data damaged, or not those that the run was trained on" ;;
    disk) echo "the disk is full or failing" ;;
    peer) echo "another process died or hangs" ;;
    preempted | interrupted) echo "stopped by a signal" ;;
    *) echo "it crashed" ;;
  esac
}

# Whether the run has ended for good: done, would fail again, or Ctrl-C.
is_final() { [[ " 0 ${final_statuses[*]} 130 " == *" $1 "* ]]; }

# The arguments as one would type them, quoted where the shell would split or expand them.
shell_quoted() {
  local word line="" quote="'\\''"
  for word in "$@"; do
    if ! [[ "$word" =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then word="'${word//\'/$quote}'"; fi
    line+="${line:+ }$word"
  done
  printf '%s' "$line"
}

# Prints a command as one would type it.
show() { printf '$ %s\n' "$(shell_quoted "$@")"; }

# Prints a command and runs it.
run() {
  show "$@"
  if [ -z "$dry_run" ]; then "$@"; fi
}

# Ends with status 2 and one line about a mistake in the arguments.
refuse() {
  echo "$(basename "$0"): $*" >&2
  exit 2
}

# For --help, prints the comment at the top of the launcher.
print_help() {
  case "${1:-}" in
    --help | -h)
      sed -n -e 2,20p "$0" | sed -n -e '/^#/!q' -e '/^#SBATCH/d' -e 's/^# \{0,1\}//p'
      exit 0
      ;;
  esac
}

# Checks the arguments of a script that takes at most one directory.
one_directory() {
  [ $# -le 1 ] || refuse "one directory at most, not $*"
  case "${1:-}" in
    -*) refuse "$1 is no option here; give a directory, or nothing (--help says more)" ;;
    *://*) refuse "$1 is no directory; mount the bucket (gcsfuse), and give the path" ;;
  esac
}

# take_options "dry_run spot" "slices" "$@": --dry_run sets $dry_run, --slices=2 sets $slices; the rest is left in $words.
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
  words=("$@")
}

# Sets $workdir and $config from flags of llada train or sweep.
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
    *) refuse "--workdir=$workdir must begin with /: each host has its own working directory" ;;
  esac
}

# Checks, before a machine is created, that the experiment file exists; with "shipped" also that it is committed, since
# hosts get the committed checkout.
check_experiment() {
  local file="$config" changed
  if [ -z "$config" ]; then
    # A workdir that holds a run or an imported model needs none; here it is visible only if it is mounted.
    if [ -e "$workdir/config.json" ] || [ -e "$workdir/sweep.json" ]; then return; fi
    refuse "--config=FILE is missing: an experiment file of the checkout, such as experiments/llada_1b.py"
  fi
  if [ ! -f "$file" ]; then file="${config%:*}"; fi
  case "$config" in *://*) refuse "--config=$config is no file of the checkout" ;; esac
  case "$file" in
    /*)
      if [ -n "${1:-}" ]; then echo "# $file must exist on every host"; fi
      return
      ;;
  esac
  [ -f "$file" ] || refuse "--config=$config: there is no file $file in $PWD"
  if [ -z "${1:-}" ] || ! git rev-parse --is-inside-work-tree > /dev/null 2>&1; then return; fi
  changed=$(git status --porcelain --ignored -- "$file")
  [ -z "$changed" ] || refuse "--config=$config: $file has changes that are not committed, and hosts get what is: git add, git commit"
  changed=$(git status --porcelain | grep -c '' || true)
  if [ "$changed" -gt 0 ]; then echo "# $changed changed files are not committed and stay here (git status)"; fi
}

# Has llada train check its flags, if it is installed here and this is no dry run.
check_flags() {
  if [ -z "$dry_run" ] && [ -x .venv/bin/llada ]; then .venv/bin/llada train "$@" --print_config > /dev/null || exit 2; fi
}

# Prints the step of the newest checkpoint of a workdir, if any.
newest_checkpoint() {
  local path newest=""
  for path in "$1"/checkpoints/*; do
    path="${path##*/}"
    if [[ "$path" =~ ^[0-9]+$ ]] && [ "$path" -gt "${newest:--1}" ]; then newest="$path"; fi
  done
  echo "$newest"
}

# Waits for a child and sets $status, however many trapped signals interrupt `wait`; their traps set $signalled.
wait_for() {
  local code
  status=0
  wait "$1" || status=$?
  while [ -n "$signalled" ] || kill -0 "$1" 2> /dev/null; do
    signalled="" code=0
    wait "$1" || code=$?
    # Bash may have forgotten the child during the signal (127 or -1): then the signal's status stands.
    case "$code" in
      127 | -1) sleep 0.1 ;;
      *) status="$code" ;;
    esac
  done
}
