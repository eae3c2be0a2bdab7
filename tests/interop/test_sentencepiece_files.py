"""The exported files, read by both major versions of transformers, give the ids of the SentencePiece model itself.

Each version answers for all tokenizers and texts in one fresh process, where sentencepiece cannot be imported.
"""

import io
import itertools
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from llada.data.sentencepiece_tokenizer import SentencePieceTokenizer
from llada.data.sources import documents
from llada.data.tokenizer_training import train_tokenizer
from llada.errors import UserError
from llada.interop.sentencepiece_files import tokenizer_files

OTHER_MAJOR = Path(sys.prefix) / "transformers4"
MAJORS = ("4", "5")
DOCUMENTS = list(itertools.islice(documents("stdlib"), 40))
LINES = [line for document in DOCUMENTS for line in document.split("\n")][:3_000]
CONTROL = re.compile("<pad>|<eos>|<unk>|<mask>|<s>|</s>")
NASTY = [
    "",
    " ",
    "  a  b   c    \n\n \n" + " " * 300,
    "\n\n\tif x:\r\n\t\t  pass\r",
    "\u2581",
    "\u2581\u2581a\u2581 \u2581\n\u2581",
    "<mask><pad><eos><unk><s></s>[MASK]<0x41><0xE2><0x96><0x81>",
    "日本語 русский عربي e\u0301 \u00e9 ﬁ ① Ａ",
    "😀👩\u200d👩\u200d👧 \U0010ffff\ue000\ufffd\ufdd0\ufffe",
    "\ufeff\u2028\u2029\x85\x0b\x0c\u00a0\u3000\u200b\x00\x1f",
    "x" * 20_000,
    "".join(map(chr, range(0x3000))),
]
SPELLED = "if<mask> <eos>b<unk>"

# Runs with the transformers that PYTHONPATH selects.
ANSWERS = """
import json, sys
from pathlib import Path
sys.modules["sentencepiece"] = None  # importing it fails
import transformers

def answers(folder, texts, spelled):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    split = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    tokenizer.save_pretrained(f"{folder}-again{transformers.__version__}")
    again = transformers.AutoTokenizer.from_pretrained(f"{folder}-again{transformers.__version__}")
    padded = {}
    for side in ("left", "right"):
        tokenizer.padding_side = side
        batch = tokenizer(["if", "if a == b:"], padding=True)
        padded[side] = [batch["input_ids"], batch["attention_mask"]]
    return {
        "split": split,
        "ids": ids,
        "same again": again(texts[:200], add_special_tokens=False)["input_ids"] == ids[:200],
        "decoded": tokenizer.batch_decode(split),
        "complete": tokenizer(texts)["input_ids"],
        "pair": tokenizer("if", "else")["input_ids"],
        "spelled": tokenizer(spelled, add_special_tokens=False)["input_ids"],
        "decoded spelled": tokenizer.decode(tokenizer(spelled)["input_ids"]),
        "skipped": tokenizer.decode(tokenizer(spelled)["input_ids"], skip_special_tokens=True),
        "padded": padded,
        "named ids": {name: getattr(tokenizer, name + "_token_id") for name in ("mask", "eos", "pad", "unk", "bos")},
        "sizes": [len(tokenizer), tokenizer.vocab_size, tokenizer.model_max_length],
        "tokens": tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))),
    }

cases = json.loads(Path(sys.argv[1]).read_text())
found = {name: answers(**case) for name, case in cases.items()}
found["version"] = transformers.__version__
Path(sys.argv[2]).write_text(json.dumps(found))
"""


