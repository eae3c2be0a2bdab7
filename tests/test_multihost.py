"""Real processes on this machine, each with some of eight pretended devices: `llada train`, by multihost_process.py.

The runs are shared: one is stopped by a signal to its second process and continued by other numbers of processes, and
ends like runs that nobody stopped.
"""

import dataclasses
import json
import os
import signal
import socket
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from faults.forking import Forks

from llada import jax_internals, processes
from llada import mesh as mesh_lib
from llada.config import load
from llada.errors import PeerLost, UserError
from llada.training import metrics, resuming
from llada.training.checkpoint import Checkpoints

STEPS = 50
# What one run compiles the next need not.
CACHE = {
    "JAX_COMPILATION_CACHE_DIR": tempfile.mkdtemp(prefix="llada-compiled-"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
}
CLOCK = ("speed/tokens_per_second", "time/seconds")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def slurm(i: int, count: int) -> dict[str, str]:
    """What a task of a Slurm step finds."""
    step = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": str(count)}
    return step | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}


def tpu_slices(i: int, count: int) -> dict[str, str]:
    """What a host of TPU slices finds, each a slice: on GKE, and in the metadata of queued resources."""
    slices = {"MEGASCALE_NUM_SLICES": str(count), "MEGASCALE_SLICE_ID": str(i)}
    here = {"TPU_HOST": "1", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "127.0.0.1", "TPU_WORKER_ID": "0"}
    return slices | here | {"MEGASCALE_COORDINATOR_ADDRESS": "127.0.0.1:8080"}


@pytest.fixture(scope="module")
def forks():
    """What starts processes that have imported all they need."""
    search = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = CACHE | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": search}
    with Forks(environment, "multihost_process") as started:
        yield started


class Launched:
    """`count` processes of `devices` devices each, told of each other by flags, or by what a cluster sets."""

    def __init__(self, forks, log: Path, count: int, devices: int, *arguments, cluster=None, only_of=None):
        self.processes = []
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
        port = free_port()
        for i in range(count):
            environment = {"XLA_FLAGS": flags, "MASKS": f"{log}.masks"}
            command = ["train", *arguments, *(only_of or {}).get(i, [])]
            if cluster:
                environment |= cluster(i, count) | {"JAX_COORDINATOR_PORT": str(port)}
            elif count > 1:
                command += [f"--coordinator=127.0.0.1:{port}", f"--processes={count}", f"--process_id={i}"]
            self.processes.append(forks.start(command, log.with_name(f"{log.name}.{i}.log"), environment))

    def wait(self) -> list[int]:
        """The exit statuses."""
        return [process.wait() for process in self.processes]

    def said(self) -> list[str]:
        return [process.said() for process in self.processes]

    def until(self, path: Path) -> None:
        """Wait for a file of a run that does not end by itself."""
        assert self.processes[0].until(path.exists), self.said()

    def finish(self) -> list[str]:
        """What they said, after they all ended well."""
        statuses = self.wait()
        assert set(statuses) == {0}, (statuses, [text[-2000:] for text in self.said()])
        return self.said()


@pytest.fixture(scope="module")
def experiment(tiny, tmp_path_factory):
    """An experiment file; its learning rate does not depend on the number of steps."""
    changes = {"optimizer.schedule": "0:0 2048:1", "train.log_every": 1, "evaluate.every": 0, "checkpoint.every": 1000}
    tree = json.dumps(dataclasses.asdict(tiny("llada", changes | {"train.steps": STEPS})))
    path = tmp_path_factory.mktemp("experiment") / "experiment.py"
    path.write_text(f"import json\n\ndef get_config():\n    return json.loads({tree!r})\n")
    return path


@pytest.fixture(scope="module")
def runs(forks, experiment, tmp_path_factory):
    """Work directories by name, all of as many steps, and what the processes said."""
    folder = tmp_path_factory.mktemp("runs")

    def start(name, count, devices, steps, *more):
        arguments = (f"--config={experiment}", f"--workdir={folder / name}", f"--config.train.steps={steps}", *more)
        return Launched(forks, folder / f"{name}-{steps}", count, devices, *arguments)

    stopped = start("stopped", 2, 4, 1_000_000, "--config.checkpoint.every=10")
    stopped.until(folder / "stopped" / "checkpoints" / "30")
    stopped.processes[1].send_signal(signal.SIGTERM)
    statuses = stopped.wait()
    checkpoints = Checkpoints(folder / "stopped")
    at = checkpoints.latest()
    checkpoints.close()
    steps = max(STEPS, at + 10)

    said = {name: start(name, *sizes, steps).finish() for name, sizes in {"stopped": (4, 2), "2 x 4": (2, 4)}.items()}
    said["1 x 1"] = start("1 x 1", 1, 1, steps).finish()
    return SimpleNamespace(folder=folder, steps=steps, at=at, statuses=statuses, stopped=stopped.said(), said=said)


