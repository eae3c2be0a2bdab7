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
_POSITION = re.compile(rf"(?P<number>{_NUMBER})(?P<unit>%|it|[KMGBT]?)")
_MOST_TOKENS, _MOST_FACTOR = 1e18, 1e38  # float32 holds both


def parse_position(text: str, config: Config) -> float | None:
    """Tokens of "2000000", "10.5G", "50it" (iterations) or "2%" (of the run); None where the text is none of these."""
    match = _POSITION.fullmatch(text)
    if not match:
        return None
    step = config.tokens_per_step
    units = _UNITS | {"it": step, "%": config.steps * step / 100}
    return float(match["number"]) * units[match["unit"]]


def parse_schedule(config: Config) -> list[tuple[float, float]]:
    """Breakpoints `(tokens, factor)` of `optimizer.schedule`, "position:factor ...": positions as in `parse_position`.

    LLaDA's two plateaus (appendix B.2) are "0:0 10.49G:1 1.2T:1 1.2T:0.25 2T:0.25 2.3T:0.025": a position given twice
    is a jump. UserError names the bad point.
    """
    points: list[tuple[float, float]] = []
    for word in config.optimizer.schedule.split():
        left, _, right = word.partition(":")
        position = parse_position(left, config)
        factor = float(right) if re.fullmatch(_NUMBER, right) else math.inf
        if position is None or position > _MOST_TOKENS or factor > _MOST_FACTOR:
            raise UserError(
                f"--config.optimizer.schedule has {word[:80]!r}; each point is POSITION:FACTOR, the position in tokens "
                f"(2000000, 10.5G), iterations (50it) or percent (2%), at most {_MOST_TOKENS:g} tokens, FACTOR at most "
                f"{_MOST_FACTOR:g}"
            )
        if points and position < points[-1][0]:
            raise UserError(f"--config.optimizer.schedule goes back in time at {word!r}; positions must not decrease")
        points.append((position, factor))
    if not points:
        raise UserError("--config.optimizer.schedule is empty; try '0:0 2%:1 80%:1 100%:0.1'")
    return points


def evaluation_steps(config: Config) -> frozenset[int]:
    """Steps that `evaluate.at` names, the nearest to each position. UserError where one is no position of the run."""
    steps = set()
    for word in config.evaluate.at.split():
        tokens = parse_position(word, config)
        # Neither NaN nor infinity has a nearest step.
        step = None if tokens is None or tokens > 1e18 else round(tokens / config.tokens_per_step)
        if step is None or not 0 < step <= config.steps:
            raise UserError(
                f"--config.evaluate.at has {word[:80]!r}; a position is in tokens (2000000, 10.5G), iterations (50it) "
                f"or percent (2%), from one step ({config.tokens_per_step} tokens) to the end of the run"
            )
        steps.add(step)
    return frozenset(steps)


def learning_rate(config: Config) -> Callable[[jax.Array | int], jax.Array]:
    """`step -> learning rate` (float32, traceable), taken at the end of the step, so that warm-up never gives 0."""
    points = parse_schedule(config)
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


def clip_factor(clip_norm: float, norm: jax.Array, token_count: jax.Array) -> jax.Array:
    """From gradients of sums over tokens to those of means, with a global norm of at most `clip_norm`.

    `norm` is that of the mean's gradient. One factor, unlike a division and `optax.clip_by_global_norm` after it: on
    CPU each of these is a pass over memory.
    """
    return jnp.minimum(1.0, clip_norm / norm) / token_count


def _times_factor() -> optax.GradientTransformationExtraArgs:
    def update(gradients, state, params=None, *, factor):
        return jax.tree.map(lambda g: g * factor, gradients), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def make(config: Config) -> optax.GradientTransformationExtraArgs:
    """Clip by global norm, then AdamW; norm scales are not decayed.

    Its `update` takes gradients of sums over tokens, and with them `factor`, their `clip_factor`.
    """
    o: OptimizerConfig = config.optimizer
    return optax.chain(
        _times_factor(),
        optax.adamw(
            learning_rate(config),
            b1=o.beta1,
            b2=o.beta2,
            eps=o.adam_eps,
            weight_decay=o.weight_decay,
            mask=lambda params: jax.tree_util.tree_map_with_path(lambda path, _: "norm" not in path[-1].key, params),
        ),
    )


def pass_over(optimizer_state: optax.OptState) -> optax.OptState:
    """The state after a step without an update: the same, but for the schedule, which follows the step number."""
    return _with_count(optimizer_state, optax.safe_increment)


def at_step(optimizer_state: optax.OptState, step: int) -> optax.OptState:
    """The state with the schedule at another step."""
    return _with_count(optimizer_state, lambda count: jax.device_put(np.int32(step), count.sharding))


def _with_count(optimizer_state: optax.OptState, change: Callable[[jax.Array], jax.Array]) -> optax.OptState:
    def changed(node):
        is_schedule = isinstance(node, optax.ScaleByScheduleState)
        return optax.ScaleByScheduleState(change(node.count)) if is_schedule else node

    return jax.tree.map(changed, optimizer_state, is_leaf=lambda node: isinstance(node, optax.ScaleByScheduleState))
