"""Training from what `llada tokenize` wrote: the rows of the .npy files, and nothing that is damaged."""

import json
import random
import shutil

import numpy as np
import pytest
from in_process import llada

from llada import json_files
from llada.data import checksums, record_corpus, rows
from llada.data.checksums import CheckedRows
from llada.data.inspection import duplicates
from llada.data.record_files import RecordRows, RecordWriter
from llada.data.sources import documents
from llada.data.tokenizer_training import train_tokenizer
from llada.errors import DataError, UserError
from llada.training import loop

L = 32


@pytest.fixture(scope="module")
def made(corpus, trained, tmp_path_factory):
    """`made(shards)`: the corpus of the shared runs as so many shards, by their tokenizer; to be read only."""
    folder, done = tmp_path_factory.mktemp("records"), {}

    def make(shards):
        if shards not in done:
            out = folder / str(shards)
            flags = [f"--source=text:{corpus}/*.txt", f"--tokenizer={trained['llada'].workdir}", f"--out={out}"]
            flags += [f"--shards={shards}", f"--sequence_length={L}", "--holdout_fraction=0.2", "--workers=1"]
            found = llada("tokenize", *flags)
            assert found.returncode == 0, found.stderr
            done[shards] = out
        return done[shards]

    return make


@pytest.fixture
def copied(made, tmp_path):
    """Three shards, to be damaged."""
    shutil.copytree(made(3), tmp_path / "copy")
    return tmp_path / "copy"


def from_records(tiny, family, directory, changes=()):
    return tiny(family, {"data.source": f"array_record:{directory}", **dict(changes)})


def test_one_shard_trains_as_the_npy_files_do(tiny, made, trained, tmp_path):
    """The same bits: rows, parameters, moments, held-out figures; the tokenizer is the corpus's own."""
    summary = loop.train(from_records(tiny, "llada", made(1)), tmp_path)
    same = {key for key, value in trained["llada"].summary.items() if summary[key] == value}
    assert same >= {"rows_digest", "parameters_sha256", "moments_sha256", "eval_nats_per_token", "eval_rows_digest"}
    assert same >= {"unigram_entropy_nats", "tokenizer_sha256", "eval_bits_per_byte"}
    assert not (tmp_path / "data").exists()


def test_families_read_the_same_rows_and_a_run_goes_on_with_them(tiny, made, tmp_path):
    """The ARM without a break, LLaDA stopped in the middle: every row of three shards, in one order."""
    arm = loop.train(from_records(tiny, "arm", made(3)), tmp_path / "arm")
    config = from_records(tiny, "llada", f"{made(3)}/*.array_record")
    loop.train(config, tmp_path / "llada", until=5)
    assert loop.train(config, tmp_path / "llada")["rows_digest"] == arm["rows_digest"]
    shown = llada("data", f"--workdir={tmp_path / 'llada'}", "--at_step=3")
    corpus = record_corpus.open_corpus(made(3))
    batches = rows.Batches(corpus.checked(320)[0], 8, config.seed)
    found = json.loads(shown.stdout)
    assert [each["row"] for each in found["rows"]] == batches.row_ids(3).tolist()
    for each, ids_L in zip(found["rows"], batches.at(3), strict=True):
        reader = RecordRows(made(3), [f for f in corpus.train_NL.files if f.name == each["file"]], L, np.dtype("<u2"))
        np.testing.assert_array_equal(reader[np.array([each["record"]])][0], ids_L)
    good = llada("verify", f"--workdir={tmp_path / 'llada'}")
    assert good.returncode == 0 and "0 are damaged" in good.stdout


