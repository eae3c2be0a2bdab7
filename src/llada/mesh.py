"""The device mesh and the only PartitionSpecs of the project.

Axes: `data` (batch), `fsdp` (batch and parameters), `tensor` (heads, FFN columns, vocabulary). All three exist on a
laptop too, with size 1. A spec is named by the shape suffix of the array it shards (README.md lists them).
Axis types are Auto: the compiler propagates, and every array that matters is pinned through this table. Devices are
those of all processes: `local_positions` says which rows of a batch a process needs, `shard_batch` assembles them.
"""

import functools
import math
from collections.abc import Callable, Container
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from llada.config import Config, MeshConfig
from llada.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")

# Activations and batches. Positions are split over `tensor` only inside the vocabulary head (`BL_rows`), where every
# row is independent and a tensor rank would otherwise repeat its neighbour's work.
ACTIVATIONS = {
    "B": P(BATCH),
    "BL": P(BATCH, None),
    "BLD": P(BATCH, None, None),
    "BLHC": P(BATCH, None, "tensor", None),
    "ND": P(BATCH, None),
    "NF": P(BATCH, "tensor"),
    "BL_rows": P(BATCH, "tensor"),
    "BLD_rows": P(BATCH, "tensor", None),
    "VD_gathered": P(None, None),
    "devices": P(AXES),  # one entry a device
    "replicated": P(),
}

# Parameters by name; those of the scanned layers carry a leading, unsharded layer axis.
PARAMETERS = {
    "embedding": P("tensor", "fsdp"),  # VD
    "head": P("tensor", "fsdp"),  # VD
    "query": P("fsdp", "tensor", None),  # DHC
    "key": P("fsdp", "tensor", None),  # DKC
    "value": P("fsdp", "tensor", None),  # DKC
    "output": P("tensor", None, "fsdp"),  # HCD
    "gate": P("fsdp", "tensor"),  # DF
    "up": P("fsdp", "tensor"),  # DF
    "down": P("tensor", "fsdp"),  # FD
}


