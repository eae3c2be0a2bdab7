"""Files and directories that exist completely or not at all, even if the process or the machine stops; locks; prefetch.

Temporary names are hidden and hold host, process and a counter: no two writers share one, and the next writer of the
same path recognises and removes what a killed process left behind. Nothing else is ever removed.
"""

import contextlib
import ctypes
import errno
import fcntl
import glob
import itertools
import os
import re
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
_TEMPORARY = re.compile(r"\.([^.]+)-(\d+)-\d+\.tmp$")
_HOUR = 3_600
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that `path` holds all of `content` or is untouched. DiskError where there is no room."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name to write a file to; it is synced and renamed to `path` if the block succeeds, else removed.

    Several processes may do this for one `path`: the last to finish wins. DiskError where there is no room.
    """
    temporary = temporary_name(path, "tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale_temporaries(path)
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
    """A hidden name beside `path`, unique to this process and call."""
    return path.with_name(f"{_temporary_prefix(path)}{os.getpid()}-{next(_counter)}.{suffix}")


def _temporary_prefix(path: Path) -> str:
    return f".{path.name[:80]}.{_host()}-"


def _host() -> str:
    return "".join(c if c.isalnum() else "_" for c in socket.gethostname())[:40]


def _remove_stale_temporaries(path: Path) -> None:
    """Remove temporary files and directories for `path` whose process, on this host, no longer exists."""
    prefix = _temporary_prefix(path)
    for stale in path.parent.glob(f"{glob.escape(prefix)}*"):
        process, dash, rest = stale.name.removeprefix(prefix).partition("-")
        if not (dash and process.isdigit() and rest.partition(".")[2] in ("tmp", "partial", "old")):
            continue
        if int(process) == os.getpid() or _is_alive(int(process)):
            continue
        with contextlib.suppress(OSError):
            shutil.rmtree(stale) if stale.is_dir() and not stale.is_symlink() else stale.unlink()


def remove_temporaries(directory: Path) -> None:
    """Remove the temporary files in `directory` of processes that no longer exist, once nobody needs any of them.

    Those of other hosts, of which that is not known, after an hour in which they have not grown.
    """
    for path in directory.glob(".*.tmp"):
        found = _TEMPORARY.search(path.name)
        with contextlib.suppress(OSError):
            if found and found[1] == _host():
                stale = not _is_alive(int(found[2]))
            else:
                stale = found is not None and time.time() - path.stat().st_mtime > _HOUR
            if stale:
                path.unlink()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


class Locked(UserError):
    """Another process holds the lock; the message and `holder` say which."""

    holder = "another process"


@contextlib.contextmanager
def lock(path: Path, what: str = "", remove: bool = False) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`, which names its holder; the kernel frees it if the process dies.

    Locked, saying "`what` (default the path) is in use by ...", if another process holds it. `remove` deletes the file
    at the end of the block. On a file system without locks a warning is printed and the block runs.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = path.open("a+", encoding="utf-8", errors="replace")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = " ".join(file.read(200).split()) or Locked.holder
            file.close()
            locked = Locked(f"{what or path} is in use by {holder}; wait for it, stop it, or choose another")
            locked.holder = holder
            raise locked from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                file.close()
                raise
            sys.stderr.write(f"{path.parent} has no file locks: make sure that no other process uses it\n")
        # The previous holder may have removed the file after we opened it: then ours is a lock on a deleted file.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                break
        file.close()
    try:
        with contextlib.suppress(OSError):  # the lock holds even if the disk is full
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
def queue_for_lock(path: Path, activity: str, check: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold a lock as soon as other processes release it; its file is deleted at the end of the block.

    A line on standard error says who is waited for and what that process does: `activity`, like "prepares DIR".
    `check` is called while waiting, and may raise to give up.
    """
    waiting = False
    with contextlib.ExitStack() as held:
        while True:
            try:
                held.enter_context(lock(path, remove=True))
                break
            except Locked as locked:
                if not waiting:
                    sys.stderr.write(f"waiting for {locked.holder}, which {activity}\n")
                waiting = True
                check()
                time.sleep(0.1)
        yield


@contextlib.contextmanager
def new_directory(path: Path, flag: str, replace: bool = False) -> Iterator[Path]:
    """A temporary directory to fill; it is renamed to `path` if the block succeeds, else removed.

    Of several processes that create one `path`, the first holds a lock beside it and the others are refused. With
    `replace` an existing `path` is replaced, at the end; the caller decides whether that is allowed. UserError naming
    `flag` if `path` exists otherwise, or cannot be created; DiskError where there is no room.
    """
    path = path.resolve() if path.exists() else path.absolute()  # a link's target is what is replaced

    def require_free() -> None:
        if os.path.ismount(path):
            raise UserError(f"{flag}={path} is where a disk is mounted and cannot be renamed; give a directory in it")
        if os.path.lexists(path) and not replace and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{flag}={path} exists already; choose another, or remove it first")

    try:
        require_free()
        path.parent.mkdir(parents=True, exist_ok=True)
        with lock(path.with_name(f".{path.name[:80]}.lock"), f"{flag}={path}", remove=True):
            _remove_stale_temporaries(path)
            partial = temporary_name(path, "partial")
            partial.mkdir()
            try:
                yield partial
                require_free()
                _rename_over(partial, path)
            except BaseException:
                for _ in range(20):  # a library's threads may still be writing into it
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


def _rename_over(new: Path, path: Path) -> None:
    """Rename `new` to `path` and delete what was there; where Linux can exchange names, `path` always exists."""
    if not os.path.lexists(path):
        os.rename(new, path)
    elif _exchange(new, path):
        shutil.rmtree(new)
    else:
        old = temporary_name(path, "old")
        os.rename(path, old)
        os.rename(new, path)
        shutil.rmtree(old)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names atomically; False if the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    return rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0


def prefetch(items: Iterator[T]) -> Iterator[T]:
    """The same items (none of them None); a thread computes the next one while the caller uses the current one."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        following = pool.submit(next, items, None)
        while (item := following.result()) is not None:
            following = pool.submit(next, items, None)
            yield item
