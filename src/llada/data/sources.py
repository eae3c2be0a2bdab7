"""Documents: where the text comes from, in which order, and on which side of the hold-out split each one falls.

Two sources, both on the local disk: the Python standard library's own code ("stdlib"; nothing to download) and the
user's files ("text:GLOB"). Text passes through exactly as stored. Not for tokenising: see tokenizer.py and rows.py.
"""

import hashlib
import itertools
import os
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from llada import paths
from llada.config import DataConfig
from llada.data import text_files
from llada.data.patterns import Files, parts_of
from llada.errors import UserError

Remark = Callable[[str], None]

_ALLOWED = "allowed: stdlib, text:GLOB[,GLOB ...], or a file or directory that exists"
_STDLIB_SKIPPED = ["__pycache__", "dist-packages", "idle_test", "site-packages", "test", "tests", "turtledemo"]
# A corpus up to so many characters is cut into sections where all its documents fall on one side.
_SMALL_CHARACTERS = 1 << 24
_SMALL_SECTIONS, _SMALLEST_SECTION = 64, 128
_CHARACTERS_A_TOKEN = 8  # at most, of a tokenizer that is any good


def documents(
    source: str, text_key: str = "text", remark: Remark | None = None, flag: str = "--config.data.source"
) -> Iterator[str]:
    """Yield the text of every document of `source`, never empty, in an order that depends only on the file names.

      "stdlib"                every .py file of the running Python's standard library, without its tests
      "text:GLOB[,GLOB ...]"  files matching one of the patterns ("~", "**" and "{a,b}" work), read by their names: see
                              text_files.py. What exists is taken as it is written, not as a pattern. A directory
                              stands for the files in it, at any depth, but for hidden ones and those that are no text
      PATH                    the same as "text:PATH", for a path that exists

    A file that has several names, by links, is read once. Files are opened one at a time, so a damaged file is reported
    when its turn comes. `text_key` is the field or column that holds a text. `remark` is told in one line what was
    left out. `flag` is what errors call the source.
    Raises UserError for an unknown source, a source without text, binary or non-UTF-8 files, bad records.
    """
    if source == "stdlib":
        reason = f"this Python has no standard library sources; use {flag}=text:GLOB"
        return _refuse_empty(_stdlib(), reason)
    pattern = _pattern(source, flag)
    files = Files(flag)
    for part in parts_of(pattern):
        files.add(part)
    reason = f"all {len(files.found)} files matching {pattern!r} are empty or no text; check {flag}=text:GLOB"
    return _refuse_empty(_texts(files, text_key, remark or (lambda line: None)), reason)


def split(
    source: str,
    holdout_fraction: float,
    sequence_length: int,
    text_key: str = "text",
    holdout_source: str | None = None,
    remark: Remark | None = None,
) -> Iterator[tuple[bool, str]]:
    """Yield (is held out, text) of every document, each side in the order of `documents`.

    With `holdout_source` its documents are held out, and left out of the training side where they occur there too. Else
    `is_holdout` decides. A small corpus none of whose documents, or all of them, would be held out is cut into
    sections, of which those with the smallest hashes are held out, enough for rows of `sequence_length` tokens.
    UserError where `documents` has one.
    """
    remark = remark or (lambda line: None)
    texts = documents(source, text_key, remark)
    if holdout_source is None:
        return _by_hash(texts, holdout_fraction, sequence_length, remark)
    return _without(texts, documents(holdout_source, text_key, remark, "--config.data.holdout_source"), remark)


def training(data: DataConfig) -> Iterator[str]:
    """Yield the documents of the training side. UserError where all are held out, and where `documents` has one."""
    trains = False
    for held, text in split(
        data.source, data.holdout_fraction, data.sequence_length, data.text_key, data.holdout_source
    ):
        if not held:
            trains = True
            yield text
    if not trains:
        holds = "source" if data.holdout_source else f"fraction={data.holdout_fraction}"
        raise UserError(f"no text to train on: --config.data.holdout_{holds} holds out every document; change it")


