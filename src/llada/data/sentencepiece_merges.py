"""What a SentencePiece model does to text, as the tokenizers library could do it: its merges in order of rank.

A model that the other library cannot express could be trained with and never be exported, so it is looked at before
training begins as well.
"""

import itertools
import re
from typing import Any, NamedTuple

from llada.data.tokenizer import SPACE_MARK
from llada.errors import UserError

# Numbers of sentencepiece_model.proto.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
BPE = 2
_OTHER_MODEL_TYPES = {1: "unigram", 3: "word", 4: "char"}

_LONGEST_RUN = 64


class Merge(NamedTuple):
    """The step of byte-pair encoding that makes a piece."""

    score: float
    piece: str
    left: str
    right: str


def require_expressible(proto: Any) -> list[Merge]:
    """The merges of a byte-pair ModelProto, best first. UserError unless an export can make transformers encode as it.

    Takes some seconds for a vocabulary of 100,000.
    """
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    problem = None
    if trainer.model_type != BPE:
        name = _OTHER_MODEL_TYPES.get(trainer.model_type, trainer.model_type)
        problem = f"is of type {name}; only bpe models can be exported"
    elif normalizer.precompiled_charsmap:
        problem = "changes characters of a text (normalization_rule_name); only identity can be exported"
    elif trainer.treat_whitespace_as_suffix:
        problem = "was trained with --treat_whitespace_as_suffix, which transformers cannot express"
    elif not normalizer.escape_whitespaces:
        problem = "was trained with --escape_whitespaces=false, which transformers cannot express"
    elif proto.denormalizer_spec.precompiled_charsmap:
        problem = "has denormalisation rules, which transformers cannot express"
    elif not any(piece.type == UNKNOWN for piece in proto.pieces):
        problem = "has no unknown piece; transformers cannot load it"
    else:
        for piece in proto.pieces:
            if piece.type == UNUSED:
                problem = f"has the unused piece {piece.piece!r}, which transformers cannot express"
            elif " " in piece.piece and piece.type in (NORMAL, USER_DEFINED):
                problem = f"has the piece {piece.piece!r} with a plain space, which transformers cannot express"
        if len(set(map(spelled, proto.pieces))) != len(proto.pieces):
            problem = "has two pieces that differ only in how they spell a space, which transformers cannot express"
    if problem:
        raise UserError(f"the SentencePiece model {problem}")
    return _merges(proto)


def spelled(piece: Any) -> str:
    """A piece with spaces for the marks that SentencePiece writes them as."""
    return piece.piece.replace(SPACE_MARK, " ") if piece.type in (NORMAL, USER_DEFINED) else piece.piece


def user_defined(proto: Any) -> list[str]:
    """Symbols that are never cut, longest first: the order in which a text is searched for them."""
    symbols = [spelled(piece) for piece in proto.pieces if piece.type == USER_DEFINED]
    return sorted(symbols, key=len, reverse=True)


def _merges(proto: Any) -> list[Merge]:
    """The one pair of pieces that each piece is ever merged from, best score first.

    SentencePiece merges the neighbours whose joint piece has the best score, leftmost among equals; the tokenizers
    library ranks pairs instead, so two pairs that make one piece would have to share a rank. They never meet: until a
    piece is made no merge has crossed its ends, so all merges within it were those of encoding the piece alone, and
    the last of them is the same everywhere. Pieces that encode to something else are never made at all.
    """
    scores = {spelled(piece): piece.score for piece in proto.pieces if piece.type == NORMAL}
    vocabulary = {spelled(piece) for piece in proto.pieces}
    symbols = user_defined(proto)
    start = re.compile("|".join([*map(re.escape, symbols), "."]), re.DOTALL)
    merges = []
    for piece, score in scores.items():
        halves = _last_merge(start.findall(piece), scores, set(symbols))
        if halves is None:
            continue
        for half in halves:
            if half not in vocabulary:
                raise UserError(
                    f"the SentencePiece model has the piece {piece!r} but not its part {half!r}, "
                    "which transformers cannot express"
                )
        merges.append(Merge(score, piece, *halves))
    # Of runs of one character, the only equals that are not refused, a longer one begun goes before a new one.
    merges.sort(key=lambda merge: (-merge.score, -len(merge.piece)))
    _refuse_ties(merges)
    return merges


