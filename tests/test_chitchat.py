"""Dialogues of people: what becomes of a dataset, and a report on runs that are stood in for."""

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from llada import accounting
from llada.commands import experiment
from llada.data import dialogues
from llada.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "experiments" / "chitchat.py"


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "experiments" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def groups(*said: str) -> dict:
    """A record of the dataset: "a: Hello" is what person a wrote; each stands in a group of its own."""
    messages = [[dict(zip(("sender", "text"), words.split(": ", 1), strict=True), timestamp="")] for words in said]
    return {"messages": messages, "ratings": {}, "prompt": "?"}


@pytest.fixture(scope="module")
def data():
    return script("chitchat_data")


@pytest.fixture(scope="module")
def dataset(data):
    """400 dialogues that say their own names, and some that are not taken."""
    record = {
        f"d{i}": groups(*(f"{'ab'[turn % 2]}: d{i} says {turn} {'x' * 90}" for turn in range(9))) for i in range(400)
    }
    record["merged"] = groups("b: Hi", "b:  you ", "a:  ", "b: !", "a: /quit", "b: Bye")
    record |= {"mail": groups("a: x@y.z", "b: k"), "call": groups("a: 801-555 1234", "b: k"), "none": groups("a:  ")}
    record |= {"rude": groups("a: Bullshit!", "b: k"), "alone": groups("a: Hello?", "a: Anybody?")}
    return record | {"three": groups("a: d3", "b: k", "c: hey")}


@pytest.fixture(scope="module")
def files(data, dataset, tmp_path_factory):
    out = tmp_path_factory.mktemp("chitchat")
    data.english = lambda: iter(["English. "])  # all of it takes seconds
    data.write(out, dataset)
    return out


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def names(texts) -> set[str]:
    return {name for text in texts for name in re.findall(r"\bd\d+\b", text)}


def test_who_answers_first_is_the_assistant_and_what_one_wrote_in_a_row_is_one_message(data, dataset):
    assert data.exchanges_of(data.messages_of(dataset["merged"])) == [("Hi you !", "/quit")]
    assert data.exchanges_of(data.messages_of(dataset["three"])) == []
    dropped = {name: data.why_not(data.messages_of(dataset[name])) for name in ("mail", "call", "rude", "none", "d1")}
    assert dropped == {
        "mail": "with addresses",
        "call": "with addresses",
        "rude": "with rude words",
        "none": "empty",
        "d1": None,
    }
    assert data.why_not(data.messages_of(groups("a: Classic! Pass the shiitake"))) is None


def test_nothing_of_a_held_out_dialogue_is_on_the_training_side(files, dataset):
    sides = {}
    for side in ("train", "held_out"):
        found = list(dialogues.read(str(files / f"{side}.jsonl")))
        texts = [message["content"] for dialogue in found for message in dialogue.messages]
        sides[side] = names(texts)
        assert all(len(dialogues.text_of(dialogue)) <= 600 + 10 for dialogue in found)
        # Stretches put together are the dialogues, but for a last message that nobody answered.
        assert sorted(re.findall(r"d\d+ says \d", " ".join(texts))) == sorted(
            f"{name} says {turn}" for name in sides[side] for turn in range(8)
        )
    text = [record["text"] for record in records(files / "text.jsonl")]
    assert sides["train"] | sides["held_out"] == {f"d{i}" for i in range(400)}
    assert 8 <= len(sides["held_out"]) < 40
    assert not sides["held_out"] & (sides["train"] | names(text))
    counts = json.loads((files / "counts.json").read_text())
    assert sum(count for name, count in counts.items() if name.startswith("dialogues, ")) == len(dataset)
    assert {"Hello? Anybody?\n", "English. "} < set(text)


def test_questions_are_the_first_turns_of_held_out_users(data, files, dataset):
    lines = (files / "questions.txt").read_text().splitlines()
    assert lines[3::4] == ["/reset"] * 5
    asked = [name for name in sorted(dataset, key=data._digest) if data.is_held_out(name) and name in names(lines)]
    for name, *said in zip(asked, lines[::4], lines[1::4], lines[2::4], strict=True):
        assert [text.split("x")[0] for text in said] == [f"{name} says {turn} " for turn in (0, 2, 4)]
    assert data.questions_of([[("/steps 3", "a"), ("b", "c"), ("d", "e")]])[0] == "//steps 3"


