"""Products inside Pallas kernels, which the compiler sees as one opaque call.

The rule, by the kernel's name: splash attention multiplies queries with keys and weights with values (2 products), its
backward passes 3 (dq), 4 (dkv) or 5 (dkv that makes dq too), each 2 x heads x queries x keys x channels; a causal
kernel leaves out the tiles that no query sees. Any other kernel counts what it declares.
"""

import math
import re

from llada.model import attention_kernels

SHARE = 0.5  # of peak that such kernels reach with 128 channels per head; fewer leave lanes empty
LANES = 128


def is_kernel(opcode: str, attributes: str) -> bool:
    """Whether an instruction calls a Pallas kernel."""
    return opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in attributes


def flops(name: str, attributes: str, operands: list[tuple[int, ...]], results: int, causal: bool) -> float | None:
    """FLOPs of one call, from the shapes of its floating-point operands and the number of its results.

    None of another kernel that declares none.
    """
    if products := _products(name, results):
        query, key = operands[:2]
        return (
            products * 2.0 * math.prod(query) * key[-2] * (attention_kernels.causal_share(key[-2]) if causal else 1.0)
        )
    declared = re.search(r'"flops":"?(\d+)', attributes)
    return float(declared[1]) if declared else None


def efficiency(name: str, operands: list[tuple[int, ...]]) -> float:
    """The share of peak FLOP/s that a call is taken to run at: an assumption, as the compiler estimates none."""
    channels = operands[1][-1] if _products(name, 0) else LANES  # the keys': queries may come with positions last
    return SHARE * min(1.0, channels / LANES)


def _products(name: str, results: int) -> int:
    kind = re.search(r"splash_m[hq]a_(fwd|dq|dkv)", name)
    return {"fwd": 2, "dq": 3, "dkv": 5 if results > 2 else 4}[kind[1]] if kind else 0
