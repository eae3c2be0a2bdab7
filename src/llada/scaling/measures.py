"""Finished runs of a sweep by further measures of `llada evaluate`, each read once, and the gap between twins by each.

Laws are fitted to training's own held-out figures, never to these.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from llada import config as config_lib
from llada import json_files
from llada.errors import UserError
from llada.evaluation import likelihoods, validation
from llada.files import write_atomically
from llada.inference import likelihood
from llada.inference.row_batches import OnRows
from llada.objectives import families
from llada.objectives.families import Family
from llada.scaling import gaps, held_out
from llada.scaling.held_out import Figures
from llada.scaling.numbers import markdown_table
from llada.scaling.results import FINISHED, Result
from llada.training import run as run_lib
from llada.training.corpus import Corpus

_DTYPE = "float32"  # of the parameters
FITTED = (
    "The laws of this report are fitted to training's own held-out figures, LLaDA's bound and the ARM's exact NLL, and "
    "to no other measure."
)


class Measured(NamedTuple):
    """A finished run of a sweep as `gaps` wants it."""

    name: str
    family: Family
    workdir: Path
    figures: Figures
    measures: Sequence[Figures]


def check(estimators: Sequence[str]) -> None:
    """UserError for a name that no estimator has."""
    known = list(likelihood.ESTIMATORS)
    if wrong := [name for name in estimators if name not in known]:
        raise UserError(f"--estimator={wrong[0]} is not one of {', '.join(known)}")


def read_all(
    workdirs: Sequence[Path],
    estimators: Sequence[str],
    rows: int | None,
    said: Callable[[str], None],
    show: OnRows | None = None,
) -> None:
    """Score these finished runs by each estimator, ARMs exactly, on the same `rows` held-out rows (None: training's).

    What evaluation.json of a run has already is not read again. `said` gets a line for each figure. UserError as
    `llada evaluate`.
    """
    for workdir in workdirs:
        config, summary = config_lib.load(workdir / "config.json"), json_files.read(workdir / "summary.json")
        family = families.of(config)
        if family.exact and rows is None:
            continue  # training has read it
        described = run_lib.describe(workdir, summary["step"])
        corpus = run_lib.corpus_of_run(workdir, config, described.tokenizer, described.corpus_digest)
        held = corpus.held_out(config, described.tokenizer)
        count = min(rows or summary.get("eval_rows") or len(held), len(held))
        known, _ = held_out.measures(workdir, summary["step"])
        left = [
            name
            for name in ([family.estimators[0]] if family.exact else estimators)
            if not any(_is(of, name, count, config.evaluate.draws) for of in known)
        ]
        if not left:
            continue
        opened = run_lib.load(workdir, summary["step"])
        for name in left:
            validator = _validator(opened, corpus, None if family.exact else name, count)
            with jax.set_mesh(opened.mesh):
                facts = validator(opened.params, show)._asdict()
            facts = {"step": opened.step, "task": "validation", **facts, "dtype": _DTYPE}
            facts |= {"sampler": likelihoods.SAMPLER} if name == "sampler" else {}
            text = json_files.dumps(held_out.with_earlier(facts, workdir), indent=2)
            write_atomically(workdir / held_out.FILE, f"{text}\n".encode())
            said(f"{workdir.name}: {name} {facts['nats_per_token']:.4f} nats/token, {facts['kind']}")
        jax.clear_caches()  # no two runs share a program


def _is(of: Figures, name: str, rows: int, draws: int) -> bool:
    """Whether a figure is by this estimator, with the settings that are used here."""
    drawn = name in likelihood.DRAWN
    return (of.estimator, of.rows, of.dtype) == (name, rows, _DTYPE) and (
        of.sampler in (None, likelihoods.SAMPLER) and (of.draws == draws or not drawn)
    )


def _validator(opened: run_lib.Run, corpus: Corpus, estimator: str | None, rows: int) -> validation.Validator:
    config, tokenizer = opened.config, opened.tokenizer
    return validation.Validator(
        config,
        tokenizer.special,
        corpus.text_bytes(tokenizer.token_bytes_V),
        corpus.held_out(config, tokenizer),
        opened.mesh,
        estimator,
        rows,
        likelihoods.scorer_for(config, tokenizer, opened.mesh, estimator),
    )


def section(directory: Path, results: Sequence[Result]) -> str:
    """The gap of each diffusion run to its ARM twin, of the same size, budget and seed, by each measure taken of both.

    Empty where there is none but training's own.
    """
    ended = [
        r
        for r in results
        if r.status == FINISHED and r.step == r.steps and (directory / "runs" / r.run / "summary.json").exists()
    ]
    exact = {(r.size, r.budget, r.seed): r for r in reversed(ended) if r.family.exact}
    found: list[gaps.Line] = []
    for r in ended:
        twin = exact.get((r.size, r.budget, r.seed))
        if not r.family.exact and twin is not None:
            found += gaps.lines([_measured(directory, each) for each in (r, twin)])
    cells = gaps.table(found)
    return f"{markdown_table(cells)}\n\n{gaps.EXPLAINED} {FITTED}" if cells else ""


def _measured(directory: Path, result: Result) -> Measured:
    workdir = directory / "runs" / result.run
    config, summary = config_lib.load(workdir / "config.json"), json_files.read(workdir / "summary.json")
    found, _ = held_out.measures(workdir, summary["step"])
    return Measured(result.run, result.family, workdir, held_out.of_training(config, summary), found)
