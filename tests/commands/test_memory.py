"""Memory of the process: what a step on CPU frees is there for the next one."""

import os
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import jax, jax.numpy as jnp
from llada.commands import memory

if sys.argv[1] == "keep":
    memory.keep()
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
def test_a_kept_step_touches_no_new_memory():
    """A page of 4 KB is 16,384 faults in 64 MB, one of 2 MB 32."""
    faults = {}
    for how in ("keep", "as it is"):
        # One device, and small pages where the system gives no others unasked: there are more of them to count.
        plain = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "GLIBC_TUNABLES")}
        command = [sys.executable, "-c", FAULTS, how]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=plain)
        faults[how] = int(done.stdout)
    assert faults["as it is"] >= 5 * 32, faults
    assert faults["keep"] <= faults["as it is"] / 4, faults
