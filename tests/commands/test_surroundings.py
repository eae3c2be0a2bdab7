"""The program in a bad environment: closed streams, no home, full disks, Ctrl-C at any time, harmful variables."""

import errno
import os
import signal
import subprocess
import sys
import time

import jax
import pytest

import llada
from llada.commands import endings, environment, program, progress
from llada.errors import DataError, DiskError, UserError

PROGRAM = f"{sys.executable} -m llada"


def shell(line: str, **environment: str) -> subprocess.CompletedProcess:
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "LC_"))}
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=plain | environment, timeout=60)


# The shell command, its status, and the number of lines on standard error.
UNREAD = "{llada} train --help_config | true; exit ${{PIPESTATUS[0]}}"
SURROUNDINGS = {
    "nothing open": ("{llada} --version <&- >&- 2>&-", 0, 0),
    "no standard error": ("{llada} trian 2>&-", 2, 0),
    "no standard output": ("{llada} train --help_config >&-", 0, 0),
    "nobody reads": (UNREAD, 141, 0),
    "nobody reads what comes at once": (f"PYTHONUNBUFFERED=1 {UNREAD}", 141, 0),
    "nobody reads anything": ("({llada} trian; echo $? > {tmp}/status) 2>&1 | true; exit $(cat {tmp}/status)", 141, 0),
    "a full disk": ("{llada} --version > /dev/full", 5, 1),
    "no home": ("env -u HOME -u XDG_CACHE_HOME {llada} trian", 2, 1),
    "ASCII": ("PYTHONIOENCODING=ascii {llada} träin", 2, 1),
    "an ASCII locale": ("LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 {llada} träin", 2, 1),
    "no terminal to speak of": ("TERM=dumb NO_COLOR=1 {llada} trian < /dev/null", 2, 1),
}


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_it_ends_as_it_should_wherever_it_stands(name, tmp_path):
    line, status, lines = SURROUNDINGS[name]
    done = shell(line.format(llada=PROGRAM, tmp=tmp_path))
    assert done.returncode == status and len(done.stderr.splitlines()) == lines, done
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr, done.stderr


INTERRUPTED = {
    "an import": "import slow",
    "a callback of the garbage collector": "gc.callbacks.append(wait); gc.collect(); time.sleep(20)",
    "a finalizer": "Finalized(); time.sleep(20)",
    "work": "print('ready', flush=True); time.sleep(20)",
    "a long call into C": "print('ready', flush=True); __import__('hashlib').pbkdf2_hmac('sha256', b'', b'', 10**9)",
}
HEARD = """
import gc, sys, time
from llada.commands import endings

def wait(*arguments):
    gc.callbacks.clear()
    print("ready", flush=True)
    time.sleep(1)

class Finalized:
    __del__ = wait

def main():
    sys.path.insert(0, sys.argv[1])
    {}

sys.exit(endings.run(main))
"""


