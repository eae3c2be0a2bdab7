"""Files and directories that are there whole, or not at all, whenever the process or the machine stops.

Temporary names are hidden, and carry host, process and a counter: two writers never share one, and what a killed
process left behind is recognised and cleared by the next writer of the same name. Nothing else is ever removed.
"""

import contextlib
import ctypes
import errno
import fcntl
import glob
import itertools
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from llada.errors import UserError, disk_error

T = TypeVar("T")

_counter = itertools.count()
_RENAME_EXCHANGE, _AT_FDCWD = 2, -100  # from linux/fs.h and fcntl.h


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that `path` holds all of `content` or is untouched. DiskError where there is no room."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name of this process alone, to write a file to; it becomes `path` when the block ends well, synced to the disk.

    Any number of processes may do this for one `path`: the last to end counts. DiskError where there is no room.
    """
    temporary = temporary_name(path, "tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear_left_behind(path)
        yield temporary
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and (full := disk_error(error, f"writing {path}")):
            raise full from error
        raise


def temporary_name(path: Path, suffix: str) -> Path:
    """A hidden name beside `path` that no other process and no other call has."""
    return path.with_name(f"{_own_prefix(path)}{os.getpid()}-{next(_counter)}.{suffix}")


def _own_prefix(path: Path) -> str:
    host = "".join(c if c.isalnum() else "_" for c in socket.gethostname())[:40]
    return f".{path.name[:80]}.{host}-"


def _clear_left_behind(path: Path) -> None:
    """Remove temporary files and directories for `path` whose process, on this host, is no more."""
    prefix = _own_prefix(path)
    for left in path.parent.glob(f"{glob.escape(prefix)}*"):
        process, dash, rest = left.name.removeprefix(prefix).partition("-")
        if not (dash and process.isdigit() and rest.partition(".")[2] in ("tmp", "partial", "old")):
            continue
        if int(process) == os.getpid() or _is_alive(int(process)):
            continue
        with contextlib.suppress(OSError):
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


class Locked(UserError):
    """Another process holds the file; the message and `holder` say which."""

    holder = "another process"


@contextlib.contextmanager
def lock(path: Path, what: str = "", wait: bool = False, remove: bool = False) -> Iterator[None]:
    """Hold a file's lock, which ends with the process however it ends; the file names its holder.

    Locked, saying "`what` is in use by ..." (default the path), where another holds it, unless told to `wait`. With
    `remove` the file goes when the block ends. Where the file system has no locks, a line says so and the block runs.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = path.open("a+", encoding="utf-8", errors="replace")
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = " ".join(file.read(200).split()) or "another process"
            file.close()
            locked = Locked(f"{what or path} is in use by {holder}; wait for it, stop it, or choose another")
            locked.holder = holder
            raise locked from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                file.close()
                raise
            print(f"{path.parent} has no file locks: keep other processes away yourself", file=sys.stderr)
        # Whoever held it may have removed it since it was opened.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                break
        file.close()
    try:
        with contextlib.suppress(OSError):  # a full disk holds a lock all the same
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
            file.flush()
        yield
    finally:
        if remove:
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            file.close()


@contextlib.contextmanager
def in_turn(path: Path, does: str, check: Callable[[], None]) -> Iterator[None]:
    """Hold a file's lock as soon as others let it go; the file goes when the block ends.

    Whoever must wait is told for whom, and what that one `does` ("prepares DIR"); `check` is called meanwhile, and may
    raise to end it.
    """
    waits = False
    with contextlib.ExitStack() as held:
        while True:
            try:
                held.enter_context(lock(path, remove=True))
                break
            except Locked as locked:
                if not waits:
                    print(f"waiting for {locked.holder}, which {does}", file=sys.stderr)
                waits = True
                check()
                time.sleep(0.1)
        yield


@contextlib.contextmanager
def new_directory(path: Path, flag: str, replace: bool = False) -> Iterator[Path]:
    """A directory to fill, beside `path`; it takes that name when the block ends well, and goes when it does not.

    Of several processes that make one `path`, the first holds a lock beside it and the others are refused. With
    `replace` an existing `path` gives way at the last moment; the caller says whether it may. UserError naming `flag`
    if `path` exists otherwise, or cannot be made; DiskError where there is no room.
    """
    path = path.resolve() if path.exists() else path.absolute()  # behind a link lies what is to be made

    def refuse_what_is_there() -> None:
        if os.path.ismount(path):
            raise UserError(f"{flag}={path} is where a disk is mounted and cannot be renamed; give a directory in it")
        if os.path.lexists(path) and not replace and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{flag}={path} exists already; choose another, or remove it first")

    try:
        refuse_what_is_there()
        path.parent.mkdir(parents=True, exist_ok=True)
        lock_name = path.with_name(f".{path.name[:80]}.lock")
        with lock(lock_name, f"{flag}={path}", remove=True):
            _clear_left_behind(path)
            partial = temporary_name(path, "partial")
            partial.mkdir()
            try:
                yield partial
                refuse_what_is_there()
                _take_place(partial, path)
            except BaseException:
                for _ in range(20):  # a library's threads may still be writing there
                    shutil.rmtree(partial, ignore_errors=True)
                    if not partial.exists():
                        break
                    time.sleep(0.05)
                raise
    except OSError as error:
        if full := disk_error(error, f"writing {flag}={path}"):
            raise full from error
        if error.filename and not str(error.filename).startswith(str(path.parent)):
            raise
        raise UserError(f"{flag}={path} cannot be written: {error.strerror or error}; choose another") from error


def _take_place(new: Path, path: Path) -> None:
    """Give `new` the name of `path`, and remove what had it; at no moment is there neither where Linux can exchange."""
    if not os.path.lexists(path):
        os.rename(new, path)
        return
    if _exchange(new, path):
        shutil.rmtree(new)
        return
    old = temporary_name(path, "old")
    os.rename(path, old)
    os.rename(new, path)
    shutil.rmtree(old)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one operation; False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    return bool(rename) and rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items (none of them None), each made in a thread while the caller is busy with the one before."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        following = pool.submit(next, items, None)
        while (item := following.result()) is not None:
            following = pool.submit(next, items, None)
            yield item
