"""Damaged and hostile files of models, tokenizers, templates and corpora, given to everything that opens them.

A child process opens them, so that a crash of a library is seen as one; Python's audit events say whether code of a
file was run, and whether anything was opened where it should not be. Each case has a directory; beside it lies what no
case may read or change.
"""

import json
import os
import queue
import random
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from faults.goal import Outcome
from faults.hostile_kinds import KINDS

NUMBER = "R12"
TITLE = "Hostile files"
DEMAND = "one line or a whole model: no code of theirs run, no crash, nothing outside their directory, 5 s and 200 MB"
FULL, SAMPLE = 1000, 20

CPU_SECONDS, HANG_SECONDS, MOST_BYTES = 5.0, 60.0, 200 << 20  # of one case
_CODE = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class", "socket.connect")
_TESTS = Path(__file__).resolve().parents[1]


def outcomes(count: int, seed: int, folder: Path) -> Iterator[Outcome]:
    """Cases in order, in as few processes as do not crash."""
    (folder / "outside").mkdir(parents=True)
    done = 0
    while done < count:
        with Child(folder, seed, done, count) as child:
            while done < count:
                line = child.line(HANG_SECONDS)
                if line is None:
                    what = child.end()
                    yield Outcome(f"case {done}, {child.last}", "crash", f"the process {what}")
                    done += 1
                    break
                if "begun" in line:
                    child.last = line["begun"]
                    continue
                yield Outcome(**line)
                done += 1


class Child:
    """A process that does cases from `first` on and writes a line of JSON before and after each."""

    def __init__(self, folder: Path, seed: int, first: int, count: int):
        path = os.pathsep.join([str(_TESTS), str(_TESTS.parent / "src")])
        arguments = [sys.executable, __file__, str(folder), str(seed), str(first), str(count)]
        environment = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
        self.errors = (folder / "errors.txt").open("w+b")
        self.process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=self.errors, env=environment)
        self.lines: queue.Queue[bytes] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.last = "before its first case"

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self.lines.put(line)
        self.lines.put(b"")

    def line(self, seconds: float) -> dict[str, Any] | None:
        """The next; None where the process has ended, or has written none for so long."""
        try:
            line = self.lines.get(timeout=seconds)
        except queue.Empty:
            return None
        return json.loads(line) if line else None

    def end(self) -> str:
        """Why there is no more of it."""
        hangs = self.process.poll() is None and not self._ends()
        self.process.kill()
        status = self.process.wait()
        self.errors.seek(0)
        return "hangs" if hangs else f"ended with {status}: {self.errors.read()[-2000:].decode(errors='replace')}"

    def _ends(self) -> bool:
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            return False
        return True

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.errors.close()


# What follows runs in the child.


class Audit:
    """Events of the interpreter that no file may bring about, while a case is open."""

    def __init__(self, folder: Path):
        self.folder, self.place, self.seen = f"{folder}/", "", []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple) -> None:
        if not self.place:
            return
        if event in (
            "os.system",
            "os.exec",
            "os.posix_spawn",
            "subprocess.Popen",
            "pickle.find_class",
            "socket.connect",
        ):
            self.seen.append(f"{event} {str(arguments)[:200]}")
        elif event == "exec" and str(getattr(arguments[0], "co_filename", "")).startswith(self.folder):
            self.seen.append(f"ran {arguments[0].co_filename}")
        elif event in ("open", "os.mkdir", "os.rename", "os.remove", "os.symlink"):
            path = os.path.realpath(os.fsdecode(arguments[0])) if isinstance(arguments[0], str | bytes) else ""
            if path.startswith(self.folder) and not path.startswith(self.place):
                self.seen.append(f"{event} {path}")


def child(folder: Path, seed: int, first: int, count: int) -> None:
    """Write the lines."""
    from faults import hostile_models

    made = hostile_models.Models(folder / "models")
    audit = Audit(folder.resolve())
    lines, sys.stdout = sys.stdout, sys.stderr
    for case in range(first, count):
        rng, kind = random.Random(f"{seed} {case}"), KINDS[case % len(KINDS)]
        place = folder / "case"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(made.exports[case // len(KINDS) % 2], place / "hf")
        what, opened = kind(rng, place, made)
        name = f"case {case}, {kind.__name__}: {what}"
        print(json.dumps({"begun": name}), file=lines, flush=True)
        print(json.dumps(one(name, opened, place, audit)._asdict()), file=lines, flush=True)


def one(name: str, opened: Callable[[], object], place: Path, audit: Audit) -> Outcome:
    """One case, judged."""
    from llada.errors import UserError

    outside = sorted(path for path in place.parent.rglob("*") if place not in path.parents)
    memory, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    audit.seen, audit.place, wrong = [], f"{place.resolve()}/", ""
    try:
        opened()
        ended = "accepted"
    except UserError as error:
        ended = "refused"
        if "\n" in str(error) or len(str(error)) > 1_000:
            wrong = f"not one line: {str(error)[:2_000]}"
    except BaseException as error:
        ended, wrong = "traceback", f"{type(error).__name__}: {str(error)[:1_000]}"
    finally:
        audit.place = ""
    seconds = time.process_time() - started
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) * 1024
    if audit.seen:
        ended, wrong = "escaped", "; ".join(audit.seen[:5])
    elif outside != sorted(path for path in place.parent.rglob("*") if place not in path.parents):
        ended, wrong = "escaped", "files beside its directory have changed"
    elif seconds > CPU_SECONDS or grown > MOST_BYTES:
        wrong = wrong or f"took {seconds:.1f} s of a core and {grown >> 20} MB"
    return Outcome(name, ended, wrong, seconds)


if __name__ == "__main__":
    child(Path(sys.argv[1]), *map(int, sys.argv[2:]))
