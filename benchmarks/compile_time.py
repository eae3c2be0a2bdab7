"""What compiling the training step costs, and what the compiled program contains: python benchmarks/compile_time.py

  depth   seconds to trace, lower and compile the step of 32, 3 and 2 layers, alternately: first with one layer in an
          iteration of the scan (scan_unroll=1, as on TPU), then with this platform's default. The last layer is
          outside the scan, so with 2 layers the loop has one iteration, which XLA unrolls
  warm    the same of 32 layers in fresh processes, with an empty compilation cache and with a full one
  traces  how often a short `llada train` traces its step
  head    matrix FLOPs of the vocabulary head in one step of the compiled program (loop body times trip count), over
          those of logits of all positions

On the platform that JAX finds; a line of JSON each.
"""

import argparse
import dataclasses
import json
import math
import re
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import record
import timing

from llada import config as config_lib
from llada import mesh as mesh_lib
from llada.objectives import noise as noise_lib
from llada.objectives import vocabulary_head
from llada.objectives.contract import SpecialTokens
from llada.training import loop
from llada.training import step as step_lib
from llada.training.progress import TerminalProgress

BATCH, LENGTH = 4, 256


def build(
    layers: int, width: int, vocab: int = 4096, scan_unroll: int | None = None
) -> tuple[config_lib.Config, SpecialTokens]:
    """A scanned model in the dtype of a real run, and special tokens."""
    model = dict(layers=layers, width=width, heads=width // 64, ffn=4 * width, vocab_size=vocab, max_length=LENGTH)
    model["scan_unroll"] = scan_unroll
    values = dict(
        model=model,
        objective=dict(random_length_fraction=0.0),
        data=dict(sequence_length=LENGTH),
        mesh=dict(data=1),
        train=dict(batch_size=BATCH, steps=100),
    )
    return config_lib.from_config_dict(values), SpecialTokens(mask=vocab - 1, eos=vocab - 2)


def compile_once(config: config_lib.Config, special: SpecialTokens):
    """`(seconds by phase, compiled program)`, without JAX's caches in memory."""
    jax.clear_caches()
    mesh = mesh_lib.make(config.mesh, jax.devices()[:1])
    state = jax.eval_shape(lambda: step_lib.init_state(config))
    batch_BL = jax.ShapeDtypeStruct((BATCH, LENGTH), np.int32)
    with jax.set_mesh(mesh):
        marks = [time.perf_counter()]
        traced = step_lib.compile_step(config, special, mesh).trace(state, batch_BL)
        marks.append(time.perf_counter())
        lowered = traced.lower()
        marks.append(time.perf_counter())
        compiled = lowered.compile()
        marks.append(time.perf_counter())
    seconds = dict(zip(("trace", "lower", "compile"), np.diff(marks).tolist(), strict=True))
    return seconds | {"total": marks[-1] - marks[0]}, compiled


def depth(width: int, pairs: int) -> dict:
    """32 layers against 2, and against 3."""
    compile_once(*build(2, width))  # JAX's own start-up
    facts = {}
    for name, unroll in (("scanned", 1), ("default", None)):
        seconds = {32: [], 3: [], 2: []}
        for _ in range(pairs):
            for layers, measured in seconds.items():
                measured.append(compile_once(*build(layers, width, scan_unroll=unroll))[0]["total"])
        spreads = {f"layers_{n}": timing.spread(measured) for n, measured in seconds.items()}
        for few, label in ((2, "ratio"), (3, "ratio_to_3")):
            spreads[label] = timing.spread([a / b for a, b in zip(seconds[32], seconds[few], strict=True)])
        facts[name] = spreads
    return facts


def warm(width: int) -> dict:
    """A process with an empty cache, then one with the cache that the first filled."""
    with tempfile.TemporaryDirectory() as cache:
        variables = {
            "JAX_COMPILATION_CACHE_DIR": cache,
            # By default JAX does not save programs that compile within a second, as some of this size do.
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        facts = {
            name: timing.in_a_process(__file__, "child", f"--width={width}", **variables) for name in ("cold", "warm")
        }
    # The cache saves compiling; tracing and lowering come before it can be read.
    ratios = {f"ratio_{phase}": facts["warm"][phase] / facts["cold"][phase] for phase in ("compile", "total")}
    return facts | ratios


def traces() -> dict:
    """Calls of `train_step`, which Python enters only when JAX traces it, in a run of 6 steps with an evaluation."""
    calls, original = [], step_lib.train_step

    def counting(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    step_lib.train_step = counting
    try:
        with tempfile.TemporaryDirectory() as directory:
            for document in range(300):
                numbers = range(10 * document, 10 * document + 10)
                text = "".join(f"{i} is followed by {i + 1}, and {i * i} is its square.\n" for i in numbers)
                (Path(directory) / f"{document}.txt").write_text(text, encoding="utf-8")
            config, _ = build(2, 64, vocab=300)
            data = dataclasses.replace(config.data, source=f"text:{directory}/*.txt", sequence_length=32)
            evaluate = dataclasses.replace(config.evaluate, every=3, batches=1, draws=1)
            train = dataclasses.replace(config.train, steps=6)
            config = dataclasses.replace(config, data=data, evaluate=evaluate, train=train)
            loop.train(config, Path(directory) / "run", TerminalProgress(config, quiet=True))
    finally:
        step_lib.train_step = original
    return {"steps": 6, "traces": len(calls)}


DOT = re.compile(r"%?([\w.-]+) = \w+\[([\d,]*)\][^=]* dot\((.*?)\), lhs_contracting_dims=\{([\d,]*)\}")
SHAPE = re.compile(r"%?([\w.-]+) = \w+\[([\d,]*)\]")


def head_flops(text: str, vocab: int) -> float:
    """FLOPs of the matrix products in a compiled program that have the vocabulary as an axis, loop bodies once."""
    sizes = {name: _ints(shape) for name, shape in SHAPE.findall(text)}
    total = 0
    for _, result, operands, contracted in DOT.findall(text):
        names = [re.split(r"[ %]", operand.strip())[-1] for operand in operands.split(", ") if "[" not in operand]
        typed = re.findall(r"\w+\[([\d,]*)\]", operands)
        left = _ints(typed[0]) if typed else sizes[names[0]]
        right = _ints(typed[1]) if len(typed) > 1 else sizes[names[-1]]
        if vocab in (*left, *right, *_ints(result)):
            total += 2 * math.prod(_ints(result)) * math.prod(left[i] for i in _ints(contracted))
    return float(total)


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(",") if word)


def head(width: int) -> dict:
    """FLOPs of the head over those of all logits, and its bound: masked rows rounded up to blocks, over all rows."""
    # The head's products do not depend on depth. Below one piece of the vocabulary they are not in an inner loop, whose
    # FLOPs would be missed; three quarters of a piece is a size that no other axis has.
    config, special = build(1, width, vocab=vocabulary_head.PIECE * 3 // 4)
    config = dataclasses.replace(config, objective=dataclasses.replace(config.objective, head_rows=128))
    _, compiled = compile_once(config, special)
    body = head_flops(compiled.as_text(), config.model.vocab_size)
    noise = noise_lib.Noise(config.seed, 0, np.arange(BATCH), BATCH)
    p_B = (1 - config.objective.eps) * noise_lib.times(noise, config.objective.time_sampling) + config.objective.eps
    masked = int(np.sum(noise_lib.uniform(noise, noise_lib.MASK, (LENGTH,)) < p_B[:, None]))
    rows = BATCH * LENGTH
    sizes = vocabulary_head.block_sizes(rows, config.objective.head_rows, jax.default_backend())
    executed = math.ceil(masked / sizes[-1]) * sizes[-1]
    each = body / sum(sizes)  # a loop for every block size, once each; a row costs the same in all
    dense = 6.0 * config.model.vocab_size * width
    assert body > 0, "no product with the vocabulary was found in the compiled program"
    facts = dict(rows=rows, masked=masked, executed=executed, row_gflops=each / 1e9, dense_row_gflops=dense / 1e9)
    return facts | dict(ratio=each * executed / (dense * rows), bound=executed / rows)


def rows(which: str, facts: dict) -> list[dict[str, str]]:
    """What docs/benchmarks.md shows of one program's facts."""
    cell = timing.text
    if which == "depth":
        figures = {
            f"32 layers / {few}, {name}": facts[unroll][ratio]
            for unroll, name in (("scanned", "one an iteration"), ("default", "default unrolling"))
            for few, ratio in ((2, "ratio"), (3, "ratio_to_3"))
        }
        figures |= {f"seconds of 32 layers, {name}": facts[name]["layers_32"] for name in ("scanned", "default")}
    elif which == "warm":
        figures = {
            "seconds with an empty cache": facts["cold"]["total"],
            "seconds with a full cache": facts["warm"]["total"],
            "full / empty": facts["ratio_total"],
            "full / empty, compiling alone": facts["ratio_compile"],
        }
    elif which == "traces":
        figures = {f"traces of the step in {facts['steps']} steps": facts["traces"]}
    else:
        figures = {
            "FLOPs of the vocabulary head / of all logits": facts["ratio"],
            "its bound: masked rows rounded up to blocks / all rows": facts["bound"],
        }
    return [{"program": which, "figure": name, "value": cell(figure)} for name, figure in figures.items()]


def main() -> None:
    """Run what is named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", default=["depth", "warm", "traces", "head"])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=3)
    record.add_flags(parser)
    options = parser.parse_args()
    if options.which == ["child"]:
        print(json.dumps(compile_once(*build(32, options.width))[0]))
        return
    programs = {
        "depth": lambda: depth(options.width, options.pairs),
        "warm": lambda: warm(options.width),
        "traces": traces,
        "head": lambda: head(options.width),
    }
    table = []
    for name in options.which:
        facts = programs[name]()
        timing.report(benchmark=f"compile_{name}", width=options.width, **facts)
        table += rows(name, facts)
    record.record(options, "compile_time", table)


if __name__ == "__main__":
    main()
