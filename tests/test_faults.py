"""The fault suite itself: what its goals are, how they are run and counted, and the page that is written of them."""

import os
import re
import sys

import pytest
from faults import page, suite

WITH_ONE_WRONG = """
from faults.goal import Outcome
NUMBER, TITLE, DEMAND, FULL, SAMPLE = "R98", "Coins", "heads | up", 40, 2

def outcomes(count, seed, folder):
    print("what a library prints is no outcome")
    for i in range(count):
        yield Outcome(f"coin {seed} {i}", f"side {i % 3}", "~~~~~\\nit stood | on its edge" if i == 2 else "", 0.5 * i)
"""
ENDS_EARLY = """
from faults.goal import Outcome
NUMBER, TITLE, DEMAND, FULL, SAMPLE = "R99", "Early", "none", 4, 1

def outcomes(count, seed, folder):
    yield Outcome("one", "right")
    raise RuntimeError("the goal has a mistake")
"""
HANGS = """
import time
from faults.goal import Outcome
NUMBER, TITLE, DEMAND, FULL, SAMPLE = "R97", "Hangs", "none", 4, 1

def outcomes(count, seed, folder):
    yield Outcome("one", "right")
    time.sleep(600)
"""


@pytest.fixture
def goals(tmp_path, monkeypatch):
    """Goals of this test alone, beside those of the suite: `faults` is a package without a file of its own."""
    folder = tmp_path / "faults"
    folder.mkdir()
    for name, text in (("r97_hangs", HANGS), ("r98_coins", WITH_ONE_WRONG), ("r99_early", ENDS_EARLY)):
        (folder / f"{name}.py").write_text(text)
    monkeypatch.setattr(suite, "names", lambda: {"R97": "r97_hangs", "R98": "r98_coins", "R99": "r99_early"})
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr(os, "environ", os.environ.copy())

    def run(*flags: str) -> tuple[int, dict, str]:
        out = tmp_path / "reliability.md"
        monkeypatch.setattr(sys, "argv", ["suite.py", f"--out={out}", *flags])
        status = suite.main()
        return status, page.read(out.with_suffix(".json")), out.read_text() if out.exists() else ""

    return run


def test_the_suite_counts_what_comes_and_replaces_single_rows(goals, capsys):
    status, rows, text = goals("--goals=R98,R99", "--share=0.25", "--seed=7")
    assert status == 1 and list(rows) == ["R98", "R99"]
    coins, early = rows["R98"], rows["R99"]
    assert (coins["count"], coins["done"], coins["right"], coins["complete"]) == (10, 10, 9, True)
    assert coins["endings"] == {"side 0": 4, "side 1": 3, "side 2": 3}
    assert coins["timed"] == {"median": 2.5, "slowest": 4.5}
    assert (early["count"], early["right"], early["complete"]) == (1, 0, False)
    assert "RuntimeError: the goal has a mistake" in text
    assert "| R98 Coins | heads \\| up | **9 of 10** | - |" in text
    assert "coin 7 2: side 2\n~ ~ ~\nit stood | on its edge" in text and "no outcome" not in text
    assert "`bash launch/faults.sh --goals=R98 --share=0.25 --seed=7`" in text
    assert "R98 10 of 10" in capsys.readouterr().out or coins["seconds"] < suite.WRITE_SECONDS

    status, rows, text = goals("--goals=r98", "--share=0.05")
    assert status == 0 and rows["R99"] == early
    assert (rows["R98"]["count"], rows["R98"]["right"]) == (2, 2)
    assert "| 2 of 2 | 78 % |" in text and "it stood" not in text and "the goal has a mistake" in text


def test_a_goal_that_hangs_is_ended_and_what_it_had_found_stays(goals):
    status, rows, text = goals("--goals=R97", "--limit=1.5")
    assert status == 1 and (rows["R97"]["done"], rows["R97"]["complete"]) == (1, False)
    assert "not done after 2 s: 1 of 4 cases" in text and "(1 tried)" in text


@pytest.mark.parametrize(
    ("flag", "words"),
    [("--goals=R98,R400", "no R400; goals: R97"), ("--share=0", "above 0"), ("--out=/nowhere/x.md", "no directory")],
)
def test_mistakes_in_its_flags_are_one_line(goals, capsys, flag, words):
    assert goals("--goals=R98", flag)[0] == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_the_bound_is_the_exact_one():
    """The rule of three, and where it is too rough."""
    assert page.bound(1) == pytest.approx(0.95)
    assert page.bound(1000) == pytest.approx(3.0 / 1000, rel=5e-3)


@pytest.mark.parametrize("name", suite.names().values())
def test_goals_are_what_the_suite_expects(name):
    goal = suite.load(name)
    assert name.partition("_")[0].upper() == goal.NUMBER
    assert 0 < goal.SAMPLE <= goal.FULL and goal.TITLE and "\n" not in goal.DEMAND


@pytest.mark.parametrize("number", ["R4"])
def test_a_sample_of_the_goals_that_need_no_process(number, tmp_path):
    """R9 is held by tests/training/test_guard.py, and R7 by tests/commands/test_endings.py."""
    goal = suite.load(suite.names()[number])
    found = list(goal.outcomes(goal.SAMPLE, 3, tmp_path))
    assert len(found) == goal.SAMPLE and not [one for one in found if one.wrong]


def test_a_call_of_a_fork_is_a_call_of_the_program(tmp_path):
    from faults.forking import Forks

    with Forks() as forks:
        assert forks.run(["train", "--workdir=x", "--spel"], tmp_path / "mistake") == 2
        assert re.fullmatch(r"llada train: --spel is no flag of llada train.*\n", (tmp_path / "mistake").read_text())
        call = forks.start(["--version"], tmp_path / "version")
        assert call.wait() == 0 and call.said().startswith("llada ")
