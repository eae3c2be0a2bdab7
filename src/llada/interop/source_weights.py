"""The weights of a Hugging Face directory as our parameters: checked against its config.json, read piece by piece."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llada.config import ModelConfig
from llada.errors import UserError
from llada.interop import layout
from llada.interop.safetensors_files import Weights

_ROWS = 4_096  # of a table, at a time
_MOST = 1e18  # of a weight: far from where its square leaves float32

# (our leaf, index into it, float32 values)
Pieces = Iterator[tuple[str, tuple[int | slice, ...], np.ndarray]]


def open_weights(path: Path, fields: dict[str, Any], names: dict[str, str]) -> Weights:
    """The tensors of a directory. UserError unless config.json has the sizes of the files: before anything is built."""
    weights = Weights(path)
    if fields["layers"] > len(weights.names):
        raise UserError(f"config.json asks for {fields['layers']} layers, the files hold {len(weights.names)} tensors")
    V, D, F = (fields[name] for name in ("vocab_size", "width", "ffn"))
    for name, shape in ((names["embedding"], (V, D)), (names["layers.gate"].format(0), (F, D))):
        if min(shape) > 0 and name in weights.names and weights.shape(name) != shape:
            raise UserError(f"{name} is {list(weights.shape(name))}; config.json makes it {list(shape)}")
    return weights


def check_tensors(weights: Weights, model: ModelConfig, names: dict[str, str]) -> None:
    """UserError unless the files hold the model's tensors, with its shapes, and no others."""
    wanted = {tensor.name: tensor.shape for tensor in layout.tensors(model, names)}
    # Buffers that old versions saved, and the copy of a tied head that some programs write.
    ignored = {name for name in weights.names if name.endswith("rotary_emb.inv_freq")}
    if model.tie_embeddings:
        ignored |= {names["head"]}
    missing, extra = sorted(wanted.keys() - weights.names), sorted(weights.names - wanted.keys() - ignored)
    for kind, tensors in (("lacks", missing), ("holds, besides what the model has,", extra)):
        if tensors:
            more = f" and {len(tensors) - 1} more" if len(tensors) > 1 else ""
            raise UserError(f"the checkpoint {kind} {tensors[0]}{more}")
    for name, shape in wanted.items():
        if weights.shape(name) != shape:
            raise UserError(f"{name} is {list(weights.shape(name))}; the config makes it {list(shape)}")


def read_pieces(weights: Weights, model: ModelConfig, names: dict[str, str], allow_nonfinite: bool) -> Pieces:
    """Every parameter, a layer's matrix or some rows of a table at a time."""
    if model.tie_embeddings and names["head"] in weights.names:
        _check_tied(weights, names)
    shapes = layout.leaf_shapes(model)
    for tensor in layout.tensors(model, names):
        if tensor.layer is None:
            for rows in row_slices(tensor.shape[0], _ROWS):
                values = weights.read(tensor.name, rows).astype(np.float32, copy=False)
                yield tensor.leaf, (rows,), finite(tensor.name, values, allow_nonfinite)
            continue
        ours = np.empty(shapes[tensor.leaf][1:], np.float32)
        theirs = weights.read(tensor.name)
        if tensor.transposed:
            layout.transpose(theirs, layout.as_matrix(tensor.leaf, ours))
        else:
            ours[...] = theirs
        yield tensor.leaf, (tensor.layer,), finite(tensor.name, ours, allow_nonfinite)


def row_slices(count: int, size: int) -> Iterator[slice]:
    """0 ... count in slices of `size` rows; the last may be shorter."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def finite(name: str, values: np.ndarray, allow_nonfinite: bool) -> np.ndarray:
    """`values`. UserError, naming the tensor, for NaN, infinity, or weights too large to be squared, unless allowed."""
    # No comparison holds for NaN.
    if not (allow_nonfinite or (values.max() <= _MOST and values.min() >= -_MOST)):
        raise UserError(
            f"--source: {name} holds NaN or infinity, or a weight beyond {_MOST:g}; "
            "--allow_nonfinite takes it all the same"
        )
    return values


def _check_tied(weights: Weights, names: dict[str, str]) -> None:
    """UserError if a tied model's separate head is not its embedding."""
    for rows in row_slices(weights.shape(names["embedding"])[0], _ROWS):
        if not np.array_equal(weights.read(names["embedding"], rows), weights.read(names["head"], rows)):
            raise UserError(f"config.json ties head and embedding, but {names['head']} differs")
