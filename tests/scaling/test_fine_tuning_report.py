"""Fine-tuned runs beside each other: the report has the scores that were evaluated, and says what falls short."""

import json
import shutil

import in_process
import pytest

from llada.evaluation import answers
from llada.evaluation.answers import Answer, Written
from llada.objectives.families import FAMILIES
from llada.scaling import comparison, fine_tuning


def written(share: float, settings: dict) -> dict:
    """20 answers to two turns of two tasks each, of which so many of `copy` are right and all of `sort` but one."""
    given = []
    for label in ("copy", "sort"):
        for turn in (1, 2):
            for i in range(20):
                right = i < 20 * share if label == "copy" else i or turn == 1
                given.append(Answer(label, turn, f"<|user|>{label} | {i}", "a b", "a b" if right else "b a"))
    return answers.summary(Written(given, settings, 1.25))


@pytest.fixture
def tuned(trained, tmp_path):
    """Copies of the trained pair, as if they had been fine-tuned, with the scores of three ways of writing."""
    places = {}
    for name, run in trained.items():
        places[name] = tmp_path / "runs" / name
        places[name].mkdir(parents=True)
        for file in ("config.json", "summary.json", "metrics.jsonl"):
            shutil.copy(run.workdir / file, places[name])
        path = places[name] / "config.json"
        config = json.loads(path.read_text())
        config["data"]["source"] = "dialogues:x.jsonl"
        config["objective"]["random_length_fraction"] = 0.0
        path.write_text(json.dumps(config))
    settings = {"gen_length": 8, "temperature": 0.0, "seed": 0}
    for name, share, more in (("llada", 1.0, {}), ("llada", 0.5, {"block_length": 4}), ("arm", 0.75, {})):
        answers.record(places[name] / answers.FILE, 12, "digest", written(share, settings | more))
    by_time = [{"t": t, "nats_per_token": t / 2, "stderr": 0.01, "tokens": 9} for t in (0.5, 1.0)]
    (places["llada"] / "evaluation.json").write_text(
        json.dumps({"step": 12, "nats_per_token": 1.5, "by_time": by_time})
    )
    return places


def compare(tuned, out):
    return in_process.llada("compare", *(f"--{name}={place}" for name, place in tuned.items()), f"--out={out}")


def test_the_report_has_every_score_and_what_falls_short(tuned, tmp_path):
    done = compare(tuned, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    report = (tmp_path / "out" / "report.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in report.splitlines() if line[:1] == "|"]
    cells = {row[0]: row[1:] for row in rows}
    assert cells[""][:4] != [] and rows[0][1:] == ["LLaDA, pure", "LLaDA, blocks of 4", "ARM", "answers"]
    low, high = answers.wilson(20, 40)
    assert cells["copy"] == [
        "100.0 % (91.2 to 100.0)",
        f"50.0 % ({100 * low:.1f} to {100 * high:.1f})",
        "75.0 % (59.8 to 85.8)",
        "40",
    ]
    assert [cells[key][3] for key in ("all", "sort", "turn 2", "sort, turn 2")] == ["80", "40", "40", "20"]
    assert cells["sort, turn 1"][0].startswith("100.0 %") and cells["sort, turn 2"][0].startswith("95.0 %")
    assert (
        "- LLaDA, pure: 95 % or more in every task. Wrong answers: 1; 0 with other words, 1 in another order" in report
    )
    assert "- LLaDA, blocks of 4: below 95 % in copy (50.0 %). Wrong answers: 21;" in report
    assert "- ARM: below 95 % in copy (75.0 %)" in report
    assert "&lt;|user" not in report and "&lt;\\|user\\|>sort \\| 0" in report  # cells of a table
    assert f"llada compare --llada={tuned['llada']} --arm={tuned['arm']}" in report and "commit " in report
    for name in ("answers.png", "curves.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG"), name
    assert "50.0 %" in done.stdout and "report.md" in done.stdout


def test_scores_that_are_missing_of_another_step_or_damaged_are_refused(tuned, tmp_path):
    path = tuned["arm"] / answers.FILE
    scores = json.loads(path.read_text())
    damaged = json.loads(path.read_text())
    del damaged["results"][0]["scores"][1]["low"]
    for content, words in (
        (None, "answers.json is missing"),
        (scores | {"step": 8}, "is of step 8, not 12"),
        (damaged, "is damaged"),
        (scores | {"results": []}, "holds no scores"),
    ):
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_text(json.dumps(content))
        done = compare(tuned, tmp_path / "out")
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert words in done.stderr and "--task=dialogues --generate=" in done.stderr
    assert not list((tmp_path / "out").glob("*"))


def test_runs_that_wrote_no_answers_are_compared_by_their_held_out_figures(tuned, tmp_path):
    for workdir in tuned.values():
        (workdir / answers.FILE).unlink(missing_ok=True)
    done = compare(tuned, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["curves.png", "report.md"]
    assert "held-out nats/token" in (tmp_path / "out" / "report.md").read_text()


def test_other_settings_than_the_usual_ones_are_in_the_name(tuned):
    settings = {"gen_length": 8, "block_length": 8, "temperature": 0.7, "seed": 3, "remasking": "random", "steps": 4}
    answers.record(tuned["llada"] / answers.FILE, 12, "digest", written(1.0, settings))
    run = comparison.read_run(FAMILIES["diffusion"], tuned["llada"])
    names = [each.name for each in fine_tuning.read([run])]
    assert names == ["LLaDA, pure", "LLaDA, blocks of 4", "LLaDA, pure, temperature=0.7, remasking=random, steps=4"]
