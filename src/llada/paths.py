"""Paths as users type them: one set of rules for every flag and config key."""

import os
import re
import tempfile
from pathlib import Path

from llada.errors import UserError

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")
_NAME_BYTES = 255  # limit for one component of a path on common file systems


def user_path(value: str | os.PathLike, flag: str) -> Path:
    """The path given to `flag` ("--out", "--config.data.directory") with "~" expanded, otherwise unchanged.

    UserError for what is no local path: empty, "-", scheme://, NUL, bytes that no file name can hold, a component that
    is too long. The disk is consulted only for a ".." below a directory that does not exist.
    """
    text = os.fspath(value)
    if not text.strip():
        raise UserError(f"{flag} is empty; give a path")
    if text == "-":
        raise UserError(f"{flag}=- is no path, and this flag takes no stream; write ./- for a file of that name")
    if _SCHEME.match(text):
        raise UserError(
            f"{flag}={text} is no directory or file of this machine; mount the bucket (gcsfuse) or file system, "
            "and give the path"
        )
    try:
        encoded = os.fsencode(text)
    except UnicodeEncodeError as error:
        raise UserError(f"{flag}={text!r} cannot be a file name ({error.reason}); give another path") from error
    if b"\0" in encoded:
        raise UserError(f"{flag}={text!r} has a NUL in it; give another path")
    if any(len(part) > _NAME_BYTES for part in encoded.split(b"/")):
        raise UserError(f"{flag}={text[:40]}... has a name of more than {_NAME_BYTES} bytes; give a shorter one")
    try:
        path = Path(text).expanduser()
        # Creating "missing/../out" would also create `missing`.
        return path.resolve() if ".." in path.parts and not path.parent.exists() else path
    except RuntimeError as error:  # ~someone, or no home directory
        raise UserError(f"{flag}={text}: {error}; write the path out") from error


def readable_file(value: str | os.PathLike, flag: str) -> Path:
    """`user_path` of an existing file. UserError if it is missing, a directory or no regular file."""
    path = user_path(value, flag)
    try:
        if path.is_file():
            return path
        what = "is a directory" if path.is_dir() else "is no regular file" if path.exists() else "does not exist"
    except OSError as error:
        what = f"cannot be read: {error.strerror}"
    raise UserError(f"{flag}={path} {what}; give a file")


def writable_target(value: str | os.PathLike, flag: str) -> Path:
    """`user_path` of a file to be written later: its directory exists or can be created, and is writable.

    UserError naming `flag` otherwise, before any work is done. Nothing is written.
    """
    path = user_path(value, flag)
    try:
        if path.is_dir():
            raise UserError(f"{flag}={path} is a directory; give a file in it")
        if path.exists() and not path.is_file():
            raise UserError(f"{flag}={path} is no regular file; give another path")
        _require_writable(path, path.absolute().parent, flag)
        if path.exists() and not os.access(path, os.W_OK):
            raise UserError(f"{flag}={path} cannot be written: permission denied, or a read-only disk; choose another")
    except OSError as error:
        raise UserError(f"{flag}={path} cannot be written: {error.strerror}; choose another") from error
    return path


def writable_directory(value: str | os.PathLike, flag: str, read_only: bool = False) -> Path:
    """`user_path` of a directory for output: it exists or can be created, and is writable.

    With `read_only` it only must not be a file. UserError naming `flag` otherwise. Nothing is written.
    """
    path = user_path(value, flag)
    try:
        if os.path.lexists(path) and not path.is_dir():
            raise UserError(f"{flag}={path} is no directory; choose another")
        _require_writable(path, path.absolute(), flag, read_only)
    except OSError as error:
        raise UserError(f"{flag}={path} cannot be written: {error.strerror}; choose another") from error
    return path


def _require_writable(path: Path, directory: Path, flag: str, read_only: bool = False) -> None:
    """UserError unless the nearest existing ancestor of `directory` is a directory; OSError if it is not writable."""
    while not directory.exists():
        directory = directory.parent
    if not directory.is_dir():
        raise UserError(f"{flag}={path} cannot be written: {directory} is no directory; choose another")
    if not read_only:
        # Writing is tried: for root, and on network file systems, permission bits do not tell.
        with tempfile.TemporaryFile(dir=directory):
            pass
