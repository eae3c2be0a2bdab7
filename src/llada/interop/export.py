"""A trained workdir as a Hugging Face directory, written leaf by leaf: no model is ever in memory, and no torch needed.

A LLaDA becomes a `LLaDAModelLM` with its own modelling code beside the weights, an ARM a native `LlamaForCausalLM`
(`Qwen3ForCausalLM` where it has qk-norm).
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llada.errors import UserError
from llada.files import new_directory, prefetch, write_atomically
from llada.interop import export_files, layout, safetensors_files
from llada.interop.schema import schema_of
from llada.training import leaves as leaves_lib
from llada.training import run as run_lib
from llada.training import run_item
from llada.training.checkpoint import Checkpoints
from llada.training.corpus import saved_tokenizer

SHARD_BYTES = 5_000_000_000
_SLAB_BYTES = 8 << 20

Report = Callable[[int, int], None]  # of bytes of weights written, and of how many


class Exported(NamedTuple):
    """What was written: the checkpoint's step, the architecture, shards and bytes of weights."""

    step: int
    architecture: str
    shards: int
    weight_bytes: int


def export(
    workdir: Path,
    out: Path,
    step: int | None = None,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    progress: Report | None = None,
) -> Exported:
    """Write the checkpoint of `step` (default the latest) of `workdir` to `out`, which appears whole or not at all.

    `overwrite` replaces an earlier export at `out`. `progress` is called after each piece of the weights; it begins
    again where training removes the latest step while it is read, which is tried once more. UserError for a workdir or
    step that is not there, an unknown dtype, or an `out` that exists, all before weights are read.
    """
    if dtype not in safetensors_files.DTYPES:
        raise UserError(f"--dtype={dtype} is not one of {', '.join(safetensors_files.DTYPES)}")
    if shard_bytes < 1:
        raise UserError(f"--shard_bytes={shard_bytes} must be positive")
    run_lib.read_config(workdir)
    _require_apart(out, workdir)
    if overwrite:
        _require_replaceable(out)
    with Checkpoints(workdir) as checkpoints:

        def write(step: int | None) -> Exported:
            found = checkpoints.resolve(step)
            return _export(workdir, out, checkpoints, found, dtype, shard_bytes, overwrite, progress)

        return run_item.newest_again(checkpoints.directory, write, step)


def _export(
    workdir: Path,
    out: Path,
    checkpoints: Checkpoints,
    step: int,
    dtype: str,
    shard_bytes: int,
    overwrite: bool,
    progress: Report | None,
) -> Exported:
    config = run_lib.read_config(workdir)
    leaves = leaves_lib.open_parameters(checkpoints, step)
    tokenizer = saved_tokenizer(workdir, checkpoints.item(step))
    tensors = layout.tensors(config.model, schema_of(config.model).names)
    shards = safetensors_files.plan(tensors, dtype, shard_bytes)
    index = safetensors_files.index(shards, dtype)
    architecture, files = export_files.small_files(workdir, config, tokenizer, step, dtype)
    files[safetensors_files.INDEX] = export_files.to_bytes(index)
    total, written = index["metadata"]["total_size"], 0
    reading = functools.partial(checkpoints.usable, step)
    with new_directory(out, "--out", replace=overwrite) as directory:
        for shard in shards:
            slabs = prefetch(_slabs(shard.tensors, leaves, dtype, reading))
            reported = _reported(slabs, progress, written, total)
            written += safetensors_files.write_shard(directory, shard, dtype, reported)
        for name, content in files.items():
            write_atomically(directory / name, content)
    return Exported(step, architecture, len(shards), total)


def _reported(slabs: Iterator[np.ndarray], report: Report | None, written: int, total: int) -> Iterator[np.ndarray]:
    """The same slabs; `report` is called as each is written, after `written` bytes of `total`."""
    for slab in slabs:
        yield slab
        written += slab.nbytes
        if report:
            report(written, total)


def _slabs(
    tensors: list[layout.Tensor],
    leaves: dict[str, leaves_lib.Leaf],
    dtype: str,
    reading: Callable[[], AbstractContextManager],
) -> Iterator[np.ndarray]:
    """The data of the tensors in order, contiguous arrays of about a slab each; read inside `reading()`."""
    numpy_dtype, _ = safetensors_files.DTYPES[dtype]

    def read(leaf: leaves_lib.Leaf, *index: int | slice) -> np.ndarray:
        with reading():
            return leaf.read(*index)

    for tensor in tensors:
        leaf = leaves[tensor.leaf]
        if tensor.layer is None:
            for start in range(0, len(leaf), leaf.chunk_rows):
                rows = slice(start, min(start + leaf.chunk_rows, len(leaf)))
                yield read(leaf, rows).astype(numpy_dtype, copy=False)
        elif not tensor.transposed:
            yield read(leaf, tensor.layer).astype(numpy_dtype, copy=False)
        else:
            matrix = layout.as_matrix(tensor.leaf, read(leaf, tensor.layer))
            columns = max(1, _SLAB_BYTES // (len(matrix) * numpy_dtype.itemsize))
            for start in range(0, matrix.shape[1], columns):
                slab = matrix[:, start : start + columns]
                out = np.empty(slab.shape[::-1], numpy_dtype)
                layout.transpose(slab, out)
                yield out
            del matrix, slab  # before the next tensor is read


def _require_apart(out: Path, workdir: Path) -> None:
    """UserError if `out` is the workdir or in it: no place for an export, and training writes there."""
    if out.resolve().is_relative_to(workdir.resolve()):
        raise UserError(f"--out={out} is --workdir={workdir} or in it; choose a directory elsewhere")


def _require_replaceable(out: Path) -> None:
    """UserError unless `out` is missing, empty, or an earlier export: nothing of the user's is ever removed."""
    if not out.exists():
        return
    names = {path.name for path in out.iterdir()} if out.is_dir() else {out.name}
    known = export_files.NAMES | {safetensors_files.INDEX}
    strange = sorted(n for n in names - known if not (n.startswith("model-") and n.endswith(".safetensors")))
    if strange:
        raise UserError(f"--out={out} holds {strange[0]}, which no export wrote; choose another directory")
    if names and not export_files.is_export(out):
        raise UserError(f"--out={out} holds a model that llada export did not write; choose another directory")
