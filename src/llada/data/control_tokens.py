"""Control tokens of dialogues by name, and the built-in chat templates that are made of them.

The templates are Jinja sources, in the folder `templates`:

* plain: for tokenizers trained here. `<|role|>content<|eot_id|>`, after the text's first token where there is one.
* llada: what the published LLaDA was tuned with, to the byte. It spells `<|startoftext|>` out, so that it means the
  same to tokenizers that begin no text so.
"""

import functools
import re
from collections.abc import Container
from pathlib import Path

PLAIN_CONTROLS = ("<|system|>", "<|user|>", "<|assistant|>", "<|eot_id|>")
LLADA_CONTROLS = ("<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
# What fills an answer behind its end, instead of one end token many times (arXiv 2510.03680).
RAINBOW = tuple(f"<|pad_{number}|>" for number in range(7))
BUILT_IN = {"plain": PLAIN_CONTROLS, "llada": LLADA_CONTROLS}
# Names in a template: any, and those of the built-in ones, which a tokenizer may lack that comes with such a template.
NAMED = re.compile(r"<\|\w+\|>")
OF_BUILT_IN = re.compile("|".join(map(re.escape, {*PLAIN_CONTROLS, *LLADA_CONTROLS})))
# Tokens that makers of tokenizers set aside.
RESERVED = re.compile(r"<\|?(reserved|unused|extra)[\w-]*\|?>|\[unused\d+\]")
# How makers of tokenizers spell the end of a turn.
ENDS_OF_TURN = ("<|eot_id|>", "<eot>", "<|im_end|>", "<end_of_turn>", "<|end|>")


@functools.cache
def builtin(name: str) -> str:
    """The source of a built-in template; `BUILT_IN` has their names, and the control tokens that each is made of."""
    if name not in BUILT_IN:
        raise KeyError(name)
    return (Path(__file__).with_name("templates") / f"{name}.jinja").read_text(encoding="utf-8")


def end_of_turn(names: Container[str], template: str | None) -> str | None:
    """Which of a tokenizer's tokens ends a turn: one that the template spells, else one of a usual name, else None."""
    known = [name for name in ENDS_OF_TURN if name in names]
    return next((name for name in known if name in (template or "")), next(iter(known), None))
