"""What the runs of a sweep ended with: one row a reading, `results.csv`, and which rows may be compared.

A reading is a held-out figure of one run at one budget. Runs with a schedule of their own give one reading, at their
end; runs of the checkpoint and data-limited modes give one at every budget or epoch that was asked for.
"""

import csv
import dataclasses
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from llada import json_files
from llada.errors import Diverged, UserError
from llada.files import write_atomically
from llada.knobs import knob, scalar
from llada.objectives.families import FAMILIES, Family
from llada.scaling.held_out import abbreviated, require_same
from llada.scaling.laws import Point
from llada.scaling.series import NAME, NAME_RULE, Series
from llada.scaling.sweep_config import ANNEALED, MATCHED, MODES, MOST

FINISHED, RUNNING, WAITING, FAILED = "finished", "running", "waiting", "failed"

# A mask predictor's Monte Carlo error is measured; an ARM has none, and no run is reproducible beyond the order of
# sums: this floor, in nats per token, keeps its weight finite. The scatter between runs comes from the fits' residuals.
STDERR_FLOOR = 1e-3


@dataclass(frozen=True, kw_only=True)
class Result:
    """One reading, a line of results.csv. Figures that do not exist yet are None."""

    run: str = knob(MISSING, "name of its directory under runs/")
    objective: str = knob(MISSING, "name of its family", choices=tuple(FAMILIES))
    size: str = knob(MISSING, "name of its size")
    seed: int = knob(MISSING, "of the run", least=0)
    mode: str = knob(MISSING, "of the sweep", choices=MODES)
    matching: str = knob(MISSING, "which count the budget is in", choices=tuple(MATCHED))
    budget: float = knob(MISSING, "FLOPs asked for", above=0, most=MOST)
    layers: int = knob(MISSING, "of the model", above=0)
    width: int = knob(MISSING, "of the model", above=0)
    parameters: int = knob(MISSING, "all of them", above=0, most=MOST)
    non_embedding_parameters: int = knob(MISSING, "N", above=0, most=MOST)
    tokens: int = knob(MISSING, "trained on by this reading", above=0, most=MOST)
    unique_tokens: int | None = knob(MISSING, "of the corpus as used; None before it is prepared", least=0, most=MOST)
    epochs: float | None = knob(MISSING, "how often the unique tokens were read", least=0, most=MOST)
    flops_6nd: float = knob(MISSING, "spent by this reading", above=0, most=MOST)
    flops_exact: float = knob(MISSING, "spent by this reading, all matrix products", above=0, most=MOST)
    step: int = knob(MISSING, "of this reading", above=0, most=MOST)
    steps: int = knob(MISSING, "of the whole run", above=0, most=MOST)
    batch_size: int = knob(MISSING, "sequences", above=0, most=MOST)
    peak_learning_rate: float = knob(MISSING, "of the run", above=0, most=MOST)
    status: str = knob(MISSING, "of the run", choices=(FINISHED, RUNNING, WAITING, FAILED))
    reason: str | None = knob(None, "why a failed run has no figure")
    nats_per_token: float | None = knob(None, "held out; not finite where the run diverged", above=0, most=MOST)
    stderr: float | None = knob(None, "over held-out rows", least=0, most=MOST)
    monte_carlo_stderr: float | None = knob(None, "over draws, the rows given; 0 where exact", least=0, most=MOST)
    bits_per_byte: float | None = knob(None, "held out", least=0, most=MOST)
    tokens_per_second: float | None = knob(None, "while training", least=0, most=MOST)
    seconds: float | None = knob(None, "of the whole run, by the clock", least=0, most=MOST)
    unigram_entropy_nats: float | None = knob(None, "of the corpus")
    corpus_digest: str | None = knob(None, "")
    tokenizer_sha256: str | None = knob(None, "")
    eval_rows_digest: str | None = knob(None, "of the held-out rows")
    rows_digest: str | None = knob(None, "of the whole run's batches, at its end")
    draws: int | None = knob(None, "Monte Carlo draws a held-out row; 1 where exact", least=0, most=MOST)
    block_cross_document_attention: bool | None = knob(None, "whether documents of a row see themselves only")
    retried: str | None = knob(None, "why a run's rate is not the grid's")
    variant: str | None = knob(None, "of the objective; None: the plain one")
    variant_keys: str | None = knob(None, "what the variant changes, key=value")
    bound_trained: bool | None = knob(None, "whether the training loss estimates the bound, or is the NLL")
    row_copies: int = knob(1, "how often a batch holds each of its rows", above=0, most=MOST)

    @property
    def family(self) -> Family:
        """Of the objective."""
        return FAMILIES[self.objective]

    @property
    def series(self) -> Series:
        """Family and variant: what readings are grouped by."""
        return Series(self.family, self.variant)

    @property
    def matched(self) -> str:
        """The count that budgets are in, in words."""
        return MATCHED[self.matching]

    @property
    def loss(self) -> float:
        """Nats per token; nan where there is no figure."""
        return math.nan if self.nats_per_token is None else self.nats_per_token

    @property
    def measured(self) -> bool:
        """Whether there is a figure to fit."""
        return math.isfinite(self.loss)

    @property
    def data_limited(self) -> bool:
        """Whether it is of a run that reads few unique tokens again and again."""
        return self.mode == "repeat"

    @property
    def ranked(self) -> bool:
        """Whether it is of a sweep that ranks variants, and fits nothing."""
        return self.mode == "variants"

    @property
    def annealed(self) -> bool:
        """Whether the learning rate had come down at this reading."""
        return self.mode in ANNEALED


