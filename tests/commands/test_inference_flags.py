"""Every flag of `llada sample` and `llada likelihood` with values that nobody means: one line and status 2, or a use.

What would run is left out: these are the checks before it, which may not take a moment or a gigabyte.
"""

import time

import in_process
import pytest

from llada.inference import generation, likelihood
from llada.training import workdir as workdir_lib

HUGE = "1" + "0" * 40
VALUES = ("0", "-1", "1", "nan", "inf", "-inf", "1e400", "1e39", "1e-320", HUGE, "9" * 5000, "", "text", "\udce9")
NUMBERS = {
    "sample": "gen_length steps block_length temperature cfg_scale speculate confidence_threshold samples seed step "
    "prompt_ids remasking eos cache",
    "likelihood": "draws cfg_scale batch_tokens window step estimator prompt_ids answer_ids",
}
GIVEN = {"sample": ["--prompt=the cat"], "likelihood": ["--answer= sees the dog"]}
# What a flag takes, of VALUES; for an ARM only these flags are there at all.
TAKES = {
    "gen_length": {"1"},
    "steps": {"1"},
    "block_length": {"1"},
    "temperature": {"0", "1", "1e-320"},
    "cfg_scale": {"0", "1", "1e-320"},
    "speculate": {"1"},
    "confidence_threshold": {"1", "1e-320"},
    "samples": {"1"},
    "seed": {"0", "1"},
    "step": set(),
    "prompt_ids": {"0", "1", ""},
    "answer_ids": {"0", "1"},
    "draws": {"1"},
    "batch_tokens": {"1", HUGE},
    "window": {"1"},
}
OF_AN_ARM = {"gen_length", "temperature", "samples", "seed", "prompt_ids", "answer_ids", "batch_tokens", "window"}


class Ran(Exception):
    pass


@pytest.fixture
def runs_nothing(trained, monkeypatch):
    """Models are opened once, and what would sample or score raises Ran."""
    opened = {str(run.workdir): workdir_lib.load(run.workdir) for run in trained.values()}
    real = workdir_lib.load

    def load(workdir, step=None, *more, **options):
        return opened[str(workdir)] if step is None else real(workdir, step, *more, **options)

    def ran(*given, **options):
        raise Ran

    monkeypatch.setattr(workdir_lib, "load", load)
    monkeypatch.setattr(generation, "_run", ran)
    monkeypatch.setattr(likelihood, "_batches", ran)


def ends(*arguments) -> str | None:
    """The one line of a refusal; None where the command would have run."""
    start = time.monotonic()
    try:
        done = in_process.llada(*arguments)
    except Ran:
        return None
    lines = done.stderr.strip().splitlines()
    assert (done.returncode, done.stdout, len(lines)) == (2, "", 1), (arguments, done)
    assert time.monotonic() - start < 5, arguments
    return lines[0]


@pytest.mark.parametrize("family", ["llada", "arm"])
@pytest.mark.parametrize("command", list(NUMBERS))
def test_numbers_that_nobody_means_get_one_line(command, family, trained, runs_nothing):
    workdir = f"--workdir={trained[family].workdir}"
    wrong = []
    for flag in NUMBERS[command].split():
        others = [] if flag in ("prompt_ids", "answer_ids") and command == "sample" else GIVEN[command]
        others = [] if flag == "answer_ids" else others
        others = [*others, "--rolling"] if flag == "window" else others
        others = [*others, "--gen_length=8"] if flag in ("steps", "block_length") else others
        for value in VALUES:
            line = ends(command, workdir, *others, f"--{flag}={value}")
            takes = value in TAKES.get(flag, ()) and (family == "llada" or flag in OF_AN_ARM)
            takes |= family == "arm" and command == "likelihood" and flag == "cfg_scale" and value == "0"
            if takes != (line is None) or (line and flag.removesuffix("_ids") not in line):
                wrong.append((flag, value, line))
    assert not wrong, wrong
