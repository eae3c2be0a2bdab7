"""Dialogues on disk and the rows of fine-tuning: held-out sides, order, padding, packing, bad dialogues."""

import json
import random
import shutil

import numpy as np
import pytest

from llada.data import examples, prepare_dialogues, unfinished
from llada.data.packing import packed
from llada.data.sentencepiece_tokenizer import SentencePieceTokenizer
from llada.data.tokenizer_training import train_tokenizer
from llada.errors import DataError, DiskError, UserError
from llada.objectives.contract import ANSWER, CONTEXT, PADDING
from llada.training.corpus import with_dialogue

WORDS = "cat dog bird fish tree stone river cloud".split()


def dialogue(rng: random.Random, turns: int) -> dict:
    messages = []
    for _ in range(turns):
        words = " ".join(rng.choices(WORDS, k=rng.randint(1, 4)))
        messages += [{"role": "user", "content": f"copy {words}"}, {"role": "assistant", "content": words}]
    return {"messages": messages, "task": rng.choice(["copy", "other"])}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> SentencePieceTokenizer:
    texts = [f"copy {' '.join(random.Random(i).choices(WORDS, k=6))}" for i in range(200)]
    return train_tokenizer(texts, 330, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """120 dialogues of one to three turns."""
    rng, path = random.Random(0), tmp_path_factory.mktemp("dialogues") / "d.jsonl"
    records = [dialogue(rng, 1 + i % 3) for i in range(120)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path, records


@pytest.fixture
def config(tiny, written):
    def build(family="llada", **changes):
        keys = {"data.source": f"dialogues:{written[0]}", "objective.random_length_fraction": 0.0}
        keys |= {"data.sequence_length": 64, "model.max_length": 64, "model.vocab_size": 340}
        return tiny(family, keys | {key.replace("__", "."): value for key, value in changes.items()})

    return build


def text(tokenizer, ids):
    return tokenizer.decode([int(token) for token in ids])


def test_every_answer_is_stored_once_behind_its_prompt_and_no_dialogue_is_on_both_sides(
    config, written, tokenizer, tmp_path
):
    c = config()
    corpus = prepare_dialogues.prepare(tmp_path / "rows", c, tokenizer)
    opened = examples.open_matching(tmp_path / "rows", c, tokenizer)
    assert opened.metadata == corpus.metadata
    expected = {True: [], False: []}
    for held, found in prepare_dialogues.split(c):
        expected[held].append(found)
    assert 0 < len(expected[True]) < 50 and len(expected[True]) + len(expected[False]) == 120
    for side, dialogues in ((corpus.train, expected[False]), (corpus.holdout, expected[True])):
        pairs = [(d, turn) for d in dialogues for turn in range(len(d.messages) // 2)]
        assert len(side.table_E6) == len(pairs)
        for (d, turn), (start, answer, end, _, number, label) in zip(pairs, side.table_E6.tolist(), strict=True):
            assert text(tokenizer, side.ids_N[answer:end]) == d.messages[2 * turn + 1]["content"]
            assert text(tokenizer, side.ids_N[start:answer]).endswith(d.messages[2 * turn]["content"])
            assert side.ids_N[end - 1] == tokenizer.eot_id and side.ids_N[answer - 1] == tokenizer.token_id(
                "<|assistant|>"
            )
            assert (number, corpus.metadata.labels[label]) == (turn, d.label)
        # Turns of one dialogue share its ids: what is stored is the dialogues, once.
        whole = side.table_E6[examples.chosen(side.table_E6, "last")]
        assert len(side.ids_N) == int((whole[:, 2] - whole[:, 0]).sum())
    with pytest.raises(UserError, match="another sequence_length"):
        examples.open_matching(tmp_path / "rows", config(data__sequence_length=32), tokenizer)
    ids = np.load(tmp_path / "rows" / "train.npy")
    np.save(tmp_path / "rows" / "train.npy", ids[:-1])
    with pytest.raises(DataError, match="delete it to prepare again"):
        examples.open_corpus(tmp_path / "rows")


def test_damage_is_named_when_the_example_is_read_and_that_of_tables_at_once(config, tokenizer, tmp_path):
    c = config(dialogues__turns="each")
    made = prepare_dialogues.prepare(tmp_path, c, tokenizer)
    start, _, end = made.holdout.table_E6[2, :3].tolist()
    path = tmp_path / "holdout.npy"
    ids = np.load(path, mmap_mode="r+")
    ids[end - 1] ^= 1
    held_out = examples.open_corpus(tmp_path).held_out(c, tokenizer)
    words = f"{path}: example 2, at byte {ids.offset + 2 * start}, is not what was written: .*remove {tmp_path}, "
    for read in (held_out.pair, held_out.__getitem__):
        with pytest.raises(DataError, match=words):
            read(2)
    assert held_out.pair(0) and len(held_out[np.array([0])].tokens_BL) == 1
    ids[end - 1] ^= 1
    held_out.layout = held_out.layout._replace(vocab_size=int(ids.max()))  # as of another tokenizer
    at = ids.offset + 2 * int(np.argmax(ids))
    with pytest.raises(DataError, match=f"at byte {at}, holds id {ids.max()}, beyond the {ids.max()} of the vocab"):
        held_out[np.arange(len(held_out))]
    for name in ("train.examples.npy", "train.crc32.npy", "metadata.json"):
        good = (tmp_path / name).read_bytes()
        for at in np.random.default_rng(0).integers(0, len(good), 20):
            (tmp_path / name).write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
            with pytest.raises(DataError, match="no usable corpus|metadata.json"):
                examples.open_corpus(tmp_path)
        (tmp_path / name).write_bytes(good)
    assert examples.open_corpus(tmp_path).metadata == made.metadata
    np.save(path, np.load(path).astype(np.int64).view("<M8[s]"))
    with pytest.raises(DataError, match=r"no usable corpus .*holdout.npy holds datetime64\[s\]"):
        examples.open_corpus(tmp_path)


@pytest.mark.parametrize("turns", ["drawn", "each", "last"])
@pytest.mark.parametrize("bucket", [None, 8])
def test_an_epoch_reads_every_dialogue_as_its_key_says_and_any_step_can_be_read_first(
    config, tokenizer, tmp_path, turns, bucket
):
    c = config(dialogues__turns=turns, dialogues__bucket=bucket, train__batch_size=4)
    corpus = prepare_dialogues.prepare(tmp_path, c, tokenizer)
    batches = corpus.batches(c, tokenizer)
    table = corpus.train.table_E6
    seen = []
    for epoch in range(3):
        plan = batches.epoch(epoch)
        read = np.concatenate([plan.row(i) for i in range(len(plan))])
        seen.append(read)
        dialogues, counts = np.unique(table[read, 3], return_counts=True)
        assert len(dialogues) == corpus.metadata.train_documents
        per_dialogue = np.bincount(table[:, 3])
        assert (counts == (per_dialogue if turns == "each" else 1)).all()
        if turns == "last":
            assert (table[read, 4] == per_dialogue[table[read, 3]] - 1).all()
        sizes = [sum(-(-(table[e, 2] - table[e, 0]) // (bucket or 64)) for e in plan.row(i)) for i in range(len(plan))]
        assert max(sizes) <= 64 // (bucket or 64) and (bucket is None or len(plan) < 0.9 * len(read))
    assert not np.array_equal(seen[0][: len(seen[1])], seen[1][: len(seen[0])])  # another order every epoch
    if turns == "drawn":  # and another of a dialogue's turns
        assert set(table[seen[0], 4]) == {0, 1, 2} and set(seen[0]) != set(seen[1])
    steps = 2 * len(batches.epoch(0)) // 4 + 2  # into the third epoch
    reader = corpus.batches(c, tokenizer).iterate(0)
    stream = [next(reader) for _ in range(steps + 1)]
    reader.close()
    fresh, some = corpus.batches(c, tokenizer).at(steps), corpus.batches(c, tokenizer, np.array([1, 3])).at(steps)
    for whole, again, part in zip(stream[steps], fresh, some, strict=True):
        np.testing.assert_array_equal(whole, again)
        np.testing.assert_array_equal(whole[[1, 3]], part)


@pytest.mark.parametrize("padding", ["eos", "ignore", "rainbow"])
def test_rows_hold_prompts_answers_and_padding_where_the_roles_say(config, tokenizer, tmp_path, padding):
    c = config(dialogues__padding=padding, dialogues__bucket=16, dialogues__turns="each")
    tokenizer = with_dialogue(tokenizer, c)
    corpus = prepare_dialogues.prepare(tmp_path, c, tokenizer)
    batch = corpus.batches(c, tokenizer).at(3)
    assert batch.example_BL.max() >= 2
    for tokens_L, example_L, role_L in zip(*batch, strict=True):
        assert not role_L[example_L == 0].any()
        for number in range(1, example_L.max() + 1):
            here = np.flatnonzero(example_L == number)
            assert (np.diff(here) == 1).all() and here[0] % 16 == 0
            role = role_L[here]
            assert (np.diff(role) >= 0).all()  # context, answer, padding
            answer = tokens_L[here][role == ANSWER]
            assert answer[-1] == tokenizer.eot_id
            prompt = text(tokenizer, tokens_L[here][role == CONTEXT])
            assert prompt.endswith(text(tokenizer, answer))  # its last request was to copy these words
            pads = tokens_L[here][role == PADDING]
            if padding == "ignore":
                assert not len(pads)
            else:
                assert len(here) % 16 == 0
                cycle = [tokenizer.eos_id] if padding == "eos" else list(tokenizer.filler_ids)
                assert pads.tolist() == (cycle * 16)[: len(pads)]
    held_out = corpus.held_out(c, tokenizer)
    rows = held_out[np.arange(len(held_out))]
    assert rows.example_BL.max() == 1 and len(held_out) == len(corpus.holdout.table_E6)
    prompt_ids, answer_ids = held_out.pair(2)
    assert rows.tokens_BL[2, : len(prompt_ids) + len(answer_ids)].tolist() == prompt_ids + answer_ids


def test_packing_fits_and_fills():
    """Sizes within rows, every item once, and rows as few as sizes allow: within 2 % of their sum."""
    rng = np.random.default_rng(0)
    size_E = rng.integers(1, 33, 3000)
    plan = packed(np.arange(3000), size_E, 64, np.random.default_rng(1))
    rows = [plan.row(i) for i in range(len(plan))]
    assert sorted(np.concatenate(rows).tolist()) == list(range(3000))
    assert max(size_E[row].sum() for row in rows) <= 64
    assert len(rows) <= 1.02 * size_E.sum() / 64 + 1


GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def messages(*pairs):
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


@pytest.mark.parametrize(
    ("records", "changes", "said"),
    [
        ([GOOD, messages(("user", "a"))], {}, r"line 2 .*assistant"),
        ([GOOD, messages(("assistant", "a"))], {}, r"line 2"),
        ([GOOD, messages(("user", "a"), ("assistant", " "))], {}, r"line 2: .*empty"),
        ([GOOD, messages(("user", "a"), ("tool", "x"), ("assistant", "b"))], {}, r"line 2"),
        ([GOOD, {"prompt": "a", "completion": "b"}], {}, r"line 2.*line 1|line 1.*line 2"),
        ([GOOD, messages(("user", "\ud800"), ("assistant", "b"))], {}, r"line 2.*surrogate"),
        ([GOOD, messages(("user", "a"), ("assistant", "b " * 200))], {}, r"line 2: .*too_long=truncate"),
        ([GOOD, messages(("user", "b " * 200), ("assistant", "b"))], {}, r"line 2: .*too_long=truncate"),
        ([GOOD], {}, r"side has no example"),
    ],
)
def test_a_bad_dialogue_is_named_and_nothing_is_left(config, tokenizer, tmp_path, records, changes, said):
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    c = config(data__source=f"dialogues:{tmp_path}/d.jsonl", **changes)
    with pytest.raises(UserError, match=said) as refusal:
        prepare_dialogues.prepare(tmp_path / "rows", c, tokenizer)
    assert "\n" not in str(refusal.value)
    assert not list((tmp_path / "rows").glob("*.npy")) and not (tmp_path / "rows" / "metadata.json").exists()


@pytest.mark.parametrize("fault", ["killed", "other dialogues", "damaged"])
def test_a_preparation_that_was_killed_goes_on(config, written, tokenizer, tmp_path, monkeypatch, fault):
    source, stopped, whole, added = tmp_path / "d.jsonl", tmp_path / "stopped", tmp_path / "whole", []
    shutil.copy(written[0], source)
    c, add = config(data__source=f"dialogues:{source}"), prepare_dialogues._Sides.add

    def add_sixty(sides, held, dialogue):
        if len(added) == 60:
            shutil.copytree(stopped, tmp_path / "killed")
            raise KeyboardInterrupt
        added.append(dialogue)
        monkeypatch.setattr(unfinished, "_SECONDS", 0 if len(added) < 50 else 1e9)
        add(sides, held, dialogue)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare_dialogues._Sides, "add", add_sixty)
        prepare_dialogues.prepare(stopped, c, tokenizer)
    if fault == "other dialogues":
        source.write_text("".join(reversed(source.read_text().splitlines(keepends=True))))
    if fault == "damaged":
        content = bytearray((tmp_path / "killed" / "train.examples.partial").read_bytes())
        content[80] ^= 1
        (tmp_path / "killed" / "train.examples.partial").write_bytes(content)
        with pytest.raises(DiskError, match="not those that were written"):
            prepare_dialogues.prepare(tmp_path / "killed", c, tokenizer)
    added.clear()
    with monkeypatch.context() as patch:
        patch.setattr(prepare_dialogues._Sides, "add", lambda *arguments: (added.append(0), add(*arguments)))
        prepare_dialogues.prepare(tmp_path / "killed", c, tokenizer)
    assert len(added) == (71 if fault == "killed" else 120)
    prepare_dialogues.prepare(whole, c, tokenizer)
    files = sorted(path.name for path in whole.iterdir())
    assert files == sorted(path.name for path in (tmp_path / "killed").iterdir()) and len(files) == 7
    assert all((tmp_path / "killed" / name).read_bytes() == (whole / name).read_bytes() for name in files)


def test_what_is_too_long_is_cut_or_left_out_and_counted(config, tokenizer, tmp_path):
    records = [
        GOOD,
        messages(("user", "a"), ("assistant", "x" * 300)),
        messages(("user", "x" * 300), ("assistant", "b")),
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "held.jsonl").write_text(json.dumps(messages(("user", "c"), ("assistant", "d"))) + "\n")
    sources = {
        "data__source": f"dialogues:{tmp_path}/d.jsonl",
        "data__holdout_source": f"dialogues:{tmp_path}/held.jsonl",
    }
    c, said = config(dialogues__too_long="truncate", **sources), []
    corpus = prepare_dialogues.prepare(tmp_path / "rows", c, tokenizer, said.append)
    assert (corpus.metadata.truncated, corpus.metadata.left_out, len(corpus.train.table_E6)) == (1, 1, 2)
    assert "1 truncated" in said[-1] and "1 left out" in said[-1]
    assert sorted(corpus.train.table_E6[:, 2] - corpus.train.table_E6[:, 0])[-1] == 64
    with pytest.raises(UserError, match="rainbow"):
        corpus.batches(config(dialogues__padding="rainbow", **sources), tokenizer)
