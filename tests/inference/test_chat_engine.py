"""Chat: its replies are those of plain sampling behind the template's ids, whatever is rounded, batched or watched."""

import numpy as np
import pytest

import llada
from llada.data.chat_template import ChatTemplate, drop_start
from llada.errors import UserError
from llada.inference import ancestral, chat, generation, sampler
from llada.inference.chat import Options


@pytest.fixture(scope="module", params=["llada", "arm"])
def talker(request, trained) -> chat.Chat:
    """A chat with an untuned model, whose large weights make every prompt's answer another one."""
    run = llada.load(trained[request.param].workdir)
    return chat.Chat(run)


def asked(*texts):
    """A dialogue: the user, the assistant, the user ..."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


DIALOGUES = [asked("the cat"), asked("a dog sees"), asked("the", " bird", "fish")]


def sampled(talker, messages, **options):
    """What `llada sample` writes behind the ids of the dialogue: nothing rounded, nothing else in the batch."""
    run = talker.run
    ids = ChatTemplate(run.tokenizer).prompt_ids(messages)
    request = generation.Request(prompt_ids=drop_start(ids, run.tokenizer.special, run.config.model.causal), **options)
    return generation.generate(run.config, run.params, run.tokenizer, [request])[0]


def programs():
    return sampler.fill_blocks._cache_size() + ancestral.left_to_right._cache_size()


def test_replies_are_those_of_sampling_for_every_length_alone_and_together(talker):
    options = Options(gen_length=8)
    together = talker.reply(DIALOGUES, [options] * len(DIALOGUES))
    for messages, reply in zip(DIALOGUES, together, strict=True):
        wanted = sampled(talker, messages, gen_length=8)
        assert (reply.canvas, reply.step) == (wanted.ids, wanted.step)
        assert reply.canvas[reply.prompt_tokens :][: len(reply.ids)] == reply.ids
        assert (reply.text, reply.gen_length) == (talker.run.tokenizer.decode(reply.ids), 8)
    assert reply[:6] == talker.reply([messages], [options])[0][:6]
    assert len({tuple(reply.canvas) for reply in together}) == len(DIALOGUES)


@pytest.mark.parametrize("talker", ["llada"], indirect=True)
def test_draws_depend_on_the_seed_and_on_nothing_else(talker):
    options = [Options(gen_length=8, temperature=1.0, seed=seed) for seed in range(3)]
    together = talker.reply([DIALOGUES[0]] * 3, options)
    for seed, reply in enumerate(together):
        assert reply.canvas == sampled(talker, DIALOGUES[0], gen_length=8, temperature=1.0, seed=seed).ids
    assert len({tuple(reply.canvas) for reply in together}) == 3


def test_a_watched_dialogue_compiles_once_and_each_watcher_sees_its_own_reply(talker):
    options = [Options(gen_length=8)] * 2

    def watched(dialogues):
        states = []
        replies = talker.reply(dialogues, options, lambda *state: states.append(state))
        for index, reply in enumerate(replies):
            mine = [state for state in states if state[0] == index]
            assert [step for *_, step in mine] == list(range(len(mine)))
            answer_A, step_A = (np.array(x[reply.prompt_tokens :]) for x in (reply.canvas, reply.step))
            for _, tokens_A, then_A, step in mine:
                np.testing.assert_array_equal(then_A, np.where(step_A <= step, step_A, -1))
                np.testing.assert_array_equal(tokens_A[then_A >= 0], answer_A[then_A >= 0])
        return replies

    first = watched(DIALOGUES[:2])
    before = programs()
    assert watched(DIALOGUES[1:]) != first
    assert programs() == before


def test_a_watcher_that_raises_ends_its_reply_and_nothing_else(talker):
    steps = []

    def stop(index, tokens_A, step_A, step):
        steps.append(step)
        if step == 2:
            raise KeyboardInterrupt

    options = [Options(gen_length=8)] * 2
    unwatched = talker.reply(DIALOGUES, [options[0]] * 3)
    with pytest.raises(KeyboardInterrupt):
        talker.reply(DIALOGUES[:2], options, stop)
    assert steps == [0, 0, 1, 1, 2]
    after = talker.reply(DIALOGUES[:2], options, lambda *state: None)
    assert [reply.canvas for reply in after] == [reply.canvas for reply in unwatched[:2]]


def test_the_answer_ends_at_an_end_token(talker):
    special, text = talker.run.tokenizer.special, talker.run.tokenizer.encode("the cat")
    for end in special.ends:
        for ids, reason in (([*text, end, *text], "stop"), ([end] * 3, "stop"), (text, "length")):
            reply = talker._reply(generation.Generated([5, *ids], "", [], len(ids), 1, 1.0, 0.0, 1.0), 1)
            wanted = ids[: ids.index(end)] if end in ids else ids
            assert (reply.ids, reply.finish_reason, reply.completion_tokens) == (wanted, reason, len(wanted))


def test_lengths_are_rounded_to_a_few():
    rounded = [generation.rounded_up(length) for length in range(1, 4097)]
    assert sorted(set(rounded)) == [64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096]
    assert all(length <= up <= max(64, 2 * length) for length, up in enumerate(rounded, 1))


@pytest.mark.parametrize(
    ("options", "room", "wanted"),
    [
        (Options(gen_length=128), 500, (128, None, 128)),
        (Options(gen_length=128, block_length=32), 128, (128, 32, 128)),
        (Options(gen_length=90, block_length=32), 90, (90, 32, 90)),
        (Options(gen_length=100, block_length=48), 100, (100, 48, 144)),  # 100 is no multiple of 3
        (Options(gen_length=128, block_length=32, steps=64), 70, (70, 32, 48)),  # 16 a block, as before
        (Options(gen_length=128, block_length=32, steps=64), 20, (20, 20, 16)),
        (Options(gen_length=128, block_length=32, steps=64), 5, (5, 5, 5)),
        (Options(gen_length=128), 5, (5, 5, 5)),
    ],
)
def test_options_are_cut_to_the_context(options, room, wanted):
    fitted = chat.fitted(options, room)
    assert (fitted.gen_length, fitted.block_length, fitted.steps) == wanted
    generation.sampler_settings(generation.Request(prompt="", **fitted._asdict()), fitted.gen_length)


def test_a_reply_is_as_long_as_the_context_allows(talker):
    longest = talker.run.config.model.max_length
    request = talker._request(DIALOGUES[0], Options(gen_length=1000))
    assert request.gen_length == longest - len(request.prompt_ids)


def test_trimming_drops_the_oldest_turns_only(talker):
    system = [{"role": "system", "content": "s"}]
    dialogue = asked("the cat", "sees", "the dog", "hears", "a fish")
    count = len(talker._prompt_ids([*system, *dialogue]))
    longest = talker.run.config.model.max_length
    room = longest - count
    assert 0 < room < longest // 2
    assert talker.trimmed([*system, *dialogue], Options(gen_length=room)) == [*system, *dialogue]
    assert talker.trimmed([*system, *dialogue], Options(gen_length=room + 1)) == [*system, *dialogue[2:]]
    assert talker.trimmed(asked("the cat" * 30), Options()) == asked("the cat" * 30)


WRONG = {
    "no message": ([], {}, "the last message has the role None"),
    "an answer last": (asked("a", "b"), {}, "the last message has the role assistant"),
    "no text": ([{"role": "user", "content": 3}], {}, "message 1"),
    "an unknown role": ([{"role": "cat", "content": "3"}, *asked("a")], {}, "'cat'"),
    "half a surrogate": (asked("\ud800"), {}, "half a surrogate"),
    "too long": (asked("the cat " * 40), {}, "no room for an answer; /reset"),
    "no length": (asked("a"), {"gen_length": 0}, "--gen_length=0"),
    "a length that is none": (asked("a"), {"gen_length": "8"}, "--gen_length='8' must be a whole number"),
    "a temperature below 0": (asked("a"), {"temperature": -1.0}, "--temperature=-1"),
    "a seed below 0": (asked("a"), {"seed": -1}, "--seed=-1"),
    "too many steps": (asked("a"), {"gen_length": 4, "steps": 5}, "--steps=5"),
    "a block of nothing": (asked("a"), {"block_length": 0}, "--block_length=0"),
    "an unknown rule": (asked("a"), {"eos": "never"}, "--eos=never"),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_what_cannot_be_answered_is_one_line(talker, name):
    messages, options, words = WRONG[name]
    with pytest.raises(UserError) as refused:
        talker.check(messages, Options(**options))
    causal = talker.run.config.model.causal and {"steps", "block_length", "eos"} & options.keys()
    assert ("needs a diffusion model" if causal else words) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_templates_by_name_and_file(talker, tmp_path):
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}<|assistant|>")
    run = talker.run
    other = chat.Chat(run, str(tmp_path / "t.jinja"))
    assert other._prompt_ids(asked("the cat"))[-1] == run.tokenizer.token_id("<|assistant|>")
    assert chat.Chat(run, "plain")._prompt_ids(asked("the cat")) == talker._prompt_ids(asked("the cat"))
    for value, words in (("llada", "startoftext|>"), (str(tmp_path / "none"), "--template=")):
        with pytest.raises(UserError, match=words.replace("|", r"\|")):
            chat.Chat(run, value)
