"""What a run stands on: its workdir for itself, values that settle, disks that fill up, signals, a clock."""

import contextlib
import errno
import json
import math
import shutil
import signal
import threading
from types import SimpleNamespace

import jax
import pytest

import llada
from llada import accounting, files
from llada.data import holdout
from llada.errors import DiskError, Interrupted, UserError
from llada.inference import generation
from llada.training import corpus as corpus_lib
from llada.training import loop, metrics, stopping
from llada.training import run as run_lib
from llada.training import step as step_lib
from llada.training import workdir as workdir_lib
from llada.training.checkpoint import Checkpoints
from llada.training.run_item import RunItem


@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained["llada"].workdir, tmp_path / "run")


def contents(workdir):
    return {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}


def test_nobody_else_trains_in_a_workdir(tiny, copy):
    with files.lock(copy / "lock"):
        before = contents(copy)
        with pytest.raises(files.Locked, match=r"--workdir=.* is in use by process \d+ on .* since"):
            loop.train(tiny("llada"), copy)
        assert contents(copy) == before
    loop.train(tiny("llada"), copy)
    assert not (copy / "lock").exists()


def test_a_failed_save_ends_in_one_line_and_leaves_no_thread(tiny, copy, monkeypatch):
    """The second of two saves finds no room. Threads that never end would keep the process for ever."""
    shutil.rmtree(copy / "checkpoints" / "12")
    threads = {thread for thread in threading.enumerate() if not thread.daemon}
    from orbax.checkpoint import CheckpointManager

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "checkpoints/12")

    monkeypatch.setattr(CheckpointManager, "wait_until_finished", full)
    with pytest.raises(DiskError, match="No space left on device while saving .*the checkpoint of step 8 is good"):
        loop.train(tiny("llada"), copy)
    assert {thread for thread in threading.enumerate() if not thread.daemon} <= threads


def test_a_full_disk_takes_no_checkpoint_and_tensorboard_is_not_needed(tiny, copy, monkeypatch, capsys):
    """Metrics find no room at step 12, TensorBoard never does."""
    shutil.rmtree(copy / "checkpoints" / "12")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(metrics._Board, "write", full)
    dumps = metrics.json_files.dumps
    monkeypatch.setattr(
        metrics.json_files, "dumps", lambda value, **k: full() if value.get("step") == 12 else dumps(value)
    )
    with pytest.raises(DiskError, match=r"No space left on device while writing .*metrics.jsonl; make room"):
        loop.train(tiny("llada"), copy)
    assert "no more TensorBoard events: No space left" in capsys.readouterr().err
    assert Checkpoints(copy).steps() == [4, 8]
    assert [line["step"] for line in metrics.read(copy / "metrics.jsonl")][-1] == 9


@pytest.mark.parametrize("steps", [10, 24])
def test_another_length_is_refused_where_the_rate_would_jump(tiny, copy, steps, capsys, monkeypatch):
    """The default schedule, in percent, from step 12 of 12."""
    config, before = tiny("llada", {"train.steps": steps}), contents(copy)
    if steps == 10:
        assert loop.train(config, copy) == json.loads((copy / "summary.json").read_text())
        assert "is already at step 12 of 10: nothing to do" in capsys.readouterr().err
    else:
        words = "12 -> 24 steps moves .* from step 12 to 13 the learning rate would go from 0.001 to 0.01; --allow_rate"
        with pytest.raises(UserError, match=words):
            loop.train(config, copy)
    assert contents(copy) == before
    monkeypatch.setattr(loop, "TrainingRun", _stopped)
    if steps == 24:
        with pytest.raises(Interrupted):
            loop.train(config, copy, allow_rate_jump=True)


@pytest.mark.parametrize(
    ("schedule", "step", "old", "new", "refused"),
    [
        ("0:1", 12, 12, 24, False),
        ("0:0 512:1 2048:0.1", 12, 12, 24, False),  # in tokens
        ("0:0 20%:1 80%:1 100%:0", 6, 12, 18, False),  # on the plateau before and after
        ("0:0 20%:1 80%:1 100%:0", 2, 12, 24, True),  # warm-up would go back
        ("0:0 20%:1 80%:1 100%:0", 11, 12, 10, False),  # nothing left to do
    ],
)
def test_the_rate_of_the_next_step_decides(tiny, schedule, step, old, new, refused):
    configs = [tiny("llada", {"optimizer.schedule": schedule, "train.steps": steps}) for steps in (old, new)]
    with pytest.raises(UserError) if refused else contextlib.nullcontext():
        workdir_lib._refuse_a_jump(RunItem(step, configs[0], {}, b"", True), configs[1])


