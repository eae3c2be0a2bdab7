"""Held-out answers: written as `llada sample` writes them, counted exactly, with intervals as SciPy has them."""

import json

import in_process
import jax
import numpy as np
import pytest
from scipy import stats

import llada
from llada.data.examples import HeldOut, Layout, Side
from llada.errors import UserError
from llada.evaluation import answers, by_time
from llada.evaluation.answers import Answer
from llada.evaluation.validation import Validator
from llada.inference import generation
from llada.objectives.contract import ANSWER
from llada.training.run import Run

PROMPTS = ("the cat sees", "the dog", "the river hears the bird .", "cat")


@pytest.fixture(scope="module")
def opened(trained) -> Run:
    return llada.load(trained["llada"].workdir)


def held_out_of(opened: Run, pairs: list[tuple[list[int], list[int]]], bucket: int = 32) -> HeldOut:
    """Two turns each of as many dialogues as that are, labelled 0 and 1 in turn."""
    ids: list[int] = []
    table = []
    for i, (prompt_ids, answer_ids) in enumerate(pairs):
        start, answer = len(ids), len(ids) + len(prompt_ids)
        ids += [*prompt_ids, *answer_ids]
        table.append((start, answer, len(ids), i // 2, i % 2, i // 2 % 2))
    layout = Layout(
        32, bucket, np.array([opened.tokenizer.eos_id]), opened.tokenizer.eos_id, opened.tokenizer.vocab_size
    )
    return HeldOut(Side(np.array(ids), np.array(table)), layout, "drawn")


@pytest.fixture(scope="module")
def own_answers(opened) -> list[tuple[list[int], list[int]]]:
    """What the model itself writes greedily behind PROMPTS, as if it were the right answer."""
    pairs = []
    with jax.set_mesh(opened.mesh):
        for prompt in PROMPTS:
            ids = opened.tokenizer.encode(prompt)
            request = generation.Request(prompt_ids=ids, gen_length=8, block_length=4)
            text = generation.generate(opened.config, opened.params, opened.tokenizer, [request])[0]
            ends = [i for i, token in enumerate(text.ids) if i >= len(ids) and token in opened.tokenizer.special.ends]
            pairs.append((ids, [*text.ids[len(ids) : ends[0] if ends else None], opened.tokenizer.eos_id]))
    return pairs


def test_a_model_is_right_about_its_own_answers_and_wrong_about_one_that_was_changed(opened, own_answers):
    changed = [*own_answers[:3], (own_answers[3][0], opened.tokenizer.encode("no such answer"))]
    for pairs, right in ((own_answers, 4), (changed, 3)):
        with jax.set_mesh(opened.mesh):
            options = {"gen_length": 8, "block_length": 4, "steps": None}
            written = answers.write(
                opened.config, opened.params, opened.tokenizer, held_out_of(opened, pairs), ["a", "b"], 10, options
            )
        summary = answers.summary(written)
        total = summary["scores"][0]
        assert (total["label"], total["turn"], total["right"], total["count"]) == (None, None, right, 4)
        assert summary["settings"] == {"gen_length": 8, "block_length": 4} and summary["seconds"] > 0
        assert [a.prompt for a in written.answers] == list(PROMPTS)
        assert [(a.label, a.turn) for a in written.answers] == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
        assert [w["expected"] for w in summary["wrong"]] == ["no such answer"] * (4 - right)
        assert [f["prompt"] for f in summary["first"]] == [PROMPTS[0], PROMPTS[2]]


def test_answers_get_room_for_the_longest_one_and_what_the_context_leaves(opened, own_answers):
    long = (opened.tokenizer.encode("the cat sees the dog ." * 20)[:29], own_answers[0][1])
    with jax.set_mesh(opened.mesh):
        arguments = opened.config, opened.params, opened.tokenizer
        written = answers.write(*arguments, held_out_of(opened, [*own_answers, long]), ["a", "b"], 10, {})
        longest = max(len(answer_ids) for _, answer_ids in own_answers)
        assert written.settings == {"gen_length": -(-longest // 8) * 8}
        full = (long[0] + long[0][:3], own_answers[0][1])
        with pytest.raises(UserError, match="a held-out prompt of 32 tokens leaves no room"):
            answers.write(*arguments, held_out_of(opened, [full]), ["a", "b"], 10, {})


def test_which_examples_are_answered_does_not_depend_on_the_model(opened, own_answers):
    held_out = held_out_of(opened, own_answers * 5)
    some = answers.sampled(held_out, 7)
    assert len(set(some)) == 7 and list(some) == sorted(some) and list(answers.sampled(held_out, 7)) == list(some)
    assert set(some) < set(answers.sampled(held_out, 12))
    assert list(answers.sampled(held_out, 99)) == list(range(20))


def test_intervals_are_those_of_scipy():
    for right, count in ((0, 1), (0, 30), (7, 10), (480, 500), (500, 500)):
        wanted = stats.binomtest(right, count).proportion_ci(0.95, method="wilson")
        assert answers.wilson(right, count) == pytest.approx((wanted.low, wanted.high), abs=1e-6)
    assert answers.wilson(0, 0) == (0.0, 1.0)


def test_scores_count_every_answer_once_in_each_view():
    rng = np.random.default_rng(0)
    given = [
        Answer(str(rng.choice(["copy", "sort"])), int(rng.integers(1, 4)), "", "x", str(rng.choice(["x", "y"])))
        for _ in range(200)
    ]
    scores = answers.scores(given)
    assert len(scores) == 3 * 4 and len({(s["label"], s["turn"]) for s in scores}) == 12
    for s in scores:
        chosen = [a for a in given if s["label"] in (None, a.label) and s["turn"] in (None, a.turn)]
        assert s["count"] == len(chosen) and s["right"] == sum(a.written == "x" for a in chosen)
        assert s["low"] <= s["share"] == s["right"] / s["count"] <= s["high"]
    kinds = {"b a": "order", "a c": "words", "a": "length", "a b c": "length"}
    assert {w: Answer("", 1, "", "a b", w).kind for w in kinds} == kinds


def test_a_file_of_scores_holds_one_step_and_each_way_of_writing_once(tmp_path):
    path = tmp_path / answers.FILE
    for step, length, share in ((5, 8, 1), (5, 16, 2), (5, 8, 3)):
        answers.record(path, step, "digest", {"settings": {"gen_length": length}, "share": share})
    assert [r["share"] for r in json.loads(path.read_text())["results"]] == [2, 3]
    answers.record(path, 6, "digest", {"settings": {"gen_length": 16}, "share": 4})
    assert json.loads(path.read_text())["results"] == [{"settings": {"gen_length": 16}, "share": 4}]


def test_the_loss_at_a_time_is_that_of_the_masked_answer_tokens(opened, own_answers):
    """At t = 1 against logits of a canvas whose answer and padding are masks; counts against what t asks for."""
    held_out = held_out_of(opened, own_answers, bucket=16)
    special = opened.tokenizer.special
    with jax.set_mesh(opened.mesh):
        validator = Validator(opened.config, special, opened.tokenizer.token_bytes_V, held_out, opened.mesh)
        losses = by_time.losses_by_time(opened.config, special, validator, opened.params)
    assert [loss.t for loss in losses] == list(by_time.TIMES)
    rows = held_out[np.arange(4)]
    sums = []
    for tokens_L, example_L, role_L in zip(*rows, strict=True):
        length = int((example_L > 0).sum())
        canvas_L = np.where(role_L[:length] > 0, special.mask, tokens_L[:length])
        log_LV = np.asarray(jax.nn.log_softmax(opened.logits(canvas_L[None])[0]))
        is_answer = np.flatnonzero(role_L[:length] == ANSWER)
        sums.append(-log_LV[is_answer, tokens_L[is_answer]].sum())
    tokens = sum(len(answer_ids) for _, answer_ids in own_answers)
    assert losses[-1].tokens == tokens and losses[-1].nats_per_token == pytest.approx(sum(sums) / tokens, rel=1e-5)
    counts = [loss.tokens for loss in losses]
    assert counts == sorted(counts)


def test_flags_that_do_not_go_together_are_refused_before_a_model_is_read(trained):
    run = f"--workdir={trained['llada'].workdir}"
    for flags, words in (
        (["--task=dialogues"], "--task=dialogues is for fine-tuned runs; this one's data.source=text:"),
        (["--generate=5"], "--generate=5 is for --task=dialogues"),
        (["--gen_length=8"], "--gen_length says how answers are written; --generate=N, how many, is missing"),
    ):
        done = in_process.llada("evaluate", run, *flags)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1) and words in done.stderr, done.stderr
