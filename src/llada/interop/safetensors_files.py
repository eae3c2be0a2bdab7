"""Safetensors shards and their index: written tensor by tensor, read slice by slice; every file is checked first.

The library checks what is read. The data itself bypasses it both ways, because it would hold an entire shard, or a copy
of each slice, in memory; the format is eight bytes of length, a JSON header and the data. No other weight format is
read: pickles run code.
"""

import json
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from llada import json_files
from llada.errors import UserError, in_brief
from llada.interop.layout import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"float32": (np.dtype(np.float32), "F32"), "bfloat16": (np.dtype(ml_dtypes.bfloat16), "BF16")}
_READABLE = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class Shard(NamedTuple):
    """One file and what it holds, in order."""

    name: str
    tensors: list[Tensor]


def plan(tensors: list[Tensor], dtype: str, shard_bytes: int) -> list[Shard]:
    """Cut the list into files of at most `shard_bytes` of data (a larger tensor gets its own), in order."""
    itemsize = DTYPES[dtype][0].itemsize
    groups: list[list[Tensor]] = [[]]
    used = 0
    for tensor in tensors:
        size = tensor.size * itemsize
        if groups[-1] and used + size > shard_bytes:
            groups.append([])
            used = 0
        groups[-1].append(tensor)
        used += size
    count = len(groups)
    return [Shard(f"model-{i:05d}-of-{count:05d}.safetensors", group) for i, group in enumerate(groups, 1)]


def write_shard(directory: Path, shard: Shard, dtype: str, pieces: Iterable[np.ndarray]) -> int:
    """Write one file, return the size of its data; `pieces` are that of its tensors in order, in contiguous arrays."""
    numpy_dtype, code = DTYPES[dtype]
    header: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in shard.tensors:
        start, end = end, end + tensor.size * numpy_dtype.itemsize
        header[tensor.name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # data aligned as the library aligns it
    written = 0
    with (directory / shard.name).open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for piece in pieces:
            written += file.write(piece.view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
    if written != end:
        raise AssertionError(f"{shard.name}: wrote {written} bytes of {end}")
    return written


def index(shards: list[Shard], dtype: str) -> dict:
    """The content of `model.safetensors.index.json`."""
    total = sum(tensor.size for shard in shards for tensor in shard.tensors) * DTYPES[dtype][0].itemsize
    names = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}


class Weights:
    """The tensors of a directory: names, shapes, and rows on demand."""

    def __init__(self, directory: Path):
        """UserError, naming the file, for anything missing, damaged, contradictory, or outside the directory."""
        files, weight_map = _files(directory)
        self._directory = directory
        self._start: dict[str, int] = {}
        self._entries: dict[str, dict] = {}
        self._file_of: dict[str, str] = {}
        for name in files:
            entries, self._start[name] = _header(directory / name)
            for tensor in entries:
                if tensor in self._entries:
                    raise UserError(f"{_short(tensor)} is in {name} and in another file")
            self._entries |= entries
            self._file_of |= dict.fromkeys(entries, name)
        if weight_map is None:
            return
        for tensor in sorted(weight_map.keys() ^ self._file_of.keys()):
            kind = "names, but its file lacks" if tensor in weight_map else "does not name, but a file holds"
            raise UserError(f"{INDEX} {kind}, the tensor {_short(tensor)}")

    @property
    def names(self) -> set[str]:
        """Every tensor's name."""
        return set(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape; UserError if it is not of a floating type that is read here."""
        dtype = self._entries[name]["dtype"]
        if dtype not in _READABLE:
            raise UserError(f"{self._file_of[name]}: {name} is {dtype}; it must be one of {', '.join(_READABLE)}")
        return tuple(self._entries[name]["shape"])

    def dtype(self, name: str) -> str:
        """Its dtype as safetensors spells it: F32, BF16 or F16."""
        return self._entries[name]["dtype"]

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """It, or some of its rows, in its own dtype."""
        (count, *rest), dtype = self.shape(name), _READABLE[self.dtype(name)]
        start, stop, _ = rows.indices(count)
        size = math.prod(rest)
        begin = self._start[self._file_of[name]] + self._entries[name]["data_offsets"][0]
        with (self._directory / self._file_of[name]).open("rb") as file:
            file.seek(begin + start * size * dtype.itemsize)
            values = np.fromfile(file, dtype, (stop - start) * size)
        if len(values) != (stop - start) * size:
            raise UserError(f"{self._file_of[name]} ends early: it has changed while it was read")
        return values.reshape(stop - start, *rest)


def _header(path: Path) -> tuple[dict[str, dict], int]:
    """Entries by tensor name, and where the data begins. UserError unless the library accepts the file."""
    try:
        with safetensors.safe_open(path, framework="np"):  # checks offsets, shapes and dtypes against the file's length
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(length))
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise UserError(f"{path.name} is not a whole safetensors file: {in_brief(error)}") from error
    entries.pop("__metadata__", None)
    return entries, 8 + length


def _files(directory: Path) -> tuple[list[str], dict[str, str] | None]:
    """Names of the files that hold the weights, and what the index says, where the files need one."""
    if (directory / SINGLE).is_file():  # transformers looks for it first, too
        return [SINGLE], None
    if not (directory / INDEX).exists():
        return _shards(directory), None
    weight_map = json_files.read(directory / INDEX, name=INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{INDEX} has no weight_map from tensor names to file names")
    for name in sorted(set(weight_map.values())):
        # A plain name may still be a link, as in the hub's own cache; only the index is distrusted.
        if Path(name).name != name or set(name) & set("\\\0") or not name.endswith(".safetensors"):
            raise UserError(
                f"{INDEX} names the file {_short(name)}; shards are safetensors files in the same directory"
            )
        if len(name.encode(errors="replace")) > 255 or not (directory / name).is_file():
            raise UserError(f"{INDEX} names {_short(name)}, which is not there; copy the missing shard")
    return sorted(set(weight_map.values())), weight_map


def _shards(directory: Path) -> list[str]:
    """The shards of a directory without an index, all of them. UserError naming one that is missing."""
    counts: dict[str, set[int]] = {}
    for path in directory.iterdir():
        if match := _SHARD.fullmatch(path.name):
            counts.setdefault(match[2], set()).add(int(match[1]))
    if not counts:
        pickles = sorted(p.name for pattern in _PICKLES for p in directory.glob(pattern))
        hint = f" ({pickles[0]} is a pickle, which can run code and is not read)" if pickles else ""
        raise UserError(
            f"it has neither {SINGLE} nor {INDEX} nor shards such as model-00001-of-00002.safetensors{hint}; "
            "convert the weights to safetensors first"
        )
    if len(counts) > 1:
        raise UserError(
            f"it holds shards of {' and of '.join(sorted(counts))} files, and no {INDEX} that says which count"
        )
    ((count, numbers),) = counts.items()
    missing = next((n for n in range(1, int(count) + 1) if n not in numbers), None)
    if missing is not None:
        raise UserError(f"model-{missing:05d}-of-{count}.safetensors is not there; copy the missing shard")
    return [f"model-{n:05d}-of-{count}.safetensors" for n in range(1, int(count) + 1)]


def _short(name: str) -> str:
    return repr(name if len(name) <= 80 else f"{name[:80]}...")
