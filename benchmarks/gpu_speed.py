"""Training speed on one GPU in bfloat16, against PyTorch on the same one: python benchmarks/gpu_speed.py

  train      LLaDA-1B at 4,096 tokens, complete optimizer step: ours, PyTorch eager (scaled_dot_product_attention) and
             torch.compile, each at the largest power of two of sequences that fits, in processes of their own; the
             same for LLaDA-8B cut to 6 of its 32 layers. One step on the same weights and masks is compared first
  loss       the vocabulary head forward and backward, d 4096, 8,192 positions, half masked: seconds, memory
  attention  forward and backward, 4 sequences, 32 heads, 4,096 tokens, 128 and 64 channels, against torch's backends
  packed     the same with four documents a row, against one document
  input      a step fed by the real loader against one that gets the same batch every time

MFU is useful FLOPs (head on masked rows) over the peak in `llada.accounting`; the rate of an 8192^3 matrix product in
the same run is printed beside it. Without a GPU the same code runs at toy size on CPU, in float32, which shows that it
runs and nothing else: such lines are marked toy_size and cannot be recorded. Needs torch, built for the GPU.
"""

import argparse
import json
import os
import statistics
import sys
import time

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # two frameworks share the memory

import jax
import jax.numpy as jnp
import numpy as np
import record
import timing
import torch
import torch.nn.functional as F
import train_speed
from loss_speed import our_nats
from torch.nn.attention import SDPBackend, sdpa_kernel

from llada import accounting
from llada import mesh as mesh_lib
from llada.config import ModelConfig
from llada.data.rows import Batches
from llada.model.attention import attend
from llada.model.attention_kernels import Allowed

GPU = jax.default_backend() == "gpu"
DEVICE, TORCH_DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
DTYPE = "bfloat16" if GPU else "float32"
MODELS = {
    "1b": dict(layers=22, width=2048, heads=32, kv_heads=4, ffn=5634, vocab_size=126_464, max_length=4096),
    "8b_slice": dict(layers=6, width=4096, heads=32, ffn=12288, vocab_size=126_464, max_length=4096),
}
TOY = dict(layers=2, width=64, heads=4, kv_heads=2, ffn=96, vocab_size=512, max_length=128)
PROGRAMS = ("ours", "eager", "compile")


def build(name: str, batch: int, remat: str):
    """As `train_speed.build`."""
    model = ModelConfig(**(MODELS[name] if GPU else TOY), dtype=DTYPE, remat=remat)
    return train_speed.for_model(model, model.max_length, batch)


def programs(name: str, batch: int, remat: str, which: str):
    """`(config, program)`; `which` is one of PROGRAMS, or `both` for the pair of ours and eager."""
    c, special, x0_BL = build(name, batch, remat)
    ours = train_speed.Ours(c, special, x0_BL)
    if which == "ours":
        return c, ours
    params = jax.device_get(ours.state.params)
    device = dict(device=DEVICE, dtype=TORCH_DTYPE)
    if which != "both":
        del ours  # frees its memory for the rival
        return c, train_speed.Torch(c, special, x0_BL, params, which == "compile", **device)
    return c, (ours, train_speed.Torch(c, special, x0_BL, params, False, **device))


def child(name: str, which: str, batch: int, remat: str, steps: int) -> dict:
    """Seconds of one program's step and what follows from them; fails where memory does not suffice."""
    c, program = programs(name, batch, remat, which)
    program.step()
    seconds = []
    for _ in range(steps):
        if which != "ours":
            program.prepare()
        start = time.perf_counter()
        program.step()  # returns the loss as a float: the step has ended
        seconds.append(time.perf_counter() - start)
    facts = {"batch": batch, "seconds": statistics.median(seconds)}
    facts["tokens_per_second"] = c.tokens_per_step / facts["seconds"]
    peak = accounting.PEAK_FLOPS.get(jax.devices()[0].device_kind)
    useful = accounting.flops_exact_per_token(c)
    m = c.model
    dense = useful + 6 * m.vocab_size * m.width * (1 - accounting.head_fraction(c))
    for label, flops in (("useful", useful), ("dense_credit", dense)):
        facts[f"{label}_tflops"] = flops * facts["tokens_per_second"] / 1e12
        facts[f"{label}_mfu"] = flops * facts["tokens_per_second"] / peak if peak else None
    return facts


def in_a_process(*arguments: str) -> dict | None:
    """What `child` returns in a fresh process, or None where that runs out of memory."""
    try:
        return timing.in_a_process(__file__, "child", *arguments)
    except RuntimeError as failure:
        if any(sign in str(failure) for sign in ("RESOURCE_EXHAUSTED", "OutOfMemoryError")):
            return None
        raise


