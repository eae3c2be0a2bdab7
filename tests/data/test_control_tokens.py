"""Control tokens and chat templates that travel with a tokenizer of either kind; no text spells them."""

import itertools
import json

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from llada.data import tokenizer_files
from llada.data.control_tokens import LLADA_CONTROLS, PLAIN_CONTROLS, RAINBOW, builtin
from llada.data.sentencepiece_tokenizer import SentencePieceTokenizer
from llada.data.tokenizer_training import train_tokenizer
from llada.errors import UserError

TEXT = "the cat sees the dog .\n" * 40
SPELLED = "".join(PLAIN_CONTROLS + LLADA_CONTROLS + RAINBOW)
OWN = "{{ messages[0]['content'] }} \u2581 é {{ eos_token }}"


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    return train_tokenizer([TEXT], 300, tmp_path_factory.mktemp("tokenizer") / "t.model")


def test_a_trained_tokenizer_has_the_control_tokens_of_the_plain_template(ours):
    assert ours.template == builtin("plain")
    ids = [ours.token_id(name) for name in ("<mask>", *PLAIN_CONTROLS)]
    assert ids == list(range(ours.mask_id, ours.mask_id + 5)) and ours.eot_id == ids[-1]
    assert ours.special.ends == (ours.eos_id, ours.eot_id)
    assert ours.token_id("the") is None and ours.filler_ids == ()
    assert ours.named == {"mask_token": "<mask>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    spelled = ours.encode(SPELLED)
    assert ours.decode(spelled) == SPELLED and not set(ours.controls.values()) & set(spelled)


def test_a_sentencepiece_model_carries_a_template_and_new_control_tokens(ours):
    names = [*LLADA_CONTROLS, *RAINBOW]
    with pytest.raises(UserError, match="lacks 10 of them, and the model has 9 rows.*model.vocab_size=309"):
        ours.with_dialogue(OWN, names, 309)
    found = ours.with_dialogue(OWN, names, 310)
    assert [found.token_id(name) for name in names if name != "<|eot_id|>"] == list(range(300, 310))
    assert found.filler_ids == tuple(range(303, 310)) and found.template == OWN
    again = tokenizer_files.parse(found.content, "it")
    assert (again.template, again.controls, again.special) == (OWN, found.controls, found.special)
    assert again.with_dialogue(OWN, names, 310) is again  # what continues a run asks once more
    assert again.encode(TEXT + SPELLED) == ours.encode(TEXT + SPELLED)
    # Changed once more, the file holds one template; without one of its own it has the plain one again.
    other = again.with_dialogue("x" * 300, [], 310)
    assert other.template == "x" * 300 and OWN.encode() not in other.content
    proto = other.proto
    proto.pieces[other.mask_id].piece = "<none>"
    assert SentencePieceTokenizer(proto.SerializeToString(), "it").with_mask().template == other.template
    word = next(text for text in map(ours.piece, range(270, 300)) if len(text) > 2)
    changed = other.with_dialogue(other.template, [word, "<unk>"], 310)
    assert changed.token_id(word) == ours._id_of[word] and not changed.token_bytes_V[changed.token_id(word)]
    assert changed.decode(changed.encode(TEXT)) == TEXT and changed.token_id("<unk>") is None
    with pytest.raises(UserError, match="the chat template is no Unicode"):
        other.with_dialogue("\ud800", [], 310)
    plain = other.with_dialogue(builtin("plain"), PLAIN_CONTROLS, 310)
    assert plain.template == builtin("plain") and plain.template.encode() not in plain.content
    assert ours.with_dialogue(builtin("plain"), PLAIN_CONTROLS, 300).sha256 == ours.sha256


def test_the_end_of_a_turn_is_the_one_that_the_template_spells(ours):
    chatml = "<|im_start|>{{ messages[0]['content'] }}<|im_end|>"
    found = ours.with_dialogue(chatml, ["<|im_start|>", "<|im_end|>"], 302)
    assert (ours.piece(ours.eot_id), found.piece(found.eot_id)) == ("<|eot_id|>", "<|im_end|>")


def byte_level(special: list[str]) -> dict[str, str]:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet))
    made.add_tokens(["<shout>"])  # added, but text
    made.add_special_tokens(special)
    decoder = {
        str(token): {"content": e.content, "special": True} for token, e in made.get_added_tokens_decoder().items()
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "added_tokens_decoder": decoder}
    config["chat_template"] = [{"name": "tools", "template": "no"}, {"name": "default", "template": OWN}]
    return {"tokenizer.json": made.to_str(), "tokenizer_config.json": json.dumps(config)}


