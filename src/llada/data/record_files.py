"""ArrayRecord files of rows: a row is a record, its ids as they are in memory, little-endian.

Each record is a chunk of its own (`group_size:1`), so that any of them can be read alone; Riegeli, the format below,
compares each with a hash when it is read. Letters: N rows of all files, B of them read, L ids in a row.
"""

import bisect
import hashlib
import itertools
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from llada.data import checksums
from llada.errors import DataError, DiskError, UserError, disk_error, in_brief

SUFFIX = ".array_record"
_WRITE = "group_size:1"
_READ = "readahead_buffer_size:0,max_parallelism:0"  # for single records
_BLOCK_BYTES = 1 << 20


class RecordFile(NamedTuple):
    """A file of rows: its name, how many there are, its size, and the sha256 of the file and of its rows' bytes."""

    name: str
    records: int
    bytes: int
    sha256: str
    rows_sha256: str


class RecordWriter:
    """Writes rows to a new ArrayRecord file, as a block: closed at its end."""

    def __init__(self, path: Path, sequence_length: int):
        self._path, self._length = path, sequence_length
        self._writer: Any = None
        self._rows_sha = hashlib.sha256()
        self._checksums: list[np.ndarray] = []
        self.records = 0

    def write(self, ids: np.ndarray) -> None:
        """Append rows, given as one array of ids."""
        rows_BL = np.ascontiguousarray(ids).reshape(-1, self._length)
        if self._writer is None:
            self._path.touch()  # the library says nothing where it cannot create a file
            self._writer = _library().ArrayRecordWriter(str(self._path), _WRITE)
        try:
            for row_L in rows_BL:
                self._writer.write(row_L.tobytes())
        except RuntimeError as error:
            raise self._failed(error) from error
        self._rows_sha.update(rows_BL.data)
        self._checksums.append(checksums.of_rows(rows_BL))
        self.records += len(rows_BL)

    @property
    def checksums_N(self) -> np.ndarray:
        """The crc32 of each row."""
        return np.concatenate([np.zeros(0, "<u4"), *self._checksums])

    def finish(self, name: str) -> RecordFile:
        """Close the file, which will be called `name`, and say what it holds. DiskError where that is not so."""
        self.close()
        path, records = str(self._path), self.records
        if _library().ArrayRecordReader(path, _READ).num_records() != records:
            raise DiskError(f"{path} does not hold the {records} rows that were written; check the disk, then go on")
        size, digest = size_and_sha256(self._path)
        return RecordFile(name, records, size, digest, self._rows_sha.hexdigest())

    def close(self) -> None:
        """Close the file, if one was begun. DiskError where its end cannot be written."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            try:
                writer.close()
            except RuntimeError as error:
                raise self._failed(error) from error

    def _failed(self, error: RuntimeError) -> Exception:
        return disk_error(error, f"writing {self._path}") or DiskError(f"writing {self._path}: {in_brief(error)}")

    def __enter__(self) -> "RecordWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class RecordRows:
    """The rows of several files in their order, `rows[index]`, read when they are asked for, by any thread.

    They are compared with their checksums by checksums.CheckedRows.
    """

    def __init__(self, directory: Path, files: Sequence[RecordFile], sequence_length: int, dtype: np.dtype):
        """Take files of `directory`. DataError, before any is read, where one is missing or its size is another."""
        self.files, self.dtype, self._directory = list(files), dtype, directory
        for file in self.files:
            require_size(directory / file.name, file)
        self._ends = list(itertools.accumulate(file.records for file in self.files))
        self.shape = (self._ends[-1] if self._ends else 0, sequence_length)
        self._readers: list[Any] = [None] * len(self.files)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def itemsize(self) -> int:
        """Bytes of an id."""
        return self.dtype.itemsize

    def where(self, row: int) -> tuple[Path, int]:
        """The file that holds a row, and which of its records that is."""
        file = bisect.bisect_right(self._ends, row)
        return self._directory / self.files[file].name, row - (self._ends[file - 1] if file else 0)

    def damaged(self, row: int, what: str) -> DataError:
        """The error for a row, naming its file and record."""
        return damaged(*self.where(row), what)

    def __getitem__(self, index: np.ndarray | slice) -> np.ndarray:
        """These rows (B, L). DataError for a record that is damaged, naming file and record."""
        ids_B = np.arange(len(self))[index]
        rows_BL = np.empty((len(ids_B), self.shape[1]), self.dtype)
        for b, row in enumerate(ids_B.tolist()):
            rows_BL[b] = self._row(row)
        return rows_BL

    def _row(self, row: int) -> np.ndarray:
        path, record = self.where(row)
        try:
            content = self._reader(bisect.bisect_right(self._ends, row)).read([record])[0]
        except RuntimeError as error:
            raise damaged(path, record, f"cannot be read ({in_brief(error)})") from error
        row_L = np.frombuffer(content, self.dtype) if len(content) % self.itemsize == 0 else np.zeros(0, self.dtype)
        if row_L.shape != self.shape[1:]:
            raise damaged(path, record, f"holds {len(content)} bytes, not {self.shape[1]} ids of {self.itemsize}")
        return row_L

    def _reader(self, file: int) -> Any:
        if self._readers[file] is None:
            with self._lock:
                if self._readers[file] is None:
                    path = self._directory / self.files[file].name
                    try:
                        reader = _library().ArrayRecordReader(str(path), _READ)
                        count = reader.num_records()
                    except RuntimeError as error:
                        raise _unusable(path, f"cannot be opened ({in_brief(error)})") from error
                    if count != self.files[file].records:
                        raise _unusable(path, f"holds {count} records, and {self.files[file].records} in the manifest")
                    self._readers[file] = reader
        return self._readers[file]


def require_size(path: Path, file: RecordFile) -> None:
    """DataError unless there is a file of this size."""
    if not path.is_file():
        raise _unusable(path, "is no regular file" if path.exists() else "is missing")
    if (size := path.stat().st_size) != file.bytes:
        raise _unusable(path, f"has {size:,} bytes, and {file.bytes:,} in the manifest")


def damaged(path: Path, record: int, what: str) -> DataError:
    """The error for one record."""
    return _unusable(path, f"record {record} {what}", colon=True)


def _unusable(path: Path, what: str, colon: bool = False) -> DataError:
    remedy = "remove it, and llada tokenize, called as before, writes it again"
    return DataError(f"{path}{':' if colon else ''} {what}; llada data --verify reads all of them; {remedy}")


def size_and_sha256(path: Path) -> tuple[int, str]:
    """Of a file, read block by block."""
    sha, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            sha.update(block)
            size += len(block)
    return size, sha.hexdigest()


def _library() -> Any:
    try:
        from array_record.python import array_record_module
    except ImportError as error:
        raise UserError(
            f"ArrayRecord files need the package array-record ({error}): pip install array-record"
        ) from error
    return array_record_module
