"""A checkpoint that a newer llada wrote: every command that reads one says so in one line."""

import json
import shutil

import in_process
import pytest

from llada.training.run_item import FORMAT_VERSION, sealed

COMMANDS = {
    "train": [],
    "evaluate": [],
    "sample": ["--prompt=a"],
    "likelihood": ["--answer=a"],
    "export": ["--out={tmp}/export"],
    "import": ["--source={run}", "--workdir={tmp}/imported"],
    "compare": ["--llada={run}", "--arm={arm}", "--out={tmp}/out", "--prompt=a", "--infill=[MASK]", "--gen_length=4"],
}


@pytest.fixture(scope="module")
def newer(trained, tmp_path_factory):
    run = tmp_path_factory.mktemp("newer") / "run"
    shutil.copytree(trained["llada"].workdir, run)
    for path in run.glob("checkpoints/*/run/metadata"):
        tree = json.loads(path.read_text()) | {"format_version": FORMAT_VERSION + 1}
        path.write_text(json.dumps(sealed(tree)))
    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_a_newer_checkpoint_format_is_one_line(command, newer, trained, tmp_path):
    paths = {"run": newer, "arm": trained["arm"].workdir, "tmp": tmp_path}
    arguments = [word.format(**paths) for word in COMMANDS[command]]
    if command not in ("import", "compare"):
        arguments.append(f"--workdir={newer}")
    done = in_process.llada(command, *arguments)
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and not done.stdout, done
    assert len(lines) == 1 and f"format {FORMAT_VERSION + 1}" in lines[0] and "use a newer llada" in lines[0], lines
