"""What a study of training objectives found, as numbers: from both sweeps and objectives_measure.py, for the page.

A difference is a variant's figure less plain LLaDA's, paired by the runs' seeds: equal seeds have the same initial
weights and rows. Seeds are few, so the variance of pairs is taken to be one for all variants, and pooled.
Units: nats per token; shares of 1.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from llada import config as config_lib
from llada import json_files
from llada.errors import UserError
from llada.objectives.families import DIFFUSION
from llada.scaling import results
from llada.scaling.results import Result
from llada.scaling.series import Series, of_key
from llada.training import metrics

LEVEL = 0.95
PLAIN = Series(DIFFUSION).key


class Claim(NamedTuple):
    """What a publication says of a variant, as a share of plain LLaDA's FLOPs: below 1, above 1 or about 1.

    `size`: the share that it gives, if any.
    """

    variant: str
    source: str
    text: str
    share: str
    size: float | None = None


BELOW, ABOVE, SAME = "below", "above", "same"
CLAIMS = (
    Claim("bell", "arXiv 2605.13026", "bell-shaped t: the same NLL in up to about a quarter of the steps", BELOW, 0.25),
    Claim("bell_bound", "arXiv 2605.13026", "the same, with weights that keep it an estimate of the bound", BELOW),
    Claim("band", "arXiv 2503.09573", "t away from 0 and 1: gradients of lower variance, a better bound", BELOW),
    Claim("clipped", "arXiv 2303.09556", "bounded weights train faster (there: Gaussian diffusion)", BELOW),
    Claim("flat", "arXiv 2602.15014", "plain cross-entropy: about 12 % fewer FLOPs at equal NLL", BELOW, 0.88),
    Claim("flat", "arXiv 2510.03280", "the bound's own weight 1/t ends better than plain cross-entropy", ABOVE),
    Claim("exact_count", "arXiv 2502.09992", "l of L tokens: the same bound as Eq. (3), of lower variance", SAME),
    Claim("complementary", "arXiv 2512.15745", "each row with m and not m: more is learned of every row", BELOW),
    Claim("complementary_flat", "arXiv 2512.15745", "the same with plain cross-entropy, as there", BELOW),
    Claim("clean_prefix", "arXiv 2608.09424", "clean prefixes: better (there: downstream tasks)", BELOW),
)


def verdict(claim: Claim, of: Mapping[str, Any] | None) -> str:
    """What a variant's entry of the ranking says of the claim, by the interval of its share alone."""
    if of is None or of["share"] is None:
        return "not tried"
    if not of["degrees_of_freedom"]:
        return "one seed cannot tell"
    value, low, high = (np.inf if of["share"][key] is None else of["share"][key] for key in ("value", "low", "high"))
    found = BELOW if high < 1 else ABOVE if low > 1 else SAME
    if found == SAME:
        return "no difference that this study can tell"
    if found != claim.share:
        return f"does not replicate: {'fewer' if found == BELOW else 'more'} FLOPs"
    if claim.size is None:
        return "replicates"
    if low <= claim.size <= high:
        return "replicates, in size too"
    return f"replicates, {'less' if abs(np.log(value)) < abs(np.log(claim.size)) else 'more'} than claimed"


def paired(figures: Mapping[str, Mapping[int, Any]]) -> dict[str, dict[str, Any]]:
    """`mean` of each series over seeds, `spread` between them, and of variants the `difference` to plain LLaDA.

    `figures`: by key of the series and seed; a number or an array, whose entries are then figures of their own. The
    difference is None without a seed in common, `low` and `high` are None where no series has two.
    """
    arrays = {key: {seed: np.asarray(value, float) for seed, value in of.items()} for key, of in figures.items()}
    pairs: dict[str, np.ndarray] = {}
    for key, of in arrays.items():
        seeds = sorted(of.keys() & arrays[PLAIN].keys()) if key != PLAIN else []
        if seeds:
            pairs[key] = np.stack([of[seed] - arrays[PLAIN][seed] for seed in seeds])
    dof = sum(len(d_S) - 1 for d_S in pairs.values())
    squares = sum(((d_S - d_S.mean(axis=0)) ** 2).sum(axis=0) for d_S in pairs.values())
    found = {}
    for key, of in arrays.items():
        values_S = np.stack(list(of.values()))
        found[key] = {"mean": values_S.mean(axis=0).tolist(), "seeds": len(of), "spread": None, "difference": None}
        if len(of) > 1:
            found[key]["spread"] = values_S.std(axis=0, ddof=1).tolist()
        if key in pairs:
            stderr = np.sqrt(squares / dof / len(pairs[key])) if dof else None
            found[key]["difference"] = difference(pairs[key].mean(axis=0), stderr, dof)
    return found


def difference(value: Any, stderr: Any, dof: int) -> dict[str, Any]:
    """A difference with the ends of its interval by Student's t."""
    ends = (None, None)
    if stderr is not None:
        half = stats.t.ppf((1 + LEVEL) / 2, dof) * stderr
        ends = (np.subtract(value, half).tolist(), np.add(value, half).tolist())
    return {"value": np.asarray(value).tolist(), "low": ends[0], "high": ends[1], "degrees_of_freedom": dof}


