"""Fully sharded data parallelism, spelt out: each device computes on its own sequences, from shards of the parameters.

A parameter is all-gathered along `fsdp` where it is used; the transpose of that is a reduce-scatter, so gradients come
back as shards. Left to the compiler, an all-reduce sums full gradients on every device first: twice the bytes sent.
What is replicated along `data` is summed once a step, whatever the number of microbatches.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike

from llada import mesh as mesh_lib
from llada.errors import UserError
from llada.mesh import ACTIVATIONS, BATCH

# With these a TPU multiplies while shards travel: gathers advance inside products (v4 and v5p wait for each otherwise),
# reduce-scatters on the SparseCores of those that have them. The last: without it gradients of 126,464 entries, in
# shards of 64 channels, are summed whole on every device.
TPU_OPTIONS = {
    "xla_enable_async_all_gather": True,
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
    "xla_tpu_use_minor_sharding_for_major_trivial_input": True,
}

# MiB of on-chip memory that a product may use on chips that have 64 or more (a v4 has 16). With the default of 16 a
# large product takes up to twice as long; more than this takes longer to compile and gains little.
VMEM = {"TPU v5": 48, "TPU v5 lite": 32, "TPU v6 lite": 48, "TPU7x": 56}


def compiler_options(mesh: jax.sharding.Mesh, wanted: bool = True) -> dict[str, bool | int] | None:
    """Compiler options of a step on this mesh; None where there are none, or not `wanted` (mesh.tpu_options).

    UserError for an option that the installed libtpu does not know.
    """
    device = mesh.devices.flat[0]
    if device.platform != "tpu" or not wanted:
        return None
    vmem = VMEM.get(device.device_kind)
    options = TPU_OPTIONS | ({} if vmem is None else {"xla_tpu_scoped_vmem_limit_kib": vmem * 1024})
    _check_known(mesh, tuple(options.items()))
    return options


@functools.cache
def _check_known(mesh: jax.sharding.Mesh, options: tuple[tuple[str, bool | int], ...]) -> None:
    """Compile a trivial program with these options: versions of libtpu differ in them, and say so only then."""
    replicated = mesh_lib.sharding(mesh, "replicated")
    trivial = jax.jit(jnp.negative, in_shardings=replicated).trace(jax.ShapeDtypeStruct((), jnp.float32))
    try:
        trivial.lower(lowering_platforms=("tpu",)).compile(compiler_options=dict(options))
    except jax.errors.JaxRuntimeError as error:
        refused = next((name for name, _ in options if name in str(error)), None)
        if refused is None:
            raise
        raise UserError(
            f"libtpu does not take the option {refused} ({str(error).splitlines()[0]}); another version of it may, "
            "and --config.mesh.tpu_options=False leaves all of them out"
        ) from error


def batch_sums(f: Callable) -> Callable:
    """`f(params, batch, *common) -> (gradients, sums)` of all sequences, from `f` of each device's sequences.

    `batch` is a tuple of arrays with sequences first, `common` is the same everywhere, `sums` add up over sequences.
    Within `f` parameters are shards along `fsdp` (see `all_gather_params`), and so are gradients.
    """

    def on_global_batch(params, batch, *common):
        # Where no axis splits sequences nothing is to be added up; what `tensor` splits the compiler divides.
        if mesh_lib.batch_shards(jax.sharding.get_abstract_mesh()) == 1:
            return f(params, batch, *common)
        specs = mesh_lib.parameter_specs(params)

        def on_local_batch(params, batch, *common):
            gradients, sums = f(params, batch, *common)
            return jax.tree.map(_add_over_devices, gradients, specs), jax.lax.psum(sums, BATCH)

        # Without tensor parallelism nothing is left for the compiler to divide: a kernel may stand anywhere then.
        axes = {axis for axis, size in mesh_lib.shared_axes().items() if axis in BATCH or size == 1}
        sharded, replicated = ACTIVATIONS["B"], ACTIVATIONS["replicated"]
        in_specs = specs, sharded, *(replicated,) * len(common)
        return mesh_lib.on_each_device(on_local_batch, in_specs, (specs, replicated), axes)(params, batch, *common)

    return on_global_batch


def _add_over_devices(gradient: jax.Array, spec: mesh_lib.P) -> jax.Array:
    # A sharded parameter's gradient is already added up over `fsdp`, by the reduce-scatter.
    return jax.lax.psum(gradient, "data" if "fsdp" in spec else BATCH)


@jax.named_scope("all_gather_params")
def all_gather_params(params: Any, dtype: DTypeLike) -> Any:
    """Parameters as they are used, matrices in `dtype`, from a device's shards; as they come outside `batch_sums`."""
    if "fsdp" not in jax.sharding.get_abstract_mesh().manual_axes:
        return params

    def gather(leaf, spec):
        if "fsdp" not in spec:
            return leaf
        # Along the first axis, wherever it is: the compiler lays arrays out as it likes, but along the last one a shard
        # of fewer than 128 channels comes back to a TPU by an all-reduce of everything.
        axis = spec.index("fsdp")
        shard = jnp.moveaxis(leaf.astype(dtype), axis, 0)
        return jnp.moveaxis(_gradient_by_rows(jax.lax.all_gather(shard, "fsdp", tiled=True)), 0, axis)

    return jax.tree.map(gather, params, mesh_lib.parameter_specs(params))


@jax.custom_vjp
def _gradient_by_rows(gathered: jax.Array) -> jax.Array:
    """`gathered`, whose gradient is written row by row before it is scattered, on TPU.

    Left to itself the compiler writes gradients of heads of 64 channels across registers of 128 lanes, and transposes
    the vocabulary's by copies. The layout of what is gathered is best left to it.
    """
    return gathered


def _lay_out_by_rows(_, gradient):
    if mesh_lib.platform() == "tpu":
        gradient = with_layout_constraint(gradient, Layout(tuple(range(gradient.ndim))))
    return (gradient,)


_gradient_by_rows.defvjp(lambda gathered: (gathered, None), _lay_out_by_rows)


def reduce_in_loop(gradients: Any) -> Any:
    """`gradients` of a microbatch, whose reduce-scatters stay in the loop over microbatches on TPU.

    XLA's while-loop-all-reduce-code-motion would take them for all-reduces to be done behind the loop, and fails.
    """
    return jax.lax.optimization_barrier(gradients) if mesh_lib.platform() == "tpu" else gradients


@jax.custom_vjp
def reuse_gathered(gathered: jax.Array, reused: jax.Array) -> jax.Array:
    """`reused`, which was gathered once outside a loop, in place of `gathered`, the same parameter gathered inside it.

    The gradient goes to `gathered`, and so back to its shards. No gather runs inside the loop: nothing reads
    `gathered`, and XLA drops what nothing reads.
    """
    return reused


reuse_gathered.defvjp(lambda gathered, reused: (reused, None), lambda _, gradient: (gradient, None))
