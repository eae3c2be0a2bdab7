"""SentencePiece: lossless, never spells the mask, counts bytes exactly, trains to the same bytes, refuses bad files."""

import io
import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import sentencepiece

from llada.data import tokenizer_files
from llada.data.sentencepiece_tokenizer import SentencePieceTokenizer
from llada.data.sources import documents
from llada.data.tokenizer_training import _sample, train_tokenizer
from llada.errors import UserError

TEXTS = list(itertools.islice(documents("stdlib"), 40))
NASTY = [
    "",
    " ",
    "\n",
    "\tif x:\r\n\t\t  pass\r",
    "  a  b   c    \n\n \n" + " " * 300,
    "\u2581",
    "\u2581\u2581a\u2581 \u2581\n\u2581",
    "<mask><pad><eos><unk><s></s>[MASK]<0x41>",
    "日本語 русский عربي e\u0301 \u00e9 ﬁ ① Ａ",
    "😀👩\u200d👩\u200d👧 \U0010ffff\ue000\ufffd",
    "\ufeff\u2028\u2029\x85\x0b\x0c\u00a0\u3000\u200b\x00\x1f",
    "\u2585 \u2047 ",
    "x" * 20_000,
    "".join(map(chr, range(0x3000))),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> SentencePieceTokenizer:
    return train_tokenizer(TEXTS, 600, tmp_path_factory.mktemp("tokenizer") / "t.model")


def test_every_text_comes_back_and_its_bytes_are_counted(tokenizer):
    texts = NASTY + TEXTS
    encoded = tokenizer.encode_many(texts)
    control = {tokenizer.mask_id, tokenizer.eos_id, tokenizer.pad_id}
    for text, ids in zip(texts, encoded, strict=True):
        assert ids == tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes_V[ids].sum() == len(text.encode())
        assert not control & set(ids)


def test_random_text_comes_back(tokenizer):
    rng = np.random.default_rng(0)
    alphabet = [*"abc  \n\t\r<>_", "\u2581", "<mask>", "self", "é", "字", "😀", "\u0301", "\x00"]
    for _ in range(300):
        text = "".join(rng.choice(alphabet, rng.integers(1, 60)))
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and tokenizer.mask_id not in ids
        assert tokenizer.token_bytes_V[ids].sum() == len(text.encode())


def test_vocabulary_is_exact_and_control_ids_are_apart(tokenizer):
    assert tokenizer.vocab_size == 600 == len(tokenizer.token_bytes_V)
    assert tokenizer.token_bytes_V.dtype == np.int32
    pieces = [tokenizer.piece(token) for token in range(600)]
    assert len(set(pieces)) == 600
    ids = tokenizer.mask_id, tokenizer.eos_id, tokenizer.pad_id
    assert [pieces[token] for token in ids] == ["<mask>", "<eos>", "<pad>"] and len(set(ids)) == 3
    assert [tokenizer.token_bytes_V[token] for token in ids] == [0, 0, 0]
    assert tokenizer.encode("\n\n") == [pieces.index("\n")] * 2
    assert not [piece for piece in pieces if "\n" in piece and piece != "\n"]
    bytes_V = [token for token, piece in enumerate(pieces) if piece.startswith("<0x")]
    assert len(bytes_V) == 256 and set(tokenizer.token_bytes_V[bytes_V]) == {1}
    hello = tokenizer.encode("hello")
    assert tokenizer.decode([*ids, *hello, tokenizer.mask_id]) == "hello"
    assert tokenizer.decode(np.array(hello, np.int32)) == "hello"


def test_training_gives_the_same_bytes_and_leaves_one_file(tokenizer, tmp_path):
    path = tmp_path / "new" / "t.model"
    again = train_tokenizer(iter(TEXTS), 600, path)
    assert again.sha256 == tokenizer.sha256 == SentencePieceTokenizer.load(path).sha256
    assert [file.name for file in path.parent.iterdir()] == ["t.model"]
    other = train_tokenizer(TEXTS[:30], 600, path)
    assert other.sha256 != again.sha256 and SentencePieceTokenizer.load(path).sha256 == other.sha256


def test_training_sample_is_bounded_and_spread(tmp_path):
    # 12 MB: words only in an endless line, or only at the very end, must still be learnt.
    texts = ["alpha beta gamma\n" * 100_000, "x " * 1_000_000, "delta " * 500_000, *["omega\n" * 100] * 8_000]
    tokenizer = train_tokenizer(texts, 300, tmp_path / "t.model")
    assert len(tokenizer.encode("delta")) <= 2 and len(tokenizer.encode("omega")) == 1
    assert sum(len(segment.encode()) for segment in _sample(texts, 100_000)) in range(50_000, 100_001)


def test_a_text_without_spaces_still_gives_a_lossless_model(tmp_path):
    tokenizer = train_tokenizer(["a\nb\nabc\n" * 30], 271, tmp_path / "t.model")
    assert tokenizer.decode(tokenizer.encode(" a  b ")) == " a  b "


@pytest.mark.parametrize(("vocab_size", "message"), [(100, "too small.*alone take 2"), (9_000, "too large.*at most")])
def test_impossible_vocabulary_is_explained(tmp_path, vocab_size, message):
    with pytest.raises(UserError, match=f"model.vocab_size={vocab_size} is {message}"):
        train_tokenizer(["a few words only"], vocab_size, tmp_path / "t.model")
    assert not list(tmp_path.iterdir())


def test_no_text_to_train_on(tmp_path):
    with pytest.raises(UserError, match="no text to train"):
        train_tokenizer([], 600, tmp_path / "t.model")


def foreign(path, **options):
    """Write a model as other projects make them: default normalisation, no byte fallback, other names."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[0].split("\n")),
        model_writer=model,
        vocab_size=200,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    path.write_bytes(model.getvalue())
    return path


@pytest.mark.parametrize("mask", ["<mask>", "[MASK]", "<|mdm_mask|>"])
def test_models_of_others_load(tmp_path, mask):
    tokenizer = SentencePieceTokenizer.load(str(foreign(tmp_path / "t.model", control_symbols=[mask])))
    assert tokenizer.piece(tokenizer.mask_id) == mask
    assert tokenizer.piece(tokenizer.eos_id) == "</s>" and tokenizer.pad_id == tokenizer.eos_id
    assert tokenizer.decode(tokenizer.encode("import self")) == "import self"
    assert tokenizer.mask_id not in tokenizer.encode(f"a {mask} b \u2581")


def test_bad_models_are_refused(tmp_path):
    path = tmp_path / "t.model"
    with pytest.raises(UserError, match="cannot read tokenizer .*t.model: No such file"):
        SentencePieceTokenizer.load(path)
    for content in (b"", b"garbage", b"\0" * 99, bytes(range(256))):
        path.write_bytes(content)
        with pytest.raises(UserError, match="t.model is not a SentencePiece model"):
            SentencePieceTokenizer.load(path)
    with pytest.raises(UserError, match="has no end-of-text token; it needs one of </s>"):
        SentencePieceTokenizer.load(foreign(path, control_symbols=["<mask>"], eos_id=-1))
    with pytest.raises(UserError, match="lets text spell its mask token"):
        SentencePieceTokenizer.load(foreign(path, user_defined_symbols=["<mask>"]))


def test_a_mask_token_is_appended_as_a_control_symbol(tmp_path):
    plain = SentencePieceTokenizer.load(foreign(tmp_path / "t.model"))
    assert plain.mask_id is None
    masked = tokenizer_files.fitted(plain, plain.vocab_size + 1, True, lambda line: None)
    assert masked.mask_id == plain.vocab_size and masked.piece(masked.mask_id) == "<mask>"
    text = "import self <mask>"
    assert masked.encode(text) == plain.encode(text) and masked.special.eos == plain.eos_id
    assert masked.token_bytes_V.tolist() == [*plain.token_bytes_V.tolist(), 0]
    assert tokenizer_files.parse(masked.content, "it").sha256 == masked.sha256


def test_damaged_models_are_refused_or_work(tokenizer):
    """SentencePiece says what is damaged in bytes that need not be UTF-8."""
    rng = np.random.default_rng(0)
    for _ in range(150):
        content = bytearray(tokenizer.content)
        for place in rng.integers(0, len(content), 3):
            content[place] = rng.integers(0, 256)
        try:
            found = SentencePieceTokenizer(bytes(content), "it")
            found.decode(found.encode("def f(x): \u2581 \u00e9"))
        except UserError as error:
            assert "\n" not in str(error)


def test_an_unknown_token_that_is_no_piece_is_refused(tokenizer):
    proto = tokenizer.proto
    unknown = next(piece for piece in proto.pieces if piece.type == type(piece).UNKNOWN)
    unknown.type = type(unknown).CONTROL
    proto.trainer_spec.unk_piece = "another"
    with pytest.raises(UserError, match="its unknown token is id -1, which is no piece"):
        SentencePieceTokenizer(proto.SerializeToString(), "it")


def test_processes_that_train_at_once_share_one_model(tmp_path, capfd):
    path = tmp_path / "t.model"
    with ThreadPoolExecutor(3) as pool:
        made = list(pool.map(lambda _: train_tokenizer(TEXTS[:3], 400, path).sha256, range(3)))
    assert set(made) == {SentencePieceTokenizer.load(path).sha256} and [file.name for file in tmp_path.iterdir()] == [
        "t.model"
    ]
    assert f"which trains {path}" in capfd.readouterr().err


def test_training_a_tokenizer_can_be_stopped(tmp_path):
    class Stop(Exception):
        pass

    def stop():
        raise Stop

    with pytest.raises(Stop):
        train_tokenizer(TEXTS, 600, tmp_path / "t.model", check=stop)
    assert not list(tmp_path.iterdir())
