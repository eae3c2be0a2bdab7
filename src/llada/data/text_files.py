"""One file to the documents in it: plain text, JSON lines, JSON or Parquet, compressed or not.

Files are streamed: of a large one no more is in memory than a document. What is damaged, no text, or expands without
end gets one line that names the file and the place.
"""

import codecs
import contextlib
import importlib
import itertools
import json
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from llada.data.line_spans import LineSpan
from llada.errors import UserError, in_brief

_DAMAGED: tuple[type[Exception], ...] = (zlib.error,)
with contextlib.suppress(ImportError):  # a Python built without it
    from lzma import LZMAError

    _DAMAGED += (LZMAError,)

_LONG_CHARACTERS = 65_536
_SECTION_CHARACTERS = 16_384
_CHUNK_BYTES = 1 << 20
_MOST_BYTES = 1 << 30  # of a JSON file, which is in memory as a whole
_MOST_OF_A_LINE = 1 << 28
# Text is compressed to a third, tables of much repetition to a hundredth; what is made to fill a disk to a thousandth.
_MOST_EXPANSION = 400
_FREE_BYTES = 64 << 20

_COMPRESSED = {".gz", ".zst", ".bz2", ".xz"}
_JSON_LINES = {".jsonl", ".ndjson", ".jsonlines"}
_ARCHIVES = {".zip", ".tar", ".tgz", ".7z", ".rar"}


class NotText(UserError):
    """A file that begins with bytes which are no text."""


def read(path: Path, text_key: str, span: tuple[int, int] | None = None, errors: str = "strict") -> Iterator[str]:
    """Yield the documents of one file, whose kind its name says.

      .jsonl .ndjson .jsonlines   one JSON object a line, its text in the string field `text_key`
      .json                       a list of such objects, or one a line, or one
      .parquet                    a row each, its text in the column `text_key`; rows of null are no documents
      anything else               plain UTF-8: one document, or, above 64 Ki characters, sections of about 16 Ki that
                                  end with a line

    each also with .gz, .zst, .bz2 or .xz behind it, but for Parquet. With `span`, only those of the lines that begin at
    its bytes, or of its row groups, of a file that `cut_by` says can be cut. With `errors` "surrogateescape", bytes
    that are not UTF-8 are half surrogate pairs in what is yielded. UserError naming the place if it is damaged, NotText
    if it begins as no text does.
    """
    with _kind_of(path) as (kind, file):
        first = 0
        if span and kind != ".parquet":
            file = LineSpan(file, *span)
            first = file.first
        if kind == ".parquet":
            yield from _parquet_texts(path, text_key, span, errors)
        elif kind in _JSON_LINES:
            records_ = _json_lines(file, path, first, errors)
            yield from (_text_field(record, where, text_key, errors) for where, record in records_)
        elif kind == ".json":
            records_ = _json_records(file, path, errors)
            yield from (_text_field(record, where, text_key, errors) for where, record in records_)
        else:
            yield from _sections(_characters(file, path, first, errors), path, is_long=span is not None)


def cut_by(path: Path) -> str | None:
    """What a file can be cut by, as its name says: "lines", "row groups", or None."""
    kind, compressed = _suffixes(path)
    if compressed or kind == ".json" or kind in _ARCHIVES:
        return None
    return "row groups" if kind == ".parquet" else "lines"


def row_group_bytes(path: Path) -> list[int]:
    """The sizes of a Parquet file's row groups. UserError for what is none."""
    with _parquet(path) as file:
        return [file.metadata.row_group(g).total_byte_size for g in range(file.metadata.num_row_groups)]


def begins_as_text(path: Path) -> bool:
    """Whether what `read` reads first of a plain file is text."""
    with _open(path, None) as file:
        try:
            next(_characters(file, path), None)
        except NotText:
            return False
    return True


def _suffixes(path: Path) -> tuple[str, str | None]:
    """A file's kind by its name, and the suffix of a compressed one."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compressed = suffixes.pop() if suffixes and suffixes[-1] in _COMPRESSED else None
    return suffixes[-1] if suffixes else "", compressed


@contextlib.contextmanager
def _kind_of(path: Path) -> Iterator[tuple[str, Any]]:
    """What a file is by its name, without the suffix of a compressed one, and what its content is read from."""
    kind, compressed = _suffixes(path)
    if kind in _ARCHIVES:
        raise NotText(f"{path} is an archive; unpack it, and give its directory to --config.data.source")
    if kind == ".parquet" and compressed:
        raise UserError(f"{path} is a compressed Parquet file; unpack it: {path.name.removesuffix(compressed)}")
    try:
        with _open(path, compressed) as file:
            yield kind, file
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"cannot read {path}: {reason}; check --config.data.source") from error


class _Unpacked:
    """A compressed file as its content, of which there must be no more than text can be."""

    def __init__(self, file: BinaryIO, path: Path, raw_bytes: int):
        self._file, self._path = file, path
        self._left = _FREE_BYTES + _MOST_EXPANSION * raw_bytes

    def read(self, size: int) -> bytes:
        try:
            content = self._file.read(size)
        except _DAMAGED as error:
            raise OSError(f"damaged: {error}") from error
        self._left -= len(content)
        if self._left < 0:
            raise UserError(f"{self._path} expands to {_MOST_EXPANSION} times its size and more, which no text does")
        return content


@contextlib.contextmanager
def _open(path: Path, compressed: str | None) -> Iterator[BinaryIO | _Unpacked]:
    """Something with read(size), for a regular file only: a pipe would wait, a device never end."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is no regular file (a pipe or a device); check --config.data.source")
    with _library(compressed)(path) as file:
        yield file if compressed is None else _Unpacked(file, path, status.st_size)


