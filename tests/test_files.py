"""Atomic writing, locks, paths and JSON when disks, users and other processes misbehave."""

import errno
import json
import math
import multiprocessing
import os
import threading

import pytest

from llada import errors, files, json_files, paths
from llada.errors import UserError

FORK = multiprocessing.get_context("spawn")


def test_writers_of_one_file_never_mix_and_leave_nothing(tmp_path):
    path = tmp_path / "f.json"
    contents = [bytes([65 + i]) * 200_000 for i in range(6)]
    threads = [threading.Thread(target=files.write_atomically, args=(path, content)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in contents
    assert os.listdir(tmp_path) == ["f.json"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    old = os.umask(0)
    os.umask(old)
    return old


def test_what_a_killed_writer_left_is_cleared_and_nothing_of_the_users(tmp_path):
    dead = FORK.Process(target=int)
    dead.start()
    dead.join()
    left = files.temporary_name(tmp_path / "out", "partial")
    left = left.with_name(left.name.replace(f"-{os.getpid()}-", f"-{dead.pid}-"))
    left.mkdir()
    (left / "half").write_text("x")
    mine = [tmp_path / "out.partial", tmp_path / "out.old", tmp_path / "out.tmp", tmp_path / ".out.mine"]
    for path in mine:
        path.mkdir()
        (path / "keep").write_text("x")
    for replace in (False, True):
        with files.new_directory(tmp_path / "out", "--out", replace=replace) as directory:
            (directory / "a").write_text(str(replace))
    assert (tmp_path / "out/a").read_text() == "True"
    assert sorted(os.listdir(tmp_path)) == [".out.mine", "out", "out.old", "out.partial", "out.tmp"]
    assert all((path / "keep").exists() for path in mine)


def test_errors_of_the_disk_are_known_by_their_numbers():
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
        assert isinstance(errors.disk_error(OSError(number, "failed", "/x"), "saving"), errors.DiskError)
    assert errors.disk_error(OSError(errno.EACCES, "failed", "/x"), "saving") is None
    assert errors.disk_error(OSError(errno.EROFS, "failed", "/x"), "saving") is None
    assert "see to the disk" in str(errors.disk_error(OSError(errno.EROFS, "failed", "/x"), "saving", writable=True))


def test_errors_of_the_disk_are_known_in_the_words_of_tensorstore():
    words = "Failed to fsync directory: {} [os_error_code='{}']"
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS):
        error = ValueError(words.format(os.strerror(number), number))
        line = f"{os.strerror(number)} while saving; "
        assert str(errors.disk_error(error, "saving", writable=True)).startswith(line)
    assert errors.disk_error(ValueError(words.format("Permission denied", errno.EACCES)), "saving") is None


def test_what_another_process_is_writing_stays(tmp_path):
    other = files.temporary_name(tmp_path / "out", "tmp")
    other = other.with_name(other.name.replace(f"-{os.getpid()}-", f"-{os.getppid()}-"))
    other.write_text("half")
    files.write_atomically(tmp_path / "out", b"whole")
    assert other.read_text() == "half"


def test_a_directory_that_appears_meanwhile_stays(tmp_path):
    def make() -> None:
        with files.new_directory(tmp_path / "out", "--out") as directory:
            (directory / "a").write_text("ours")
            (tmp_path / "out").mkdir()
            (tmp_path / "out/theirs").write_text("x")

    with pytest.raises(UserError, match="exists already"):
        make()
    assert os.listdir(tmp_path / "out") == ["theirs"]


def test_a_second_maker_of_a_directory_is_told_who_the_first_is(tmp_path):
    with files.new_directory(tmp_path / "out", "--out") as directory:
        (directory / "a").write_text("first")
        with (
            pytest.raises(files.Locked, match=rf"--out=.* is in use by process {os.getpid()} on "),
            files.new_directory(tmp_path / "out", "--out"),
        ):
            raise AssertionError
    assert (tmp_path / "out/a").read_text() == "first"
    assert os.listdir(tmp_path) == ["out"]
    with pytest.raises(UserError, match="exists already"), files.new_directory(tmp_path / "out", "--out"):
        raise AssertionError


def test_a_lock_names_its_holder_and_ends_with_the_block(tmp_path):
    path = tmp_path / "lock"
    with files.lock(path, "the run"):
        with (
            pytest.raises(files.Locked, match=f"the run is in use by process {os.getpid()} on "),
            files.lock(path, "the run"),
        ):
            raise AssertionError
        assert str(os.getpid()) in path.read_text()
    with files.lock(path, "the run"):
        pass


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("gs://bucket/x", "mount the bucket"),
        ("s3://b", "mount the bucket"),
        ("file:///tmp/x", "give the path"),
        ("", "is empty"),
        (" ", "is empty"),
        ("-", "is no path"),
        ("a\0b", "NUL"),
        ("x" * 256, "255 bytes"),
        ("é" * 128, "255 bytes"),
        ("a\ud800", "cannot be a file name"),
        ("~nobody-of-this-name/x", "write the path out"),
    ],
)
def test_what_is_no_path_is_refused_with_its_flag(given, words):
    with pytest.raises(UserError, match=words) as refused:
        paths.user_path(given, "--out")
    assert "--out" in str(refused.value)


