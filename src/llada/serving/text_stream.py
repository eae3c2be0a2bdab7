"""A reply as text that only grows: what has been sent is never taken back."""

from collections.abc import Sequence

from llada.data.tokenizer import Tokenizer


class TextStream:
    """The text of a reply whose ids come piece by piece, cut at the first of the `stops` strings.

    Held back until more is known: the bytes of an unfinished character, and an end that may begin a stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        """Nothing has been sent yet."""
        self._tokenizer, self._stops = tokenizer, stops
        self._count = 0
        self.text = ""
        self.stopped = False

    def grow(self, ids: Sequence[int], last: bool = False) -> str:
        """The text that `ids`, all of the reply's so far, add to what was sent; `last`: there will be no more."""
        if self.stopped or (len(ids) == self._count and not last):
            return ""
        self._count = len(ids)
        text = self._tokenizer.decode(ids)
        # The one that is complete first, whatever the pieces are in which the ids come.
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            text, self.stopped = text[: min(found)[1]], True
        elif not last:
            text = text.rstrip("\ufffd")
            text = text[: len(text) - self._pending(text)]
        if not text.startswith(self.text) and not last:
            return ""  # a tokenizer that changes its mind about what is before: wait for the end
        added = text[len(self.text) :]
        self.text += added
        return added

    def _pending(self, text: str) -> int:
        """Characters at the end of `text` with which a stop string may begin."""
        lengths = range(min(len(text), max(map(len, self._stops), default=1) - 1), 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)
