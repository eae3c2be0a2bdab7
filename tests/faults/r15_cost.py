"""What safety costs: steps of a run with all of it against bare steps, taken in turn; and how long a save stalls a run.

With all of it: the step that skips bad numbers and spikes and counts its metrics, digests of rows, the watchdog, logs.
Bare: gradients, clipping and the update of the same batches, nothing else. Both are compiled as users have it.
"""

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from faults import tiny_run, workers
from faults.goal import Outcome

NUMBER = "R15"
TITLE = "The cost of safety"
DEMAND = "all of it at most 2 % of a step of 200 ms or more; an asynchronous save stalls at most one step, p95"
FULL, SAMPLE = 4, 1

MOST_COST, MOST_STALL = 0.02, 1.0  # shares of a step
LEAST_SECONDS = 0.2  # of a step
PAIRS, SAVES, BETWEEN = 60, 20, 4  # pairs of steps; saves, and steps from one to the next
MEASURED = ("cost", "stall")


def outcomes(count: int, seed: int, folder: Path) -> Iterator[Outcome]:
    """Cost and stall of either family; the seed is the run's."""
    source, changes = workers.prepared(folder)
    cases = [(("llada", "arm")[i // 2 % 2], MEASURED[i % 2], seed + i // 4) for i in range(count)]
    plain = {"XLA_FLAGS": os.environ.get("R15_XLA_FLAGS", "")}  # the suite's would not optimise
    arguments = {"cases": cases, "source": source, "changes": changes, "folder": folder / "runs"}
    for found in workers.Workers("r15_cost", "measured", arguments, folder / "runs", environment=plain):
        yield Outcome(*found)


def measured(cases: list[list], source: str, changes: dict[str, Any], folder: str) -> Iterator[Outcome]:
    """In a worker: the cases, one after another."""
    for i, (family, kind, seed) in enumerate(cases):
        model = {"model.layers": 4, "model.width": 256, "model.heads": 4, "model.ffn": 704, "train.batch_size": 48}
        model |= {"optimizer.spike_factor": 10.0, "train.log_every": 20, "train.steps": 10_000}
        model |= {"checkpoint.every": 10_000 if kind == "cost" else BETWEEN}
        with _opened(tiny_run.config(source, family, changes | model), seed, Path(folder) / str(i)) as run:
            yield (_cost if kind == "cost" else _stall)(run, f"{family}, {kind}")


def _opened(config: Any, seed: int, workdir: Path) -> Any:
    """A run as `loop.train` opens it."""
    import contextlib
    import dataclasses

    import jax

    from llada import mesh as mesh_lib
    from llada.training import loop
    from llada.training import workdir as workdir_lib
    from llada.training.checkpoint import Checkpoints
    from llada.training.progress import TerminalProgress
    from llada.training.stopping import Stop, stop_signals
    from llada.training.watchdog import Watchdog

    config = dataclasses.replace(config, seed=seed)
    mesh = mesh_lib.make(config.mesh)

    @contextlib.contextmanager
    def opened() -> Iterator[Any]:
        with (
            jax.set_mesh(mesh),
            stop_signals() as received,
            Watchdog(config.train.watchdog_seconds, workdir) as watchdog,
            Checkpoints(workdir, config.checkpoint.keep) as checkpoints,
        ):
            tokenizer, corpus = workdir_lib.prepare(workdir, config)
            stop = Stop(received, mesh)
            with loop.TrainingRun(
                config, workdir, mesh, tokenizer, corpus, checkpoints, stop, TerminalProgress(config), watchdog
            ) as run:
                yield run

    return opened()


def _cost(run: Any, what: str) -> Outcome:
    """Steps of the run and bare ones in turn, each waited for: the median of the ratios of neighbours."""
    import jax

    from llada import mesh as mesh_lib
    from llada.training.step import state_shardings

    bare = jax.jit(
        lambda state, batch: _bare_step(state, batch, run.config, run.tokenizer.special),
        donate_argnums=0,
        out_shardings=(state_shardings(run.config, run.mesh), None),
    )
    state, batches = jax.tree.map(lambda x: x.copy(), run.state), run.rows.iterate(0)

    def take_bare() -> None:
        nonlocal state
        batch = mesh_lib.shard_batch(run.mesh, next(batches), run.positions, run.config.train.batch_size)
        state, loss = bare(state, batch)
        float(loss)
        jax.block_until_ready(state)

    def take_whole() -> None:
        run.advance()
        jax.block_until_ready(run.state)

    seconds: dict[Callable, list[float]] = {take_whole: [], take_bare: []}
    for i in range(PAIRS + 3):
        for take in list(seconds)[:: 1 if i % 2 else -1]:
            start = time.perf_counter()
            take()
            if i >= 3:  # compiled, and warm
                seconds[take].append(time.perf_counter() - start)
    batches.close()
    step = statistics.median(seconds[take_bare])
    ratios = [whole / alone - 1 for whole, alone in zip(*seconds.values(), strict=True)]
    low, cost, high = statistics.quantiles(ratios, n=4)
    said = f"{100 * cost:+.1f} % of a step of {step:.3f} s (quartiles {100 * low:+.1f} and {100 * high:+.1f} %)"
    wrong = said if cost > MOST_COST else f"a step takes only {step:.3f} s" if step < LEAST_SECONDS else ""
    return Outcome(f"{what}: {said}", "more than 2 %" if cost > MOST_COST else "at most 2 %", wrong, step)


def _bare_step(state: Any, batch: Any, config: Any, special: Any) -> Any:
    """`training.step.train_step` without metrics and decisions."""
    import functools

    import jax.numpy as jnp
    import optax

    from llada import fsdp
    from llada.training import optimizer
    from llada.training import step as step_lib

    B = len(batch)
    of_batch = fsdp.batch_sums(functools.partial(step_lib.gradients_of_batch, config, special, B))
    gradients, terms = of_batch(state.params, (batch, jnp.arange(B)), state.step)
    norm = optax.tree.norm(gradients) / terms.token_count
    factor = optimizer.clip_factor(config.optimizer.clip_norm, norm, terms.token_count)
    updates, moments = optimizer.make(config).update(gradients, state.optimizer_state, state.params, factor=factor)
    params = optax.apply_updates(state.params, updates)
    return state._replace(step=state.step + 1, params=params, optimizer_state=moments), terms.nats


def _stall(run: Any, what: str) -> Outcome:
    """How much longer than the others a step takes that also saves, in steps; p95 over the saves."""
    import jax

    saving, others = [], []
    for i in range(BETWEEN * (SAVES + 1)):
        start = time.perf_counter()
        run.advance()
        jax.block_until_ready(run.state)
        seconds = time.perf_counter() - start
        if i >= BETWEEN:  # the first is compiled
            (saving if run.step % BETWEEN == 0 else others).append(seconds)
    step = statistics.median(others)
    stalls = sorted(seconds / step - 1 for seconds in saving)
    p95 = stalls[math.ceil(0.95 * len(stalls)) - 1]
    said = f"stalls of {SAVES} saves: median {statistics.median(stalls):.2f}, p95 {p95:.2f} steps of {step:.3f} s"
    late = p95 > MOST_STALL
    return Outcome(f"{what}: {said}", "more than a step" if late else "at most a step", said if late else "", step)
