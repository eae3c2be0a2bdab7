"""The training benchmarks at toy size: they run, both programs compute the same, and figures are recorded."""

import argparse
import re
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import compile_time
import dense_losses
import jax
import loss_speed
import record
import timing
import torch
import train_speed

from llada.objectives import families


@pytest.fixture(autouse=True)
def one_thread():
    """Two libraries' thread pools on a few busy cores wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def families_as_they_were(monkeypatch):
    """A rival's loss is a family of its own in this file only."""
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))


@pytest.mark.parametrize("rival", ["eager", "dense", "chunked", "static"])
def test_our_step_and_its_rival_make_the_same_step(rival, monkeypatch):
    monkeypatch.setattr(dense_losses, "CHUNK", 64)  # a quarter of the toy's positions
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    facts = train_speed.measure("toy", rival, pairs=1)
    assert facts["loss_error"] < 1e-5 and facts["gradient_error"] < 1e-4 and facts["update_error"] < 1e-3
    assert facts["dense_credit_gflops_per_second"]["ours"] > facts["useful_gflops_per_second"] > 0
    assert train_speed.row(facts)["rival"] == rival


def test_a_step_on_other_masks_is_refused(monkeypatch):
    """The comparison can fail: the rival is given the masks of another step."""
    drawn = train_speed.corrupt
    monkeypatch.setattr(train_speed, "corrupt", lambda c, special, x0_BL, step: drawn(c, special, x0_BL, step + 7))
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    with pytest.raises(AssertionError, match="loss_error"):
        train_speed.measure("toy", "eager", pairs=1)


def test_every_implementation_of_the_loss_gives_the_same_gradients(monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    arrays = loss_speed.inputs(rows=64, width=32, vocab=256)
    ours = loss_speed.program("ours", arrays)()
    for rival in loss_speed.RIVALS:
        if rival != "cce":  # torch.compile takes longer than the rest of this file
            errors = loss_speed.same(ours, loss_speed.program(rival, arrays)())
            assert max(errors.values()) < 1e-5, rival
    wrong = (*arrays[:2], arrays[2], np.roll(arrays[3], 1))
    with pytest.raises(AssertionError):
        loss_speed.same(ours, loss_speed.program("md4", wrong)())


def test_the_head_multiplies_masked_rows_only():
    facts = compile_time.head(width=64)
    assert facts["ratio"] <= facts["bound"] < 1
    assert compile_time.rows("head", facts)[0]["value"] == timing.text(facts["ratio"])


def test_alternate_counts_pairs_and_compares_every_one():
    compared = []
    facts = timing.alternate(lambda: 1, lambda: 1, lambda a, b: compared.append((a, b)) or {"fact": 3}, pairs=4)
    assert len(compared) == 5 and facts["fact"] == 3
    assert facts["ratio"]["min"] <= facts["ratio"]["median"] <= facts["ratio"]["max"]


def test_figures_as_text():
    assert [timing.text(figure) for figure in (3, 0.5, 12.345, 1234.5)] == ["3", "0.500", "12.3", "1,234"]
    assert timing.text({"median": 2.0, "min": 1.0, "max": 100.0}) == "2.00 (1.00 to 100)"


EMPTY = "".join(
    f"{name}\n<!-- begin {name} -->\nnot recorded yet: `python x`\n<!-- end {name} -->\n"
    for name in ("loss_speed", "train_speed", "attention")
)


@pytest.fixture
def recorded(monkeypatch, tmp_path):
    """`recorded(section, processor, command line, figure)`: the document after that was recorded in it."""
    path = tmp_path / "benchmarks.md"
    path.write_text(EMPTY, encoding="utf-8")

    def recorded(section, processor, line, figure):
        script = record.ROOT / "benchmarks" / f"{section}.py"
        monkeypatch.setattr(sys, "argv", [str(script), *line.split(), "--record", f"--docs={path}"])
        monkeypatch.setattr(record, "processor", lambda: processor)
        parser = argparse.ArgumentParser()
        parser.add_argument("--shape")
        record.add_flags(parser)
        record.record(parser.parse_args(), section, [{"shape": "toy", "seconds": figure}])
        return path.read_text(encoding="utf-8")

    return recorded


def between(document: str, section: str) -> str:
    return document.partition(f"<!-- begin {section} -->\n")[2].partition(f"<!-- end {section} -->")[0]


def test_a_recorded_table_says_where_it_comes_from(recorded):
    lines = between(recorded("train_speed", "Zen", "--shape=toy", "1.25"), "train_speed").split("\n")
    assert lines[1:4] == ["#### Zen", "", "`python benchmarks/train_speed.py --shape=toy`\\"]
    assert lines[4].startswith(f"commit {record.commit()}, 20")
    assert f"jax {jax.__version__}, " in lines[4] and f"torch {torch.__version__}" in lines[4]
    assert lines[6:] == ["| shape | seconds |", "| --- | --- |", "| toy | 1.25 |", "", ""]


def test_recording_replaces_one_table_and_leaves_the_others(recorded):
    recorded("train_speed", "Zen", "--shape=toy", "1.25")
    recorded("train_speed", "Arm", "--shape=toy", "3.5")
    recorded("train_speed", "Zen", "--shape=other", "2.75")
    after = recorded("train_speed", "Zen", "--shape=toy", "1.5")
    section = between(after, "train_speed")
    figures = ("3.5 ", "2.75 ", "1.5 ")  # by processor, then by command, in whatever order they were recorded
    assert [section.index(figure) for figure in figures] == sorted(section.index(figure) for figure in figures)
    assert "1.25" not in section and section.count("#### Zen") == 1 and "not recorded yet" not in section
    assert after.replace(section, "not recorded yet: `python x`\n") == EMPTY


def test_a_section_that_the_document_lacks_is_an_error(recorded):
    with pytest.raises(ValueError, match="no section <!-- begin no_such_speed -->"):
        recorded("no_such_speed", "Zen", "--shape=toy", "1.25")


def test_every_recorded_section_is_in_the_document():
    scripts = "".join(path.read_text(encoding="utf-8") for path in (record.ROOT / "benchmarks").glob("*.py"))
    sections = set(re.findall(r'record\.record\(\w+, "(\w+)"', scripts))
    sections |= {f"gpu_speed_{name}" for name in ("train", "loss", "attention", "packed", "input")}
    document = record.DOCUMENT.read_text(encoding="utf-8")
    assert sections <= set(re.findall(r"<!-- begin (\w+) -->", document))
