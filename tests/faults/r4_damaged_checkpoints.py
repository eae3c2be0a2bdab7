"""Damage to the newest step of a small run, and what the code that goes on from it meets."""

import random
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import numpy as np
from faults import tiny_run
from faults.goal import Outcome

from llada import mesh as mesh_lib
from llada.config import Config, MeshConfig
from llada.errors import UserError
from llada.training import loop, resuming
from llada.training.checkpoint import Checkpoints

NUMBER = "R4"
TITLE = "Damaged checkpoints"
DEMAND = "noticed in one line that names the step, or every bit is right"
FULL, SAMPLE = 1000, 6

KINDS = ("bad sector", "flip", "truncate", "delete", "zeros", "empty")
FALL_BACK = 50  # one case in so many also trains on: from the step before, to the bits of an undisturbed run


def damage(step: Path, rng: random.Random, kind: str) -> str:
    """Damage one file of a step; returns which and how. A bad sector is a flipped bit in a file drawn by its size."""
    files = sorted(path for path in step.rglob("*") if path.is_file() and path.stat().st_size)
    weights = [path.stat().st_size if kind == "bad sector" else 1 for path in files]
    path = rng.choices(files, weights)[0]
    content = bytearray(path.read_bytes())
    at = rng.randrange(len(content))
    if kind in ("bad sector", "flip"):
        content[at] ^= 1 << rng.randrange(8)
    elif kind == "zeros":
        content[at : at + 4096] = bytes(len(content[at : at + 4096]))
    elif kind == "truncate":
        del content[at:]
    elif kind == "empty":
        content.clear()
    path.unlink() if kind == "delete" else path.write_bytes(content)
    return f"{kind} at {at} of {path.relative_to(step)}"


def bits(state) -> list[bytes]:
    """Of all arrays."""
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def draw(step: Path, seed: int, case: int) -> str:
    """Damage a step as a case says; kinds take turns."""
    return damage(step, random.Random(f"{seed} {case}"), KINDS[case % len(KINDS)])


def verdicts(workdir: Path, scratch: Path, config: Config, mesh, cases: Iterable[int], seed: int) -> Iterator[Outcome]:
    """What a restore meets in the newest step of `workdir` after each fault.

    `ended`: noticed, harmless (the right bits), silent (wrong bits) or traceback; the last two are wrong.
    """
    with Checkpoints(workdir) as checkpoints:
        newest = checkpoints.latest()
        right = bits(resuming.restore_state(checkpoints, config, mesh, newest)[0])
    for case in cases:
        copy = scratch / "checkpoints"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(workdir / "checkpoints" / str(newest), copy / str(newest))
        what, said = draw(copy / str(newest), seed, case), ""
        try:
            with Checkpoints(scratch) as checkpoints:
                state = resuming.restore_state(checkpoints, config, mesh, newest)[0]
            verdict = "harmless" if bits(state) == right else "silent"
        except UserError as error:
            clear = "\n" not in str(error) and f"step {newest}" in str(error)
            verdict, said = "noticed" if clear else "traceback", str(error)
        except Exception as error:
            verdict, said = "traceback", repr(error)
        bad = verdict in ("silent", "traceback")
        yield Outcome(f"case {case}, {what}", verdict, f"{verdict}: {said}" if bad else "")


def falls_back(workdir: Path, scratch: Path, config: Config, case: int, seed: int) -> Outcome:
    """Training called again on a damaged copy: it ends with the right bits, whichever step it has to go on from."""
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(workdir, scratch)
    newest = tiny_run.saved(scratch)[-1]
    what = draw(scratch / "checkpoints" / str(newest), seed, case)
    try:
        loop.train(config, scratch)
        moved = list((scratch / "checkpoints").glob("*.damaged*"))
        ended, wrong = f"trained on from {'the step before' if moved else 'it'}", ""
        if tiny_run.bits(scratch, newest) != tiny_run.bits(workdir, newest):
            wrong = "other bits than an undisturbed run's"
        elif tiny_run.record(scratch) != tiny_run.record(workdir):
            wrong = "metrics.jsonl is not an undisturbed run's"
    except Exception as error:
        ended, wrong = "not trained on", repr(error)
    return Outcome(f"case {case}, {what}, trained on", ended, wrong)


def outcomes(count: int, seed: int, folder: Path) -> Iterator[Outcome]:
    """Restores, and now and then a run that goes on."""
    changes = {"train.steps": 6, "checkpoint.every": 3}
    config = tiny_run.config(tiny_run.write_documents(folder / "text"), changes=changes)
    loop.train(config, folder / "run")
    mesh = mesh_lib.make(MeshConfig())
    trained_on = range(FALL_BACK - 1, count, FALL_BACK)
    restores = [case for case in range(count) if case not in trained_on]
    yield from verdicts(folder / "run", folder / "scratch", config, mesh, restores, seed)
    for case in trained_on:
        yield falls_back(folder / "run", folder / "trained on", config, case, seed)
