"""Where figures come from: commit, date and machine, for reports that a command writes."""

import datetime
import os

from llada.training.calls import commit, processor


def line() -> str:
    """Commit, date and hardware in one line."""
    return f"commit {commit()}, {datetime.date.today()}, {machine()}"


def machine() -> str:
    """The devices that JAX runs on; of CPUs the model and the number of cores."""
    import jax

    if jax.default_backend() != "cpu":
        return f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return f"{processor()}, {os.cpu_count()} cores"
