"""The device mesh and the only PartitionSpecs of the project.

Axes: `data` (batch), `fsdp` (batch and parameters), `tensor` (heads, FFN columns, vocabulary). All three exist on a
laptop too, with size 1. A spec is named by the shape suffix of the array it places (the alphabet is in README).
Axis types are Auto: the compiler propagates, and every array that matters is pinned through this table. Devices are
those of all processes; where a batch comes from and goes to is `local_positions` and `shard_batch`.
"""

import functools
import math
from collections.abc import Callable

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
    """Lay `devices` (default: all) out as (data, fsdp, tensor). UserError if the sizes do not multiply out.

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
    return jax.sharding.Mesh(_laid_out((data, mesh.fsdp, mesh.tensor), devices), AXES, axis_types=(AxisType.Auto,) * 3)


def _laid_out(shape: tuple[int, int, int], devices: list) -> np.ndarray:
    """The devices as an array of that shape, neighbours in the network near each other."""
    slices = {device.slice_index for device in devices} if hasattr(devices[0], "slice_index") else set()
    if devices[0].platform != "tpu" or len(slices) < 2:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if shape[0] % len(slices):
        raise UserError(
            f"the mesh's data axis is {shape[0]} and there are {len(slices)} slices; make it a multiple of that: "
            f"--config.mesh.fsdp times --config.mesh.tensor at most {len(devices) // len(slices)}"
        )
    within = (shape[0] // len(slices), *shape[1:])
    return mesh_utils.create_hybrid_device_mesh(within, (len(slices), 1, 1), devices, allow_split_physical_axes=True)


def check(config: Config, mesh: jax.sharding.Mesh) -> None:
    """UserError unless batch, positions, heads, FFN, width and vocabulary divide over the mesh."""
    ways = batch_shards(mesh)
    per_microbatch = config.train.batch_size // config.train.microbatches
    if per_microbatch % ways:
        raise UserError(
            f"--config.train.batch_size={config.train.batch_size} over {config.train.microbatches} microbatch(es) is "
            f"{per_microbatch} sequences, not a multiple of mesh data x fsdp = {ways}; "
            f"use a multiple of {ways * config.train.microbatches}, or another mesh"
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


def local_batch(batch_size: int, mesh: jax.sharding.Mesh) -> int:
    """The smallest multiple of the batch axes that is at least `batch_size`: what evaluation rounds a batch up to."""
    ways = batch_shards(mesh)
    return math.ceil(batch_size / ways) * ways


def batch_shards(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> int:
    """How many parts the sequences of a batch are split into; 1 where there is no mesh."""
    return math.prod(mesh.shape.get(axis, 1) for axis in BATCH)


def constrain(x: jax.Array, name: str) -> jax.Array:
    """Pin an activation to the spec called `name`; nothing happens where every device computes for itself."""
    axes = shared_axes()
    return jax.lax.with_sharding_constraint(x, only(ACTIVATIONS[name], axes)) if axes else x


def on_each_device(f: Callable, in_specs, out_specs, axes: set[str] | None = None) -> Callable:
    """`f` as a function of whole arrays that every device applies to its own parts, placed by these specs.

    Its arrays stay shared over axes that are not among `axes` (default: all), and are a device's own already over those
    of an enclosing `on_each_device`. Where nothing is left to divide it is `f` itself.
    """
    axes = shared_axes().keys() & (AXES if axes is None else axes)
    if not axes or jax.sharding.get_abstract_mesh().size == 1:
        return f
    in_specs, out_specs = jax.tree.map(lambda spec: only(spec, axes), (in_specs, out_specs))
    return jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, axis_names=axes, check_vma=False)


def shared_axes() -> dict[str, int]:
    """Axes, and their sizes, of the mesh in force over which the compiler divides the arrays being traced."""
    mesh = jax.sharding.get_abstract_mesh()
    return {axis: size for axis, size in mesh.shape.items() if axis not in mesh.manual_axes}


def only(spec: P, axes) -> P:
    """The spec with no axis but those."""
    named = [(part,) if isinstance(part, str) else part or () for part in spec]
    return P(*(tuple(axis for axis in part if axis in axes) or None for part in named))


def platform() -> str:
    """`cpu`, `gpu` or `tpu`: what the program being traced is for.

    The mesh in force says it, also that of a TPU which is only described; without one it is JAX's default backend.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def device_kind() -> str:
    """The name of the devices that the program being traced is for, such as "TPU v4"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (device or jax.local_devices()[0]).device_kind


def sharding(mesh: jax.sharding.Mesh, name: str) -> NamedSharding:
    """Sharding of the activation or batch called `name`."""
    return NamedSharding(mesh, ACTIVATIONS[name])


def local_positions(mesh: jax.sharding.Mesh, batch_size: int) -> np.ndarray:
    """Positions of a global batch that this process's devices hold, ascending; others may hold them too."""
    indices = sharding(mesh, "B").addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[rows] for (rows,) in indices]))


def shard_batch(mesh: jax.sharding.Mesh, rows_RL: np.ndarray, positions_R: np.ndarray, batch_size: int) -> jax.Array:
    """The global batch_BL of which this process has the rows at `positions_R` (ascending; at least its own)."""

    def part(index):
        start, stop, _ = index[0].indices(batch_size)
        first = np.searchsorted(positions_R, start)
        return rows_RL[first : first + stop - start]

    with jax.transfer_guard("allow"):  # JAX takes it for a transfer that nobody asked for
        return jax.make_array_from_callback((batch_size, *rows_RL.shape[1:]), sharding(mesh, "BL"), part)


def on_host(tree):
    """The values of arrays as NumPy's, whole on every process, wherever they lie. All processes must call it."""

    def fetch(x):
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        whole = jax.jit(lambda x: x, out_shardings=sharding(x.sharding.mesh, "replicated"))
        return np.asarray(whole(x))

    return jax.tree.map(fetch, tree)


def parameter_shardings(mesh: jax.sharding.Mesh, tree):
    """Shardings for a tree whose leaves are parameters, or optimizer moments named like them; scalars replicate."""
    return jax.tree.map(functools.partial(NamedSharding, mesh), parameter_specs(tree))


def parameter_specs(tree):
    """Their PartitionSpecs."""

    def place(path, leaf):
        spec = PARAMETERS.get(str(getattr(path[-1], "key", "")) if path else "", P())
        return P(*(None,) * (len(leaf.shape) - len(spec)), *spec) if spec else P()

    return jax.tree_util.tree_map_with_path(place, tree)
