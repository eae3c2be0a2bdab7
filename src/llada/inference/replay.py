"""Showing the reverse process: how masks become words, live in a terminal or replayed by a page of HTML.

Steps count from 0 as in the sampler's `step_BL`, with -1 for the context; people are shown them from 1. What is drawn
is text of a model, so nothing in it may act: control characters, terminal escapes, rich's markup and HTML are all shown
as characters, or as U+FFFD.
Shapes: L canvas positions.
"""

import functools
import importlib.resources
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.style import Style
from rich.text import Text

from llada.data.tokenizer import Tokenizer
from llada.errors import UserError
from llada.files import write_atomically
from llada.paths import writable_target

# Violet, blue, teal, amber: ordered as viridis is, but with its ends moved to where both backgrounds give contrast.
_ON_ANY = ("#8a63d2", "#2f86c9", "#1a9c80", "#b98516")  # at least 3:1 on black and on white
_ON_LIGHT = ("#6b3fb8", "#1f63a8", "#0f766a", "#9a5b00")
_ON_DARK = ("#b79cf0", "#6fb1f2", "#4fcfb0", "#f0c050")
_PAGE_SHADES = 32

_MASK_GLYPH, _MASK_STYLE = "░", Style(dim=True)
_SECONDS_BETWEEN_FRAMES = 0.05
_NO_TOKEN = -1

