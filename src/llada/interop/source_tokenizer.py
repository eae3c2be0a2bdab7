"""The tokenizer of a Hugging Face directory, with a mask token where the model has a place for one."""

import json
import re
from pathlib import Path
from typing import Any

from llada import json_files
from llada.config import ModelConfig
from llada.data import huggingface_controls, huggingface_tokenizer, sentencepiece_tokenizer
from llada.data.control_tokens import RESERVED
from llada.data.huggingface_tokenizer import HuggingFaceTokenizer
from llada.data.sentencepiece_merges import CONTROL
from llada.data.sentencepiece_tokenizer import SentencePieceTokenizer, parse_proto
from llada.data.tokenizer import NAMES
from llada.errors import UserError
from llada.interop import sentencepiece_files

# Tokens that makers set aside: free to be the mask of a model that had none.
_FREE = (RESERVED, re.compile(r"<\|?unk\|?>|\[UNK\]"))


def open_tokenizer(
    path: Path, special: dict[str, int], model: ModelConfig, mask_token: str | None
) -> HuggingFaceTokenizer:
    """The source's tokenizer with a mask; `special` are ids by role that its config.json names.

    UserError if there is no tokenizer, if it does not fit the model, or if a mask predictor's has no mask and no id is
    free to become one.
    """
    files, vocab_size = huggingface_tokenizer.read_files(path), model.vocab_size
    if "tokenizer.json" not in files:
        if not (path / SentencePieceTokenizer.file_name).is_file():
            raise UserError(f"--source={path} has neither tokenizer.json nor tokenizer.model; copy the tokenizer there")
        files |= _from_sentencepiece(path, files, special)
    ids = huggingface_tokenizer.vocabulary(files, str(path))
    if not ids:
        raise UserError(f"--source={path}: the tokenizer has no tokens; copy the right tokenizer.json")
    if max(ids.values()) >= vocab_size:
        raise UserError(
            f"--source={path}: the tokenizer has ids up to {max(ids.values())}, the model a vocabulary of "
            f"{vocab_size}; they do not belong together"
        )
    roles = _roles(files, ids, special, model.causal, str(path))
    if mask_token is not None:
        if mask_token not in ids:
            raise UserError(f"--mask_token={mask_token} is not a token of {path}; give one that no text needs")
        roles["mask"] = ids[mask_token]
    elif "mask" not in roles and not huggingface_tokenizer.has_mask(files, str(path)):
        mask = _free_id(ids, vocab_size)
        if mask is not None:
            roles["mask"] = mask
        elif not model.causal:  # an ARM can do without
            raise UserError(f"--source={path} has no mask token and no reserved one; name one with --mask_token=TOKEN")
    outside = [f"{role}_token_id={token}" for role, token in roles.items() if not 0 <= token < vocab_size]
    if outside:
        raise UserError(f"--source={path}: config.json has {outside[0]}; ids of this model are 0 to {vocab_size - 1}")
    return HuggingFaceTokenizer(huggingface_tokenizer.bundle(files, str(path), {**roles}), str(path))


def _roles(
    files: dict[str, str], ids: dict[str, int], special: dict[str, int], causal: bool, name: str
) -> dict[str, int]:
    """Special ids by role: those of config.json, and for an ARM the bos that only the tokenizer's files name."""
    roles, named = dict(special), huggingface_tokenizer.declared(files, name)
    if causal and named.get("bos") in ids:
        roles.setdefault("bos", ids[named["bos"]])
    if roles.get("bos") == roles.get("eos", ids.get(named.get("eos", ""))):
        roles.pop("bos", None)  # as in models trained here
    return roles


def _from_sentencepiece(path: Path, files: dict[str, str], special: dict[str, int]) -> dict[str, str]:
    """Hugging Face files from a SentencePiece model that came without tokenizer.json."""
    name = str(path / SentencePieceTokenizer.file_name)
    content = json_files.read_bytes(Path(name))
    proto = parse_proto(content, name)
    settings = json_files.parse(files.get("tokenizer_config.json", "{}"), f"tokenizer_config.json of {path}")
    added = _added_tokens(path, settings, len(proto.pieces))
    id_of = {piece.piece: token for token, piece in enumerate(proto.pieces)} | {v: k for k, v in added.items()}
    roles = {role: next((id_of[name] for name in names if name in id_of), None) for role, names in NAMES.items()}
    roles |= {role: token for role, token in special.items() if token < len(proto.pieces) or token in added}
    template = None
    if huggingface_controls.template_of(files, str(path)) is None:
        controls = {piece.piece for piece in proto.pieces if piece.type == CONTROL}
        template = sentencepiece_tokenizer.template_of(content, controls, name)
    try:
        made = sentencepiece_files.tokenizer_files(
            proto,
            mask_id=roles["mask"],
            eos_id=roles["eos"],
            pad_id=roles["pad"],
            # Llama's own tokenizer begins texts so unless its settings turn it off.
            bos_id=roles.get("bos") if settings.get("add_bos_token") is not False else None,
            model_max_length=None,
            added=added,
            keep_marks=False,
            template=template,
        )
    except UserError as error:
        raise UserError(f"--source={path}: {error}; add its tokenizer.json, if it has one") from error
    written = {name: text.decode() for name, text in made.items()}
    kept = {name: settings[name] for name in ("chat_template", "model_max_length", "padding_side") if name in settings}
    config = json.loads(written["tokenizer_config.json"]) | kept
    return written | {"tokenizer_config.json": json_files.dumps(config, indent=1) + "\n"}


def _added_tokens(path: Path, settings: dict[str, Any], pieces: int) -> dict[int, str]:
    """Tokens past the last piece, by id, that the files beside a SentencePiece model add."""
    tokens: dict[int, str] = {}
    decoder = settings.get("added_tokens_decoder")
    for token, entry in decoder.items() if isinstance(decoder, dict) else ():
        if token.isascii() and token.isdecimal() and isinstance(entry, dict) and isinstance(entry.get("content"), str):
            tokens[int(token)] = entry["content"]
    if (path / "added_tokens.json").exists():
        values = json_files.read(path / "added_tokens.json")
        tokens |= {token: content for content, token in values.items() if type(token) is int}
    return {token: content for token, content in tokens.items() if token >= pieces}


def _free_id(ids: dict[str, int], vocab_size: int) -> int | None:
    """An id that no text uses: a row past the tokenizer's last, else a token its makers reserved; None without."""
    last = max(ids.values())
    if last + 1 < vocab_size:
        return last + 1
    for pattern in _FREE:
        if free := [token for name, token in ids.items() if pattern.fullmatch(name)]:
            return min(free)
    return None
