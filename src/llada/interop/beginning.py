"""`llada train --init=SOURCE`: a workdir whose model begins as another run's, or as a Hugging Face directory's.

The model, and with it the family, are the source's; everything else, dropout too, is the experiment's. What a workdir
began from is written down in it (init.json), so that the same command goes on from its own checkpoints later.
"""

import contextlib
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from llada import json_files, processes
from llada.config import Config
from llada.data import tokenizer_files
from llada.errors import UserError
from llada.interop import importing
from llada.interop.importing import Report
from llada.training import optimizer
from llada.training.corpus import fitted, require_documents

_RECORD = "init.json"


def adopt(values: dict[str, Any], init: Path, workdir: Path) -> dict[str, Any]:
    """An experiment's nested dict with the model that it begins from, or has begun from.

    UserError for a source that cannot be read, and a workdir that did not begin from it.
    """
    saved = workdir / "config.json"
    if saved.exists():
        record = json_files.read(workdir / _RECORD) if (workdir / _RECORD).exists() else {}
        if record.get("source") != str(init.resolve()):
            began = f"began from {record['source']}" if "source" in record else "did not begin by --init"
            raise UserError(f"--workdir={workdir} {began}, not from --init={init}; give a new --workdir")
        theirs = json_files.read(saved)
    else:
        theirs = _config_of(init)
    model = theirs["model"] | {"dropout": values["model"]["dropout"]}
    objective = values["objective"] | {"name": theirs["objective"]["name"]}
    return values | {"model": model, "objective": objective}


def begin(
    config: Config, init: Path, workdir: Path, progress: Report | None = None, allow_nonfinite: bool = False
) -> None:
    """Create the workdir with the source's parameters as step 0, unless that has been done. All processes call it.

    What can be refused before the parameters are read is: UserError, and nothing is left behind. UserError too for NaN
    and infinity among them, unless that is allowed.
    """
    with processes.agreement():
        if not processes.is_first() or (workdir / "config.json").exists():
            return
        optimizer.parse_schedule(config)
        require_documents(config)
        if processes.count() == 1:
            _begin(config, init, workdir, progress, allow_nonfinite)
        else:
            _begin_alone(config, init, workdir, allow_nonfinite)


def _begin_alone(config: Config, init: Path, workdir: Path, allow_nonfinite: bool) -> None:
    """`_begin` in a process of its own: where there are several, Orbax would wait for all of them to write."""
    before = os.environ.get("JAX_PLATFORMS")
    os.environ["JAX_PLATFORMS"] = "cpu"  # read by the new process
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            pool.submit(_begin, config, init, workdir, None, allow_nonfinite).result()
    finally:
        os.environ.pop("JAX_PLATFORMS")
        os.environ |= {} if before is None else {"JAX_PLATFORMS": before}


def _begin(config: Config, init: Path, workdir: Path, progress: Report | None, allow_nonfinite: bool) -> None:
    with _as_init():
        source = importing.open_source(init, allow_nonfinite=allow_nonfinite)
        tokenizer = fitted(source.tokenizer, config)
        tokenizer_files.require_exportable(tokenizer, f"--init={init}")
        record = json_files.dumps({"source": str(init.resolve())}, indent=2) + "\n"
        files = source.files | {_RECORD: record.encode()}
        importing.write(source._replace(tokenizer=tokenizer, files=files), config, workdir, progress)


def _config_of(init: Path) -> dict[str, Any]:
    """The config of a workdir, or the one that an import would begin with."""
    with _as_init():
        importing.require_directory(init)
        path = init / "config.json"
        if path.exists() and "model" in (values := json_files.read(path)):
            return values
        return importing.open_source(init).config


@contextlib.contextmanager
def _as_init() -> Iterator[None]:
    """A block in which errors of an import call the source by the flag that named it here."""
    try:
        yield
    except UserError as error:
        raise type(error)(str(error).replace("--source", "--init")) from error
