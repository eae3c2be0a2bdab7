"""Rows of many pairs in batches of similar length: how likelihoods go through the model, a number for each row.

Shapes: B rows of a batch, L tokens, A answer tokens.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from llada import mesh as mesh_lib
from llada.inference import orders
from llada.inference.compiled_loop import Array
from llada.inference.mask_plans import Pair, padded_length

OnRows = Callable[[int, int], None]  # (rows done, of so many)


class Rows(NamedTuple):
    """What a program reads of a batch of rows besides its tokens.

    masked_BL, scored_BL  bool
    open_BL               bool, the answer: what guidance's unconditional branch sees, too
    lengths_B             int32, positions from there on are padding; None where there is none
    """

    masked_BL: Array
    scored_BL: Array
    open_BL: Array
    lengths_B: Array | None


class Row(NamedTuple):
    """One row of a plan, on its way into a batch; rows of different orders go into different ones."""

    pair: Pair
    masked_A: np.ndarray
    scored_A: np.ndarray
    order: orders.Order | None = None


def values_of_rows(
    program: Callable, rows: list[Row], batch_tokens: int, progress: OnRows | None = None, full: bool = False
) -> np.ndarray:
    """A number for every row, by `program(order, tokens_BL, Rows)`, which gives one for each, on batches of rows."""
    nats, done = np.zeros(len(rows)), 0
    for order in dict.fromkeys(row.order for row in rows):
        of_order = np.array([i for i, row in enumerate(rows) if row.order == order])
        lengths = np.array([len(rows[i].pair.prompt) + len(rows[i].pair.answer) for i in of_order])
        for index, L in _batches(lengths, batch_tokens):
            batch = of_order[index]
            B = _batch_size(batch_tokens, L) if full else 1 << (len(index) - 1).bit_length()
            stacked = _stacked([rows[i] for i in batch], B, L, full)
            nats[batch] = mesh_lib.on_host(program(order, *stacked))[: len(batch)]
            done += len(batch)
            if progress is not None:
                progress(done, len(rows))
    return nats


def _batches(lengths: np.ndarray, batch_tokens: int) -> Iterator[tuple[np.ndarray, int]]:
    """Pairs (indices, L): rows of similar length together, at most `batch_tokens` tokens, L few different numbers."""
    order = np.argsort(lengths, kind="stable")
    padded = np.array([padded_length(length) for length in lengths])
    for L in np.unique(padded):
        indices = order[padded[order] == L]
        size = _batch_size(batch_tokens, L)
        for start in range(0, len(indices), size):
            yield indices[start : start + size], int(L)


def _batch_size(batch_tokens: int, L: int) -> int:
    """Rows of a full batch: a power of two."""
    return 1 << (max(1, batch_tokens // int(L)).bit_length() - 1)


def _stacked(rows: list[Row], B: int, L: int, full: bool) -> tuple[np.ndarray, Rows]:
    """The rows as a batch of B rows of L tokens. Rows that fill it up score nothing.

    B, a power of two (few shapes, few compilations), is rounded up to the devices of the mesh. With `full` lengths are
    given even where all are L, so that there is one program for each L.
    """
    B = mesh_lib.local_batch(B, jax.sharding.get_abstract_mesh())
    tokens_BL = np.zeros((B, L), np.int32)
    masked_BL, scored_BL, open_BL = (np.zeros((B, L), bool) for _ in range(3))
    lengths_B = np.full(B, L, np.int32)
    for b, (pair, masked_A, scored_A, _) in enumerate(rows):
        start, end = len(pair.prompt), len(pair.prompt) + len(pair.answer)
        tokens_BL[b, :start], tokens_BL[b, start:end] = pair.prompt, pair.answer
        masked_BL[b, start:end], scored_BL[b, start:end] = masked_A, scored_A
        open_BL[b, start:end], lengths_B[b] = True, end
    padded = full or bool((lengths_B != L).any())
    return tokens_BL, Rows(masked_BL, scored_BL, open_BL, lengths_B if padded else None)
