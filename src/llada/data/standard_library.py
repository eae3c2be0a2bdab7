"""A corpus that needs no download: the Python standard library's own code."""

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

_SKIPPED = ["__pycache__", "dist-packages", "idle_test", "site-packages", "test", "tests", "turtledemo"]


def documents(_argument: str, _text_key: str, _remark: object, flag: str) -> tuple[Iterator[str], str]:
    """Every .py file of the running Python's standard library, without its tests: see `sources.SOURCES`."""
    return _texts(), f"this Python has no standard library sources; use {flag}=text:GLOB"


def _texts() -> Iterator[str]:
    root = Path(sysconfig.get_path("stdlib"))
    paths: list[Path] = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED]
        paths.extend(Path(folder, name) for name in files if name.endswith(".py"))
    for path in sorted(paths, key=lambda path: path.relative_to(root).as_posix()):
        try:
            yield path.read_bytes().decode()
        except UnicodeDecodeError:
            continue