def test_a_missing_package_is_one_line(data, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["chitchat_data.py", f"--out={tmp_path / 'data'}"])
    with pytest.raises(SystemExit) as ended:
        data.main()
    assert ended.value.code == 2 and not (tmp_path / "data").exists()
    assert capsys.readouterr().err.count("\n") == 1


def test_the_base_models_are_twins_and_fine_tuning_keeps_step_0(files):
    llada, arm = (experiment.read(f"{CONFIG}:{name}", {}) for name in ("base", "base_arm"))
    assert accounting.parameters(llada.model) == accounting.parameters(arm.model)
    assert (llada.data, llada.train, llada.optimizer) == (arm.data, arm.train, arm.optimizer)
    tuned = experiment.read(f"{CONFIG}:sft", {"data.source": "dialogues:train.jsonl"})
    assert tuned.fine_tunes and tuned.model == llada.model
    assert tuned.checkpoint.keep > tuned.train.steps // tuned.checkpoint.every


@pytest.fixture
def run_dir(trained, files, tmp_path):
    """What the script leaves, with trained runs in place of tuned ones."""
    shutil.copytree(files, tmp_path / "data")
    asked = len((files / "questions.txt").read_text().splitlines()) - 5
    for name, run in trained.items():
        for folder in (name, f"base_{name}"):
            (tmp_path / folder).mkdir()
            for file in ("config.json", "summary.json", "metrics.jsonl"):
                shutil.copy(run.workdir / file, tmp_path / folder)
        step = json.loads((tmp_path / name / "summary.json").read_text())["step"]
        for when, at, nats in (("before", 0, 6.5), ("after", step, 4.25)):
            by_time = [{"t": t, "nats_per_token": nats - t, "stderr": 0.01, "tokens": 9} for t in (0.5, 1.0)]
            values = {"step": at, "nats_per_token": nats, "stderr": 0.1, "bits_per_byte": nats / 2, "rows": 64}
            values |= {"tokens": 1234, "draws": 4, "eval_rows_digest": "d", "by_time": by_time}
            (tmp_path / f"{name}-{when}.json").write_text(json.dumps(values))
        replies = [{"text": f"{name} | {i}", "completion_tokens": 3, "finish_reason": "stop"} for i in range(asked)]
        (tmp_path / f"{name}-replies.jsonl").write_text("".join(f"{json.dumps(reply)}\n" for reply in replies))
    return tmp_path


def test_the_report_has_the_figures_and_every_reply_beside_its_question(run_dir, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["chitchat_report.py", f"--run_dir={run_dir}", "--chat=llada chat --json"])
    script("chitchat_report").main()
    text = (run_dir / "report.md").read_text()
    rows = [[cell.strip() for cell in line.split(" | ")] for line in text.splitlines() if line.startswith("| ")]
    cells = {row[0].removeprefix("| "): row[1:] for row in rows}
    assert cells["ARM (exact NLL)"][:2] == ["6.5000 ± 0.1000", "4.2500 ± 0.1000"]
    assert cells["LLaDA (bound)"][2].startswith("3.2500 ± 0.0500") and cells["0.5"][0] == "6.000 ± 0.010"
    lines = (run_dir / "data" / "questions.txt").read_text().splitlines()
    asked = [line for line in lines if line != "/reset"]
    said = [row for row in text.splitlines() if "llada \\| " in row]
    assert len(said) == len(asked) == 15
    for i, (question, row) in enumerate(zip(asked, said, strict=True)):
        assert row.startswith(f"| {question}") and f"llada \\| {i} " in row and f"arm \\| {i} " in row
    assert (run_dir / "curves.png").read_bytes().startswith(b"\x89PNG") and f"launch/chitchat.sh {run_dir}" in text


@pytest.mark.parametrize("damage", ["reply", "step", "rows"])
def test_a_report_of_what_does_not_belong_together_is_refused(run_dir, damage):
    report = script("chitchat_report")
    path = run_dir / "arm-after.json"
    values = json.loads(path.read_text())
    if damage == "reply":
        replies = run_dir / "arm-replies.jsonl"
        replies.write_text(replies.read_text().partition("\n")[2])
    else:
        path.write_text(json.dumps(values | ({"step": 3} if damage == "step" else {"eval_rows_digest": "e"})))
    with pytest.raises(UserError, match="replies to|another step|other held-out answers"):
        report.transcripts(report.read(run_dir), report.questions(run_dir))
