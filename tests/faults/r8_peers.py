"""SIGKILL or SIGSTOP to one of two or four processes that train together, and what the others do.

Two chains of runs, one of two processes and one of four, each with a device of its own. Some time after a step one
process dies or hangs; the others must end by themselves. What is saved then has the bits of an undisturbed run on as
many processes, all start again from there, and the last run of each chain is left to end.
"""

import random
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from faults import tiny_run
from faults.forking import Forked, Forks
from faults.goal import Outcome

from llada.errors import PeerLost

NUMBER = "R8"
TITLE = "A process of several dies or hangs"
DEMAND = "the others end within 15 s with status 6, none is left, and the restarted run has the same bits"
FULL, SAMPLE = 40, 1

STEPS, EVERY, KEEP = 120, 4, 3
MOST_SECONDS = 15.0
FOUR = 4  # every fourth case is of four processes


class Chain:
    """One run after another of so many processes."""

    def __init__(self, count: int, seed: int, folder: Path):
        self.count, self.seed, self.folder = count, seed, folder / f"{count} processes"
        self.expected, self.calls = self.folder / "undisturbed", 0
        self.folder.mkdir()

    def outcomes(self, cases: range) -> Iterator[Outcome]:
        """A dead or hung process for each case; where the run has come to its end, another begins."""
        changes = {"train.steps": STEPS, "checkpoint.every": EVERY, "checkpoint.keep": KEEP}
        made = tiny_run.config(tiny_run.write_documents(self.folder / "text"), changes=changes)
        self.flag = tiny_run.write_experiment(self.folder / "experiment.py", made)
        with Forks(tiny_run.cache(self.folder.parent)) as self.forks:
            ended = [call.wait() for call in self.start(self.expected, f"--config.checkpoint.keep={STEPS}")]
            assert set(ended) == {0}, ended
            self.bits = {step: tiny_run.bits(self.expected, step) for step in tiny_run.saved(self.expected)}
            workdir = self.folder / "run"
            for case in cases:
                yield self.disturb(workdir, case)
                if tiny_run.saved(workdir)[-1:] == [STEPS]:
                    shutil.rmtree(workdir)
            calls = self.start(workdir)
            ended = [call.wait() for call in calls]
            bad = any(ended)
            wrong = f"{ended}\n{calls[0].said()}" if bad else tiny_run.difference(workdir, self.expected, STEPS)
            if wrong:
                yield Outcome("the last run, left to end", "wrong", wrong)

    def start(self, workdir: Path, *words: str) -> list[Forked]:
        """All processes of a run."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        words = ("train", self.flag, f"--workdir={workdir}", *words)
        joined = [f"--coordinator=127.0.0.1:{port}", f"--processes={self.count}"]
        return [
            self.forks.start([*words, *joined, f"--process_id={i}"], self.folder / f"log.{i}")
            for i in range(self.count)
        ]

    def disturb(self, workdir: Path, case: int) -> Outcome:
        """One run, one of whose processes dies or hangs."""
        rng = random.Random(f"R8 {self.seed} {case}")
        victim, number = rng.randrange(self.count), rng.choice((signal.SIGKILL, signal.SIGSTOP))
        moment = rng.random()
        newest = max(tiny_run.saved(workdir), default=0) if workdir.exists() else 0
        calls = self.start(workdir)
        first = calls[0]
        first.until(lambda: tiny_run.last_step(first.said()) > newest)
        time.sleep(moment)
        running = first.poll() is None
        calls[victim].send_signal(number)
        start = time.monotonic()
        others = [call for i, call in enumerate(calls) if i != victim]
        for call in others:
            call.until(lambda: time.monotonic() - start > 3 * MOST_SECONDS)
        seconds = time.monotonic() - start
        statuses = [call.poll() for call in others]
        for call in calls:
            call.send_signal(signal.SIGKILL)
        last = [call.wait() for call in calls]
        what = f"case {case}, {number.name} to process {victim} of {self.count}, {moment:.2f} s after step {newest + 1}"
        if not running:  # all had come to their end before
            wrong = "" if set(last) == {0} else f"statuses {last}"
            return Outcome(what, "done before", wrong or tiny_run.difference(workdir, self.expected, STEPS))
        wrong = self.judge(workdir, statuses, seconds, newest, first.said())
        said = "\n".join(f"process {i}:\n{tiny_run.excerpt(call.said())}" for i, call in enumerate(calls))
        ended = f"{number.name} of {self.count}: " + ", ".join(sorted({f"status {status}" for status in statuses}))
        return Outcome(what, ended, f"{wrong}\n{said}" if wrong else "", seconds)

    def judge(self, workdir: Path, statuses: list[int | None], seconds: float, newest: int, said: str) -> str:
        """What is wrong with those that were left, and with what they have left."""
        if None in statuses:
            return f"after {seconds:.0f} s some still run: {statuses}"
        if set(statuses) != {PeerLost.status}:
            return f"statuses {statuses}"
        if seconds > MOST_SECONDS:
            return f"it took {seconds:.1f} s"
        if newest and f"continuing from step {newest} of" not in said:
            return f"it did not go on from step {newest}"
        steps, trained = tiny_run.saved(workdir), tiny_run.last_step(said)
        if max(steps, default=0) < trained - 2 * EVERY:
            return f"step {trained} was trained; saved: {steps}"
        return tiny_run.wrong_bits(workdir, steps[-KEEP:], self.bits)


def outcomes(count: int, seed: int, folder: Path) -> Iterator[Outcome]:
    """Both chains, side by side."""
    fours = [case for case in range(count) if case % FOUR == FOUR - 1]
    twos = [case for case in range(count) if case % FOUR != FOUR - 1]
    chains = [Chain(processes, seed, folder).outcomes(mine) for processes, mine in ((2, twos), (4, fours)) if mine]
    yield from tiny_run.side_by_side(*chains)
