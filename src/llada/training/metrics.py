"""What a run reports: names and units, the windowed record, the writers, the progress line.

`metrics.jsonl` has one line per `train.log_every` steps and one per evaluation; TensorBoard gets the same numbers.
"""

import json
import math
import sys
import time
from pathlib import Path

import jax
from rich.console import Console

from llada import accounting
from llada.config import Config

# name -> unit and meaning; writing a name that is not here is an error.
METRICS = {
    "train/loss_nats_per_token": "the objective: Eq. (3) for LLaDA, NLL for the ARM; mean over the window",
    "train/head_nats_per_row": "plain cross-entropy of the rows that met the vocabulary head (masked tokens)",
    "train/head_fraction": "those rows as a share of the tokens",
    "train/grad_norm": "global gradient norm before clipping",
    "train/parameter_norm": "global norm of the parameters after the step",
    "train/learning_rate": "of the window's last step",
    "train/tokens": "tokens read since step 0",
    "train/flops_6nd": "FLOPs since step 0, 6 N D with N non-embedding",
    "train/flops_exact": "FLOPs since step 0, all matrix products",
    "speed/tokens_per_second": "while training, compilation, evaluation and saving left out",
    "speed/mfu_percent": "exact FLOPs over the devices' bf16 peak; absent where the peak is not known",
    "time/seconds": "wall time since step 0, all calls of the run together",
    "eval/nats_per_token": "held-out bound (LLaDA) or NLL (ARM)",
    "eval/stderr": "its standard error over rows",
    "eval/monte_carlo_stderr": "its standard error over draws, the rows given; 0 where it is exact",
    "eval/bits_per_byte": "the same per UTF-8 byte of the evaluated text",
}

# What an evaluation writes under eval/, by its name in `evaluation.validation.Validation`.
EVALUATED = tuple(name.removeprefix("eval/") for name in METRICS if name.startswith("eval/"))


class Meter:
    """Accumulates steps into windows and keeps the clock; its state travels in the checkpoint's cursor."""

    def __init__(self, config: Config, saved: dict | None = None):
        saved = saved or {}
        self.config = config
        self.sums: dict[str, float] = dict(saved.get("sums", {}))
        self.steps_in_window: int = saved.get("steps_in_window", 0)
        self.seconds: float = saved.get("seconds", 0.0)
        self.timed_seconds: float = saved.get("timed_seconds", 0.0)
        self.timed_tokens: int = saved.get("timed_tokens", 0)
        self._last_wall = time.perf_counter()
        self._clock: float | None = None
        self._window_clock = (self.timed_seconds, self.timed_tokens)

    def state(self) -> dict:
        """JSON-ready, and apart from what goes on: a checkpoint writes it down while further steps are added."""
        self._count_wall()
        names = ("steps_in_window", "seconds", "timed_seconds", "timed_tokens")
        return {"sums": dict(self.sums)} | {name: getattr(self, name) for name in names}

    def pause(self) -> None:
        """Leave what follows (evaluation, saving, compilation) out of the speed."""
        self._clock = None

    def add(self, metrics: dict[str, float]) -> None:
        """Count one finished step."""
        now = time.perf_counter()
        if self._clock is not None:
            self.timed_seconds += now - self._clock
            self.timed_tokens += self.config.tokens_per_step
        self._clock = now
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.steps_in_window += 1

    def window(self, step: int, last: dict[str, float]) -> dict[str, float]:
        """Close the window that ends with `step` steps done: means, totals, speed."""
        self._count_wall()
        mean = {name: total / self.steps_in_window for name, total in self.sums.items()}
        values = {f"train/{name}": mean[name] for name in last if name != "token_count"}
        values["train/learning_rate"] = last["learning_rate"]
        values |= run_totals(self.config, step)
        seconds, tokens = self.timed_seconds - self._window_clock[0], self.timed_tokens - self._window_clock[1]
        if seconds > 0:
            values["speed/tokens_per_second"] = tokens / seconds
            peak = accounting.PEAK_FLOPS.get(jax.devices()[0].device_kind)
            if peak:
                rate = tokens / seconds * accounting.flops_exact_per_token(self.config)
                values["speed/mfu_percent"] = 100 * rate / (peak * jax.device_count())
        values["time/seconds"] = self.seconds
        self.sums, self.steps_in_window = {}, 0
        self._window_clock = (self.timed_seconds, self.timed_tokens)
        return values

    @property
    def tokens_per_second(self) -> float | None:
        """Over the whole run so far; None before the second step."""
        return self.timed_tokens / self.timed_seconds if self.timed_seconds else None

    def _count_wall(self) -> None:
        now = time.perf_counter()
        self.seconds += now - self._last_wall
        self._last_wall = now


