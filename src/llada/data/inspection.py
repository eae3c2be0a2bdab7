"""What a run reads, for people: rows decoded, lengths, bytes per token, how much of it is there twice."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from llada.config import DataConfig
from llada.data.checksums import CheckedRows
from llada.data.holdout import is_holdout, text_hash
from llada.data.record_files import RecordRows
from llada.data.rows import Batches, Corpus
from llada.data.sources import documents
from llada.data.tokenizer import Tokenizer

_CHARACTERS = 400  # of a text that is shown
_BLOCK_ROWS = 1_024


def of_rows(corpus: Corpus, tokenizer: Tokenizer, count: int) -> dict[str, Any]:
    """Figures of both sides of a corpus, and the first `count` training rows. DataError for damaged ones."""
    metadata = corpus.metadata
    sides = {}
    for name, side_NL in zip(("train", "holdout"), corpus.checked(tokenizer.vocab_size), strict=True):
        figures = {key: getattr(metadata, f"{name}_{key}") for key in ("documents", "tokens", "bytes", "rows")}
        figures["bytes_per_token"] = figures["bytes"] / figures["tokens"]
        figures["tokens_per_document"] = figures["tokens"] / max(figures["documents"], 1)
        sums_N = corpus.checksums[name == "holdout"] if corpus.checksums else None
        figures["duplicate_row_share"] = None if sums_N is None else duplicates(side_NL, sums_N) / len(side_NL)
        sides[name] = figures
    return {
        "source": metadata.source,
        "sequence_length": metadata.sequence_length,
        "vocab_size": metadata.vocab_size,
        "tokenizer_sha256": metadata.tokenizer_sha256,
        "unigram_entropy_nats": metadata.unigram_entropy_nats,
        "digest": metadata.digest,
        **sides,
        "rows": decoded(corpus.checked(tokenizer.vocab_size)[0], range(min(count, metadata.train_rows)), tokenizer),
    }


def of_step(batches: Batches, step: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """The rows of a batch, in its order, as training reads them. DataError for damaged ones."""
    ids = batches.row_ids(step).tolist()
    return {"step": step, "epochs": batches.epochs(step), "rows": decoded(batches.rows_NL, ids, tokenizer)}


def decoded(rows_NL: Any, ids: Sequence[int], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Rows as text, each with its number, how many documents end in it and, of records, the file and the record."""
    found = []
    for row in ids:
        ids_L = rows_NL[np.array([row])][0].tolist()
        where = {}
        stored = rows_NL.rows_NL if isinstance(rows_NL, CheckedRows) else rows_NL
        if isinstance(stored, RecordRows):
            path, record = stored.where(row)
            where = {"file": path.name, "record": record}
        ends = sum(token == tokenizer.eos_id for token in ids_L)
        found.append({"row": row, **where, "documents_ended": ends, "text": _brief(tokenizer.decode(ids_L))})
    return found


def of_documents(data: DataConfig, tokenizer: Tokenizer | None, count: int) -> dict[str, Any]:
    """Figures of a source's documents, all of which are read, and the first `count`. UserError as `documents`."""
    sizes: list[int] = []
    tokens: list[int] = []
    seen: set[int] = set()
    totals: Counter[str] = Counter()
    first: list[str] = []
    for text in documents(data.source, data.text_key, flag="--source"):
        size, key = len(text.encode()), text_hash(text)
        sizes.append(size)
        totals["duplicates"] += key in seen
        totals["duplicate_bytes"] += size if key in seen else 0
        totals["holdout"] += is_holdout(text, data.holdout_fraction)
        seen.add(key)
        if tokenizer is not None:
            tokens.append(len(tokenizer.encode(text)) + 1)
        if len(first) < count:
            first.append(_brief(text))
    figures: dict[str, Any] = {
        "source": data.source,
        "documents": len(sizes),
        "bytes": sum(sizes),
        "document_bytes": _quantiles(sizes),
        "duplicate_document_share": totals["duplicates"] / len(sizes),
        "duplicate_byte_share": totals["duplicate_bytes"] / sum(sizes),
        "holdout_document_share": totals["holdout"] / len(sizes),
    }
    if tokenizer is not None:
        figures |= {"tokens": sum(tokens), "bytes_per_token": sum(sizes) / sum(tokens)}
        figures["document_tokens"] = _quantiles(tokens)
    return figures | {"texts": first}


def _quantiles(sizes: list[int]) -> dict[str, float]:
    names = {"min": 0.0, "median": 0.5, "p90": 0.9, "max": 1.0}
    return {name: float(np.quantile(sizes, at)) for name, at in names.items()}


def duplicates(rows_NL: CheckedRows, sums_N: np.ndarray) -> int:
    """How many rows are the same as an earlier one: those of equal checksums are read and compared."""
    sums, inverse_N, counts = np.unique(sums_N, return_inverse=True, return_counts=True)
    order_N = np.argsort(inverse_N, kind="stable")
    ends = np.cumsum(counts)
    repeated = 0
    for group in np.flatnonzero(counts > 1).tolist():
        seen: set[bytes] = set()
        for row in _blocks(order_N[ends[group] - counts[group] : ends[group]]):
            for content_L in rows_NL[row]:
                repeated += content_L.tobytes() in seen
                seen.add(content_L.tobytes())
    return repeated


def _blocks(ids: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(ids), _BLOCK_ROWS):
        yield ids[start : start + _BLOCK_ROWS]


def _brief(text: str) -> str:
    return text[:_CHARACTERS] + ("..." if text[_CHARACTERS:] else "")