def _library(compressed: str | None) -> Callable[[Path], BinaryIO]:
    """What opens a file of that suffix. Some Pythons are built without one or the other."""
    if compressed is None:
        return lambda path: path.open("rb")
    if compressed == ".zst":
        import pyarrow

        return lambda path: pyarrow.input_stream(str(path), compression="zstd")
    name = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma"}[compressed]
    try:
        return importlib.import_module(name).open
    except ImportError as error:
        raise UserError(f"this Python cannot read {compressed} ({error}); unpack the files, or give .gz") from error


def _chunks(file) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK_BYTES):
        yield chunk


def _lines(file, path: Path) -> Iterator[bytes]:
    """The file's lines with their line feeds; no other character ends one."""
    rest: list[bytes] = []
    held = 0
    for chunk in _chunks(file):
        *lines, last = chunk.split(b"\n")
        for line in lines:
            yield b"".join([*rest, line, b"\n"])
            rest, held = [], 0
        if last:
            rest.append(last)
            held += len(last)
        if held > _MOST_OF_A_LINE:
            raise UserError(f"{path} has a line of more than {_MOST_OF_A_LINE:,} bytes; check --config.data.source")
    if rest:
        yield b"".join(rest)


def _characters(file, path: Path, offset: int = 0, errors: str = "strict") -> Iterator[str]:
    """Text in pieces; NUL marks a binary file even where it is valid UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    following = file.read(_CHUNK_BYTES)
    while chunk := following:
        following = file.read(_CHUNK_BYTES)
        bad = NotText if offset == 0 else UserError
        _refuse_binary(chunk, path, offset, bad)
        waiting = len(decoder.getstate()[0])
        try:
            piece = decoder.decode(chunk, final=not following)
        except UnicodeDecodeError as error:
            raise bad(_not_utf8(path, offset - waiting + error.start)) from error
        yield piece
        offset += len(chunk)


def _sections(pieces: Iterator[str], path: Path, is_long: bool = False) -> Iterator[str]:
    """A short text uncut, a long one cut at line ends: else one book would be all training or all hold-out."""
    text = ""
    for piece in pieces:
        text += piece
        is_long = is_long or len(text) > _LONG_CHARACTERS
        start = 0
        while is_long and (end := text.find("\n", start + _SECTION_CHARACTERS) + 1):
            yield text[start:end]
            start = end
        text = text[start:]
        if len(text) > _MOST_OF_A_LINE:
            raise UserError(
                f"{path} has a line of more than {_MOST_OF_A_LINE:,} characters; check --config.data.source"
            )
    yield text


def sections(text: str, size: int) -> Iterator[str]:
    """A text cut into sections of `size` characters or somewhat more, at line ends, else at spaces, else anywhere."""
    start = 0
    while start < len(text):
        end, most = start + size, min(start + 2 * size, len(text))
        for mark in "\n ":
            if (at := text.find(mark, end - 1, most)) >= 0:
                most = at + 1
                break
        yield text[start:most]
        start = most


def records(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, record) of a file of JSON lines, JSON or Parquet, as `read` takes them: "x.jsonl line 3".

    UserError naming the place if it is damaged, NotText for files of other kinds.
    """
    with _kind_of(path) as (kind, file):
        if kind == ".parquet":
            yield from _parquet_records(path)
        elif kind in _JSON_LINES:
            yield from _json_lines(file, path)
        elif kind == ".json":
            yield from _json_records(file, path)
        else:
            raise NotText(f"{path} has no records: give .jsonl, .json or .parquet, or the first two compressed")


def _json_lines(file, path: Path, first: int = 0, errors: str = "strict") -> Iterator[tuple[str, Any]]:
    offset = first
    for number, raw in enumerate(_lines(file, path), start=1):
        line = _decode(raw, path, offset, errors)
        where = f"{path} at byte {offset}" if first else f"{path} line {number}"
        offset += len(raw)
        yield from _record_of(line, where)


