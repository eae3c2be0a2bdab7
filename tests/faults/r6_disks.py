"""A disk that fills up or fails while a run saves, and what it does then.

Call after call goes on with one workdir. At a random step the disk has no room (a small tmpfs that is filled), files
may not grow (RLIMIT_FSIZE), or one system call of a thread fails (strace). A checkpoint that fails is one line and the
next is another try; where metrics or the config cannot be written the run ends with status 5. The disk is whole again
once that has been seen.
"""

import atexit
import contextlib
import os
import random
import re
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from faults import tiny_run
from faults.forking import Forked, Forks
from faults.goal import Outcome

from llada.errors import DiskError

NUMBER = "R6"
TITLE = "Disks that are full or fail"
DEMAND = (
    "the newest steps intact, one line, no traceback; the next save is another try, or status 5; the same bits at last"
)
FULL, SAMPLE = 60, 2

STEPS, EVERY, KEEP = 60, 2, 3
PATIENCE = 8  # steps without any effect of a fault, after which there will be none
DISK_BYTES = 32 << 20
ERRORS = ("ENOSPC", "EIO", "EDQUOT", "EROFS")
READ_ONLY = ("mkdir", "rename", "openat")  # what a file system that has become read-only refuses
# What fails, and how many of them a thread makes in about two saves.
OPERATIONS = {"mkdir": 4, "writev": 40, "fsync": 80, "rename": 20, "openat": 60}
FAILED = re.compile(r"^.* while (saving|writing) .*$", re.M)


