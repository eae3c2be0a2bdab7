"""Reporting on a training run: the protocol, and its lines on the terminal."""

import contextlib
import math
from typing import Protocol

from rich.console import Console

from llada.config import Config
from llada.data.waiting import clock
from llada.objectives import families
from llada.training.metrics import training_loss


class Progress(Protocol):
    """What `loop.train` reports to; values have the names of `metrics.METRICS`."""

    def log(self, text: str) -> None:
        """A remark between windows: what is compiled, restored, evaluated."""

    def window(self, step: int, values: dict[str, float]) -> None:
        """Means, totals and speed of the window of steps that ends with `step`."""

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """Held-out figures of the parameters after `step`."""


class TerminalProgress:
    """A line a window on standard error, coloured on a terminal, plain in a file; none at all where `quiet`."""

    def __init__(self, config: Config, quiet: bool = False):
        self.config = config
        self.console = Console(highlight=False, soft_wrap=True, stderr=True, quiet=quiet)

    def log(self, text: str) -> None:
        """The remark as a line."""
        self._print(text, style="cyan")

    def window(self, step: int, values: dict[str, float]) -> None:
        """Step, loss, rate, gradient norm; speed, MFU and time left where they are known."""
        words = [
            f"step {step:>{len(str(self.config.steps))}}/{self.config.steps}",
            f"lr {values['train/learning_rate']:.2e}",
        ]
        if (loss := training_loss(values)) is not None:  # a step of the window was not skipped
            words.insert(1, f"loss {loss:.4f} nats/token")
            words.append(f"|g| {values['train/grad_norm']:.2f}")
        if skipped := values.get("train/skipped_steps"):
            words.append(f"{skipped:.0f} skipped")
        if rate := values.get("speed/tokens_per_second"):
            words.append(f"{rate:,.0f} tokens/s")
            if "speed/mfu_percent" in values:
                words.append(f"MFU {values['speed/mfu_percent']:.1f} %")
            words.append(f"{clock((self.config.steps - step) * self.config.tokens_per_step / rate)} left")
        self._print("  ".join(words))

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """The held-out figure with its standard error."""
        measure, stderr = families.of(self.config).measure, values["eval/stderr"]
        figure = f"{values['eval/nats_per_token']:.4f}" + (f" ± {stderr:.4f}" if math.isfinite(stderr) else "")
        bits = f"{values['eval/bits_per_byte']:.4f} bits/byte"
        self._print(f"step {step}: held-out {measure} {figure} nats/token  {bits}", style="bold green")

    def _print(self, text: str, style: str | None = None) -> None:
        # The terminal may have gone, or the pipe: the run has not.
        with contextlib.suppress(OSError, ValueError):
            self.console.print(text, markup=False, style=style)
