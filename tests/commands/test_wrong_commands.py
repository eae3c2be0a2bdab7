"""Mistyped and impossible commands: each gets one line on standard error and status 2 at once, and writes nothing."""

import importlib
import math
import os
import subprocess
import sys
from pathlib import Path

import in_process
import pytest

from llada import knobs
from llada.config import Config
from llada.scaling.sweep_config import SweepConfig

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
QUICKSTART = f"--config={EXPERIMENTS}/quickstart.py:llada"
ISOFLOP = f"--config={EXPERIMENTS}/isoflop.py:quick"
COMMANDS = "train evaluate likelihood sample chat export import plan sweep tokenize data verify compare".split()
TRAIN = ["train", QUICKSTART, "--workdir=run"]
SWEEP = ["sweep", ISOFLOP, "--workdir=run", "--dry_run"]
PLAN = ["plan", QUICKSTART, "--topology=v5e:2x2"]

# The command, run in the directory of the fixture below, and words that its line must have.
WRONG = {
    # the program
    "llada trian": ["no command 'trian'", "did you mean train?"],
    "llada Train": ["no command 'Train'", "did you mean train?"],
    "llada --workdir=run train": ["the command comes first"],
    "llada help trian": ["no command 'trian'"],
    "llada ''": ["no command ''"],
    "llada train --steps=10": ["--steps is no flag", "did you mean --config.train.steps?"],
    "llada train --batch_size 8": ["did you mean --config.train.batch_size?"],
    "llada sample --max_tokens=20": ["--max_tokens is no flag of llada sample"],
    "llada sample --prompts=a": ["did you mean --prompt?"],
    "llada evaluate --workdri=run": ["did you mean --workdir?"],
    "llada sweep --budgets=1e18": ["did you mean --config.sweep.budgets?"],
    "llada plan --topologie=v4": ["did you mean --topology?"],
    "llada train go": ["'go' is not a flag"],
    "llada sample a b c": ["'a' is not a flag"],
    "llada train -- --workdir=run": ["'--' is not a flag"],
    "llada train --workdir": ["--workdir needs a value"],
    "llada train --workdir --config=x.py": ["--workdir needs a value"],
    "llada sample --json=perhaps": ["--json=perhaps"],
    "llada evaluate --workdir=older --config.seed=1": ["--config.seed"],
    "llada export --config.seed=1": ["belongs to llada train"],
    # experiments
    "llada train --workdir=run": ["--config is missing"],
    "llada train --config= --workdir=run": ["--config is missing"],
    "llada train --config=nope.py --workdir=run": ["there is no file nope.py", "good.py"],
    "llada train --config=. --workdir=run": ["is a directory", "good.py"],
    "llada train --config=gs://b/x.py --workdir=run": ["--config=gs://b/x.py", "give the path"],
    "llada train --config=good.py:small --workdir=run": ["takes no argument", ":small"],
    "llada train --config=sized.py --workdir=run": ["needs an argument"],
    "llada train --config=name.py --workdir=run": ["name.py line 2", "NameError", "widht"],
    "llada train --config=imports.py --workdir=run": ["imports.py line 1", "ModuleNotFoundError"],
    "llada train --config=typed.py --workdir=run": ["typed.py line 4", "TypeError"],
    "llada train --config=fraction.py --workdir=run": ["fraction.py line 4", "3.5"],
    "llada train --config=text.py --workdir=run": ["--config.model.width='256' is a str", "must be int"],
    "llada train --config=nothing.py --workdir=run": ["returned None"],
    "llada train --config=lines.py --workdir=run": ["lines.py line 2", "a b  c"],
    "llada train --config=leaves.py --workdir=run": ["leaves.py line 1", "SystemExit"],
    "llada train --config=syntax.py --workdir=run": ["not a Python experiment file", "line 1"],
    "llada train --config=binary.py --workdir=run": ["binary.py"],
    "llada train --config=empty.py --workdir=run": ["defines no get_config"],
    "llada train --config=value.py --workdir=run": ["get_config"],
    "llada train --config=group.py --workdir=run": ["config.model=3 must be a group"],
    "llada train --config=pipe.py --workdir=run": ["pipe.py is no regular file"],
    f"llada train {ISOFLOP} --workdir=run": ["describes a sweep", "llada sweep"],
    f"llada sweep {QUICKSTART} --workdir=run": ["has no group `sweep`"],
    "llada sweep --config=swept.py --workdir=run": ["config.sweep=3 must be a group"],
    # keys
    "TRAIN --config.layers=3": ["did you mean --config.model.layers?"],
    "TRAIN --config.every=3": ["--config.evaluate.every or --config.checkpoint.every"],
    "TRAIN --config.model.widht=3": ["did you mean --config.model.width?"],
    "TRAIN --config.model.width.x=3": ["config.model.width is a value, not a group"],
    "TRAIN --config.model=3": ["must be a group"],
    "TRAIN --config.=3": ["names no key"],
    "TRAIN --config. 3": ["names no key"],
    "TRAIN --config.model..width=3": ["names no key"],
    "TRAIN --config.model.width --print_config": ["--config.model.width needs a value"],
    "TRAIN --config.model.width = 256": ["--config.model.width needs a value"],
    "TRAIN --config.train.steps=1e400": ["not a whole number"],
    "TRAIN --config.train.steps=1.5": ["not a whole number"],
    "TRAIN --config.model.width=1e12": ["must be positive and at most"],
    "TRAIN --config.train.batch_size=1e9": ["must be positive and at most"],
    "TRAIN --config.train.tokens=1e15": ["steps", "at most"],
    "TRAIN --config.model.heads=131071": ["must divide", "..."],
    "TRAIN --config.optimizer.clip_norm=nan": ["finite number"],
    "TRAIN --config.model.causal=maybe": ["is not True or False"],
    "TRAIN --config.model.dtype=float16": ["bfloat16, float32"],
    "TRAIN --config.data.unique_tokens=1": ["data.unique_tokens=1", "one row is data.sequence_length="],
    "TRAIN --config.data.tokenizer=good.py": ["data.tokenizer=good.py is not a SentencePiece model"],
    "TRAIN --config.data.tokenizer=hf": ["data.tokenizer=hf has no tokenizer.json"],
    "TRAIN --config.data.holdout_source=text:none": ["no file matches 'none'", "data.holdout_source"],
    f"llada sweep {ISOFLOP} --workdir=run --config.data.source=text:none": ["no file matches 'none'"],
    "SWEEP --config.sweep.tokens_per_parameter=10": ["not a group of values"],
    "SWEEP --config.sweep.seeds=a": ["config.sweep.seeds"],
    "SWEEP --config.sweep=3": ["must be a group"],
    "SWEEP --config.budgets=1e18": ["did you mean --config.sweep.budgets?"],
    "SWEEP --config.sweep.budgts=1": ["did you mean --config.sweep.budgets?"],
    "SWEEP --only=3/2": ["--only=3/2"],
    "SWEEP --predict=-1": ["--predict=-1"],
    "SWEEP --chips=0": ["chips"],
    # workdirs and sources that are missing, damaged or of another kind
    "llada sample --workdir=hf --prompt=a": ["hf/config.json", "llada import --source=hf"],
    "llada sample --workdir=damaged --prompt=a": ["damaged/config.json is not JSON", "line 1"],
    "llada sample --workdir=older --prompt=a": ["older/config.json", "config.model.wings"],
    "llada sample --workdir=. --prompt=a": ["holds no config.json"],
    "llada evaluate --workdir=damaged": ["damaged/config.json is not JSON"],
    "llada export --workdir=hf --out=out": ["llada import --source=hf"],
    "llada export --workdir=nowhere": ["--out"],
    "llada import --source=nowhere --workdir=new": ["nowhere"],
    "llada import --source=hf": ["--workdir"],
    "llada compare --llada=nowhere --arm=hf --out=out": ["nowhere"],
    "llada compare --llada=hf": ["--arm"],
    "llada likelihood --workdir=nowhere --answer=a": ["nowhere"],
    # planning
    "llada plan --topology=v5e:2x2": ["--config is missing"],
    "PLAN --program=trian": ["trian"],
    "PLAN --search --program=sample": ["--search is for --program=train"],
    "PLAN --json=/proc/x/plan.json": ["--json=/proc/x/plan.json cannot be written"],
    "PLAN --json=.": ["--json=. is a directory"],
    "PLAN --slices=0": ["--slices=0"],
    "PLAN --slices=-3": ["--slices=-3"],
    "PLAN --batch=0": ["--batch=0"],
    f"llada plan {QUICKSTART} --topology=": ["--topology is missing"],
    f"llada plan {QUICKSTART} --topology=v5e:9x9": ["--topology=v5e:9x9", "16x16"],
    f"llada plan {QUICKSTART} --topology=tpu": ["no TPU generation"],
}

