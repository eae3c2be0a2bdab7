"""Digests of saved arrays, which any mesh and any reader of pieces can compute: sums over elements, modulo 2^32.

The bits of an element are mixed with its row-major position by a bijection, and the results of all elements are added.
So pieces of any shape have digests that add up to that of the whole: devices sum their shards, processes their sums,
and nobody needs to hold a chunk completely. One wrong element always changes the sum; several, or elements that have
changed places, with probability 1 - 2^-32. A leaf that is stacked over layers has one digest for each layer, any other
leaf one.
"""

import functools
import hashlib
import json
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llada import mesh as mesh_lib

Digests = dict[str, list[int]]  # by a leaf's dotted name
_STEP, _FIRST, _SECOND = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35  # odd, so that multiplying by one loses nothing
_MODULUS = 1 << 32
_BLOCK = 1 << 15  # elements: they and their positions stay in a core's cache


def by_name(tree: Any) -> dict[str, Any]:
    """Leaves by dotted name, as Orbax calls them on disk: `layers.query`, `1.0.mu.layers.query`."""
    return {
        ".".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", "")))) for key in path): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def is_stacked(name: str) -> bool:
    """Whether the first axis of a leaf is that of layers."""
    return "layers" in name.split(".")


def of_items(items: dict[str, Any]) -> dict[str, Digests]:
    """Digests of each item's arrays, computed where they lie. Of several processes all must call it.

    One program at a time: XLA on CPU has as many threads as cores, and the collectives of two programs that run at once
    on pretended devices may hold all of them, each waiting for the other.
    """
    sums = {
        item: {
            name: jax.block_until_ready(_device_sums(leaf, is_stacked(name))) for name, leaf in by_name(tree).items()
        }
        for item, tree in items.items()
    }
    return jax.tree.map(lambda x: x.tolist(), mesh_lib.on_host(sums))


def combined(digests: Digests) -> str:
    """The sha256 (hex) of all leaves' digests: one word for the bits of an item, on any mesh."""
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def fingerprints(items: dict[str, Digests]) -> dict[str, str]:
    """What `summary.json` says of the bits that a run ends with, from the digests of its items."""
    return {
        "parameters_sha256": combined(items["params"]),
        "moments_sha256": combined(items["optimizer_state"]),
    }


def empty(name: str, shape: tuple[int, ...]) -> list[int]:
    """Sums to which the pieces of a leaf are added."""
    return [0] * _count(name, shape)


def add_piece(sums: list[int], name: str, values: np.ndarray, shape: tuple[int, ...], starts: tuple[int, ...]) -> None:
    """Add a piece, which begins at `starts` of a leaf of that shape, to the sums of the leaf."""
    if is_stacked(name):
        for i, layer in enumerate(values, starts[0]):
            sums[i] = (sums[i] + _of_piece(layer, shape[1:], starts[1:])) % _MODULUS
    else:
        sums[0] = (sums[0] + _of_piece(values, shape, starts)) % _MODULUS


def difference(name: str, found: list[int], expected: list[int] | None) -> str | None:
    """What is wrong with a leaf whose sums are these; None where nothing is."""
    if expected is None:
        return f"there is no digest of {name}"
    if found == expected:
        return None
    wrong = [i for i, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]]
    layers = f" in layer{'s' if wrong[1:] else ''} {', '.join(map(str, wrong))}" if is_stacked(name) and wrong else ""
    return f"{name} is not what was saved{layers}: its digest is another"


def _count(name: str, shape: tuple[int, ...]) -> int:
    return shape[0] if is_stacked(name) else 1


@functools.partial(jax.jit, static_argnames="stacked")  # a leaf at a time: parameters and moments share programs
def _device_sums(x: jax.Array, stacked: bool) -> jax.Array:
    """All sums of a leaf, uint32, on every device."""
    x = x if stacked else x[None]
    position = jnp.full(x.shape, _salt(x.dtype), jnp.uint32)
    for axis, stride in enumerate(_strides(x.shape[1:]), 1):
        position += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * np.uint32(stride * _STEP % _MODULUS)
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    mixed = (bits ^ position) * np.uint32(_FIRST)
    mixed = (mixed ^ (mixed >> 16)) * np.uint32(_SECOND)
    sums = (mixed ^ (mixed >> 13)).sum(axis=tuple(range(1, x.ndim)), dtype=jnp.uint32)
    return mesh_lib.constrain(sums, "replicated")


def _of_piece(values: np.ndarray, shape: tuple[int, ...], starts: tuple[int, ...]) -> int:
    """The sum over a piece of an array without an axis of layers."""
    if not shape:
        values, shape, starts = values.reshape(1), (1,), (0,)
    bits = np.ascontiguousarray(values).view(f"uint{8 * values.dtype.itemsize}")
    strides, axis = _strides(shape), len(shape) - 1
    while axis > 0 and values.shape[axis] == shape[axis]:  # what lies in one run in the whole array as well
        axis -= 1
    first_R = np.full(1, sum(start * stride for start, stride in zip(starts, strides, strict=True)), np.uint64)
    for size, stride in zip(values.shape[:axis], strides, strict=False):
        first_R = np.add.outer(first_R, np.arange(size, dtype=np.uint64) * np.uint64(stride)).reshape(-1)
    bits_RC = bits.reshape(len(first_R), math.prod(values.shape[axis:]))
    rows, columns = max(1, _BLOCK // max(1, bits_RC.shape[1])), min(_BLOCK, max(1, bits_RC.shape[1]))
    offset_C = (np.arange(columns, dtype=np.uint64) * np.uint64(_STEP) + np.uint64(_salt(values.dtype))).astype(
        np.uint32
    )
    total = 0
    for r in range(0, len(first_R), rows):
        for c in range(0, bits_RC.shape[1], columns):
            block = bits_RC[r : r + rows, c : c + columns]
            first = ((first_R[r : r + rows] + np.uint64(c)) * np.uint64(_STEP)).astype(np.uint32)
            total += _mixed_sum(block, np.add.outer(first, offset_C[: block.shape[1]]))
    return total % _MODULUS


def _mixed_sum(bits: np.ndarray, position: np.ndarray) -> int:
    """As in `_device_sums`, in place of `position`."""
    mixed = np.bitwise_xor(position, bits, out=position)
    mixed *= np.uint32(_FIRST)
    mixed ^= mixed >> np.uint32(16)
    mixed *= np.uint32(_SECOND)
    mixed ^= mixed >> np.uint32(13)
    return int(mixed.sum(dtype=np.uint64))


def _salt(dtype: Any) -> np.uint32:
    """Of a dtype: the same bits, read as numbers of another kind, have another digest."""
    return np.uint32(zlib.crc32(np.dtype(dtype).name.encode()))


def _strides(shape: tuple[int, ...]) -> list[int]:
    """Elements between neighbours along each axis, row-major."""
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
