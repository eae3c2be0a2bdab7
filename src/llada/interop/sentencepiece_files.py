"""A SentencePiece model as the files that `transformers.AutoTokenizer` loads, written with json alone.

For models trained here the ids are those of the tokenizer's own `encode` on every Unicode text, and decoding gives the
text back. What a user meets that is different:

* Text that spells a control symbol or the unknown piece, such as "<mask>", gives that id, as users of transformers
  expect; SentencePiece never does. `tokenizer(text, split_special_tokens=True)` gives the ids of `encode` here too.
* Pieces are spelled with spaces, not with U+2581, so that U+2581 in a text stays what it is: three bytes.
* Ids of bytes that are not UTF-8, which no text encodes to, may decode to another number of U+FFFD.

Byte-pair models of users, such as those of Llama 2 and Mistral, are exact too, but for these:

* The text on each side of a special token, or of U+2581 in a model with byte fallback, is to SentencePiece a text of
  its own. Here that holds for special tokens, not for U+2581, where a model adds a dummy prefix or drops spaces.
* A text that is one user-defined symbol of several characters gets no dummy prefix.

Unigram models, and models that change characters, are refused: `sentencepiece_merges.require_expressible`.
"""

import json
import re
from typing import Any

from llada.data.huggingface_controls import TEMPLATE_FILE
from llada.data.sentencepiece_merges import (
    CONTROL,
    SPACE_MARK,
    UNKNOWN,
    USER_DEFINED,
    Merge,
    require_expressible,
    spelled,
    user_defined,
)


def tokenizer_files(
    proto: Any,
    *,
    mask_id: int | None,
    eos_id: int | None,
    pad_id: int | None,
    bos_id: int | None = None,
    model_max_length: int | None,
    added: dict[int, str] | None = None,
    keep_marks: bool = True,
    template: str | None = None,
) -> dict[str, bytes]:
    """Return the files' contents by name: tokenizer.json, tokenizer_config.json and special_tokens_map.json.

    With a chat `template` also chat_template.jinja.

    `proto` is a parsed byte-pair ModelProto; ids are None where it has no such token. With `bos_id` every encoded text
    begins with that token, unless the user passes add_special_tokens=False. `added` are special tokens past the last
    piece, by id. Without `keep_marks` a U+2581 in a text is a space, as SentencePiece itself has it. Transformers 4.57
    and 5 load the files without sentencepiece. Raises UserError for a model that the format cannot express.
    """
    merges = require_expressible(proto)
    added = added or {}
    ids = {"mask_token": mask_id, "eos_token": eos_id, "pad_token": pad_id, "bos_token": bos_id}
    roles = {role: token for role, token in ids.items() if token is not None}
    roles["unk_token"] = next(token for token, piece in enumerate(proto.pieces) if piece.type == UNKNOWN)
    name_of = dict(enumerate(piece.piece for piece in proto.pieces)) | added
    names = {role: name_of[token] for role, token in roles.items()}
    added_tokens = _added_tokens(proto, set(roles.values()), added)
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens,
        "normalizer": _sequence("normalizers", _normalizers(proto, keep_marks)),
        "pre_tokenizer": None,
        "post_processor": None if bos_id is None else _template(names["bos_token"], bos_id),
        "decoder": _sequence("decoders", _decoders(proto)),
        "model": _byte_pair_model(proto, merges),
    }
    config = {
        # The one name of the plain fast tokenizer that both major versions know.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model_max_length,
        # Without it the tokenizer adds token types, which no causal model takes.
        "model_input_names": ["input_ids", "attention_mask"],
        # Cleaning up would change text such as "a ." into "a.".
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {
            str(token["id"]): {key: token[key] for key in token if key != "id"} for token in added_tokens
        },
        **names,
    }
    return {
        "tokenizer.json": _json(tokenizer),
        "tokenizer_config.json": _json(config),
        "special_tokens_map.json": _json(names),
        **({} if template is None else {TEMPLATE_FILE: template.encode()}),
    }


