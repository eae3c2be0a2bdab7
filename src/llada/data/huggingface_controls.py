"""Chat templates and control tokens in the files of a Hugging Face tokenizer: read, and written into them."""

import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

from llada import json_files
from llada.data.control_tokens import RESERVED
from llada.data.tokenizer import NAMES, require_rows

TEMPLATE_FILE = "chat_template.jinja"
_CONFIGS = ("special_tokens_map.json", "tokenizer_config.json")
# The published LLaDA: its base model has the rows of dialogues, which its tokenizer has no names for.
_LLADA_VOCABULARY, _LLADA_MASK = 126_464, 126_336
_LLADA_IDS = {"<|start_header_id|>": 126_346, "<|end_header_id|>": 126_347, "<|eot_id|>": 126_348}


def template_of(files: dict[str, str], name: str) -> str | None:
    """The chat template: a file of its own, else a text in tokenizer_config.json, or the default one of several."""
    if TEMPLATE_FILE in files:
        return files[TEMPLATE_FILE]
    found = _read(files, "tokenizer_config.json", name).get("chat_template")
    if isinstance(found, list):
        named = [entry for entry in found if isinstance(entry, dict) and entry.get("name") == "default"]
        found = named[0].get("template") if named else None
    return found if isinstance(found, str) else None


def named_tokens(files: dict[str, str], name: str) -> dict[str, str]:
    """Tokens that the files name for a role: `eos_token` and its like, by these words."""
    named = {}
    for file in _CONFIGS:
        values = _read(files, file, name)
        extra = values.get("extra_special_tokens")
        for role, value in [*values.items(), *(extra.items() if isinstance(extra, dict) else ())]:
            value = value.get("content") if isinstance(value, dict) else value
            if role.endswith("_token") and isinstance(value, str):
                named[role] = value
    return named


def assigned_ids(
    ids: dict[str, int], names: Sequence[str], taken: set[int], mask_id: int | None, vocab_size: int
) -> dict[str, int]:
    """An id for each of `names`: its own in `ids`, those of the published LLaDA, else one that no text uses.

    Free are tokens that their makers reserved, and rows of a model of `vocab_size` ids past the tokenizer's last; not
    those `taken`. UserError where there are too few.
    """
    found = {name: ids[name] for name in names if name in ids}
    text_of = {token: text for text, token in ids.items()}
    free = [token for text, token in sorted(ids.items(), key=lambda item: item[1]) if RESERVED.fullmatch(text)]
    free += range(max(ids.values()) + 1, vocab_size)
    free = [token for token in free if token not in taken and text_of.get(token) not in names]
    if (vocab_size, mask_id) == (_LLADA_VOCABULARY, _LLADA_MASK):
        found |= {name: token for name, token in _LLADA_IDS.items() if name in names and token in free}
        free = [token for token in free if token not in _LLADA_IDS.values()]
    missing = [name for name in dict.fromkeys(names) if name not in found]
    require_rows(names, len(missing), len(free), vocab_size)
    return found | dict(zip(missing, free, strict=False))


def with_controls(
    files: dict[str, str], ids: dict[str, int], wanted: dict[str, int], mask_id: int | None, template: str, name: str
) -> dict[str, str]:
    """The files with `template` and special tokens of the `wanted` ids; `ids` are those they have.

    The format gives added tokens ids in a row, so that rows between the last token and a new one get tokens too.
    """
    last, unused = max(ids.values()), _unused_names({*ids, *wanted})
    tokens = {token: text for text, token in wanted.items()}
    for token in range(last + 1, max([last, *tokens]) + 1):
        if token not in tokens:
            is_mask = token == mask_id and NAMES["mask"][0] not in ids
            tokens[token] = NAMES["mask"][0] if is_mask else next(unused)
    renamed = {text: tokens[token] for text, token in ids.items() if tokens.get(token, text) != text}
    source = _read(files, "tokenizer.json", name)
    _rename(source["model"], renamed)
    added = {entry["id"]: entry for entry in source.get("added_tokens") or ()}
    added |= {token: _entry(token, text) for token, text in tokens.items()}
    source["added_tokens"] = [added[token] for token in sorted(added)]
    made = files | {"tokenizer.json": _text(source), TEMPLATE_FILE: template}
    for file in _CONFIGS:
        if file in files:
            values = _read(files, file, name)
            values.pop("chat_template", None)
            _rename_in_config(values, renamed, tokens)
            made[file] = _text(values)
    return made


def _rename(model: dict[str, Any], renamed: dict[str, str]) -> None:
    if isinstance(model.get("vocab"), dict):
        model["vocab"] = {renamed.get(text, text): token for text, token in model["vocab"].items()}
    elif isinstance(model.get("vocab"), list):  # Unigram
        model["vocab"] = [[renamed.get(text, text), score] for text, score in model["vocab"]]


def _rename_in_config(values: dict[str, Any], renamed: dict[str, str], tokens: dict[int, str]) -> None:
    """Where transformers writes the added tokens down once more."""
    for role in ("additional_special_tokens", "extra_special_tokens"):
        if isinstance(values.get(role), list):
            values[role] = [renamed.get(text, text) if isinstance(text, str) else text for text in values[role]]
    if isinstance(values.get("added_tokens_decoder"), dict):
        for token, text in sorted(tokens.items()):
            entry = _entry(token, text)
            values["added_tokens_decoder"][str(entry.pop("id"))] = entry


def _entry(token: int, content: str) -> dict[str, Any]:
    strips = {"single_word": False, "lstrip": False, "rstrip": False}
    return {"id": token, "content": content, **strips, "normalized": False, "special": True}


def _unused_names(ids: set[str]) -> Iterator[str]:
    return (text for number in itertools.count() if (text := f"<|reserved_{number}|>") not in ids)


def _read(files: dict[str, str], file: str, name: str) -> dict[str, Any]:
    return json_files.parse(files.get(file, "{}"), f"{file} of {name}")


def _text(values: dict[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False, indent=1) + "\n"
