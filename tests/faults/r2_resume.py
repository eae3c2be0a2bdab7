"""Runs that are stopped or crash at a drawn step, or during an evaluation, and go on: compared with undisturbed ones.

A stop is SIGTERM, which saves; a crash is an exception in the middle of the run, after which the next call goes on from
the newest planned checkpoint. Both families, plain, in microbatches, and with parameters sharded over two devices.
"""

import json
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from faults import tiny_run, workers
from faults.goal import Outcome

NUMBER = "R2"
TITLE = "Going on after a stop or a crash"
DEMAND = "parameters, moments, metrics lines and summary are an undisturbed run's, bit for bit"
FULL, SAMPLE = 80, 1

STEPS, SAVED, EVALUATED = 24, 5, 7
WARM_UP = 6  # steps: a quarter of the run
EPOCH_ROWS, BATCH = 44, 8  # an epoch ends in the middle of a batch: in steps 6, 11, 17, 22
ENDS = [-(-EPOCH_ROWS * n // BATCH) for n in range(1, 5)]
VARIANTS = {  # name -> devices, and what differs from the plain run
    "plain": (1, {}),
    "4 microbatches": (1, {"train.microbatches": 4}),
    "fsdp 2": (2, {"mesh.fsdp": 2}),
}
PLACES = ("warm-up", "before the end of an epoch", "in it", "after it", "evaluation", "any step")


class Case(NamedTuple):
    """`step`: after which the run is disturbed, or whose evaluation is."""

    number: int
    family: str
    variant: str
    place: str
    kind: str
    step: int

    def __str__(self) -> str:
        where = f"step {self.step}" + f" ({self.place})" * (self.place != "any step")
        return f"{self.family}, {self.variant}: {self.kind}, {where}"


def case(seed: int, i: int) -> Case:
    """Families, variants and places take turns, so that 36 neighbours are all combinations; the rest is drawn."""
    rng = random.Random(f"R2 {seed} {i}")
    place = PLACES[i // 6 % 6]
    step = {
        "warm-up": rng.randrange(1, WARM_UP),
        "before the end of an epoch": rng.choice(ENDS) - 1,
        "in it": rng.choice(ENDS),
        "after it": rng.choice(ENDS) + 1,
        "evaluation": rng.randrange(EVALUATED, STEPS, EVALUATED),
        "any step": rng.randrange(1, STEPS),
    }[place]
    return Case(i, ("llada", "arm")[i % 2], tuple(VARIANTS)[i // 2 % 3], place, rng.choice(("stop", "crash")), step)


def outcomes(count: int, seed: int, folder: Path) -> Iterator[Outcome]:
    """Those of one device and those of two side by side."""
    cases = [case(seed, i) for i in range(count)]
    source, changes = workers.prepared(folder)
    groups = []
    for devices in sorted({devices for devices, _ in VARIANTS.values()}):
        mine = [each for each in cases if VARIANTS[each.variant][0] == devices]
        if mine:
            arguments = {"cases": mine, "source": source, "changes": changes, "folder": folder / str(devices)}
            groups.append(workers.Workers("r2_resume", "resumed", arguments, folder / str(devices), devices))
    for found in tiny_run.side_by_side(*groups):
        yield Outcome(*found)


class Crash(Exception):
    """What no run expects."""


def resumed(cases: list[list], source: str, changes: dict[str, Any], folder: str) -> Iterator[Outcome]:
    """In a worker: each case, with an undisturbed run for each family and variant."""
    from llada.training import loop

    expected: dict[tuple[str, str], Path] = {}
    for values in cases:
        drawn = Case(*values)
        every = {"checkpoint.every": SAVED, "evaluate.every": EVALUATED, "optimizer.schedule": "0:0 25%:1 100%:0.1"}
        every |= {"train.steps": STEPS, "train.log_every": 2, "data.unique_tokens": EPOCH_ROWS * 32}
        config = tiny_run.config(source, drawn.family, changes | every | VARIANTS[drawn.variant][1])
        key = drawn.family, drawn.variant
        if key not in expected:
            expected[key] = Path(folder) / "-".join(key).replace(" ", "-")
            loop.train(config, expected[key])
        workdir = Path(folder) / f"case-{drawn.number}"
        try:
            disturb(config, workdir, drawn)
            wrong = "the run was not disturbed"
        except (loop.Interrupted, Crash) as end:
            ended = f"{drawn.kind}, went on"
            saved = tiny_run.saved(workdir)
            wrong = "" if drawn.kind == "crash" or saved[-1:] == [drawn.step] else f"{end}: saved are {saved}"
            loop.train(config, workdir)
        wrong = wrong or tiny_run.difference(workdir, expected[key], STEPS) or _other_summary(workdir, expected[key])
        yield Outcome(str(drawn), ended if not wrong else "other", wrong)
        if not wrong:
            shutil.rmtree(workdir)


def disturb(config: Any, workdir: Path, drawn: Case) -> None:
    """Train until the case's fault. Interrupted, or Crash."""
    from llada.training import loop

    def fault() -> None:
        if drawn.kind == "crash":
            raise Crash
        signal.raise_signal(signal.SIGTERM)

    name = "evaluate" if drawn.place == "evaluation" else "advance"
    plain = getattr(loop.TrainingRun, name)
    validate = loop.Validator.__call__

    def advance(run: Any) -> None:
        plain(run)
        if run.step == drawn.step:
            fault()

    def evaluate(run: Any) -> None:
        def disturbed(*arguments: Any) -> Any:
            found = validate(*arguments)
            fault()
            return found

        loop.Validator.__call__ = disturbed if run.step == drawn.step else validate
        plain(run)

    setattr(loop.TrainingRun, name, evaluate if name == "evaluate" else advance)
    try:
        loop.train(config, workdir)
    finally:
        setattr(loop.TrainingRun, name, plain)
        loop.Validator.__call__ = validate


def _other_summary(workdir: Path, expected: Path) -> str:
    clocks = ("seconds", "tokens_per_second")
    ours, theirs = (json.loads((folder / "summary.json").read_text()) for folder in (workdir, expected))
    names = [name for name in theirs if name not in clocks and ours.get(name) != theirs[name]]
    return f"summary.json differs in {', '.join(names)}" if names else ""
