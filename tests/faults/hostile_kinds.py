"""Kinds of hostile files, drawn from a seed: each spoils a copy of a model in a directory and says how to open it.

What they return: what was done, and the call that opens it.
"""

import copy
import json
import math
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Opened = tuple[str, Callable[[], object]]
SHARD, INDEX = "model-00001-of-00002.safetensors", "model.safetensors.index.json"
JSON = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", INDEX)
VALUES = (
    *(
        None,
        True,
        -1,
        0,
        1,
        2**31,
        2**63,
        10**12,
        10**30,
        1e308,
        math.nan,
        math.inf,
        "",
        "x",
        "\0",
        "../x",
        "/etc/passwd",
    ),
    *([], {}, [[]], {"a": {}}, ["x"] * 3, "a" * 100_000, [0] * 100_000, {"__class__": "os.system"}, "{{ 1 }}"),
)


def importing(place: Path) -> Callable[[], object]:
    """All of `llada import`."""

    def call() -> None:
        from llada.config import from_config_dict
        from llada.interop import importing

        source = importing.open_source(place / "hf")
        config = from_config_dict(source.config)
        if sum(values.size for _, _, values in source.pieces(config)) > 1 << 20:
            raise AssertionError("more parameters than the files hold")
        source.tokenizer.decode(source.tokenizer.encode("def f(x): \u2581 \u00e9 <|eot_id|>"))

    return call


def damage(rng: random.Random, content: bytes, first: int) -> tuple[str, bytes]:
    """Bytes changed, cut, repeated or put in; most of them among the `first`."""
    data = bytearray(content)
    how = rng.choice(("byte", "bits", "cut", "insert", "overwrite", "repeat"))
    at = rng.randrange(min(len(data), rng.choice((first, len(data)))))
    if how == "byte":
        data[at] = rng.randrange(256)
    elif how == "bits":
        for place in rng.choices(range(len(data)), k=rng.randrange(1, 20)):
            data[place] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del data[at:]
    elif how == "insert":
        data[at:at] = rng.randbytes(rng.randrange(1, 64))
    elif how == "overwrite":
        word = rng.choice((b"99999999999", b"-1234567", b"[[[[[[[[", b"nullnull", b'"../../x', b"\xff" * 8, bytes(8)))
        data[at : at + len(word)] = word
    else:
        data[at:at] = bytes(data[at : at + rng.randrange(1, 1_000)])
    return f"{how} at {at}", bytes(data)


def safetensors_bytes(rng: random.Random, place: Path, made) -> Opened:
    """Damage in a shard, most of it in the header."""
    path = place / "hf" / SHARD
    how, data = damage(rng, path.read_bytes(), 800)
    path.write_bytes(data)
    return how, importing(place)


def safetensors_header(rng: random.Random, place: Path, made) -> Opened:
    """A header that is JSON, and says what cannot be."""
    path = place / "hf" / SHARD
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    what = change(rng, header)
    text = json.dumps(header).encode()
    length = rng.choice((len(text),) * 6 + (0, 7, 2**63, 2**40, len(text) + 1))
    path.write_bytes(length.to_bytes(8, "little") + text + content[8 + size :])
    return f"{what}, length {length}", importing(place)


def change(rng: random.Random, tree: Any) -> str:
    """Put a hostile value somewhere in a tree of JSON."""
    where = []
    while True:
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        key = rng.choice(keys)
        where.append(str(key)[:40])
        below = tree[key]
        if not (isinstance(below, dict | list) and below) or rng.randrange(4) == 0:
            break
        tree = below
    how = rng.choice(("set", "set", "set", "delete", "double"))
    if how == "delete" or (how == "double" and isinstance(tree, dict)):
        value = tree.pop(key)
        if how == "double":
            tree[f"{key} "] = value
    elif how == "double":
        tree.append(below)
    else:
        tree[key] = copy.deepcopy(rng.choice(VALUES))
    return f"{how} {'.'.join(where)} {str(tree[key])[:40] if how == 'set' else ''}"


def json_values(rng: random.Random, place: Path, made) -> Opened:
    """Any JSON file of a model with a value that it should not have."""
    path = place / "hf" / rng.choice([name for name in JSON if (place / "hf" / name).exists()])
    tree = json.loads(path.read_text())
    what = "; ".join(change(rng, tree) for _ in range(rng.randrange(1, 4)) if tree)
    path.write_text(json.dumps(tree))
    return f"{path.name}: {what}", importing(place)


def json_bytes(rng: random.Random, place: Path, made) -> Opened:
    """Any JSON file, damaged."""
    path = place / "hf" / rng.choice([name for name in JSON if (place / "hf" / name).exists()])
    how, data = damage(rng, path.read_bytes(), 2_000)
    path.write_bytes(rng.choice((data,) * 8 + (b"[" * 100_000, b"", b"\xff\xfe", b'{"a":' * 50_000)))
    return f"{path.name}: {how}", importing(place)


