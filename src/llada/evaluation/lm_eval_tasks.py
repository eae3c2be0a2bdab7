"""Tasks of lm-evaluation-harness: found, loaded, planned and run, with results in the files that its own CLI writes."""

import difflib
import logging
import os
import random
import time
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from llada import processes
from llada.errors import UserError, in_brief
from llada.evaluation.lm_eval import HarnessModel
from llada.evaluation.presets import Row

# Ours comes first: it sets what lm-eval reads when it is imported.
from lm_eval import evaluator  # isort: skip
from lm_eval.loggers import EvaluationTracker  # isort: skip
from lm_eval.tasks import TaskManager  # isort: skip
from lm_eval.utils import make_table  # isort: skip

_SEEDS = {"random": 0, "numpy": 1234, "fewshot": 1234}  # those of its CLI


class Loaded(NamedTuple):
    """A row's task or group: lm-eval's tasks and groups by their names. `missing` says why there are none."""

    row: Row
    leaves: dict[str, Any]
    groups: dict[str, Any]
    missing: str | None = None

    @property
    def wants_greedy(self) -> bool:
        """Whether a metric of the task reads `is_greedy`."""
        return any(
            task.OUTPUT_TYPE == "loglikelihood" or "exact_match" in getattr(task, "_metric_fn_list", {})
            for task in self.leaves.values()
        )


def manager(names: Iterable[str], include_path: Path | None) -> TaskManager:
    """lm-eval's index of tasks: those of `include_path` alone where they have all the names, else its own too.

    UserError for a name that is nowhere. Reading its own 14,000 takes seconds.
    """
    names = list(names)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its advice goes beside results
    if include_path is not None:
        found = TaskManager(include_path=str(include_path), include_defaults=False)
        if all(name in found.task_index for name in names):
            return found
    found = TaskManager(include_path=None if include_path is None else str(include_path))
    for name in names:
        if name not in found.task_index:
            close = difflib.get_close_matches(name, found.all_tasks, n=1, cutoff=0.75)
            hint = f"; did you mean {close[0]}?" if close else ";"
            where = (
                "lm-eval's own and those of --include_path" if include_path else "lm-eval's; --include_path adds more"
            )
            raise UserError(f"--tasks: there is no task {name}{hint} known are {where}")
    return found


def load(tasks: TaskManager, rows: Sequence[Row], confirm_unsafe: bool) -> list[Loaded]:
    """Each row's tasks with their data; `missing` where it cannot be had. UserError for code that is not confirmed."""
    return [_load(tasks, row, confirm_unsafe) for row in rows]


def _load(tasks: TaskManager, row: Row, confirm_unsafe: bool) -> Loaded:
    try:
        found = tasks.load([row.task])
    except Exception as error:  # of lm-eval, of a task's own code, of datasets, of the network
        advice = "it needs the network, or its data at hand (HF_HOME); --include_path has tasks on local files"
        return Loaded(
            row, {}, {}, f"task {row.task} cannot be loaded: {in_brief(error) or type(error).__name__}; {advice}"
        )
    leaves, groups = found["tasks"], found.get("groups", {})
    for name, task in leaves.items():
        if getattr(task, "UNSAFE_CODE", False) and not confirm_unsafe:
            raise UserError(f"task {name} runs code that the model writes; --confirm_run_unsafe_code allows it")
        if row.shots is not None and task.get_config("num_fewshot") != row.shots:
            task.set_config("num_fewshot", row.shots)
    return Loaded(row, leaves, groups)


