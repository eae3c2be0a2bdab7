"""Inputs cut into units, each of which becomes a shard whoever tokenises it: a plan, and the documents of a unit.

The files of a source, in the order of their names, are laid end to end and cut into as many stretches of equal bytes as
there are to be units. JSON lines and long texts are cut at the line that a stretch begins with, Parquet between row
groups; all other files (compressed, .json, short texts) belong to the stretch that they begin in. So a plan depends on
names, sizes and the number of units, and on nothing else.
"""

import bisect
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from llada.data import packages, patterns, standard_library, text_files
from llada.errors import UserError
from llada.paths import user_path

UNIT_BYTES = 64 << 20
MOST_UNITS = 4_096  # by default
_SHORT_BYTES = 1 << 18  # no text below this is cut anywhere else than `text_files` cuts it
INVALID_UTF8 = ("refuse", "replace", "skip")
_SURROGATES = re.compile("[\ud800-\udfff]")
_PYTHON = {"stdlib": standard_library.files, "packages": packages.files}
_ALLOWED = "allowed: stdlib, packages, text:GLOB[,GLOB ...], or a file or directory that exists"


class Piece(NamedTuple):
    """A file of a unit; of one that is cut, the bytes at which its lines begin, or its row groups, from start to stop.

    `path` is below the source's directory, where it has one. `named`: a pattern names it, so it has to be text.
    `weight` is the piece's share of the input in bytes.
    """

    path: str
    size: int
    named: bool
    start: int | None
    stop: int | None
    weight: int


class _File(NamedTuple):
    path: str
    size: int
    named: bool


def plan(source: str, count: int | None, flag: str, remark: Callable[[str], None]) -> list[list[Piece]]:
    """Units, at most `count` of them (None: one for each 64 MiB, up to 4,096), none empty.

    UserError, naming `flag`, for a source that is none, and where it has no file or only empty ones.
    """
    root, files = _files(source, flag, remark)
    total = sum(file.size for file in files)
    if not total:
        raise UserError(f"{flag}={source}: all of its {len(files)} files are empty")
    if count is None:
        count = min(-(-total // UNIT_BYTES), MOST_UNITS)
    bounds = [total * unit // count for unit in range(count)]
    units: list[list[Piece]] = [[] for _ in bounds]
    at = 0
    for file in files:
        for unit, piece in _cut(root, file, at, bounds):
            units[unit].append(piece)
        at += file.size
    return [unit for unit in units if unit]


def documents(
    source: str, text_key: str, invalid_utf8: str, unit: list[Piece], counts: Counter[str]
) -> Iterator[tuple[Piece, str]]:
    """Yield the documents of a unit, each with its piece, never empty.

    `counts` receives how many documents were "empty", "replaced" or "skipped" (as `invalid_utf8` says of those that are
    no Unicode), and how many files were "no text", which only those of a directory may be. UserError for files that are
    not those of the plan, and where text_files.read has one.
    """
    root = _PYTHON[source]()[0] if source in _PYTHON else Path()
    for piece in unit:
        path = root / piece.path
        _require_same(path, piece)
        try:
            for found in _texts(source, path, text_key, piece, invalid_utf8):
                text = _checked(found, invalid_utf8, counts)
                counts["empty"] += text == ""
                if text:
                    yield piece, text
        except text_files.NotText:
            if piece.named:
                raise
            counts["no text"] += 1


def _texts(source: str, path: Path, text_key: str, piece: Piece, policy: str) -> Iterator[str]:
    errors = "strict" if policy == "refuse" else "surrogateescape"
    if source in _PYTHON:
        yield from standard_library.texts([path])
        return
    span = None if piece.start is None or piece.stop is None else (piece.start, piece.stop)
    yield from text_files.read(path, text_key, span, errors)


def _checked(text: str, policy: str, counts: Counter[str]) -> str | None:
    """The text as the policy has it; None for one that is skipped."""
    if policy == "refuse":
        return text  # text_files has looked
    try:
        text.encode()
    except UnicodeEncodeError:
        if policy == "skip":
            counts["skipped"] += 1
            return None
        counts["replaced"] += 1
        return _SURROGATES.sub("\ufffd", text)
    return text


def _files(source: str, flag: str, remark: Callable[[str], None]) -> tuple[Path, list[_File]]:
    """The directory that paths are below, and the files of a source in their order."""
    if source in _PYTHON:
        root, paths = _PYTHON[source]()
        if not paths:
            raise UserError(f"{flag}={source}: this Python has no such sources; give text:GLOB")
        return root, [_File(path.relative_to(root).as_posix(), path.stat().st_size, False) for path in paths]
    prefix, colon, pattern = source.partition(":")
    if not (prefix == "text" and colon and pattern):
        if not (source and os.path.lexists(user_path(source, flag))):
            raise UserError(f"{flag}={source!r} is none that can be tokenised; {_ALLOWED}")
        pattern = source
    below = patterns.files(pattern, flag)
    paths = patterns.once(below, remark)
    return Path(), [_File(os.fspath(path), path.stat().st_size, not below[path]) for path in paths]


def _cut(root: Path, file: _File, at: int, bounds: list[int]) -> Iterator[tuple[int, Piece]]:
    """The pieces of a file that begins at byte `at` of all, each with its unit."""
    first = bisect.bisect_right(bounds, at) - 1
    last = bisect.bisect_left(bounds, at + file.size) - 1
    path = root / file.path
    by = text_files.cut_by(path) if last > first and not root.parts else None
    if by == "lines" and (file.size < _SHORT_BYTES or not (file.named or text_files.begins_as_text(path))):
        by = None
    if by is None:
        yield first, Piece(*file, None, None, file.size)
    elif by == "lines":
        cuts = [0, *(bound - at for bound in bounds[first + 1 : last + 1]), file.size]
        for unit, (start, stop) in enumerate(itertools.pairwise(cuts), first):
            yield unit, Piece(*file, start, stop, stop - start)
    else:
        yield from _cut_groups(path, file, at, bounds)


def _cut_groups(path: Path, file: _File, at: int, bounds: list[int]) -> Iterator[tuple[int, Piece]]:
    """Of a Parquet file; a row group begins where its share of the file does."""
    sizes = text_files.row_group_bytes(path)
    whole, before = max(sum(sizes), 1), 0
    groups: dict[int, list[int]] = {}
    for group, size in enumerate(sizes):
        groups.setdefault(bisect.bisect_right(bounds, at + file.size * before // whole) - 1, []).append(group)
        before += size
    for unit, members in groups.items():
        weight = file.size * sum(sizes[group] for group in members) // whole
        yield unit, Piece(*file, members[0], members[-1] + 1, weight)


def _require_same(path: Path, piece: Piece) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; the plan has it; put it back") from error
    if size != piece.size:
        raise UserError(
            f"{path} has {size:,} bytes, and {piece.size:,} in the plan: it was changed since; put it back, or give "
            "another --out"
        )


def to_json(units: list[list[Piece]]) -> list[list[list[Any]]]:
    """For the plan's file."""
    return [[list(piece) for piece in unit] for unit in units]


def from_json(units: list[list[list[Any]]]) -> list[list[Piece]]:
    """What `to_json` was given."""
    return [[Piece(*piece) for piece in unit] for unit in units]
