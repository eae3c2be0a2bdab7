"""What the runs of a sweep ended with: one row a reading, `results.csv`, and which rows may be compared.

A reading is a held-out figure of one run at one budget. Runs with a schedule of their own give one reading, at their
end; runs of the checkpoint and data-limited modes give one at every budget or epoch that was asked for.
"""

import csv
import dataclasses
import io
import json
import math
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llada.errors import UserError
from llada.files import write_atomically
from llada.scaling.laws import Point

FINISHED, RUNNING, WAITING, FAILED = "finished", "running", "waiting", "failed"

# A mask predictor's Monte Carlo error is measured; an ARM has none, and no run is reproducible beyond the order of
# sums: this floor, in nats per token, keeps its weight finite. The scatter between runs comes from the fits' residuals.
STDERR_FLOOR = 1e-3


@dataclass(frozen=True, kw_only=True)
class Result:
    """One reading. Figures that do not exist yet are None; `reason` says why a failed run has none."""

    run: str  # name of its directory under runs/
    objective: str
    size: str
    seed: int
    mode: str  # isoflop | checkpoints | repeat
    matching: str  # which count the budget is in: 6nd | exact
    budget: float  # FLOPs asked for
    layers: int
    width: int
    parameters: int
    non_embedding_parameters: int
    tokens: int  # read by this reading
    unique_tokens: int | None  # of the corpus as used; None before it is prepared
    epochs: float | None
    flops_6nd: float
    flops_exact: float
    step: int
    steps: int  # of the whole run
    batch_size: int
    peak_learning_rate: float
    status: str
    reason: str | None = None
    nats_per_token: float | None = None
    stderr: float | None = None  # over held-out rows
    monte_carlo_stderr: float | None = None  # over draws, the rows given; 0 for an ARM
    bits_per_byte: float | None = None
    tokens_per_second: float | None = None
    seconds: float | None = None
    unigram_entropy_nats: float | None = None
    corpus_digest: str | None = None
    tokenizer_sha256: str | None = None
    eval_rows_digest: str | None = None
    rows_digest: str | None = None  # of the whole run's batches, at its end

    @property
    def annealed(self) -> bool:
        """Whether the learning rate had come down at this reading."""
        return self.mode == "isoflop"

    @property
    def measured(self) -> bool:
        """Whether there is a figure to fit."""
        return self.nats_per_token is not None and math.isfinite(self.nats_per_token)


def points(results: Iterable[Result], annealing_gain: float = 0.0) -> dict[str, list[Point]]:
    """Measured readings by family, as the fits take them; families in order of appearance.

    `annealing_gain`: the share of its loss that a reading without annealing would still lose to it, taken off.
    """
    families: dict[str, list[Point]] = {}
    for r in results:
        if r.measured:
            gain = 1.0 if r.annealed else 1.0 - annealing_gain
            error = max(r.monte_carlo_stderr or 0.0, STDERR_FLOOR)
            point = Point(r.budget, r.non_embedding_parameters, r.tokens, gain * r.nats_per_token, gain * error)
            families.setdefault(r.objective, []).append(point)
    return families


# What must be equal for two losses to compare, and what to say where it is not.
SAME = {
    "corpus_digest": "another corpus",
    "tokenizer_sha256": "another tokenizer",
    "eval_rows_digest": "other held-out rows",
    "matching": "budgets matched by another count",
}


def check_comparable(results: Sequence[Result]) -> None:
    """UserError unless all readings are of one corpus, tokenizer, set of held-out rows and kind of budget, where known.

    And unless runs that differ in the objective alone, and read equally many tokens in equal batches, read the same
    rows in the same order.
    """
    for key, what in SAME.items():
        known = [r for r in results if getattr(r, key) is not None]
        for first, r in zip(known[:1] * len(known), known, strict=True):
            if getattr(r, key) != getattr(first, key):
                raise UserError(
                    f"{r.run} has {what} than {first.run} ({key} {_short(getattr(r, key))}, not "
                    f"{_short(getattr(first, key))}), so their losses do not compare; leave one of the two out"
                )
    twins: dict[tuple, Result] = {}
    for r in (r for r in results if r.rows_digest is not None):
        key = (r.layers, r.width, r.non_embedding_parameters, r.seed, r.batch_size, r.steps, r.unique_tokens)
        other = twins.setdefault(key, r)
        if other.rows_digest != r.rows_digest:
            raise UserError(
                f"{r.run} and {other.run} ended on different rows (rows_digest {_short(r.rows_digest)} and "
                f"{_short(other.rows_digest)}), though both took {r.steps} steps of {r.batch_size} sequences; "
                "they were trained on different data: train one of the two again in a new --workdir"
            )


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}..." if len(text) > 16 else text


def write_csv(results: Iterable[Result], path: Path) -> None:
    """One line a reading, columns in the order of `Result`; None is an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in dataclasses.fields(Result)], lineterminator="\n")
    writer.writeheader()
    for result in results:
        writer.writerow(dataclasses.asdict(result))
    write_atomically(path, text.getvalue().encode())


def read_csv(path: Path) -> list[Result]:
    """What `write_csv` wrote. UserError for a missing file, missing columns or a cell of the wrong kind."""
    try:
        with path.open(newline="") as file:
            lines = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--results={path} cannot be read ({error}); give a results.csv of llada sweep") from error
    kinds = {field.name: field.type for field in dataclasses.fields(Result)}
    for line in lines[:1]:
        if missing := [name for name in kinds if name not in line]:
            raise UserError(f"--results={path} has no column {', '.join(missing)}; give a results.csv of llada sweep")
    try:
        return [Result(**{name: _cell(line[name], kind) for name, kind in kinds.items()}) for line in lines]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"--results={path} has a line that is no reading ({error})") from error


def _cell(text: str, kind: Any) -> Any:
    if isinstance(kind, types.UnionType):
        if text == "":
            return None
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    return {"True": True, "False": False}[text] if kind is bool else kind(text)


def write_failure(workdir: Path, reason: str) -> None:
    """Leave word in a run's directory that it failed, and why."""
    write_atomically(workdir / "failed.json", (json.dumps({"reason": reason}, indent=2) + "\n").encode())


def failure(workdir: Path) -> str | None:
    """Why the run failed; None where it did not."""
    path = workdir / "failed.json"
    return json.loads(path.read_text())["reason"] if path.exists() else None
