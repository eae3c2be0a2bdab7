"""A SentencePiece model as the files that `transformers.AutoTokenizer` loads, written with json alone.

For models trained here the ids are those of the tokenizer's own `encode` on every Unicode text, and decoding gives the
text back. What a user meets that is different:

* Text that spells a control symbol or the unknown piece, such as "<mask>", gives that id, as users of transformers
  expect; SentencePiece never does. `tokenizer(text, split_special_tokens=True)` gives the ids of `encode` here too.
* Pieces are spelled with spaces, not with U+2581, so that U+2581 in a text stays what it is: three bytes.
* Ids of bytes that are not UTF-8, which no text encodes to, may decode to another number of U+FFFD.

Byte-pair models of users are exact too, and unigram models nearly, but for these:

* A charsmap is applied by character cluster, not by longest match: rare marks on a character that is itself
  normalised are lost. U+FDD0 to U+FDEF, which are no characters, stand for user-defined symbols meanwhile.
* Where two unigram cuts are equally probable ("))" + ")" and ")" + "))"), rounding decides: here of 64-bit sums,
  in SentencePiece of 32-bit ones, which in texts of many thousand characters also confuse cuts that are nearly so.
* The text on each side of a special token, or of U+2581 in a model with byte fallback, is to SentencePiece a text of
  its own. Here that holds for special tokens, not for U+2581, where a model adds a dummy prefix or normalises.
* A text that is one user-defined symbol of several characters, in a byte-pair model, or that a charsmap deletes, gets
  no dummy prefix.
"""

import base64
import json
import re
from typing import Any

from llada.data.sentencepiece_merges import (
    BPE,
    CONTROL,
    PLACEHOLDERS,
    SPACE_MARK,
    UNIGRAM,
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
) -> dict[str, bytes]:
    """Return the files' contents by name: tokenizer.json, tokenizer_config.json and special_tokens_map.json.

    `proto` is a parsed SentencePiece ModelProto, byte-pair or unigram; ids are None where it has no such token. With
    `bos_id` every encoded text begins with that token, unless the user passes add_special_tokens=False. `added` are
    special tokens past the last piece, by id. Without `keep_marks` a U+2581 in a text is a space, as SentencePiece
    itself has it. Transformers 4.57 and 5 load the files without sentencepiece. Raises
    UserError for a model that the format cannot express.
    """
    merges = require_expressible(proto)
    added = added or {}
    given = {"mask_token": mask_id, "eos_token": eos_id, "pad_token": pad_id, "bos_token": bos_id}
    roles = {role: token for role, token in given.items() if token is not None}
    roles["unk_token"] = next(token for token, piece in enumerate(proto.pieces) if piece.type == UNKNOWN)
    name_of = dict(enumerate(piece.piece for piece in proto.pieces)) | added
    names = {role: name_of[token] for role, token in roles.items()}
    found_first = _added_tokens(proto, set(roles.values()), added)
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": found_first,
        "normalizer": _sequence("normalizers", _normalizers(proto, keep_marks)),
        "pre_tokenizer": _pre_tokenizer(proto),
        "post_processor": None if bos_id is None else _template(names["bos_token"], bos_id),
        "decoder": _sequence("decoders", _decoders(proto)),
        "model": _byte_pair_model(proto, merges) if proto.trainer_spec.model_type == BPE else _unigram_model(proto),
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
            str(token["id"]): {key: token[key] for key in token if key != "id"} for token in found_first
        },
        **names,
    }
    return {
        "tokenizer.json": _json(tokenizer),
        "tokenizer_config.json": _json(config),
        "special_tokens_map.json": _json(names),
    }


def _cut_out(proto: Any) -> list[str]:
    """User-defined symbols that the model itself would not keep whole.

    Unigram scores keep any of them whole. In a byte-pair model that no merge touches a single character.
    """
    return [] if proto.trainer_spec.model_type == UNIGRAM else [s for s in user_defined(proto) if len(s) > 1]


def _added_tokens(proto: Any, special: set[int], added: dict[int, str]) -> list[dict]:
    """Tokens found in a text before the model sees it: special ones, and symbols found in normalised text."""
    cut_out, tokens = set(_cut_out(proto)), []
    whole = {"single_word": False, "lstrip": False, "rstrip": False}
    for token, piece in enumerate(proto.pieces):
        is_special = token in special or piece.type in (CONTROL, UNKNOWN)
        if is_special or (piece.type == USER_DEFINED and spelled(piece) in cut_out):
            name = {"id": token, "content": spelled(piece)}
            tokens.append({**name, **whole, "normalized": not is_special, "special": is_special})
    past = sorted(added.items())
    return tokens + [
        {"id": token, "content": name, **whole, "normalized": False, "special": True} for token, name in past
    ]


