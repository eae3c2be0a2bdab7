"""A sweep as a whole: every run once, whatever interrupts it; what it leaves behind; what it refuses."""

import errno
import json
import math
import shutil
import signal
import sys
from pathlib import Path

import in_process
import jax
import pytest

from llada import config as config_lib
from llada.errors import DataError, DiskError, Diverged, UserError
from llada.scaling import measures, results, sweep_report
from llada.scaling import sweep as sweep_lib
from llada.training import loop, metrics
from llada.training import run as run_lib

EXPERIMENT = """
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
                       evaluation_rows=16, objectives=("diffusion",),
                       variants=dict(paired=dict(masks="complementary", weight="flat")))
    if argument == "variants":
        c.sweep = dict(mode="variants", sizes=c.sweep["sizes"][:2], budgets=(2e8, 4e8), seeds=(0, 1), max_epochs=100.0,
                       evaluation_rows=16, objectives=("diffusion",), variants=dict(flat=dict(weight="flat")))
    return c
"""


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


def test_finished_runs_are_scored_once_by_further_measures_and_gaps_say_what_they_are(swept, tmp_path, monkeypatch):
    directory = tmp_path / "swept"
    shutil.copytree(swept, directory)
    every = results.read_csv(swept / "results.csv")
    (llada,), (arm,) = ([r for r in every if r.width == 16 and r.family.exact == exact] for exact in (False, True))
    rows, said = [llada, arm], []
    workdirs = [directory / "runs" / row.run for row in rows]
    assert measures.section(directory, rows) == ""
    measures.read_all(workdirs, ["chain_rule"], 2, said.append)
    assert sorted(line.split(":")[0] for line in said) == sorted(row.run for row in rows)

    def again(*_):
        raise AssertionError("scored twice")

    monkeypatch.setattr(run_lib, "load", again)
    measures.read_all(workdirs, ["chain_rule"], 2, again)
    sweep_report.write(directory, rows, "llada sweep")
    report = (directory / "report.md").read_text()
    (by_order,) = [line for line in report.splitlines() if "| chain_rule " in line]
    (by_bound,) = [line for line in report.splitlines() if "| l_of_L " in line]
    assert "| exact, of this order " in by_order and "| exact on both sides " in by_order
    assert "| a bound on its NLL from above " in by_bound and "| the true gap is at most this " in by_bound
    assert measures.FITTED in report
    found = [json.loads((workdir / "evaluation.json").read_text()) for workdir in workdirs]
    assert found[0]["eval_rows_digest"] == found[1]["eval_rows_digest"] and found[0]["rows"] == 2
    assert llada.run in by_order and f" {found[0]['nats_per_token'] - found[1]['nats_per_token']:+.4f} " in by_order


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

    def interrupt(meter, *values):
        said(meter, *values)
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


@pytest.fixture
def quick_runs(monkeypatch):
    """`quick_runs(fails)`: runs that train nothing and end with figures of a made-up law, where `fails` raises nothing.

    `fails` is called with the config. No pictures. Returns the names of the workdirs, in order.
    """
    begun = []
    monkeypatch.setattr(sweep_report, "draw", lambda *_: {})

    def make(fails=lambda config: None):
        def train(config, workdir, progress=None):
            begun.append(workdir.name)
            workdir.mkdir(parents=True, exist_ok=True)
            (workdir / "config.json").write_text(json.dumps(config_lib.to_dict(config)))
            fails(config)
            width, step = config.model.width, config.steps
            loss = 3 + 0.3 * math.log(width / 24) ** 2 + 1e-3 * config.seed
            figures = {"nats_per_token": loss, "stderr": 0.1, "monte_carlo_stderr": 0.01, "bits_per_byte": 1.0}
            at = [round(float(w) / config.tokens_per_step) for w in config.evaluate.at.split()]
            (workdir / "metrics.jsonl").write_text(
                "".join(
                    json.dumps({"step": s} | {f"eval/{k}": v for k, v in figures.items()}) + "\n" for s in (*at, step)
                )
            )
            summary = {"step": step, "tokens_per_second": None, "seconds": 7.0, "rows_digest": str(config.seed)}
            (workdir / "summary.json").write_text(json.dumps(summary | {"eval_rows_digest": "e"}))

        monkeypatch.setattr(loop, "train", train)
        return begun

    return make


