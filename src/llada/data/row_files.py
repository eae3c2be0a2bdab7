"""The files of rows: .npy of N rows of L token ids, written as they come, opened by mapping them into memory."""

import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from llada.errors import UserError


def id_dtype(vocab_size: int) -> np.dtype:
    """Of ids on disk: uint16, or uint32 above 65,536 of them."""
    return np.dtype("<u2" if vocab_size <= 65_536 else "<u4")


def open_rows(path: Path) -> np.ndarray:
    """Rows, memory-mapped. UserError for what is no such file, or has more or less in it than it says."""
    if not path.is_file():
        raise UserError(f"{path.name} is {'no regular file' if path.exists() else 'missing'}")
    try:
        rows_NL = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, TypeError, EOFError, OverflowError, MemoryError) as error:
        raise UserError(f"{path.name}: {' '.join(str(error).split())}") from error
    if not rows_NL.flags.c_contiguous or path.stat().st_size != rows_NL.offset + rows_NL.nbytes:
        raise UserError(f"{path.name} holds more or less than its header says")
    return rows_NL


class RowWriter:
    """Appends rows to a .npy file whose length is not known in advance; counts what it sees."""

    def __init__(self, file: BinaryIO, sequence_length: int, vocab_size: int):
        self.file = file
        self.sequence_length = sequence_length
        self.dtype = id_dtype(vocab_size)
        self.documents = self.tokens = self.bytes = self.rows = self.checksum = 0
        self.counts_V = np.zeros(vocab_size, np.int64)
        self._pending: list[int] = []
        self._write_header()

    def add(self, ids: list[int], byte_count: int) -> None:
        self.documents += 1
        self.tokens += len(ids)
        self.bytes += byte_count
        self._pending += ids
        full = len(self._pending) // self.sequence_length * self.sequence_length
        if full:
            block = np.array(self._pending[:full], self.dtype)
            # Not block.tofile: NumPy writes past Python's file, and drops the error of a disk that is full.
            self.file.write(block.tobytes())
            self.checksum = zlib.crc32(block, self.checksum)
            self.counts_V += np.bincount(block, minlength=len(self.counts_V))
            self.rows += full // self.sequence_length
            del self._pending[:full]

    def finish(self) -> None:
        self.file.seek(0)
        self._write_header()
        self.file.flush()

    def _write_header(self) -> None:
        # NumPy pads the header for 21 digits of the first dimension, so rewriting it never moves the rows.
        shape = (self.rows, self.sequence_length)
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self.file, header)
