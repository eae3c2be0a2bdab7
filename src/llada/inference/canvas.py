"""From what a user types to a canvas of tokens, and back to text.

Infilling marks: `[MASK]` is one token to fill, `[MASK:12]` twelve. Text that stands behind other tokens is encoded as
the middle of a text: tokenizers such as Llama's would put a space before each piece of it.
"""

import functools
import numbers
import os
import re
import sys
from collections.abc import Iterable, Sequence

import numpy as np

from llada.data.tokenizer import Tokenizer, unicode_text
from llada.errors import UserError

_MARK = re.compile(r"\[MASK(?::([^\]\n]*))?\]")
_DIGITS = 18  # of a number that is worth reading
# Stand-ins for what precedes a piece: whichever the tokenizer keeps apart from it serves.
_BEFORE = ("\n", "(", ")", "|", "。", "0", "a")


def from_prompt(prompt_ids: list[int], gen_length: int, filler: int, max_length: int) -> np.ndarray:
    """(L,) int32: the prompt, then `gen_length` times `filler`. UserError if it is longer than the model's context."""
    if gen_length < 1:
        raise UserError(f"--gen_length={gen_length} must be at least 1")
    _check_length(len(prompt_ids) + gen_length, max_length)
    return np.array([*prompt_ids, *[filler] * gen_length], np.int32)


def from_infill(text: str, tokenizer: Tokenizer, max_length: int) -> np.ndarray:
    """(L,) int32: the text's tokens with masks where its marks stand. UserError without marks or if too long."""
    marks = list(_MARK.finditer(text))
    if not marks:
        raise UserError("--infill has nothing to fill; write [MASK] for one token or [MASK:12] for twelve")
    counts = [_count(mark) for mark in marks]
    _check_length(sum(counts), max_length)
    cuts = [0, *(place for mark in marks for place in mark.span()), len(text)]
    given = [text[start:end] for start, end in zip(cuts[::2], cuts[1::2], strict=True)]
    ids: list[int] = []
    for piece, count in zip(given, [*counts, 0], strict=True):
        ids += encode_after(tokenizer, piece) if ids else tokenizer.encode(piece)
        ids += [tokenizer.mask_id] * count
    _check_length(len(ids), max_length)
    _say_what_changed(tokenizer, ids, "".join(given), "--infill")
    return np.array(ids, np.int32)


def _count(mark: re.Match) -> int:
    """Tokens that a mark stands for. UserError for a number that is none."""
    digits = "1" if mark[1] is None else mark[1]
    if not re.fullmatch(f"[0-9]{{1,{_DIGITS}}}", digits) or int(digits) < 1:
        if re.fullmatch("[0-9]+", digits) and digits.strip("0"):
            raise UserError(f"--infill has a mark of {_short(digits)} tokens, more than any context; lower it")
        raise UserError(f"--infill has {_short(mark[0])}, which is no mark; [MASK] is one token, [MASK:12] twelve")
    return int(digits)


def encode_text(tokenizer: Tokenizer, text: str, name: str) -> list[int]:
    """Ids of a whole text. UserError calling it `name` where it is no Unicode; what the tokenizer changes is said."""
    ids = tokenizer.encode(unicode_text(text, name))
    _say_what_changed(tokenizer, ids, text, name)
    return ids


