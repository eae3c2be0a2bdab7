"""SentencePiece tokenizers: one trained here, or a `.model` file of the user's.

Models trained here are lossless: decode(encode(text)) == text for every Unicode text, with no normalisation and bytes
for whatever the vocabulary lacks. A user's own model may normalise text; then only its own rules are promised.
The mask token is a control symbol, so no text can spell it. Letters: V = vocabulary size.
"""

import io
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import sentencepiece

from llada.data.sentencepiece_merges import CONTROL, SPACE_MARK
from llada.data.tokenizer import NAMES, Tokenizer, read_content
from llada.data.waiting import Report
from llada.errors import UserError
from llada.files import in_turn, write_atomically

_SAMPLE_BYTES = 4_000_000
_SEGMENT_CHARACTERS = 4_096
# The trainer skips, without a word, sentences above 4,192 bytes; a character has at most four.
_SENTENCE_CHARACTERS = 1_024


class SentencePieceTokenizer(Tokenizer):
    """A loaded SentencePiece model; `content` is its `.model` file."""

    file_name = "tokenizer.model"

    def __init__(self, model: bytes, name: str):
        """Parse the bytes of a model file; `name` is what errors call it. Raises UserError if it cannot serve."""
        self._processor = _parse(model, name)
        try:
            self._id_of = {self.piece(token): token for token in range(self._processor.get_piece_size())}
        except UnicodeDecodeError as error:
            raise UserError(f"{name} is not a SentencePiece model: a piece is not UTF-8") from error
        special = {
            role: next((self._id_of[n] for n in names if n in self._id_of), None) for role, names in NAMES.items()
        }
        if special["eos"] is None:
            raise UserError(f"tokenizer {name} has no end-of-text token; it needs one of {', '.join(NAMES['eos'])}")
        for role, word in (("mask", "mask token"), ("eos", "end-of-text token")):
            if special[role] is not None and not self._processor.is_control(special[role]):
                piece = self.piece(special[role])
                raise UserError(f"tokenizer {name} lets text spell its {word} {piece}; make it a control symbol")
        super().__init__(model, name, range(self._processor.get_piece_size()), special)
        self._space_mark_ids = [self._id_of.get(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]

    def with_mask(self) -> "SentencePieceTokenizer":
        """The same model with one more piece, a control symbol that is its mask token."""
        proto = self.proto
        proto.pieces.add(piece=NAMES["mask"][0], score=0.0, type=CONTROL)
        return SentencePieceTokenizer(proto.SerializeToString(), self.file_name)

    @classmethod
    def load(cls, path: str | Path) -> "SentencePieceTokenizer":
        """Read a `.model` file. Raises UserError if it is missing, is no SentencePiece model, or lacks mask or eos."""
        return cls(read_content(path), str(path))

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        path: str | Path,
        progress: Callable[[str], None] | None = None,
        check: Callable[[], None] | None = None,
    ) -> "SentencePieceTokenizer":
        """Train a byte-pair model of exactly `vocab_size` pieces, write it to `path` at once or not at all, return it.

        Learns from at most 4 MB, spread evenly over `texts`, which are read once; the same texts give the same bytes.
        Of several processes that train for one `path`, one does, and the others wait and take its model. `progress` is
        told how far it is, about once a second; `check` is called as often, and may raise to end the call.
        Raises UserError if the texts are too small or too varied for the vocabulary, DiskError where there is no room.
        """
        path, report = Path(path), Report(progress, check)
        before = path.stat().st_ino if path.exists() else None
        with in_turn(path.with_name(f".{path.name}.lock"), f"trains {path}", report.check):
            if path.exists() and path.stat().st_ino != before:  # made while this call waited
                made = cls.load(path)
                if made.vocab_size != vocab_size:
                    raise UserError(
                        f"{path} was just made with {made.vocab_size} pieces, not model.vocab_size={vocab_size}"
                    )
                return made
            tokenizer = cls(_trained(texts, vocab_size, report), str(path))
            write_atomically(path, tokenizer.content)
            return tokenizer

    @property
    def proto(self) -> Any:
        """The model file as a ModelProto: pieces, scores and rules, for whoever writes it in another format."""
        return parse_proto(self.content, self.file_name)

    def _encode(self, text: str) -> list[int]:
        if SPACE_MARK not in text or None in self._space_mark_ids:
            return self._processor.encode(text)
        first, *rest = self._processor.encode(text.split(SPACE_MARK))
        return first + [token for ids in rest for token in (*self._space_mark_ids, *ids)]

    def _encode_many(self, texts: list[str]) -> list[list[int]]:
        return [
            self._encode(text) if SPACE_MARK in text else ids
            for text, ids in zip(texts, self._processor.encode(texts), strict=True)
        ]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids` without its control ids; bytes that are not UTF-8 become U+FFFD.

        Raises IndexError for an id outside 0..vocab_size-1.
        """
        return self._processor.decode([int(token) for token in ids])

    def piece(self, token: int) -> str:
        """Return the piece of one id as SentencePiece spells it: spaces as U+2581, raw bytes as <0xNN>."""
        return self._processor.id_to_piece(int(token))

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of text one id stands for, empty for control ids; joined, they are those of the text."""
        if self._processor.is_control(token) or self._processor.is_unknown(token):
            return b""
        if self._processor.is_byte(token):
            return bytes([int(self.piece(token)[3:5], 16)])
        return self.piece(token).replace(SPACE_MARK, " ").encode()


def parse_proto(model: bytes, name: str) -> Any:
    """A model file's pieces, scores and rules, as a ModelProto; UserError, calling it `name`, if it is none."""
    # Not at the top: what it needs of protobuf, other packages may have in another version, and only few calls need it.
    from sentencepiece import sentencepiece_model_pb2

    try:
        return sentencepiece_model_pb2.ModelProto.FromString(model)
    except Exception as error:  # protobuf's DecodeError, whose home moved between its versions
        raise UserError(f"{name} is not a SentencePiece model; give a .model file") from error


def _parse(model: bytes, name: str) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
    except (RuntimeError, UnicodeDecodeError) as error:  # the second where its own message quotes what is damaged
        raise UserError(f"{name} is not a SentencePiece model; give a .model file") from error
    return processor


def _trained(texts: Iterable[str], vocab_size: int, report: Report) -> bytes:
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
            control_symbols=["<mask>"],
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
    kept, kept_bytes, stride = [], 0, 1
    segments = (segment for text in texts for segment in _segments(text))
    for index, segment in enumerate(segments):
        if index % stride:
            continue
        kept.append(segment)
        kept_bytes += len(segment.encode())
        while kept_bytes > budget_bytes and len(kept) > 1:
            kept, stride = kept[::2], stride * 2
            kept_bytes = sum(len(segment.encode()) for segment in kept)
    return kept


def _segments(text: str) -> Iterator[str]:
    """Cut a text at line ends into parts of about _SEGMENT_CHARACTERS, so that one long document is sampled too."""
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
    """Say which way to move model.vocab_size; the limits are only found in the trainer's own words."""
    least = re.search(r"required_chars\. -?\d+ vs (\d+)", reason)
    most = re.search(r"value <= (\d+)", reason)
    if least:
        return (
            f"model.vocab_size={vocab_size} is too small for this text; its characters and bytes alone take {least[1]}"
        )
    if most:
        return f"model.vocab_size={vocab_size} is too large for this text; it gives at most {most[1]} pieces"
    return f"cannot train a tokenizer with model.vocab_size={vocab_size}: {reason.split('] ')[-1].strip() or reason}"
