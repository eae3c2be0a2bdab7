"""The vocabulary head alone, forward and backward, against other implementations: python benchmarks/loss_speed.py

  linear    PyTorch: logits of all rows, then those of the masked ones, cross-entropy (the published formulation)
  cce       PyTorch: masked rows first, then logits and cross-entropy under torch.compile, as in Apple's
            cut-cross-entropy (its `torch_compile` implementation)
  md4, levanter, maxtext   JAX: see `jax_rivals.py`

float32; half of the rows have weight 2, the others 0. Ours and each rival run alternately after one run each to
compile; value and both gradients are compared after every pair. Memory is the peak of resident memory above that before
a second run, in a process of its own (Linux); it includes the gradients themselves. Needs torch.
"""

import argparse
import ctypes
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import jax_rivals
import numpy as np
import record
import timing
import torch
import torch.nn.functional as F

from llada.config import ObjectiveConfig
from llada.objectives.vocabulary_head import weighted_nats

RIVALS = ("linear", "cce", *jax_rivals.ALL)


def inputs(rows: int, width: int, vocab: int):
    """`(hidden_ND, head_VD, targets_N, weights_N)`, NumPy."""
    rng = np.random.default_rng(0)
    hidden_ND = rng.standard_normal((rows, width), np.float32)
    head_VD = rng.standard_normal((vocab, width), np.float32) * np.float32(0.02)
    weights_N = 2 * rng.permutation(np.arange(rows) % 2).astype(np.float32)
    return hidden_ND, head_VD, rng.integers(0, vocab, rows).astype(np.int32), weights_N


def our_nats(hidden_ND, head_VD, targets_N, weights_N):
    """`weighted_nats` on one long row."""
    args = (hidden_ND[None], head_VD, targets_N[None], weights_N[None])
    return weighted_nats(*args, ObjectiveConfig().head_rows)[0]


def jax_program(function, arrays):
    """A function that returns the value and the gradients of hidden and head."""
    arrays = [jnp.asarray(a) for a in arrays]
    run = jax.jit(jax.value_and_grad(function, argnums=(0, 1)))
    return lambda: jax.block_until_ready(run(*arrays))


def torch_program(name: str, arrays):
    """As `jax_program`, for `linear` and `cce`."""
    hidden_ND, head_VD = (torch.from_numpy(a).requires_grad_() for a in arrays[:2])
    targets_N, weights_N = torch.from_numpy(arrays[2]).long(), torch.from_numpy(arrays[3])
    masked_N = weights_N != 0

    def nats_of(x_ND, y_N):
        return F.cross_entropy(F.linear(x_ND, head_VD), y_N, reduction="none")

    compiled = torch.compile(nats_of)

    def run():
        if name == "linear":
            logits_NV = F.linear(hidden_ND, head_VD)
            nats = F.cross_entropy(logits_NV[masked_N], targets_N[masked_N], reduction="none")
            del logits_NV
        else:
            nats = compiled(hidden_ND[masked_N], targets_N[masked_N])
        total = (nats * weights_N[masked_N]).sum()
        total.backward()
        gradients = hidden_ND.grad, head_VD.grad
        hidden_ND.grad = head_VD.grad = None  # the next run must not hold them too
        return total.item(), gradients

    return run


def program(name: str, arrays):
    """Ours or any rival, by name."""
    if name in ("linear", "cce"):
        torch.set_num_threads(os.cpu_count())
        return torch_program(name, arrays)
    return jax_program(our_nats if name == "ours" else jax_rivals.ALL[name], arrays)


def same(mine, theirs) -> dict[str, float]:
    """Relative errors of the value and of both gradients (largest error against largest entry), asserted small."""
    errors = {"value_error": abs(float(mine[0]) / float(theirs[0]) - 1)}
    assert errors["value_error"] <= 1e-5, errors
    for name, a, b in zip(("hidden", "head"), mine[1], theirs[1], strict=True):
        a, b = np.asarray(a), np.asarray(b)
        largest = max(np.max(np.abs(x - y)) for x, y in zip(a, b, strict=True))  # by rows: no third such matrix
        errors[f"d_{name}_error"] = float(largest / np.max(np.abs(b)))
        assert errors[f"d_{name}_error"] <= 1e-4, errors
    return errors


def extra_bytes(run) -> int:
    """Peak memory of a second run above that before it."""
    run()
    time.sleep(1)  # threads of the runtime may hold a buffer of the first run a moment longer
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # returns what the first run freed, which would hide in the baseline
    CLEAR_REFS.write_text("5", encoding="utf-8")  # resets VmHWM
    before = timing.resident_bytes("VmRSS")
    run()
    return timing.resident_bytes("VmHWM") - before


CLEAR_REFS = Path("/proc/self/clear_refs")


def measure(rival: str, sizes: dict[str, int], pairs: int) -> dict:
    """The facts about one rival; `sizes`: rows, width, vocab."""
    arrays = inputs(**sizes)
    facts = timing.alternate(program("ours", arrays), program(rival, arrays), same, pairs, rival)
    if CLEAR_REFS.exists():
        del arrays
        flags = [f"--{name}={size}" for name, size in sizes.items()]
        extra = {name: timing.in_a_process(__file__, f"--memory={name}", *flags) for name in ("ours", rival)}
        gradients = 4 * sizes["width"] * (sizes["rows"] + sizes["vocab"])
        facts["extra_gb"] = {name: value / 1e9 for name, value in extra.items()}
        facts["extra_gb_besides_gradients"] = {name: (value - gradients) / 1e9 for name, value in extra.items()}
    return dict(benchmark="loss", rival=rival, pairs=pairs) | sizes | facts


def row(facts: dict) -> dict[str, str]:
    """What docs/benchmarks.md shows of them."""
    rival, cell = facts["rival"], timing.text
    memory = facts.get("extra_gb_besides_gradients")
    largest = max(facts[name] for name in ("value_error", "d_hidden_error", "d_head_error"))
    return {
        "rival": rival,
        "ours, s": cell(facts["ours"]),
        "rival, s": cell(facts[rival]),
        "rival / ours": cell(facts["ratio"]),
        "memory besides gradients, ours, GB": cell(memory["ours"]) if memory else "",
        "rival, GB": cell(memory[rival]) if memory else "",
        "largest error": cell(largest),
    }


def main() -> None:
    """A line of JSON for each rival."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rivals", nargs="*", default=RIVALS, metavar="RIVAL", help=", ".join(RIVALS))
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=126_464)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--memory", choices=("ours", *RIVALS), help="print the extra bytes of one program and stop")
    record.add_flags(parser)
    options = parser.parse_args()
    sizes = dict(rows=options.rows, width=options.width, vocab=options.vocab)
    if options.memory:
        print(extra_bytes(program(options.memory, inputs(**sizes))))
        return
    rows = []
    for rival in options.rivals:
        facts = measure(rival, sizes, options.pairs)
        timing.report(**facts)
        rows.append(row(facts))
    record.record(options, "loss_speed", rows)


if __name__ == "__main__":
    main()
