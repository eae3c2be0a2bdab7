"""launch/quickstart_reversal.sh: nothing states an asked pair backward; twins; the page; a tiny run of all of it."""

import importlib.util
import json
import random
import shutil
import sys
from pathlib import Path

import in_process
import pytest

from llada import accounting
from llada.commands import experiment
from llada.errors import UserError
from llada.evaluation import reversal

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "experiments" / "reversal.py"


@pytest.fixture(scope="module")
def script():
    """Scripts of experiments/ by name; one imports the other."""
    sys.path.insert(0, str(ROOT / "experiments"))

    def load(name: str):
        spec = importlib.util.spec_from_file_location(name, ROOT / "experiments" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    sys.path.remove(str(ROOT / "experiments"))


@pytest.fixture(scope="module")
def data(script):
    return script("reversal_data")


def files(data, out: Path, seed: int, people: int | None = None) -> Path:
    rng = random.Random(seed)
    data.PEOPLE = people or data.PEOPLE
    data.write(out, data.study("facts", *(found := data.facts(rng))[:1], rng, found[1]), data.FORMS["facts"])
    return out


def test_an_asked_pair_is_never_stated_backward_and_every_name_stands_at_either_end(data, tmp_path):
    out = files(data, tmp_path / "data", 0)
    train = [json.loads(line)["completion"] for line in (out / "train.jsonl").read_text().splitlines()]
    held_out = [json.loads(line)["completion"] for line in (out / "held_out.jsonl").read_text().splitlines()]
    asked, both = (reversal.read_items(out / f"{name}.json") for name in ("asked", "both"))
    assert len(asked) == len(both) == 40 and len(set(train)) == len(train) == 480 and len(held_out) == 80
    for item in asked:
        naming = [text for text in train if item.second in text]
        assert len(naming) == len(data.LEADS) and all(f"{item.first} is" in text for text in naming)
        assert [text for text in held_out if item.second in text and text.endswith(f"is {item.first}.")]
    for item in both:
        orders = [text.index(item.first) < text.index(item.second) for text in train if item.second in text]
        assert sorted(orders) == [False, False, True, True]
    for item in (*asked, *both):
        own = [text for text in train if item.first in text]
        assert any(text.endswith(f"{item.first}.") for text in own) and any(text.startswith(item.first) for text in own)


def test_the_same_seed_gives_the_same_files_and_another_one_others(data, tmp_path):
    contents = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        files(data, tmp_path / name, seed)
        contents.append({path.name: path.read_bytes() for path in (tmp_path / name).glob("*.json*")})
    assert contents[0] == contents[1] and all(contents[0][name] != contents[2][name] for name in contents[0])


def test_glosses_of_a_dictionary_are_one_a_word_and_held_out_pairs_are_not_stated(data, tmp_path):
    lines = ["  1 This software and database is being provided", '00001740 03 n 01 entity 0 000 | that which is; "x"']
    lines += [
        f"0000{i:04} 03 n 02 word{chr(97 + i // 26)}{chr(97 + i % 26)} 0 other 0 000 | gloss of number {i}"
        for i in range(60)
    ]
    lines += [
        "00009999 03 n 01 two_words 0 000 | a gloss that is not taken",
        "00009998 03 n 01 entity 0 000 | again one",
    ]
    (tmp_path / "data.noun").write_text("\n".join(line.replace("word", "w") for line in lines))
    pairs = data.dictionary(tmp_path)
    assert pairs[0] == ("entity", "that which is") and len(pairs) == 61 == len(dict(pairs))
    found = data.study("dictionary", pairs, random.Random(0))
    assert len(found.asked) == 3 and not {gloss for _, gloss in found.asked} & set(" ".join(found.train).split(" : "))
    assert len(found.train) == 2 * 58


@pytest.mark.parametrize("flags", [["--kind=couplets"], ["--kind=dictionary"], ["--kind=dictionary", "--wordnet=."]])
def test_a_missing_file_is_one_line(data, monkeypatch, capsys, tmp_path, flags):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["reversal_data.py", f"--out={tmp_path / 'data'}", *flags])
    with pytest.raises(SystemExit) as ended:
        data.main()
    assert ended.value.code == 2 and not (tmp_path / "data").exists()
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("kind", ["facts", "couplets", "dictionary"])
def test_both_families_have_the_same_model_data_and_training(kind):
    source = {"data.source": "dialogues:train.jsonl"}
    llada, arm = (experiment.read(f"{CONFIG}:{name}", source) for name in (kind, f"{kind}_arm"))
    assert accounting.parameters(llada.model) == accounting.parameters(arm.model) and arm.model.causal
    assert (llada.data, llada.train, llada.optimizer, llada.dialogues) == (
        arm.data, arm.train, arm.optimizer, arm.dialogues,
    )  # fmt: skip


