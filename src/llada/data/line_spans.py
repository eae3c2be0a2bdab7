"""A stretch of a file's lines: however a file is cut at bytes, each line belongs to one stretch."""

from typing import BinaryIO

_CHUNK_BYTES = 1 << 20


class LineSpan:
    """The lines of a file that begin at the bytes from `start` up to `stop`, as a file; `first` is where."""

    def __init__(self, file: BinaryIO, start: int, stop: int):
        self._file, self._stop = file, stop
        self.first = self._at = self._line_from(start)
        self._ended = self.first >= stop
        file.seek(self.first)

    def _line_from(self, start: int) -> int:
        """Where the first line begins that begins at `start` or later."""
        at = max(start - 1, 0)
        self._file.seek(at)
        while start and (chunk := self._file.read(_CHUNK_BYTES)):
            if (end := chunk.find(b"\n") + 1) > 0:
                return at + end
            at += len(chunk)
        return at

    def read(self, size: int) -> bytes:
        """At most so many bytes; none at the end."""
        chunk = b"" if self._ended else self._file.read(size)
        if (end := chunk.find(b"\n", max(self._stop - 1 - self._at, 0)) + 1) > 0:
            self._ended = True
            chunk = chunk[:end]
        self._at += len(chunk)
        return chunk
