"""Rows and batches: exact against a plain reading, reused, safe to interrupt, the same on any number of processes."""

import dataclasses
import errno
import hashlib
import itertools
import json
import math
import os
import shutil
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from llada import files
from llada.config import DataConfig, default_config, from_config_dict
from llada.data import holdout, rows, unfinished
from llada.data import prepare as prepare_lib
from llada.data.checksums import CheckedRows
from llada.data.holdout import is_holdout
from llada.data.prepare import RowWriter
from llada.data.rows import Batches, chain_digest, id_dtype, open_corpus, unique_rows
from llada.data.sentencepiece_tokenizer import SentencePieceTokenizer
from llada.data.sources import documents
from llada.data.tokenizer_training import train_tokenizer
from llada.errors import DataError, DiskError, UserError

L = 32
FILES = ["holdout.crc32.npy", "holdout.npy", "metadata.json", "train.crc32.npy", "train.npy"]


def prepare(directory, source, tokenizer, length, fraction, text_key="text", holdout_source=None, check=lambda: None):
    """`prepare.prepare` by the values that these tests change."""
    data = DataConfig(
        source=source,
        sequence_length=length,
        holdout_fraction=fraction,
        text_key=text_key,
        holdout_source=holdout_source,
    )
    return prepare_lib.prepare(directory, data, tokenizer, check=check)


def digest(corpus: rows.Corpus) -> str:
    """Of the rows as they are on disk."""
    return hashlib.sha256(corpus.train_NL.tobytes() + corpus.holdout_NL.tobytes()).hexdigest()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    """Return a corpus of real files and awkward ones, as one JSONL file and several text files."""
    folder = tmp_path_factory.mktemp("text")
    texts = list(itertools.islice(documents("stdlib"), 30))
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text[:3000]}) + "\n" for text in texts))
    for index in range(20):
        (folder / f"{index:02}.txt").write_text(f"\u2581 file {index} 字\r\n\t<mask>" * (1 + index * 3))
    return f"text:{folder}/*"


@pytest.fixture(scope="module")
def tokenizer(source, tmp_path_factory) -> SentencePieceTokenizer:
    return train_tokenizer(documents(source), 512, tmp_path_factory.mktemp("tokenizer") / "t.model")


@pytest.fixture(scope="module")
def corpus(source, tokenizer, tmp_path_factory) -> rows.Corpus:
    return prepare(tmp_path_factory.mktemp("corpus"), source, tokenizer, L, 0.3)


def test_rows_and_metadata_equal_a_plain_reading(source, tokenizer, corpus, tmp_path, monkeypatch):
    plain = {False: [], True: []}
    counts = {False: Counter(), True: Counter()}
    for text in documents(source):
        side = is_holdout(text, 0.3)
        plain[side] += [*tokenizer.encode(text), tokenizer.eos_id]
        counts[side].update(documents=1, bytes=len(text.encode()))
    found = corpus.metadata
    for side, name, rows_NL in ((False, "train", corpus.train_NL), (True, "holdout", corpus.holdout_NL)):
        N = len(plain[side]) // L
        assert isinstance(rows_NL, np.memmap) and rows_NL.dtype == np.uint16
        np.testing.assert_array_equal(rows_NL, np.array(plain[side][: N * L]).reshape(N, L))
        assert getattr(found, f"{name}_rows") == N > 1
        assert getattr(found, f"{name}_tokens") == len(plain[side])
        assert getattr(found, f"{name}_documents") == counts[side]["documents"]
        assert getattr(found, f"{name}_bytes") == counts[side]["bytes"]
    frequency = [n / corpus.train_NL.size for n in Counter(corpus.train_NL.ravel().tolist()).values()]
    assert found.unigram_entropy_nats == pytest.approx(-sum(p * math.log(p) for p in frequency))
    assert found.digest == hashlib.sha256(corpus.train_NL.tobytes() + corpus.holdout_NL.tobytes()).hexdigest()
    assert tokenizer.mask_id not in corpus.train_NL
    # Encoding in groups of one document must not show.
    monkeypatch.setattr(prepare_lib, "_ENCODE_CHARACTERS", 1)
    assert prepare(tmp_path, source, tokenizer, L, 0.3).metadata == found


