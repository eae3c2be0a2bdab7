"""What `config.debug` records of a call of `llada train`; the run's bits stay the same."""

import contextlib
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from llada.config import DebugConfig
from llada.files import write_atomically
from llada.processes import is_first

_FIRST_TRACED = 3  # the first step compiles, the second may still wait for memory
_SOURCE = Path(__file__).resolve().parents[1]


class Debugged:
    """The jitted train step, `program`, with what `config` asks for before and around it.

    profile_steps  a trace in workdir/profile, for TensorBoard's profile plugin or xprof, from every process
    dump_hlo       workdir/hlo/train_step.stablehlo.txt, as lowered, and train_step.hlo.txt, as compiled
    nans           FloatingPointError in the step that computes a NaN, saying in one line what computed it where
    """

    def __init__(self, train_step: Any, config: DebugConfig, workdir: Path, log: Callable[[str], None]):
        self.program, self._config, self._workdir, self._log = train_step, config, workdir, log
        self._calls = 0
        self._tracing = False

    def __call__(self, state: Any, batch: Any) -> Any:
        """`train_step(state, batch)`."""
        self._calls += 1
        if self._calls == 1 and self._config.dump_hlo:
            self._dump(state, batch)
        if self._config.profile_steps:
            self._profile(state)
        if not self._config.nans:
            return self.program(state, batch)
        # JAX prints what it does on finding one; the program's own standard output is the summary.
        with jax.debug_nans(True), contextlib.redirect_stdout(sys.stderr):
            try:
                return self.program(state, batch)
            except FloatingPointError as error:
                raise FloatingPointError(_where(error)) from error

    def __enter__(self) -> "Debugged":
        return self

    def __exit__(self, *_: object) -> None:
        """End a trace that the run did not outlast."""
        self._stop()
        if self._config.profile_steps and self._calls < _FIRST_TRACED:
            self._log(f"nothing was traced: tracing begins with step {_FIRST_TRACED} of a call")

    def _stop(self) -> None:
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False

    def _profile(self, state: Any) -> None:
        if self._calls in (_FIRST_TRACED, _FIRST_TRACED + self._config.profile_steps):
            jax.block_until_ready(state)  # whole steps are traced
            self._stop()
        if self._calls == _FIRST_TRACED:
            directory = self._workdir / "profile"
            self._log(f"tracing {self._config.profile_steps} steps into {directory}: tensorboard --logdir={directory}")
            jax.profiler.start_trace(directory)
            self._tracing = True

    def _dump(self, state: Any, batch: Any) -> None:
        lowered = self.program.lower(state, batch)
        texts = {"stablehlo": lowered.as_text(debug_info=True), "hlo": lowered.compile().as_text()}
        directory = self._workdir / "hlo"
        if is_first():  # all compile, as some compilers agree among processes
            for kind, text in texts.items():
                write_atomically(directory / f"train_step.{kind}.txt", text.encode())
            self._log(f"the step's program, lowered and compiled, is in {directory}")


def _where(error: FloatingPointError) -> str:
    """What computed a NaN, and the line of ours that asked for it, in one line."""
    what = str(error).partition(".")[0]
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _SOURCE in Path(frame.filename).parents]
    if not frames:
        return what
    return f"{what}, at {Path(frames[-1].filename).relative_to(_SOURCE)}:{frames[-1].lineno} ({frames[-1].name})"
