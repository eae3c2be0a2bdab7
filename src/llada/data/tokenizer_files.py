"""Opening a tokenizer, whatever kind its file is."""

from collections.abc import Callable
from pathlib import Path

from llada import json_files
from llada.data.sentencepiece_tokenizer import SentencePieceTokenizer
from llada.data.tokenizer import NAMES, Tokenizer, read_content
from llada.errors import UserError
from llada.paths import user_path

# What a workdir calls its tokenizer, by kind.
_IN_WORKDIR = (SentencePieceTokenizer.file_name, "tokenizer.bundle.json")


def load(path: str | Path, flag: str = "--config.data.tokenizer") -> Tokenizer:
    """A SentencePiece `.model`, a `tokenizer.json`, a directory that holds one of them, or a workdir's bundle.

    Raises UserError, naming `flag`, if it is missing, is none of these, or lacks an end-of-text token.
    """
    path = user_path(path, flag)
    if path.is_dir():
        return _from_directory(path, flag)
    content = read_content(path, flag)
    if path.name == "tokenizer.json":
        return _from_directory(path.parent, flag)
    in_workdir = path.name in _IN_WORKDIR  # which nobody typed
    return parse(content, str(path) if in_workdir else f"{flag}={path}")


def parse(content: bytes, name: str) -> Tokenizer:
    """The tokenizer that `Tokenizer.content` stands for; `name` is what errors call it."""
    if not content.lstrip().startswith(b"{"):
        return SentencePieceTokenizer(content, name)
    from llada.data import huggingface_tokenizer  # not needed for SentencePiece

    try:
        values = json_files.parse(content, "it")
    except UserError as error:
        raise UserError(f"tokenizer {name} is not a bundle of a Hugging Face tokenizer ({error})") from error
    if "files" not in values and "model" in values:  # a tokenizer.json by another name
        files = {"tokenizer.json": json_files.decode(content, f"tokenizer {name}")}
        content = huggingface_tokenizer.bundle(files, name)
    return huggingface_tokenizer.HuggingFaceTokenizer(content, name)


def _from_directory(path: Path, flag: str) -> Tokenizer:
    from llada.data import huggingface_controls, huggingface_tokenizer

    files = huggingface_tokenizer.read_files(path)
    if "tokenizer.json" not in files and (path / SentencePieceTokenizer.file_name).exists():
        tokenizer = SentencePieceTokenizer.load(path / SentencePieceTokenizer.file_name)
        template = huggingface_controls.template_of(files, f"{flag}={path}")
        return tokenizer if template is None else tokenizer.with_dialogue(template, [], tokenizer.vocab_size)
    name = f"{flag}={path}"
    return huggingface_tokenizer.HuggingFaceTokenizer(huggingface_tokenizer.bundle(files, name), name)


def in_workdir(workdir: Path) -> Path | None:
    """The tokenizer's file in a workdir, or None where there is none yet."""
    return next((workdir / name for name in _IN_WORKDIR if (workdir / name).exists()), None)


def fitted(tokenizer: Tokenizer, vocab_size: int, masks: bool, remark: Callable[[str], None]) -> Tokenizer:
    """A tokenizer for a model of `vocab_size` ids: where it has no mask token, the first free id becomes one.

    LLaDA `masks`, and must have one; an ARM goes without where no id is free. UserError where ids are missing.
    """
    needed = tokenizer.vocab_size + (masks and tokenizer.mask_id is None)
    if needed > vocab_size:
        has = f"{tokenizer.vocab_size} pieces" + (" and no mask token" if needed > tokenizer.vocab_size else "")
        raise UserError(
            f"the tokenizer has {has}, more than model.vocab_size={vocab_size} has room for; "
            f"set --config.model.vocab_size={needed} or more"
        )
    if tokenizer.mask_id is not None or tokenizer.vocab_size == vocab_size:
        return tokenizer
    masked = tokenizer.with_mask()
    remark(f"the tokenizer has no mask token ({', '.join(NAMES['mask'])}): id {masked.mask_id} becomes one")
    return masked


def require_exportable(tokenizer: Tokenizer, flag: str) -> None:
    """UserError, naming `flag`, if `llada export` could not write the tokenizer: asked before anything is trained."""
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return  # its files are handed on as they are
    from llada.data import sentencepiece_merges

    try:
        sentencepiece_merges.require_expressible(tokenizer.proto)
    except UserError as error:
        raise UserError(
            f"{flag}: {error}; llada export could not write it, so give its tokenizer.json, if it has one, or train "
            "another"
        ) from error
