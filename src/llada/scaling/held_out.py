"""Held-out figures of finished runs, and whether they compare.

A run has a figure of its last training step in summary.json and may have some of `llada evaluate` in evaluation.json:
the latest one, and under "earlier" those of the same step by other estimators or on other rows. Figures compare where
they were measured on the same rows; runs, where they share tokenizer and corpus as well.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from llada import json_files
from llada.config import Config
from llada.errors import UserError
from llada.objectives import families

FILE = "evaluation.json"
_EARLIER = "earlier"
_OWN = {family.measure for family in families.FAMILIES.values()}  # the kinds that training's own evaluation has
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
    kind: str | None  # as in `validation.Validation`
    sampler: Mapping[str, Any] | None = None  # whose likelihood it is


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
        kind=family.measure,
    )


def of_evaluation(workdir: Path, step: int) -> tuple[Figures | None, str | None]:
    """The latest bound or NLL that `llada evaluate` measured at `step`, or a remark why there is none to be used.

    Neither where it never ran, or only by other estimators. UserError for a damaged file.
    """
    found, remark = measures(workdir, step)
    return next((of for of in found if of.kind in (None, *_OWN)), None), remark


def measures(workdir: Path, step: int) -> tuple[list[Figures], str | None]:
    """All that `llada evaluate` measured at `step`, the latest first, or a remark why the file cannot be used."""
    path = workdir / FILE
    if not path.exists():
        return [], None
    latest = json_files.finite(json_files.read(path))
    if latest.get("step") != step:
        return [], f"{path} is of step {str(latest.get('step'))[:20]}, not {step}, and is not used"
    return [_figures(path, values) for values in (latest, *_earlier(path, latest))], None


def _earlier(path: Path, values: Mapping[str, Any]) -> list[dict[str, Any]]:
    earlier = values.get(_EARLIER, [])
    if not (isinstance(earlier, list) and all(isinstance(each, dict) for each in earlier)):
        raise UserError(f"{path}: {_EARLIER} is {str(earlier)[:40]!r} and not a list; run llada evaluate again")
    return earlier


def _figures(path: Path, values: Mapping[str, Any]) -> Figures:
    for key in ("nats_per_token", "stderr", "bits_per_byte", "rows", "draws"):
        if not (is_number(values.get(key)) or (key != "nats_per_token" and values.get(key) is None)):
            raise UserError(
                f"{path}: {key} is {str(values.get(key))[:40]!r} and not a number; run llada evaluate again"
            )
    texts = {key: values.get(key) for key in ("eval_rows_digest", "estimator", "kind", "dtype")}
    texts = {key: value if isinstance(value, str) else None for key, value in texts.items()}
    sampler = values.get("sampler")
    return Figures(
        **{key: values.get(key) for key in ("nats_per_token", "stderr", "bits_per_byte", "rows", "draws")},
        rows_digest=texts.pop("eval_rows_digest"),
        **texts,
        source="llada evaluate",
        sampler=sampler if isinstance(sampler, dict) else None,
    )


_KEPT = (
    "step task nats_per_token stderr monte_carlo_stderr bits_per_byte perplexity kind estimator rows tokens draws "
    "eval_rows_digest sampler dtype"
).split()
_SAME_MEASURE = ("estimator", "sampler", "eval_rows_digest", "draws", "dtype")


def with_earlier(facts: dict[str, Any], workdir: Path) -> dict[str, Any]:
    """New contents of evaluation.json: `facts`, and what it held of the same step and is not measured again."""
    path = workdir / FILE
    try:
        latest = json_files.read(path) if path.exists() else {}
        before = [latest, *_earlier(path, latest)] if latest.get("step") == facts["step"] else []
    except UserError:
        before = []  # damaged; it is replaced
    kept = [{key: each[key] for key in _KEPT if key in each} for each in before]
    kept = [each for each in kept if any(each.get(key) != facts.get(key) for key in _SAME_MEASURE)]
    return facts | {_EARLIER: kept} if kept else facts


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
