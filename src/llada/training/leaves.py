"""Saved parameters piece by piece, for programs that cannot hold the model, or need not: export and import.

Orbax keeps an array as a zarr array in a tensorstore OCDBT database; here the same arrays are opened with tensorstore.
"""

from pathlib import Path

import numpy as np
import tensorstore

FILE_BYTES = 128 << 20  # of the database's data files; several are written at once: twice the speed of one


class Leaf:
    """One parameter on disk."""

    def __init__(self, array: tensorstore.TensorStore):
        """Hold an opened array; see `open_leaves`."""
        self._array = array
        self.shape: tuple[int, ...] = tuple(array.shape)
        self.chunk_rows: int = array.chunk_layout.read_chunk.shape[
            0
        ]  # of the first axis: what one read brings in anyway

    def __len__(self) -> int:
        """Size of the first axis."""
        return self.shape[0]

    def read(self, *index: int | slice) -> np.ndarray:
        """The piece at `index`, as NumPy would take it."""
        return self._array[index].read().result()

    def write(self, values: np.ndarray, *index: int | slice) -> tensorstore.Future:
        """Start putting a piece in place. `values` may change on return; the piece is on the disk when the result of
        what is returned is there. Whole chunks are fastest: layers, or `chunk_rows` rows.
        """
        writing = self._array[index].write(values)
        writing.copy.result()
        return writing.commit


def open_leaves(params: Path, rewrite: bool = False) -> dict[str, Leaf]:
    """Every parameter in the params item of a step by its dotted name (`layers.query`), opened but not read.

    With `rewrite` what they hold is gone, and pieces never written read as zero; arrays are then uncompressed, whatever
    they were.
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
