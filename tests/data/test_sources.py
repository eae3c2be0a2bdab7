"""Documents: order, exactness, the split by content, and a clear line for every bad input."""

import json
import sysconfig
from pathlib import Path

import pytest

from llada.data.sources import documents, is_holdout
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
    with pytest.raises(UserError, match="allowed: stdlib, text:GLOB.*; set --config.data.source"):
        documents(source)


def test_a_glob_without_files_is_refused_at_once(tmp_path):
    with pytest.raises(UserError, match="no file matches"):
        documents(f"text:{tmp_path}")


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
