"""What a preparation has written so far, so that a call after a kill goes on from there instead of the start.

preparing.json   settings, documents read, a checksum of their texts, and where each side stands
*.partial        what has been written; what lies beyond the sizes in preparing.json is written again

A document is a text, or a dialogue.
"""

import itertools
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

from llada import json_files
from llada.data.sources import Remark
from llada.data.waiting import Report
from llada.errors import UserError
from llada.files import write_atomically

_SECONDS = 10  # between two records: so much work is lost at most

Held = tuple[bool, Any]  # whether a document is held out, and the document


class Unfinished:
    """The record of one directory, which its caller has locked. `state` is the caller's own, as last saved, or None."""

    def __init__(
        self, directory: Path, names: Iterable[str], settings: dict[str, Any], text_of: Callable[[Any], str] = str
    ):
        """Read the record, if there is one of these settings that fits the files `NAME.partial` of its directory.

        `text_of` is all of a document that what is written for it depends on.
        """
        self._path, self._settings, self._text_of = directory / "preparing.json", settings, text_of
        self.paths = [directory / f"{name}.partial" for name in names]
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

    def left(self, documents: Callable[[], Iterator[Held]], log: Remark, report: Report) -> Iterator[Held]:
        """The documents that have not been written: all of them, with no state left, where the first are others now."""
        found = documents()
        if self.state is not None:
            log(f"going on with the preparation that was stopped in {self._path.parent}")
            if not self._skip(found, report):
                log("the documents are others than before: from the start")
                self.remove()
                found = documents()
        return found

    def _skip(self, documents: Iterator[Held], report: Report) -> bool:
        """Read past the documents that have been written; whether they are the same."""
        checksum = 0
        for number, document in enumerate(itertools.islice(documents, self._documents), 1):
            checksum = self._add(checksum, *document)
            if number % 1_000 == 0:
                report(f"reading past {number:,} of {self._documents:,} documents that are prepared")
        return checksum == self._checksum

    def open(self, stack: ExitStack) -> list[BinaryIO]:
        """The files to write, at their ends as recorded, or empty."""
        files = [stack.enter_context(path.open("r+b" if self.state else "wb")) for path in self.paths]
        for file, size in zip(files, self.state["sizes"] if self.state else (), strict=False):
            file.truncate(size)
            file.seek(size)
        return files

    def add(self, documents: Iterable[Held]) -> None:
        """Count documents that have been written."""
        for document in documents:
            self._checksum = self._add(self._checksum, *document)
            self._documents += 1

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

    def _add(self, checksum: int, held: bool, document: Any) -> int:
        text = self._text_of(document)
        return zlib.crc32(text.encode(errors="surrogatepass"), zlib.crc32(b"+" if held else b"-", checksum))
