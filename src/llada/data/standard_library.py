"""A corpus that needs no download: the Python standard library's own code."""

import os
import sysconfig
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

_SKIPPED = ["__pycache__", "dist-packages", "idle_test", "site-packages", "test", "tests", "turtledemo"]


def documents(_argument: str, _text_key: str, _remark: object, flag: str) -> tuple[Iterator[str], str]:
    """Every .py file of the running Python's standard library, without its tests: see `sources.SOURCES`."""
    return texts(files()[1]), f"this Python has no standard library sources; use {flag}=text:GLOB"


def files() -> tuple[Path, list[Path]]:
    """The directory of the standard library, and its .py files in the order of their names below it."""
    root = Path(sysconfig.get_path("stdlib"))
    return root, python_files(root, _SKIPPED)


def python_files(root: Path, skipped: Collection[str]) -> list[Path]:
    """The .py files below a directory, but for folders of these names, in the order of their names below it."""
    paths: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skipped]
        paths.extend(Path(folder, name) for name in names if name.endswith(".py"))
    return sorted(paths, key=lambda path: path.relative_to(root).as_posix())


def texts(paths: Iterable[Path]) -> Iterator[str]:
    """Each file as a document, without those that are not UTF-8."""
    for path in paths:
        try:
            yield path.read_bytes().decode()
        except UnicodeDecodeError:
            continue