def test_a_diverged_run_is_reported_and_the_rest_goes_on(experiment, tmp_path, quick_runs, capsys):
    def some_diverge(config):
        if config.model.width == 24 and config.optimizer.peak_learning_rate > 4e-3:
            raise Diverged("step 3 is not finite")

    begun = quick_runs(some_diverge)
    common = (f"--config={experiment}", f"--workdir={tmp_path}")
    assert sweep(*common) == 3
    rows = {row.run: row for row in results.read_csv(tmp_path / "results.csv")}
    assert sorted(row.status for row in rows.values()) == ["failed"] * 2 + ["finished"] * 4
    assert "diverged: step 3" in rows["arm_L1-d24_C2e08"].reason
    assert "diverged: step 3" in (tmp_path / "report.md").read_text()
    assert "arm_L1-d24_C2e08 failed" in capsys.readouterr().err
    # A failed run is not tried again by itself, and is not finished.
    begun.clear()
    assert sweep(*common) == 3 and begun == []
    assert "4 of them finished, 2 failed" in capsys.readouterr().out
    # The same rate diverges again; another is on record wherever the run is, and the grid still knows it.
    assert sweep(*common, "--retry_failed") == 3 and begun == ["llada_L1-d24_C2e08", "arm_L1-d24_C2e08"]
    assert "begun again at the rate at which it diverged; --retry_rate=0.5" in capsys.readouterr().err
    assert sweep(*common, "--retry_rate=0.5") == 3
    assert sweep(f"--workdir={tmp_path}", "--retry_rate=0.5") == 0
    for more in ([], ["--dry_run"], [f"--config={experiment}"]):
        begun.clear()
        assert sweep(f"--workdir={tmp_path}", *more) == 0 and begun == []
        assert "6 of them finished;" in capsys.readouterr().out
    rows = {row.run: row for row in results.read_csv(tmp_path / "results.csv")}
    assert rows["arm_L1-d24_C2e08"].peak_learning_rate == 0.0025 and rows["arm_L1-d16_C2e08"].retried is None
    report = (tmp_path / "report.md").read_text()
    line = next(line for line in report.splitlines() if line.startswith("- arm_L1-d24_C2e08: "))
    assert "peak rate 0.0025 and not 0.01: at 0.01 it diverged, step 3" in line and "; at 0.005 it diverged" in line
    assert "2 runs had failed and were trained at a lower rate" in report
    assert len(list(tmp_path.glob("failed/arm_L1-d24_C2e08-*/failed.json"))) == 2


def test_seeds_added_to_a_finished_sweep_are_all_that_is_trained(experiment, tmp_path, quick_runs, capsys):
    begun = quick_runs()
    common = (f"--config={experiment}", f"--workdir={tmp_path}")
    assert sweep(*common) == 0 and len(begun) == 6
    for seeds in ("0,5", "5,0", "0", "5"):
        begun.clear()
        assert sweep(*common, f"--config.sweep.seeds={seeds}") == 0
        assert begun == ([f"{r}_s5" for r in names(tmp_path) if not r.endswith("_s5")] if seeds == "0,5" else [])
    assert "left out: 6 runs in" in capsys.readouterr().out  # of the seed that the last grids do not have
    # As an earlier version named the runs of two seeds.
    for run in tmp_path.glob("runs/*C2e08"):
        run.rename(f"{run}_s0")
    assert sweep(*common, "--config.sweep.seeds=0,5") == 0 and begun == []