class Chain:
    """One workdir after another, on a disk of its own where this process may mount one."""

    def __init__(self, seed: int, folder: Path, name: str):
        self.seed, self.folder, self.disk = seed, folder / name, folder / name / "disk"
        self.disk.mkdir(parents=True)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(self.disk)]
        self.mounted = shutil.which("mount") is not None and not subprocess.run(mount, capture_output=True).returncode
        if self.mounted:
            atexit.register(subprocess.run, ["umount", "-l", str(self.disk)], capture_output=True)
        self.expected = folder / name / "undisturbed"

    def outcomes(self, cases: range) -> Iterator[Outcome]:
        """A fault for each case; where the run has come to its end, another begins."""
        changes = {"train.steps": STEPS, "checkpoint.every": EVERY, "checkpoint.keep": KEEP}
        made = tiny_run.config(tiny_run.write_documents(self.folder / "text"), changes=changes)
        self.flag = tiny_run.write_experiment(self.folder / "experiment.py", made)
        with Forks(tiny_run.cache(self.folder.parent)) as self.forks:
            keep_all = f"--config.checkpoint.keep={STEPS}"
            status = self.forks.run(["train", self.flag, f"--workdir={self.expected}", keep_all], self.folder / "log")
            assert status == 0, (self.folder / "log").read_text()
            self.bits = {step: tiny_run.bits(self.expected, step) for step in tiny_run.saved(self.expected)}
            workdir = self.disk / "run"
            for case in cases:
                yield self.disturb(workdir, case)
                if tiny_run.saved(workdir)[-1:] == [STEPS]:
                    shutil.rmtree(workdir)
            status = self.forks.run(["train", self.flag, f"--workdir={workdir}"], self.folder / "log")
            said = (self.folder / "log").read_text()
            wrong = f"status {status}\n{said}" if status else tiny_run.difference(workdir, self.expected, STEPS)
            if wrong:
                yield Outcome("the last run, left to end", "wrong", wrong)

    def disturb(self, workdir: Path, case: int) -> Outcome:
        """One call, its fault, and what it does once the disk is whole again."""
        rng = random.Random(f"R6 {self.seed} {case}")
        before = tiny_run.saved(workdir)
        call = self.forks.start(["train", self.flag, f"--workdir={workdir}"], self.folder / "log")
        first = max(before, default=0)
        what, repair = self.begin(call, rng, first)
        start = tiny_run.last_step(call.said()) or first

        def noticed() -> bool:
            said = call.said()
            return bool(FAILED.search(said)) or tiny_run.last_step(said) >= min(start + PATIENCE, STEPS)

        call.until(noticed)
        failed = FAILED.search(call.said())
        repair()
        seen = max(tiny_run.saved(workdir), default=0)
        call.until(lambda: max(tiny_run.saved(workdir), default=0) > seen)
        tried_again = call.poll() is None
        if tried_again:
            call.send_signal(9)
        status, said = call.wait(), call.said()
        wrong = self.judge(workdir, status, said, before)
        line = failed[0].partition(" while ")[0].rpartition(": ")[2] if failed else ""
        ended = f"{line}: {'saved again' if tried_again else f'status {status}'}" if failed else "no effect"
        return Outcome(f"case {case}, {what}", ended, f"{wrong}\n{tiny_run.excerpt(said)}" if wrong else "")

    def begin(self, call: Forked, rng: random.Random, first: int) -> tuple[str, Callable[[], None]]:
        """Begin a fault; returns what it is, and what ends it."""
        kinds = ["limit", *["full"] * self.mounted, *["error"] * (2 * bool(shutil.which("strace")))]
        kind, opening = rng.choice(kinds), rng.random() < 0.15
        if not opening:
            call.until(lambda: tiny_run.last_step(call.said()) > first)
            time.sleep(rng.random() * 0.3)
        when = "while it opens the run" if opening else f"after step {first + 1}"
        if kind == "error":
            operation = rng.choice(list(OPERATIONS))
            error = rng.choice(ERRORS if operation in READ_ONLY and not opening else ERRORS[:3])
            number = 1 + rng.randrange(3 if opening else OPERATIONS[operation])
            flags = ["-f", "-o", str(self.folder / "strace"), "-e", f"trace={operation}"]
            flags += ["-e", f"inject={operation}:error={error}:when={number}", "-p", str(call.pid)]
            tracer = subprocess.Popen(["strace", *flags], stderr=subprocess.DEVNULL)
            return f"{error} at {operation} {number} {when}", lambda: _end(tracer)
        if kind == "full":
            room = rng.randrange(600_000)
            ballast = self.disk / "ballast"
            fill(ballast, room)
            return f"{room:,} bytes left {when}", lambda: ballast.unlink()
        most = rng.randrange(120_000)
        old = resource.RLIM_INFINITY
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(call.pid, resource.RLIMIT_FSIZE, (most, old))

        def lift() -> None:
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(call.pid, resource.RLIMIT_FSIZE, (old, old))

        return f"files of at most {most:,} bytes {when}", lift

    def judge(self, workdir: Path, status: int, said: str, before: list[int]) -> str:
        """What is wrong after a call that had to go on from the last of `before`."""
        if status not in (0, 137, DiskError.status):
            return f"status {status}"
        if found := [word for word in tiny_run.TRACEBACKS if word in said]:
            return f"it says {found[0]}"
        if status == DiskError.status and len(re.findall(r"^llada train: .* while .*$", said, re.M)) != 1:
            return "not one line about it"
        if status == 0 and (wrong := tiny_run.difference(workdir, self.expected, STEPS)):
            return wrong
        steps = tiny_run.saved(workdir)
        if max(steps, default=0) < max(before, default=0):
            return f"step {before[-1]} is gone; saved: {steps}"
        return tiny_run.wrong_bits(workdir, steps[-KEEP:], self.bits)


def _end(tracer: subprocess.Popen) -> None:
    """Let strace leave the process."""
    tracer.terminate()
    tracer.wait(60)


def fill(ballast: Path, room: int) -> None:
    """Fill a disk but for so many bytes."""
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(64 << 10))
    os.truncate(ballast, max(0, ballast.stat().st_size - room))


def outcomes(count: int, seed: int, folder: Path) -> Iterator[Outcome]:
    """The faults of two chains, side by side."""
    cases = tiny_run.shares(count, 2)
    chains = [Chain(seed, folder, f"chain{mine.start}") for mine in cases]
    yield from tiny_run.side_by_side(*(chain.outcomes(mine) for chain, mine in zip(chains, cases, strict=True)))
