"""Training a SentencePiece tokenizer on a corpus: imported only where a run has none."""

import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from llada.data.control_tokens import PLAIN_CONTROLS
from llada.data.sentencepiece_tokenizer import SentencePieceTokenizer
from llada.data.tokenizer import SPACE_MARK
from llada.data.waiting import Report
from llada.errors import UserError
from llada.files import queue_for_lock, write_atomically

_SAMPLE_BYTES = 4_000_000
_SEGMENT_CHARACTERS = 4_096
# The trainer skips, without a word, sentences above 4,192 bytes; a character has at most four.
_SENTENCE_CHARACTERS = 1_024


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    path: Path,
    log: Callable[[str], None] = lambda text: None,
    check: Callable[[], None] = lambda: None,
    controls: Sequence[str] = (),
) -> SentencePieceTokenizer:
    """Train a byte-pair model of exactly `vocab_size` pieces, write it to `path` at once or not at all, return it.

    Among them are the control tokens of the plain chat template, and those of `controls`.

    Learns from at most 4 MB, spread evenly over `texts`, which are read once; the same texts give the same bytes.
    Of several processes that train for one `path`, one does, and the others wait and take its model. `log` is called
    with how far it is, about once a second; `check` as often, and may raise to end the call.
    UserError if the texts are too small or too varied for the vocabulary, DiskError where there is no room.
    """
    report = Report(log, check)
    before = path.stat().st_ino if path.exists() else None
    with queue_for_lock(path.with_name(f".{path.name}.lock"), f"trains {path}", report.check):
        if path.exists() and path.stat().st_ino != before:  # another process has trained it while this one waited
            tokenizer = SentencePieceTokenizer.load(path)
            if tokenizer.vocab_size != vocab_size:
                raise UserError(
                    f"{path} was just trained with {tokenizer.vocab_size} pieces, not model.vocab_size={vocab_size}"
                )
            return tokenizer
        tokenizer = SentencePieceTokenizer(_trained(texts, vocab_size, controls, report), str(path))
        write_atomically(path, tokenizer.content)
        return tokenizer


def _trained(texts: Iterable[str], vocab_size: int, controls: Sequence[str], report: Report) -> bytes:
    """The model file of a byte-pair model of exactly `vocab_size` pieces."""
    lines = [
        line for segment in _sample(_counted(texts, vocab_size, report), _SAMPLE_BYTES) for line in _sentences(segment)
    ]
    if not lines:
        raise UserError("no text to train a tokenizer on; check --config.data.source")
    writer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=writer,
            # Against unigram, on Python code: somewhat fewer tokens, and much faster to train.
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            required_chars=SPACE_MARK,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            pad_piece="<pad>",
            eos_piece="<eos>",
            control_symbols=list(dict.fromkeys(["<mask>", *PLAIN_CONTROLS, *controls])),
            user_defined_symbols=["\n"],
            num_threads=1,  # the thread count is written into the model, and would change its bytes
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(_training_error(vocab_size, str(error))) from error
    return writer.getvalue()


def _counted(texts: Iterable[str], vocab_size: int, report: Report) -> Iterator[str]:
    for number, text in enumerate(texts, 1):
        report(f"training a tokenizer of {vocab_size:,} pieces: {number:,} documents read")
        yield text


def _sample(texts: Iterable[str], budget_bytes: int) -> list[str]:
    """Return every k-th segment of the texts, k being the least power of two that fits the budget."""
    sample: list[str] = []
    sample_bytes, stride = 0, 1
    segments = (segment for text in texts for segment in _segments(text))
    for index, segment in enumerate(segments):
        if index % stride:
            continue
        sample.append(segment)
        sample_bytes += len(segment.encode())
        while sample_bytes > budget_bytes and len(sample) > 1:
            sample, stride = sample[::2], stride * 2
            sample_bytes = sum(len(segment.encode()) for segment in sample)
    return sample


def _segments(text: str) -> Iterator[str]:
    """Cut a text at line ends into segments of about _SEGMENT_CHARACTERS, so that one long document is sampled too."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + _SEGMENT_CHARACTERS)
        # A text without line ends must not become one endless segment.
        end = start + 2 * _SEGMENT_CHARACTERS if end < 0 else min(end + 1, start + 2 * _SEGMENT_CHARACTERS)
        yield text[start:end]
        start = end


def _sentences(segment: str) -> Iterator[str]:
    for line in segment.split("\n"):
        for start in range(0, len(line), _SENTENCE_CHARACTERS):
            yield line[start : start + _SENTENCE_CHARACTERS]


def _training_error(vocab_size: int, reason: str) -> str:
    """Say which way to move model.vocab_size; only the trainer's message has the limits."""
    least = re.search(r"required_chars\. -?\d+ vs (\d+)", reason)
    most = re.search(r"value <= (\d+)", reason)
    if least:
        return (
            f"model.vocab_size={vocab_size} is too small for this text; its characters and bytes alone take {least[1]}"
        )
    if most:
        return f"model.vocab_size={vocab_size} is too large for this text; it gives at most {most[1]} pieces"
    return f"cannot train a tokenizer with model.vocab_size={vocab_size}: {reason.split('] ')[-1].strip() or reason}"