def points(results: Iterable[Result], annealing_gain: float = 0.0) -> dict[str, list[Point]]:
    """Measured readings by the keys of their series, as the fits take them; series in order of appearance.

    `annealing_gain`: the share of its loss that a reading without annealing would still lose to it, taken off.
    """
    by_series: dict[str, list[Point]] = {}
    for r in results:
        if r.measured:
            gain = 1.0 if r.annealed else 1.0 - annealing_gain
            error = r.monte_carlo_stderr
            error = STDERR_FLOOR if error is None or not math.isfinite(error) else max(error, STDERR_FLOOR)
            point = Point(r.budget, r.non_embedding_parameters, r.tokens, gain * r.loss, gain * error)
            by_series.setdefault(r.series.key, []).append(point)
    return by_series


# What must be equal for two losses to compare, and what it means where it is not.
SAME = {
    "corpus_digest": "another corpus",
    "tokenizer_sha256": "another tokenizer",
    "eval_rows_digest": "other held-out rows",
    "matching": "budgets matched by another count",
    "block_cross_document_attention": "one saw the other documents of a row",
}


def check_comparable(results: Sequence[Result]) -> None:
    """UserError unless all readings are of one corpus, tokenizer, set of held-out rows and kind of budget, where known.

    And unless runs that differ in the objective alone, and read equally many tokens in equal batches, read the same
    rows in the same order; and where readings of modes that one report cannot hold stand together, or two variants of
    one name.
    """
    require_same([(r.run, vars(r)) for r in results], SAME, "leave one of the two out")
    apart = [r for r in results if r.data_limited or r.ranked]  # modes with a report of their own
    for r in results if apart else ():
        if (r.data_limited, r.ranked) != (apart[0].data_limited, apart[0].ranked):
            raise UserError(f"{apart[0].run} is of mode {apart[0].mode} and {r.run} is not; make a report of each mode")
    sizes: dict[tuple, Result] = {}
    variants: dict[str, Result] = {}
    for r in results:
        other = sizes.setdefault((r.series.key, r.size), r)
        if apart and other.non_embedding_parameters != r.non_embedding_parameters:
            raise UserError(f"{r.run} and {other.run} call two sizes {r.size!r}; leave one out, or name it otherwise")
        other = variants.setdefault(r.series.key, r)
        if other.variant_keys != r.variant_keys:
            raise UserError(
                f"{other.run} and {r.run} call two variants {r.variant!r} ({other.variant_keys} and {r.variant_keys}); "
                "leave one out"
            )
    twins: dict[tuple, Result] = {}
    for r in (r for r in results if r.rows_digest is not None):
        size = (r.layers, r.width, r.non_embedding_parameters, r.seed)
        key = (*size, r.batch_size, r.row_copies, r.steps, r.unique_tokens)  # what reads a row twice reads other rows
        other = twins.setdefault(key, r)
        if other.rows_digest != r.rows_digest:
            raise UserError(
                f"{r.run} and {other.run} ended on different rows (rows_digest {abbreviated(r.rows_digest)} and "
                f"{abbreviated(other.rows_digest)}), though both took {r.steps} steps of {r.batch_size} sequences; "
                "they were trained on different data: train one of the two again in a new --workdir"
            )


# What makes two readings one and the same.
_IDENTITY = (
    *("run", "objective", "size", "seed", "mode", "matching", "budget", "non_embedding_parameters", "tokens", "step"),
    *("steps", "batch_size", "peak_learning_rate", "variant"),
)


