"""What a tokenizer is to the rest of the project, whichever library reads its file. Letters: V = vocabulary size."""

import abc
import hashlib
from collections.abc import Iterable

import numpy as np

from llada.objectives.contract import SpecialTokens

# How makers of tokenizers spell the tokens that matter here, most specific first.
NAMES = {
    "mask": ("<mask>", "[MASK]", "<|mdm_mask|>", "<[MASK]>"),
    "eos": ("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>"),
    "eot": ("<|eot_id|>", "<eot>", "<|im_end|>"),
    "pad": ("<pad>", "[PAD]"),
}


class Tokenizer(abc.ABC):
    """Text to ids and back. The mask and the end tokens are control ids, which no text can spell.

    Fields: `content`, the bytes that stand for the whole tokenizer in a workdir (file `file_name`) and in checkpoints,
    and their sha256 (hex); vocab_size; eos_id and pad_id; mask_id, eot_id (the end of a dialogue turn) and bos_id (what
    texts of an imported ARM begin with), each None where there is none; token_bytes_V (int32), the UTF-8 bytes of text
    each id stands for, 0 for control ids. For models trained here sum(token_bytes_V[encode(text)]) is exactly the
    text's length in bytes, the denominator of bits per byte.
    """

    file_name: str

    def __init__(self, content: bytes, vocab_size: int, special: dict[str, int | None]):
        """`special`: ids of mask, eos, pad, eot and, for imported models, bos; pad None is eos."""
        self.content = content
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.vocab_size = vocab_size
        self.mask_id, self.eos_id, self.eot_id = special["mask"], special["eos"], special["eot"]
        self.bos_id = special.get("bos")
        self.pad_id = self.eos_id if special["pad"] is None else special["pad"]
        self.token_bytes_V = np.array([len(self.token_bytes(token)) for token in range(vocab_size)], np.int32)

    @property
    def special(self) -> SpecialTokens:
        """Ids that objectives and samplers need."""
        return SpecialTokens(mask=self.mask_id, eos=self.eos_id, eot=self.eot_id, bos=self.bos_id)

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`; never a control id."""

    @abc.abstractmethod
    def encode_many(self, texts: list[str]) -> list[list[int]]:
        """Return encode(text) of each text, on all cores."""

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
