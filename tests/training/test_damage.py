"""Workdirs that are not what they were: one line that says what is wrong, from training and from reading alike.

What is wrong is refused before anything is written, and a workdir is as it was afterwards.
"""

import io
import json
import shutil
import time
from types import SimpleNamespace

import in_process
import jax
import orbax.checkpoint as ocp
import pytest

import llada
from llada.data.tokenizer_training import train_tokenizer
from llada.errors import DataError, UserError
from llada.training import loop, metrics
from llada.training import run as run_lib
from llada.training.arrays import Leaf
from llada.training.checkpoint import Checkpoints
from llada.training.run_item import sealed
from llada.training.verification import verify


@pytest.fixture
def copies(trained, tmp_path):
    """`copies("llada")`: a workdir of one's own, of 12 steps with checkpoints 4, 8 and 12."""

    def copy(family: str, name: str = "run"):
        return shutil.copytree(trained[family].workdir, tmp_path / name)

    return copy


def edit(path, **changes):
    """Keys of a JSON file set anew; a dotted key by `__`; None removes it. The item of a step is sealed again."""
    tree = json.loads(path.read_text())
    for key, value in changes.items():
        *groups, leaf = key.split("__")
        node = tree
        for group in groups:
            node = node[group]
        if value is None:
            del node[leaf]
        else:
            node[leaf] = value
    path.write_text(json.dumps(sealed(tree) if "sha256" in tree else tree))


def run_item(w, step=12):
    return w / "checkpoints" / str(step) / "run" / "metadata"


def cut(path, size=10):
    path.write_bytes(path.read_bytes()[:size])


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def another_family(w, copies):
    shutil.rmtree(w / "checkpoints")
    shutil.copytree(copies("arm", "arm") / "checkpoints", w / "checkpoints")


def renamed(w):
    (w / "checkpoints" / "12").rename(w / "checkpoints" / "14")


BOTH, TRAIN, READ = ("load", "train"), ("train",), ("load",)
# name -> (what is done to a workdir, words of the line, which calls meet it)
DAMAGE = {
    "checkpoint of the other family": (
        another_family,
        r"config.json is not that of its checkpoint.*objective.name",
        BOTH,
    ),
    "config edited": (
        lambda w, _: edit(w / "config.json", model__rope_theta=1e4),
        r"config.json is not that of its checkpoint of step 12 \(model.rope_theta: 500000.0 -> 10000.0\); put the old",
        READ,
    ),
    "step renamed": (
        lambda w, _: renamed(w),
        r"step 14 .* its cursor says step 12: the directory has been renamed",
        BOTH,
    ),
    "no cursor": (lambda w, _: edit(run_item(w), cursor={}), "its cursor has step='None', which is no number", BOTH),
    "cursor a list": (lambda w, _: edit(run_item(w), cursor=[1]), r"has cursor='\[1\]', which is no dict", BOTH),
    "meter of text": (lambda w, _: edit(run_item(w), cursor__meter={"sums": "x"}), "meter=.*no numbers", BOTH),
    "meter of nulls": (lambda w, _: edit(run_item(w), cursor__meter__seconds=[1]), "meter=.*no numbers", BOTH),
    "digest a number": (
        lambda w, _: edit(run_item(w), cursor__rows_digest=3),
        "rows_digest='3', which is no text",
        BOTH,
    ),
    "format of tomorrow": (lambda w, _: edit(run_item(w), format_version=3), "format 3, .*use a newer llada", BOTH),
    "format of nobody": (lambda w, _: edit(run_item(w), format_version="1"), "format_version='1', .* no version", BOTH),
    "begun is text": (lambda w, _: edit(run_item(w), begun="yes"), "begun='yes', which is no bool", BOTH),
    "config of the checkpoint": (lambda w, _: edit(run_item(w), config__model__width="x"), "width='x' is a str", BOTH),
    "tokenizer no base64": (lambda w, _: edit(run_item(w), tokenizer="?"), "its tokenizer is no base64", BOTH),
    "run item cut": (
        lambda w, _: cut(run_item(w)),
        r"metadata is not JSON: .*other steps saved: 4, 8 \(--step=8",
        BOTH,
    ),
    "moments gone": (
        lambda w, _: shutil.rmtree(w / "checkpoints" / "12" / "optimizer_state"),
        "its optimizer_state, the moments of AdamW, is missing; other steps",
        BOTH,
    ),
    "parameters gone": (
        lambda w, _: shutil.rmtree(w / "checkpoints" / "12" / "params"),
        "step 12 .*cannot be used",
        BOTH,
    ),
    "parameters cut": (
        lambda w, _: cut(largest(w / "checkpoints" / "12" / "params")),
        "step 12 .*cannot be used",
        BOTH,
    ),
    "moments cut": (
        lambda w, _: cut(largest(w / "checkpoints" / "12" / "optimizer_state"), 1000),
        "step 12 .*cannot be used",
        TRAIN,
    ),
    "empty step": (lambda w, _: (w / "checkpoints" / "999").mkdir(), "step 999 .*cannot be read: No such file", READ),
    "config.json cut": (lambda w, _: cut(w / "config.json"), "config.json is not JSON", BOTH),
    "config.json a list": (
        lambda w, _: (w / "config.json").write_text("[1]"),
        "must hold a JSON object, not list",
        BOTH,
    ),
    "config.json bytes": (lambda w, _: (w / "config.json").write_bytes(b"\xff"), "config.json is not UTF-8", BOTH),
    "summary.json cut": (lambda w, _: cut(w / "summary.json"), "summary.json is not JSON.*; remove it", TRAIN),
    "summary.json a list": (lambda w, _: (w / "summary.json").write_text("[]"), "must hold a JSON object", TRAIN),
    "other tokenizer": (
        lambda w, copies: shutil.copy(copies("arm", "arm") / "config.json", w / "tokenizer.model"),
        "tokenizer",
        BOTH,
    ),
}


