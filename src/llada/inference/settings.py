"""How to run the reverse process: every choice, its default, and what cannot work."""

import numbers
import typing
from collections.abc import Mapping
from dataclasses import dataclass

from llada.errors import UserError

REMASKING = ("low_confidence", "top_probability", "random", "random_binomial")
RANKED = REMASKING[:2]  # by confidence
CACHES = ("none", "prefix", "dual")
EOS = ("keep", "no_logits", "no_confidence")

# Limits far beyond use: float32 holds everything computed from them, and a slip of the keyboard is refused at once.
LEAST_TEMPERATURE, MOST_TEMPERATURE = 1e-30, 1e30
MOST_GUIDANCE = 1e6
MOST_SPECULATION = 64

_KINDS = {str: (str, "text"), int: (numbers.Integral, "a whole number"), float: (numbers.Real, "a number")}


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How to run the reverse process.

    steps          over all blocks, a multiple of their number; each block gets as many
    block_length   open positions per block; blocks are filled left to right, later ones in view as masks. All of them
                   at once is pure diffusion, 1 is autoregressive order
    temperature    0 takes the most likely token, and so do numbers below 1e-30; else a draw from
                   softmax(logits / temperature)
    cfg_scale      w of classifier-free guidance without labels: LLaDA Eq. (16); 0 is off
    remasking      which predictions a step writes; the others stay masked:
                     low_confidence   an equal quota per step, the most probable ones (Algorithm 5)
                     top_probability  the same quota, where the most likely token is the most probable, whichever token
                                      is drawn there: the order follows from the canvas alone, so that texts have an
                                      exact likelihood (DUEL, arXiv 2603.01367); at temperature 0 it is low_confidence
                     random           the same quota, any of them (the published code's "random")
                     random_binomial  each with probability 1 - s/t (Algorithm 4 of the paper)
    eos            keep; no_logits: end tokens are never written; no_confidence: they are written last in their block
    speculate      canvases per pass: the present one and drafts of the next ones, made as if predictions stayed as they
                   are; steps to a draft that is confirmed cost no pass, and the text is the same (FreeDave, arXiv
                   2510.00294). 1 is off; it pays where a pass over few canvases costs little more than one
    Approximations of the above:
    cache          none; dual: during a block, keys and values of all other positions are those of the block's first
                   pass; prefix: those of the positions before it are (Fast-dLLM, arXiv 2505.22618)
    confidence_threshold  besides its quota a step writes every prediction at least this probable (Fast-dLLM)
    """

    steps: int
    block_length: int
    temperature: float = 0.0
    cfg_scale: float = 0.0
    remasking: str = "low_confidence"
    eos: str = "keep"
    speculate: int = 1
    cache: str = "none"
    confidence_threshold: float | None = None


def check(settings: SamplerConfig, open_count: int) -> None:
    """UserError unless `settings` can fill `open_count` positions."""
    for name, allowed in (("remasking", REMASKING), ("cache", CACHES), ("eos", EOS)):
        if getattr(settings, name) not in allowed:
            raise UserError(f"--{name}={getattr(settings, name)} is not one of {', '.join(allowed)}")
    check_temperature(settings.temperature)
    check_guidance(settings.cfg_scale)
    threshold = settings.confidence_threshold
    if threshold is not None and not 0 < threshold <= 1:
        raise UserError(f"--confidence_threshold={threshold} must be a probability above 0, at most 1")
    if settings.remasking not in RANKED and (threshold is not None or settings.eos == "no_confidence"):
        flag = "--eos=no_confidence" if threshold is None else f"--confidence_threshold={threshold}"
        raise UserError(f"{flag} ranks by confidence; --remasking={settings.remasking} does not: use low_confidence")
    if settings.eos == "no_confidence" and settings.remasking != "low_confidence":
        raise UserError(
            f"--eos=no_confidence ranks by the token that is drawn, --remasking={settings.remasking} by the canvas "
            "alone: use low_confidence"
        )
    if not 1 <= settings.speculate <= MOST_SPECULATION:
        raise UserError(f"--speculate={settings.speculate} must be between 1 (off) and {MOST_SPECULATION}")
    if settings.speculate > 1 and settings.cache != "none":
        raise UserError(f"--speculate={settings.speculate} and --cache={settings.cache} exclude each other")
    if not 1 <= settings.block_length <= open_count:
        raise UserError(f"--block_length={settings.block_length} must be between 1 and the {open_count} open positions")
    blocks = -(-open_count // settings.block_length)
    if settings.steps < blocks or settings.steps % blocks:
        raise UserError(
            f"--steps={settings.steps} must be a positive multiple of the {blocks} block(s) that "
            f"--block_length={settings.block_length} makes of {open_count} positions"
        )
    if settings.steps > blocks * settings.block_length:
        raise UserError(f"--steps={settings.steps} is more than the {open_count} positions to fill; lower it")


def check_temperature(temperature: float) -> None:
    """UserError unless it is 0 or a number that float32 can divide by."""
    if not 0 <= temperature <= MOST_TEMPERATURE:
        raise UserError(
            f"--temperature={temperature} must be 0 (greedy), 1 (the model's own distribution) or another number >= 0, "
            f"at most {MOST_TEMPERATURE:g}"
        )


def usable_temperature(temperature: float) -> float:
    """The temperature, or 0 for one that float32 cannot divide logits by: no draw could tell the two apart."""
    return 0.0 if temperature < LEAST_TEMPERATURE else temperature


def check_guidance(cfg_scale: float) -> None:
    """UserError unless it is a w of LLaDA Eq. (16) that float32 can multiply by."""
    if not 0 <= cfg_scale <= MOST_GUIDANCE:
        raise UserError(f"--cfg_scale={cfg_scale} must not be negative, and at most {MOST_GUIDANCE:g}; 0 is off")


def check_types(values: Mapping[str, object], annotations: Mapping[str, object]) -> None:
    """UserError for a value that is not of its annotation's type: text, a whole number, a number, None where allowed.

    Of a union the first type is checked.
    """
    for name, value in values.items():
        allowed = typing.get_args(annotations[name]) or (annotations[name],)
        base, word = _KINDS.get(allowed[0], (object, ""))
        if (value is None and type(None) in allowed) or (isinstance(value, base) and not isinstance(value, bool)):
            continue
        raise UserError(f"--{name}={value!r} must be {word}")
