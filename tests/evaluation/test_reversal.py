"""Pairs asked both ways: scored as written out by hand from logits, written as `generation` writes, files refused."""

import itertools
import json
import math

import in_process
import jax
import numpy as np
import pytest

import llada
from llada.errors import UserError
from llada.evaluation import reversal
from llada.evaluation.reversal import Asker, Asking, Item
from llada.inference import generation
from llada.inference.likelihood import LikelihoodConfig

TEXTS = {"forward": "{first} sees {second}", "backward": "{second} sees {first}"}
ITEMS = [Item(a, b, f"record {i}") for i, (a, b) in enumerate((("cat", "dog"), ("tree", "bird"), ("the", "cat")))]


@pytest.fixture(scope="module")
def opened(trained):
    return {family: llada.load(trained[family].workdir) for family in ("llada", "arm")}


def by_hand(run, pair) -> float:
    """log p of an ARM; of a LLaDA the bound of Eq. (6), over all masks there are."""
    ids, A = [*pair.prompt, *pair.answer], len(pair.answer)
    places = range(len(pair.prompt), len(ids))
    if run.config.model.causal:
        inputs, subsets, weights = [[run.tokenizer.special.start, *ids[:-1]]], [places], [1.0]
    else:
        subsets = [m for size in range(1, A + 1) for m in itertools.combinations(places, size)]
        inputs = [[run.tokenizer.special.mask if i in m else token for i, token in enumerate(ids)] for m in subsets]
        weights = [1 / len(m) / math.comb(A, len(m)) for m in subsets]
    log_RLV = np.asarray(jax.nn.log_softmax(run.logits(np.array(inputs))))
    return sum(w * sum(log_LV[i, ids[i]] for i in m) for log_LV, m, w in zip(log_RLV, subsets, weights, strict=True))


@pytest.mark.parametrize("family", ["llada", "arm"])
def test_the_likelier_candidate_is_the_one_that_enumeration_finds(opened, family):
    run = opened[family]
    asking = Asking("text", TEXTS, 3, "likelihood")
    with jax.set_mesh(run.mesh):
        facts = reversal.evaluate(run, ITEMS, asking, {}, LikelihoodConfig())
    asker, right = Asker(run, asking), {}
    for direction in reversal.DIRECTIONS:
        asked = reversal.questions(ITEMS, asking, direction)
        answers = [question.answer for question in asked]
        right[direction] = 0
        for index, question in enumerate(asked):
            choices = reversal.candidates(answers, index, 3)
            assert choices[0] == question.answer and sorted(choices) == sorted(answers)
            pairs = [asker.pair(question, text) for text in choices]
            assert all(pair.answer[-1] == run.tokenizer.eos_id for pair in pairs)
            values = [by_hand(run, pair) for pair in pairs]
            right[direction] += values[0] > max(values[1:])
        found = facts[direction]["likelihood"]
        assert (found["right"], found["count"], found["candidates"]) == (right[direction], 3, 3)
        assert found["chance"] == pytest.approx(1 / 3) and "exact" not in facts[direction]
    assert sum(right.values()) > 0, "a test of models that are never right would show little"


@pytest.mark.parametrize(("family", "ask"), [("llada", "text"), ("arm", "text"), ("arm", "chat")])
def test_a_model_is_right_about_what_it_writes_itself(opened, family, ask):
    run = opened[family]
    texts = TEXTS if ask == "text" else {"forward": "{first}?", "backward": "{second}?"}
    asking, options = Asking(ask, texts, 3, "generation"), {"gen_length": 6}
    items = [Item(first, "dog", "record") for first in ("the cat", "the river")]
    asker = Asker(run, asking)
    with jax.set_mesh(run.mesh):
        requests = [asker.request(q, options) for q in reversal.questions(items, asking, "forward")]
        written = [
            run.tokenizer.decode(text.ids[len(r.prompt_ids) :]).strip()
            for r, text in zip(
                requests, generation.generate(run.config, run.params, run.tokenizer, requests), strict=True
            )
        ]
        own = [item._replace(second=text) for item, text in zip(items, written, strict=True)]
        facts = reversal.evaluate(run, [*own, Item("the cat", "no such thing", "record")], asking, options, None)
    exact = facts["forward"]["exact"]
    assert (exact["right"], exact["count"]) == (2, 3) and facts["forward"]["wrong"][0]["expected"] == "no such thing"
    if ask == "chat":
        start = run.tokenizer.special.start
        for item, request in zip(items, requests, strict=True):
            ids = Asker(run, asking)._template.prompt_ids([{"role": "user", "content": f"{item.first}?"}])
            assert request.prompt_ids == (ids[1:] if ids[0] == start else ids)


