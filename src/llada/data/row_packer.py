"""The ids of documents, one after the other, cut into rows."""

import zlib

import numpy as np


def id_dtype(vocab_size: int) -> np.dtype:
    """Of ids on disk: uint16, or uint32 above 65,536 of them."""
    return np.dtype("<u2" if vocab_size <= 65_536 else "<u4")


class RowPacker:
    """Cuts the ids of documents, one after the other, into rows; counts what it sees."""

    def __init__(self, sequence_length: int, vocab_size: int):
        self.sequence_length = sequence_length
        self.dtype = id_dtype(vocab_size)
        self.documents = self.tokens = self.bytes = self.rows = self.checksum = 0
        self.counts_V = np.zeros(vocab_size, np.int64)
        self._pending: list[int] = []

    def add(self, ids: list[int], byte_count: int) -> None:
        """Append the ids of a document of so many bytes."""
        self.documents += 1
        self.tokens += len(ids)
        self.bytes += byte_count
        self._pending += ids
        full = len(self._pending) // self.sequence_length * self.sequence_length
        if full:
            block = np.array(self._pending[:full], self.dtype)
            self._append(block)
            self.checksum = zlib.crc32(block.data, self.checksum)
            self.counts_V += np.bincount(block, minlength=len(self.counts_V))
            self.rows += full // self.sequence_length
            del self._pending[:full]

    def _append(self, block: np.ndarray) -> None:
        """Write rows, as one array of ids."""
        raise NotImplementedError