def infilled(right: Mapping[str, Mapping[int, list[int]]], masked: int) -> dict[str, dict[str, Any]]:
    """Shares of `masked` tokens of a row that are right: as `paired`, and with a standard error over rows.

    The interval of a difference holds the variance between seeds and the one between rows, their sum being an upper
    bound on the variance of the mean.
    """
    shares = {key: {seed: np.array(n) / masked for seed, n in of.items()} for key, of in right.items()}
    found = paired({key: {seed: row_N.mean() for seed, row_N in of.items()} for key, of in shares.items()})
    by_row = {key: np.mean(list(of.values()), axis=0) for key, of in shares.items()}
    for key, row_N in by_row.items():
        found[key]["stderr"] = _stderr(row_N)
        d = found[key]["difference"]
        if d is not None and d["low"] is not None:
            dof = d["degrees_of_freedom"]
            of_seeds = (d["value"] - d["low"]) / stats.t.ppf((1 + LEVEL) / 2, dof)
            seeds = sorted(shares[key].keys() & shares[PLAIN].keys())
            over_N = np.mean([shares[key][seed] - shares[PLAIN][seed] for seed in seeds], axis=0)
            found[key]["difference"] = difference(d["value"], np.hypot(of_seeds, _stderr(over_N)), dof)
    return found


def _stderr(values_N: np.ndarray) -> float:
    return float(np.std(values_N, ddof=1) / np.sqrt(len(values_N)))


def samples(scores: Mapping[str, Mapping[int, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """What the judge says of each series' texts: `nats` as `paired`, with a standard error over texts, and the rest."""
    found = paired({key: {seed: np.mean(s["nats"]) for seed, s in of.items()} for key, of in scores.items()})
    for key, of in scores.items():
        found[key] |= of_texts(list(of.values()))
    return found


def of_texts(scores: list[dict[str, Any]]) -> dict[str, float]:
    """Of some sets of texts: the mean NLL of their tokens with a standard error over texts, and both their measures."""
    nats_N = np.concatenate([s["nats"] for s in scores])
    means = {name: float(np.mean([s[name] for s in scores])) for name in ("entropy", "repeated")}
    return {"nats": float(nats_N.mean()), "stderr": _stderr(nats_N)} | means


def gradients(lines_of_seeds: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Of the windows of all seeds: the norm's median, 90 % quantile and largest, and the share of clipped steps."""
    norms, clipped, steps = [], 0.0, 0
    for lines in lines_of_seeds:
        before = 0
        for line in (line for line in lines if line.get("train/grad_norm") is not None):
            length, before = line["step"] - before, line["step"]
            norms.append(line["train/grad_norm"])
            clipped += length * line["train/clipped_share"]
            steps += length
    if not norms:
        raise UserError("the runs have no train/grad_norm in metrics.jsonl; --config.train.log_every is too large")
    middle, high, most = np.quantile(norms, (0.5, 0.9, 1.0)).tolist()
    return {"median": middle, "q90": high, "largest": most, "clipped": clipped / steps, "windows": len(norms)}


def winner(ranking: Path) -> str:
    """The name of the variant that is first in the ranking. UserError where there is none."""
    best = _ranking(ranking)["best"]
    if best is None:
        raise UserError(f"{ranking} ranks no variant; llada sweep says why in its report.md")
    return best


def _ranking(ranking: Path) -> dict[str, Any]:
    fits = json_files.read(ranking / "fits.json")
    if not isinstance(fits.get("ranking"), dict):
        raise UserError(f"{ranking} is no sweep of mode variants; give that of experiments/objectives.py:quick")
    return fits["ranking"]


def study(run_dir: Path) -> dict[str, Any]:
    """All numbers of the page. UserError where something of it is missing or of other runs."""
    measured, directory = json_files.read(run_dir / "measured.json"), run_dir / "ranking"
    by_name = {r.run: r for r in results.read_csv(directory / "results.csv")}
    if missing := [name for name in measured["runs"] if name not in by_name]:
        raise UserError(f"{run_dir}/measured.json has {missing[0]}, which the ranking has not; remove it")
    runs: dict[str, dict[int, Result]] = {}
    for name in measured["runs"]:
        runs.setdefault(by_name[name].series.key, {})[by_name[name].seed] = by_name[name]

    def of(*path: str) -> dict[str, dict[int, Any]]:
        return {
            key: {seed: _at(measured["runs"][r.run], path) for seed, r in seeds.items()} for key, seeds in runs.items()
        }

    settings, first = measured["settings"], next(iter(next(iter(runs.values())).values()))
    length = config_lib.load(directory / "runs" / first.run / "config.json").data.sequence_length
    ranking, best = _ranking(directory), winner(directory)
    isoflop = json_files.read(run_dir / best / "fits.json")
    if Series(DIFFUSION, best).key not in isoflop["families"]:
        raise UserError(f"{run_dir / best} has no figure of {best}; run llada sweep there with objectives.py:{best}")
    entries = {entry["variant"]: entry for entry in ranking["variants"]}
    logs = {
        key: [metrics.read(directory / "runs" / r.run / "metrics.jsonl") for r in seeds.values()]
        for key, seeds in runs.items()
    }
    return {
        "ranking": ranking,
        "claims": [c._asdict() | {"found": verdict(c, entries.get(c.variant))} for c in CLAIMS],
        "looked_at": {"size": first.size, "budget": first.budget, "seeds": sorted(runs[PLAIN]), "length": length},
        "settings": settings,
        "judge": measured["judge"],
        "bound_trained": {key: next(iter(seeds.values())).bound_trained for key, seeds in runs.items()},
        "by_time": paired(of("by_time")),
        "gradients": {key: gradients(lines) for key, lines in logs.items()},
        "samples": {order: samples(of("samples", order)) for order in settings["orders"]},
        "held_out": of_texts(measured["held_out"]),
        "infill": {
            f"{share:g}": infilled(of("infill", f"{share:g}"), max(1, round(share * length)))
            for share in settings["shares"]
        },
        "winner": best,
        "isoflop": isoflop,
    }


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def title(key: str) -> str:
    """Of a series, in tables and pictures."""
    return of_key(key).title
