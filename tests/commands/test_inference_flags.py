"""Every flag of `llada sample` and `llada likelihood` with values that nobody means: one line and status 2, or a use.

What would run is left out: these are the checks before it, which may not take a moment or a gigabyte.
"""

import copy
import io
import json
import math
import sys
import time

import in_process
import numpy as np
import pytest

from llada.errors import UserError
from llada.inference import compiled_loop, generation, likelihood, row_batches
from llada.inference.generation import Request
from llada.training import run as run_lib

HUGE = "1" + "0" * 40
VALUES = (
    "0",
    "-1",
    "1",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "1e39",
    "1e-320",
    HUGE,
    "9" * 5000,
    "",
    "text",
    "\udce9",
    "1,,2",
)
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
    opened = {str(run.workdir): run_lib.load(run.workdir) for run in trained.values()}
    real = run_lib.load

    def load(workdir, step=None, *more, **options):
        return opened[str(workdir)] if step is None else real(workdir, step, *more, **options)

    def ran(*given, **options):
        raise Ran

    monkeypatch.setattr(run_lib, "load", load)
    monkeypatch.setattr(generation, "_sample", ran)
    monkeypatch.setattr(row_batches, "_batches", ran)


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


TEXT = '{"answer": "a"}\n'
# Lines of --requests that are wrong, and words of what is said of them.
WRONG_LINES = {
    '{"answer": "\\ud83d"}': "line 2: answer is no Unicode",
    '{"prompt": "\\udc00", "answer": "a"}': "line 2: prompt is no Unicode",
    '{"prompt": 5, "answer": "a"}': "line 2 has 'prompt'",
    '{"prompt": null, "answer": "a"}': "line 2 has 'prompt'",
    '{"anwser": "a"}': "line 2 has 'anwser'",
    '{"prompt": "a"}': "line 2: give one of answer and answer_ids",
    '{"prompt": "a", "prompt_ids": [5], "answer": "a"}': "line 2: give one of prompt and prompt_ids",
    '{"answer_ids": "5"}': "line 2 has 'answer_ids'",
    '{"answer_ids": []}': "line 2: --answer is empty",
    '{"answer_ids": [5.0]}': "line 2: answer_ids has 5.0",
    '{"answer_ids": [true]}': "line 2: answer_ids has True",
    '{"answer_ids": ["5"]}': "line 2: answer_ids has 5",
    '{"answer_ids": [NaN]}': "line 2: answer_ids has nan",
    '{"answer_ids": [1e400]}': "line 2: answer_ids has inf",
    '{"answer_ids": [320]}': "line 2: answer_ids has 320; ids of this model are 0 to 319",
    '{"prompt_ids": [-1], "answer": "a"}': "line 2: prompt_ids has -1",
    '{"answer_ids": [3]}': "line 2: the mask token 3",
    '["a"]': "line 2 must hold a JSON object",
    '{"answer": "a': "line 2 is not JSON",
    "[" * 100_000: "line 2 is not JSON",
    json.dumps({"prompt": "the cat " * 40, "answer": "a"}): "line 2: --prompt and --answer have",
}


def test_wrong_lines_of_requests_are_named(trained, runs_nothing, tmp_path):
    workdir, path = f"--workdir={trained['llada'].workdir}", tmp_path / "requests.jsonl"
    for wrong, words in WRONG_LINES.items():
        path.write_text(TEXT + wrong + "\n")
        line = ends("likelihood", workdir, f"--requests={path}")
        assert words in line and f"--requests={path}" in line, line
    path.write_bytes(TEXT.encode() + b'{"answer": "caf\xe9"}\n')
    assert "line 2 is not UTF-8" in ends("likelihood", workdir, f"--requests={path}")
    for content in ("", "\n \r\n\n"):
        path.write_text(content)
        assert "holds no request" in ends("likelihood", workdir, f"--requests={path}")
    path.write_text(TEXT + '{"prompt": "a", "answer": "b"}\n')
    assert "line 2: --rolling scores" in ends("likelihood", workdir, f"--requests={path}", "--rolling")


def test_requests_end_at_newlines_only_and_may_come_from_standard_input(trained, tmp_path, monkeypatch):
    """A line separator is a character of a text. What is printed is JSON, whatever the model says."""
    answers, scored = ["a\u2028b", "a\x85b", "a"], []

    def nothing(config, params, pairs, *given):
        scored.append([list(pair.answer) for pair in pairs])
        return [likelihood.LogLikelihood(math.nan, math.nan, 1, "l_of_L", 1, 1) for _ in pairs]

    monkeypatch.setattr(likelihood, "log_likelihoods", nothing)
    content = "".join(json.dumps({"answer": answer}, ensure_ascii=False) + "\r\n" for answer in answers).encode()
    (tmp_path / "requests.jsonl").write_bytes(content)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    workdir = f"--workdir={trained['llada'].workdir}"
    for requests in (tmp_path / "requests.jsonl", "-"):
        done = in_process.llada("likelihood", workdir, f"--requests={requests}")
        found = [json.loads(line, parse_constant=pytest.fail) for line in done.stdout.split("\n")[:-1]]
        assert [line["log_likelihood"] for line in found] == [None] * 3
    tokenizer = run_lib.load(trained["llada"].workdir).tokenizer
    assert scored == 2 * [[tokenizer.encode(answer) for answer in answers]]