def contents(workdir):
    return {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", DAMAGE)
def test_one_line_says_what_is_wrong_and_nothing_is_written(name, tiny, copies):
    damage, words, calls = DAMAGE[name]
    w = copies("llada")
    damage(w, copies)
    before = contents(w)
    for call in calls:
        if call == "train":  # with an older step beside it training would go on from that: see test_digests.py
            for step in ("4", "8"):
                if (w / "checkpoints" / step).exists():
                    shutil.rmtree(w / "checkpoints" / step)
            before = contents(w)
            words = words.partition(";" if "; other steps" in words else ".*other steps")[0]
        with pytest.raises(UserError, match=words) as raised:
            loop.train(tiny("llada"), w) if call == "train" else llada.load(w)
        assert "\n" not in str(raised.value)
        assert contents(w) == before, call


def test_an_older_step_is_read_and_continued_also_one_of_before_there_was_a_version(tiny, copies, trained):
    w = copies("llada")
    for step in (4, 8):
        edit(run_item(w, step), format_version=None, begun=None, cursor__corpus_digest=None, digests=None, sha256=None)
    cut(run_item(w, 12))
    assert llada.load(w, step=8).step == 8
    shutil.rmtree(w / "checkpoints" / "12")
    summary = loop.train(tiny("llada"), w)
    assert summary["rows_digest"] == trained["llada"].summary["rows_digest"]
    assert summary["eval_nats_per_token"] == trained["llada"].summary["eval_nats_per_token"]


def test_a_lost_tokenizer_comes_back_from_the_checkpoint(tiny, copies):
    w = copies("llada")
    content = (w / "tokenizer.model").read_bytes()
    (w / "tokenizer.model").unlink()
    loop.train(tiny("llada"), w)
    assert (w / "tokenizer.model").read_bytes() == content


def test_another_tokenizer_than_the_checkpoints_is_refused(tiny, copies):
    w = copies("llada")
    train_tokenizer(["other words entirely " * 50], 300, w / "tokenizer.model")
    for use in (lambda: llada.load(w), lambda: loop.train(tiny("llada"), w)):
        with pytest.raises(UserError, match="is not the tokenizer of the checkpoint of step 12"):
            use()


def rows_of(w):
    opened = llada.load(w)
    return run_lib.corpus_of_run(w, opened.config, opened.tokenizer, opened.corpus_digest)


@pytest.mark.parametrize("there", [True, False])
def test_a_run_goes_on_and_is_judged_with_the_rows_that_it_was_trained_on(there, tiny, copies, trained):
    """Rows that are `there` are compared; those that have gone are made anew, and compared before they count."""
    w, digest = copies("llada"), trained["llada"].summary["corpus_digest"]
    if not there:
        shutil.rmtree(w / "data")
        with pytest.raises(
            UserError, match="no rows of .*; llada train --workdir=.* makes them from data.source=text:"
        ):
            rows_of(w)
    edit(run_item(w), cursor__corpus_digest="0" * 64)  # as if the documents had changed since
    before = contents(w)
    words = f"digest {digest}.* are not those that .* was trained on .digest {'0' * 64}.*--config.data.directory=DIR"
    with pytest.raises(DataError, match=words):
        loop.train(tiny("llada"), w)
    assert contents(w) == before
    if there:
        with pytest.raises(DataError, match=words):
            rows_of(w)
    edit(run_item(w), cursor__corpus_digest=digest)
    loop.train(tiny("llada"), w)
    assert rows_of(w).metadata.digest == digest
    names = ["holdout.crc32.npy", "holdout.npy", "metadata.json", "train.crc32.npy", "train.npy"]
    assert sorted(path.name for path in (w / "data").glob("[!.]*")) == names


def test_a_damaged_row_ends_the_run_before_the_step_that_would_use_it(tiny, copies, trained, capsys):
    """Put right, it goes on to the bits that it would have had; rows of an older llada with one remark."""
    w, config = copies("llada"), tiny("llada")
    for step in (8, 12):
        shutil.rmtree(w / "checkpoints" / str(step))
    opened = llada.load(w)
    corpus = run_lib.corpus_of_run(w, config, opened.tokenizer, opened.corpus_digest)
    row = row_of_step(corpus.batches(config, opened.tokenizer), 10)
    path, at = w / "data" / "train.npy", corpus.train_NL.offset + row * 2 * 32
    good = path.read_bytes()
    path.write_bytes(good[: at + 7] + bytes([good[at + 7] ^ 128]) + good[at + 8 :])
    with pytest.raises(DataError, match=f"train.npy: row {row}, at byte {at}, is not what was .*; remove {w}/data"):
        loop.train(config, w)
    assert sorted(int(path.name) for path in (w / "checkpoints").glob("[0-9]*")) == [4, 8]
    path.write_bytes(good)
    assert "checksums" not in capsys.readouterr().err
    edit(w / "data" / "metadata.json", checksums=None, sha256=None)
    for path in (w / "data").glob("*.crc32.npy"):
        path.unlink()
    summary = loop.train(config, w)
    for key in ("rows_digest", "eval_nats_per_token"):
        assert summary[key] == trained["llada"].summary[key]
    rows_of(w)
    assert capsys.readouterr().err.count("was prepared without checksums, by an older llada") == 1
    found = verify(w)
    assert not found.damaged and any("prepared without checksums" in remark for remark in found.remarks)


def row_of_step(batches, step):
    """A row that no step before it has read since step 4."""
    used = batches._used[[batches._ids[i] for i in range(8 * step)]].tolist()
    return next(row for row in used[8 * (step - 1) :] if row not in used[8 * 4 : 8 * (step - 1)])


def test_a_step_taken_away_while_it_is_read_is_looked_for_again(copies, monkeypatch):
    """Training saves a newer one and removes the one that a reader has just chosen."""
    w = copies("llada")
    restore, calls = Checkpoints.restore_parameters, []

    def rotated(checkpoints, config, mesh, step, *more):
        calls.append(step)
        if len(calls) == 1:
            (w / "checkpoints" / "12").rename(w / "checkpoints" / "gone")
        return restore(checkpoints, config, mesh, step, *more)

    monkeypatch.setattr(Checkpoints, "restore_parameters", rotated)
    open_manager, failures = ocp.CheckpointManager, [FileNotFoundError(2, "No such file", "12")] * 2

    def looked_into(*arguments, **more):
        if failures:
            raise failures.pop()
        return open_manager(*arguments, **more)

    monkeypatch.setattr(ocp, "CheckpointManager", looked_into)
    assert llada.load(w).step == 8
    assert not failures
    assert calls == [12, 8]
    calls.clear()
    (w / "checkpoints" / "gone").rename(w / "checkpoints" / "12")
    with pytest.raises(UserError, match="step 12 .*was removed while it was read; saved now: 4, 8.*checkpoint.keep"):
        llada.load(w, step=12)
    # Some of its files have gone, the others are going.
    shutil.rmtree(w / "checkpoints" / "4" / "params")
    rest = SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: shutil.rmtree(w / "checkpoints" / "4"))
    monkeypatch.setattr("llada.training.run_item.time", rest)
    with pytest.raises(UserError, match="step 4 .*was removed while it was read; saved now: 8;"):
        llada.load(w, step=4)