def state(workdir: Path, step: int):
    checkpoints = Checkpoints(workdir)
    mesh = mesh_lib.make(mesh_lib.MeshConfig())
    restored, cursor = resuming.restore_state(checkpoints, load(workdir / "config.json"), mesh, step)
    checkpoints.close()
    return jax.tree.map(np.asarray, restored), cursor


def record(workdir: Path) -> list[dict]:
    lines = metrics.read(workdir / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]


def column(workdir: Path, name: str) -> list[float]:
    return [line[f"train/{name}"] for line in record(workdir) if f"train/{name}" in line]


def test_a_signal_to_one_process_stops_all_after_saving_the_same_step(runs):
    assert runs.statuses == [143, 143]
    assert runs.at >= 30
    first, second = runs.stopped
    assert f"stopped by SIGTERM after step {runs.at}; run again to continue" in first
    assert "finishing this step and saving" in second and "stopped by" not in second


def test_two_by_four_stopped_and_continued_as_four_by_two_ends_with_the_bits_of_two_by_four(runs):
    """Eight devices reduce in the same order, however many processes they belong to."""
    (a, cursor_a), (b, cursor_b) = (state(runs.folder / name, runs.steps) for name in ("stopped", "2 x 4"))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert cursor_a["rows_digest"] == cursor_b["rows_digest"] != ""
    assert record(runs.folder / "stopped") == record(runs.folder / "2 x 4")
    assert f"continuing from step {runs.at}" in runs.said["stopped"][0]


@pytest.mark.parametrize("name", ["2 x 4", "stopped"])
def test_rows_and_masks_are_those_of_one_device_and_the_loss_agrees(runs, name):
    here, one = runs.folder / name, runs.folder / "1 x 1"
    summary, expected = (json.loads((folder / "summary.json").read_text()) for folder in (here, one))
    for key in ("rows_digest", "eval_rows_digest", "corpus_digest", "tokenizer_sha256", "tokens", "step"):
        assert summary[key] == expected[key], key
    assert column(here, "head_fraction") == column(one, "head_fraction")  # how many tokens were masked, step by step
    assert len(column(here, "head_fraction")) == runs.steps
    losses, reference = (column(folder, "loss_nats_per_token") for folder in (here, one))
    assert losses[:20] == pytest.approx(reference[:20], rel=1e-5)
    assert losses[:STEPS] == pytest.approx(reference[:STEPS], rel=5e-5)  # training amplifies what rounding begins
    assert summary["eval_nats_per_token"] == pytest.approx(expected["eval_nats_per_token"], rel=1e-4)


@pytest.mark.parametrize("name", ["2 x 4", "stopped"])
def test_times_lengths_and_masks_have_the_same_bits_wherever_they_are_drawn(runs, name):
    here, one = (masks(runs.folder / f"{run}-{runs.steps}.masks") for run in (name, "1 x 1"))
    assert len(one) == 3 * 8 and len(set(one.values())) == len(one)
    assert here == one


def masks(path: Path) -> dict[str, str]:
    """Digests by step and sequence, of all processes; where several hold a sequence they agree."""
    found = {}
    for part in path.parent.glob(f"{path.name}.*"):
        for sequence, digest in json.loads(part.read_text()).items():
            assert found.setdefault(sequence, digest) == digest
    return found


def test_only_the_first_process_speaks_and_writes(runs):
    for name in ("2 x 4", "stopped"):
        first, *others = runs.said[name]
        assert '"train_nats_per_token"' in first and f"step {runs.steps}/{runs.steps}" in first
        assert not [text for text in others if "step" in text or "nats" in text]
    assert ", 4 processes" in runs.said["stopped"][0]
    assert len(list((runs.folder / "2 x 4").glob("events.out.tfevents.*"))) == 1
    assert not list((runs.folder / "2 x 4").glob(".seen-by-all*"))


def test_another_number_of_processes_continues_from_what_was_saved(forks, runs, experiment):
    """2 x 4, 4 x 2, then 1 x 8: sums are rounded in another order there, so the last steps agree and no more."""
    workdir, steps = runs.folder / "stopped", runs.steps + 2
    flags = (f"--config={experiment}", f"--workdir={workdir}", f"--config.train.steps={steps}")
    said = Launched(forks, runs.folder / "more", 1, 8, *flags).finish()
    assert f"continuing from step {runs.steps}" in said[0]
    assert len(column(workdir, "loss_nats_per_token")) == steps
    assert np.isfinite(column(workdir, "loss_nats_per_token")).all()


