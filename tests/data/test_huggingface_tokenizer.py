"""Tokenizers of Hugging Face: the library's ids, bytes counted exactly, control ids that no text spells, bad files."""

import json
import os

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


def gemma_like() -> tokenizers.Tokenizer:
    """Runs of spaces are added tokens, spelled as the model spells them."""
    made = byte_fallback()
    made.add_tokens([tokenizers.AddedToken("\u2581" * n, normalized=False) for n in (2, 3, 4)])
    return made


def llama_like() -> tokenizers.Tokenizer:
    """A space is put before every text, and taken away again."""
    made = byte_fallback()
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Sequence([made.decoder, decoders.Strip(" ", 1, 0)])
    return made


def word_piece() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    made.train_from_iterator([TEXT], trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", *SPECIAL]))
    return made


@pytest.mark.parametrize(
    ("make", "text", "counted"),
    [
        (byte_level, "    main", 8),
        (byte_level, "caf\u00e9 \U0001f389", 10),
        (gemma_like, "    main", 8),
        (gemma_like, "a  b   \u5b57", 10),
        (llama_like, "    main", 9),  # one more for every text, which corpora put right by their documents' bytes
        (word_piece, "the cat sees the dog", 21),
    ],
)
def test_bytes_of_tokens_are_those_of_the_text_that_comes_back(make, text, counted, tmp_path):
    make().save(str(tmp_path / "tokenizer.json"))
    tokenizer = tokenizer_files.load(tmp_path)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and tokenizer.token_bytes_V[ids].sum() == counted
    spelled = b"".join(map(tokenizer.token_bytes, ids)).decode()
    assert spelled == (text if counted == len(text.encode()) else f" {text}")


def test_a_mask_token_is_appended_where_there_is_room(made, tmp_path):
    values = json.loads(made.to_str().replace("<mask>", "<other>"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    plain, said = tokenizer_files.load(tmp_path), []
    V = plain.vocab_size
    assert plain.mask_id is None and plain.special.mask is None
    masked = tokenizer_files.fitted(plain, V + 1, True, said.append)
    assert (masked.mask_id, masked.vocab_size) == (V, V + 1) and f"id {V} becomes one" in said[0]
    assert masked.encode(TEXT) == plain.encode(TEXT) and masked.decode([V, *plain.encode("x")]) == "x"
    again = tokenizer_files.parse(masked.content, "it")
    assert again.special == masked.special and masked.special._replace(mask=None) == plain.special
    # An ARM goes without where there is no room; with room it has the same tokenizer as a LLaDA.
    assert tokenizer_files.fitted(plain, V, False, said.append) is plain
    assert tokenizer_files.fitted(plain, V + 1, False, said.append).sha256 == masked.sha256
    assert tokenizer_files.fitted(masked, V + 1, True, said.append) is masked
    for size, masks, message in ((V, True, "and no mask token"), (V - 1, False, f"has {V} pieces, more than")):
        with pytest.raises(UserError, match=f"{message}.*set --config.model.vocab_size={V + masks} or more"):
            tokenizer_files.fitted(plain, size, masks, said.append)


def test_texts_begin_with_bos_only_where_an_import_says_so(made, tmp_path):
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|eot_id|>"}))
    plain = tokenizer_files.load(tmp_path)
    assert plain.special.bos is None and plain.special.start == plain.eos_id
    files = huggingface_tokenizer.read_files(tmp_path)
    imported = HuggingFaceTokenizer(huggingface_tokenizer.bundle(files, "here", {"bos": 2}), "here")
    assert imported.special.start == imported.bos_id == 2
    assert tokenizer_files.parse(imported.content, "it").special == imported.special


BOMB = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 200}


def hostile(changes: dict) -> str:
    """A tokenizer.json of two letters, changed; keys with a dot are of its model."""
    values = json.loads(tokenizers.Tokenizer(models.BPE({"<eos>": 0, "a": 1, "b": 2}, [])).to_str())
    for key, value in changes.items():
        (values["model"] if key.startswith("model.") else values)[key.removeprefix("model.")] = value
    return json.dumps(values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"type": "WordLevel", "vocab": {"<eos>": 0, "x": 400_000_000}, "unk_token": "x"}}, "id 400000000"),
        ({"normalizer": {"type": "Sequence", "normalizers": [BOMB] * 4}}, "normalizer makes text 1,600,000,000 times"),
        ({"decoder": BOMB}, "decoder makes text 200 times as long"),
        ({"model": None}, "not a Hugging Face tokenizer"),
        ({"model": []}, "not a Hugging Face tokenizer"),
        ({"model.unk_token": 3}, "not a Hugging Face tokenizer"),
        ({"model.vocab": {}}, "no end-of-text token"),
        ("[" * 100_000, "tokenizer.json of .* is not JSON that can be read"),
        ('{"model":', "tokenizer.json of .* is not JSON"),
        ("\0", "tokenizer.json of .* is not JSON"),
    ],
)
def test_hostile_files_get_one_line_at_once(tmp_path, changes, message):
    text = hostile(changes) if isinstance(changes, dict) else changes
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        tokenizer_files.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_pieces_that_are_no_bytes_are_text(tmp_path):
    decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    for pieces, changes in (("\u5b57", {"decoder": decoder}), ("<0xZZ>", {"model.byte_fallback": True})):
        (tmp_path / "tokenizer.json").write_text(hostile({"model.vocab": {"<eos>": 0, pieces: 1}} | changes))
        assert tokenizer_files.load(tmp_path).token_bytes(1) == pieces.encode()