def load(files: dict[str, str], folder):
    for name, text in files.items():
        (folder / name).write_text(text)
    return tokenizer_files.load(folder)


def test_a_hugging_face_tokenizer_gets_them_in_its_files(tmp_path):
    """Reserved tokens first, then rows past the last; the mask, a row without a name, is no gap then."""
    special = ["</s>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"]
    plain = load(byte_level(special), tmp_path)
    first, size = plain.eos_id + 1, plain.vocab_size
    masked = plain.with_mask()
    assert plain.template == OWN and masked.template == OWN and plain.eot_id is None
    with pytest.raises(UserError, match="lacks 4 of them, and the model has 3 rows"):
        masked.with_dialogue(builtin("plain"), PLAIN_CONTROLS, size + 2)
    found = masked.with_dialogue(builtin("plain"), PLAIN_CONTROLS, size + 3)
    assert [found.token_id(name) for name in PLAIN_CONTROLS] == [first, first + 1, size + 1, size + 2]
    assert (found.mask_id, found.piece(found.mask_id), found.piece(found.eot_id)) == (size, "<mask>", "<|eot_id|>")
    assert found.template == builtin("plain") and "chat_template" not in found.files["tokenizer_config.json"]
    assert found.encode(TEXT + SPELLED) == plain.encode(TEXT + SPELLED)
    assert found.with_dialogue(builtin("plain"), PLAIN_CONTROLS, size + 3) is found
    back = found.with_dialogue(OWN, [], size).with_dialogue(builtin("plain"), PLAIN_CONTROLS, size + 3)
    assert back.sha256 == found.sha256
    again = tokenizer_files.parse(found.content, "it")
    assert (again.sha256, again.controls, again.special) == (found.sha256, found.controls, found.special)
    # Text that becomes a control token is none from then on.
    spelled = again.with_dialogue(again.template, ["<shout>"], size)
    assert spelled.token_id("<shout>") == plain.encode("<shout>")[0] and plain.token_id("<shout>") is None
    assert spelled.decode(spelled.encode("<shout>")) == "<shout>" and len(spelled.encode("<shout>")) > 1
    more = again.with_dialogue(again.template, [*PLAIN_CONTROLS, *RAINBOW], size + 10)
    assert more.filler_ids == tuple(range(size + 3, size + 10)) and more.eot_id == found.eot_id


@pytest.mark.parametrize("reserved", [True, False], ids=["reserved", "missing"])
def test_rows_that_the_published_base_model_has_get_their_names(reserved, tmp_path):
    words = {f"w{i}": i for i in range(126_080)}
    tokens = ["<|startoftext|>", "<|endoftext|>", *(f"<|reserved_token_{i}|>" for i in range(126_082, 126_336))]
    tokens += ["<|mdm_mask|>", *(f"<|reserved_token_{i}|>" for i in range(126_337, 126_349 if reserved else 126_340))]
    source = json.loads(tokenizers.Tokenizer(models.WordLevel(words, "w0")).to_str())
    source["added_tokens"] = [
        dict(
            id=126_080 + i, content=text, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True
        )
        for i, text in enumerate(tokens)
    ]
    config = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
    base = load({"tokenizer.json": json.dumps(source), "tokenizer_config.json": json.dumps(config)}, tmp_path)
    found = base.with_dialogue(builtin("llada"), LLADA_CONTROLS, 126_464)
    assert [found.token_id(name) for name in LLADA_CONTROLS] == [126_080, 126_346, 126_347, 126_348]
    assert found.special == (126_336, 126_081, 126_348, None)
    more = found.with_dialogue(builtin("llada"), RAINBOW, 126_464)
    assert more.special == found.special and not set(more.filler_ids) & {126_336, 126_346, 126_347, 126_348}
    assert all(a < b for a, b in itertools.pairwise(more.filler_ids))


def test_a_tokenizer_is_trained_with_the_control_tokens_that_are_asked_for(tmp_path):
    found = train_tokenizer([TEXT], 300, tmp_path / "t.model", controls=RAINBOW)
    assert found.vocab_size == 300 and found.filler_ids == tuple(range(found.eot_id + 1, found.eot_id + 8))
    assert found.with_dialogue(builtin("plain"), [*PLAIN_CONTROLS, *RAINBOW], 300) is found
