"""Opening a tokenizer, whatever kind its file is."""

from pathlib import Path

from llada.data import huggingface_tokenizer
from llada.data.huggingface_tokenizer import HuggingFaceTokenizer
from llada.data.sentencepiece_merges import require_expressible
from llada.data.sentencepiece_tokenizer import SentencePieceTokenizer
from llada.data.tokenizer import Tokenizer
from llada.errors import UserError

KINDS = (SentencePieceTokenizer, HuggingFaceTokenizer)


def load(path: str | Path) -> Tokenizer:
    """A SentencePiece `.model`, a `tokenizer.json`, a directory that holds one, or a workdir's bundle.

    Raises UserError if it is missing, is none of these, or lacks a mask or an end-of-text token.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _from_directory(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read tokenizer {path}: {error.strerror}; check the path") from error
    if path.name == "tokenizer.json":
        return _from_directory(path.parent)
    return parse(content, str(path))


def require_exportable(tokenizer: Tokenizer, given: str) -> None:
    """UserError, naming `given`, if `llada export` could not write the tokenizer: asked before anything is trained."""
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return  # its files are handed on as they are
    try:
        require_expressible(tokenizer.proto)
    except UserError as error:
        raise UserError(
            f"{given}: {error}; llada export could not write it, so give its tokenizer.json, if it has one, or train "
            "another"
        ) from error


def parse(content: bytes, name: str) -> Tokenizer:
    """The tokenizer that `Tokenizer.content` stands for; `name` is what errors call it."""
    kind = HuggingFaceTokenizer if content.startswith(b"{") else SentencePieceTokenizer
    return kind(content, name)


def in_workdir(workdir: Path) -> Path | None:
    """The tokenizer's file in a workdir, or None where there is none yet."""
    return next((workdir / kind.file_name for kind in KINDS if (workdir / kind.file_name).exists()), None)


def _from_directory(path: Path) -> HuggingFaceTokenizer:
    files = huggingface_tokenizer.read_files(path)
    return HuggingFaceTokenizer(huggingface_tokenizer.bundle(files, str(path)), str(path))
