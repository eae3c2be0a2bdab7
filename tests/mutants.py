"""Semantic mutants: small wrong changes of src/llada, one at a time, each of which some test must notice.

    python tests/mutants.py [--only=NAME,...] [--jobs=1] [--list]

The table is mutants.txt. Works on a copy of the tree; the named tests first run on it as it is. Exit status 1
where a mutant survives that the table does not explain, or cannot be tried: its old text is not in its file exactly
once, or its tests fail without it. Takes about 15 s a mutant, and no part in CI.
"""

import argparse
import contextlib
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

ROOT = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_suffix(".txt")
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "runs", "build", "dist")
LONGEST = 600  # seconds that tests may take: a mutant may never end
STYLES = {"killed": "green", "explained": "yellow"}

stopping = threading.Event()
_running: set[subprocess.Popen] = set()


class Mutant(NamedTuple):
    """One wrong change: `new` in place of `old` in a file; `explained`: why it may survive, or ""."""

    name: str
    file: str
    tests: tuple[str, ...]
    harm: str
    explained: str
    old: str
    new: str


def table() -> list[Mutant]:
    """What mutants.txt says, which tells its own form."""
    found = []
    for entry in TABLE.read_text(encoding="utf-8").strip().split("\n\n"):
        if not entry.startswith("#"):
            head, harm, *lines = entry.split("\n")
            name, file, *tests = head.split()
            why, old, new = ("\n".join(line[len(mark) :] for line in lines if line.startswith(mark))
                             for mark in ("  = ", "-", "+"))  # fmt: skip
            found.append(Mutant(name, file, tuple(tests), harm.strip(), why, old, new))
    return found


