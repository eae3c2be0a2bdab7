"""Goals of the fault suite that train in processes of their own: what they draw, and that they see what is wrong.

That runs resume, move between meshes and repeat is held by tests/training, test_sharding.py and test_multihost.py.
"""

import json

import pytest
from faults import r2_resume, r3_other_mesh, r10_determinism, workers


def test_resuming_is_tried_everywhere():
    """36 neighbours are all combinations of family, variant and place, and each fault is where its name says."""
    drawn = [r2_resume.case(5, i) for i in range(r2_resume.FULL)]
    combinations = {(each.family, each.variant, each.place) for each in drawn[:36]}
    assert len(combinations) == 2 * len(r2_resume.VARIANTS) * len(r2_resume.PLACES) == 36
    for each in drawn:
        assert 0 < each.step < r2_resume.STEPS
        read = [(each.step + i) * r2_resume.BATCH // r2_resume.EPOCH_ROWS for i in (-1, 0, 1)]  # epochs completed
        if each.place == "before the end of an epoch":
            assert read[1] < read[2], each
        if each.place == "in it":
            assert read[0] < read[1], each
        assert each.place != "evaluation" or each.step % r2_resume.EVALUATED == 0
    assert {each.kind for each in drawn} == {"stop", "crash"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bits": "b"}, "leaves that were restored are not those"),
        ({"rows_digest": "s"}, "other rows"),
        ({"losses": [2.0] * 25 + [2.0001]}, "a loss is 5.0e-05 apart"),
        ({"losses": [2.0] * 25 + [2.000001]}, ""),
    ],
)
def test_what_another_mesh_makes_wrong_is_seen(change, words):
    expected = {"bits": "a", "rows_digest": "r", "losses": [2.0] * (r3_other_mesh.SAVED + r3_other_mesh.MORE)}
    wrong = r3_other_mesh._wrong(expected | change, expected)
    assert words in wrong and bool(wrong) == bool(words)


def test_a_summary_with_another_figure_is_seen(tmp_path):
    for name, loss in (("a", 5.0), ("b", 5.0000001)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(json.dumps({"step": 3, "seconds": loss, "eval": loss}))
    assert r2_resume._other_summary(tmp_path / "a", tmp_path / "b") == "summary.json differs in eval"
    assert not r2_resume._other_summary(tmp_path / "a", tmp_path / "a")


def test_fresh_runs_that_differ_are_seen(tmp_path, monkeypatch):
    """Of two runs on one device and two on eight: one with other bits, one that read other rows."""
    ends = [("a", "r"), ("b", "r"), ("a", "s"), ("a", "s")]
    yielded = iter([{"bits": bits, "rows_digest": rows} for bits, rows in ends])
    monkeypatch.setattr(r10_determinism.workers, "prepared", lambda folder: ("", {}))
    monkeypatch.setattr(r10_determinism.workers, "Workers", lambda *_, **__: (next(yielded) for _ in range(1)))
    found = list(r10_determinism.outcomes(2, 0, tmp_path))
    assert [one.ended for one in found] == ["other", "other"]
    assert "bits" in found[0].wrong and "rows_digest" in found[1].wrong


def test_a_worker_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match="no_such_function"):
        list(workers.Workers("r2_resume", "no_such_function", {}, tmp_path))
