"""Saved parameters piece by piece, for programs that cannot hold the model, or need not: export and import."""

from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from llada.config import Config
from llada.model import transformer
from llada.training import run_item
from llada.training.arrays import Leaf, open_leaves
from llada.training.checkpoint import Checkpoints


def open_parameters(checkpoints: Checkpoints, step: int | None = None) -> dict[str, Leaf]:
    """Every parameter of `step`, or of the latest, by its dotted name (`layers.query`), opened but not read.

    Reading compares with the digests that were saved, and raises Damage; see `Checkpoints.usable`. UserError without a
    step, for one of another run, and where the parameters are not those of its config.
    """
    item = checkpoints.item_of_run(step)
    with checkpoints.usable(item.step):
        leaves = open_leaves(checkpoints.directory / str(item.step) / "params", item.digests_of("params"))
    run_item.remark(item)
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
    workdir out of sight until all is written, and then calls `finish`.
    """
    abstract = transformer.abstract_parameters(config.model)
    # Orbax writes the frame of the checkpoint, around one zero that has every shape and compresses to nothing; it must
    # not copy that to the full size first.
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), abstract)
    uncopied = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)
    registry = ocp.type_handlers.create_type_handler_registry((np.ndarray, uncopied))
    handler = ocp.PyTreeCheckpointHandler(use_compression=True, type_handler_registry=registry)
    checkpoints = Checkpoints(workdir, keep=1, params_handler=handler)
    checkpoints.save_items(0, zeros, run_item.to_json(config, {}, tokenizer, begun=False, digests={}))
    checkpoints.close()
    return open_leaves(checkpoints.directory / "0" / "params", rewrite=True)


def finish(workdir: Path, leaves: dict[str, Leaf]) -> None:
    """Once all of what `create` opened is written: its digests, without which the step is not read."""
    digests = {name: leaf.sums for name, leaf in leaves.items()}
    run_item.add_digests(workdir / "checkpoints", 0, {"params": digests})
