"""Two finished runs side by side: the figures in a table, loss against FLOPs as a picture, a report in Markdown.

Reads what training wrote (`summary.json`, `metrics.jsonl`, `evaluation.json`); computes nothing a model is needed for.
"""

import io
import math
import os
import re
import shlex
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

from llada import config as config_lib
from llada import json_files
from llada.errors import UserError
from llada.scaling import figure as figure_lib
from llada.scaling.held_out import require_same as same_data
from llada.training import metrics as metrics_lib


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


class RunRecord(NamedTuple):
    """One run as its workdir tells it: figures of its training, and of a separate evaluation where there is one."""

    name: str
    workdir: Path
    config: config_lib.Config
    summary: dict
    lines: list[dict]
    figures: Figures
    evaluated: Figures | None
    remark: str | None  # on an evaluation that cannot be used


class Sampled(NamedTuple):
    """One generated text: what was asked, by which settings, and what came."""

    title: str
    given: str
    text: str


# What the table, the picture and the checks take from summary.json.
_NUMBERS = ("step", "parameters", "non_embedding_parameters", "tokens", "flops_6nd", "flops_exact")
_NUMBERS_OR_NONE = ("eval_nats_per_token", "eval_stderr", "eval_bits_per_byte", "unigram_entropy_nats",
                    "tokens_per_second", "seconds", "eval_rows", "eval_draws")  # fmt: skip
_WORDS = ("objective", "rows_digest", "corpus_digest", "tokenizer_sha256")


def read_run(name: str, workdir: Path, objective: str, flag: str) -> RunRecord:
    """A finished run of the family `objective`, given to `flag`. UserError for what is none, or damaged."""
    path, settings = workdir / "summary.json", workdir / "config.json"
    for needed in (settings, path):
        if not needed.exists():
            raise UserError(f"{flag}={workdir} holds no {needed.name}; let llada train finish there first")
    config, summary = config_lib.load(settings), json_files.finite(json_files.read(path))
    summary = dict.fromkeys(_NUMBERS_OR_NONE) | summary
    for keys, ok, what in (
        (_NUMBERS, lambda v: _is_number(v), "a number"),
        (_NUMBERS_OR_NONE, lambda v: v is None or _is_number(v), "a number or null"),
        (_WORDS, lambda v: isinstance(v, str), "a text"),
    ):
        for key in keys:
            if not ok(summary.get(key)):
                raise UserError(f"{path}: {key} is {str(summary.get(key))[:40]!r} and not {what}; train the run again")
    for found, where in ((summary["objective"], path), (config.objective.name, settings)):
        if found != objective:
            raise UserError(
                f"{flag}={workdir} is a run of {found[:40]!r} by {where.name}, not of {objective!r}; "
                "--llada is for a LLaDA and --arm for an ARM"
            )
    exact = objective == "autoregressive"
    of_training = Figures(
        *(summary[f"eval_{key}"] for key in ("nats_per_token", "stderr", "bits_per_byte")),
        summary["eval_rows"],
        1 if exact else summary["eval_draws"] or config.evaluate.draws,
        "exact" if exact else "l_of_L",
        summary.get("eval_rows_digest"),
        "float32",
        "training",
    )
    evaluated, remark = _evaluation(workdir / "evaluation.json", summary["step"])
    lines = metrics_lib.read(workdir / "metrics.jsonl")
    return RunRecord(name, workdir, config, summary, lines, of_training, evaluated, remark)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _evaluation(path: Path, step: int) -> tuple[Figures | None, str | None]:
    """What llada evaluate left behind, of `step` and with the digest of its rows; or else a remark why not."""
    if not path.exists():
        return None, None
    found = json_files.finite(json_files.read(path))
    if found.get("step") != step:
        return None, f"{path} is of step {str(found.get('step'))[:20]}, not {step}, and is not used"
    if not isinstance(found.get("eval_rows_digest"), str):
        return None, f"{path} does not say which rows it read, and is not used; llada evaluate writes a new one"
    for key, optional in (("nats_per_token", False), ("stderr", True), ("bits_per_byte", True), ("rows", True),
                          ("draws", True)):  # fmt: skip
        if not (_is_number(found.get(key)) or (optional and found.get(key) is None)):
            raise UserError(f"{path}: {key} is {str(found.get(key))[:40]!r} and not a number; run llada evaluate again")
    names = ("nats_per_token", "stderr", "bits_per_byte", "rows", "draws", "estimator", "eval_rows_digest",
             "dtype")  # fmt: skip
    return Figures(*(found.get(name) for name in names), "llada evaluate"), None


