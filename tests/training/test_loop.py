"""A run as a whole: resumes bit for bit, reads identical rows for both families, stops when it must."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from llada.config import from_config_dict
from llada.errors import UserError
from llada.training import loop, metrics, optimizer, resuming
from llada.training.checkpoint import Checkpoints

# What a process of its own runs, given a directory with the config in it.
PROGRAM = (
    "import json, pathlib, sys; from llada.config import load; from llada.training import loop;"
    "loop.train(load(pathlib.Path(sys.argv[1]) / 'config.json'), pathlib.Path(sys.argv[1]))"
)
TIMINGS = ("speed/tokens_per_second", "time/seconds", "speed/mfu_percent")


def final_state(config, workdir):
    """Every leaf of the last checkpoint, on the host."""
    from llada import mesh as mesh_lib

    checkpoints = Checkpoints(workdir)
    state, cursor = resuming.restore_state(checkpoints, config, mesh_lib.make(config.mesh), checkpoints.latest())
    checkpoints.close()
    return jax.tree.map(np.asarray, state), cursor


def record(workdir):
    """metrics.jsonl without what depends on the clock."""
    lines = metrics.read(workdir / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]


def assert_same_run(config, a, b):
    (state_a, cursor_a), (state_b, cursor_b) = final_state(config, a), final_state(config, b)
    jax.tree.map(np.testing.assert_array_equal, state_a, state_b)
    assert cursor_a["rows_digest"] == cursor_b["rows_digest"] != ""
    assert record(a) == record(b)


@pytest.mark.parametrize(("family", "number", "times"), [("llada", signal.SIGINT, 1), ("arm", signal.SIGTERM, 2)])
def test_an_interrupted_run_ends_with_the_bits_of_an_uninterrupted_one(
    tiny, trained, family, number, times, tmp_path, monkeypatch
):
    """A signal in the middle of a logging window, away from any planned checkpoint; then the same call again.

    Schedulers may send SIGTERM twice.
    """
    config = tiny(family)
    said, steps = metrics.Meter.add, []

    def interrupt(meter, *values):
        said(meter, *values)
        steps.append(1)
        if len(steps) == 5:
            for _ in range(times):
                signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(metrics.Meter, "add", interrupt)
        with pytest.raises(loop.Interrupted, match=number.name):
            loop.train(config, tmp_path)
    stopped_at = Checkpoints(tmp_path).latest()
    assert 5 <= stopped_at < config.steps
    assert not (tmp_path / "summary.json").exists()
    loop.train(config, tmp_path)
    assert_same_run(config, tmp_path, trained[family].workdir)


def test_a_killed_run_continues_from_its_last_checkpoint_bit_for_bit(tiny, trained, tmp_path):
    """SIGKILL as soon as step 4 is committed."""
    config = tiny("llada")
    (tmp_path / "config.json").write_text(json.dumps(config_tree(config)))
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path)], env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 400
    while not (tmp_path / "checkpoints" / "4").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read().decode()
        time.sleep(0.002)
    process.kill()
    process.communicate()
    loop.train(config, tmp_path)
    assert_same_run(config, tmp_path, trained["llada"].workdir)


def test_what_a_checkpoint_writes_down_does_not_change_while_the_run_goes_on(tiny):
    """Orbax does it in the background, in the middle of a window of metrics."""
    meter = metrics.Meter(tiny("llada"))
    meter.add({"loss_nats_per_token": 5.0})
    saved = meter.state()
    as_it_was = json.dumps(saved)
    meter.add({"loss_nats_per_token": 3.0})
    assert json.dumps(saved) == as_it_was


def config_tree(config):
    from llada.config import to_dict

    return to_dict(config)


def test_both_families_read_identical_rows_in_identical_order(trained):
    llada, arm = (trained[family].summary for family in ("llada", "arm"))
    assert llada["rows_digest"] == arm["rows_digest"]
    assert llada["corpus_digest"] == arm["corpus_digest"]
    assert llada["tokens"] == arm["tokens"]


def test_the_summary_holds_what_the_interface_promises(trained):
    promised = (
        "step objective parameters non_embedding_parameters tokens flops_6nd flops_exact train_nats_per_token "
        "eval_nats_per_token eval_stderr eval_bits_per_byte tokens_per_second seconds"
    ).split()
    for run in trained.values():
        summary = json.loads((run.workdir / "summary.json").read_text())
        assert summary == run.summary
        assert set(promised) <= summary.keys()
        assert summary["eval_nats_per_token"] < np.log(320) + 0.5
        assert list(run.workdir.glob("events.out.tfevents.*"))


def test_training_learns(trained):
    """Twelve steps are few, but the loss falls from ln V."""
    for run in trained.values():
        losses = [line["train/loss_nats_per_token"] for line in record(run.workdir) if "train/grad_norm" in line]
        assert losses[-1] < losses[0] - 0.2


def test_a_finished_run_called_again_changes_nothing(tiny, trained, tmp_path):
    workdir = tmp_path / "llada"
    shutil.copytree(trained["llada"].workdir, workdir)
    files = ("metrics.jsonl", "calls.jsonl", "summary.json")
    before = [(workdir / name).read_bytes() for name in files]
    assert loop.train(tiny("llada"), workdir) == trained["llada"].summary
    assert [(workdir / name).read_bytes() for name in files] == before


def test_a_non_finite_loss_stops_the_run_and_names_the_last_good_checkpoint(tiny, tmp_path):
    """The rate jumps to 1e30 after step 4: loss and gradient of step 5 are finite, the parameters it leaves are not."""
    config = tiny("llada", {"optimizer.schedule": "0:0 33.4%:0 33.4%:1e30", "checkpoint.every": 2})
    with pytest.raises(
        loop.Diverged,
        match=r"step 5 is not finite: loss \d.* gradient norm \d.* parameter norm inf.* checkpoint: step 4 in",
    ):
        loop.train(config, tmp_path)
    assert Checkpoints(tmp_path).steps() == [2, 4]


def test_a_workdir_of_another_experiment_is_refused_and_left_alone(tiny, trained):
    workdir = trained["llada"].workdir
    before = (workdir / "config.json").read_bytes()
    words = r"another experiment \(model\.layers: 2 -> 3\); give a new --workdir or the old values\. To go on from its "
    with pytest.raises(UserError, match=words + "weights .*llada import --source=.*another --config.seed"):
        loop.train(tiny("llada", {"model.layers": 3}), workdir)
    assert (workdir / "config.json").read_bytes() == before


def test_an_unwritable_workdir_is_refused(tiny, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        loop.train(tiny("llada"), tmp_path / "file" / "run")


def test_more_steps_continue_a_finished_run(tiny, trained, tmp_path):
    """A run of 6 steps lengthened to 12 under a schedule in tokens equals a run of 12."""
    changes = {"optimizer.schedule": "0:1"}
    loop.train(tiny("llada", changes | {"train.steps": 6}), tmp_path / "grown")
    config = tiny("llada", changes)
    loop.train(config, tmp_path / "grown")
    loop.train(config, tmp_path / "straight")
    grown, straight = (final_state(config, tmp_path / name)[0] for name in ("grown", "straight"))
    jax.tree.map(np.testing.assert_array_equal, grown, straight)


def test_config_survives_json(tiny):
    for family in ("llada", "arm"):
        config = tiny(family)
        assert from_config_dict(json.loads(json.dumps(config_tree(config)))) == config


def test_evaluations_happen_at_named_positions_too(tiny, tmp_path):
    """256 tokens a step: 768 tokens are step 3, half the run is step 6; the last step always."""
    config = tiny("llada", {"evaluate.every": 0, "evaluate.at": "768 50%"})
    loop.train(config, tmp_path)
    assert [line["step"] for line in record(tmp_path) if "eval/nats_per_token" in line] == [3, 6, 12]
    for wrong in ("soon", "0", "200%", "1"):
        with pytest.raises(UserError, match=f"evaluate.at has '{wrong}'"):
            optimizer.evaluation_steps(tiny("llada", {"evaluate.at": wrong}))


def test_unique_tokens_are_read_again_and_again(tiny, tmp_path):
    """Ten rows of 32 tokens, 12 steps of 8 rows: 9.6 epochs, in the same order for both families."""
    summaries = []
    for family in ("llada", "arm"):
        config = tiny(family, {"data.unique_tokens": 330, "data.directory": str(tmp_path / "rows")})
        summaries.append(loop.train(config, tmp_path / family))
        assert not (tmp_path / family / "data").exists()  # one directory of rows for both
    assert summaries[0]["rows_digest"] == summaries[1]["rows_digest"]
    assert summaries[0]["epochs"] == pytest.approx(9.6, rel=0.05)
    with pytest.raises(UserError, match="unique_tokens=31: one row is data.sequence_length=32"):
        loop.train(tiny("llada", {"data.unique_tokens": 31, "data.directory": str(tmp_path / "rows")}), tmp_path / "x")


def test_a_moved_tokenizer_is_no_other_experiment_but_another_tokenizer_is(tiny, trained, tmp_path):
    source = trained["llada"].workdir / "tokenizer.model"
    here = tmp_path / "here.model"
    here.write_bytes(source.read_bytes())
    loop.train(tiny("arm", {"data.tokenizer": str(here)}), tmp_path / "run")
    here.rename(tmp_path / "there.model")
    for path in ("here.model", "there.model"):
        loop.train(tiny("arm", {"data.tokenizer": str(tmp_path / path)}), tmp_path / "run")
    from llada.data.tokenizer_training import train_tokenizer

    train_tokenizer(["other words entirely " * 50], 300, tmp_path / "other.model")
    with pytest.raises(UserError, match="not the tokenizer that"):
        loop.train(tiny("arm", {"data.tokenizer": str(tmp_path / "other.model")}), tmp_path / "run")


def test_the_compiler_as_users_have_it_trains_the_same(tiny, trained, tmp_path):
    """The other tests compile with flags that save time (conftest.py); a process without them ends as close as float32
    sums in another order do."""
    (tmp_path / "config.json").write_text(json.dumps(config_tree(tiny("llada"))))
    plain = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], env=plain, check=True, stderr=subprocess.PIPE)
    for ours, theirs in zip(record(tmp_path), record(trained["llada"].workdir), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4)
