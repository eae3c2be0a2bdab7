"""Estimates of time: from a data sheet, from finished runs, from a product."""

from types import SimpleNamespace

import pytest

from llada.errors import UserError
from llada.scaling import status


def run(size: str, flops: float):
    return SimpleNamespace(size=size, flops=flops)


def test_a_named_accelerator_counts_at_its_stated_share():
    for name in ("v5p", "TPU v5p", "tpu V5P"):
        rate = status.on_device(name, 4)
        assert rate.typical == pytest.approx(4 * status.UTILISATION * 459e12)
    assert rate.seconds(run("any", 1e18)) == pytest.approx(status.OVERHEAD_SECONDS + 1e18 / rate.typical)
    assert "4 x TPU v5p" in rate.basis and "assumed" in rate.basis
    with pytest.raises(UserError, match="--machine=v9 is not one of TPU v4"):
        status.on_device("v9", 1)


def test_finished_runs_tell_the_rate_of_their_own_size_and_what_they_take_beside_training():
    def result(size, speed, seconds):
        return SimpleNamespace(size=size, tokens_per_second=speed, seconds=seconds, flops_exact=6e9, tokens=1e3)

    assert status.measured([result("S", None, None)]) is None
    rate = status.measured(
        [result("S", 10.0, 120.0), result("S", 30.0, 50.0), result("M", 2.0, 530.0), result("L", 5.0, None)]
    )
    assert rate.by_size == {"S": 20.0 * 6e6, "M": 2.0 * 6e6}
    assert rate.overhead == pytest.approx(20.0)  # of 20, 50 - 1000 / 30, and 30
    assert rate.seconds(run("M", 6e9)) == pytest.approx(520.0)
    assert "3 finished runs" in rate.basis
    # Too few steps to tell a speed: all of a run's time.
    assert status.measured([result("S", None, 60.0)]).seconds(run("S", 6e9)) == pytest.approx(60.0)


def test_this_machine_is_timed():
    rate = status.this_machine("float32", size=64)
    assert rate.typical > 1e6 and "timed here" in rate.basis
