"""Which documents are held out: decided by a hash of the text, or by a source of their own."""

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator

from llada.config import DataConfig
from llada.data import text_files
from llada.data.sources import Remark, documents
from llada.errors import UserError

# A corpus up to so many characters is cut into sections where all its documents fall on one side.
_SMALL_CHARACTERS = 1 << 24
_SMALL_SECTIONS, _SMALLEST_SECTION = 64, 128
_CHARACTERS_A_TOKEN = 8  # at most, of a tokenizer that is any good


def split(data: DataConfig, remark: Remark = lambda line: None) -> Iterator[tuple[bool, str]]:
    """Yield (is held out, text) of every document, each side in the order of `documents`.

    With `holdout_source` its documents are held out, and left out of the training side where they occur there too. Else
    `is_holdout` decides. A small corpus none of whose documents, or all of them, would be held out is cut into
    sections, of which those with the smallest hashes are held out, enough for rows of `sequence_length` tokens.
    UserError where `documents` has one.
    """
    texts = documents(data.source, data.text_key, remark)
    if data.holdout_source is None:
        return _by_hash(texts, data.holdout_fraction, data.sequence_length, remark)
    holdout = documents(data.holdout_source, data.text_key, remark, "--config.data.holdout_source")
    return _without(texts, holdout, remark)


def training(data: DataConfig) -> Iterator[str]:
    """Yield the documents of the training side. UserError where all are held out, and where `documents` has one."""
    any_text = False
    for held, text in split(data):
        if not held:
            any_text = True
            yield text
    if not any_text:
        holds = "source" if data.holdout_source else f"fraction={data.holdout_fraction}"
        raise UserError(f"no text to train on: --config.data.holdout_{holds} holds out every document; change it")


def require_documents(data: DataConfig) -> None:
    """UserError for sources without a document: asked before any work begins."""
    next(documents(data.source, data.text_key), None)
    if data.holdout_source is not None:
        next(documents(data.holdout_source, data.text_key, flag="--config.data.holdout_source"), None)


def is_holdout(text: str, fraction: float) -> bool:
    """Whether a document belongs to the hold-out side, which gets about `fraction` (0..1) of all documents.

    Decided by a hash of the text alone, so a document stays on its side whatever else the corpus holds, and copies
    of one document never straddle the split.
    """
    return text_hash(text) < fraction * 2.0**64


def text_hash(text: str) -> int:
    """64 bits of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _by_hash(texts: Iterator[str], fraction: float, length: int, remark: Remark) -> Iterator[tuple[bool, str]]:
    first: list[str] = []
    characters = 0
    for text in texts:
        first.append(text)
        characters += len(text)
        if characters > _SMALL_CHARACTERS:
            break
    else:
        # No row could be made of so few bytes by any tokenizer: such a corpus has never been of use as it is.
        side_bytes: Counter[bool] = Counter()
        for text in first:
            side_bytes[is_holdout(text, fraction)] += len(text.encode()) + 1
        if min(side_bytes[True], side_bytes[False]) < length and characters >= 2 * _SMALLEST_SECTION:
            yield from _sections(first, fraction, length, remark)
            return
    for text in itertools.chain(first, texts):
        yield is_holdout(text, fraction), text


def _sections(texts: list[str], fraction: float, length: int, remark: Remark) -> Iterator[tuple[bool, str]]:
    """Few documents in sections, the smallest hashes held out: the fraction, or a row's worth, at most a quarter."""
    characters = sum(map(len, texts))
    size = max(characters // _SMALL_SECTIONS, _SMALLEST_SECTION)
    sections = [section for text in texts for section in text_files.sections(text, size)]
    least = min(_CHARACTERS_A_TOKEN * length, characters // 4)
    wanted, held, copies = max(fraction * characters, least), set(), Counter(sections)
    for section in sorted(copies, key=text_hash):
        if wanted <= 0:
            break
        held.add(section)
        wanted -= len(section) * copies[section]
    remark(
        f"few documents ({len(texts)}): cut into {len(sections)} sections, and {sum(copies[text] for text in held)} of "
        "them held out; --config.data.holdout_source=text:GLOB holds out documents of your own"
    )
    for section in sections:
        yield section in held, section


def _without(texts: Iterator[str], holdout: Iterator[str], remark: Remark) -> Iterator[tuple[bool, str]]:
    """The held-out documents, then the others but for copies of them."""
    hashes = set()
    for text in holdout:
        hashes.add(text_hash(text))
        yield True, text
    copies = 0
    for text in texts:
        if text_hash(text) in hashes:
            copies += 1
        else:
            yield False, text
    if copies:
        remark(f"{copies} documents of --config.data.source are held out too, and left out of the training side")
