"""Documents: order, exactness, the split by content, and a clear line for every bad input."""

import bz2
import dataclasses
import gzip
import json
import lzma
import os
import re
import sysconfig
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from llada.config import DataConfig, default_config, from_config_dict
from llada.data import text_files
from llada.data.holdout import is_holdout, split, text_hash, training
from llada.data.sources import documents
from llada.errors import UserError


def test_stdlib_is_deterministic_ordered_and_without_tests():
    texts = list(documents("stdlib"))
    assert texts == list(documents("stdlib"))
    assert sum(len(text.encode()) for text in texts) > 5_000_000
    root = Path(sysconfig.get_path("stdlib"))
    early, late, test = (root / name for name in ("abc.py", "typing.py", "unittest/mock.py"))
    positions = [texts.index(path.read_bytes().decode()) for path in (early, late, test)]
    assert positions == sorted(positions)
    tests = root / "test"
    if tests.is_dir():
        assert (tests / "test_abc.py").read_bytes().decode() not in texts


def test_stdlib_without_sources_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match="no standard library sources.*data.source=text:GLOB"):
        list(documents("stdlib"))


def test_text_files_are_read_exactly_sorted_and_recursively(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "b.txt").write_bytes("\ufeffb\r\n\tß\r".encode())
    (tmp_path / "deep" / "a.txt").write_bytes(b"a\n")
    (tmp_path / "deep" / "er" / "c.txt").write_bytes(b"  c")
    (tmp_path / "deep" / "empty.txt").write_bytes(b"")
    assert list(documents("text:~/deep/**/*.txt")) == ["a\n", "\ufeffb\r\n\tß\r", "  c"]


def test_jsonl_is_one_document_a_line_whatever_characters_it_holds(tmp_path):
    texts = ["one\nline", "two\u2028 \x85 three", "日本\r\n", "nul \0"]
    lines = [json.dumps({"text": text, "id": 1}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)]
    (tmp_path / "x.jsonl").write_bytes(("\n\n".join([*lines, '{"text": ""}']) + "\n \n").encode())
    assert list(documents(f"text:{tmp_path}/*.jsonl")) == texts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"good\n\x00", r"a\.txt is binary: NUL at byte 5"),
        ("a.txt", b"good\xff", r"a\.txt is not UTF-8: bad byte at 4"),
        ("a.txt", b"", r"all 1 files matching .* are empty"),
        ("a.jsonl", b'\n{"text": ""}\n', r"all 1 files matching .* are empty"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl line 2 is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n\n[]\n', r"a\.jsonl line 3 has no string field"),
        ("a.jsonl", b'{"text": 3}', r"a\.jsonl line 1 has no string field"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"a\.jsonl line 1 holds half a surrogate pair"),
        ("a.jsonl", b'{"text": "\xc3\xa9"}\n\xff', r"a\.jsonl is not UTF-8: bad byte at 15"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl line 1 is not JSON"),
        ("a.bin", b"\x00", r"a\.bin is binary: NUL at byte 0"),
    ],
)
def test_bad_files_are_named_with_the_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(documents(f"text:{tmp_path}/*"))


@pytest.mark.parametrize("source", ["", "text:", "texts:*", "wikipedia"])
def test_unknown_source_lists_the_allowed_ones(source):
    with pytest.raises(UserError, match="allowed: stdlib, packages, text:GLOB.*; set --config.data.source"):
        documents(source)


@pytest.fixture
def folder(made_folder, monkeypatch):
    """A working directory with what newcomers have."""
    monkeypatch.chdir(made_folder)