def sentencepiece_bytes(rng: random.Random, place: Path, made) -> Opened:
    """A tokenizer.model, damaged."""

    def call() -> None:
        from llada.data import tokenizer_files

        found = tokenizer_files.load(place / "tokenizer.model")
        found.decode(found.encode("def f(x): \u2581 \u00e9"))
        tokenizer_files.require_exportable(found, "--config.data.tokenizer")

    how, data = damage(rng, made.tokenizer, 3_000)
    (place / "tokenizer.model").write_bytes(data)
    return how, call


def out_of_the_directory(rng: random.Random, place: Path, made) -> Opened:
    """Names of files that lead elsewhere, to weights that would fit."""
    target = place.parent / "outside" / SHARD
    if not target.exists():
        shutil.copy(place / "hf" / SHARD, target)
    names = [f"../../outside/{SHARD}", str(target), f"./../../outside/{SHARD}", f"x/../../../outside/{SHARD}"]
    names += [f"..\\{SHARD}", f"{SHARD}\0", f"file://{target}", "..", ".", "", f"hf/../{SHARD}", f"~/{SHARD}", "\n"]
    name = rng.choice(names)
    path = place / "hf" / INDEX
    index = json.loads(path.read_text())
    moved = [tensor for tensor, file in index["weight_map"].items() if file == SHARD]
    index["weight_map"] |= dict.fromkeys(moved, name)
    path.write_text(json.dumps(index))
    (place / "hf" / SHARD).unlink()
    return repr(name[-40:]), importing(place)


class Canary:
    """Unpickling it writes a file where none may be."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def pickles(rng: random.Random, place: Path, made) -> Opened:
    """Code where weights, rows, a tokenizer or JSON are expected."""
    canary, hf = Canary(place.parent / "outside" / "unpickled"), place / "hf"
    content = pickle.dumps(canary, rng.randrange(6))
    where = rng.choice(("bin", "shard", "npy", "tokenizer", "json", "python"))
    if where == "npy":
        return f"{where} of objects", rows_of(
            place, np.array([Canary(place.parent / "outside" / "unpickled")]), content
        )
    if where == "bin":
        for path in hf.glob("*.safetensors*"):
            path.unlink()
        (hf / rng.choice(("pytorch_model.bin", "model.pt", "model.ckpt"))).write_bytes(content)
    elif where == "python":
        values = json.loads((hf / "config.json").read_text())
        values["auto_map"] = {"AutoConfig": "canary.C", "AutoModelForCausalLM": "canary.C", "AutoTokenizer": "canary.C"}
        (hf / "config.json").write_text(json.dumps(values))
        for path in (*hf.glob("*.py"), hf / "canary.py"):
            path.write_text(f"open({str(place.parent / 'outside' / 'run')!r}, 'w')\n")
    else:
        names = {"shard": SHARD, "tokenizer": "tokenizer.json", "json": rng.choice(JSON[:2])}
        (hf / names[where]).write_bytes(content)
    return where, importing(place)


def rows_of(place: Path, objects: np.ndarray, content: bytes) -> Callable[[], object]:
    """A corpus whose rows are objects; or a file of rows that is a pickle."""
    np.save(place / "train.npy", objects, allow_pickle=True)
    (place / "holdout.npy").write_bytes(content)

    def call() -> None:
        from llada.data import rows

        rows.open_rows(place / ("train.npy" if len(content) % 2 else "holdout.npy"))

    return call


TEMPLATES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ self.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.system('touch OUT') }}",
    "{% for i in range(10**9) %}x{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}",
    "{{ 'x' * 10**10 }}",
    "{{ ('%' ~ '9' * 9 ~ 'd') % 1 }}",
    "{{ 9 ** 9 ** 9 }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as o %}{{ o }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ messages | map(attribute='__class__') | list }}",
    "{{ lipsum.__globals__['os'].popen('touch OUT').read() }}",
    "{{ raise_exception('no') }}",
    "{" * 10_000,
    "{{ (" * 3_000 + ")}}" * 10,
)


def templates(rng: random.Random, place: Path, made) -> Opened:
    """A chat template that would run code, never end, or fill the memory."""

    def call() -> None:
        from llada.data import sentencepiece_tokenizer
        from llada.data.chat_template import ChatTemplate

        tokenizer = sentencepiece_tokenizer.SentencePieceTokenizer(made.tokenizer, "it")
        ChatTemplate(tokenizer, source).turns([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])

    source = rng.choice(TEMPLATES).replace("OUT", str(place.parent / "outside" / "rendered"))
    if rng.randrange(2):
        source = "{% for m in messages %}{{ m.content }}" + source + "{% endfor %}"
    return repr(source[:60]), call


KINDS: tuple[Callable[[random.Random, Path, Any], Opened], ...] = (
    *(safetensors_bytes, safetensors_header) * 3,
    *(json_values, json_bytes) * 3,
    *(sentencepiece_bytes,) * 4,
    *(out_of_the_directory, pickles, pickles, templates),
)
