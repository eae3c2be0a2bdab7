"""Documents to rows of token ids on disk, and rows to training batches.

Every row holds `sequence_length` ids cut from one long stream of documents, each ended by eos: no padding. A batch is
a pure function of (seed, step), so a resumed run, a run on other machines, and a run with another objective all read
the same rows in the same order. Letters: N rows on disk, B rows in a batch, L tokens in a row.
"""

import dataclasses
import hashlib
import sys
import typing
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import grain
import numpy as np

from llada import json_files
from llada.data.row_files import RowWriter, id_dtype, open_rows
from llada.data.sources import split
from llada.data.tokenizer import Tokenizer
from llada.data.waiting import Report
from llada.errors import DataError, DiskError, UserError, disk_error
from llada.files import in_turn, replacing, write_atomically
from llada.paths import user_path

_ENCODE_CHARACTERS = 1_000_000
_MOST_OF_ANYTHING = 1 << 62
_STEPS_FOREVER = 1 << 62


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What a corpus was made from and what is in it. Tokens include eos and the tail cut off; bytes are UTF-8 text."""

    source: str
    sequence_length: int
    holdout_fraction: float
    tokenizer_sha256: str
    vocab_size: int
    train_documents: int
    train_tokens: int
    train_bytes: int
    train_rows: int
    holdout_documents: int
    holdout_tokens: int
    holdout_bytes: int
    holdout_rows: int
    unigram_entropy_nats: float  # of the training rows: the loss of a model that knows only how often each id occurs
    digest: str  # sha256 over the row bytes of both sides, training first
    text_key: str = "text"
    holdout_source: str | None = None
    holdout_token_bytes: int | None = None  # by the tokenizer's count: another where it adds to or changes text


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Rows of both sides, memory-mapped (uint16, or uint32 above 65,536 ids), and how they came about."""

    train_NL: np.ndarray
    holdout_NL: np.ndarray
    metadata: Metadata

    def verify(self) -> None:
        """Re-read every row; raises DataError if the bytes are not those that were prepared."""
        if _digest(self.train_NL, self.holdout_NL) != self.metadata.digest:
            raise DataError("corpus rows changed since they were prepared; delete the data directory to prepare again")

    def text_bytes(self, token_bytes_V: np.ndarray) -> np.ndarray:
        """Bytes of held-out text that each id stands for, of shape V, so that all together they are the documents'.

        That is what the tokenizer says, but for one that begins each text with a space, or changes text: there its
        count is spread over the bytes that there are.
        """
        counted, there = self.metadata.holdout_token_bytes, self.metadata.holdout_bytes
        return token_bytes_V * (there / counted) if counted and counted != there else token_bytes_V


def prepare(
    directory: str | Path,
    source: str,
    tokenizer: Tokenizer,
    sequence_length: int,
    holdout_fraction: float,
    *,
    text_key: str = "text",
    holdout_source: str | None = None,
    progress: Callable[[str], None] | None = None,
    check: Callable[[], None] | None = None,
) -> Corpus:
    """Tokenise `source` into rows under `directory`, or reopen them if the same request made them before.

    metadata.json is written last: without it nothing here counts, and an interrupted call starts again. Of several
    processes that share a directory one prepares, and the others wait for it. `source`, `text_key`, `holdout_fraction`
    and `holdout_source` are those of sources.split. `progress` is told how far it is, about once a second; `check` is
    called as often, and may raise to end the call.
    Raises UserError if the directory holds another corpus or cannot be written, if the source is bad (see sources.py),
    or if either side has too little text for one row; DataError for damaged rows; DiskError where there is no room.
    """
    directory = user_path(directory, "--config.data.directory")
    if sequence_length < 1:
        raise UserError(f"data.sequence_length={sequence_length} must be at least 1")
    if not 0 < holdout_fraction < 1:
        raise UserError(f"data.holdout_fraction={holdout_fraction} must lie between 0 and 1, both excluded")
    request = {
        "source": source,
        "sequence_length": sequence_length,
        "holdout_fraction": holdout_fraction,
        "tokenizer_sha256": tokenizer.sha256,
        "text_key": text_key,
        "holdout_source": holdout_source,
    }
    if (directory / "metadata.json").exists():
        return reopened(directory, request)
    if directory.exists() and not directory.is_dir():
        raise UserError(f"--config.data.directory={directory} is no directory; choose another")
    report = Report(progress, check)
    try:
        with in_turn(directory / ".lock", f"prepares {directory}", report.check):
            if (directory / "metadata.json").exists():  # made while this call waited
                return reopened(directory, request)
            return _made(directory, request, tokenizer, report)
    except OSError as error:
        if not str(error.filename or "").startswith(str(directory)):
            raise
        reason = error.strerror or error
        raise UserError(f"--config.data.directory={directory} cannot be written: {reason}; choose another") from error


