"""The debug keys: what they record, and that they change nothing."""

import jax
import numpy as np
import pytest

from llada import mesh as mesh_lib
from llada.errors import Diverged
from llada.training import loop, metrics, resuming
from llada.training.checkpoint import Checkpoints


def test_traces_and_programs_are_written_and_the_bits_stay_the_same(tiny, trained, tmp_path):
    config = tiny("llada", {"debug.profile_steps": 2, "debug.dump_hlo": True, "debug.nans": True})
    loop.train(config, tmp_path)
    states = []
    for workdir in (tmp_path, trained["llada"].workdir):
        with Checkpoints(workdir) as checkpoints:
            states.append(resuming.restore_state(checkpoints, config, mesh_lib.make(config.mesh), config.steps)[0])
    jax.tree.map(np.testing.assert_array_equal, *states)
    assert not jax.config.jax_debug_nans
    (trace,) = (tmp_path / "profile").glob("plugins/profile/*/*.xplane.pb")
    lowered, compiled = ((tmp_path / "hlo" / f"train_step.{kind}.txt").read_text() for kind in ("stablehlo", "hlo"))
    assert "stablehlo.dot_general" in lowered and "ENTRY" in compiled
    for scope in ("attention", "vocabulary_head"):
        assert scope.encode() in trace.read_bytes() and scope in lowered and scope in compiled


def test_a_nan_is_named_where_it_is_computed(tiny, tmp_path, capfd):
    """The rate jumps to 1e30 after step 4: step 5 leaves infinite parameters, and step 6 computes with them."""
    config = tiny("llada", {"optimizer.schedule": "0:0 33.4%:0 33.4%:1e30", "checkpoint.every": 2, "debug.nans": True})
    words = r"^step \d computes a NaN: invalid value \(nan\) encountered in .*, at \w+/\w+\.py:\d+ \(\w+\)\. Last good "
    with pytest.raises(Diverged, match=words + "checkpoint: step 4 in") as raised:
        loop.train(config, tmp_path)
    assert "\n" not in str(raised.value)
    assert capfd.readouterr().out == ""


def test_a_step_moves_nothing_to_the_device_but_its_batch(tiny, tmp_path, monkeypatch):
    """Batches go there by name; a Python number or NumPy array that goes along unseen costs a wait each step."""
    advance, guarded = loop.TrainingRun.advance, []

    def guard(run):
        if not 1 < run.step < run.config.steps - 1:  # the first compiles, the last evaluates and saves
            return advance(run)
        guarded.append(run.step)
        with jax.transfer_guard("disallow"):
            return advance(run)

    monkeypatch.setattr(loop.TrainingRun, "advance", guard)
    config = tiny("llada", {"evaluate.every": 0, "checkpoint.every": 100, "train.log_every": 2})
    with jax.numpy_rank_promotion("raise"):
        loop.train(config, tmp_path)
    assert len(guarded) == 9
    assert len(metrics.read(tmp_path / "metrics.jsonl")) == 7
