"""What launch scripts do when training dies or its machine goes: real shells, stand-ins for trainer and cloud.

The stand-in for `gcloud` runs what is sent over ssh in a directory that plays the host's home; the one for `llada` ends
as it is told, and saves a checkpoint before it dies.
"""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "--config=experiments/llada_1b.py"  # launchers look whether it is there

# Ends with the next of the statuses in $STORY; `save` saves first, `wait` waits for a SIGTERM, `hang` for SIGKILL.
TRAINER = """#!/usr/bin/env bash
for word in "$@"; do case "$word" in --workdir=*) workdir="${word#--workdir=}" ;; esac; done
newest=$(ls "$workdir/checkpoints" 2> /dev/null | sort -n | tail -n 1)
echo "$(basename "$0") $* from ${newest:-0}" >> "$STORY.told"
trap 'echo TERM >> "$STORY.told"; exit 143' TERM
trap 'echo INT >> "$STORY.told"; exit 130' INT
trap 'echo HUP >> "$STORY.told"; exit 129' HUP
read -r -a acts < "$STORY"
sed -i 1d "$STORY"
for act in "${acts[@]}"; do
  case "$act" in
    save) mkdir -p "$workdir/checkpoints/$((${newest:-0} + 10))" ;;
    wait | hang) touch "$STORY.waits"; for _ in $(seq 300); do sleep 0.1; done ;;
    *) exit "$act" ;;
  esac
done
"""


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def until(happened, seconds: float = 60):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


class Story:
    """What the trainer is to do, call by call, and what it was told."""

    def __init__(self, folder: Path, *calls: str):
        self.path = folder / "story"
        self.path.write_text("".join(f"{call}\n" for call in calls))
        self.environment = os.environ | {"STORY": str(self.path), "PAUSE_SECONDS": "0", "POLL_SECONDS": "0"}
        self.environment |= {"DISK_PAUSE_SECONDS": "0", "SLURM_RESTART_COUNT": "6"}

    def told(self) -> list[str]:
        path = self.path.with_name("story.told")
        return path.read_text().splitlines() if path.exists() else []

    def waits(self) -> bool:
        return self.path.with_name("story.waits").exists()


@pytest.fixture
def workdir(tmp_path):
    return tmp_path / "shared disk" / "it's a run"


def keep(tmp_path, workdir, story):
    trainer = write(tmp_path / "trainer", TRAINER)
    # A signal that is ignored where bash starts stays ignored, whatever it traps.
    heard = ["env", "--default-signal=HUP,INT,TERM"]
    command = [*heard, "bash", ROOT / "launch" / "keep_training.sh", trainer, "--config=x", f"--workdir={workdir}"]
    return subprocess.Popen(
        command, env=story.environment, stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=tmp_path
    )


@pytest.mark.parametrize(
    ("calls", "status", "starts"),
    [
        (["save 143", "0"], 0, 2),  # preempted, then done
        (["save 137", "save 1", "save 134", "0"], 0, 4),
        (["129"] * 4 + ["143"] * 4 + ["0"], 0, 9),  # each time preempted before it had saved
        (["save 6", "6", "6", "0"], 0, 4),  # a peer that died, or hangs
        (["6"] * 9, 6, 5),  # one that never comes back
        (["1", "143", "1", "6", "143", "1", "6", "0"], 6, 7),  # a preemption is no crash, and no way forward
        (["2", "0"], 2, 1),  # a mistake stays one
        (["save 3", "0"], 3, 1),  # it would diverge again
        (["4", "0"], 4, 1),  # so would damaged data be
        (["5"] * 9, 5, 6),  # the disk stays full
        (["5"] * 5 + ["save 5", "0"], 0, 7),  # there is room again
        (["0", "0"], 0, 1),
        (["130", "0"], 130, 1),  # Ctrl-C
        (["1"] * 9, 1, 5),  # no way forward
        (["1", "1", "1", "1", "save 1", "1", "1", "1", "1", "0"], 1, 9),  # each checkpoint is worth five deaths
    ],
)
def test_training_is_started_again_unless_that_is_no_use(tmp_path, workdir, calls, status, starts):
    story = Story(tmp_path, *calls)
    said = keep(tmp_path, workdir, story)
    assert said.wait(120) == status
    told = story.told()
    assert len(told) == starts
    saves = [sum("save" in call for call in calls[:i]) for i in range(starts)]
    assert told == [f"trainer --config=x --workdir={workdir} from {10 * saved}" for saved in saves]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_group_reaches_training_once_and_ends_the_loop(tmp_path, workdir, number):
    """A machine that shuts down, Ctrl-C in a terminal, a terminal that is closed."""
    story = Story(tmp_path, "wait", "0")
    loop = keep(tmp_path, workdir, story)
    until(story.waits)
    os.killpg(loop.pid, number)
    assert loop.wait(120) == 128 + number
    assert story.told()[1:] == [number.name.removeprefix("SIG")]


