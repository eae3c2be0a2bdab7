"""How the process stands in its surroundings, and how it ends: streams, Ctrl-C, a reader that has gone, known failures.

A failure of ours keeps its traceback. What a user, a disk or a machine can put right gets one line.
"""

import codecs
import contextlib
import errno
import os
import signal
import sys
from collections.abc import Callable

from llada.errors import UserError, disk_error

INTERRUPTED, BROKEN_PIPE = 128 + signal.SIGINT, 128 + signal.SIGPIPE
# What the system says of a path, for the user to put right.
_OF_PATHS = {errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EROFS}
_OF_LIMITS = {errno.EMFILE: "ulimit -n", errno.ENFILE: "the system's limit of open files"}


def open_streams() -> None:
    """Have standard input, output and error, where they are closed as nothing; text that they cannot show is escaped.

    A closed one would be the next file to be opened, and get what is meant for a terminal.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        ascii_only = codecs.lookup(stream.encoding).name == "ascii" and "PYTHONIOENCODING" not in os.environ
        stream.reconfigure(encoding="utf-8" if ascii_only else None, errors="backslashreplace")


def hold_interrupts() -> None:
    """Have Ctrl-C wait for `run`, also in a program that takes this one's place."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def _interrupt(number: int, frame) -> None:
    """KeyboardInterrupt, but not where it would be lost or do harm.

    During an import it can break a half-made module of C++, and the process with it: end at once, nothing is open yet.
    JAX's callback of the garbage collector would swallow it: come again in a moment.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            _say_interrupted()
            os._exit(INTERRUPTED)
        if frame.f_code.co_name == "_xla_gc_callback":
            import threading

            threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
            return
        frame = frame.f_back
    raise KeyboardInterrupt


def run(main: Callable[[], int]) -> int:
    """The exit status of `main`, with all that it wrote out of the buffers; quiet where nobody reads it (`| head`).

    Ctrl-C ends it however little of it is there; it stays ignored where it was (nohup, `&` in a script).
    """
    try:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _interrupt)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        status = main()
        sys.stdout.flush()
        sys.stderr.flush()
        return status
    except KeyboardInterrupt:
        _say_interrupted()
        return INTERRUPTED
    except BrokenPipeError:
        status = BROKEN_PIPE
    except OSError as error:
        if not (known := disk_error(error, "writing to standard output")):
            raise
        status = known.status
        with contextlib.suppress(OSError):
            print(f"llada: {known}", file=sys.stderr, flush=True)
    # What is still in the buffers goes nowhere, without a word when Python ends.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(nowhere, stream.fileno())
    return status


def _say_interrupted() -> None:
    with contextlib.suppress(OSError):
        os.write(2, b"llada: interrupted\n")


def known(error: BaseException, what: str) -> UserError | None:
    """The UserError for an exception that someone can put right though nobody foresaw it, during `what`; else None."""
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
    if isinstance(error, MemoryError):
        return UserError(f"out of memory {_where(error)}; ask for less at once")
    words = str(error)
    if type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError") and "RESOURCE_EXHAUSTED" in words:
        return UserError(f"out of memory on the device ({words.splitlines()[0][:200]}); ask for less at once, or "
                         "spread it over more devices (--config.mesh.fsdp; llada plan says what fits)")  # fmt: skip
    if isinstance(error, ValueError) and _while_jax_reads_the_environment(error):
        return UserError(f"the environment has a JAX_... variable that JAX does not take ({words}); unset it")
    if isinstance(error, RuntimeError | AssertionError) and _where(error, own=False).startswith("in xla_bridge.py"):
        platforms = os.environ.get("JAX_PLATFORMS", "")
        return UserError(f"JAX_PLATFORMS={platforms}: JAX finds no such device here ({words or 'no reason given'}); "
                         "unset it, or name one that is there, such as cpu")  # fmt: skip
    return None


def _while_jax_reads_the_environment(error: BaseException) -> bool:
    """Raised as JAX is imported, by the module that holds its settings."""
    import traceback

    own = os.path.join("jax", "_src", "config.py")
    frames = traceback.extract_tb(error.__traceback__)
    return any(frame.name == "<module>" and frame.filename.endswith(own) for frame in frames)


def _where(error: BaseException, own: bool = True) -> str:
    """`in FILE line N`: the last frame of our own code, or of any."""
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in frames if not own or f"{os.sep}llada{os.sep}" in frame.filename] or frames
    return f"in {os.path.basename(frames[-1].filename)} line {frames[-1].lineno}" if frames else ""