STOPS = [(during, number) for during in INTERRUPTED for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
for number in (signal.SIGINT, signal.SIGHUP):  # Ctrl-C waits: a chat takes it for an end of its answer
    STOPS.remove(("a long call into C", number))


@pytest.mark.parametrize(("during", "number"), STOPS)
def test_a_signal_is_heard_once_and_ends_in_one_line(during, number, tmp_path):
    """Out of C, where Python runs no handler, it is a thread that ends the process."""
    (tmp_path / "slow.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(20)\n")
    command = [sys.executable, "-c", HEARD.format(INTERRUPTED[during]), tmp_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        start = time.monotonic()
        _, said = process.communicate(timeout=120)
    line = "interrupted" if number == signal.SIGINT else f"stopped by {number.name}"
    assert (process.returncode, said) == (128 + number, f"llada: {line}\n")
    assert time.monotonic() - start < 10


def test_signals_that_were_ignored_stay_so(tmp_path):
    """As under nohup, and with `&` in a script."""
    body = "import os, signal; [os.kill(os.getpid(), n) for n in (1, 2)]; print(*map(signal.getsignal, (1, 2)))"
    script = tmp_path / "ignored.py"
    script.write_text(HEARD.format(body))
    done = shell(f"trap '' INT HUP; {sys.executable} {script} {tmp_path}")
    assert (done.returncode, done.stdout, done.stderr) == (0, "1 1\n", "")


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except type(error) as caught:
        return caught


KNOWN = {
    UserError: UserError("a"),
    DataError: DataError("a"),
    DiskError: OSError(errno.ENOSPC, "No space left on device", "/x"),
    "disk, told by a library": ValueError("DATA_LOSS: write: No space left on device [OS error 28]"),
    "permission": PermissionError(errno.EACCES, "Permission denied", "/x/y"),
    "read-only": OSError(errno.EROFS, "Read-only file system", "/x/y"),
    "a directory": IsADirectoryError(errno.EISDIR, "Is a directory", "/x/y"),
    "links in a circle": OSError(errno.ELOOP, "Too many levels of symbolic links", "/x/y"),
    "open files": OSError(errno.EMFILE, "Too many open files", "/x/y"),
    "memory": MemoryError(),
}
BUGS = [ValueError("a"), KeyError("a"), AssertionError(), FileNotFoundError(2, "No such file", "/x"), OSError("a")]


@pytest.mark.parametrize("kind", [UserError, DataError, DiskError])
def test_a_command_ends_with_the_status_of_its_error(kind, monkeypatch, capsys):
    def fail(*_):
        raise kind("a\nline")

    monkeypatch.setattr(program, "_call", fail)
    monkeypatch.setattr(program.importlib, "import_module", lambda name: None)
    assert program.main(["train"]) == kind.status
    assert capsys.readouterr().err == "llada train: a line\n"


def test_what_someone_can_put_right_is_known_and_bugs_are_not():
    statuses = {name: endings.as_user_error(raised(error), "llada ran").status for name, error in KNOWN.items()}
    assert {statuses[UserError], statuses["permission"], statuses["memory"]} == {2}
    assert (statuses[DataError], statuses[DiskError], statuses["disk, told by a library"]) == (4, 5, 5)
    assert "/x/y: Permission denied" in str(endings.as_user_error(KNOWN["permission"], ""))
    assert "ulimit -n" in str(endings.as_user_error(KNOWN["open files"], ""))
    for error in [*BUGS, BrokenPipeError(errno.EPIPE, "Broken pipe")]:
        assert endings.as_user_error(raised(error), "llada ran") is None, error


def test_a_device_that_is_not_there_is_named(monkeypatch):
    from jax._src import xla_bridge

    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(RuntimeError) as failure:
        exec(compile("raise RuntimeError('no such backend')", xla_bridge.__file__, "exec"))
    assert "JAX_PLATFORMS=cuda" in str(endings.as_user_error(failure.value, ""))


def test_a_variable_that_jax_does_not_take_gets_one_line():
    from jax._src import config

    for line in ("raise ValueError('invalid truth value')", "def f(): raise ValueError('invalid truth value')\nf()"):
        with pytest.raises(ValueError, match="truth") as failure:
            exec(compile(line, config.__file__, "exec"))
        assert "JAX_... variable that JAX does not take (invalid truth value)" in str(
            endings.as_user_error(failure.value, "")
        )
    with pytest.raises(AttributeError) as failure:
        jax.config.update("jax_no_such", 3)
    assert endings.as_user_error(failure.value, "") is None
    with pytest.raises(ValueError, match="banana") as failure:
        jax.config.update("jax_default_matmul_precision", "banana")
    assert endings.as_user_error(failure.value, "") is None, "a mistake of ours"


def test_variables_that_would_change_figures_are_ignored_in_one_line_each(monkeypatch, capsys):
    changed = {"JAX_ENABLE_X64": "1", "JAX_DEFAULT_PRNG_IMPL": "rbg", "JAX_DISABLE_JIT": "True"}
    for name, value in (changed | {"JAX_RANDOM_SEED_OFFSET": "0", "JAX_DEBUG_NANS": "1"}).items():
        monkeypatch.setenv(name, value)
    environment.pin_jax_settings()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and all(f"{name}={value} is ignored" in "".join(said) for name, value in changed.items())
    assert not set(changed) & set(os.environ) and os.environ["JAX_DEBUG_NANS"] == "1"


def test_a_notebook_whose_jax_computes_otherwise_is_told(monkeypatch):
    before = jax.config.jax_random_seed_offset
    try:
        jax.config.update("jax_random_seed_offset", 3)
        with pytest.raises(UserError, match=r"jax_random_seed_offset=3.*jax\.config\.update"):
            llada.load("nowhere")
    finally:
        jax.config.update("jax_random_seed_offset", before)


@pytest.mark.parametrize("place", ["file", "/proc/none", "no home", "full", "relative"])
def test_where_compiled_programs_cannot_be_kept_one_line_says_so(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", {"file": str(tmp_path / "f"), "full": str(tmp_path)}.get(place, place))
    (tmp_path / "f").write_text("")
    if place == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(environment.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    if place == "full":
        monkeypatch.setattr(environment, "_LEAST_FREE_BYTES", 1 << 62)
    environment.use_compilation_cache()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == ""
    (said,) = capsys.readouterr().err.splitlines()
    assert "compiled programs are not cached" in said
    environment.use_compilation_cache()  # as one whose variable says: keep none
    assert capsys.readouterr().err == ""


def test_compiled_programs_do_not_grow_without_end(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(environment, "_MOST_BYTES", 1000)
    kept = tmp_path / "llada" / "compiled"
    kept.mkdir(parents=True)
    for age in range(12):
        (kept / f"{age:02}").write_bytes(bytes(100))
        os.utime(kept / f"{age:02}", (1e9 - age, 1e9 - age))
    environment.use_compilation_cache()
    assert sorted(os.listdir(kept)) == [f"{age:02}" for age in range(7)]  # the seven used last
    environment.use_compilation_cache()
    assert len(os.listdir(kept)) == 7


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_told_in_lines_where_nothing_can_be_drawn(terminal, monkeypatch, capfd):
    monkeypatch.setattr(progress, "_QUIET_SECONDS", 0)
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with progress.bar("weights exported") as show:
        show(1, 4)
        show(4, 4)
    with progress.line() as line:
        line.now("compiling")
        line.done("first")
    assert capfd.readouterr().err.splitlines() == ["weights exported: 25%", "weights exported: 100%", "first"]


def test_causes_in_a_circle_are_looked_at_once():
    error, cause = ValueError("a"), BrokenPipeError(errno.EPIPE, "Broken pipe")
    error.__cause__, cause.__context__ = cause, error
    assert endings.as_user_error(error, "llada ran") is None
