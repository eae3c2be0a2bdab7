"""Runs under `launch/keep_training.sh` alone, and every few seconds one of all faults.

Two supervisors, each with one workdir after another. Some time after a step the training process is killed, stopped by
SIGTERM, or hangs and is killed; the newest of its checkpoints is damaged and then it is killed; or its disk is full for
a while. Nobody helps: the supervisor starts it again, and the run ends as an undisturbed one.
"""

import atexit
import contextlib
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from faults import tiny_run
from faults.goal import Outcome

NUMBER = "R13"
TITLE = "One fault after another under the supervisor"
DEMAND = (
    "it goes on by itself from the newest whole step on disk; SIGTERM loses none, a kill at most a save and the one in "
    "flight, but for saves that found no room; same bits"
)
FULL, SAMPLE = 96, 1

STEPS, EVERY, KEEP = 800, 10, 3
KINDS = ("SIGKILL", "SIGTERM", "damage and SIGKILL", "full disk", "SIGSTOP and SIGKILL")
LAUNCH = Path(__file__).resolve().parents[2] / "launch" / "keep_training.sh"
DISK_BYTES = 32 << 20
FEW = 3  # cases in which saves that a full disk has refused may still be missing
SECONDS = 4.0  # after the first step of a process its fault comes within so many
LATE_SECONDS = 180.0  # from a fault to the next step
CONTINUING = re.compile(r"^continuing from step (\d+) of", re.M)


