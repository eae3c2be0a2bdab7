"""The training benchmarks at toy size: they run, and both programs of each compute the same."""

import functools
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import compile_time
import dense_losses
import loss_speed
import timing
import torch
import train_speed


@pytest.fixture(autouse=True)
def one_thread():
    """Two libraries' thread pools on a few busy cores wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


OUR_STEP = functools.cache(train_speed.step_lib.compile_step)


@pytest.fixture(autouse=True)
def our_step_compiled_once(monkeypatch):
    """All rivals of one shape meet the same step."""
    monkeypatch.setattr(train_speed.step_lib, "compile_step", OUR_STEP)


@pytest.mark.parametrize("rival", ["eager", "dense", "chunked", "static"])
def test_our_step_and_its_rival_make_the_same_step(rival, monkeypatch):
    monkeypatch.setattr(dense_losses, "CHUNK", 64)  # a quarter of the toy's positions
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    found = train_speed.measure("toy", rival, pairs=1)
    assert found["loss_error"] < 1e-5 and found["gradient_error"] < 1e-4 and found["update_error"] < 1e-3
    assert found["dense_credit_gflops_per_second"]["ours"] > found["useful_gflops_per_second"] > 0


def test_a_step_on_other_masks_is_refused(monkeypatch):
    """The comparison can fail: the rival is given the masks of another step."""
    drawn = train_speed.corrupt
    monkeypatch.setattr(train_speed, "corrupt", lambda c, special, x0_BL, step: drawn(c, special, x0_BL, step + 7))
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    with pytest.raises(AssertionError, match="loss_error"):
        train_speed.measure("toy", "eager", pairs=1)


def test_every_way_to_compute_the_loss_gives_the_same_gradients(monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    arrays = loss_speed.inputs(rows=64, width=32, vocab=256)
    ours = loss_speed.program("ours", arrays)()
    for rival in loss_speed.RIVALS:
        if rival != "cce":  # torch.compile takes longer than the rest of this file
            found = loss_speed.same(ours, loss_speed.program(rival, arrays)())
            assert max(found.values()) < 1e-5, rival
    wrong = (*arrays[:2], arrays[2], np.roll(arrays[3], 1))
    with pytest.raises(AssertionError):
        loss_speed.same(ours, loss_speed.program("md4", wrong)())


def test_the_head_multiplies_masked_rows_only():
    found = compile_time.head(width=64)
    assert found["ratio"] <= found["bound"] < 1


def test_alternate_counts_pairs_and_compares_every_one():
    compared = []
    found = timing.alternate(lambda: 1, lambda: 1, lambda a, b: compared.append((a, b)) or {"fact": 3}, pairs=4)
    assert len(compared) == 5 and found["fact"] == 3
    assert found["ratio"]["min"] <= found["ratio"]["median"] <= found["ratio"]["max"]
