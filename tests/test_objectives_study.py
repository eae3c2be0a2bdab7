"""The study of objectives: its table of variants, the rules of its page, and all of it in miniature."""

import dataclasses
import functools
import importlib
import json
import sys
from collections import Counter
from pathlib import Path

import in_process
import jax
import numpy as np
import pytest
from scaling import synthetic

from llada.commands import experiment
from llada.errors import UserError
from llada.objectives.contract import SpecialTokens
from llada.scaling import grid, results, sweep_config, sweep_report
from llada.training.step import init_state, train_step

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
CONFIG = EXPERIMENTS / "objectives.py"


@pytest.fixture(scope="module", autouse=True)
def scripts_import_each_other():
    sys.path.insert(0, str(EXPERIMENTS))
    yield
    sys.path.remove(str(EXPERIMENTS))


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly():
    """Tiny programs, a few steps each: compiling them well takes longer than running them badly."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def findings(scripts_import_each_other):
    return importlib.import_module("objectives_findings")


@pytest.fixture(scope="module")
def measure(scripts_import_each_other):
    return importlib.import_module("objectives_measure")


@pytest.fixture(scope="module")
def report(scripts_import_each_other):
    return importlib.import_module("objectives_report")


# --- the experiment file


def planned(argument: str, tmp_path: Path):
    base, group = experiment.read_sweep(f"{CONFIG}:{argument}", {})
    return grid.plan(base, sweep_config.parse(group), tmp_path)


def test_quick_ranks_every_variant_in_every_size_budget_and_seed(tmp_path):
    runs = planned("quick", tmp_path)
    _, group = experiment.read_sweep(f"{CONFIG}:quick", {})
    names = [None, *group["variants"]]
    cells = Counter((run.variant, run.size, run.group, run.seed) for run in runs)
    assert len(names) == 11 and len(cells) == len(names) * 2 * 2 * 3 and set(cells.values()) == {1}
    objectives = {run.variant: run.config.objective for run in runs}
    assert len(set(objectives.values())) == len(names)  # no two are the same
    assert len({(run.size, run.group, run.config.steps, run.config.optimizer.schedule) for run in runs}) == 2 * 2


def test_the_step_of_every_variant_traces(tmp_path):
    """Its gradients are tested in tests/objectives/test_variants.py; here nothing is compiled."""
    for config in {run.variant: run.config for run in planned("quick", tmp_path)}.values():
        state = jax.eval_shape(functools.partial(init_state, config))
        batch = jax.ShapeDtypeStruct((config.train.batch_size, config.data.sequence_length), np.int32)
        step = functools.partial(train_step, config=config, special=SpecialTokens(mask=3, eos=1))
        after, values = jax.eval_shape(step, state, batch)
        assert jax.tree.map(lambda x: x.shape, after) == jax.tree.map(lambda x: x.shape, state)
        assert values["grad_norm"].shape == values["clipped_share"].shape == ()


def test_a_variants_study_and_the_judge_share_the_rankings_rows(tmp_path):
    quick = planned("quick", tmp_path)[0].config
    study = planned("bell_flat", tmp_path)
    assert {(run.objective, run.variant) for run in study} == {
        ("diffusion", None),
        ("diffusion", "bell_flat"),
        ("autoregressive", None),
    }
    sizes = Counter((run.objective, run.variant, run.group) for run in study)
    assert len(sizes) == 6 and set(sizes.values()) <= {4, 5}
    judge = experiment.read(f"{CONFIG}:judge", {})
    names = ("source", "sequence_length", "holdout_fraction", "text_key", "holdout_source")
    for config in (judge, study[0].config):
        assert all(getattr(config.data, name) == getattr(quick.data, name) for name in names)
        assert config.model.vocab_size == quick.model.vocab_size
    assert judge.objective.name == "autoregressive"
    with pytest.raises(UserError, match="bell_bound"):
        experiment.read_sweep(f"{CONFIG}:belle", {})
    assert len(planned("full", tmp_path)) == 11 * 2 * 3 * 3


# --- the rules of the page


def entry(value, low, high, dof=8):
    return {"share": {"value": value, "low": low, "high": high}, "degrees_of_freedom": dof}


@pytest.mark.parametrize(
    ("claimed", "size", "found", "said"),
    [
        ("below", None, entry(0.6, 0.5, 0.7), "replicates"),
        ("below", 0.55, entry(0.6, 0.5, 0.7), "replicates, in size too"),
        ("below", 0.25, entry(0.6, 0.5, 0.7), "replicates, less than claimed"),
        ("below", 0.9, entry(0.6, 0.5, 0.7), "replicates, more than claimed"),
        ("below", 0.9, entry(0.9, 0.7, 1.1), "no difference that this study can tell"),
        ("below", 0.9, entry(1.5, 1.2, None), "does not replicate: more FLOPs"),
        ("below", None, entry(None, 1.2, None), "does not replicate: more FLOPs"),
        ("above", None, entry(1.5, 1.2, 2.0), "replicates"),
        ("above", None, entry(0.6, 0.5, 0.7), "does not replicate: fewer FLOPs"),
        ("same", None, entry(1.1, 0.9, 1.3), "no difference that this study can tell"),
        ("same", None, entry(0.6, 0.5, 0.7), "does not replicate: fewer FLOPs"),
        ("below", None, entry(0.6, None, None, dof=0), "one seed cannot tell"),
        ("below", None, {"share": None, "degrees_of_freedom": 0}, "not tried"),
        ("below", None, None, "not tried"),
    ],
)
def test_a_claim_is_judged_by_the_interval(findings, claimed, size, found, said):
    assert findings.verdict(findings.Claim("x", "", "", claimed, size), found) == said


def test_claims_are_of_variants_that_are_tried(findings):
    _, group = experiment.read_sweep(f"{CONFIG}:quick", {})
    assert {claim.variant for claim in findings.CLAIMS} <= group["variants"].keys()


def test_paired_intervals_cover_as_often_as_they_say(findings):
    """Seeds move plain and variants together; what is left is noise of one size."""
    rng, plain, truth, held = np.random.default_rng(0), findings.PLAIN, {"a": 0.3, "b": -0.2}, 0
    studies = 600
    for _ in range(studies):
        of_seed = rng.normal(0, 5, 3)
        figures = {plain: dict(enumerate(of_seed + rng.normal(0, 0.1, 3)))}
        figures |= {key: dict(enumerate(of_seed + rng.normal(d, 0.1, 3))) for key, d in truth.items()}
        found = findings.paired(figures)
        assert found[plain]["difference"] is None and found["a"]["difference"]["degrees_of_freedom"] == 4
        held += sum(found[k]["difference"]["low"] <= d <= found[k]["difference"]["high"] for k, d in truth.items())
    assert 0.925 < held / studies / 2 < 0.975


def test_one_seed_has_no_interval_and_arrays_are_figures_of_their_own(findings):
    plain = findings.PLAIN
    alone = findings.paired({plain: {0: 1.0}, "a": {0: 1.5}})["a"]
    assert alone["difference"] == {"value": 0.5, "low": None, "high": None, "degrees_of_freedom": 0}
    assert alone["spread"] is None
    rng = np.random.default_rng(1)
    arrays = {key: {seed: rng.normal(size=3) for seed in range(2)} for key in (plain, "a", "b")}
    together = findings.paired(arrays)["b"]["difference"]
    for i in range(3):
        one = {key: {seed: x[i] for seed, x in of.items()} for key, of in arrays.items()}
        single = findings.paired(one)["b"]["difference"]
        for name in ("value", "low", "high"):
            assert together[name][i] == pytest.approx(single[name])


def test_filled_in_shares_hold_rows_and_seeds(findings):
    plain = findings.PLAIN
    rng = np.random.default_rng(2)
    right = {key: {seed: rng.integers(0, 9, 40).tolist() for seed in range(3)} for key in (plain, "a")}
    found = findings.infilled(right, 8)["a"]
    row_N = np.mean([right["a"][seed] for seed in range(3)], axis=0) / 8
    assert found["mean"] == pytest.approx(row_N.mean())
    assert found["stderr"] == pytest.approx(row_N.std(ddof=1) / np.sqrt(40))
    of_seeds = findings.paired({key: {s: np.mean(n) / 8 for s, n in of.items()} for key, of in right.items()})["a"]
    assert found["difference"]["high"] > of_seeds["difference"]["high"]
    assert found["difference"]["low"] < of_seeds["difference"]["low"]


def test_gradients_weigh_windows_by_their_steps(findings):
    lines = [
        {"step": 10, "train/grad_norm": 1.0, "train/clipped_share": 1.0},
        {"step": 12, "eval/nats_per_token": 3.0},
        {"step": 13, "train/grad_norm": 3.0, "train/clipped_share": 0.0},
    ]
    found = findings.gradients([lines, lines[:1]])
    assert (found["median"], found["largest"], found["windows"]) == (1.0, 3.0, 3)
    assert found["clipped"] == pytest.approx(20 / 23)
    with pytest.raises(UserError, match="log_every"):
        findings.gradients([lines[1:2]])


def test_entropy_and_repeated_4_grams_are_counted(measure):
    ids_NL = np.random.default_rng(3).integers(0, 3, (5, 12))
    count = Counter(ids_NL.ravel().tolist())
    assert measure.entropy(ids_NL) == pytest.approx(-sum(n / 60 * np.log(n / 60) for n in count.values()))
    grams = [tuple(row[i : i + 4]) for row in ids_NL.tolist() for i in range(9)]
    assert measure.repeated(ids_NL) == pytest.approx(1 - len(set(grams)) / len(grams))


def test_times_are_told_as_ranges(report):
    assert report.ranges("lower", (0.1, 0.2, 0.5, 1.0), (True, True, False, True)) == "lower at t 0.1 to 0.2, 1"
    assert report.ranges("lower", (0.1, 0.2), (False, False)) == "lower nowhere"


# --- all of it in miniature

EXPERIMENT = """
from llada.config import default_config


