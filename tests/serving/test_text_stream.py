"""A reply as text that only grows: whatever the pieces, the same text, and nothing is taken back."""

import random
from types import SimpleNamespace

import pytest

from llada.serving.text_stream import TextStream

BYTES = SimpleNamespace(decode=lambda ids: bytes(ids).decode(errors="replace"))  # a token is a byte


def streamed(ids, stops, cuts):
    """The pieces of a reply that is looked at after `cuts` tokens."""
    stream = TextStream(BYTES, stops)
    return [stream.grow(ids[:cut]) for cut in cuts] + [stream.grow(ids, last=True)], stream


@pytest.mark.fast
def test_random_texts_and_stops_in_random_pieces():
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(rng.choice("aab é☃𝄞") for _ in range(rng.randrange(12)))
        ids = list(text.encode()) + rng.choice([[], [0xE2, 0x98]])  # half a snowman at the end
        stops = ["".join(rng.choice("ab é☃") for _ in range(rng.randint(1, 3))) for _ in range(rng.randrange(3))]
        cuts = sorted(rng.randrange(len(ids) + 1) for _ in range(rng.randrange(6)))
        pieces, stream = streamed(ids, stops, cuts)
        whole, at_once = streamed(ids, stops, [])
        assert "".join(pieces) == whole[0] == stream.text == at_once.text and stream.stopped == at_once.stopped
        # By definition: the stop string that is complete first, token by token.
        full = bytes(ids).decode(errors="replace")
        ended = next((n for n in range(len(full) + 1) if any(full[:n].endswith(stop) for stop in stops)), None)
        longest = [] if ended is None else [stop for stop in stops if full[:ended].endswith(stop)]
        assert stream.text == (full if ended is None else full[: ended - len(max(longest, key=len))])
        assert stream.stopped == (ended is not None)


@pytest.mark.fast
def test_what_cannot_become_a_stop_or_another_character_is_sent_at_once():
    assert streamed(list("a☃b".encode()), [], [1, 2, 3, 4, 5])[0] == ["a", "", "", "☃", "b", ""]
    assert streamed(list(b"one END two"), ["END"], [3, 5, 6, 7])[0] == ["one", " ", "", "", ""]
    assert streamed(list(b"one ENTER"), ["END"], [6, 7])[0] == ["one ", "ENT", "ER"]
