"""The replay: every position has its text and none is lost, the last state is always shown, and no text can act."""

import configparser
import html.parser
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from rich.console import Console

from llada.data.sentencepiece_tokenizer import SentencePieceTokenizer
from llada.data.tokenizer_training import train_tokenizer
from llada.errors import UserError
from llada.inference import replay

TEXTS = [
    "the cat sees the dog .\n",
    "\tfor i in range(3):\r\n\t\tpass  \n\n",
    "日本語 русский e\u0301 é 🎉👩\u200d👧 \U0010ffff\ufffd",
    " \u2581\u2581a <0x41> [bold]x[/bold] [MASK] <mask> ∎",
    "\x1b[2J\x1b]0;owned\x07 \x9b31m \x00 \u202eabc\u2028",
    "</script><b onclick='x()'>&amp;<!-- <script> \u2028 DATA /*SHADES*/",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> SentencePieceTokenizer:
    return train_tokenizer(["the cat sees the dog .\n" * 20], 290, tmp_path_factory.mktemp("tokenizer") / "t.model")


@pytest.fixture(autouse=True)
def ordinary_terminal(monkeypatch):
    """Continuous integration may call its own dumb, or call every pipe a terminal."""
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=80, height=24, color_system="truecolor")


def canvas(tokenizer, prompt, answer, steps=4):
    """A prompt and its answer, filled from right to left."""
    given, new = tokenizer.encode(prompt), [*tokenizer.encode(answer), tokenizer.eos_id]
    step_L = np.array([-1] * len(given) + [(len(new) - 1 - i) * steps // len(new) for i in range(len(new))], np.int32)
    return np.array(given + new, np.int32), step_L


def after(tokenizer, tokens_L, step_L, step):
    """The same canvas as it was after `step`."""
    later_L = step_L > step
    return np.where(later_L, tokenizer.mask_id, tokens_L), np.where(later_L, -1, step_L), step


def watch(tokenizer, console, states, steps=4):
    with replay.Watch(tokenizer, tokenizer.mask_id, steps, console) as drawn:
        for state in states:
            drawn(*state)
    return console.file.getvalue()


def without_codes(drawn):
    return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", drawn)


@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_of_a_text_are_the_text(tokenizer, text):
    ids = tokenizer.encode(text)
    parts = replay.pieces(tokenizer, np.array(ids, np.int32))
    assert len(parts) == len(ids) and "".join(parts) == text
    parts = replay.pieces(tokenizer, [tokenizer.pad_id, *ids, tokenizer.eos_id, tokenizer.mask_id])
    assert (parts[0], "".join(parts[1:-2]), *parts[-2:]) == ("<pad>", text, "∎", "<mask>")


def test_random_bytes_read_as_the_tokenizer_decodes_them(tokenizer):
    """Characters broken, overlong, swapped or cut by a control token included."""
    rng = np.random.default_rng(0)
    byte_ids = [i for i in range(tokenizer.vocab_size) if tokenizer.piece(i).startswith("<0x")]
    likely = [tokenizer.encode("é")[0], *tokenizer.encode("🎉"), *tokenizer.encode("語"), *tokenizer.encode("the")]
    for _ in range(500):
        ids = rng.choice(likely if rng.random() < 0.7 else byte_ids, rng.integers(1, 12)).tolist()
        ids.insert(int(rng.integers(len(ids) + 1)), tokenizer.pad_id)
        assert "".join(replay.pieces(tokenizer, ids)).replace("<pad>", "") == tokenizer.decode(ids)


def test_a_character_of_bytes_stands_at_its_last_byte_once_all_are_known(tokenizer):
    emoji, mask = tokenizer.encode("🎉"), tokenizer.mask_id
    assert len(emoji) == 4
    assert replay.pieces(tokenizer, emoji) == ["", "", "", "🎉"]
    assert replay.pieces(tokenizer, [*emoji[:3], mask]) == ["\ufffd"] * 3 + ["<mask>"]
    assert replay.pieces(tokenizer, [mask, *emoji[1:]]) == ["<mask>"] + ["\ufffd"] * 3


def test_a_model_of_another_maker_that_hides_the_first_space_and_has_no_bytes_but_a_word_like_one():
    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sees the dog"] * 20), model_writer=writer, vocab_size=24, model_type="bpe",
        user_defined_symbols=["<0x41>"], control_symbols=["[MASK]"], num_threads=1, minloglevel=2,
    )  # fmt: skip
    other = SentencePieceTokenizer(writer.getvalue(), "other")
    ids = other.encode("the cat<0x41> sees")
    assert other.piece(ids[0]).startswith("\u2581") and "<0x41>" in [other.piece(token) for token in ids]
    assert "".join(replay.pieces(other, ids)) == "the cat<0x41> sees"
    assert replay.pieces(other, [other.mask_id]) == ["<MASK>"]


def test_every_state_reaches_the_terminal_and_no_text_acts_there(tokenizer, terminal, monkeypatch):
    monkeypatch.setattr(replay, "_SECONDS_BETWEEN_FRAMES", 0)
    filled = canvas(tokenizer, TEXTS[3], TEXTS[4] + TEXTS[5])
    drawn = watch(tokenizer, terminal, [after(tokenizer, *filled, s) for s in range(-1, 4)])
    for s in range(5):
        assert f"step {s}/4" in drawn
    for harmful in ("\x1b[2J\x1b]0", "\x1b]", "\x07", "\x9b", "\x00", "\u202e"):
        assert harmful not in drawn
    assert "[bold]x[/bold] [MASK] <mask>" in without_codes(drawn) and "</script><b onclick" in without_codes(drawn)


def test_frames_are_held_back_but_never_the_last_one(tokenizer, terminal, monkeypatch):
    monkeypatch.setattr(replay, "_SECONDS_BETWEEN_FRAMES", 3600)
    filled = canvas(tokenizer, "the cat", " sees the dog .", 4)
    drawn = watch(tokenizer, terminal, [after(tokenizer, *filled, s) for s in range(4)])
    assert "step 1/4" in drawn and "step 2/4" not in drawn and "step 3/4" not in drawn
    assert drawn.index("step 4/4") > drawn.index("step 1/4")


def test_a_text_higher_than_the_terminal_is_shown_around_the_newest_tokens_and_whole_at_the_end(tokenizer, monkeypatch):
    monkeypatch.setattr(replay, "_SECONDS_BETWEEN_FRAMES", 0)
    lines = [f"line {i:02} ." for i in range(60)]
    tokens_L, step_L = canvas(tokenizer, "", "\n".join(lines), 60)
    filled = tokens_L, step_L[::-1]  # from left to right
    console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=80, height=12)
    with replay.Watch(tokenizer, tokenizer.mask_id, 60, console) as drawn:
        for step in range(60):
            console.file.seek(console.file.truncate(0))
            drawn(*after(tokenizer, *filled, step))
            frame = console.file.getvalue()
            assert frame.count("\n") <= 10 and "\x1b[1;7" in frame  # bold and reversed: the newest are in view
        frame = without_codes(frame)
        assert "line 59" in frame and "line 40" not in frame and "lines 51-60 of 60" in frame
        console.file.seek(console.file.truncate(0))
    assert [line for line in lines if line not in without_codes(console.file.getvalue())] == []


