"""Several processes, one run: finding each other, agreeing on what is common, failing together.

A process is one Python on one host, with the devices it sees; all of them run the same command. Process 0 does what is
to be done once, the others wait. What they tell each other here goes through JAX's coordination service, not through
the devices: a collective would time out while process 0 tokenises a corpus. JAX is imported only where there may be
other processes; alone, everything here is a no-op.
"""

import contextlib
import importlib.util
import itertools
import json
import os
import secrets
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from llada.errors import KINDS, Interrupted, UserError

# Where none of these is set and there is no libtpu, no launcher that JAX knows has started us.
_LAUNCHERS = ("SLURM_", "OMPI_", "KUBERNETES_", "TPU_", "MEGASCALE_")
_HEARTBEAT_SECONDS = 30  # a process silent for so long is dead, and ends the others
_MEETING_SECONDS = 300  # how long to look for process 0
_SHUTDOWN_SECONDS = 60  # how long a process that has ended well waits for the others to do so
_POLL_MILLISECONDS = 5_000  # how long waiting keeps Python from handling a signal
_SHARED_SECONDS = 5  # a network file system may take a moment to show a new file to other hosts

_exchanges = itertools.count()  # the same on every process, because all make the same exchanges in the same order


def start(coordinator: str | None = None, processes: int | None = None, process_id: int | None = None) -> None:
    """Join the other processes, before anything touches a device: as told, or as JAX finds them (Slurm, TPU pod, ...).

    Nothing happens where there are none, or where they are joined already. UserError for impossible arguments, and
    where the others cannot be found.
    """
    _check(coordinator, processes, process_id)
    if processes == 1 or not (processes or _launched()):
        return
    import jax

    if jax.distributed.is_initialized():
        return
    if processes is None:
        found = _cluster()
        if found.size == 1:
            return
        _say_who_waits(found)
    # Its C++ handler would take SIGTERM from us before and after training; see training/stopping.py.
    jax.config.update("jax_enable_preemption_service", False)
    told = {"coordinator_address": coordinator, "num_processes": processes, "process_id": process_id}
    arguments = told | {"cluster_detection_method": "deactivate"} if processes else {}
    if processes:
        words = f"process {process_id} of {processes}, waiting for the others at {coordinator}"
        print(words, file=sys.stderr, flush=True)
        if process_id != 0:
            _find(coordinator)
    try:
        jax.distributed.initialize(
            **arguments, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS, shutdown_timeout_seconds=_SHUTDOWN_SECONDS
        )
    except (RuntimeError, ValueError) as error:
        where = f"--coordinator={coordinator} --processes={processes} --process_id={process_id}" if processes else ""
        raise UserError(
            f"{where or 'the cluster that JAX detected'} did not come together ({error}); every process needs the same "
            "--coordinator (process 0 listens there) and --processes, and a --process_id of its own"
        ) from error


def count() -> int:
    """How many processes make this run."""
    return _jax().process_count() if _joined() else 1


def index() -> int:
    """Which of them this is; process 0 does what is done once."""
    return _jax().process_index() if _joined() else 0


def is_first() -> bool:
    """Whether this is process 0, or the only one."""
    return index() == 0


def gather(value: Any) -> list[Any]:
    """What every process gives (JSON-ready), by process index, on every process. All must call it."""
    if count() == 1:
        return [value]
    from jax._src import distributed  # the coordination service's store has no public name

    client = distributed.global_state.client
    prefix = f"llada/{next(_exchanges)}"
    if is_first():
        values = [value] + [json.loads(_wait_for(client, f"{prefix}/{i}")) for i in range(1, count())]
        client.key_value_set(f"{prefix}/all", json.dumps(values))
        return values
    client.key_value_set(f"{prefix}/{index()}", json.dumps(value))
    return json.loads(_wait_for(client, f"{prefix}/all"))


def from_first(value: Any) -> Any:
    """What process 0 gives, on every process. All must call it."""
    return gather(value if is_first() else None)[0]


@contextlib.contextmanager
def agreement() -> Iterator[None]:
    """A block that every process enters, and that fails on all if it fails on one; it ends when all have ended it."""
    if count() == 1:
        yield
        return
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    told = gather(None if failure is None else _described(failure))
    if failure is not None:
        raise failure
    for i, found in enumerate(told):
        if found is not None:
            raise _theirs(i, *found)


def _described(failure: Exception) -> list[Any]:
    """Kind, message, and the signal that it was for: JSON-ready."""
    if isinstance(failure, Interrupted):
        return ["Interrupted", failure.where, failure.signal_number]
    kinds = (kind.__name__ for kind in type(failure).__mro__ if kind.__name__ in KINDS)
    return [next(kinds, ""), str(failure), 0]


def _theirs(process: int, kind: str, message: str, signal_number: int) -> Exception:
    """The exception that another process raised, as its kind allows."""
    if kind == "Interrupted":
        return Interrupted(signal_number, message)
    return KINDS.get(kind, RuntimeError)(f"process {process}: {message}")


