"""Dialogues to examples on disk (examples.py): imported only where they have to be prepared."""

import contextlib
import dataclasses
import hashlib
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from llada.config import Config
from llada.data import checksums, dialogues, examples, holdout, rows
from llada.data.chat_template import ChatTemplate, drop_start
from llada.data.dialogues import Dialogue
from llada.data.examples import COLUMNS, SIDES, Corpus, Metadata
from llada.data.prepare import RowWriter, entropy_nats, not_as_written, writable
from llada.data.sources import Remark
from llada.data.tokenizer import Tokenizer
from llada.data.unfinished import Unfinished
from llada.data.waiting import Report
from llada.errors import DiskError, UserError, disk_error
from llada.files import queue_for_lock, replacing

# Of up to so many dialogues the held-out ones are those with the smallest hashes, so that there are some.
_FEW = 1_000


def prepare(
    directory: Path,
    config: Config,
    tokenizer: Tokenizer,
    log: Remark = lambda line: None,
    check: Callable[[], None] = lambda: None,
) -> Corpus:
    """Render and tokenise the dialogues of `data.source` under `directory`, or open them if that has been done.

    Arguments and promises are those of `prepare.prepare`. UserError too for dialogues and templates that cannot be
    used, naming file and record, and for examples longer than a row where `dialogues.too_long` refuses them.
    """
    report = Report(log, check)
    metadata = directory / "metadata.json"
    with writable(directory):
        if not metadata.exists():
            with queue_for_lock(directory / ".lock", f"prepares {directory}", report.check):
                if not metadata.exists():
                    _write_corpus(directory, config, tokenizer, log, report)
    return examples.open_matching(directory, config, tokenizer)


def split(config: Config, remark: Remark = lambda line: None) -> Iterator[tuple[bool, Dialogue]]:
    """Yield (is held out, dialogue) of every dialogue. UserError as `dialogues.read`.

    As `holdout.split` does with documents: by a hash of the messages, or by a source of their own.
    """
    data = config.data
    found = dialogues.read(_argument(data.source), remark)
    if data.holdout_source is not None:
        flag = "--config.data.holdout_source"
        held = set()
        for dialogue in dialogues.read(_argument(data.holdout_source, flag), remark, flag):
            held.add(dialogues.key(dialogue))
            yield True, dialogue
        yield from ((False, dialogue) for dialogue in found if dialogues.key(dialogue) not in held)
        return
    first: list[Dialogue] = []
    for dialogue in found:
        first.append(dialogue)
        if len(first) > _FEW:
            break
    fraction = data.holdout_fraction
    if len(first) <= _FEW:
        hashes = sorted({holdout.text_hash(dialogues.key(dialogue)) for dialogue in first})
        last = hashes[max(1, round(fraction * len(hashes))) - 1] if hashes else 0
        yield from ((holdout.text_hash(dialogues.key(dialogue)) <= last, dialogue) for dialogue in first)
        return
    for dialogue in (*first, *found):
        yield holdout.is_holdout(dialogues.key(dialogue), fraction), dialogue


def training_texts(config: Config) -> Iterator[str]:
    """The texts of the dialogues that are trained on, for a tokenizer to learn from."""
    return (dialogues.text_of(dialogue) for held, dialogue in split(config) if not held)


def require_dialogues(config: Config) -> None:
    """UserError for sources without a dialogue: asked before any work begins."""
    next(split(config), None)


def _argument(source: str, flag: str = "--config.data.source") -> str:
    if not dialogues.is_dialogues(source):
        raise UserError(f"{flag}={source} must be dialogues, too: dialogues:GLOB")
    return source.partition(":")[2]


