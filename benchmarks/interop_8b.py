"""LLaDA-8B's checkpoint imported and exported again on a small machine: python benchmarks/interop_8b.py --directory=DIR

Writes a directory in the released layout, 16 GB of random bfloat16 in the released names and shapes, imports it (32 GB
of float32), exports that as bfloat16, and asserts that every shard has the same SHA-256 as before. Prints seconds and
peak memory of both. Needs 50 GB of disk. `--layers=2` is a quick trial.
"""

import argparse
import hashlib
import json
import runpy
import shutil
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import record
import timing

from llada.config import from_config_dict
from llada.data.tokenizer_training import train_tokenizer
from llada.interop import importing, layout, safetensors_files, schema, sentencepiece_files
from llada.interop.export import SHARD_BYTES, export

EXPERIMENT = Path(__file__).resolve().parents[1] / "experiments" / "llada_8b.py"
_PIECE = 8 << 20


def write_released(directory: Path, layers: int) -> None:
    """The directory, as `llada export` writes it, with random weights of ordinary size."""
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

    shards = safetensors_files.plan(layout.tensors(model, schema.LLADA.names), "bfloat16", SHARD_BYTES)
    directory.mkdir()
    for shard in shards:
        safetensors_files.write_shard(directory, shard, "bfloat16", pieces(shard))
    index = safetensors_files.index(shards, "bfloat16")
    (directory / safetensors_files.INDEX).write_text(json.dumps(index), encoding="utf-8")
    tokenizer = train_tokenizer(["a quick brown fox\n" * 50], 280, directory.parent / "tokenizer.model")
    values = schema.LLADA.to_json(model, tokenizer.special, tokenizer.pad_id)
    (directory / "config.json").write_text(json.dumps(values), encoding="utf-8")
    ids = dict(mask_id=tokenizer.mask_id, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
    for name, content in sentencepiece_files.tokenizer_files(tokenizer.proto, **ids, model_max_length=4096).items():
        (directory / name).write_bytes(content)


def digests(directory: Path) -> dict[str, str]:
    """SHA-256 of every shard."""
    result = {}
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            result[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return result


def measure(directory: Path, layers: int) -> list[dict[str, str]]:
    """Write, import and export again; a row for import and for export."""
    write_released(directory / "released", layers)
    before = digests(directory / "released")
    sizes = [path.stat().st_size / 1e9 for path in (directory / "released").glob("*.safetensors")]
    rows = []
    for program, source, out in (("import", "released", "workdir"), ("export", "workdir", "again")):
        paths = str(directory / source), str(directory / out)
        facts = timing.in_a_process(__file__, "--program", program, "--paths", *paths)
        row = {"program": program, "bfloat16": f"{sum(sizes):.1f} GB", "shards": str(len(before))}
        row |= {"largest shard": f"{max(sizes):.2f} GB", "seconds": f"{facts['seconds']:.0f}"}
        rows.append(row | {"peak memory": f"{facts['peak'] / 1e9:.2f} GB"})
        shutil.rmtree(directory / source)
    assert digests(directory / "again") == before, "the exported shards are not those that were imported"
    return rows


def main() -> None:
    """All of it, or with --program one step of it in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", help="where to work (default: the temporary directory)")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--program", help=argparse.SUPPRESS)
    parser.add_argument("--paths", nargs=2, type=Path, help=argparse.SUPPRESS)
    record.add_flags(parser)
    options = parser.parse_args()
    if options.program:
        start = time.perf_counter()
        source, out = options.paths
        if options.program == "import":
            opened = importing.open_source(source)
            importing.write(opened, from_config_dict(opened.config), out)
        else:
            export(source, out, dtype="bfloat16")
        print(json.dumps({"seconds": time.perf_counter() - start, "peak": timing.resident_bytes("VmHWM")}))
        return
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        rows = measure(Path(directory), options.layers)
    print(record.table(rows))
    record.record(options, "interop_8b", rows)


if __name__ == "__main__":
    main()
