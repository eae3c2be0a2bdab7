"""Attention forward and backward on this machine: all scores at once, by blocks of queries, and PyTorch's.

    python benchmarks/attention.py [--lengths=512,1024,2048,4096] [--blocks=64,128,256] [--heads=6] [--pairs=5]

float32, one sequence, 64 channels a head. Results and gradients must agree; times are of programs run in turns, memory
is what the compiled program of ours holds besides inputs and outputs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl import app, flags
from timing import alternate, report

from llada.model import attention

LENGTHS = flags.DEFINE_list("lengths", ["512", "1024", "2048", "4096"], "Tokens.")
BLOCKS = flags.DEFINE_list("blocks", [str(attention.BLOCK)], "Queries in a block.")
HEADS = flags.DEFINE_integer("heads", 6, "Heads, all with keys of their own.")
PAIRS = flags.DEFINE_integer("pairs", 5, "Timed runs of each.")


def torch_program(inputs, weights):
    """Value and gradients of the weighted sum of PyTorch's scaled_dot_product_attention."""
    inputs = [torch.tensor(x).transpose(1, 2).contiguous().requires_grad_() for x in inputs]
    weights = torch.tensor(weights).transpose(1, 2).contiguous()

    def run():
        mixed = torch.nn.functional.scaled_dot_product_attention(*inputs)
        gradients = torch.autograd.grad(torch.sum(mixed * weights), inputs)
        return [x.detach().transpose(1, 2).numpy() for x in (mixed, *gradients)]

    return run


def our_program(way, inputs, weights):
    """The same of one of our ways, and the bytes of its temporaries."""

    def total(*inputs):
        mixed = way(*inputs)
        return jnp.sum(mixed * weights), mixed

    program = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True)).lower(*inputs).compile()

    def run():
        gradients, mixed = jax.block_until_ready(program(*inputs))
        return [mixed, *gradients]

    return run, program.memory_analysis().temp_size_in_bytes


def same(ours, theirs):
    """Refuse results that are apart."""
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(np.asarray(a), b, atol=2e-4)
    return {}


def main(_):
    rng = np.random.default_rng(0)
    for length in map(int, LENGTHS.value):
        *inputs, weights = rng.normal(size=(4, 1, length, HEADS.value, 64)).astype(np.float32)
        theirs = torch_program(inputs, weights)
        ways = {"at_once": attention.at_once}
        ways |= {f"by_blocks {n}": functools.partial(attention.by_blocks, block=int(n)) for n in BLOCKS.value}
        for name, way in ways.items():
            run, temporaries = our_program(lambda q, k, v, way=way: way(q, k, v, False), inputs, weights)
            facts = alternate(run, theirs, same, PAIRS.value)
            report(length=length, way=name, temporaries_mb=temporaries / 1e6, **facts)


if __name__ == "__main__":
    app.run(main)
