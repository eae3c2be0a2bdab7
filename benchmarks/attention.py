"""Attention forward and backward on this machine, all scores at once and by blocks of queries, against PyTorch's.

    python benchmarks/attention.py [--lengths 512 1024 2048 4096] [--blocks 64 128 256] [--heads=6] [--pairs=5]

float32, one sequence, 64 channels a head. Ours and PyTorch's scaled_dot_product_attention run alternately; outputs and
gradients of every pair are compared. Memory is that of our compiled program besides inputs and outputs. Needs torch.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
import record
import timing
import torch

from llada.model import attention
from llada.model.attention_kernels import Allowed


def torch_program(inputs, weights):
    """Output of PyTorch's attention and the gradients of its weighted sum."""
    inputs = [torch.tensor(x).transpose(1, 2).contiguous().requires_grad_() for x in inputs]
    weights = torch.tensor(weights).transpose(1, 2).contiguous()

    def run():
        mixed = torch.nn.functional.scaled_dot_product_attention(*inputs)
        gradients = torch.autograd.grad(torch.sum(mixed * weights), inputs)
        return [x.detach().transpose(1, 2).numpy() for x in (mixed, *gradients)]

    return run


def our_program(attend, inputs, weights):
    """The same of one of our implementations, and the bytes of its temporaries."""

    def weighted_sum(*inputs):
        mixed = attend(*inputs, Allowed())
        return jnp.sum(mixed * weights), mixed

    program = jax.jit(jax.grad(weighted_sum, argnums=(0, 1, 2), has_aux=True)).lower(*inputs).compile()

    def run():
        gradients, mixed = jax.block_until_ready(program(*inputs))
        return [mixed, *gradients]

    return run, program.memory_analysis().temp_size_in_bytes


def same(ours, theirs):
    """AssertionError where results differ."""
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(np.asarray(a), b, atol=2e-4)
    return {}


def row(facts: dict) -> dict[str, str]:
    """What docs/benchmarks.md shows of them."""
    return {
        "tokens": str(facts["length"]),
        "implementation": facts["implementation"],
        "ours, s": timing.text(facts["ours"]),
        "PyTorch, s": timing.text(facts["pytorch"]),
        "PyTorch / ours": timing.text(facts["ratio"]),
        "temporaries, MB": timing.text(facts["temporaries_mb"]),
    }


def main() -> None:
    """A line of JSON for each length and implementation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 1024, 2048, 4096], help="tokens")
    parser.add_argument("--blocks", nargs="+", type=int, default=[attention.BLOCK], help="queries in a block")
    parser.add_argument("--heads", type=int, default=6, help="each with keys of its own")
    parser.add_argument("--pairs", type=int, default=5)
    record.add_flags(parser)
    options = parser.parse_args()
    implementations = {"at once": attention.at_once}
    implementations |= {f"blocks of {n}": functools.partial(attention.by_blocks, block=n) for n in options.blocks}
    rng = np.random.default_rng(0)
    rows = []
    for length in options.lengths:
        *inputs, weights = rng.normal(size=(4, 1, length, options.heads, 64)).astype(np.float32)
        theirs = torch_program(inputs, weights)
        for name, implementation in implementations.items():
            ours, temporaries = our_program(implementation, inputs, weights)
            facts = dict(benchmark="attention", length=length, implementation=name, temporaries_mb=temporaries / 1e6)
            facts |= timing.alternate(ours, theirs, same, options.pairs)
            timing.report(**facts)
            rows.append(row(facts))
    record.record(options, "attention", rows)


if __name__ == "__main__":
    main()
