"""A corpus that `llada tokenize` has written: ArrayRecord shards and the manifest that counts.

manifest.json           all of rows.Metadata, the files with their sizes and digests, and how they came about; sealed
train-00000-of-00010.array_record, holdout-...   rows of a unit; train-rest: see shards.py
train.crc32.npy  holdout.crc32.npy               the crc32 of every row, in the order of the files
tokenizer.model         or tokenizer.bundle.json: whose ids they are
plan.json  units/       what the work goes on from; training does not read them
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llada import json_files
from llada.config import ARRAY_RECORD, DataConfig
from llada.data import checksums, patterns, rows, tokenizer_files
from llada.data.record_files import RecordFile, RecordRows, require_size, size_and_sha256
from llada.data.rows import Corpus, Metadata
from llada.data.unit_workers import FORMAT_VERSION
from llada.errors import DataError, UserError
from llada.paths import user_path

MANIFEST = "manifest.json"
_BLOCK_ROWS = 1_024


class Manifest(NamedTuple):
    """What a manifest says: of both sides the files, training first, and all of it as written."""

    metadata: Metadata
    files: tuple[list[RecordFile], list[RecordFile]]
    values: dict[str, Any]


def directory_of(source: str, flag: str = "--config.data.source") -> Path:
    """The directory of "array_record:DIR", or of "array_record:GLOB"'s shards. UserError where there is not one."""
    pattern = source.removeprefix(ARRAY_RECORD)
    if not pattern:
        raise UserError(
            f"{flag}={source} names no directory; give {ARRAY_RECORD}DIR, as llada tokenize --out=DIR wrote it"
        )
    path = user_path(pattern, flag)
    if path.is_dir():
        return path
    found = patterns.files(pattern, flag)
    directories = sorted({file.parent for file in found})
    if len(directories) > 1:
        names = ", ".join(map(str, directories[:3]))
        raise UserError(f"{flag}={source} matches files of {len(directories)} directories ({names}); give one of them")
    matched = {file.name for file in found}
    _, files, _ = read_manifest(directories[0])
    if left_out := [file.name for side in files for file in side if file.name not in matched]:
        raise UserError(
            f"{flag}={source} leaves out {len(left_out)} shards of {directories[0]}, such as {left_out[0]}; a corpus "
            f"is read as a whole: give {ARRAY_RECORD}{directories[0]}"
        )
    return directories[0]


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a directory. UserError where there is none or of a newer format; DataError for a damaged one."""
    path = directory / MANIFEST
    if not os.path.lexists(path):
        raise UserError(
            f"there is no {MANIFEST} in {directory}: llada tokenize --out={directory} has not finished there"
        )
    try:
        values = json_files.read(path)
        if isinstance(version := values.get("format_version"), int) and version > FORMAT_VERSION:
            raise _Newer(
                f"{path} has format version {version}; this llada reads up to {FORMAT_VERSION}: install a newer"
            )
        metadata = rows.read_metadata(path, Metadata)
        if metadata.checksums is None:
            raise UserError(f"{MANIFEST} has no checksums")
        files = values["files"]
        train, held_out = ([RecordFile(**file) for file in files[side]] for side in ("train", "holdout"))
    except _Newer as error:
        raise UserError(str(error)) from error
    except (UserError, KeyError, TypeError) as error:
        what = error if isinstance(error, UserError) else f"{MANIFEST} lacks {error}"
        raise DataError(
            f"no usable corpus in {directory} ({what}); call llada tokenize as before to write it again"
        ) from error
    return Manifest(metadata, (train, held_out), values)


class _Newer(UserError):
    pass


def open_corpus(directory: Path) -> Corpus:
    """Open what `llada tokenize` wrote: sizes are compared here, rows when they are read.

    UserError and DataError as `read_manifest`; DataError, too, for shards that are missing or of another size.
    """
    metadata, files, _ = read_manifest(directory)
    train, held_out = (
        RecordRows(directory, side, metadata.sequence_length, rows.id_dtype(metadata.vocab_size)) for side in files
    )
    try:
        sums = rows.open_checksums(directory, metadata.checksums, metadata.train_rows, metadata.holdout_rows)
    except (UserError, OSError) as error:
        raise DataError(
            f"no usable corpus in {directory} ({error}); remove {MANIFEST}, and llada tokenize, called as before, "
            "writes both again"
        ) from error
    if (len(train), len(held_out)) != (metadata.train_rows, metadata.holdout_rows):
        raise DataError(f"{directory / MANIFEST}: its files do not have as many rows as it says")
    return Corpus(train, held_out, metadata, sums)


def open_matching(directory: Path, data: DataConfig) -> Corpus:
    """The same; UserError where the config asks for other rows than there are."""
    corpus = open_corpus(directory)
    if changed := differences(corpus.metadata, data):
        raise UserError(
            f"the corpus in {directory} was tokenised with other values: {', '.join(changed)}; give those, or tokenise "
            "again"
        )
    return corpus


def differences(metadata: Metadata, data: DataConfig) -> list[str]:
    """What `data` asks for that these rows are not, as flags with both values."""
    names = ("sequence_length", "holdout_fraction")
    return [
        f"--config.data.{name}={getattr(metadata, name)}, not {getattr(data, name)}"
        for name in names
        if getattr(metadata, name) != getattr(data, name)
    ]


def tokenizer_path(directory: Path) -> Path:
    """The tokenizer that the corpus was made with. DataError where it is gone, or is another."""
    path = tokenizer_files.in_workdir(directory)
    expected = read_manifest(directory).metadata.tokenizer_sha256
    if path is None or hashlib.sha256(json_files.read_bytes(path)).hexdigest() != expected:
        what = "is gone" if path is None else "is another one now"
        raise DataError(
            f"the tokenizer of {directory} {what}; llada tokenize, called as before with its --tokenizer, writes it "
            "again"
        )
    return path


def digest(files: tuple[list[RecordFile], list[RecordFile]]) -> str:
    """sha256 (hex) of the digests of all files' rows, training first: of what the rows are, in their order."""
    return hashlib.sha256("\n".join(file.rows_sha256 for side in files for file in side).encode()).hexdigest()


