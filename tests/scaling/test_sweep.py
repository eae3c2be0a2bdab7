"""A sweep as a whole: every run once, whatever interrupts it; what it leaves behind; what it refuses."""

import json
import signal
import sys
from pathlib import Path

import in_process
import jax
import pytest

from llada import config as config_lib
from llada.errors import UserError
from llada.scaling import results
from llada.scaling import sweep as sweep_lib
from llada.training import loop, metrics

EXPERIMENT = '''
from llada.config import default_config


def get_config(argument="isoflop"):
    c = default_config()
    c.model.update(dict(vocab_size=320, max_length=32, dtype="float32"))
    c.data.update(dict(source="text:{corpus}/*.txt", sequence_length=32, holdout_fraction=0.2))
    c.train.update(dict(batch_size=4, log_every=10))
    c.evaluate.draws = 2
    c.checkpoint.every = 12
    c.optimizer.peak_learning_rate = 1e-2
    c.sweep = dict(
        budgets=(2e8,),
        sizes=tuple(dict(layers=1, width=width, heads=2, ffn=2 * width) for width in (16, 24, 32)),
        max_epochs=100.0,
        evaluation_rows=16,
    )
    if argument == "repeat":
        c.sweep = dict(mode="repeat", sizes=c.sweep["sizes"][:1], unique_tokens=(640,), epochs=(1, 4, 16),
                       evaluation_rows=16)
    if argument == "checkpoints":
        c.sweep = dict(mode="checkpoints", sizes=c.sweep["sizes"][:2], budgets=(2e8, 4e8), max_epochs=100.0,
                       evaluation_rows=16, objectives=("diffusion",))
    return c
'''  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly():
    """Dozens of tiny programs, a few steps each: compiling them well takes longer than running them badly."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def experiment(corpus, tmp_path_factory):
    path = tmp_path_factory.mktemp("experiment") / "tiny.py"
    path.write_text(EXPERIMENT.replace("{corpus}", str(corpus)))
    return path


@pytest.fixture(scope="module")
def swept(experiment, tmp_path_factory):
    """A finished sweep of six runs, by the command; leave it as it is."""
    directory = tmp_path_factory.mktemp("swept")
    assert sweep(f"--config={experiment}", f"--workdir={directory}", "--predict=1e9") == 0
    return directory


def sweep(*arguments: str) -> int:
    done = in_process.llada("sweep", *arguments)
    print(done.stdout)
    print(done.stderr, file=sys.stderr)
    return done.returncode


def figures(directory):
    return {(r.run, r.step): (r.nats_per_token, r.stderr) for r in results.read_csv(directory / "results.csv")}


def test_every_run_is_an_ordinary_workdir_and_its_figure_in_the_table(swept):
    rows = results.read_csv(swept / "results.csv")
    assert len(rows) == 6 and {row.status for row in rows} == {"finished"}
    for row in rows:
        workdir = swept / "runs" / row.run
        summary = json.loads((workdir / "summary.json").read_text())
        assert row.nats_per_token == summary["eval_nats_per_token"]
        assert row.monte_carlo_stderr == summary["eval_monte_carlo_stderr"]
        assert (row.monte_carlo_stderr > 0) == (row.objective == "diffusion")
        assert row.flops_exact == summary["flops_exact"] and row.flops_6nd == summary["flops_6nd"]
        assert row.tokens == summary["tokens"] and row.epochs == pytest.approx(summary["epochs"])
        again = loop.train(config_lib.load(workdir / "config.json"), workdir)  # llada train finds nothing to do
        assert again == summary
    # The tokenizer was trained and the corpus cut once, for all.
    assert not list(swept.glob("runs/*/data")) and (swept / "data" / "metadata.json").exists()
    assert len({row.tokenizer_sha256 for row in rows}) == len({row.eval_rows_digest for row in rows}) == 1


def test_it_leaves_fits_pictures_and_a_report(swept):
    fits = json.loads((swept / "fits.json").read_text())
    assert set(fits["families"]) == {"diffusion", "autoregressive"} and fits["matching"] == "6nd"
    for name in ("isoflop", "frontier", "allocation"):
        assert (swept / f"{name}.png").stat().st_size > 10_000
    report = (swept / "report.md").read_text()
    assert "llada sweep --config=" in report or "llada" in report
    for picture in ("isoflop.png", "frontier.png", "allocation.png"):
        assert picture in report


def test_called_again_it_trains_nothing(swept, experiment, monkeypatch, capsys):
    before = figures(swept)

    def train(*_):
        raise AssertionError("a finished run was begun again")

    monkeypatch.setattr(loop, "train", train)
    assert sweep(f"--workdir={swept}") == 0  # and the grid needs no naming twice
    assert figures(swept) == before
    assert "6 of them finished" in capsys.readouterr().out


def test_a_dry_run_plans_and_writes_nothing(experiment, tmp_path, capsys):
    directory = tmp_path / "none"
    assert sweep(f"--config={experiment}", f"--workdir={directory}", "--dry_run", "--machine=v5p") == 0
    assert not directory.exists()
    out = capsys.readouterr().out
    assert "6 runs" in out and "TPU v5p" in out


def test_jobs_share_a_directory_and_an_interrupted_run_goes_on(swept, experiment, tmp_path, monkeypatch):
    """Two shares, the first stopped in the middle of a run: all six end with the figures of an undisturbed sweep."""
    common = (f"--config={experiment}", f"--workdir={tmp_path}")
    said = metrics.Meter.add

    def interrupt(meter, values):
        said(meter, values)
        if meter.timed_tokens == 20 * meter.config.tokens_per_step:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(metrics.Meter, "add", interrupt)
        assert sweep(*common, "--only=1/2") == 130
    assert sweep(*common, "--only=2/2") == 0
    half = results.read_csv(tmp_path / "results.csv")
    assert {"finished", "waiting"} <= {row.status for row in half}
    assert "waiting" in (tmp_path / "report.md").read_text()
    assert sweep(*common, "--only=1/2") == 0
    assert figures(tmp_path) == figures(swept)


def test_a_diverged_run_is_reported_and_the_rest_goes_on(experiment, tmp_path, monkeypatch, capsys):
    train = loop.train

    def some_diverge(config, workdir, progress=None):
        if config.model.width == 24:
            raise loop.Diverged("step 3 is not finite")
        return train(config, workdir, progress)

    monkeypatch.setattr(loop, "train", some_diverge)
    common = (f"--config={experiment}", f"--workdir={tmp_path}")
    assert sweep(*common) == 1
    rows = {row.run: row for row in results.read_csv(tmp_path / "results.csv")}
    assert sorted(row.status for row in rows.values()) == ["failed"] * 2 + ["finished"] * 4
    assert "diverged: step 3" in rows["arm_L1-d24_C2e08"].reason
    assert "diverged: step 3" in (tmp_path / "report.md").read_text()
    assert "arm_L1-d24_C2e08 failed" in capsys.readouterr().err
    monkeypatch.setattr(loop, "train", train)
    assert sweep(*common) == 1  # a failed run is not tried again by itself
    assert sweep(*common, "--retry_failed") == 0


def test_a_run_that_another_process_has_is_left_to_it(experiment, tmp_path):
    base, group = sweep_of(experiment)
    sweep_ = sweep_lib.make(tmp_path, base, group)
    sweep_lib.prepare(sweep_)
    run, *_ = sweep_.runs
    said = []
    with sweep_lib.lock(sweep_.workdir(run) / "lock"):
        sweep_lib.run_all(sweep_, [run], lambda _: None, lambda run, how: said.append(how))
    assert said == ["left to another process, which has it"]
    assert sweep_lib.state(sweep_.workdir(run), run.config.steps) == "waiting"


def sweep_of(experiment, argument="isoflop"):
    from llada.commands.experiment import read_sweep

    return read_sweep(f"{experiment}:{argument}", {})


@pytest.mark.parametrize("argument", ["checkpoints", "repeat"])
def test_one_run_is_read_at_many_budgets_or_epochs(experiment, argument, tmp_path):
    assert sweep(f"--config={experiment}:{argument}", f"--workdir={tmp_path}") == 0
    rows = results.read_csv(tmp_path / "results.csv")
    assert {row.status for row in rows} == {"finished"} and not any(row.annealed for row in rows)
    for run in {row.run for row in rows}:
        readings = [row for row in rows if row.run == run]
        assert len(readings) == (2 if argument == "checkpoints" else 3)
        assert [row.step for row in readings] == sorted({row.step for row in readings})
        assert all(row.measured for row in readings)
    if argument == "repeat":
        assert json.loads((tmp_path / "fits.json").read_text())["crossovers"][0]["unique_tokens"] == 640
        assert [round(row.epochs) for row in rows[:3]] == [1, 4, 16] and (tmp_path / "repeat.png").exists()
        assert {row.unique_tokens for row in rows} == {640}


def test_runs_made_by_other_rules_are_not_taken_for_ours(swept, experiment):
    base, group = sweep_of(experiment)
    base["optimizer"]["peak_learning_rate"] = 2e-2
    with pytest.raises(UserError, match=r"planned by other rules \(optimizer.peak_learning_rate: 0.01 -> 0.02"):
        sweep_lib.make(swept, base, group)


def test_results_join_only_where_they_compare(swept, tmp_path, capsys):
    """Readings of the sweep fitted by themselves; from another corpus, tokenizer, set of rows or count, refused."""
    csv = swept / "results.csv"
    assert sweep(f"--results={csv}", f"--workdir={tmp_path / 'joined'}") == 0
    joined, alone = (json.loads((d / "fits.json").read_text()) for d in (tmp_path / "joined", swept))
    assert joined["families"] == alone["families"]
    rows = results.read_csv(csv)
    for change in ({"corpus_digest": "other"}, {"tokenizer_sha256": "other"}, {"eval_rows_digest": "other"},
                   {"matching": "exact"}):  # fmt: skip
        results.write_csv([type(rows[0])(**(rows[0].__dict__ | change))], tmp_path / "other.csv")
        assert sweep(f"--results={csv}", f"--results={tmp_path / 'other.csv'}", f"--workdir={tmp_path / 'x'}") == 2
        assert "do not compare" in capsys.readouterr().err
    twin = next(r for r in rows if r.objective != rows[0].objective and r.size == rows[0].size)
    results.write_csv([rows[0], type(twin)(**(twin.__dict__ | {"rows_digest": "other"}))], tmp_path / "rows.csv")
    assert sweep(f"--results={tmp_path / 'rows.csv'}", f"--workdir={tmp_path / 'x'}") == 2
    assert "ended on different rows" in capsys.readouterr().err
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    assert sweep(f"--results={tmp_path / 'bad.csv'}", f"--workdir={tmp_path / 'x'}") == 2
    assert "has no column run" in capsys.readouterr().err


def test_a_table_survives_its_file(swept, tmp_path):
    rows = results.read_csv(swept / "results.csv")
    results.write_csv(rows, tmp_path / "again.csv")
    assert results.read_csv(tmp_path / "again.csv") == rows
    assert (tmp_path / "again.csv").read_bytes() == (swept / "results.csv").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config=experiments/isoflop.py"], "--workdir is missing"),
        (["--workdir=nowhere"], "holds no sweep"),
        (["--config=experiments/isoflop.py:huge", "--workdir=w"], "quick, smdm, paper, repeat"),
        (["--config=experiments/isoflop.py", "--workdir=w", "--only=5/4"], "--only=5/4"),
        (["--config=experiments/isoflop.py", "--workdir=w", "--machine=v9", "--dry_run"], "TPU v5p"),
        (["--config=experiments/isoflop.py", "--workdir=w", "--predict=-1"], "--predict=-1"),
        (["--results=nothing.csv", "--workdir=w"], "cannot be read"),
    ],
)
def test_bad_input_gets_one_line_and_status_2(arguments, said, capsys, monkeypatch):
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    assert sweep(*arguments) == 2
    error = capsys.readouterr().err
    assert said in error and error.strip().count("\n") == 0
    assert not Path("w").exists() and not Path("nowhere").exists()
