"""Memory on CPU: what a training step frees is reused by the next one."""

import os
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import jax, jax.numpy as jnp
from llada.commands import environment

if sys.argv[1] == "retained":
    environment.retain_freed_memory()
step = jax.jit(lambda x: jnp.sum(jnp.exp(x @ x.T) @ x))  # 64 MB of its own
x = jnp.ones((4096, 8))
for _ in range(3):
    step(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_retained_memory_is_not_touched_anew():
    """A page of 4 KB is 16,384 faults in 64 MB, one of 2 MB 32."""
    faults = {}
    for how in ("retained", "as it is"):
        # One device, and small pages where the system gives no others unasked: there are more of them to count.
        plain = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "GLIBC_TUNABLES")}
        command = [sys.executable, "-c", FAULTS, how]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=plain)
        faults[how] = int(done.stdout)
    assert faults["as it is"] >= 5 * 32, faults
    assert faults["retained"] <= faults["as it is"] / 4, faults