class _Writer:
    """One side being written: its ids, and its table, of which a checksum is kept."""

    def __init__(self, ids_file: BinaryIO, table_file: BinaryIO, vocab_size: int):
        self.ids = RowWriter(ids_file, 1, vocab_size)
        self._table_file = table_file
        self.table_E6 = np.zeros((0, len(COLUMNS)), np.int64)
        self.dialogues = self.checksum = 0
        self._shared: list[int] = []  # the ids of the dialogue's last example, and where they begin
        self._start = 0

    def new_dialogue(self, byte_count: int) -> None:
        """What follows are examples of the next dialogue."""
        self.dialogues += 1
        self.ids.add([], byte_count)
        self._shared = []

    def add(self, prompt_ids: list[int], answer_ids: list[int], turn: int, label: int) -> None:
        """One example: its ids are stored as far as the dialogue's last one does not begin with them."""
        shared = len(self._shared)
        if not shared or prompt_ids[:shared] != self._shared:
            self._start, shared = self.ids.tokens, 0
        ids = [*prompt_ids, *answer_ids]
        self.ids.add(ids[shared:], 0)
        self._shared = ids
        answer = self._start + len(prompt_ids)
        row_6 = np.array((self._start, answer, self._start + len(ids), self.dialogues - 1, turn, label), np.int64)
        self._table_file.write(row_6.tobytes())
        self.checksum = zlib.crc32(row_6.data, self.checksum)

    def state(self) -> dict[str, Any]:
        """What `restore` takes, ready for JSON; between two dialogues."""
        return {"ids": self.ids.state(), "dialogues": self.dialogues, "checksum": self.checksum}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where a writer of these files stood."""
        self.ids.restore(state["ids"])
        self.dialogues, self.checksum = state["dialogues"], state["checksum"]

    def finish(self) -> None:
        """Have all on disk, and read the table back. DiskError where it is not what was written."""
        self.ids.finish()
        self._table_file.flush()
        path = Path(self._table_file.name)
        self.table_E6 = np.fromfile(path, np.int64).reshape(-1, len(COLUMNS))
        if zlib.crc32(self.table_E6.data) != self.checksum:
            raise not_as_written(path.parent)


class _Sides:
    """Both sides being written, with what is counted over them: labels by their number, examples that do not fit."""

    def __init__(self, files: list[BinaryIO], config: Config, tokenizer: Tokenizer):
        self.both = [_Writer(files[i], files[i + 1], tokenizer.vocab_size) for i in (0, 2)]
        self.labels: dict[str, int] = {}
        self.counts: Counter[str] = Counter()
        self._config, self._tokenizer, self._template = config, tokenizer, ChatTemplate(tokenizer)
        self._drops = examples.own_start(config, tokenizer)

    def add(self, held: bool, dialogue: Dialogue) -> None:
        """Give the examples of a dialogue to its side."""
        side, special = self.both[held], self._tokenizer.special
        try:
            turns = self._template.turns(dialogue.messages, dialogue.tools)
        except UserError as error:
            raise UserError(f"{dialogue.place}: {error}") from error
        side.new_dialogue(len(dialogues.text_of(dialogue).encode()))
        label = self.labels.setdefault(dialogue.label, len(self.labels))
        for turn in turns:
            prompt_ids = drop_start(turn.prompt_ids, special, self._drops)
            answer_ids = list(turn.answer_ids)
            if not answer_ids or answer_ids[-1] not in special.ends:
                answer_ids.append(self._tokenizer.eos_id)  # or nothing would say where it ends
            fitted = _fitted(prompt_ids, answer_ids, self._config, dialogue.place, self.counts)
            if fitted:
                side.add(prompt_ids, fitted, turn.index, label)

    def state(self) -> dict[str, Any]:
        """What `restore` takes, ready for JSON."""
        of_sides = [side.state() for side in self.both]
        return {"sides": of_sides, "labels": list(self.labels), "counts": dict(self.counts)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where the writing of these files stood."""
        for side, of_side in zip(self.both, state["sides"], strict=True):
            side.restore(of_side)
        self.labels = {label: number for number, label in enumerate(state["labels"])}
        self.counts = Counter(state["counts"])

    def __str__(self) -> str:
        count, tokens = (sum(found) for found in zip(*((x.dialogues, x.ids.tokens) for x in self.both), strict=True))
        return f"{count:,}, {tokens / 1e6:.1f} M tokens"


def _write_corpus(directory: Path, config: Config, tokenizer: Tokenizer, log: Remark, report: Report) -> None:
    settings: dict[str, Any] = {"data": dataclasses.asdict(config.data) | {"directory": None}}
    settings |= {
        "tokenizer": tokenizer.sha256,
        "too_long": config.dialogues.too_long,
        "own_start": examples.own_start(config, tokenizer),
    }
    directory.mkdir(parents=True, exist_ok=True)
    parts = [f"{name}{suffix}" for name in SIDES for suffix in ("", ".examples")]
    names = [f"{part}.npy" for part in parts]
    unfinished = Unfinished(directory, parts, settings, _all_of)
    try:
        sides = _write_sides(unfinished, config, tokenizer, log, report)
        for side, ids_path, ids, table in zip(sides.both, unfinished.paths[::2], names[::2], names[1::2], strict=True):
            with replacing(directory / ids) as temporary:
                ids_path.rename(temporary)
            with replacing(directory / table) as temporary, temporary.open("wb") as file:
                np.save(file, side.table_E6)
    except OSError as error:
        raise disk_error(error, f"writing dialogues to {directory}") or error from error
    finally:
        if not unfinished.kept():
            unfinished.remove()
    train, held_out = sides.both
    metadata = Metadata(
        kind="dialogues",
        source=config.data.source,
        sequence_length=config.data.sequence_length,
        holdout_fraction=config.data.holdout_fraction,
        holdout_source=config.data.holdout_source,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        too_long=config.dialogues.too_long,
        own_start=examples.own_start(config, tokenizer),
        train_documents=train.dialogues,
        train_tokens=train.ids.tokens,
        train_bytes=train.ids.bytes,
        train_rows=len(train.table_E6),
        holdout_documents=held_out.dialogues,
        holdout_tokens=held_out.ids.tokens,
        holdout_bytes=held_out.ids.bytes,
        holdout_rows=len(held_out.table_E6),
        left_out=sides.counts["left out"],
        truncated=sides.counts["truncated"],
        labels=list(sides.labels),
        unigram_entropy_nats=entropy_nats(train.ids.counts_V),
        digest=_digest(directory, names),
        checksums=_write_checksums(directory, sides.both),
    )
    rows.write_metadata(directory / "metadata.json", metadata)
    unfinished.remove()
    if lost := [f"{count} {what}" for what, count in sides.counts.items() if count]:
        log(f"examples longer than data.sequence_length={config.data.sequence_length}: {', '.join(lost)}")


