"""Text to token ids and back, by a SentencePiece model: one trained here, or a `.model` file of the user's.

Models trained here are lossless: decode(encode(text)) == text for every Unicode text, with no normalisation and bytes
for whatever the vocabulary lacks. A user's own model may normalise text; then only its own rules are promised.
The mask token is a control symbol, so no text can spell it. Letters: V = vocabulary size.
"""

import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import sentencepiece

from llada.errors import UserError
from llada.objectives.contract import SpecialTokens

_MASK_NAMES = ("<mask>", "[MASK]", "<|mdm_mask|>")
_EOS_NAMES = ("</s>", "<eos>", "<|endoftext|>")
_EOT_NAMES = ("<|eot_id|>", "<eot>")
_PAD_NAMES = ("<pad>", "[PAD]")

# SentencePiece writes every space as this character, and so reads the character itself as a space.
_SPACE_MARK = "\u2581"

_SAMPLE_BYTES = 4_000_000
_SEGMENT_CHARACTERS = 4_096
# The trainer skips, without a word, sentences above 4,192 bytes; a character has at most four.
_SENTENCE_CHARACTERS = 1_024


class Tokenizer:
    """A loaded SentencePiece model. Fields: vocab_size, mask_id, eos_id, pad_id (ints), eot_id (the end of a dialogue
    turn, or None), sha256 of the model file (hex), and token_bytes_V (int32): the UTF-8 bytes of text each id stands
    for, 0 for control ids. For models trained here sum(token_bytes_V[encode(text)]) is exactly the text's length in
    bytes, the denominator of bits per byte.
    """

    def __init__(self, model: bytes, name: str):
        """Parse the bytes of a model file; `name` is what errors call it. Raises UserError if it cannot serve."""
        self._processor = _parse(model, name)
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.vocab_size = self._processor.get_piece_size()
        self._id_of = {self.piece(token): token for token in range(self.vocab_size)}
        self.mask_id = self._control_id(_MASK_NAMES, "mask token", name)
        self.eos_id = self._control_id(_EOS_NAMES, "end-of-text token", name)
        self.pad_id = next((self._id_of[pad] for pad in _PAD_NAMES if pad in self._id_of), self.eos_id)
        self.eot_id = next((self._id_of[eot] for eot in _EOT_NAMES if eot in self._id_of), None)
        self.token_bytes_V = np.array([self._byte_count(token) for token in range(self.vocab_size)], np.int32)
        self._space_mark_ids = [self._id_of.get(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a `.model` file. Raises UserError if it is missing, is no SentencePiece model, or lacks mask or eos."""
        try:
            model = Path(path).expanduser().read_bytes()
        except OSError as error:
            raise UserError(f"cannot read tokenizer {path}: {error.strerror}; check the path") from error
        return cls(model, str(path))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, path: str | Path) -> "Tokenizer":
        """Train a byte-pair model of exactly `vocab_size` pieces, write it to `path` at once or not at all, return it.

        Learns from at most 4 MB, spread evenly over `texts`, which are read once; the same texts give the same bytes.
        Raises UserError if the texts are too small or too varied for the vocabulary.
        """
        lines = [line for segment in _sample(texts, _SAMPLE_BYTES) for line in _sentences(segment)]
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
        tokenizer = cls(writer.getvalue(), str(path))
        write_atomically(Path(path), writer.getvalue())
        return tokenizer

    @property
    def special(self) -> SpecialTokens:
        """Ids that objectives and samplers need."""
        return SpecialTokens(mask=self.mask_id, eos=self.eos_id, eot=self.eot_id)

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`; never a control id."""
        if _SPACE_MARK not in text or None in self._space_mark_ids:
            return self._processor.encode(text)
        first, *rest = self._processor.encode(text.split(_SPACE_MARK))
        return first + [token for ids in rest for token in (*self._space_mark_ids, *ids)]

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        """Return encode(text) of each text, on all cores."""
        return [
            self.encode(text) if _SPACE_MARK in text else ids
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

    def _control_id(self, names: tuple[str, ...], role: str, model_name: str) -> int:
        token = next((self._id_of[name] for name in names if name in self._id_of), None)
        if token is None:
            raise UserError(f"tokenizer {model_name} has no {role}; it needs one of {', '.join(names)}")
        if not self._processor.is_control(token):
            raise UserError(
                f"tokenizer {model_name} lets text spell its {role} {self.piece(token)}; make it a control symbol"
            )
        return token

    def _byte_count(self, token: int) -> int:
        if self._processor.is_control(token) or self._processor.is_unknown(token):
            return 0
        if self._processor.is_byte(token):
            return 1
        return len(self.piece(token).replace(_SPACE_MARK, " ").encode())


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that `path` holds all of `content` or is untouched, whenever the process or machine stops."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _parse(model: bytes, name: str) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
    except RuntimeError as error:
        raise UserError(f"{name} is not a SentencePiece model; give a .model file") from error
    return processor


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
