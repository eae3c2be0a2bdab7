"""Every path flag of every command: what is no path is refused before any work, and any real path works."""

import json
import os
from pathlib import Path

import in_process
import pytest

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
QUICKSTART = f"--config={EXPERIMENTS}/quickstart.py:llada"

# The flag and the rest of its command line; {run} is a trained workdir.
FLAGS = {
    "train --config": ["train", "--workdir=w"],
    "train --workdir": ["train", QUICKSTART],
    "train --config.data.directory": ["train", QUICKSTART, "--workdir=w"],
    "train --config.data.tokenizer": ["train", QUICKSTART, "--workdir=w"],
    "evaluate --workdir": ["evaluate"],
    "likelihood --workdir": ["likelihood", "--answer=x"],
    "likelihood --requests": ["likelihood", "--workdir={run}"],
    "sample --workdir": ["sample", "--prompt=x"],
    "sample --html": ["sample", "--workdir={run}", "--prompt=x"],
    "export --workdir": ["export", "--out=x"],
    "export --out": ["export", "--workdir={run}"],
    "import --source": ["import", "--workdir=w"],
    "import --workdir": ["import", "--source={run}"],
    "plan --config": ["plan", "--topology=v5e:2x2"],
    "plan --json": ["plan", QUICKSTART, "--topology=v5e:2x2"],
    "sweep --config": ["sweep", "--workdir=w", "--dry_run"],
    "sweep --workdir": ["sweep", f"--config={EXPERIMENTS}/isoflop.py:quick", "--dry_run"],
    "sweep --results": ["sweep", "--workdir=w"],
    "tokenize --source": ["tokenize", "--tokenizer={run}", "--out=o"],
    "tokenize --tokenizer": ["tokenize", "--source=stdlib", "--out=o"],
    "tokenize --out": ["tokenize", "--source=stdlib", "--tokenizer={run}"],
    "data --workdir": ["data"],
    "compare --llada": ["compare", "--arm={run}", "--out=o"],
    "compare --arm": ["compare", "--llada={run}", "--out=o"],
    "compare --out": ["compare", "--llada={run}", "--arm={run}"],
}
NO_PATHS = ["gs://bucket/x", "s3://b/x", "file:///etc", "", "a\0b", "n" * 300, "~no-such-user-here/x"]


@pytest.mark.parametrize("name", FLAGS)
def test_what_is_no_path_is_one_line_and_nothing_is_written(name, trained, tmp_path):
    _, flag = name.split()
    rest = [word.format(run=trained["llada"].workdir) for word in FLAGS[name]]
    for given in NO_PATHS:
        done = in_process.llada(*rest, f"{flag}={given}", cwd=tmp_path)
        lines = done.stderr.strip().splitlines()
        assert done.returncode == 2, (name, given, done)
        assert len(lines) == 1, (name, given, lines)
        assert flag in lines[0], (name, given, lines)
        if "://" in given:
            assert "give the path" in lines[0], (name, given, lines)
        assert not done.stdout and not os.listdir(tmp_path), (name, given)


@pytest.mark.parametrize("place", ["lr#1 ?x=%20&é", "c[b] [v2] *", "-x"])
def test_a_run_lives_in_any_directory(place, trained, tmp_path, monkeypatch):
    """Through a link in the home directory, by a name full of characters that mean something elsewhere."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "real").mkdir()
    (tmp_path / place).symlink_to(tmp_path / "real")
    source = trained["llada"].workdir
    (tmp_path / "real/run").symlink_to(source)
    run = f"~/{place}/run"

    def succeeds(*arguments):
        done = in_process.llada(*arguments, cwd=tmp_path / "real")
        assert done.returncode == 0, (arguments, done.stderr)
        return done.stdout

    succeeds("sample", f"--workdir={run}", "--prompt=the", "--gen_length=4", "--html=../page.html")
    assert (tmp_path / "page.html").exists()
    (tmp_path / place / "r[1].jsonl").write_text('{"answer": "the cat"}\n')
    scored = succeeds("likelihood", f"--workdir={run}", f"--requests=~/{place}/r[1].jsonl", "--draws=2")
    assert json.loads(scored)["tokens"] > 0
    succeeds("export", f"--workdir={run}", f"--out=~/{place}/ex")
    succeeds("import", f"--source=~/{place}/ex", f"--workdir=~/{place}/back")
    assert (tmp_path / "real/back/config.json").exists()
    assert sorted(os.listdir(tmp_path)) == sorted(["page.html", "real", place])
