"""Two finished runs side by side: the figures in a table, loss against FLOPs as a picture, a report in Markdown.

Reads what training wrote (`summary.json`, `metrics.jsonl`, `evaluation.json`); computes nothing a model is needed for.
"""

import os
import re
import shlex
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from llada import changes, json_files
from llada import config as config_lib
from llada.errors import UserError
from llada.objectives.families import FAMILIES, Family
from llada.scaling import figure, gaps, held_out
from llada.scaling.held_out import Figures, is_number
from llada.scaling.numbers import markdown_table, or_dash
from llada.scaling.series import Series
from llada.training import metrics as metrics_lib


class RunRecord(NamedTuple):
    """One run as its workdir shows it: figures of its training, and of a separate evaluation where there is one."""

    family: Family
    workdir: Path
    config: config_lib.Config
    summary: dict[str, Any]
    lines: list[dict[str, Any]]
    figures: Figures
    evaluated: Figures | None
    remark: str | None  # on an evaluation that cannot be used
    measures: tuple[Figures, ...] = ()  # all evaluations of its last step, the latest first
    variant: str | None = None  # the name of one that stands beside the family's own

    @property
    def series(self) -> Series:
        """How it is named and drawn."""
        return Series(self.family, self.variant)

    @property
    def name(self) -> str:
        """In table, picture and report."""
        return self.series.title


class Sampled(NamedTuple):
    """One generated text: the model and its settings, the prompt or infilling request, and the answer."""

    title: str
    prompt: str
    text: str


# What the table, the picture and the checks take from summary.json.
_NUMBERS = "step parameters non_embedding_parameters tokens flops_6nd flops_exact".split()
_OPTIONAL_NUMBERS = (
    "eval_nats_per_token eval_stderr eval_bits_per_byte eval_rows eval_draws unigram_entropy_nats tokens_per_second "
    "seconds"
).split()
_TEXTS = "objective rows_digest corpus_digest tokenizer_sha256".split()


def read_run(family: Family, workdir: Path) -> RunRecord:
    """A finished run of the family, given to the flag of its prefix. UserError for what is none, or damaged."""
    flag = f"--{family.prefix}={workdir}"
    path, settings = workdir / "summary.json", workdir / "config.json"
    for needed in (settings, path):
        if not needed.exists():
            raise UserError(f"{flag} holds no {needed.name}; let llada train finish there first")
    config, summary = config_lib.load(settings), json_files.finite(json_files.read(path))
    summary = dict.fromkeys(_OPTIONAL_NUMBERS) | summary
    _require(path, summary, _NUMBERS, is_number, "a number")
    _require(path, summary, _OPTIONAL_NUMBERS, lambda value: value is None or is_number(value), "a number or null")
    _require(path, summary, _TEXTS, lambda value: isinstance(value, str), "a text")
    for name, where in ((summary["objective"], path), (config.objective.name, settings)):
        if name != family.name:
            flags = ", ".join(f"--{each.prefix} is for {each.title}" for each in FAMILIES.values())
            raise UserError(f"{flag} is a run of {name[:40]!r} by {where.name}, not of {family.name!r}; {flags}")
    evaluated, remark = held_out.of_evaluation(workdir, summary["step"])
    if evaluated and evaluated.rows_digest is None:
        evaluated = None
        remark = (
            f"{workdir / 'evaluation.json'} does not say which rows it read, and is not used; llada evaluate writes a "
            "new one"
        )
    return RunRecord(
        family=family,
        workdir=workdir,
        config=config,
        summary=summary,
        lines=metrics_lib.read(workdir / "metrics.jsonl"),
        figures=held_out.of_training(config, summary),
        evaluated=evaluated,
        remark=remark,
        measures=tuple(held_out.measures(workdir, summary["step"])[0]),
    )


def read_further(workdir: Path) -> RunRecord:
    """A further finished run, of either family, named by its directory. UserError for what is none, or damaged."""
    path = workdir / "config.json"
    if not path.exists():
        raise UserError(f"--also={workdir} holds no {path.name}; let llada train finish there first")
    family = FAMILIES[config_lib.load(path).objective.name]
    name = workdir.resolve().name.removeprefix(family.prefix).strip("_-")
    return read_run(family, workdir)._replace(variant=name or workdir.resolve().name)


def _require(path: Path, summary: dict[str, Any], keys: list[str], ok: Callable[[Any], bool], kind: str) -> None:
    for key in keys:
        if not ok(value := summary.get(key)):
            raise UserError(f"{path}: {key} is {str(value)[:40]!r} and not {kind}; train the run again")


def choose_figures(runs: list[RunRecord]) -> tuple[list[RunRecord], list[str]]:
    """The runs with the figures that compare, and remarks on those left out.

    Evaluations take the place of training's figures where all runs have one of the same rows.
    """
    remarks = [run.remark for run in runs if run.remark]
    evaluated = [run.evaluated for run in runs if run.evaluated]
    if len(evaluated) == len(runs) and held_out.of_same_rows(evaluated):
        return [run._replace(figures=figures) for run, figures in zip(runs, evaluated, strict=True)], remarks
    why = "they are of different rows" if len(evaluated) == len(runs) else "the other has none to go with it"
    remarks += [f"{run.workdir / 'evaluation.json'} is not used: {why}" for run in runs if run.evaluated]
    return runs, remarks