def require_shared(directory: Path, flag: str) -> None:
    """UserError, on all, unless every process sees what process 0 writes to `directory`. All must call it."""
    if count() == 1:
        return
    path = directory / f".seen-by-all-{from_first(secrets.token_hex(8))}"
    try:
        with agreement():
            if is_first():
                path.touch()
        with agreement():
            if not _appears(path):
                raise UserError(
                    f"{socket.gethostname()} does not see what process 0 writes to {flag}={directory}; "
                    "give a directory on a file system that all hosts share"
                )
    finally:
        if is_first():
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def ending_together(*agreed: type[Exception], advice: Callable[[], str] | None = None) -> Iterator[None]:
    """A block of work on the devices, whose exceptions are `agreed` where every process raises them alike.

    Any other ends the process at once. The rest wait for it in a collective; only a broken connection tells them, and
    an orderly exit would wait for them. What to do, `advice`, is the last line said.
    """
    try:
        yield
    except agreed:
        raise
    except BaseException as error:
        if count() == 1:
            raise
        status = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "status", 1)
        if isinstance(error, UserError):
            print(f"process {index()}: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
        print(f"process {index()} of {count()} ends, and the others with it", file=sys.stderr)
        if advice is not None and not isinstance(error, UserError):
            print(advice(), file=sys.stderr)
        sys.stderr.flush()
        os._exit(status)


def _check(coordinator: str | None, processes: int | None, process_id: int | None) -> None:
    given = {"--coordinator": coordinator, "--processes": processes, "--process_id": process_id}
    missing = [flag for flag, value in given.items() if value is None]
    if len(missing) == 3 or (processes == 1 and len(missing) == 2):
        return
    if missing:
        raise UserError(
            f"{' and '.join(missing)} missing: --coordinator=HOST:PORT --processes=N --process_id=I go together "
            "(--processes=1 alone: no others, whatever the cluster says)"
        )
    if processes < 1:
        raise UserError(f"--processes={processes} must be at least 1")
    if not 0 <= process_id < processes:
        raise UserError(f"--process_id={process_id} must be one of 0..{processes - 1} for --processes={processes}")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator={coordinator} must be HOST:PORT of process 0, like 10.0.0.1:8476")


def _find(coordinator: str) -> None:
    """Wait until process 0 listens; JAX would end in a C++ stack trace where it never does."""
    host, _, port = coordinator.rpartition(":")
    until = time.monotonic() + _MEETING_SECONDS
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise UserError(
                    f"nobody listens at --coordinator={coordinator} after {_MEETING_SECONDS} seconds ({error}); start "
                    "--process_id=0 on that host, and let the others reach it"
                ) from error
        time.sleep(0.2)


def _launched() -> bool:
    """Whether it is worth asking JAX for other processes."""
    return any(name.startswith(_LAUNCHERS) for name in os.environ) or importlib.util.find_spec("libtpu") is not None


class _Cluster(NamedTuple):
    """What JAX's own detection would join: how many processes, which one this is, by whom and where they meet."""

    size: int
    index: int | None = None
    name: str = ""
    meeting: str = ""


_NAMES = {"slurm": "Slurm", "ompi": "Open MPI", "k8s": "Kubernetes", "gcetpu": "TPU pod", "gketpu": "TPU pod on GKE"}


def _cluster() -> _Cluster:
    """Asked before joining, since a single process needs none."""
    try:
        from jax._src import clusters

        kinds = [kind for kind in clusters.ClusterEnv._cluster_types if not kind.opt_in_only_method]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # any Kubernetes pod without the kubernetes package
            kind = next((kind for kind in kinds if kind.is_env_present()), None)
        if kind is None or kind.get_process_count() == 1:
            return _Cluster(1)
        size = kind.get_process_count()
    except Exception as error:
        raise UserError(
            f"what launched this process cannot be asked for the others ({error}); give --coordinator, --processes and "
            "--process_id, or --processes=1 where there are none"
        ) from error
    index, meeting = None, ""
    with contextlib.suppress(Exception):  # only to say so: joining asks for them again
        index = kind.get_process_id()
        meeting = kind.get_coordinator_address(5, os.environ.get("JAX_COORDINATOR_PORT"))
    return _Cluster(size, index, _NAMES.get(kind.name, kind.name), meeting)


def _say_who_waits(found: _Cluster) -> None:
    which = "one" if found.index is None else f"process {found.index}"
    where = f" at {found.meeting}" if found.meeting else ""
    words = f"{which} of {found.size} processes ({found.name}), waiting for the others{where}"
    print(f"{words}; --processes=1 if there are none", file=sys.stderr, flush=True)


def _jax():
    return sys.modules["jax"]


def _joined() -> bool:
    return "jax" in sys.modules and _jax().distributed.is_initialized()


def _wait_for(client, key: str) -> str:
    """The value that another process sets, however long that takes; should it die, the service ends this one too."""
    while True:
        try:
            return client.blocking_key_value_get(key, _POLL_MILLISECONDS)
        except _jax().errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def _appears(path: Path) -> bool:
    until = time.monotonic() + _SHARED_SECONDS
    while not path.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True