def test_a_gap_is_where_the_answer_stands_and_is_filled_with_the_likeliest_token(opened):
    run = opened["llada"]
    asking = Asking("blank", {"forward": "the {first} sees the {second} ."}, 3, "generation")
    asker = Asker(run, asking)
    items = [Item("cat", "dog", ""), Item("river", "tree", ""), Item("bird", "fish", "")]
    with jax.set_mesh(run.mesh):
        facts = reversal.evaluate(run, items, asking, {}, None)
    for direction in reversal.DIRECTIONS:
        right = 0
        for question in reversal.questions(items, asking, direction):
            ids, gap = asker.gap(question)
            assert run.tokenizer.decode([ids[i] for i in gap]).strip() == question.answer
            assert run.tokenizer.decode(ids[:-1]).strip() == f"{question.before}{question.written}"
            if len(gap) == 1:
                masked_L = np.where(np.isin(np.arange(len(ids)), gap), run.tokenizer.special.mask, ids)
                right += int(np.argmax(run.logits(masked_L[None])[0, gap[0]])) == ids[gap[0]]
        assert facts[direction]["exact"]["right"] == right, "words of this corpus are tokens"


def test_candidates_are_the_same_for_every_model_and_never_the_right_one_twice():
    answers = [f"a{i % 40}" for i in range(60)]
    for index in range(60):
        drawn = reversal.candidates(answers, index, 10)
        assert drawn == reversal.candidates(answers, index, 10) and len(set(drawn)) == 10 and drawn[0] == answers[index]
    assert reversal.candidates(answers, 0, 10) != reversal.candidates(answers, 40, 10)
    assert len(reversal.candidates(["a", "b", "a"], 0, 10)) == 2


def test_the_published_files_and_prompts_are_taken_as_they_are(tmp_path):
    path = tmp_path / "poems.json"
    path.write_text(json.dumps([{"first": "白日依山尽", "second": "黄河入海流"}]))
    [item] = reversal.read_items(path)
    asking = Asking("chat", reversal.PUBLISHED, 3, "both")
    forward, backward = (reversal.questions([item], asking, d)[0] for d in reversal.DIRECTIONS)
    assert forward.before.startswith("白日依山尽的下一句") and forward.written == "黄河入海流"
    assert backward.before.startswith("黄河入海流的上一句") and backward.written == "白日依山尽"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('[{"first": "a", "second": "b", "third": "c"}]', "record 1 has the keys first, second, third; it must have"),
        ('[{"first": "a", "second": "b"}, {"name": "a"}]', "record 2 has the keys name; it must have"),
        ('[["a", "b"]]', "record 1 is list; it must be an object"),
        ('[{"first": "a", "second": " "}]', "record 1: second must be a text that is not empty"),
        ("[]", "holds no record"),
        ('{"first": "a"}', "must hold a JSON list, not dict"),
        ("[", "is not JSON"),
    ],
)
def test_other_files_are_refused_in_one_line(trained, tmp_path, content, words):
    (tmp_path / "facts.json").write_text(content)
    flags = [f"--{name}={text}" for name, text in TEXTS.items()]
    done = in_process.llada(
        "evaluate", f"--workdir={trained['arm'].workdir}", "--task=reversal", f"--facts={tmp_path}/facts.json", *flags
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and words in done.stderr, done.stderr


def test_flags_that_do_not_go_together_are_refused_in_one_line(trained, tmp_path):
    facts = tmp_path / "facts.json"
    facts.write_text('[{"first": "the cat", "second": "the dog"}]')
    task, both = ["--task=reversal", f"--facts={facts}"], ["--forward={first} {second}", "--backward={second} {first}"]
    for family, flags, words in (
        ("llada", [f"--facts={facts}"], "--facts is for --task=reversal; this is --task=validation"),
        ("llada", task[:1], "--facts is missing"),
        ("llada", task, "--forward is missing: the text that is asked"),
        ("llada", [*task, "--forward={second} {first}", both[1]], "must hold {first} and then {second}, once"),
        ("llada", [*task, *both, "--ask=chat"], "must hold {first}, once, for --ask=chat"),
        ("llada", [*task, *both, "--batches=3"], "--batches=3 is not for --task=reversal"),
        ("llada", [*task, *both, "--ask=blank"], "--backward is not for --ask=blank"),
        ("arm", [*task, both[0], "--ask=blank"], "with --scoring=likelihood it can be scored"),
        ("arm", [*task, *both, "--estimator=chain_rule"], "this ARM's likelihood is exact"),
        ("llada", [*task, *both, "--scoring=likelihood", "--steps=2"], "with --scoring=likelihood none are"),
        ("llada", [*task, both[0], "--ask=blank", "--gen_length=4"], "--gen_length=4 is not for --ask=blank"),
        ("llada", [*task, *both, "--gen_length=31"], "record 1: question and answer have"),
    ):
        done = in_process.llada("evaluate", f"--workdir={trained[family].workdir}", *flags)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1) and words in done.stderr, (flags, done.stderr)


def test_a_model_without_a_template_is_asked_by_text_only(opened, monkeypatch):
    run = opened["arm"]
    monkeypatch.setattr(run.tokenizer, "template", None)
    with pytest.raises(UserError, match="the model's tokenizer has none; use --ask=text"):
        Asker(run, Asking("chat", reversal.PUBLISHED, 3, "both"))