def _normalizers(proto: Any, keep_marks: bool) -> list[dict]:
    spec, byte_fallback = proto.normalizer_spec, proto.trainer_spec.byte_fallback and keep_marks
    steps = _charsmap(proto) if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        # Not the normaliser Strip, which would take all kinds of white space.
        last = " " if byte_fallback else f" {SPACE_MARK}"
        steps += [_replace_regex(rf"\A +|[{last}]+\z", ""), _replace_regex(" {2,}", " ")]
    if spec.add_dummy_prefix:
        # Added tokens are themselves normalised before they are looked for, and must not get the prefix then.
        whole = "|".join(map(_escaped, _cut_out(proto)))
        prefix = _replace_regex(rf"\A(?!(?:{whole})\z)(?=[\s\S])", " ")
        steps.append(prefix if whole else {"type": "Prepend", "prepend": " "})
    if not byte_fallback:
        steps.append(_replace(SPACE_MARK, " "))
    if proto.trainer_spec.byte_fallback and not any(piece.piece == SPACE_MARK for piece in proto.pieces):
        # Trained on text without a space: to SentencePiece an unknown space is the three bytes of its mark.
        steps.append(_replace(" ", SPACE_MARK))
    return steps


def _charsmap(proto: Any) -> list[dict]:
    """The model's own normalisation, from which SentencePiece exempts user-defined symbols."""
    symbols, (gap, *placeholders) = user_defined(proto), PLACEHOLDERS
    hidden = list(zip(symbols, placeholders, strict=False))
    # Of the character clusters that the tokenizers library normalises as one, the one that ordinary text is full of.
    hidden.append(("\r\n", f"\r{gap}\n"))
    charsmap = base64.b64encode(proto.normalizer_spec.precompiled_charsmap).decode()
    return [
        *(_replace(symbol, placeholder) for symbol, placeholder in hidden),
        {"type": "Precompiled", "precompiled_charsmap": charsmap},
        _replace(gap, ""),
        *(_replace(placeholder, symbol) for symbol, placeholder in hidden[:-1]),
    ]


def _pre_tokenizer(proto: Any) -> dict | None:
    """Keep a unigram model from reading text such as "<0x41>" or "<s>" as the piece of that name.

    A byte-pair model needs no such help, because no merge makes those pieces.
    """
    if proto.trainer_spec.model_type == BPE:
        return None
    names = [piece.piece for piece in proto.pieces if piece.type in (UNKNOWN, CONTROL)]
    tails: dict[str, list[str]] = {}
    for name in names:
        if len(name) > 1:
            tails.setdefault(name[0], []).append(_escaped(name[1:]))
    if proto.trainer_spec.byte_fallback:
        tails.setdefault("<", []).append("0x[0-9A-F]{2}>")
    pattern = "|".join(f"{_escaped(first)}(?={'|'.join(rest)})" for first, rest in tails.items())
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "MergedWithPrevious", "invert": False}
    return split if pattern else None


def _decoders(proto: Any) -> list[dict]:
    steps = [{"type": "ByteFallback"}] if proto.trainer_spec.byte_fallback else []
    steps.append({"type": "Fuse"})
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return steps


def _template(bos: str, bos_id: int) -> dict:
    """Begin every text, and each of a pair of texts, with one token."""

    def parts(sequence: str, segment: int) -> list[dict]:
        return [
            {"SpecialToken": {"id": bos, "type_id": segment}},
            {"Sequence": {"id": sequence, "type_id": segment}},
        ]

    return {
        "type": "TemplateProcessing",
        "single": parts("A", 0),
        "pair": parts("A", 0) + parts("B", 1),
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


def _unigram_model(proto: Any) -> dict:
    vocabulary = []
    for piece in proto.pieces:
        score = piece.score
        if piece.type == USER_DEFINED:
            # Better than any log-probability: SentencePiece's own bonus.
            score = 0.1 * len(piece.piece.encode()) - 0.1
        vocabulary.append([spelled(piece), score])
    return {
        "type": "Unigram",
        "unk_id": next(token for token, piece in enumerate(proto.pieces) if piece.type == UNKNOWN),
        "vocab": vocabulary,
        "byte_fallback": bool(proto.trainer_spec.byte_fallback),
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
