"""Checkpoints through Orbax: parameters, optimizer state, and a JSON item with cursor, config and tokenizer.

On disk as in memory: a nested dict, layers stacked on axis 0. Parameters are an item of their own, so that inference
reads nothing else, in chunks of one layer, so that an export reads no more than it writes. Nothing is compressed:
trained weights shrink by a tenth, and take three times as long. Saving is asynchronous; a step exists only once Orbax
has committed it.
"""

import contextlib
import fnmatch
import functools
import logging
import math
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from llada import config as config_lib
from llada import mesh as mesh_lib
from llada.config import Config
from llada.errors import UserError, causes, disk_error
from llada.model import transformer
from llada.training import optimizer, run_item
from llada.training.leaves import FILE_BYTES, Leaf, open_leaves
from llada.training.run_item import RunItem
from llada.training.step import TrainState, init_state, state_shardings

# Orbax narrates every save, and where one fails its threads print the traceback of the exception that they then raise.
logging.getLogger("absl").setLevel(logging.CRITICAL)


_CHUNK_BYTES, _LEAST_CHUNK_BYTES = 16 << 20, 1 << 20


class Restored(NamedTuple):
    """A training state with the position of its run."""

    state: TrainState
    cursor: dict


def require_plain(workdir: Path) -> None:
    """UserError for a path under which Orbax would save what nobody could read: it takes [...] for a pattern."""
    path = str(workdir.resolve())
    if not fnmatch.fnmatchcase(path, path) or "\\" in path:
        raise UserError(f"--workdir={workdir}: no checkpoint can be kept under a path with [...] or \\; choose another")


