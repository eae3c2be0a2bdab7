"""`llada tokenize`: the same bytes whoever wrote them and however often, and one line for inputs that are none."""

import gzip
import hashlib
import io
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pyarrow
import pytest
from in_process import llada
from pyarrow import parquet

from llada.data import line_spans, packages, prepare, record_corpus, shards, text_files, tokenizing, units
from llada.data.holdout import is_holdout
from llada.data.sources import documents
from llada.data.tokenizer_training import train_tokenizer
from llada.errors import DataError, UserError

L = 32


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """JSON lines, compressed and not, a table of several row groups, a long text and two short ones."""
    folder = tmp_path_factory.mktemp("inputs")
    rng = random.Random(0)
    words = "the a cat dog sees hears é 字 of\n and".split(" ")

    def text(count):
        return " ".join(rng.choices(words, k=count))

    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text(90)}) + "\n" for _ in range(60)))
    (folder / "b.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps({"text": text(80)}) + "\n" for _ in range(20)).encode(), mtime=0)
    )
    table = pyarrow.table({"text": [None if i == 3 else text(60) for i in range(40)]})
    parquet.write_table(table, folder / "c.parquet", row_group_size=10)
    (folder / "d.txt").write_text("".join(text(12) + "\n" for _ in range(9_000)))
    (folder / "e.txt").write_text(text(50))
    (folder / "f.txt").write_text("")
    return folder


