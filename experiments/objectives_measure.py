"""What the models of a ranking predict, write and fill in: the measurements behind the page of objectives_report.py.

python experiments/objectives_measure.py --ranking=DIR/ranking --judge=DIR/judge --out=DIR/measured.json

Of every series (plain LLaDA and its variants) the runs of all seeds at the largest size and budget:
  by_time  nats per masked token of held-out rows with t of their tokens masked
  samples  texts of one row's length, written from masks alone in two orders at temperature 1: the judge's NLL, the
           entropy of their tokens and the share of 4-grams that are not new, as of held-out text
  infill   tokens of held-out rows that low-confidence decoding gets right where a share of them is masked
Rows, masks and seeds are the same for all. Called again it goes on with the models that OUT does not have yet.
Shapes: N rows, L tokens, T times, V vocabulary.
"""

import argparse
import functools
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import llada
from llada import json_files
from llada.config import ObjectiveConfig
from llada.data.checksums import CheckedRows
from llada.errors import UserError
from llada.evaluation import validation
from llada.files import write_atomically
from llada.inference import canvas, generation, sampler
from llada.inference.settings import SamplerConfig
from llada.model import transformer
from llada.objectives import diffusion, families
from llada.objectives.contract import segments
from llada.scaling import results
from llada.scaling.results import FINISHED, Result
from llada.training.run import Run, corpus_of_run

