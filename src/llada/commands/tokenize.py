"""llada tokenize --source=SPEC --tokenizer=PATH --out=DIR [--shards=N --workers=W --only=I/N]

Tokenises a corpus into ArrayRecord shards of rows and manifest.json, for
llada train --config.data.source=array_record:DIR. Sources are those of llada train but for dialogues: stdlib, packages,
text:GLOB[,GLOB ...] or a path; plain text, JSON lines, JSON, Parquet; .gz, .zst, .bz2, .xz.

The input is cut into units, one for each shard, by a plan that is written first; the bytes of the shards depend on the
plan and the tokenizer alone. Called again on the same DIR it does what is missing and no more, and the manifest is
written last. --only=I/N is for job I of N on a file system that all share, such as a Slurm array: each does its units,
and the one that finds all of them finished writes the manifest; if jobs were killed, call any of them again.
"""

import contextlib
import os
import sys
from collections.abc import Iterator

from llada import json_files, knobs, processes
from llada.commands.command_flags import CommandFlags, required
from llada.config import DataConfig
from llada.data import units
from llada.errors import Interrupted, UserError
from llada.paths import user_path, writable_directory

FLAGS = CommandFlags()
SOURCE = FLAGS.define_string("source", None, "stdlib | packages | text:GLOB[,GLOB ...] | a file or directory")
TOKENIZER = FLAGS.define_string(
    "tokenizer", None, "a SentencePiece .model, a tokenizer.json or its directory, or a workdir"
)
OUT = FLAGS.define_string("out", None, "directory of the shards and their manifest; gone on with if it was begun")
SHARDS = FLAGS.define_integer(
    "shards",
    None,
    f"units of input, and shards; default: one for each 64 MiB, at most {units.MOST_UNITS:,}",
    lower_bound=1,
)
WORKERS = FLAGS.define_integer("workers", None, "processes on this host; default: one for each core", lower_bound=1)
ONLY = FLAGS.define_string("only", None, "I/N: the units of job I of N")
SEQUENCE_LENGTH = FLAGS.define_integer("sequence_length", DataConfig.sequence_length, "tokens of a row", lower_bound=1)
HOLDOUT_FRACTION = FLAGS.define_float(
    "holdout_fraction", DataConfig.holdout_fraction, "share of the documents held out, chosen by a hash of their text"
)
TEXT_KEY = FLAGS.define_string("text_key", DataConfig.text_key, "field or column that holds a document's text")
INVALID_UTF8 = FLAGS.define_enum(
    "invalid_utf8",
    "refuse",
    units.INVALID_UTF8,
    "documents that are no UTF-8: refuse, replace by U+FFFD, skip; counted",
)


def run() -> int:
    """Write shards, and print the manifest's figures once it is written; status 129, 130 or 143 after a signal."""
    source = required(SOURCE, "for example --source=text:corpus/**/*.jsonl")
    named = required(TOKENIZER, "for example --tokenizer=runs/first/tokenizer.model")
    out = writable_directory(required(OUT, "for example --out=corpus"), "--out")
    job = processes.job(ONLY.value) if ONLY.value else (1, 1)
    with own_flags():
        knobs.check(
            DataConfig(
                sequence_length=SEQUENCE_LENGTH.value,
                holdout_fraction=HOLDOUT_FRACTION.value,
                text_key=TEXT_KEY.value,
                source=source,
            ),
            "config.data",
        )
        from llada.data import tokenizer_files, tokenizing
        from llada.data.shards import Options
        from llada.training import stopping

        path = user_path(named, "--tokenizer")
        tokenizer = tokenizer_files.load(tokenizer_files.in_workdir(path) or path, "--tokenizer")
        options = Options(source, TEXT_KEY.value, SEQUENCE_LENGTH.value, HOLDOUT_FRACTION.value, INVALID_UTF8.value)
        with stopping.stop_signals() as received:
            try:
                values = tokenizing.tokenize(
                    out, options, tokenizer, SHARDS.value, job, WORKERS.value or cores(), _log, received.check
                )
            except Interrupted as end:
                print(f"llada tokenize: {end}", file=sys.stderr)
                return end.status
    if values is not None:
        names = ("units", "train_rows", "holdout_rows", "train_tokens", "holdout_tokens", "left_out", "digest")
        print(json_files.dumps({name: values[name] for name in names}, indent=2))
    return 0


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def own_flags() -> Iterator[None]:
    """A block whose errors call keys of the config, --config.data.KEY, by the flags of this command, --KEY."""
    try:
        yield
    except UserError as error:
        renamed = str(error).replace("--config.data.", "--")
        if renamed == str(error):
            raise
        raise type(error)(renamed) from error


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
