"""Workdirs that older versions of llada left (tests/old_checkpoints/), read and continued by this one."""

import hashlib
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import in_process
import jax
import numpy as np
from faults.goal import Outcome

import llada
from llada import config as config_lib
from llada import json_files
from llada import mesh as mesh_lib
from llada.config import MeshConfig, from_config_dict
from llada.errors import UserError
from llada.interop import importing
from llada.interop.export import export
from llada.training import digests, loop, resuming, run_item
from llada.training.checkpoint import Checkpoints
from llada.training.verification import verify

NUMBER = "R14"
TITLE = "Old checkpoints"
DEMAND = "loaded with the bits that were saved, evaluated, continued, exported; a newer format refused in one line"

ARCHIVES = Path(__file__).resolve().parents[1] / "old_checkpoints"
NAMES = sorted(path.name.removesuffix(".tar.xz") for path in ARCHIVES.glob("*.tar.xz"))
TOLERANCE = 1e-5  # of held-out nats: four steps of this llada against four of the older one


def unpacked(name: str, folder: Path) -> tuple[Path, dict]:
    """The workdir, and what was written down when it was made."""
    with tarfile.open(ARCHIVES / f"{name}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "run", json.loads((ARCHIVES / f"{name}.json").read_text())


def sha256(x) -> str:
    """Of an array's dtype, shape and bytes, as tests/old_checkpoints/make.py wrote it."""
    x = np.asarray(x)
    return hashlib.sha256(f"{x.dtype} {x.shape} ".encode() + x.tobytes()).hexdigest()


def hashes(prefix: str, tree) -> dict[str, str]:
    """Of all leaves, by name."""
    return {f"{prefix}/{name}": sha256(leaf) for name, leaf in digests.by_name(tree).items()}


def loads(run: Path, facts: dict, folder: Path) -> str:
    """All of its arrays, as training restores them and as `llada.load` does."""
    step, config = facts["step"], config_lib.load(run / "config.json")
    with Checkpoints(run) as checkpoints:
        state = resuming.restore_state(checkpoints, config, mesh_lib.make(MeshConfig()), step)[0]
    found = hashes("params", state.params) | hashes("optimizer_state", state.optimizer_state)
    if found != facts["arrays"]:
        return f"arrays with other bits: {sorted(dict(found.items() ^ facts['arrays'].items()))}"
    again = hashes("params", llada.load(run).params)
    return "" if again == {name: found[name] for name in again} else "llada.load has other parameters than training"


def evaluates(run: Path, facts: dict, folder: Path) -> str:
    """By the command."""
    done = in_process.llada("evaluate", f"--workdir={run}", "--draws=1", "--batches=1")
    if done.returncode or "Traceback" in done.stderr:
        return f"status {done.returncode}: {done.stderr}"
    found = json.loads(done.stdout)
    right = found["step"] == facts["step"] and 0 < found["nats_per_token"] < 10
    return "" if right else f"evaluated to {found}"


def continues(run: Path, facts: dict, folder: Path) -> str:
    """To the end that the older llada came to: the same rows, and its figures but for rounding."""
    summary, expected = loop.train(config_lib.load(run / "config.json"), run), facts["after"]
    for key in ("step", "rows_digest", "corpus_digest"):
        if summary[key] != expected[key]:
            return f"{key} is {summary[key]}, then it was {expected[key]}"
    there, here = expected["eval_nats_per_token"], summary["eval_nats_per_token"]
    return "" if abs(here - there) < TOLERANCE * there else f"held-out nats {here}, then they were {there}"


def exports(run: Path, facts: dict, folder: Path) -> str:
    """Out and in again, with the parameters that were saved."""
    export(run, folder / "export")
    source = importing.open_source(folder / "export")
    importing.write(source, from_config_dict(source.config), folder / "imported")
    found = hashes("params", llada.load(folder / "imported").params)
    return "" if all(facts["arrays"][name] == digest for name, digest in found.items()) else "other parameters"


def verifies(run: Path, facts: dict, folder: Path) -> str:
    """Nothing of it is called damaged."""
    return "; ".join(f"{name}: {what}" for name, what in verify(run).damaged.items())


def refuses_newer(run: Path, facts: dict, folder: Path) -> str:
    """The same step in the format after this one: one line, from readers and from training."""
    path = run / "checkpoints" / str(facts["step"]) / "run" / "metadata"
    newer = json.loads(path.read_text()) | {"format_version": run_item.FORMAT_VERSION + 1}
    path.write_text(json.dumps(json_files.sealed(newer)))
    for call in (lambda: llada.load(run), lambda: loop.train(config_lib.load(run / "config.json"), run)):
        try:
            call()
        except UserError as error:
            if "\n" in str(error) or "use a newer llada" not in str(error):
                return f"refused by {error}"
        else:
            return "read"
    return ""


CHECKS: tuple[Callable[[Path, dict, Path], str], ...] = (
    loads,
    verifies,
    evaluates,
    exports,
    continues,
    refuses_newer,
)
FULL, SAMPLE = len(NAMES) * len(CHECKS), len(NAMES)


def outcome(case: int, folder: Path) -> Outcome:
    """Each check of all archives, then the next."""
    check, archive = divmod(case % FULL, len(NAMES))
    name, what = NAMES[archive], CHECKS[check]
    place = folder / str(case)
    place.mkdir(parents=True)
    try:
        wrong = what(*unpacked(name, place), place)
    except Exception as error:
        wrong = repr(error)
    jax.clear_caches()
    return Outcome(f"{name}: {what.__name__}", "wrong" if wrong else what.__name__, wrong)


def outcomes(count: int, seed: int, folder: Path) -> Iterator[Outcome]:
    """All of them in order: nothing is drawn."""
    for case in range(count):
        yield outcome(case, folder)
