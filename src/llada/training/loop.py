"""A training run from the first step to the summary: fetch, dispatch, log the step before, evaluate, save.

Resuming follows one rule: if the workdir holds a committed checkpoint, continue from the newest; else start at step 0.
The next step is a pure function of (state, step), so a continued run ends with the bits of an uninterrupted one.

Several processes run this file side by side, each with the rows of its own devices; process 0 alone prepares, writes
metrics and summary, and prints. Whatever decides what to do next must be the same on all of them: a metric, a step, or
something agreed through `processes`.
"""

import contextlib
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from llada import accounting, json_files, processes
from llada import mesh as mesh_lib
from llada.config import Config, DebugConfig
from llada.data.rows import Batches, Corpus, chain_digest
from llada.data.tokenizer import Tokenizer
from llada.errors import DiskError, Diverged, Interrupted, UserError
from llada.evaluation.validation import Validator
from llada.files import write_atomically
from llada.paths import user_path
from llada.training import metrics as metrics_lib
from llada.training import optimizer, run_item
from llada.training import workdir as workdir_lib
from llada.training.checkpoint import Checkpoints
from llada.training.progress import Progress, TerminalProgress
from llada.training.step import TrainState, abstract_state, compile_step, init_state, state_shardings
from llada.training.stopping import Stop, stop_signals

TrainStep = Callable[[TrainState, jax.Array], tuple[TrainState, dict[str, jax.Array]]]


def train(
    config: Config,
    workdir: str | Path,
    progress: Progress | None = None,
    allow_rate_jump: bool = False,
) -> dict[str, Any]:
    """Train `config` in `workdir` until its last step; returns the summary it wrote to `summary.json`.

    `progress` receives its reports; default: lines on the terminal. A run whose length has changed is refused where its
    schedule would make the learning rate jump, unless `allow_rate_jump`. Raises UserError (Diverged among them) or
    Interrupted (after saving), on all processes alike.
    """
    workdir = user_path(workdir, "--workdir")
    workdir_lib.require_same(config)
    first = processes.is_first()
    progress = (progress if first else None) or TerminalProgress(config, quiet=not first)
    # What can be refused without any work, before anything is written.
    evaluation_steps(config)
    optimizer.parse_schedule(config.optimizer.schedule, config.steps * config.tokens_per_step)
    mesh = mesh_lib.make(config.mesh)
    mesh_lib.check(config, mesh)
    workdir_lib.require_source(workdir, config)

    with jax.set_mesh(mesh), stop_signals() as received, workdir_lib.held(workdir):
        saved = workdir_lib.claim(workdir, config, allow_rate_jump)
        summary = read_summary(workdir) if saved is not None and saved >= config.steps else None
        if saved is not None and saved > config.steps:
            progress.log(f"{workdir} is already at step {saved} of {config.steps}: nothing to do")
            return summary or {"step": saved}
        tokenizer, corpus = workdir_lib.prepare(workdir, config, progress.log, received.check)
        received.answer = "finishing this step and saving"
        advice = functools.partial(_advice, workdir)
        # An exception of one process would leave the others waiting in a collective: it ends all of them, but for what
        # all raise alike. While a run is opened that is any UserError, as all make the same checks; between steps only
        # what all read from the same metrics (Diverged) and the agreed signal (Interrupted), as a full disk, also a
        # UserError, is met by one process alone.
        with (
            processes.ending_together(UserError, Interrupted, advice=advice),
            Checkpoints(workdir, keep=config.checkpoint.keep) as checkpoints,
            TrainingRun(config, workdir, mesh, tokenizer, corpus, checkpoints, Stop(received, mesh), progress) as run,
            processes.ending_together(Interrupted, Diverged, advice=advice),
        ):
            while run.step < config.steps and not run.stop.number:
                run.advance()
            run.flush()
            if run.stop.number and run.step < config.steps:
                run.save()
                checkpoints.wait()
                raise Interrupted(run.stop.number, f"after step {run.step}")
            return run.finish()


