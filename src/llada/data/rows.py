"""Rows of token ids on disk, and the training batches made of them.

Every row holds `sequence_length` ids cut from one long stream of documents, each ended by eos: no padding. A batch is
a pure function of (seed, step), so a resumed run, a run on other machines, and a run with another objective all read
the same rows in the same order. Rows are written by `prepare.py`, and compared with their checksums when they are read.
Letters: N rows on disk, B rows in a batch, L tokens in a row.
"""

import dataclasses
import hashlib
import math
import typing
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, TypeVar

import grain
import numpy as np

from llada import json_files
from llada.config import Config, DataConfig
from llada.data import checksums
from llada.data.checksums import CheckedRows, Rows
from llada.data.row_packer import id_dtype
from llada.data.tokenizer import Tokenizer
from llada.errors import DataError, UserError, in_brief
from llada.files import write_atomically

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
    checksums: str | None = None  # sha256 over the checksums of both sides' rows; None in corpora of an older llada


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Rows of both sides (uint16, or uint32 above 65,536 ids), memory-mapped or in records, and how they came about.

    `checksums`: of the rows of each side; None where it was prepared without.
    """

    train_NL: Rows
    holdout_NL: Rows
    metadata: Metadata
    checksums: tuple[np.ndarray, np.ndarray] | None = None

    def checked(self, vocab_size: int) -> tuple[CheckedRows, CheckedRows]:
        """Both sides, training first, compared when they are read."""
        train_N, holdout_N = self.checksums or (None, None)
        return CheckedRows(self.train_NL, train_N, vocab_size), CheckedRows(self.holdout_NL, holdout_N, vocab_size)

    def batches(self, config: Config, tokenizer: Tokenizer, positions: np.ndarray | None = None) -> "Batches":
        """The training stream of a run; `positions` of the global batch are read, default all."""
        size, unique, tokens = config.train.batch_size, config.data.unique_tokens, self.metadata.train_tokens
        train = self.checked(tokenizer.vocab_size)[0]
        batches = Batches(train, size, config.seed, unique, positions, config.row_copies)
        batches.epoch_tokens = min(unique or tokens, tokens)
        return batches

    def held_out(self, config: Config, tokenizer: Tokenizer) -> CheckedRows:
        """The held-out rows."""
        return self.checked(tokenizer.vocab_size)[1]

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
        metadata = read_metadata(directory / "metadata.json", Metadata)
        train_NL, holdout_NL = (open_rows(directory / name) for name in ("train.npy", "holdout.npy"))
        sums = open_checksums(directory, metadata.checksums, metadata.train_rows, metadata.holdout_rows)
    except (UserError, OSError) as error:
        raise DataError(f"no usable corpus in {directory} ({error}); {again}") from error
    shapes = train_NL.shape, holdout_NL.shape, train_NL.dtype, holdout_NL.dtype
    length, dtype = metadata.sequence_length, id_dtype(metadata.vocab_size)
    expected = (metadata.train_rows, length), (metadata.holdout_rows, length), dtype, dtype
    if shapes != expected:
        raise DataError(f"rows in {directory} are {shapes}, metadata.json says {expected}; {again}")
    return Corpus(train_NL, holdout_NL, metadata, sums)


def open_checksums(
    directory: Path, expected: str | None, train: int, holdout: int, *more: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | None:
    """The checksums of both sides, of so many records; None where no sha256 is `expected`: prepared without.

    UserError unless they, and `more` arrays that are opened with them, have that sha256.
    """
    if expected is None:
        return None
    paths = [directory / f"{side}{checksums.SUFFIX}" for side in ("train", "holdout")]
    train_N, holdout_N = (np.array(open_rows(path)) for path in paths)
    for path, sums_N, count in zip(paths, (train_N, holdout_N), (train, holdout), strict=True):
        checksums.require_count(path, sums_N, count)
    if checksums.sha256(train_N, holdout_N, *more) != expected:
        raise UserError("its checksums are not what was written: their sha256 is another")
    return train_N, holdout_N


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


_M = TypeVar("_M")


def write_metadata(path: Path, metadata: Any) -> None:
    """Write what `read_metadata` reads, with its seal."""
    values = json_files.sealed(dataclasses.asdict(metadata))
    write_atomically(path, json_files.dumps(values, indent=2).encode())


def read_metadata(path: Path, kind: type[_M]) -> _M:
    """A dataclass from a JSON file. UserError unless every field is there, of its type, possible, and as written."""
    values = json_files.read(path)
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]  # a dataclass
    for field in fields:
        name = field.name
        if name not in values and field.default is dataclasses.MISSING:
            raise UserError(f"{path.name} has no {name}")
        value, kinds = values.get(name, field.default), typing.get_args(field.type) or (field.type,)
        if isinstance(value, bool) != (bool in kinds) or not isinstance(
            value, (*kinds, int) if float in kinds else kinds
        ):
            raise UserError(f"{path.name}: {name} is {value!r:.80}, not {' or '.join(kind.__name__ for kind in kinds)}")
        if isinstance(value, int | float) and not 0 <= value < _MOST_OF_ANYTHING:
            raise UserError(f"{path.name}: {name}={value} is not possible")
    if min(values[name] for name in ("sequence_length", "vocab_size", "train_rows", "holdout_rows")) < 1:
        raise UserError(f"{path.name} says that there are no rows")
    checksums.require_seal(values, path.name)
    return kind(**{field.name: values[field.name] for field in fields if field.name in values})


def open_rows(path: Path) -> np.ndarray:
    """Rows, memory-mapped. UserError for what is no .npy file, or has more or less in it than it says."""
    if not path.is_file():
        raise UserError(f"{path.name} is {'no regular file' if path.exists() else 'missing'}")
    try:
        rows_NL = np.lib.format.open_memmap(path, mode="r")
    except OSError:
        raise
    except Exception as error:  # of NumPy's parser of headers, which raises all kinds, tokenize's among them
        raise UserError(f"{path.name}: {in_brief(error)}") from error
    if not rows_NL.flags.c_contiguous or path.stat().st_size != rows_NL.offset + rows_NL.nbytes:
        raise UserError(f"{path.name} holds more or less than its header says")
    return rows_NL


def unique_rows(rows_NL: np.ndarray | CheckedRows, unique_tokens: int | None) -> np.ndarray:
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

    With `copies` each of them is in the batch so many times, one after the other, and batch s has B / copies of them.
    That is the global batch, whoever reads it: a process may take only the positions that its devices hold. Grain
    numbers orders by seed + epoch, so epoch 1 of seed 0 is epoch 0 of seed 1.
    """

    def __init__(
        self,
        rows_NL: np.ndarray | CheckedRows,
        batch_size: int,
        seed: int,
        unique_tokens: int | None = None,
        positions: np.ndarray | None = None,
        copies: int = 1,
    ):
        """Take N rows, the global batch size, and which positions of it to read (default all).

        UserError as `unique_rows`.
        """
        self.rows_NL = rows_NL
        self.batch_size = batch_size
        self._used = unique_rows(rows_NL, unique_tokens)
        self._ids = grain.MapDataset.range(len(self._used)).shuffle(seed=seed).repeat()
        self.positions = np.arange(batch_size) if positions is None else positions
        self.copies = copies
        self.epoch_tokens = self._used.size * rows_NL.shape[1]

    def at(self, step: int) -> np.ndarray:
        """Return the rows of batch `step` (0 is the first) at the positions: batch_BL int32, B = len(positions).

        DataError for rows that are damaged.
        """
        return self.rows_NL[self.row_ids(step)].astype(np.int32)

    def row_ids(self, step: int) -> np.ndarray:
        """Which rows those are: ids_B."""
        start = step * self.batch_size
        return self._used[[self._ids[(start + position) // self.copies] for position in self.positions.tolist()]]

    def epochs(self, steps: int) -> float:
        """How often so many steps read the tokens that may be read; copies in a batch are read once."""
        return steps * self.batch_size * self.rows_NL.shape[1] / self.epoch_tokens / self.copies

    def steps(self, epochs: float) -> int:
        """Steps that read the rows so often."""
        return max(1, math.ceil(epochs * len(self._used) * self.copies / self.batch_size))

    def iterate(self, step: int) -> Generator[np.ndarray, None, None]:
        """Yield at(step), at(step + 1), ... without end, prefetched in threads; closing the iterator ends them."""
        yield from prefetched(self.at, step)


def prefetched(at: Callable[[int], Any], step: int) -> Generator[Any, None, None]:
    """Yield at(step), at(step + 1), ... without end, computed in threads; closing the iterator ends them."""
    steps = grain.MapDataset.range(step, _STEPS_FOREVER).map(at)
    reader = iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)))
    try:
        yield from reader
    finally:
        reader.close()


def chain_digest(digest: str, *arrays_BL: np.ndarray) -> str:
    """Return sha256 (hex) of the digest so far ("" at first) and this batch as little-endian int32, row by row.

    Equal digests after step s mean that two runs read identical rows in identical order up to s. A batch of several
    arrays counts one after the other.
    """
    content = (np.ascontiguousarray(x_BL, "<i4").tobytes() for x_BL in arrays_BL)
    return hashlib.sha256(digest.encode() + b"".join(content)).hexdigest()