def trained(kind, **options):
    """A model as other projects make them: dummy prefix, extra spaces dropped, no byte fallback but for `options`."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=model,
        model_type=kind,
        vocab_size=800,
        control_symbols=["<mask>"],
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
        **{"normalization_rule_name": "identity", **options},
    )
    return SentencePieceTokenizer(model.getvalue(), "a user's model")


def fuzzed(tokenizer, count, characters="abcdeors =()'.- \n"):
    """Texts of pieces, of few characters again and again, of white space, of any characters, and of damaged code."""
    rng = random.Random(0)
    pieces = [tokenizer.token_bytes(token).decode(errors="ignore") for token in range(tokenizer.vocab_size)]
    pieces = [piece for piece in pieces if piece]
    rare = ["\u2581", "<0x41>", "<mask>", "é", "字", "😀", "\u0301", "\x00", "\r\n", "\ufeff", "a", " ", "  ", "\n"]
    for _ in range(count):
        n = int(2 ** rng.uniform(0, 7))
        start = rng.randrange(10_000)
        code = DOCUMENTS[start % len(DOCUMENTS)][start : start + n]
        yield "".join(
            rng.choice(
                [
                    rng.choices(pieces, k=n),
                    rng.choices(rng.choices(characters, k=2), k=n),
                    rng.choices(" \t\n\r ", k=n),
                    rng.choices(rare, k=n),
                    [chr(rng.choice((rng.randrange(0x3000), rng.randrange(0xE000, 0x110000)))) for _ in range(n)],
                    [code[: n // 2], rng.choice(pieces), code[n // 2 :]],
                ]
            )
        )


def ascii_only(texts):
    """What is left is exact in every byte-pair model, whatever it does with U+2581 and rare marks."""
    return [re.sub(r"[^\t\n\r -~]", "", text) for text in texts]


def exported(tokenizer, **arguments):
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(tokenizer.content)
    ids = {"mask_id": tokenizer.mask_id, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    return tokenizer_files(proto, **ids, **{"model_max_length": 64, **arguments})


def trained_here(folder):
    """Name to tokenizer, texts and further arguments of the export."""

    def train(name, texts, vocab_size):
        return train_tokenizer(texts, vocab_size, folder / f"{name}.model")

    code = train("code", DOCUMENTS, 900)
    yield "code", (code, [*NASTY, *fuzzed(code, 4_000), *DOCUMENTS[:20]], {})
    arguments = {"bos_id": code.eos_id, "model_max_length": 512}
    yield "code, bos", (code, ["", "if a == b:", *LINES[:100]], arguments)
    # Little but repetitions, so that most pieces have several cuts; then every short text there is.
    rng = random.Random(0)
    loops = ["".join(rng.choices(["ab", "a", "bba", " ", "  ", "aab "], k=500)) for _ in range(10)]
    tokenizer = train("loops", loops, 360)
    short = ["".join(text) for n in range(1, 9) for text in itertools.product("ab ", repeat=n)]
    yield "loops", (tokenizer, [*short, *fuzzed(tokenizer, 1_000, "ab ")], {})
    tokenizer = train("spaceless", ["日本語\n字字日本\n" * 40], 270)
    yield "spaceless", (tokenizer, [*NASTY, "日本 字", *fuzzed(tokenizer, 300, "日本 字")], {})


def of_users():
    """The same for models in the ways of other projects."""

    def bpe(clean=ascii_only, **options):
        tokenizer = trained("bpe", **options)
        return tokenizer, clean([*NASTY, *fuzzed(tokenizer, 600), *LINES[:500]]), {}

    yield "bpe, unknown pieces", bpe(clean=list)
    yield "bpe, bytes", bpe(byte_fallback=True, remove_extra_whitespaces=False)
    yield "bpe, across words", bpe(split_by_whitespace=False, byte_fallback=True)
    yield "bpe, line ends", bpe(user_defined_symbols=["\n"], remove_extra_whitespaces=False)
    # Never a symbol alone, which gets no dummy prefix.
    symbols = {"user_defined_symbols": ["\n", "<|user|>", "<|us", "▁▁▁▁"], "remove_extra_whitespaces": False}
    yield "bpe, symbols", bpe(clean=lambda texts: [f"x{text}" for text in ascii_only(texts)], **symbols)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {**dict(trained_here(tmp_path_factory.mktemp("models"))), **dict(of_users())}


@pytest.fixture(scope="module")
def answers(models, tmp_path_factory):
    """Major version to what it says of every model."""
    home = tmp_path_factory.mktemp("exported")
    cases = {}
    for number, (name, (tokenizer, texts, arguments)) in enumerate(models.items()):
        folder = home / str(number)
        folder.mkdir()
        for file, content in exported(tokenizer, **arguments).items():
            (folder / file).write_bytes(content)
        cases[name] = {"folder": str(folder), "texts": texts, "spelled": SPELLED}
    (home / "cases.json").write_text(json.dumps(cases))
    assert OTHER_MAJOR.is_dir(), f"install transformers 4 with pip --target {OTHER_MAJOR}"
    processes = []
    for major, path in (("5", ""), ("4", str(OTHER_MAJOR))):  # at once
        with (home / f"{major}.err").open("w") as err:
            command = [sys.executable, "-c", ANSWERS, str(home / "cases.json"), str(home / f"answers{major}.json")]
            environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
            processes.append((major, subprocess.Popen(command, env=environment, stdout=err, stderr=err)))
    found = {}
    for major, process in processes:
        assert process.wait() == 0, (home / f"{major}.err").read_text()[-3_000:]
        said = json.loads((home / f"answers{major}.json").read_text())
        found[said.pop("version").split(".")[0]] = said
    assert set(found) == set(MAJORS)
    return found


@pytest.mark.parametrize("major", MAJORS)
def test_ids_are_those_of_the_model(models, answers, major):
    for name, (tokenizer, texts, _) in models.items():
        said = answers[major][name]
        for text, expected, split, ids in zip(
            texts, tokenizer.encode_many(texts), said["split"], said["ids"], strict=True
        ):
            assert split == expected, (name, text)
            # By default a text that spells a control symbol means it.
            assert ids == expected or CONTROL.search(text), (name, text)
        assert said["same again"], name
        assert said["sizes"][:2] == [tokenizer.vocab_size] * 2


@pytest.mark.parametrize("major", MAJORS)
def test_text_comes_back(models, answers, major):
    for name in ("code", "code, bos", "loops"):
        assert answers[major][name]["decoded"] == models[name][1], name
    for name, (tokenizer, texts, _) in models.items():
        for text, decoded, ids in zip(
            texts, answers[major][name]["decoded"], tokenizer.encode_many(texts), strict=True
        ):
            # To say "unknown", SentencePiece has a character of its own.
            if "\u2047" not in (expected := tokenizer.decode(ids)):
                assert decoded == expected, (name, text)


@pytest.mark.parametrize("major", MAJORS)
def test_special_tokens(models, answers, major):
    for name, (tokenizer, _, arguments) in models.items():
        said, unknown = answers[major][name], tokenizer.encode(SPELLED)
        named = {"mask": tokenizer.mask_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
        assert named.items() <= said["named ids"].items() and unknown
        assert said["named ids"]["bos"] == arguments.get("bos_id")
        tokens = said["tokens"]
        assert tokens[said["named ids"]["unk"]] == "<unk>" and tokens[tokenizer.mask_id] == "<mask>"
    tokenizer, said = models["code"][0], answers[major]["code"]
    mask, eos, unk = tokenizer.mask_id, tokenizer.eos_id, said["named ids"]["unk"]
    assert said["spelled"] == [*tokenizer.encode("if"), mask, *tokenizer.encode(" "), eos, *tokenizer.encode("b"), unk]
    assert said["decoded spelled"] == SPELLED and said["skipped"] == "if b"
    assert said["complete"] == said["ids"] and said["pair"] == tokenizer.encode("if") + tokenizer.encode("else")
    assert said["sizes"] == [900, 900, 64]
    first, second = tokenizer.encode("if"), tokenizer.encode("if a == b:")
    gap = len(second) - len(first)
    for side, padding in (("left", lambda ids, pad: [pad] * gap + ids), ("right", lambda ids, pad: ids + [pad] * gap)):
        ids, mask = said["padded"][side]
        assert ids == [padding(first, tokenizer.pad_id), second]
        assert mask == [padding([1] * len(first), 0), [1] * len(second)]


@pytest.mark.parametrize("major", MAJORS)
def test_bos_begins_every_text(models, answers, major):
    (tokenizer, texts, _), said = models["code, bos"], answers[major]["code, bos"]
    bos = tokenizer.eos_id
    assert said["complete"] == [[bos, *ids] for ids in tokenizer.encode_many(texts)]
    assert said["pair"] == [bos, *tokenizer.encode("if"), bos, *tokenizer.encode("else")]
    assert said["sizes"][2] == 512


def test_files_are_json_and_the_same_each_time(models):
    files = exported(models["code"][0])
    assert sorted(files) == ["special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]
    assert files == exported(models["code"][0]) and all(json.loads(content) for content in files.values())


def proto_of(*pieces, model_type=2):
    """A model by hand; piece types: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused."""
    proto = sentencepiece_model_pb2.ModelProto()
    proto.trainer_spec.model_type = model_type
    for piece, score, type in [("<unk>", 0, 2), ("<mask>", 0, 3), ("<eos>", 0, 3), *pieces]:
        proto.pieces.add(piece=piece, score=score, type=type)
    return proto


def merges_of(*pieces):
    files = tokenizer_files(proto_of(*pieces), mask_id=1, eos_id=2, pad_id=2, model_max_length=8)
    return json.loads(files["tokenizer.json"])["model"]["merges"]


LETTERS = [(letter, -9 - i, 1) for i, letter in enumerate("▁abc")]


def test_every_piece_has_the_one_merge_that_makes_it():
    # abc is only ever a + bc, since bc comes before ab; no merge makes cab, whose end is taken by ab; b is frozen.
    pieces = [
        ("bc", -1, 1),
        ("ab", -2, 1),
        ("abc", -3, 1),
        ("ca", -4, 1),
        ("cab", -5, 1),
        ("aa", -6, 1),
        ("aaa", -7, 1),
    ]
    assert merges_of(*LETTERS, *pieces) == [
        ["b", "c"],
        ["a", "b"],
        ["a", "bc"],
        ["c", "a"],
        ["c", "ab"],
        ["a", "a"],
        ["aa", "a"],
    ]
    assert merges_of(("ab", -1, 1), ("▁a", -2, 1), *LETTERS[:2], ("c", -9, 1), ("b", 0, 4)) == [[" ", "a"]]
    assert merges_of(("aa", -1, 1), ("bb", -1, 1), *LETTERS) == [["a", "a"], ["b", "b"]]


def changed(spec, **fields):
    proto = proto_of(*LETTERS)
    for name, value in fields.items():
        setattr(getattr(proto, spec), name, value)
    return proto


@pytest.mark.parametrize(
    ("proto", "message"),
    [
        (proto_of(*LETTERS, model_type=1), "is of type unigram; only bpe"),
        (proto_of(*LETTERS, model_type=3), "is of type word; only bpe"),
        (proto_of(*LETTERS, model_type=4), "is of type char; only bpe"),
        (changed("normalizer_spec", precompiled_charsmap=b"x"), "changes characters of a text .*only identity"),
        (changed("trainer_spec", treat_whitespace_as_suffix=True), "treat_whitespace_as_suffix"),
        (changed("normalizer_spec", escape_whitespaces=False), "escape_whitespaces"),
        (changed("denormalizer_spec", precompiled_charsmap=b"x"), "denormalisation"),
        (proto_of(*LETTERS, ("ab", -1, 5)), "the unused piece 'ab'"),
        (proto_of(*LETTERS, ("a b", -1, 1)), "the piece 'a b' with a plain space"),
        (proto_of(*LETTERS, ("x a", 0, 3), ("x▁a", -1, 1)), "two pieces that differ only in"),
        (proto_of(*LETTERS, ("ax", -1, 1)), "the piece 'ax' but not its part 'x'"),
        (proto_of(*LETTERS, ("ab", -1, 1), ("bc", -1, 1)), "the pieces 'ab' and 'bc' the same score"),
        (proto_of(*LETTERS, ("aa", -1, 1), ("ab", -1, 1)), "the pieces 'aa' and 'ab' the same score"),
        (
            proto_of(*LETTERS, ("ab", -2, 1), ("cc", -2, 1), ("abc", -1, 1)),
            "the piece 'abc' no lower than its part 'ab'",
        ),
    ],
)
def test_what_transformers_cannot_express_is_refused(proto, message):
    with pytest.raises(UserError, match=f"^the SentencePiece model .*{message}") as error:
        tokenizer_files(proto, mask_id=1, eos_id=2, pad_id=2, model_max_length=8)
    assert "\n" not in str(error.value)


def test_a_model_without_an_unknown_piece_is_refused():
    proto = proto_of(*LETTERS)
    del proto.pieces[0]
    with pytest.raises(UserError, match="no unknown piece"):
        tokenizer_files(proto, mask_id=0, eos_id=1, pad_id=1, model_max_length=8)
