"""How commands end: statuses by kind, signals at any moment, saves that fail, processes that hang."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from faults import tiny_run
from faults.r7_signals import Trainer

from llada import errors

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_of_statuses_is_that_of_the_program():
    page = (ROOT / "docs" / "running.md").read_text()
    rows = [f"| {status} | {e.kind} | {e.meaning} | {e.again} |" for status, e in errors.ENDINGS.items()]
    assert "\n".join(["| status | kind | means | again |", "|---|---|---|---|", *rows, "\n"]) in page


def test_every_error_has_a_status_of_its_kind():
    kinds = {kind.status: errors.ENDINGS[kind.status].kind for kind in errors.KINDS.values()}
    assert kinds == {2: "mistake", 3: "diverged", 4: "data", 5: "disk", 6: "peer"}
    for number in (1, 2, 15):
        stop = errors.Interrupted(number, "after step 3")
        assert errors.ENDINGS[stop.status].kind == ("interrupted" if number == 2 else "preempted")


def test_signals_at_any_moment_lose_nothing(tiny, trained, tmp_path):
    """One, and a run that is then finished; `bash launch/faults.sh --goals=R7` sends a hundred."""
    experiment = tiny_run.write_experiment(tmp_path / "experiment.py", tiny("llada"))
    # Then the programs are those that the run of this process has compiled.
    environment = {"JAX_PLATFORMS": "cpu", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    shutil.copytree(trained["llada"].workdir / "data", tmp_path / "run0" / "data")
    trainer = Trainer([experiment], environment, seconds=5.0)
    (found,) = trainer.chain(tmp_path, trained["llada"].workdir, range(1, 2), seed=2)
    assert not found.wrong


STUCK = """
import ctypes, sys, time
from pathlib import Path
from llada.training.watchdog import Watchdog

def stuck(where):
    time.sleep(60) if where == "Python" else ctypes.PyDLL(None).usleep(60_000_000)

with Watchdog(0.5, Path(sys.argv[2])) as watchdog:
    time.sleep(1)  # the first step is being compiled
    watchdog.alive()
    with watchdog.suspended():
        time.sleep(1)
    stuck(sys.argv[1])
"""


@pytest.mark.parametrize(("where", "status"), [("Python", 6), ("C, with Python's lock", 1)])
def test_a_process_that_hangs_says_where_and_ends(where, status, tmp_path):
    done = subprocess.run([sys.executable, "-c", STUCK, where, tmp_path], capture_output=True, text=True, timeout=120)
    assert done.returncode == status
    assert "in stuck" in done.stderr
    if status == errors.PeerLost.status:
        assert done.stderr.startswith("llada: process 0 of 1: no step has finished for 0.5 s (train.watchdog_seconds)")
        assert "in stuck" in (tmp_path / "hung.0.txt").read_text()


HANGS = """
import sys, time
from llada.commands import program
from llada.training import loop, metrics

def slowly(f, calls):
    def call(*arguments):
        calls.append(1)
        if len(calls) == 1:
            time.sleep(3)
        return f(*arguments)
    return call

def add(meter, *values, add=metrics.Meter.add, seen=[]):
    seen.append(1)
    if len(seen) == 6:
        time.sleep(600)
    add(meter, *values)

compile_step = loop.compile_step
loop.compile_step = lambda *arguments: slowly(compile_step(*arguments), [])
loop.Validator.__call__ = slowly(loop.Validator.__call__, [])
metrics.Meter.add = add
sys.exit(program.main(sys.argv[1:]))
"""


def test_a_run_whose_steps_stop_ends_as_one_that_lost_a_peer(tiny, tmp_path):
    """Its first step and its first evaluation are compiled for longer than the watchdog waits."""
    changes = {"train.watchdog_seconds": 2.5, "evaluate.every": 3, "checkpoint.every": 100}
    tree = json.dumps(dataclasses.asdict(tiny("llada", changes)))
    (tmp_path / "experiment.py").write_text(f"import json\n\ndef get_config():\n    return json.loads({tree!r})\n")
    flags = [f"--config={tmp_path}/experiment.py", f"--workdir={tmp_path}/run"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", HANGS, "train", *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == errors.PeerLost.status, done.stderr
    assert "in add" in (tmp_path / "run" / "hung.0.txt").read_text()
    assert "step 6/12" in done.stderr or "step  3/12" in done.stderr
