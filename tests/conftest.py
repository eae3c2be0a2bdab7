"""Shared by all tests: exact float32 products, a tiny corpus, and one trained run of each family.

GPUs and TPUs otherwise round float32 operands to fewer bits, and one tolerance would not hold everywhere.
"""

import atexit
import gc
import os
import random
import shutil
import signal
import tempfile
from pathlib import Path
from types import SimpleNamespace

import quick_compilation

# The same step is built by many tests, and by processes that they start, and compiled by one: pytest's workers share
# the place that the process which starts them has made.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="llada-compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.update(quick_compilation.DEFAULTS | os.environ)

import jax
import pytest
from marks import FILES, LONGEST

from llada.config import default_config, from_config_dict
from llada.evaluation import by_time, validation
from llada.training import loop, step

jax.config.update("jax_default_matmul_precision", "highest")
# x_BL + y_B is a mistake more often than it is meant: where ranks differ, the code says which axis is added.
jax.config.update("jax_numpy_rank_promotion", "raise")
# Tracing makes many objects and little garbage: looking for it took a twentieth of the time.
gc.set_threshold(100_000, 50, 100)


HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items):
    """Markers, and long files first, the others as they come; launch/test.sh keeps that order."""
    for item in items:
        file = item.path.relative_to(HERE).as_posix()
        for marker, files in FILES.items():
            if file in files:
                item.add_marker(marker)
        if "libtpu" in getattr(item, "fixturenames", ()):
            item.add_marker("tpu")
        if file in LONGEST and not item.get_closest_marker("fast"):
            item.add_marker("slow")
    rank = {HERE / name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """A file that skips itself, for want of an extra, fails under launch/test.sh: it has installed them all."""
    report = yield
    if report.skipped and os.environ.get("LLADA_TEST_EXTRAS") == "required":
        reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome, report.longrepr = "failed", f"{collector.nodeid}: {reason}; LLADA_TEST_EXTRAS=required"
    return report


def hear_signals():
    """What is started by nohup, or in the background, ignores these; so does what a command ran in, once it is done.

    All that a test starts, and sends them to, would, too.
    """
    usual = {signal.SIGHUP: signal.SIG_DFL, signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    for number, handler in usual.items():
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


hear_signals()


@pytest.fixture(autouse=True)
def handlers():
    """Signals are heard before a test and after it: what it starts would inherit that they are ignored."""
    hear_signals()
    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        if signal.getsignal(number) is not handler and handler is not None:
            signal.signal(number, handler)


@pytest.fixture(scope="module", autouse=True)
def not_too_many_programs():
    """Files share compiled programs until they are too many: each is mapped memory, and a process has 65,530 maps."""
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()


@pytest.fixture
def fresh_programs():
    """A test that changes what is traced takes this, and calls it after each change: programs are shared by config."""
    shared = (step._compiled_init, step._abstract_state, step._compiled_step, validation._jitted, by_time._compiled)

    def forget():
        for cached in shared:
            cached.cache_clear()

    forget()
    yield forget
    forget()


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """No network, whatever this machine has, and caches of Hugging Face in a temporary directory."""
    home = str(tmp_path_factory.mktemp("huggingface"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": home}.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """40 documents of made-up sentences: enough for some 500 rows of 32 tokens."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    nouns, verbs = "cat dog bird fish tree stone river cloud".split(), "sees hears likes follows finds".split()
    for i in range(40):
        sentences = [f"the {rng.choice(nouns)} {rng.choice(verbs)} the {rng.choice(nouns)} .\n" for _ in range(60)]
        (folder / f"{i:02}.txt").write_text(f"chapter {i}\n" + "".join(sentences))
    return folder


@pytest.fixture(scope="session")
def tiny(corpus):
    """`tiny(family, {"model.layers": 3})`: a checked Config of 12 steps, seconds to train."""

    def build(family: str, changes: dict | None = None):
        c = default_config()
        c.model.update(dict(layers=2, width=32, heads=2, ffn=48, vocab_size=320, max_length=32, dtype="float32"))
        c.data.update(dict(source=f"text:{corpus}/*.txt", sequence_length=32, holdout_fraction=0.2))
        if family == "arm":
            c.objective.name, c.model.causal, c.objective.random_length_fraction = "autoregressive", True, 0.0
        else:
            c.objective.random_length_fraction = 0.25  # often enough to matter in twelve steps
        c.optimizer.peak_learning_rate = 1e-2
        c.train.update(dict(batch_size=8, steps=12, log_every=3))
        c.evaluate.update(dict(every=6, batches=2, draws=2))
        c.checkpoint.update(dict(every=4, keep=3))
        for key, value in (changes or {}).items():
            group, name = key.split(".")
            c[group][name] = value
        return from_config_dict(c)

    return build


@pytest.fixture(scope="session")
def trained(tiny, tmp_path_factory):
    """`trained["llada"]`, `trained["arm"]`: workdir and summary of an uninterrupted run, to be read only.

    A test that writes into one copies it first; `trained_runs_are_only_read` holds it to that.
    """
    runs = {}
    for family in ("llada", "arm"):
        workdir = tmp_path_factory.mktemp("runs") / family
        runs[family] = SimpleNamespace(workdir=workdir, summary=loop.train(tiny(family), workdir))
    return runs


@pytest.fixture(autouse=True)
def trained_runs_are_only_read(request):
    """A file that one test leaves in a shared run changes what another one finds, in some orders only."""
    if "trained" not in request.fixturenames:
        yield
        return
    workdirs = [run.workdir for run in request.getfixturevalue("trained").values()]

    def files():
        found = (path for workdir in workdirs for path in workdir.rglob("*"))
        return {str(path): path.stat().st_mtime_ns for path in found if path.is_file() and path.name != ".lock"}

    before = files()
    yield
    after = files()
    changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    assert not changed, f"this test changed files of a shared run: {changed}"
