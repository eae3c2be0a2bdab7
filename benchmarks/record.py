"""Write a benchmark's figures into docs/benchmarks.md, with the command, commit, date and processor they come from.

    record.add_flags(parser)                    # --record, --docs
    record.record(options, "train_speed", rows)  # does nothing without --record

docs/benchmarks.md is prose around sections, `<!-- begin NAME -->` to `<!-- end NAME -->`, which only this module
writes. A section has a heading for each processor and below it a table for each command. A recorded table replaces the
one of the same command on the same processor; the order of headings and tables does not depend on what ran when.
"""

import argparse
import datetime
import importlib.metadata
import itertools
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "benchmarks.md"
CODE = ("src/llada", "benchmarks", "experiments")  # a change elsewhere changes no figure
PACKAGES = ("jax", "libtpu", "torch", "safetensors")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """--record, and --docs for trying it out."""
    parser.add_argument("--record", action="store_true", help="write the figures into docs/benchmarks.md")
    parser.add_argument("--docs", type=Path, default=DOCUMENT, help="record into this file instead")
    parser.set_defaults(commit=commit())  # of the beginning: the checkout may move on during a long run


def record(options: argparse.Namespace, section: str, rows: list[dict[str, str]], machine: str | None = None) -> None:
    """Put `rows`, which map column to cell, into a section, under this processor's heading or that of another machine.

    Does nothing without --record.
    """
    if options.record:
        text = options.docs.read_text(encoding="utf-8")
        recorded = f"{command()}\\\n{origin(options.commit)}\n\n{table(rows)}"
        text = with_table(text, section, machine or processor(), recorded)
        options.docs.write_text(text, encoding="utf-8")


def with_table(document: str, section: str, machine: str, recorded: str) -> str:
    """The document with a table in it: provenance, whose first line is the command, an empty line and the rows."""
    marked = re.compile(rf"(?<=<!-- begin {section} -->\n).*?(?=<!-- end {section} -->)", re.DOTALL)
    old = marked.search(document)
    if old is None:
        raise ValueError(f"the document has no section <!-- begin {section} --> ... <!-- end {section} -->")
    tables = {}
    for part in re.split(r"^#### ", old[0], flags=re.MULTILINE)[1:]:
        name, _, body = part.partition("\n")
        for entry in re.split(r"^(?=`python )", body, flags=re.MULTILINE)[1:]:
            tables[name, entry.partition("\n")[0]] = entry.strip()
    tables[machine, recorded.partition("\n")[0]] = recorded.strip()
    lines = []
    for name, keys in itertools.groupby(sorted(tables), key=lambda key: key[0]):
        lines += [f"#### {name}", *(tables[key] for key in keys)]
    return "\n".join([document[: old.start()], "\n\n".join(lines), "", document[old.end() :]])


def table(rows: list[dict[str, str]]) -> str:
    """A Markdown table; its columns are those of the first row."""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([row[column] for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def command() -> str:
    """The command line, as code, without the flags of this module."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_flags(parser)
    script = Path(sys.argv[0]).resolve().relative_to(ROOT)
    return f"`{shlex.join(['python', str(script), *parser.parse_known_args()[1]])}`"


def origin(commit: str) -> str:
    """Commit, date, versions of Python and of the packages in use."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES if name in sys.modules]
    return ", ".join([f"commit {commit}, {datetime.date.today()}, Python {platform.python_version()}", *versions])


def commit() -> str:
    """Short hash of the commit, followed by + where the code differs from it; "unknown" outside a checkout."""
    head = _git("rev-parse", "--short", "HEAD")
    return head + "+" * bool(_git("status", "--porcelain", "--", *CODE)) if head else "unknown"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def processor() -> str:
    """Accelerators where JAX runs on them, else the CPU's model; cores and memory of the host."""
    jax = sys.modules.get("jax")
    accelerated = jax is not None and jax.default_backend() != "cpu"
    kind = f"{jax.device_count()} x {jax.devices()[0].device_kind}" if accelerated else _cpu()
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{kind}, {os.cpu_count()} cores, {gigabytes:.0f} GiB of memory"


def _cpu() -> str:
    """Virtual machines name every model of a maker alike: with its family and number where Linux has them."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(re.findall(r"^(\S[^\t:]*?)\s*: (.*)$", text, re.MULTILINE))
    if "model name" not in facts:
        return platform.machine()
    return f"{facts['model name']} (family {facts['cpu family']}, model {facts['model']})"
