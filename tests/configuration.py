"""Writes docs/configuration.md, every key of a config by what the key declares: `python tests/configuration.py`."""

from pathlib import Path

from llada import knobs
from llada.config import Config
from llada.scaling.sweep_config import SweepConfig

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"

INTRODUCTION = """# Configuration

Written by `python tests/configuration.py` from `src/llada/config.py` and `src/llada/scaling/sweep_config.py`; a test
holds it to them. On the command line a key is `--config.KEY=VALUE`; in an experiment file it is a field of the
`ConfigDict` that `get_config` returns. `llada train --help_config` prints the same in the terminal.

`later`: whether a later call on the same workdir may give another value. `yes`: at will; `recorded`: it holds from the
next step on, and `changes` in config.json says from which ([running.md](running.md)). All other keys are fixed with the
first checkpoint, since they decide which model it is or what it sees at a given step.
"""


def page() -> str:
    """The page as it should be."""
    groups = [("Training run", "", Config), ("Sweep (`llada sweep`)", "sweep.", SweepConfig)]
    return INTRODUCTION + "".join(f"\n## {title}\n{_tables(cls, prefix)}" for title, prefix, cls in groups)


def _tables(cls: type, prefix: str) -> str:
    lines: list[str] = []
    group = None
    for key in knobs.keys(cls, prefix):
        if key.name.rpartition(".")[0] != group:
            group = key.name.rpartition(".")[0]
            if group.rstrip("."):
                lines += ["", f"### `{group}`"]
            lines += ["", "| key | kind | default | allowed | later | meaning |", "|---|---|---|---|---|---|"]
        limits = "" if key.knob.choices and key.knob.limits in key.knob.meaning else key.knob.limits
        default = f"`{key.default!r}`" if key.default != "" else "empty"
        cells = [f"`{key.name}`", knobs.named(key.annotation), default, limits]
        cells.append("yes" if key.knob.changeable else "recorded" if key.knob.recorded else "")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in (*cells, key.knob.meaning)) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
