"""What a checkpoint says about itself: the JSON item `run` of a step, written, read and checked without Orbax.

{"format_version": 1, "begun": true, "cursor": {"step": 40, "rows_digest": ..., "corpus_digest": ..., "meter": ...},
"config": {...}, "tokenizer": base64}. Those written before there was a version lack it, `begun` and `corpus_digest`.
"""

import base64
import binascii
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

from llada import config as config_lib
from llada import json_files
from llada.config import Config
from llada.errors import UserError

FORMAT_VERSION = 1
_REMOVAL_SECONDS = 0.5  # how long the files of a step may take to go


class RunItem(NamedTuple):
    """The item of one step. `begun`: saved by training; an imported model has no moments and no cursor yet."""

    step: int
    config: Config
    cursor: dict[str, Any]
    tokenizer: bytes
    begun: bool


class StepRemoved(UserError):
    """Training, which retains only the newest steps, removed one while it was being read."""


def saved_steps(checkpoints: Path) -> list[int]:
    """Steps in a directory of checkpoints, ascending; those being written have other names. UserError for a file."""
    if checkpoints.exists() and not checkpoints.is_dir():
        raise UserError(f"{checkpoints} is no directory; move it away, or give another --workdir")
    names = (path.name for path in checkpoints.glob("*"))
    return sorted(int(name) for name in names if name.isascii() and name.isdecimal() and str(int(name)) == name)


def to_json(config: Config, cursor: dict[str, Any], tokenizer: bytes, begun: bool) -> dict[str, Any]:
    """The item to save."""
    return {
        "format_version": FORMAT_VERSION,
        "begun": begun,
        "cursor": cursor,
        "config": config_lib.to_dict(config),
        "tokenizer": base64.b64encode(tokenizer).decode(),
    }


def read(checkpoints: Path, step: int) -> RunItem:
    """The item of `step`. UserError, naming what is wrong and the other steps, for one that cannot be used."""
    directory = checkpoints / str(step)
    try:
        tree = json_files.read(directory / "run" / "metadata")
        _check_version(tree)
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
        raise unusable(checkpoints, step, str(error)) from error
    return RunItem(step, config, cursor, tokenizer, begun)


def unusable(checkpoints: Path, step: int, what: str) -> UserError:
    """The error for a step that cannot be used, or that has been removed."""
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
        remedy = (
            f"other steps saved: {', '.join(map(str, others))} (--step={others[-1]} reads one; "
            f"training goes on from step {others[-1]} once {checkpoints / str(step)} is moved away)"
        )
    else:
        remedy = f"no other step is saved; move {checkpoints} away to train from the start"
    return UserError(f"checkpoint of step {step} in {checkpoints} cannot be used: {what}; {remedy}")


def require_same(item: RunItem, config: Config, checkpoints: Path) -> None:
    """UserError unless the step was saved by this config, but for keys that later calls may change."""
    changed = config_lib.differences(item.config, config, begun=item.begun)
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


def _check_version(tree: dict[str, Any]) -> None:
    version = tree.get("format_version", FORMAT_VERSION)
    if type(version) is not int or version < 1:
        raise UserError(f"its item `run` has format_version={str(version)[:60]!r}, which is no version")
    if version > FORMAT_VERSION:
        raise UserError(f"it has format {version}, and this llada reads up to {FORMAT_VERSION}: use a newer llada")


def _check_cursor(cursor: dict[str, Any], step: int, begun: bool) -> None:
    """The cursor's step is the directory's, and what a run continues from has the right types."""
    if not begun:
        if step != 0:
            raise UserError("it holds an imported model, which is step 0: the directory has been renamed")
        return
    saved = cursor.get("step")
    if type(saved) is not int:
        raise UserError(f"its cursor has step={str(saved)[:60]!r}, which is no number of a step")
    if saved != step:
        raise UserError(f"its cursor says step {saved}: the directory has been renamed")
    meter = cursor.get("meter", {})
    sums = meter.get("sums", {}) if isinstance(meter, dict) else None
    if not (isinstance(sums, dict) and all(map(_is_number, [*sums.values(), *_without(meter, "sums").values()]))):
        raise UserError(f"its cursor has meter={str(meter)[:60]!r}, which are no numbers")
    for name in ("rows_digest", "corpus_digest"):
        if not isinstance(cursor.get(name, ""), str):
            raise UserError(f"its cursor has {name}={str(cursor[name])[:60]!r}, which is no text")


def _without(tree: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in tree.items() if key != name}


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