def _advice(workdir: Path) -> str:
    """What to do once all processes have ended together."""
    steps = run_item.saved_steps(workdir / "checkpoints")
    return f"start it again on all hosts: it goes on from {f'step {steps[-1]}' if steps else 'the start'}"


class TrainingRun:
    """Everything a run holds between steps. `step` counts dispatched steps; `pending` is the newest one's metrics."""

    def __init__(
        self,
        config: Config,
        workdir: Path,
        mesh: jax.sharding.Mesh,
        tokenizer: Tokenizer,
        corpus: Corpus,
        checkpoints: Checkpoints,
        stop: Stop,
        progress: Progress,
    ):
        self.config, self.workdir, self.mesh, self.stop = config, workdir, mesh, stop
        self.tokenizer, self.corpus, self.checkpoints, self.progress = tokenizer, corpus, checkpoints, progress
        self._log_description()
        # The state before all else: batches, metrics and their files go on from its step and its cursor.
        self.state, cursor = self._restore_or_init()
        self.step: int = int(jax.device_get(self.state.step))
        self.rows_digest: str = cursor.get("rows_digest", "")
        first, special, B = processes.is_first(), tokenizer.special, config.train.batch_size
        # The digest is of whole batches, so the process that computes it reads them; the others read their own rows.
        positions = None if first else mesh_lib.local_positions(mesh, B)
        rows = Batches(corpus.train_NL, B, config.seed, config.data.unique_tokens, positions, tokenizer.vocab_size)
        self.closing = contextlib.ExitStack()
        self.positions, self.batches = rows.positions, rows.iterate(self.step)
        self.closing.callback(self.batches.close)  # ends its threads
        self.meter = metrics_lib.Meter(config, cursor.get("meter"))
        self.writer = metrics_lib.Writer(workdir, self.step, progress.log) if first else None
        self.train_step: TrainStep = compile_step(config, special, mesh)
        if config.debug != DebugConfig():
            from llada.training.debug import Debugged  # seldom needed

            debugged = Debugged(self.train_step, config.debug, workdir, progress.log)
            self.train_step = self.closing.enter_context(debugged)
        self.validate = Validator(config, special, corpus.text_bytes(tokenizer.token_bytes_V), corpus.holdout_NL, mesh)
        self.evaluate_at = evaluation_steps(config)
        self.pending: dict[str, jax.Array] | None = None
        self.last_evaluation: tuple[int, dict[str, float]] | None = None
        self.compiled = False

    def __enter__(self) -> "TrainingRun":
        return self

    def __exit__(self, *_: object) -> None:
        """Stop reading batches ahead, and tracing."""
        self.closing.close()

    def advance(self) -> None:
        """One step of the run; the device works on it while the host looks at the one before."""
        rows_RL = next(self.batches)
        if processes.is_first():
            self.rows_digest = chain_digest(self.rows_digest, rows_RL)
        batch_BL = mesh_lib.shard_batch(self.mesh, rows_RL, self.positions, self.config.train.batch_size)
        self.state, metrics = self._dispatch(batch_BL)
        self.log_pending()
        self.stop.post()
        self.step += 1
        self.pending = metrics
        last = self.step == self.config.steps
        if last or self._due(self.config.evaluate.every) or self.step in self.evaluate_at:
            self.flush()
            self.evaluate()
        if last or self._due(self.config.checkpoint.every):
            self.flush()
            self.save()

    def _dispatch(self, batch_BL: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        """Start a step. The first is compiled, which is logged, as it may take minutes."""
        start = None if self.compiled else time.perf_counter()
        if start is not None:
            self.progress.log("compiling the training step ...")
        try:
            out = self.train_step(self.state, batch_BL)
        except FloatingPointError as error:  # debug.nans
            raise self._diverged(f"step {self.step + 1} computes a NaN: {error}") from error
        if start is not None:
            self.progress.log(f"compiled in {time.perf_counter() - start:.1f} s")
            self.compiled = True
        return out

    def log_pending(self) -> None:
        """Fetch and record the newest metrics not yet seen; stop the run if they are not finite."""
        if self.pending is None:
            return
        values = {name: float(value) for name, value in jax.device_get(self.pending).items()}
        self.pending = None
        self.stop.collect()
        # The norm after the step is among them: a finite loss may still have led to parameters that must not be saved.
        if not all(map(math.isfinite, values.values())):
            raise self._diverged(
                f"step {self.step} is not finite: loss {values['loss_nats_per_token']} nats/token, gradient norm "
                f"{values['grad_norm']}, parameter norm {values['parameter_norm']}"
            )
        self.meter.add(values)
        if self.step % self.config.train.log_every == 0 or self.step == self.config.steps:
            window = self.meter.window(self.step, values)
            self.record(window)
            self.progress.window(self.step, window)

    def _diverged(self, what: str) -> Diverged:
        self.checkpoints.wait()
        good = self.checkpoints.latest()
        return Diverged(
            f"{what}. Last good checkpoint: {'none' if good is None else f'step {good}'} in "
            f"{self.checkpoints.directory}; nothing later was saved. Try a lower --config.optimizer.peak_learning_rate"
            f"{'' if good is None else ' in a new workdir'}"
        )

    def flush(self) -> None:
        """Wait for the dispatched step, log its metrics, and stop the throughput clock for what follows."""
        self.meter.pause()
        self.log_pending()
        self.meter.pause()

    def evaluate(self) -> None:
        """Held-out figures of the present parameters."""
        if self.last_evaluation is None:
            self.progress.log(f"evaluating on {len(self.validate.rows_NL):,} held-out rows (compiled first) ...")
        validation = self.validate(self.state.params)
        values = {f"eval/{name}": getattr(validation, name) for name in metrics_lib.EVALUATED}
        self.record(values | metrics_lib.run_totals(self.config, self.step))
        self.progress.evaluation(self.step, values)
        self.last_evaluation = (self.step, values)

    def record(self, values: dict[str, float]) -> None:
        """A line of metrics.jsonl, written by process 0."""
        if self.writer is None:
            return
        try:
            self.writer.write(self.step, values)
        except DiskError:
            self.checkpoints.wait()  # what is being saved may still find room
            raise

    def save(self) -> None:
        """Checkpoint the present step; arrays have left the device on return, so donation is safe."""
        cursor = {"step": self.step, "rows_digest": self.rows_digest, "meter": self.meter.state()}
        cursor["corpus_digest"] = self.corpus.metadata.digest
        self.checkpoints.save(self.state, self.config, cursor, self.tokenizer.content)

    def finish(self) -> dict[str, Any]:
        """Write `summary.json`: the run's figures in one place. Every process returns it."""
        if self.last_evaluation is None:  # a finished run, called again
            summary = read_summary(self.workdir)
            if summary is not None and summary.get("step") == self.step:
                return summary
            self.evaluate()
        summary = processes.from_first(self.summary() if processes.is_first() else None)
        if processes.is_first():
            content = json_files.dumps(summary, indent=2) + "\n"
            write_atomically(self.workdir / "summary.json", content.encode())
        return summary

    def summary(self) -> dict[str, Any]:
        """The run's figures after its last evaluation, as process 0 knows them."""
        count = accounting.parameters(self.config.model)
        totals = metrics_lib.run_totals(self.config, self.step)
        lines = metrics_lib.read(self.workdir / "metrics.jsonl")
        losses = [line["train/loss_nats_per_token"] for line in lines if "train/loss_nats_per_token" in line]
        self.meter.count_wall()
        corpus = self.corpus.metadata
        evaluated = self.last_evaluation[1] if self.last_evaluation else {}
        summary = {
            "step": self.step,
            "objective": self.config.objective.name,
            "parameters": count.total,
            "non_embedding_parameters": count.non_embedding,
            "tokens": totals["train/tokens"],
            "epochs": self._epochs(self.step),
            "flops_6nd": totals["train/flops_6nd"],
            "flops_exact": totals["train/flops_exact"],
            "train_nats_per_token": losses[-1] if losses else None,
            **{f"eval_{name}": evaluated[f"eval/{name}"] for name in metrics_lib.EVALUATED},
            "eval_rows_digest": self.validate.rows_digest,
            "eval_rows": len(self.validate.rows_NL),
            "eval_draws": self.validate.draws,
            "tokens_per_second": self.meter.tokens_per_second,
            "seconds": self.meter.seconds,
            "unigram_entropy_nats": corpus.unigram_entropy_nats,
            "rows_digest": self.rows_digest,
            "corpus_digest": corpus.digest,
            "tokenizer_sha256": self.tokenizer.sha256,
        }
        return json_files.finite(summary)

    def _restore_or_init(self) -> tuple[TrainState, dict[str, Any]]:
        step = processes.from_first(self.checkpoints.latest())
        if step is None:
            shardings = state_shardings(self.config, self.mesh)
            return jax.jit(lambda: init_state(self.config), out_shardings=shardings)(), {}
        self.progress.log(f"continuing from step {step} of {self.workdir}")
        return restore_state(self.checkpoints, self.config, self.mesh, step)

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _epochs(self, steps: int) -> float:
        """How often so many steps read the tokens that the run may read."""
        tokens = self.corpus.metadata.train_tokens
        return steps * self.config.tokens_per_step / min(self.config.data.unique_tokens or tokens, tokens)

    def _log_description(self) -> None:
        c, d = self.config, self.corpus.metadata
        count = accounting.parameters(c.model)
        self.progress.log(
            f"{c.objective.name}: {count.total:,} parameters ({count.non_embedding:,} without embeddings), "
            f"{c.steps:,} steps x {c.tokens_per_step:,} tokens ({self._epochs(c.steps):.2f} epochs); "
            f"corpus {d.source}: {d.train_documents:,} documents, {d.train_tokens:,} tokens, "
            f"unigram entropy {d.unigram_entropy_nats:.3f} nats/token; "
            f"mesh {dict(self.mesh.shape)} on {jax.devices()[0].device_kind}"
            + (f", {processes.count()} processes" if processes.count() > 1 else "")
        )


def restore_state(
    checkpoints: Checkpoints, config: Config, mesh: jax.sharding.Mesh, step: int
) -> tuple[TrainState, dict[str, Any]]:
    """The state saved at `step`, sharded over `mesh` whatever mesh wrote it, and its cursor.

    An imported model has no moments: they begin at zero. UserError where the step cannot be used, or is of another run
    than `config`.
    """
    item = checkpoints.item(step)
    run_item.require_same(item, config, checkpoints.directory)
    abstract = abstract_state(config, mesh)
    if item.begun:
        restored = checkpoints.restore(step, params=abstract.params, optimizer_state=abstract.optimizer_state)
        moments = restored["optimizer_state"]
    else:
        restored = checkpoints.restore(step, params=abstract.params)
        shardings = jax.tree.map(lambda x: x.sharding, abstract.optimizer_state)
        moments = jax.jit(optimizer.make(config).init, out_shardings=shardings)(restored["params"])
    return TrainState(jax.device_put(jnp.int32(step), abstract.step.sharding), restored["params"], moments), item.cursor


def read_summary(workdir: Path) -> dict[str, Any] | None:
    """What `summary.json` holds, on every process; None where there is none. UserError, on all, for a damaged one."""
    summary = None
    with processes.agreement():
        path = workdir / "summary.json"
        if processes.is_first() and path.exists():
            try:
                summary = json_files.read(path)
            except UserError as error:
                raise UserError(f"{error}; remove it, and the same command writes it again") from error
    return processes.from_first(summary)


def evaluation_steps(config: Config) -> frozenset[int]:
    """Steps that `evaluate.at` names, the nearest to each position. UserError where one is no position of the run."""
    steps = set()
    for word in config.evaluate.at.split():
        tokens = optimizer.parse_position(word, config.steps * config.tokens_per_step)
        # Neither NaN nor infinity has a nearest step.
        step = None if tokens is None or tokens > 1e18 else round(tokens / config.tokens_per_step)
        if step is None or not 0 < step <= config.steps:
            raise UserError(
                f"--config.evaluate.at has {word[:80]!r}; a position is in tokens (2000000, 10.5G) or percent (2%), "
                f"from one step ({config.tokens_per_step} tokens) to the end of the run"
            )
        steps.add(step)
    return frozenset(steps)
