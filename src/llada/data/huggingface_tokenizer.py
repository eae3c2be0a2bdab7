"""Tokenizers in Hugging Face's format: a directory with a `tokenizer.json`, bundled into one file for a workdir.

The bundle keeps the directory's files as they are, so that an export hands them on unchanged, and says which ids mask,
end text, end a turn and pad. Needs the `tokenizers` library: the [hf] extra.
"""

import functools
import json
from collections.abc import Iterable
from pathlib import Path

from llada.data.tokenizer import NAMES, Tokenizer
from llada.errors import UserError

_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_SPACE_MARK = "\u2581"


class HuggingFaceTokenizer(Tokenizer):
    """A bundled tokenizer; `content` is the bundle, `files` the directory's files by name.

    Ids past the last that the files know are control ids too: models have rows that no token uses, and the mask may be
    one of them.
    """

    file_name = "tokenizer.bundle.json"

    def __init__(self, content: bytes, name: str):
        """Parse a bundle; `name` is what errors call it. Raises UserError if it cannot serve."""
        try:
            bundle = json.loads(content)
            self.files: dict[str, str] = bundle["files"]
            special = {role: bundle["special"][role] for role in NAMES} | {"bos": bundle["special"].get("bos")}
            source = json.loads(self.files["tokenizer.json"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"tokenizer {name} is not a bundle of a Hugging Face tokenizer ({error!r})") from error
        self._tokenizer = _parse(self.files["tokenizer.json"], name)
        # What the files call special is text like any other when a document spells it.
        self._tokenizer.encode_special_tokens = True
        added = self._tokenizer.get_added_tokens_decoder()
        self._text_of_added = {token: entry.content for token, entry in added.items() if not entry.special}
        self._control = {token for token, entry in added.items() if entry.special}
        self._control |= {token for token in special.values() if token is not None}
        self._control |= {self._tokenizer.token_to_id(source["model"].get("unk_token") or "")}
        self._byte_level = '"ByteLevel"' in json.dumps([source.get("pre_tokenizer"), source.get("decoder")])
        self._byte_fallback = bool(source["model"].get("byte_fallback"))
        ids = [*self._tokenizer.get_vocab(with_added_tokens=True).values(), *special.values()]
        super().__init__(content, max(token + 1 for token in ids if token is not None), special)

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`; never a control id."""
        return self._checked(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        """Return encode(text) of each text, on all cores."""
        return [self._checked(e.ids) for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids` without its control ids; bytes that are not UTF-8 become U+FFFD.

        Raises IndexError for an id outside 0..vocab_size-1.
        """
        ids = [int(token) for token in ids]
        if any(not 0 <= token < self.vocab_size for token in ids):
            raise IndexError(f"an id of {ids} is outside 0..{self.vocab_size - 1}")
        return self._tokenizer.decode([token for token in ids if token not in self._control], skip_special_tokens=False)

    def piece(self, token: int) -> str:
        """Return one id as the files spell it; `<id>` for a row without a token."""
        return self._tokenizer.id_to_token(int(token)) or f"<{int(token)}>"

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of text one id stands for, empty for control ids; joined, they are those of the text."""
        if token in self._control or self._tokenizer.id_to_token(token) is None:
            return b""
        if token in self._text_of_added:
            return self._text_of_added[token].encode()
        piece = self.piece(token)
        if self._byte_level:
            return bytes(_byte_of_character()[character] for character in piece)
        if self._byte_fallback and len(piece) == 6 and piece.startswith("<0x"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(_SPACE_MARK, " ").encode()

    def _checked(self, ids: list[int]) -> list[int]:
        """Drop control ids, which a text that spells a token not marked as special would give."""
        return ids if self._control.isdisjoint(ids) else [token for token in ids if token not in self._control]


def read_files(directory: Path) -> dict[str, str]:
    """The tokenizer's files in a directory, by name; UserError for one that cannot be read."""
    files = {}
    for name in _FILES:
        path = directory / name
        if path.is_file():
            try:
                files[name] = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"cannot read {path}: {error}") from error
    return files


def bundle(files: dict[str, str], name: str, special: dict[str, int | None] | None = None) -> bytes:
    """The bundle of a tokenizer's files; `name` is what errors call where they came from.

    `special` gives ids of some roles (mask, eos, eot, pad, bos); the others are those that the files declare, else
    those whose token has a usual name, but for bos: only an imported model's texts begin with it. UserError where files
    are missing or bad, or mask or eos is unknown.
    """
    ids = vocabulary(files, name)
    declared = _declared(files, name)
    found = dict(special or {})
    for role, usual in NAMES.items():
        if role not in found:
            found[role] = next((ids[token] for token in (declared.get(role), *usual) if token in ids), None)
    for role, word in (("mask", "mask token"), ("eos", "end-of-text token")):
        if found[role] is None:
            raise UserError(f"tokenizer {name} has no {word}; it needs one of {', '.join(NAMES[role])}")
    return json.dumps({"special": found, "files": files}, ensure_ascii=False).encode()


def vocabulary(files: dict[str, str], name: str) -> dict[str, int]:
    """Every token with its id. Raises UserError if there is no tokenizer.json, or a bad one."""
    if "tokenizer.json" not in files:
        raise UserError(f"{name} has no tokenizer.json; give a directory that AutoTokenizer can load")
    return _parse(files["tokenizer.json"], name).get_vocab(with_added_tokens=True)


def has_mask(files: dict[str, str], name: str) -> bool:
    """Whether the files declare a mask token, or have one of a usual name."""
    ids = vocabulary(files, name)
    return any(token in ids for token in (_declared(files, name).get("mask"), *NAMES["mask"]))


def _declared(files: dict[str, str], name: str) -> dict[str, str]:
    """Tokens that tokenizer_config.json or special_tokens_map.json name for a role."""
    declared = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        try:
            values = json.loads(files.get(file, "{}"))
        except ValueError as error:
            raise UserError(f"{file} of {name} is not JSON ({error})") from error
        for role in ("mask", "eos", "pad"):
            value = values.get(f"{role}_token") if isinstance(values, dict) else None
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                declared[role] = value
    return declared


def _parse(text: str, name: str):
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(
            f"{name} is a Hugging Face tokenizer, which needs the tokenizers library: pip install 'llada-jax[hf]'"
        ) from error
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing more precise
        raise UserError(f"{name} is not a Hugging Face tokenizer ({error})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable ones as themselves, the others as the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
