"""The process around a command: JAX's environment variables, the cache of compiled programs, memory on CPU."""

import contextlib
import os
import shutil
import sys
import warnings
from pathlib import Path

# Variables that would change what is computed, or break it, and their harmless values. They may be set for other work,
# in a profile or a job template; llada's results must not depend on that.
_PINNED = {
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
_MOST_BYTES = 4 << 30  # of the cache; a run adds some megabytes
_LEAST_FREE_BYTES = 64 << 20
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # parameters of mallopt(3), from glibc's malloc.h


def pin_jax_settings() -> None:
    """Remove the variables that would change results, before JAX is imported; a line names each."""
    for name, harmless in _PINNED.items():
        value = os.environ.pop(name, None)
        if value is not None and value.strip().lower() not in harmless:
            print(f"llada: {name}={value} is ignored: it would change or break what is computed", file=sys.stderr)


def use_compilation_cache() -> None:
    """Have JAX cache compiled programs on disk, in the directory of its own variable if that is set (empty: no cache).

    If the directory cannot be used a line says so, and every program is compiled each time.
    """
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache entry")
    variable = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if variable == "" or "://" in (variable or ""):
        return
    directory = Path(variable) if variable else _default_directory()
    problem = "there is no home directory" if directory is None else _problem(directory)
    if directory is None or problem:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = ""
        print(
            f"llada: compiled programs are not cached ({problem}); XDG_CACHE_HOME=DIR moves the cache", file=sys.stderr
        )
        return
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(directory)
    if not variable:
        _remove_oldest(directory)


def _default_directory() -> Path | None:
    with contextlib.suppress(RuntimeError):  # neither HOME nor an entry in passwd
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        if cache.is_absolute():
            return cache / "llada" / "compiled"
    return None


def _problem(directory: Path) -> str | None:
    """Why the directory cannot be written to, in words."""
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
    """Delete the least recently used programs if the cache is too large; other processes may be doing the same."""
    with contextlib.suppress(OSError):
        stats = [(entry.stat(), entry.path) for entry in os.scandir(directory) if entry.is_file()]
        used = sorted((max(status.st_mtime, status.st_atime), status.st_size, path) for status, path in stats)
        total = sum(size for _, size, _ in used)
        if total <= _MOST_BYTES:
            return
        for _, size, path in used:
            with contextlib.suppress(OSError):
                os.unlink(path)
                total -= size
            if total <= 0.75 * _MOST_BYTES:
                return


def one_program_at_a_time() -> None:
    """On CPU no program starts before the one before it has ended; to be called before JAX initialises its devices.

    XLA has as many threads as cores there. The collectives of two programs that run at once, on several devices or
    processes, may hold all of them, each waiting for the other for ever.
    """
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)


def retain_freed_memory() -> None:
    """On CPU keep the memory that a training step frees for the next step, instead of returning it to the system.

    XLA allocates all buffers of a step and frees them at its end; the system would fill hundreds of megabytes with
    zeros for each step. The process stays as large as it ever was. To be called before JAX initialises its devices, and
    after `processes.start`. No effect outside Linux, without glibc, or where JAX has an accelerator.
    """
    import ctypes

    import jax

    if sys.platform != "linux":
        return
    # A step on a thread of its own would allocate outside the main heap, which is the one that is retained.
    one_program_at_a_time()
    if jax.default_backend() == "cpu" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)