@pytest.fixture(scope="module")
def tokenizer(inputs, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    sample = itertools.islice(documents(f"text:{inputs}/*"), 100)
    return SimpleNamespace(path=path, made=train_tokenizer(sample, 320, path))


@pytest.fixture(scope="module")
def corpus(inputs, tokenizer, tmp_path_factory):
    """Five shards of all inputs, by one process."""
    out = tmp_path_factory.mktemp("corpus") / "out"
    assert tokenize(inputs, tokenizer, out, "--workers=1").returncode == 0
    return out


def tokenize(source, tokenizer, out, *flags, shards=5):
    return llada(
        "tokenize", f"--source=text:{source}/*" if os.path.isdir(source) else f"--source={source}",
        f"--tokenizer={tokenizer.path}", f"--out={out}", f"--shards={shards}", f"--sequence_length={L}",
        "--holdout_fraction=0.3", *flags,
    )  # fmt: skip


def content(directory):
    """Digests of all files by name: no temporary one among them."""
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_rows_are_those_of_a_plain_reading(inputs, tokenizer, corpus):
    """Unit by unit the documents with eos, cut into rows; the rests of all units make the last ones."""
    opened = record_corpus.open_corpus(corpus)
    plan = units.from_json(json.loads((corpus / "plan.json").read_text())["units"])
    assert len(plan) == 5 and {piece.path for unit in plan for piece in unit if piece.start} >= {f"{inputs}/d.txt"}
    whole, rests, found = ([], []), ([], []), Counter()
    for unit in plan:
        stream = ([], [])
        for _, text in units.documents(f"text:{inputs}/*", "text", "refuse", unit, found):
            stream[is_holdout(text, 0.3)].extend([*tokenizer.made.encode(text), tokenizer.made.eos_id])
        for side in (0, 1):
            full = len(stream[side]) // L * L
            whole[side].extend(stream[side][:full])
            rests[side].extend(stream[side][full:])
    for side, rows in enumerate((opened.train_NL, opened.holdout_NL)):
        ids = whole[side] + rests[side][: len(rests[side]) // L * L]
        np.testing.assert_array_equal(rows[:].ravel(), ids)
        tokens = (opened.metadata.train_tokens, opened.metadata.holdout_tokens)[side]
        assert len(whole[side]) + len(rests[side]) == tokens < len(ids) + L
    assert found["empty"] == 1
    assert not record_corpus.verify(corpus)


def test_units_hold_every_document_once(inputs):
    """However the inputs are cut: records are those of an uncut reading, and the long text is the same text."""
    texts = list(documents(f"text:{inputs}/*"))
    long = {text for text in texts if text in (inputs / "d.txt").read_text()}
    for count in (1, 2, 7, 40):
        plan = units.plan(f"text:{inputs}/*", count, "--source", print)
        read = [
            each for unit in plan for each in units.documents(f"text:{inputs}/*", "text", "refuse", unit, Counter())
        ]
        assert [text for piece, text in read if not piece.path.endswith("d.txt")] == [t for t in texts if t not in long]
        assert "".join(text for piece, text in read if piece.path.endswith("d.txt")) == (inputs / "d.txt").read_text()
        assert sum(piece.weight for unit in plan for piece in unit) == pytest.approx(
            sum(path.stat().st_size for path in inputs.iterdir()), abs=10
        )


@pytest.mark.parametrize("content", [b"ab\n\ncd\nefg", b"a\n", b"\n\n\n", b"abc", b"a\r\nb\n"])
@pytest.mark.parametrize("size", [1, 2, 64])
def test_each_line_belongs_to_one_span(content, size, monkeypatch):
    """Every pair of cuts: what is read is the lines that begin between them."""
    monkeypatch.setattr(line_spans, "_CHUNK_BYTES", size)
    lines, begin = {}, 0
    for line in content.splitlines(keepends=True):
        lines[begin] = line
        begin += len(line)
    for start, stop in itertools.combinations_with_replacement(range(len(content) + 1), 2):
        span = line_spans.LineSpan(io.BytesIO(content), start, stop)
        inside = [begin for begin in lines if start <= begin < stop]
        assert b"".join(iter(lambda span=span: span.read(size), b"")) == b"".join(lines[at] for at in inside)
        assert not inside or span.first == inside[0]


def test_bytes_do_not_depend_on_workers_or_jobs(inputs, tokenizer, corpus, tmp_path):
    expected = content(corpus)
    assert tokenize(inputs, tokenizer, tmp_path / "two", "--workers=2").returncode == 0
    first = tokenize(inputs, tokenizer, tmp_path / "jobs", "--only=2/2", "--workers=1")
    assert first.returncode == 0 and not first.stdout and "2 of 5 shards are finished" in first.stderr
    with pytest.raises(UserError, match=r"no manifest.json .* has not finished there"):
        record_corpus.open_corpus(tmp_path / "jobs")
    last = tokenize(inputs, tokenizer, tmp_path / "jobs", "--only=1/2", "--workers=1")
    assert json.loads(last.stdout)["units"] == 5
    assert content(tmp_path / "two") == content(tmp_path / "jobs") == expected


def test_one_unit_is_the_corpus_that_training_prepares(inputs, tokenizer, tmp_path):
    """The same rows, in the same order, as the .npy files of the same documents."""
    source = f"text:{inputs}/[abc]*"
    assert tokenize(source, tokenizer, tmp_path / "out", shards=1).returncode == 0
    data = prepare.DataConfig(source=source, sequence_length=L, holdout_fraction=0.3)
    plain, made = prepare.prepare(tmp_path / "npy", data, tokenizer.made), record_corpus.open_corpus(tmp_path / "out")
    np.testing.assert_array_equal(made.train_NL[:], plain.train_NL)
    np.testing.assert_array_equal(made.holdout_NL[:], plain.holdout_NL)
    assert made.metadata.__class__(**made.metadata.__dict__ | {"digest": plain.metadata.digest}) == plain.metadata
    assert (tmp_path / "npy/train.crc32.npy").read_bytes() == (tmp_path / "out/train.crc32.npy").read_bytes()


def test_a_killed_call_is_gone_on_with(inputs, tokenizer, corpus, tmp_path):
    """SIGKILL while shards are written: the next call writes what is missing, and sweeps what was half written."""
    out = tmp_path / "out"
    code = (
        "import os, sys; from llada.data import shards, record_files; write = record_files.RecordWriter.write\n"
        "def once(self, ids):\n"
        "    write(self, ids)\n"
        "    if 'train-00002' in str(self._path): os.kill(os.getpid(), 9)\n"
        "record_files.RecordWriter.write = once\n"
        "from llada.commands import program; program.main(sys.argv[1:])"
    )
    flags = [f"--source=text:{inputs}/*", f"--tokenizer={tokenizer.path}", f"--out={out}", "--shards=5"]
    flags += [f"--sequence_length={L}", "--holdout_fraction=0.3", "--workers=1"]
    killed = subprocess.run([sys.executable, "-c", code, "tokenize", *flags], capture_output=True, timeout=600)
    assert killed.returncode == -9, killed.stderr
    assert list(out.glob(".*.tmp")) and not (out / "manifest.json").exists()
    before = {name: (out / name).stat().st_mtime_ns for name in content(out) if "/0000" in name}
    assert len(before) == 2
    assert tokenize(inputs, tokenizer, out, "--workers=1").returncode == 0
    assert content(out) == content(corpus)
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    # A shard that has gone comes back, and nothing else is written but the manifest, as it was.
    (out / shards.shard_name("train", 3, 5)).unlink()
    kept = (out / shards.shard_name("train", 2, 5)).stat().st_mtime_ns
    assert tokenize(inputs, tokenizer, out, "--workers=1").returncode == 0
    assert content(out) == content(corpus) and (out / shards.shard_name("train", 2, 5)).stat().st_mtime_ns == kept
    again = tokenize(inputs, tokenizer, out)
    assert again.returncode == 0 and "complete: nothing to do" in again.stderr


def test_what_is_written_again_must_be_as_before(inputs, tokenizer, tmp_path):
    """Inputs of the same size but other content: the shards that are there are of the old ones."""
    folder = tmp_path / "inputs"
    shutil.copytree(inputs, folder)
    assert tokenize(folder, tokenizer, tmp_path / "out", shards=3).returncode == 0
    (folder / "a.jsonl").write_text((folder / "a.jsonl").read_text().replace("cat", "dog"))
    (tmp_path / "out" / shards.shard_name("train", 0, 3)).unlink()
    found = tokenize(folder, tokenizer, tmp_path / "out", shards=3)
    assert found.returncode == DataError.status and "are not what they were" in found.stderr
    (folder / "a.jsonl").write_text("{}")
    found = tokenize(folder, tokenizer, tmp_path / "out", shards=3)
    assert found.returncode == 2 and "it was changed since" in found.stderr


def test_a_signal_ends_the_workers_and_loses_nothing(inputs, tokenizer, corpus, tmp_path):
    """SIGTERM to a call with two workers: status 143, no process of it is left, and the next call ends as usual."""
    out = tmp_path / "out"
    flags = [f"--source=text:{inputs}/*", f"--tokenizer={tokenizer.path}", f"--out={out}", "--shards=5"]
    flags += [f"--sequence_length={L}", "--holdout_fraction=0.3", "--workers=2"]
    call = subprocess.Popen(
        [sys.executable, "-m", "llada", "tokenize", *flags], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    for _ in range(6_000):
        if (out / "plan.json").exists() or call.poll() is not None:
            break
        time.sleep(0.1)
    time.sleep(0.3)
    call.terminate()
    err = call.communicate(timeout=600)[1]
    assert call.returncode == 143 and "stopped by SIGTERM" in err and "Traceback" not in err, err
    with pytest.raises(ProcessLookupError):
        for _ in range(100):  # multiprocessing's own helper ends after it
            os.killpg(call.pid, 0)
            time.sleep(0.1)
    assert tokenize(inputs, tokenizer, out, "--workers=1").returncode == 0
    assert content(out) == content(corpus)


@pytest.mark.parametrize(
    ("policy", "rows", "counted"),
    [("replace", ["a\ufffdb", "c\ufffd"], "2 documents were"), ("skip", [], "2 documents are")],
)
def test_invalid_utf8_is_refused_replaced_or_skipped(tokenizer, tmp_path, policy, rows, counted):
    folder = tmp_path / "in"
    folder.mkdir()
    good = [json.dumps({"text": f"the cat sees dog {i} " * 30}).encode() for i in range(20)]
    (folder / "a.jsonl").write_bytes(b"\n".join([*good, b'{"text": "a\xffb"}', b'{"text": "c\\ud800"}', b""]))
    found = tokenize(folder, tokenizer, tmp_path / "no")
    assert found.returncode == 2 and "a.jsonl is not UTF-8: bad byte at" in found.stderr and "--source" in found.stderr
    found = tokenize(folder, tokenizer, tmp_path / "yes", f"--invalid_utf8={policy}", shards=1)
    assert found.returncode == 0 and counted in found.stderr
    assert json.loads(found.stdout)["left_out"]["replaced" if rows else "skipped"] == 2
    plan = units.plan(f"text:{folder}/*", 1, "--source", print)
    read = [text for _, text in units.documents(f"text:{folder}/*", "text", policy, plan[0], Counter())]
    assert read[20:] == rows


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), "dictionary"])
def test_a_table_may_hold_what_is_no_utf8(tmp_path, kind):
    values = pyarrow.array([b"a\xffb", b"good", None], pyarrow.binary()).view(pyarrow.string())
    values = values.dictionary_encode() if kind == "dictionary" else values.cast(kind)
    parquet.write_table(pyarrow.table({"text": values}), tmp_path / "x.parquet")
    plan = units.plan(f"text:{tmp_path}/*", 1, "--source", print)
    for policy, texts in (("replace", ["a\ufffdb", "good"]), ("skip", ["good"])):
        found = units.documents(f"text:{tmp_path}/*", "text", policy, plan[0], Counter())
        assert [text for _, text in found] == texts
    with pytest.raises(UserError, match="not UTF-8"):
        list(units.documents(f"text:{tmp_path}/*", "text", "refuse", plan[0], Counter()))


