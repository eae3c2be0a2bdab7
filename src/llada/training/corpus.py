"""The tokenizer and the rows of a run: opened where they are, else prepared, and compared with those trained on."""

import contextlib
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

from llada import json_files
from llada.config import Config
from llada.data import rows, tokenizer_files
from llada.data.tokenizer import Tokenizer
from llada.errors import DataError, UserError
from llada.files import write_atomically
from llada.objectives import families
from llada.paths import user_path
from llada.training.run_item import RunItem

Log = Callable[[str], None]
Check = Callable[[], None]


def rows_directory(workdir: Path, config: Config) -> Path:
    """Where the run's rows are stored."""
    directory = config.data.directory
    return workdir / "data" if directory is None else user_path(directory, "--config.data.directory")


def corpus_for(
    workdir: Path,
    config: Config,
    tokenizer: Tokenizer,
    digest: str | None = None,
    log: Log = lambda text: None,
    check: Check = lambda: None,
) -> rows.Corpus:
    """The run's rows, tokenised once and stored under `data.directory`, or else `workdir/data`.

    With the `digest` of what the run has been trained on, other rows are a DataError; those that are prepared again are
    compared before they take their place. `log` and `check` are those of prepare.prepare.
    """
    directory = rows_directory(workdir, config)
    if (directory / "metadata.json").exists():
        corpus = rows.open_matching(directory, config.data, tokenizer.sha256)
        require_digest(workdir, directory, corpus, digest)
        return corpus
    from llada.data.prepare import prepare  # not needed where there are rows

    if digest is None:
        return prepare(directory, config.data, tokenizer, log, check)
    again = directory / "prepared-again"
    try:
        require_digest(workdir, directory, prepare(again, config.data, tokenizer, log, check), digest)
        for name in ("train.npy", "holdout.npy", "metadata.json"):  # which counts, last
            (again / name).replace(directory / name)
    finally:
        shutil.rmtree(again, ignore_errors=True)
        with contextlib.suppress(OSError):
            directory.rmdir()  # where there was none before
    return rows.open_corpus(directory)


def corpus_digest(workdir: Path, item: RunItem) -> str | None:
    """Of the rows that a run has been trained on; None where nothing says it: before training, and in old runs."""
    path = workdir / "summary.json"
    digest = item.cursor.get("corpus_digest")
    if digest is None and item.begun and path.exists():
        digest = json_files.read(path).get("corpus_digest")
    return digest


def require_digest(workdir: Path, directory: Path, corpus: rows.Corpus, digest: str | None) -> None:
    """DataError unless the rows are those that were trained on; None where that is not known."""
    if digest and corpus.metadata.digest != digest:
        raise DataError(
            f"{directory}: these rows (digest {corpus.metadata.digest}) are not those that {workdir} was trained on "
            f"(digest {digest}); put back the documents that it was made from, or give its rows by "
            "--config.data.directory=DIR; for another corpus give a new --workdir"
        )


def tokenizer_for(
    workdir: Path, config: Config, log: Log = lambda text: None, check: Check = lambda: None
) -> Tokenizer:
    """The run's tokenizer: the workdir's copy, else `data.tokenizer`, else one trained on the training documents.

    `log` is called where it is changed or trained; `check` between documents, and may raise to end it.
    """
    path = tokenizer_files.in_workdir(workdir)
    named = config.data.tokenizer and user_path(config.data.tokenizer, "--config.data.tokenizer")

    def fitted(tokenizer: Tokenizer, remark: Log = lambda line: None) -> Tokenizer:
        return tokenizer_files.fitted(tokenizer, config.model.vocab_size, families.of(config).masks, remark)

    if path is not None:
        tokenizer = fitted(tokenizer_files.load(path))
        # A file that has moved is no matter: the workdir's copy counts.
        if named and named.exists() and fitted(tokenizer_files.load(named)).sha256 != tokenizer.sha256:
            raise UserError(f"--config.data.tokenizer={named} is not the tokenizer that {workdir} was begun with")
        return tokenizer
    if named:
        tokenizer = fitted(tokenizer_files.load(named), log)
        tokenizer_files.require_exportable(tokenizer, f"--config.data.tokenizer={named}")
        write_atomically(workdir / tokenizer.file_name, tokenizer.content)
        return tokenizer
    from llada.data import holdout, tokenizer_training  # not needed where there is a tokenizer

    log(f"training the tokenizer: {config.model.vocab_size:,} pieces, from {config.data.source}")
    path = workdir / tokenizer_training.SentencePieceTokenizer.file_name
    return tokenizer_training.train_tokenizer(holdout.training(config.data), config.model.vocab_size, path, log, check)


def saved_tokenizer(workdir: Path, item: RunItem) -> Tokenizer:
    """The workdir's tokenizer, or else the copy in a checkpoint. UserError where the two differ."""
    path = tokenizer_files.in_workdir(workdir)
    if path is None:
        return tokenizer_files.parse(item.tokenizer, f"the tokenizer in the checkpoint of step {item.step}")
    tokenizer = tokenizer_files.load(path)
    if tokenizer.sha256 != hashlib.sha256(item.tokenizer).hexdigest():
        raise UserError(
            f"{path} is not the tokenizer of the checkpoint of step {item.step}, which holds a copy of its own; "
            f"move {path} away to use that"
        )
    return tokenizer
