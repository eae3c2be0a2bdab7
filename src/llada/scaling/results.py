"""What the runs of a sweep ended with: one row a reading, `results.csv`, and which rows may be compared.

A reading is a held-out figure of one run at one budget. Runs with a schedule of their own give one reading, at their
end; runs of the checkpoint and data-limited modes give one at every budget or epoch that was asked for.
"""

import csv
import dataclasses
import io
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llada import json_files
from llada.errors import Diverged, UserError
from llada.files import write_atomically
from llada.scaling.laws import Point
from llada.scaling.sweep_config import FAMILIES, MODES, MOST

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
    draws: int | None = None  # Monte Carlo draws a held-out row; 1 for an ARM
    block_cross_document_attention: bool | None = None
    retried: str | None = None  # why a run's rate is not the grid's

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
            known = r.monte_carlo_stderr is not None and math.isfinite(r.monte_carlo_stderr)
            error = max(r.monte_carlo_stderr if known else 0.0, STDERR_FLOOR)
            point = Point(r.budget, r.non_embedding_parameters, r.tokens, gain * r.nats_per_token, gain * error)
            families.setdefault(r.objective, []).append(point)
    return families


# What must be equal for two losses to compare, and what to say where it is not.
SAME = {
    "corpus_digest": "another corpus",
    "tokenizer_sha256": "another tokenizer",
    "eval_rows_digest": "other held-out rows",
    "matching": "budgets matched by another count",
    "block_cross_document_attention": "one saw the other documents of a row",
}
_LABELS = {"block_cross_document_attention": "objective.block_cross_document_attention"}


def same_data(runs: Sequence[tuple[str, Mapping[str, Any]]], keys: Mapping[str, str], advice: str) -> None:
    """UserError unless all runs, each a name and what is known of it, agree in `keys`, where known (None: not)."""
    for key, what in keys.items():
        known = [(name, facts[key]) for name, facts in runs if facts.get(key) is not None]
        for name, value in known[1:]:
            first, other = known[0]
            if value != other:
                raise UserError(
                    f"{first} and {name} differ in {_LABELS.get(key, key)} ({what}: {_short(other)} and "
                    f"{_short(value)}), so their losses do not compare; {advice}"
                )


def check_comparable(results: Sequence[Result]) -> None:
    """UserError unless all readings are of one corpus, tokenizer, set of held-out rows and kind of budget, where known.

    And unless runs that differ in the objective alone, and read equally many tokens in equal batches, read the same
    rows in the same order; and where data-limited readings stand beside others, which one report cannot hold.
    """
    same_data([(r.run, vars(r)) for r in results], SAME, "leave one of the two out")
    repeated = {r.mode == "repeat": r.run for r in results}
    if len(repeated) > 1:
        raise UserError(f"{repeated[True]} is of mode repeat and {repeated[False]} is not; make a report of each mode")
    sizes: dict[tuple, Result] = {}
    for r in results if True in repeated else ():
        other = sizes.setdefault((r.objective, r.size), r)
        if other.non_embedding_parameters != r.non_embedding_parameters:
            raise UserError(f"{r.run} and {other.run} call two sizes {r.size!r}; leave one out, or name it otherwise")
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


# What makes two readings one and the same.
_IDENTITY = (
    *("run", "objective", "size", "seed", "mode", "matching", "budget", "non_embedding_parameters", "tokens", "step"),
    *("steps", "batch_size", "peak_learning_rate"),
)


def each_once(results: Iterable[Result]) -> tuple[list[Result], int]:
    """The readings without those given before, and how many were left out.

    Of a reading with and without its figure, as of one sweep at two times, the one with it stays; two figures of one
    run's name are two readings (the same grid in two directories).
    """
    kept: dict[tuple, list[Result]] = {}
    dropped = 0
    for r in results:
        there = kept.setdefault(tuple(getattr(r, name) for name in _IDENTITY), [])
        if there and (not r.measured or any(r.nats_per_token == other.nats_per_token for other in there)):
            dropped += 1
        elif there and not there[0].measured:
            there[0], dropped = r, dropped + 1
        else:
            there.append(r)
    return [r for there in kept.values() for r in there], dropped


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


