"""Two finished runs side by side: the figures in a table, loss against FLOPs as a picture, a report in Markdown.

Reads what training wrote (`summary.json`, `metrics.jsonl`, `evaluation.json`); computes nothing a model is needed for.
"""

import json
from pathlib import Path
from typing import NamedTuple

from llada import config as config_lib
from llada.errors import UserError
from llada.training import metrics as metrics_lib


class RunRecord(NamedTuple):
    """One run as its workdir tells it."""

    name: str
    workdir: Path
    config: config_lib.Config
    summary: dict
    lines: list[dict]


class Sampled(NamedTuple):
    """One generated text: what was asked, by which settings, and what came."""

    title: str
    given: str
    text: str


def read_run(name: str, workdir: Path) -> RunRecord:
    """A finished run; a separate evaluation of its last step takes the place of the one made while training."""
    path, settings = workdir / "summary.json", workdir / "config.json"
    for needed in (settings, path):
        if not needed.exists():
            raise UserError(f"{workdir} holds no {needed.name}; let llada train finish there first")
    summary = json.loads(path.read_text())
    evaluation = workdir / "evaluation.json"
    if evaluation.exists():
        found = json.loads(evaluation.read_text())
        if found["step"] == summary["step"]:
            summary["eval_nats_per_token"] = found["nats_per_token"]
            summary["eval_stderr"] = found["stderr"]
            summary["eval_bits_per_byte"] = found["bits_per_byte"]
    return RunRecord(name, workdir, config_lib.load(settings), summary, metrics_lib.read(workdir / "metrics.jsonl"))


def check_twins(runs: list[RunRecord]) -> None:
    """UserError unless the runs read the same rows in the same order with the same tokenizer."""
    places = " and ".join(str(run.workdir) for run in runs)
    for key in ("tokenizer_sha256", "corpus_digest", "rows_digest"):
        values = {run.summary[key] for run in runs}
        if len(values) > 1:
            raise UserError(f"{places} differ in {key}, so their losses do not compare; train both on the same data")
    if len({run.config.objective.block_cross_document_attention for run in runs}) > 1:
        raise UserError(
            f"{places} differ in objective.block_cross_document_attention: one saw the other documents of a row, so "
            "their losses do not compare; train both alike"
        )


ROWS = (
    ("parameters", lambda s: f"{s['parameters']:,}"),
    ("without embeddings", lambda s: f"{s['non_embedding_parameters']:,}"),
    ("tokens", lambda s: f"{s['tokens']:,}"),
    ("FLOPs, 6ND", lambda s: f"{s['flops_6nd']:.3e}"),
    ("FLOPs, exact", lambda s: f"{s['flops_exact']:.3e}"),
    ("held-out nats/token", lambda s: f"{s['eval_nats_per_token']:.4f} ± {s['eval_stderr']:.4f}"),
    ("held-out bits/byte", lambda s: f"{s['eval_bits_per_byte']:.4f}"),
    ("below unigram entropy, nats", lambda s: f"{s['unigram_entropy_nats'] - s['eval_nats_per_token']:.4f}"),
    ("training tokens/s", lambda s: f"{s['tokens_per_second']:,.0f}"),
    ("seconds", lambda s: f"{s['seconds']:,.0f}"),
)


def table(runs: list[RunRecord]) -> list[list[str]]:
    """Header and rows of strings: one column per run."""
    kinds = {"diffusion": "bound", "autoregressive": "exact NLL"}
    header = ["", *(f"{run.name} ({kinds[run.summary['objective']]})" for run in runs)]
    return [header, *([label, *(show(run.summary) for run in runs)] for label, show in ROWS)]


def markdown_table(cells: list[list[str]]) -> str:
    """The table in Markdown, columns padded so that it reads as plain text too."""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def draw_curves(runs: list[RunRecord], path: Path) -> None:
    """`curves.png`: held-out nats per token (with two standard errors) and training loss against training FLOPs."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("curves need matplotlib: pip install 'llada-jax[plots]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), dpi=150)
    for run, colour in zip(runs, ("#c8553d", "#2a6f97", "#588157", "#7f5539"), strict=False):
        train = [line for line in run.lines if "train/loss_nats_per_token" in line]
        held_out = [line for line in run.lines if "eval/nats_per_token" in line]
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
            yerr=[2 * line["eval/stderr"] for line in held_out],
            color=colour,
            marker="o",
            capsize=3,
            label=f"{run.name}: held-out {kind} {run.summary['eval_nats_per_token']:.2f}",
        )
    entropy = runs[0].summary["unigram_entropy_nats"]
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
    figure.savefig(path)
    plt.close(figure)


def report(runs: list[RunRecord], samples: list[Sampled], out: Path) -> str:
    """`report.md`: what was trained, the table, the curves, the samples, and how to go on."""
    entropy = runs[0].summary["unigram_entropy_nats"]
    shown = "\n\n".join(f"**{s.title}**, given `{s.given}`:\n\n~~~python\n{s.text.rstrip()}\n~~~" for s in samples)
    names = " and ".join(run.name for run in runs)
    return f"""# {names} on the same tokens

{markdown_table(table(runs))}

The LLaDA figure is an upper bound on its negative log-likelihood (Eq. (6), Monte Carlo), the ARM figure is exact: the
true gap is at most the one shown. Errors are standard errors over held-out rows; what another seed would change is not
in them. Both runs read the same rows in the same order (`rows_digest` {runs[0].summary["rows_digest"][:16]}... in both
`summary.json`). A model that knew only how often each token occurs would reach {entropy:.4f} nats per token. FLOPs are
those of training: 6 x parameters without embeddings x tokens, and a count of all matrix products. Tokens per second are
of this machine.

![nats per token against training FLOPs](curves.png)

## Samples

{shown}

## How to go on

    llada sample --workdir={runs[0].workdir} --prompt='def main():' --temperature=0.7
    llada sample --workdir={runs[0].workdir} --infill='for i in [MASK:6]:'
    llada evaluate --workdir={runs[0].workdir} --draws=64
    llada train --config=experiments/quickstart.py:llada --workdir=runs/longer --config.train.steps=20000
    llada train --config=experiments/quickstart.py:llada --workdir=runs/mine --config.data.source='text:/my/**/*.txt'
    llada export --workdir={runs[0].workdir} --out=runs/for_pytorch
    tensorboard --logdir={out}
"""
