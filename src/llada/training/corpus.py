"""The tokenizer and the rows of a run: opened where they are, else prepared, and compared with those trained on."""

import contextlib
import functools
import hashlib
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from llada import json_files, processes
from llada.config import Config
from llada.data import control_tokens, examples, record_corpus, rows, tokenizer_files
from llada.data.tokenizer import Tokenizer
from llada.errors import DataError, UserError
from llada.files import write_atomically
from llada.objectives import families
from llada.paths import user_path
from llada.training.run_item import RunItem

Log = Callable[[str], None]
Check = Callable[[], None]
# Of documents, or of dialogues.
Corpus = rows.Corpus | examples.Corpus
Metadata = rows.Metadata | examples.Metadata


def rows_directory(workdir: Path, config: Config) -> Path:
    """Where the run's rows are stored. UserError where an array_record source is nowhere."""
    if config.data.directory is not None:
        return user_path(config.data.directory, "--config.data.directory")
    return record_corpus.directory_of(config.data.source) if config.reads_records else workdir / "data"


def has_rows(directory: Path, config: Config) -> bool:
    """Whether finished rows, or examples, of the kind that the config reads are in a directory."""
    return (directory / (record_corpus.MANIFEST if config.reads_records else "metadata.json")).exists()


def corpus_for(
    workdir: Path,
    config: Config,
    tokenizer: Tokenizer,
    digest: str | None = None,
    log: Log = lambda text: None,
    check: Check = lambda: None,
) -> Corpus:
    """The run's rows, tokenised once and stored under `data.directory`, or else `workdir/data`.

    With the `digest` of what the run has been trained on, other rows are a DataError; those that are prepared again are
    compared before they take their place. `log` and `check` are those of prepare.prepare.
    """
    directory = rows_directory(workdir, config)
    if config.reads_records or has_rows(directory, config):
        corpus = open_matching(directory, config, tokenizer)
        require_digest(workdir, directory, corpus, digest)
        remark(directory, corpus)
        return corpus
    if digest is None:
        return _prepare(directory, config, tokenizer, log, check)
    again = directory / "prepared-again"
    try:
        require_digest(workdir, directory, _prepare(again, config, tokenizer, log, check), digest)
        for path in sorted(again.glob("*.npy")):
            path.replace(directory / path.name)
        (again / "metadata.json").replace(directory / "metadata.json")  # which counts, last
    finally:
        shutil.rmtree(again, ignore_errors=True)
        with contextlib.suppress(OSError):
            directory.rmdir()  # where there was none before
    return open_corpus(directory, config)


def remark(directory: Path, corpus: Corpus) -> None:
    """A line, from the first process, for a corpus whose rows cannot be checked when they are read."""
    if corpus.metadata.checksums is None and processes.is_first():
        _remark_unchecked(directory)


@functools.cache  # one line in a process
def _remark_unchecked(directory: Path) -> None:
    sys.stderr.write(
        f"the corpus in {directory} was prepared without checksums, by an older llada: damage to its rows stays unseen "
        "until llada verify reads them\n"
    )


def open_corpus(directory: Path, config: Config) -> Corpus:
    """What is in a directory of rows, or of examples where the config fine-tunes. DataError if it is damaged."""
    if config.reads_records:
        return record_corpus.open_corpus(directory)
    return examples.open_corpus(directory) if config.fine_tunes else rows.open_corpus(directory)


def open_matching(directory: Path, config: Config, tokenizer: Tokenizer | None = None, flag: str = "") -> Corpus:
    """The same; UserError where it was prepared by other values, or another tokenizer, if that is known."""
    if config.fine_tunes:
        return examples.open_matching(directory, config, tokenizer, flag)
    if config.reads_records:
        return _open_records(directory, config, tokenizer)
    return rows.open_matching(directory, config.data, tokenizer.sha256 if tokenizer else None, flag)


def _open_records(directory: Path, config: Config, tokenizer: Tokenizer | None) -> rows.Corpus:
    corpus = record_corpus.open_matching(directory, config.data)
    if tokenizer is not None and tokenizer.sha256 != corpus.metadata.tokenizer_sha256:
        # The corpus has the tokenizer as it was given; the run's may have a mask token more.
        theirs = fitted(tokenizer_files.load(record_corpus.tokenizer_path(directory)), config)
        if theirs.sha256 != tokenizer.sha256:
            raise UserError(
                f"the rows in {directory} are ids of another tokenizer, {corpus.metadata.tokenizer_sha256[:12]}..., "
                f"than the run's ({tokenizer.sha256[:12]}); leave out --config.data.tokenizer for a new --workdir, or "
                "tokenise with the run's"
            )
    return corpus


def matches(corpus: Corpus, config: Config, tokenizer: Tokenizer) -> bool:
    """Whether these values prepared it."""
    if isinstance(corpus, examples.Corpus):
        return not examples.differences(corpus.metadata, config, tokenizer)
    if config.reads_records:
        return not record_corpus.differences(corpus.metadata, config.data)
    return not rows.differences(corpus.metadata, config.data, tokenizer.sha256)


