"""Rows of token ids on disk, and the training batches made of them.

Every row holds `sequence_length` ids cut from one long stream of documents, each ended by eos: no padding. A batch is
a pure function of (seed, step), so a resumed run, a run on other machines, and a run with another objective all read
the same rows in the same order. Rows are written by `prepare.py`.
Letters: N rows on disk, B rows in a batch, L tokens in a row.
"""

import dataclasses
import hashlib
import typing
from collections.abc import Generator
from pathlib import Path

import grain
import numpy as np

from llada import json_files
from llada.config import DataConfig
from llada.errors import DataError, UserError

_MOST_OF_ANYTHING = 1 << 62
_STEPS_FOREVER = 1 << 62


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What a corpus was prepared from, and its size. Tokens include eos and the tail cut off; bytes are UTF-8 text."""

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

    def text_bytes(self, token_bytes_V: np.ndarray) -> np.ndarray:
        """Bytes of held-out text that each id stands for, of shape V, so that all together they are the documents'.

        That is what the tokenizer says, but for one that begins each text with a space, or changes text: its count is
        then scaled to the bytes of the documents.
        """
        counted, actual = self.metadata.holdout_token_bytes, self.metadata.holdout_bytes
        return token_bytes_V * (actual / counted) if counted and counted != actual else token_bytes_V


def open_corpus(directory: Path) -> Corpus:
    """Open what `prepare.prepare` wrote. DataError if it is missing, damaged, or its files disagree on their shape."""
    again = "delete it to prepare again"
    try:
        metadata = _metadata(directory / "metadata.json")
        train_NL, holdout_NL = (open_rows(directory / name) for name in ("train.npy", "holdout.npy"))
    except (UserError, OSError) as error:
        raise DataError(f"no usable corpus in {directory} ({error}); {again}") from error
    shapes = train_NL.shape, holdout_NL.shape, train_NL.dtype, holdout_NL.dtype
    length, dtype = metadata.sequence_length, id_dtype(metadata.vocab_size)
    expected = (metadata.train_rows, length), (metadata.holdout_rows, length), dtype, dtype
    if shapes != expected:
        raise DataError(f"rows in {directory} are {shapes}, metadata.json says {expected}; {again}")
    return Corpus(train_NL, holdout_NL, metadata)


def open_matching(directory: Path, data: DataConfig, tokenizer_sha256: str | None = None, flag: str = "") -> Corpus:
    """The rows in `directory`; UserError where they were prepared by other values of `data`, or another tokenizer.

    None for a tokenizer that is not known yet.
    """
    corpus = open_corpus(directory)
    if changed := differences(corpus.metadata, data, tokenizer_sha256):
        raise UserError(f"{flag}{directory} holds a corpus with another {', '.join(changed)}; give a fresh directory")
    return corpus


def differences(metadata: Metadata, data: DataConfig, tokenizer_sha256: str | None = None) -> list[str]:
    """Names of the settings in which these rows differ from those that `data` and the tokenizer ask for."""
    names = ("source", "sequence_length", "holdout_fraction", "text_key", "holdout_source")
    asked = {name: getattr(data, name) for name in names} | {"tokenizer_sha256": tokenizer_sha256}
    if tokenizer_sha256 is None:
        del asked["tokenizer_sha256"]
    has = dataclasses.asdict(metadata)
    return [f"{name} ({has[name]!r}, asked {value!r})" for name, value in asked.items() if value != has[name]]


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


def id_dtype(vocab_size: int) -> np.dtype:
    """Of ids on disk: uint16, or uint32 above 65,536 of them."""
    return np.dtype("<u2" if vocab_size <= 65_536 else "<u4")


def open_rows(path: Path) -> np.ndarray:
    """Rows, memory-mapped. UserError for what is no .npy file, or has more or less in it than it says."""
    if not path.is_file():
        raise UserError(f"{path.name} is {'no regular file' if path.exists() else 'missing'}")
    try:
        rows_NL = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, TypeError, EOFError, OverflowError, MemoryError) as error:
        raise UserError(f"{path.name}: {' '.join(str(error).split())}") from error
    if not rows_NL.flags.c_contiguous or path.stat().st_size != rows_NL.offset + rows_NL.nbytes:
        raise UserError(f"{path.name} holds more or less than its header says")
    return rows_NL


def require_known(rows_NL: np.ndarray, vocab_size: int, row_N: np.ndarray) -> None:
    """DataError unless all ids of these rows are below `vocab_size`; `row_N` are their numbers in the file.

    JAX clamps indices that are out of bounds: it would silently train on damaged rows.
    """
    if rows_NL.size and rows_NL.max() >= vocab_size:
        bad = int(np.argmax((rows_NL >= vocab_size).any(axis=1)))
        raise DataError(
            f"row {int(row_N[bad])} of the corpus holds id {int(rows_NL[bad].max())}, beyond the {vocab_size} of the "
            "vocabulary: the rows are damaged; delete the data directory to prepare again"
        )


def unique_rows(rows_NL: np.ndarray, unique_tokens: int | None) -> np.ndarray:
    """The row ids that hold the first `unique_tokens` of a corpus in random order (None: all); of n ids, n <= N.

    The order is the same for every run, so less data is always a subset of more. Raises UserError where it is too much,
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
    """The training stream: batch s has the rows ids[s*B : (s+1)*B] of ids that Grain shuffles again every epoch.

    That is the global batch, whoever reads it: a process may take only the positions that its devices hold. Grain
    numbers orders by seed + epoch, so epoch 1 of seed 0 is epoch 0 of seed 1.
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
        """Take N rows, the global batch size, and which positions of it to read (default all).

        With `vocab_size` the ids of each batch are compared with it: see `require_known`. UserError as `unique_rows`.
        """
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

    def iterate(self, step: int) -> Generator[np.ndarray, None, None]:
        """Yield at(step), at(step + 1), ... without end, prefetched in threads; closing the iterator ends them."""
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
