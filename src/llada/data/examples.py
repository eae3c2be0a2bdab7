"""Examples of dialogues on disk, and the batches of fine-tuning made of them.

An example is one assistant turn: a prompt, everything before it, and its answer. Examples of one dialogue share their
tokens where each prompt goes on from the example before. Which examples an epoch reads, which of them share a row, and
in what order, is a pure function of (seed, epoch), so a resumed run, a run on other machines, and the ARM beside a
LLaDA read the same rows. Files are written by `prepare_dialogues.py`.
Letters: N ids of one side on disk, E examples, B rows in a batch, L tokens in a row.
"""

import bisect
import dataclasses
import functools
import math
import threading
import zlib
from collections.abc import Generator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llada.config import Config
from llada.data import checksums, rows
from llada.data.packing import Packed, packed
from llada.data.tokenizer import Tokenizer
from llada.errors import DataError, UserError
from llada.objectives.contract import ANSWER, PADDING, Examples

SIDES = ("train", "holdout")
# Columns of the table of examples: ids[start:answer] is the prompt, ids[answer:end] the answer; `dialogue` and `turn`
# count from 0, `label` is an index into Metadata.labels.
COLUMNS = ("start", "answer", "end", "dialogue", "turn", "label")


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What dialogues were prepared from, and their number. Tokens are those of all examples' ids, stored once.

    left_out   examples whose prompt fills a row          truncated  examples whose answer was cut at the row's end
    own_start  whether a template's first token was dropped because an ARM reads it before every text by itself
    """

    kind: str
    source: str
    sequence_length: int
    holdout_fraction: float
    holdout_source: str | None
    tokenizer_sha256: str
    vocab_size: int
    too_long: str
    own_start: bool
    train_documents: int
    train_tokens: int
    train_bytes: int
    train_rows: int
    holdout_documents: int
    holdout_tokens: int
    holdout_bytes: int
    holdout_rows: int
    left_out: int
    truncated: int
    labels: list
    unigram_entropy_nats: float  # of all training ids
    digest: str  # sha256 over ids and tables of both sides
    checksums: str | None = None  # sha256 over the examples' checksums and the tables; None in those of an older llada


class Side(NamedTuple):
    """One side: its ids, memory-mapped, its table of examples (int64, columns as in COLUMNS), and their checksums.

    `checksums_E` are of each example's ids; None where it was prepared without.
    """

    ids_N: np.ndarray
    table_E6: np.ndarray
    checksums_E: np.ndarray | None = None

    def read(self, example: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids of a prompt and its answer. DataError for damage, naming file, example and byte."""
        start, answer, end = self.table_E6[example, :3].tolist()
        ids = np.array(self.ids_N[start:end])
        if self.checksums_E is not None and zlib.crc32(ids.data) != self.checksums_E[example]:
            what = "is not what was written: its crc32 is another"
            raise checksums.damaged(self.ids_N, f"example {example}", start, what)
        if ids.max() >= vocab_size:
            at = int(np.argmax(ids >= vocab_size))
            what = checksums.beyond(int(ids[at]), vocab_size)
            raise checksums.damaged(self.ids_N, f"example {example}", start + at, what)
        return ids[: answer - start], ids[answer - start :]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Both sides, and how they came about."""

    train: Side
    holdout: Side
    metadata: Metadata

    def batches(self, config: Config, tokenizer: Tokenizer, positions: np.ndarray | None = None) -> "Batches":
        """The training stream of a run; `positions` of the global batch are read, default all."""
        return Batches(self.train, config, Layout.of(config, tokenizer), positions)

    def held_out(self, config: Config, tokenizer: Tokenizer) -> "HeldOut":
        """The held-out examples as rows of one each."""
        return HeldOut(self.holdout, Layout.of(config, tokenizer), config.dialogues.turns)

    def text_bytes(self, token_bytes_V: np.ndarray) -> np.ndarray:
        """Bytes of text that each id stands for."""
        return token_bytes_V


def open_corpus(directory: Path) -> Corpus:
    """Open what `prepare_dialogues.prepare` wrote. DataError if it is missing, damaged, or its files disagree."""
    again = "delete it to prepare again"
    try:
        metadata = rows.read_metadata(directory / "metadata.json", Metadata)
        train = _open_side(directory, "train", metadata.train_tokens, metadata.vocab_size)
        held_out = _open_side(directory, "holdout", metadata.holdout_tokens, metadata.vocab_size)
        counts, tables = (metadata.train_rows, metadata.holdout_rows), (train.table_E6, held_out.table_E6)
        train_E, holdout_E = rows.open_checksums(directory, metadata.checksums, *counts, *tables) or (None, None)
    except (UserError, OSError) as error:
        raise DataError(f"no usable corpus of dialogues in {directory} ({error}); {again}") from error
    if tuple(map(len, tables)) != counts:
        raise DataError(f"the tables in {directory} have other numbers of examples than metadata.json; {again}")
    return Corpus(train._replace(checksums_E=train_E), held_out._replace(checksums_E=holdout_E), metadata)


def _open_side(directory: Path, name: str, tokens: int, vocab_size: int) -> Side:
    ids_N1, table_E6 = (rows.open_rows(directory / f"{name}{suffix}") for suffix in (".npy", ".examples.npy"))
    if ids_N1.shape != (tokens, 1) or table_E6.ndim != 2 or table_E6.shape[1] != len(COLUMNS):
        raise UserError(f"{name}.npy is {ids_N1.shape}, {name}.examples.npy {table_E6.shape}")
    if (ids_N1.dtype, table_E6.dtype) != (rows.id_dtype(vocab_size), np.dtype("<i8")):
        raise UserError(f"{name}.npy holds {ids_N1.dtype}, {name}.examples.npy {table_E6.dtype}")
    table_E6 = np.asarray(table_E6)
    start, answer, end = table_E6[:, 0], table_E6[:, 1], table_E6[:, 2]
    if len(table_E6) and not ((start >= 0) & (start <= answer) & (answer < end) & (end <= tokens)).all():
        raise UserError(f"{name}.examples.npy points outside {name}.npy")
    return Side(ids_N1[:, 0], table_E6)


def open_matching(directory: Path, config: Config, tokenizer: Tokenizer | None = None, flag: str = "") -> Corpus:
    """The examples in `directory`; UserError where they were prepared by other values, or another tokenizer.

    None for a tokenizer that is not known yet.
    """
    corpus = open_corpus(directory)
    if changed := differences(corpus.metadata, config, tokenizer):
        raise UserError(f"{flag}{directory} holds dialogues with another {', '.join(changed)}; give a fresh directory")
    return corpus


def differences(metadata: Metadata, config: Config, tokenizer: Tokenizer | None = None) -> list[str]:
    """Names of the settings in which these examples differ from those that are asked for."""
    names = ("source", "sequence_length", "holdout_fraction", "holdout_source")
    asked = {name: getattr(config.data, name) for name in names} | {"too_long": config.dialogues.too_long}
    if tokenizer is not None:
        asked |= {"tokenizer_sha256": tokenizer.sha256, "own_start": own_start(config, tokenizer)}
    has = dataclasses.asdict(metadata)
    return [f"{name} ({has[name]!r}, asked {value!r})" for name, value in asked.items() if value != has[name]]


def own_start(config: Config, tokenizer: Tokenizer) -> bool:
    """Whether the model reads a token before every text by itself that templates write, too: an imported ARM's."""
    return config.model.causal and tokenizer.special.bos is not None


