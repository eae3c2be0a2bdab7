"""What a run records: names and units, means over windows, the files they are written to.

`metrics.jsonl` has one line per `train.log_every` steps and one per evaluation; TensorBoard gets the same numbers.
"""

import contextlib
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax

from llada import accounting, json_files
from llada.config import Config
from llada.errors import UserError, disk_error
from llada.files import write_atomically
from llada.objectives import families
from llada.objectives.contract import TIME_BINS

# Of a fine-tuning loss by t: one name for each bin, with the bin's middle.
BY_TIME = tuple(f"answer_nats_at_t{(i + 0.5) / TIME_BINS:.2f}" for i in range(TIME_BINS))
_LOSSES = ("train/loss_nats_per_token", "train/loss_not_a_bound")
PARTS = ("sum", "count")  # a step's `NAME:sum` and `NAME:count` become NAME, their ratio over a window

# name -> unit and meaning; writing a name that is not here is an error.
METRICS = {
    "train/loss_nats_per_token": "the objective, Eq. (3) or (5), or NLL for the ARM: mean over the window's steps",
    "train/loss_not_a_bound": "in its place, where the config's objective estimates neither the bound nor the NLL",
    "train/head_nats_per_row": "plain cross-entropy of the rows that met the vocabulary head (masked tokens)",
    "train/head_fraction": "those rows as a share of the tokens",
    "train/grad_norm": "global gradient norm before clipping",
    "train/clipped_share": "share of the window's steps whose gradient was clipped",
    "train/parameter_norm": "global norm of the parameters after the step",
    "train/learning_rate": "of the window's last step",
    "train/skipped_steps": "steps of the window whose update was skipped: in no mean, though their tokens are read",
    "train/tokens": "tokens trained on since step 0",
    "train/flops_6nd": "FLOPs since step 0, 6 N D with N non-embedding",
    "train/flops_exact": "FLOPs since step 0, all matrix products; of fine-tuning as if all tokens were answers",
    "train/padding_share": "fine-tuning: the share of the loss that padding behind the answers is",
    **{f"train/{name}": "fine-tuning: nats per masked token of answers whose t is near this" for name in BY_TIME},
    "speed/tokens_per_second": "while training: no compilation, evaluation, saving; absent before 3 timed steps",
    "speed/mfu_percent": "exact FLOPs over the devices' bf16 peak; absent where that or the speed is not known",
    "time/seconds": "wall time since step 0, all calls of the run together",
    "eval/nats_per_token": "held-out bound (LLaDA) or NLL (ARM)",
    "eval/stderr": "its standard error over rows",
    "eval/monte_carlo_stderr": "its standard error over draws, for these rows; 0 where it is exact",
    "eval/bits_per_byte": "the same per UTF-8 byte of the evaluated text",
}

# What an evaluation writes under eval/, by its name in `evaluation.validation.Validation`.
EVALUATED = tuple(name.removeprefix("eval/") for name in METRICS if name.startswith("eval/"))


_FEWEST_TIMED = 3  # steps that a speed is measured over; none from fewer


class Meter:
    """Accumulates steps into windows and keeps the clock; its state travels in the checkpoint's cursor."""

    def __init__(self, config: Config, saved: dict | None = None):
        saved = saved or {}
        self.config = config
        self.sums: dict[str, float] = dict(saved.get("sums", {}))
        self.steps_in_window: int = saved.get("steps_in_window", 0)  # without those that were skipped
        self.skipped_in_window: int = saved.get("skipped_in_window", 0)
        self.seconds: float = saved.get("seconds", 0.0)
        self.timed_seconds: float = saved.get("timed_seconds", 0.0)
        self.timed_tokens: int = saved.get("timed_tokens", 0)
        self._last_wall = time.perf_counter()
        self._clock: float | None = None
        self._latest: deque[float] = deque(maxlen=max(config.train.log_every, _FEWEST_TIMED))

    def state(self) -> dict:
        """A JSON-ready copy: a checkpoint writes it in the background while further steps are added."""
        self.count_wall()
        names = ("steps_in_window", "skipped_in_window", "seconds", "timed_seconds", "timed_tokens")
        return {"sums": dict(self.sums)} | {name: getattr(self, name) for name in names}

    def pause(self) -> None:
        """Leave what follows (evaluation, saving, compilation) out of the speed.

        Also called before the last step ahead of a pause is fetched: that one may have been ready as long as the step
        before it, and the time between the two fetches is then not the time of a step.
        """
        self._clock = None

    def add(self, metrics: dict[str, float]) -> None:
        """Count one finished step."""
        self._tick()
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.steps_in_window += 1

    def skip(self) -> None:
        """Count one whose update was skipped: its time alone."""
        self._tick()
        self.skipped_in_window += 1

    def _tick(self) -> None:
        now = time.perf_counter()
        if self._clock is not None:
            self._latest.append(now - self._clock)
            self.timed_seconds += now - self._clock
            self.timed_tokens += self.config.tokens_per_step
        self._clock = now

    def window(self, step: int, last: dict[str, float]) -> dict[str, float]:
        """Close the window that ends with `step` steps done: means, totals, and the speed of the latest timed steps.

        A window of skipped steps has no means.
        """
        self.count_wall()
        mean = {name: total / self.steps_in_window for name, total in self.sums.items()}
        values = {f"train/{name}": mean[name] for name in mean if name != "token_count" and ":" not in name}
        for name in dict.fromkeys(name.partition(":")[0] for name in mean if ":" in name):
            total, count = (mean[f"{name}:{part}"] for part in PARTS)
            values |= {f"train/{name}": total / count} if count else {}
        if values and not families.of(self.config).bound_trained(self.config.objective):
            values[_LOSSES[1]] = values.pop(_LOSSES[0])
        values["train/learning_rate"] = last["learning_rate"]
        values["train/skipped_steps"] = self.skipped_in_window
        values |= run_totals(self.config, step)
        if len(self._latest) >= _FEWEST_TIMED and sum(self._latest) > 0:
            rate = len(self._latest) * self.config.tokens_per_step / sum(self._latest)
            values["speed/tokens_per_second"] = rate
            peak = accounting.PEAK_FLOPS.get(jax.devices()[0].device_kind)
            if peak:
                flops = rate * accounting.flops_exact_per_token(self.config)
                values["speed/mfu_percent"] = 100 * flops / (peak * jax.device_count())
        values["time/seconds"] = self.seconds
        self.sums, self.steps_in_window = {}, 0
        self.skipped_in_window = 0
        return values

    @property
    def tokens_per_second(self) -> float | None:
        """Over the whole run so far; None before enough steps are timed."""
        enough = self.timed_tokens >= _FEWEST_TIMED * self.config.tokens_per_step and self.timed_seconds > 0
        return self.timed_tokens / self.timed_seconds if enough else None

    def count_wall(self) -> None:
        """Bring `seconds` up to now."""
        now = time.perf_counter()
        self.seconds += now - self._last_wall
        self._last_wall = now


