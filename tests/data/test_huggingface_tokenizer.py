"""Tokenizers of Hugging Face: the library's ids, bytes counted exactly, control ids that no text spells, bad files."""

import json

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from llada.data import huggingface_tokenizer, tokenizer_files
from llada.data.huggingface_tokenizer import HuggingFaceTokenizer
from llada.errors import UserError
from llada.inference import replay

TEXT = "def main():\n    print('the cat sees the dog')  # naïve café 日本語 🎉👩\u200d👧\n" * 20
NASTY = [
    "",
    " ",
    "  a  b \n\n\t c \r\n",
    "<mask><|endoftext|>[MASK]<|eot_id|><extra>",
    "日本語 e\u0301 🎉👩\u200d👧 \U0010ffff",
    "\x00\x1f\u2028\u2581 \u00a0",
    "x" * 5_000,
]
SPECIAL = ["<|endoftext|>", "<mask>", "<|eot_id|>", "<pad>"]


def byte_level() -> tokenizers.Tokenizer:
    """As Llama 3, GPT-2 and the released LLaDA have it."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    made.add_tokens(["<extra>"])  # added, but text
    return made


def byte_fallback() -> tokenizers.Tokenizer:
    """As Llama 2 has it."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    made = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Replace(" ", "\u2581")
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()],
    )
    trained = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", *SPECIAL, *bytes_], show_progress=False)
    made.train_from_iterator([TEXT], trained)
    # The trainer calls them special; in such files bytes are ordinary pieces.
    values = json.loads(made.to_str())
    values["added_tokens"] = [token for token in values["added_tokens"] if token["content"] not in bytes_]
    return tokenizers.Tokenizer.from_str(json.dumps(values))


@pytest.fixture(scope="module", params=[byte_level, byte_fallback])
def made(request):
    return request.param()


@pytest.fixture(scope="module")
def tokenizer(made, tmp_path_factory) -> HuggingFaceTokenizer:
    path = tmp_path_factory.mktemp("tokenizer")
    made.save(str(path / "tokenizer.json"))
    return tokenizer_files.load(path)


def test_ids_are_the_library_s_and_texts_come_back_with_their_bytes_counted(made, tokenizer):
    for text in [TEXT, *NASTY[:3], *NASTY[4:]]:
        ids = tokenizer.encode(text)
        assert ids == made.encode(text, add_special_tokens=False).ids
        if "\u2581" in text and made.normalizer is not None:
            continue  # there the character itself means a space
        assert tokenizer.decode(ids) == text
        assert sum(tokenizer.token_bytes_V[ids]) == len(text.encode())
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
        assert "".join(replay.pieces(tokenizer, ids)) == text
    assert tokenizer.encode_many(NASTY) == [tokenizer.encode(text) for text in NASTY]


def test_no_text_spells_a_control_id(made, tokenizer):
    spelled = NASTY[3]
    control = {made.token_to_id(token) for token in SPECIAL}
    assert control & set(made.encode(spelled).ids)  # a plain use of the library would give them
    ids = tokenizer.encode(spelled)
    assert not control & set(ids) and tokenizer.decode(ids) == spelled
    assert tokenizer.decode([tokenizer.mask_id, *ids, tokenizer.eos_id]) == spelled
    assert not tokenizer.token_bytes_V[list(control)].any()
    with pytest.raises(IndexError, match="outside"):
        tokenizer.decode([tokenizer.vocab_size])


def test_special_ids_come_from_the_caller_then_the_files_then_usual_names(made, tmp_path):
    made.save(str(tmp_path / "tokenizer.json"))
    found = tokenizer_files.load(tmp_path / "tokenizer.json")
    names = [made.id_to_token(i) for i in (found.mask_id, found.eos_id, found.eot_id, found.pad_id)]
    assert names == ["<mask>", "<|endoftext|>", "<|eot_id|>", "<pad>"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|eot_id|>"}}))
    assert tokenizer_files.load(tmp_path).eos_id == made.token_to_id("<|eot_id|>")
    files = huggingface_tokenizer.read_files(tmp_path)
    beyond = made.get_vocab_size() + 5  # a row of the model that no token uses
    content = huggingface_tokenizer.bundle(files, "here", {"mask": beyond})
    given = HuggingFaceTokenizer(content, "here")
    assert (given.mask_id, given.vocab_size) == (beyond, beyond + 1)
    assert given.piece(beyond) == f"<{beyond}>" and given.decode([beyond]) == "" and given.token_bytes(beyond) == b""


def test_a_bundle_keeps_the_files_and_is_the_same_bytes_again(tokenizer, tmp_path):
    (tmp_path / tokenizer.file_name).write_bytes(tokenizer.content)
    again = tokenizer_files.load(tokenizer_files.in_workdir(tmp_path))
    assert (again.sha256, again.special, again.files) == (tokenizer.sha256, tokenizer.special, tokenizer.files)


def test_bad_tokenizers_get_one_line(made, tmp_path):
    cases = {
        "no tokenizer.json": lambda path: None,
        "not a Hugging Face tokenizer": lambda path: (path / "tokenizer.json").write_text("{}"),
        "tokenizer.json is not UTF-8": lambda path: (path / "tokenizer.json").write_bytes(b"\xff\xfe"),
        "tokenizer_config.json of .* is not JSON": lambda path: (path / "tokenizer_config.json").write_text("{"),
    }
    for number, (message, spoil) in enumerate(cases.items()):
        path = tmp_path / str(number)
        path.mkdir()
        if number > 2:
            made.save(str(path / "tokenizer.json"))
        spoil(path)
        with pytest.raises(UserError, match=message) as caught:
            tokenizer_files.load(path)
        assert "\n" not in str(caught.value)
    plain = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    plain.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="no end-of-text token; it needs one of </s>"):
        tokenizer_files.load(tmp_path)
    for content in (b"{}", b'{"files": {}}', b"{nonsense"):
        with pytest.raises(UserError, match="not a bundle"):
            tokenizer_files.parse(content, "it")