class Checkpoints:
    """The checkpoints of one workdir."""

    def __init__(self, workdir: Path, keep: int | None = None, params_handler: ocp.CheckpointHandler | None = None):
        """Open them; with `keep`, to save too, the newest so many staying."""
        _without_aftermath()
        if keep is not None:
            require_plain(workdir)
        self.directory = (workdir / "checkpoints").resolve()
        open_manager = functools.partial(
            ocp.CheckpointManager,
            self.directory,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=keep is not None),
            item_handlers={
                "params": params_handler or ocp.PyTreeCheckpointHandler(use_compression=False),
                "optimizer_state": ocp.PyTreeCheckpointHandler(use_compression=False),
                "run": ocp.JsonCheckpointHandler(),
            },
        )
        for _ in range(20):  # it looks into every step, and training may take one away meanwhile
            try:
                self.manager = open_manager()
                break
            except FileNotFoundError:
                time.sleep(0.05)
        else:
            self.manager = open_manager()

    def steps(self) -> list[int]:
        """Committed steps, ascending, as the disk has them now."""
        return run_item.saved_steps(self.directory)

    def latest(self) -> int | None:
        """The newest committed step, or None."""
        steps = self.steps()
        return steps[-1] if steps else None

    def save(self, state: TrainState, config: Config, cursor: dict, tokenizer: bytes) -> None:
        """Start saving `state`; returns once the arrays have left the device. A step already there is left alone.

        DiskError where this save or the one before found no room.
        """
        step = int(state.step)
        if step not in self.manager.all_steps():
            moments = ocp.args.PyTreeSave(state.optimizer_state, None, FILE_BYTES)
            with self._room():
                self._save(
                    step, state.params, run_item.to_json(config, cursor, tokenizer, True), optimizer_state=moments
                )

    def _save(self, step, params, run, **more) -> None:
        chunks = jax.tree_util.tree_map_with_path(_chunks, params)
        items = {"params": ocp.args.PyTreeSave(params, chunks, FILE_BYTES), "run": ocp.args.JsonSave(run)}
        self.manager.save(step, args=ocp.args.Composite(**items, **more))

    def item(self, step: int) -> RunItem:
        """What `step` says about itself. UserError where it cannot be used."""
        return run_item.read(self.directory, step)

    def restore(self, config: Config, mesh: jax.sharding.Mesh, step: int) -> Restored:
        """The training state of `step`, placed on `mesh` whatever mesh wrote it; an import gets fresh moments.

        UserError where the step cannot be used, or is of another run than `config`.
        """
        item = self.item(step)
        run_item.require_same(item, config, self.directory)
        places = state_shardings(config, mesh)
        target = _placed(jax.eval_shape(lambda: init_state(config)), places)
        items = {"params": _to_restore(target.params)}
        if item.begun:
            items["optimizer_state"] = _to_restore(target.optimizer_state)
        with self.usable(step):
            found = self.manager.restore(step, args=ocp.args.Composite(**items))
        if item.begun:
            moments = found.optimizer_state
        else:
            moments = jax.jit(optimizer.make(config).init, out_shardings=places.optimizer_state)(found.params)
        place = mesh_lib.sharding(mesh, "replicated")
        state = TrainState(jax.device_put(jnp.int32(step), place), found.params, moments)
        return Restored(state, item.cursor)

    def restore_parameters(
        self, config: Config, mesh: jax.sharding.Mesh, step: int | None, dtype: str = "float32"
    ) -> transformer.Parameters:
        """Only the parameters, of `step` or of the latest; UserError where there is none, or none of this run."""
        step = self._own(step).step
        abstract = transformer.abstract_parameters(config.model)
        abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), abstract)
        target = _placed(abstract, mesh_lib.parameter_shardings(mesh, abstract))
        with self.usable(step):
            return self.manager.restore(step, args=ocp.args.Composite(params=_to_restore(target))).params

    def open_parameters(self, step: int | None = None) -> dict[str, Leaf]:
        """Every parameter by its dotted name (`layers.query`), opened but not read.

        UserError without a step, for one of another run, and where the parameters are not those of its config.
        """
        item = self._own(step)
        with self.usable(item.step):
            leaves = open_leaves(self.directory / str(item.step) / "params")
        abstract = transformer.abstract_parameters(item.config.model)
        wanted = {".".join(key.key for key in path): leaf.shape for path, leaf in jax.tree.leaves_with_path(abstract)}
        found = {name: leaf.shape for name, leaf in leaves.items()}
        wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        if wrong:
            shapes = f"{wrong[0]} is {found.get(wrong[0], 'missing')}, its config wants {wanted.get(wrong[0], 'none')}"
            raise run_item.unusable(self.directory, item.step, shapes)
        return leaves

    def resolve(self, step: int | None) -> int:
        """`step`, or the latest for None; UserError naming the steps there are."""
        steps = self.steps()
        if not steps:
            raise UserError(f"no checkpoint in {self.directory}; train first: llada train --config=... --workdir=...")
        if step is not None and step not in steps:
            raise UserError(f"--step={step} is not saved in {self.directory}; saved: {', '.join(map(str, steps))}")
        return steps[-1] if step is None else step

    def tokenizer(self, step: int | None = None) -> bytes:
        """`Tokenizer.content` as saved with a step."""
        return self.item(self.resolve(step)).tokenizer

    def wait(self) -> None:
        """Until every save is committed; DiskError if one found no room, and whatever else made one fail."""
        with self._room():
            self.manager.wait_until_finished()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        """`close`; `abandon` where someone wants it to end at once."""
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self.abandon()
        else:
            self.close()

    def close(self) -> None:
        """Wait, then let go, also where a save has failed."""
        try:
            self.wait()
        except BaseException:
            self.abandon()
            raise
        self.manager.close()

    def abandon(self) -> None:
        """Let go without waiting. Orbax's own `close` ends where its wait does, and leaves threads that never end."""
        parts = "_checkpointer", "_non_blocking_metadata_store", "_blocking_metadata_store", "_checkpoint_deleter"
        for part in parts:
            with contextlib.suppress(Exception):
                getattr(self.manager, part).close()

    def _own(self, step: int | None) -> RunItem:
        """The item of `step`, or of the latest, of the run whose config.json lies beside the checkpoints."""
        item = self.item(self.resolve(None) if step is None else step)
        path = self.directory.parent / "config.json"
        if path.exists():
            run_item.require_same(item, config_lib.load(path), self.directory)
        return item

    @contextlib.contextmanager
    def usable(self, step: int) -> Iterator[None]:
        """Whatever Orbax and tensorstore make of damaged files, as one line; they raise all kinds of exceptions."""
        try:
            yield
        except Exception as error:
            if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                raise
            *_, first = causes(error, implicit=False)  # Orbax prints the whole specification of an array around it
            words = " ".join(str(first).split())
            what = f"{type(first).__name__}: {words[:200]}{'...' if words[200:] else ''}"
            raise run_item.unusable(self.directory, step, what) from error

    @contextlib.contextmanager
    def _room(self) -> Iterator[None]:
        """A DiskError that names the good step, for what Orbax raises where the disk is full."""
        try:
            yield
        except Exception as error:
            good = self.latest()
            kept = "no checkpoint is saved yet" if good is None else f"the checkpoint of step {good} is good"
            if full := disk_error(error, f"saving a checkpoint in {self.directory} ({kept})"):
                raise full from error
            raise