def test_a_large_vocabulary_is_stored_in_32_bits():
    assert id_dtype(65_536) == np.uint16 and id_dtype(65_537) == np.uint32


def test_prepared_rows_are_reused_without_the_source_and_never_mixed(source, tokenizer, tmp_path, monkeypatch):
    made = prepare(tmp_path, source, tokenizer, L, 0.3)
    monkeypatch.setattr(holdout, "split", lambda *request, **_: pytest.fail("read the source again"))
    again = prepare(tmp_path, source, tokenizer, L, 0.3)
    assert again.metadata == made.metadata == open_corpus(tmp_path).metadata
    np.testing.assert_array_equal(again.train_NL, made.train_NL)
    with pytest.raises(
        UserError, match=r"another sequence_length \(32, asked 33\), holdout_fraction \(0.3, asked 0.2\)"
    ):
        prepare(tmp_path, source, tokenizer, L + 1, 0.2)
    with pytest.raises(UserError, match="another source .*fresh directory"):
        prepare(tmp_path, "stdlib", tokenizer, L, 0.3)
    tokenizer_sha256, tokenizer.sha256 = tokenizer.sha256, "other"
    try:
        with pytest.raises(UserError, match="another tokenizer_sha256"):
            prepare(tmp_path, source, tokenizer, L, 0.3)
    finally:
        tokenizer.sha256 = tokenizer_sha256


@pytest.mark.parametrize("stop_at", range(5))
def test_an_interrupted_prepare_leaves_nothing_that_counts(source, tokenizer, corpus, tmp_path, monkeypatch, stop_at):
    calls = iter(range(9))
    replace = os.replace

    def stop(*paths):
        if next(calls) == stop_at:
            raise KeyboardInterrupt
        replace(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path, source, tokenizer, L, 0.3)
    with pytest.raises(UserError, match="no usable corpus"):
        open_corpus(tmp_path)
    # The next call may even ask for something else: nothing of the first one is left.
    assert prepare(tmp_path, source, tokenizer, 2 * L, 0.3).metadata.train_rows == corpus.metadata.train_tokens // (
        2 * L
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES


