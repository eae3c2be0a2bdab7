"""Saved parameters piece by piece, for programs that cannot hold the model, or need not: export and import.

Orbax keeps an array as a zarr array in a tensorstore OCDBT database; here the same arrays are opened with tensorstore.
"""

from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from llada.config import Config
from llada.model import transformer
from llada.training import run_item
from llada.training.checkpoint import FILE_BYTES, Checkpoints


class Leaf:
    """One parameter on disk."""

    def __init__(self, array: tensorstore.TensorStore):
        """Hold an opened array; see `open_leaves`."""
        self._array = array
        self.shape: tuple[int, ...] = tuple(array.shape)
        # Of the first axis: what one read brings in anyway.
        self.chunk_rows = int((array.chunk_layout.read_chunk.shape or self.shape)[0] or 1)

    def __len__(self) -> int:
        """Size of the first axis."""
        return self.shape[0]

    def read(self, *index: int | slice) -> np.ndarray:
        """The piece at `index`, as NumPy would take it."""
        return self._array[index].read().result()

    def write(self, values: np.ndarray, *index: int | slice) -> tensorstore.Future:
        """Start writing a piece; whole chunks are fastest: layers, or `chunk_rows` rows.

        `values` may change on return; the piece is on the disk once the future has its result.
        """
        writing = self._array[index].write(values)
        writing.copy.result()
        return writing.commit


def open_parameters(checkpoints: Checkpoints, step: int | None = None) -> dict[str, Leaf]:
    """Every parameter of `step`, or of the latest, by its dotted name (`layers.query`), opened but not read.

    UserError without a step, for one of another run, and where the parameters are not those of its config.
    """
    item = checkpoints.item_of_run(step)
    with checkpoints.usable(item.step):
        leaves = open_leaves(checkpoints.directory / str(item.step) / "params")
    abstract = transformer.abstract_parameters(item.config.model)
    wanted = {".".join(key.key for key in path): leaf.shape for path, leaf in jax.tree.leaves_with_path(abstract)}
    saved = {name: leaf.shape for name, leaf in leaves.items()}
    wrong = sorted(name for name in wanted.keys() | saved.keys() if wanted.get(name) != saved.get(name))
    if wrong:
        shapes = f"{wrong[0]} is {saved.get(wrong[0], 'missing')}, its config wants {wanted.get(wrong[0], 'none')}"
        raise run_item.unusable(checkpoints.directory, item.step, shapes)
    return leaves


def create(workdir: Path, config: Config, tokenizer: bytes) -> dict[str, Leaf]:
    """Step 0 of a run that has not begun, for a model from elsewhere: parameters are zero until the leaves are written.

    So no more of it is in memory than the caller holds. The step counts as committed at once: the caller keeps the
    workdir out of sight until all is written.
    """
    abstract = transformer.abstract_parameters(config.model)
    # Orbax writes the frame of the checkpoint, around one zero that has every shape and compresses to nothing; it must
    # not copy that to the full size first.
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), abstract)
    uncopied = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)
    registry = ocp.type_handlers.create_type_handler_registry((np.ndarray, uncopied))
    handler = ocp.PyTreeCheckpointHandler(use_compression=True, type_handler_registry=registry)
    checkpoints = Checkpoints(workdir, keep=1, params_handler=handler)
    checkpoints.save_items(0, zeros, run_item.to_json(config, {}, tokenizer, begun=False))
    checkpoints.close()
    return open_leaves(checkpoints.directory / "0" / "params", rewrite=True)


def open_leaves(params: Path, rewrite: bool = False) -> dict[str, Leaf]:
    """Every parameter in the params item of a step by its dotted name (`layers.query`), opened but not read.

    With `rewrite` what they held is gone, pieces never written read as zero, and arrays are uncompressed.
    """
    # Not as a URL: a path may hold "#", "?" or "%".
    base = {"driver": "file", "path": f"{params}/"}
    database = {"driver": "ocdbt", "base": base, "target_data_file_size": FILE_BYTES}
    context = tensorstore.Context()
    store = tensorstore.KvStore.open(database, context=context).result()
    names = [key.decode().removesuffix("/.zarray") for key in store.list().result() if key.endswith(b"/.zarray")]
    leaves = {}
    for name in names:
        spec = {"driver": "zarr", "kvstore": database | {"path": name}}
        array = tensorstore.open(spec, open=True, read=True, context=context).result()
        if rewrite:
            spec["metadata"] = array.spec().to_json()["metadata"] | {"compressor": None, "fill_value": 0.0}
            array = tensorstore.open(spec, create=True, delete_existing=True, context=context).result()
        leaves[name] = Leaf(array)
    return leaves