LONG = "from llada.config import default_config\ndef get_config():\n    c = default_config()\n    {}\n    return c\n"
FILES = {
    "good.py": LONG.format("c.train.steps = 3"),
    "sized.py": "def get_config(size): return {}\n",
    "name.py": "def get_config():\n    return widht\n",
    "imports.py": "import no_such_module_here\n",
    "typed.py": LONG.format('c.model.width = "256"'),
    "fraction.py": LONG.format("c.model.layers = 3.5"),
    "text.py": 'def get_config(): return {"model": {"width": "256"}}\n',
    "nothing.py": "def get_config(): pass\n",
    "lines.py": 'def get_config():\n    raise ValueError("a\\nb  c")\n',
    "leaves.py": "raise SystemExit(0)\n",
    "syntax.py": "def get_config(:\n",
    "binary.py": "\0\x01",
    "empty.py": "",
    "value.py": "get_config = 3\n",
    "group.py": 'def get_config(): return {"model": 3}\n',
    "swept.py": 'def get_config(): return {"sweep": 3}\n',
    "hf/config.json": '{"model_type": "llama"}',
    "damaged/config.json": "{,}",
    "older/config.json": '{"model": {"wings": 2}}',
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("typed")
    for name, text in FILES.items():
        (made / name).parent.mkdir(exist_ok=True)
        (made / name).write_text(text, encoding="utf-8")
    os.mkfifo(made / "pipe.py")
    return made


def words_of(line: str) -> list[str]:
    first, *rest = line.split(" ")
    begin = {"llada": [], "TRAIN": TRAIN, "SWEEP": SWEEP, "PLAN": PLAN}[first]
    return [*begin, *(word.strip("'") for word in rest)]


def refusal(arguments: list[str], folder: Path) -> str:
    """The line printed; fails if more is printed or anything is written."""
    before = sorted((str(path), path.lstat().st_mtime_ns) for path in folder.rglob("*"))
    done = in_process.llada(*arguments, cwd=folder)
    lines = done.stderr.splitlines()
    assert (done.returncode, done.stdout, len(lines)) == (2, "", 1), (arguments, done)
    assert lines[0].startswith("llada") and "Traceback" not in lines[0] and len(lines[0]) < 1000, lines
    after = sorted(
        (str(path), path.lstat().st_mtime_ns) for path in folder.rglob("*") if "__pycache__" not in str(path)
    )
    assert after == before, arguments
    return lines[0]


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_command_gets_one_line(line, folder):
    said = refusal(words_of(line), folder)
    assert all(word in said for word in WRONG[line]), said


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_without_a_value_or_with_another_kind_of_one(command, folder):
    assert in_process.llada(command, "--help").returncode == 0
    module = importlib.import_module(f"llada.commands.{command}")
    for flag in map(module.FLAGS.__getitem__, module.FLAGS):
        name = f"--{flag.name}"
        wrong = [[f"{name}=perhaps"], [f"{name}="]] if flag.boolean else [[name], [name, "--workdir=x"]]
        if flag.flag_type() in ("int", "float", "string enum"):
            wrong += [[f"{name}=many"], [f"{name}="]]
        for arguments in wrong:
            assert flag.name in refusal([command, *arguments], folder), arguments


VALUES = ("0", "-1", "1", "0.5", "nan", "inf", "1e400", "1e39", "1" + "0" * 40, "9" * 5000, "", "text", "None", "True")


@pytest.mark.parametrize("group", ["seed", *dict.fromkeys(key.name.split(".")[0] for key in knobs.keys(Config))][1:])
def test_every_key_takes_what_it_says_and_nothing_else(group, folder):
    """No value ends in a traceback, or takes long; numbers beyond their limits are refused by name."""
    for key in knobs.keys(Config):
        if key.name.split(".")[0] != group:
            continue
        kind = knobs.scalar(key.annotation)
        for value in VALUES:
            arguments = [*TRAIN, "--print_config", f"--config.{key.name}={value}"]
            done = in_process.llada(*arguments, cwd=folder)
            assert done.returncode in (0, 2) and len(done.stderr.splitlines()) == done.returncode // 2, (
                arguments,
                done,
            )
            if kind in (int, float) and value in ("nan", "inf", "1e400", "", "text", "True", "9" * 5000):
                assert done.returncode == 2 and f"--config.{key.name}=" in done.stderr, (arguments, done.stderr)