def reopened(directory: Path, request: dict, flag: str = "") -> Corpus:
    """The rows that lie in `directory`. UserError where they were made by other values than those of `request`."""
    corpus = open_corpus(directory)
    found = dataclasses.asdict(corpus.metadata)
    changed = [f"{name} ({found[name]!r}, asked {asked!r})" for name, asked in request.items() if asked != found[name]]
    if changed:
        raise UserError(f"{flag}{directory} holds a corpus with another {', '.join(changed)}; give a fresh directory")
    return corpus


def _made(directory: Path, request: dict, tokenizer: Tokenizer, report: Report) -> Corpus:
    length = request["sequence_length"]
    asked = (request[name] for name in ("source", "holdout_fraction", "sequence_length", "text_key", "holdout_source"))
    texts = split(*asked, remark=lambda line: print(line, file=sys.stderr))
    with (
        replacing(directory / "train.npy") as train_path,
        replacing(directory / "holdout.npy") as holdout_path,
        train_path.open("wb") as train_file,
        holdout_path.open("wb") as holdout_file,
    ):
        try:
            train, holdout = (RowWriter(file, length, tokenizer.vocab_size) for file in (train_file, holdout_file))
            token_bytes = _write(train, holdout, texts, tokenizer, report)
            _require_rows(train, holdout, request)
            for side in (train, holdout):
                side.finish()
        except OSError as error:
            raise disk_error(error, f"writing rows to {directory}") or error from error
    train_NL, holdout_NL = (open_rows(directory / name) for name in ("train.npy", "holdout.npy"))
    digest, *found = _digest_and_checksums(train_NL, holdout_NL)
    if found != [train.checksum, holdout.checksum]:
        raise DiskError(f"the rows in {directory} are not those that were written; check the disk, then call again")
    metadata = Metadata(
        **request,
        vocab_size=tokenizer.vocab_size,
        **{f"train_{name}": getattr(train, name) for name in ("documents", "tokens", "bytes", "rows")},
        **{f"holdout_{name}": getattr(holdout, name) for name in ("documents", "tokens", "bytes", "rows")},
        unigram_entropy_nats=_entropy_nats(train.counts_V),
        digest=digest,
        holdout_token_bytes=token_bytes,
    )
    write_atomically(directory / "metadata.json", json_files.dumps(dataclasses.asdict(metadata), indent=2).encode())
    return Corpus(train_NL, holdout_NL, metadata)


def _write(train: RowWriter, holdout: RowWriter, texts: Iterator, tokenizer: Tokenizer, report: Report) -> int:
    """Give each document to its side; how many bytes the tokenizer counts on the held-out one."""
    token_bytes = 0
    for group in _groups(texts):
        for (held, text), ids in zip(group, tokenizer.encode_many([text for _, text in group]), strict=True):
            (holdout if held else train).add([*ids, tokenizer.eos_id], len(text.encode()))
            token_bytes += int(tokenizer.token_bytes_V[ids].sum()) if held else 0
        documents, tokens = train.documents + holdout.documents, train.tokens + holdout.tokens
        report(f"tokenising: {documents:,} documents, {tokens / 1e6:.1f} M tokens")
    return token_bytes