class Layout(NamedTuple):
    """How examples lie in rows of L tokens: each padded to a multiple of `bucket`, with `padding_P` in a cycle.

    padding_P  ids that follow an answer and are predicted; empty where padding is neither seen nor predicted
    """

    L: int
    bucket: int
    padding_P: np.ndarray
    filler: int
    vocab_size: int

    @classmethod
    def of(cls, config: Config, tokenizer: Tokenizer) -> "Layout":
        """The layout of a run. UserError where its padding needs tokens that the tokenizer has not."""
        L, padding = config.data.sequence_length, config.dialogues.padding
        ids = {"eos": (tokenizer.eos_id,), "ignore": (), "rainbow": tokenizer.filler_ids}[padding]
        if padding == "rainbow" and not ids:
            raise UserError(
                "--config.dialogues.padding=rainbow: the tokenizer has no padding tokens <|pad_0|>, ...; begin from a "
                "model with rows that no text uses (--init), or use eos"
            )
        bucket = config.dialogues.bucket or L
        return cls(L, bucket, np.array(ids, np.int32), tokenizer.eos_id, tokenizer.vocab_size)

    def units(self, length_E: np.ndarray) -> np.ndarray:
        """Buckets that examples of so many tokens take."""
        return -(-length_E // self.bucket)

    def rows(self, side: Side, examples_of_rows: list[np.ndarray]) -> Examples:
        """`Examples` with a row for each array of examples, in that order from the row's start."""
        shape = len(examples_of_rows), self.L
        out = Examples(np.full(shape, self.filler, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.int32))
        for i, examples in enumerate(examples_of_rows):
            begin = 0
            for number, example in enumerate(examples.tolist(), 1):
                begin = self._write(side, example, number, out, i, begin)
        return out

    def _write(self, side: Side, example: int, number: int, out: Examples, row: int, begin: int) -> int:
        """Write one example as the row's `number`-th, from `begin` on; where the next one begins."""
        prompt, answer = side.read(example, self.vocab_size)
        first, last = begin + len(prompt), begin + len(prompt) + len(answer)
        stop = begin + -(-(last - begin) // self.bucket) * self.bucket
        out.tokens_BL[row, begin:first], out.tokens_BL[row, first:last] = prompt, answer
        out.role_BL[row, first:last] = ANSWER
        if len(self.padding_P):
            out.tokens_BL[row, last:stop] = np.resize(self.padding_P, stop - last)
            out.role_BL[row, last:stop] = PADDING
        out.example_BL[row, begin : stop if len(self.padding_P) else last] = number
        return stop


class Batches:
    """The training stream: batch s has rows s*B to (s+1)*B of all epochs' rows, one epoch after the other."""

    def __init__(self, side: Side, config: Config, layout: Layout, positions: np.ndarray | None = None):
        self.side, self.layout, self.seed, self.turns = side, layout, config.seed, config.dialogues.turns
        self.batch_size = config.train.batch_size
        self.positions = np.arange(self.batch_size) if positions is None else positions
        self._lock = threading.Lock()  # rows are read by several threads
        self._first_row = [0]  # of each epoch, as far as they are known
        self.epoch = functools.lru_cache(maxsize=2)(self._epoch)

    def at(self, step: int) -> Examples:
        """The rows of batch `step` (0 is the first) at the positions: (B, L) int32, B = len(positions)."""
        return self.layout.rows(self.side, [self._row(step * self.batch_size + i) for i in self.positions.tolist()])

    def iterate(self, step: int) -> Generator[Examples, None, None]:
        """Yield at(step), at(step + 1), ... without end, prefetched; closing the iterator ends it."""
        yield from rows.prefetched(self.at, step)

    def epochs(self, steps: int) -> float:
        """How many epochs so many steps are, by the size of the first."""
        return steps * self.batch_size / len(self.epoch(0))

    def steps(self, epochs: float) -> int:
        """Steps of so many epochs, by the size of the first."""
        return max(1, math.ceil(epochs * len(self.epoch(0)) / self.batch_size))

    def _row(self, index: int) -> np.ndarray:
        """The examples of one row of the stream."""
        with self._lock:
            epoch = bisect.bisect_right(self._first_row, index) - 1
            while index >= (end := self._first_row[epoch] + len(self.epoch(epoch))):
                epoch += 1
                if epoch == len(self._first_row):
                    self._first_row.append(end)
            return self.epoch(epoch).row(index - self._first_row[epoch])

    def _epoch(self, epoch: int) -> Packed:
        """The rows of an epoch, in order."""
        rng = np.random.default_rng((self.seed, epoch))
        examples = rng.permutation(chosen(self.side.table_E6, self.turns, rng))
        length = self.side.table_E6[examples, 2] - self.side.table_E6[examples, 0]
        return packed(examples, self.layout.units(length), self.layout.L // self.layout.bucket, rng)


def chosen(table_E6: np.ndarray, turns: str, rng: np.random.Generator | None = None) -> np.ndarray:
    """Examples that count: all for `each`, every dialogue's last for `last`, and one of each, by `rng`, for `drawn`."""
    if turns == "each" or not len(table_E6):
        return np.arange(len(table_E6))
    # Examples of a dialogue are neighbours, in the order of their turns.
    first = np.flatnonzero(np.diff(table_E6[:, 3], prepend=-1))
    count = np.diff(first, append=len(table_E6))
    if turns == "last":
        return first + count - 1
    assert rng is not None
    return first + (rng.random(len(first)) * count).astype(np.int64)


class HeldOut:
    """Held-out examples as rows, one example each: `held_out[indices]` are `Examples`, `len` their number.

    With `turns` "last" those of last turns; else all, as what is drawn in training is any of them.
    """

    def __init__(self, side: Side, layout: Layout, turns: str):
        self.side, self.layout = side, layout
        self.examples = chosen(side.table_E6, "last" if turns == "last" else "each")

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, indices: np.ndarray) -> Examples:
        return self.layout.rows(self.side, [self.examples[i : i + 1] for i in np.atleast_1d(indices).tolist()])

    def pair(self, index: int) -> tuple[list[int], list[int]]:
        """Ids of a prompt and its answer."""
        prompt, answer = self.side.read(int(self.examples[index]), self.layout.vocab_size)
        return prompt.tolist(), answer.tolist()

    def turn_and_label(self, index: int) -> tuple[int, int]:
        """Which assistant turn of its dialogue the example is, from 0, and its label's index in Metadata.labels."""
        turn, label = self.side.table_E6[self.examples[index], 4:6].tolist()
        return turn, label