def settle(runs: list[RunRecord]) -> tuple[list[RunRecord], list[str]]:
    """The runs with the figures that compare, and remarks on those left out.

    Evaluations take the place of training's figures where all runs have one of the same rows.
    """
    remarks = [run.remark for run in runs if run.remark]
    evaluated = [run.evaluated for run in runs if run.evaluated]
    if len(evaluated) == len(runs) and len({figures.rows_digest for figures in evaluated}) == 1:
        return [run._replace(figures=run.evaluated) for run in runs], remarks
    why = "they are of different rows" if len(evaluated) == len(runs) else "the other has none to go with it"
    remarks += [f"{run.workdir / 'evaluation.json'} is not used: {why}" for run in runs if run.evaluated]
    return runs, remarks


def check_twins(runs: list[RunRecord]) -> None:
    """UserError unless the runs read the same rows in the same order with the same tokenizer, and are read on the same.

    Also where there is no held-out figure to compare.
    """
    for run in runs:
        if run.figures.nats_per_token is None:
            raise UserError(f"{run.workdir} has no held-out figure (it is null); llada evaluate tells why")
    keys = {
        "tokenizer_sha256": "another tokenizer",
        "corpus_digest": "another corpus",
        "step": "trained for longer",
        "rows_digest": "trained on other rows, or in another order",
        "block_cross_document_attention": "one saw the other documents of a row",
        "eval_rows_digest": "read on other held-out rows",
    }
    facts = [
        run.summary
        | {
            "block_cross_document_attention": run.config.objective.block_cross_document_attention,
            "eval_rows_digest": run.figures.rows_digest,
        }
        for run in runs
    ]
    names = [str(run.workdir) for run in runs]
    same_data(list(zip(names, facts, strict=True)), keys, "train, or evaluate, both alike")


def _show(value: float | None, form: str) -> str:
    return "-" if value is None or (isinstance(value, float) and not math.isfinite(value)) else format(value, form)


def _loss(run: RunRecord) -> str:
    f = run.figures
    return _show(f.nats_per_token, ".4f") + ("" if f.stderr is None else f" ± {f.stderr:.4f}")


def _below_unigram(run: RunRecord) -> float | None:
    entropy, nats = run.summary["unigram_entropy_nats"], run.figures.nats_per_token
    return None if entropy is None or nats is None else entropy - nats


ROWS = (
    ("parameters", lambda r: f"{r.summary['parameters']:,}"),
    ("without embeddings", lambda r: f"{r.summary['non_embedding_parameters']:,}"),
    ("tokens", lambda r: f"{r.summary['tokens']:,}"),
    ("FLOPs, 6ND", lambda r: f"{r.summary['flops_6nd']:.3e}"),
    ("FLOPs, exact", lambda r: f"{r.summary['flops_exact']:.3e}"),
    ("held-out nats/token", _loss),
    ("held-out bits/byte", lambda r: _show(r.figures.bits_per_byte, ".4f")),
    ("held-out rows", lambda r: _show(r.figures.rows, ",")),
    ("draws a row", lambda r: "-" if r.figures.estimator == "exact" else _show(r.figures.draws, ",")),
    ("estimator", lambda r: str(r.figures.estimator or "-")),
    ("parameters in", lambda r: str(r.figures.dtype or "-")),
    ("below unigram entropy, nats", lambda r: _show(_below_unigram(r), ".4f")),
    ("training tokens/s", lambda r: _show(r.summary["tokens_per_second"], ",.0f")),
    ("seconds", lambda r: _show(r.summary["seconds"], ",.0f")),
)


def table(runs: list[RunRecord]) -> list[list[str]]:
    """Header and rows of strings: one column per run."""
    kinds = {"diffusion": "bound", "autoregressive": "exact NLL"}
    header = ["", *(f"{run.name} ({kinds[run.summary['objective']]})" for run in runs)]
    return [header, *([label, *(show(run) for run in runs)] for label, show in ROWS)]


