"""llada lm_eval --workdir=DIR --tasks=a,b [--preset=paper-table1] [--include_path=DIR] [--at=N|all] [--dry_run]

Tasks of lm-evaluation-harness (extra `eval`), with results in the files that its own CLI writes, under --out (default
DIR/lm_eval). A LLaDA scores answers by its bound (--draws, --estimator, --cfg_scale) and writes texts by the reverse
process; an ARM scores exactly and writes left to right. --preset has the published evaluations, task by task: shots,
draws, guidance, lengths, blocks and the rule for end tokens; flags given beside it change all of its rows.

--dry_run prints what will run and what it sends through the model. Finished requests are kept (--finished), so that a
killed evaluation goes on where it stood. --at=all evaluates every checkpoint of a run, or the last ones of all runs of
a sweep, and draws scores against FLOPs; a directory with the workdirs of several runs gives them all in one picture.
--include_path has tasks of one's own: YAML files beside the JSON lines that they name.
"""

import contextlib
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llada import json_files, processes
from llada.commands import joining, opening, progress
from llada.commands import lm_eval_flags as asked
from llada.commands.command_flags import required
from llada.commands.lm_eval_flags import Model
from llada.config import Config, MeshConfig
from llada.errors import UserError
from llada.evaluation.presets import PRESETS
from llada.files import write_atomically
from llada.paths import user_path

if TYPE_CHECKING:  # at run time these would import JAX, before the flags are parsed
    from llada.evaluation.harness import Settings, Tally
    from llada.evaluation.lm_eval_tasks import Loaded
    from llada.scaling.downstream import Reading
    from llada.training.run import Run

FLAGS = asked.FLAGS


def run(overrides: dict[str, str]) -> int:
    """Evaluate, print lm-eval's table, and save."""
    workdir = user_path(required(asked.WORKDIR, "give a workdir of llada train"), "--workdir")
    rows = asked.rows()
    mesh = opening.mesh(overrides)
    joining.join()
    with processes.agreement():
        asked.require_lm_eval()
        include_path = asked.include_path()
        models = asked.models(workdir)
        settings = asked.settings(models, rows)
    out = user_path(asked.OUT.value, "--out") if asked.OUT.value is not None else workdir / "lm_eval"
    of_all = (flag.value for flag in (*asked.OF_ALL, opening.DTYPE))
    opening.require_same([mesh, rows, models, settings, *of_all])

    from llada.evaluation import lm_eval_tasks

    with processes.agreement():
        tasks = lm_eval_tasks.manager([row.task for row in rows], include_path)
        loaded = lm_eval_tasks.load(tasks, rows, asked.UNSAFE.value or asked.DRY_RUN.value)
        missing = [each.missing for each in loaded if each.missing]
        if missing and not asked.DRY_RUN.value:
            raise UserError(missing[0])
    if asked.DRY_RUN.value:
        with processes.agreement():
            return _dry_run(models, settings, loaded)
    found: list[Reading] = []
    with processes.ending_together(UserError):
        for model in models:
            found += _evaluate(model, mesh, settings[model.workdir], loaded, out)
        with processes.agreement():
            if asked.AT.value == "all" and processes.is_first():
                _save_curves(found, out)
    return 0


def _options(model: Model) -> dict[str, Any]:
    """What `lm_eval_tasks` is to do, beside the model's own settings."""
    from llada.training import calls

    return {
        "system_instruction": asked.SYSTEM.value,
        "chat": asked.is_chat(),
        "log_samples": asked.LOG_SAMPLES.value,
        "bootstrap_iters": asked.BOOTSTRAP.value,
        "confirm_unsafe": asked.UNSAFE.value,
        "git_hash": calls.commit(),
        "model_args": {"workdir": str(model.workdir), "step": model.step, "preset": asked.PRESET.value},
    }


def _of_leaves(settings: "dict[str, Settings]", loaded: "Sequence[Loaded]") -> "dict[str, Settings]":
    """Settings by the names of leaves, which requests bring; `is_greedy` is found out where a metric reads it."""
    return {leaf: settings[each.row.task]._replace(greedy=each.wants_greedy) for each in loaded for leaf in each.leaves}


def _evaluate(
    model: Model, mesh: MeshConfig, settings: "dict[str, Settings]", loaded: "Sequence[Loaded]", out: Path
) -> "list[Reading]":
    """Evaluate one checkpoint, print lm-eval's table and save its files."""
    from llada.evaluation import harness_cache, lm_eval_tasks
    from llada.evaluation.harness import Harness
    from llada.evaluation.lm_eval import HarnessModel
    from llada.scaling import downstream

    opened = opening.open_run(model.workdir, model.step, mesh)
    of_leaves = _of_leaves(settings, loaded)
    identity = identity_of(opened, opening.DTYPE.value)
    facts = identity | facts_of(opened, of_leaves) | {"preset": asked.PRESET.value}
    with progress.bar("requests answered") as show:
        harness = Harness(opened, asked.template(opened), show)
        with contextlib.ExitStack() as stack:
            with processes.agreement():
                harness.cache = stack.enter_context(harness_cache.opened(_cache(out, identity), identity))
            results = lm_eval_tasks.evaluate(
                HarnessModel(harness, of_leaves.__getitem__, facts),
                loaded,
                model.name,
                out if processes.is_first() else None,
                asked.LIMIT.value,
                _options(model),
            )
    if processes.is_first():
        _print(model, opened, results, harness.tally, out)
    return downstream.readings(downstream.checkpoint(model.workdir, opened.config, opened.step), results)


