"""Two fresh runs of the same experiment, each in a process of its own; one of them compiles everything anew."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from faults import tiny_run, workers
from faults.goal import Outcome

NUMBER = "R10"
TITLE = "Two fresh runs"
DEMAND = "equal bits of parameters and moments, equal metrics; rows equal for both families and on every mesh"
FULL, SAMPLE = 24, 1

STEPS = 10
MESHES = {  # name -> devices, data, fsdp
    "1 device": (1, 1, 1),
    "8 fsdp": (8, 1, 8),
    "2 data x 4 fsdp": (8, 2, 4),
    "4 data x 2 fsdp": (8, 4, 2),
}
FAMILIES = ("llada", "arm")
SEEDS = 3


def outcomes(count: int, seed: int, folder: Path) -> Iterator[Outcome]:
    """Meshes take turns; both runs of a case go on side by side."""
    source, changes = workers.prepared(folder)
    rows: dict[int, str] = {}
    for i, (mesh, (devices, data, fsdp)) in enumerate(MESHES.items()):
        runs = [(FAMILIES[n // 4 % 2], seed * SEEDS + n // 8) for n in range(i, count, len(MESHES))]
        if not runs:
            return
        arguments = {"runs": runs, "source": source, "changes": changes | {"mesh.data": data, "mesh.fsdp": fsdp}}
        first, second = (
            workers.Workers("r10_determinism", "fresh", arguments | {"folder": where}, where, devices, 1, environment)
            for where, environment in (
                (folder / f"{devices}-{fsdp}-a", {}),
                (folder / f"{devices}-{fsdp}-b", {"JAX_COMPILATION_CACHE_DIR": ""}),
            )
        )
        for (family, number), a, b in zip(runs, first, second, strict=True):
            different = [name for name in a if a[name] != b[name]]
            if rows.setdefault(number, a["rows_digest"]) != a["rows_digest"]:
                different.append("rows_digest, which is another than on the mesh or of the family before")
            what = f"{family}, seed {number}, {mesh}"
            yield Outcome(what, "other" if different else "equal", f"differs: {different}" if different else "")


def fresh(runs: list[list], source: str, changes: dict[str, Any], folder: str) -> Iterator[dict[str, Any]]:
    """In a worker: what each run ends with."""
    from llada.training import loop

    for family, number in runs:
        config = tiny_run.config(source, family, changes | {"train.steps": STEPS, "checkpoint.every": STEPS})
        workdir = Path(folder) / f"{family}-{number}"
        summary = loop.train(dataclasses.replace(config, seed=number), workdir)
        yield {
            "bits": tiny_run.bits(workdir, STEPS),
            "metrics": tiny_run.record(workdir),
            **{name: value for name, value in summary.items() if name not in ("seconds", "tokens_per_second")},
        }
