"""Ids of a text that follows other tokens, as the middle of a text and not as its beginning.

Tokenizers such as Llama's put a space before every text, and would before each piece of one.
"""

import functools
from collections.abc import Iterable

from llada.data.tokenizer import Tokenizer

# Stand-ins for what precedes a piece: the first one serves that the tokenizer does not merge with it.
_BEFORE = ("\n", "(", ")", "|", "。", "0", "a")


def encode_after(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text that follows other tokens, without the space that some tokenizers put before every text."""
    ids, wanted = tokenizer.encode(text), text.encode()
    if spelled_bytes(tokenizer, ids) == wanted:
        return ids
    for before in _BEFORE:
        before_ids, joined_ids = tokenizer.encode(before), tokenizer.encode(before + text)
        if before_ids and joined_ids[: len(before_ids)] == before_ids:
            ids = joined_ids[len(before_ids) :]
            if spelled_bytes(tokenizer, ids) == wanted:
                break
    return ids


@functools.lru_cache(maxsize=1 << 20)
def _token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    return tokenizer.token_bytes(token)


def spelled_bytes(tokenizer: Tokenizer, ids: Iterable[int]) -> bytes:
    """The bytes of text that ids stand for."""
    return b"".join(_token_bytes(tokenizer, token) for token in ids)
