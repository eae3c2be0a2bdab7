"""What a preparation has written so far, so that a call after a kill goes on from there instead of the start.

preparing.json   settings, documents read, a checksum of their texts, and where each side stands
SIDE.partial     rows of a side; what lies beyond the size in preparing.json is written again
"""

import itertools
import os
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llada import json_files
from llada.data.waiting import Report
from llada.errors import UserError
from llada.files import write_atomically

_SECONDS = 10  # between two records: so much work is lost at most

Texts = Iterator[tuple[bool, str]]


class Unfinished:
    """The record of one directory, which its caller has locked. `state` is the caller's own, as last saved, or None."""

    def __init__(self, directory: Path, settings: dict[str, Any]):
        """Read the record, if there is one of these settings that fits its files."""
        self._path, self._settings = directory / "preparing.json", settings
        self.paths = [directory / "train.partial", directory / "holdout.partial"]
        self._documents = self._checksum = 0
        self._saved_at = time.monotonic()
        self.state = self._read()

    def _read(self) -> dict[str, Any] | None:
        try:
            values = json_files.read(self._path)
            sizes = [path.stat().st_size for path in self.paths]
        except (OSError, UserError):
            return None
        if values != json_files.sealed(values) or values["settings"] != self._settings:
            return None
        if any(size < least for size, least in zip(sizes, values["sizes"], strict=True)):
            return None
        self._documents, self._checksum = values["documents"], values["texts"]
        return values["state"] | {"sizes": values["sizes"]}

    def skip(self, texts: Texts, report: Report) -> bool:
        """Read past the texts that have been written; False, with no state left, where they are others now."""
        checksum = 0
        for number, (held, text) in enumerate(itertools.islice(texts, self._documents), 1):
            checksum = _add(checksum, held, text)
            if number % 1_000 == 0:
                report(f"reading past {number:,} of {self._documents:,} documents that are tokenised")
        if checksum == self._checksum:
            return True
        self.remove()
        return False

    def add(self, texts: list[tuple[bool, str]]) -> None:
        """Count texts that have been written."""
        for held, text in texts:
            self._checksum = _add(self._checksum, held, text)
        self._documents += len(texts)

    def due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() - self._saved_at >= _SECONDS

    def save(self, state: dict[str, Any], files: list) -> None:
        """Record where the caller stands, once the sides' files are on disk up to there."""
        for file in files:
            file.flush()
            os.fsync(file.fileno())
        values = {"settings": self._settings, "documents": self._documents, "texts": self._checksum, "state": state}
        values["sizes"] = [file.tell() for file in files]
        write_atomically(self._path, json_files.dumps(json_files.sealed(values)).encode())
        self._saved_at = time.monotonic()

    def kept(self) -> bool:
        """Whether there is a record to go on from."""
        return self._path.exists()

    def remove(self) -> None:
        """Forget all of it."""
        for path in (self._path, *self.paths):
            path.unlink(missing_ok=True)
        self._documents, self._checksum, self.state = 0, 0, None


def _add(checksum: int, held: bool, text: str) -> int:
    return zlib.crc32(text.encode(errors="surrogatepass"), zlib.crc32(b"+" if held else b"-", checksum))