def test_help_config_lists_every_key_with_its_meaning():
    keys = list(knobs.keys(Config))
    assert len(keys) > 40 and all(key.knob.meaning for key in keys)
    said = in_process.llada("train", "--help_config")
    assert said.returncode == 0 and said.stderr == ""
    listed = {line[2:].split(" ")[0]: line for line in said.stdout.splitlines() if line[2:3].strip()}
    assert {key.name for key in keys} <= set(listed)
    assert "int = 6" in listed["model.layers"] and listed["train.steps"].startswith("+")
    swept = in_process.llada("sweep", "--help_config").stdout
    assert all(f"sweep.{key.name} " in swept for key in knobs.keys(SweepConfig))


def test_versions_are_told_without_importing_jax():
    code = "import sys; from llada.commands.program import main; main(['--version']); main(['train', '--help']); "
    done = subprocess.run(
        [sys.executable, "-c", code + "assert 'jax' not in sys.modules"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("llada 0.") and "jax 0." in done.stdout and "--workdir" in done.stdout


def test_a_key_given_twice_takes_its_last_value_and_says_so(folder):
    done = in_process.llada(*TRAIN, "--config.seed=1", "--config.seed=2", "--print_config", cwd=folder)
    assert '"seed": 2' in done.stdout and "--config.seed is given twice; 2 counts, not 1" in done.stderr


def test_a_flag_given_twice_takes_its_last_value_and_says_so(folder):
    done = in_process.llada("train", QUICKSTART, "--workdir=a", "--workdir=gs://b/c", cwd=folder)
    said = done.stderr.splitlines()
    assert "--workdir=a is given again; --workdir=gs://b/c counts" in said[0] and "--workdir=gs://b/c" in said[1]
    assert done.returncode == 2 and len(said) == 2
    done = in_process.llada("sweep", "--workdir=a", "--results=x", "--results=y", cwd=folder)  # many may be given
    assert len(done.stderr.splitlines()) == 1


def test_limits_in_words():
    said = {
        "positive": knobs.Knob("", above=0),
        "positive and at most 1,024": knobs.Knob("", above=0, most=1024),
        "in [0, 1)": knobs.Knob("", least=0, below=1),
        "in [0, 1]": knobs.Knob("", least=0, most=1),
        "between 0 and 1": knobs.Knob("", above=0, below=1),
        "one of a, b": knobs.Knob("", choices=("a", "b")),
        "": knobs.Knob(""),
    }
    for words, knob in said.items():
        assert knob.limits == words
    knob = knobs.Knob("", above=0, most=4)
    assert [knob.broken(value) is None for value in (0, 1, 4, 5, 0.5, math.nan, None)] == [0, 1, 1, 0, 1, 0, 1]