def test_flags_that_would_change_nothing_are_refused(trained, runs_nothing):
    run, arm = (f"--workdir={trained[family].workdir}" for family in ("llada", "arm"))
    for arguments, words in (
        (["likelihood", arm, "--answer=a", "--draws=128"], ["--draws=128", "exact"]),
        (["likelihood", arm, "--answer=a", "--estimator=l_of_L"], ["--estimator=l_of_L", "exact"]),
        (["likelihood", run, "--answer=a", "--estimator=chain_rule", "--draws=4"], ["--draws=4", "chain_rule"]),
        (["likelihood", run, "--answer=a", "--window=4"], ["--window=4", "--rolling"]),
        (["sample", run, "--infill=a [MASK]", "--gen_length=4"], ["--gen_length=4", "--infill"]),
        (["sample", run, "--prompt=a", "--samples=60000", "--prompt=b"], ["120000 texts", "--samples"]),
    ):
        line = ends(*arguments)
        assert all(word in line for word in words), line
    for flag in "steps=1 block_length=1 cfg_scale=0 remasking=random eos=keep speculate=1 cache=none".split():
        assert "needs a diffusion model" in ends("sample", arm, "--prompt=a", f"--{flag}")


def test_a_page_is_refused_before_a_model_is_opened(trained, monkeypatch, tmp_path):
    def no_load(*given, **options):
        raise Ran

    monkeypatch.setattr(run_lib, "load", no_load)
    (tmp_path / "file").write_text("")
    asked = ("sample", f"--workdir={trained['llada'].workdir}", "--prompt=a")
    for target in ("", "-", tmp_path, tmp_path / "file" / "a.html", "gs://bucket/a.html", "/dev/full", "x" * 300):
        line = ends(*asked, f"--html={target}")
        assert line and "--html" in line
    assert (
        ends("sample", f"--workdir={trained['llada'].workdir}", "--prompt=a", f"--html={tmp_path}/new/a.html") is None
    )
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "request_, words",
    [
        (Request(), "give one of --prompt"),
        (Request(prompt="a", infill="[MASK]"), "--prompt and --infill"),
        (Request(prompt=5), "--prompt=5 must be text"),
        (Request(prompt_ids=[1.5]), "--prompt_ids has 1.5"),
        (Request(prompt="a", gen_length="8"), "--gen_length='8' must be a whole number"),
        (Request(prompt="a", steps=2.0), "--steps=2.0 must be a whole number"),
        (Request(prompt="a", temperature="hot"), "--temperature='hot' must be a number"),
        (Request(prompt="a", temperature=None), "--temperature=None must be a number"),
        (Request(prompt="a", seed=-1), "--seed=-1"),
        (Request(prompt="a", seed=1 << 32), "--seed="),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_requests_from_python_are_refused_alike(trained, runs_nothing, request_, words):
    run = run_lib.load(trained["llada"].workdir)
    with pytest.raises(UserError) as caught:
        generation.generate(run.config, run.params, run.tokenizer, [request_])
    assert words in str(caught.value)
    good = Request(prompt_ids=np.array([9, 10]), gen_length=np.int64(4), temperature=1)
    with pytest.raises(Ran):
        generation.generate(run.config, run.params, run.tokenizer, [good])


def test_tokens_behind_an_arms_end_are_not_counted_as_written(trained, monkeypatch):
    """Nor is a mask token needed; the figures are those of what was written."""
    run = run_lib.load(trained["arm"].workdir)
    tokenizer = copy.copy(run.tokenizer)
    tokenizer.mask_id = None

    def ended_early(config, params, canvas_BL, prompt_B, *given):
        step_BL = np.full(canvas_BL.shape, -1)
        step_BL[0, prompt_B[0] : prompt_B[0] + 3] = range(3)
        return compiled_loop.Sample(np.where(step_BL < 0, canvas_BL, 9), step_BL, 3, 2.0, 0.0)

    monkeypatch.setattr(generation, "ancestral", ended_early)
    prompt = run.tokenizer.encode("the cat")
    found = generation.generate(run.config, run.params, tokenizer, [Request(prompt="the cat", gen_length=8)])[0]
    assert found.ids == prompt + [9] * 3 + [run.tokenizer.eos_id] * 5 and found.gen_length == 8
    assert found.tokens_per_second == 3 / 2.0
