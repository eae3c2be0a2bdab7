"""Memory of the process, taken so that training on CPU does not wait for it.

XLA takes the buffers of every step anew and gives them back at its end. As the system would have it that is hundreds of
megabytes to be filled with zeros a step, while it computes nothing.
"""

import contextlib
import os
import sys

# Parameters of mallopt(3), from glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def use_huge_pages() -> None:
    """Begin this process anew with memory in pages of 2 MB, where glibc is asked nothing else already.

    The first touch of memory costs less in large pages. glibc reads the variable only when a process begins. Nothing
    happens outside Linux; an old glibc ignores the variable.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ and sys.executable:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        sys.stdout.flush()
        with contextlib.suppress(OSError):  # as it is, then: no process may be begun here, or the file has gone
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def keep() -> None:
    """On CPU have this process keep what a step gives back, for the next one: it stays as large as it ever was.

    To be called before JAX is asked for devices, and after `processes.start`. Nothing happens outside Linux, with
    another C library than glibc, or where JAX has an accelerator.
    """
    import ctypes

    import jax

    if sys.platform != "linux":
        return
    # A step on a thread of its own would take its memory past the heap, which is what is kept.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if jax.default_backend() == "cpu" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)