def create(workdir: Path, config: Config, tokenizer: bytes) -> dict[str, Leaf]:
    """Step 0 of a run that has not begun, its parameters zero until the leaves are written: a model from elsewhere, of
    which no more is in memory than the caller holds.

    The step counts as committed at once: the caller keeps the workdir out of sight until all is written.
    """
    abstract = transformer.abstract_parameters(config.model)
    # Orbax writes the frame of the checkpoint, around one zero that has every shape and compresses to nothing; it must
    # not copy that to the full size first.
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), abstract)
    as_they_are = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)
    registry = ocp.type_handlers.create_type_handler_registry((np.ndarray, as_they_are))
    handler = ocp.PyTreeCheckpointHandler(use_compression=True, type_handler_registry=registry)
    checkpoints = Checkpoints(workdir, keep=1, params_handler=handler)
    checkpoints._save(0, zeros, run_item.to_json(config, {}, tokenizer, begun=False))
    checkpoints.close()
    return open_leaves(checkpoints.directory / "0" / "params", rewrite=True)


@functools.cache
def _without_aftermath() -> None:
    """Where a save or a restore fails or is given up, what it had to do goes on in threads: it finds Orbax's event
    loop closed, or nobody waiting, and prints a traceback each time.
    """
    shown = sys.unraisablehook

    def hook(raised) -> None:
        closed = raised.exc_type is RuntimeError and str(raised.exc_value) == "Event loop is closed"
        code = getattr(raised.object, "cr_code", None)
        if not closed and (code is None or "orbax" not in code.co_filename):
            shown(raised)

    sys.unraisablehook = hook
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)


def _placed(abstract, placements):
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, placements)


def _to_restore(target) -> ocp.args.PyTreeRestore:
    """Restore what `target` describes, onto its shardings."""
    return ocp.args.PyTreeRestore(target, restore_args=ocp.checkpoint_utils.construct_restore_args(target))


def _chunks(path, leaf) -> ocp.SaveArgs:
    """Stacked leaves are cut between layers first, and each layer alone unless a device's part of it is tiny: reading
    one layer should not bring in the others.
    """
    if str(getattr(path[0], "key", "")) != "layers":
        return ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES)
    part = leaf.sharding.shard_shape(leaf.shape) if isinstance(leaf, jax.Array) else leaf.shape
    layer_bytes = max(math.prod(part[1:]) * leaf.dtype.itemsize, _LEAST_CHUNK_BYTES)
    return ocp.SaveArgs(chunk_byte_size=min(layer_bytes, _CHUNK_BYTES), shard_axes=(0,))
