"""Dialogues from files of records: the formats, one line for each bad record, the same order and keys."""

import gzip
import json
import os

import pyarrow
import pytest
from pyarrow import parquet

from llada.data import dialogues, text_files
from llada.data.sources import documents
from llada.errors import UserError

TOOLS = [{"type": "function", "function": {"name": "f"}}]


def turns(*texts: str, roles: str = "ua") -> list[dict]:
    """Messages of the roles u(ser), a(ssistant), s(ystem), t(ool), in turn."""
    names = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
    return [{"role": names[roles[i % len(roles)]], "content": text} for i, text in enumerate(texts)]


FORMATS = [
    ({"messages": turns("q", "a", "r", "b"), "task": "copy"}, turns("q", "a", "r", "b")),
    ({"messages": turns("s", "q", "a", roles="sua"), "category": "x"}, turns("s", "q", "a", roles="sua")),
    ({"messages": [{"role": "human", "content": "q"}, {"role": "model", "content": "a"}]}, turns("q", "a")),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, *turns("a", roles="a")]},
        turns("q", "a"),
    ),
    ({"messages": turns("q", "a", "r")}, turns("q", "a", "r")),  # the last question has no answer yet
    ({"messages": turns("q", "call", "result", "a", roles="uata")}, turns("q", "call", "result", "a", roles="uata")),
    ({"prompt": "q", "completion": "a", "system": "s"}, turns("s", "q", "a", roles="sua")),
    ({"prompt": "q", "response": "a"}, turns("q", "a")),
    ({"prompt": turns("q", "a", "r"), "completion": turns("b", roles="a")}, turns("q", "a", "r", "b")),
    ({"instruction": "q", "input": "", "output": "a"}, turns("q", "a")),
    ({"instruction": "q", "input": "more", "output": "a"}, turns("q\n\nmore", "a")),
    (
        {"instruction": "q", "output": "a", "system": "s", "history": [["1", "2"], ["3", "4"]]},
        turns("s", *"1234", "q", "a", roles="suauaua"),
    ),
    (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
        turns("s", "q", "a", roles="sua"),
    ),
    (
        {
            "conversations": [
                {"from": "user", "value": "q"},
                {"from": "function_call", "value": "c"},
                {"from": "observation", "value": "o"},
                {"from": "assistant", "value": "a"},
            ],
        },
        turns("q", "c", "o", "a", roles="uata"),
    ),
    ({"conversations": turns("q", "a")}, turns("q", "a")),
]


def write(path, *records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.mark.parametrize(("record", "messages"), FORMATS, ids=range(len(FORMATS)))
def test_formats_are_told_apart_by_their_fields(tmp_path, record, messages):
    (found,) = dialogues.read(write(tmp_path / "x.jsonl", record))
    assert found.messages == messages and found.tools is None
    assert found.label == record.get("task", record.get("category", ""))
    assert found.place == f"{tmp_path}/x.jsonl line 1"
    assert dialogues.text_of(found) == "\n".join(message["content"] for message in messages)


def test_tools_go_along_as_json_or_as_text_of_it(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    messages = [*turns("q"), call, *turns("result", "a", roles="ta")]
    records = [{"messages": messages, "tools": TOOLS}, {"messages": messages, "tools": json.dumps(TOOLS)}]
    for found in dialogues.read(write(tmp_path / "x.jsonl", *records)):
        assert found.tools == TOOLS and found.messages[1] == call | {"content": ""}
        assert dialogues.text_of(found) == "q\nresult\na"


def test_all_kinds_of_files_in_the_order_of_their_names(tmp_path):
    records = [{"prompt": f"q{n}", "completion": "a"} for n in range(6)]
    lines = [json.dumps(record).encode() + b"\n" for record in records]
    (tmp_path / "a.jsonl").write_bytes(b"\n" + lines[0])
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines[1]))
    (tmp_path / "c.ndjson.zst").write_bytes(pyarrow.compress(lines[2], "zstd", asbytes=True))
    (tmp_path / "d.json").write_text(json.dumps(records[3:4]))
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": turns("q4", "a")}]), tmp_path / "e.parquet")
    (tmp_path / "README.md").write_text("no dialogue")
    os.link(tmp_path / "a.jsonl", tmp_path / "z.jsonl")
    remarks: list[str] = []
    found = list(dialogues.read(str(tmp_path), remarks.append))
    assert [dialogue.messages[0]["content"] for dialogue in found] == ["q0", "q1", "q2", "q3", "q4"]
    places = [dialogue.place.removeprefix(f"{tmp_path}/") for dialogue in found]
    assert places == [
        "a.jsonl line 2",
        "b.jsonl.gz line 1",
        "c.ndjson.zst line 1",
        "d.json record 1",
        "e.parquet row 1",
    ]
    assert len(remarks) == 2 and "README.md" in remarks[1]
    assert list(documents(f"dialogues:{tmp_path}/a.jsonl,{tmp_path}/d.json")) == ["q0\na", "q3\na"]
    with pytest.raises(text_files.NotText, match="has no records: give .jsonl, .json or .parquet"):
        list(dialogues.read(f"{tmp_path}/README.md"))