def failure(tree: Path, tests: tuple[str, ...], compiled: Path) -> str | None:
    """Run tests in a copy of the tree: None where they pass, else the first that does not."""
    environment = os.environ | {
        "PYTHONPATH": str(tree / "src"),
        "JAX_PLATFORMS": "cpu",
        "OMP_NUM_THREADS": "1",
        # As one of several workers: conftest.py then leaves the place of compiled programs to whoever started it.
        "PYTEST_XDIST_WORKER": "mutants",
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "--no-header", "--tb=no", "-p", "no:cacheprovider"]
    command += [f"--basetemp={tree.parent / f'{tree.name}.tmp'}", *(f"tests/{test}" for test in tests)]
    process = subprocess.Popen(
        command, cwd=tree, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    _running.add(process)
    try:
        said, _ = process.communicate(timeout=LONGEST)
    except subprocess.TimeoutExpired:
        return f"no end within {LONGEST} s"
    finally:
        end(process)
        _running.discard(process)
    if process.returncode == 0:
        return None
    found = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", said, re.MULTILINE)
    return found[1] if found else f"status {process.returncode}: {' '.join(said.split())[-200:]}"


def end(process: subprocess.Popen) -> None:
    """Kill a process and all that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def mutated(tree: Path, mutant: Mutant) -> Iterator[None]:
    """The tree with one mutant in it, until the block ends."""
    path = tree / "src" / "llada" / mutant.file
    text = path.read_text(encoding="utf-8")

    def put(content: str) -> None:
        path.write_text(content, encoding="utf-8")
        # Python tells a changed file by its length and by whole seconds.
        for old in path.parent.glob(f"__pycache__/{path.stem}.*"):
            old.unlink()

    try:
        put(text.replace(mutant.old, mutant.new))
        yield
    finally:
        put(text)


def stale(mutant: Mutant, tree: Path = ROOT) -> str | None:
    """Why a mutant cannot be tried; None where it can."""
    path = tree / "src" / "llada" / mutant.file
    if not path.exists():
        return f"{mutant.file} is no more"
    count = path.read_text(encoding="utf-8").count(mutant.old)
    if count != 1:
        return f"{mutant.file} has its old text {count} times"
    missing = [test for test in mutant.tests if not _exists(tree / "tests", *test.split("::"))]
    return f"there is no tests/{missing[0]}" if missing else None


def _exists(tests: Path, file: str, function: str = "") -> bool:
    path = tests / file
    return path.exists() and (not function or f"def {function}(" in path.read_text(encoding="utf-8"))


class Trial:
    """Mutants tried by `jobs` workers, each with a tree of its own; `outcome` by name."""

    def __init__(self, mutants: list[Mutant], jobs: int, folder: Path, console: Console):
        self.mutants, self.folder, self.console = mutants, folder, console
        self.trees: queue.Queue[Path] = queue.Queue()
        for job in range(jobs):
            tree = folder / f"tree{job}"
            shutil.copytree(ROOT, tree, ignore=LEFT_OUT)
            self.trees.put(tree)
        self.jobs = jobs
        self.outcome: dict[str, str] = {}
        self.baseline: dict[str, str | None] = {}  # of tests on the tree as it is

    def with_tree(self, call, *arguments) -> None:
        """`call(tree, *arguments)` in the next tree that is free."""
        tree = self.trees.get()
        try:
            if not stopping.is_set():
                call(tree, *arguments)
        finally:
            self.trees.put(tree)

    def try_baseline(self, tree: Path, test: str) -> None:
        """What a test says of the tree as it is."""
        start = time.monotonic()
        failed = failure(tree, (test,), self.folder / "compiled")
        if stopping.is_set():
            return
        self.baseline[test] = failed
        verdict = "[green]pass[/]" if failed is None else f"[bold red]FAIL[/] at {escape(failed)}"
        self.console.print(f"{time.monotonic() - start:6.1f} s  unmutated {test}: {verdict}")

    def try_mutant(self, tree: Path, mutant: Mutant) -> None:
        """What the tests say of one mutant."""
        start = time.monotonic()
        if why := stale(mutant, tree):
            verdict, detail = "STALE", why
        elif failing := [test for test in mutant.tests if self.baseline[test]]:
            verdict, detail = "UNTRIED", f"{failing[0]} fails without it"
        else:
            with mutated(tree, mutant):
                killer = failure(tree, mutant.tests, self.folder / "compiled")
            if stopping.is_set():
                return
            verdict = "killed" if killer else "explained" if mutant.explained else "SURVIVED"
            detail = f"by {killer}" if killer else mutant.explained or f"harm: {mutant.harm}"
        self.outcome[mutant.name] = verdict
        self.console.print(
            f"{time.monotonic() - start:6.1f} s  [{STYLES.get(verdict, 'bold red')}]{verdict:<9}[/]  "
            f"{mutant.name:<4} {mutant.file}: {escape(detail)}"
        )

    def run(self, progress: Progress) -> None:
        """Baselines first, then mutants."""
        possible = [mutant for mutant in self.mutants if not stale(mutant, self.folder / "tree0")]
        tests = list(dict.fromkeys(test for mutant in possible for test in mutant.tests))
        for what, call, items in (
            ("unmutated", self.try_baseline, tests),
            ("mutants", self.try_mutant, self.mutants),
        ):
            task = progress.add_task(what, total=len(items))
            with ThreadPoolExecutor(self.jobs) as pool:
                for done in [pool.submit(self.with_tree, call, item) for item in items]:
                    while not stopping.is_set():
                        with contextlib.suppress(TimeoutError):
                            done.result(timeout=0.2)
                            progress.advance(task)
                            break
            progress.remove_task(task)
            if stopping.is_set():
                return


def stop(number, frame) -> None:
    """Let nothing begin, and end what runs."""
    stopping.set()
    for process in list(_running):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


def chosen(names: str | None) -> list[Mutant]:
    """The mutants asked for; SystemExit for a name that there is not."""
    by_name = {mutant.name: mutant for mutant in table()}
    if names is None:
        return list(by_name.values())
    wanted = names.split(",")
    if unknown := [name for name in wanted if name not in by_name]:
        sys.exit(f"--only={names}: there is no mutant {unknown[0]!r}; --list shows all")
    return [by_name[name] for name in wanted]


def main() -> int:
    """Parse, try, count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="names, separated by commas")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    parser.add_argument("--list", action="store_true", help="show the table and end")
    given = parser.parse_args()
    mutants = chosen(given.only)
    if given.jobs < 1:
        parser.error(f"--jobs={given.jobs} must be at least 1")
    console = Console(highlight=False, soft_wrap=True)
    if given.list:
        for mutant in mutants:
            why = stale(mutant)
            mark = f"  [bold red]STALE: {escape(why)}[/]" if why else ""
            console.print(f"{mutant.name:<4} {mutant.file}: {escape(mutant.harm)}{mark}")
        return 0
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="llada-mutants-", ignore_cleanup_errors=True) as folder:
        trial = Trial(mutants, given.jobs, Path(folder), console)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=console, transient=True) as progress:
            trial.run(progress)
    verdicts = list(trial.outcome.values())
    tried = sum(verdict not in ("STALE", "UNTRIED") for verdict in verdicts)
    rest = ", ".join(
        f"{count} {word.lower()} ({', '.join(n for n, v in trial.outcome.items() if v == word)})"
        for word in ("explained", "SURVIVED", "STALE", "UNTRIED")
        if (count := verdicts.count(word))
    )
    minutes = (time.monotonic() - start) / 60
    console.print(f"{verdicts.count('killed')} of {tried} killed{f'; {rest}' if rest else ''}; {minutes:.1f} minutes")
    if stopping.is_set():
        console.print(f"stopped: {len(mutants) - len(verdicts)} of {len(mutants)} were not tried")
        return 130
    return int(any(verdict in verdicts for verdict in ("SURVIVED", "STALE", "UNTRIED")))


if __name__ == "__main__":
    sys.exit(main())