# describe: the next of the states in $CLOUD/states, the last for ever. NONE is an error, as gcloud has it.
GCLOUD = """#!/usr/bin/env bash
printf '%s\\0' "$@" >> "$CLOUD/calls"
echo >> "$CLOUD/calls"
export HOME="$CLOUD/home"
case "$4" in
  describe)
    state=$(head -n 1 "$CLOUD/states")
    [ "$(wc -l < "$CLOUD/states")" = 1 ] || sed -i 1d "$CLOUD/states"
    case "$state" in
      NONE) echo "ERROR: (gcloud) NOT_FOUND: Resource was not found" >&2; exit 1 ;;
      *) echo "WARNING: there is a newer gcloud" >&2; echo "$state" ;;
    esac ;;
  scp) mkdir -p "$HOME" && cp -r "$CLOUD/image/." "$HOME" && cp "$5" "$HOME/llada.tar.gz" ;;
  ssh)
    for word in "$@"; do case "$word" in --command=*) command="${word#--command=}" ;; esac; done
    if [[ "$command" == *follow && -e "$CLOUD/loses" ]]; then
      # The connection breaks, and in one case the machine goes with all that is on it.
      for _ in $(seq 100); do [ ! -e "$STORY.waits" ] || break; sleep 0.1; done
      if [ "$(cat "$CLOUD/loses")" = machine ]; then kill -9 -- "-$(cat "$HOME/training.pid")"; rm -rf "$HOME"; fi
      rm "$CLOUD/loses" "$STORY.waits"
      exit 255
    fi
    cd "$HOME" && bash -c "$command" ;;
esac
"""
GIT = """#!/usr/bin/env bash
case "$1" in archive)
  for word in "$@"; do case "$word" in --output=*) file="${word#--output=}" ;; esac; done
  tar -czf "$file" -C "$REPOSITORY" launch requirements.txt setup.cfg pyproject.toml ;;
esac
"""


class Cloud:
    """One host, that `gcloud` makes and loses. `said` is set by train."""

    def __init__(self, folder: Path, story: Story, *states: str, loses: str | None = None):
        self.folder, self.story = folder / "cloud", story
        environment = self.folder / "image" / "llada" / ".venv" / "bin"
        write(environment / "python", "#!/bin/sh\nexit 0\n")
        write(environment / "llada", TRAINER)
        write(environment / "activate", 'PATH="$PWD/.venv/bin:$PATH"\n')
        write(folder / "bin" / "gcloud", GCLOUD)
        write(folder / "bin" / "git", GIT)
        (self.folder / "states").write_text("".join(f"{state}\n" for state in states))
        if loses:
            (self.folder / "loses").write_text(loses)
        search = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        self.environment = story.environment | {"CLOUD": str(self.folder), "REPOSITORY": str(ROOT), "PATH": search}

    def train(self, script: str, *arguments) -> int:
        command = ["bash", ROOT / "launch" / script, "--spot", "tpu", "zone-a", "v6e-8", *arguments]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=180)
        self.said = done.stdout + done.stderr
        return done.returncode

    def calls(self) -> list[str]:
        """The verbs, without what only looks."""
        calls = [line.rstrip("\0").split("\0") for line in (self.folder / "calls").read_text().splitlines()]
        verbs = [call[3] if call[3] != "ssh" else call_of_ssh(call) for call in calls]
        return [verb for verb in verbs if verb not in ("describe", "status")]


