"""Keys that change from the next step on: what a run then does, what is recorded, what is refused. Going back."""

import json
import shutil

import jax
import numpy as np
import pytest
from faults.r9_bad_numbers import Fault, with_faults

from llada import changes
from llada import config as config_lib
from llada import mesh as mesh_lib
from llada.errors import UserError
from llada.interop import model_card
from llada.training import corpus, guard, loop, metrics, reproduction, resuming
from llada.training import step as step_lib
from llada.training.checkpoint import Checkpoints

# The paper's remedy at 1.2 T tokens, as docs/running.md has it: a quarter of the rate; and some more.
REMEDY = {"optimizer.schedule": "0:1 6it:1 6it:0.25", "optimizer.clip_norm": 0.5, "optimizer.spike_factor": 50.0}
STEADY = {"optimizer.schedule": "0:1", "checkpoint.every": 3, "checkpoint.keep": 9, "train.log_every": 1}


def end(workdir, step=12):
    """All bits of a run's state, and its metrics but for clocks."""
    config = config_lib.load(workdir / "config.json")
    with Checkpoints(workdir) as checkpoints:
        state, cursor = resuming.restore_state(checkpoints, config, mesh_lib.make(config.mesh), step)
    bits = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]
    lines = [
        {name: value for name, value in line.items() if not name.startswith(("speed", "time"))}
        for line in metrics.read(workdir / "metrics.jsonl")
    ]
    return bits, cursor["rows_digest"], cursor["guard"], lines


@pytest.fixture(scope="module")
def changed(tiny, tmp_path_factory):
    """A run of 6 steps that went on to 12 by other values."""
    workdir = tmp_path_factory.mktemp("changed") / "run"
    loop.train(tiny("llada", STEADY | {"train.steps": 6}), workdir)
    loop.train(tiny("llada", STEADY | REMEDY), workdir)
    return workdir


def test_a_change_holds_from_the_next_step_on_and_is_recorded(tiny, changed, tmp_path):
    config = config_lib.load(changed / "config.json")
    assert json.loads((changed / "config.json").read_text())["changes"] == [
        [0, "optimizer.clip_norm", 1.0],
        [0, "optimizer.spike_factor", None],
        [0, "optimizer.schedule", "0:1"],
        [6, "optimizer.clip_norm", 0.5],
        [6, "optimizer.spike_factor", 50.0],
        [6, "optimizer.schedule", "0:1 6it:1 6it:0.25"],
    ]
    with Checkpoints(changed) as checkpoints:
        assert [len(checkpoints.item(step).config.changes) for step in (3, 6, 9, 12)] == [0, 0, 6, 6]
    lines = metrics.read(changed / "metrics.jsonl")
    rates = [line["train/learning_rate"] for line in lines if "train/learning_rate" in line]
    assert rates == [np.float32(0.01).item()] * 6 + [np.float32(0.0025).item()] * 6
    assert changes.at(config, 5) == tiny("llada", STEADY) and changes.at(config, 6) == tiny("llada", STEADY | REMEDY)

    # In one call, as `llada reproduce` trains it, and from a checkpoint before the change: the same bits.
    loop.train(config, tmp_path / "replayed")
    assert end(tmp_path / "replayed") == end(changed)
    assert reproduction.train_again(reproduction.plan(changed), tmp_path / "again") == []
    shutil.copytree(changed, tmp_path / "back")
    (tmp_path / "back" / "summary.json").unlink()
    for step in (6, 9, 12):
        shutil.rmtree(tmp_path / "back" / "checkpoints" / str(step))
    loop.train(tiny("llada", STEADY | REMEDY), tmp_path / "back")
    assert end(tmp_path / "back") == end(changed)
    assert config_lib.load(tmp_path / "back" / "config.json") == config

    # And those of the steps themselves, without any of the run's own bookkeeping.
    mesh, tokenizer = mesh_lib.make(config.mesh), corpus.tokenizer_for(changed, config)
    with Checkpoints(changed) as checkpoints, jax.set_mesh(mesh):
        state = resuming.restore_state(checkpoints, config, mesh, 6)[0]
        program = step_lib.compile_step(tiny("llada", STEADY | REMEDY), tokenizer.special, mesh)
        rows = corpus.corpus_for(changed, config, tokenizer).batches(config, tokenizer).iterate(6)
        for _ in range(6):
            state, _ = program(state, next(rows))
        rows.close()
    assert [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)] == end(changed)[0]


def test_reports_say_what_was_changed(changed):
    config = config_lib.load(changed / "config.json")
    said = (
        "after step 6: optimizer.clip_norm 1.0 -> 0.5; after step 6: optimizer.spike_factor None -> 50.0; after step 6"
    )
    facts = model_card._training_facts(config, changed, 12)
    assert facts["changed while training"].startswith(said) and "6it:0.25" in facts["optimizer"]
    facts = model_card._training_facts(config, changed, 6)
    assert "changed while training" not in facts and "`0:1`" in facts["optimizer"]


