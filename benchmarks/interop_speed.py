"""Export and import against a plain safetensors copy of the same bytes: python benchmarks/interop_speed.py

  copy    safetensors' load_file and save_file of every shard
  export  llada export of a workdir to those bytes
  import  llada import of the exported directory to a workdir

Each runs in a process of its own, alternately, on one disk. Seconds are of the work without start-up (imports, opening
the workdir), up to the data being synced to the disk. GB/s are bytes of weights over seconds; ratios are per round,
medians and ranges over the rounds. Peak memory is the process's highest resident set (pages of mapped files are part of
it) less that of the same command on a toy model. Every round asserts that the exported bytes are the model's and that
the import gives the same parameters. Linux only.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import record
import timing
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from llada.config import default_config, from_config_dict, to_dict
from llada.data.tokenizer_training import train_tokenizer
from llada.interop import export as export_lib
from llada.interop import importing, layout, schema
from llada.training import run as run_lib
from llada.training.checkpoint import Checkpoints
from llada.training.leaves import create, finish, open_parameters

MATRIX = 2048 * 8192
TOY = dict(layers=1, width=64, heads=1, ffn=64, vocab_size=512)


def shape_of(gigabytes: float) -> dict:
    """A tied model of about that many 1e9 bytes in float32."""
    layers = max(1, round((gigabytes * 1e9 / 4 - 32_768 * 2048) / (4 * MATRIX)))
    return dict(layers=layers, width=2048, heads=16, ffn=8192, vocab_size=32_768)


def make_workdir(workdir: Path, shape: dict) -> None:
    """A workdir as `llada import` leaves it, with random parameters."""
    values = default_config().to_dict()
    values["model"] |= shape | dict(tie_embeddings=True, max_length=2048, dtype="float32")
    values["data"]["sequence_length"], values["train"]["steps"] = 2048, 1
    config = from_config_dict(values)
    text = "the quick brown fox jumps over the lazy dog\n" * 50
    tokenizer = train_tokenizer([text], 320, workdir / "tokenizer.model")
    rng = np.random.default_rng(0)
    leaves = create(workdir, config, tokenizer.content)
    for leaf in leaves.values():
        for start in range(0, len(leaf), leaf.chunk_rows):
            rows = min(leaf.chunk_rows, len(leaf) - start)
            values = rng.standard_normal((rows, *leaf.shape[1:]), np.float32)
            leaf.write(values, slice(start, start + rows)).result()
    finish(workdir, leaves)
    (workdir / "config.json").write_text(json.dumps(to_dict(config)), encoding="utf-8")


def copy(source: Path, out: Path) -> None:
    """Load and save every shard."""
    out.mkdir()
    for path in sorted(source.glob("*.safetensors")):
        save_file(load_file(path), out / path.name)
        with (out / path.name).open("rb") as file:
            os.fsync(file.fileno())


def import_(source: Path, out: Path) -> None:
    """`llada import`."""
    opened = importing.open_source(source)
    importing.write(opened, from_config_dict(opened.config), out)
    os.sync()


def check(workdir: Path, exported: Path, imported: Path, dtype: str) -> None:
    """AssertionError unless the exported tensors are the workdir's, cast, and the imported parameters those again."""
    config = run_lib.read_config(workdir)
    ours, again = (open_parameters(Checkpoints(path)) for path in (workdir, imported))
    files = json.loads((exported / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    cast = np.dtype(np.float32 if dtype == "float32" else ml_dtypes.bfloat16)
    for tensor in layout.tensors(config.model, schema.LLADA.names):
        index = () if tensor.layer is None else (tensor.layer,)
        source, back = (leaves[tensor.leaf].read(*index) for leaves in (ours, again))
        with safe_open(exported / files[tensor.name], framework="np") as file:
            written = file.get_tensor(tensor.name)
        expected = layout.as_matrix(tensor.leaf, source).T if tensor.transposed else source
        assert np.array_equal(written, expected.astype(cast)), tensor.name
        assert np.array_equal(back, source.astype(cast).astype(np.float32)), tensor.name


def one_round(workdir: Path, scratch: Path, dtype: str, shard_gigabytes: float) -> dict:
    """Seconds and peak bytes of the three programs, and the bytes of all shards and of the largest."""
    scratch.mkdir()
    flags = [f"--dtype={dtype}", f"--shard_gigabytes={shard_gigabytes}"]
    facts = {}
    for program, paths in (
        ("export", (workdir, scratch / "exported")),
        ("copy", (scratch / "exported", scratch / "copied")),
        ("import", (scratch / "exported", scratch / "imported")),
    ):
        facts[program] = timing.in_a_process(__file__, "--program", program, *flags, "--paths", *map(str, paths))
    shards = [path.stat().st_size for path in (scratch / "exported").glob("*.safetensors")]
    check(workdir, scratch / "exported", scratch / "imported", dtype)
    shutil.rmtree(scratch)
    return facts | {"bytes": sum(shards), "largest": max(shards)}


def measure(directory: Path, options) -> list[dict[str, str]]:
    """The table of all rounds, copy, export and import."""
    make_workdir(directory / "toy", TOY)
    make_workdir(directory / "model", shape_of(options.gigabytes))
    sizes = options.dtype, options.shard_gigabytes
    toy = one_round(directory / "toy", directory / "scratch", *sizes)
    # The first round warms the disk's cache.
    rounds = [one_round(directory / "model", directory / "scratch", *sizes) for _ in range(options.rounds + 1)][1:]
    rows = []
    for program in ("copy", "export", "import"):
        speed = [one["bytes"] / one[program]["seconds"] / 1e9 for one in rounds]
        ratio = [one["copy"]["seconds"] / one[program]["seconds"] for one in rounds]
        peak = [(one[program]["peak"] - toy[program]["peak"]) / one["largest"] for one in rounds]
        row = {"program": program, "bytes": f"{rounds[0]['bytes'] / 1e9:.2f} GB of {options.dtype}"}
        row |= {"largest shard": f"{rounds[0]['largest'] / 1e9:.2f} GB", "GB/s": timing.text(timing.spread(speed))}
        row["speed over the copy's"] = timing.text(timing.spread(ratio))
        rows.append(row | {"peak memory / largest shard": timing.text(timing.spread(peak))})
    return rows


def main() -> None:
    """Write the workdirs, run the rounds, print the table; or with --program run one program in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of parameters in float32")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--shard_gigabytes", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", help="where to work: the disk that is measured (default: the temporary one)")
    parser.add_argument("--program", help=argparse.SUPPRESS)
    parser.add_argument("--paths", nargs=2, type=Path, help=argparse.SUPPRESS)
    record.add_flags(parser)
    options = parser.parse_args()
    if options.program:
        shard_bytes = int(options.shard_gigabytes * 1e9)
        start = time.perf_counter()
        if options.program == "export":
            export_lib.export(*options.paths, dtype=options.dtype, shard_bytes=shard_bytes)
        else:
            {"copy": copy, "import": import_}[options.program](*options.paths)
        print(json.dumps({"seconds": time.perf_counter() - start, "peak": timing.resident_bytes("VmHWM")}))
        return
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        rows = measure(Path(directory), options)
    print(record.table(rows))
    record.record(options, "interop_speed", rows)


if __name__ == "__main__":
    main()
