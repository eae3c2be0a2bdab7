#!/usr/bin/env bash
# Sourced by the other scripts: creates or reuses .venv in the checkout and activates it. A newer Python
# than 3.11 that PYTHON names gets the newest versions within the ranges of setup.cfg instead.
# Usage: source launch/setup.sh; make_environment FILE.txt ...; add_accelerator; use_large_pages; install_beside NAME FILE

make_environment() {
  local python="" candidate wanted stamp file extras=""
  if [ ! -x .venv/bin/python ]; then
    for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python; do
      if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python="$candidate"
        break
      fi
    done
    if [ -z "$python" ] && has_tpu; then
      # Images of TPU VMs have Python 3.10.
      python3 -m pip install --quiet --user uv && python3 -m uv python install --quiet 3.11 || return 1
      python=$(python3 -m uv python find 3.11)
    fi
    if [ -z "$python" ]; then
      echo "llada needs Python 3.11 or newer; none found. Name one: PYTHON=/path/to/python3.11 bash $0" >&2
      return 2
    fi
    echo "creating .venv with $("$python" --version)"
    "$python" -m venv .venv || return 1
  fi
  # Skipped if the same requirements were installed before.
  wanted=$(cat "$@" setup.cfg pyproject.toml | cksum)
  stamp=.venv/installed.cksum
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing $* into .venv"
    if [ -n "${PYTHON:-}" ] && .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 12))'; then
      # requirements-plots.txt pins what the extra [plots] asks for, and so on.
      for file in "$@"; do
        file="${file#requirements}"
        file="${file%.txt}"
        extras+="${file:+,${file#-}}"
      done
      .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".${extras:+[${extras#,}]}" || return 1
    else
      # shellcheck disable=SC2046
      .venv/bin/python -m pip install --quiet --disable-pip-version-check $(printf -- '-r %s ' "$@") || return 1
      .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable . || return 1
    fi
    echo "$wanted" > "$stamp"
  fi
  # shellcheck disable=SC1091
  source .venv/bin/activate
}

# Whether .venv has the JAX that requirements.txt pins.
pinned() { grep -qx "jax==$(.venv/bin/python -c 'from importlib.metadata import version; print(version("jax"))')" requirements.txt; }

# Memory in pages of 2 MB, where glibc has them: cheaper to allocate. glibc reads the variable when a process starts.
use_large_pages() { export GLIBC_TUNABLES="${GLIBC_TUNABLES-glibc.malloc.hugetlb=1}"; }

has_tpu() { compgen -G '/dev/accel*' > /dev/null || compgen -G '/dev/vfio/[0-9]*' > /dev/null; }

# Adds JAX's support for this machine's TPU or NVIDIA GPU to the JAX that make_environment installed.
add_accelerator() {
  local extra="" plugin="" version
  if has_tpu; then
    extra=tpu plugin=libtpu
  elif command -v nvidia-smi > /dev/null && nvidia-smi -L > /dev/null 2>&1; then
    extra=cuda12 plugin=jax_cuda12_plugin
  fi
  if [ -n "$extra" ] && ! python -c "import $plugin" 2> /dev/null; then
    version=$(python -c 'import jax; print(jax.__version__)') || return 1
    echo "installing jax[$extra]==$version into .venv"
    python -m pip install --quiet --disable-pip-version-check "jax[$extra]==$version" || return 1
  fi
}

# Installs packages that conflict with .venv's, for processes with PYTHONPATH=.venv/NAME. Exact pins, no dependencies.
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