def call_of_ssh(call: list[str]) -> str:
    command = next(word for word in call if word.startswith("--command="))
    return "start" if " start " in command else command.split()[-1]


HOST = ["scp", "start", "follow"]


@pytest.mark.parametrize(
    ("script", "lost", "first", "up"),
    [
        ("tpu_pod.sh", "SUSPENDED", ["NONE", "WAITING_FOR_RESOURCES", "PROVISIONING"], "ACTIVE"),
        ("tpu_pod.sh", "FAILED", ["NONE"], "ACTIVE"),
        ("tpu_vm.sh", "PREEMPTED", ["NONE"], "READY"),
        ("tpu_vm.sh", "TERMINATED", [], "READY"),  # one that was there before
    ],
)
def test_a_preempted_tpu_is_asked_for_again_and_training_goes_on(tmp_path, workdir, script, lost, first, up):
    story = Story(tmp_path, "save hang", "0")
    states = [*first, up, *(["SUSPENDING"] if script == "tpu_pod.sh" else []), lost, "NONE", up]
    cloud = Cloud(tmp_path, story, *states, loses="machine")
    assert cloud.train(script, CONFIG, f"--workdir={workdir}") == 0, cloud.said
    created = ["create"] if first else []
    assert cloud.calls() == [*created, *HOST, "delete", "create", *HOST]
    assert [line.rpartition(" from ")[2] for line in story.told()] == ["0", "10"]
    assert story.told()[0] == f"llada train {CONFIG} --workdir={workdir} from 0"
    assert f"tpu is {lost}" in cloud.said and "training ended with status 0" in cloud.said


