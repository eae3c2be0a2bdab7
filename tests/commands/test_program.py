"""The program as users see it: commands work, mistakes get one line and status 2, and an interrupted run is saved."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import in_process
import pytest

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
QUICKSTART = f"--config={EXPERIMENTS}/quickstart.py"


def llada(*arguments, cwd=None):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "llada", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=400)


def refused(*arguments, cwd=None, program=in_process.llada) -> str:
    """The one line of a refusal."""
    done = program(*arguments, cwd=cwd)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2, (done.returncode, done.stderr[-2000:])
    assert "Traceback" not in done.stderr
    assert lines[-1].startswith("llada"), lines
    return lines[-1]


WRONG_CONFIGS = {
    "unknown key": (["--config.model.wdth=64"], ["config.model.wdth", "did you mean", "model.width", "heads"]),
    "unknown group": (["--config.modle.width=64"], ["config.modle", "did you mean --config.model"]),
    "heads that do not divide": (["--config.model.heads=7"], ["model.heads=7", "model.width=", "1, 2, 3, 4"]),
    "kv_heads that do not divide": (["--config.model.kv_heads=2"], ["model.kv_heads=2", "model.heads="]),
    "not a number": (["--config.train.steps=many"], ["train.steps=many", "whole number"]),
    "not a whole number": (["--config.model.layers=2.5"], ["model.layers=2.5", "whole number"]),
    "a group given a value": (["--config.model=8"], ["config.model", "group of keys"]),
    "nothing given": (["--config.seed"], ["--config.seed", "needs a value"]),
    "negative": (["--config.train.batch_size=-4"], ["train.batch_size=-4", "positive"]),
    "not a choice": (["--config.objective.name=gpt"], ["objective.name=gpt", "diffusion, autoregressive"]),
    "objective against attention": (["--config.model.causal=True"], ["model.causal=True", "needs False"]),
    "rows longer than the model": (["--config.data.sequence_length=4096"], ["4096", "model.max_length"]),
    "microbatches": (["--config.train.microbatches=5"], ["train.batch_size", "multiple of train.microbatches=5"]),
    "steps and tokens": (["--config.train.steps=5", "--config.train.tokens=9"], ["train.steps", "train.tokens"]),
    "fewer tokens than a step": (["--config.train.tokens=9"], ["train.tokens=9", "one step is"]),
    "a bad schedule": (
        ["--config.optimizer.schedule=0:0 fast:1"],
        ["optimizer.schedule", "'fast:1'", "POSITION:FACTOR"],
    ),
    "a schedule back in time": (["--config.optimizer.schedule=50%:1 20%:1"], ["optimizer.schedule", "'20%:1'"]),
    "a mesh of more devices": (["--config.mesh.data=3"], ["mesh.data=3", "1 device"]),
    "missing corpus": (["--config.data.source=text:/nowhere/*.txt"], ["/nowhere/*.txt", "--config.data.source"]),
    "unknown source": (["--config.data.source=wikipedia"], ["'wikipedia'", "stdlib", "text:GLOB"]),
    "a tokenizer that is not there": (["--config.data.tokenizer=/no.model"], ["/no.model", "check the path"]),
    "an unwritable workdir": (["--workdir=/proc/llada/run"], ["--workdir=/proc/llada/run", "cannot be written"]),
    "a flag that does not exist": (["--workdri=x"], ["workdri", "workdir"]),
    "a word without a flag": (["go"], ["'go' is not a flag"]),
}


@pytest.mark.parametrize("name", list(WRONG_CONFIGS))
def test_a_wrong_configuration_gets_one_line(name, tmp_path):
    arguments, words = WRONG_CONFIGS[name]
    line = refused("train", f"{QUICKSTART}:llada", f"--workdir={tmp_path / 'run'}", *arguments)
    assert all(word in line for word in words), line


def test_wrong_experiment_files_get_one_line(tmp_path):
    (tmp_path / "broken.py").write_text("def get_config(:\n")
    (tmp_path / "empty.py").write_text("")
    for file, words in {
        f"{EXPERIMENTS}/quickstart.py:lada": [":lada", "llada, arm"],
        f"{EXPERIMENTS}/quikstart.py": ["no file", "quickstart.py"],
        tmp_path / "broken.py": ["not a Python experiment file", "line 1"],
        tmp_path / "empty.py": ["defines no get_config"],
    }.items():
        line = refused("train", f"--config={file}", f"--workdir={tmp_path / 'run'}")
        assert all(word in line for word in words), line
    assert "--config is missing" in refused("train")
    assert "--workdir is missing" in refused("train", QUICKSTART)
    assert not (tmp_path / "run").exists()


def test_wrong_corpora_and_tokenizers_get_one_line(tmp_path):
    import sentencepiece

    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"abc\0\xff")
    (tmp_path / "few.txt").write_text("a few words\n")
    (tmp_path / "text.txt").write_text("the cat sees the dog and the tree\n" * 500)
    model = str(tmp_path / "plain")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=model, vocab_size=18, minloglevel=2
    )
    for arguments, words in (
        ([f"--config.data.source=text:{tmp_path}/empty.txt"], ["empty", "--config.data.source"]),
        ([f"--config.data.source=text:{tmp_path}/binary.txt"], ["binary.txt", "byte 3"]),
        ([f"--config.data.source=text:{tmp_path}/few.txt", "--config.model.vocab_size=280"], ["data.sequence_length"]),
        (
            [f"--config.data.tokenizer={tmp_path}/plain.model", "--config.model.vocab_size=18"],
            ["no mask token", "vocab_size=19"],
        ),
        ([f"--config.data.tokenizer={tmp_path}/text.txt"], ["text.txt", "not a SentencePiece model"]),
    ):
        line = refused("train", f"{QUICKSTART}:llada", f"--workdir={tmp_path}/run{len(words[0])}", *arguments)
        assert all(word in line for word in words), line


def test_a_batch_that_does_not_divide_over_the_mesh_gets_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    line = refused("train", QUICKSTART, f"--workdir={tmp_path}/run", "--config.train.batch_size=12", program=llada)
    assert "train.batch_size=12" in line and "= 8" in line
    line = refused("train", QUICKSTART, f"--workdir={tmp_path}/run", "--config.mesh.tensor=8", program=llada)
    assert "multiple of --config.mesh.tensor=8" in line


def test_another_experiments_workdir_is_refused(trained):
    workdir = trained["llada"].workdir
    line = refused("train", f"{QUICKSTART}:llada", f"--workdir={workdir}")
    assert "belongs to another experiment" in line and "model." in line


def test_wrong_requests_for_text_get_one_line(trained):
    run, arm = (f"--workdir={trained[name].workdir}" for name in ("llada", "arm"))
    for arguments, words in (
        ([run], ["one of --prompt, --prompt_ids, --infill", "none"]),
        ([run, "--prompt=a", "--infill=[MASK]"], ["--prompt and --infill"]),
        ([run, "--prompt=a", "--gen_length=0"], ["--gen_length=0"]),
        ([run, "--prompt=a", "--gen_length=400"], ["model.max_length=32"]),
        ([run, "--prompt=a", "--gen_length=8", "--steps=9"], ["--steps=9", "8 positions"]),
        ([run, "--prompt=a", "--gen_length=8", "--steps=3", "--block_length=4"], ["--steps=3", "2 block"]),
        ([run, "--prompt=a", "--gen_length=8", "--block_length=9"], ["--block_length=9"]),
        ([run, "--prompt=a", "--gen_length=8", "--temperature=-1"], ["--temperature=-1", "0 (greedy)"]),
        (
            [run, "--prompt=a", "--gen_length=8", "--remasking=best"],
            ["--remasking=best", "low_confidence, top_probability, random"],
        ),
        ([run, "--infill=nothing to fill"], ["--infill", "[MASK:12]"]),
        ([run, "--prompt=a", "--gen_length=8", "--cache=double"], ["--cache=double", "none, prefix, dual"]),
        ([run, "--prompt=a", "--gen_length=8", "--confidence_threshold=2"], ["--confidence_threshold=2"]),
        ([run, "--prompt=a", "--gen_length=8", "--eos=never"], ["--eos=never", "no_confidence"]),
        ([run, "--prompt=a", "--prompt=b", "--watch"], ["--watch", "2"]),
        ([run, "--prompt=a", "--gen_length=8", "--html=/dev/null/a.html"], ["--html", "/dev/null"]),
        ([run, "--prompt=a", "--seed=-1"], ["seed"]),
        ([run, "--prompt_ids=1,x"], ["--prompt_ids", "integers"]),
        ([run, "--prompt_ids=1,320"], ["320", "0 to 319"]),
        ([run, "--step=5", "--prompt=a"], ["--step=5", "saved: 4, 8, 12"]),
        ([arm, "--infill=a [MASK]"], ["--infill", "diffusion model"]),
        ([arm, "--prompt=a", "--cfg_scale=1"], ["--cfg_scale", "diffusion model"]),
        ([arm, "--prompt=a", "--cache=dual"], ["--cache", "diffusion model"]),
        (["--workdir=/nowhere", "--prompt=a"], ["/nowhere", "config.json"]),
        ([], ["--workdir is missing"]),
    ):
        line = refused("sample", *arguments)
        assert all(word in line for word in words), line


def test_wrong_evaluations_get_one_line(trained):
    run, arm = (f"--workdir={trained[name].workdir}" for name in ("llada", "arm"))
    assert "l_of_L, bernoulli" in refused("evaluate", run, "--estimator=guess")
    assert "exact" in refused("evaluate", arm, "--estimator=l_of_L")
    assert "--draws" in refused("evaluate", run, "--draws=0")
    assert "belongs to llada train" in refused("evaluate", run, "--config.seed=1")


def test_sample_continues_a_prompt_and_fills_gaps(trained):
    for name, program in (("llada", llada), ("arm", in_process.llada)):  # a process of its own, and this one
        done = program("sample", f"--workdir={trained[name].workdir}", "--prompt=the cat", "--gen_length=8", "--json")
        answer = json.loads(done.stdout)
        assert answer["text"].startswith("the cat") and answer["forward_passes"] == 8 and answer["seconds"] > 0
        assert 3 not in answer["ids"]  # the mask token
    done = in_process.llada("sample", f"--workdir={trained['llada'].workdir}", "--infill=the [MASK:2] sees[MASK] dog")
    assert done.stdout.startswith("the ") and " sees" in done.stdout and done.stdout.endswith(" dog\n")


def test_several_prompts_are_written_as_one_batch_and_shown_as_they_come(trained, tmp_path):
    run, page = f"--workdir={trained['llada'].workdir}", tmp_path / "replay.html"
    options = ["--gen_length=8", "--temperature=1", "--block_length=4", "--json"]
    done = in_process.llada(
        "sample", run, "--prompt=the cat", "--prompt=a tree sees the river", *options, "--samples=2"
    )
    four = [json.loads(line) for line in done.stdout.splitlines()]
    assert [text["text"].startswith("the cat") for text in four] == [True, True, False, False]
    assert four[0]["ids"] != four[1]["ids"] and four[0]["forward_passes"] == 8
    done = in_process.llada("sample", run, "--prompt=the cat", *options, "--seed=1", "--watch", f"--html={page}")
    alone = json.loads(done.stdout)
    assert alone["ids"] == four[1]["ids"] and alone["step"] == four[1]["step"]
    assert "step 8/8" in done.stderr and "<html" in page.read_text()


def test_likelihoods_of_answers(trained, tmp_path):
    llada_run, arm_run = (f"--workdir={trained[name].workdir}" for name in ("llada", "arm"))
    asked = ["--prompt=the cat", "--answer= sees the dog"]
    bound = json.loads(in_process.llada("likelihood", llada_run, *asked, "--draws=16").stdout)
    exact = json.loads(in_process.llada("likelihood", arm_run, *asked).stdout)
    assert bound["tokens"] == exact["tokens"] and exact["stderr"] == 0 and exact["estimator"] == "exact"
    assert bound["log_likelihood"] < 0 and bound["nats_per_token"] == -bound["log_likelihood"] / bound["tokens"]
    requests = tmp_path / "requests.jsonl"
    lines = [{"prompt": "a", "answer": " tree"}, {"prompt": "the cat", "answer": " sees the dog"}, {"answer_ids": [9]}]
    requests.write_text("\n".join(map(json.dumps, lines)) + "\n")
    done = in_process.llada("likelihood", llada_run, f"--requests={requests}", "--draws=16")
    many = [json.loads(line) for line in done.stdout.splitlines()]
    assert many[1]["log_likelihood"] == pytest.approx(bound["log_likelihood"], rel=1e-4)
    assert len(many) == 3 and many[2]["rows"] == 1 and many[2]["stderr"] == 0
    long = "--answer=" + "the cat sees the dog . " * 20
    whole = json.loads(in_process.llada("likelihood", arm_run, long, "--rolling").stdout)
    assert whole["tokens"] > 64 and whole["rows"] > 2


def test_wrong_likelihoods_get_one_line(trained, tmp_path):
    run, arm = (f"--workdir={trained[name].workdir}" for name in ("llada", "arm"))
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n')
    for arguments, words in (
        ([run], ["--answer"]),
        ([run, "--prompt=a", "--answer="], ["--answer is empty"]),
        ([run, "--prompt=a", "--prompt_ids=1", "--answer=b"], ["--prompt and --prompt_ids"]),
        ([run, "--answer_ids=5,999"], ["999", "0 to 319"]),
        ([run, "--answer_ids=3"], ["mask token 3"]),
        ([run, "--answer=" + "the cat . " * 40], ["model.max_length=32", "--rolling"]),
        ([run, "--answer=b", "--draws=0"], ["--draws=0"]),
        ([run, "--answer=b", "--estimator=guess"], ["--estimator=guess", "chain_rule"]),
        ([arm, "--answer=b", "--cfg_scale=1"], ["--cfg_scale=1", "ARM"]),
        ([run, "--answer=b", "--window=4"], ["--window=4", "--rolling"]),
        ([run, "--prompt=a", "--answer=b", "--rolling"], ["--rolling", "prompt"]),
        ([run, "--requests=/nowhere.jsonl"], ["--requests=/nowhere.jsonl"]),
        ([run, f"--requests={tmp_path}/bad.jsonl"], ["line 1", "answer"]),
        ([run, f"--requests={tmp_path}/bad.jsonl", "--answer=b"], ["exclude each other"]),
    ):
        line = refused("likelihood", *arguments)
        assert all(word in line for word in words), line


def test_evaluate_repeats_the_figure_of_training(trained, tmp_path):
    for name in ("llada", "arm"):
        workdir = tmp_path / name
        shutil.copytree(trained[name].workdir, workdir)
        done = in_process.llada("evaluate", f"--workdir={workdir}")
        result, summary = json.loads(done.stdout), trained[name].summary
        assert result["nats_per_token"] == pytest.approx(summary["eval_nats_per_token"], rel=1e-5)
        assert result["stderr"] == pytest.approx(summary["eval_stderr"], rel=1e-3)
        assert result["bits_per_byte"] == pytest.approx(summary["eval_bits_per_byte"], rel=1e-5)
        assert json.loads((workdir / "evaluation.json").read_text()) == result


def test_compare_writes_report_and_curves(trained, tmp_path):
    runs = [f"--{name}={trained[name].workdir}" for name in ("llada", "arm")]
    done = in_process.llada(
        "compare", *runs, f"--out={tmp_path}", "--prompt=the cat", "--infill=the [MASK]", "--gen_length=8"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = (tmp_path / "report.md").read_text()
    bound = f"{trained['llada'].summary['eval_nats_per_token']:.4f}"
    assert bound in report and bound in done.stdout and "curves.png" in report
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "summary, blocked, words",
    [
        ({"rows_digest": "0"}, False, "differ in rows_digest"),
        ({}, True, "differ in objective.block_cross_document_attention"),
    ],
)
def test_compare_refuses_runs_that_read_other_rows_or_less_of_them(trained, tiny, tmp_path, summary, blocked, words):
    other = tmp_path / "other"
    other.mkdir()
    config = tiny("arm", {"objective.block_cross_document_attention": blocked})
    (other / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    (other / "summary.json").write_text(json.dumps(trained["arm"].summary | summary))
    line = refused("compare", f"--llada={trained['llada'].workdir}", f"--arm={other}", f"--out={tmp_path / 'out'}")
    assert words in line


def test_help_and_unknown_commands():
    assert "train" in llada("--help").stdout and llada("--help").returncode == 0
    assert "--workdir" in llada("train", "--help").stdout
    assert "there is no command 'trian'" in refused("trian")


def test_ctrl_c_saves_and_says_so(tiny, tmp_path):
    """The program's own exit status and message; the bits are proved in tests/training/test_loop.py."""
    experiment = tmp_path / "experiment.py"
    tree = json.dumps(dataclasses.asdict(tiny("llada", {"train.steps": 100_000})))
    experiment.write_text(f"import json\n\ndef get_config():\n    return json.loads({tree!r})\n")
    command = [sys.executable, "-m", "llada", "train", f"--config={experiment}", f"--workdir={tmp_path}/run"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    while not (tmp_path / "run" / "checkpoints" / "4").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 130
    assert "stopped by SIGINT after step" in errors and "Traceback" not in errors
