"""SIGTERM, SIGINT and SIGHUP at random moments of `llada train`, and what each cost.

Two chains, each of call after call on one workdir. Half of the calls get their signal at a moment drawn from the time
that an undisturbed one takes, half shortly after a line drawn from those that it writes: while Python imports, rows are
made, a program is compiled, a step, an evaluation or a save is done. A run that comes to its end is compared with an
undisturbed one. tests/commands/test_endings.py does so twice.
"""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from faults import tiny_run
from faults.goal import Outcome

NUMBER = "R7"
TITLE = "SIGTERM, SIGINT or SIGHUP at any moment"
DEMAND = (
    "saved and ended within 15 s in one line with the signal's status, no step lost; the run ends with the same bits"
)
FULL, SAMPLE = 100, 1

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
STEPS = 30
LATE_SECONDS = 300  # a call that has not ended by then is killed
AFTER_LINE_SECONDS = 0.3  # to the signal, at most
MOST_SECONDS = 15  # from a signal to the end, on a machine that may be busy


class Trainer:
    """Calls of `llada train` with the flags `words`, as processes; `seconds`, `lines`: of an undisturbed one."""

    def __init__(self, words: list[str], environment: dict[str, str], seconds: float = 0.0):
        self.words, self.environment, self.seconds, self.lines = words, environment, seconds, 0

    def call(
        self,
        workdir: Path,
        number: signal.Signals | None = None,
        moment: float = 0,
        cache: bool = True,
        after_lines: int = 0,
    ) -> tuple[int, list[str], int, float]:
        """A call that gets a signal `moment` seconds after so many lines, or later: once it listens to signals.

        Returns its exit status as a shell has it, the lines of its standard error, how many of them came before the
        signal, and the seconds from the signal to the end.
        """
        command = [sys.executable, "-m", "llada", "train", *self.words, f"--workdir={workdir}"]
        environment = os.environ | self.environment | ({} if cache else {"JAX_COMPILATION_CACHE_DIR": ""})
        lines: list[str] = []
        streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        with subprocess.Popen(command, env=environment, **streams, text=True) as process:
            reader = threading.Thread(target=lambda: lines.extend(iter(process.stderr.readline, "")))
            reader.start()
            before, sent = 0, time.monotonic()
            if number is not None:
                while process.poll() is None and len(lines) < after_lines:
                    time.sleep(0.002)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(moment)
                due = time.monotonic()
                while process.poll() is None and not listens(process.pid):
                    time.sleep(0.01)
                before, sent = len(lines), time.monotonic()
                assert sent < due + MOST_SECONDS, "it does not listen to signals"
                process.send_signal(number)
            timer = threading.Timer(LATE_SECONDS, process.kill)
            timer.start()
            status = process.wait()
            after = time.monotonic() - sent
            timer.cancel()
            reader.join()
        return 128 - status if status < 0 else status, [line.rstrip() for line in lines], before, after

    def measure(self, workdir: Path) -> None:
        """Train a workdir from its start to its end, undisturbed."""
        start = time.monotonic()
        status, lines, *_ = self.call(workdir)
        assert status == 0, (status, lines)
        self.seconds, self.lines = time.monotonic() - start, len(lines)

    def disturbed(self, workdir: Path, seed: int, case: int) -> tuple[Outcome, int]:
        """A call and the signal that a case draws; also the exit status."""
        rng = random.Random(f"{seed} {case}")
        moment, line = self.seconds * (case % 10 + rng.random()) / 10, 0  # every tenth of a call gets its share
        if case // 10 % 2:
            moment, line = AFTER_LINE_SECONDS * rng.random(), 1 + rng.randrange(self.lines)
        number, cache = rng.choice(SIGNALS), rng.random() < 0.75
        status, lines, before, after = self.call(workdir, number, moment, cache, line)
        stops = [line for line in lines if re.match(r"llada.*: (stopped by|interrupted)", line)]
        trained = tiny_run.last_step("\n".join(lines))
        wrong = []
        if status not in (0, 128 + number):
            wrong.append(f"status {status}")
        if len(stops) != (status != 0):
            wrong.append(f"{len(stops)} lines about it")
        if any(word in line for line in lines for word in tiny_run.TRACEBACKS):
            wrong.append("a traceback")
        if trained > max(tiny_run.saved(workdir), default=0):
            wrong.append(f"step {trained} is lost")
        if after > MOST_SECONDS:
            wrong.append(f"{after:.1f} s to its end")
        if wrong:
            wrong += ["", *lines[-40:]]
        ended = f"{phase(lines[:before])}: {'stopped' if status else 'done before'}"
        what = f"case {case}, {number.name} {moment:.2f} s after {f'line {line}' if line else 'its start'}"
        return Outcome(what, ended, "\n".join(wrong), after), status

    def chain(self, folder: Path, expected: Path, cases: range, seed: int) -> Iterator[Outcome]:
        """The signals of some cases, to one run after another."""
        run = 0
        for case in cases:
            outcome, status = self.disturbed(folder / f"run{run}", seed, case)
            if status == 0:
                outcome = self.compared(outcome, folder / f"run{run}", expected)
                run += 1
            yield outcome
        status, lines, *_ = self.call(folder / f"run{run}")
        last = Outcome("the last run, left to end", "done", "\n".join(lines[-40:]) if status else "")
        last = last if status else self.compared(last, folder / f"run{run}", expected)
        if last.wrong:
            yield last

    def compared(self, outcome: Outcome, workdir: Path, expected: Path) -> Outcome:
        """The outcome of the call that has finished a run, with what is wrong with that."""
        step = tiny_run.saved(expected)[-1]
        wrong = tiny_run.difference(workdir, expected, step)
        shutil.rmtree(workdir)
        return outcome._replace(wrong="\n".join(filter(None, [outcome.wrong, wrong])))


def listens(pid: int) -> bool:
    """Whether a process has installed its handlers, the last of which is for SIGHUP. Linux says so; others do not."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True
    caught = re.search(r"^SigCgt:\s*(\w+)", status, re.M)
    return caught is None or bool(int(caught[1], 16) >> (signal.SIGHUP - 1) & 1)


def phase(lines: list[str]) -> str:
    """What a call did after it had written these lines."""
    if not lines:
        return "imports"
    words = {"compiling": "compile", "compiled": "first step", "evaluating": "evaluation", "step": "steps"}
    return words.get(lines[-1].split()[0], "preparation")


def outcomes(count: int, seed: int, folder: Path) -> Iterator[Outcome]:
    """The signals of two chains, side by side."""
    changes = {"train.steps": STEPS, "evaluate.every": 10, "checkpoint.every": 5}
    made = tiny_run.config(tiny_run.write_documents(folder / "text"), changes=changes)
    trainer = Trainer([tiny_run.write_experiment(folder / "experiment.py", made)], tiny_run.cache(folder))
    for name in ("compiling", "undisturbed"):  # the first one fills the cache of programs
        trainer.measure(folder / name)
    chains = []
    for cases in tiny_run.shares(count, 2):
        (mine := folder / f"chain{cases.start}").mkdir()
        chains.append(trainer.chain(mine, folder / "undisturbed", cases, seed))
    yield from tiny_run.side_by_side(*chains)