@pytest.fixture(scope="module")
def made_folder(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("folder")
    contents = {
        "d/a.txt": "alpha",
        "d/sub/b.md": "beta",
        "d/.hidden": "no",
        "d/.git/c.txt": "no",
        "d/latin.txt": "é".encode("latin-1"),
        "d/x.png": b"\x89PNG\0",
        "c [v2]/1.txt": "bracket",
        "a,b.txt": "comma",
        "x.json": json.dumps([RECORD, RECORD | {"text": "two"}], indent=1),
        "one.json": json.dumps(RECORD, indent=1),
        "lines.json": f"{json.dumps(RECORD)}\n{json.dumps(RECORD)}\n",
        "bom.jsonl": b"\xef\xbb\xbf" + json.dumps(RECORD).encode() + b"\r\n",
        "x.ndjson": json.dumps(RECORD),
        "x.jsonlines": json.dumps(RECORD),
        "x.jsonl.gz": gzip.compress(json.dumps(RECORD).encode()),
        "x.txt.bz2": bz2.compress(b"plain"),
        "x.txt.xz": lzma.compress(b"plain"),
        "x.json.zst": pyarrow.compress(json.dumps([RECORD]).encode(), "zstd", asbytes=True),
        "cut.txt.gz": gzip.compress(b"plain")[:-3],
        "cut.txt.xz": lzma.compress(b"plain")[:-3],
        "cut.txt.zst": pyarrow.compress(b"plain" * 99, "zstd", asbytes=True)[:-3],
        "bad.txt.gz": b"plain",
        "a.tar.gz": gzip.compress(b"archive"),
        "a.zip": b"PK",
        "number.json": "3",
        "bad.json": '[{"text": ]',
        "cut.json": '{"k": "x"}\n{"tex',
        "deep.json": "[" * 100_000,
    }
    for name, content in contents.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    table = pyarrow.table(
        {"text": ["p1", None, "p2"], "other": pyarrow.array(["q"] * 3).dictionary_encode(), "n": [1, 2, 3]}
    )
    parquet.write_table(table, tmp_path / "t.parquet", row_group_size=1)
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "t.parquet").read_bytes()[:-20])
    os.symlink("..", tmp_path / "d" / "sub" / "up")
    os.symlink("..", tmp_path / "d" / "sub" / "up2")
    os.symlink("a.txt", tmp_path / "d" / "link.txt")
    os.symlink("nowhere", tmp_path / "d" / "dead")
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "d" / "pipe")
    return tmp_path


RECORD = {"text": "one", "other": "three"}
DIRECTORY = (["alpha", "beta"], ["1 files are other names", "2 files are no UTF-8 text.*: latin.txt, x.png"])


@pytest.mark.parametrize(
    ("source", "key", "texts", "remarks"),
    [
        *[(source, "text", *DIRECTORY) for source in ("d", "./d/", "text:d", "text:d,d/a.txt")],
        *[
            (source, "text", ["alpha", "beta"], [])
            for source in ("text:d/a.txt,d/sub/*", "text:d/{z,a}.txt, d/*/b.{md,txt}")
        ],
        ("text:d/**/a.txt", "text", ["alpha"], []),
        ("text:d/**/*.txt,d/a.txt", "text", UserError, ["1 files are other names"]),
        *[(source, "text", ["bracket"], []) for source in ("text:c [v2]/1.txt", "c [v2]", "text:c [v2]/*.txt")],
        *[(source, "text", ["comma"], []) for source in ("text:a,b.txt", "a,b.txt", "text:a*b.txt")],
        ("text:x.json", "text", ["one", "two"], []),
        ("text:one.json", "other", ["three"], []),
        ("text:lines.json", "text", ["one", "one"], []),
        *[
            (f"text:{name}", "text", ["one"], [])
            for name in ("bom.jsonl", "x.ndjson", "x.jsonlines", "x.jsonl.gz", "x.json.zst")
        ],
        *[(f"text:{name}", "text", ["plain"], []) for name in ("x.txt.bz2", "x.txt.xz")],
        ("text:t.parquet", "text", ["p1", "p2"], []),
        ("text:t.parquet", "other", ["q"] * 3, []),
    ],
)
def test_what_newcomers_have_is_read_once(folder, source, key, texts, remarks):
    said = []
    if texts is UserError:
        with pytest.raises(UserError, match="latin.txt is not UTF-8"):  # named by a pattern, so by its user
            list(documents(source, key, said.append))
    else:
        assert list(documents(source, key, said.append)) == texts
    assert len(said) == len(remarks) and all(map(re.search, remarks, said))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("text:nothing*", "no file matches 'nothing"),
        ("text:d/a.txt,nothing", "no file matches 'nothing"),
        ("text:d/sub/up/pipe", "no regular file"),
        ("pipe", "no regular file"),
        ("/dev/zero", "no regular file"),
        ("text:d/dead", "is a link to nothing"),
        ("text:x.ndjson", r'line 1 has no string field "k"; its fields are text, other: set --config.data.text_key'),
        ("text:number.json", 'record 1 has no string field "k"'),
        ("text:bad.json", "bad.json is not JSON"),
        ("text:cut.json", "cut.json line 2 is not JSON"),
        ("text:deep.json", "deep.json is not JSON"),
        ("text:t.parquet", "has no column 'k'; its columns are text, other, n: set --config.data.text_key"),
        ("text:cut.parquet", "no Parquet file that can be read"),
        ("text:cut.txt.gz", "cannot read cut.txt.gz"),
        ("text:cut.txt.xz", "cannot read cut.txt.xz"),
        ("text:cut.txt.zst", "cannot read cut.txt.zst"),
        ("text:bad.txt.gz", "cannot read bad.txt.gz"),
        ("text:a.tar.gz", "is an archive; unpack it"),
        ("text:a.zip", "is an archive; unpack it"),
        ("hf:name/of", "data sets are not fetched by name.*allowed"),
        ("gs://bucket/x", "no directory or file of this machine"),
        ("text:s3://bucket/x", "no directory or file of this machine"),
        ("text:\udcff", "is no Unicode text"),
        ("text:a\0", "has a NUL in it"),
        ("text:-", "is no path"),
    ],
)
def test_what_cannot_be_read_gets_one_line(folder, source, message):
    with pytest.raises(UserError, match=message) as caught:
        list(documents(source, "k"))
    assert "\n" not in str(caught.value)


