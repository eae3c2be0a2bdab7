"""Text to tokens where it is cut: before and behind masks, between a prompt and its answer; ids as they are typed."""

import io
import json

import numpy as np
import pytest
import sentencepiece

from llada.data.huggingface_tokenizer import HuggingFaceTokenizer, bundle
from llada.data.sentencepiece_tokenizer import SentencePieceTokenizer
from llada.errors import UserError
from llada.inference import canvas

LINES = ["the cat sees the dog alpha, x (beta) gamma delta", "x = f(y) and more text, of words"] * 20


def sentencepieces(**options) -> SentencePieceTokenizer:
    writer = io.BytesIO()
    options = dict(model_type="bpe", vocab_size=340, byte_fallback=True, normalization_rule_name="identity") | options
    ids = dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1, control_symbols=["<mask>"])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=writer, hard_vocab_limit=False, minloglevel=2, **ids, **options
    )
    return SentencePieceTokenizer(writer.getvalue(), "test")


def tokenizer_json(normalizer, pre_tokenizer, decoder) -> HuggingFaceTokenizer:
    from tokenizers import Tokenizer, models, trainers

    made = Tokenizer(models.BPE(byte_fallback=True))
    if normalizer is not None:
        made.normalizer = normalizer
    if pre_tokenizer is not None:
        made.pre_tokenizer = pre_tokenizer
    made.decoder = decoder
    special = ["<pad>", "</s>", "<mask>"]
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    made.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=400, special_tokens=special + alphabet))
    content = json.loads(made.to_str())
    content["added_tokens"] = content["added_tokens"][: len(special)]
    return HuggingFaceTokenizer(bundle({"tokenizer.json": json.dumps(content)}, "test"), "test")


def llamas_json():
    from tokenizers import decoders, normalizers

    fused = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return tokenizer_json(
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None, decoders.Sequence(fused)
    )


def mistrals_json():
    from tokenizers import decoders, pre_tokenizers

    decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return tokenizer_json(None, pre_tokenizers.Metaspace(), decoder)


MAKERS = {
    "trained here": lambda: sentencepieces(
        add_dummy_prefix=False, remove_extra_whitespaces=False, user_defined_symbols=["\n"]
    ),
    "Llama's .model": lambda: sentencepieces(remove_extra_whitespaces=False),
    "T5's .model": lambda: sentencepieces(model_type="unigram", normalization_rule_name="nmt_nfkc", vocab_size=330),
    "Llama's tokenizer.json": llamas_json,
    "Mistral's tokenizer.json": mistrals_json,
}


@pytest.fixture(scope="module", params=list(MAKERS))
def tokenizer(request):
    return MAKERS[request.param]()


def spelled(tokenizer, ids) -> str:
    """The text of ids in the middle of a text: a space that the first brings stays."""
    return b"".join(tokenizer.token_bytes(int(token)) for token in ids).decode()


@pytest.mark.parametrize(
    "pieces", [("alpha", "(beta)"), ("alpha", " (beta)"), ("", "cat sees"), ("the c", "at, naïve"), ("x =", "(y)", "")]
)
def test_no_space_comes_in_where_masks_stand(tokenizer, pieces):
    canvas_L = canvas.from_infill("[MASK:2]".join(pieces), tokenizer, 64)
    where = np.flatnonzero(canvas_L == tokenizer.mask_id)
    assert len(where) == 2 * (len(pieces) - 1)
    # The first piece may have the space that its tokenizer puts before every text.
    shown = [spelled(tokenizer, part[part != tokenizer.mask_id]) for part in np.split(canvas_L, where[::2])]
    assert [shown[0].lstrip(" "), *shown[1:]] == list(pieces)


@pytest.mark.parametrize(
    "prompt, answer",
    [("alpha", ", x"), ("the cat", " sees"), ("the cat ", "sees"), ("", "cat"), (" ", "cat"), ("x = f", "(y) and")],
)
def test_prompt_and_answer_are_one_text(tokenizer, prompt, answer):
    first, rest = canvas.encode_pair(tokenizer, prompt, answer)
    assert tokenizer.decode(first + rest).strip() == (prompt + answer).strip()
    assert spelled(tokenizer, first).strip() == prompt.strip()
    assert spelled(tokenizer, rest).strip() == answer.strip()
    if first:  # in the middle of a text a space is there because it was given
        assert spelled(tokenizer, rest) == (" " if prompt.endswith(" ") else "") + answer
    whole = tokenizer.encode(prompt + answer)
    assert first + rest == whole or whole[: len(first)] != first
    # With ids for one of the two, the other is the same.
    assert canvas.encode_pair(tokenizer, first, rest) == (first, rest)
    if prompt == prompt.rstrip():
        by_ids = canvas.encode_pair(tokenizer, first, answer)
        assert by_ids[0] == first and spelled(tokenizer, by_ids[1]) == spelled(tokenizer, rest)