def _json_records(file, path: Path, errors: str = "strict") -> Iterator[tuple[str, Any]]:
    """A list of records, one record over several lines, or one record a line."""
    content = b"".join(itertools.islice(_chunks(file), _MOST_BYTES // _CHUNK_BYTES))
    if file.read(1):
        raise UserError(f"{path} has more than {_MOST_BYTES:,} bytes, too many for a .json; give JSON lines (.jsonl)")
    text = _decode(content, path, 0, errors)
    if not text.strip():
        return
    try:
        value = json.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        if not (isinstance(error, json.JSONDecodeError) and error.msg.startswith("Extra data")):
            raise UserError(_not_json(str(path), error)) from error
        value = None
    if value is None and text.lstrip()[0] == "{":
        for number, line in enumerate(text.split("\n"), start=1):
            yield from _record_of(line, f"{path} line {number}")
        return
    for number, record in enumerate(value if isinstance(value, list) else [value], start=1):
        yield f"{path} record {number}", record


def _parquet_texts(path: Path, text_key: str, groups: tuple[int, int] | None, errors: str) -> Iterator[str]:
    import pyarrow

    with _parquet(path) as file:
        schema = file.schema_arrow
        if text_key not in schema.names:
            raise UserError(
                f"{path} has no column {text_key!r}; its columns are {', '.join(schema.names[:20]) or 'none'}: "
                "set --config.data.text_key"
            )
        kind = schema.field(text_key).type
        kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        if not any(is_kind(kind) for is_kind in _string_kinds()):
            raise UserError(f"{path}: its column {text_key!r} is {kind}, not text; set --config.data.text_key")
        for batch in _batches(file, path, [text_key], groups):
            if errors == "strict":
                yield from (text.as_py() for text in batch.column(0) if text.is_valid)
            else:  # pyarrow does not look whether bytes are UTF-8 before they are made a str
                column = batch.column(0)
                column = column.dictionary_decode() if pyarrow.types.is_dictionary(column.type) else column
                column = column.cast(pyarrow.large_string()).cast(pyarrow.large_binary())
                yield from (text.as_py().decode(errors=errors) for text in column if text.is_valid)


def _parquet_records(path: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    with _parquet(path) as file:
        for batch in _batches(file, path, None, None):
            for record in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", record


def _batches(file, path: Path, columns: list[str] | None, groups: tuple[int, int] | None) -> Iterator[Any]:
    """Some rows at a time, of all row groups or some. UserError for a file that expands without end."""
    left = _FREE_BYTES + _MOST_EXPANSION * path.stat().st_size
    row_groups = list(range(*groups)) if groups else None
    for batch in file.iter_batches(batch_size=1024, columns=columns, row_groups=row_groups):
        left -= batch.nbytes
        if left < 0:
            raise UserError(f"{path} expands to {_MOST_EXPANSION} times its size and more, which no text does")
        yield batch


@contextlib.contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    """An open Parquet file; UserError for what is damaged in it, whenever that is read."""
    import pyarrow
    import pyarrow.parquet

    try:
        with _open(path, None) as raw, pyarrow.parquet.ParquetFile(raw) as file:
            yield file
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: a column that is read is not UTF-8; check --config.data.source") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{path} is no Parquet file that can be read ({in_brief(error)}); check --config.data.source"
        ) from error


def _string_kinds():
    from pyarrow import types

    return [getattr(types, n) for n in ("is_string", "is_large_string", "is_string_view") if hasattr(types, n)]


def _record_of(line: str, where: str) -> Iterator[tuple[str, Any]]:
    """A line's place and record; none on a blank one."""
    if not line.strip():
        return
    try:
        record = json.loads(line.removeprefix("\ufeff"))  # Windows begins files so
    except (ValueError, RecursionError) as error:
        raise UserError(_not_json(where, error)) from error
    yield where, record


def _not_json(where: str, error: Exception) -> str:
    return f"{where} is not JSON ({error}); --config.data.source needs one JSON object a line"


def _text_field(record, where: str, text_key: str, errors: str) -> str:
    text = record.get(text_key) if isinstance(record, dict) else None
    if not isinstance(text, str):
        fields = ", ".join(list(record)[:20]) if isinstance(record, dict) else ""
        has = f"its fields are {fields}: set --config.data.text_key" if fields else "every record needs one"
        raise UserError(f'{where} has no string field "{text_key}"; {has}')
    if errors != "strict":
        return text
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # JSON may spell half of a surrogate pair, which no UTF-8 text can hold.
        raise UserError(f"{where} holds half a surrogate pair; check --config.data.source") from error
    return text


def _decode(raw: bytes, path: Path, offset: int, errors: str = "strict") -> str:
    """Decode bytes found at `offset` of a file; NUL marks a binary file even where it is valid UTF-8."""
    _refuse_binary(raw, path, offset, UserError)
    try:
        return raw.decode(errors=errors)
    except UnicodeDecodeError as error:
        raise UserError(_not_utf8(path, offset + error.start)) from error


def _refuse_binary(raw: bytes, path: Path, offset: int, kind: type[UserError]) -> None:
    if (zero := raw.find(b"\0")) >= 0:
        raise kind(f"{path} is binary: NUL at byte {offset + zero}; --config.data.source takes UTF-8 text only")


def _not_utf8(path: Path, at: int) -> str:
    return f"{path} is not UTF-8: bad byte at {at}; --config.data.source takes UTF-8 text only"