def plan(model: HarnessModel, loaded: Sequence[Loaded], limit: float | None, options: dict[str, Any]) -> list[dict]:
    """What each row will send through the model; nothing of it is run."""
    prepare(loaded)
    planned = []
    for each in loaded:
        facts: dict[str, Any] = {}
        for task in each.leaves.values():
            count = limit if limit is None or limit >= 1 else -(-len(task.eval_docs) * limit // 1)
            task.build_all_requests(
                limit=None if count is None else int(count),
                rank=0,
                world_size=1,
                system_instruction=options["system_instruction"],
                apply_chat_template=options["chat"],
                fewshot_as_multiturn=options["chat"],
                chat_template=model.apply_chat_template if options["chat"] else None,
            )
            kinds: dict[str, list] = {}
            for instance in task.instances:
                kinds.setdefault(instance.request_type, []).append(instance)
            for kind, instances in kinds.items():
                found = model.planned(kind, instances)
                facts = {name: facts.get(name, 0) + value for name, value in found.items()}
        shots = {task.get_config("num_fewshot") for task in each.leaves.values()}
        writes = any(task.OUTPUT_TYPE == "generate_until" for task in each.leaves.values())
        facts = {"requests": 0, "rows": 0, "tokens": 0, "truncated": 0} | facts
        about = {"task": each.row.task, "tasks": len(each.leaves), "shots": sorted(shots), "writes": writes}
        planned.append(about | facts)
    return planned


def evaluate(
    model: HarnessModel,
    loaded: Sequence[Loaded],
    name: str,
    out: Path | None,
    limit: float | None,
    options: dict[str, Any],
) -> dict[str, Any]:
    """lm-eval's results of the loaded tasks, saved under `out`/`name` as its CLI does (None: not by this process).

    `options`: system_instruction, chat (whether contexts are dialogues), log_samples, bootstrap_iters, confirm_unsafe,
    git_hash, model_args (what results show of the model). UserError where the results cannot be written.
    """
    if options["confirm_unsafe"]:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # asked again by Hugging Face's code_eval
    begun, chat, system = time.time(), options["chat"], options["system_instruction"]
    tracker, model_args = EvaluationTracker(output_path=None if out is None else str(out)), {"path": name}
    model_args |= options["model_args"]
    tracker.general_config_tracker.log_experiment_args("llada", model_args, system, model.chat_template(chat), chat)
    prepare(loaded)
    results: dict[str, Any] = evaluator.evaluate(
        model,
        tasks_of(loaded),
        limit=limit,
        bootstrap_iters=options["bootstrap_iters"],
        log_samples=True,
        system_instruction=system,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        confirm_run_unsafe_code=options["confirm_unsafe"],
    )
    samples = results.pop("samples")
    # What `simple_evaluate` adds, but for versions of PyTorch: it would import it.
    results["config"] = {"model": "llada", "model_args": model_args, **model.get_model_info()} | {
        "limit": limit,
        "bootstrap_iters": options["bootstrap_iters"],
        **{f"{name}_seed": seed for name, seed in _SEEDS.items()},
    }
    results |= {"git_hash": options["git_hash"], "date": begun, "lm_eval_version": metadata.version("lm_eval")}
    results["pretty_env_info"] = jax.print_environment_info(return_string=True)
    with processes.agreement():
        if out is not None:
            _save(tracker, results, samples if options["log_samples"] else None, samples)
    return results


def prepare(loaded: Sequence[Loaded]) -> None:
    """Tasks as lm-eval's CLI has them before they are run: seeds of its own, and no examples where nobody says."""
    random.seed(_SEEDS["random"])
    np.random.seed(_SEEDS["numpy"])  # tasks of lm-eval draw from it
    for each in loaded:
        for task in each.leaves.values():
            if task.get_config("num_fewshot") is None:
                task.set_config("num_fewshot", 0)
            task.set_fewshot_seed(seed=_SEEDS["fewshot"])


def tasks_of(loaded: Sequence[Loaded]) -> dict[str, Any]:
    """All of them in the form that lm-eval loads them in. UserError where two rows have a task in common."""
    all_tasks: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for each in loaded:
        for name in each.leaves:
            if name in all_tasks["tasks"]:
                raise UserError(f"--tasks: {name} is in two of them; leave one out")
        all_tasks["tasks"] |= each.leaves
        all_tasks["groups"] |= each.groups
    all_tasks["group_map"] = {name: group.child_names for name, group in all_tasks["groups"].items()}
    return all_tasks


def _save(tracker: EvaluationTracker, results: dict[str, Any], logged: dict | None, samples: dict) -> None:
    """Results, with the hash of every task's prompts, and samples where they are wanted. UserError if that fails."""
    folder = Path(tracker.output_path) / str(tracker.general_config_tracker.model_name_sanitized)
    before = set(folder.glob("results_*.json"))
    tracker.save_results_aggregated(results=results, samples=samples)  # it says nothing when it fails
    if not set(folder.glob("results_*.json")) - before:
        raise UserError(f"--out={tracker.output_path} cannot be written; give another directory")
    for name in logged or ():
        tracker.save_results_samples(task_name=name, samples=samples[name])


def table(results: dict[str, Any]) -> str:
    """lm-eval's table of results, and that of groups."""
    text = make_table(results)
    return f"{text}\n{make_table(results, 'groups')}" if results.get("groups") else text
