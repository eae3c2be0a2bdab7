"""The `llada` program run within the test process: same parsing, messages and status, in a tenth of the time."""

import contextlib
import io
import os
import subprocess
from pathlib import Path

from llada.commands import program


def llada(*arguments, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """As `subprocess.run(["llada", ...], capture_output=True, text=True)` would answer."""
    out, err = io.StringIO(), io.StringIO()
    here = os.getcwd()
    try:
        os.chdir(cwd or here)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = program.main([str(argument) for argument in arguments])
    finally:
        os.chdir(here)
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())