@pytest.mark.parametrize("kind", ["WordLevel", "Unigram"])
def test_text_without_a_token_gets_one_line(tmp_path, kind):
    vocab = [["<eos>", 0.0], ["a", -1.0]] if kind == "Unigram" else {"<eos>": 0, "a": 1}
    model = {"type": kind, "vocab": vocab} | ({"unk_token": "no such"} if kind == "WordLevel" else {"unk_id": None})
    (tmp_path / "tokenizer.json").write_text(hostile({"model": model}))
    tokenizer = tokenizer_files.load(tmp_path)
    for call in (tokenizer.encode, lambda text: tokenizer.encode_many(["a", text])):
        with pytest.raises(UserError, match="has no token for a part of the text"):
            call("\u5b57")


@pytest.mark.parametrize("token", [1_000_000_000, -1, 2**70, "1", [1], {}, True, 1.5])
@pytest.mark.parametrize("role", ["mask", "eos", "bos"])
def test_a_bundle_s_ids_are_ids(tokenizer, role, token):
    bundle = json.loads(tokenizer.content)
    bundle["special"][role] = token
    with pytest.raises(UserError, match="is not a bundle .*not an id|has an id .*, outside 0..16777215"):
        tokenizer_files.parse(json.dumps(bundle).encode(), "it")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_settings_nested_without_end_get_one_line(made, tmp_path, name):
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / name).write_text("[" * 100_000)
    with pytest.raises(UserError, match=f"{name} of .* is not JSON that can be read"):
        tokenizer_files.load(tmp_path)


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "tokenizer.json")
    for path in (tmp_path, tmp_path / "tokenizer.json", "/dev/zero"):
        with pytest.raises(UserError, match="no regular file"):
            tokenizer_files.load(path)
    for path, message in (("gs://b/t", "no directory or file of this machine"), ("a\0", "NUL"), ("", "is empty")):
        with pytest.raises(UserError, match=f"config.data.tokenizer.*{message}"):
            tokenizer_files.load(path)


def test_half_a_surrogate_pair_is_no_text(tokenizer):
    for call in (tokenizer.encode, lambda text: tokenizer.encode_many(["fine", text])):
        with pytest.raises(UserError, match="no Unicode: half a surrogate pair.* at character 1"):
            call("a\ud83d")