def test_bad_inputs_get_one_line(inputs, tokenizer, corpus, tmp_path, monkeypatch):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "a.txt").touch()
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(text_files, "_FREE_BYTES", 1 << 20)
    (tmp_path / "bomb.txt.gz").write_bytes(gzip.compress(b"a\n" * 3_000_000))
    out = tmp_path / "out"
    cases = [
        (tokenize(f"text:{empty}/*", tokenizer, out), "all of its 1 files are empty"),
        (tokenize(f"text:{tmp_path}/none/*", tokenizer, out), "no file matches .*check --source"),
        (tokenize(f"text:{tmp_path}/pipe", tokenizer, out), "no regular file"),
        (tokenize(f"text:{tmp_path}/bomb.txt.gz", tokenizer, tmp_path / "b"), "expands to 400 times its size"),
        (tokenize("wikipedia", tokenizer, out), "none that can be tokenised; allowed: stdlib"),
        (tokenize("dialogues:x", tokenizer, out), "none that can be tokenised"),
        (tokenize(f"text:{inputs}/c.parquet", tokenizer, tmp_path / "c", "--text_key=x"), "no column 'x'.*--text_key"),
        (tokenize(inputs, tokenizer, out, "--only=3/2"), "--only=3/2 must be I/N"),
        (tokenize(inputs, tokenizer, out, "--holdout_fraction=1"), "--holdout_fraction=1.0"),
        (tokenize(inputs, tokenizer, corpus, "--text_key=body"), "other values .text_key 'text', asked 'body'"),
        (tokenize(inputs, tokenizer, corpus, shards=6), "shards 5, asked 6"),
        (tokenize(inputs, tokenizer, inputs), "holds other files, such as a.jsonl"),
        (tokenize(f"text:{inputs}/e.txt", tokenizer, tmp_path / "e"), "side has .* less than one row"),
    ]  # fmt: skip
    for found, message in cases:
        assert found.returncode == 2 and not found.stdout, (message, found)
        last = found.stderr.strip().splitlines()[-1]
        assert last.startswith("llada tokenize: "), found.stderr
        assert re.search(message, last), (message, last)
    assert not record_corpus.verify(corpus)


def test_packages_are_found_in_the_order_of_their_names(tokenizer, tmp_path, monkeypatch):
    for name in ("b/x.py", "a/z.py", "a/y.py", "a/__pycache__/y.py", "a/data.txt"):
        (tmp_path / "site" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "site" / name).write_text(f"# {name}\n" + "cat = dog\n" * 60)
    monkeypatch.setattr(packages.sysconfig, "get_path", lambda name: str(tmp_path / "site"))
    texts = [f"# {name}\n" for name in ("a/y.py", "a/z.py", "b/x.py")]
    assert [text[: len(name)] for text, name in zip(documents("packages"), texts, strict=True)] == texts
    plan = units.plan("packages", 2, "--source", print)
    assert [[piece.path for piece in unit] for unit in plan] == [["a/y.py", "a/z.py"], ["b/x.py"]]
    read = [text for unit in plan for _, text in units.documents("packages", "text", "refuse", unit, Counter())]
    assert read == list(documents("packages"))
    assert tokenizing.units.plan("packages", None, "--source", print) == [plan[0] + plan[1]]
