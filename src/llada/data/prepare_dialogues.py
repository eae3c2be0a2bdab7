"""Dialogues to examples on disk (examples.py): imported only where they have to be prepared."""

import hashlib
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from llada.config import Config
from llada.data import checksums, dialogues, examples, holdout, rows
from llada.data.chat_template import ChatTemplate, drop_start
from llada.data.dialogues import Dialogue
from llada.data.examples import COLUMNS, SIDES, Corpus, Metadata
from llada.data.prepare import RowWriter, entropy_nats, not_as_written, writable
from llada.data.sources import Remark
from llada.data.tokenizer import Tokenizer
from llada.data.waiting import Report
from llada.errors import UserError, disk_error
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
    """One side being written: its ids go to a file at once, its table is kept until the end."""

    def __init__(self, file, vocab_size: int):
        self.ids = RowWriter(file, 1, vocab_size)
        self.table = array("q")
        self.dialogues = 0
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
        self.table.extend((self._start, answer, self._start + len(ids), self.dialogues - 1, turn, label))

    def finish(self) -> np.ndarray:
        """The table, int64, and all ids written."""
        self.ids.finish()
        return np.array(self.table, np.int64).reshape(-1, len(COLUMNS))


def _write_corpus(directory: Path, config: Config, tokenizer: Tokenizer, log: Remark, report: Report) -> None:
    names = [f"{name}{suffix}" for name in SIDES for suffix in (".npy", ".examples.npy")]
    labels: dict[str, int] = {}
    counts: Counter[str] = Counter()
    with (
        replacing(directory / names[0]) as train_path,
        replacing(directory / names[1]) as train_table,
        replacing(directory / names[2]) as holdout_path,
        replacing(directory / names[3]) as holdout_table,
        train_path.open("wb") as train_file,
        holdout_path.open("wb") as holdout_file,
    ):
        try:
            sides = [_Writer(file, tokenizer.vocab_size) for file in (train_file, holdout_file)]
            _write_dialogues(sides, config, tokenizer, labels, counts, log, report)
            tables = [side.finish() for side in sides]
            for name, table_E6 in zip(SIDES, tables, strict=True):
                _require_examples(name, table_E6, config)
            for path, table_E6 in zip((train_table, holdout_table), tables, strict=True):
                with path.open("wb") as file:
                    np.save(file, table_E6)
        except OSError as error:
            raise disk_error(error, f"writing dialogues to {directory}") or error from error
    train, held_out = sides
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
        train_rows=len(tables[0]),
        holdout_documents=held_out.dialogues,
        holdout_tokens=held_out.ids.tokens,
        holdout_bytes=held_out.ids.bytes,
        holdout_rows=len(tables[1]),
        left_out=counts["left out"],
        truncated=counts["truncated"],
        labels=list(labels),
        unigram_entropy_nats=entropy_nats(train.ids.counts_V),
        digest=_digest(directory, names),
        checksums=_write_checksums(directory, sides, tables),
    )
    rows.write_metadata(directory / "metadata.json", metadata)
    if lost := [f"{count} {what}" for what, count in counts.items() if count]:
        log(f"examples longer than data.sequence_length={config.data.sequence_length}: {', '.join(lost)}")


def _write_dialogues(
    sides: list[_Writer],
    config: Config,
    tokenizer: Tokenizer,
    labels: dict[str, int],
    counts: Counter[str],
    log: Remark,
    report: Report,
) -> None:
    """Give the examples of each dialogue to its side; `labels` and `counts` are filled."""
    template = ChatTemplate(tokenizer)
    drops = examples.own_start(config, tokenizer)
    for number, (held, dialogue) in enumerate(split(config, log), 1):
        side = sides[held]
        try:
            turns = template.turns(dialogue.messages, dialogue.tools)
        except UserError as error:
            raise UserError(f"{dialogue.place}: {error}") from error
        side.new_dialogue(len(dialogues.text_of(dialogue).encode()))
        label = labels.setdefault(dialogue.label, len(labels))
        for turn in turns:
            prompt_ids = drop_start(turn.prompt_ids, tokenizer.special, drops)
            answer_ids = list(turn.answer_ids)
            if not answer_ids or answer_ids[-1] not in tokenizer.special.ends:
                answer_ids.append(tokenizer.eos_id)  # or nothing would say where it ends
            fitted = _fitted(prompt_ids, answer_ids, config, dialogue.place, counts)
            if fitted:
                side.add(prompt_ids, fitted, turn.index, label)
        report(f"rendering dialogues: {number:,}, {(sides[0].ids.tokens + sides[1].ids.tokens) / 1e6:.1f} M tokens")


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


def _write_checksums(directory: Path, sides: list[_Writer], tables: list[np.ndarray]) -> str:
    """Write the crc32 of each example's ids; the sha256 (hex) over all of these, and the tables.

    DiskError unless the ids on disk are those that were written.
    """
    of_examples = []
    for name, side, table_E6 in zip(SIDES, sides, tables, strict=True):
        ids_N = rows.open_rows(directory / f"{name}.npy")[:, 0]
        if zlib.crc32(ids_N.data) != side.ids.checksum:
            raise not_as_written(directory)
        sums = (zlib.crc32(ids_N[start:end].data) for start, _, end in table_E6[:, :3].tolist())
        of_examples.append(np.fromiter(sums, np.uint32, len(table_E6)))
        checksums.write(directory / f"{name}{checksums.SUFFIX}", of_examples[-1])
    return checksums.sha256(*of_examples, *tables)
