"""Every way of using a model, with the commands' own words, on two processes of two devices: as on one device.

The mesh is fsdp=2 x tensor=2, in which each process holds half of the parameters and each device a quarter. Both
processes run one command after the other; what each said, wrote and held is in a file of its own.
"""

import contextlib
import importlib.util
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import in_process
import numpy as np
import pytest

MESH = ("--config.mesh.fsdp=2", "--config.mesh.tensor=2")
ROWS = ("--rows=3", "--draws=2")
BY_ORDER = ("chain_rule", "sampler")
REQUESTS = [("the cat", " sees the dog ."), ("the tree", " likes the bird ."), ("the fish", " hears the stone .")]
TASKS = {
    "choice": "multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: [' the cat', ' dog .', ' sees']\n"
    "doc_to_target: 1\ntarget_delimiter: ''\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n",
    "whole": "loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
    "metric_list: [{metric: bits_per_byte}]\n",
    "write": "generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: 'dog'\n"
    "generation_kwargs: {until: ['.'], max_gen_toks: 8}\nmetric_list: [{metric: exact_match}]\n",
}


def commands(folder: Path) -> dict[str, list[str]]:
    """By name; {} is where the workdirs lie."""
    llada, arm = "--workdir={}/llada", "--workdir={}/arm"
    scored = ["likelihood", f"--requests={folder}/requests.jsonl", "--draws=4", llada]
    sampler = ["--cache=dual", "--block_length=4", "--cfg_scale=0.5", "--temperature=1", "--gen_length=8"]
    words = {
        "sample": ["sample", "--json", "--prompt=the cat", "--prompt=a river sees", *sampler, llada],
        "scores": scored,
        "upper": [*scored, "--estimator=upper", "--dtype=bfloat16"],
        "arm": ["evaluate", *ROWS, arm],
        "l_of_L": ["evaluate", *ROWS, llada],
    }
    words |= {name: ["evaluate", ROWS[0], f"--estimator={name}", llada] for name in BY_ORDER}
    if importlib.util.find_spec("lm_eval") is not None:
        tasks = [f"--tasks={','.join(TASKS)}", f"--include_path={folder}/tasks", "--log_samples", "--bootstrap_iters=0"]
        words["lm_eval"] = ["lm_eval", *tasks, llada]
    return words


def prepared(folder: Path, trained) -> Path:
    """Copies of the trained runs, requests and tasks."""
    for family, run in trained.items():
        shutil.copytree(run.workdir, folder / family)
    lines = [json.dumps({"prompt": prompt, "answer": answer}) for prompt, answer in REQUESTS]
    (folder / "requests.jsonl").write_text("\n".join(lines))
    (folder / "tasks").mkdir()
    rows = [{"q": prompt, "text": (prompt + answer) * 4} for prompt, answer in REQUESTS]
    (folder / "tasks" / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, rest in TASKS.items():
        where = f"json\ndataset_kwargs: {{data_files: {{test: {folder}/tasks/data.jsonl}}}}\ntest_split: test"
        (folder / "tasks" / f"{name}.yaml").write_text(f"task: {name}\ndataset_path: {where}\noutput_type: {rest}")
    return folder


@pytest.fixture(scope="module")
def both(trained, tmp_path_factory):
    """What one device answers to every command, and what two processes do."""
    folder = tmp_path_factory.mktemp("inference")
    alone, shared = (prepared(folder / name, trained) for name in ("alone", "shared"))
    (shared / "garbage").write_text("{}\n")
    names = commands(shared)
    mistakes = {
        "one has no requests": ["likelihood", "--workdir={}/llada", f"--requests={shared}/{{process}}"],
        "one samples else": [*names["sample"], "--seed={process}"],
    }
    (shared / "0").write_text((shared / "requests.jsonl").read_text())
    if "lm_eval" in names:
        mistakes["the first's cache is none"] = [*names["lm_eval"], f"--finished={shared}/garbage"]
        mistakes["the first cannot write"] = [*names["lm_eval"], "--out=/proc/nowhere"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "huggingface"), "JAX_PLATFORMS": "cpu"}
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for i in range(2):
        task = {"commands": names | mistakes, "folder": str(shared), "group": [f"127.0.0.1:{port}", 2, i]}
        log = (folder / f"{i}.log").open("w")
        command = [sys.executable, __file__, json.dumps(task)]
        started.append(subprocess.Popen(command, env=environment | {"XLA_FLAGS": flags}, stdout=log, stderr=log))
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        for name, words in commands(alone).items():
            found[name] = in_process.llada(*(word.format(alone) for word in words))
    statuses = [process.wait(900) for process in started]
    assert statuses == [0, 0], [(folder / f"{i}.log").read_text()[-3000:] for i in range(2)]
    pair = [json.loads((shared / f"said.{i}.json").read_text()) for i in range(2)]
    return SimpleNamespace(alone=found, pair=pair, folders=(alone, shared), mistakes=mistakes)


def figures(text: str) -> list:
    """The JSON of a command's output: one value, or a line each."""
    try:
        return [json.loads(text)]
    except json.JSONDecodeError:
        return [json.loads(line) for line in text.splitlines()]


