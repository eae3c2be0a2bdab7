"""Held-out figures of finished runs, and whether those of several runs compare.

A run has a figure of its last training step in summary.json and may have one of `llada evaluate` in evaluation.json.
Figures compare where they were measured on the same rows; runs, where they share tokenizer and corpus as well.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from llada import json_files
from llada.config import Config
from llada.errors import UserError
from llada.objectives import families

_LABELS = {"block_cross_document_attention": "objective.block_cross_document_attention"}


class Figures(NamedTuple):
    """Held-out figures, and what they are of. None: not known, or there is none."""

    nats_per_token: float | None
    stderr: float | None
    bits_per_byte: float | None
    rows: int | None
    draws: int | None
    estimator: str | None
    rows_digest: str | None
    dtype: str | None  # of the parameters
    source: str  # training | llada evaluate


def of_training(config: Config, values: Mapping[str, Any]) -> Figures:
    """Training's own figures, from the keys eval_* of a summary.json."""
    family = families.of(config)
    return Figures(
        nats_per_token=values.get("eval_nats_per_token"),
        stderr=values.get("eval_stderr"),
        bits_per_byte=values.get("eval_bits_per_byte"),
        rows=values.get("eval_rows"),
        draws=1 if family.exact else values.get("eval_draws") or config.evaluate.draws,
        estimator=family.estimators[0],
        rows_digest=values.get("eval_rows_digest"),
        dtype="float32",
        source="training",
    )


def of_evaluation(workdir: Path, step: int) -> tuple[Figures | None, str | None]:
    """What `llada evaluate` measured at `step`, or a remark why that cannot be used; neither where it never ran.

    UserError for a damaged file.
    """
    path = workdir / "evaluation.json"
    if not path.exists():
        return None, None
    values = json_files.finite(json_files.read(path))
    if values.get("step") != step:
        return None, f"{path} is of step {str(values.get('step'))[:20]}, not {step}, and is not used"
    for key in ("nats_per_token", "stderr", "bits_per_byte", "rows", "draws"):
        if not (is_number(values.get(key)) or (key != "nats_per_token" and values.get(key) is None)):
            raise UserError(
                f"{path}: {key} is {str(values.get(key))[:40]!r} and not a number; run llada evaluate again"
            )
    digest = values.get("eval_rows_digest")
    figures = Figures(
        **{key: values.get(key) for key in Figures._fields if key not in ("rows_digest", "source")},
        rows_digest=digest if isinstance(digest, str) else None,
        source="llada evaluate",
    )
    return figures, None


def of_same_rows(figures: Sequence[Figures]) -> bool:
    """Whether all are known to have been measured on the same held-out rows: what does not say so does not compare."""
    digests = {each.rows_digest for each in figures}
    return len(digests) == 1 and None not in digests


def require_same(runs: Sequence[tuple[str, Mapping[str, Any]]], keys: Mapping[str, str], advice: str) -> None:
    """UserError unless all runs, each a name and what is known of it, agree in `keys` where they are known.

    keys    what must be equal, and what it means where it is not: {"corpus_digest": "another corpus"}
    advice  what to do then
    """
    for key, meaning in keys.items():
        known = [(name, facts[key]) for name, facts in runs if facts.get(key) is not None]
        for name, value in known[1:]:
            first, expected = known[0]
            if value != expected:
                raise UserError(
                    f"{first} and {name} differ in {_LABELS.get(key, key)} ({meaning}: {abbreviated(expected)} and "
                    f"{abbreviated(value)}), so their losses do not compare; {advice}"
                )


def abbreviated(value: Any) -> str:
    """A digest by its first characters; what is short already as it is."""
    text = str(value)
    return f"{text[:12]}..." if len(text) > 16 else text


def is_number(value: Any) -> TypeGuard[float]:
    """Whether JSON had a number here."""
    return isinstance(value, int | float) and not isinstance(value, bool)
