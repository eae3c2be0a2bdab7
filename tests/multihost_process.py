"""One of the processes of test_multihost.py: the `llada` program, and then what its devices draw as noise.

With $MASKS it writes the time, length and masks of every sequence that its devices hold to $MASKS.PROCESS, for a few
steps, computed on the devices of all processes. With $TPU_HOST it runs as on a host of a TPU pod.
"""

import hashlib
import json
import os

STEPS, B, L = 3, 8, 32


def masks() -> dict[str, str]:
    """A digest by "step sequence", of the sequences that this process's devices hold."""
    import functools

    import jax
    import jax.numpy as jnp
    import numpy as np

    from llada import config, mesh
    from llada.objectives import noise
    from llada.objectives.contract import is_valid
    from llada.objectives.corruption import forward_process

    everything = mesh.make(config.MeshConfig())

    @functools.partial(jax.jit, out_shardings=mesh.sharding(everything, "BL"))
    def draw(step, sequence_B, x0_BL):
        n = noise.Noise(7, step, sequence_B, B)
        t_B, lengths_B = noise.times(n, "stratified"), noise.lengths(n, L, 0.5)
        uniform_BL = noise.uniform(n, noise.MASK, (L,))
        corruption = forward_process(x0_BL, t_B, uniform_BL, is_valid(x0_BL, lengths_B), 0, 1e-3)
        bits_BK = [jax.lax.bitcast_convert_type(x, jnp.int32)[:, None] for x in (t_B, corruption.weight_B)]
        return jnp.concatenate([*bits_BK, lengths_B[:, None], corruption.masked_BL.astype(jnp.int32)], axis=1)

    found = {}
    with jax.set_mesh(everything):
        for step in range(STEPS):
            drawn_BK = draw(step, np.arange(B, dtype=np.int32), np.ones((B, L), np.int32))
            for shard in drawn_BK.addressable_shards:
                first = shard.index[0].start or 0
                for i, row_K in enumerate(np.asarray(shard.data)):
                    found[f"{step} {first + i}"] = hashlib.sha256(row_K.tobytes()).hexdigest()
    return found


def start() -> int:
    """In a fork of faults/forking.py: the `llada` program of sys.argv, then the masks."""
    if "TPU_HOST" in os.environ:
        from jax._src.clusters import cloud_tpu_cluster

        cloud_tpu_cluster.running_in_cloud_tpu_vm = True
    from llada.commands import program

    status = program.main()
    if "MASKS" in os.environ and status == 0:
        from llada import processes

        with open(f"{os.environ['MASKS']}.{processes.index()}", "w") as file:
            json.dump(masks(), file)
    return status