def test_a_parquet_column_of_numbers_is_refused(folder):
    with pytest.raises(UserError, match="its column 'n' is int64, not text"):
        list(documents("text:t.parquet", "n"))


@pytest.mark.parametrize("pack", [gzip.compress, lambda text: pyarrow.compress(text, "zstd", asbytes=True)])
def test_what_expands_without_end_is_refused(tmp_path, monkeypatch, pack):
    monkeypatch.setattr(text_files, "_FREE_BYTES", 100_000)
    path = tmp_path / ("x.txt.gz" if pack is gzip.compress else "x.txt.zst")
    path.write_bytes(pack(b"a\n" * 3_000_000))
    with pytest.raises(UserError, match="expands to 400 times its size"):
        list(documents(str(path)))


def test_a_table_that_expands_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "_FREE_BYTES", 100_000)
    parquet.write_table(pyarrow.table({"text": ["word " * 1_000] * 3_000}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="expands to 400 times its size"):
        list(documents(str(tmp_path)))


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_text_is_the_same_whatever_is_read_at_once(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(text_files, "_CHUNK_BYTES", chunk)
    text = "".join(f"line {i} é字🎉\u2028\r" + "\n" * (i % 3) for i in range(9_000 if chunk > 1 else 50))
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.jsonl").write_text(
        "".join(json.dumps({"text": f"{i}é"}, ensure_ascii=False) + "\n" for i in range(9))
    )
    sections = list(documents(f"text:{tmp_path}/a.txt"))
    assert "".join(sections) == text and all(len(section) >= 16_384 for section in sections[:-1])
    assert (len(sections) > 1) == (len(text) > 65_536)
    assert list(documents(f"text:{tmp_path}/b.jsonl")) == [f"{i}é" for i in range(9)]
    for end in (b"\xc3", b"\xc3a"):
        (tmp_path / "a.txt").write_bytes("aé".encode() + end)
        with pytest.raises(UserError, match="bad byte at 3"):
            list(documents(f"text:{tmp_path}/a.txt"))


def sides(source, fraction, length, remark=lambda line: None, holdout_source=None) -> tuple[list[str], list[str]]:
    """(training, held out)."""
    data = DataConfig(source=source, holdout_fraction=fraction, sequence_length=length, holdout_source=holdout_source)
    made = list(split(data, remark))
    return [text for held, text in made if not held], [text for held, text in made if held]


def test_few_documents_are_cut_so_that_some_text_is_held_out(tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.txt").write_text("".join(f"file {i} has a line {j}\n" for j in range(200)))
    whole = "".join(documents(str(tmp_path)))
    said = []
    train, held = sides(str(tmp_path), 1e-9, 64, remark=said.append)
    assert sorted(map(len, [*train, *held])) and len("".join(train + held)) == len(whole)
    assert 64 * 4 <= len("".join(held)) <= len(whole) / 4 and not set(train) & set(held)
    assert "few documents" in said[0] and "--config.data.holdout_source" in said[0]
    assert sides(str(tmp_path), 1e-9, 64) == (train, held)
    assert max(held) > min(train)  # by their hashes, not the first ones
    _, held = sides(str(tmp_path), 1e-9, 100_000)  # however long a row is, most of the text trains
    assert len("".join(held)) < len(whole) / 3
    # Nor is everything held out, be it that all hashes say so.
    train, held = sides(f"text:{tmp_path}/0.txt", (text_hash((tmp_path / "0.txt").read_text()) + 2**54) / 2**64, 64)
    assert train and held and len(held) < 64
    # Where the fraction holds enough out as it is, documents stay whole.
    plain, _ = sides(str(tmp_path), 0.5, 64)
    assert set(plain) < set(documents(str(tmp_path)))


def test_documents_that_are_held_out_too_do_not_train(folder):
    said = []
    train, held = sides("text:x.json,d/a.txt", 0.5, 8, holdout_source="text:one.json,d/sub/b.md", remark=said.append)
    assert (train, held) == (["alpha", "two"], ["beta", "one"])
    assert said == ["1 documents of --config.data.source are held out too, and left out of the training side"]
    with pytest.raises(UserError, match="no file matches .*check --config.data.holdout_source"):
        sides("d", 0.5, 8, holdout_source="text:nothing")


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"holdout_fraction": 0.999999}, "holdout_fraction=0.999999"), ({"holdout_source": "one.json"}, "holdout_source")],
)
def test_nothing_left_to_train_on_names_the_cause(folder, changes, message):
    data = dataclasses.replace(DataConfig(source="one.json"), **changes)
    with pytest.raises(UserError, match=f"no text to train on: --config.data.{message} holds out every document"):
        list(training(data))


