"""Packing: examples of different lengths into rows of one length."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packed:
    """Rows of items: row r has `item_E[offset_R[r] : offset_R[r + 1]]`."""

    item_E: np.ndarray
    offset_R: np.ndarray

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.offset_R) - 1

    def row(self, index: int) -> np.ndarray:
        """The items of one row."""
        return self.item_E[self.offset_R[index] : self.offset_R[index + 1]]


def packed(items_E: np.ndarray, size_E: np.ndarray, room: int, rng: np.random.Generator) -> Packed:
    """Rows of items whose sizes sum to at most `room`, in random order.

    Best fit, largest first: an item goes where it leaves least room. Items of one size are taken in the order in which
    they come, so that shuffled ones meet other neighbours every epoch. Sizes are from 1 to `room`.
    """
    if len(size_E) and int(size_E.min()) * 2 > room:  # no two fit together
        return Packed(items_E[rng.permutation(len(items_E))], np.arange(len(items_E) + 1))
    members: list[list[int]] = []
    rows_by_room: list[list[int]] = [[] for _ in range(room + 1)]
    has_rows = 0  # bit r: whether rows_by_room[r] has any
    for index in np.argsort(-size_E, kind="stable").tolist():
        size = int(size_E[index])
        fitting = has_rows >> size
        if fitting:
            left = size + (fitting & -fitting).bit_length() - 1
            row = rows_by_room[left].pop()
            has_rows &= ~(1 << left) if not rows_by_room[left] else -1
        else:
            left, row = room, len(members)
            members.append([])
        members[row].append(index)
        left -= size
        if left:
            rows_by_room[left].append(row)
            has_rows |= 1 << left
    order = rng.permutation(len(members)).tolist()
    counts = [len(members[row]) for row in order]
    return Packed(items_E[[index for row in order for index in members[row]]], np.cumsum([0, *counts]))