def get_config():
    c = default_config()
    c.model.update(dict(vocab_size=320, max_length=32, dtype="float32"))
    c.data.update(dict(source="text:{corpus}/*.txt", sequence_length=32, holdout_fraction=0.2))
    c.train.update(dict(batch_size=4, log_every=5))
    c.evaluate.draws = 2
    c.optimizer.peak_learning_rate = 1e-2
    c.sweep = dict(
        mode="variants",
        budgets=(1e8,),
        sizes=(dict(layers=1, width=16, heads=2, ffn=32),),
        objectives=("diffusion",),
        variants=dict(bell=dict(time_law="logit_normal", weight="paper")),
        seeds=(0, 1),
        max_epochs=100.0,
        evaluation_rows=16,
    )
    return c
"""
SMALL = {"time_rows": 8, "texts": 3, "infill_rows": 6, "times": [0.1, 1.0], "shares": [0.5], "orders": ["random"]}


@pytest.fixture(scope="module")
def run_dir(trained, corpus, measure, tmp_path_factory):
    """What the script leaves: runs and their measurements in miniature. A smaller budget, and the isoFLOP study, are
    made up."""
    folder = tmp_path_factory.mktemp("objectives")
    (folder / "tiny.py").write_text(EXPERIMENT.replace("{corpus}", str(corpus)))
    judge = trained["arm"].workdir
    words = [f"--config={folder}/tiny.py", f"--workdir={folder}/ranking"]
    done = in_process.llada("sweep", *words, f"--config.data.tokenizer={judge}/tokenizer.model")
    assert done.returncode == 0, done.stderr
    ranked = results.read_csv(folder / "ranking" / "results.csv")
    ranked += [
        dataclasses.replace(r, run=f"{r.run}-half", budget=r.budget / 2, rows_digest=None, nats_per_token=r.loss + 0.1)
        for r in ranked
    ]
    sweep_report.write(folder / "ranking", ranked, "llada sweep")
    measure.measure_all(folder / "ranking", judge, folder / "measured.json", measure.SETTINGS | SMALL)
    readings = synthetic.isoflop_readings(budgets=synthetic.BUDGETS[:2], sizes=3)
    bell = [r for r in readings if r.objective == "diffusion"]
    keys = "time_law=logit_normal weight=paper"
    readings += [
        dataclasses.replace(r, run=f"bell_{r.run}", variant="bell", variant_keys=keys, bound_trained=False)
        for r in bell
    ]
    (folder / "bell").mkdir()
    sweep_report.write(folder / "bell", readings, "llada sweep")
    return folder


@pytest.mark.slow
def test_the_page_of_a_miniature(run_dir, report, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["objectives_report.py", f"--run_dir={run_dir}", "--winner"])
    report.main()
    assert capsys.readouterr().out == "bell\n"
    monkeypatch.setattr(
        sys, "argv", ["objectives_report.py", f"--run_dir={run_dir}", f"--out={tmp_path}", "--seconds=90"]
    )
    report.main()
    text = (tmp_path / "report.md").read_text()
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert {path.name for path in tmp_path.glob("*.png")} == {"by_time.png", "quality.png"}
    for shown in ("ranking/ranking.png", "isoflop/frontier.png", "ranking/report.md", "isoflop/report.md"):
        assert f"]({shown})" in text and (tmp_path / shown).exists()
    share = json.loads((run_dir / "ranking" / "fits.json").read_text())["ranking"]["variants"][0]["share"]
    assert numbers["ranking"]["variants"][0]["share"] == share
    # The page's figures are those of the files: one of each kind.
    measured = json.loads((run_dir / "measured.json").read_text())["runs"]
    assert len(measured) == 4 and len({json.dumps(of) for of in measured.values()}) == 4
    plain = [of for name, of in measured.items() if name.startswith("llada_")]
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| LLaDA")
    ]
    by_time = np.array([of["by_time"] for of in plain])
    cells = zip(by_time.mean(axis=0), by_time.std(axis=0, ddof=1), strict=True)
    assert ["LLaDA", *(f"{mean:.3f} ± {spread:.3f}" for mean, spread in cells)] in rows
    right = np.mean([of["infill"]["0.5"] for of in plain]) / 16
    assert any(row[:1] == ["LLaDA"] and row[1].startswith(f"{right:.1%} ±") for row in rows)
    nats = np.mean([of["samples"]["random"]["nats"] for of in plain])
    assert any(row[:2] == ["LLaDA", "random"] and row[2].startswith(f"{nats:.3f} ±") for row in rows)
    assert "LLaDA, bell *" in text and "All of it took 2 minutes" in text


@pytest.mark.slow
def test_called_again_it_measures_what_is_missing(run_dir, trained, measure, tmp_path, monkeypatch):
    measured = json.loads((run_dir / "measured.json").read_text())
    name, of = measured["runs"].popitem()
    (tmp_path / "measured.json").write_text(json.dumps(measured))
    again = []

    def stand_in(run, *_):
        again.append(run.workdir.name)
        return of

    monkeypatch.setattr(measure, "measure", stand_in)
    measure.measure_all(run_dir / "ranking", trained["arm"].workdir, tmp_path / "measured.json", measured["settings"])
    assert again == [name]
    assert (tmp_path / "measured.json").read_text() == (run_dir / "measured.json").read_text()


@pytest.mark.slow
def test_what_does_not_belong_together_is_refused(run_dir, trained, findings, measure, tmp_path):
    with pytest.raises(UserError, match="mask predictor"):
        measure.measure_all(run_dir / "ranking", trained["llada"].workdir, tmp_path / "out.json", measure.SETTINGS)
    with pytest.raises(UserError, match="no finished run"):
        measure.largest([])
    with pytest.raises(UserError, match="no sweep of mode variants"):
        findings.winner(run_dir / "bell")
    measured = json.loads((run_dir / "measured.json").read_text())
    for path in (run_dir / "ranking", run_dir / "bell"):
        (tmp_path / path.name).symlink_to(path)
    of = next(iter(measured["runs"].values()))
    (tmp_path / "measured.json").write_text(json.dumps(measured | {"runs": {"other": of}}))
    with pytest.raises(UserError, match="other"):
        findings.study(tmp_path)
