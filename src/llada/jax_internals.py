"""Parts of JAX that are not public: the coordination service's store, and the detection of clusters.

Private names may change with any release; tests/test_jax_internals.py lists the releases that have been checked.
"""

import contextlib
import os
import warnings
from typing import Any, NamedTuple


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