def test_a_process_reads_its_own_rows_only_and_each_row_once_an_epoch(made, monkeypatch):
    corpus = record_corpus.open_corpus(made(3))
    read, real = [], RecordRows._row
    monkeypatch.setattr(RecordRows, "_row", lambda self, row: read.append(row) or real(self, row))
    sums = corpus.checked(320)[0]
    B = 8
    whole = rows.Batches(sums, B, seed=0)
    first, second = (rows.Batches(sums, B, seed=0, positions=np.arange(B)[half::2]) for half in (0, 1))
    steps = -(-len(sums) // B)
    for step in range(steps):
        ids = whole.row_ids(step)
        read.clear()
        np.testing.assert_array_equal(first.at(step), corpus.train_NL[ids[::2]])
        assert read[: B // 2] == ids[::2].tolist()
        assert second.row_ids(step).tolist() == ids[1::2].tolist()
    seen = [row for step in range(steps) for row in whole.row_ids(step).tolist()][: len(sums)]
    assert sorted(seen) == list(range(len(sums)))


def test_every_bit_that_is_wrong_is_noticed_or_harmless(copied):
    """Of 20 single bits over a shard: a record that is read is as written, or is refused by file and number."""
    manifest = record_corpus.read_manifest(copied)
    expected = record_corpus.open_corpus(copied).train_NL[:]
    path = copied / manifest.files[0][1].name
    content, rng = path.read_bytes(), random.Random(0)
    refused = 0
    used = len(content.rstrip(b"\0"))
    for case in range(20):
        # The last third of a small file is padding, where a bit is nothing's.
        at, bit = rng.randrange(used if case % 4 == 0 else 2 * L * manifest.files[0][1].records), rng.randrange(8)
        damaged = bytearray(content)
        damaged[at] ^= 1 << bit
        path.write_bytes(damaged)
        assert path.name in record_corpus.verify(copied)  # whatever the bit is of
        try:
            rows_NL = record_corpus.open_corpus(copied).checked(320)[0][:]
        except DataError as error:
            assert str(path) in str(error) and error.status == 4
            refused += 1
        else:
            np.testing.assert_array_equal(rows_NL, expected)
    assert refused >= 15
    path.write_bytes(content)
    assert not record_corpus.verify(copied)


def test_damage_ends_a_run_before_the_step_that_would_read_it(tiny, copied, tmp_path):
    config = from_records(tiny, "arm", copied)
    corpus = record_corpus.open_corpus(copied)
    batches = corpus.batches(config, _Vocabulary)
    step, row = next(
        (step, row) for step in range(3, 12) for row in batches.row_ids(step) if row < corpus.train_NL.files[0].records
    )
    path, record = corpus.train_NL.where(row)
    content = path.read_bytes()
    rows_NL = corpus.train_NL[: corpus.train_NL.files[0].records]
    # Another row in its place, as a file of an earlier corpus would have it: only the checksum of the row differs.
    rows_NL[record] = rows_NL[record][::-1]
    with RecordWriter(path, L) as writer:
        writer.write(rows_NL)
    assert path.stat().st_size == len(content)
    with pytest.raises(DataError, match=rf"{path.name}: record {record} is not what was written: its crc32 is another"):
        loop.train(config, tmp_path / "run")
    done = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all(each <= step for each in done)
    found = llada("verify", f"--workdir={tmp_path / 'run'}")
    assert found.returncode == 4 and path.name in found.stdout
    found = llada("data", f"--source=array_record:{copied}", "--verify")
    assert found.returncode == 4 and f"{path.name}: DAMAGED" in found.stdout and "1 are damaged" in found.stdout
    path.write_bytes(content)
    assert llada("data", f"--source=array_record:{copied}", "--verify").returncode == 0


class _Vocabulary:
    vocab_size = 320


def test_bad_corpora_get_one_line(tiny, made, copied, tmp_path, trained):
    path = copied / record_corpus.read_manifest(copied).files[0][1].name
    content, manifest = path.read_bytes(), copied / "manifest.json"
    values = json_files.read(manifest)

    def trains(source=f"array_record:{copied}", **changes):
        keys = {f"data.{key}": value for key, value in changes.items()}
        return lambda: loop.train(tiny("arm", {"data.source": source, **keys}), tmp_path / "run")

    def rewritten(**changes):
        manifest.write_text(json_files.dumps(json_files.sealed(values | changes)))
        return trains()

    def refused(call, kind, message):
        with pytest.raises(kind, match=message) as caught:
            call()
        assert type(caught.value) is kind and "\n" not in str(caught.value)
        assert not (tmp_path / "run").exists()

    path.write_bytes(content[: len(content) // 2])
    refused(trains(), DataError, rf"{path.name} has [\d,]+ bytes, and [\d,]+ in the manifest")
    path.unlink()
    refused(trains(), DataError, rf"{path.name} is missing")
    path.write_bytes(content)
    refused(rewritten(format_version=2), UserError, "format version 2; this llada reads up to 1")
    refused(rewritten(train_rows=values["train_rows"] + 1), DataError, "no usable corpus|not have as many rows")
    manifest.write_text(manifest.read_text().replace('"source"', '"sauce"'))
    refused(trains(), DataError, "no usable corpus")
    manifest.unlink()
    refused(trains(), UserError, "has not finished there")
    manifest.write_text(json_files.dumps(values))
    refused(trains(sequence_length=16), UserError, "sequence_length=32, not 16")
    refused(trains(holdout_fraction=0.1), UserError, "holdout_fraction=0.2, not 0.1")
    refused(trains(source="array_record:"), UserError, "names no directory")
    refused(trains(source=f"array_record:{tmp_path}/none"), UserError, "no file matches")
    refused(trains(source=f"array_record:{copied}/train-00*"), UserError, "leaves out")
    refused(trains(source=f"array_record:{copied}/*.array_record,{made(3)}/*.array_record"), UserError, "2 directories")
    with pytest.raises(UserError, match="held-out rows of its own"):
        trains(holdout_source="text:x")()
    (copied / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(DataError, match="the tokenizer of .* is another one now"):
        trains()()


def test_another_tokenizer_and_ids_beyond_the_vocabulary_are_refused(tiny, made, tmp_path, corpus):
    train_tokenizer(list(documents(f"text:{corpus}/*.txt"))[:3], 300, tmp_path / "other.model")
    config = from_records(tiny, "arm", made(3), {"data.tokenizer": str(tmp_path / "other.model")})
    with pytest.raises(UserError, match="are ids of another tokenizer"):
        loop.train(config, tmp_path / "run")
    opened = record_corpus.open_corpus(made(3))
    checked = CheckedRows(opened.train_NL, opened.checksums[0], 100)
    with pytest.raises(DataError, match=r"train-.*: record \d+ holds id \d+, beyond the 100 of the vocabulary"):
        checked[:]


def test_what_is_read_is_shown(made, corpus, trained, tmp_path):
    shown = json.loads(llada("data", f"--source=array_record:{made(3)}", "--rows=3").stdout)
    metadata = record_corpus.open_corpus(made(3)).metadata
    assert shown["digest"] == metadata.digest and shown["train"]["tokens"] == metadata.train_tokens
    assert [each["row"] for each in shown["rows"]] == [0, 1, 2] and " the " in shown["rows"][0]["text"]
    npy = json.loads(llada("data", f"--workdir={trained['llada'].workdir}").stdout)
    assert npy["train"]["bytes"] == shown["train"]["bytes"] and npy["train"]["duplicate_row_share"] == 0
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, text in (("a", "one two\n"), ("b", "one two\n"), ("c", "three"), ("d", "")):
        (folder / name).write_text(text)
    tokenizer = trained["llada"].workdir / "tokenizer.model"
    found = json.loads(llada("data", f"--source=text:{folder}/*", f"--tokenizer={tokenizer}").stdout)
    assert found["documents"] == 3 and found["bytes"] == 21
    assert found["duplicate_document_share"] == pytest.approx(1 / 3)
    assert found["document_bytes"]["max"] == 8 and found["texts"] == ["one two\n", "one two\n"]
    assert found["bytes_per_token"] == 21 / found["tokens"]
    for flags, message in (
        ([], "give one of --source"),
        ([f"--source=text:{folder}/*", "--verify"], "has none"),
        ([f"--source=text:{folder}/*", "--at_step=1"], "give its --workdir"),
        ([f"--source=array_record:{folder}"], "has not finished there"),
    ):
        bad = llada("data", *flags)
        assert bad.returncode == 2 and message in bad.stderr and not bad.stdout


def test_rows_that_are_there_twice_are_counted(tmp_path):
    rows_NL = np.array([[1, 2], [3, 4], [1, 2], [1, 2], [5, 6]], "<u2")
    sums_N = checksums.of_rows(rows_NL)
    assert duplicates(CheckedRows(rows_NL, sums_N, 10), sums_N) == 2
    assert duplicates(CheckedRows(rows_NL, None, 10), np.zeros(5, "<u4")) == 2  # of equal checksums, not of equal rows
