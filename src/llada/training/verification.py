"""All that lies in a workdir, read and compared with what was saved: checkpoints, tokenizer, config, rows."""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from llada import config as config_lib
from llada import json_files
from llada.config import CheckpointConfig, Config
from llada.data import examples, record_corpus, rows
from llada.data.record_files import RecordRows
from llada.data.tokenizer import Tokenizer
from llada.errors import DataError, UserError, causes
from llada.training import arrays, run_item
from llada.training.corpus import (
    Corpus,
    corpus_digest,
    has_rows,
    open_matching,
    require_digest,
    rows_directory,
    saved_tokenizer,
)
from llada.training.digests import Digests
from llada.training.run_item import RunItem

Progress = Callable[[int, int], None]  # of bytes read, and of how many
_BLOCK_BYTES = 16 << 20
# How Python, our own reader, and tensorstore (of an index, and of values) say that a file is not there.
_GONE = re.compile(r"No such file|is missing|NOT_FOUND|expected at least \d+ or \d+ more; at byte 0$")


class Verified(NamedTuple):
    """Names of what is whole, what is wrong with the rest, and remarks on what nothing can be said about."""

    good: list[str]
    damaged: dict[str, str]
    remarks: list[str]


def verify(workdir: Path, progress: Progress | None = None) -> Verified:
    """Read everything in `workdir`; nothing is changed. UserError where there is no run."""
    work = _Work(workdir, progress)
    directory = workdir / "checkpoints"
    steps = run_item.saved_steps(directory)
    if not steps and not (workdir / "config.json").exists():
        raise UserError(f"--workdir={workdir} holds neither config.json nor checkpoints; give the workdir of a run")
    items = {step: work.check(f"checkpoints/{step}/run", lambda s=step: run_item.read(directory, s)) for step in steps}
    work.total = sum(path.stat().st_size for step in steps for path in (directory / str(step)).rglob("*/d/*"))
    for path in sorted(directory.glob("*.damaged*")):
        work.remarks.append(f"checkpoints/{path.name} was set aside by training; remove it once it is not needed")
    good = {step: item for step, item in items.items() if item is not None}
    config = work.check("config.json", lambda: _config(workdir, max(good.items(), default=(0, None))[1]))
    tokenizer = None
    for item in good.values():
        tokenizer = work.check(f"tokenizer of checkpoints/{item.step}", lambda i=item: saved_tokenizer(workdir, i))
    corpus = work.check("metadata of the rows", lambda: _open_rows(work, config, good, tokenizer)) if config else None
    for item in good.values():
        work.read_arrays(directory / str(item.step), item)
    if config and corpus is not None:
        work.check("rows", lambda: _check_rows(work, rows_directory(workdir, config), corpus))
    if config:
        _excuse_half_removed(work, steps, config.checkpoint)
    return Verified(work.good, work.damaged, work.remarks)


class _Work:
    """What has been found so far, and how much has been read."""

    def __init__(self, workdir: Path, progress: Progress | None):
        self.workdir, self.progress = workdir, progress
        self.good: list[str] = []
        self.damaged: dict[str, str] = {}
        self.remarks: list[str] = []
        self.done = self.total = 0

    def check(self, name: str, call: Callable):
        """What `call` returns; None, and a line on what is wrong, where it raises."""
        try:
            value = call()
        except MemoryError:
            raise
        except Exception as error:
            parts = name.split("/")
            if parts[0] == "checkpoints" and not (self.workdir / parts[0] / parts[1]).exists():
                self.remarks.append(f"{name} was removed while it was read")
                return None
            *_, first = causes(error, implicit=False)
            words = " ".join(str(error if isinstance(error, UserError) else first).split())
            self.damaged[name] = words[:300]
            return None
        self.good.append(name)
        return value

    def read(self, count: int) -> None:
        """Report that so many bytes more have been read."""
        self.done += count
        if self.progress:
            self.progress(self.done, max(self.total, self.done))

    def read_arrays(self, step: Path, item: RunItem) -> None:
        """All arrays of a step, leaf by leaf."""
        if item.digests is None:
            self.remarks.append(f"checkpoints/{step.name} was saved without digests: its arrays are read, not compared")
        for part in ("params", *(["optimizer_state"] if item.begun else [])):
            name = f"checkpoints/{step.name}/{part}"
            leaves = self.check(name, lambda p=part: _open(step / p, item.digests_of(p)))
            for leaf_name, leaf in sorted((leaves or {}).items()):
                self.check(f"{name}/{leaf_name}", lambda x=leaf: self._read_leaf(x))

    def _read_leaf(self, leaf: arrays.Leaf) -> None:
        for block in leaf.blocks():
            self.read(leaf.read(block).nbytes)


