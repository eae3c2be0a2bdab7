"""Two runs beside each other: figures of the same held-out rows only, whatever lies in their directories."""

import json
import shutil
import sys

import in_process
import pytest

from llada.errors import UserError
from llada.objectives.families import FAMILIES
from llada.scaling import comparison

EVALUATION = {
    "kind": "bound",
    "nats_per_token": 1.5,
    "stderr": 0.25,
    "bits_per_byte": 0.75,
    "rows": 7,
    "draws": 3,
    "estimator": "l_of_L",
    "eval_rows_digest": "abc",
    "step": 12,
}
FILES = ("config.json", "summary.json", "metrics.jsonl")


@pytest.fixture
def copies(trained, tmp_path):
    """Copies of the trained pair without checkpoints; `edit(name, file, change)` changes keys, or writes text."""
    places = {}
    for name, run in trained.items():
        places[name] = tmp_path / "runs" / name
        places[name].mkdir(parents=True)
        for file in FILES:
            shutil.copy(run.workdir / file, places[name])

    def edit(name, file, change):
        path = places[name] / file
        if isinstance(change, dict):
            held = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps(held | change))
        else:
            path.write_bytes(change)

    edit.places = places
    return edit


def read(places):
    runs = [comparison.read_run(family, places[family.prefix]) for family in FAMILIES.values()]
    runs, remarks = comparison.choose_figures(runs)
    comparison.check_twins(runs)
    return runs, remarks


def test_a_further_run_stands_beside_the_two_with_its_objective(copies, tmp_path):
    edit, places = copies, copies.places
    shutil.copytree(places["llada"], tmp_path / "runs/llada_bell")
    edit.places["bell"] = tmp_path / "runs/llada_bell"
    config = json.loads((places["bell"] / "config.json").read_text())
    config["objective"] |= {"time_law": "logit_normal", "weight": "paper"}
    edit("bell", "config.json", {"objective": config["objective"]})
    runs, _ = read(places)
    runs.insert(1, comparison.read_further(places["bell"]))
    comparison.check_twins(runs)
    header, first, *_ = comparison.table(runs)
    assert header == ["", "LLaDA (bound)", "LLaDA, bell (bound)", "ARM (exact NLL)"]
    bell = "time_law=logit_normal, weight=paper: not a bound"
    assert first == ["training objective", "the paper's", bell, "the paper's"]
    report = " ".join(comparison.report(runs, [], tmp_path, []).split())
    assert "The LLaDA and LLaDA, bell figures are upper bounds" in report and "All runs read the same rows" in report
    assert comparison.draw_curves(runs)[:4] == b"\x89PNG"
    for name, words in (("nowhere", "holds no config.json"), ("other", "trained on other rows")):
        shutil.copytree(places["llada"], tmp_path / "runs/other", dirs_exist_ok=True)
        edit.places["other"] = tmp_path / "runs/other"
        edit("other", "summary.json", {"rows_digest": "another"})
        with pytest.raises(UserError, match=words):
            comparison.check_twins([*runs, comparison.read_further(tmp_path / "runs" / name)])


def cells(runs):
    return {label: values for label, *values in comparison.table(runs)}


