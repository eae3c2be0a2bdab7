"""Tokenizers in Hugging Face's format: a directory with a `tokenizer.json`, bundled into one file for a workdir.

The bundle keeps the directory's files as they are, so that an export hands them on unchanged, and says which ids mask,
end text, end a turn and pad. Needs the `tokenizers` library: the [hf] extra.
"""

import functools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from llada import json_files
from llada.data import huggingface_controls
from llada.data.control_tokens import end_of_turn
from llada.data.tokenizer import NAMES, SPACE_MARK, Tokenizer, unicode_text
from llada.errors import UserError, in_brief

_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", huggingface_controls.TEMPLATE_FILE)
_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
_MOST_GROWTH = 64


class HuggingFaceTokenizer(Tokenizer):
    """A bundled tokenizer; `content` is the bundle, `files` the directory's files by name.

    Ids past the last that the files know are control ids too: models have rows that no token uses, and the mask may be
    one of them.
    """

    file_name = "tokenizer.bundle.json"

    def __init__(self, content: bytes, name: str):
        """Parse a bundle; `name` is what errors call it. Raises UserError if it cannot serve."""
        values = json_files.parse(content, f"tokenizer {name}")
        self.files, special = _bundled(values, name)
        source = json_files.parse(self.files["tokenizer.json"], f"tokenizer.json of {name}")
        self._tokenizer = _parse(self.files["tokenizer.json"], name)
        # What the files call special is text like any other when a document spells it.
        self._tokenizer.encode_special_tokens = True
        added = self._tokenizer.get_added_tokens_decoder()
        self._text_of_added = {token: entry.content for token, entry in added.items() if not entry.special}
        self._control = {token for token, entry in added.items() if entry.special}
        self._control |= {token for token in special.values() if token is not None}
        model = source["model"]
        self._control |= {self._tokenizer.token_to_id(model.get("unk_token") or "")}
        self._byte_level = '"ByteLevel"' in json.dumps([source.get("pre_tokenizer"), source.get("decoder")])
        self._byte_fallback = bool(model.get("byte_fallback"))
        pieces = self._tokenizer.get_vocab(with_added_tokens=True)
        self._bytes = self._bytes_of({token: piece for piece, token in pieces.items() if token not in self._control})
        self.controls = {piece: token for piece, token in pieces.items() if token in self._control}
        self.template = huggingface_controls.template_of(self.files, name)
        self.named = huggingface_controls.named_tokens(self.files, name)
        super().__init__(content, name, pieces.values(), special)

    def with_mask(self) -> "HuggingFaceTokenizer":
        """The same tokenizer with a mask token of id vocab_size, which no token of the files has."""
        return HuggingFaceTokenizer(
            bundle(self.files, self.file_name, self._roles() | {"mask": self.vocab_size}), self.file_name
        )

    def with_dialogue(self, template: str, names: Sequence[str], vocab_size: int) -> "HuggingFaceTokenizer":
        """The same tokenizer carrying `template`, with a special token for each of `names`, written into its files.

        Those that it lacks are tokens that its makers reserved, renamed, or rows past its last. UserError where the
        model of `vocab_size` ids has none, and where the format cannot give a token such an id.
        """
        if self._has_dialogue(template, names):
            return self
        unicode_text(template, "the chat template")
        ids, name = vocabulary(self.files, self.file_name), self.file_name
        roles = self._roles()
        taken = {token for token in roles.values() if token is not None} | {ids.get(t, -1) for t in self.named.values()}
        wanted = huggingface_controls.assigned_ids(ids, names, taken, self.mask_id, vocab_size)
        files = huggingface_controls.with_controls(self.files, ids, wanted, self.mask_id, template, name)
        found = vocabulary(files, name)
        wrong = [f"{text} {token}" for text, token in wanted.items() if found.get(text) != token]
        if wrong:
            raise UserError(f"the tokenizer cannot give {wrong[0]} as its id: its files have gaps; add the token there")
        ending = end_of_turn(found, template)
        roles["eot"] = roles["eot"] if ending is None else found[ending]
        return HuggingFaceTokenizer(bundle(files, name, roles), name)

    def _roles(self) -> dict[str, int | None]:
        ids = {"mask": self.mask_id, "eos": self.eos_id, "pad": self.pad_id, "eot": self.eot_id}
        return ids | ({} if self.bos_id is None else {"bos": self.bos_id})

    def _encode(self, text: str) -> list[int]:
        return self._encode_many([text])[0]

    def _encode_many(self, texts: list[str]) -> list[list[int]]:
        try:
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # the library raises nothing more precise
            raise UserError(
                f"the tokenizer has no token for a part of the text, nor for unknown ones ({in_brief(error)})"
            ) from error
        return [self._checked(encoding.ids) for encoding in encodings]

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
        """Return the bytes of text one id stands for, empty for control ids; joined, they are those of the text.

        Where the files change text, or put a space before it, they are those of the text that comes back.
        """
        return self._bytes.get(int(token), b"")

    def _bytes_of(self, pieces: dict[int, str]) -> dict[int, bytes]:
        if self._byte_level:
            table = _byte_of_character()
            # What is added, or no spelling of bytes, is text as it is.
            spelled = {
                token: bytes(table[c] for c in piece) if table.keys() >= set(piece) else piece.encode()
                for token, piece in pieces.items()
            }
            return spelled | {token: text.encode() for token, text in self._text_of_added.items() if token in spelled}
        # Decoders treat the first token of a text apart: a space is dropped before it, or put before all others.
        plain = (t for t, p in pieces.items() if p.isascii() and p.isalpha() and t not in self._text_of_added)
        anchor = next(plain, None)
        first = [] if anchor is None else [anchor]
        before, *texts = self._tokenizer.decode_batch(
            [first, *([*first, token] for token in pieces)], skip_special_tokens=False
        )
        decoded = {}
        for (token, piece), text in zip(pieces.items(), texts, strict=True):
            if self._byte_fallback and _BYTE.fullmatch(piece):
                decoded[token] = bytes([int(piece[3:5], 16)])
            elif before and text.startswith(before):
                decoded[token] = text.removeprefix(before).encode()
            else:
                decoded[token] = piece.replace(SPACE_MARK, " ").encode()
        return decoded

    def _checked(self, ids: list[int]) -> list[int]:
        """Drop control ids, which a text that spells a token not marked as special would give."""
        return ids if self._control.isdisjoint(ids) else [token for token in ids if token not in self._control]


