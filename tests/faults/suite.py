"""python tests/faults/suite.py: faults by the hundred, goal by goal, and the page that says what came of them.

Each goal (`r*.py` beside this file) runs in a process of its own with a time limit. What is known is written as it
comes, so that a suite that is stopped keeps it, and `--goals` replaces single rows. Status 1 where anything is wrong.
`bash launch/faults.sh` prepares the environment first.
"""

import argparse
import collections
import contextlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import quick_compilation
from faults import page
from faults.goal import Outcome

HERE = Path(__file__).resolve().parent
LIMIT_SECONDS = 25 * 60  # of one goal
ENVIRONMENT = quick_compilation.DEFAULTS | {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
WRITE_SECONDS = 2.0  # between two writings of what is known
SHOWN_WRONG = 20  # cases of a goal that are told in full


def names() -> dict[str, str]:
    """Module names by the number of the goal ("R4"), in the order in which they run."""
    files = sorted(HERE.glob("r[0-9]*_*.py"), key=lambda path: (int(path.stem[1:].partition("_")[0]), path.stem))
    return {path.stem.partition("_")[0].upper(): path.stem for path in files}


def load(name: str) -> ModuleType:
    """A goal by the name of its module."""
    return importlib.import_module(f"faults.{name}")


def cases(goal: ModuleType, share: float) -> int:
    """How many of a goal's cases are drawn."""
    return max(1, round(goal.FULL * share))


class Tally:
    """What has come of one goal so far."""

    def __init__(self, goal: ModuleType, count: int, seed: int):
        self.known = {"number": goal.NUMBER, "title": goal.TITLE, "demand": goal.DEMAND, "full": goal.FULL}
        self.known |= {"count": count, "seed": seed}
        self.endings: collections.Counter[str] = collections.Counter()
        self.wrong: list[dict[str, str]] = []
        self.timed: list[float] = []
        self.done = self.wrong_count = 0

    def add(self, outcome: Outcome) -> None:
        """One more case."""
        self.done += 1
        self.endings[outcome.ended] += 1
        if outcome.seconds is not None:
            self.timed.append(outcome.seconds)
        if outcome.wrong:
            self.fail(outcome.what, outcome.ended, outcome.wrong)

    def fail(self, what: str, ended: str, wrong: str) -> None:
        """What should not be."""
        self.wrong_count += 1
        if len(self.wrong) < SHOWN_WRONG:
            self.wrong.append({"what": what, "ended": ended, "wrong": wrong})

    def row(self, seconds: float, complete: bool) -> dict:
        """As it is written down."""
        timed = sorted(self.timed)
        middle = {"median": timed[len(timed) // 2], "slowest": timed[-1]} if timed else None
        found = {"done": self.done, "right": max(0, self.done - self.wrong_count), "wrong_count": self.wrong_count}
        found |= {"wrong": self.wrong, "endings": dict(self.endings.most_common()), "timed": middle}
        return self.known | found | {"seconds": seconds, "complete": complete}


def run_goal(name: str, count: int, seed: int, limit: float, tell: Callable[[Tally, float], None]) -> dict:
    """The row of a goal that runs in a process of its own; `tell(tally, seconds)` after each case."""
    tally, start = Tally(load(name), count, seed), time.monotonic()
    command = [sys.executable, str(HERE / "suite.py"), f"--one={name}", f"--count={count}", f"--seed={seed}"]
    with tempfile.TemporaryDirectory(prefix=f"llada-{name}-") as folder, contextlib.ExitStack() as files:
        work, out, errors = (Path(folder) / part for part in ("work", "out", "errors"))
        work.mkdir()
        streams = {"stdout": files.enter_context(out.open("wb")), "stderr": files.enter_context(errors.open("wb"))}
        process = subprocess.Popen([*command, f"--folder={work}"], **streams, start_new_session=True)
        late, lines = False, files.enter_context(out.open("rb"))
        try:
            while True:
                ended = process.poll() is not None
                for line in _complete(lines):
                    tally.add(Outcome(**json.loads(line)))
                tell(tally, time.monotonic() - start)
                late = time.monotonic() - start > limit
                if ended or late:
                    break
                time.sleep(0.1)
        finally:
            _end(process)
        seconds = time.monotonic() - start
        if late:
            tally.fail("the goal itself", "late", f"not done after {limit:.0f} s: {tally.done} of {count} cases")
        elif process.returncode or tally.done < count:
            said = errors.read_text(errors="replace")[-4000:]
            tally.fail("the goal itself", f"status {process.returncode}", said or "too few cases")
    return tally.row(seconds, not late and process.returncode == 0 and tally.done >= count)


def _complete(lines: BinaryIO) -> Iterator[bytes]:
    """The lines that have been written completely since the last look."""
    while (at := lines.tell(), line := lines.readline())[1].endswith(b"\n"):
        yield line
    lines.seek(at)


def _end(process: subprocess.Popen) -> None:
    """End a goal and the processes that it has started, if there are any left."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_one(options: argparse.Namespace) -> int:
    """In the process of a goal: a JSON line for each outcome."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what it has started is ended
    for number in (signal.SIGINT, signal.SIGHUP):  # nohup ignores them, and what a goal starts would, too
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    lines, sys.stdout = sys.stdout, sys.stderr  # what JAX or a command prints is no outcome
    for outcome in load(options.one).outcomes(options.count, options.seed, Path(options.folder)):
        print(json.dumps(outcome._asdict()), file=lines, flush=True)
    return 0


def run_all(options: argparse.Namespace) -> int:
    """Run the goals and write the page; the exit status."""
    chosen = names()
    if options.goals:
        unknown = [number for number in options.goals.upper().split(",") if number not in chosen]
        if unknown:
            return _mistake(f"--goals={options.goals}: there is no {unknown[0]}; goals: {', '.join(chosen)}")
        chosen = {number: chosen[number] for number in options.goals.upper().split(",")}
    if not 0 < options.share <= 1:
        return _mistake(f"--share={options.share} must be above 0 and at most 1")
    out = Path(options.out)
    if not out.parent.is_dir():
        return _mistake(f"--out={out}: there is no directory {out.parent}")
    cache = tempfile.mkdtemp(prefix="llada-compiled-")  # for all goals, and for nobody else
    os.environ.update(ENVIRONMENT | os.environ | {"JAX_COMPILATION_CACHE_DIR": cache})
    kept, bad = page.read(out.with_suffix(".json")), []
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and end the goal
    try:
        for i, (number, name) in enumerate(chosen.items()):
            count = cases(load(name), options.share)
            print(f"{number} {load(name).TITLE}: {count} cases ({i + 1} of {len(chosen)} goals)", flush=True)
            kept[number] = _row(name, count, options, Teller(number, count, kept, out, options))
            bad += [number] * bool(kept[number]["wrong_count"])
            page.write(out, kept)
    except KeyboardInterrupt:
        print(f"stopped; what is known is in {out}")
        return 128 + signal.SIGINT
    finally:
        shutil.rmtree(cache, ignore_errors=True)
        signal.signal(signal.SIGTERM, before)
    print(f"{len(chosen) - len(bad)} of {len(chosen)} goals reached; {out}" + f"; wrong: {', '.join(bad)}" * bool(bad))
    return int(bool(bad))


def _row(name: str, count: int, options: argparse.Namespace, teller: "Teller") -> dict:
    row = run_goal(name, count, options.seed, options.limit, teller)
    print(f"   {row['right']} of {count} right in {row['seconds']:.0f} s", flush=True)
    for wrong in row["wrong"]:
        print(f"   {wrong['what']}: {wrong['ended']}\n{wrong['wrong']}", flush=True)
    return row | teller.where


class Teller:
    """Prints how far a goal is, and writes down what is known."""

    def __init__(self, number: str, count: int, kept: dict, out: Path, options: argparse.Namespace):
        self.number, self.count, self.kept, self.out = number, count, kept, out
        self.where = page.where() | {"command": command_of(number, options)}
        self.told, self.printed = time.monotonic(), 0

    def __call__(self, tally: Tally, seconds: float) -> None:
        """After a look at what there is."""
        now = time.monotonic()
        if not tally.done or now - self.told < WRITE_SECONDS or tally.done == self.printed:
            return
        self.told, self.printed = now, tally.done
        left = seconds / tally.done * max(0, self.count - tally.done)
        wrong = f", {tally.wrong_count} WRONG" if tally.wrong_count else ""
        line = f"   {self.number} {tally.done} of {self.count}{wrong}, {seconds:.0f} s, about {left:.0f} s left"
        print(line, flush=True)
        page.write(self.out, self.kept | {self.number: tally.row(seconds, False) | self.where})


def command_of(number: str, options: argparse.Namespace) -> str:
    """What repeats a row."""
    share = f" --share={options.share:g}" if options.share != 1 else ""
    return f"bash launch/faults.sh --goals={number}{share} --seed={options.seed}"


def _mistake(line: str) -> int:
    print(f"faults: {line}", file=sys.stderr)
    return 2


def main() -> int:
    """Run goals, or one as their child; status 1 where anything is wrong, 2 for a mistake in the flags."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--goals", default="", help="such as R1,R4; default: all")
    flags.add_argument("--share", type=float, default=1.0, help="of each goal's cases")
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--out", default="docs/reliability.md", help="the page; its figures lie beside it as JSON")
    flags.add_argument("--limit", type=float, default=LIMIT_SECONDS, help="seconds that a goal may take")
    for name in ("one", "count", "folder"):
        flags.add_argument(f"--{name}", type=int if name == "count" else str, help=argparse.SUPPRESS)
    options = flags.parse_args()
    return run_one(options) if options.one else run_all(options)


if __name__ == "__main__":
    sys.exit(main())
