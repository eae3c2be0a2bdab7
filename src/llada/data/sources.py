"""Documents: where the text comes from, in which order, and on which side of the hold-out split each one falls.

Two sources, both on the local disk: the Python standard library's own code ("stdlib"; nothing to download) and the
user's files ("text:GLOB"). Text passes through exactly as stored. Not for tokenising: see tokenizer.py and rows.py.
"""

import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from llada.errors import UserError

_LONG_CHARACTERS = 65_536
_SECTION_CHARACTERS = 16_384
_STDLIB_SKIPPED = ["__pycache__", "dist-packages", "idle_test", "site-packages", "test", "tests", "turtledemo"]


def documents(source: str) -> Iterator[str]:
    """Yield the text of every document of `source`, never empty, in an order that depends only on the file names.

      "stdlib"     every .py file of the running Python's standard library, without its tests; one document each
      "text:GLOB"  files matching GLOB ("~" and "**" work): .jsonl is one document per line, in the string field
                   "text"; anything else is plain UTF-8: one document, or, above 64 Ki characters, sections of
                   about 16 Ki that end with a line

    Files are opened one at a time, so a damaged file is reported when its turn comes.
    Raises UserError for an unknown source, a source without text, binary or non-UTF-8 files, bad JSONL lines.
    """
    if source == "stdlib":
        reason = "this Python has no standard library sources; use --config.data.source=text:GLOB"
        return _refuse_empty(_stdlib(), reason)
    if source.startswith("text:") and source != "text:":
        pattern = source.removeprefix("text:")
        matches = map(Path, glob.glob(os.path.expanduser(pattern), recursive=True))
        paths = sorted(path for path in matches if path.is_file())
        if not paths:
            raise UserError(f"no file matches {pattern!r}; check --config.data.source=text:GLOB")
        reason = f"all {len(paths)} files matching {pattern!r} are empty; check --config.data.source=text:GLOB"
        return _refuse_empty((text for path in paths for text in _read(path)), reason)
    raise UserError(f"unknown source {source!r}; allowed: stdlib, text:GLOB; set --config.data.source")


def is_holdout(text: str, fraction: float) -> bool:
    """Tell whether a document belongs to the hold-out side, which gets about `fraction` (0..1) of all documents.

    Decided by a hash of the text alone, so a document stays on its side whatever else the corpus holds, and copies
    of one document never straddle the split.
    """
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2.0**64


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
    paths = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _STDLIB_SKIPPED]
        paths.extend(Path(folder, name) for name in files if name.endswith(".py"))
    for path in sorted(paths, key=lambda path: path.relative_to(root).as_posix()):
        try:
            yield path.read_bytes().decode()
        except UnicodeDecodeError:
            continue


def _read(path: Path) -> Iterator[str]:
    try:
        if path.suffix.lower() == ".jsonl":
            yield from _read_jsonl(path)
        else:
            yield from _sections(_decode(path.read_bytes(), path, 0))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check --config.data.source") from error


def _sections(text: str) -> Iterator[str]:
    """A text whole, or, where it is long, cut at line ends: else one book would be all training or all hold-out."""
    if len(text) <= _LONG_CHARACTERS:
        yield text
        return
    start = 0
    while start < len(text):
        end = text.find("\n", start + _SECTION_CHARACTERS) + 1 or len(text)
        yield text[start:end]
        start = end


def _read_jsonl(path: Path) -> Iterator[str]:
    offset = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            line = _decode(raw, path, offset)
            offset += len(raw)
            if line.strip():
                yield _text_field(line, path, number)


def _text_field(line: str, path: Path, number: int) -> str:
    where = f"{path} line {number}"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}); --config.data.source needs one JSON object a line") from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise UserError(f'{where} has no string field "text"; --config.data.source needs one on every line')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # JSON may spell half of a surrogate pair, which no UTF-8 text can hold.
        raise UserError(f"{where} holds half a surrogate pair; check --config.data.source") from error
    return text


def _decode(raw: bytes, path: Path, offset: int) -> str:
    """Decode bytes found at `offset` of a file; NUL marks a binary file even where it is valid UTF-8."""
    zero = raw.find(b"\0")
    if zero >= 0:
        raise UserError(f"{path} is binary: NUL at byte {offset + zero}; --config.data.source takes UTF-8 text only")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        at = offset + error.start
        raise UserError(f"{path} is not UTF-8: bad byte at {at}; --config.data.source takes UTF-8 text only") from error