def _prepare(directory: Path, config: Config, tokenizer: Tokenizer, log: Log, check: Check) -> Corpus:
    if config.fine_tunes:
        from llada.data import prepare_dialogues  # not needed where there are examples

        return prepare_dialogues.prepare(directory, config, tokenizer, log, check)
    from llada.data import prepare  # not needed where there are rows

    return prepare.prepare(directory, config.data, tokenizer, log, check)


def require_documents(config: Config) -> None:
    """UserError for a source without a document, or a dialogue: asked before any work begins."""
    if config.fine_tunes:
        from llada.data import prepare_dialogues  # only to prepare

        prepare_dialogues.require_dialogues(config)
    elif config.reads_records:
        record_corpus.open_matching(record_corpus.directory_of(config.data.source), config.data)
    else:
        from llada.data import holdout  # only to prepare

        holdout.require_documents(config.data)


def corpus_digest(workdir: Path, item: RunItem) -> str | None:
    """Of the rows that a run has been trained on; None where nothing says it: before training, and in old runs."""
    path = workdir / "summary.json"
    digest = item.cursor.get("corpus_digest")
    if digest is None and item.begun and path.exists():
        digest = json_files.read(path).get("corpus_digest")
    return digest


def require_digest(workdir: Path, directory: Path, corpus: Corpus, digest: str | None) -> None:
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
    """The run's tokenizer: the workdir's copy, else `data.tokenizer`, else the array_record corpus's, else a new one.

    It is trained on the training documents. `log` is called where it is changed or trained; `check` between documents,
    and may raise to end it.
    """
    path = tokenizer_files.in_workdir(workdir)
    named = config.data.tokenizer and user_path(config.data.tokenizer, "--config.data.tokenizer")

    if path is not None:
        tokenizer = fitted(tokenizer_files.load(path), config)
        # A file that has moved is no matter: the workdir's copy counts.
        if named and named.exists() and fitted(tokenizer_files.load(named), config).sha256 != tokenizer.sha256:
            raise UserError(f"--config.data.tokenizer={named} is not the tokenizer that {workdir} was begun with")
        return tokenizer
    if config.reads_records and not named:
        named = record_corpus.tokenizer_path(rows_directory(workdir, config))
    if named:
        tokenizer = fitted(tokenizer_files.load(named), config, log)
        tokenizer_files.require_exportable(tokenizer, f"--config.data.tokenizer={named}")
        write_atomically(workdir / tokenizer.file_name, tokenizer.content)
        return tokenizer
    from llada.data import tokenizer_training  # not needed where there is a tokenizer

    log(f"training the tokenizer: {config.model.vocab_size:,} pieces, from {config.data.source}")
    path = workdir / tokenizer_training.SentencePieceTokenizer.file_name
    texts = _training_texts(config)
    controls = _template_and_controls(control_tokens.builtin("plain"), config)[1] if config.fine_tunes else []
    tokenizer = tokenizer_training.train_tokenizer(texts, config.model.vocab_size, path, log, check, controls)
    with_template = fitted(tokenizer, config)
    if with_template.sha256 != tokenizer.sha256:  # another one than it was trained with
        write_atomically(path, with_template.content)
    return with_template


def fitted(tokenizer: Tokenizer, config: Config, remark: Log = lambda line: None) -> Tokenizer:
    """The tokenizer as the config needs it: `tokenizer_files.fitted` to its model, and `with_dialogue` to fine-tune.

    UserError, too, for an ARM whose inputs are to be masked, and no mask token.
    """
    size, share = config.model.vocab_size, config.objective.input_masking
    tokenizer = tokenizer_files.fitted(tokenizer, size, families.of(config).masks, remark)
    if share and tokenizer.mask_id is None:
        raise UserError(
            f"--config.objective.input_masking={share}: the tokenizer has no mask token, and model.vocab_size={size} "
            "leaves no id free for one; set it to 0, or begin a model of another size"
        )
    return with_dialogue(tokenizer, config) if config.fine_tunes else tokenizer


def _training_texts(config: Config) -> Iterator[str]:
    if config.fine_tunes:
        from llada.data import prepare_dialogues

        return prepare_dialogues.training_texts(config)
    from llada.data import holdout

    return holdout.training(config.data)


def with_dialogue(tokenizer: Tokenizer, config: Config) -> Tokenizer:
    """The tokenizer with the chat template that the config asks for, and the control tokens that fine-tuning needs.

    UserError for a template that cannot be read, and where the model has no rows for its tokens.
    """
    template, names = _template_and_controls(tokenizer.template, config)
    return tokenizer.with_dialogue(template, names, config.model.vocab_size)


def _template_and_controls(own: str | None, config: Config) -> tuple[str, list[str]]:
    """The template of the config, else the tokenizer's `own`, else the plain one; the control tokens to be had."""
    asked = config.dialogues.template or (None if own else "plain")
    pattern = control_tokens.NAMED
    if asked is None:
        template, pattern = own or "", control_tokens.OF_BUILT_IN
    elif asked in control_tokens.BUILT_IN:
        template = control_tokens.builtin(asked)
    else:
        flag = "--config.dialogues.template"
        template = json_files.read_text(user_path(asked, flag), name=f"{flag}={asked}")
    names = list(dict.fromkeys(pattern.findall(template)))
    if config.dialogues.padding == "rainbow":
        names += control_tokens.RAINBOW
    return template, names


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
