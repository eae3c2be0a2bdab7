"""What each call of `llada train` ran with: `calls.jsonl` in the workdir, a line a call, for `llada reproduce`.

{"from_step": 40, "steps": 100, "imported": false, "date": ..., "command": [...], "versions": {"jax": ...}, "commit":
"1a2b3c4+", "code_sha256": ..., "machine": {"platform": "cpu", "devices": 8, ...}, "environment": {"XLA_FLAGS": ...},
"keys": {"mesh.fsdp": 2, ...}}. `keys` are those that later calls may change, as this call had them; a + behind the
commit says that the tree had changes of its own, and `code_sha256` is of the code as it ran.
"""

import contextlib
import datetime
import functools
import hashlib
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from llada import json_files, knobs, processes
from llada.config import Config
from llada.errors import UserError

FILE = "calls.jsonl"
_CODE = Path(__file__).resolve().parents[1]
_CHECKOUT = _CODE.parents[1]
_PACKAGES = {"llada": "llada-jax"} | {
    name: name for name in ("jax", "jaxlib", "flax", "optax", "grain", "orbax-checkpoint", "numpy")
}
# Changeable keys that change neither bits nor metrics: paths, what is kept; and the record of others.
_NO_MATTER = ("changes", "data.", "dialogues.", "debug.", "checkpoint.", "train.watchdog_seconds")
# Variables that say where things are and what is logged, or what `machine` says.
_NO_MATTER_VARIABLES = re.compile(
    "JAX_(.*COMPILATION_CACHE|PERSISTENT_CACHE|TRACEBACK|LOG|PLATFORM|COORDINATOR|NUM_PROC|PROCESS_ID|LOCAL)"
)
_GIT_SECONDS = 10


def record(
    workdir: Path,
    config: Config,
    mesh: jax.sharding.Mesh,
    from_step: int,
    imported: bool,
    log: Callable[[str], None] = lambda text: None,
) -> None:
    """Append the call that trains `config` from a step on; `imported`: from a model that was not trained here.

    Process 0 writes, unless the run is finished. Where the file cannot be written `log` is told, and no more.
    """
    if not processes.is_first() or _is_finished(workdir, config, from_step):
        return
    call = {
        "from_step": from_step,
        "steps": config.steps,
        "imported": imported,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        **surroundings(),
        "keys": _changeable(config) | {f"mesh.{axis}": size for axis, size in mesh.shape.items()},
    }
    path = workdir / FILE
    line = json_files.dumps(call).encode("utf-8", "backslashreplace") + b"\n"
    try:
        with path.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else b"\n" + line  # a kill has cut the last one short
            file.write(line)
    except OSError as error:
        log(f"{path} cannot be written ({error.strerror or error}): llada reproduce will not know of this call")


def _is_finished(workdir: Path, config: Config, step: int) -> bool:
    """Whether there is a summary of the last step already, so that this call will do nothing."""
    path = workdir / "summary.json"
    with contextlib.suppress(UserError):  # a damaged one is written again
        return step == config.steps and path.exists() and json_files.read(path).get("step") == step
    return False


def read(workdir: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The calls, oldest first, and the numbers of lines that are none. UserError where there is no record."""
    path = workdir / FILE
    if not path.exists():
        raise UserError(
            f"--workdir={workdir} has no {FILE}, which llada train writes: not a run, or one of an older llada"
        )
    calls, bad = [], []
    for number, text in enumerate(json_files.read_bytes(path).split(b"\n"), 1):
        if text.strip():
            try:
                calls.append(_checked(json_files.parse(text, f"line {number}")))
            except UserError:
                bad.append(number)
    return calls, bad


def _checked(call: dict[str, Any]) -> dict[str, Any]:
    kinds = {"versions": dict, "machine": dict, "environment": dict, "keys": dict, "commit": str, "code_sha256": str}
    sound = all(type(call.get(name)) is int for name in ("from_step", "steps")) and type(call.get("imported")) is bool
    if not (sound and all(isinstance(call.get(name), kind) for name, kind in kinds.items())):
        raise UserError("no call")
    return call


def surroundings() -> dict[str, Any]:
    """Versions, code, machine and environment of this process: what may change bits beside the config."""
    return {
        "versions": _versions() | {"Python": platform.python_version()},
        "commit": commit(),
        "code_sha256": _code_sha256(),
        "machine": {
            "platform": jax.default_backend(),
            "device_kind": jax.devices()[0].device_kind,
            "processor": processor(),
            "devices": jax.device_count(),
            "processes": processes.count(),
            "cores": _cores(),
            "matmul_precision": getattr(jax.config, "jax_default_matmul_precision", None),
        },
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
            or (name.startswith("JAX_") and not _NO_MATTER_VARIABLES.match(name))
        },
    }


def _changeable(config: Config) -> dict[str, Any]:
    """The keys that a later call may change, and that change bits or metrics."""
    names = [key.name for key in knobs.keys(Config) if key.knob.changeable and not key.name.startswith(_NO_MATTER)]
    return {name: knobs.value(config, name) for name in names}


@functools.cache
def commit() -> str:
    """Short hash of the checkout's commit, followed by + where the code differs from it; "unknown" outside of one."""
    if not (_CHECKOUT / ".git").exists():
        return "unknown"
    head = _git("rev-parse", "--short", "HEAD")
    return head + "+" * bool(_git("status", "--porcelain", "--", "src", "experiments", "launch")) if head else "unknown"


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=_CHECKOUT, capture_output=True, text=True, check=False, timeout=_GIT_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):  # no git here, or a slow disk
        return ""
    return done.stdout.strip()


@functools.cache
def _code_sha256() -> str:
    """Of all our Python files: it tells two trees apart that one commit does not."""
    sha = hashlib.sha256()
    for path in sorted(_CODE.rglob("*.py")):
        sha.update(f"{path.relative_to(_CODE).as_posix()}\n".encode() + path.read_bytes())
    return sha.hexdigest()


@functools.cache
def _versions() -> dict[str, str]:
    found = {}
    for name, package in _PACKAGES.items():
        try:
            found[name] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


@functools.cache
def processor() -> str:
    """The CPU's model: XLA compiles for the instructions that it has."""
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    found = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def _cores() -> int:
    """Cores that this process may use: XLA on CPU divides sums among them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
