"""Checkpoints through Orbax: parameters, optimizer state, and a JSON item with cursor, config, tokenizer and digests.

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
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from llada import config as config_lib
from llada import mesh as mesh_lib
from llada import processes
from llada.config import Config
from llada.errors import DiskError, UserError, causes, disk_error, in_brief
from llada.model import transformer
from llada.training import arrays, run_item
from llada.training import digests as digests_lib
from llada.training.arrays import FILE_BYTES
from llada.training.run_item import RunItem
from llada.training.step import TrainState

_CHUNK_BYTES, _LEAST_CHUNK_BYTES = 16 << 20, 1 << 20


def require_plain(workdir: Path) -> None:
    """UserError for a path under which Orbax could not read what it saves: it takes [...] for a pattern."""
    path = str(workdir.resolve())
    if not fnmatch.fnmatchcase(path, path) or "\\" in path:
        raise UserError(
            f"--workdir={workdir}: no checkpoint can be saved under a path with [...] or \\; choose another"
        )


class Checkpoints:
    """The checkpoints of one workdir."""

    def __init__(
        self,
        workdir: Path,
        keep: int | None = None,
        params_handler: ocp.CheckpointHandler | None = None,
        keep_every: int = 0,
    ):
        """Open them; with `keep`, also to save, retaining that many of the newest, and multiples of `keep_every`."""
        _quieten_orbax()
        if keep is not None:
            require_plain(workdir)
        self.directory = (workdir / "checkpoints").resolve()
        self._open = functools.partial(
            ocp.CheckpointManager,
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, keep_period=keep_every or None, create=keep is not None
            ),
            item_handlers={
                "params": params_handler or ocp.PyTreeCheckpointHandler(use_compression=False),
                "optimizer_state": ocp.PyTreeCheckpointHandler(use_compression=False),
                "run": ocp.JsonCheckpointHandler(),
            },
        )
        self._saving = False
        for _ in range(20):  # it looks into every step, and training may remove one meanwhile
            with contextlib.suppress(FileNotFoundError):
                self.manager = self._open()
                return
            time.sleep(0.05)
        self.manager = self._open()

    def steps(self) -> list[int]:
        """Committed steps, ascending, as the disk has them now."""
        return run_item.saved_steps(self.directory)

    def latest(self) -> int | None:
        """The newest committed step, or None."""
        steps = self.steps()
        return steps[-1] if steps else None

    def save(self, state: TrainState, config: Config, cursor: dict, tokenizer: bytes) -> None:
        """Start saving `state`; returns once the arrays have left the device. A step already saved is left alone.

        DiskError where there was no room for this save, or the one before; `start_over` then allows another try.
        """
        step = int(jax.device_get(state.step))
        if step not in self.manager.all_steps():
            moments = ocp.args.PyTreeSave(state.optimizer_state, None, FILE_BYTES)
            digests = digests_lib.of_items({"params": state.params, "optimizer_state": state.optimizer_state})
            run = run_item.to_json(config, cursor, tokenizer, begun=True, digests=digests)
            with self._room():
                self.save_items(step, state.params, run, optimizer_state=moments)
            self._saving = True

    def failed(self, wait: bool = False) -> DiskError | None:
        """The DiskError of the save that was started last, once it is known, or after a wait for its end."""
        if self._saving and (wait or not self.manager.is_saving_in_progress()):
            self._saving = False
            try:
                self.wait()
            except DiskError as error:
                return error
        return None

    def start_over(self) -> None:
        """After a save that failed: forget it, and remove what it has written, so that the next finds that room."""
        self._saving = False
        self.abandon()
        self._remove_partial()
        self.manager = self._open()

    def _remove_partial(self) -> None:
        """What a failed save has written: it would keep a full disk full."""
        for _ in range(20):  # its threads may still be writing
            partial = list(self.directory.glob("*.orbax-checkpoint-tmp*"))
            for path in partial:
                shutil.rmtree(path, ignore_errors=True)
            if not partial:
                break
            time.sleep(0.05)

    def save_items(self, step: int, params: Any, run: dict[str, Any], **more: ocp.args.CheckpointArgs) -> None:
        """Start saving `params` and the JSON item `run`, with `more` items."""
        chunks = jax.tree_util.tree_map_with_path(_chunks, params)
        items = {"params": ocp.args.PyTreeSave(params, chunks, FILE_BYTES), "run": ocp.args.JsonSave(run)}
        self.manager.save(step, args=ocp.args.Composite(**items, **more))

    def item(self, step: int) -> RunItem:
        """What `step` says about itself. UserError where it cannot be used."""
        return run_item.read(self.directory, step)

    def item_of_run(self, step: int | None) -> RunItem:
        """The item of `step`, or of the latest. UserError unless it is of the run of the config.json beside it."""
        item = self.item(self.resolve(None) if step is None else step)
        path = self.directory.parent / "config.json"
        if path.exists():
            run_item.require_same(item, config_lib.load(path), self.directory)
        return item

    def restore(self, item: RunItem, **items: Any) -> dict[str, Any]:
        """The `items` of a step (`params`, `optimizer_state`), each given as its shapes, dtypes and shardings.

        Arrays go where those say, whatever mesh wrote them. Damaged, on all processes alike, where the step cannot be
        used; what has no digests is taken as it is.
        """
        run_item.remark(item)
        with self.usable(item.step):
            directory = self.directory / str(item.step)
            return {
                name: arrays.restore(directory / name, target, item.digests_of(name)) for name, target in items.items()
            }

    def restore_parameters(
        self, config: Config, mesh: jax.sharding.Mesh, step: int | None, dtype: str = "float32"
    ) -> transformer.Parameters:
        """Only the parameters, of `step` or of the latest; UserError where there is none, or none of this run."""
        item = self.item_of_run(step)
        abstract = transformer.abstract_parameters(config.model)
        shardings = mesh_lib.parameter_shardings(mesh, abstract)
        target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype, sharding=s), abstract, shardings)
        return self.restore(item, params=target)["params"]

    def set_aside(self, step: int) -> str:
        """Move a damaged step out of the way; returns its new name. All processes call it, and only training may."""
        with processes.agreement():
            name = run_item.set_aside(self.directory, step) if processes.is_first() else None
        name = processes.from_first(name)
        self.manager.reload()
        return name

    def resolve(self, step: int | None) -> int:
        """`step`, or the latest for None; UserError naming the steps there are."""
        steps = self.steps()
        if not steps:
            raise UserError(f"no checkpoint in {self.directory}; train first: llada train --config=... --workdir=...")
        if step is not None and step not in steps:
            raise UserError(f"--step={step} is not saved in {self.directory}; saved: {', '.join(map(str, steps))}")
        return steps[-1] if step is None else step

    def wait(self) -> None:
        """Until every save is committed; DiskError where there was no room, and whatever else made one fail."""
        with self._room():
            self.manager.wait_until_finished()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        """`close`; `abandon` on a second Ctrl-C, which asks to end at once."""
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self.abandon()
            return
        try:
            self.close()
        except DiskError as full:
            error = full
            raise
        finally:
            if isinstance(error, DiskError) and processes.count() == 1:
                self._remove_partial()

    def close(self) -> None:
        """Wait, then close, also where a save has failed."""
        try:
            self.wait()
        except BaseException:
            self.abandon()
            raise
        self.manager.close()

    def abandon(self) -> None:
        """Close without waiting. Orbax's own `close` ends where its wait does, and leaves threads that never end."""
        for name in (
            "_checkpointer",
            "_non_blocking_metadata_store",
            "_blocking_metadata_store",
            "_checkpoint_deleter",
        ):
            with contextlib.suppress(Exception):
                getattr(self.manager, name).close()

    @contextlib.contextmanager
    def usable(self, step: int) -> Iterator[None]:
        """A UserError of one line for what Orbax and tensorstore raise on damaged files: all kinds of exceptions."""
        try:
            yield
        except Exception as error:
            if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                raise
            *_, first = causes(error, implicit=False)  # Orbax prints the whole specification of an array around it
            kind = "" if isinstance(first, arrays.Damage) else f"{type(first).__name__}: "
            raise run_item.unusable(self.directory, step, f"{kind}{in_brief(first)}") from error

    @contextlib.contextmanager
    def _room(self) -> Iterator[None]:
        """A DiskError that names the good step, for what Orbax raises where the disk is full."""
        try:
            yield
        except Exception as error:
            good = self.latest()
            saved = "no checkpoint is saved yet" if good is None else f"the checkpoint of step {good} is good"
            if full := disk_error(error, f"saving a checkpoint in {self.directory} ({saved})", writable=True):
                raise full from error
            raise