def test_keys_are_of_the_messages_alone(tmp_path):
    record = {"messages": turns("q", "a")}
    same = [record, record | {"task": "x"}, {"prompt": "q", "completion": "a"}]
    keys = {
        dialogues.key(found)
        for number, each in enumerate(same)
        for found in dialogues.read(write(tmp_path / f"{number}.jsonl", each))
    }
    (other,) = dialogues.read(write(tmp_path / "other.jsonl", {"messages": turns("q", "b")}))
    assert len(keys) == 1 and dialogues.key(other) not in keys
    assert dialogues.is_dialogues("dialogues:x") and not dialogues.is_dialogues("text:x")


BAD = {
    "line 1 has no answer": {"messages": turns("q")},
    "message 1 is of the role assistant, and comes first, where only system or user may": {
        "messages": turns("a", roles="a")
    },
    "message 2 is of the role user, and follows user, where only assistant may": {
        "messages": turns("q", "r", roles="u")
    },
    "message 3 is of the role assistant, and follows assistant": {"messages": turns("q", "a", "b", roles="uaa")},
    "message 2 is of the role system, and follows user": {"messages": turns("q", "s", roles="us")},
    "message 2 is an empty answer": {"messages": turns("q", " \n")},
    "message 1 has no content that is text, but int": {"messages": [{"role": "user", "content": 3}]},
    "message 2 has no content that is text, but NoneType": {"prompt": "q", "completion": [{"role": "assistant"}]},
    "message 1 has a part of type 'image'": {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
    "message 1 has the role 'boss'; roles are system, user, assistant, tool": {
        "messages": [{"role": "boss", "content": "x"}]
    },
    "message 1 has the role 3": {"messages": [{"role": 3, "content": "x"}]},
    "holds half a surrogate pair": {"prompt": "\ud800", "completion": "a"},
    "its fields are chosen, prompt; needed are messages, prompt and completion": {"prompt": "q", "chosen": "a"},
    "line 1 is no dialogue: it has no fields": ["messages"],
    "messages must be a list of messages": {"messages": "q"},
    "conversations must be a list of messages": {"conversations": []},
    "completion must be a list of messages": {"prompt": "q", "completion": ["a"]},
    "history must be a list of pairs": {"instruction": "q", "output": "a", "history": [["1"]]},
    "instruction and input must be text": {"instruction": 1, "input": "q", "output": "a"},
    "tools is no JSON": {"messages": turns("q", "a"), "tools": "{"},
    "tools must be a list of objects": {"messages": turns("q", "a"), "tools": [1]},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_records_get_one_line_with_their_place(tmp_path, message):
    with pytest.raises(UserError) as caught:
        list(dialogues.read(write(tmp_path / "x.jsonl", BAD[message])))
    line = str(caught.value)
    assert message in line and line.startswith(f"{tmp_path}/x.jsonl line 1") and "\n" not in line


def test_bad_files_get_one_line(tmp_path):
    path = write(tmp_path / "x.jsonl", {"prompt": "q", "completion": "a"}, {"instruction": "q", "output": "a"})
    with pytest.raises(UserError, match="x.jsonl line 2 is of instruction and output, and line 1 of prompt and compl"):
        list(dialogues.read(path))
    (tmp_path / "x.jsonl").write_text('{"prompt": "q", "completion": "a"}\n{"prompt": \n')
    with pytest.raises(UserError, match="x.jsonl line 2 is not JSON"):
        list(dialogues.read(path))
    (tmp_path / "x.jsonl").write_text("\n")
    with pytest.raises(UserError, match="the 1 files matching .* hold no dialogue; check --config.data.source"):
        list(dialogues.read(path))
    table = pyarrow.table({"messages": ["q"], "when": [pyarrow.scalar(0, pyarrow.timestamp("s"))]})
    parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(UserError, match="x.parquet row 1: messages must be a list of messages"):
        list(dialogues.read(f"{tmp_path}/x.parquet"))
