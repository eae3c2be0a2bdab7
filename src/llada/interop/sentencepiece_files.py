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
import itertools
import json
import re
from typing import Any, NamedTuple

from llada.errors import UserError

# Numbers of sentencepiece_model.proto.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5
_UNIGRAM, _BPE = 1, 2
_MODEL_TYPES = {3: "word", 4: "char"}

_SPACE_MARK = "\u2581"

# Code points that are never characters: Unicode reserves them for a program's own use inside a text.
_PLACEHOLDERS = [chr(0xFDD0 + i) for i in range(32)] + [chr(plane * 0x10000 + 0xFFFE) for plane in range(17)]


class _Merge(NamedTuple):
    """The step of byte-pair encoding that makes a piece."""

    score: float
    piece: str
    left: str
    right: str


def tokenizer_files(
    proto: Any,
    *,
    mask_id: int | None,
    eos_id: int | None,
    pad_id: int | None,
    bos_id: int | None = None,
    model_max_length: int | None,
) -> dict[str, bytes]:
    """Return the files' contents by name: tokenizer.json, tokenizer_config.json and special_tokens_map.json.

    `proto` is a parsed SentencePiece ModelProto, byte-pair or unigram; ids are None where it has no such token. With
    `bos_id` every encoded text begins with that token, unless the user passes add_special_tokens=False. Transformers
    4.57 and 5 load the files without sentencepiece. Raises UserError for a model that the format cannot express.
    """
    _refuse_what_has_no_equal(proto)
    given = {"mask_token": mask_id, "eos_token": eos_id, "pad_token": pad_id, "bos_token": bos_id}
    roles = {role: token for role, token in given.items() if token is not None}
    unknown = next((token for token, piece in enumerate(proto.pieces) if piece.type == _UNKNOWN), None)
    if unknown is None:
        raise UserError("the SentencePiece model has no unknown piece; transformers cannot load it")
    roles["unk_token"] = unknown
    names = {role: proto.pieces[token].piece for role, token in roles.items()}
    added = _added_tokens(proto, set(roles.values()))
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": _sequence("normalizers", _normalizers(proto)),
        "pre_tokenizer": _pre_tokenizer(proto),
        "post_processor": None if bos_id is None else _template(names["bos_token"], bos_id),
        "decoder": _sequence("decoders", _decoders(proto)),
        "model": _byte_pair_model(proto) if proto.trainer_spec.model_type == _BPE else _unigram_model(proto),
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
            str(token["id"]): {key: token[key] for key in token if key != "id"} for token in added
        },
        **names,
    }
    return {
        "tokenizer.json": _json(tokenizer),
        "tokenizer_config.json": _json(config),
        "special_tokens_map.json": _json(names),
    }


def _refuse_what_has_no_equal(proto: Any) -> None:
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    problem = None
    if trainer.model_type not in (_UNIGRAM, _BPE):
        name = _MODEL_TYPES.get(trainer.model_type, trainer.model_type)
        problem = f"is of type {name}; only bpe and unigram models can be exported"
    elif trainer.treat_whitespace_as_suffix:
        problem = "was trained with --treat_whitespace_as_suffix, which transformers cannot express"
    elif not normalizer.escape_whitespaces:
        problem = "was trained with --escape_whitespaces=false, which transformers cannot express"
    elif proto.denormalizer_spec.precompiled_charsmap:
        problem = "has denormalisation rules, which transformers cannot express"
    else:
        for piece in proto.pieces:
            if piece.type == _UNUSED:
                problem = f"has the unused piece {piece.piece!r}, which transformers cannot express"
            elif " " in piece.piece and piece.type in (_NORMAL, _USER_DEFINED):
                problem = f"has the piece {piece.piece!r} with a plain space, which transformers cannot express"
        if len(set(map(_spelled, proto.pieces))) != len(proto.pieces):
            problem = "has two pieces that differ only in how they spell a space, which transformers cannot express"
    if problem:
        raise UserError(f"the SentencePiece model {problem}")


def _spelled(piece: Any) -> str:
    """A piece as the files spell it."""
    return piece.piece.replace(_SPACE_MARK, " ") if piece.type in (_NORMAL, _USER_DEFINED) else piece.piece


def _user_defined(proto: Any) -> list[str]:
    """Symbols that are never cut, longest first: the order in which a text is searched for them."""
    symbols = [_spelled(piece) for piece in proto.pieces if piece.type == _USER_DEFINED]
    return sorted(symbols, key=len, reverse=True)


def _cut_out(proto: Any) -> list[str]:
    """User-defined symbols that the model itself would not keep whole.

    Unigram scores keep any of them whole. In a byte-pair model that no merge touches a single character.
    """
    return [] if proto.trainer_spec.model_type == _UNIGRAM else [s for s in _user_defined(proto) if len(s) > 1]


def _added_tokens(proto: Any, special: set[int]) -> list[dict]:
    """Tokens found in a text before the model sees it: special ones, and symbols found in normalised text."""
    cut_out, tokens = set(_cut_out(proto)), []
    for token, piece in enumerate(proto.pieces):
        is_special = token in special or piece.type in (_CONTROL, _UNKNOWN)
        if is_special or (piece.type == _USER_DEFINED and _spelled(piece) in cut_out):
            whole = {"single_word": False, "lstrip": False, "rstrip": False}
            name = {"id": token, "content": _spelled(piece)}
            tokens.append({**name, **whole, "normalized": not is_special, "special": is_special})
    return tokens


