"""Nothing crosses between host and device within a training step, nor as its arguments."""

import jax
import numpy as np
import pytest

from llada import mesh as mesh_lib
from llada.objectives.contract import SpecialTokens
from llada.training.step import compile_step, init_state, state_shardings


@pytest.mark.parametrize("family", ["llada", "arm"])
def test_a_step_transfers_nothing(tiny, family):
    """Batches are put on devices, and metrics fetched, by name: a NumPy array that met the step would stall it."""
    config = tiny(family)
    B, L = config.train.batch_size, config.data.sequence_length
    mesh = mesh_lib.make(config.mesh)
    rows_BL = np.arange(B * L, dtype=np.int32).reshape(B, L) % config.model.vocab_size
    with jax.set_mesh(mesh):
        step = compile_step(config, SpecialTokens(mask=3, eos=1), mesh)
        state = jax.device_put(init_state(config), state_shardings(config, mesh))
        batch_BL = mesh_lib.shard_batch(mesh, rows_BL, np.arange(B), B)
        with jax.transfer_guard("disallow"):
            for _ in range(2):
                state, metrics = step(state, batch_BL)
            with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
                step(state, rows_BL)
        assert np.isfinite(float(metrics["loss_nats_per_token"]))
        assert int(state.step) == 2
