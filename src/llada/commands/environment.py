"""What the environment says to JAX, and what of it may count here; where compiled programs are kept."""

import contextlib
import os
import shutil
import sys
import warnings
from pathlib import Path

# Variables of JAX that would change what is computed, or break it, and the values that do neither. Whoever sets them
# for other work, in a profile or a job's template, gets the figures that everyone else gets.
_SETTLED = {
    "JAX_ENABLE_X64": ("0", "false"),
    "JAX_EXPLICIT_X64_DTYPES": ("", "allow"),
    "JAX_DEFAULT_DTYPE_BITS": ("32",),
    "JAX_NUMPY_DTYPE_PROMOTION": ("standard",),
    "JAX_NUMPY_RANK_PROMOTION": ("allow",),
    "JAX_DEFAULT_PRNG_IMPL": ("threefry2x32",),
    "JAX_THREEFRY_PARTITIONABLE": ("1", "true"),
    "JAX_RANDOM_SEED_OFFSET": ("0",),
    "JAX_ENABLE_CUSTOM_PRNG": ("0", "false"),
    "JAX_LEGACY_PRNG_KEY": ("allow",),
    "JAX_HIGH_DYNAMIC_RANGE_GUMBEL": ("0", "false"),
    "JAX_SOFTMAX_CUSTOM_JVP": ("1", "true"),
    "JAX_DISABLE_JIT": ("0", "false"),
    "JAX_NO_TRACING": ("0", "false"),
    "JAX_NO_EXECUTION": ("0", "false"),
    "JAX_CHECK_TRACER_LEAKS": ("0", "false"),
    "JAX_TRANSFER_GUARD": ("allow",),
    "JAX_TRANSFER_GUARD_HOST_TO_DEVICE": ("allow",),
    "JAX_TRANSFER_GUARD_DEVICE_TO_DEVICE": ("allow",),
    "JAX_TRANSFER_GUARD_DEVICE_TO_HOST": ("allow",),
}
_MOST_BYTES = 4 << 30  # of kept programs; a run adds some megabytes
_LEAST_FREE_BYTES = 64 << 20


def settle() -> None:
    """Have JAX, not imported yet, compute as it does by default. A line names each variable that is ignored."""
    for name, harmless in _SETTLED.items():
        value = os.environ.pop(name, None)
        if value is not None and value.strip().lower() not in harmless:
            print(f"llada: {name}={value} is ignored: it would change or break what is computed", file=sys.stderr)


def keep_compiled_programs() -> None:
    """What one call compiles, later ones read; JAX's own variable names another directory, or none (empty).

    Where nothing can be kept a line says so, and everything is compiled anew.
    """
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache entry")
    given = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if given == "" or "://" in (given or ""):
        return
    directory = Path(given) if given else _default_directory()
    problem = "there is no home directory" if directory is None else _problem(directory)
    if problem:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = ""
        print(f"llada: compiled programs are not kept ({problem}); XDG_CACHE_HOME=DIR keeps them", file=sys.stderr)
        return
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(directory)
    if not given:
        _remove_oldest(directory)


def _default_directory() -> Path | None:
    with contextlib.suppress(RuntimeError):  # neither HOME nor an entry in passwd
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        if cache.is_absolute():
            return cache / "llada" / "compiled"
    return None


def _problem(directory: Path) -> str | None:
    """Why nothing can be written there, in words."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not os.access(directory, os.W_OK | os.X_OK):
            return f"{directory} cannot be written"
        if shutil.disk_usage(directory).free < _LEAST_FREE_BYTES:
            return f"no space is left on the disk of {directory}"
    except (OSError, ValueError) as error:
        return f"{directory}: {getattr(error, 'strerror', None) or error}"
    return None


def _remove_oldest(directory: Path) -> None:
    """Keep the programs read last, so that they fit; other processes may be doing the same."""
    with contextlib.suppress(OSError):
        found = [(max(s.st_mtime, s.st_atime), s.st_size, entry.path)
                 for entry in os.scandir(directory) if entry.is_file() and (s := entry.stat())]  # fmt: skip
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found) if total > _MOST_BYTES else ():
            with contextlib.suppress(OSError):
                os.unlink(path)
                total -= size
            if total <= 0.75 * _MOST_BYTES:
                break
