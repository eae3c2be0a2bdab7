"""What a checkpoint says about itself: the JSON item `run` of a step, written, read and checked without Orbax.

{"format_version": 2, "begun": true, "cursor": {"step": 40, "rows_digest": ..., "corpus_digest": ..., "meter": ...,
"guard": ...}, "config": {...}, "tokenizer": base64, "digests": {"params": {"layers.query": [...]},
"optimizer_state": ...}, "sha256": of all else}. Those of version 1 lack the last two; those written before there was a
version lack it, `begun` and `corpus_digest`.
"""

import base64
import binascii
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from llada import changes, json_files, processes
from llada import config as config_lib
from llada.config import Config
from llada.errors import Damaged, StepRemoved, UserError
from llada.files import write_atomically
from llada.json_files import sealed
from llada.training.digests import Digests

T = TypeVar("T")

FORMAT_VERSION = 2
_REMOVAL_SECONDS = 0.5  # how long the files of a step may take to go


class RunItem(NamedTuple):
    """The item of one step. `begun`: saved by training; an imported model has no moments and no cursor yet.

    `digests` of its arrays, by item; None where it was saved without.
    """

    step: int
    config: Config
    cursor: dict[str, Any]
    tokenizer: bytes
    begun: bool
    digests: dict[str, Digests] | None = None

    def digests_of(self, item: str) -> Digests | None:
        """Of one item's arrays."""
        return None if self.digests is None else self.digests.get(item, {})


class _Foreign(UserError):
    """A step that is whole, but not one to be used here."""


def saved_steps(checkpoints: Path) -> list[int]:
    """Steps in a directory of checkpoints, ascending; those being written have other names. UserError for a file."""
    if checkpoints.exists() and not checkpoints.is_dir():
        raise UserError(f"{checkpoints} is no directory; move it away, or give another --workdir")
    names = (path.name for path in checkpoints.glob("*"))
    return sorted(int(name) for name in names if name.isascii() and name.isdecimal() and str(int(name)) == name)


def to_json(
    config: Config, cursor: dict[str, Any], tokenizer: bytes, begun: bool, digests: dict[str, Digests]
) -> dict[str, Any]:
    """The item to save."""
    tree = {
        "format_version": FORMAT_VERSION,
        "begun": begun,
        "cursor": cursor,
        "config": config_lib.to_dict(config),
        "tokenizer": base64.b64encode(tokenizer).decode(),
        "digests": digests,
    }
    return sealed(tree)


def add_digests(checkpoints: Path, step: int, digests: dict[str, Digests]) -> None:
    """Put the digests of arrays that have been written since into the item of a step."""
    path = checkpoints / str(step) / "run" / "metadata"
    write_atomically(path, json.dumps(sealed(json_files.read(path) | {"digests": digests})).encode())


def remark(item: RunItem) -> None:
    """A line, from the first process, for a step whose arrays cannot be checked."""
    if item.digests is None and processes.is_first():
        sys.stderr.write(f"step {item.step} was saved without digests, by an older llada: damage to it stays unseen\n")


def read(checkpoints: Path, step: int) -> RunItem:
    """The item of `step`. UserError, naming what is wrong and the other steps, for one that cannot be used."""
    directory = checkpoints / str(step)
    try:
        tree = json_files.read(directory / "run" / "metadata")
        digests = _check_seal(tree)
        config = config_lib.from_config_dict(_of_kind(tree, "config", dict))
        tokenizer = base64.b64decode(_of_kind(tree, "tokenizer", str), validate=True)
        cursor = _of_kind(tree, "cursor", dict)
        guess = "step" in cursor or (directory / "optimizer_state").exists()
        begun = _of_kind(tree, "begun", bool) if "begun" in tree else guess
        _check_cursor(cursor, step, begun)
        if begun and not (directory / "optimizer_state").exists():
            raise UserError("its optimizer_state, the moments of AdamW, is missing")
    except binascii.Error as error:
        raise unusable(checkpoints, step, f"its tokenizer is no base64 ({error})") from error
    except UserError as error:
        raise unusable(checkpoints, step, str(error), UserError if isinstance(error, _Foreign) else Damaged) from error
    return RunItem(step, config, cursor, tokenizer, begun, digests)