def read_files(directory: Path) -> dict[str, str]:
    """The tokenizer's files in a directory, by name; UserError for one that cannot be read."""
    return {name: json_files.read_text(directory / name) for name in _FILES if (directory / name).exists()}


def bundle(files: dict[str, str], name: str, special: dict[str, int | None] | None = None) -> bytes:
    """The bundle of a tokenizer's files; `name` is what errors call where they came from.

    `special` gives ids of some roles (mask, eos, eot, pad, bos); the others are those that the files declare, else
    those whose token has a usual name, but for bos: only an imported model's texts begin with it. UserError where files
    are missing or bad, or eos is unknown.
    """
    ids = vocabulary(files, name)
    named = declared(files, name)
    roles = dict(special or {})
    for role, usual in NAMES.items():
        if role not in roles:
            roles[role] = next((ids[token] for token in (named.get(role), *usual) if token in ids), None)
    if "eot" not in (special or {}) and (ending := end_of_turn(ids, huggingface_controls.template_of(files, name))):
        roles["eot"] = ids[ending]
    if roles["eos"] is None:
        raise UserError(f"tokenizer {name} has no end-of-text token; it needs one of {', '.join(NAMES['eos'])}")
    return json.dumps({"special": roles, "files": files}, ensure_ascii=False).encode()


def vocabulary(files: dict[str, str], name: str) -> dict[str, int]:
    """Every token with its id. Raises UserError if there is no tokenizer.json, or a bad one."""
    if "tokenizer.json" not in files:
        raise UserError(f"{name} has no tokenizer.json; give a directory that AutoTokenizer can load")
    return _parse(files["tokenizer.json"], name).get_vocab(with_added_tokens=True)


def has_mask(files: dict[str, str], name: str) -> bool:
    """Whether the files declare a mask token, or have one of a usual name."""
    ids = vocabulary(files, name)
    return any(token in ids for token in (declared(files, name).get("mask"), *NAMES["mask"]))


def declared(files: dict[str, str], name: str) -> dict[str, str]:
    """Tokens that tokenizer_config.json or special_tokens_map.json name for a role."""
    named = huggingface_controls.named_tokens(files, name)
    return {role: named[f"{role}_token"] for role in ("mask", "eos", "pad", "bos") if f"{role}_token" in named}


def _bundled(values: dict[str, Any], name: str) -> tuple[dict[str, str], dict[str, int | None]]:
    """The files in a bundle and the ids of every role. UserError where one is missing, or no text or id."""
    refusal = f"tokenizer {name} is not a bundle of a Hugging Face tokenizer"
    files, ids = values.get("files"), values.get("special")
    if not isinstance(files, dict) or not all(isinstance(text, str) for text in files.values()):
        raise UserError(f"{refusal} (no files)")
    if "tokenizer.json" not in files:
        raise UserError(f"{refusal} (no tokenizer.json)")
    if not isinstance(ids, dict):
        raise UserError(f"{refusal} (no special ids)")
    special = {role: ids.get(role) for role in (*NAMES, "bos")}
    for role, token in special.items():
        if (token is None and role == "eos") or type(token) not in (int, type(None)):
            raise UserError(f"{refusal} ({role} is {token!r:.80}, not an id)")
    return files, special


@functools.lru_cache(maxsize=1)  # asked for ids first, then for the tokenizer, of which a large one takes seconds
def _parse(text: str, name: str) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(
            f"{name} is a Hugging Face tokenizer, which needs the tokenizers library: pip install 'llada-jax[hf]'"
        ) from error
    source = json_files.parse(text, f"tokenizer.json of {name}")
    for step in ("normalizer", "decoder"):
        if (longer := _growth(source.get(step))) > _MOST_GROWTH:
            raise UserError(
                f"tokenizer {name}: its {step} makes text {longer:,} times as long, which no tokenizer does"
            )
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing more precise
        raise UserError(f"{name} is not a Hugging Face tokenizer ({in_brief(error)})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _growth(step: Any) -> int:
    """How many times as long a text can be after a normalizer or decoder, by the replacements in it."""
    if not isinstance(step, dict):
        return 1
    growth = 1
    for part in ("normalizers", "decoders"):
        for inner in step.get(part) or () if isinstance(step.get(part), list) else ():
            growth *= _growth(inner)
    content = step.get("content", step.get("prepend"))
    return growth * max(len(content), 1) if isinstance(content, str) else growth


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable ones as themselves, the others as the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