def _excuse_half_removed(work: _Work, steps: list[int], kept: CheckpointConfig) -> None:
    """A step older than those that are kept, of which files are gone, is no damage: a kill fell into its removal.

    A file that is there and is not what was saved is damage in any step.
    """
    for step in steps[: -kept.keep]:
        parts = [name for name in work.damaged if name.split("/")[:2] == ["checkpoints", str(step)]]
        gone = all(_GONE.search(work.damaged[name]) for name in parts)
        if parts and gone and not (kept.keep_every and step % kept.keep_every == 0):
            for name in parts:
                del work.damaged[name]
            work.remarks.append(
                f"checkpoints/{step} is removed in part: newer ones replace it, and training removes the rest as it "
                "saves again"
            )


def _open(directory: Path, digests: Digests | None) -> dict[str, arrays.Leaf]:
    return arrays.open_leaves(directory, digests)


def _config(workdir: Path, newest: RunItem | None) -> Config:
    """config.json, where it is that of the newest checkpoint."""
    config = config_lib.load(workdir / "config.json")
    if newest is not None:
        run_item.require_same(newest, config, workdir / "checkpoints")
    return config


def _open_rows(work: _Work, config: Config, good: dict[int, RunItem], tokenizer: Tokenizer | None) -> Corpus | None:
    """The run's rows, where they are those of its config, tokenizer and checkpoints; None where there are none."""
    directory = rows_directory(work.workdir, config)
    if not has_rows(directory, config):
        work.remarks.append(f"there are no rows in {directory}")
        return None
    corpus = open_matching(directory, config, tokenizer)
    for item in good.values():
        require_digest(work.workdir, directory, corpus, corpus_digest(work.workdir, item))
    if corpus.metadata.checksums is None:
        work.remarks.append(f"the corpus in {directory} was prepared without checksums: damage has no row to be named")
    work.total += sum(path.stat().st_size for kind in ("*.npy", "*.array_record") for path in directory.glob(kind))
    return corpus


def _check_rows(work: _Work, directory: Path, corpus: Corpus) -> None:
    """DataError for a row that is not what was written, or is beyond the vocabulary; and unless all have the digest."""
    if isinstance(corpus, rows.Corpus) and isinstance(corpus.train_NL, RecordRows):
        if damaged := record_corpus.verify(directory, work.read):
            raise DataError(f"{len(damaged)} files are damaged ({', '.join(damaged)}): {next(iter(damaged.values()))}")
        return
    sha = hashlib.sha256()
    vocab_size = corpus.metadata.vocab_size
    if isinstance(corpus, examples.Corpus):
        for side in (corpus.train, corpus.holdout):
            for example in range(len(side.table_E6)):
                side.read(example, vocab_size)
        for name in (f"{side}{suffix}" for side in examples.SIDES for suffix in (".npy", ".examples.npy")):
            with (directory / name).open("rb") as file:
                while block := file.read(_BLOCK_BYTES):
                    sha.update(block)
                    work.read(len(block))
    else:
        for side_NL in corpus.checked(vocab_size):
            size = max(1, _BLOCK_BYTES // (side_NL.rows_NL.itemsize * side_NL.shape[1]))
            for start in range(0, len(side_NL), size):
                rows_BL = side_NL[start : start + size]
                sha.update(rows_BL.data)
                work.read(rows_BL.nbytes)
    if sha.hexdigest() != corpus.metadata.digest:
        raise DataError(
            f"the rows in {directory} are not those that metadata.json says: their sha256 is another; remove the "
            "directory, and llada train makes them again"
        )


def to_json(verified: Verified) -> str:
    """For programs."""
    return json_files.dumps({"whole": not verified.damaged, **verified._asdict()}, indent=2)
