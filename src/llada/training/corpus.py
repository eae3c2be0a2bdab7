"""The rows of a run: made, found again, and compared with those that it has been trained on."""

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

from llada import json_files
from llada.config import Config
from llada.data import rows
from llada.data.tokenizer import Tokenizer
from llada.errors import DataError, UserError
from llada.paths import user_path
from llada.training import run_item
from llada.training.run_item import RunItem


def corpus_for(
    workdir: Path,
    config: Config,
    tokenizer: Tokenizer,
    digest: str | None = None,
    say: Callable[[str], None] | None = None,
    check: Callable[[], None] | None = None,
) -> rows.Corpus:
    """The run's rows, tokenised once and kept under `data.directory`, or else `workdir/data`.

    With the `digest` of what the run has been trained on, other rows are a DataError, and those made anew are compared
    before they take their place. `say` and `check` are the `progress` and `check` of rows.prepare.
    """
    d, directory = config.data, rows_directory(workdir, config)
    made = directory
    if digest and not (directory / "metadata.json").exists():
        made = directory / "made-anew"
    try:
        corpus = rows.prepare(
            made,
            *(d.source, tokenizer, d.sequence_length, d.holdout_fraction),
            text_key=d.text_key,
            holdout_source=d.holdout_source,
            progress=say,
            check=check,
        )
        if digest and corpus.metadata.digest != digest:
            raise _another_corpus(workdir, directory, corpus.metadata.digest, digest)
        if made != directory:
            for name in ("train.npy", "holdout.npy", "metadata.json"):  # which counts, last
                (made / name).replace(directory / name)
            corpus = rows.open_corpus(directory)
    finally:
        if made != directory:
            shutil.rmtree(made, ignore_errors=True)
            with contextlib.suppress(OSError):
                directory.rmdir()  # where there was none before
    return corpus


def corpus_of_run(workdir: Path, config: Config, tokenizer: Tokenizer, step: int) -> rows.Corpus:
    """The rows that the run of `step` was trained on, opened where they are and never made.

    They lie where the config says, in the workdir, or in the sweep that the workdir belongs to. UserError where there
    are none, DataError where they are others.
    """
    item = run_item.read(workdir / "checkpoints", step)
    digest = corpus_digest(workdir, item)
    own = rows_directory(workdir, config)
    places = list(dict.fromkeys([own, workdir / "data", workdir.absolute().parent.parent / "data"]))
    found = [place for place in places if (place / "metadata.json").exists()]
    for place in found:
        corpus = rows.open_corpus(place)
        d, m = config.data, corpus.metadata
        asked = (d.source, d.sequence_length, d.holdout_fraction, d.text_key, d.holdout_source, tokenizer.sha256)
        found_ = (m.source, m.sequence_length, m.holdout_fraction, m.text_key, m.holdout_source, m.tokenizer_sha256)
        as_asked = asked == found_
        if m.digest == digest or (digest is None and as_asked):
            return corpus
    if own in found and digest is not None:
        raise _another_corpus(workdir, own, rows.open_corpus(own).metadata.digest, digest)
    raise UserError(
        f"no rows of {workdir} in {' or '.join(map(str, places[:2]))}; llada train --workdir={workdir} makes them from "
        f"data.source={config.data.source}, or finds them with --config.data.directory=DIR"
    )


def corpus_digest(workdir: Path, item: RunItem) -> str | None:
    """Of the rows that a run has been trained on; None where nothing says it: before training, and in old runs."""
    path = workdir / "summary.json"
    digest = item.cursor.get("corpus_digest")
    if digest is None and item.begun and path.exists():
        digest = json_files.read(path).get("corpus_digest")
    return digest


def _another_corpus(workdir: Path, directory: Path, found: str, wanted: str) -> DataError:
    return DataError(
        f"{directory}: these rows (digest {found}) are not those that {workdir} was trained on (digest {wanted}); put "
        "back the documents that it was made from, or give its rows by --config.data.directory=DIR; for another corpus "
        "give a new --workdir"
    )


def rows_directory(workdir: Path, config: Config) -> Path:
    """Where the run's rows are kept."""
    given = config.data.directory
    return workdir / "data" if given is None else user_path(given, "--config.data.directory")
