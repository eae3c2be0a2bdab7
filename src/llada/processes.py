"""Several processes that train or evaluate together: joining, exchanging values, failing together.

A process is one Python on one host, with the devices it sees; all of them run the same command. Process 0 does what
needs doing once, while the others wait. Values are exchanged through JAX's coordination service, not through devices: a
collective would time out while process 0 tokenizes a corpus. JAX is imported only if there may be other processes;
with one process, everything here is a no-op.
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llada import jax_internals
from llada.errors import KINDS, Interrupted, PeerLost, UserError

# If none of these is set and there is no libtpu, no launcher that JAX knows has started this process.
_LAUNCHERS = ("SLURM_", "OMPI_", "KUBERNETES_", "TPU_", "MEGASCALE_")
_HEARTBEAT_SECONDS = 10  # a process silent for this long is taken for dead, which ends the others
_CONNECT_SECONDS = 300  # how long to try to reach process 0
_SHUTDOWN_SECONDS = 60  # how long a process that has finished waits for the others to finish
_POLL_MILLISECONDS = 5_000  # Python handles no signal during one poll
_SHARED_SECONDS = 5  # how long a network file system may take to show a new file to other hosts

_exchanges = itertools.count()  # equal on all processes, since all make the same exchanges in the same order


def job(only: str) -> tuple[int, int]:
    """I and N of "I/N", job I of N that do not communicate, from 1. UserError for anything that is not such a pair."""
    first, slash, second = only.partition("/")
    pair = [int(word) if word.isdecimal() and len(word) < 6 else 0 for word in (first, second)]
    if not (slash and 1 <= pair[0] <= pair[1]):
        raise UserError(f"--only={only} must be I/N with I from 1 to N (at most 99999), such as --only=1/4")
    return pair[0], pair[1]


def start(coordinator: str | None = None, processes: int | None = None, process_id: int | None = None) -> None:
    """Join the other processes, by these arguments or as JAX detects them (Slurm, TPU pod, ...).

    To be called before anything touches a device. Does nothing if there are no others or they are joined already.
    UserError for impossible arguments, PeerLost if the others cannot be reached.
    """
    explicit = _check(coordinator, processes, process_id)
    if processes == 1 or not (explicit or _may_have_launcher()):
        return
    import jax

    if jax.distributed.is_initialized():
        return
    if coordinator is not None:
        _log(f"process {process_id} of {processes}, waiting for the others at {coordinator}")
        if process_id != 0:
            _wait_for_coordinator(coordinator)
    elif not _detect():
        return
    # JAX's C++ handler would catch SIGTERM before and after training, where ours must; see training/stopping.py.
    jax.config.update("jax_enable_preemption_service", False)
    jax_internals.abort_with_stacks()
    try:
        jax.distributed.initialize(
            coordinator_address=coordinator,
            num_processes=processes,
            process_id=process_id,
            cluster_detection_method="deactivate" if explicit else None,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        arguments = f"--coordinator={coordinator} --processes={processes} --process_id={process_id}"
        kind = PeerLost if isinstance(error, RuntimeError) else UserError
        raise kind(
            f"the processes of {arguments if explicit else 'the detected cluster'} did not connect ({error}); every "
            "process needs the same --coordinator (process 0 listens there) and --processes, and its own --process_id"
        ) from error


def count() -> int:
    """The number of processes in this run."""
    return _jax().process_count() if _joined() else 1


def index() -> int:
    """The index of this process, from 0."""
    return _jax().process_index() if _joined() else 0


def is_first() -> bool:
    """Whether this is process 0 (or the only one), which does what needs doing once."""
    return index() == 0


def gather(value: Any) -> list[Any]:
    """The values (JSON-ready) of all processes, by process index, on every process. All must call it."""
    if count() == 1:
        return [value]
    client = jax_internals.coordination_client()
    prefix = f"llada/{next(_exchanges)}"
    if is_first():
        values = [value] + [json.loads(_wait_for_key(client, f"{prefix}/{i}")) for i in range(1, count())]
        client.key_value_set(f"{prefix}/all", json.dumps(values))
        return values
    client.key_value_set(f"{prefix}/{index()}", json.dumps(value))
    return json.loads(_wait_for_key(client, f"{prefix}/all"))


def from_first(value: Any) -> Any:
    """The value of process 0, on every process. All must call it."""
    return gather(value if is_first() else None)[0]


@contextlib.contextmanager
def agreement() -> Iterator[None]:
    """A block that all processes enter and leave together; if it fails on one, it fails on all."""
    if count() == 1:
        yield
        return
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    failures = gather(None if failure is None else _serialized(failure))
    if failure is not None:
        raise failure
    for i, other in enumerate(failures):
        if other is not None:
            raise _deserialized(i, *other)


def _serialized(failure: Exception) -> list[Any]:
    """Kind, message and signal number of an exception: JSON-ready."""
    if isinstance(failure, Interrupted):
        return ["Interrupted", failure.where, failure.signal_number]
    kinds = (kind.__name__ for kind in type(failure).__mro__ if kind.__name__ in KINDS)
    return [next(kinds, ""), str(failure), 0]


def _deserialized(process: int, kind: str, message: str, signal_number: int) -> Exception:
    """The exception that another process raised; a RuntimeError if it was of none of our kinds."""
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
def ending_together(*agreed: type[BaseException], advice: Callable[[], str] | None = None) -> Iterator[None]:
    """A block with collectives; `agreed` are the exceptions that all processes raise alike, and they pass through.

    Any other exception ends this process at once: the others wait for it in a collective, and only a broken connection
    frees them; an orderly exit would itself wait for them. `advice()` is printed last, as what to do next. A connection
    that another process broke by ending is PeerLost.
    """
    try:
        yield
    except BaseException as error:
        if count() == 1 or (isinstance(error, agreed) and not isinstance(error, PeerLost)):
            raise
        error = _peer_lost(error) or error
        status = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "status", 1)
        if isinstance(error, SystemExit):  # a signal, which has been reported
            status = error.code
        elif isinstance(error, UserError):
            _log(f"process {index()}: {error}")
        else:
            traceback.print_exc()
        _log(f"process {index()} of {count()} ends, and the others with it")
        if advice is not None and (isinstance(error, PeerLost) or not isinstance(error, UserError)):
            _log(advice())
        os._exit(status)


def _check(coordinator: str | None, processes: int | None, process_id: int | None) -> bool:
    """Whether the arguments name the processes; False if they leave that to JAX. UserError for impossible ones."""
    if coordinator is None and process_id is None and processes in (None, 1):
        return False
    if coordinator is None or processes is None or process_id is None:
        arguments = {"--coordinator": coordinator, "--processes": processes, "--process_id": process_id}
        missing = " and ".join(flag for flag, value in arguments.items() if value is None)
        raise UserError(
            f"{missing} missing: --coordinator=HOST:PORT --processes=N --process_id=I go together "
            "(--processes=1 alone: no others, whatever the cluster says)"
        )
    if processes < 1:
        raise UserError(f"--processes={processes} must be at least 1")
    if not 0 <= process_id < processes:
        raise UserError(f"--process_id={process_id} must be one of 0..{processes - 1} for --processes={processes}")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator={coordinator} must be HOST:PORT of process 0, like 10.0.0.1:8476")
    return True


def _wait_for_coordinator(coordinator: str) -> None:
    """Return when process 0 listens. PeerLost after a while, where JAX would abort with a C++ stack trace."""
    host, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + _CONNECT_SECONDS
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise PeerLost(
                    f"nobody listens at --coordinator={coordinator} after {_CONNECT_SECONDS} seconds ({error}); start "
                    "--process_id=0 on that host, and let the others reach it"
                ) from error
        time.sleep(0.2)


def _may_have_launcher() -> bool:
    """Whether it is worth importing JAX to look for other processes."""
    return any(name.startswith(_LAUNCHERS) for name in os.environ) or importlib.util.find_spec("libtpu") is not None


def _detect() -> bool:
    """Whether JAX detects a cluster of several processes; logs which process this is, and that it waits."""
    try:
        cluster = jax_internals.detect_cluster()
    except Exception as error:
        raise UserError(
            f"the cluster that launched this process does not say which others there are ({error}); give "
            "--coordinator, --processes and --process_id, or --processes=1 if there are none"
        ) from error
    if cluster.size == 1:
        return False
    which = "one" if cluster.process_id is None else f"process {cluster.process_id}"
    where = f" at {cluster.coordinator}" if cluster.coordinator else ""
    _log(
        f"{which} of {cluster.size} processes ({cluster.kind}), waiting for the others{where}; "
        "--processes=1 if there are none"
    )
    return True


def _peer_lost(error: BaseException) -> PeerLost | None:
    """PeerLost for what a collective or the coordination service raises where another process has ended."""
    if not jax_internals.is_lost_connection(error):
        return None
    return PeerLost(f"another process has ended or cannot be reached: {' '.join(str(error).split())[:300]}")


def _log(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _jax() -> Any:
    return sys.modules["jax"]


def _joined() -> bool:
    return "jax" in sys.modules and _jax().distributed.is_initialized()


def _wait_for_key(client: Any, key: str) -> str:
    """The value that another process sets, however long that takes; if that process dies, the service ends this one."""
    while True:
        try:
            return client.blocking_key_value_get(key, _POLL_MILLISECONDS)
        except _jax().errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                continue
            if lost := _peer_lost(error):
                _log(f"process {index()}: {lost}")
                os._exit(lost.status)  # an orderly exit would wait for the others
            raise


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + _SHARED_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
