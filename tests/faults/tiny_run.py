"""Runs that are disturbed: a tiny experiment, what its checkpoints hold, and what it has recorded.

Everything is read from the files, without JAX, so that a goal sees what the next call would find.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import queue
import random
import re
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from llada.config import Config, default_config, from_config_dict
from llada.training import arrays, metrics, run_item

CLOCK = ("speed/tokens_per_second", "time/seconds")
TRACEBACKS = ("Traceback", "Exception ignored", "Fatal", "terminate called", "Segmentation", "Aborted")
STEP_LINE = re.compile(r"^step +(\d+)/", re.M)


def write_documents(folder: Path) -> str:
    """Forty small documents; returns them as `data.source` takes them."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    for i in range(40):
        words = [rng.choice("the cat dog bird sees hears likes a tree river .".split()) for _ in range(400)]
        (folder / f"{i:02}.txt").write_text(f"{i} {' '.join(words)}\n")
    return f"text:{folder}/*.txt"


def config(source: str, family: str = "llada", changes: dict | None = None) -> Config:
    """A model of two layers that saves every step and is evaluated at the end; `changes` by key ("train.steps")."""
    c = default_config()
    c.model.update(dict(layers=2, width=32, heads=2, ffn=48, vocab_size=320, max_length=32, dtype="float32"))
    c.data.update(dict(source=source, sequence_length=32, holdout_fraction=0.2))
    c.train.update(dict(batch_size=8, steps=40, log_every=1))
    c.evaluate.update(dict(every=0, batches=2, draws=2))
    c.checkpoint.update(dict(every=1, keep=3))
    if family == "arm":
        c.objective.name, c.model.causal, c.objective.random_length_fraction = "autoregressive", True, 0.0
    for key, value in (changes or {}).items():
        group, name = key.split(".")
        c[group][name] = value
    return from_config_dict(c)


def write_experiment(path: Path, made: Config) -> str:
    """An experiment file of that config; returns the flag that names it."""
    tree = json.dumps(dataclasses.asdict(made))
    path.write_text(f"import json\n\ndef get_config():\n    return json.loads({tree!r})\n")
    return f"--config={path}"


def cache(folder: Path) -> dict[str, str]:
    """Variables for calls that share compiled programs, unless the caller has a place for them already."""
    return {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", f"{folder}/compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }


def saved(workdir: Path) -> list[int]:
    """Steps of committed checkpoints, ascending."""
    return run_item.saved_steps(workdir / "checkpoints")


def wrong_bits(workdir: Path, steps: list[int], expected: dict[int, str]) -> str:
    """What is wrong with the arrays of these steps; "" for nothing. `expected`: `bits` of an undisturbed run's."""
    for step in steps:
        try:
            if bits(workdir, step) != expected[step]:
                return f"step {step} has other bits than an undisturbed run's"
        except Exception as error:  # whatever reading raises is the finding
            return f"step {step} cannot be read: {error!r}"
    return ""


def bits(workdir: Path, step: int) -> str:
    """A sha256 of all arrays of a step and of the rows it has seen. Raises where they are not what was saved."""
    item, sha = run_item.read(workdir / "checkpoints", step), hashlib.sha256()
    for name in ("params", "optimizer_state"):
        leaves = arrays.open_leaves(workdir / "checkpoints" / str(step) / name, item.digests_of(name))
        for leaf_name, leaf in sorted(leaves.items()):
            sha.update(f"{name} {leaf_name} {leaf.dtype} {leaf.shape}".encode())
            for block in leaf.blocks():
                sha.update(leaf.read(block).tobytes())
    sha.update(json.dumps([item.cursor[key] for key in ("step", "rows_digest", "corpus_digest")]).encode())
    return sha.hexdigest()


def record(workdir: Path) -> list[dict]:
    """The metrics, of which the clock is left out."""
    lines = metrics.read(workdir / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]


def last_step(said: str) -> int:
    """The step of the last line about one; 0 for none."""
    return max(map(int, STEP_LINE.findall(said)), default=0)


def difference(workdir: Path, expected: Path, step: int) -> str:
    """What is wrong with a finished run, "" for nothing: other bits, metrics, or files that should be gone."""
    left = [path.name for path in (workdir / "checkpoints").iterdir() if not path.name.isdecimal()]
    if saved(workdir)[-1:] != [step]:
        return f"steps {saved(workdir)} are saved, not {step}"
    if bits(workdir, step) != bits(expected, step):
        return f"step {step} has other bits than an undisturbed run's"
    if record(workdir) != record(expected):
        return "metrics.jsonl is not an undisturbed run's"
    if left := [name for name in left if ".damaged" not in name]:
        return f"left in checkpoints/: {', '.join(left)}"
    return ""


def side_by_side(*sources: Iterable) -> Iterator:
    """The items of all sources as they come, each source on a thread of its own: two calls use two cores."""
    done, found = object(), queue.Queue()

    def drain(source: Iterable) -> None:
        try:
            for item in source:
                found.put(item)
            found.put(done)
        except BaseException as error:
            found.put(error)

    for source in sources:
        threading.Thread(target=drain, args=(source,), daemon=True).start()
    left = len(sources)
    while left:
        item = found.get()
        if isinstance(item, BaseException):
            raise item
        if item is done:
            left -= 1
        else:
            yield item


def shares(count: int, of: int) -> list[range]:
    """The cases 0 to count - 1, dealt out."""
    return [range(i, count, of) for i in range(min(of, max(count, 1)))]


def excerpt(said: str) -> str:
    """The end of what a call has printed, where that has to explain a fault."""
    lines = list(itertools.islice(reversed(said.splitlines()), 25))
    return "\n".join(reversed(lines))