def test_holdout_depends_on_the_text_alone_and_is_nested():
    texts = [f"document {i}" for i in range(10_000)]
    tenth = [text for text in texts if is_holdout(text, 0.1)]
    assert 900 < len(tenth) < 1100
    assert all(is_holdout(text, 0.2) for text in tenth)
    # The split is part of every published result: these must never change.
    chosen = [index for index in range(150) if is_holdout(f"document {index}", 0.1)]
    assert chosen == [40, 44, 59, 70, 81, 100, 105, 108, 117, 118, 120, 123, 129, 148]


def test_a_long_file_becomes_sections_that_add_up_to_it(tmp_path):
    """One book must be able to lie on both sides of the split."""
    text = "".join(f"line {i} of a long book\n" for i in range(8_000))
    (tmp_path / "book.txt").write_text(text)
    sections = list(documents(f"text:{tmp_path}/book.txt"))
    assert "".join(sections) == text
    assert len(sections) > 8 and all(section.endswith("\n") for section in sections)
    (tmp_path / "book.txt").write_text("x" * 100_000)  # no line end anywhere
    assert list(documents(f"text:{tmp_path}/book.txt")) == ["x" * 100_000]


@pytest.mark.parametrize("key", ["source", "text_key", "tokenizer", "holdout_source", "directory"])
@pytest.mark.parametrize("value", ["\udcff", "a\0"])
def test_keys_hold_unicode(key, value):
    c = default_config()
    c.train.steps, c.data[key] = 1, value
    with pytest.raises(UserError, match=f"--config.data.{key}=.*: it must be Unicode text, without NUL"):
        from_config_dict(c)