def _normalizers(proto: Any) -> list[dict]:
    spec, byte_fallback = proto.normalizer_spec, proto.trainer_spec.byte_fallback
    steps = _charsmap(proto) if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        # Not the normaliser Strip, which would take all kinds of white space.
        last = " " if byte_fallback else f" {_SPACE_MARK}"
        steps += [_replace_regex(rf"\A +|[{last}]+\z", ""), _replace_regex(" {2,}", " ")]
    if spec.add_dummy_prefix:
        # Added tokens are themselves normalised before they are looked for, and must not get the prefix then.
        whole = "|".join(map(_escaped, _cut_out(proto)))
        prefix = _replace_regex(rf"\A(?!(?:{whole})\z)(?=[\s\S])", " ")
        steps.append(prefix if whole else {"type": "Prepend", "prepend": " "})
    if not byte_fallback:
        steps.append(_replace(_SPACE_MARK, " "))
    elif not any(piece.piece == _SPACE_MARK for piece in proto.pieces):
        # Trained on text without a space: to SentencePiece an unknown space is the three bytes of its mark.
        steps.append(_replace(" ", _SPACE_MARK))
    return steps


def _charsmap(proto: Any) -> list[dict]:
    """The model's own normalisation, from which SentencePiece exempts user-defined symbols."""
    symbols, (gap, *placeholders) = _user_defined(proto), _PLACEHOLDERS
    if len(symbols) > len(placeholders):
        raise UserError(
            f"the SentencePiece model normalises text and has {len(symbols)} user-defined symbols; "
            f"transformers can express {len(placeholders)}"
        )
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
    if proto.trainer_spec.model_type == _BPE:
        return None
    names = [piece.piece for piece in proto.pieces if piece.type in (_UNKNOWN, _CONTROL)]
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


def _byte_pair_model(proto: Any) -> dict:
    vocabulary = {_spelled(piece): token for token, piece in enumerate(proto.pieces)}
    merges = _merges(proto)
    for merge in merges:
        for part in (merge.left, merge.right):
            if part not in vocabulary:
                raise UserError(
                    f"the SentencePiece model has the piece {merge.piece!r} but not its part {part!r}, "
                    "which transformers cannot express"
                )
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": next(piece.piece for piece in proto.pieces if piece.type == _UNKNOWN),
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": bool(proto.trainer_spec.byte_fallback),
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": [[merge.left, merge.right] for merge in merges],
    }


def _merges(proto: Any) -> list[_Merge]:
    """The one pair of parts that each piece is ever merged from, best score first.

    SentencePiece merges the neighbours whose joint piece has the best score, leftmost among equals; the tokenizers
    library ranks pairs instead, so two pairs that make one piece would have to share a rank. They never meet: until a
    piece is made no merge has crossed its ends, so all merges within it were those of encoding the piece alone, and
    the last of them is the same everywhere. Pieces that encode to something else are never made at all.
    """
    scores = {_spelled(piece): piece.score for piece in proto.pieces if piece.type == _NORMAL}
    symbols = _user_defined(proto)
    start = re.compile("|".join([*map(re.escape, symbols), "."]), re.DOTALL)
    merges = []
    for piece, score in scores.items():
        parts = _last_merge(start.findall(piece), scores, set(symbols))
        if parts:
            merges.append(_Merge(score, piece, *parts))
    merges.sort(key=lambda merge: -merge.score)
    _refuse_ties(merges)
    return merges


def _last_merge(parts: list[str], scores: dict[str, float], frozen: set[str]) -> tuple[str, str] | None:
    """The parts of the merge that makes one piece of all `parts`, or None where merging ends before."""
    last = None
    while len(parts) > 1:
        best_score, best = None, 0
        for i, (left, right) in enumerate(itertools.pairwise(parts)):
            score = scores.get(left + right)
            if score is None or left in frozen or right in frozen:
                continue
            if best_score is None or score > best_score:
                best_score, best = score, i
        if best_score is None:
            return None
        last = parts[best], parts[best + 1]
        parts[best : best + 2] = ["".join(last)]
    return last


def _refuse_ties(merges: list[_Merge]) -> None:
    """Pieces of equal score: SentencePiece takes the leftmost, a rank cannot; refused where the order could matter.

    It matters where two such merges want the same part, or where one makes room for a merge that is no worse.
    """
    tied: dict[str, float] = {}
    for score, group in itertools.groupby(merges, key=lambda merge: merge.score):
        equals = list(group)
        if len(equals) == 1:
            continue
        by_left: dict[str, list[_Merge]] = {}
        for merge in equals:
            tied[merge.piece] = score
            by_left.setdefault(merge.left, []).append(merge)
        for merge in equals:
            for other in by_left.get(merge.right, []):
                if other.piece != merge.piece:
                    raise UserError(
                        f"the SentencePiece model gives the pieces {merge.piece!r} and {other.piece!r} the same score, "
                        "so that their order depends on the text; transformers cannot express that"
                    )
    for merge in merges:
        for part in (merge.left, merge.right):
            if merge.score >= tied.get(part, float("inf")):
                raise UserError(
                    f"the SentencePiece model scores the piece {merge.piece!r} no lower than its part {part!r}, whose "
                    "score other pieces share; transformers cannot express that"
                )


def _unigram_model(proto: Any) -> dict:
    vocabulary = []
    for piece in proto.pieces:
        score = piece.score
        if piece.type == _USER_DEFINED:
            # Better than any log-probability: SentencePiece's own bonus.
            score = 0.1 * len(piece.piece.encode()) - 0.1
        vocabulary.append([_spelled(piece), score])
    return {
        "type": "Unigram",
        "unk_id": next(token for token, piece in enumerate(proto.pieces) if piece.type == _UNKNOWN),
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
