"""The pure function of tokenising: a unit of a plan to its two shards, training and hold-out, and a record of them.

Documents end with eos and lie end to end; rows are cut from them. What is left at the end of a unit, less than a row a
side, stands in its record: `joined` rows of these rests, in the order of the units, are the last shard of each side. So
a corpus loses less than a row a side, however many units it has, and no unit depends on another.
"""

import base64
import contextlib
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llada import json_files
from llada.data import units
from llada.data.holdout import is_holdout
from llada.data.record_files import SUFFIX, RecordFile, RecordWriter
from llada.data.row_packer import RowPacker
from llada.data.tokenizer import Tokenizer
from llada.data.units import Piece
from llada.errors import DataError, UserError
from llada.files import replacing, write_atomically

SIDES = ("train", "holdout")
PACKING = (
    "documents, each ended by eos, lie end to end within a unit and are cut into rows; what is left of each unit, less "
    "than a row, lies end to end in the order of the units, cut into rows, in the shard called rest; its last rest is "
    "dropped"
)
COUNTED = ("documents", "tokens", "bytes")


class Options(NamedTuple):
    """All that rows depend on, besides the inputs and the tokenizer."""

    source: str
    text_key: str
    sequence_length: int
    holdout_fraction: float
    invalid_utf8: str


class Side(NamedTuple):
    """What a unit has come to on one side."""

    documents: int
    tokens: int
    bytes: int
    file: RecordFile | None
    checksums_N: np.ndarray
    rest: np.ndarray
    counts_V: np.ndarray


class Result(NamedTuple):
    """What a unit has come to."""

    sides: tuple[Side, Side]
    holdout_token_bytes: int
    counts: dict[str, int]  # see units.documents


def shard_name(side: str, unit: int | None, count: int) -> str:
    """The file of a unit's rows on one side; None: of the rows joined from rests."""
    return f"{side}-{'rest' if unit is None else f'{unit:05}-of-{count:05}'}{SUFFIX}"


class _Packer(RowPacker):
    """Rows to a RecordWriter."""

    def __init__(self, writer: RecordWriter, sequence_length: int, vocab_size: int):
        super().__init__(sequence_length, vocab_size)
        self.writer = writer

    def _append(self, block: np.ndarray) -> None:
        self.writer.write(block)

    @property
    def rest(self) -> np.ndarray:
        return np.array(self._pending, self.dtype)


def write(
    directory: Path,
    unit: int,
    plan: list[list[Piece]],
    options: Options,
    tokenizer: Tokenizer,
    report: Callable[[Piece, int, int], None] = lambda piece, size, tokens: None,
) -> Result:
    """Write the shards of a unit and then its record; a side without a row has no file.

    `report` is called after each document with its piece, its size in bytes and its tokens, and may raise to end it.
    UserError where the inputs are bad (`units.documents`), DiskError where there is no room, DataError where the unit
    was written before, has lost a shard, and has come to something else now.
    """
    counts: Counter[str] = Counter()
    token_bytes = 0
    with contextlib.ExitStack() as stack:
        packers = [stack.enter_context(_side(directory, side, unit, len(plan), options, tokenizer)) for side in SIDES]
        for piece, text in units.documents(options.source, options.text_key, options.invalid_utf8, plan[unit], counts):
            ids, size, held = tokenizer.encode(text), len(text.encode()), is_holdout(text, options.holdout_fraction)
            packers[held].add([*ids, tokenizer.eos_id], size)
            token_bytes += int(tokenizer.token_bytes_V[ids].sum()) if held else 0
            report(piece, size, len(ids) + 1)
        train, held_out = (
            _finished(packer, shard_name(side, unit, len(plan))) for side, packer in zip(SIDES, packers, strict=True)
        )
        _require_as_before(directory, unit, [train.file, held_out.file])
    result = Result((train, held_out), token_bytes, dict(sorted(counts.items())))
    write_atomically(record_path(directory, unit), json_files.dumps(_to_json(result)).encode())
    return result


def _require_as_before(directory: Path, unit: int, files: list[RecordFile | None]) -> None:
    old = recorded(directory, unit)
    if old and [side.file for side in old.sides] != files:
        raise DataError(
            f"{directory}: the shards of unit {unit}, written again, are not what they were: the inputs are others "
            "now, or a library that reads or writes them; give another --out"
        )


@contextlib.contextmanager
def _side(
    directory: Path, side: str, unit: int | None, count: int, options: Options, tokenizer: Tokenizer
) -> Iterator[_Packer]:
    """A packer of one side, whose file is renamed to its name at the end of the block if it has a row."""
    path = directory / shard_name(side, unit, count)
    with contextlib.ExitStack() as stack:
        temporary = stack.enter_context(replacing(path))
        with RecordWriter(temporary, options.sequence_length) as writer:
            yield _Packer(writer, options.sequence_length, tokenizer.vocab_size)
        if not writer.records:
            temporary.touch()
    if not writer.records:
        path.unlink()


def _finished(packer: _Packer, name: str) -> Side:
    writer = packer.writer
    file = writer.finish(name) if writer.records else None
    figures = {key: getattr(packer, key) for key in COUNTED}
    return Side(**figures, file=file, checksums_N=writer.checksums_N, rest=packer.rest, counts_V=packer.counts_V)


def join(directory: Path, side: int, results: list[Result], options: Options, tokenizer: Tokenizer) -> Side:
    """Write the rows joined from the rests of all units, on one side."""
    with _side(directory, SIDES[side], None, 0, options, tokenizer) as packer:
        for result in results:
            packer.add(result.sides[side].rest.tolist(), 0)
        return _finished(packer, shard_name(SIDES[side], None, 0))


def record_path(directory: Path, unit: int) -> Path:
    """Where the record of a unit is, once its shards are written."""
    return directory / "units" / f"{unit:05}.json"


def finished(directory: Path, unit: int) -> Result | None:
    """The record of a unit whose shards are there, at their sizes; None where it has to be written."""
    result = recorded(directory, unit)
    files = [side.file for side in result.sides if side.file] if result else []
    for file in files:
        path = directory / file.name
        if not path.is_file() or path.stat().st_size != file.bytes:
            return None
    return result


def recorded(directory: Path, unit: int) -> Result | None:
    """The record of a unit, whatever has become of its shards; None where there is none that is whole."""
    try:
        values = json_files.read(record_path(directory, unit))
    except UserError:
        return None
    return _from_json(values) if values == json_files.sealed(values) else None


def _to_json(result: Result) -> dict[str, Any]:
    sides = [
        side._asdict() | {key: _packed(getattr(side, key)) for key in ("checksums_N", "rest", "counts_V")}
        for side in result.sides
    ]
    return json_files.sealed(result._asdict() | {"sides": sides})


def _from_json(values: dict[str, Any]) -> Result:
    sides = [
        Side(
            side["documents"],
            side["tokens"],
            side["bytes"],
            RecordFile(*side["file"]) if side["file"] else None,
            _unpacked(side["checksums_N"]),
            _unpacked(side["rest"]),
            _unpacked(side["counts_V"]),
        )
        for side in values["sides"]
    ]
    return Result((sides[0], sides[1]), values["holdout_token_bytes"], values["counts"])


def _packed(array: np.ndarray) -> list[str]:
    array = array.astype(array.dtype.newbyteorder("<"))
    return [array.dtype.str, base64.b64encode(zlib.compress(array.tobytes())).decode()]


def _unpacked(packed: list[str]) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(packed[1])), packed[0])