def _require_rows(train: RowWriter, holdout: RowWriter, request: dict) -> None:
    for name, side in (("training", train), ("hold-out", holdout)):
        if not side.rows:
            raise UserError(
                f"the {name} side has {side.tokens} tokens of {side.documents} documents, less than one row of "
                f"data.sequence_length={request['sequence_length']}; shorten it, give more documents, change "
                f"data.holdout_fraction={request['holdout_fraction']} or set --config.data.holdout_source"
            )


def open_corpus(directory: str | Path) -> Corpus:
    """Open what `prepare` made. Raises DataError if it is missing, damaged, or its files disagree on their shape."""
    directory = Path(directory)
    again = "delete it to prepare again"
    try:
        metadata = _metadata(directory / "metadata.json")
        train_NL, holdout_NL = (open_rows(directory / name) for name in ("train.npy", "holdout.npy"))
    except (UserError, OSError) as error:
        raise DataError(f"no usable corpus in {directory} ({error}); {again}") from error
    found = train_NL.shape, holdout_NL.shape, train_NL.dtype, holdout_NL.dtype
    length, dtype = metadata.sequence_length, id_dtype(metadata.vocab_size)
    expected = (metadata.train_rows, length), (metadata.holdout_rows, length), dtype, dtype
    if found != expected:
        raise DataError(f"rows in {directory} are {found}, metadata.json says {expected}; {again}")
    return Corpus(train_NL, holdout_NL, metadata)


def require_known(rows_NL: np.ndarray, vocab_size: int, row_N: np.ndarray) -> None:
    """DataError unless all ids of these rows are below `vocab_size`; `row_N` are their numbers in the file.

    JAX takes the last row of a table for what lies beyond it, and would train on damaged rows without a word.
    """
    if rows_NL.size and rows_NL.max() >= vocab_size:
        bad = int(np.argmax((rows_NL >= vocab_size).any(axis=1)))
        raise DataError(
            f"row {int(row_N[bad])} of the corpus holds id {int(rows_NL[bad].max())}, beyond the {vocab_size} of the "
            "vocabulary: the rows are damaged; delete the data directory to prepare again"
        )


def _metadata(path: Path) -> Metadata:
    """UserError unless every field is there, of its type, and possible."""
    values = json_files.read(path)
    fields = dataclasses.fields(Metadata)
    for field in fields:
        name = field.name
        if name not in values and field.default is dataclasses.MISSING:
            raise UserError(f"{path.name} has no {name}")
        value, kinds = values.get(name, field.default), typing.get_args(field.type) or (field.type,)
        if isinstance(value, bool) or not isinstance(value, (*kinds, int) if float in kinds else kinds):
            raise UserError(f"{path.name}: {name} is {value!r}, not {' or '.join(kind.__name__ for kind in kinds)}")
        if isinstance(value, int | float) and not 0 <= value < _MOST_OF_ANYTHING:
            raise UserError(f"{path.name}: {name}={value} is not possible")
    if min(values[name] for name in ("sequence_length", "vocab_size", "train_rows", "holdout_rows")) < 1:
        raise UserError(f"{path.name} says that there are no rows")
    return Metadata(**{field.name: values[field.name] for field in fields if field.name in values})


def unique_rows(rows_NL: np.ndarray, unique_tokens: int | None) -> np.ndarray:
    """The row ids that hold the first `unique_tokens` of a corpus in random order (None: all); of n ids, n <= N.

    The order is the same for every run, so less data is always a part of more. Raises UserError where it is too much,
    or less than one row.
    """
    count, length = rows_NL.shape
    if unique_tokens is None:
        return np.arange(count)
    wanted = unique_tokens // length
    if not 0 < wanted <= count:
        raise UserError(
            f"--config.data.unique_tokens={unique_tokens} must be from {length} (one row) to {count * length}, "
            "the training side of this corpus"
        )
    return np.random.default_rng(0).permutation(count)[:wanted]