def test_variants_are_ranked_and_seeds_added_later_are_all_that_is_trained(experiment, tmp_path, quick_runs, capsys):
    begun = quick_runs()
    common = (f"--config={experiment}:variants", f"--workdir={tmp_path}")
    assert sweep(*common, "--config.sweep.seeds=0") == 0 and len(begun) == 8
    assert "with one seed nothing tells" in (tmp_path / "report.md").read_text()
    begun.clear()
    assert sweep(*common) == 0 and len(begun) == 8 and all(name.endswith("_s1") for name in begun)
    ranking = json.loads((tmp_path / "fits.json").read_text())["ranking"]
    assert ranking["best"] == "flat" and ranking["variants"][0]["degrees_of_freedom"] == 4
    assert ranking["variants"][0]["keys"] == "weight=flat" and ranking["variants"][0]["bound_trained"] is False
    begun.clear()
    assert sweep(f"--workdir={tmp_path}") == 0 and begun == []
    assert sweep(f"--results={tmp_path / 'results.csv'}", f"--workdir={tmp_path / 'again'}") == 0
    assert json.loads((tmp_path / "again" / "fits.json").read_text())["ranking"] == ranking
    capsys.readouterr()
    assert sweep(*common, "--config.sweep.variants.flat.clean_prefix=0.5") == 2
    assert "planned by other rules (objective.clean_prefix" in capsys.readouterr().err and begun == []


def test_a_first_mistake_locks_nothing(experiment, tmp_path, quick_runs, capsys):
    """Rows and tokenizer of values that no run has begun with give way; of a corpus that is none nothing is left."""
    begun, directory = quick_runs(), tmp_path / "new"
    common = (f"--config={experiment}", f"--workdir={directory}")
    assert sweep(*common, "--config.data.source=text:/nowhere/*.txt") == 2 and not directory.exists()
    assert sweep(*common, "--config.sweep.max_epochs=0.1") == 2 and "allow it with" in capsys.readouterr().err
    assert sweep(*common, "--config.data.sequence_length=16", "--config.model.vocab_size=330") == 0 and len(begun) == 6
    assert json.loads((directory / "data" / "metadata.json").read_text())["sequence_length"] == 16
    assert sweep_lib.tokenizer_files.load(directory / "tokenizer.model").vocab_size == 330
    assert sweep(*common) == 2 and "planned by other rules" in capsys.readouterr().err


def names(directory):
    return [r.run for r in results.read_csv(directory / "results.csv")]


@pytest.mark.parametrize(
    ("error", "status", "goes_on"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 5, False),
        (DiskError("no room"), 5, False),
        (DataError("damaged rows"), 4, False),
        (UserError("a mistake"), 2, False),
        (Diverged("at step 3"), 3, True),
        (MemoryError("RESOURCE_EXHAUSTED: Out of memory"), 1, True),
    ],
)
def test_what_would_meet_the_next_run_too_ends_the_sweep(error, status, goes_on, experiment, tmp_path, quick_runs):
    def fails(config):
        if config.model.width == 16 and config.objective.name == "diffusion":
            raise error

    begun = quick_runs(fails)
    assert sweep(f"--config={experiment}", f"--workdir={tmp_path}") == status
    assert len(begun) == (6 if goes_on else 1)
    assert len(list(tmp_path.glob("runs/*/failed.json"))) == goes_on


def test_what_changes_how_runs_are_read_is_refused_before_any_run(experiment, tmp_path, quick_runs, capsys):
    begun = quick_runs()
    common = (f"--config={experiment}", f"--workdir={tmp_path}")
    assert sweep(*common) == 0
    begun.clear()
    for key in ("evaluate.draws=4", "sweep.evaluation_rows=32", "optimizer.peak_learning_rate=1e-3"):
        assert sweep(*common, f"--config.{key}", "--config.sweep.seeds=0,1") == 2
        assert "was planned by other rules" in capsys.readouterr().err
    grid = (tmp_path / "sweep.json").read_bytes()
    assert sweep(*common, "--config.sweep.budgets=3e8", "--config.data.source=text:/nowhere/*") in (2, 4)
    assert (tmp_path / "sweep.json").read_bytes() == grid
    first = next(tmp_path.glob("runs/*"))
    for name in ("summary.json", "failed.json", "config.json", "retry.json"):
        path = first / name
        held = path.read_bytes() if path.exists() else None
        path.write_text("{,}")
        assert sweep(*common) == 2 and str(path) in capsys.readouterr().err
        path.unlink() if held is None else path.write_bytes(held)
    (tmp_path / "sweep.json").write_text("[]")
    assert sweep(f"--workdir={tmp_path}") == 2 and "sweep.json" in capsys.readouterr().err
    assert sweep(f"--config={experiment}", f"--workdir={first}") == 2
    assert "is a run or a model, not a sweep" in capsys.readouterr().err
    assert begun == []


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
    if argument == "checkpoints":
        plain, paired = ([r for r in rows if r.variant == name] for name in (None, "paired"))
        assert {r.run for r in paired} == {"llada-paired_L1-d16_curve", "llada-paired_L1-d24_curve"}
        for one, two in zip(plain, paired, strict=True):
            assert (one.tokens, one.budget) == (two.tokens, two.budget)
            assert two.epochs == pytest.approx(one.epochs / 2) and (one.row_copies, two.row_copies) == (1, 2)
            summary = json.loads((tmp_path / "runs" / two.run / "summary.json").read_text())
            assert two.step != summary["step"] or two.epochs == pytest.approx(summary["epochs"])
        report = (tmp_path / "report.md").read_text()
        assert "LLaDA, paired: masks=complementary weight=flat; its training loss is not a bound." in report
    if argument == "repeat":
        assert json.loads((tmp_path / "fits.json").read_text())["crossovers"][0]["unique_tokens"] == 640
        assert [round(row.epochs) for row in rows[:3]] == [1, 4, 16] and (tmp_path / "repeat.png").exists()
        assert {row.unique_tokens for row in rows} == {640}