def test_evaluations_count_where_both_runs_have_one_of_the_same_rows(copies):
    edit, places = copies, copies.places
    trained = cells(read(places)[0])
    edit("llada", "evaluation.json", EVALUATION)
    runs, remarks = read(places)
    assert cells(runs) == trained and "the other has none" in remarks[0] and len(remarks) == 1
    edit("arm", "evaluation.json", EVALUATION | {"nats_per_token": 1.25, "draws": 1, "estimator": "exact"})
    runs, remarks = read(places)
    shown = cells(runs)
    assert remarks == [] and shown["held-out nats/token"] == ["1.5000 ± 0.2500", "1.2500 ± 0.2500"]
    assert shown["held-out rows"] == ["7", "7"] and shown["draws a row"] == ["3", "-"]
    assert shown["estimator"] == ["l_of_L", "exact"] and shown["tokens"] == trained["tokens"]
    report = " ".join(comparison.report(runs, [], places["llada"], ["so be it"]).split())
    assert "the same 7 held-out rows, by llada evaluate: LLaDA 3 draws a row (l_of_L)" in report
    assert "so be it." in report
    for change, said in (
        ({"eval_rows_digest": "other"}, "different rows"),
        ({"step": 8}, "is of step 8, not 12"),
        ({"eval_rows_digest": None}, "does not say which rows"),
    ):
        edit("arm", "evaluation.json", change)
        runs, remarks = read(places)
        assert cells(runs) == trained and any(said in remark for remark in remarks), remarks
        edit("arm", "evaluation.json", EVALUATION)


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("summary.json", {"eval_rows_digest": "0"}, "differ in eval_rows_digest"),
        ("summary.json", {"rows_digest": "0"}, "differ in rows_digest"),
        ("summary.json", {"corpus_digest": "0"}, "differ in corpus_digest"),
        ("summary.json", {"tokenizer_sha256": "0"}, "differ in tokenizer_sha256"),
        ("summary.json", {"step": 8}, "differ in step"),
        ("summary.json", {"objective": "diffusion"}, "is a run of 'diffusion' by summary.json"),
        ("summary.json", {"parameters": None}, "parameters is 'None' and not a number"),
        ("summary.json", {"eval_stderr": "small"}, "eval_stderr is 'small'"),
        ("summary.json", {"rows_digest": 5}, "rows_digest is '5' and not a text"),
        ("summary.json", {"eval_nats_per_token": None}, "has no held-out figure"),
        ("summary.json", b"{,}", "summary.json is not JSON"),
        ("summary.json", b"[]", "summary.json must hold a JSON object"),
        ("summary.json", b"\xff", "summary.json is not UTF-8"),
        ("config.json", b"", "config.json is not JSON"),
        ("evaluation.json", b"\x00", "evaluation.json is not JSON"),
        ("evaluation.json", EVALUATION | {"nats_per_token": "x"}, "nats_per_token is 'x'"),
    ],
)
def test_runs_that_do_not_compare_and_damaged_files_are_one_line(copies, file, change, said):
    copies("arm", file, change)
    with pytest.raises(UserError, match=said):
        read(copies.places)


def test_swapped_families_and_unfit_places_are_refused_before_any_work(trained, tmp_path, monkeypatch):
    runs = {name: f"--{name}={run.workdir}" for name, run in trained.items()}
    swapped = (f"--llada={trained['arm'].workdir}", f"--arm={trained['llada'].workdir}")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "taken" / "report.md").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    cases = [
        ((*swapped, "--out=o"), "--llada is for LLaDA, --arm is for ARM"),
        ((*runs.values(), "--out=file"), "--out=file is no directory"),
        ((*runs.values(), "--out=taken"), "--out=taken/report.md is a directory"),
        ((*runs.values(), "--out=file/o"), "is no directory"),
        ((*runs.values(), "--out=/proc/o"), "--out=/proc/o cannot be written"),
        ((*runs.values(), "--out=o", "--temperature=-1"), "--temperature"),
        ((runs["llada"], "--arm=nowhere", "--out=o"), "--arm=nowhere holds no config.json"),
    ]
    for arguments, said in cases:
        done = in_process.llada("compare", *arguments, cwd=tmp_path)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for command in (("compare", *runs.values(), "--out=o"), ("sweep", "--results=x", "--workdir=o")):
        done = in_process.llada(*command, cwd=tmp_path)
        assert done.returncode == 2 and "pictures need matplotlib" in done.stderr, done
    assert sorted(tmp_path.rglob("*")) == before


def test_figures_that_do_not_exist_are_dashes_and_paths_are_as_they_are(copies, tmp_path):
    for name in ("llada", "arm"):
        copies(
            name,
            "summary.json",
            {
                "eval_stderr": None,
                "tokens_per_second": None,
                "seconds": None,
                "unigram_entropy_nats": None,
                "eval_bits_per_byte": None,
            },
        )
        lines = [json.loads(line) for line in (copies.places[name] / "metrics.jsonl").read_text().splitlines()]
        text = "".join(json.dumps(line | {"eval/stderr": None}) + "\n" for line in lines)
        copies(name, "metrics.jsonl", text.encode())
    runs, _ = read(copies.places)
    shown = cells(runs)
    assert "±" not in shown["held-out nats/token"][0]
    for label in ("held-out bits/byte", "below unigram entropy, nats", "training tokens/s", "seconds"):
        assert shown[label] == ["-", "-"], label
    odd = tmp_path / "a [b] 'c'"
    runs = [run._replace(workdir=odd / run.name) for run in runs]
    report = comparison.report(runs, [comparison.Sampled("t", "a ` b", "~~~ c")], odd, [])
    assert f"llada sample --workdir='{tmp_path}/a [b] '\"'\"'c'\"'\"'/LLaDA' " in report
    assert "`` a ` b ``" in report and "~~~~python\n~~~ c\n~~~~" in report
    assert comparison.draw_curves(runs).startswith(b"\x89PNG")