@functools.cache
def _quieten_orbax() -> None:
    """Orbax logs every save, and where one fails its threads print the traceback of the exception that they then raise.

    Where a save or a restore fails or is given up, what it had to do goes on in threads, which find Orbax's event loop
    closed, or nothing waiting for them, and print a traceback each time.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    report = sys.unraisablehook

    def hook(raised: Any) -> None:
        closed = raised.exc_type is RuntimeError and str(raised.exc_value) == "Event loop is closed"
        code = getattr(raised.object, "cr_code", None)
        of_orbax = code is not None and "orbax" in code.co_filename and issubclass(raised.exc_type, Exception)
        if not (closed or of_orbax):
            report(raised)

    sys.unraisablehook = hook
    logging.getLogger("asyncio").addFilter(
        lambda r: not ("exception was never retrieved" in r.getMessage() and "orbax" in r.getMessage())
    )
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)


def _chunks(path, leaf) -> ocp.SaveArgs:
    """Stacked leaves are cut between layers first, and each layer alone unless a device's shard of it is tiny.

    Reading one layer should not bring in the others.
    """
    if str(getattr(path[0], "key", "")) != "layers":
        return ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES)
    shape = leaf.sharding.shard_shape(leaf.shape) if isinstance(leaf, jax.Array) else leaf.shape
    layer_bytes = max(math.prod(shape[1:]) * leaf.dtype.itemsize, _LEAST_CHUNK_BYTES)
    return ocp.SaveArgs(chunk_byte_size=min(layer_bytes, _CHUNK_BYTES), shard_axes=(0,))