@pytest.mark.parametrize("fault", ["killed", "other documents", "damaged"])
def test_a_preparation_goes_on_where_it_was_stopped(source, tokenizer, tmp_path, monkeypatch, fault):
    """Killed a few groups after the last record. All files are those of a call that was left alone, to the byte."""
    monkeypatch.setattr(prepare_lib, "_ENCODE_CHARACTERS", 5_000)
    folder, encoded, encode = tmp_path / "text", [], tokenizer.encode_many
    shutil.copytree(os.path.dirname(source.removeprefix("text:")), folder)
    files_of, whole = f"text:{folder}/*", tmp_path / "whole"
    monkeypatch.setattr(tokenizer, "encode_many", lambda texts: (encoded.extend(texts), encode(texts))[1])
    monkeypatch.setattr(unfinished, "_SECONDS", 0)
    prepare(whole, files_of, tokenizer, L, 0.3)
    every = len(encoded)

    def killed_at(count):
        if len(encoded) > count and not (tmp_path / "killed").exists():
            monkeypatch.setattr(unfinished, "_SECONDS", 1e9)
        if len(encoded) > count + 8 and not (tmp_path / "killed").exists():
            shutil.copytree(tmp_path / "stopped", tmp_path / "killed")
            raise KeyboardInterrupt

    encoded.clear()
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "stopped", files_of, tokenizer, L, 0.3, check=lambda: killed_at(every // 2))
    assert sorted(os.listdir(tmp_path / "killed")) == [".lock", "holdout.partial", "preparing.json", "train.partial"]
    encoded.clear()
    if fault == "other documents":
        (folder / "00.txt").write_text("another text " * 900)
        whole = tmp_path / "again"
        prepare(whole, files_of, tokenizer, L, 0.3)
        encoded.clear()
    if fault == "damaged":
        content = bytearray((tmp_path / "killed" / "train.partial").read_bytes())
        content[700] ^= 1
        (tmp_path / "killed" / "train.partial").write_bytes(content)
        with pytest.raises(DiskError, match="not those that were written"):
            prepare(tmp_path / "killed", files_of, tokenizer, L, 0.3)
        encoded.clear()
    prepare(tmp_path / "killed", files_of, tokenizer, L, 0.3)
    assert (every // 3 < len(encoded) < every) == (fault == "killed") and len(encoded) <= every
    for name in FILES:
        assert (tmp_path / "killed" / name).read_bytes() == (whole / name).read_bytes()
    assert sorted(os.listdir(tmp_path / "killed")) == FILES


def test_runs_that_start_together_share_one_corpus(source, tokenizer, corpus, tmp_path, capfd):
    """Locks are of open files, so threads stand for processes; a file left by a killed one is cleared."""
    left = files.temporary_name(tmp_path / "train.npy", "tmp").name.replace(f"-{os.getpid()}-", "-999999999-")
    (tmp_path / left).write_bytes(b"half")
    (tmp_path / "train.npy").write_bytes(b"of a preparation that was killed")
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: prepare(tmp_path, source, tokenizer, L, 0.3), range(4)))
    assert {each.metadata for each in made} == {corpus.metadata}
    assert digest(made[-1]) == corpus.metadata.digest
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES


def test_who_waits_is_told_for_whom_and_may_be_stopped(source, tokenizer, tmp_path, capfd):
    class Stop(Exception):
        pass

    def stop():
        raise Stop

    with files.lock(tmp_path / ".lock"), pytest.raises(Stop):
        prepare(tmp_path, source, tokenizer, L, 0.3, check=stop)
    waiting = capfd.readouterr().err
    assert f"waiting for process {os.getpid()} on " in waiting and f"which prepares {tmp_path}" in waiting
    with pytest.raises(Stop):
        prepare(tmp_path, source, tokenizer, L, 0.3, check=stop)
    assert not list(tmp_path.iterdir())


class Full:
    """A file on a disk that has no room while `after` bytes and the next few thousand are written."""

    def __init__(self, file, after):
        self.file, self.after = file, after

    def write(self, content):
        if self.after <= self.file.tell() < self.after + 5_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(content)

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("after", [0, 3_000])
def test_a_disk_that_is_full_for_a_moment_leaves_nothing(source, tokenizer, corpus, tmp_path, monkeypatch, after):
    with monkeypatch.context() as patch:
        patch.setattr(prepare_lib, "RowWriter", lambda file, *args: RowWriter(Full(file, after), *args))
        with pytest.raises(DiskError, match="No space left on device while writing rows to"):
            prepare(tmp_path, source, tokenizer, L, 0.3)
    assert not list(tmp_path.iterdir())
    with monkeypatch.context() as patch:  # a write that says it went well, as NumPy's own does
        patch.setattr(RowWriter, "finish", lambda side: (finish(side), os.pwrite(side.file.fileno(), bytes(64), 500)))
        with pytest.raises(DiskError, match="not those that were written"):
            prepare(tmp_path, source, tokenizer, L, 0.3)
    assert prepare(tmp_path, source, tokenizer, L, 0.3).metadata == corpus.metadata


