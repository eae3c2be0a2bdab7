"""Workdirs of every older format of checkpoints: what they held when they were written is what is read today.

All of them are continued, evaluated and exported by the goal R14 of tests/faults/; here one is.
"""

import json

import pytest
from faults import r14_old_checkpoints as old


@pytest.mark.parametrize("name", old.NAMES)
def test_an_old_workdir_has_the_bits_that_were_written_and_a_newer_one_is_refused(name, tmp_path):
    run, facts = old.unpacked(name, tmp_path)
    tree = json.loads((run / "checkpoints" / "4" / "run" / "metadata").read_text())
    assert name.startswith(f"version-{tree.get('format_version')}" if "format_version" in tree else "no-version-")
    assert len(facts["arrays"]) == 3 * 13 + 2  # parameters, two moments of each, two counts of steps
    assert sum((old.ARCHIVES / f"{name}{end}").stat().st_size for end in (".tar.xz", ".json")) <= 200_000
    for check in (old.loads, old.verifies, old.refuses_newer):
        assert check(run, facts, tmp_path) == ""


def test_the_oldest_workdir_is_evaluated_exported_and_continued(tmp_path):
    run, facts = old.unpacked("no-version-llada", tmp_path)
    for check in (old.evaluates, old.exports, old.continues):
        assert check(run, facts, tmp_path) == ""


def test_every_format_has_a_workdir():
    assert {name.rpartition("-")[0] for name in old.NAMES} == {
        "no-version",
        *(f"version-{version}" for version in range(1, old.run_item.FORMAT_VERSION + 1)),
    }