def _last_merge(pieces: list[str], scores: dict[str, float], frozen: set[str]) -> tuple[str, str] | None:
    """The last merge on the way from `pieces` to a single piece, or None where merging ends before."""
    last = None
    while len(pieces) > 1:
        best_score, best = None, 0
        for i, (left, right) in enumerate(itertools.pairwise(pieces)):
            score = scores.get(left + right)
            if score is None or left in frozen or right in frozen:
                continue
            if best_score is None or score > best_score:
                best_score, best = score, i
        if best_score is None:
            return None
        last = pieces[best], pieces[best + 1]
        pieces[best : best + 2] = ["".join(last)]
    return last


def _refuse_ties(merges: list[Merge]) -> None:
    """Pieces of equal score: SentencePiece takes the leftmost, a rank cannot; refused where the order could matter.

    It matters where two such merges want the same part, or where one makes room for a merge that is no worse. Runs of
    one character, as Llama has them of spaces, want the same parts; there ranks by length do what the leftmost does.
    """
    tied: dict[str, float] = {}
    runs: set[str] = set()
    for score, group in itertools.groupby(merges, key=lambda merge: merge.score):
        equals = list(group)
        if len(equals) == 1:
            continue
        runs |= _runs_in_order(equals, merges)
        by_left: dict[str, list[Merge]] = {}
        for merge in equals:
            tied[merge.piece] = score
            by_left.setdefault(merge.left, []).append(merge)
        for merge in equals:
            for other in by_left.get(merge.right, []):
                if other.piece != merge.piece and not {merge.piece, other.piece} <= runs:
                    raise UserError(
                        f"the SentencePiece model gives the pieces {merge.piece!r} and {other.piece!r} the same score, "
                        "so that their order depends on the text; transformers cannot express that"
                    )
    for merge in merges:
        for part in (merge.left, merge.right):
            if merge.score >= tied.get(part, float("inf")) and merge.piece not in runs:
                raise UserError(
                    f"the SentencePiece model scores the piece {merge.piece!r} no lower than its part {part!r}, whose "
                    "score other pieces share; transformers cannot express that"
                )


def _runs_in_order(equals: list[Merge], merges: list[Merge]) -> set[str]:
    """Those of equally scored pieces that are runs of one character and come out alike by rank and by position.

    All lengths are tried at which they could differ: beyond the longest piece merging repeats itself.
    """
    good: set[str] = set()
    for character in {merge.piece[0] for merge in equals if len(set(merge.piece)) == 1}:
        family = [merge for merge in merges if set(merge.piece) == {character}]
        ranks = {(len(merge.left), len(merge.right)): rank for rank, merge in enumerate(family)}
        lengths = {len(merge.piece) for merge in family}
        if len({merge.score for merge in family}) > 1 or max(lengths) > _LONGEST_RUN:
            continue
        leftmost = {(a, b): 0 for a in range(1, max(lengths)) for b in range(1, max(lengths)) if a + b in lengths}
        if all(_merged(n, ranks) == _merged(n, leftmost) for n in range(2, 3 * max(lengths))):
            good |= {merge.piece for merge in family}
    return good


def _merged(length: int, ranks: dict[tuple[int, int], int]) -> list[int]:
    """Lengths of what a run is merged into: the neighbours of least rank first, leftmost among equals."""
    lengths = [1] * length
    while mergeable := [(ranks[pair], i) for i, pair in enumerate(itertools.pairwise(lengths)) if pair in ranks]:
        _, i = min(mergeable)
        lengths[i : i + 2] = [lengths[i] + lengths[i + 1]]
    return lengths
