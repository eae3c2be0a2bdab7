"""SIGKILL at each kind of file operation of a save, and at random moments; what the next call finds.

Two chains, one of each family: call after call trains one workdir, which saves every step, and is killed. The newest
steps on the disk are then compared with those of an undisturbed run, and the next call must go on from there. A chain
that comes to its last step is compared with that run, metrics included, and begins anew.
"""

import random
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from faults import tiny_run
from faults.forking import Forked, Forks
from faults.goal import Outcome

NUMBER = "R1"
TITLE = "SIGKILL while saving"
DEMAND = "the newest committed step has an undisturbed run's bits, at most the save in flight is lost, and so it ends"
FULL, SAMPLE = 250, 2

STEPS = 40
RANDOM_SHARE = 0.4  # of the kills come at a moment that no file operation chooses
RANDOM_SECONDS = 1.2  # after the first step: about three saves
# What changes files, and how many of them one thread makes in about two saves.
OPERATIONS = {"mkdir": 4, "write": 8, "writev": 40, "fsync": 80, "rename": 20, "unlink": 1, "unlinkat": 12}
KEEP = 3


class Chain:
    """One workdir after another of a family, and the undisturbed run that they are compared with."""

    def __init__(self, family: str, seed: int, folder: Path):
        self.family, self.seed, self.folder, self.runs = family, seed, folder / family, 0
        self.folder.mkdir()
        self.expected = self.folder / "undisturbed"

    def prepare(self) -> None:
        """Train the undisturbed run, all of whose steps are retained."""
        changes = {"train.steps": STEPS, "checkpoint.keep": KEEP}
        made = tiny_run.config(tiny_run.write_documents(self.folder / "text"), self.family, changes)
        self.flag = tiny_run.write_experiment(self.folder / "experiment.py", made)
        keep_all = f"--config.checkpoint.keep={STEPS}"
        status = self.forks.run(["train", self.flag, f"--workdir={self.expected}", keep_all], self.folder / "log")
        assert status == 0, (self.folder / "log").read_text()
        self.bits = {step: tiny_run.bits(self.expected, step) for step in tiny_run.saved(self.expected)}

    def outcomes(self, cases: range) -> Iterator[Outcome]:
        """A kill for each case; where the run has come to its end, another begins."""
        with Forks(tiny_run.cache(self.folder.parent)) as self.forks:
            self.prepare()
            newest = None
            for case in cases:
                if newest is None:
                    self.runs += 1
                    workdir = self.folder / f"run{self.runs}"
                outcome, newest = self.kill(workdir, case, newest or 0)
                yield outcome
                if newest is None:
                    shutil.rmtree(workdir)
            if newest is not None and (wrong := self.finish(workdir)):
                yield Outcome("the last run, left to end", "other bits", wrong)

    def finish(self, workdir: Path) -> str:
        """Let the last run come to its end; returns what is wrong."""
        status = self.forks.run(["train", self.flag, f"--workdir={workdir}"], self.folder / "log")
        said = (self.folder / "log").read_text()
        return f"status {status}\n{said}" if status else tiny_run.difference(workdir, self.expected, STEPS)

    def kill(self, workdir: Path, case: int, newest: int) -> tuple[Outcome, int | None]:
        """One call and its kill: how it was, and the newest step then; None where the run had ended."""
        rng = random.Random(f"R1 {self.seed} {case}")
        call = self.forks.start(["train", self.flag, f"--workdir={workdir}"], self.folder / "log")
        call.until(lambda: tiny_run.last_step(call.said()) > newest)
        if rng.random() < RANDOM_SHARE or shutil.which("strace") is None:
            moment = RANDOM_SECONDS * rng.random()
            what, point = f"{moment:.2f} s after step {newest + 1}", "at a random moment"
            time.sleep(moment)
            call.send_signal(9)
        else:
            operation = rng.choice(list(OPERATIONS))
            number = 1 + rng.randrange(OPERATIONS[operation])
            what, point = at_operation(call, operation, number, self.folder / "strace")
        status, said = call.wait(), call.said()
        wrong = self.judge(workdir, status, said, newest)
        steps = tiny_run.saved(workdir)
        ended = f"killed {point}" if status == 137 else f"ended before, status {status}"
        if wrong:
            wrong = f"{what}: {wrong}\n{tiny_run.excerpt(said)}"
        over = status != 137 or bool(wrong)
        return Outcome(f"case {case}, {what}", ended, wrong), None if over else max(steps, default=0)

    def judge(self, workdir: Path, status: int, said: str, newest: int) -> str:
        """What is wrong after a call that had to go on from step `newest`."""
        if newest and f"continuing from step {newest} of" not in said:
            return f"it did not go on from step {newest}"
        if status == 0:
            return tiny_run.difference(workdir, self.expected, STEPS)
        if status != 137:
            return f"status {status}"
        steps, trained = tiny_run.saved(workdir), tiny_run.last_step(said)
        # The line of a step comes before its save begins, and that waits for the save before, which may be in flight.
        if steps[-1:] < [trained - 2] and trained > 2:
            return f"step {trained} was trained, and of the saved {steps} none is newer than {trained - 3}"
        return tiny_run.wrong_bits(workdir, steps[-KEEP:], self.bits)  # older ones may be half removed


def at_operation(call: Forked, operation: str, number: int, log: Path) -> tuple[str, str]:
    """Have strace kill a call as a thread begins its `number`-th `operation` from here on; returns where that was."""
    flags = ["-f", "-y", "-o", str(log), "-e", f"trace={operation}"]
    flags += ["-e", f"inject={operation}:signal=SIGKILL:when={number}"]
    command = ["strace", *flags, "-p", str(call.pid)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    last = [line for line in log.read_text().splitlines() if "checkpoints" in line or "metrics" in line][-1:]
    path = re.search(r"checkpoints/([^\">]*)|(metrics[^\">]*|events[^\">]*)", last[0]) if last else None
    where = f" of {path[0]}" if path else f" ({done.stderr.strip()[-200:]})" if done.returncode not in (0, 137) else ""
    return f"{operation} {number}{where}", f"at {operation}"


def outcomes(count: int, seed: int, folder: Path) -> Iterator[Outcome]:
    """The kills of both chains, side by side."""
    chains = [Chain(family, seed, folder) for family in ("llada", "arm")]
    cases = tiny_run.shares(count, 2)
    yield from tiny_run.side_by_side(*(chain.outcomes(mine) for chain, mine in zip(chains, cases, strict=False)))
