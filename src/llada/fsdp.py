"""Fully sharded data parallelism, spelt out: each device computes on its own sequences with parts of the parameters.

A part becomes whole where it is used, from those of the other devices along `fsdp`; the transpose of that is a
reduce-scatter, so gradients come back as parts. Left to the compiler they are whole on every device first: twice the
bytes on the wires. What `data` repeats is added up once a step, whatever the number of microbatches.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from llada import mesh as mesh_lib
from llada.errors import UserError
from llada.mesh import ACTIVATIONS, BATCH

# With these a TPU multiplies while parts are on their way: gathers advance inside products (v4 and v5p wait for each
# otherwise), reduce-scatters on the SparseCores of those that have them. The last: without it
# gradients of 126,464 entries, in parts of 64 channels, are summed whole on every device.
TPU_OPTIONS = {
    "xla_enable_async_all_gather": True,
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
    "xla_tpu_use_minor_sharding_for_major_trivial_input": True,
}

# MiB of on-chip memory that a product may fill, where there are 64 or more (a v4 has 16): in the 16 that it gets
# otherwise a large one takes up to twice as long. More takes longer to compile, for less and less.
VMEM = {"TPU v5": 48, "TPU v5 lite": 32, "TPU v6 lite": 48, "TPU7x": 56}


def compiler_options(mesh: jax.sharding.Mesh, wanted: bool = True) -> dict[str, bool | int] | None:
    """What to compile a step for this mesh with; None where that is nothing, or not `wanted` (mesh.tpu_options).

    UserError for an option that the installed libtpu does not take.
    """
    device = mesh.devices.flat[0]
    if device.platform != "tpu" or not wanted:
        return None
    room = VMEM.get(device.device_kind)
    options = TPU_OPTIONS | ({} if room is None else {"xla_tpu_scoped_vmem_limit_kib": room * 1024})
    _try_out(mesh, tuple(options.items()))
    return options


@functools.cache
def _try_out(mesh: jax.sharding.Mesh, options: tuple[tuple[str, bool | int], ...]) -> None:
    """Compile next to nothing with these options: libtpu's versions differ in them, and say so only then."""
    place = mesh_lib.sharding(mesh, "replicated")
    nothing = jax.jit(jnp.negative, in_shardings=place).trace(jax.ShapeDtypeStruct((), jnp.float32))
    try:
        nothing.lower(lowering_platforms=("tpu",)).compile(compiler_options=dict(options))
    except jax.errors.JaxRuntimeError as error:
        refused = next((name for name, _ in options if name in str(error)), None)
        if refused is None:
            raise
        raise UserError(
            f"libtpu does not take the option {refused} ({str(error).splitlines()[0]}); another version of it may, "
            "and --config.mesh.tpu_options=False leaves all of them out"
        ) from error


def batch_sums(f: Callable) -> Callable:
    """`f(params, batch, *common) -> (gradients, sums)` of the whole batch, from `f` of every device's sequences.

    `batch` is a tuple of arrays with sequences first, `common` is the same everywhere, `sums` add up over sequences.
    """

    def on_whole_batch(params, batch, *common):
        # Where no axis splits sequences nothing is to be added up; what `tensor` splits the compiler divides.
        if mesh_lib.batch_shards(jax.sharding.get_abstract_mesh()) == 1:
            return f(params, batch, *common)
        specs = mesh_lib.parameter_specs(params)

        def on_own_sequences(params, batch, *common):
            gradients, sums = f(params, batch, *common)
            return jax.tree.map(_add, gradients, specs), jax.lax.psum(sums, BATCH)

        # Without tensor parallelism nothing is left for the compiler to divide: a kernel may stand anywhere then.
        axes = {axis for axis, size in mesh_lib.shared_axes().items() if axis in BATCH or size == 1}
        own, same = ACTIVATIONS["B"], ACTIVATIONS["replicated"]
        places = specs, own, *(same,) * len(common)
        return mesh_lib.on_each_device(on_own_sequences, places, (specs, same), axes)(params, batch, *common)

    return on_whole_batch


def _add(gradient: jax.Array, spec) -> jax.Array:
    return jax.lax.psum(gradient, "data" if "fsdp" in spec else BATCH)


def all_gather_params(params, dtype):
    """Parameters as they are used, matrices in `dtype`, from a device's parts of them; else as they come."""
    if "fsdp" not in jax.sharding.get_abstract_mesh().manual_axes:
        return params

    def gather(leaf, spec):
        if "fsdp" not in spec:
            return leaf
        # Along the first axis, wherever it is: the compiler lays arrays out as it likes, but along the last one a part
        # of fewer than 128 channels comes back to a TPU by an all-reduce of everything.
        axis = spec.index("fsdp")
        part = jnp.moveaxis(leaf.astype(dtype), axis, 0)
        return jnp.moveaxis(_scattered_by_rows(jax.lax.all_gather(part, "fsdp", tiled=True)), 0, axis)

    return jax.tree.map(gather, params, mesh_lib.parameter_specs(params))


@jax.custom_vjp
def _scattered_by_rows(whole):
    """`whole`, whose gradient is written down row by row before it is scattered, on TPU.

    Left to itself the compiler writes gradients of heads of 64 channels across registers of 128 lanes, and turns the
    vocabulary's around by copies. What is gathered it lays out better.
    """
    return whole


def _by_rows(_, gradient):
    if mesh_lib.platform() == "tpu":
        gradient = with_layout_constraint(gradient, Layout(tuple(range(gradient.ndim))))
    return (gradient,)


_scattered_by_rows.defvjp(lambda whole: (whole, None), _by_rows)


@jax.custom_vjp
def reuse_gathered(gathered, reused):
    """`reused`, which was gathered once outside a loop, in place of `gathered`, the same parameter gathered inside it.

    The gradient goes to `gathered`, and so back to its shards. No gather runs inside the loop: nothing reads
    `gathered`, and XLA drops what nothing reads.
    """
    return reused


reuse_gathered.defvjp(lambda gathered, reused: (reused, None), lambda _, gradient: (gradient, None))