def _cache(out: Path, identity: dict[str, Any]) -> Path | None:
    """The file of finished requests, of the first process only."""
    if asked.FINISHED.value == "none" or not processes.is_first():
        return None
    if asked.FINISHED.value is not None:
        return user_path(asked.FINISHED.value, "--finished")
    digest = hashlib.sha256(json_files.dumps(identity).encode()).hexdigest()
    return out / "requests" / f"{digest[:16]}.jsonl"


def identity_of(opened: "Run", dtype: str) -> dict[str, Any]:
    """What the numbers depend on, beside a request and its settings; `dtype` is that of the parameters."""
    import jax

    from llada.training import digests

    return {
        "parameters_sha256": digests.combined(digests.of_items({"params": opened.params})["params"]),
        "objective": opened.config.objective.name,
        "tokenizer_sha256": opened.tokenizer.sha256,
        "dtype": dtype,
        "device_kind": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


def facts_of(opened: "Run", settings: "dict[str, Settings]") -> dict[str, Any]:
    """What results say of the model and of how it was asked."""
    from llada import accounting
    from llada.training import calls

    causal = opened.config.model.causal
    return {
        "step": opened.step,
        "parameters": accounting.parameters(opened.config.model).total,
        "likelihood": "exact" if causal else "a bound, or an estimate of one, by the estimator of each task",
        "mesh": dict(opened.mesh.shape),
        "settings": {task: each.described(causal) for task, each in settings.items()},
        "surroundings": calls.surroundings(),
    }


def _print(model: Model, opened: "Run", results: dict[str, Any], tally: "Tally", out: Path) -> None:
    """lm-eval's table, and what happened to requests on their way."""
    from llada.evaluation import lm_eval_tasks

    print(f"{model.workdir}, step {opened.step}: {opened.config.objective.name}")
    print(lm_eval_tasks.table(results))
    print(
        f"{tally.requests:,} requests, {tally.cached:,} of them known already; results: {out / model.name}", flush=True
    )
    for count, what in (
        (
            tally.truncated,
            "contexts were cut on the left: they are longer than the model's context beside their answer",
        ),
        (tally.shortened, "texts got fewer tokens than asked for: the model's context has no more"),
    ):
        if count:
            print(f"{count:,} {what} (model.max_length={opened.config.model.max_length})", file=sys.stderr)


def _dry_run(models: Sequence[Model], settings: "dict[Path, dict[str, Settings]]", loaded: "Sequence[Loaded]") -> int:
    """Print what would run. It is counted with the first checkpoint of each run: tokenizers do not change."""
    from llada.evaluation import lm_eval_tasks
    from llada.evaluation.harness import Harness
    from llada.evaluation.lm_eval import HarnessModel
    from llada.training import run as run_lib

    if not processes.is_first():
        return 0
    if asked.PRESET.value:
        preset = PRESETS[asked.PRESET.value]
        print(f"{asked.PRESET.value}: {preset.title}" + f" ({preset.remark})" * bool(preset.remark))
    for workdir, own in settings.items():
        steps = [model.step for model in models if model.workdir == workdir]
        opened = run_lib.describe(workdir, steps[0])
        of_leaves = _of_leaves(own, loaded)
        model = HarnessModel(Harness(opened, asked.template(opened)), of_leaves.__getitem__)
        plans = lm_eval_tasks.plan(model, loaded, asked.LIMIT.value, _options(Model(workdir, steps[0])))
        print(f"{workdir}: {opened.config.objective.name}, {len(steps)} checkpoint(s)")
        for each, facts in zip(loaded, plans, strict=True):
            shown = each.missing or _planned(facts, of_leaves[next(iter(each.leaves))], opened.config)
            print(f"  {shown}")
    return 0


def _planned(facts: dict[str, Any], settings: "Settings", config: Config) -> str:
    """A line on what a task sends through the model."""
    from llada import accounting

    flops = accounting.flops_6nd_per_token(config.model) / 3 * facts["tokens"]  # forward alone is a third
    shots = ", ".join(map(str, facts["shots"]))
    described = settings.described(config.model.causal)["writing" if facts["writes"] else "scoring"]
    how = ", ".join(f"{name}={value}" for name, value in described.items() if value is not None)
    return (
        f"{facts['task']}: {facts['requests']:,} requests of {facts['tasks']} task(s), {shots} shots, at most "
        f"{facts['rows']:,} forward passes of one row, {facts['tokens']:,} tokens, {flops:.2g} FLOPs (2ND); "
        f"{facts['truncated']:,} contexts cut; {how}"
    )


def _save_curves(found: "Sequence[Reading]", out: Path) -> None:
    """downstream.json, downstream.md and, where matplotlib is, downstream.png."""
    from llada.scaling import downstream, figure, numbers, provenance

    text = json_files.dumps({"provenance": provenance.line(), "readings": downstream.to_json(found)}, indent=1)
    write_atomically(out / "downstream.json", f"{text}\n".encode())
    table = numbers.markdown_table(downstream.table(found))
    write_atomically(out / "downstream.md", f"{table}\n\n{provenance.line()}\n".encode())
    print(table)
    try:
        figure.require_matplotlib()
    except UserError as error:
        print(f"no picture: {error}", file=sys.stderr)
        return
    write_atomically(out / "downstream.png", downstream.draw(found, "Downstream scores against training FLOPs"))
    print(f"picture: {out / 'downstream.png'}   figures: {out / 'downstream.json'}")