def parity(name: str) -> dict:
    """Loss and gradient norm of one step of both at the smallest batch, compared."""
    _, (ours, theirs) = programs(name, 1, "none", "both")
    mine, expected = ours.step(), theirs.step()
    errors = {"loss_error": abs(mine[0] / expected[0] - 1), "gradient_norm_error": abs(mine[1] / expected[1] - 1)}
    limits = (2e-3, 2e-2) if GPU else (1e-5, 1e-4)
    assert errors["loss_error"] <= limits[0] and errors["gradient_norm_error"] <= limits[1], errors
    return errors


def train(remat: str, rounds: int) -> list[dict[str, str]]:
    """Both models."""
    rows = []
    for name in MODELS if GPU else ["1b"]:
        best = {}
        for which in PROGRAMS:
            batch, most = 1, 1 << 10 if GPU else 1
            while batch <= most and (facts := in_a_process(name, which, str(batch), remat, "5")):
                best[which], batch = facts, 2 * batch
        line = in_a_process(name, "parity", "1", "none", "0")
        speeds = {which: [] for which in best}
        for _ in range(rounds):  # the programs alternate, in processes of their own
            for which, facts in best.items():
                again = in_a_process(name, which, str(facts["batch"]), remat, "10")
                speeds[which].append(again["tokens_per_second"])
        line |= {which: facts | {"tokens_per_second_again": speeds[which]} for which, facts in best.items()}
        rate = matmul_rate()
        report("train", model=name, remat=remat, matmul_tflops=rate, **line)
        for which, facts in best.items():
            row = {"model": name, "program": which, "sequences": str(facts["batch"])}
            row["tokens/s"] = timing.text(timing.spread(speeds[which]))
            row["useful TFLOP/s"] = timing.text(facts["useful_tflops"])
            row["useful MFU"] = f"{facts['useful_mfu']:.1%}" if facts["useful_mfu"] else ""
            row["TFLOP/s of a large product"] = timing.text(rate)
            rows.append(row)
    return rows


def matmul_rate() -> float:
    """TFLOP/s of one large square product in the dtype of the run."""
    size = 8192 if GPU else 512
    x = jax.random.normal(jax.random.key(0), (size, size), DTYPE)
    seconds = time_of(jax.jit(lambda x: x @ x), (x,))["median"]
    return 2 * size**3 / seconds / 1e12


def time_of(run, arguments, repeats: int = 20) -> dict:
    """Seconds of a JAX function, compiled first."""
    jax.block_until_ready(run(*arguments))
    seconds = []
    for _ in range(repeats if GPU else 3):
        start = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        seconds.append(time.perf_counter() - start)
    return timing.spread(seconds)


def loss() -> list[dict[str, str]]:
    """The vocabulary head alone."""
    rows, width, vocab = (8192, 4096, 126_464) if GPU else (256, 64, 512)
    keys = jax.random.split(jax.random.key(0), 4)
    hidden_ND = jax.random.normal(keys[0], (rows, width), DTYPE)
    head_VD = 0.02 * jax.random.normal(keys[1], (vocab, width))
    targets_N = jax.random.randint(keys[2], (rows,), 0, vocab)
    weights_N = 2.0 * (jax.random.permutation(keys[3], rows) % 2)
    inputs = (hidden_ND, head_VD, targets_N, weights_N)
    compiled = jax.jit(jax.grad(our_nats, argnums=(0, 1))).lower(*inputs).compile()
    memory, seconds = compiled.memory_analysis().temp_size_in_bytes / 1e9, time_of(compiled, inputs)
    report("loss", rows=rows, width=width, vocab=vocab, seconds=seconds, temporaries_gb=memory)
    sizes = {"rows": f"{rows:,}", "width": f"{width:,}", "vocabulary": f"{vocab:,}"}
    return [sizes | {"seconds": timing.text(seconds), "temporaries, GB": timing.text(memory)}]


def attention_gradient(q, k, v, segments_BL=None):
    """Gradients of the sum of the attention's outputs."""
    allowed = Allowed(segments_BQ=segments_BL, segments_BL=segments_BL)
    return jax.grad(lambda *qkv: attend(*qkv, allowed).astype(jnp.float32).sum(), (0, 1, 2))(q, k, v)


def torch_attention(inputs, backend: str):
    """Gradients of PyTorch's attention by one of its backends."""
    with sdpa_kernel(getattr(SDPBackend, backend)):
        gradients = torch.autograd.grad(F.scaled_dot_product_attention(*inputs).float().sum(), inputs)
    if GPU:
        torch.cuda.synchronize()
    return gradients


