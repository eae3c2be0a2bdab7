"""Launch scripts: what they would run, seen through stand-ins for the programs they call."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
SWEEP = ["--config=experiments/isoflop.py:smdm", "--workdir=/shared/a b"]


def run(script: str, *arguments: str, path: Path | None = None, **environment: str):
    search = f"{path}{os.pathsep}{os.environ['PATH']}" if path else os.environ["PATH"]
    environment = os.environ | {"PATH": search} | environment
    return subprocess.run(
        ["bash", ROOT / "launch" / script, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT
    )


@pytest.fixture
def programs(tmp_path):
    """`gcloud` and `srun` that write down their arguments, one a line, NUL between."""
    for name in ("gcloud", "srun"):
        (tmp_path / name).write_text(
            f"#!/bin/sh\nprintf '%s\\0' {name} \"$@\" >> {tmp_path}/calls\necho >> {tmp_path}/calls\n"
        )
        (tmp_path / name).chmod(0o755)
    return tmp_path


def calls(programs: Path) -> list[list[str]]:
    return [line.rstrip("\0").split("\0") for line in (programs / "calls").read_text().splitlines()]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_it_parses_and_says_what_it_is_for(script):
    subprocess.run(["bash", "-n", script], check=True)
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert any("Usage: " in line for line in lines)


def test_every_host_of_a_pod_gets_its_share(programs):
    done = run("sweep_tpu_pod.sh", "pod", "us-east5-a", "3", *SWEEP, path=programs)
    assert done.returncode == 0, done.stderr
    copy, *hosts, log = calls(programs)
    assert copy[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "scp"] and "--worker=all" in copy
    for i, call in enumerate(hosts):
        assert f"--worker={i}" in call and "--zone=us-east5-a" in call
        words = shlex.split(call[-1].replace("(", " ").replace(")", " "))
        start = words.index("launch/sweep_job.sh")
        assert words[start + 1 : start + 5] == [str(i + 1), "3", *SWEEP]  # the space in the path survives
    assert "tail" in log[-1]
    assert "launch/sweep_job.sh 3 3" in done.stdout.replace("\\", "")


def test_a_dry_run_calls_nothing(programs):
    done = run("sweep_tpu_pod.sh", "--dry_run", "pod", "us-east5-a", "2", *SWEEP, path=programs)
    assert done.returncode == 0 and not (programs / "calls").exists()
    assert done.stdout.count("$ gcloud") == 4


def test_a_task_of_an_array_gets_its_share_wherever_the_array_begins(programs):
    slurm = dict(
        SLURM_ARRAY_TASK_ID="7", SLURM_ARRAY_TASK_MIN="5", SLURM_ARRAY_TASK_COUNT="4", SLURM_SUBMIT_DIR="/repo"
    )
    done = run("sweep_slurm.sh", *SWEEP, path=programs, **slurm)
    assert done.returncode == 0, done.stderr
    assert calls(programs) == [["srun", "--ntasks=1", "bash", "/repo/launch/sweep_job.sh", "3", "4", *SWEEP]]


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("sweep_tpu_pod.sh", []),
        ("sweep_tpu_pod.sh", ["pod", "zone", "many", *SWEEP]),
        ("sweep_slurm.sh", SWEEP),
        ("sweep_job.sh", ["1", "2"]),
    ],
)
def test_missing_arguments_get_one_line_and_status_2(script, arguments):
    environment = {key: "" for key in ("SLURM_ARRAY_TASK_ID",)}
    done = run(script, *arguments, **environment)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
