"""A directory of runs of both families over seeds, each in a workdir FAMILY-SEED: read, checked, named, coloured."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llada import json_files
from llada.errors import UserError
from llada.objectives.families import FAMILIES, Family
from llada.scaling import comparison, figure
from llada.scaling.comparison import RunRecord
from llada.training import calls

BY_PREFIX: dict[str, Family] = {family.prefix: family for family in FAMILIES.values()}


class Seeded(NamedTuple):
    """A finished run: the prefix of its family, its seed, and what its workdir shows."""

    family: str
    seed: int
    run: RunRecord

    @property
    def name(self) -> str:
        """In tables and pictures."""
        return f"{self.run.name}, seed {self.seed}"


def read(directory: Path, script: str) -> list[list[Seeded]]:
    """The runs of each seed, by family. UserError where there are none, one is not finished, or two are no twins.

    `script` is the launcher that makes them.
    """
    first = next(iter(BY_PREFIX))
    seeds = sorted(
        int(number)
        for path in directory.glob(f"{first}-*")
        if path.is_dir() and (number := path.name.rpartition("-")[2]).isdecimal()
    )
    if not seeds:
        raise UserError(f"{directory} holds no run {first}-0; run {script}")
    found = []
    for seed in seeds:
        twins = [
            Seeded(prefix, seed, comparison.read_run(family, directory / f"{prefix}-{seed}"))
            for prefix, family in BY_PREFIX.items()
        ]
        comparison.check_twins([each.run for each in twins])
        found.append(twins)
    return found


def commits(runs: Sequence[RunRecord]) -> list[str]:
    """Those that the runs were trained at, as their calls.jsonl has them."""
    records = [json_files.read_lines(run.workdir / calls.FILE) for run in runs]
    return sorted({str(call.get("commit")) for lines in records for _, call in lines})


def shades(seeds: Sequence[int]) -> dict[tuple[str, int], Any]:
    """The colour of each (family's prefix, seed): its family's, from light to dark."""
    found = {}
    for prefix, family in BY_PREFIX.items():
        for seed, shade in zip(seeds, figure.shades(figure.COLOURS[family.name], len(seeds)), strict=True):
            found[prefix, seed] = shade
    return found
