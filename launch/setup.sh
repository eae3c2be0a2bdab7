#!/usr/bin/env bash
# Sourced by the other scripts: makes or reuses .venv in the checkout from requirements.txt and activates it.
# Usage: source launch/setup.sh; make_environment FILE.txt ...; install_beside NAME FILE.txt

make_environment() {
  local python="" candidate wanted stamp
  if [ ! -x .venv/bin/python ]; then
    for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python; do
      if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python="$candidate"
        break
      fi
    done
    if [ -z "$python" ]; then
      echo "llada needs Python 3.11 or newer; none found. Name one: PYTHON=/path/to/python3.11 bash $0" >&2
      return 2
    fi
    echo "making .venv with $("$python" --version)"
    "$python" -m venv .venv || return 1
  fi
  # Installing is skipped where the same requirements were installed before.
  wanted=$(cat "$@" setup.cfg pyproject.toml | cksum)
  stamp=.venv/installed.cksum
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing $* into .venv"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check $(printf -- '-r %s ' "$@") || return 1
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable . || return 1
    echo "$wanted" > "$stamp"
  fi
  # shellcheck disable=SC1091
  source .venv/bin/activate
}

# Packages that exclude some of .venv's, for a process of their own: PYTHONPATH=.venv/NAME. Exact pins, no dependencies.
install_beside() {
  local target=".venv/$1" wanted
  wanted=$(cksum < "$2")
  if [ "$(cat "$target/installed.cksum" 2>/dev/null)" != "$wanted" ]; then
    echo "installing $2 into $target"
    rm -rf "$target"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target "$target" -r "$2" || return 1
    echo "$wanted" > "$target/installed.cksum"
  fi
}
