"""LLaDA-8B's checkpoint in and out again on a small machine: python benchmarks/interop_8b.py --directory=DIR

Writes a directory in the released layout, 16 GB of random bfloat16 in the released names and shapes, imports it (32 GB
of float32), exports that as bfloat16, and asserts that every shard has the same SHA-256 as before. Prints seconds and
peak memory of both. Needs 50 GB of disk. `--layers=2` is a short try.
"""

import argparse
import hashlib
import json
import runpy
import shutil
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from interop_speed import child, peak_bytes

from llada.config import from_config_dict
from llada.data.sentencepiece_tokenizer import SentencePieceTokenizer
from llada.interop import importing, layout, llada_schema, safetensors_files, sentencepiece_files
from llada.interop.export import SHARD_BYTES, export
from llada.interop.schema import Special

EXPERIMENT = Path(__file__).resolve().parents[1] / "experiments" / "llada_8b.py"
_PIECE = 8 << 20


def make(directory: Path, layers: int) -> None:
    """The directory, as `llada export` writes it; weights are random bits of ordinary size."""
    values = runpy.run_path(str(EXPERIMENT))["get_config"]()
    values.model.layers = layers
    model = from_config_dict(values).model
    rng = np.random.default_rng(0)
    noise = (rng.standard_normal(_PIECE, np.float32) * 0.02).astype(ml_dtypes.bfloat16)

    def pieces(shard):
        for tensor in shard.tensors:
            for start in range(0, tensor.size, _PIECE):
                count = min(_PIECE, tensor.size - start)
                yield np.roll(noise, int(rng.integers(_PIECE)))[:count]

    shards = safetensors_files.plan(layout.tensors(model, llada_schema.NAMES), "bfloat16", SHARD_BYTES)
    directory.mkdir()
    for shard in shards:
        safetensors_files.write_shard(directory, shard, "bfloat16", pieces(shard))
    index = safetensors_files.index(shards, "bfloat16")
    (directory / safetensors_files.INDEX).write_text(json.dumps(index))
    tokenizer = SentencePieceTokenizer.train(["a quick brown fox\n" * 50], 280, directory.parent / "tokenizer.model")
    special = Special(tokenizer.mask_id, tokenizer.eos_id, tokenizer.pad_id)
    (directory / "config.json").write_text(json.dumps(llada_schema.to_json(model, special)))
    ids = dict(mask_id=special.mask, eos_id=special.eos, pad_id=special.pad)
    for name, content in sentencepiece_files.tokenizer_files(tokenizer.proto, **ids, model_max_length=4096).items():
        (directory / name).write_bytes(content)


def digests(directory: Path) -> dict[str, str]:
    """SHA-256 of every shard."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def main() -> None:
    """All of it, or with --program one step of it in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", help="where to work (default: the temporary directory)")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--program", help=argparse.SUPPRESS)
    parser.add_argument("--paths", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.program:
        start = time.perf_counter()
        source, out = arguments.paths
        if arguments.program == "import":
            opened = importing.open_source(source)
            importing.write(opened, from_config_dict(opened.config), out)
        else:
            export(source, out, dtype="bfloat16")
        print(json.dumps({"seconds": time.perf_counter() - start, "peak": peak_bytes()}))
        return
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        place = Path(name)
        make(place / "released", arguments.layers)
        before = digests(place / "released")
        total = sum(path.stat().st_size for path in (place / "released").glob("*.safetensors"))
        largest = max(path.stat().st_size for path in (place / "released").glob("*.safetensors"))
        print(f"{total / 1e9:.2f} GB of bfloat16 in {len(before)} shards, the largest {largest / 1e9:.2f}")
        for program, source, out in (("import", "released", "workdir"), ("export", "workdir", "again")):
            paths = ["--paths", str(place / source), str(place / out)]
            done = child(["--program", program, *paths], Path(__file__))
            print(f"{program}: {done['seconds']:.0f} s, peak memory {done['peak'] / 1e9:.2f} GB", flush=True)
            shutil.rmtree(place / source)
        if digests(place / "again") != before:
            sys.exit("the shards are not those that were imported")
        print("every shard has the SHA-256 it had before")


if __name__ == "__main__":
    main()