finish = RowWriter.finish


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("source", 1), ("train_rows", None), ("train_rows", "512"), ("train_rows", 0), ("vocab_size", True)],
        *[("sequence_length", 0), ("holdout_tokens", -1), ("unigram_entropy_nats", math.inf), ("digest", [])],
        *[("vocab_size", 10**30), ("holdout_rows", 2.5), ("digest", ...)],
    ],
)
def test_impossible_metadata_gets_one_line(corpus, tmp_path, field, value):
    values = dataclasses.asdict(corpus.metadata) | {field: value}
    if value is ...:
        del values[field]
    (tmp_path / "metadata.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match=f"no usable corpus in .*{'no rows|' if value == 0 else ''}{field}") as caught:
        open_corpus(tmp_path)
    assert "\n" not in str(caught.value)


def test_ids_beyond_the_vocabulary_name_their_row():
    rows_NL = numbered(50)
    rows_NL[7, 1] = 60
    reader = Batches(CheckedRows(rows_NL, None, 60), 8, seed=1)
    with pytest.raises(DataError, match="row 7, at byte 30, holds id 60, beyond the 60 of the vocabulary"):
        [reader.at(step) for step in range(7)]
    assert Batches(CheckedRows(rows_NL, None, 61), 8, seed=1).at(0).shape == (8, 2)


def test_a_wrong_bit_names_file_row_and_byte_and_only_its_batch(source, tokenizer, tmp_path):
    """On both sides, read by number and by slice."""
    made = prepare(tmp_path, source, tokenizer, L, 0.3)
    c = default_config()
    c.train.update(batch_size=8, steps=9)
    config = from_config_dict(c)
    for name, side in (("train", 0), ("holdout", 1)):
        path, header = tmp_path / f"{name}.npy", made.train_NL.offset
        for row, bit in ((0, 0), (1, 8 * 2 * L - 1), (5, 77)):
            content = bytearray(path.read_bytes())
            content[header + row * 2 * L + bit // 8] ^= 1 << bit % 8
            path.write_bytes(content)
            opened = open_corpus(tmp_path)
            rows_NL = opened.checked(tokenizer.vocab_size)[side]
            words = (
                rf"{path}: row {row}, at byte {header + row * 2 * L}, is not what was written: .*remove {tmp_path}, "
            )
            for read in (slice(row, row + 1), slice(None), np.array([3, row])):
                with pytest.raises(DataError, match=words):
                    rows_NL[read]
            np.testing.assert_array_equal(rows_NL[np.array([3, 4])], [made.train_NL, made.holdout_NL][side][3:5])
            if name == "train":
                batches = opened.batches(config, tokenizer)
                damaged = [step for step in range(2) if row in batches._used[batches._ids[8 * step : 8 * step + 8]]]
                for step in range(2):
                    assert (step in damaged) == fails(batches.at, step)
            content[header + row * 2 * L + bit // 8] ^= 1 << bit % 8
            path.write_bytes(content)


def test_checksums_and_metadata_are_sealed_and_older_corpora_open_without(source, tokenizer, tmp_path):
    made = prepare(tmp_path, source, tokenizer, L, 0.3)
    for path in (tmp_path / "train.crc32.npy", tmp_path / "metadata.json"):
        good = path.read_bytes()
        for at in np.random.default_rng(0).integers(0, len(good), 40):
            path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
            with pytest.raises(DataError, match="no usable corpus|metadata.json says"):
                open_corpus(tmp_path)
        path.unlink()
        with pytest.raises(DataError, match="no usable corpus"):
            open_corpus(tmp_path)
        path.write_bytes(good)
    values = json.loads((tmp_path / "metadata.json").read_text())
    del values["checksums"], values["sha256"]
    (tmp_path / "metadata.json").write_text(json.dumps(values))
    for path in tmp_path.glob("*.crc32.npy"):
        path.unlink()
    older = open_corpus(tmp_path)
    assert older.checksums is None and older.metadata.digest == made.metadata.digest
    np.testing.assert_array_equal(older.checked(tokenizer.vocab_size)[0][:], made.train_NL)


def fails(call, *arguments) -> bool:
    try:
        call(*arguments)
    except DataError:
        return True
    return False


def test_held_out_documents_of_ones_own(source, tokenizer, tmp_path):
    texts = list(documents(source))
    (tmp_path / "own.jsonl").write_text("".join(json.dumps({"words": text}) + "\n" for text in ["new " * 90, texts[3]]))
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"words": text}) + "\n" for text in texts))
    made = prepare(
        *(tmp_path / "rows", f"text:{tmp_path}/text.jsonl", tokenizer, L, 0.3),
        text_key="words",
        holdout_source=str(tmp_path / "own.jsonl"),
    ).metadata
    assert (made.holdout_documents, made.train_documents) == (2, len(texts) - texts.count(texts[3]))
    with pytest.raises(UserError, match="another text_key .*holdout_source"):
        prepare(tmp_path / "rows", f"text:{tmp_path}/text.jsonl", tokenizer, L, 0.3)