# What could steer a terminal or turn a line around: controls but tab and newline, line separators, direction overrides.
_STEERING = [*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_VISIBLE = dict.fromkeys((code for code in _STEERING if chr(code) not in "\t\n"), "\ufffd")


def pieces(tokenizer: Tokenizer, tokens_L: Iterable[int]) -> list[str]:
    """Return the text of every position; those of text, joined, are `tokenizer.decode` of their ids.

    A character made of byte tokens stands at its last byte, after empty strings; a byte of no complete character is
    U+FFFD. End-of-text is "∎", other control tokens are their names: "<mask>". Characters are not yet safe to display.
    """
    return [piece for start, end, text in _spans(tokenizer, tokens_L) for piece in [*[""] * (end - start - 1), text]]


def displayable(text: str) -> str:
    """The text with all characters that could steer a terminal replaced by U+FFFD; tabs and newlines stay."""
    return text.translate(_VISIBLE)


class _State(NamedTuple):
    """The canvas after `step`; see `Watch.__call__`."""

    tokens_L: np.ndarray
    step_L: np.ndarray
    step: int


class Watch:
    """Draws the canvas while it is filled: `with Watch(...) as watch`, then `watch(tokens_L, step_L, step)` a step.

    Masks are dim blocks, one a token; filled tokens are coloured by their step, those of the newest step reversed; the
    footer counts and is the legend. At most 20 frames a second; the last state is always drawn. A text higher than the
    terminal is cropped: the view stays while the first of the newest tokens is in it, else centres on that one; on
    leaving, all of the text is printed. Where the console is no terminal, one plain frame at the end is all that is
    printed.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        mask_id: int | None,
        total_steps: int,
        console: Console | None = None,
        leave: bool = True,
    ):
        """`mask_id` marks open positions, None where none are; `console` is standard output if not given.

        Without `leave` the drawing disappears at the end.
        """
        mask_id = _NO_TOKEN if mask_id is None else mask_id
        self._tokenizer, self._mask_id, self._total_steps = tokenizer, mask_id, total_steps
        self._console = console or Console()
        self._moves = self._console.is_terminal and not self._console.is_dumb_terminal
        self._leave = leave
        self._live = Live(console=self._console, auto_refresh=False, vertical_overflow="crop", transient=not leave)
        self._state: _State | None = None
        self._drawn_at = -_SECONDS_BETWEEN_FRAMES
        self._top = 0

    def __enter__(self) -> "Watch":
        """Start drawing."""
        if self._moves:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Draw the last state, uncropped, and leave it there; also after Ctrl-C or an error."""
        try:
            if not self._leave:
                pass
            elif self._state and self._moves:
                self._live.update(self._frame(self._state, cropped=False))
            elif self._state:
                # Not through rich, which would write tabs as spaces.
                self._console.file.write(self._plain(self._state) + "\n")
                self._console.file.flush()
        finally:
            self._live.stop()

    def __call__(self, tokens_L: np.ndarray, step_L: np.ndarray, step: int) -> None:
        """Take the canvas after `step`, counted as in `step_L`; -1 is the canvas before the first."""
        self._state = _State(np.array(tokens_L), np.array(step_L), int(step))
        now = time.monotonic()
        if self._live.is_started and now - self._drawn_at >= _SECONDS_BETWEEN_FRAMES:
            self._drawn_at = now
            self._live.update(self._frame(self._state, cropped=True), refresh=True)

    def _frame(self, state: _State, cropped: bool) -> Group:
        width, height = self._console.width, max(1, self._console.height - 2)
        text = Text()
        for piece, token, filled in zip(
            pieces(self._tokenizer, state.tokens_L), state.tokens_L, state.step_L, strict=True
        ):
            if token == self._mask_id:
                text.append(_MASK_GLYPH, _MASK_STYLE)
            else:
                text.append(displayable(piece), self._style(filled, newest=filled == state.step))
        lines = [*text.wrap(self._console, width, overflow="fold")]
        view = ""
        if cropped and len(lines) > height:
            newest = self._style(state.step, newest=True)
            at = next((i for i, line in enumerate(lines) if any(span.style == newest for span in line.spans)), None)
            if at is not None and not self._top <= at < self._top + height:
                self._top = at - height // 2
            self._top = max(0, min(self._top, len(lines) - height))
            view = f" · lines {self._top + 1}-{self._top + height} of {len(lines)}"
            lines = lines[self._top : self._top + height]
        return Group(*lines, self._footer(state, view, width))

    def _footer(self, state: _State, view: str, width: int) -> Text:
        footer = Text(self._counts(state) + view, no_wrap=True, overflow="crop")
        cells = min(24, width - footer.cell_len - len(" · early  late"))
        if cells >= 4:
            done = round(cells * (state.step + 1) / self._total_steps)
            footer.append(" · early ")
            for i in range(cells):
                footer.append("━" if i < done else "─", Style(color=_shade(_ON_ANY, i / (cells - 1))))
            footer.append(" late")
        return footer

    def _counts(self, state: _State) -> str:
        filled = int(np.sum(state.step_L >= 0))
        total = filled + int(np.sum(state.tokens_L == self._mask_id))
        return f"step {state.step + 1}/{self._total_steps} · {filled} of {total} tokens"

    def _plain(self, state: _State) -> str:
        shown = zip(pieces(self._tokenizer, state.tokens_L), state.tokens_L, strict=True)
        text = "".join(_MASK_GLYPH if token == self._mask_id else displayable(piece) for piece, token in shown)
        return f"{text}\n{self._counts(state)}"

    def _style(self, filled: int, newest: bool) -> Style:
        if filled < 0:
            return Style()
        colour = _shade(_ON_ANY, filled / max(1, self._total_steps - 1))
        return Style(color=colour, bold=True, reverse=True) if newest else Style(color=colour)


def paced(watch: Callable[..., None], steps: int, seconds: float) -> Callable[..., None]:
    """`watch`, waiting after each step where all of them would take less than `seconds`: faster than eyes follow."""
    start = time.monotonic()

    def observe(tokens_L, step_L, step):
        watch(tokens_L, step_L, step)
        nonlocal start
        start = time.monotonic() if step == 0 else start
        time.sleep(max(0.0, start + (step + 1) * seconds / steps - time.monotonic()))

    return observe


def write_html(
    path: str | Path,
    tokenizer: Tokenizer,
    tokens_L: Sequence[int] | np.ndarray,
    step_L: Sequence[int] | np.ndarray,
    mask_id: int | None,
    facts: dict[str, str],
) -> None:
    """Write a self-contained page that replays how the canvas `tokens_L` was filled; `facts` is its table.

    Positions that hold `mask_id` stay masked. UserError if `path` cannot be written, DiskError if the disk is full.
    """
    target = writable_target(path, "--html")
    mask_id = _NO_TOKEN if mask_id is None else mask_id
    units = [
        [displayable(text), [int(i) for i in tokens_L[start:end]], [int(s) for s in step_L[start:end]]]
        for start, end, text in _spans(tokenizer, tokens_L)
    ]
    # Steps are one more than the last index: position k of the slider shows what k steps have filled.
    data = {"units": units, "mask": int(mask_id), "steps": int(max(step_L, default=-1)) + 1, "facts": [*facts.items()]}
    # ASCII without "<" can neither end the script element nor open a comment in it.
    encoded = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    template = importlib.resources.files(__package__).joinpath("replay.html").read_text(encoding="utf-8")
    page = template.replace("/*SHADES*/", _shade_rules()).replace("DATA", encoded)
    try:
        write_atomically(target, page.encode())
    except OSError as error:
        raise UserError(f"--html={path} cannot be written: {error.strerror}; give a file to create") from error


def _spans(tokenizer: Tokenizer, tokens_L: Iterable[int]) -> Iterator[tuple[int, int, str]]:
    """Yield (start, end, text): one span per token, but one for all the tokens that share a character."""
    ids = [int(token) for token in tokens_L]
    bytes_L = [tokenizer.token_bytes(token) for token in ids]
    start = 0
    while start < len(ids):
        if bytes_L[start]:
            end, text = _character(bytes_L, start)
            if start == 0 and end == 1 and "\ufffd" not in text:
                # Models of other makers may drop the space before the first word; only decoding knows.
                text = tokenizer.decode(ids[:1])
        else:
            name = tokenizer.piece(ids[start]).strip("<>[]|")
            end, text = start + 1, "∎" if ids[start] == tokenizer.eos_id else f"<{name}>"
        yield start, end, text
        start = end


def _character(bytes_L: list[bytes], start: int) -> tuple[int, str]:
    """The end and text of the fewest tokens from `start` on that end with a UTF-8 character, if it is all there."""
    for end in range(start + 1, min(start + 4, len(bytes_L)) + 1):
        if not bytes_L[end - 1]:
            break
        try:
            return end, b"".join(bytes_L[start:end]).decode()
        except UnicodeDecodeError:
            continue
    return start + 1, bytes_L[start].decode(errors="replace")


@functools.cache
def _shade(stops: tuple[str, ...], fraction: float) -> str:
    """The colour at `fraction` of the way from the first stop to the last, linear in between; "#rrggbb"."""
    position = min(max(fraction, 0.0), 1.0) * (len(stops) - 1)
    left = min(int(position), len(stops) - 2)
    channels = zip(bytes.fromhex(stops[left][1:]), bytes.fromhex(stops[left + 1][1:]), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * (position - left)):02x}" for a, b in channels)


def shades() -> list[tuple[str, str]]:
    """A page's colours for what is written early to late, each for light and for dark backgrounds: "#rrggbb"."""
    fractions = [i / (_PAGE_SHADES - 1) for i in range(_PAGE_SHADES)]
    return [(_shade(_ON_LIGHT, fraction), _shade(_ON_DARK, fraction)) for fraction in fractions]


def _shade_rules() -> str:
    """CSS of the page's shades, classes s0 (early) to s31 (late), and of its legend, for both colour schemes."""

    def rules(stops, colours):
        ramp = f":root {{ --ramp: linear-gradient(to right, {', '.join(stops)}) }}"
        return " ".join([ramp, *(f".s{i} {{ color: {colour} }}" for i, colour in enumerate(colours))])

    light, dark = zip(*shades(), strict=True)
    return f"{rules(_ON_LIGHT, light)}\n@media (prefers-color-scheme: dark) {{ {rules(_ON_DARK, dark)} }}"