def test_without_a_terminal_one_plain_frame_is_printed_at_the_end(tokenizer):
    text = "the\tcat\n\n" + "sees the dog . " * 30
    filled = canvas(tokenizer, "the ", text)
    states = [after(tokenizer, *filled, s) for s in range(4)]
    assert watch(tokenizer, Console(file=io.StringIO(), width=80), states) == (
        f"the {text}∎\nstep 4/4 · {np.sum(filled[1] >= 0)} of {np.sum(filled[1] >= 0)} tokens\n"
    )
    half = watch(tokenizer, Console(file=io.StringIO(), width=80), states[:2])
    assert half.count("░") == np.sum(filled[1] > 1) and "step 2/4" in half
    assert watch(tokenizer, Console(file=io.StringIO()), []) == ""


class _Page(html.parser.HTMLParser):
    """Collects the elements and the text of each script."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.scripts = [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "script":
            self.scripts.append(data)


def test_the_page_holds_the_sample_and_nothing_in_it_is_markup(tokenizer, tmp_path):
    tokens_L, step_L = canvas(tokenizer, TEXTS[2], TEXTS[5] + TEXTS[4])
    tokens_L[-1], step_L[-1] = tokenizer.mask_id, -1  # one that was never filled
    facts = {"10": "the order of facts", "2": TEXTS[5]}
    replay.write_html(tmp_path / "new" / "a.html", tokenizer, tokens_L, step_L, tokenizer.mask_id, facts)
    source = (tmp_path / "new" / "a.html").read_text(encoding="utf-8")
    page = _Page(source)
    replay.write_html(tmp_path / "b.html", tokenizer, tokens_L[:0], step_L[:0], tokenizer.mask_id, {})
    assert page.tags == _Page((tmp_path / "b.html").read_text(encoding="utf-8")).tags
    at = [attributes.get("id") for tag, attributes in page.tags if tag == "script"].index("data")
    data = json.loads(page.scripts[at])
    assert np.concatenate([ids for _, ids, _ in data["units"]]).tolist() == tokens_L.tolist()
    assert np.concatenate([steps for _, _, steps in data["units"]]).tolist() == step_L.tolist()
    assert data["facts"] == [["10", "the order of facts"], ["2", TEXTS[5]]]
    assert (data["mask"], data["steps"]) == (tokenizer.mask_id, 4)
    texts = [text for text, _, _ in data["units"]]
    assert "".join(texts).startswith(TEXTS[2] + "</script><b onclick='x()'>") and "🎉" in texts
    assert not set("\x1b\x07\x9b\x00\u202e\u2028") & set("".join(texts))
    assert not [a for _, attributes in page.tags for a in attributes if a in ("src", "href")] and "url(" not in source


def test_every_file_that_is_no_code_is_installed():
    """The page is read as package data: a wheel holds what setup.cfg lists and nothing else."""
    root = Path(__file__).resolve().parents[2]
    config = configparser.ConfigParser()
    config.read(root / "setup.cfg")
    package = root / "src" / "llada"
    files = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    listed = config["options.package_data"]["llada"].split()
    assert files == {path for pattern in listed for path in package.glob(pattern)}


def test_a_path_that_cannot_be_written_is_one_line_naming_it(tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "a.html", tmp_path):
        with pytest.raises(UserError, match=f"^--html={path} (cannot be written:|is a directory;) [^\n]+$"):
            replay.write_html(path, tokenizer, np.zeros(0, int), np.zeros(0, int), tokenizer.mask_id, {})
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert not list(tmp_path.parent.glob(f"{tmp_path.name}.tmp"))
