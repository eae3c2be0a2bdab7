"""Damage to a prepared corpus, noticed before it is trained on: a crc32 for each row or example, compared when read.

They lie beside the ids that they are of (`train.crc32.npy`). metadata.json holds a sha256 of them, and of all else that
is read when a corpus is opened, and one of itself; so what is opened is whole, and what is read later is checked then.
Letters: N rows (or examples) of a side, B of them read, L ids in a row.
"""

import hashlib
import zlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llada import json_files
from llada.errors import DataError, UserError
from llada.files import replacing

SUFFIX = ".crc32.npy"
_DTYPE = np.dtype("<u4")


def of_rows(rows_BL: np.ndarray) -> np.ndarray:
    """crc32 of the bytes of each row, uint32 (B,)."""
    rows_BL = np.ascontiguousarray(rows_BL)
    return np.fromiter(map(zlib.crc32, rows_BL), _DTYPE, len(rows_BL))


def write(path: Path, checksums_N: np.ndarray) -> None:
    """Write the checksums of a side to `path`, at once or not at all."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, checksums_N.astype(_DTYPE))


def require_count(path: Path, checksums_N: np.ndarray, count: int) -> None:
    """UserError unless a file of checksums holds one for each of so many rows."""
    if checksums_N.shape != (count,) or checksums_N.dtype != _DTYPE:
        raise UserError(f"{path.name} holds {checksums_N.dtype} {checksums_N.shape}, not {count} checksums")


def sha256(*arrays: np.ndarray) -> str:
    """sha256 (hex) over the bytes of arrays that are read when a corpus is opened."""
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(np.ascontiguousarray(array).data)
    return sha.hexdigest()


def require_seal(values: dict[str, Any], name: str = "metadata.json") -> None:
    """UserError unless the values are what was written; those of an older llada, without checksums, have no seal."""
    if ("checksums" in values or "sha256" in values) and values.get("sha256") != json_files.sealed(values)["sha256"]:
        raise UserError(f"{name} is not what was written: its sha256 is another")


class Rows(Protocol):
    """Rows of ids (N, L), in an array or in files."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, L)."""

    @property
    def dtype(self) -> np.dtype:
        """Of an id."""

    @property
    def itemsize(self) -> int:
        """Bytes of an id."""

    def __len__(self) -> int:
        """How many rows there are."""

    def __getitem__(self, index: Any) -> np.ndarray:
        """Some of them."""


class CheckedRows:
    """The rows of one side, `rows[index]`, each compared with its checksum and with the vocabulary when it is read.

    JAX clamps indices that are out of bounds: it would silently train on damaged rows.
    """

    def __init__(self, rows_NL: Rows, checksums_N: np.ndarray | None, vocab_size: int):
        """Take rows, memory-mapped or not; None for a corpus that an older llada prepared without checksums."""
        self.rows_NL, self.checksums_N, self.vocab_size = rows_NL, checksums_N, vocab_size
        self.shape = rows_NL.shape

    def __len__(self) -> int:
        return len(self.rows_NL)

    def __getitem__(self, index: np.ndarray | slice) -> np.ndarray:
        """These rows, copied (B, L). DataError for damage, naming file, row and byte."""
        rows_BL = np.array(self.rows_NL[index], copy=True if isinstance(index, slice) else None)
        if self.checksums_N is not None:
            wrong_B = of_rows(rows_BL) != self.checksums_N[index]
            if wrong_B.any():
                raise self._error(index, int(np.argmax(wrong_B)), 0, "is not what was written: its crc32 is another")
        if rows_BL.size and rows_BL.max() >= self.vocab_size:
            b, at = divmod(int(np.argmax(rows_BL >= self.vocab_size)), rows_BL.shape[1])
            raise self._error(index, b, at, beyond(int(rows_BL[b, at]), self.vocab_size))
        return rows_BL

    def _error(self, index: np.ndarray | slice, b: int, at: int, what: str) -> DataError:
        row = int(np.arange(len(self))[index][b])
        if of_record := getattr(self.rows_NL, "damaged", None):
            return of_record(row, what)
        return damaged(self.rows_NL, f"row {row}", row * self.shape[1] + at, what)


def beyond(token: int, vocab_size: int) -> str:
    """What is wrong with an id."""
    return f"holds id {token}, beyond the {vocab_size} of the vocabulary"


def damaged(ids: Any, record: str, position: int, what: str) -> DataError:
    """The error for a record whose first bad id is the `position`-th of the array."""
    path = getattr(ids, "filename", None)
    where = f"{path}: {record}" if path else record
    remedy = f"remove {Path(path).parent}, and llada train prepares it again" if path else "prepare the corpus again"
    byte = getattr(ids, "offset", 0) + position * ids.dtype.itemsize
    return DataError(f"{where}, at byte {byte}, {what}; llada verify reads the whole corpus; {remedy}")
