"""How a command starts and ends as a process: standard streams, signals, closed pipes, exceptions that a user can fix.

A bug of ours keeps its traceback. What a user, a disk or a machine can fix becomes one line.
"""

import codecs
import contextlib
import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable

from llada import signals
from llada.errors import UserError, disk_error

INTERRUPTED, BROKEN_PIPE = 128 + signal.SIGINT, 128 + signal.SIGPIPE
# Errors of the system about a path, which the user can fix.
_OF_PATHS = {errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EROFS}
_OF_LIMITS = {errno.EMFILE: "ulimit -n", errno.ENFILE: "the system's limit of open files"}


def open_streams() -> None:
    """Open closed standard streams as /dev/null, and escape characters that standard output or error cannot encode.

    A closed stream's number would go to the next file that is opened, which would then get the terminal's text.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number: this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        ascii_only = codecs.lookup(stream.encoding).name == "ascii" and "PYTHONIOENCODING" not in os.environ
        # sys.stdout is typed as TextIO, which lacks the method of TextIOWrapper.
        stream.reconfigure(encoding="utf-8" if ascii_only else None, errors="backslashreplace")  # type: ignore[union-attr]


def run(main: Callable[[], int]) -> int:
    """The exit status of `main`, with its output flushed; silent if the reader of the output has gone (`| head`).

    SIGINT, SIGTERM and SIGHUP end it at any point, unless they were ignored when the process started (nohup, `&` in a
    script).
    """
    try:
        signals.listen()
        status = main()
        signals.ignore()
        sys.stdout.flush()
        sys.stderr.flush()
        return status
    except KeyboardInterrupt:
        signals.report(signal.SIGINT)
        return INTERRUPTED
    except BrokenPipeError:
        status = BROKEN_PIPE
    except OSError as error:
        if not (full := disk_error(error, "writing to standard output")):
            raise
        status = full.status
        with contextlib.suppress(OSError):
            print(f"llada: {full}", file=sys.stderr, flush=True)
    # Discard what is left in the buffers: Python would complain about it when it exits.
    devnull = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(devnull, stream.fileno())
    return status


def as_user_error(error: BaseException, what: str) -> UserError | None:
    """The UserError for an exception during `what` that a user can fix; None for a bug of ours."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, BrokenPipeError):
        return None
    if full := disk_error(error, what):
        return full
    if isinstance(error, OSError) and error.errno in _OF_LIMITS:
        return UserError(f"{error.strerror}; raise {_OF_LIMITS[error.errno]}")
    if isinstance(error, OSError) and error.errno in _OF_PATHS and error.filename is not None:
        return UserError(f"{os.fsdecode(error.filename)}: {error.strerror}; give a path that can be used")
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, MemoryError):
        ours = [frame for frame in frames if f"{os.sep}llada{os.sep}" in frame.filename]
        where = "".join(f" in {os.path.basename(frame.filename)} line {frame.lineno}" for frame in ours[-1:])
        return UserError(f"out of memory{where}; ask for less at once")
    text = str(error)
    if type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError") and "RESOURCE_EXHAUSTED" in text:
        return UserError(
            f"out of memory on the device ({text.splitlines()[0][:200]}); ask for less at once, or spread it over more "
            "devices (--config.mesh.fsdp; llada plan says what fits)"
        )
    config_file = os.path.join("jax", "_src", "config.py")  # reads the variables while jax is imported
    importing = any(frame.name == "<module>" and frame.filename.endswith(config_file) for frame in frames)
    if isinstance(error, ValueError) and importing:
        return UserError(f"the environment has a JAX_... variable that JAX does not take ({text}); unset it")
    in_backend = bool(frames) and os.path.basename(frames[-1].filename) == "xla_bridge.py"
    if isinstance(error, RuntimeError | AssertionError) and in_backend:
        platforms = os.environ.get("JAX_PLATFORMS", "")
        return UserError(
            f"JAX_PLATFORMS={platforms}: JAX finds no such device here ({text or 'no reason given'}); unset it, or "
            "name one that is there, such as cpu"
        )
    return None