def make(mesh: MeshConfig, devices: list | None = None) -> jax.sharding.Mesh:
    """A mesh (data, fsdp, tensor) of `devices` (default: all). UserError unless its sizes multiply to their number.

    JAX numbers devices host by host and the last axes vary fastest: tensor, then fsdp, stay within a host where they
    fit. On TPUs JAX follows the torus instead, and `data` goes over slices first: only its gradients cross the slower
    network between them.
    """
    devices = jax.devices() if devices is None else devices
    rest = mesh.fsdp * mesh.tensor
    data = mesh.data if mesh.data is not None else max(1, len(devices) // rest)
    if data * rest != len(devices):
        raise UserError(
            f"mesh.data={mesh.data} x mesh.fsdp={mesh.fsdp} x mesh.tensor={mesh.tensor} does not make the "
            f"{len(devices)} device(s) there are; leave --config.mesh.data=None, "
            f"with fsdp x tensor a divisor of {len(devices)}"
        )
    grid = _device_grid((data, mesh.fsdp, mesh.tensor), devices)
    return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def _device_grid(shape: tuple[int, int, int], devices: list) -> np.ndarray:
    """The devices as an array of that shape, in which neighbours are near each other in the network."""
    slices = {device.slice_index for device in devices} if hasattr(devices[0], "slice_index") else set()
    if devices[0].platform != "tpu" or len(slices) < 2:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if shape[0] % len(slices):
        raise UserError(
            f"the mesh's data axis is {shape[0]} and there are {len(slices)} slices; make it a multiple of that: "
            f"--config.mesh.fsdp times --config.mesh.tensor at most {len(devices) // len(slices)}"
        )
    within_slice = (shape[0] // len(slices), *shape[1:])
    return mesh_utils.create_hybrid_device_mesh(
        within_slice, (len(slices), 1, 1), devices, allow_split_physical_axes=True
    )


def check(config: Config, mesh: jax.sharding.Mesh) -> None:
    """UserError unless batch, positions, heads, FFN, width and vocabulary divide over the mesh."""
    shards = batch_shards(mesh)
    per_microbatch = config.train.batch_size // config.train.microbatches
    if per_microbatch % shards:
        raise UserError(
            f"--config.train.batch_size={config.train.batch_size} over {config.train.microbatches} microbatch(es) is "
            f"{per_microbatch} sequences, not a multiple of mesh data x fsdp = {shards}; "
            f"use a multiple of {shards * config.train.microbatches}, or another mesh"
        )
    _check_divides(mesh, "tensor", "data.sequence_length", config.data.sequence_length)
    check_parameters(config, mesh)


def check_parameters(config: Config, mesh: jax.sharding.Mesh) -> None:
    """UserError unless the parameters divide over the mesh."""
    m = config.model
    for key in ("heads", "kv_heads", "ffn", "vocab_size"):
        value = m.key_value_heads if key == "kv_heads" else getattr(m, key)
        _check_divides(mesh, "tensor", f"model.{key}", value)
    _check_divides(mesh, "fsdp", "model.width", m.width)


def _check_divides(mesh: jax.sharding.Mesh, axis: str, key: str, value: int) -> None:
    if value % mesh.shape[axis]:
        raise UserError(f"--config.{key}={value} is not a multiple of --config.mesh.{axis}={mesh.shape[axis]}")


def local_batch(batch_size: int, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> int:
    """The smallest multiple of the batch axes that is at least `batch_size`: what evaluation rounds a batch up to."""
    shards = batch_shards(mesh)
    return math.ceil(batch_size / shards) * shards


def batch_shards(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> int:
    """How many shards the sequences of a batch are split into; 1 where there is no mesh."""
    return math.prod(mesh.shape.get(axis, 1) for axis in BATCH)


def constrain(x: jax.Array, name: str) -> jax.Array:
    """Pin an activation to the spec called `name`; without effect inside `on_each_device`, where arrays are local."""
    axes = shared_axes()
    return jax.lax.with_sharding_constraint(x, only(ACTIVATIONS[name], axes)) if axes else x


def on_each_device(f: Callable, in_specs: Any, out_specs: Any, axes: set[str] | None = None) -> Callable:
    """`f` as a function of global arrays that every device applies to its own shards, by these specs: a shard_map.

    Over axes that are not among `axes` (default: all) the compiler goes on dividing; over those of an enclosing
    `on_each_device` arrays are local already. Where no axis is left to divide over it is `f` itself.
    """
    axes = shared_axes().keys() & (AXES if axes is None else axes)
    if not axes or jax.sharding.get_abstract_mesh().size == 1:
        return f
    in_specs, out_specs = jax.tree.map(lambda spec: only(spec, axes), (in_specs, out_specs))
    return jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, axis_names=axes, check_vma=False)


def shared_axes() -> dict[str, int]:
    """Axes, and their sizes, of the mesh in force over which the compiler shards the arrays being traced."""
    mesh = jax.sharding.get_abstract_mesh()
    return {axis: size for axis, size in mesh.shape.items() if axis not in mesh.manual_axes}


def only(spec: P, axes: Container[str]) -> P:
    """The spec with no axis but those."""
    dimensions = [(names,) if isinstance(names, str) else names or () for names in spec]
    return P(*(tuple(axis for axis in names if axis in axes) or None for names in dimensions))


def platform() -> str:
    """`cpu`, `gpu` or `tpu`: the platform of the mesh in force, else JAX's default backend.

    The mesh may be of TPUs that are only described, to compile for them. To be called while tracing, and only in the
    files whose subject is a platform (tests/test_architecture.py lists them).
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def device_kind() -> str:
    """What the devices of the mesh in force are called, such as "TPU v4"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (device or jax.local_devices()[0]).device_kind


def sharding(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, name: str) -> NamedSharding:
    """Sharding of the activation or batch called `name`."""
    return NamedSharding(mesh, ACTIVATIONS[name])


def local_positions(mesh: jax.sharding.Mesh, batch_size: int) -> np.ndarray:
    """Positions of a global batch that this process's devices hold, ascending; others may hold them too."""
    indices = sharding(mesh, "B").addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices]))


def shard_batch(mesh: jax.sharding.Mesh, rows: Any, positions_R: np.ndarray, batch_size: int) -> Any:
    """The global batch_BL, from this process's rows: those at `positions_R`, ascending, at least `local_positions`.

    `rows` is one array (R, L) or a tuple of them.
    """

    def assemble(rows_RL):
        def shard(index):
            start, stop, _ = index[0].indices(batch_size)
            first = np.searchsorted(positions_R, start)
            return rows_RL[first : first + stop - start]

        return jax.make_array_from_callback((batch_size, *rows_RL.shape[1:]), sharding(mesh, "BL"), shard)

    with jax.transfer_guard("allow"):  # JAX takes it for a transfer that nobody asked for
        return jax.tree.map(assemble, rows)


def on_host(tree: Any) -> Any:
    """Arrays as NumPy's, complete on every process, however they are sharded. All processes must call it."""

    def fetch(x):
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        assert isinstance(x.sharding, NamedSharding)
        return np.asarray(_replicate(x.sharding.mesh)(x))

    return jax.tree.map(fetch, tree)


@functools.cache
def _replicate(mesh: jax.sharding.Mesh):
    return jax.jit(lambda x: x, out_shardings=sharding(mesh, "replicated"))


def parameter_shardings(mesh: jax.sharding.Mesh, tree: Any) -> Any:
    """Shardings of a tree whose leaves are parameters, or optimizer moments named like them; scalars replicate."""
    return jax.tree.map(functools.partial(NamedSharding, mesh), parameter_specs(tree))


def parameter_specs(tree: Any) -> Any:
    """Their PartitionSpecs."""

    def spec_of(path, leaf):
        spec = PARAMETERS.get(str(getattr(path[-1], "key", "")) if path else "", P())
        return P(*(None,) * (len(leaf.shape) - len(spec)), *spec) if spec else P()

    return jax.tree_util.tree_map_with_path(spec_of, tree)
