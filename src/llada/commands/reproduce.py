"""llada reproduce --workdir=DIR [--out=NEW]

Trains the run of a workdir again, from its config, rows, tokenizer and the record of its calls alone (calls.jsonl), and
compares: the digests of parameters and moments, the rows that were read, and every line of metrics.jsonl but for
clocks. Beforehand it says, a line each, what may make bits differ: another jax, processor, number of cores or devices,
another llada. Of a run that is not finished it reproduces the newest checkpoint. DIR is only read.

The last line is the verdict; status 0 where all is equal, else 1. --out=NEW keeps the new run, which is otherwise in a
temporary directory ($TMPDIR) and removed. A run of several processes is reproduced by as many, with the flags of llada
train and an --out that all of them see.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

from llada import processes
from llada.commands import environment, joining
from llada.commands.command_flags import CommandFlags, required
from llada.errors import Interrupted, UserError
from llada.paths import user_path, writable_directory

FLAGS = CommandFlags(joining.FLAGS)
WORKDIR = FLAGS.define_string("workdir", None, "directory of the run to reproduce")
OUT = FLAGS.define_string("out", None, "new directory that keeps the reproduction; default: a temporary one")


def run() -> int:
    """Train again and compare; status 1 where something differs, 129, 130 or 143 after a signal."""
    workdir = user_path(required(WORKDIR, "for example --workdir=runs/first"), "--workdir")
    out = writable_directory(OUT.value, "--out") if OUT.value else None
    joining.join()
    environment.retain_freed_memory()
    if out is None and processes.count() > 1:
        raise UserError("--out is needed where several processes reproduce a run: a directory that all of them see")
    from llada.training import reproduction

    with processes.agreement():
        plan = reproduction.plan(workdir)
        if processes.is_first() and out is not None:
            reproduction.empty_directory(out)
    if processes.is_first():
        for line in plan.doubts:
            print(f"remark: {line}", file=sys.stderr, flush=True)
    directory = out or Path(tempfile.mkdtemp(prefix="llada-reproduce-"))
    try:
        wrong = reproduction.train_again(plan, directory)
    except Interrupted as end:
        if processes.is_first():
            print(f"llada reproduce: stopped by signal {end.signal_number}; nothing is known", file=sys.stderr)
        return end.status
    except KeyboardInterrupt:
        _remove(out, directory)
        os._exit(130)  # as llada train does: threads that save would go on
    finally:
        _remove(out, directory)
    if processes.is_first():
        print(reproduction.verdict(plan, wrong), flush=True)
    return 1 if wrong else 0


def _remove(out: Path | None, directory: Path) -> None:
    if out is None:
        shutil.rmtree(directory, ignore_errors=True)