TINY = "layers=1 width=16 heads=2 ffn=16 vocab_size=420".split()


@pytest.fixture(scope="module")
def studied(data, tmp_path_factory):
    """What the script leaves after a few steps of tiny models on six people."""
    run_dir = tmp_path_factory.mktemp("reversal")
    out = files(data, run_dir / "facts" / "data", 0, people=6)
    forward, backward = ((out / f"{name}.txt").read_text() for name in ("forward", "backward"))
    for family, name in (("llada", "facts"), ("arm", "facts_arm")):
        workdir = run_dir / "facts" / f"{family}-0"
        flags = [f"--config.model.{each}" for each in TINY]
        flags += ["--config.train.steps=6", "--config.evaluate.every=0", "--config.evaluate.batches=1"]
        if family == "arm":
            flags.append(f"--config.data.tokenizer={run_dir}/facts/llada-0/tokenizer.model")
        done = in_process.llada(
            "train", f"--config={CONFIG}:{name}", f"--workdir={workdir}",
            f"--config.data.source=dialogues:{out}/train.jsonl",
            f"--config.data.holdout_source=dialogues:{out}/held_out.jsonl", f"--config.data.directory={out}/rows",
            f"--config.dialogues.template={out}/statement.jinja", *flags,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        for answers, pairs, more in (
            ("asked", "asked", [f"--forward={forward}", f"--backward={backward}"]),
            ("both", "both", [f"--forward={forward}", f"--backward={backward}"]),
            ("blank", "asked", [f"--forward={forward}", "--ask=blank"]),
        ):
            if answers != "asked":
                more.append("--scoring=likelihood" if family == "arm" else "--scoring=generation")
            flags = [f"--workdir={workdir}", "--task=reversal", f"--facts={out}/{pairs}.json", "--draws=2", *more]
            done = in_process.llada("evaluate", *flags)
            assert done.returncode == 0, done.stderr
            (run_dir / "facts" / f"{family}-0-{answers}.json").write_text(done.stdout)
            assert json.loads((workdir / reversal.FILE).read_text()) == json.loads(done.stdout)
    return run_dir


def test_a_tiny_study_reads_the_same_rows_one_statement_an_example(studied):
    rows = [json.loads((studied / "facts" / f"{f}-0" / "summary.json").read_text()) for f in ("llada", "arm")]
    assert rows[0]["rows_digest"] == rows[1]["rows_digest"] and rows[0]["parameters"] == rows[1]["parameters"]
    answers = json.loads((studied / "facts" / "llada-0-asked.json").read_text())
    assert answers["items"] == 3 and answers["forward"]["exact"]["count"] == 3
    assert answers["backward"]["likelihood"]["candidates"] == 3


def test_the_page_has_every_score_and_says_what_is_reached(script, studied, tmp_path, monkeypatch):
    shutil.copytree(studied, run_dir := tmp_path / "run")
    made_up = {("llada", "forward"): 3, ("llada", "backward"): 3, ("arm", "forward"): 3, ("arm", "backward"): 0}
    for (family, direction), right in made_up.items():
        path = run_dir / "facts" / f"{family}-0-asked.json"
        values = json.loads(path.read_text())
        values[direction]["exact"] = reversal.score([True] * right + [False] * (3 - right))
        path.write_text(json.dumps(values))
    monkeypatch.setattr(sys, "argv", ["reversal_report.py", f"--run_dir={run_dir}", f"--out={tmp_path / 'docs'}"])
    script("reversal_report").main()
    text = (tmp_path / "docs" / "reversal.md").read_text()
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "| LLaDA, backward | 90 % or more | 100.0 % | yes |" in lines
    assert "| ARM, backward | near chance, 33.3 % | 0.0 % | yes |" in lines
    written = "| ARM, seed 0 | written exactly | 100.0 % (43.9 to 100.0) | 0.0 % (0.0 to 56.1) |"
    assert written in lines and "Not run here: couplets, dictionary" in text and f"sh {run_dir}" in text
    assert (tmp_path / "docs" / "reversal" / "facts.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("damage", ["step", "texts", "rows", "missing"])
def test_a_page_of_what_does_not_belong_together_is_refused(script, studied, tmp_path, damage):
    shutil.copytree(studied, run_dir := tmp_path / "run")
    path = run_dir / "facts" / ("arm-0/summary.json" if damage == "rows" else "arm-0-asked.json")
    change = {"step": {"step": 3}, "texts": {"texts": {}}, "rows": {"rows_digest": "e"}, "missing": {}}[damage]
    if damage == "missing":
        path.unlink()
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=r"not of step|asked differently|other rows|cannot be read"):
        script("reversal_report").read(run_dir, "facts")