def verify(directory: Path, read: Callable[[int], None] = lambda size: None) -> dict[str, str]:
    """Read everything and compare it with the manifest: what is damaged, by file. `read` is told of bytes read.

    UserError and DataError as `read_manifest`.
    """
    metadata, sides, _ = read_manifest(directory)
    found: dict[str, str] = {}
    try:
        sums = rows.open_checksums(directory, metadata.checksums, metadata.train_rows, metadata.holdout_rows)
    except (UserError, OSError) as error:
        found["checksums"] = str(error)
        sums = None
    for side, files in enumerate(sides):
        first = 0
        for file in files:
            of_file = sums[side][first : first + file.records] if sums else None
            first += file.records
            try:
                _verify_file(directory, file, metadata, of_file)
            except DataError as error:
                found[file.name] = str(error)
            read(file.bytes)
    if not found and digest(sides) != metadata.digest:
        found[MANIFEST] = "its digest is not that of its files"
    return found


def _verify_file(directory: Path, file: RecordFile, metadata: Metadata, sums_N: np.ndarray | None) -> None:
    """DataError for the first thing that is wrong: with a record, else with the file."""
    path = directory / file.name
    require_size(path, file)
    dtype = rows.id_dtype(metadata.vocab_size)
    records = RecordRows(directory, [file], metadata.sequence_length, dtype)
    checked = checksums.CheckedRows(records, sums_N, metadata.vocab_size)
    sha = hashlib.sha256()
    for start in range(0, file.records, _BLOCK_ROWS):
        sha.update(checked[start : start + _BLOCK_ROWS].data)
    if sha.hexdigest() != file.rows_sha256:
        raise DataError(f"{path}: its rows are not those of the manifest")
    if size_and_sha256(path) != (file.bytes, file.sha256):
        raise DataError(
            f"{path}: its rows are as they were, but another byte of the file is not; its sha256 is another"
        )


def total_bytes(directory: Path) -> int:
    """What `verify` reads, for its progress."""
    return sum(file.bytes for side in read_manifest(directory).files for file in side)
