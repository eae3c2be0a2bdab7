"""Finished requests of an evaluation in a file: a line of JSON each, flushed as they finish, so that a kill loses none.

The first line says of which model they are. A line that a kill has cut off is dropped when the file is opened again.
"""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from llada import json_files
from llada.errors import DiskError, UserError, disk_error
from llada.files import lock

_FLAG = "--finished"


class RequestCache:
    """Results by the key of their request; what is added is in the file before `add` returns."""

    def __init__(self, path: Path, model: dict[str, Any]):
        """Read what is there. UserError for a file of another `model`, or one that is no such file."""
        self._path, self._results = path, {}
        with _room(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            content = json_files.read_bytes(path, name=f"{_FLAG}={path}") if path.exists() else b""
            whole = content[: content.rfind(b"\n") + 1]
            lines = [value for _, value in json_files.lines(whole, f"{_FLAG}={path}")]
            if lines:
                _require_same(path, lines[0].get("model"), model)
            elif content:
                raise UserError(f"{_FLAG}={path} is no cache of requests; give another file")
            for number, line in enumerate(lines[1:], 2):
                if set(line) != {"key", "result"}:
                    raise UserError(f"{_FLAG}={path} line {number} is no finished request; give another file")
                self._results[line["key"]] = line["result"]
            self._file = path.open("ab")
            if len(whole) < len(content):
                self._file.truncate(len(whole))
            if not lines:
                self._write({"model": model})

    def find(self, keys: Iterable[str]) -> dict[str, Any]:
        """Results of those that are there."""
        return {key: self._results[key] for key in keys if key in self._results}

    def add(self, results: dict[str, Any]) -> None:
        """More of them. DiskError where there is no room."""
        self._results |= results
        with _room(self._path):
            for key, result in results.items():
                self._write({"key": key, "result": result})

    def close(self) -> None:
        """Nothing is added any more."""
        with _room(self._path):
            self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()


@contextlib.contextmanager
def opened(path: Path | None, model: dict[str, Any]) -> Iterator[RequestCache | None]:
    """The cache at `path`, which one process uses at a time; None without a path. UserError as `RequestCache`."""
    if path is None:
        yield None
        return
    with contextlib.ExitStack() as stack:
        with _room(path):
            stack.enter_context(lock(path.with_name(f".{path.name}.lock"), f"{_FLAG}={path}", remove=True))
        cache = RequestCache(path, model)
        stack.callback(cache.close)
        yield cache


def _require_same(path: Path, found: Any, model: dict[str, Any]) -> None:
    """UserError unless the cache is of this model, computed with the same numbers."""
    if not isinstance(found, dict):
        raise UserError(f"{_FLAG}={path} is no cache of requests; give another file")
    differing = [key for key in (*model, *found) if model.get(key) != found.get(key)]
    if differing:
        key = differing[0]
        raise UserError(
            f"{_FLAG}={path} is of another model: its {key} is {str(found.get(key))[:40]} and here it is "
            f"{str(model.get(key))[:40]}; give another file, or remove this one"
        )


@contextlib.contextmanager
def _room(path: Path) -> Iterator[None]:
    """A block whose failures to write are one line."""
    try:
        yield
    except OSError as error:
        full: DiskError | None = disk_error(error, f"writing {_FLAG}={path}")
        raise full or UserError(
            f"{_FLAG}={path} cannot be used: {error.strerror or os.strerror(error.errno or 0)}"
        ) from error
