"""The `llada` program called without a process of its own: same parsing, messages and status, a tenth of the time."""

import contextlib
import importlib
import io
import os
import subprocess
import sys
from pathlib import Path

from absl import flags

_flags_of: tuple = ()  # the command called last


def llada(*arguments, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """As `subprocess.run(["llada", ...], capture_output=True, text=True)` would answer."""
    global _flags_of
    if _flags_of != arguments[:1]:
        # Every command defines flags of its own, some of one name; a process of its own would have one command's only.
        for module, defined in list(flags.FLAGS.flags_by_module_dict().items()):
            for flag in list(defined) if module.startswith("llada.commands.") else ():
                delattr(flags.FLAGS, flag.name)
        for name in [name for name in sys.modules if f"{name}.".startswith("llada.commands.")]:
            del sys.modules[name]
    _flags_of = arguments[:1]
    for name in flags.FLAGS:
        flags.FLAGS[name].unparse()
    flags.FLAGS.unparse_flags()
    program = importlib.import_module("llada.commands.program")
    out, err = io.StringIO(), io.StringIO()
    here = os.getcwd()
    try:
        os.chdir(cwd or here)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = program.main([str(argument) for argument in arguments])
    finally:
        os.chdir(here)
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())