def markdown_table(cells: list[list[str]]) -> str:
    """The table in Markdown, columns padded so that it reads as plain text too."""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def draw_curves(runs: list[RunRecord]) -> bytes:
    """`curves.png`: held-out nats per token (with two standard errors) and training loss against training FLOPs."""
    figure_lib.require_matplotlib()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), dpi=150)
    for run, colour in zip(runs, ("#c8553d", "#2a6f97", "#588157", "#7f5539"), strict=False):
        train, held_out = (
            [line for line in run.lines if _is_number(line.get(key)) and _is_number(line.get("train/flops_exact"))]
            for key in ("train/loss_nats_per_token", "eval/nats_per_token")
        )
        errors = [line.get("eval/stderr") for line in held_out]
        axes.plot(
            [line["train/flops_exact"] for line in train],
            [line["train/loss_nats_per_token"] for line in train],
            color=colour,
            alpha=0.3,
            linewidth=1,
        )
        kind = "bound" if run.summary["objective"] == "diffusion" else "NLL"
        axes.errorbar(
            [line["train/flops_exact"] for line in held_out],
            [line["eval/nats_per_token"] for line in held_out],
            yerr=[2 * error if _is_number(error) and error >= 0 else 0.0 for error in errors],
            color=colour,
            marker="o",
            capsize=3,
            label=f"{run.name}: held-out {kind} {_show(run.figures.nats_per_token, '.2f')}",
        )
    entropy = runs[0].summary["unigram_entropy_nats"]
    if entropy is not None:
        axes.axhline(entropy, color="0.4", linestyle="--", linewidth=1)
        axes.annotate(
            f"unigram entropy {entropy:.2f}", (0.99, entropy), xycoords=("axes fraction", "data"),
            ha="right", va="bottom", fontsize=9, color="0.3",
        )  # fmt: skip
    axes.set(
        xscale="log",
        xlabel="training FLOPs (all matrix products)",
        ylabel="nats per token",
        title=f"Same size, same {runs[0].summary['tokens'] / 1e6:.2f} M tokens",
    )
    axes.legend(frameon=False, loc="lower left")
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    figure.text(0.99, 0.01, "points: held-out, two standard errors; faint lines: training loss", ha="right", fontsize=7)
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    image = io.BytesIO()
    figure.savefig(image, format="png")
    plt.close(figure)
    return image.getvalue()


def report(runs: list[RunRecord], samples: list[Sampled], out: Path, remarks: list[str]) -> str:
    """`report.md`: what was trained, the table, the curves, the samples, and how to go on."""
    entropy = runs[0].summary["unigram_entropy_nats"]
    shown = "\n\n".join(f"**{s.title}**, given {_code(s.given)}:\n\n{_block(s.text)}" for s in samples)
    names = " and ".join(run.name for run in runs)
    own = shlex.quote(str(runs[0].workdir))
    unigram = "" if entropy is None else (
        f" A model that knew only how often each token occurs would reach {entropy:.4f} nats per token."
    )  # fmt: skip
    told = "".join(f"\n\n{remark}." for remark in remarks)
    explained = textwrap.fill(
        "The LLaDA figure is an upper bound on its negative log-likelihood (Eq. (6), Monte Carlo), the ARM figure is "
        f"exact: the true gap is at most the one shown. {_provenance(runs)} Errors are standard errors over held-out "
        "rows; what another seed would change is not in them. Both runs read the same rows in the same order "
        f"(`rows_digest` {runs[0].summary['rows_digest'][:16]}... in both `summary.json`).{unigram} FLOPs are those of "
        "training: 6 x parameters without embeddings x tokens, and a count of all matrix products. Tokens per second "
        "are of this machine.",
        120,
    )
    return f"""# {names} on the same tokens

{markdown_table(table(runs))}{told}

{explained}

![nats per token against training FLOPs](curves.png)

## Samples

{shown}

## How to go on

    llada sample --workdir={own} --prompt='def main():' --temperature=0.7
    llada sample --workdir={own} --infill='for i in [MASK:6]:'
    llada evaluate --workdir={own} --draws=64
    llada train --config=experiments/quickstart.py:llada --workdir=runs/longer --config.train.steps=20000
    llada train --config=experiments/quickstart.py:llada --workdir=runs/mine --config.data.source='text:/my/**/*.txt'
    llada export --workdir={own} --out=runs/for_pytorch
    tensorboard --logdir={shlex.quote(_above(runs, out))}
"""


def _provenance(runs: list[RunRecord]) -> str:
    """Which evaluation the figures are of."""
    f = runs[0].figures
    rows = "the same held-out rows" if f.rows is None else f"the same {f.rows:,} held-out rows"
    by = "as training ended" if f.source == "training" else "by llada evaluate"
    draws = "; ".join(
        f"{run.name} {run.figures.draws} draws a row ({run.figures.estimator})"
        for run in runs
        if run.figures.estimator != "exact"
    )
    return f"Both figures are of {rows}, {by}{f': {draws}' if draws else ''}."


def _above(runs: list[RunRecord], out: Path) -> str:
    """The directory that TensorBoard finds both runs in."""
    if all(run.workdir.resolve().is_relative_to(out.resolve()) for run in runs):
        return str(out)
    return os.path.commonpath([run.workdir.absolute() for run in runs])


def _code(text: str) -> str:
    """A span of code in Markdown, whatever is in it, on one line."""
    text = " ".join(text.splitlines())
    ticks = "`" * (max((len(found) for found in re.findall("`+", text)), default=0) + 1)
    return f"{ticks} {text} {ticks}" if len(ticks) > 1 else f"`{text}`"


def _block(text: str) -> str:
    """A block of code in Markdown, whatever is in it."""
    fence = "~" * max(3, max((len(found) for found in re.findall("~+", text)), default=0) + 1)
    return f"{fence}python\n{text.rstrip()}\n{fence}"