def _long_symbols(proto: Any) -> list[str]:
    """User-defined symbols of several characters, which merges would cut; no merge touches a single character."""
    return [symbol for symbol in user_defined(proto) if len(symbol) > 1]


def _added_tokens(proto: Any, special: set[int], added: dict[int, str]) -> list[dict[str, Any]]:
    """Tokens that are searched for before the model sees a text: special ones, and symbols in normalised text."""
    symbols = set(_long_symbols(proto))
    tokens = []
    for token, piece in enumerate(proto.pieces):
        is_special = token in special or piece.type in (CONTROL, UNKNOWN)
        if is_special or (piece.type == USER_DEFINED and spelled(piece) in symbols):
            tokens.append(_added_token(token, spelled(piece), is_special))
    return tokens + [_added_token(token, name, True) for token, name in sorted(added.items())]


def _added_token(token: int, content: str, special: bool) -> dict[str, Any]:
    strips = {"single_word": False, "lstrip": False, "rstrip": False}
    return {"id": token, "content": content, **strips, "normalized": not special, "special": special}


def _normalizers(proto: Any, keep_marks: bool) -> list[dict]:
    spec, byte_fallback = proto.normalizer_spec, proto.trainer_spec.byte_fallback and keep_marks
    steps = []
    if spec.remove_extra_whitespaces:
        # Not the normaliser Strip, which would take all kinds of white space.
        last = " " if byte_fallback else f" {SPACE_MARK}"
        steps += [_replace_regex(rf"\A +|[{last}]+\z", ""), _replace_regex(" {2,}", " ")]
    if spec.add_dummy_prefix:
        # Added tokens are themselves normalised before they are looked for, and must not get the prefix then.
        symbols = "|".join(map(_escaped, _long_symbols(proto)))
        prefix = _replace_regex(rf"\A(?!(?:{symbols})\z)(?=[\s\S])", " ")
        steps.append(prefix if symbols else {"type": "Prepend", "prepend": " "})
    if not byte_fallback:
        steps.append(_replace(SPACE_MARK, " "))
    if proto.trainer_spec.byte_fallback and not any(piece.piece == SPACE_MARK for piece in proto.pieces):
        # Trained on text without a space: to SentencePiece an unknown space is the three bytes of its mark.
        steps.append(_replace(" ", SPACE_MARK))
    return steps


def _decoders(proto: Any) -> list[dict]:
    steps: list[dict] = [{"type": "ByteFallback"}] if proto.trainer_spec.byte_fallback else []
    steps.append({"type": "Fuse"})
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return steps


def _template(bos: str, bos_id: int) -> dict:
    """Begin every text, and each of a pair of texts, with one token."""

    def with_bos(sequence: str, segment: int) -> list[dict]:
        return [
            {"SpecialToken": {"id": bos, "type_id": segment}},
            {"Sequence": {"id": sequence, "type_id": segment}},
        ]

    return {
        "type": "TemplateProcessing",
        "single": with_bos("A", 0),
        "pair": with_bos("A", 0) + with_bos("B", 1),
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }


def _byte_pair_model(proto: Any, merges: list[Merge]) -> dict:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": next(piece.piece for piece in proto.pieces if piece.type == UNKNOWN),
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": bool(proto.trainer_spec.byte_fallback),
        "ignore_merges": False,
        "vocab": {spelled(piece): token for token, piece in enumerate(proto.pieces)},
        "merges": [[merge.left, merge.right] for merge in merges],
    }


def _sequence(key: str, steps: list[dict]) -> dict | None:
    return {"type": "Sequence", key: steps} if steps else None


def _replace(text: str, by: str) -> dict:
    return {"type": "Replace", "pattern": {"String": text}, "content": by}


def _replace_regex(pattern: str, by: str) -> dict:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": by}


def _escaped(text: str) -> str:
    r"""Text as a regular expression in the tokenizers library's dialect (Oniguruma)."""
    return re.sub(r"([^\w\s])", r"\\\1", text)


def _json(content: dict) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode()