def test_a_first_mistake_settles_nothing(tiny, trained, tmp_path, monkeypatch):
    """Source, schedule, position, tokenizer, vocabulary, length of rows wrong one after the other, then right."""
    w, rows = tmp_path / "run", trained["llada"].workdir / "data"
    for wrong, words in (
        ({"data.source": "text:/nowhere/*.txt"}, "no file matches"),
        ({"optimizer.schedule": "soon"}, "optimizer.schedule has 'soon'"),
        ({"optimizer.schedule": "0:1e400"}, "optimizer.schedule has '0:1e400'.*at most 1e.18"),
        ({"optimizer.schedule": "0:0 1e400:1"}, "optimizer.schedule has '1e400:1'"),
        ({"evaluate.at": "soon"}, "evaluate.at has 'soon'"),
        ({"data.tokenizer": "/nowhere/t.model"}, "tokenizer.*/nowhere/t.model"),
        ({"data.directory": "/dev/null"}, "data.directory=/dev/null is no directory"),
        ({"data.directory": f"{__file__}/rows"}, "data.directory=.* cannot be written: .* is no directory"),
        ({"data.directory": str(rows), "data.sequence_length": 31}, r"with another sequence_length \(32, asked 31\)"),
        ({"model.vocab_size": 100_000}, "vocab_size=100000 is too large"),
    ):
        with pytest.raises(UserError, match=words):
            loop.train(tiny("llada", wrong), w)
        assert not w.exists(), "what is refused leaves no trace"
    monkeypatch.setattr(loop, "TrainingRun", _stopped)
    for right in ({"model.vocab_size": 310, "data.sequence_length": 30}, {}):
        with pytest.raises(Interrupted):
            loop.train(tiny("llada", right), w)
        config = run_lib.read_config(w)
        assert config == tiny("llada", right)
        tokenizer = corpus_lib.tokenizer_for(w, config)
        assert tokenizer.vocab_size == config.model.vocab_size
        assert corpus_lib.corpus_for(w, config, tokenizer).train_NL.shape[1] == config.data.sequence_length


def _stopped(*_):
    raise Interrupted(signal.SIGTERM, "before its first step")


def test_a_signal_while_preparing_stops_at_the_next_document(tiny, tmp_path, monkeypatch):
    read, seen = holdout.training, []

    def counted(*arguments):
        for text in read(*arguments):
            seen.append(text)
            if len(seen) == 3:
                signal.raise_signal(signal.SIGTERM)
            yield text

    monkeypatch.setattr(holdout, "training", counted)
    with pytest.raises(Interrupted, match="stopped by SIGTERM while preparing; run again") as stopped:
        loop.train(tiny("llada"), tmp_path / "run")
    assert len(seen) == 3 and stopped.value.status == 143


