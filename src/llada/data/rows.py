"""Documents to rows of token ids on disk, and rows to training batches.

Every row holds `sequence_length` ids cut from one long stream of documents, each ended by eos: no padding. A batch is
a pure function of (seed, step), so a resumed run, a run on other machines, and a run with another objective all read
the same rows in the same order. Letters: N rows on disk, B rows in a batch, L tokens in a row.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import grain
import numpy as np

from llada.data.sources import documents, is_holdout
from llada.data.tokenizer import Tokenizer
from llada.errors import UserError
from llada.files import write_atomically

_ENCODE_CHARACTERS = 4_000_000
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


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Rows of both sides, memory-mapped (uint16, or uint32 above 65,536 ids), and how they came about."""

    train_NL: np.ndarray
    holdout_NL: np.ndarray
    metadata: Metadata

    def verify(self) -> None:
        """Re-read every row; raises UserError if the bytes are not those that were prepared."""
        if _digest(self.train_NL, self.holdout_NL) != self.metadata.digest:
            raise UserError("corpus rows changed since they were prepared; delete the data directory to prepare again")


def prepare(
    directory: str | Path, source: str, tokenizer: Tokenizer, sequence_length: int, holdout_fraction: float
) -> Corpus:
    """Tokenise `source` into rows under `directory`, or reopen them if the same request made them before.

    metadata.json is written last: without it nothing here counts, and an interrupted call starts again.
    One process prepares; the others wait for it (see training/workdir.py). Raises UserError if the directory holds
    another corpus, if the source is bad (see sources.py), or if either side has too little text for one row.
    """
    directory = Path(directory)
    if sequence_length < 1:
        raise UserError(f"data.sequence_length={sequence_length} must be at least 1")
    if not 0 < holdout_fraction < 1:
        raise UserError(f"data.holdout_fraction={holdout_fraction} must lie between 0 and 1, both excluded")
    request = {
        "source": source,
        "sequence_length": sequence_length,
        "holdout_fraction": holdout_fraction,
        "tokenizer_sha256": tokenizer.sha256,
    }
    if (directory / "metadata.json").exists():
        corpus = open_corpus(directory)
        found = dataclasses.asdict(corpus.metadata)
        changed = [
            f"{name} ({found[name]!r}, asked {asked!r})" for name, asked in request.items() if asked != found[name]
        ]
        if changed:
            raise UserError(f"{directory} holds a corpus with another {', '.join(changed)}; give a fresh directory")
        return corpus
    directory.mkdir(parents=True, exist_ok=True)
    train = _RowWriter(directory / "train.npy", sequence_length, tokenizer.vocab_size)
    holdout = _RowWriter(directory / "holdout.npy", sequence_length, tokenizer.vocab_size)
    with train.file, holdout.file:
        for texts in _groups(documents(source)):
            for text, ids in zip(texts, tokenizer.encode_many(texts), strict=True):
                side = holdout if is_holdout(text, holdout_fraction) else train
                side.add([*ids, tokenizer.eos_id], len(text.encode()))
        for name, side in (("training", train), ("hold-out", holdout)):
            if not side.rows:
                raise UserError(
                    f"the {name} side has {side.tokens} tokens of {side.documents} documents, less than one row of "
                    f"data.sequence_length={sequence_length}; shorten it, change data.holdout_fraction="
                    f"{holdout_fraction} or give more documents"
                )
            side.finish()
    train_NL, holdout_NL = (np.load(directory / name, mmap_mode="r") for name in ("train.npy", "holdout.npy"))
    metadata = Metadata(
        **request,
        vocab_size=tokenizer.vocab_size,
        **{f"train_{name}": getattr(train, name) for name in ("documents", "tokens", "bytes", "rows")},
        **{f"holdout_{name}": getattr(holdout, name) for name in ("documents", "tokens", "bytes", "rows")},
        unigram_entropy_nats=_entropy_nats(train.counts_V),
        digest=_digest(train_NL, holdout_NL),
    )
    write_atomically(directory / "metadata.json", json.dumps(dataclasses.asdict(metadata), indent=2).encode())
    return Corpus(train_NL, holdout_NL, metadata)