class Soak:
    """A supervisor, and its run on a disk of its own where this process may mount one."""

    def __init__(self, words: list[str], expected: Path, seed: int, folder: Path):
        self.words, self.expected, self.seed, self.disk = words, expected, seed, folder / "disk"
        self.log, self.workdir = folder / "log", folder / "disk" / "run"
        self.disk.mkdir(parents=True)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(self.disk)]
        self.mounted = shutil.which("mount") is not None and not subprocess.run(mount, capture_output=True).returncode
        if self.mounted:
            atexit.register(subprocess.run, ["umount", "-l", str(self.disk)], capture_output=True)
        self.supervisor: subprocess.Popen | None = None
        self.damaged: int | None = None  # the step that the latest fault has damaged
        self.filled = -FEW  # the case that filled the disk last

    def outcomes(self, cases: range) -> Iterator[Outcome]:
        """A fault for each case; where the run has come to its end, another begins."""
        try:
            for case in cases:
                if self.supervisor is None:
                    self.begin()
                yield self.disturb(case)
            if self.supervisor is not None and (wrong := self.ended(self.supervisor.wait())):
                yield Outcome("the last run, left to end", "wrong", wrong)
        finally:
            if self.supervisor is not None:
                self.supervisor.terminate()
                with contextlib.suppress(ProcessLookupError, TypeError):
                    os.kill(self.trainer(), signal.SIGKILL)

    def begin(self) -> None:
        """Start a supervisor on a new workdir."""
        shutil.rmtree(self.workdir, ignore_errors=True)
        environment = os.environ | {"PAUSE_SECONDS": "0", "DISK_PAUSE_SECONDS": "1"}
        command = ["bash", str(LAUNCH), *self.words, f"--workdir={self.workdir}"]
        with self.log.open("wb") as log:
            self.supervisor = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def trainer(self) -> int | None:
        """The process that trains, None between two."""
        pid = self.supervisor.pid
        with contextlib.suppress(OSError):
            for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
                if b"--workdir=" in Path(f"/proc/{child}/cmdline").read_bytes():
                    return int(child)
        return None

    def said(self, start: int = 0) -> str:
        """What supervisor and training have printed, from that byte on."""
        with self.log.open("rb") as file:
            file.seek(start)
            return file.read().decode(errors="replace")

    def until(self, happened) -> bool:
        """Wait for `happened()`; False where the supervisor has ended, or it takes too long."""
        end = time.monotonic() + LATE_SECONDS
        while not happened():
            if self.supervisor.poll() is not None or time.monotonic() > end:
                return False
            time.sleep(0.02)
        return True

    def disturb(self, case: int) -> Outcome:
        """One fault, and what the supervisor makes of it until a step is trained again, or the run has ended."""
        rng = random.Random(f"R13 {self.seed} {case}")
        kind, moment = rng.choice(KINDS), rng.random() * SECONDS
        what = f"case {case}, {kind}, {moment:.2f} s after a step"
        time.sleep(moment)
        start, begun = self.log.stat().st_size if self.log.exists() else 0, time.monotonic()
        process = self.trainer() if tiny_run.STEP_LINE.search(self.said()) else None
        if process is None and self.until(lambda: tiny_run.STEP_LINE.search(self.said(start))):
            process = self.trainer()
        before, self.damaged = tiny_run.last_step(self.last_call()), None
        whole = tiny_run.saved(self.workdir)
        if process is None or not self.fault(kind, process, rng):
            return self.next(what, "done before", "", None)
        killed = kind != "full disk"
        if killed:
            self.until(lambda: not alive(process))
        trained = max(before, tiny_run.last_step(self.last_call()))
        mark = self.log.stat().st_size
        going = self.until(lambda: tiny_run.STEP_LINE.search(self.said(mark)))
        found = CONTINUING.findall(self.said(mark))
        self.filled = case if kind == "full disk" else self.filled
        lost = trained - int(found[-1]) if found else 0
        most = {"SIGTERM": 0, "damage and SIGKILL": 3 * EVERY}.get(kind, 2 * EVERY)
        most = STEPS if case - self.filled < FEW and kind != "SIGTERM" else most
        wrong = f"{lost} steps were lost: {trained} were trained" if lost > most else ""
        newest = max((step for step in whole if step != self.damaged), default=0)
        if found and int(found[-1]) < newest:
            wrong = f"it goes on from step {found[-1]}, with step {newest} on disk"
        if killed and going and not found and trained > 2 * EVERY:
            wrong = "it began anew"
        return self.next(what, f"{kind}: {'goes on' if going else 'ended'}", wrong, time.monotonic() - begun)

    def last_call(self) -> str:
        """What the process that trains now, or the last one, has printed."""
        return re.split(r"^(?:diffusion: |status \d+; again)", self.said(), flags=re.M)[-1]

    def fault(self, kind: str, process: int, rng: random.Random) -> bool:
        """Do it; False where the process has ended before."""
        if kind == "damage and SIGKILL":
            from faults.r4_damaged_checkpoints import KINDS as DAMAGE
            from faults.r4_damaged_checkpoints import damage

            # Where the only step is damaged, training rightly ends: whether to begin anew is for a person to say.
            with contextlib.suppress(ValueError, OSError):  # too few steps, or it has just been removed
                *_, _, self.damaged = tiny_run.saved(self.workdir)
                damage(self.workdir / "checkpoints" / str(self.damaged), rng, rng.choice(DAMAGE))
        try:
            if kind == "full disk":
                self.fill(process, rng)
            else:
                if kind.startswith("SIGSTOP"):
                    os.kill(process, signal.SIGSTOP)
                    time.sleep(rng.random())
                os.kill(process, signal.SIGTERM if kind == "SIGTERM" else signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True

    def fill(self, process: int, rng: random.Random) -> None:
        """No room for a second or two: on the disk, or for any file where there is no disk of its own."""
        if not self.mounted:
            most = resource.RLIM_INFINITY
            resource.prlimit(process, resource.RLIMIT_FSIZE, (rng.randrange(100_000), most))
            time.sleep(1 + rng.random())
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(process, resource.RLIMIT_FSIZE, (most, most))
            return
        from faults.r6_disks import fill

        ballast = self.disk / "ballast"
        fill(ballast, rng.randrange(600_000))
        time.sleep(1 + rng.random())
        ballast.unlink()

    def next(self, what: str, ended: str, wrong: str, seconds: float | None) -> Outcome:
        """The outcome, with what is wrong with the run where it has ended."""
        if self.supervisor.poll() is None and ended.endswith("ended"):
            wrong = f"no step within {LATE_SECONDS:.0f} s"
        if self.supervisor.poll() is not None or wrong:
            if self.supervisor.poll() is None:
                self.supervisor.terminate()
                with contextlib.suppress(ProcessLookupError, TypeError):
                    os.kill(self.trainer(), signal.SIGKILL)
            status = self.supervisor.wait()
            wrong = wrong or self.ended(status)
            self.supervisor = None
        return Outcome(what, ended, f"{wrong}\n{tiny_run.excerpt(self.said())}" if wrong else "", seconds)

    def ended(self, status: int) -> str:
        """What is wrong with a run whose supervisor has ended."""
        if status:
            return f"the supervisor gave up with status {status}"
        for path in (self.workdir / "checkpoints").glob("*.damaged*"):
            shutil.rmtree(path)
        return tiny_run.difference(self.workdir, self.expected, STEPS)


def alive(process: int) -> bool:
    """Whether a process runs; one that has ended and is not yet waited for does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def outcomes(count: int, seed: int, folder: Path) -> Iterator[Outcome]:
    """The faults of two supervisors, side by side."""
    changes = {"train.steps": STEPS, "checkpoint.every": EVERY, "checkpoint.keep": KEEP}
    made = tiny_run.config(tiny_run.write_documents(folder / "text"), changes=changes)
    flag = tiny_run.write_experiment(folder / "experiment.py", made)
    words, expected = [sys.executable, "-m", "llada", "train", flag], folder / "undisturbed"
    os.environ.update(tiny_run.cache(folder))
    subprocess.run([*words, f"--workdir={expected}"], check=True, capture_output=True)
    cases = tiny_run.shares(count, 2)
    soaks = [Soak(words, expected, seed, folder / f"soak{mine.start}") for mine in cases]
    yield from tiny_run.side_by_side(*(soak.outcomes(mine) for soak, mine in zip(soaks, cases, strict=True)))