@pytest.mark.parametrize("ignored", [False, True])
def test_a_hangup_is_a_signal_to_stop_unless_it_is_ignored(ignored, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        with stopping.stop_signals() as received:
            signal.raise_signal(signal.SIGHUP)
            assert list(received) == ([] if ignored else [signal.SIGHUP])
        assert signal.getsignal(signal.SIGHUP) == (signal.SIG_IGN if ignored else signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture
def clock(monkeypatch):
    """`clock(seconds)` moves the meter's clock."""
    now = [0.0]

    def advance(seconds):
        now[0] += seconds

    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    return advance


STEP = {"loss_nats_per_token": 5.0, "token_count": 100.0, "learning_rate": 0.1}


@pytest.mark.parametrize("log_every", [1, 3, 50])
def test_a_speed_is_of_several_steps_that_took_their_time(tiny, clock, log_every):
    """Two seconds a step of 256 tokens; the last before a pause is fetched at once, being ready."""
    meter = metrics.Meter(tiny("llada", {"train.log_every": log_every}))
    for _ in range(2):
        for step in range(4):
            clock(2.0 if step else 60.0)  # compilation, evaluation, saving
            meter.add(STEP)
        meter.pause()
        meter.add(STEP)
        meter.pause()
        assert meter.window(5, STEP)["speed/tokens_per_second"] == pytest.approx(128)
        assert meter.tokens_per_second == pytest.approx(128)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_few_steps_have_no_speed(tiny, clock, steps):
    meter = metrics.Meter(tiny("llada"))
    for _ in range(steps):
        clock(1e-6)
        meter.add(STEP)
    assert meter.tokens_per_second is None
    assert not [name for name in meter.window(steps, STEP) if name.startswith("speed")]


def test_a_window_has_the_mean_of_its_steps_and_the_last_rate(tiny):
    meter = metrics.Meter(tiny("llada"))
    for i in range(3):
        meter.add(STEP | {"loss_nats_per_token": 2.0 * i, "learning_rate": 0.1 * i})
    window = meter.window(3, STEP | {"learning_rate": 0.2})
    assert window["train/loss_nats_per_token"] == pytest.approx(2.0)
    assert window["train/learning_rate"] == 0.2
    assert "train/token_count" not in window
    for _ in range(2):
        meter.add(STEP | {"loss_nats_per_token": 5.0})
    assert meter.window(5, STEP)["train/loss_nats_per_token"] == pytest.approx(5.0)  # of these two steps alone


def test_totals_are_of_tokens(tiny):
    config = tiny("llada")
    totals = metrics.run_totals(config, 3)
    assert totals["train/tokens"] == 3 * 8 * 32
    assert totals["train/flops_exact"] == 3 * 8 * 32 * accounting.flops_exact_per_token(config)


def test_mfu_is_of_all_devices(tiny, clock, monkeypatch):
    """Four devices of a teraflop, two seconds a step of 256 tokens."""
    config = tiny("llada")
    monkeypatch.setitem(accounting.PEAK_FLOPS, metrics.jax.devices()[0].device_kind, 1e12)
    monkeypatch.setattr(metrics.jax, "device_count", lambda: 4)
    meter = metrics.Meter(config)
    for _ in range(5):
        clock(2.0)
        meter.add(STEP)
    flops = 128 * accounting.flops_exact_per_token(config)
    assert meter.window(5, STEP)["speed/mfu_percent"] == pytest.approx(100 * flops / 4e12)


def test_tensorboard_hides_later_steps_of_an_earlier_call_only(tmp_path):
    from tensorboardX.proto import event_pb2

    metrics.Writer(tmp_path, 40)
    (path,) = tmp_path.glob("events.out.tfevents.*")
    content, starts = path.read_bytes(), []
    while content:
        size = int.from_bytes(content[:8], "little")
        event = event_pb2.Event.FromString(content[12 : 12 + size])
        starts += [event.step] if event.HasField("session_log") else []
        content = content[16 + size :]
    assert starts == [41]


def test_what_does_not_exist_is_null_in_metrics(tmp_path):
    """One draw has no Monte Carlo error, a diverged likelihood no perplexity."""
    writer = metrics.Writer(tmp_path, 0)
    writer.write(1, {"eval/nats_per_token": math.inf, "eval/monte_carlo_stderr": math.nan})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 1, "eval/nats_per_token": null, "eval/monte_carlo_stderr": null}\n'
    assert metrics.read(tmp_path / "metrics.jsonl") == [json.loads(text)]


def test_a_loaded_run_writes_scores_and_shows_itself_in_one_line(trained, monkeypatch):
    run = llada.load(trained["llada"].workdir)
    assert repr(run) == f"Run(diffusion, 38,048 parameters, step 12, workdir={trained['llada'].workdir})"
    asked = []

    def generate(config, params, tokenizer, requests):
        assert jax.sharding.get_abstract_mesh().shape == run.mesh.shape
        asked.extend(requests)
        return [SimpleNamespace(text="sees")]

    monkeypatch.setattr(generation, "generate", generate)
    assert run.generate("the cat", gen_length=2) == run.infill("the [MASK:1]", steps=1) == "sees"
    assert asked == [generation.Request("the cat", gen_length=2), generation.Request(infill="the [MASK:1]", steps=1)]
    assert run.log_likelihood("the cat", " sees", draws=2).log_likelihood < 0


def test_jaxs_default_generator_does_not_change_initial_parameters(tiny, monkeypatch):
    keys = []
    monkeypatch.setattr(step_lib.transformer, "init", lambda config, key: keys.append(key) or {})
    with jax.default_prng_impl("rbg"):
        step_lib.init_state(tiny("llada"))
    assert (jax.random.key_data(keys[0]) == jax.random.key_data(jax.random.key(0, impl="threefry2x32"))).all()
    assert keys[0].dtype == jax.random.key(0, impl="threefry2x32").dtype


def test_tensorboard_is_not_given_figures_that_do_not_exist(tmp_path, caplog):
    """One draw has no Monte Carlo error: null in metrics.jsonl, and no warning of tensorboardX in the terminal."""
    values = {"eval/nats_per_token": 1.5, "eval/monte_carlo_stderr": float("nan")}
    metrics.Writer(tmp_path, 0).write(1, values)
    (path,) = tmp_path.glob("events.out.tfevents.*")
    assert not caplog.records
    assert b"eval/nats_per_token" in path.read_bytes() and b"monte_carlo" not in path.read_bytes()
    assert metrics.read(tmp_path / "metrics.jsonl")[0]["eval/monte_carlo_stderr"] is None
