"""SentencePiece tokenizers: one trained here (tokenizer_training.py), or a `.model` file of the user's.

Models trained here are lossless: decode(encode(text)) == text for every Unicode text, with no normalisation and bytes
for whatever the vocabulary lacks. A user's own model may normalise text; then only its own rules are promised.
The mask token is a control symbol, so no text can spell it. Letters: V = vocabulary size.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece

from llada.data.tokenizer import NAMES, SPACE_MARK, Tokenizer, read_content
from llada.errors import UserError


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
        for role, word in (("mask", "mask token"), ("eos", "end-of-text token")):
            token = special[role]
            if token is not None and not self._processor.is_control(token):
                piece = self.piece(token)
                raise UserError(f"tokenizer {name} lets text spell its {word} {piece}; make it a control symbol")
        super().__init__(model, name, range(self._processor.get_piece_size()), special)
        self._space_mark_ids = [self._id_of.get(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]

    def with_mask(self) -> "SentencePieceTokenizer":
        """The same model with one more piece, a control symbol that is its mask token."""
        proto = self.proto
        proto.pieces.add(piece=NAMES["mask"][0], score=0.0, type=type(proto).SentencePiece.CONTROL)
        return SentencePieceTokenizer(proto.SerializeToString(), self.file_name)

    @classmethod
    def load(cls, path: str | Path) -> "SentencePieceTokenizer":
        """Read a `.model` file. Raises UserError if it is missing, is no SentencePiece model, or lacks mask or eos."""
        return cls(read_content(path), str(path))

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
        return sentencepiece_model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]  # made at import
    except Exception as error:  # protobuf's DecodeError, whose home moved between its versions
        raise UserError(f"{name} is not a SentencePiece model; give a .model file") from error


def _parse(model: bytes, name: str) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
    except (RuntimeError, UnicodeDecodeError) as error:  # the second where its own message quotes what is damaged
        raise UserError(f"{name} is not a SentencePiece model; give a .model file") from error
    return processor