def unusable(checkpoints: Path, step: int, what: str, kind: type[UserError] = Damaged) -> UserError:
    """The error for a step that cannot be used, of that kind, or that has been removed."""
    others = [saved for saved in saved_steps(checkpoints) if saved != step]
    # With a newer one beside it, training may be half way through removing this one.
    until = time.monotonic() + (_REMOVAL_SECONDS if any(saved > step for saved in others) else 0)
    while (checkpoints / str(step)).exists() and time.monotonic() < until:
        time.sleep(0.05)
    if not (checkpoints / str(step)).exists():
        saved_now = f"; saved now: {', '.join(map(str, others))}" if others else ""
        return StepRemoved(
            f"step {step} of {checkpoints} was removed while it was read{saved_now}; "
            "try again, or let training keep more: --config.checkpoint.keep"
        )
    if others:
        goes_on = f"training sets it aside and goes on from step {others[-1]}"
        if kind is not Damaged:
            goes_on = f"training goes on from step {others[-1]} once {checkpoints / str(step)} is moved away"
        remedy = f"other steps saved: {', '.join(map(str, others))} (--step={others[-1]} reads one; {goes_on})"
    else:
        remedy = f"no other step is saved; move {checkpoints} away to train from the start"
    return kind(f"checkpoint of step {step} in {checkpoints} cannot be used: {what}; {remedy}")


def newest_again(checkpoints: Path, read: Callable[[int | None], T], step: int | None) -> T:
    """`read(step)`; where training removes the newest step (None) while it is read, once more with what is newest then.

    A step that was asked for is not replaced by another. Of several processes all must call it.
    """
    try:
        return read(step)
    except StepRemoved:
        if step is not None or not saved_steps(checkpoints):
            raise
    return read(None)


def set_aside(checkpoints: Path, step: int) -> str:
    """Give a damaged step a name that is no step's, and return it. Only training may, which holds the workdir."""
    names = [f"{step}.damaged", *(f"{step}.damaged.{i}" for i in range(2, 1000))]
    name = next(name for name in names if not (checkpoints / name).exists())
    (checkpoints / str(step)).rename(checkpoints / name)
    return name


def require_same(item: RunItem, config: Config, checkpoints: Path) -> None:
    """UserError unless the step was saved by this config, but for keys that later calls may change."""
    changed = changes.differences(item.config, config, begun=item.begun)
    if changed:
        more = "; ..." if changed[4:] else ""
        raise UserError(
            f"{checkpoints.parent / 'config.json'} is not that of its checkpoint of step {item.step} "
            f"({'; '.join(changed[:4])}{more}); put the old values back, or the checkpoint where it belongs"
        )


def _of_kind(tree: dict[str, Any], name: str, kind: type) -> Any:
    value = tree.get(name)
    if not isinstance(value, kind):
        raise UserError(f"its item `run` has {name}={str(value)[:60]!r}, which is no {kind.__name__}")
    return value


def _check_seal(tree: dict[str, Any]) -> dict[str, Digests] | None:
    """The digests in an item that is what was saved; None in one of version 1, which has neither these nor a sha256."""
    version = tree.get("format_version", 1)
    if (version != 1 or "sha256" in tree) and tree.get("sha256") != sealed(tree)["sha256"]:
        raise UserError("its item `run` is not what was saved: its sha256 is another")
    if type(version) is not int or version < 1:
        raise UserError(f"its item `run` has format_version={str(version)[:60]!r}, which is no version")
    if version > FORMAT_VERSION:
        raise _Foreign(f"it has format {version}, and this llada reads up to {FORMAT_VERSION}: use a newer llada")
    return None if version == 1 else _of_kind(tree, "digests", dict)


def _check_cursor(cursor: dict[str, Any], step: int, begun: bool) -> None:
    """The cursor's step is the directory's, and what a run continues from has the right types."""
    if not begun:
        if step != 0:
            raise _Foreign("it holds an imported model, which is step 0: the directory has been renamed")
        return
    saved = cursor.get("step")
    if type(saved) is not int:
        raise UserError(f"its cursor has step={str(saved)[:60]!r}, which is no number of a step")
    if saved != step:
        raise _Foreign(f"its cursor says step {saved}: the directory has been renamed")
    meter = cursor.get("meter", {})
    sums = meter.get("sums", {}) if isinstance(meter, dict) else None
    if not (isinstance(sums, dict) and all(map(_is_number, [*sums.values(), *_without(meter, "sums").values()]))):
        raise UserError(f"its cursor has meter={str(meter)[:60]!r}, which are no numbers")
    guard = cursor.get("guard", {})
    lists = [guard.get("norms", []), *guard.get("rolled_back", [])] if isinstance(guard, dict) else [None]
    others = _without(_without(guard, "norms"), "rolled_back").values() if isinstance(guard, dict) else ()
    if not all(isinstance(x, list) and all(map(_is_number, x)) for x in [*lists, list(others)]):
        raise UserError(f"its cursor has guard={str(guard)[:60]!r}, which are no numbers")
    for name in ("rows_digest", "corpus_digest"):
        if not isinstance(cursor.get(name, ""), str):
            raise UserError(f"its cursor has {name}={str(cursor[name])[:60]!r}, which is no text")


def _without(tree: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in tree.items() if key != name}


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