def test_values_that_a_run_left_behind_do_not_come_back_by_themselves(tiny, changed, tmp_path):
    """An experiment file that still has the old rate; and a run that has ended has no next step."""
    workdir = tmp_path / "run"
    shutil.copytree(changed, workdir)
    longer = STEADY | {"train.steps": 14}
    with pytest.raises(UserError, match=r"clip_norm=1.0 is a value .* left behind: it is 0.5 since step 6"):
        loop.train(tiny("llada", longer), workdir)
    with pytest.raises(UserError, match="end, step 12, and another value .optimizer.clip_norm: 0.5 -> 0.25. would"):
        loop.train(tiny("llada", STEADY | REMEDY | {"optimizer.clip_norm": 0.25}), workdir)
    with pytest.raises(UserError, match="belongs to another experiment .optimizer.beta2: 0.95 -> 0.9"):
        loop.train(tiny("llada", longer | REMEDY | {"optimizer.beta2": 0.9}), workdir)
    loop.train(tiny("llada", longer), workdir, allow_rate_jump=True)
    found = config_lib.load(workdir / "config.json").changes[6:]
    assert [change.step for change in found] == [12, 12, 12]
    assert [change.value for change in found] == [1.0, None, "0:1"]


def test_a_record_that_no_run_wrote_is_refused(tiny):
    rate = "optimizer.peak_learning_rate"
    for record, words in (
        ("soon", "is a str"),
        ([[0, rate]], "it holds"),
        ([[0, "model.width", 8]], "it holds"),
        ([[0, rate, 1.0], [5, rate, "x"]], "not a number"),
        ([[0, rate, 1.0], [5, rate, -1.0]], "must be positive"),
        ([[3, rate, 0.01]], "must rise from 0"),
        ([[0, rate, 1.0], [5, rate, 0.02]], "ends with 0.02, and is 0.01"),
    ):
        with pytest.raises(UserError, match=words):
            config_lib.from_config_dict(config_lib.to_dict(tiny("llada")) | {"changes": record})


@pytest.fixture
def faulty(monkeypatch, fresh_programs):
    plain = step_lib.loss

    def poison(steps):
        faults = [Fault(step - 1, "gradient NaN", 3, 4) for step in steps]
        monkeypatch.setattr(step_lib, "loss", with_faults(plain, faults))
        fresh_programs()

    return poison


def test_a_run_goes_back_once_and_leaves_the_batches_since_out(tiny, faulty, tmp_path, monkeypatch):
    """Steps 8 to 10 are bad, and the updates of 5 to 7 go with them: step 4 is the last one saved 2 steps before 8."""
    monkeypatch.setattr(guard, "WINDOW", 8)
    steady = STEADY | {"checkpoint.every": 2, "optimizer.spike_factor": 50.0, "optimizer.schedule": "0:1 100%:0.5"}
    guarded = steady | {"train.most_skipped": 3, "train.roll_back": 2}
    faulty([8, 9, 10])
    summary = loop.train(tiny("llada", guarded), tmp_path / "run")
    assert summary["rolled_back"] == [[4, 10]] and summary["skipped_steps"] == 6
    faulty(range(5, 11))
    left_out = loop.train(tiny("llada", steady), tmp_path / "left_out")
    (bits, rows, found, _), (theirs, their_rows, expected, _) = (end(tmp_path / name) for name in ("run", "left_out"))
    assert bits == theirs and rows == their_rows and left_out["skipped_steps"] == 6
    assert found == expected | {"rolled_back": [[4, 10]]}

    # Killed after it went back, and before it saved: it meets the same again.
    faulty([8, 9, 10])
    shutil.copytree(tmp_path / "run", tmp_path / "killed")
    (tmp_path / "killed" / "summary.json").unlink()
    for step in (8, 10, 12):
        shutil.rmtree(tmp_path / "killed" / "checkpoints" / str(step))
    loop.train(tiny("llada", guarded), tmp_path / "killed")
    assert end(tmp_path / "killed") == end(tmp_path / "run")

    # Reach: far enough before the first of the skipped steps, and saved since the run last went back.
    skips = guard.Skips(tiny("llada", guarded), {"guard": {"in_a_row": 3}})
    assert list(skips.reach(10)) == list(range(6))
    skips.went_back(4, 10, {})
    skips.count(skipped=True)
    assert list(skips.reach(16)) == [10, 11, 12, 13] and not skips.reach(12) and skips.total == 7
    assert guard.Skips(tiny("llada", steady), {}).reach(10) is None