_COUNTS = ("parameters", "non_embedding_parameters", "tokens", "step", "steps", "batch_size", "layers", "width")
_AMOUNTS = ("budget", "flops_6nd", "flops_exact", "peak_learning_rate")
_NOT_NEGATIVE = ("seed", "unique_tokens", "epochs", "tokens_per_second", "seconds", "bits_per_byte", "draws")
_UNKNOWN_IF_NAN = ("stderr", "monte_carlo_stderr", "bits_per_byte", "tokens_per_second", "seconds")
_WORDS = {
    "objective": tuple(FAMILIES),
    "mode": MODES,
    "matching": ("6nd", "exact"),
    "status": (FINISHED, RUNNING, WAITING, FAILED),
}


def read_csv(path: Path, name: str | None = None) -> list[Result]:
    """What `write_csv` wrote, by this version or an earlier one; `name` is what errors call it.

    UserError for a file that cannot be read, missing columns, no reading at all, and a cell that is none of its column.
    """
    name = name or f"--results={path}"
    fields = dataclasses.fields(Result)
    text = json_files.read_text(path, name=name).removeprefix("\ufeff")
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    found = []
    try:
        columns = reader.fieldnames or []
        if missing := [f.name for f in fields if f.name not in columns and f.default is dataclasses.MISSING]:
            raise UserError(f"{name} has no column {', '.join(missing)}; give a results.csv of llada sweep")
        for line in reader:
            where = f"{name} line {reader.line_num}"
            if None in line or None in line.values():
                raise UserError(f"{where} has not {len(columns)} cells, as many as the first line has columns")
            found.append(_result(where, {f.name: _cell(line, f, where) for f in fields if f.name in columns}))
    except csv.Error as error:
        raise UserError(f"{name} line {reader.line_num} is no line of a table ({error})") from error
    if not found:
        raise UserError(f"{name} holds no reading; give a results.csv of llada sweep")
    return found


def _cell(line: dict[str, str], field: dataclasses.Field, where: str) -> Any:
    text, kind = line[field.name], field.type
    if isinstance(kind, types.UnionType):
        if text == "":
            return None
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    try:
        return {"True": True, "False": False}[text] if kind is bool else kind(text)
    except (ValueError, KeyError) as error:
        words = {int: "a whole number", float: "a number", bool: "True or False"}[kind]
        raise UserError(f"{where}: {field.name} is {text[:40]!r}, not {words}") from error


def _result(where: str, values: dict[str, Any]) -> Result:
    """A reading whose figures a run can have."""

    def require(ok: bool, key: str, rule: str) -> None:
        if not ok:
            raise UserError(f"{where}: {key} is {str(values.get(key))[:40]!r}; it must be {rule}")

    for key, words in _WORDS.items():
        require(values[key] in words, key, f"one of {', '.join(words)}")
    for key in (*_COUNTS, *_AMOUNTS):
        require(0 < values[key] <= MOST, key, "above 0 and finite")
    for key in _UNKNOWN_IF_NAN:
        if (value := values.get(key)) is not None and math.isnan(value):
            values[key] = None
    for key in (*_NOT_NEGATIVE, "stderr", "monte_carlo_stderr"):
        value = values.get(key)
        require(value is None or 0 <= value <= MOST, key, "not negative, and finite")
    loss = values.get("nats_per_token")
    require(loss is None or not math.isfinite(loss) or 0 < loss <= MOST, "nats_per_token", "above 0")
    for key in ("run", "size"):
        require(bool(values[key]) and values[key].isprintable(), key, "a name")
    require(values["step"] <= values["steps"], "step", f"at most steps={values['steps']}")
    return Result(**values)


DIVERGED = "diverged: "


def write_failure(workdir: Path, error: BaseException) -> None:
    """Leave word in a run's directory that it failed, and why."""
    text = str(error).splitlines()[0] if str(error) else ""
    reason = f"{DIVERGED}{text}" if isinstance(error, Diverged) else f"{type(error).__name__}: {text}"
    write_atomically(workdir / "failed.json", (json_files.dumps({"reason": reason}, indent=2) + "\n").encode())


def failure(workdir: Path) -> str | None:
    """Why the run failed; None where it did not."""
    path = workdir / "failed.json"
    return str(json_files.read(path).get("reason", "unknown")) if path.exists() else None
