"""Saved arrays on disk, opened with tensorstore: read piece by piece, or onto a mesh, and checked by their digests.

Orbax keeps an array as a zarr array in a tensorstore OCDBT database. Reading it needs no agreement of processes: each
reads what its devices hold, and a damaged file fails in one place, on all alike.
"""

import functools
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore

from llada import processes
from llada.training import digests as digests_lib
from llada.training.digests import Digests

FILE_BYTES = 128 << 20  # of the files that hold the arrays; several are written at once: twice the speed of one
_READ_BYTES = 64 << 20  # of one read, which brings in several chunks side by side
_READERS = 4  # leaves that are read at the same time


class Damage(Exception):
    """What was read is not what was saved."""


class Leaf:
    """One array on disk. `sums` are of what has been read or written through it, compared once all of it was read."""

    def __init__(self, name: str, array: tensorstore.TensorStore, expected: list[int] | None = None):
        """Hold an opened array and the digests that it should have; see `open_leaves`."""
        self.name, self._array, self._expected = name, array, expected
        self.shape: tuple[int, ...] = tuple(array.shape)
        self.dtype = np.dtype(array.dtype.numpy_dtype)
        # Of the first axis: what one read brings in anyway.
        self.chunk_rows = int((array.chunk_layout.read_chunk.shape or self.shape or (1,))[0] or 1)
        self.sums = digests_lib.empty(name, self.shape)
        self._unread = np.ones(len(self), bool)

    def __len__(self) -> int:
        """Size of the first axis."""
        return self.shape[0] if self.shape else 1

    def read(self, rows: int | slice = slice(None)) -> np.ndarray:
        """The rows, or the one row, of the first axis. Damage where a digest says that they are not what was saved.

        A layer is compared as it is read, a leaf without layers once all of its rows have been.
        """
        start, stop, _ = (slice(rows, rows + 1) if isinstance(rows, int) else rows).indices(len(self))
        values = self.piece((slice(start, stop),))
        if self._expected is not None:
            self._compare(values, start, stop)
        return values[0] if isinstance(rows, int) else values

    def piece(self, index: tuple[slice, ...]) -> np.ndarray:
        """Any piece, not compared with anything."""
        return np.asarray(self._array[index if self.shape else ()].read().result())

    def blocks(self) -> Iterator[slice]:
        """Slices of rows that are best read at once."""
        row_bytes = max(1, math.prod(self.shape[1:]) * self.dtype.itemsize)
        size = max(1, _READ_BYTES // row_bytes // self.chunk_rows) * self.chunk_rows
        return (slice(start, min(start + size, len(self))) for start in range(0, len(self), size))

    def write(self, values: np.ndarray, *index: int | slice) -> tensorstore.Future:
        """Start writing a piece of the first axis; whole chunks are fastest: layers, or `chunk_rows` rows.

        `values` may change on return; the piece is on the disk once the future has its result.
        """
        whole = np.asarray(values, self.dtype)
        first = index[0] if index else 0
        start = first.indices(len(self))[0] if isinstance(first, slice) else first
        whole = whole[None] if index and not isinstance(first, slice) else whole
        digests_lib.add_piece(self.sums, self.name, whole, self.shape, (start, *(0 for _ in self.shape[1:])))
        writing = self._array[index].write(values)
        writing.copy.result()
        return writing.commit

    def _compare(self, values: np.ndarray, start: int, stop: int) -> None:
        stacked, expected = digests_lib.is_stacked(self.name), self._expected or []
        if stacked:  # what has not been read yet counts as right
            found = digests_lib.empty(self.name, self.shape)
        elif self._unread[start:stop].all():
            found = self.sums
        else:  # read again: it has been compared, or will be
            return
        starts = (start, *(0 for _ in self.shape[1:]))[: len(self.shape)]
        digests_lib.add_piece(found, self.name, values, self.shape, starts)
        self._unread[start:stop] = False
        if stacked:
            found = [*expected[:start], *found[start:stop], *expected[stop:]]
        elif self._unread.any():
            return
        if wrong := digests_lib.difference(self.name, found, expected):
            raise Damage(wrong)


def open_leaves(directory: Path, digests: Digests | None = None, rewrite: bool = False) -> dict[str, Leaf]:
    """Every array in an item of a step by its dotted name (`layers.query`), opened but not read.

    With `digests`, Damage where the names are not theirs. With `rewrite` what they held is gone, pieces never written
    read as zero, and arrays are uncompressed.
    """
    # Not as a URL: a path may hold "#", "?" or "%".
    base = {"driver": "file", "path": f"{directory}/"}
    database = {"driver": "ocdbt", "base": base, "target_data_file_size": FILE_BYTES}
    context = tensorstore.Context()
    store = tensorstore.KvStore.open(database, context=context).result()
    names = [key.decode().removesuffix("/.zarray") for key in store.list().result() if key.endswith(b"/.zarray")]
    if digests is not None and (missing := digests.keys() ^ set(names)):
        name = min(missing)
        raise Damage(f"{name} is missing" if name in digests else f"there is no digest of {name}")
    leaves = {}
    for name in names:
        spec = {"driver": "zarr", "kvstore": database | {"path": name}}
        array = tensorstore.open(spec, open=True, read=True, context=context).result()
        if rewrite:
            spec["metadata"] = array.spec().to_json()["metadata"] | {"compressor": None, "fill_value": 0.0}
            array = tensorstore.open(spec, create=True, delete_existing=True, context=context).result()
        leaves[name] = Leaf(name, array, None if digests is None else digests[name])
        if digests is not None and len(leaves[name].sums) != len(digests[name]):
            raise Damage(f"{name} has the shape {leaves[name].shape}, its digests are of another")
    return leaves


def restore(directory: Path, target: Any, digests: Digests | None) -> Any:
    """The arrays of an item as `target` says: its shapes, dtypes and shardings, whatever mesh wrote them.

    What was read is compared before it is cast. Damage where it is not what was saved. Of several processes all must
    call it, and it ends alike on all.
    """
    wanted = digests_lib.by_name(target)
    with processes.agreement(), ThreadPoolExecutor(_READERS) as pool:
        leaves = open_leaves(directory, digests)
        shapes = {name: leaf.shape for name, leaf in leaves.items()}
        for name in sorted(wanted.keys() | shapes.keys()):
            if name not in wanted or wanted[name].shape != shapes.get(name):
                asked = wanted[name].shape if name in wanted else "none"
                raise Damage(f"{name} is {shapes.get(name, 'missing')}, its config wants {asked}")
        sums: Digests = {name: digests_lib.empty(name, shape) for name, shape in shapes.items()}
        arrays = list(pool.map(lambda name: _restore_leaf(leaves[name], wanted[name], sums[name]), wanted))
    if digests is not None:
        everywhere = processes.gather(sums)
        for name in wanted:
            found = [sum(parts) % (1 << 32) for parts in zip(*(theirs[name] for theirs in everywhere), strict=True)]
            if wrong := digests_lib.difference(name, found, digests[name]):
                raise Damage(wrong)
    return jax.tree.unflatten(jax.tree.structure(target), arrays)


def _restore_leaf(leaf: Leaf, target: jax.ShapeDtypeStruct, sums: list[int]) -> jax.Array:
    """A leaf on its devices; of pieces that several processes hold the first one adds the digest to its `sums`."""
    first_process: dict[tuple, int] = {}
    for device, index in target.sharding.devices_indices_map(leaf.shape).items():
        key = _bounds(index, leaf.shape)
        first_process[key] = min(device.process_index, first_process.get(key, device.process_index))

    @functools.cache
    def read(key: tuple[tuple[int, int], ...]) -> np.ndarray:
        piece = np.empty([stop - start for start, stop in key], target.dtype)
        counts = first_process[key] == processes.index()
        rows = leaf.blocks() if key else [slice(0, 1)]
        for block in rows:
            start, stop = (max(block.start, key[0][0]), min(block.stop, key[0][1])) if key else (0, 1)
            if start >= stop:
                continue
            values = leaf.piece((slice(start, stop), *(slice(*bounds) for bounds in key[1:])))
            if counts:
                starts = (start, *(bounds[0] for bounds in key[1:])) if key else ()
                digests_lib.add_piece(sums, leaf.name, values, leaf.shape, starts)
            piece[slice(start - key[0][0], stop - key[0][0]) if key else ()] = values
        return piece

    return jax.make_array_from_callback(leaf.shape, target.sharding, lambda i: read(_bounds(i or (), leaf.shape)))


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """First and last + 1 along each axis."""
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
