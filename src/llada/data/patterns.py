"""The user's files as a source: paths, directories and patterns, each file once.

What exists is taken as it is written; "*", "?", "[ab]", "{a,b}" and "**" are looked at only in what does not. A
directory stands for the files in it, at any depth, but for hidden ones and those that are no text. A file that has
several names, by links, is read once, under the first of them; files are read in the order of their names.
"""

import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from llada import paths
from llada.data import text_files
from llada.errors import UserError

T = TypeVar("T")


def documents(pattern: str, text_key: str, remark: Callable[[str], None], flag: str) -> tuple[Iterator[str], str]:
    """The documents of files that match "GLOB[,GLOB ...]", and the error's words where there are none.

    The arguments are those of `sources.SOURCES`.
    """
    found = files(pattern, flag)
    reason = f"all {len(found)} files matching {pattern!r} are empty or no text; check {flag}=text:GLOB"
    return read(found, lambda path: text_files.read(path, text_key), remark), reason


def files(pattern: str, flag: str) -> dict[Path, bool]:
    """The files that match "GLOB[,GLOB ...]", each with whether no pattern but only a directory stands for it.

    UserError where there are none, or the pattern is no file or directory of this machine.
    """
    try:
        pattern.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{flag}={pattern!r} is no Unicode text; rename the file or directory") from error
    in_directory: dict[Path, bool] = {}
    for alternative in _split(pattern):
        for path, below in _matching(alternative, flag):
            in_directory[path] = below and in_directory.get(path, True)
    return in_directory


def read(
    in_directory: dict[Path, bool], content_of: Callable[[Path], Iterator[T]], remark: Callable[[str], None]
) -> Iterator[T]:
    """What `content_of` finds in each of the `files`, in the order of their names, without those that are no text.

    Only files that no pattern names may be no text (`text_files.NotText`).
    """
    no_text = []
    for path in once(in_directory, remark):
        try:
            yield from content_of(path)
        except text_files.NotText:
            if not in_directory[path]:
                raise
            no_text.append(path.name)
    if no_text:
        names = ", ".join(no_text[:3]) + (", ..." if len(no_text) > 3 else "")
        remark(f"{len(no_text)} files are no UTF-8 text, and left out: {names}")


def once(in_directory: Iterable[Path], remark: Callable[[str], None]) -> list[Path]:
    """The files in the order of their names, without other names of the same ones."""
    first: dict[tuple, Path] = {}
    paths = sorted(in_directory)
    for path in paths:
        first.setdefault(_identity(path), path)
    if links := len(paths) - len(first):
        remark(f"{links} files are other names (links) of files that are read already, and left out")
    return list(first.values())


def _split(pattern: str) -> list[str]:
    """A list's patterns. Commas within braces are theirs, and what exists is one path whatever its characters."""
    if os.path.lexists(os.path.expanduser(pattern)):
        return [pattern]
    pieces = [piece.strip() for piece in re.split(r",(?![^{}]*\})", pattern)]
    return [piece for piece in pieces if piece] or [pattern]


def _matching(pattern: str, flag: str) -> list[tuple[Path, bool]]:
    """The files of one pattern, each with whether it lies below a directory that the pattern names.

    UserError where there are none, or the pattern is no file or directory of this machine.
    """
    path = os.fspath(paths.user_path(pattern, flag))
    alternatives = [path] if os.path.lexists(path) else _alternatives(path)
    files = [file for alternative in alternatives for file in _files(Path(alternative), flag)]
    if not files:
        raise UserError(f"no file matches {pattern!r}; check {flag}=text:GLOB")
    return files


def _files(path: Path, flag: str) -> Iterator[tuple[Path, bool]]:
    """The same of a pattern without braces, or of what exists."""
    matches: Iterable[Path] = [path]
    below = path.is_dir()
    if below:
        matches = _matches(os.path.join(glob.escape(os.fspath(path)), "**"), flag)
    elif not os.path.lexists(path):
        matches = _matches(_literal_as_far_as_it_exists(os.fspath(path)), flag)
    elif not path.is_file():
        what = "is no regular file (a pipe or a device)" if path.exists() else "is a link to nothing"
        raise UserError(f"{flag}: {path} {what}; give files or a directory")
    return ((match, below) for match in matches if match.is_file())


def _alternatives(pattern: str) -> list[str]:
    """`a{b,c}` as `ab` and `ac`, from the innermost braces out."""
    braces = re.search(r"\{([^{}]*,[^{}]*)\}", pattern)
    if not braces:
        return [pattern]
    before, after = pattern[: braces.start()], pattern[braces.end() :]
    return [each for choice in braces[1].split(",") for each in _alternatives(before + choice + after)]


def _literal_as_far_as_it_exists(pattern: str) -> str:
    """The pattern, but with brackets and stars of directories that are called so taken as letters."""
    head, *rest = Path(pattern).parts
    literal = Path(head)
    while rest and os.path.lexists(literal):
        literal = literal / rest.pop(0)
    if os.path.lexists(literal):
        return glob.escape(os.fspath(literal))
    return os.path.join(glob.escape(os.fspath(literal.parent)), literal.name, *rest)


def _matches(pattern: str, flag: str) -> Iterator[Path]:
    """What a pattern stands for. Each directory below a "**" is met once: glob's own goes round with links."""
    names = Path(pattern).parts
    if "**" not in names:
        yield from map(Path, glob.glob(pattern))
        return
    at = names.index("**")
    rest = os.path.join(*names[at + 1 :]) if names[at + 1 :] else "*"
    for base in glob.glob(os.path.join(*names[:at])) if at else [os.curdir]:
        for folder in _folders(base, flag):
            yield from _matches(os.path.join(glob.escape(folder), rest), flag)


def _folders(root: str, flag: str) -> Iterator[str]:
    """A directory and those below it, but for hidden ones."""

    def refuse(error: OSError) -> None:
        raise UserError(f"cannot read {error.filename}: {error.strerror}; check {flag}") from error

    seen = set()
    for folder, subfolders, _ in os.walk(root, onerror=refuse, followlinks=True):
        identity = _identity(Path(folder))
        if identity in seen:
            subfolders.clear()
            continue
        seen.add(identity)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield folder


def _identity(path: Path) -> tuple[str | int, ...]:
    """The same for two names of one file or directory."""
    try:
        stat = os.stat(path)
    except OSError:
        return (os.path.realpath(path),)
    return (stat.st_dev, stat.st_ino) if stat.st_ino else (os.path.realpath(path),)