def test_paths_keep_their_characters_and_home_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/h")
    assert str(paths.user_path("~/a", "--out")) == "/h/a"
    for name in ("a#b", "a?b", "a%20b", "[v2]", "c[/b]", "-x", "./-", "gs:x", "é", "a b", "*"):
        assert paths.user_path(name, "--out").as_posix() == name.removeprefix("./")


def test_targets_and_sources_are_checked_before_any_work(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").write_text("x")
    cases = [
        (paths.readable_file, tmp_path / "none", "does not exist"),
        (paths.readable_file, tmp_path, "is a directory"),
        (paths.readable_file, tmp_path / "fifo", "no regular file"),
        (paths.writable_target, tmp_path, "is a directory"),
        (paths.writable_target, tmp_path / "fifo", "no regular file"),
        (paths.writable_target, tmp_path / "file/x/y", "is no directory"),
    ]
    for check, path, words in cases:
        with pytest.raises(UserError, match=words):
            check(path, "--json")
    assert paths.writable_target(tmp_path / "new/deep/x.json", "--json") == tmp_path / "new/deep/x.json"
    assert not (tmp_path / "new").exists()
    through = tmp_path / "new/deep/../../file/x.json"  # what is not there is not gone through
    with pytest.raises(UserError, match="file is no directory"):
        paths.writable_target(through, "--json")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "line 1 column 1"),
        (b"{,}", "line 1 column 2"),
        (b'{"a": 1', "line 1 column 8"),
        (b"[1]", "must hold a JSON object, not list"),
        (b"\0\0", "line 1 column 1"),
        (b'{"a": "\xff"}', "bad byte at 7"),
        (b'{"a":' * 100_000, "not JSON"),
        (b'{"a": ' + b"9" * 5_000 + b"}", "not JSON"),
    ],
)
def test_damaged_json_is_one_line_that_names_file_and_position(tmp_path, content, words):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words) as refused:
        json_files.read(path)
    assert "config.json" in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_pipes_devices_and_huge_files_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path, words in (
        (tmp_path / "fifo", "no regular file"),
        ("/dev/zero", "no regular file"),
        (tmp_path, "directory"),
    ):
        with pytest.raises(UserError, match=words):
            json_files.read(path)
    (tmp_path / "big").write_bytes(b"{}" * 100)
    with pytest.raises(UserError, match="more than the 100"):
        json_files.read(tmp_path / "big", most=100)


def test_lines_end_at_newlines_only_and_errors_name_the_line(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"a": "x\u2028y"}\n\n{"a": 1}\n{]\n', encoding="utf-8")
    lines = json_files.read_lines(path)
    assert next(lines) == (1, {"a": "x\u2028y"})
    assert next(lines) == (3, {"a": 1})
    with pytest.raises(UserError, match="line 4"):
        next(lines)


def test_what_is_written_is_strict_json():
    text = json_files.dumps({"a": math.nan, "b": [math.inf, (1.5, -math.inf)], "c": {"d": "é"}})
    assert json.loads(text, parse_constant=lambda word: pytest.fail(word)) == {
        "a": None,
        "b": [None, [1.5, None]],
        "c": {"d": "é"},
    }
