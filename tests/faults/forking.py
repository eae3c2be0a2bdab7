"""Calls of `llada` that need no imports: a process has made them, waits, and forks for each call.

    with Forks() as forks:
        call = forks.start(["train", "--workdir=w"], log=Path("w.log"))
        call.kill() ... status = call.wait()

What a call runs is the `llada` program from its first line on, but for the seconds in which Python starts and imports.
The waiting process has one thread and no device, so that a fork of it is as good as a new process.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

LATE_SECONDS = 240  # a call that has not ended by then is killed, and is wrong


class Forked:
    """A call. `log` is its standard output and error."""

    def __init__(self, forks: "Forks", pid: int, log: Path):
        self._forks, self.pid, self.log, self._status = forks, pid, log, None
        self.started = time.monotonic()

    def said(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(errors="replace")

    def poll(self) -> int | None:
        """The exit status, as a shell has it; None while it runs."""
        if self._status is None:
            self._status = self._forks.status(self.pid)
        return self._status

    def send_signal(self, number: int) -> None:
        """To the call, where it still runs: it is no child of ours, so a moment later its pid may be another's."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def until(self, happened, pause: float = 0.005) -> bool:
        """Wait for `happened()`; False where the call has ended before."""
        while not happened():
            if self.poll() is not None:
                return happened()
            if time.monotonic() - self.started > LATE_SECONDS:
                self.send_signal(signal.SIGKILL)
            time.sleep(pause)
        return True

    def wait(self) -> int:
        """The exit status, once it has ended."""
        self.until(lambda: self.poll() is not None)
        return self.poll()


class Forks:
    """The process that forks; any number of calls may run beside each other."""

    def __init__(self, environment: dict[str, str] | None = None, program: str = "llada.commands.program"):
        """`program`: the module whose `start()` a call runs."""
        command = [sys.executable, str(Path(__file__).resolve()), program]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        # A group of its own, so that Ctrl-C of a suite does not become a signal under test.
        self._process = subprocess.Popen(command, env=os.environ | (environment or {}), start_new_session=True, **pipes)
        assert self._ask({}) == {"ready": True}

    def start(self, words: list[str], log: Path, environment: dict[str, str] | None = None) -> Forked:
        """Run `llada WORDS`; `environment` is added where it is not read by an import."""
        words = [str(word) for word in words]
        log.write_text("")
        pid = self._ask({"words": words, "log": str(log), "environment": environment or {}})["pid"]
        return Forked(self, pid, log)

    def run(self, words: list[str], log: Path) -> int:
        """The exit status of `llada WORDS`."""
        return self.start(words, log).wait()

    def status(self, pid: int) -> int | None:
        """Of a call, None while it runs."""
        return self._ask({"status": pid})["status"]

    def _ask(self, request: dict) -> dict:
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process that forks has ended: {self._process.wait()}")
        return json.loads(answer)

    def __enter__(self) -> "Forks":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """End it, and with it what still runs: on both ways out it kills its calls."""
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def _serve() -> None:
    """Answer requests until standard input ends."""
    import orbax.checkpoint
    import tensorboardX

    from llada.commands import train
    from llada.inference import generation
    from llada.training import loop, metrics

    del orbax, tensorboardX, train, loop, metrics, generation
    running: dict[int, int | None] = {}
    while line := sys.stdin.readline():
        request = json.loads(line)
        if "status" in request:
            pid = request["status"]
            if running[pid] is None and (found := os.waitpid(pid, os.WNOHANG))[0]:
                code = os.waitstatus_to_exitcode(found[1])
                running[pid] = 128 - code if code < 0 else code
            answer = {"status": running[pid]}
        elif "words" in request:
            pid = os.fork()
            if pid == 0:
                return _call(sys.argv[1], **request)
            running[pid], answer = None, {"pid": pid}
        else:
            answer = {"ready": True}
        print(json.dumps(answer), flush=True)
    for pid in (pid for pid, status in running.items() if status is None):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return None


def _call(program: str, words: list[str], log: str, environment: dict[str, str]) -> None:
    """In the fork: what `python -m llada WORDS` does, or another program, its streams being the log."""
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
    null = os.open(os.devnull, os.O_RDONLY)
    for number, source in ((0, null), (1, descriptor), (2, descriptor)):
        os.dup2(source, number)
    os.close(descriptor)
    os.close(null)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["llada", *words]
    sys.exit(importlib.import_module(program).start())


if __name__ == "__main__":
    _serve()
