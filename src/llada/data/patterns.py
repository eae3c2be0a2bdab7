"""The files that a source names: paths, directories and patterns, each file once.

What exists is taken as it is written; "*", "?", "[ab]", "{a,b}" and "**" are looked at only in what does not.
"""

import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path

from llada import paths
from llada.errors import UserError


def parts_of(pattern: str) -> list[str]:
    """A list's patterns. Commas within braces are theirs, and what exists is one path whatever its characters."""
    if os.path.lexists(os.path.expanduser(pattern)):
        return [pattern]
    parts = [part.strip() for part in re.split(r",(?![^{}]*\})", pattern)]
    return [part for part in parts if part] or [pattern]


def _alternatives(pattern: str) -> list[str]:
    """`a{b,c}` as `ab` and `ac`, from the innermost braces out."""
    found = re.search(r"\{([^{}]*,[^{}]*)\}", pattern)
    if not found:
        return [pattern]
    return [
        whole
        for part in found[1].split(",")
        for whole in _alternatives(pattern[: found.start()] + part + pattern[found.end() :])
    ]


def _literal_as_far_as_it_exists(pattern: str) -> str:
    """The pattern, but with brackets and stars of directories that are called so taken as letters."""
    head, *rest = Path(pattern).parts
    literal = Path(head)
    while rest and os.path.lexists(literal):
        literal = literal / rest.pop(0)
    if os.path.lexists(literal):
        return glob.escape(os.fspath(literal))
    return os.path.join(glob.escape(os.fspath(literal.parent)), literal.name, *rest)


def _at_double_star(pattern: str) -> tuple[str, str, str]:
    """Parts of a pattern before, at and after its first "**", which stands for directories at any depth."""
    parts = Path(pattern).parts
    at = parts.index("**") if "**" in parts else len(parts)
    head, rest = (os.path.join(*some) if some else "" for some in (parts[:at], parts[at + 1 :]))
    return head, "".join(parts[at : at + 1]), rest


class Files:
    """The files of a source: each once, whatever names and links it has."""

    def __init__(self, flag: str):
        self.flag = flag
        self.found: dict[Path, bool] = {}  # path, and whether it was met in a directory

    def add(self, part: str) -> None:
        """Take one pattern's files. UserError if there are none, or it is no file or directory of this machine."""
        path = paths.user_path(part, self.flag)
        patterns = [os.fspath(path)] if os.path.lexists(path) else _alternatives(os.fspath(path))
        if not sum([self._add(pattern) for pattern in patterns]):
            raise UserError(f"no file matches {part!r}; check {self.flag}=text:GLOB")

    def _add(self, pattern: str) -> int:
        """How many files a pattern without braces, or what exists, stands for; each is noted."""
        path, in_directory = Path(pattern), False
        if not os.path.lexists(path):
            matches = [match for match in self._matches(_literal_as_far_as_it_exists(pattern)) if match.is_file()]
        elif path.is_dir():
            matches, in_directory = self._matches(os.path.join(glob.escape(pattern), "**")), True
            matches = [match for match in matches if match.is_file()]
        elif path.is_file():
            matches = [path]
        else:
            what = "is no regular file (a pipe or a device)" if path.exists() else "is a link to nothing"
            raise UserError(f"{self.flag}: {path} {what}; give files or a directory")
        for match in matches:
            self.found[match] = in_directory and self.found.get(match, True)
        return len(matches)

    def _matches(self, pattern: str) -> Iterator[Path]:
        """What a pattern stands for. Each directory below a "**" is met once: glob's own goes round with links."""
        head, star, rest = _at_double_star(pattern)
        if not star:
            yield from map(Path, glob.glob(pattern))
            return
        for base in glob.glob(head) if head else [os.curdir]:
            for folder in self._folders(base):
                yield from self._matches(os.path.join(glob.escape(folder), rest or "*"))

    def _folders(self, root: str) -> Iterator[str]:
        """A directory and those below it, but for hidden ones."""

        def refuse(error: OSError):
            raise UserError(f"cannot read {error.filename}: {error.strerror}; check {self.flag}") from error

        seen = set()
        for folder, subfolders, _ in os.walk(root, onerror=refuse, followlinks=True):
            identity = _identity(Path(folder))
            if identity in seen:
                subfolders.clear()
                continue
            seen.add(identity)
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            yield folder

    def once(self) -> tuple[list[Path], int]:
        """The paths in order, the first name of each file, and how many other names there are."""
        first: dict[tuple, Path] = {}
        for path in sorted(self.found):
            first.setdefault(_identity(path), path)
        return list(first.values()), len(self.found) - len(first)


def _identity(path: Path) -> tuple:
    """The same for two names of one file or directory."""
    try:
        found = os.stat(path)
    except OSError:
        return (os.path.realpath(path),)
    return (found.st_dev, found.st_ino) if found.st_ino else (os.path.realpath(path),)
