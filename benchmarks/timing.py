"""Two programs timed in turns, and a line of JSON about it: what the benchmarks of this folder share."""

import json
import os
import statistics
import time
from collections.abc import Callable

import jax


def alternate(
    ours: Callable,
    theirs: Callable,
    same: Callable,
    pairs: int,
    rival: str = "pytorch",
    runs: int = 1,
    between: Callable = lambda: None,
) -> dict:
    """Seconds of both and the ratio theirs / ours of each pair, with what `same` has to say about the results.

    The first run of each compiles and is not timed. `same(a, b)` raises where the results differ; it sees every pair of
    runs. With `runs` > 1 a program's turn is an untimed run and then that many, of which the mean counts: what the
    other one did to caches and memory is over by then. `between()` follows every run of the rival, untimed.
    """
    seconds = {"ours": [], rival: []}

    def turn(program, after):
        results, total = [], 0.0
        for run in range(runs + (runs > 1)):
            start = time.perf_counter()
            results.append(program())
            total += (time.perf_counter() - start) * (run > 0 or runs == 1)
            after()
        return results, total / runs

    facts = same(ours(), theirs())
    between()
    for _ in range(pairs):
        (a, mine), (b, other) = turn(ours, lambda: None), turn(theirs, between)
        seconds["ours"].append(mine)
        seconds[rival].append(other)
        for results in zip(a, b, strict=True):
            same(*results)
    ratios = [b / a for a, b in zip(seconds["ours"], seconds[rival], strict=True)]
    return dict(facts) | {name: spread(values) for name, values in (*seconds.items(), ("ratio", ratios))}


def spread(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def report(**facts) -> None:
    """Print one line of JSON: the facts to four digits after the point, the device and the load of the machine."""
    facts |= {"device": jax.default_backend(), "load": os.getloadavg()[0]}
    print(json.dumps(json.loads(json.dumps(facts), parse_float=_rounded)), flush=True)


def _rounded(text: str) -> float:
    value = float(text)
    return round(value, 4) if abs(value) >= 0.01 else float(f"{value:.3g}")