TIMES = (1 / 64, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
ORDERS = ("low_confidence", "random")
SHARES = (0.25, 0.5)
TEXTS = 64
N_GRAM = 4
AT_ONCE = 64  # rows of one forward pass


def largest(readings: list[Result]) -> list[Result]:
    """The runs to look at: all series and seeds, at the largest size and budget. UserError where there are none."""
    mask_predictors = [r for r in readings if r.family.masks and r.status == FINISHED and r.measured]
    if not mask_predictors:
        raise UserError("the ranking has no finished run of a mask predictor; run llada sweep on it first")
    size, budget = max((r.non_embedding_parameters, r.budget) for r in mask_predictors)
    return [r for r in mask_predictors if (r.non_embedding_parameters, r.budget) == (size, budget)]


def spread_rows(rows_NL: np.ndarray, count: int) -> np.ndarray:
    """`count` of the rows, evenly: neighbours come from one document."""
    return np.asarray(rows_NL[np.linspace(0, len(rows_NL) - 1, min(count, len(rows_NL))).astype(int)], np.int32)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _nats_by_time(model, objective, special, times, params, tokens_BL, row_B):
    """Nats of the masked tokens (T, B), and how many those are."""
    predict = functools.partial(transformer.hidden, model, params, segments_BL=segments(tokens_BL, special, objective))
    head_VD, all_BL = transformer.head(model, params), jnp.ones(tokens_BL.shape, bool)
    return diffusion.nats_by_time(
        predict, head_VD, tokens_BL, row_B, special, times, objective.head_rows, all_BL, all_BL
    )


def by_time(run: Run, rows_NL: np.ndarray, times: tuple[float, ...] = TIMES) -> list[float]:
    """Nats per masked token at each of `times`; the masks of a row are the same for every model."""
    o = run.config.objective
    # What of the objective the network sees: with nothing else in it, one program serves all variants.
    seen = ObjectiveConfig(block_cross_document_attention=o.block_cross_document_attention, head_rows=o.head_rows)
    sums_of = functools.partial(_nats_by_time, run.config.model, seen, run.tokenizer.special, times, run.params)
    index_N = np.arange(len(rows_NL), dtype=np.int32)
    batches = np.split(index_N, range(AT_ONCE, len(rows_NL), AT_ONCE))
    sums = [[np.asarray(x_TB, np.float64) for x_TB in sums_of(rows_NL[i_B], i_B)] for i_B in batches]
    nats_T, count_T = (np.concatenate(x, axis=1).sum(axis=1) for x in zip(*sums, strict=True))
    return (nats_T / count_T).tolist()


def texts(run: Run, order: str, count: int, L: int) -> np.ndarray:
    """`ids_NL`: texts written from masks alone, a token a step; with `random` order samples of the model as trained."""
    requests = [
        generation.Request(prompt="", gen_length=L, temperature=1.0, remasking=order, seed=seed)
        for seed in range(count)
    ]
    return np.array([text.ids for text in generation.generate(run.config, run.params, run.tokenizer, requests)])


def infilled(run: Run, rows_NL: np.ndarray, share: float) -> list[int]:
    """How many of the masked tokens of each row are written as they were, by low confidence, a token a step."""
    config, special, (N, L) = run.config.model, run.tokenizer.special, rows_NL.shape
    count = max(1, round(share * L))
    rank_NL = np.random.default_rng(0).permuted(np.tile(np.arange(L), (N, 1)), axis=1)
    masked_NL = rank_NL < count
    canvas_NL = np.where(masked_NL, run.tokenizer.special.mask_id, rows_NL)
    settings = SamplerConfig(steps=count, block_length=count)
    forbidden_V = canvas.forbidden_ids(run.tokenizer, config.vocab_size)
    right: list[int] = []
    for i in range(0, N, AT_ONCE):
        written = sampler.reverse_process(
            config, run.params, canvas_NL[i : i + AT_ONCE], settings, special, forbidden_V
        )
        right += (written.tokens_BL == rows_NL[i : i + AT_ONCE]).sum(axis=1, where=masked_NL[i : i + AT_ONCE]).tolist()
    return right


class Judge:
    """An ARM that scores texts."""

    def __init__(self, run: Run):
        """UserError for a model whose likelihood is not exact."""
        if not families.of(run.config).exact:
            raise UserError(f"--judge={run.workdir} is a mask predictor; give an ARM, experiments/objectives.py:judge")
        self.run = run
        self.nats = validation.jitted(run.config, run.tokenizer.special, run.mesh, "exact")

    def scores(self, ids_NL: np.ndarray) -> dict[str, Any]:
        """Of texts: NLL per token of each, and of all their tokens the entropy and the share of repeated 4-grams."""
        index_N = np.arange(len(ids_NL), dtype=np.int32)
        with jax.set_mesh(self.run.mesh):
            nats_N, _ = self.nats(self.run.params, ids_NL.astype(np.int32), index_N)
        per_token_N = np.asarray(nats_N, np.float64) / ids_NL.shape[1]
        return {"nats": per_token_N.tolist(), "entropy": entropy(ids_NL), "repeated": repeated(ids_NL)}


def entropy(ids_NL: np.ndarray) -> float:
    """Of the tokens of all texts together, in nats."""
    share_V = np.unique(ids_NL, return_counts=True)[1] / ids_NL.size
    return float(-(share_V * np.log(share_V)).sum())


def repeated(ids_NL: np.ndarray, n: int = N_GRAM) -> float:
    """The share of n-grams that occurred before, in the same text or another one."""
    grams = np.lib.stride_tricks.sliding_window_view(ids_NL, n, axis=1).reshape(-1, n)
    return 1 - len(np.unique(grams, axis=0)) / len(grams)


def measure(run: Run, judge: Judge, rows_NL: np.ndarray, settings: dict[str, Any]) -> dict[str, Any]:
    """All measurements of one model."""
    L, rows = rows_NL.shape[1], spread_rows(rows_NL, settings["infill_rows"])
    with jax.set_mesh(run.mesh):
        return {
            "by_time": by_time(run, spread_rows(rows_NL, settings["time_rows"]), tuple(settings["times"])),
            "infill": {f"{share:g}": infilled(run, rows, share) for share in settings["shares"]},
            "samples": {order: judge.scores(texts(run, order, settings["texts"], L)) for order in settings["orders"]},
        }


def reference(judge: Judge, rows_NL: np.ndarray, count: int, times: int) -> list[dict[str, Any]]:
    """Held-out text in the same numbers: `times` sets of `count` rows."""
    rows_NL = spread_rows(rows_NL, count * times)
    return [judge.scores(rows_NL[i::times]) for i in range(times)]


def measure_all(ranking: Path, judge_dir: Path, out: Path, settings: dict[str, Any]) -> None:
    """Write `out`, model by model. UserError where judge and ranking have other rows or tokenizers."""
    looked_at = largest(results.read_csv(ranking / "results.csv"))
    judge = Judge(llada.load(judge_dir))
    rows_NL = shared_rows(judge_dir, judge.run, ranking / "runs" / looked_at[0].run)
    summary = json_files.read(judge_dir / "summary.json")
    sets = len({r.seed for r in looked_at})
    head = {
        "settings": settings,
        "judge": {key: summary[key] for key in ("parameters", "tokens", "step", "eval_nats_per_token", "eval_stderr")},
        "held_out": reference(judge, rows_NL, settings["texts"], sets),
    }
    head = json.loads(json_files.dumps(head))
    before = json_files.read(out) if out.exists() else {}
    runs = before["runs"] if all(before.get(key) == head[key] for key in ("settings", "judge")) else {}
    for i, r in enumerate(looked_at, 1):
        if r.run not in runs:
            sys.stderr.write(f"[{i}/{len(looked_at)}] {r.run}\n")
            runs[r.run] = measure(llada.load(ranking / "runs" / r.run), judge, rows_NL, settings)
            write_atomically(out, (json_files.dumps(head | {"runs": runs}) + "\n").encode())


def shared_rows(judge_dir: Path, judge: Run, workdir: Path) -> np.ndarray:
    """The held-out rows (N, L) of judge and ranking. UserError where those are two."""
    run = llada.load(workdir)
    mine, theirs = (
        corpus_of_run(path, r.config, r.tokenizer, r.corpus_digest) for path, r in ((judge_dir, judge), (workdir, run))
    )
    if mine.metadata.digest != theirs.metadata.digest:
        raise UserError(f"--judge={judge_dir} was trained on other rows than {workdir}; train it on those")
    rows_NL = mine.held_out(judge.config, judge.tokenizer)
    assert isinstance(rows_NL, CheckedRows)  # of documents: judges are not fine-tuned
    return rows_NL[:]


SETTINGS = {
    "times": list(TIMES),
    "time_rows": 512,
    "orders": list(ORDERS),
    "texts": TEXTS,
    "n_gram": N_GRAM,
    "shares": list(SHARES),
    "infill_rows": 256,
}


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranking", type=Path, required=True, help="sweep of experiments/objectives.py:quick or :full")
    parser.add_argument("--judge", type=Path, required=True, help="workdir of an ARM on the same rows")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; one of an earlier call is completed")
    arguments = parser.parse_args()
    try:
        measure_all(arguments.ranking, arguments.judge, arguments.out, SETTINGS)
    except (UserError, OSError) as error:
        parser.exit(2, f"objectives_measure.py: {error}\n")


if __name__ == "__main__":
    main()
