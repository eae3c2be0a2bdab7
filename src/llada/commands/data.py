"""llada data --source=SPEC | --workdir=DIR [--tokenizer=PATH --rows=N --verify --at_step=N]

Shows what a run reads, as JSON. Of array_record:DIR and of a workdir's rows: documents, tokens, bytes per token, the
share of rows that are there twice, and the first rows as text. Of other sources, all of whose documents are read: their
lengths, the share of duplicates, the first of them, and tokens where --tokenizer is given.
--at_step=N, with --workdir, shows the rows of that step's batch (0 is the first), with their files and records.

--verify reads everything and compares it with the manifest: what is damaged is printed by name, and the status is 4.
"""

import sys
from pathlib import Path

from llada import json_files
from llada.commands import progress
from llada.commands.command_flags import CommandFlags
from llada.commands.tokenize import own_flags
from llada.config import ARRAY_RECORD, DIALOGUES, DataConfig
from llada.errors import DataError, UserError
from llada.paths import user_path

FLAGS = CommandFlags()
SOURCE = FLAGS.define_string("source", None, "array_record:DIR, or a source of documents: stdlib, packages, text:GLOB")
WORKDIR = FLAGS.define_string("workdir", None, "directory of a run, whose rows are shown")
TOKENIZER = FLAGS.define_string("tokenizer", None, "of documents: count tokens by it; default: the rows' own")
TEXT_KEY = FLAGS.define_string("text_key", DataConfig.text_key, "field or column that holds a document's text")
ROWS = FLAGS.define_integer("rows", 2, "how many rows or documents are shown", lower_bound=0)
VERIFY = FLAGS.define_bool("verify", False, "read all of it and compare it with the manifest")
AT_STEP = FLAGS.define_integer("at_step", None, "show the batch of this step of --workdir", lower_bound=0)


def run() -> int:
    """Print what is read; status 4 where --verify finds damage."""
    if bool(SOURCE.value) == bool(WORKDIR.value):
        raise UserError("give one of --source=array_record:DIR and --workdir=DIR")
    if AT_STEP.value is not None and not WORKDIR.value:
        raise UserError("--at_step=N is about the batches of a run; give its --workdir=DIR")
    with own_flags():
        if WORKDIR.value:
            return _of_run(user_path(WORKDIR.value, "--workdir"))
        if (SOURCE.value or "").startswith(ARRAY_RECORD):
            return _of_records(SOURCE.value or "")
        return _of_documents(SOURCE.value or "")


def _of_records(source: str) -> int:
    from llada.data import inspection, record_corpus, tokenizer_files

    directory = record_corpus.directory_of(source, "--source")
    if VERIFY.value:
        return _verify(directory)
    corpus = record_corpus.open_corpus(directory)
    tokenizer = tokenizer_files.load(record_corpus.tokenizer_path(directory))
    return _print(inspection.of_rows(corpus, tokenizer, ROWS.value))


def _verify(directory: Path) -> int:
    """Of a directory that llada tokenize wrote."""
    from llada.data import record_corpus

    total, done = record_corpus.total_bytes(directory), 0
    with progress.bar("bytes read") as show:

        def read(size: int) -> None:
            nonlocal done
            done += size
            if show is not None:
                show(done, total)

        damaged = record_corpus.verify(directory, read)
    for name, what in damaged.items():
        print(f"{name}: DAMAGED: {what}")
    count = sum(map(len, record_corpus.read_manifest(directory).files))
    print(f"{directory}: {count} shards and their manifest were read, {len(damaged)} are damaged")
    return DataError.status if damaged else 0


def _of_documents(source: str) -> int:
    from llada.data import inspection, tokenizer_files

    if VERIFY.value:
        raise UserError(f"--verify compares {ARRAY_RECORD}DIR with its manifest; --source={source} has none")
    if source.startswith(DIALOGUES):
        raise UserError(f"--source={source}: dialogues become examples, not rows; llada data shows documents and rows")
    tokenizer = tokenizer_files.load(TOKENIZER.value, "--tokenizer") if TOKENIZER.value else None
    data = DataConfig(source=source, text_key=TEXT_KEY.value)
    return _print(inspection.of_documents(data, tokenizer, ROWS.value))


def _of_run(workdir: Path) -> int:
    from llada.data import inspection, rows
    from llada.training import corpus as corpus_lib
    from llada.training import run as run_lib

    found = run_lib.describe(workdir)
    corpus = run_lib.corpus_of_run(workdir, found.config, found.tokenizer, found.corpus_digest)
    if not isinstance(corpus, rows.Corpus):
        raise UserError(
            f"--workdir={workdir} was fine-tuned: it reads examples, not rows, which llada data does not show"
        )
    if VERIFY.value:
        if found.config.reads_records:
            return _verify(corpus_lib.rows_directory(workdir, found.config))
        raise UserError(f"--verify is for {ARRAY_RECORD}DIR; llada verify --workdir={workdir} reads these rows as well")
    if AT_STEP.value is None:
        return _print(inspection.of_rows(corpus, found.tokenizer, ROWS.value))
    batches = corpus.batches(found.config, found.tokenizer)
    return _print(inspection.of_step(batches, AT_STEP.value, found.tokenizer))


def _print(values: dict) -> int:
    sys.stdout.write(json_files.dumps(values, indent=2) + "\n")
    return 0