def test_bytes_are_the_documents_where_a_tokenizer_changes_text(source, tokenizer, corpus, tmp_path, monkeypatch):
    assert corpus.text_bytes(tokenizer.token_bytes_V) is tokenizer.token_bytes_V
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "token_bytes_V", tokenizer.token_bytes_V * 3)
        tripled = prepare(tmp_path, source, tokenizer, L, 0.3)
        text_bytes_V = tripled.text_bytes(tokenizer.token_bytes_V)
    np.testing.assert_allclose(text_bytes_V, tokenizer.token_bytes_V)


def test_damage_is_noticed(source, tokenizer, tmp_path):
    prepare(tmp_path, source, tokenizer, L, 0.3)
    path = tmp_path / "train.npy"
    good = path.read_bytes()
    for bad in (good[:-10], good[:50], b""):
        path.write_bytes(bad)
        with pytest.raises(UserError, match="no usable corpus"):
            open_corpus(tmp_path)
    path.write_bytes((tmp_path / "holdout.npy").read_bytes())
    with pytest.raises(UserError, match="metadata.json says"):
        open_corpus(tmp_path)
    for bad in ("", "[]", "{}"):
        (tmp_path / "metadata.json").write_text(bad)
        with pytest.raises(UserError, match="no usable corpus"):
            prepare(tmp_path, source, tokenizer, L, 0.3)


def test_impossible_requests_are_explained(tokenizer, tmp_path):
    (tmp_path / "one.txt").write_text("only one short document")
    source = f"text:{tmp_path}/*.txt"
    with pytest.raises(UserError, match="the training side has 0 tokens of 0 documents"):
        prepare(tmp_path / "a", source, tokenizer, 4, 0.999999)
    with pytest.raises(UserError, match="hold-out side has 0 tokens.*data.sequence_length=4.*data.holdout_fraction"):
        prepare(tmp_path / "b", source, tokenizer, 4, 0.000001)
    with pytest.raises(UserError, match=r"the training side has [1-9]\d* tokens of 1 documents"):
        prepare(tmp_path / "c", source, tokenizer, 4000, 0.000001)
    for key, values in {
        "data.holdout_fraction": (0.0, 1.0, -1.0, math.nan),
        "data.sequence_length": (0,),
        "train.batch_size": (0,),
        "seed": (-1, 2**32),
    }.items():
        for value in values:
            c = default_config()
            c.update_from_flattened_dict({key: value})
            with pytest.raises(UserError, match=f"{key}={value}"):
                from_config_dict(c)


def numbered(N: int) -> np.ndarray:
    """Return N rows of 2, each row holding its own number twice."""
    return np.repeat(np.arange(N, dtype=np.uint16)[:, None], 2, axis=1)