@pytest.mark.parametrize(("victim", "number"), [(0, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_a_process_that_dies_or_hangs_ends_the_others_soon(forks, experiment, tmp_path, victim, number):
    """With a status of its own; and what a process that waits in C was doing is written down."""
    flags = ("--config.train.steps=1000000", "--config.checkpoint.every=10")
    pair = Launched(forks, tmp_path / "pair", 2, 1, f"--config={experiment}", f"--workdir={tmp_path / 'run'}", *flags)
    pair.until(tmp_path / "run" / "checkpoints" / "10")
    pair.processes[victim].send_signal(number)
    start = time.monotonic()
    try:
        assert pair.processes[1 - victim].wait() == PeerLost.status, pair.said()
    finally:
        for process in pair.processes:
            process.send_signal(signal.SIGKILL)
    assert time.monotonic() - start < 15 + 5  # the machine may be busy
    said = pair.said()[1 - victim]
    assert "another process" in said or "(most recent call first)" in said, said


@pytest.fixture(scope="module")
def refused(forks, experiment, tmp_path_factory):
    """Two pairs of processes that must not train."""
    folder = tmp_path_factory.mktemp("refused")
    config, workdir = f"--config={experiment}", f"--workdir={folder / 'run'}"
    each = {i: [f"--workdir={folder / str(i)}"] for i in range(2)}
    launched = {
        "unshared": Launched(forks, folder / "unshared", 2, 1, config, only_of=each, cluster=tpu_slices),
        "no corpus": Launched(
            forks, folder / "none", 2, 4, config, workdir, f"--config.data.source=text:{folder}/*.txt", cluster=slurm
        ),
    }
    for pair in launched.values():
        assert pair.wait() == [2, 2], pair.said()
    assert not list(folder.rglob(".seen-by-all*"))
    return {name: pair.said() for name, pair in launched.items()}


def test_a_mistake_that_the_first_process_meets_ends_all(refused):
    """Found by process 0 alone, while the others wait for the corpus; the processes find each other as under Slurm."""
    for text, words in zip(refused["no corpus"], ("llada train: ", "llada train: process 0: "), strict=True):
        assert "Traceback" not in text
        assert text.splitlines()[-1].startswith(f"{words}no file matches"), text


def test_a_workdir_that_is_not_shared_is_refused_by_all(refused):
    """Process 1 has a directory of its own; the processes find each other as two TPU slices of one host would."""
    for text in refused["unshared"]:
        assert "does not see what process 0 writes to --workdir=" in text.splitlines()[-1], text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("10.0.0.1:8476", None, None), "--processes and --process_id missing: --coordinator=HOST:PORT"),
        ((None, 2, None), "--coordinator and --process_id missing"),
        ((None, None, 0), "--coordinator and --processes missing"),
        (("10.0.0.1:8476", 2, 2), r"--process_id=2 must be one of 0\.\.1 for --processes=2"),
        (("10.0.0.1:8476", 2, -1), "--process_id=-1 must be one of"),
        (("10.0.0.1:8476", 0, 0), "--processes=0 must be at least 1"),
        (("10.0.0.1", 2, 0), "--coordinator=10.0.0.1 must be HOST:PORT"),
        (("host:http", 2, 0), "--coordinator=host:http must be HOST:PORT"),
        (("host:70000", 2, 0), "must be HOST:PORT"),
    ],
)
def test_nonsense_is_explained(arguments, words):
    with pytest.raises(UserError, match=words):
        processes.start(*arguments)


def test_a_coordinator_that_is_not_there_is_explained(monkeypatch):
    monkeypatch.setattr(processes, "_CONNECT_SECONDS", 0.3)
    with pytest.raises(PeerLost, match="nobody listens at --coordinator=127.0.0.1:.*start --process_id=0 on that host"):
        processes.start(f"127.0.0.1:{free_port()}", 2, 1)


def test_one_process_joins_nobody(monkeypatch):
    for name in list(os.environ):
        if name.startswith(processes._LAUNCHERS):
            monkeypatch.delenv(name)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: pytest.fail("joined"))
    processes.start()
    processes.start(processes=1)
    processes.start("localhost:1", 1, 0)
    monkeypatch.setenv("SLURM_JOB_ID", "1")  # an allocation, but not a step of several tasks
    processes.start()
    assert processes.count() == 1 and processes.is_first()
    assert processes.gather({"a": 1}) == [{"a": 1}]


@pytest.mark.parametrize(
    ("hosts", "slices", "count"), [("10.0.0.1", 1, 1), ("10.0.0.1,10.0.0.2", 1, 2), ("10.0.0.1,10.0.0.2", 3, 6)]
)
def test_a_tpu_pod_is_recognised_by_its_workers(monkeypatch, hosts, slices, count):
    from jax._src.clusters import cloud_tpu_cluster

    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", hosts)
    monkeypatch.setenv("MEGASCALE_NUM_SLICES", str(slices))
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: joined.append(arguments))
    assert jax_internals.detect_cluster().size == count
    processes.start()
    assert len(joined) == (count > 1)
    assert not joined or joined[0]["coordinator_address"] is None  # JAX asks the metadata itself