def each_once(results: Iterable[Result]) -> tuple[list[Result], int]:
    """The readings without repeated ones, and how many were left out.

    Of a reading with and without its figure, as of one sweep at two times, the one with it stays; two figures of one
    run's name are two readings (the same grid in two directories).
    """
    results = list(results)
    retained: dict[tuple, list[Result]] = {}
    for r in results:
        equal = retained.setdefault(tuple(getattr(r, name) for name in _IDENTITY), [])
        if equal and not equal[0].measured:
            equal[0] = r if r.measured else equal[0]
        elif not equal or (r.measured and all(r.loss != other.loss for other in equal)):
            equal.append(r)
    unique = [r for equal in retained.values() for r in equal]
    return unique, len(results) - len(unique)


def write_csv(results: Iterable[Result], path: Path) -> None:
    """One line a reading, columns in the order of `Result`; None is an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in dataclasses.fields(Result)], lineterminator="\n")
    writer.writeheader()
    for result in results:
        writer.writerow(dataclasses.asdict(result))
    write_atomically(path, text.getvalue().encode())


def read_csv(path: Path, name: str | None = None) -> list[Result]:
    """What `write_csv` wrote, by this version or an earlier one; `name` is what errors call it.

    UserError for a file that cannot be read, missing columns, no reading at all, and a cell that is none of its column.
    """
    name = name or f"--results={path}"
    fields = dataclasses.fields(Result)
    text = json_files.read_text(path, name=name).removeprefix("\ufeff")
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    results = []
    try:
        columns = reader.fieldnames or []
        if missing := [f.name for f in fields if f.name not in columns and f.default is dataclasses.MISSING]:
            raise UserError(f"{name} has no column {', '.join(missing)}; give a results.csv of llada sweep")
        for line in reader:
            where = f"{name} line {reader.line_num}"
            if None in line or None in line.values():
                raise UserError(f"{where} has not {len(columns)} cells, as many as the first line has columns")
            results.append(_result(where, {f.name: _cell(line, f, where) for f in fields if f.name in columns}))
    except csv.Error as error:
        raise UserError(f"{name} line {reader.line_num} is no line of a table ({error})") from error
    if not results:
        raise UserError(f"{name} holds no reading; give a results.csv of llada sweep")
    return results


def _cell(line: dict[str, str], field: dataclasses.Field, where: str) -> Any:
    text, kind = line[field.name], scalar(field.type)
    if text == "" and kind is not field.type:
        return None
    try:
        return {"True": True, "False": False}[text] if kind is bool else kind(text)
    except (ValueError, KeyError) as error:
        words = {int: "a whole number", float: "a number", bool: "True or False"}[kind]
        raise UserError(f"{where}: {field.name} is {text[:40]!r}, not {words}") from error


# Columns in which earlier versions wrote nan for a figure that does not exist.
_MAY_BE_NAN = ("stderr", "monte_carlo_stderr", "bits_per_byte", "tokens_per_second", "seconds")


def _result(where: str, values: dict[str, Any]) -> Result:
    """A reading whose figures a run can have."""
    for key in _MAY_BE_NAN:
        if (value := values.get(key)) is not None and math.isnan(value):
            values[key] = None
    result = Result(**values)
    for field in dataclasses.fields(Result):
        value = getattr(result, field.name)
        rule = field.metadata["knob"].broken(value)
        if field.name in ("run", "size") and not (value and value.isprintable()):
            rule = "it must be a name"
        if field.name == "variant" and value is not None and not NAME.fullmatch(value):
            rule = NAME_RULE
        if field.name == "variant_keys" and value is not None and not value.isprintable():
            rule = "it must be keys and values"
        if field.name == "step" and value > result.steps:
            rule = f"it must be at most steps={result.steps}"
        if rule and not (field.name == "nats_per_token" and not math.isfinite(value)):  # it diverged
            raise UserError(f"{where}: {field.name} is {str(value)[:40]!r}; {rule}")
    return result


DIVERGED = "diverged: "


def write_failure(workdir: Path, error: BaseException) -> None:
    """Record in a run's directory that it failed, and why."""
    text = str(error).splitlines()[0] if str(error) else ""
    reason = f"{DIVERGED}{text}" if isinstance(error, Diverged) else f"{type(error).__name__}: {text}"
    write_atomically(workdir / "failed.json", (json_files.dumps({"reason": reason}, indent=2) + "\n").encode())


def failure(workdir: Path) -> str | None:
    """Why the run failed; None where it did not."""
    path = workdir / "failed.json"
    return str(json_files.read(path).get("reason", "unknown")) if path.exists() else None
