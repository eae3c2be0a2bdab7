"""The private parts of JAX that we use are as we know them; a release that is not listed here has to be looked at."""

import inspect

import jax
from jax._src import clusters, distributed

from llada import jax_internals

CHECKED = ("0.10", "0.11")  # releases whose jax._src was read for what src/llada/jax_internals.py uses


def test_this_release_of_jax_has_been_checked():
    release = ".".join(jax.__version__.split(".")[:2])
    assert release in CHECKED, f"read jax._src of {jax.__version__} for jax_internals.py, then list {release} here"


def test_the_coordination_service_has_a_store():
    assert jax_internals.coordination_client() is None  # until jax.distributed.initialize()
    from jaxlib import _jax

    assert type(distributed.global_state).__annotations__["client"]
    for method in ("key_value_set", "blocking_key_value_get"):
        assert callable(getattr(_jax.DistributedRuntimeClient, method))


def test_clusters_answer_what_is_asked_of_them():
    kinds = {kind.name: kind for kind in clusters.ClusterEnv._cluster_types}
    assert set(jax_internals._KINDS) <= set(kinds)
    for kind in kinds.values():
        assert isinstance(kind.opt_in_only_method, bool)
        for method in ("is_env_present", "get_process_count", "get_process_id"):
            assert not inspect.signature(getattr(kind, method)).parameters
        parameters = inspect.signature(kind.get_coordinator_address).parameters
        assert list(parameters) == ["timeout_secs", "override_coordinator_port"]


def test_one_process_is_no_cluster(monkeypatch):
    monkeypatch.setattr(clusters.ClusterEnv, "_cluster_types", [])
    assert jax_internals.detect_cluster() == jax_internals.Cluster(1)


def test_a_lost_connection_is_told_from_other_errors():
    gone = ValueError("UNKNOWN: Gloo all-reduce failed: [external/gloo/gloo/transport] Connection closed by peer")
    wrapped = RuntimeError("a step failed")
    wrapped.__cause__ = gone
    others = [jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"), OSError("Connection closed"), KeyError()]
    assert jax_internals.is_lost_connection(gone) and jax_internals.is_lost_connection(wrapped)
    assert not any(map(jax_internals.is_lost_connection, others))
