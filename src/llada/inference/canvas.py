"""From what a user types to a canvas of tokens, and back to text.

Infilling marks: `[MASK]` is one token to fill, `[MASK:12]` twelve. Text that follows other tokens is encoded as the
middle of a text: tokenizers such as Llama's would put a space before each piece of it.
"""

import numbers
import re
import sys
from collections.abc import Iterable, Sequence

import numpy as np

from llada.data.continuation import encode_after, spelled_bytes
from llada.data.tokenizer import Tokenizer, unicode_text
from llada.errors import UserError

_MARK = re.compile(r"\[MASK(?::([^\]\n]*))?\]")
_DIGITS = 18  # of the longest number that is read


def from_prompt(prompt_ids: list[int], gen_length: int, filler: int, max_length: int) -> np.ndarray:
    """`canvas_L`, int32: the prompt, then `gen_length` times `filler`. UserError if longer than the model's context."""
    if gen_length < 1:
        raise UserError(f"--gen_length={gen_length} must be at least 1")
    _check_length(len(prompt_ids) + gen_length, max_length)
    return np.array([*prompt_ids, *[filler] * gen_length], np.int32)


def from_infill(text: str, tokenizer: Tokenizer, max_length: int) -> np.ndarray:
    """`canvas_L`, int32: the text's tokens, with masks for its marks. UserError without marks or if too long."""
    marks = list(_MARK.finditer(text))
    if not marks:
        raise UserError("--infill has nothing to fill; write [MASK] for one token or [MASK:12] for twelve")
    counts = [_count(mark) for mark in marks]
    _check_length(sum(counts), max_length)
    cuts = [0, *(offset for mark in marks for offset in mark.span()), len(text)]
    pieces = [text[start:end] for start, end in zip(cuts[::2], cuts[1::2], strict=True)]
    ids: list[int] = []
    for piece, count in zip(pieces, [*counts, 0], strict=True):
        ids += encode_after(tokenizer, piece) if ids else tokenizer.encode(piece)
        ids += [tokenizer.special.mask_id] * count
    _check_length(len(ids), max_length)
    _warn_of_changes(tokenizer, ids, "".join(pieces), "--infill")
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
    """Ids of a text from its start. UserError calling it `name` where it is no Unicode; warns if ids spell another."""
    ids = tokenizer.encode(unicode_text(text, name))
    _warn_of_changes(tokenizer, ids, text, name)
    return ids


def encode_pair(
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    answer: str | Sequence[int],
    names: tuple[str, str] = ("--prompt", "--answer"),
) -> tuple[list[int], list[int]]:
    """Ids of a prompt and of the answer behind it, each a text or ids; `names` is what errors call them.

    Two texts are encoded as evaluation harnesses do it: spaces that end the prompt count to the answer, both are
    encoded as one text, and the answer's ids are those after the prompt's. Where a token would reach across the border,
    the answer is encoded by itself instead, as a piece of text behind the prompt: no character of it is lost or
    conditioned on. UserError for text that is no Unicode and ids that this model does not have.
    """
    if isinstance(prompt, str):
        unicode_text(prompt, names[0])
    if isinstance(answer, str):
        unicode_text(answer, names[1])
    if isinstance(prompt, str) and isinstance(answer, str):
        stripped = prompt.rstrip(" ")
        prompt, answer = stripped, prompt[len(stripped) :] + answer
        prompt_ids = encode_text(tokenizer, prompt, names[0])
        joined_ids = encode_text(tokenizer, prompt + answer, names[1])
        if joined_ids[: len(prompt_ids)] == prompt_ids:
            return prompt_ids, joined_ids[len(prompt_ids) :]
    elif isinstance(prompt, str):
        prompt_ids = encode_text(tokenizer, prompt, names[0])
    else:
        prompt_ids = parse_ids(f"{names[0]}_ids", prompt, tokenizer.vocab_size)
    if not isinstance(answer, str):
        return prompt_ids, parse_ids(f"{names[1]}_ids", answer, tokenizer.vocab_size)
    return prompt_ids, encode_after(tokenizer, answer) if prompt_ids else encode_text(tokenizer, answer, names[1])


def listed(text: str) -> list[int | str]:
    """The items of "12, 7 99": integers, and words that are none unchanged; "12,,7" has an empty one."""
    words = [word for part in text.split(",") for word in part.split() or [""]] if text.strip() else []
    return [int(word) if re.fullmatch("-?[0-9]{1,4000}", word) else word for word in words]


def parse_ids(flag: str, ids: str | Iterable[int], vocab_size: int) -> list[int]:
    """Token ids from "12,7,99" or integers; UserError naming `flag` for anything else or ids out of range."""
    parsed: list[int] = []
    for item in listed(ids) if isinstance(ids, str) else ids:
        if isinstance(item, bool) or not isinstance(item, numbers.Integral):
            shown = _short(item) or "an empty place"
            raise UserError(f"{flag} has {shown}; it must be a list of integers such as 12,7,99")
        if not 0 <= item < vocab_size:
            raise UserError(f"{flag} has {_short(item)}; ids of this model are 0 to {vocab_size - 1}")
        parsed.append(int(item))
    return parsed


def forbidden_ids(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """`forbidden_V`, bool: ids of neither text nor an end: padding, unknown, mask, rows past the tokenizer's last.

    What fills an answer behind its end may be written.
    """
    forbidden_V = np.ones(vocab_size, bool)
    forbidden_V[: tokenizer.vocab_size] = tokenizer.token_bytes_V == 0
    forbidden_V[tokenizer.eos_id] = False
    if tokenizer.eot_id is not None:
        forbidden_V[tokenizer.eot_id] = False
    forbidden_V[list(tokenizer.filler_ids)] = False
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


_warned: set[str] = set()  # sha256 of the tokenizers that have been warned of


def _warn_of_changes(tokenizer: Tokenizer, ids: list[int], text: str, name: str) -> None:
    """A line on standard error, once a tokenizer, if a text's ids spell another text; a first space is no change."""
    spelled, wanted = spelled_bytes(tokenizer, ids), text.encode()
    if spelled in (wanted, b" " + wanted) or tokenizer.sha256 in _warned:
        return
    _warned.add(tokenizer.sha256)
    spelled, wanted = spelled.lstrip(b" "), wanted.lstrip(b" ")
    shorter = min(len(spelled), len(wanted))
    same = next((i for i in range(shorter) if spelled[i] != wanted[i]), shorter)
    start = max(0, same - 10)
    reads, original = (x[start : start + 40].decode(errors="replace") for x in (spelled, wanted))
    sys.stderr.write(f"the model's tokenizer changes {name}: it reads {reads!r} where {original!r} is given\n")


def _short(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 40 else f"{text[:30]}... ({len(text)} characters)"
