"""Documents to rows of token ids on disk: imported only where rows have to be prepared."""

import contextlib
import dataclasses
import hashlib
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from llada.config import DataConfig
from llada.data import checksums, holdout, rows
from llada.data.row_packer import RowPacker
from llada.data.rows import Corpus, Metadata
from llada.data.sources import Remark
from llada.data.tokenizer import Tokenizer
from llada.data.unfinished import Held, Unfinished
from llada.data.waiting import Report
from llada.errors import DiskError, UserError, disk_error
from llada.files import queue_for_lock, replacing

_COUNTS = ("documents", "tokens", "bytes", "rows", "checksum")
_ENCODE_CHARACTERS = 1_000_000  # encoded together: enough for all cores, and not more than a second's work


def prepare(
    directory: Path,
    data: DataConfig,
    tokenizer: Tokenizer,
    log: Remark = lambda line: None,
    check: Callable[[], None] = lambda: None,
) -> Corpus:
    """Tokenise `data.source` into rows under `directory`, or open them if the same values wrote them before.

    metadata.json is written last: without it nothing here counts. A call after one that was stopped or killed goes on
    from the latest record of `unfinished.py`, if the documents before it are the same. Of several processes that
    share a directory one prepares, and the others wait for it. `log` is called with what is left out, and about once a
    second with the progress; `check` is called as often and may raise to end the call.
    UserError if the directory holds another corpus or cannot be written, if the source is bad (see sources.py), or if
    either side has too little text for one row; DataError for damaged rows; DiskError where there is no room.
    """
    report = Report(log, check)
    metadata = directory / "metadata.json"
    with writable(directory):
        if not metadata.exists():
            with queue_for_lock(directory / ".lock", f"prepares {directory}", report.check):
                if not metadata.exists():  # else another process has prepared them while this one waited
                    _write_corpus(directory, data, tokenizer, log, report)
    return rows.open_matching(directory, data, tokenizer.sha256)


@contextlib.contextmanager
def writable(directory: Path) -> Iterator[None]:
    """A block that writes in `directory`; UserError where that is refused."""
    try:
        yield
    except OSError as error:
        if not str(error.filename or "").startswith(str(directory)):
            raise
        reason = error.strerror or error
        raise UserError(f"--config.data.directory={directory} cannot be written: {reason}; choose another") from error


def _write_corpus(directory: Path, data: DataConfig, tokenizer: Tokenizer, log: Remark, report: Report) -> None:
    settings = dataclasses.asdict(data) | {"tokenizer": tokenizer.sha256, "directory": None, "unique_tokens": None}
    directory.mkdir(parents=True, exist_ok=True)
    unfinished = Unfinished(directory, ("train", "holdout"), settings)
    try:
        train, held_out, token_bytes = _write_sides(unfinished, data, tokenizer, log, report)
        for path, name in zip(unfinished.paths, ("train.npy", "holdout.npy"), strict=True):
            with replacing(directory / name) as temporary:
                path.rename(temporary)
    except OSError as error:
        raise disk_error(error, f"writing rows to {directory}") or error from error
    finally:
        if not unfinished.kept():
            unfinished.remove()
    sides_NL = [rows.open_rows(directory / name) for name in ("train.npy", "holdout.npy")]
    digest, of_rows = _digest_and_checksums(sides_NL, [train.checksum, held_out.checksum], directory)
    for name, sums_N in zip(("train", "holdout"), of_rows, strict=True):
        checksums.write(directory / f"{name}{checksums.SUFFIX}", sums_N)
    metadata = Metadata(
        source=data.source,
        sequence_length=data.sequence_length,
        holdout_fraction=data.holdout_fraction,
        text_key=data.text_key,
        holdout_source=data.holdout_source,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        train_documents=train.documents,
        train_tokens=train.tokens,
        train_bytes=train.bytes,
        train_rows=train.rows,
        holdout_documents=held_out.documents,
        holdout_tokens=held_out.tokens,
        holdout_bytes=held_out.bytes,
        holdout_rows=held_out.rows,
        holdout_token_bytes=token_bytes,
        unigram_entropy_nats=entropy_nats(train.counts_V),
        digest=digest,
        checksums=checksums.sha256(*of_rows),
    )
    rows.write_metadata(directory / "metadata.json", metadata)
    unfinished.remove()


def _write_sides(
    unfinished: Unfinished, data: DataConfig, tokenizer: Tokenizer, log: Remark, report: Report
) -> tuple["RowWriter", "RowWriter", int]:
    """Rows of all documents in the partial files: their writers, and the bytes by the tokenizer's count of hold-out."""
    texts = unfinished.left(lambda: holdout.split(data, log), log, report)
    with contextlib.ExitStack() as stack:
        files = unfinished.open(stack)
        sides = [RowWriter(file, data.sequence_length, tokenizer.vocab_size) for file in files]
        if unfinished.state:
            for side, state in zip(sides, unfinished.state["sides"], strict=True):
                side.restore(state)
        token_bytes = _write_documents(sides, texts, tokenizer, report, unfinished)
        for name, side in zip(("training", "hold-out"), sides, strict=True):
            _require_rows(name, side, data)
            side.finish()
    return sides[0], sides[1], token_bytes


