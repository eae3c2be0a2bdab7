"""SentencePiece tokenizers: one trained here (tokenizer_training.py), or a `.model` file of the user's.

Models trained here are lossless: decode(encode(text)) == text for every Unicode text, with no normalisation and bytes
for whatever the vocabulary lacks. A user's own model may normalise text; then only its own rules are promised.
The mask token is a control symbol, so no text can spell it. Letters: V = vocabulary size.
"""

from collections.abc import Iterable, Iterator, Sequence, Set
from pathlib import Path
from typing import Any

import sentencepiece

from llada.data.control_tokens import PLAIN_CONTROLS, builtin, end_of_turn
from llada.data.tokenizer import NAMES, SPACE_MARK, Tokenizer, read_content, require_rows, unicode_text
from llada.errors import UserError


class SentencePieceTokenizer(Tokenizer):
    """A loaded SentencePiece model; `content` is its `.model` file.

    A chat template is stored in the file. One with the control tokens of the plain template, as all trained here have
    them, needs none for that.
    """

    file_name = "tokenizer.model"

    def __init__(self, model: bytes, name: str):
        """Parse the bytes of a model file; `name` is what errors call it. Raises UserError if it cannot serve."""
        self._processor = _parse(model, name)
        try:
            self._id_of = {self.piece(token): token for token in range(self._processor.get_piece_size())}
        except UnicodeDecodeError as error:
            raise UserError(f"{name} is not a SentencePiece model: a piece is not UTF-8") from error
        unknown = self._processor.unk_id()
        if not 0 <= unknown < self._processor.get_piece_size():
            raise UserError(
                f"{name} is not a SentencePiece model: its unknown token is id {unknown}, which is no piece"
            )
        special = {
            role: next((self._id_of[n] for n in names if n in self._id_of), None) for role, names in NAMES.items()
        }
        for role, word in (("mask", "mask token"), ("eos", "end-of-text token")):
            token = special[role]
            if token is not None and not self._processor.is_control(token):
                piece = self.piece(token)
                raise UserError(f"tokenizer {name} lets text spell its {word} {piece}; make it a control symbol")
        self.controls = {piece: token for piece, token in self._id_of.items() if self._processor.is_control(token)}
        self.template = template_of(model, self.controls.keys(), name)
        ending = end_of_turn(self.controls, self.template)
        special["eot"] = None if ending is None else self.controls[ending]
        super().__init__(model, name, range(self._processor.get_piece_size()), special)
        roles = {"mask": self.mask_id, "eos": self.eos_id, "pad": self.pad_id, "unk": unknown}
        self.named = {f"{role}_token": self.piece(token) for role, token in roles.items() if token is not None}
        self._space_mark_ids = [self._id_of.get(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]

    def with_mask(self) -> "SentencePieceTokenizer":
        """The same model with one more piece, a control symbol that is its mask token."""
        proto = self.proto
        proto.pieces.add(piece=NAMES["mask"][0], score=0.0, type=type(proto).SentencePiece.CONTROL)
        return SentencePieceTokenizer(proto.SerializeToString(), self.file_name)

    def with_dialogue(self, template: str, names: Sequence[str], vocab_size: int) -> "SentencePieceTokenizer":
        """The same model carrying `template`, with a control symbol for each of `names`; new ones come last.

        UserError where the model of `vocab_size` ids has no rows for them.
        """
        if self._has_dialogue(template, names):
            return self
        unicode_text(template, "the chat template")
        proto = self.proto
        kinds, places = type(proto).SentencePiece, {piece.piece: n for n, piece in enumerate(proto.pieces)}
        missing = [name for name in dict.fromkeys(names) if name not in places]
        require_rows(names, len(missing), max(vocab_size - self.vocab_size, 0), vocab_size)
        for name in names:
            if name in places and proto.pieces[places[name]].type in (kinds.NORMAL, kinds.USER_DEFINED):
                proto.pieces[places[name]].type = kinds.CONTROL  # so far text
        for name in missing:
            proto.pieces.add(piece=name, score=0.0, type=kinds.CONTROL)
        content = _without_template(proto.SerializeToString())
        if template != builtin("plain") or not set(PLAIN_CONTROLS) <= self.controls.keys() | set(names):
            content += _template_field(template)
        return SentencePieceTokenizer(content, self.file_name)

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


def template_of(model: bytes, controls: Set[str], name: str) -> str | None:
    """The chat template in a model file; without one the plain template, where its control tokens are there."""
    template = _stored_template(model, name)
    return builtin("plain") if template is None and controls >= set(PLAIN_CONTROLS) else template


def _parse(model: bytes, name: str) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
    except (RuntimeError, UnicodeDecodeError) as error:  # the second where its own message quotes what is damaged
        raise UserError(f"{name} is not a SentencePiece model; give a .model file") from error
    return processor


# A chat template in a model file: a field of ModelProto that we add. A message is its fields in a row, each a number
# and a wire type (together: number * 8 + type) before its value, and SentencePiece keeps what it does not know: its
# format leaves the numbers from 200 on to others.
_TEMPLATE_TAG = 250209992 << 3 | 2  # type 2: a length, then so many bytes


def _template_field(template: str) -> bytes:
    text = template.encode()
    return _varint(_TEMPLATE_TAG) + _varint(len(text)) + text


def _stored_template(model: bytes, name: str) -> str | None:
    if _varint(_TEMPLATE_TAG) not in model:  # as in nearly all, which saves walking through their pieces
        return None
    template = None
    for tag, start, end in _fields(model):
        if tag == _TEMPLATE_TAG:  # of several, the last counts, as protobuf has it
            length, start = _read_varint(model, start + len(_varint(tag)))
            template = model[start:end]
    try:
        return None if template is None else template.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not a SentencePiece model: its chat template is not UTF-8") from error


def _without_template(model: bytes) -> bytes:
    return b"".join(model[start:end] for tag, start, end in _fields(model) if tag != _TEMPLATE_TAG)


def _fields(message: bytes) -> Iterator[tuple[int, int, int]]:
    """Tag, start and end of each field of a message that protobuf has read before."""
    place = 0
    while place < len(message):
        tag, end = _read_varint(message, place)
        if tag & 7 == 2:
            length, end = _read_varint(message, end)
            end += length
        elif tag & 7 == 0:
            _, end = _read_varint(message, end)
        else:  # groups, types 3 and 4, have no length; their fields follow as if they were ours
            end += {1: 8, 5: 4}.get(tag & 7, 0)
        yield tag, place, end
        place = end


def _varint(number: int) -> bytes:
    digits = []
    while number > 0x7F:
        digits.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*digits, number])


def _read_varint(message: bytes, place: int) -> tuple[int, int]:
    number = shift = 0
    while place < len(message):
        digit = message[place]
        number, shift, place = number | (digit & 0x7F) << shift, shift + 7, place + 1
        if digit < 0x80:
            break
    return number, place