def test_a_lost_connection_disturbs_nobody(tmp_path, workdir):
    """The script comes back to the same training, whose crash the host has dealt with in the meantime."""
    story = Story(tmp_path, "save 1", "wait", "0")
    cloud = Cloud(tmp_path, story, "READY", loses="connection")
    with subprocess.Popen(
        ["bash", ROOT / "launch" / "tpu_vm.sh", "tpu", "zone-a", "v6e-8", CONFIG, f"--workdir={workdir}"],
        env=cloud.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as script:
        until(lambda: (cloud.folder / "calls").exists() and cloud.calls().count("follow") == 2)
        assert len(story.told()) == 2
        home = cloud.environment | {"HOME": str(cloud.folder / "home")}
        subprocess.run(["bash", ROOT / "launch" / "tpu_host.sh", "stop"], env=home, check=True)
        said = script.communicate(timeout=120)[0]
    assert script.returncode == 143, said
    assert "is training already" in said and "status 1; again" in said
    assert story.told()[2:] == ["TERM"]  # saved, and not started again


def test_a_mistake_on_the_host_is_the_answer(tmp_path, workdir):
    story = Story(tmp_path, "2", "0")
    cloud = Cloud(tmp_path, story, "READY")
    assert cloud.train("tpu_vm.sh", CONFIG, f"--workdir={workdir}") == 2, cloud.said
    assert len(story.told()) == 1


@pytest.mark.parametrize(
    ("states", "said"),
    [
        (["FAILED"], "tpu FAILED 3 times in a row"),
        (["HIDDEN", "ACTIVE"], "tpu is ACTIVE and does not train, after 20 tries"),
    ],
)
def test_what_never_comes_up_is_given_up(tmp_path, workdir, states, said):
    cloud = Cloud(tmp_path, Story(tmp_path), *states)
    write(tmp_path / "bin" / "git", "#!/bin/sh\nexit 1\n")  # nothing to ship: a host that cannot be used
    assert cloud.train("tpu_pod.sh", CONFIG, f"--workdir={workdir}") == 1
    assert said in cloud.said


@pytest.fixture
def node(tmp_path):
    """A Slurm node with a checkout: `srun` runs its command until `scancel` signals it."""
    checkout = tmp_path / "checkout"
    for name in ("launch", "requirements.txt", "setup.cfg", "pyproject.toml"):
        (checkout / name).parent.mkdir(exist_ok=True)
        (checkout / name).symlink_to(ROOT / name)
    binaries = checkout / ".venv" / "bin"
    write(binaries / "python", "#!/bin/sh\nexit 0\n")
    write(binaries / "llada", TRAINER)
    write(binaries / "activate", 'PATH="$PWD/.venv/bin:$PATH"\n')
    write(binaries / "srun", f'#!/bin/sh\nshift\necho $$ > {tmp_path}/step\nexec "$@"\n')
    write(binaries / "scancel", f'#!/bin/sh\nkill -TERM "$(cat {tmp_path}/step)"\n')
    write(binaries / "scontrol", f'#!/bin/sh\necho "$@" >> {tmp_path}/scontrol\n')
    return checkout


def job(node, workdir, story):
    environment = story.environment | {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(node)}
    copy = node.parent / "slurm_script"  # as Slurm does
    copy.write_text((ROOT / "launch" / "slurm.sh").read_text())
    return subprocess.Popen(["bash", copy, "--config=x", f"--workdir={workdir}"], env=environment)


@pytest.mark.parametrize(
    ("call", "status", "requeued"),
    [
        *[("0", 0, False), ("2", 2, False), ("save 3", 3, False), ("save 4", 4, False), ("143", 143, False)],
        *[("save 1", 1, True), ("1", 1, False), ("save 5", 5, True), ("5", 5, False)],
        *[("save 6", 6, True), ("6", 6, False), ("129", 129, False)],
    ],
)
def test_a_job_goes_back_to_the_queue_where_that_helps(tmp_path, node, workdir, call, status, requeued):
    story = Story(tmp_path, call)
    assert job(node, workdir, story).wait(120) == status
    assert story.told() == [f"llada train --config=x --workdir={workdir} from 0"]
    assert (tmp_path / "scontrol").exists() == requeued


def test_a_job_that_lost_a_peer_goes_back_to_the_queue_a_few_times(tmp_path, node, workdir):
    story = Story(tmp_path, "6")
    story.environment["SLURM_RESTART_COUNT"] = "4"
    assert job(node, workdir, story).wait(120) == 6
    assert (tmp_path / "scontrol").read_text() == "requeue 7\n"


def test_before_the_time_limit_a_job_saves_and_goes_back_to_the_queue(tmp_path, node, workdir):
    story = Story(tmp_path, "save wait")
    running = job(node, workdir, story)
    until(story.waits)
    running.send_signal(signal.SIGUSR1)
    assert running.wait(120) == 143
    assert story.told()[1:] == ["TERM"]
    assert (tmp_path / "scontrol").read_text() == "requeue 7\n"


def test_a_cancelled_job_waits_for_its_tasks_and_does_not_come_back(tmp_path, node, workdir):
    """Slurm signals the batch script and the step, each once."""
    story = Story(tmp_path, "save wait")
    running = job(node, workdir, story)
    until(story.waits)
    running.send_signal(signal.SIGTERM)
    os.kill(int((tmp_path / "step").read_text()), signal.SIGTERM)
    assert running.wait(120) == 143
    assert story.told()[1:] == ["TERM"] and not (tmp_path / "scontrol").exists()