class RowWriter(RowPacker):
    """Appends rows to a .npy file whose length is not known in advance."""

    def __init__(self, file: BinaryIO, sequence_length: int, vocab_size: int):
        super().__init__(sequence_length, vocab_size)
        self.file = file
        if not file.tell():
            self._write_header()

    def _append(self, block: np.ndarray) -> None:
        # Not block.tofile: NumPy writes past Python's file, and drops the error of a disk that is full.
        self.file.write(block.tobytes())

    def state(self) -> dict[str, Any]:
        """What `restore` takes, ready for JSON."""
        counts = {name: getattr(self, name) for name in _COUNTS}
        return counts | {"counts": self.counts_V.tolist(), "pending": self._pending}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where a writer of this file stood when the file ended where it ends now."""
        for name in _COUNTS:
            setattr(self, name, state[name])
        self.counts_V, self._pending = np.array(state["counts"], np.int64), list(state["pending"])

    def finish(self) -> None:
        """Say in the header how many rows there are; what is left of the last document is dropped."""
        self.file.seek(0)
        self._write_header()
        self.file.flush()

    def _write_header(self) -> None:
        # NumPy pads the header for 21 digits of the first dimension, so rewriting it never moves the rows.
        shape = (self.rows, self.sequence_length)
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self.file, header)


def _write_documents(
    sides: list[RowWriter], texts: Iterator[Held], tokenizer: Tokenizer, report: Report, unfinished: Unfinished
) -> int:
    """Give each document to its side; how many bytes the tokenizer counts on the held-out one."""
    train, held_out = sides
    token_bytes = unfinished.state["token_bytes"] if unfinished.state else 0
    for group in _groups(texts):
        for (held, text), ids in zip(group, tokenizer.encode_many([text for _, text in group]), strict=True):
            (held_out if held else train).add([*ids, tokenizer.eos_id], len(text.encode()))
            token_bytes += int(tokenizer.token_bytes_V[ids].sum()) if held else 0
        unfinished.add(group)
        if unfinished.due():
            state = {"sides": [side.state() for side in sides], "token_bytes": token_bytes}
            unfinished.save(state, [side.file for side in sides])
        documents, tokens = train.documents + held_out.documents, train.tokens + held_out.tokens
        report(f"tokenising: {documents:,} documents, {tokens / 1e6:.1f} M tokens")
    return token_bytes


def _groups(texts: Iterator[Held]) -> Iterator[list[Held]]:
    """Documents in groups to be encoded together."""
    group: list[Held] = []
    characters = 0
    for held, text in texts:
        group.append((held, text))
        characters += len(text)
        if characters >= _ENCODE_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _require_rows(name: str, side: RowWriter, data: DataConfig) -> None:
    if not side.rows:
        raise UserError(
            f"the {name} side has {side.tokens} tokens of {side.documents} documents, less than one row of "
            f"data.sequence_length={data.sequence_length}; shorten it, give more documents, change "
            f"data.holdout_fraction={data.holdout_fraction} or set --config.data.holdout_source"
        )


def entropy_nats(counts_V: np.ndarray) -> float:
    """Entropy of ids that occur so often."""
    frequency = counts_V[counts_V > 0] / counts_V.sum()
    return float(-(frequency * np.log(frequency)).sum())


def _digest_and_checksums(
    sides_NL: list[np.ndarray], written: list[int], directory: Path
) -> tuple[str, list[np.ndarray]]:
    """sha256 (hex) over the bytes of all sides, and the crc32 of each row of each.

    DiskError unless the crc32 of each side is that of what was `written`: what rows are compared with later has to be
    right.
    """
    sha, of_rows = hashlib.sha256(), []
    for rows_NL, expected in zip(sides_NL, written, strict=True):
        checksum, sums = 0, []
        for start in range(0, len(rows_NL), 4_096):
            block = np.ascontiguousarray(rows_NL[start : start + 4_096])
            sha.update(block.data)
            checksum = zlib.crc32(block.data, checksum)
            sums.append(checksums.of_rows(block))
        if checksum != expected:
            raise not_as_written(directory)
        of_rows.append(np.concatenate(sums))
    return sha.hexdigest(), of_rows


def not_as_written(directory: Path) -> DiskError:
    """The error for files that hold something else than was written to them."""
    return DiskError(f"the rows in {directory} are not those that were written; check the disk, then call again")
