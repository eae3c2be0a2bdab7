"""A bad batch is one skipped update and nothing more; many in a row end the run; a guard tells spikes."""

import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from faults.r9_bad_numbers import RIGHT, Fault, build, draw, verdicts, with_faults

from llada import mesh as mesh_lib
from llada.training import guard, loop, metrics, resuming, run_item
from llada.training import step as step_lib
from llada.training.checkpoint import Checkpoints

# By fsdp, and by data, over two devices.
ON_TWO_DEVICES = """
import random
from faults import r9_bad_numbers as goal

for config in goal.runs(2)[:2]:
    for outcome in goal.verdicts(config, goal.draw(random.Random(0), 8, config)):
        print(outcome.wrong or outcome.ended)
"""


@pytest.mark.parametrize(("family", "microbatches", "spikes"), [("llada", 2, True), ("arm", 1, False)])
def test_a_bad_batch_is_one_skipped_update_and_nothing_more(family, microbatches, spikes):
    config = build(family, microbatches, spikes, dict(data=1))
    kinds = 8 if spikes else 7
    faults = draw(random.Random(1), 2 * kinds, config)
    found = list(verdicts(config, faults))
    assert [(one.ended, one.wrong) for one in found] == [(RIGHT, "")] * 2 * kinds, found
    assert len({fault.kind for fault in faults}) == kinds