def is_holdout(text: str, fraction: float) -> bool:
    """Tell whether a document belongs to the hold-out side, which gets about `fraction` (0..1) of all documents.

    Decided by a hash of the text alone, so a document stays on its side whatever else the corpus holds, and copies
    of one document never straddle the split.
    """
    return _hash(text) < fraction * 2.0**64


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _by_hash(texts: Iterator[str], fraction: float, length: int, remark: Remark) -> Iterator[tuple[bool, str]]:
    first, characters = [], 0
    for text in texts:
        first.append(text)
        characters += len(text)
        if characters > _SMALL_CHARACTERS:
            break
    else:
        # No row could be made of so few bytes by any tokenizer: such a corpus has never been of use as it is.
        bytes_of = Counter()
        for text in first:
            bytes_of[is_holdout(text, fraction)] += len(text.encode()) + 1
        if min(bytes_of[True], bytes_of[False]) < length and characters >= 2 * _SMALLEST_SECTION:
            yield from _sections(first, fraction, length, remark)
            return
    for text in itertools.chain(first, texts):
        yield is_holdout(text, fraction), text


def _sections(texts: list[str], fraction: float, length: int, remark: Remark) -> Iterator[tuple[bool, str]]:
    """Few documents in sections, the smallest hashes held out: the fraction, or a row's worth, at most a quarter."""
    characters = sum(map(len, texts))
    size = max(characters // _SMALL_SECTIONS, _SMALLEST_SECTION)
    cut = [section for text in texts for section in text_files.sections(text, size)]
    least = min(_CHARACTERS_A_TOKEN * length, characters // 4)
    wanted, held, copies = max(fraction * characters, least), set(), Counter(cut)
    for section in sorted(copies, key=_hash):
        if wanted <= 0:
            break
        held.add(section)
        wanted -= len(section) * copies[section]
    remark(
        f"few documents ({len(texts)}): cut into {len(cut)} sections, and {sum(copies[text] for text in held)} of them "
        "held out; --config.data.holdout_source=text:GLOB holds out documents of your own"
    )
    for section in cut:
        yield section in held, section


def _without(texts: Iterator[str], holdout: Iterator[str], remark: Remark) -> Iterator[tuple[bool, str]]:
    """The held-out documents, then the others but for copies of them."""
    hashes = set()
    for text in holdout:
        hashes.add(_hash(text))
        yield True, text
    copies = 0
    for text in texts:
        if _hash(text) in hashes:
            copies += 1
        else:
            yield False, text
    if copies:
        remark(f"{copies} documents of --config.data.source are held out too, and left out of the training side")


def _refuse_empty(texts: Iterator[str], reason: str) -> Iterator[str]:
    found = False
    for text in texts:
        if text:
            found = True
            yield text
    if not found:
        raise UserError(reason)


def _stdlib() -> Iterator[str]:
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _STDLIB_SKIPPED]
        found.extend(Path(folder, name) for name in files if name.endswith(".py"))
    for path in sorted(found, key=lambda path: path.relative_to(root).as_posix()):
        try:
            yield path.read_bytes().decode()
        except UnicodeDecodeError:
            continue


def _pattern(source: str, flag: str) -> str:
    """What `text:` stands before, or a path that exists. UserError for any other source."""
    try:
        source.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{flag}={source!r} is no Unicode text; rename the file or directory") from error
    if source.startswith("text:") and source != "text:":
        return source.removeprefix("text:")
    if source and os.path.lexists(paths.user_path(source, flag)):
        return source
    if source.startswith("hf:"):
        raise UserError(
            f"{flag}={source}: data sets are not fetched by name; save it as Parquet or JSON lines; {_ALLOWED}"
        )
    raise UserError(f"unknown source {source!r}; {_ALLOWED}; set {flag}")


def _texts(files: Files, text_key: str, remark: Remark) -> Iterator[str]:
    order, links = files.once()
    if links:
        remark(f"{links} files are other names (links) of files that are read already, and left out")
    no_text = []
    for path in order:
        try:
            yield from text_files.read(path, text_key)
        except text_files.NotText:
            if not files.found[path]:
                raise
            no_text.append(path)
    if no_text:
        names = ", ".join(path.name for path in no_text[:3]) + (", ..." if len(no_text) > 3 else "")
        remark(f"{len(no_text)} files are no UTF-8 text, and left out: {names}")