NUMBERS = ("nats_per_token", "monte_carlo_stderr", "log_likelihood", "stderr")


def test_scores_and_texts_are_those_of_one_device(both):
    for name, alone in both.alone.items():
        assert alone.returncode == 0, (name, alone.stderr)
        first = both.pair[0][name]
        assert first["status"] == 0, (name, first["stderr"])
        if name == "lm_eval":
            continue
        expected, found = figures(alone.stdout), figures(first["stdout"])
        assert len(expected) == len(found)
        for ours, theirs in zip(expected, found, strict=True):
            assert ours.keys() == theirs.keys()
            assert [ours.get(key) for key in ("ids", "text", "tokens", "rows", "kind")] == [
                theirs.get(key) for key in ("ids", "text", "tokens", "rows", "kind")
            ]
            numbers = [key for key in NUMBERS if key in ours]
            assert numbers or "ids" in ours
            close = 2e-2 if name == "upper" else 1e-5
            assert [theirs[key] for key in numbers] == pytest.approx([ours[key] for key in numbers], close, close), name


def test_only_the_first_process_speaks_and_writes(both):
    alone, shared = both.folders
    for name in both.alone:
        second = both.pair[1][name]
        assert (second["status"], second["stdout"]) == (0, ""), name
    for family in ("llada", "arm"):
        ours, theirs = (json.loads((folder / family / "evaluation.json").read_text()) for folder in (alone, shared))
        assert [each["estimator"] for each in (ours, *ours.get("earlier", ()))] == [
            each["estimator"] for each in (theirs, *theirs.get("earlier", ()))
        ]


def test_tasks_of_lm_eval_get_the_answers_of_one_device(both):
    if "lm_eval" not in both.alone:
        pytest.skip("lm_eval is not installed: the extra [eval]")
    answers: tuple[dict, dict] = ({}, {})
    for folder, found in zip(both.folders, answers, strict=True):
        assert len(list(folder.glob("llada/lm_eval/*/results_*.json"))) == 1
        for path in folder.glob("llada/lm_eval/*/samples_*.jsonl"):
            for line in path.read_text().splitlines():
                sample = json.loads(line)
                found[path.name.split("_")[1], sample["doc_id"]] = sample["filtered_resps"]
    ours, theirs = answers
    assert ours.keys() == theirs.keys() and len(ours) == len(TASKS) * len(REQUESTS)
    for (task, doc), found in theirs.items():
        if task == "write":
            assert found == ours[task, doc]
        else:
            expected = np.array(ours[task, doc], str).ravel()
            numbers = [(a, b) for a, b in zip(np.array(found, str).ravel(), expected, strict=True) if b != "False"]
            assert [float(a) for a, _ in numbers] == pytest.approx([float(b) for _, b in numbers], rel=1e-5)


def test_each_device_holds_a_quarter_and_each_process_reads_a_half(both):
    for said in both.pair:
        for name in both.alone:
            assert said[name]["share"] == pytest.approx(0.25, abs=0.01), name
            assert 0.4 < said[name]["read"] < 0.6, name


def test_mistakes_of_one_process_end_both_in_one_line(both):
    for name in both.mistakes:
        for said in both.pair:
            assert said[name]["status"] == 2, (name, said[name])
            assert "Traceback" not in said[name]["stderr"]
            assert said[name]["stderr"].strip().splitlines()[-1].startswith("llada "), name


def work(task: dict) -> None:
    """In a process: run the commands, and write down what they said, and which share of the parameters lay here."""
    import jax

    from llada import processes
    from llada.commands import environment, opening, program
    from llada.training import arrays

    coordinator, count, index = task["group"]
    processes._HEARTBEAT_SECONDS = 100  # this machine may be busy with other tests
    processes.start(coordinator, count, index)
    environment.one_program_at_a_time()
    jax.config.update("jax_default_matmul_precision", "highest")
    read, opened = [], []
    piece, open_run = arrays.Leaf.piece, opening.open_run

    def counted(self, index):
        values = piece(self, index)
        read.append(values.size)
        return values

    def remembered(*arguments):
        opened.append(open_run(*arguments))
        return opened[-1]

    arrays.Leaf.piece, opening.open_run = counted, remembered
    said = {}
    for name, words in task["commands"].items():
        read.clear()
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            words = [word.format(task["folder"], process=index) for word in (*words, *MESH)]
            status = program.main(words)
        said[name] = {"status": status, "stdout": out.getvalue(), "stderr": err.getvalue()}
        said[name]["seconds"] = time.process_time()
        if opened:
            leaves = [leaf for leaf in jax.tree.leaves(opened.pop().params) if leaf.ndim > 1]
            total = sum(leaf.size for leaf in leaves)
            here = [sum(leaf.addressable_shards[i].data.size for leaf in leaves) for i in range(2)]
            said[name] |= {"share": max(here) / total, "read": sum(read) / total}
        Path(task["folder"], f"said.{index}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    work(json.loads(sys.argv[1]))
