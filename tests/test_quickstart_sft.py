"""The fine-tuning quickstart: instructions whose answers are right, held-out material that nothing else has, twins."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from llada import accounting
from llada.commands import experiment
from llada.data import tokenizer_training

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "experiments" / "quickstart_sft.py"


@pytest.fixture(scope="module")
def tasks():
    spec = importlib.util.spec_from_file_location("tasks", ROOT / "experiments" / "instruction_tasks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def files(tasks, tmp_path_factory):
    """Records by file; the text is as much as the tokenizer of the quickstart needs to be what it is there."""
    out = tmp_path_factory.mktemp("tasks")
    tasks.write(out, 3000, 600, 4000, seed=0)
    return {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in out.glob("*.jsonl")}


def answer(question: str, said: list[str]) -> str:
    """What is asked for, worked out from the words of the dialogue alone: the user's and the assistant's before."""
    name, _, words = question.partition(": ")
    lists = [text.removeprefix("List: ").split() for text in said[1::2] if text.startswith("List: ")]
    if name in ("Copy", "Repeat"):
        return f"List: {words}"
    if name in ("Reverse", "Backwards"):
        return f"List: {' '.join(reversed(words.split()))}"
    if name == "Sort":
        return f"List: {' '.join(sorted(words.split(), key=int))}"
    if question == "Now reverse the list.":
        return f"List: {' '.join(reversed(lists[-1]))}"
    if place := re.fullmatch(r"What is word (\d)\?", question):
        return f"It is {lists[-1][int(place[1]) - 1]}"
    if extreme := re.fullmatch(r"What is the (smallest|largest)\?", question):
        return f"It is {({'smallest': min, 'largest': max}[extreme[1]])(lists[-1], key=int)}"
    if sum_ := re.fullmatch(r"Add (\d+) and (\d+)", question):
        return f"It is {int(sum_[1]) + int(sum_[2])}"
    if more := re.fullmatch(r"Add (\d+) more", question):
        return f"It is {int(said[-1].removeprefix('It is ')) + int(more[1])}"
    key = re.search(r"(?:What is|And) (\w+)\?$", question)[1]
    return re.search(rf"(?:: |, )({key} .{{4}})", said[0] if said else question)[1]


def test_every_answer_follows_from_the_dialogue(files, tasks):
    turns = set()
    for name in ("train", "held_out"):
        assert len({json.dumps(record) for record in files[name]}) == len(files[name])
    for record in files["train"] + files["held_out"]:
        said = []
        for user, assistant in zip(record["messages"][::2], record["messages"][1::2], strict=True):
            assert (user["role"], assistant["role"]) == ("user", "assistant")
            assert assistant["content"] == answer(user["content"], said), record
            said += [user["content"], assistant["content"]]
            turns.add((record["task"], len(said) // 2))
    assert turns == {(task, turn) for task in tasks.TASKS for turn in (1, 2, 3)}


def materials(text: str) -> set[str]:
    """Lists of words and of digits, tables and pairs of numbers in a text, whatever is done with them."""
    word = r"[bdfgklmnprstvz][aeiou][bdfgklmnprstvz][aeiou]"
    found = re.findall(rf"\b{word}(?: {word}){{2,}}\b|\b\d(?: \d)+\b", text)
    found += [" ".join(re.findall(word, rows)) for rows in re.findall(rf"{word} {word}(?:, {word} {word})+", text)]
    found += [" ".join(pair) for pair in re.findall(r"[Aa]dd (\d+) and (\d+)", text)]
    return {" ".join(sorted(material.split())) for material in found}


def test_no_held_out_material_is_in_training_or_text(files):
    sides = {
        name: set.union(*(materials(m["content"]) for r in files[name] for m in r["messages"]))
        for name in ("train", "held_out")
    }
    text = set.union(*(materials(record["text"]) for record in files["text"]))
    assert min(map(len, (*sides.values(), text))) > 500
    assert not sides["held_out"] & (sides["train"] | text)


def test_the_same_seed_gives_the_same_files_and_another_one_others(tasks, tmp_path):
    contents = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        tasks.write(tmp_path / name, 20, 10, 2, seed)
        contents.append([path.read_bytes() for path in sorted((tmp_path / name).iterdir())])
    assert contents[0] == contents[1] and not set(contents[0]) & set(contents[2])


def test_a_word_is_one_token_and_a_number_one_a_digit(tasks, files, tmp_path):
    """Or copying and adding would be about the tokenizer."""
    size = experiment.read(f"{CONFIG}:llada", {}).model.vocab_size
    texts = [record["text"] for record in files["text"]]
    tokenizer = tokenizer_training.train_tokenizer(texts, size, tmp_path / "tokenizer.model")
    for word in tasks.WORDS:
        assert len(tokenizer.encode(f" {word}")) == 1, word
    for number in range(10, 100):
        assert len(tokenizer.encode(f" {number}")) == 2, number


def test_the_base_models_are_twins_and_fine_tuning_has_room_for_every_dialogue(tasks, files):
    llada, arm = (experiment.read(f"{CONFIG}:{name}", {}) for name in ("llada", "arm"))
    assert accounting.parameters(llada.model) == accounting.parameters(arm.model)
    assert (llada.data, llada.train, llada.optimizer) == (arm.data, arm.train, arm.optimizer)
    source = {"data.source": "dialogues:train.jsonl"}
    tuned = experiment.read(f"{CONFIG}:sft", source)
    assert tuned.fine_tunes and tuned.model == llada.model
    # A word or a digit is at most a token, and so is a control token.
    longest = max(
        sum(len(re.findall(r"\w+|[^\w\s]", m["content"])) + 4 for m in record["messages"]) for record in files["train"]
    )
    assert longest <= tuned.data.sequence_length
