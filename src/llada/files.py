"""Files and directories that are there whole, or not at all, whenever the process or the machine stops."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from llada.errors import UserError

T = TypeVar("T")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that `path` holds all of `content` or is untouched."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class Locked(Exception):
    """Another process holds the file."""


@contextlib.contextmanager
def lock(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold a file's lock, which ends with the process however it ends. Locked where another holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Locked(str(path)) from error
        yield


@contextlib.contextmanager
def new_directory(path: Path, flag: str, replace: bool = False) -> Iterator[Path]:
    """A directory to fill, beside `path`; it takes that name when the block ends well, and goes when it does not.

    What a killed process left there is cleared first. With `replace` an existing `path` gives way at the last moment;
    the caller says whether it may. UserError naming `flag` if `path` exists otherwise, or cannot be made.
    """
    path = path.absolute()
    partial = path.with_name(f"{path.name}.partial")
    if path.exists() and not replace and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{flag}={path} exists already; choose another, or remove it first")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{flag}={path} cannot be written: {error.strerror}; choose another") from error
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if path.exists():
        old = path.with_name(f"{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)
        os.replace(partial, path)
        shutil.rmtree(old)
    else:
        os.replace(partial, path)


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items (none of them None), each made in a thread while the caller is busy with the one before."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        following = pool.submit(next, items, None)
        while (item := following.result()) is not None:
            following = pool.submit(next, items, None)
            yield item
