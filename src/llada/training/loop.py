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

from llada import accounting, changes, json_files, processes
from llada import mesh as mesh_lib
from llada.config import Config, DebugConfig
from llada.data.rows import chain_digest
from llada.data.tokenizer import Tokenizer
from llada.errors import DiskError, Diverged, Interrupted, UserError
from llada.evaluation.validation import Validator
from llada.files import write_atomically
from llada.objectives import families
from llada.paths import user_path
from llada.training import calls, epochs, guard, optimizer
from llada.training import digests as digests_lib
from llada.training import metrics as metrics_lib
from llada.training import workdir as workdir_lib
from llada.training.checkpoint import Checkpoints
from llada.training.corpus import Corpus
from llada.training.progress import Progress, TerminalProgress
from llada.training.resuming import read_summary, restore_or_init, roll_back
from llada.training.step import Batch, TrainState, compile_step
from llada.training.stopping import Stop, stop_signals
from llada.training.watchdog import Watchdog

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


def train(
    config: Config,
    workdir: str | Path,
    progress: Progress | None = None,
    allow_rate_jump: bool = False,
    until: int | None = None,
) -> dict[str, Any]:
    """Train `config` in `workdir` until its last step; returns the summary it wrote to `summary.json`.

    `until`, an earlier step, ends this call once that is saved, and returns it alone.
    `progress` receives its reports; default: lines on the terminal. A run whose length has changed is refused where its
    schedule would make the learning rate jump, as is a value that the run has left behind, unless `allow_rate_jump`.
    Raises UserError (Diverged among them) or Interrupted (after saving), on all processes alike.
    """
    workdir = user_path(workdir, "--workdir")
    workdir_lib.require_same(config)
    first = processes.is_first()
    if config.train.epochs is not None:
        config = epochs.with_steps(config, workdir, allow_rate_jump)
    progress = (progress if first else None) or TerminalProgress(config, quiet=not first)
    # What can be refused without any work, before anything is written.
    optimizer.evaluation_steps(config)
    optimizer.parse_schedule(config)
    mesh = mesh_lib.make(config.mesh)
    mesh_lib.check(config, mesh)
    workdir_lib.require_source(workdir, config)

    with jax.set_mesh(mesh), stop_signals() as received, workdir_lib.held(workdir):
        saved, config = workdir_lib.claim(workdir, config, allow_rate_jump, progress.log)
        summary = read_summary(workdir) if saved is not None and saved >= config.steps else None
        if saved is not None and saved > config.steps:
            progress.log(f"{workdir} is already at step {saved} of {config.steps}: nothing to do")
            return summary or {"step": saved}
        tokenizer, corpus = workdir_lib.prepare(workdir, config, progress.log, received.check)
        received.answer = "finishing this step and saving"
        advice = functools.partial(workdir_lib.advice, workdir)
        # An exception of one process would leave the others waiting in a collective: it ends all of them, but for what
        # all raise alike. While a run is opened that is any UserError, as all make the same checks; between steps only
        # what all read from the same metrics (Diverged) and the agreed signal (Interrupted), as a full disk, also a
        # UserError, is met by one process alone.
        with (
            processes.ending_together(UserError, Interrupted, advice=advice),
            Watchdog(config.train.watchdog_seconds, workdir) as watchdog,
            Checkpoints(workdir, config.checkpoint.keep, keep_every=config.checkpoint.keep_every) as checkpoints,
            TrainingRun(
                config, workdir, mesh, tokenizer, corpus, checkpoints, Stop(received, mesh), progress, watchdog
            ) as run,
            processes.ending_together(Interrupted, Diverged, advice=advice),
        ):
            calls.record(workdir, config, mesh, run.step, saved is not None and run.step == 0, progress.log)
            while run.step < min(until or config.steps, config.steps) and not run.stop.number:
                run.advance()
            run.flush()
            if run.step < config.steps:
                run.save()
                checkpoints.wait()
                if run.stop.number:
                    raise Interrupted(run.stop.number, f"after step {run.step}")
                return {"step": run.step}
            return run.finish()


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
        watchdog: Watchdog,
    ):
        self.config, self.workdir, self.mesh, self.stop, self.watchdog = config, workdir, mesh, stop, watchdog
        self.tokenizer, self.corpus, self.checkpoints, self.progress = tokenizer, corpus, checkpoints, progress
        first, special = processes.is_first(), tokenizer.special
        # The digest is of whole batches, so the process that computes it reads them; the others read their own rows.
        positions = None if first else mesh_lib.local_positions(mesh, config.train.batch_size)
        self.rows = corpus.batches(config, tokenizer, positions)
        self._log_description()
        # The state before all else: batches, metrics and their files go on from its step and its cursor.
        self.state, cursor = restore_or_init(checkpoints, config, mesh, progress.log)
        self.step: int = int(jax.device_get(self.state.step))
        self.rows_digest: str = cursor.get("rows_digest", "")
        self.closing = contextlib.ExitStack()
        self.positions, self.batches = self.rows.positions, self.rows.iterate(self.step)
        self.closing.callback(self.batches.close)  # ends its threads
        self.meter = metrics_lib.Meter(config, cursor.get("meter"))
        self.skips = guard.Skips(changes.at(config, self.step), cursor)
        self.writer = metrics_lib.Writer(workdir, self.step, progress.log) if first else None
        self.train_step: TrainStep = self._compile_step()
        self.debugged: Any = None
        if config.debug != DebugConfig():
            from llada.training.debug import Debugged  # seldom needed

            self.debugged = Debugged(self.train_step, config.debug, workdir, progress.log)
            self.train_step = self.closing.enter_context(self.debugged)
        held_out = corpus.held_out(config, tokenizer)
        self.validate = Validator(config, special, corpus.text_bytes(tokenizer.token_bytes_V), held_out, mesh)
        self.evaluate_at = optimizer.evaluation_steps(config)
        self.changes_after = changes.steps(config)
        self.pending: dict[str, jax.Array] | None = None
        self.last_evaluation: tuple[int, dict[str, float]] | None = None

    def __enter__(self) -> "TrainingRun":
        return self

    def __exit__(self, *_: object) -> None:
        """Stop reading batches ahead, and tracing."""
        self.closing.close()

    def _compile_step(self) -> TrainStep:
        """The program of the next step, compiled when it is first called."""
        self.compiled = False
        return compile_step(changes.at(self.config, self.step), self.tokenizer.special, self.mesh)

    def _change(self) -> None:
        """Go on by the values that hold after the present step; as a call that begins here would."""
        self.flush()
        config = changes.at(self.config, self.step)
        self.skips.config = config
        norms_W = guard.restored(config, {"guard": self.skips.state(self.state.norms_W)})
        norms_W = jax.device_put(norms_W, mesh_lib.sharding(self.mesh, "replicated"))
        self.state = self.state._replace(norms_W=norms_W)
        program = self._compile_step()
        if self.debugged is None:
            self.train_step = program
        else:
            self.debugged.program = program

    def advance(self) -> None:
        """One step of the run; the device works on it while the host looks at the one before."""
        if self.step in self.changes_after and self.compiled:
            self._change()
        rows = next(self.batches)
        if processes.is_first():
            self.rows_digest = chain_digest(self.rows_digest, *jax.tree.leaves(rows))
        batch = mesh_lib.shard_batch(self.mesh, rows, self.positions, self.config.train.batch_size)
        self.state, metrics = self._dispatch(batch)
        if self.log_pending():  # the step just started was of a state that is given up
            self.state, metrics = self._dispatch(batch)
        self.stop.post()
        if error := self.checkpoints.failed():
            self._go_on_without(error, self._next_save())
        self.step += 1
        self.pending = metrics
        last = self.step == self.config.steps
        if last or self._due(self.config.evaluate.every) or self.step in self.evaluate_at:
            self.flush()
            self.evaluate()
        if last or self._due(self.config.checkpoint.every):
            self.flush()
            self.save()

    def _dispatch(self, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        """Start a step. The first is compiled, which is logged, as it may take minutes."""
        start = None if self.compiled else time.perf_counter()
        if start is not None:
            self.progress.log("compiling the training step ...")
        try:
            out = self.train_step(self.state, batch)
        except FloatingPointError as error:  # debug.nans
            raise self._diverged(f"step {self.step + 1} computes a NaN: {error}") from error
        if start is not None:
            self.progress.log(f"compiled in {time.perf_counter() - start:.1f} s")
            self.compiled = True
            self.watchdog.alive()
        return out

    def log_pending(self) -> bool:
        """Fetch and record the newest metrics not yet seen; whether the run went back to an earlier state for them.

        Diverged where it cannot: too many updates skipped in a row, or parameters that are no more finite.
        """
        if self.pending is None:
            return False
        values = {name: float(value) for name, value in jax.device_get(self.pending).items()}
        self.pending = None
        self.watchdog.alive()
        self.stop.collect()
        went_back = self._count(values, skipped=bool(values.pop("skipped")))
        if self.step % self.config.train.log_every == 0 or self.step == self.config.steps:
            window = self.meter.window(self.step, values)
            self.record(window)
            self.progress.window(self.step, window)
        return went_back

    def _count(self, values: dict[str, float], skipped: bool) -> bool:
        """Count a finished step with these metrics; whether the run went back to an earlier state."""
        figures = (
            f"loss {values['loss_nats_per_token']} nats/token, gradient norm {values['grad_norm']}, parameter norm "
            f"{values['parameter_norm']}"
        )
        self.skips.count(skipped)
        if skipped:
            self.meter.skip()
            self.progress.log(f"step {self.step} is skipped, as {self.skips.reason(values)}: {figures}")
            if not self.skips.too_many:
                return False
            return self._roll_back(
                f"step {self.step} is the last of {self.skips.in_a_row} skipped in a row "
                f"(--config.train.most_skipped={self.skips.config.train.most_skipped}): {self.skips.reason(values)}, "
                f"{figures}"
            )
        # The norm after the step is among them: a finite loss may still have led to parameters that must not be saved.
        if not all(map(math.isfinite, values.values())):
            self.meter.skip()
            return self._roll_back(f"step {self.step} is not finite: {figures}")
        self.meter.add(values)
        return False

    def _roll_back(self, what: str) -> bool:
        """Go on from an earlier state, where there is one to be used; else Diverged."""
        back = roll_back(self.checkpoints, self.config, self.mesh, self.skips, self.step)
        if back is None:
            raise self._diverged(what)
        self.state, saved = back
        self.progress.log(f"{what}: back to step {saved}, without the batches of steps {saved + 1} to {self.step}")
        return True

    def _diverged(self, what: str) -> Diverged:
        self.checkpoints.wait()
        good = self.checkpoints.latest()
        remedy = "Try a lower --config.optimizer.peak_learning_rate"
        remedy += "" if good is None else ", which this workdir takes, or an older step: see docs/running.md"
        return Diverged(
            f"{what}. Last good checkpoint: {'none' if good is None else f'step {good}'} in "
            f"{self.checkpoints.directory}; nothing later was saved. {remedy}"
        )

    def flush(self) -> None:
        """Wait for the dispatched step, log its metrics, and stop the throughput clock for what follows."""
        self.meter.pause()
        self.log_pending()
        self.meter.pause()

    def evaluate(self) -> None:
        """Held-out figures of the present parameters."""
        if self.last_evaluation is None:
            self.progress.log(f"evaluating on {self.validate.count:,} held-out rows (compiled first) ...")
        with self.watchdog.suspended() if self.last_evaluation is None else contextlib.nullcontext():
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
        cursor |= {"corpus_digest": self.corpus.metadata.digest, "guard": self.skips.state(self.state.norms_W)}
        if error := self.checkpoints.failed(wait=True):
            self._go_on_without(error, self.step)
        try:
            self.checkpoints.save(self.state, self.config, cursor, self.tokenizer.content)
        except DiskError as error:
            if self.stop.number or self.step >= self.config.steps:
                raise
            self._go_on_without(error, self._next_save())

    def _next_save(self) -> int:
        """The step after the present one that will be saved."""
        every = self.config.checkpoint.every
        return min((self.step // every + 1) * every, self.config.steps)

    def _go_on_without(self, error: DiskError, following: int) -> None:
        """One checkpoint found no room: the step `following` is another try. Of several processes it ends all."""
        if processes.count() > 1:
            raise error
        self.checkpoints.start_over()
        self.progress.log(f"{str(error).partition(';')[0]}; training goes on, and saves again at step {following}")

    def finish(self) -> dict[str, Any]:
        """Write `summary.json`: the run's figures in one place. Every process returns it."""
        if self.last_evaluation is None:  # a finished run, called again
            summary = read_summary(self.workdir)
            if summary is not None and summary.get("step") == self.step:
                return summary
            self.evaluate()
        digests = digests_lib.of_items({"params": self.state.params, "optimizer_state": self.state.optimizer_state})
        found = self.summary() | digests_lib.fingerprints(digests) if processes.is_first() else None
        summary = processes.from_first(found)
        if processes.is_first():
            content = json_files.dumps(summary, indent=2) + "\n"
            write_atomically(self.workdir / "summary.json", content.encode())
        return summary

    def summary(self) -> dict[str, Any]:
        """The run's figures after its last evaluation, as process 0 knows them."""
        count = accounting.parameters(self.config.model)
        totals = metrics_lib.run_totals(self.config, self.step)
        lines = metrics_lib.read(self.workdir / "metrics.jsonl")
        losses = [loss for line in lines if (loss := metrics_lib.training_loss(line)) is not None]
        self.meter.count_wall()
        corpus = self.corpus.metadata
        evaluated = self.last_evaluation[1] if self.last_evaluation else {}
        summary = {
            "step": self.step,
            "objective": self.config.objective.name,
            "variant": self.config.objective.variant,
            "bound_trained": families.of(self.config).bound_trained(self.config.objective),
            "parameters": count.total,
            "non_embedding_parameters": count.non_embedding,
            "tokens": totals["train/tokens"],
            "epochs": self.rows.epochs(self.step),
            "skipped_steps": self.skips.total,
            "rolled_back": self.skips.rolled_back,
            "flops_6nd": totals["train/flops_6nd"],
            "flops_exact": totals["train/flops_exact"],
            "train_nats_per_token": losses[-1] if losses else None,
            **{f"eval_{name}": evaluated[f"eval/{name}"] for name in metrics_lib.EVALUATED},
            "eval_rows_digest": self.validate.rows_digest,
            "eval_rows": self.validate.count,
            "eval_draws": self.validate.draws,
            "tokens_per_second": self.meter.tokens_per_second,
            "seconds": self.meter.seconds,
            "unigram_entropy_nats": corpus.unigram_entropy_nats,
            "rows_digest": self.rows_digest,
            "corpus_digest": corpus.digest,
            "tokenizer_sha256": self.tokenizer.sha256,
        }
        return json_files.finite(summary)

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _log_description(self) -> None:
        c, d = self.config, self.corpus.metadata
        count = accounting.parameters(c.model)
        self.progress.log(
            f"{c.objective.name}: {count.total:,} parameters ({count.non_embedding:,} without embeddings), "
            f"{c.steps:,} steps x {c.tokens_per_step:,} tokens ({self.rows.epochs(c.steps):.2f} epochs); "
            f"corpus {d.source}: {d.train_documents:,} documents, {d.train_tokens:,} tokens, "
            f"unigram entropy {d.unigram_entropy_nats:.3f} nats/token; "
            f"mesh {dict(self.mesh.shape)} on {jax.devices()[0].device_kind}"
            + (f", {processes.count()} processes" if processes.count() > 1 else "")
        )
        if variant := families.variant(c):
            self.progress.log(f"objective: {variant}")
