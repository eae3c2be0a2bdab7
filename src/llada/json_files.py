"""JSON files: read defensively, with one-line errors, and written as strict JSON that every parser accepts.

Input may be damaged or hostile: the file's kind and size are checked before it is read, text must be UTF-8, and errors
name the file and the position. Output has null for NaN and infinity, which are not JSON.
"""

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llada.errors import UserError

MOST_BYTES = 1 << 30


def read_bytes(path: Path, most: int = MOST_BYTES, name: str | None = None) -> bytes:
    """All of a regular file of at most `most` bytes; `name` is what errors call it (default the path). UserError."""
    name = name or str(path)
    try:
        # Without O_NONBLOCK opening a FIFO would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with open(descriptor, "rb") as file:
            status = os.fstat(file.fileno())
            if stat.S_ISDIR(status.st_mode):
                raise UserError(f"{name} is a directory, not a file")
            if not stat.S_ISREG(status.st_mode):
                raise UserError(f"{name} is no regular file (a pipe or a device)")
            if status.st_size > most:
                raise UserError(
                    f"{name} has {status.st_size:,} bytes, more than the {most:,} that such a file can have"
                )
            return file.read(most + 1)
    except UserError:
        raise
    except (OSError, ValueError) as error:  # ValueError: NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{name} cannot be read: {reason}") from error


def read_text(path: Path, most: int = MOST_BYTES, name: str | None = None) -> str:
    """All of a file as UTF-8 text; otherwise as `read_bytes`. UserError naming the first bad byte."""
    return decode(read_bytes(path, most, name), name or str(path))


def decode(content: bytes, name: str) -> str:
    """UTF-8 bytes as text. UserError naming the first bad byte."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8: bad byte at {error.start}") from error


def parse(content: str | bytes, name: str, kind: type = dict) -> Any:
    """The JSON value in `content`, a `kind` (dict, list; object for any). UserError naming `name` and the position."""
    text = decode(content, name) if isinstance(content, bytes) else content
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{name} is not JSON: {error.msg} at line {error.lineno} column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # too many digits, too deep nesting
        raise UserError(f"{name} is not JSON that can be read: {error}") from error
    if not isinstance(value, kind):
        expected = "a JSON object" if kind is dict else "a JSON list" if kind is list else kind.__name__
        raise UserError(f"{name} must hold {expected}, not {type(value).__name__}")
    return value


def read(path: Path, kind: type = dict, most: int = MOST_BYTES, name: str | None = None) -> Any:
    """The JSON value of a file, a `kind` (dict, list or object for any). UserError naming file and position."""
    return parse(read_bytes(path, most, name), name or str(path), kind)


def read_lines(path: Path, name: str | None = None, kind: type = dict) -> Iterator[tuple[int, Any]]:
    """Line number (from 1) and value of every line of a JSON-lines file that is not blank. UserError naming the line.

    Only the newline character ends a line: JSON strings may hold U+2028 and others at which `str.splitlines` splits.
    """
    name = name or str(path)
    yield from lines(read_bytes(path, name=name), name, kind)


def lines(content: bytes, name: str, kind: type = dict) -> Iterator[tuple[int, Any]]:
    """As `read_lines`, of the file's content."""
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            yield number, parse(line, f"{name} line {number}", kind)


def finite(value: Any) -> Any:
    """The same value with None for every float that is NaN or infinite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def sealed(tree: dict[str, Any]) -> dict[str, Any]:
    """An object with the sha256 (hex) of all else in it, as JSON with sorted keys."""
    tree = {key: value for key, value in tree.items() if key != "sha256"}
    return tree | {"sha256": hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()}


def dumps(value: Any, indent: int | None = None) -> str:
    """`value` as strict JSON: null for NaN and infinity, non-ASCII characters unescaped."""
    return json.dumps(finite(value), indent=indent, allow_nan=False, ensure_ascii=False)