READERS = {
    "sample": ["--prompt=the", "--gen_length=4", "--steps=1"],
    "evaluate": ["--draws=1", "--batches=1"],
    "likelihood": ["--answer=the", "--draws=1"],
    "chat": ["--template=plain", "--gen_length=2", "--json"],
    "export": ["--out=OUT"],
    "import": [],
}


def test_every_reader_takes_the_newest_step_where_training_removes_the_one_it_reads(copies, tmp_path, monkeypatch):
    """It goes in the middle of its arrays; one that was asked for by name is not replaced by another."""
    w = copies("llada")
    step, gone = w / "checkpoints" / "12", w / "checkpoints" / "gone"
    piece, at = Leaf.piece, []

    def removed(leaf, index):
        at.append(leaf.name)
        if len(at) == 4:
            step.rename(gone)
        return piece(leaf, index)

    monkeypatch.setattr(Leaf, "piece", removed)
    for command, flags in READERS.items():
        for asked in ([],) if command == "import" else ([], ["--step=12"]):
            at.clear()
            monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"the cat\n")))
            out = tmp_path / f"{command}{len(asked)}"
            where = [f"--source={w}", f"--workdir={out}"] if command == "import" else [f"--workdir={w}"]
            done = in_process.llada(command, *where, *(flag.replace("OUT", str(out)) for flag in flags), *asked)
            gone.rename(step)
            if asked:
                assert done.returncode == 2 and done.stdout == "", (command, done)
                assert "step 12 of " in done.stderr and "was removed while it was read; saved now: 4, 8;" in done.stderr
                assert not out.exists()
            else:
                assert done.returncode == 0 and "removed" not in done.stderr, (command, done)
                assert len(at) > 8, command
            assert "Traceback" not in done.stderr
    assert json.loads((tmp_path / "export0" / "config.json").read_text())["model_type"] == "llada"
    imported, right = llada.load(tmp_path / "import0"), llada.load(w, step=8)
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), imported.params, right.params))


def test_damaged_lines_of_metrics_go_alone_and_are_kept_beside(copies, tiny, capsys):
    """A last line cut short, as by SIGKILL, goes without a word."""
    w = copies("llada")
    path = w / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    whole = [json.loads(line) for line in lines]
    path.write_bytes(b"".join(lines) + lines[-1][:20])
    assert metrics.read(path) == whole
    damaged = b"".join([lines[0], b"\xff{\n", b"3\n", b'{"loss": 1}\n', *lines[1:]])
    path.write_bytes(damaged)
    assert metrics.read(path) == whole
    loop.train(tiny("llada"), w)
    assert metrics.read(path) == whole
    assert (w / "metrics.jsonl.damaged").read_bytes() == damaged
    assert "dropped line 2, 3, 4, damaged" in capsys.readouterr().err