def test_a_border_inside_a_token_keeps_prompt_and_answer(tokenizer):
    """A token reaches over the border in the whole text: neither side loses a character to the other."""
    first, rest = canvas.encode_pair(tokenizer, "the c", "at sees")
    assert first == tokenizer.encode("the c") and spelled(tokenizer, rest) == "at sees"


def test_tokenizers_trained_here_encode_pieces_as_they_always_did():
    own = MAKERS["trained here"]()
    for text in ("(beta)", " sees", "\n  x", "naïve", "at"):
        assert canvas.encode_after(own, text) == own.encode(text)
    for prompt, answer in (("the cat", " sees"), ("alpha\n", "x = f(y)")):
        assert canvas.encode_pair(own, prompt, answer) == (own.encode(prompt), own.encode(answer))


def test_what_a_tokenizer_changes_is_said_once(capsys):
    lossy = MAKERS["T5's .model"]()
    canvas._warned.clear()
    for _ in range(2):
        canvas.encode_text(lossy, "the cat\n\n  x = (y)", "--prompt")
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and "--prompt" in told[0] and "'e cat\\n\\n  x" not in told[0] and "\\n\\n" in told[0]
    exact = MAKERS["Llama's .model"]()
    canvas.encode_text(exact, "the cat\n\n  x = (y)", "--prompt")
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    "infill, words",
    [
        ("nothing", "nothing to fill"),
        ("[MASK:99999999999]", "99999999999 tokens"),
        (f"[MASK:{'9' * 5000}]", "more than any context"),
        ("[MASK:60] [MASK:60]", "120 tokens"),
        ("a [MASK:0] b [MASK]", "[MASK:0]"),
        ("a [MASK:-2] b", "[MASK:-2]"),
        ("a [MASK:x] b", "[MASK:x]"),
        ("a [MASK:] b", "[MASK:]"),
        ("a [MASK:٣] b", "no mark"),
    ],
)
def test_marks_that_cannot_be_filled_are_refused(infill, words):
    with pytest.raises(UserError, match=".") as caught:
        canvas.from_infill(infill, MAKERS["trained here"](), 64)
    assert words in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "given, words",
    [
        ("1,x", "integers"),
        ("1,320", "0 to 319"),
        ("-1", "0 to 319"),
        ("9" * 4500, "integers"),
        ("9" * 400, "0 to 319"),
        ("1_0", "integers"),
        ("1.0", "integers"),
        ([1.0], "integers"),
        ([True], "integers"),
        (["3"], "integers"),
        ([None], "integers"),
        ([10**30], "0 to 319"),
        ([float("nan")], "integers"),
    ],
)
def test_ids_that_are_none_are_refused(given, words):
    with pytest.raises(UserError) as caught:
        canvas.parse_ids("--prompt_ids", given, 320)
    assert words in str(caught.value) and "--prompt_ids" in str(caught.value) and len(str(caught.value)) < 200


def test_text_ends_at_the_first_end_behind_the_prompt():
    for ids, shown in (([1, 5, 1, 6, 4, 7], [1, 5, 1, 6]), ([1, 5, 1, 6, 7], [1, 5, 1, 6, 7]), ([5, 5, 5, 1], [5] * 3)):
        assert canvas.until_end(ids, (1, 4), 3) == shown


def test_what_is_no_text_and_no_end_is_never_written():
    """Padding, unknown, mask, and the rows of the model past the tokenizer's last id."""
    own = MAKERS["trained here"]()
    pad, eos, unknown, mask = 0, 1, 2, 3
    assert (own.pad_id, own.eos_id, own.mask_id) == (pad, eos, mask)
    forbidden = np.flatnonzero(canvas.forbidden_ids(own, own.vocab_size + 3))
    assert forbidden.tolist() == [pad, unknown, mask, *range(own.vocab_size, own.vocab_size + 3)]


def test_ids_in_any_spelling():
    for given in ("12,7, 99", [12, 7, 99], np.array([12, 7, 99]), (np.int64(12), 7, 99)):
        assert canvas.parse_ids("--prompt_ids", given, 320) == [12, 7, 99]
    assert canvas.parse_ids("--prompt_ids", "", 320) == []
