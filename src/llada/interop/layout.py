"""Our parameters and the tensors of a checkpoint for PyTorch: which is which, and how one is laid out as the other.

Ours are stacked over layers and have separate axes for heads and channels, `(layers, D, H, C)`; theirs are one matrix
per layer in the order of torch's Linear, `[outputs, inputs]`. Rotary embedding is half-split on both sides, so no
channel moves.
"""

import math
from typing import NamedTuple

import jax
import numpy as np

from llada.config import ModelConfig
from llada.model import transformer

# Leading axes of a matrix that are its inputs; the attention output contracts heads and channels.
_INPUT_AXES = {"query": 1, "key": 1, "value": 1, "output": 2, "gate": 1, "up": 1, "down": 1}
_BLOCK = 256


class Tensor(NamedTuple):
    """One tensor of a PyTorch checkpoint: its name and shape there, and which of our leaves it is, at which layer."""

    name: str
    shape: tuple[int, ...]
    leaf: str
    layer: int | None

    @property
    def transposed(self) -> bool:
        """Whether it is a matrix of a layer: ours is [inputs, outputs]."""
        return is_matrix(self.leaf)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def tensors(config: ModelConfig, names: dict[str, str]) -> list[Tensor]:
    """Every tensor of a model, layer by layer; `names` maps our leaves to theirs, `{}` standing for the layer.

    The order is that of a forward pass: embedding, layers, final norm, head. Nothing is allocated.
    """
    shapes = leaf_shapes(config)
    listed = [Tensor(names["embedding"], shapes["embedding"], "embedding", None)]
    for layer in range(config.layers):
        for leaf, (_, *shape) in shapes.items():
            if leaf.startswith("layers."):
                listed.append(Tensor(names[leaf].format(layer), _their_shape(leaf, shape), leaf, layer))
    listed += [Tensor(names[leaf], shapes[leaf], leaf, None) for leaf in ("final_norm", "head") if leaf in shapes]
    return listed


def leaf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each of our parameters by its dotted name."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(transformer.abstract_parameters(config))
    return {".".join(str(key.key) for key in path): leaf.shape for path, leaf in leaves}


def is_matrix(leaf: str) -> bool:
    """Whether `leaf` is a matrix per layer, which the other side has transposed."""
    return leaf.rpartition(".")[2] in _INPUT_AXES


def as_matrix(leaf: str, ours: np.ndarray) -> np.ndarray:
    """One layer of `leaf` as [inputs, outputs]; a view."""
    count = _INPUT_AXES[leaf.rpartition(".")[2]]
    return ours.reshape(math.prod(ours.shape[:count]), -1)


def transpose(matrix: np.ndarray, out: np.ndarray) -> None:
    """`out[...] = matrix.T`, cast to the dtype of `out`, by blocks: several times as fast as all at once."""
    for start in range(0, len(matrix), _BLOCK):
        out[:, start : start + _BLOCK] = matrix[start : start + _BLOCK].T


def _their_shape(leaf: str, shape: list[int]) -> tuple[int, ...]:
    count = _INPUT_AXES.get(leaf.rpartition(".")[2])
    return tuple(shape) if count is None else (math.prod(shape[count:]), math.prod(shape[:count]))