def training_loss(values: Mapping[str, float]) -> float | None:
    """Of a line of `metrics.jsonl`, whether it is the bound or not; None where the line has none."""
    return next((values[name] for name in _LOSSES if name in values), None)


def run_totals(config: Config, step: int) -> dict[str, float]:
    """Tokens and FLOPs after `step` steps."""
    tokens = step * config.tokens_per_step
    return {
        "train/tokens": tokens,
        "train/flops_6nd": tokens * accounting.flops_6nd_per_token(config.model),
        "train/flops_exact": tokens * accounting.flops_exact_per_token(config),
    }


class _Board:
    """TensorBoard's event file, written and flushed line by line.

    tensorboardX's own writer has a thread and a queue: where the disk is full it prints a traceback and then hangs.
    """

    def __init__(self, workdir: Path, from_step: int):
        # It imports torch where it finds it, for things that scalars do not need: seconds.
        hidden = sys.modules.setdefault("torch", None) is None  # type: ignore[arg-type]  # None hides a module
        try:
            from tensorboardX import event_file_writer, summary
            from tensorboardX.proto import event_pb2
        finally:
            if hidden:
                del sys.modules["torch"]
        self._scalar, self._event = summary.scalar, event_pb2.Event
        self._file = event_file_writer.EventsWriter(str(workdir / "events"))
        # What later steps of an earlier call have written is hidden.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._file.write_event(self._event(step=from_step + 1, wall_time=time.time(), session_log=start))
        self._file.flush()

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            if not math.isfinite(value):  # such as the error of a single draw; tensorboardX would print a warning
                continue
            summary = self._scalar(name, value)
            self._file.write_event(self._event(step=step, wall_time=time.time(), summary=summary))
        self._file.flush()


class Writer:
    """Appends to `metrics.jsonl` and TensorBoard; lines of steps that a resumed run will repeat are cut first."""

    def __init__(self, workdir: Path, from_step: int, log: Callable[[str], None] = lambda text: None):
        """Open both, to go on from `from_step`; `log` is called with what was damaged, or cannot be written."""
        self.path, self._log = workdir / "metrics.jsonl", log
        content = json_files.read_bytes(self.path) if self.path.exists() else b""
        good, bad = _parsed(content)
        if bad:  # in the middle: no writer of ours leaves that, so the old content is saved
            write_atomically(self.path.with_name("metrics.jsonl.damaged"), content)
            numbers = ", ".join(map(str, bad[:5])) + (", ..." if bad[5:] else "")
            log(f"{self.path}: dropped line {numbers}, damaged; the file as it was is {self.path.name}.damaged")
        retained = "".join(json_files.dumps(line) + "\n" for line in good if line["step"] <= from_step).encode()
        if retained != content or not self.path.exists():
            write_atomically(self.path, retained)
        self.board: _Board | None = None
        with self._optional():
            self.board = _Board(workdir, from_step)

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line, keys as in METRICS; flushed at once. DiskError where there is no room for it."""
        unknown = values.keys() - METRICS.keys()
        if unknown:
            raise KeyError(f"metrics without a name in METRICS: {sorted(unknown)}")
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json_files.dumps({"step": step} | values) + "\n")
        except OSError as error:
            if full := disk_error(error, f"writing {self.path}", writable=True):
                raise full from error
            raise
        if self.board is not None:
            with self._optional():
                self.board.write(step, values)

    @contextlib.contextmanager
    def _optional(self) -> Iterator[None]:
        """TensorBoard's file holds nothing that metrics.jsonl does not: a run goes on without it."""
        try:
            yield
        except OSError as error:
            self.board = None
            self._log(f"no more TensorBoard events: {error.strerror or error}; metrics.jsonl goes on")


def read(path: Path) -> list[dict]:
    """The lines of a `metrics.jsonl` without damaged ones; a value of null (NaN, infinity) is None."""
    return _parsed(json_files.read_bytes(path))[0] if path.exists() else []


def _parsed(content: bytes) -> tuple[list[dict], list[int]]:
    """Good lines, and the numbers of damaged ones; a last line cut short by a kill is simply dropped."""
    good, bad = [], []
    for number, text in enumerate(content.split(b"\n"), 1):
        if not text.strip():
            continue
        try:
            line = json_files.parse(text, f"line {number}")
            if type(line.get("step")) is not int:
                raise UserError("no step")
            good.append(line)
        except UserError:
            bad.append(number)
    if bad and not content.endswith(b"\n") and bad[-1] == content.count(b"\n") + 1:
        bad.pop()
    return good, bad