# What must be equal for two runs to be twins, and what it means where it is not.
_SAME = {
    "tokenizer_sha256": "another tokenizer",
    "corpus_digest": "another corpus",
    "step": "trained for longer",
    "rows_digest": "trained on other rows, or in another order",
    "block_cross_document_attention": "one saw the other documents of a row",
    "eval_rows_digest": "read on other held-out rows",
}


def check_twins(runs: list[RunRecord]) -> None:
    """UserError unless the runs read the same rows in the same order with the same tokenizer, and are read on the same.

    Also where there is no held-out figure to compare.
    """
    facts = []
    for run in runs:
        if run.figures.nats_per_token is None:
            raise UserError(f"{run.workdir} has no held-out figure (it is null); llada evaluate shows why")
        blocked = run.config.objective.block_cross_document_attention
        known = {"block_cross_document_attention": blocked, "eval_rows_digest": run.figures.rows_digest}
        facts.append((str(run.workdir), run.summary | known))
    held_out.require_same(facts, _SAME, "train, or evaluate, both alike")


def _loss(run: RunRecord) -> str:
    return gaps.value(run.figures)


def _objective(run: RunRecord) -> str:
    variant = run.config.objective.variant or "the paper's"
    return variant if run.family.bound_trained(run.config.objective) else f"{variant}: not a bound"


def _below_unigram(run: RunRecord) -> float | None:
    entropy, nats = run.summary["unigram_entropy_nats"], run.figures.nats_per_token
    return None if entropy is None or nats is None else entropy - nats


ROWS: tuple[tuple[str, Callable[[RunRecord], str]], ...] = (
    ("training objective", _objective),
    ("parameters", lambda r: f"{r.summary['parameters']:,}"),
    ("without embeddings", lambda r: f"{r.summary['non_embedding_parameters']:,}"),
    ("tokens", lambda r: f"{r.summary['tokens']:,}"),
    ("FLOPs, 6ND", lambda r: f"{r.summary['flops_6nd']:.3e}"),
    ("FLOPs, exact", lambda r: f"{r.summary['flops_exact']:.3e}"),
    ("held-out nats/token", _loss),
    ("held-out bits/byte", lambda r: or_dash(r.figures.bits_per_byte, ".4f")),
    ("held-out rows", lambda r: or_dash(r.figures.rows, ",")),
    ("draws a row", lambda r: "-" if r.family.exact else or_dash(r.figures.draws, ",")),
    ("estimator", lambda r: str(r.figures.estimator or "-")),
    ("parameters in", lambda r: str(r.figures.dtype or "-")),
    ("below unigram entropy, nats", lambda r: or_dash(_below_unigram(r), ".4f")),
    ("training tokens/s", lambda r: or_dash(r.summary["tokens_per_second"], ",.0f")),
    ("seconds", lambda r: or_dash(r.summary["seconds"], ",.0f")),
)


def table(runs: list[RunRecord]) -> list[list[str]]:
    """Header and rows of strings: one column per run."""
    header = ["", *(f"{run.name} ({'exact NLL' if run.family.exact else 'bound'})" for run in runs)]
    return [header, *([label, *(show(run) for run in runs)] for label, show in ROWS)]


def draw_curves(runs: list[RunRecord]) -> bytes:
    """`curves.png`: held-out nats per token (with two standard errors) and training loss against training FLOPs."""
    title = f"Same size, same {runs[0].summary['tokens'] / 1e6:.2f} M tokens"
    fig, (ax,) = figure.panels(1, title, "Points: held out, two standard errors. Faint lines: training loss.")
    styles = figure.styles(run.series.key for run in runs)
    for run in runs:
        colour, marker = styles[run.series]
        flops, losses, _ = _curve(run, "train/loss_nats_per_token")
        ax.plot(flops, losses, color=colour, alpha=0.3, linewidth=1)
        flops, losses, errors = _curve(run, "eval/nats_per_token")
        label = f"{run.name}: held-out {run.family.measure} {or_dash(run.figures.nats_per_token, '.2f')}"
        ax.errorbar(flops, losses, errors, color=colour, marker=marker, capsize=3, label=label)
    entropy = runs[0].summary["unigram_entropy_nats"]
    if entropy is not None:
        ax.axhline(entropy, color="0.4", linestyle="--", linewidth=1)
        at, style = (0.99, entropy), dict(ha="right", va="bottom", fontsize=9, color="0.3")
        ax.annotate(f"unigram entropy {entropy:.2f}", at, xycoords=("axes fraction", "data"), **style)
    ax.set(xscale="log", xlabel="training FLOPs (all matrix products)", ylabel="nats per token")
    ax.legend(frameon=False, loc="lower left")
    return figure.png(fig)