def open_corpus(directory: str | Path) -> Corpus:
    """Open what `prepare` made. Raises UserError if it is missing, damaged, or its files disagree on their shape."""
    directory = Path(directory)
    try:
        metadata = Metadata(**json.loads((directory / "metadata.json").read_bytes()))
        train_NL, holdout_NL = (np.load(directory / name, mmap_mode="r") for name in ("train.npy", "holdout.npy"))
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise UserError(f"no usable corpus in {directory} ({error}); delete it to prepare again") from error
    found = train_NL.shape, holdout_NL.shape, train_NL.dtype, holdout_NL.dtype
    length, dtype = metadata.sequence_length, _id_dtype(metadata.vocab_size)
    expected = (metadata.train_rows, length), (metadata.holdout_rows, length), dtype, dtype
    if found != expected:
        raise UserError(f"rows in {directory} are {found}, metadata.json says {expected}; delete it to prepare again")
    return Corpus(train_NL, holdout_NL, metadata)


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
    ):
        """Take N rows, the global batch size, which positions of it to read (default all). UserError if impossible."""
        if batch_size < 1:
            raise UserError(f"train.batch_size={batch_size} must be positive")
        if not 0 <= seed < 2**32:
            raise UserError(f"seed={seed} must lie in 0..4294967295; set --config.seed")
        self.rows_NL = rows_NL
        self.batch_size = batch_size
        self._used = unique_rows(rows_NL, unique_tokens)
        self._ids = grain.MapDataset.range(len(self._used)).shuffle(seed=seed).repeat()
        self.positions = np.arange(batch_size) if positions is None else positions

    def at(self, step: int) -> np.ndarray:
        """Return the rows of batch `step` (0 is the first) at the positions: batch_BL int32, B = len(positions)."""
        start = step * self.batch_size
        ids_B = self._used[[self._ids[start + position] for position in self.positions.tolist()]]
        return self.rows_NL[ids_B].astype(np.int32)

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


class _RowWriter:
    """Appends rows to a .npy file whose length is not known in advance; counts what it sees."""

    def __init__(self, path: Path, sequence_length: int, vocab_size: int):
        self.path = path
        self.temporary = path.with_name(f"{path.name}.tmp")
        self.file = self.temporary.open("wb")
        self.sequence_length = sequence_length
        self.dtype = _id_dtype(vocab_size)
        self.documents = self.tokens = self.bytes = self.rows = 0
        self.counts_V = np.zeros(vocab_size, np.int64)
        self._pending: list[int] = []
        self._write_header()

    def add(self, ids: list[int], byte_count: int) -> None:
        self.documents += 1
        self.tokens += len(ids)
        self.bytes += byte_count
        self._pending += ids
        full = len(self._pending) // self.sequence_length * self.sequence_length
        if full:
            block = np.array(self._pending[:full], self.dtype)
            block.tofile(self.file)
            self.counts_V += np.bincount(block, minlength=len(self.counts_V))
            self.rows += full // self.sequence_length
            del self._pending[:full]

    def finish(self) -> None:
        self.file.seek(0)
        self._write_header()
        self.file.flush()
        os.fsync(self.file.fileno())
        os.replace(self.temporary, self.path)

    def _write_header(self) -> None:
        # NumPy pads the header for 21 digits of the first dimension, so rewriting it never moves the rows.
        shape = (self.rows, self.sequence_length)
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self.file, header)


def _id_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 65_536 else "<u4")


def _groups(texts: Iterator[str]) -> Iterator[list[str]]:
    """Gather documents until there is enough for all cores, and not more than memory takes."""
    group, characters = [], 0
    for text in texts:
        group.append(text)
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
    sha = hashlib.sha256()
    for rows_NL in sides_NL:
        for start in range(0, len(rows_NL), 4_096):
            sha.update(np.ascontiguousarray(rows_NL[start : start + 4_096]))
    return sha.hexdigest()
