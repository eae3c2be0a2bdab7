"""The table of mutants is about this code: each can be made, and its tests exist. Whether they notice: mutants.py."""

import ast

import mutants
import pytest

pytestmark = pytest.mark.fast
SOURCES = mutants.ROOT / "src" / "llada"


def test_every_mutant_can_be_made_and_its_tests_exist():
    stale = {mutant.name: why for mutant in mutants.table() if (why := mutants.stale(mutant))}
    assert not stale


def test_every_mutant_is_a_program():
    for mutant in mutants.table():
        path = SOURCES / mutant.file
        if path.suffix == ".py":
            ast.parse(path.read_text(encoding="utf-8").replace(mutant.old, mutant.new), mutant.name)
        assert mutant.old != mutant.new, mutant.name


def test_names_of_mutants_are_unique():
    names = [mutant.name for mutant in mutants.table()]
    assert len(set(names)) == len(names)
