"""From what a user types to a canvas of tokens, and back to text.

Infilling marks: `[MASK]` is one token to fill, `[MASK:12]` twelve.
"""

import re

import numpy as np

from llada.data.tokenizer import Tokenizer
from llada.errors import UserError

_MARK = re.compile(r"\[MASK(?::(\d+))?\]")


def from_prompt(prompt_ids: list[int], gen_length: int, mask_id: int, max_length: int) -> np.ndarray:
    """(L,) int32: the prompt, then `gen_length` masks. UserError if it is longer than the model's context."""
    if gen_length < 1:
        raise UserError(f"--gen_length={gen_length} must be at least 1")
    return _checked([*prompt_ids, *[mask_id] * gen_length], max_length)


def from_infill(text: str, tokenizer: Tokenizer, max_length: int) -> np.ndarray:
    """(L,) int32: the text's tokens with masks where its marks stand. UserError without marks or if too long."""
    ids, end = [], 0
    for mark in _MARK.finditer(text):
        ids += [*tokenizer.encode(text[end : mark.start()]), *[tokenizer.mask_id] * int(mark[1] or 1)]
        end = mark.end()
    if tokenizer.mask_id not in ids:
        raise UserError("--infill has nothing to fill; write [MASK] for one token or [MASK:12] for twelve")
    return _checked([*ids, *tokenizer.encode(text[end:])], max_length)


def parse_ids(flag: str, text: str, vocab_size: int) -> list[int]:
    """Token ids from "12,7,99"; UserError naming `flag` for anything else or ids out of range."""
    try:
        ids = [int(word) for word in text.replace(",", " ").split()]
    except ValueError as error:
        raise UserError(f"{flag}={text!r} is not a list of integers such as 12,7,99") from error
    bad = [i for i in ids if not 0 <= i < vocab_size]
    if bad:
        raise UserError(f"{flag} has {bad[0]}; ids of this model are 0 to {vocab_size - 1}")
    return ids


def forbidden_ids(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """Boolean (V,): ids that are no text and no end: padding, unknown, mask, and rows past the tokenizer's last."""
    forbidden_V = np.ones(vocab_size, bool)
    forbidden_V[: tokenizer.vocab_size] = tokenizer.token_bytes_V == 0
    forbidden_V[tokenizer.eos_id] = False
    if tokenizer.eot_id is not None:
        forbidden_V[tokenizer.eot_id] = False
    return forbidden_V


def until_end(ids: list[int], ends: tuple[int, ...], prompt_length: int) -> list[int]:
    """The ids up to the first end token after the prompt."""
    for i in range(prompt_length, len(ids)):
        if ids[i] in ends:
            return ids[:i]
    return ids


def _checked(ids: list[int], max_length: int) -> np.ndarray:
    if len(ids) > max_length:
        raise UserError(
            f"the canvas has {len(ids)} tokens and the model's context is model.max_length={max_length}; "
            "shorten --prompt or --gen_length"
        )
    return np.array(ids, np.int32)
