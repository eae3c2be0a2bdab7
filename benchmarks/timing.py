"""What the benchmarks share: two programs timed alternately, one run in a process of its own, figures as text."""

import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

Spread = dict[str, float]  # median, min, max


def alternate(
    ours: Callable,
    theirs: Callable,
    same: Callable,
    pairs: int,
    rival: str = "pytorch",
    runs: int = 1,
    between: Callable = lambda: None,
) -> dict:
    """Seconds of both and the ratio theirs / ours of each pair, with the facts that `same` returns.

    The first run of each compiles and is not timed. `same(a, b)` raises where the results differ; it sees every pair of
    runs. With `runs` > 1 a program's turn is one untimed run and then `runs` timed ones, whose mean counts: the untimed
    one absorbs what the other program did to caches and memory. `between()` follows every run of the rival, untimed.
    """
    seconds: dict[str, list[float]] = {"ours": [], rival: []}

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
        (a, our_seconds), (b, their_seconds) = turn(ours, lambda: None), turn(theirs, between)
        seconds["ours"].append(our_seconds)
        seconds[rival].append(their_seconds)
        for results in zip(a, b, strict=True):
            same(*results)
    ratios = [b / a for a, b in zip(seconds["ours"], seconds[rival], strict=True)]
    return dict(facts) | {name: spread(values) for name, values in (*seconds.items(), ("ratio", ratios))}


def in_a_process(script: str, *arguments: str, **variables: str) -> Any:
    """The JSON on the last line that a script prints in a fresh process; RuntimeError if that process fails."""
    done = subprocess.run(
        [sys.executable, script, *arguments], env=os.environ | variables, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def resident_bytes(key: str) -> int:
    """Resident memory of this process (Linux): VmRSS at present, VmHWM at most since it started or was reset.

    Not `ru_maxrss`, which starts at the figure of the process that this one was forked from.
    """
    return 1024 * int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))[1])


def spread(values: list[float]) -> Spread:
    """Median and range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def text(figure: Spread | float) -> str:
    """A figure as a cell, three digits or the whole number; a spread as median (min to max)."""
    if isinstance(figure, dict):
        median, low, high = (text(figure[key]) for key in ("median", "min", "max"))
        return f"{median} ({low} to {high})"
    return f"{figure:,.0f}" if isinstance(figure, int) or abs(figure) >= 100 else f"{figure:#.3g}"


def report(**facts) -> None:
    """Print one line of JSON: the facts to four digits after the point, the device and the load of the machine."""
    facts |= {"device": jax.default_backend(), "load": os.getloadavg()[0]}
    print(json.dumps(json.loads(json.dumps(facts), parse_float=_rounded)), flush=True)


def _rounded(digits: str) -> float:
    value = float(digits)
    return round(value, 4) if abs(value) >= 0.01 else float(f"{value:.3g}")