def run_totals(config: Config, step: int) -> dict[str, float]:
    """Tokens and FLOPs after `step` steps."""
    tokens = step * config.tokens_per_step
    return {
        "train/tokens": tokens,
        "train/flops_6nd": tokens * accounting.flops_6nd_per_token(config.model),
        "train/flops_exact": tokens * accounting.flops_exact_per_token(config),
    }


def _summary_writer() -> type:
    """tensorboardX's writer, which imports torch where it finds it, for things that scalars do not need: seconds."""
    hidden = sys.modules.setdefault("torch", None) is None
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hidden:
            del sys.modules["torch"]
    return SummaryWriter


class Writer:
    """Appends to `metrics.jsonl` and TensorBoard; lines of steps that a resumed run will repeat are cut first."""

    def __init__(self, workdir: Path, from_step: int):
        self.path = workdir / "metrics.jsonl"
        kept = [line for line in read(self.path) if line["step"] <= from_step]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        partial.replace(self.path)
        self.board = _summary_writer()(str(workdir), purge_step=from_step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line, keys as in METRICS; flushed at once."""
        unknown = values.keys() - METRICS.keys()
        if unknown:
            raise KeyError(f"metrics without a name in METRICS: {sorted(unknown)}")
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step} | values) + "\n")
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush TensorBoard."""
        self.board.close()


def read(path: Path) -> list[dict]:
    """The lines of a `metrics.jsonl`; a last line cut short by a kill is dropped."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


class Progress:
    """One line per window on the terminal (coloured there, plain in a file)."""

    def __init__(self, config: Config, quiet: bool = False):
        self.config = config
        self.console = Console(highlight=False, soft_wrap=True, stderr=True, quiet=quiet)

    def say(self, text: str) -> None:
        """A remark between progress lines."""
        self.console.print(text, markup=False, style="cyan")

    def train(self, step: int, values: dict[str, float]) -> None:
        """step, loss, speed, MFU where known, time left."""
        parts = [
            f"step {step:>{len(str(self.config.steps))}}/{self.config.steps}",
            f"loss {values['train/loss_nats_per_token']:.4f} nats/token",
            f"lr {values['train/learning_rate']:.2e}",
            f"|g| {values['train/grad_norm']:.2f}",
        ]
        rate = values.get("speed/tokens_per_second")
        if rate:
            left = (self.config.steps - step) * self.config.tokens_per_step / rate
            parts.append(f"{rate:,.0f} tokens/s")
            if "speed/mfu_percent" in values:
                parts.append(f"MFU {values['speed/mfu_percent']:.1f} %")
            parts.append(f"{clock(left)} left")
        self.console.print("  ".join(parts), markup=False)

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """The held-out figure, with its error."""
        kind = "NLL" if self.config.objective.name == "autoregressive" else "bound"
        self.console.print(
            f"step {step}: held-out {kind} {values['eval/nats_per_token']:.4f} ± {values['eval/stderr']:.4f} nats/token"
            f"  {values['eval/bits_per_byte']:.4f} bits/byte",
            markup=False,
            style="bold green",
        )


def clock(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