@pytest.mark.parametrize(("N", "B"), [(1, 3), (7, 4), (96, 8), (101, 128)])
def test_every_epoch_is_every_row_once_in_a_new_order(N, B):
    batches = Batches(numbered(N), B, seed=5)
    stream = np.concatenate([batches.at(step) for step in range(3 * N // B + 1)])[:, 0]
    epochs = stream[: 3 * N].reshape(3, N)
    assert (np.sort(epochs) == np.arange(N)).all()
    if N > 20:
        assert len({*map(bytes, epochs), bytes(np.arange(N, dtype=np.int32))}) == 4
        other = np.concatenate([Batches(numbered(N), B, seed=6).at(step) for step in range(N // B + 1)])[:N, 0]
        assert (other != epochs[0]).any()


def test_copies_of_a_row_are_neighbours_and_read_once():
    plain, twice = Batches(numbered(50), 4, seed=1), Batches(numbered(50), 8, seed=1, copies=2)
    for step in (0, 12, 13):
        np.testing.assert_array_equal(twice.at(step), np.repeat(plain.at(step), 2, axis=0))
    assert twice.epochs(25) == plain.epochs(25) == 2 and twice.steps(2) == plain.steps(2) == 25


@pytest.mark.parametrize("positions", [[0], [4, 5, 6, 7], [0, 1, 4, 5], list(range(8))])
def test_a_process_reads_its_positions_of_the_batch_that_one_would_read(positions):
    whole, part = (Batches(numbered(50), 8, seed=1, positions=p) for p in (None, np.array(positions)))
    for step in (0, 5, 6, 7, 1000):
        assert part.at(step).dtype == np.int32
        np.testing.assert_array_equal(part.at(step), whole.at(step)[positions])


@pytest.mark.parametrize("positions", [None, np.array([2, 3])])
def test_resuming_at_any_step_reads_what_an_uninterrupted_run_reads(corpus, positions):
    def reader():
        return Batches(corpus.train_NL, 4, 3, positions=positions)

    last = 3 * len(corpus.train_NL) // 4
    whole = list(itertools.islice(reader().iterate(0), last))
    for step in (0, 1, last // 3 - 1, last // 3, last // 3 + 1, last - 1):
        rest = reader().iterate(step)
        for expected_BL in whole[step:]:
            np.testing.assert_array_equal(next(rest), expected_BL)
        rest.close()
        np.testing.assert_array_equal(reader().at(step), whole[step])


def test_order_outlives_library_upgrades():
    # A run resumed under another Grain must not change its rows: if this fails, pin Grain or refuse old checkpoints.
    assert Batches(numbered(50), 8, seed=1).at(6)[:, 0].tolist() == [0, 27, 20, 29, 33, 7, 45, 14]


def test_digest_chain_sees_every_row_and_its_place():
    batches = Batches(numbered(50), 4, seed=1)
    first, second = batches.at(0), batches.at(1)

    def chain(*chunks):
        digest = ""
        for chunk in chunks:
            digest = chain_digest(digest, chunk)
        return digest

    assert chain(first) == hashlib.sha256(first.astype("<i4").tobytes()).hexdigest()
    assert chain(first, second) == chain_digest(chain(first), second.astype(np.uint16))
    assert len({chain(first), chain(first, second), chain(second, first), chain(first[::-1], second)}) == 4


def test_a_host_delivers_thousands_of_rows_a_second():
    reader = Batches(np.zeros((20_000, 256), np.uint16), 64, seed=0).iterate(0)
    next(reader)
    start = time.perf_counter()
    for _ in range(100):
        next(reader)
    assert 6400 / (time.perf_counter() - start) > 5000
    reader.close()


def test_unique_rows_are_nested_and_of_the_asked_size():
    rows_NL = np.arange(40).reshape(10, 4)
    assert list(unique_rows(rows_NL, None)) == list(range(10))
    less, more = unique_rows(rows_NL, 13), unique_rows(rows_NL, 32)
    assert len(less) == 3 and len(more) == 8
    assert list(more[:3]) == list(less) and len(set(more)) == 8
    # In random order, else they were of the first documents only; and always the same, or runs could not be compared.
    assert list(less) == [4, 6, 2]
    for wrong in (3, 41 + 3):
        with pytest.raises(UserError, match=f"unique_tokens={wrong} must be from 4 .* to 40"):
            unique_rows(rows_NL, wrong)
    used = {int(row) for step in range(6) for row in Batches(rows_NL, 4, 0, unique_tokens=13).at(step)[:, 0] // 4}
    assert used == set(less.tolist())
