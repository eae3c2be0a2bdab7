"""Keys that a later call of a run gives other values: which may, from which step on, and the record of it.

`Config.changes` holds `(from step, key, value)` of every recorded key that was changed, in the order of steps; its
first value stands there from step 0, and its last one is the config's own.
"""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from llada import knobs
from llada.errors import UserError

if TYPE_CHECKING:
    from llada.config import Config


class Change(NamedTuple):
    """From the step after `step` on, `key` has this value."""

    step: int
    key: str
    value: Any


def differences(old: "Config", new: "Config", begun: bool = True, recorded: bool = False) -> list[str]:
    """`key: old -> new` for every key that differs, save those a later call may change.

    Before a run has `begun` (an imported model) only the model is settled; its dropout is a matter of training. With
    `recorded` those that may change from the next step on are differences as well.
    """

    def settled(key: knobs.Key) -> bool:
        if key.knob.changeable or (key.knob.recorded and not recorded):
            return False
        return begun or (key.name.startswith("model.") and key.name != "model.dropout")

    return [
        f"{key.name}: {a!r} -> {b!r}"
        for key in knobs.keys(type(old))
        if settled(key) and (a := knobs.value(old, key.name)) != (b := knobs.value(new, key.name))
    ]


def checked(config: "Config") -> "Config":
    """The config with its changes as they are in memory. UserError where a file has others than a run writes."""
    recorded, out = _recorded(config), []
    for entry in config.changes:
        if not (isinstance(entry, list | tuple) and len(entry) == 3):
            raise _no_record(f"it holds {str(entry)[:60]!r}")
        step, name, value = entry
        if type(step) is not int or step < 0 or name not in recorded:
            raise _no_record(f"it holds {str(entry)[:60]!r}")
        value = knobs.coerce(value, recorded[name].annotation, f"--config.{name}")
        if rule := recorded[name].knob.broken(value):
            raise _no_record(f"it holds {name}={value!r}: {rule}")
        out.append(Change(step, name, value))
    for name in dict.fromkeys(change.key for change in out):
        steps = [change.step for change in out if change.key == name]
        if steps[0] != 0 or sorted(set(steps)) != steps:
            raise _no_record(f"the steps of {name} are {steps[:4]}, and must rise from 0")
        if (last := _history(out, name)[-1].value) != (now := knobs.value(config, name)):
            raise _no_record(f"{name} ends with {last!r}, and is {now!r}")
    return dataclasses.replace(config, changes=tuple(out))


def at(config: "Config", step: int) -> "Config":
    """The config that the step after `step` is trained by; without a record."""
    values = {change.key: change.value for change in config.changes if change.step <= step}
    return dataclasses.replace(_with(config, values), changes=())


def steps(config: "Config") -> frozenset[int]:
    """After which the values of some key are others."""
    return frozenset(change.step for change in config.changes if change.step > 0)


def continued(saved: "Config", now: "Config", step: int, allow_return: bool = False) -> "Config":
    """`now`, which goes on from step `step` of a run that had `saved`, with the record of both.

    Where the values are those of `saved` its record stays, also of later steps: they come again. UserError for a value
    that the run has left behind, most likely by an experiment file that still has it, unless that is allowed.
    """
    changes: list[Change] = []
    for name in _recorded(now):
        value, before, history = knobs.value(now, name), knobs.value(saved, name), _history(saved.changes, name)
        if value != before:
            if not allow_return and value in [change.value for change in history]:
                raise UserError(
                    f"{name}={value!r} is a value that this run left behind: it is {before!r} since step "
                    f"{history[-1].step}. Give --config.{name}={before!r}, or leave out --config; --allow_rate_jump "
                    "goes back to it"
                )
            history = [change for change in history if change.step < step] or [Change(0, name, before)]
            history += [Change(step, name, value)] * (value != history[-1].value)
        changes += history if history[1:] else []
    order = sorted(changes, key=lambda change: change.step)  # keys of one step in the order of their declaration
    return dataclasses.replace(now, changes=tuple(order))


def described(config: "Config", since: int = 1, until: int | None = None) -> Iterator[str]:
    """A line for each change from step `since` to before `until`: "after step 1,200: KEY 0.0004 -> 0.0001"."""
    for change in config.changes:
        if change.step >= max(since, 1) and (until is None or change.step < until):
            before = knobs.value(at(config, change.step - 1), change.key)
            yield f"after step {change.step:,}: {change.key} {before!r} -> {change.value!r}"


def _recorded(config: "Config") -> dict[str, knobs.Key]:
    return {key.name: key for key in knobs.keys(type(config)) if key.knob.recorded}


def _history(changes: "tuple[Change, ...] | list[Change]", key: str) -> list[Change]:
    return [change for change in changes if change.key == key]


def _with(config: "Config", values: dict[str, Any]) -> "Config":
    for name, value in values.items():
        group, _, leaf = name.rpartition(".")
        config = dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **{leaf: value})})
    return config


def _no_record(what: str) -> UserError:
    return UserError(f"--config.changes: {what}; llada train writes this record, give the values of the keys alone")