class Batches:
    """The training stream. Grain shuffles the row ids anew every epoch; the global batch of step s is
    ids[s*B : (s+1)*B], whoever reads it: a process may take only the positions that its devices hold. Grain numbers
    orders by seed + epoch, so epoch 1 of seed 0 is epoch 0 of seed 1.
    """

    def __init__(
        self,
        rows_NL: np.ndarray,
        batch_size: int,
        seed: int,
        unique_tokens: int | None = None,
        positions: np.ndarray | None = None,
        vocab_size: int | None = None,
    ):
        """Take N rows, the global batch size, which positions of it to read (default all). UserError if impossible.

        With `vocab_size` the ids of each batch are compared with it: see `require_known`.
        """
        if batch_size < 1:
            raise UserError(f"train.batch_size={batch_size} must be positive")
        if not 0 <= seed < 2**32:
            raise UserError(f"seed={seed} must lie in 0..4294967295; set --config.seed")
        self.rows_NL = rows_NL
        self.batch_size = batch_size
        self._used = unique_rows(rows_NL, unique_tokens)
        self._ids = grain.MapDataset.range(len(self._used)).shuffle(seed=seed).repeat()
        self.positions = np.arange(batch_size) if positions is None else positions
        self.vocab_size = vocab_size

    def at(self, step: int) -> np.ndarray:
        """Return the rows of batch `step` (0 is the first) at the positions: batch_BL int32, B = len(positions)."""
        start = step * self.batch_size
        ids_B = self._used[[self._ids[start + position] for position in self.positions.tolist()]]
        batch_BL = self.rows_NL[ids_B]
        if self.vocab_size is not None:
            require_known(batch_BL, self.vocab_size, ids_B)
        return batch_BL.astype(np.int32)

    def iterate(self, step: int) -> Iterator[np.ndarray]:
        """Yield at(step), at(step + 1), ... without end, read ahead in threads; closing the iterator ends them."""
        steps = grain.MapDataset.range(step, _STEPS_FOREVER).map(self.at)
        reader = iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)))
        try:
            yield from reader
        finally:
            reader.close()


def chain_digest(digest: str, batch_BL: np.ndarray) -> str:
    """Return sha256 (hex) of the digest so far ("" at first) and this batch as little-endian int32, row by row.

    Equal digests after step s mean that two runs read identical rows in identical order up to s.
    """
    return hashlib.sha256(digest.encode() + np.ascontiguousarray(batch_BL, "<i4").tobytes()).hexdigest()


def _groups(texts: Iterator[tuple[bool, str]]) -> Iterator[list[tuple[bool, str]]]:
    """Gather documents until there is enough for all cores, and not more than a second's work."""
    group, characters = [], 0
    for held, text in texts:
        group.append((held, text))
        characters += len(text)
        if characters >= _ENCODE_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _entropy_nats(counts_V: np.ndarray) -> float:
    frequency = counts_V[counts_V > 0] / counts_V.sum()
    return float(-(frequency * np.log(frequency)).sum())


def _digest(*sides_NL: np.ndarray) -> str:
    return _digest_and_checksums(*sides_NL)[0]


def _digest_and_checksums(*sides_NL: np.ndarray) -> tuple:
    """sha256 (hex) over the bytes of all sides, and the crc32 of each."""
    sha, checksums = hashlib.sha256(), []
    for rows_NL in sides_NL:
        checksum = 0
        for start in range(0, len(rows_NL), 4_096):
            block = np.ascontiguousarray(rows_NL[start : start + 4_096])
            sha.update(block)
            checksum = zlib.crc32(block, checksum)
        checksums.append(checksum)
    return sha.hexdigest(), *checksums
