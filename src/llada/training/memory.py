"""The C library's allocator, told to keep what the training step frees: on CPU a step's buffers are its memory.

glibc maps a large buffer anew at every allocation and gives it back when it is freed, so that each step lets the kernel
clear its gigabytes page by page: half of the processor time of a step with a large vocabulary.
"""

import ctypes
import os
import sys

# From malloc.h; none of them has a name in Python.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_MOST = 2**31 - 1


def keep_freed_pages() -> bool:
    """Let this process keep freed memory for its next allocation; returns whether the allocator took it.

    Nothing happens without glibc, nor where the environment already tunes its malloc.
    """
    tuned = [name for name in os.environ if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"]
    if not sys.platform.startswith("linux") or tuned:
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # One arena: the others are small heaps of their own, which large buffers do not fit.
    return all([mallopt(_M_ARENA_MAX, 1), mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, _MOST)])