def test_runs_made_by_other_rules_are_not_taken_for_ours(swept, experiment):
    base, group = sweep_of(experiment)
    base["optimizer"]["peak_learning_rate"] = 2e-2
    with pytest.raises(
        UserError, match=r"planned by other rules \(optimizer.peak_learning_rate: 0.01 -> 0.02.*--retry_rate"
    ):
        sweep_lib.make(swept, base, group)


def test_results_join_only_where_they_compare(swept, tmp_path, capsys):
    """Readings of the sweep fitted by themselves; from another corpus, tokenizer, set of rows or count, refused."""
    csv = swept / "results.csv"
    assert sweep(f"--results={csv}", f"--workdir={tmp_path / 'joined'}") == 0
    joined, alone = (json.loads((d / "fits.json").read_text()) for d in (tmp_path / "joined", swept))
    assert joined["families"] == alone["families"]
    rows = results.read_csv(csv)
    for change in (
        {"corpus_digest": "other"},
        {"tokenizer_sha256": "other"},
        {"eval_rows_digest": "other"},
        {"matching": "exact"},
    ):
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
        (["--config=experiments/isoflop.py", "--workdir=w", "--estimator=bond"], "--estimator=bond is not one of"),
        (["--config=experiments/isoflop.py", "--workdir=w", "--rows=2"], "--rows=2 is for --estimator"),
        (["--results=nothing.csv", "--workdir=w"], "--results=nothing.csv does not exist"),
        (["--results=experiments", "--workdir=w"], "--results=experiments is a directory"),
        (["--config=experiments/isoflop.py", "--workdir=README.md"], "--workdir=README.md is no directory"),
        (["--config=experiments/isoflop.py", "--workdir=w", "--retry_rate=2"], "--retry_rate=2.0 must be between"),
        (["--config=experiments/isoflop.py", "--workdir=w", "--retry_rate=.5", "--retry_failed"], "give one"),
        (["--config=experiments/isoflop.py", "--workdir=w", "--config.train.steps=10"], "would do nothing"),
        (["--config=experiments/isoflop.py", "--workdir=w", "--config.sweep.epochs=2"], "does nothing in mode isoflop"),
        (["--config=experiments/isoflop.py", "--workdir=w", "--config.sweep.seeds=0,0"], "each once"),
        (["--config=experiments/isoflop.py", "--workdir=w", "--predict=1e300"], "up to 1e+40"),
        (["--results=docs/isoflop/results.csv", "--workdir=w", "--config.train.steps=2"], "trains nothing"),
        (["--results=docs/isoflop/results.csv", "--workdir=w", "--only=1/2"], "trains nothing"),
    ],
)
def test_bad_input_gets_one_line_and_status_2(arguments, said, capsys, monkeypatch):
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    assert sweep(*arguments) == 2
    error = capsys.readouterr().err
    assert said in error and error.strip().count("\n") == 0
    assert not Path("w").exists() and not Path("nowhere").exists()