def encode_after(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a piece of text that stands behind other tokens, without the space that some tokenizers put before all."""
    alone, wanted = tokenizer.encode(text), text.encode()
    if _spelled(tokenizer, alone) == wanted:
        return alone
    found = alone
    for before in _BEFORE:
        head, both = tokenizer.encode(before), tokenizer.encode(before + text)
        if head and both[: len(head)] == head:
            found = both[len(head) :]
            if _spelled(tokenizer, found) == wanted:
                return found
    return found


def encode_pair(
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    answer: str | Sequence[int],
    names: tuple[str, str] = ("--prompt", "--answer"),
) -> tuple[list[int], list[int]]:
    """Ids of a prompt and of the answer behind it, each given as text or as ids; `names` is what errors call them.

    Of two texts, as evaluation harnesses do it: spaces that end the prompt are the answer's, both are encoded as one
    text, and the answer's ids are what follows the prompt's own. Where a token would reach across the border, the
    answer is encoded by itself instead, as a piece of text behind the prompt: no character of it is lost or conditioned
    on. UserError for text that is no Unicode and ids that are none of this model's.
    """
    if isinstance(prompt, str):
        unicode_text(prompt, names[0])
    if isinstance(answer, str):
        unicode_text(answer, names[1])
    if isinstance(prompt, str) and isinstance(answer, str):
        stripped = prompt.rstrip(" ")
        prompt, answer = stripped, prompt[len(stripped) :] + answer
        first, whole = encode_text(tokenizer, prompt, names[0]), encode_text(tokenizer, prompt + answer, names[1])
        if whole[: len(first)] == first:
            return first, whole[len(first) :]
    elif isinstance(prompt, str):
        first = encode_text(tokenizer, prompt, names[0])
    else:
        first = parse_ids(f"{names[0]}_ids", prompt, tokenizer.vocab_size)
    if not isinstance(answer, str):
        return first, parse_ids(f"{names[1]}_ids", answer, tokenizer.vocab_size)
    return first, encode_after(tokenizer, answer) if first else encode_text(tokenizer, answer, names[1])


def listed(text: str) -> list[int | str]:
    """What "12, 7 99" lists: integers, and as they stand words that are none; "12,,7" has an empty one."""
    words = [word for part in text.split(",") for word in part.split() or [""]] if text.strip() else []
    return [int(word) if re.fullmatch("-?[0-9]{1,4000}", word) else word for word in words]


def parse_ids(flag: str, given: str | Iterable[int], vocab_size: int) -> list[int]:
    """Token ids from "12,7,99" or integers; UserError naming `flag` for anything else or ids out of range."""
    found = []
    for item in listed(given) if isinstance(given, str) else given:
        if isinstance(item, bool) or not isinstance(item, numbers.Integral):
            shown = _short(item) or "an empty place"
            raise UserError(f"{flag} has {shown}; it must be a list of integers such as 12,7,99")
        if not 0 <= item < vocab_size:
            raise UserError(f"{flag} has {_short(item)}; ids of this model are 0 to {vocab_size - 1}")
        found.append(int(item))
    return found


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


def _check_length(length: int, max_length: int) -> None:
    if length > max_length:
        raise UserError(
            f"the canvas has {length} tokens and the model's context is model.max_length={max_length}; "
            "shorten --prompt, --gen_length or --infill"
        )


@functools.lru_cache(maxsize=1 << 20)
def _token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    return tokenizer.token_bytes(token)


def _spelled(tokenizer: Tokenizer, ids: Iterable[int]) -> bytes:
    return b"".join(_token_bytes(tokenizer, token) for token in ids)


_told: set[str] = set()  # tokenizers of which it has been said


def _say_what_changed(tokenizer: Tokenizer, ids: list[int], text: str, name: str) -> None:
    """Say on standard error, once a tokenizer, that a text's tokens spell another text; a first space is no change."""
    found, wanted = _spelled(tokenizer, ids), text.encode()
    if found in (wanted, b" " + wanted) or tokenizer.sha256 in _told:
        return
    _told.add(tokenizer.sha256)
    found, wanted = found.lstrip(b" "), wanted.lstrip(b" ")
    place = max(0, len(os.path.commonprefix([found, wanted])) - 10)
    found, wanted = (x[place : place + 40].decode(errors="replace") for x in (found, wanted))
    print(f"the model's tokenizer changes {name}: it reads {found!r} where {wanted!r} is given", file=sys.stderr)


def _short(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 40 else f"{text[:30]}... ({len(text)} characters)"