def _curve(run: RunRecord, key: str) -> tuple[list[float], list[float], list[float]]:
    """FLOPs, values of `key`, and two standard errors (0 if not known), of the lines of metrics.jsonl with that key."""
    lines = [line for line in run.lines if is_number(line.get(key)) and is_number(line.get("train/flops_exact"))]
    errors = [line.get("eval/stderr") for line in lines]
    return (
        [line["train/flops_exact"] for line in lines],
        [line[key] for line in lines],
        [2 * max(error, 0.0) if is_number(error) else 0.0 for error in errors],
    )


def report(
    runs: list[RunRecord],
    samples: list[Sampled],
    out: Path,
    remarks: list[str],
    measured: list[list[str]] | None = None,
) -> str:
    """`report.md`: what was trained, the table, the gaps `measured`, the curves, the samples, and how to go on."""
    entropy = runs[0].summary["unigram_entropy_nats"]
    texts = "\n\n".join(f"**{s.title}**, given {_code(s.prompt)}:\n\n{_block(s.text)}" for s in samples)
    remarks = [*remarks, *filter(None, map(_changed, runs))]
    noted, first = "".join(f"\n\n{remark}." for remark in remarks), shlex.quote(str(runs[0].workdir))
    bounds, exact = (" and ".join(run.name for run in runs if run.family.exact is kind) for kind in (False, True))
    both, every = ("Both", "both") if len(runs) == 2 else ("All", "every")
    figure_of = "figure is an upper bound on its" if bounds.count(" and ") == 0 else "figures are upper bounds on their"
    explained = (
        f"The {bounds} {figure_of} negative log-likelihood (Eq. (6), Monte Carlo), the {exact} "
        f"figure is exact: the true gap is at most the one shown. {_provenance(runs)} Errors are standard errors over "
        f"held-out rows; what another seed would change is not in them. {both} runs read the same rows in the same "
        f"order (`rows_digest` {runs[0].summary['rows_digest'][:16]}... in {every} `summary.json`)."
    )
    if entropy is not None:
        explained += f" A model that knew only how often each token occurs would reach {entropy:.4f} nats per token."
    explained += (
        " FLOPs are those of training: 6 x parameters without embeddings x tokens, and a count of all matrix products. "
        "Tokens per second are of this machine."
    )
    return f"""# {" and ".join(run.name for run in runs)} on the same tokens

{markdown_table(table(runs))}{noted}

{textwrap.fill(explained, 120)}
{_gap_section(measured)}
![nats per token against training FLOPs](curves.png)

## Samples

{texts}

## How to go on

    llada sample --workdir={first} --prompt='def main():' --temperature=0.7
    llada sample --workdir={first} --infill='for i in [MASK:6]:'
    llada evaluate --workdir={first} --draws=64
    llada train --config=experiments/quickstart.py:llada --workdir=runs/longer --config.train.steps=20000
    llada train --config=experiments/quickstart.py:llada --workdir=runs/mine --config.data.source='text:/my/**/*.txt'
    llada export --workdir={first} --out=runs/for_pytorch
    tensorboard --logdir={shlex.quote(_above(runs, out))}
"""


def _gap_section(measured: list[list[str]] | None) -> str:
    if not measured:
        return ""
    return f"""
## The gap by each measure

{markdown_table(measured)}

{textwrap.fill(gaps.EXPLAINED, 120)}
"""


def _changed(run: RunRecord) -> str:
    """What a run did not do as planned from the start, in a sentence without its stop; "" for nothing."""
    said = list(changes.described(run.config))
    said += [
        f"after step {now}: back to the parameters of step {then}, without the batches between"
        for then, now in run.summary.get("rolled_back") or []
    ]
    return f"{run.name} was changed while it trained: {'; '.join(said)}" if said else ""


def _provenance(runs: list[RunRecord]) -> str:
    """Which evaluation the figures are of."""
    f = runs[0].figures
    rows = "the same held-out rows" if f.rows is None else f"the same {f.rows:,} held-out rows"
    by = "as training ended" if f.source == "training" else "by llada evaluate"
    draws = "; ".join(
        f"{run.name} {run.figures.draws} draws a row ({run.figures.estimator})" for run in runs if not run.family.exact
    )
    both = "Both" if len(runs) == 2 else "All"
    return f"{both} figures are of {rows}, {by}{f': {draws}' if draws else ''}."


def _above(runs: list[RunRecord], out: Path) -> str:
    """The directory that TensorBoard finds both runs in."""
    if all(run.workdir.resolve().is_relative_to(out.resolve()) for run in runs):
        return str(out)
    return os.path.commonpath([run.workdir.absolute() for run in runs])


def _code(text: str) -> str:
    """A span of code in Markdown, whatever is in it, on one line."""
    text = " ".join(text.splitlines())
    ticks = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    return f"{ticks} {text} {ticks}" if len(ticks) > 1 else f"`{text}`"


def _block(text: str) -> str:
    """A block of code in Markdown, whatever is in it."""
    fence = "~" * max(3, max(map(len, re.findall("~+", text)), default=0) + 1)
    return f"{fence}python\n{text.rstrip()}\n{fence}"