def _all_of(dialogue: Dialogue) -> str:
    """All that the examples of a dialogue depend on."""
    return f"{dialogues.key(dialogue)} {dialogue.tools!r} {dialogue.label}"


def _write_sides(unfinished: Unfinished, config: Config, tokenizer: Tokenizer, log: Remark, report: Report) -> _Sides:
    """The examples of all dialogues, in the partial files."""
    found = unfinished.left(lambda: split(config, log), log, report)
    with contextlib.ExitStack() as stack:
        files = unfinished.open(stack)
        sides = _Sides(files, config, tokenizer)
        if unfinished.state:
            sides.restore(unfinished.state)
        for held, dialogue in found:
            sides.add(held, dialogue)
            unfinished.add([(held, dialogue)])
            if unfinished.due():
                unfinished.save(sides.state(), files)
            report(f"rendering dialogues: {sides}")
        try:
            for side in sides.both:
                side.finish()
        except DiskError:
            unfinished.remove()  # the next call begins at the start
            raise
    for name, side in zip(SIDES, sides.both, strict=True):
        _require_examples(name, side.table_E6, config)
    return sides


def _fitted(
    prompt_ids: list[int], answer_ids: list[int], config: Config, place: str, counts: Counter[str]
) -> list[int]:
    """As much of the answer as fits into a row behind its prompt. UserError for less than all, unless truncated."""
    room = config.data.sequence_length - len(prompt_ids)
    if len(answer_ids) <= room:
        return answer_ids
    if config.dialogues.too_long == "refuse":
        raise UserError(
            f"{place}: a prompt of {len(prompt_ids)} tokens and an answer of {len(answer_ids)} do not fit a row of "
            f"data.sequence_length={config.data.sequence_length}; raise it, or --config.dialogues.too_long=truncate"
        )
    counts["truncated" if room > 0 else "left out"] += 1
    return answer_ids[: max(room, 0)]


def _require_examples(name: str, table_E6: np.ndarray, config: Config) -> None:
    if len(table_E6):
        return
    side = {"train": "training", "holdout": "held-out"}[name]
    raise UserError(
        f"the {side} side has no example; give more dialogues, change data.holdout_fraction="
        f"{config.data.holdout_fraction} or set --config.data.holdout_source"
    )


def _digest(directory: Path, names: list[str]) -> str:
    """sha256 (hex) over the bytes of all files, one after the other."""
    sha = hashlib.sha256()
    for name in names:
        with (directory / name).open("rb") as file:
            while block := file.read(1 << 20):
                sha.update(block)
    return sha.hexdigest()


def _write_checksums(directory: Path, sides: list[_Writer]) -> str:
    """Write the crc32 of each example's ids; the sha256 (hex) over all of these, and the tables.

    DiskError unless the ids on disk are those that were written.
    """
    of_examples = []
    for name, side in zip(SIDES, sides, strict=True):
        ids_N = rows.open_rows(directory / f"{name}.npy")[:, 0]
        if zlib.crc32(ids_N.data) != side.ids.checksum:
            raise not_as_written(directory)
        sums = (zlib.crc32(ids_N[start:end].data) for start, _, end in side.table_E6[:, :3].tolist())
        of_examples.append(np.fromiter(sums, np.uint32, len(side.table_E6)))
        checksums.write(directory / f"{name}{checksums.SUFFIX}", of_examples[-1])
    return checksums.sha256(*of_examples, *(side.table_E6 for side in sides))
