"""Documents: where the text comes from, exactly as stored, in an order that depends only on file names.

To add a source: a file with a function like `patterns.documents`, a line in SOURCES, and its name in the description of
`data.source` in config.py. Which documents are held out is `holdout.py`; tokens come later, in `prepare.py`.
"""

import os
from collections.abc import Callable, Iterator

from llada.data import dialogues, packages, patterns, standard_library
from llada.errors import UserError
from llada.paths import user_path

Remark = Callable[[str], None]

# Prefix -> a function of (argument, text_key, remark, flag): the texts, and the error's words where there are none.
SOURCES: dict[str, Callable[[str, str, Remark, str], tuple[Iterator[str], str]]] = {
    "stdlib": standard_library.documents,
    "packages": packages.documents,
    "text:": patterns.documents,
    dialogues.PREFIX: dialogues.documents,
}
_ALLOWED = (
    "allowed: stdlib, packages, text:GLOB[,GLOB ...], dialogues:GLOB[,GLOB ...], or a file or directory that exists"
)


def documents(
    source: str, text_key: str = "text", remark: Remark | None = None, flag: str = "--config.data.source"
) -> Iterator[str]:
    """Yield the text of every document of `source`, never empty.

      "stdlib"                every .py file of the running Python's standard library, without its tests
      "packages"              every .py file of the packages that are installed beside llada
      "text:GLOB[,GLOB ...]"  files matching one of the patterns: see patterns.py and text_files.py
      "dialogues:GLOB[,...]"  the contents of each dialogue: see dialogues.py
      PATH                    the same as "text:PATH", for a path that exists

    `text_key` is the field or column that holds a text; `remark` is called with a line on what was left out; `flag` is
    what errors call the source. UserError for an unknown source, one without text, and files that cannot be read, each
    when its turn comes.
    """
    name, colon, argument = source.partition(":")
    if not (name + colon in SOURCES and (argument or not colon)):
        name, colon, argument = "text", ":", _existing(source, flag)
    texts, reason = SOURCES[name + colon](argument, text_key, remark or (lambda line: None), flag)
    return _refuse_empty(texts, reason)


def _existing(source: str, flag: str) -> str:
    """A path that exists. UserError for any other source."""
    if source and os.path.lexists(user_path(source, flag)):
        return source
    if source.startswith("hf:"):
        raise UserError(
            f"{flag}={source}: data sets are not fetched by name; save it as Parquet or JSON lines; {_ALLOWED}"
        )
    raise UserError(f"unknown source {source!r}; {_ALLOWED}; set {flag}")


def _refuse_empty(texts: Iterator[str], reason: str) -> Iterator[str]:
    any_text = False
    for text in texts:
        if text:
            any_text = True
            yield text
    if not any_text:
        raise UserError(reason)
