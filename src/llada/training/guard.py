"""Updates that are not made: of a batch whose loss or gradient is no number, and of one whose gradient is a spike.

The decision is part of the jitted step and follows from its state and batch alone: all devices, and every repetition,
decide alike. What is no number never enters the norms that later ones are compared with.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llada.config import Config

WINDOW = 128  # gradient norms that a spike is told by, as in OLMo-core; half of them are enough to begin


def start(config: Config) -> jax.Array | None:
    """Norms of the latest updates before there is any, infinity standing for each; None without a guard."""
    return None if config.optimizer.spike_factor is None else jnp.full(WINDOW, jnp.inf, jnp.float32)


def decide(
    config: Config, norms_W: jax.Array | None, loss: jax.Array, norm: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """`(whether the update is made, norms for the next step)`, from this step's loss and gradient norm before clipping.

    With `optimizer.spike_factor` a norm may be at most that times the median of those in `norms_W`, of made updates,
    oldest first.
    """
    made, factor = jnp.isfinite(loss) & jnp.isfinite(norm), config.optimizer.spike_factor
    if norms_W is None or factor is None:
        return made, None
    count = jnp.isfinite(norms_W).sum()
    median = jnp.sort(norms_W)[jnp.maximum(count - 1, 0) // 2]  # infinities come last
    made &= (count < WINDOW // 2) | (norm <= factor * median)
    return made, jnp.where(made, jnp.append(norms_W[1:], norm), norms_W)


def restored(config: Config, cursor: dict[str, Any]) -> np.ndarray | None:
    """The norms that a checkpoint's cursor holds, as in `start`: none yet where it was saved without a guard."""
    if config.optimizer.spike_factor is None:
        return None
    saved = np.asarray(cursor.get("guard", {}).get("norms", [])[-WINDOW:], np.float32)
    return np.concatenate([np.full(WINDOW - len(saved), np.inf, np.float32), saved])


class Skips:
    """The skipped updates of a run, counted on the host: with the norms they are `guard` in a checkpoint's cursor."""

    def __init__(self, config: Config, cursor: dict[str, Any]):
        saved = cursor.get("guard", {})
        self.config = config
        self.total: int = saved.get("skipped_steps", 0)
        self.in_a_row: int = saved.get("in_a_row", 0)
        self.rolled_back: list[list[int]] = saved.get("rolled_back", [])  # [step gone back to, step gone back from]

    def state(self, norms_W: jax.Array | None) -> dict[str, Any]:
        """For the cursor, ready for JSON, which holds float32 exactly."""
        norms = [] if norms_W is None else [norm for norm in np.asarray(norms_W).tolist() if norm < np.inf]
        counts = {"skipped_steps": self.total, "in_a_row": self.in_a_row}
        return counts | {"norms": norms, "rolled_back": list(self.rolled_back)}

    def count(self, skipped: bool) -> None:
        """One more step."""
        self.total += skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0

    @property
    def too_many(self) -> bool:
        """Whether as many as `train.most_skipped` came one after another."""
        return self.in_a_row >= self.config.train.most_skipped

    def reach(self, step: int) -> range | None:
        """Steps whose checkpoints a run may go back to from `step`, the last of those skipped in a row, or no number.

        Far enough before the first of them, and saved since the run last went back, so that it goes back once.
        """
        if (margin := self.config.train.roll_back) is None:
            return None
        least = self.rolled_back[-1][1] if self.rolled_back else 0
        return range(least, step - max(self.in_a_row, 1) - margin + 1)

    def went_back(self, saved: int, step: int, cursor: dict[str, Any]) -> None:
        """Count the updates since `saved` as skipped."""
        self.total = cursor.get("guard", {}).get("skipped_steps", 0) + step - saved
        self.in_a_row = 0
        self.rolled_back.append([saved, step])

    def reason(self, values: dict[str, float]) -> str:
        """Why a step with these metrics was skipped."""
        if np.isfinite([values["loss_nats_per_token"], values["grad_norm"]]).all():
            factor = self.config.optimizer.spike_factor
            return f"the gradient norm is more than spike_factor={factor:g} times the median of the latest ones"
        return "loss or gradient is not finite"