def test_all_devices_decide_alike():
    """A fault is met by one of them."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    search = os.pathsep.join([str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": search}
    command = [sys.executable, "-c", ON_TWO_DEVICES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == [RIGHT] * 16


def test_the_guard_decides_as_a_list_of_norms_does(tiny):
    """Brute force over drifting norms with spikes, jumps for good, NaN and infinity among them."""
    config, rng = tiny("arm", {"optimizer.spike_factor": 4.0}), random.Random(0)
    decide = jax.jit(lambda norms_W, loss, norm: guard.decide(config, norms_W, loss, norm))
    norms_W, made_norms, decisions = guard.start(config), [], []
    for step in range(600):
        norm = np.float32(math.exp(rng.gauss(math.sin(step / 40), 0.3)))
        norm *= np.float32(rng.choice([1, 1, 1, 1, 3, 50, math.nan, math.inf]))
        loss = rng.choice([1.0] * 9 + [math.nan])
        expected = math.isfinite(norm) and math.isfinite(loss)
        latest = sorted(made_norms[-128:])
        if len(latest) >= 64:
            expected &= bool(norm <= np.float32(4) * latest[(len(latest) - 1) // 2])
        made, norms_W = decide(norms_W, loss, norm)
        assert bool(made) == expected, step
        decisions.append(expected)
        made_norms += [norm] * expected
        np.testing.assert_array_equal(norms_W, ([np.inf] * 128 + made_norms)[-128:])
    assert 300 < sum(decisions) < 550


class Lines:
    """A receiver of progress that keeps its lines."""

    def __init__(self):
        self.logged, self.windows = [], []

    def log(self, text):
        self.logged.append(text)

    def window(self, step, values):
        self.windows.append((step, values))

    def evaluation(self, step, values):
        pass


@pytest.fixture
def faulty(monkeypatch, fresh_programs):
    """`faulty({5: "loss NaN"})`: from then on steps of these numbers, from 0, have that fault."""
    plain = step_lib.loss

    def poison(kinds: dict[int, str]):
        faults = [Fault(step, kind, 3, 4) for step, kind in kinds.items()]
        monkeypatch.setattr(step_lib, "loss", with_faults(plain, faults))
        fresh_programs()

    return poison


def saved(config, workdir, step):
    with Checkpoints(workdir) as checkpoints:
        state, cursor = resuming.restore_state(checkpoints, config, mesh_lib.make(config.mesh), step)
    return jax.tree.map(np.asarray, state), cursor


@pytest.mark.parametrize(("family", "factor"), [("llada", None), ("arm", 10.0)])
def test_a_run_goes_on_past_bad_batches_and_resumes_between_them(tiny, faulty, family, factor, tmp_path, monkeypatch):
    """Steps 5, 7, 8 and 9 are bad: all of the window that ends with 9. A checkpoint lies between 7 and 8."""
    monkeypatch.setattr(guard, "WINDOW", 8)
    config = tiny(family, {"optimizer.spike_factor": factor, "checkpoint.every": 7})
    bad = {4: "gradient NaN", 6: "loss inf", 7: "loss and gradient NaN", 8: "gradient inf"}
    faulty(bad | ({10: "spike"} if factor else {}))
    skipped = [5, 7, 8, 9] + ([11] if factor else [])
    lines, straight, resumed = Lines(), tmp_path / "straight", tmp_path / "resumed"
    assert loop.train(config, straight, lines)["skipped_steps"] == len(skipped)

    said = [line for line in lines.logged if "is skipped" in line]
    assert [int(line.split()[1]) for line in said] == skipped
    assert "as loss or gradient is not finite: loss" in said[0]
    assert not factor or "more than spike_factor=10 times the median" in said[-1]
    by_step = dict(lines.windows)
    assert [by_step[step]["train/skipped_steps"] for step in (3, 6, 9, 12)] == [0, 1, 3, 1 if factor else 0]
    assert "train/loss_nats_per_token" not in by_step[9] and by_step[9]["train/learning_rate"] > 0
    assert all(math.isfinite(by_step[step]["train/loss_nats_per_token"]) for step in (3, 6, 12))

    shutil.copytree(straight, resumed)
    (resumed / "summary.json").unlink()
    shutil.rmtree(resumed / "checkpoints" / "12")
    assert loop.train(config, resumed)["skipped_steps"] == len(skipped)
    (state, cursor), (expected, theirs) = (saved(config, workdir, 12) for workdir in (resumed, straight))
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    assert cursor["guard"] == theirs["guard"] and cursor["rows_digest"] == theirs["rows_digest"]
    assert len(cursor["guard"]["norms"]) == (12 - len(skipped) if factor else 0)
    timings = ("speed/tokens_per_second", "time/seconds")
    ours, theirs = (metrics.read(workdir / "metrics.jsonl") for workdir in (resumed, straight))
    assert [{k: v for k, v in line.items() if k not in timings} for line in ours] == [
        {k: v for k, v in line.items() if k not in timings} for line in theirs
    ]


def test_too_many_in_a_row_end_the_run_which_goes_on_from_an_older_step(tiny, faulty, tmp_path, monkeypatch):
    """Three in a row are allowed, not four; the guard can be turned on for a run that was begun without it."""
    monkeypatch.setattr(guard, "WINDOW", 4)
    config = tiny("llada", {"train.most_skipped": 4, "checkpoint.every": 2, "checkpoint.keep": 9})
    faulty(dict.fromkeys((1, 2, 3, 7, 8, 9, 10), "loss NaN"))
    words = (
        r"step 11 is the last of 4 skipped in a row \(--config.train.most_skipped=4\): loss or gradient is not finite, "
    )
    with pytest.raises(
        loop.Diverged, match=words + r"loss nan.*Last good checkpoint: step 10 in .*older step"
    ) as raised:
        loop.train(config, tmp_path)
    assert "\n" not in str(raised.value)
    assert saved(config, tmp_path, 10)[1]["guard"] == {
        "skipped_steps": 6,
        "in_a_row": 3,
        "norms": [],
        "rolled_back": [],
    }

    guarded = tiny("llada", {"optimizer.spike_factor": 10.0, "checkpoint.every": 2, "checkpoint.keep": 9})
    for step in (8, 10):
        shutil.rmtree(tmp_path / "checkpoints" / str(step))
    state, _ = saved(guarded, tmp_path, 6)
    assert np.isinf(state.norms_W).all()  # that checkpoint was saved without
    faulty({9: "spike"})
    assert loop.train(guarded, tmp_path)["skipped_steps"] == 3 + 1
    assert len(saved(guarded, tmp_path, 12)[0].norms_W) == 4
    assert saved(config, tmp_path, 12)[0].norms_W is None  # and off again


@pytest.mark.parametrize("kind", ["nothing", "text", "list", "back"])
def test_what_an_older_or_a_damaged_cursor_says_of_the_guard(tiny, trained, kind, tmp_path):
    """Checkpoints without it begin with none skipped; what is no number is refused in one line."""
    config = tiny("llada")
    shutil.copytree(trained["llada"].workdir / "checkpoints" / "4", tmp_path / "checkpoints" / "4")
    path = tmp_path / "checkpoints" / "4" / "run" / "metadata"
    tree = json.loads(path.read_text())
    value = {"text": {"skipped_steps": "two"}, "list": {"norms": [1.0, None]}, "back": {"rolled_back": [[1, "2"]]}}.get(
        kind
    )
    tree["cursor"] = {k: v for k, v in tree["cursor"].items() if k != "guard"} | ({"guard": value} if value else {})
    path.write_text(json.dumps(run_item.sealed(tree)))
    if value:
        with pytest.raises(loop.UserError, match=r"its cursor has guard=.* which are no numbers"):
            saved(config, tmp_path, 4)
    else:
        skips = guard.Skips(config, saved(config, tmp_path, 4)[1])
        assert (skips.total, skips.in_a_row) == (0, 0)
