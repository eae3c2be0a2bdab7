"""What a tokenizer is to the rest of the project, whichever library reads its file. Letters: V = vocabulary size."""

import abc
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llada import json_files
from llada.data.control_tokens import ENDS_OF_TURN, RAINBOW, end_of_turn
from llada.errors import UserError
from llada.paths import user_path

if TYPE_CHECKING:
    from llada.objectives.contract import SpecialTokens

# How makers of tokenizers spell the tokens that matter here, most specific first.
NAMES = {
    "mask": ("<mask>", "[MASK]", "<|mdm_mask|>", "<[MASK]>"),
    "eos": ("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>"),
    "eot": ENDS_OF_TURN,
    "pad": ("<pad>", "[PAD]"),
}
SPACE_MARK = "\u2581"  # how SentencePiece, and those who follow it, spell a space
_MOST_IDS = 1 << 24


class Tokenizer(abc.ABC):
    """Text to ids and back. The mask and the end tokens are control ids, which no text can spell.

    Fields: `content`, the bytes that stand for the whole tokenizer in a workdir (file `file_name`) and in checkpoints,
    and their sha256 (hex); vocab_size; eos_id and pad_id; mask_id, eot_id (the end of a dialogue turn) and bos_id (what
    texts of an imported ARM begin with), each None where there is none; token_bytes_V (int32), the UTF-8 bytes of text
    each id stands for, 0 for control ids. For models trained here sum(token_bytes_V[encode(text)]) is exactly the
    text's length in bytes, the denominator of bits per byte.

    For dialogues: template, the Jinja source of the chat template that travels with it, None without; controls, the ids
    of all control tokens that have a name; named, what templates call some of them (bos_token, eos_token ...).
    """

    file_name: str
    template: str | None = None
    controls: dict[str, int]
    named: dict[str, str]

    def __init__(self, content: bytes, name: str, ids: Iterable[int], special: dict[str, int | None]):
        """Take the ids of all tokens, and in `special` those of mask, eos, pad, eot and, for imported models, bos.

        pad None is eos. UserError, calling the tokenizer `name`, for an id that no vocabulary has.
        """
        self.content = content
        self.sha256 = hashlib.sha256(content).hexdigest()
        ids = [*ids, *(token for token in special.values() if token is not None)]
        if min(ids) < 0 or max(ids) >= _MOST_IDS:
            bad = next(token for token in ids if not 0 <= token < _MOST_IDS)
            raise UserError(f"tokenizer {name} has an id {bad}, outside 0..{_MOST_IDS - 1}: no vocabulary is so large")
        eos_id = special["eos"]
        if eos_id is None:
            raise UserError(f"tokenizer {name} has no end-of-text token; it needs one of {', '.join(NAMES['eos'])}")
        self.vocab_size = max(ids) + 1
        self.mask_id, self.eos_id, self.eot_id = special["mask"], eos_id, special["eot"]
        self.bos_id = special.get("bos")
        self.pad_id = self.eos_id if special["pad"] is None else special["pad"]
        self.token_bytes_V = np.zeros(self.vocab_size, np.int32)
        for token in ids:
            self.token_bytes_V[token] = len(self.token_bytes(token))

    @property
    def special(self) -> "SpecialTokens":
        """Ids that objectives and samplers need."""
        from llada.objectives.contract import SpecialTokens  # which needs JAX, and tokenising does not

        return SpecialTokens(mask=self.mask_id, eos=self.eos_id, eot=self.eot_id, bos=self.bos_id)

    @property
    def filler_ids(self) -> tuple[int, ...]:
        """Control ids that fill an answer behind its end, in their order (arXiv 2510.03680); often none."""
        return tuple(self.controls[name] for name in RAINBOW if name in self.controls)

    def token_id(self, name: str) -> int | None:
        """The id of a control token, None if there is none of this name."""
        return self.controls.get(name)

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`; never a control id. UserError for half a surrogate pair, which is no text."""
        return self._encode(unicode_text(text))

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        """Return encode(text) of each text, on all cores."""
        return self._encode_many([unicode_text(text) for text in texts])

    @abc.abstractmethod
    def with_mask(self) -> "Tokenizer":
        """The same tokenizer with a mask token of id vocab_size, which must be free; for one that has none."""

    @abc.abstractmethod
    def with_dialogue(self, template: str, names: Sequence[str], vocab_size: int) -> "Tokenizer":
        """The same tokenizer carrying `template`, with a control token for each of `names`; itself if it has them.

        Those that it lacks take ids of a model of `vocab_size` ids that no text uses. UserError where there are none.
        """

    def _has_dialogue(self, template: str, names: Sequence[str]) -> bool:
        """Whether with_dialogue would change nothing."""
        ending = end_of_turn(self.controls, template)
        same = template == self.template and (ending is None or self.controls[ending] == self.eot_id)
        return same and self.controls.keys() >= set(names)

    @abc.abstractmethod
    def _encode(self, text: str) -> list[int]: ...

    @abc.abstractmethod
    def _encode_many(self, texts: list[str]) -> list[list[int]]: ...

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids` without its control ids; bytes that are not UTF-8 become U+FFFD.

        Raises IndexError for an id outside 0..vocab_size-1.
        """

    @abc.abstractmethod
    def piece(self, token: int) -> str:
        """Return one id as its library spells it."""

    @abc.abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of text one id stands for, empty for control ids; joined, they are those of the text."""


def require_rows(names: Sequence[str], missing: int, spare: int, vocab_size: int) -> None:
    """UserError unless a model has `spare` rows for as many control tokens as are `missing`."""
    if missing > spare:
        raise UserError(
            f"dialogues need the control tokens {', '.join(names)}; the tokenizer lacks {missing} of them, and the "
            f"model has {spare} rows that no text uses (model.vocab_size={vocab_size}); start from one that has more"
        )


def unicode_text(text: str, name: str = "the text") -> str:
    """The same text. UserError calling it `name` for what UTF-8 cannot spell, where libraries fail or change it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{name} is no Unicode: half a surrogate pair, or a byte that is not UTF-8, at character {error.start}"
        ) from error
    return text


def read_content(path: str | Path, flag: str = "--config.data.tokenizer") -> bytes:
    """All of a tokenizer's file. UserError for what is no regular file of a size that a tokenizer can have."""
    path = user_path(path, flag)
    if not path.exists():
        raise UserError(f"cannot read tokenizer {path}: No such file or directory; check the path in {flag}")
    return json_files.read_bytes(path, name=f"tokenizer {path}")