def attention() -> list[dict[str, str]]:
    """Against each of torch's backends that runs here."""
    B, H, L = (4, 32, 4096) if GPU else (2, 2, 128)
    rows = []
    for C in (128, 64):
        q, k, v = jax.random.normal(jax.random.key(0), (3, B, L, H, C), DTYPE)
        run = jax.jit(attention_gradient)
        line = {"ours": time_of(run, (q, k, v))}
        inputs = [torch.from_numpy(np.array(a, np.float32)).to(DEVICE, TORCH_DTYPE) for a in (q, k, v)]
        inputs = [a.transpose(1, 2).requires_grad_() for a in inputs]
        expected = [np.asarray(a, np.float32) for a in run(q, k, v)]
        for backend in ("CUDNN_ATTENTION", "FLASH_ATTENTION") if GPU else ("MATH",):
            for a, b in zip(expected, torch_attention(inputs, backend), strict=True):
                np.testing.assert_allclose(a, b.transpose(1, 2).float().cpu().numpy(), atol=3e-2 if GPU else 1e-4)
            line[backend.lower()] = time_of(torch_attention, (inputs, backend))
        report("attention", batch=B, heads=H, length=L, channels=C, **line)
        for name, seconds in line.items():
            times = {"seconds": timing.text(seconds), "/ ours": timing.text(seconds["median"] / line["ours"]["median"])}
            rows.append({"channels": f"{C}", "program": name} | times)
    return rows


def packed() -> list[dict[str, str]]:
    """Four documents a row against one."""
    B, H, L, C = (4, 32, 4096, 128) if GPU else (2, 2, 128, 32)
    q, k, v = jax.random.normal(jax.random.key(0), (3, B, L, H, C), DTYPE)
    segments_BL = jnp.broadcast_to(jnp.arange(L) * 4 // L, (B, L))
    run = jax.jit(attention_gradient)
    one, four = time_of(run, (q, k, v)), time_of(run, (q, k, v, segments_BL))
    ratio = four["median"] / one["median"]
    report("packed", one_document=one, four_documents=four, ratio=ratio)
    return [{"one document, s": timing.text(one), "four, s": timing.text(four), "four / one": timing.text(ratio)}]


def input_share() -> list[dict[str, str]]:
    """The step with rows from the loader, sharded as `llada train` does, over the step on one batch."""
    c, special, x0_BL = build("1b", 2, "none")
    ours = train_speed.Ours(c, special, x0_BL)
    rows_NL = np.random.default_rng(1).integers(0, special.mask, (64, x0_BL.shape[1]), np.int32)
    stream = Batches(rows_NL, len(x0_BL), c.seed, None, None)
    source = stream.iterate(0)

    def from_loader():
        ours.batch_BL = mesh_lib.shard_batch(ours.mesh, next(source), stream.positions, len(x0_BL))
        ours.step()

    repeats = 20 if GPU else 3
    ours.step(), from_loader()
    seconds = {"loader": [], "same_batch": []}
    for _ in range(repeats):
        for name, run in (("loader", from_loader), ("same_batch", ours.step)):
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    loader, same = timing.spread(seconds["loader"]), timing.spread(seconds["same_batch"])
    ratio = loader["median"] / same["median"]
    report("input", loader=loader, same_batch=same, ratio=ratio)
    return [{"loader, s": timing.text(loader), "same batch, s": timing.text(same), "ratio": timing.text(ratio)}]


def report(benchmark: str, **facts) -> None:
    """A line of JSON, marked where it is of toy size."""
    toy = {} if GPU else {"toy_size": True}
    timing.report(benchmark=f"gpu_{benchmark}", device_kind=jax.devices()[0].device_kind, dtype=DTYPE, **toy, **facts)


RUNS = {"train": train, "loss": loss, "attention": attention, "packed": packed, "input": input_share}


def main() -> None:
    """Run what is named, or all."""
    if sys.argv[1:2] == ["child"]:
        name, which, batch, remat, steps = sys.argv[2:]
        facts = parity(name) if which == "parity" else child(name, which, int(batch), remat, int(steps))
        print(json.dumps(facts))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", default=list(RUNS), metavar="WHICH", help=", ".join(RUNS))
    parser.add_argument("--remat", default="none", choices=("none", "dots", "attention", "full"), help="of our step")
    parser.add_argument("--rounds", type=int, default=2, help="times the programs alternate after the search")
    record.add_flags(parser)
    options = parser.parse_args()
    if options.record and not GPU and options.docs == record.DOCUMENT:
        parser.error("--record needs a GPU: without one the sizes are toys")
    for name in options.which:
        rows = RUNS[name](options.remat, options.rounds) if name == "train" else RUNS[name]()
        record.record(options, f"gpu_speed_{name}", rows)


if __name__ == "__main__":
    main()
