"""Parts of JAX that are not public: the coordination service's store, its end, and the detection of clusters.

Private names may change with any release; tests/test_jax_internals.py lists the releases that have been checked.
"""

import contextlib
import ctypes
import faulthandler
import os
import signal
import warnings
from typing import Any, NamedTuple

from llada.errors import causes

# In the errors of gloo (CPU), NCCL (GPU) and the coordination service where the other side has gone.
_GONE = ("onnection closed", "onnection reset", "onnect timeout", "Broken pipe", "remote process", "UNAVAILABLE")


class Cluster(NamedTuple):
    """What JAX's cluster detection reports: kind, number of processes, index of this one, address of process 0."""

    size: int
    process_id: int | None = None
    kind: str = ""
    coordinator: str = ""


# By JAX's names, of which Kubernetes has none.
_KINDS = {"slurm": "Slurm", "ompi": "Open MPI", "": "Kubernetes", "gcetpu": "TPU pod", "gketpu": "TPU pod on GKE"}


def coordination_client() -> Any:
    """The client of the coordination service (a store of keys and texts), once `jax.distributed` is initialized."""
    from jax._src import distributed

    return distributed.global_state.client


def abort_with_stacks() -> None:
    """From now on SIGABRT writes the Python stacks and ends the process with its own number, PeerLost's status.

    The coordination service's client aborts a process that has lost the others. Its callback for that cannot be in
    Python (jaxlib ends in std::bad_cast). The handler is therefore C's `_exit`, which takes the signal's number for the
    status; faulthandler writes the stacks and then calls it.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal(signal.SIGABRT, ctypes.cast(libc._exit, ctypes.c_void_p))
    with contextlib.suppress(OSError, ValueError, AttributeError):  # standard error may be no file
        faulthandler.enable()


def is_lost_connection(error: BaseException) -> bool:
    """Whether a collective, or a call of the coordination service, failed because another process has gone."""
    texts = [str(cause) for cause in causes(error) if isinstance(cause, RuntimeError | ValueError)]
    return any(word in text for text in texts for word in _GONE)


def detect_cluster() -> Cluster:
    """The cluster that `jax.distributed.initialize()` would join; of size 1 if there is none.

    Detection raises exceptions of many kinds, for example where a metadata server does not answer.
    """
    from jax._src import clusters

    kinds = [kind for kind in clusters.ClusterEnv._cluster_types if not kind.opt_in_only_method]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # in any Kubernetes pod without the kubernetes package
        kind = next((kind for kind in kinds if kind.is_env_present()), None)
    if kind is None or (size := kind.get_process_count()) == 1:
        return Cluster(1)
    process_id, coordinator = None, ""
    with contextlib.suppress(Exception):  # only for a message: initialize() asks again
        process_id = kind.get_process_id()
        coordinator = kind.get_coordinator_address(5, os.environ.get("JAX_COORDINATOR_PORT"))
    return Cluster(size, process_id, _KINDS.get(kind.name, kind.name), coordinator)
