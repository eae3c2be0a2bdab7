"""A workdir alone reproduces the bits that it ends with, and what may stand in the way is said."""

import json
import os
import shutil

import pytest
from in_process import llada

from llada import mesh as mesh_lib
from llada.interop import beginning
from llada.training import calls, digests, loop, run_item


@pytest.fixture(scope="module")
def stopped_twice(tiny, corpus, trained, tmp_path_factory):
    """A run from another's model, of two stops, one of them lost, whose metrics are denser at the end.

    Its corpus and that model are gone since.
    """
    folder = tmp_path_factory.mktemp("reproduced")
    workdir, documents = folder / "run", folder / "corpus"
    shutil.copytree(corpus, documents)
    shutil.copytree(trained["llada"].workdir, folder / "source")
    changes = {"data.source": f"text:{documents}/*.txt", "checkpoint.keep_every": 100}  # 0 among them
    beginning.begin(tiny("llada", changes), folder / "source", workdir, None)
    loop.train(tiny("llada", changes), workdir, until=3)
    loop.train(tiny("llada", changes), workdir, until=7)
    shutil.rmtree(workdir / "checkpoints" / "7")  # as if killed before it was saved
    loop.train(tiny("llada", changes | {"train.log_every": 2}), workdir)
    shutil.rmtree(documents)
    shutil.rmtree(folder / "source")
    return workdir


def test_a_run_that_was_stopped_and_continued_is_reproduced(stopped_twice, tmp_path):
    """From the workdir alone: its rows and tokenizer, and what each call had."""
    before = {path: path.read_bytes() for path in stopped_twice.rglob("*") if path.is_file()}
    done = llada("reproduce", f"--workdir={stopped_twice}", f"--out={tmp_path / 'new'}")
    assert done.returncode == 0, done.stderr
    digest = json.loads((stopped_twice / "summary.json").read_text())["parameters_sha256"]
    assert f"reproduced: step 12 of {stopped_twice}, parameters_sha256 {digest}" in done.stdout
    assert "remark: from step 4 on a call had train.log_every 3 -> 2: repeated alike" in done.stderr
    assert done.stderr.count("remark:") == 1
    assert calls.read(stopped_twice)[0][0]["imported"]
    assert json.loads((tmp_path / "new" / "summary.json").read_text())["parameters_sha256"] == digest
    assert not (tmp_path / "new" / "data").exists()
    assert {path: path.read_bytes() for path in stopped_twice.rglob("*") if path.is_file()} == before
    again = llada("reproduce", f"--workdir={stopped_twice}", f"--out={tmp_path / 'new'}")
    assert again.returncode == 2 and "is not empty" in again.stderr


def test_other_bits_and_metrics_are_noticed_and_differences_are_said_beforehand(tiny, tmp_path):
    """A checkpoint and a record as another machine and another llada would have left them."""
    workdir = tmp_path / "run"
    loop.train(tiny("arm", {"train.log_every": 1}), workdir, until=2)
    item = workdir / "checkpoints" / "2" / "run" / "metadata"
    tree = json.loads(item.read_text())
    right = digests.combined(tree["digests"]["params"])
    tree["digests"]["params"]["final_norm"][0] ^= 1
    item.write_text(json.dumps(run_item.sealed(tree)))
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    lines[1]["train/loss_nats_per_token"] += 1e-7
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = workdir / "calls.jsonl"
    call = json.loads(record.read_text())
    call["versions"]["jax"], call["machine"]["cores"] = "0.0.1", 77
    call["commit"], call["code_sha256"] = "abcdef0+", "0" * 64
    call["environment"]["XLA_FLAGS"] = "--other"
    record.write_text(json.dumps(call) + '\n{"from_step": 1, "st')
    done = llada("reproduce", f"--workdir={workdir}")
    assert done.returncode == 1, done.stderr
    wrong = digests.combined(tree["digests"]["params"])
    assert f"not reproduced: step 2 of {workdir}: parameters_sha256 is {right}, there {wrong}; metrics" in done.stdout
    assert "metrics.jsonl differs from line 2 on (step 2): train/loss_nats_per_token is" in done.stdout
    for words in (
        "the run is not finished: its newest checkpoint is reproduced, step 2 of 12",
        "calls.jsonl is damaged in line 2",
        "trained by llada at commit abcdef0+ with changes that no commit holds, here",
        "trained with jax=0.0.1, here",
        "trained with cores=77, here",
        "trained with XLA_FLAGS=--other, here",
    ):
        assert f"remark: {words}" in done.stderr, words
    assert done.stderr.count("remark:") == 6


def test_what_cannot_be_reproduced_is_refused_in_one_line(stopped_twice, tmp_path):
    """No record, too few devices, and a beginning that has been removed."""
    workdir = tmp_path / "run"
    shutil.copytree(stopped_twice, workdir)
    record = workdir / "calls.jsonl"
    lines = [json.loads(line) for line in record.read_text().splitlines()]

    def refused(words):
        done = llada("reproduce", f"--workdir={workdir}")
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr

    def write(change):
        record.write_text("".join(json.dumps(call | change(call)) + "\n" for call in lines))

    write(lambda call: {"keys": call["keys"] | {"mesh.fsdp": 4}})
    refused(
        "the run was on 4 device(s), and here are 1: give as many; XLA_FLAGS=--xla_force_host_platform_device_count=4"
    )
    shutil.rmtree(workdir / "checkpoints" / "0")
    write(lambda call: {})
    refused("was begun from another model, checkpoint 0, which has been removed since")
    record.write_text(json.dumps(lines[1]) + "\n")
    refused("begins at step 3: what an older llada trained before cannot be repeated")
    record.unlink()
    refused("has no calls.jsonl, which llada train writes")


def test_a_record_that_cannot_be_written_ends_no_run_and_a_line_cut_short_takes_no_other_with_it(tiny, tmp_path):
    config = tiny("llada")
    mesh = mesh_lib.make(config.mesh)
    path, said = tmp_path / calls.FILE, []
    path.mkdir()
    calls.record(tmp_path, config, mesh, 0, False, said.append)
    assert said == [f"{path} cannot be written (Is a directory): llada reproduce will not know of this call"]
    path.rmdir()
    path.write_text('{"from_st')
    for step in (4, 8):
        calls.record(tmp_path, config, mesh, step, False, said.append)
    found, bad = calls.read(tmp_path)
    assert [call["from_step"] for call in found] == [4, 8] and bad == [1] and len(said) == 1
    assert found[0]["machine"]["cores"] == len(os.sched_getaffinity(0))
