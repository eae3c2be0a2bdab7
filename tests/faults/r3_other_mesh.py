"""Runs saved on one topology and continued on another: every ordered pair of nine, up to four processes.

Each topology trains a run up to a step, and on from there. The others restore that step, and go on as well.
"""

import hashlib
import itertools
import random
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from faults import tiny_run, workers
from faults.goal import Outcome

NUMBER = "R3"
TITLE = "Going on with other devices"
DEMAND = "restored leaves have the bits that were saved, the next rows are the same, and losses agree within 1e-5"
FULL, SAMPLE = 72, 1

SAVED, MORE = 6, 20  # steps
TOLERANCE = 1e-5  # of losses, relative
TOPOLOGIES = {  # name -> processes, devices of each, and how they are used: data, fsdp, tensor
    "1 device": (1, 1, 1, 1, 1),
    "2 data": (1, 2, 2, 1, 1),
    "2 tensor": (1, 2, 1, 1, 2),
    "4 fsdp": (1, 4, 1, 4, 1),
    "2 data x 2 tensor": (1, 4, 2, 1, 2),
    "8 data": (1, 8, 8, 1, 1),
    "2 x 2 x 2": (1, 8, 2, 2, 2),
    "2 processes, 2 data x 2 fsdp": (2, 2, 2, 2, 1),
    "4 processes, 4 data x 2 tensor": (4, 2, 4, 1, 2),
}


def outcomes(count: int, seed: int, folder: Path) -> Iterator[Outcome]:
    """The pairs in an order drawn from the seed; families take turns."""
    pairs = list(itertools.permutations(TOPOLOGIES, 2))
    random.Random(f"R3 {seed}").shuffle(pairs)
    cases = [(*pairs[i % len(pairs)], ("llada", "arm")[i % 2]) for i in range(count)]
    source, changes = workers.prepared(folder)
    common = {"source": source, "changes": changes, "folder": str(folder)}

    def run(function: str, topology: str, asked: list) -> list:
        processes, devices, *_ = TOPOLOGIES[topology]
        arguments = common | {"topology": topology, "asked": asked}
        where = folder / f"{function}-{list(TOPOLOGIES).index(topology)}"
        return list(workers.Workers("r3_other_mesh", function, arguments, where, devices, processes))

    saving = {old: sorted({family for o, _, family in cases if o == old}) for old in TOPOLOGIES}
    going_on = {new: [(old, family) for old, n, family in cases if n == new] for new in TOPOLOGIES}
    with ThreadPoolExecutor(2) as pool:  # two cores
        saved = {old: pool.submit(run, "saved", old, families) for old, families in saving.items() if families}
        expected = {(old, found["family"]): found for old, job in saved.items() for found in job.result()}
        jobs = [(new, pool.submit(run, "restored", new, asked)) for new, asked in going_on.items() if asked]
        for new, job in jobs:
            for found in job.result():
                reference = expected[found["old"], found["family"]]
                wrong = _wrong(found, reference)
                what = f"{found['family']}: {found['old']} -> {new}"
                yield Outcome(what, "other" if wrong else "went on alike", wrong)


def _wrong(found: dict[str, Any], expected: dict[str, Any]) -> str:
    if found["bits"] != expected["bits"]:
        return "the leaves that were restored are not those that were saved"
    if found["rows_digest"] != expected["rows_digest"]:
        return "other rows were read"
    apart = [abs(a - b) / abs(b) for a, b in zip(found["losses"], expected["losses"], strict=True)]
    if len(apart) != SAVED + MORE:
        return f"{len(apart)} losses"
    return f"a loss is {max(apart):.1e} apart" if max(apart) > TOLERANCE else ""


def saved(topology: str, asked: list[str], **common: Any) -> Iterator[dict[str, Any]]:
    """In workers: a run of each family up to a step, whose directory is retained, and a copy of it that goes on."""
    from llada.training import loop

    plain, in_memory = loop.Checkpoints.save, []

    def save(checkpoints: Any, state: Any, *rest: Any) -> None:
        in_memory.append(_bits(state))
        plain(checkpoints, state, *rest)

    for family in asked:
        config, old = _config(topology, family, **common), _directory(common["folder"], topology, family)
        loop.Checkpoints.save = save
        loop.train(config, old, until=SAVED)
        loop.Checkpoints.save = plain
        on = _go_on(config, old, old.with_name(f"{old.name}-goes-on"))
        assert on["bits"] == in_memory[-1], "what the topology itself restores is not what it has saved"
        yield {"family": family} | on


def restored(topology: str, asked: list[list[str]], **common: Any) -> Iterator[dict[str, Any]]:
    """In workers: what others have saved, gone on with here."""
    for old, family in asked:
        directory = _directory(common["folder"], old, family)
        new = directory.with_name(f"{directory.name}-on-{list(TOPOLOGIES).index(topology)}")
        yield {"old": old, "family": family} | _go_on(_config(topology, family, **common), directory, new)


def _directory(folder: str, topology: str, family: str) -> Path:
    return Path(folder) / f"run-{list(TOPOLOGIES).index(topology)}-{family}"


def _config(topology: str, family: str, source: str, changes: dict[str, Any], folder: str) -> Any:
    _, _, data, fsdp, tensor = TOPOLOGIES[topology]
    mesh = {"mesh.data": data, "mesh.fsdp": fsdp, "mesh.tensor": tensor}
    steps = {"train.steps": 100, "checkpoint.every": 100, "optimizer.schedule": "0:0 2048:1"}
    return tiny_run.config(source, family, changes | mesh | steps)


def _go_on(config: Any, directory: Path, copy: Path) -> dict[str, Any]:
    """Continue a copy of a workdir; a sha256 of the leaves that it restores, and what it goes on to read and lose."""
    from llada import processes
    from llada.training import loop, resuming, run_item

    with processes.agreement():
        if processes.is_first():
            shutil.copytree(directory, copy, ignore=shutil.ignore_patterns("lock", "events.*"))
    plain, bits = resuming.restore_state, []

    def restore(*arguments: Any) -> Any:
        state, cursor = plain(*arguments)
        bits.append(_bits(state))
        return state, cursor

    resuming.restore_state = restore
    try:
        loop.train(config, copy, until=SAVED + MORE)
    finally:
        resuming.restore_state = plain
    item = run_item.read(copy / "checkpoints", SAVED + MORE)
    losses = [line["train/loss_nats_per_token"] for line in tiny_run.record(copy)]
    processes.gather(None)  # nobody goes on before all have read it
    if processes.is_first():
        shutil.rmtree(copy)
    return {"bits": bits[-1], "rows_digest": item.cursor["rows_digest"], "losses": losses}


def _bits(state: Any) -> str:
    """A sha256 of parameters and moments, however they are sharded; all processes call it."""
    import jax

    from llada import mesh as mesh_lib

    sha = hashlib.sha256()
    for leaf in jax.tree.leaves((state.params, state.optimizer_state)):
        whole = mesh_lib.on_host(leaf)
        sha.update(f"{whole.dtype} {whole.shape}".encode() + whole.tobytes())
    return sha.hexdigest()
