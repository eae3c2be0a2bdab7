"""A larger corpus that needs no download: the Python code of the packages installed in this environment.

Pinned packages are the same bytes on every machine: those of requirements.txt hold some 87 MB.
"""

import sysconfig
from collections.abc import Iterator
from pathlib import Path

from llada.data import standard_library

_SKIPPED = ["__pycache__"]


def documents(_argument: str, _text_key: str, _remark: object, flag: str) -> tuple[Iterator[str], str]:
    """Every .py file below site-packages: see `sources.SOURCES`."""
    return standard_library.texts(files()[1]), f"this Python has no packages with sources; use {flag}=text:GLOB"


def files() -> tuple[Path, list[Path]]:
    """The directory of the packages, and its .py files in the order of their names below it."""
    root = Path(sysconfig.get_path("purelib"))
    return root, standard_library.python_files(root, _SKIPPED)
