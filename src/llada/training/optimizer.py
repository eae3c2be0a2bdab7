"""AdamW with clipping, and the learning rate as straight lines between breakpoints in tokens."""

import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llada.config import Config, OptimizerConfig
from llada.errors import UserError

_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
_NUMBER = r"\d+(?:\.\d+)?(?:e[+-]?\d+)?"
_POSITION = re.compile(rf"(?P<number>{_NUMBER})(?P<unit>%|[KMGBT]?)")
_MOST_TOKENS, _MOST_FACTOR = 1e18, 1e38  # float32 holds both


def parse_position(text: str, total_tokens: float) -> float | None:
    """Tokens of "2000000", "10.5G" or "2%" (of `total_tokens`); None where the text is none of these."""
    match = _POSITION.fullmatch(text)
    if not match:
        return None
    return float(match["number"]) * (total_tokens / 100 if match["unit"] == "%" else _UNITS[match["unit"]])


def parse_schedule(text: str, total_tokens: float) -> list[tuple[float, float]]:
    """Breakpoints `(tokens, factor)` from "position:factor ..."; positions in tokens (10.5G) or % of `total_tokens`.

    LLaDA's two plateaus (appendix B.2) are "0:0 10.49G:1 1.2T:1 1.2T:0.25 2T:0.25 2.3T:0.025": a position given twice
    is a jump. UserError names the bad point.
    """
    points: list[tuple[float, float]] = []
    for word in text.split():
        left, _, right = word.partition(":")
        position = parse_position(left, total_tokens)
        factor = float(right) if re.fullmatch(_NUMBER, right) else math.inf
        if position is None or position > _MOST_TOKENS or factor > _MOST_FACTOR:
            raise UserError(
                f"--config.optimizer.schedule has {word[:80]!r}; each point is POSITION:FACTOR, the position in tokens "
                f"(2000000, 10.5G) or percent (2%), at most {_MOST_TOKENS:g}, FACTOR at most {_MOST_FACTOR:g}"
            )
        if points and position < points[-1][0]:
            raise UserError(f"--config.optimizer.schedule goes back in time at {word!r}; positions must not decrease")
        points.append((position, factor))
    if not points:
        raise UserError("--config.optimizer.schedule is empty; try '0:0 2%:1 80%:1 100%:0.1'")
    return points


def learning_rate(config: Config) -> Callable[[jax.Array | int], jax.Array]:
    """`step -> learning rate` (float32, traceable), taken at the end of the step, so that warm-up never gives 0."""
    points = parse_schedule(config.optimizer.schedule, config.steps * config.tokens_per_step)
    # In steps, not tokens: float32 holds 440,000 exactly and rounds 2.3e12.
    steps = np.array([tokens / config.tokens_per_step for tokens, _ in points], np.float32)
    factors = np.array([factor for _, factor in points], np.float32)
    jumps = [i for i in range(1, len(points)) if points[i][0] == points[i - 1][0]]
    pieces = np.split(np.arange(len(points)), jumps)

    def rate(step):
        position = jnp.asarray(step, jnp.float32) + 1
        value = jnp.interp(position, steps[pieces[0]], factors[pieces[0]])
        for piece in pieces[1:]:
            later = jnp.interp(position, steps[piece], factors[piece])
            value = jnp.where(position > steps[piece[0]], later, value)
        return config.optimizer.peak_learning_rate * value

    return rate


def _clipped_mean(clip_norm: float) -> optax.GradientTransformationExtraArgs:
    """From gradients of sums over tokens to those of means, with a global norm of at most `clip_norm`.

    One factor, unlike a division and `optax.clip_by_global_norm` after it: on CPU each of these is a pass over memory.
    """

    def update(gradients, state, params=None, *, token_count, norm):
        factor = jnp.minimum(1.0, clip_norm / norm) / token_count
        return jax.tree.map(lambda g: g * factor, gradients), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def make(config: Config) -> optax.GradientTransformationExtraArgs:
    """Clip by global norm, then AdamW; norm scales are not decayed.

    Its `update` takes gradients of sums over tokens, and with them `token_count` and the `norm` of the mean's gradient.
    """
    o: OptimizerConfig = config.optimizer
    return optax.chain(
        _clipped_mean(o.clip_norm),
        optax.adamw(
            learning_rate(config),
            b1=o.beta1,
            b2=o.beta2,
            eps=o.adam_eps,
            weight_decay=o.weight_decay,
            mask=lambda params: jax.tree_util.tree_map_with_path(lambda path, _: "norm" not in path[-1].key, params),
        ),
    )
