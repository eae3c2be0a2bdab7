"""Export and import against a plain safetensors copy of the same bytes: python benchmarks/interop_speed.py

  copy    safetensors' load_file and save_file of every shard, in one process without JAX
  export  llada export of a workdir to those bytes
  import  llada import of the exported directory to a workdir

Each runs in a process of its own, in turn, on one disk. The seconds are those of the work without start-up (imports,
opening the workdir); the data is synced to the disk at the end of each, the copy's too. GB/s are bytes of weights over
seconds; ratios are per round, medians and ranges over the rounds. Peak memory is the process's highest resident set
(pages of mapped files are part of it) less that of the same command on a toy model. Every round asserts that the
exported bytes are the model's and that the import gives the same parameters. Linux only.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MATRIX = 2048 * 8192


def shape_of(gigabytes: float) -> dict:
    """A tied model of about that many 1e9 bytes in float32."""
    layers = max(1, round((gigabytes * 1e9 / 4 - 32_768 * 2048) / (4 * MATRIX)))
    return dict(layers=layers, width=2048, heads=16, ffn=8192, vocab_size=32_768)


TOY = dict(layers=1, width=64, heads=1, ffn=64, vocab_size=512)


def make_workdir(workdir: Path, shape: dict) -> None:
    """A workdir as `llada import` leaves it, with random parameters."""
    import numpy as np

    from llada.config import default_config, from_config_dict, to_dict
    from llada.data.sentencepiece_tokenizer import SentencePieceTokenizer
    from llada.training.checkpoint import create

    values = default_config().to_dict()
    values["model"] |= shape | dict(tie_embeddings=True, max_length=2048, dtype="float32")
    values["data"]["sequence_length"], values["train"]["steps"] = 2048, 1
    config = from_config_dict(values)
    text = "the quick brown fox jumps over the lazy dog\n" * 50
    tokenizer = SentencePieceTokenizer.train([text], 320, workdir / "tokenizer.model")
    rng = np.random.default_rng(0)
    for leaf in create(workdir, config, tokenizer.content).values():
        for start in range(0, len(leaf), leaf.chunk_rows):
            rows = min(leaf.chunk_rows, len(leaf) - start)
            values = rng.standard_normal((rows, *leaf.shape[1:]), np.float32)
            leaf.write(values, slice(start, start + rows)).result()
    (workdir / "config.json").write_text(json.dumps(to_dict(config)))


def copy(source: Path, out: Path) -> float:
    """Seconds to load and save every shard, data on the disk."""
    import os

    from safetensors.numpy import load_file, save_file

    out.mkdir()
    start = time.perf_counter()
    for path in sorted(source.glob("*.safetensors")):
        save_file(load_file(path), out / path.name)
        with (out / path.name).open("rb") as file:
            os.fsync(file.fileno())
    return time.perf_counter() - start


def export(source: Path, out: Path, dtype: str, shard_bytes: int) -> float:
    """Seconds of `llada export`."""
    from llada.interop.export import export as run

    start = time.perf_counter()
    run(source, out, dtype=dtype, shard_bytes=shard_bytes)
    return time.perf_counter() - start


def bring_in(source: Path, out: Path) -> float:
    """Seconds of `llada import`, data on the disk."""
    import os

    from llada.config import from_config_dict
    from llada.interop import importing

    start = time.perf_counter()
    opened = importing.open_source(source)
    importing.write(opened, from_config_dict(opened.config), out)
    os.sync()
    return time.perf_counter() - start


def peak_bytes() -> int:
    """The most memory this process has held; `ru_maxrss` would begin with that of the process it was forked from."""
    line = next(
        line for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM")
    )
    return int(line.split()[1]) * 1024


def child(arguments: list[str], script: Path = Path(__file__)) -> dict:
    """One of the programs in a process of its own: its seconds and peak bytes."""
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def check(workdir: Path, exported: Path, imported: Path, dtype: str) -> None:
    """The exported tensors are the workdir's, cast; the imported parameters are those again."""
    import ml_dtypes
    import numpy as np
    from safetensors import safe_open

    from llada.interop import layout, llada_schema
    from llada.training import workdir as workdir_lib
    from llada.training.checkpoint import Checkpoints

    config = workdir_lib.read_config(workdir)
    ours, again = (Checkpoints(path).open_parameters() for path in (workdir, imported))
    files = json.loads((exported / "model.safetensors.index.json").read_text())["weight_map"]
    cast = np.dtype(np.float32 if dtype == "float32" else ml_dtypes.bfloat16)
    for tensor in layout.tensors(config.model, llada_schema.NAMES):
        index = () if tensor.layer is None else (tensor.layer,)
        source, back = (leaves[tensor.leaf].read(*index) for leaves in (ours, again))
        with safe_open(exported / files[tensor.name], framework="np") as file:
            found = file.get_tensor(tensor.name)
        wanted = layout.as_matrix(tensor.leaf, source).T if tensor.transposed else source
        assert np.array_equal(found, wanted.astype(cast)), tensor.name
        assert np.array_equal(back, source.astype(cast).astype(np.float32)), tensor.name


def main() -> None:
    """Make the workdir, run the rounds, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of parameters in float32")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--shard_gigabytes", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", help="where to work: the disk that is measured (default: the temporary one)")
    parser.add_argument("--program", help=argparse.SUPPRESS)
    parser.add_argument("--paths", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.program:
        source, out = arguments.paths
        run = {
            "copy": lambda: copy(source, out),
            "export": lambda: export(source, out, arguments.dtype, int(arguments.shard_gigabytes * 1e9)),
            "import": lambda: bring_in(source, out),
        }[arguments.program]
        print(json.dumps({"seconds": run(), "peak": peak_bytes()}))
        return
    with tempfile.TemporaryDirectory(dir=arguments.directory) as place:
        report(Path(place), arguments)


def report(place: Path, arguments) -> None:
    """All rounds; prints a table and a line of JSON."""
    common = [f"--dtype={arguments.dtype}", f"--shard_gigabytes={arguments.shard_gigabytes}"]
    floor = {}
    make_workdir(place / "toy", TOY)
    make_workdir(place / "model", shape_of(arguments.gigabytes))
    rounds: list[dict] = []
    for name, count in (("toy", 1), ("model", arguments.rounds + 1)):
        for _ in range(count):
            here, one = place / "now", {}
            here.mkdir()
            for program, paths in (
                ("export", (place / name, here / "hf")),
                ("copy", (here / "hf", here / "copy")),
                ("import", (here / "hf", here / "back")),
            ):
                one[program] = child(["--program", program, *common, "--paths", *map(str, paths)])
            shards = [path.stat().st_size for path in (here / "hf").glob("*.safetensors")]
            one["bytes"], one["shard"] = sum(shards), max(shards)
            check(place / name, here / "hf", here / "back", arguments.dtype)
            shutil.rmtree(here)
            if name == "toy":
                floor = one
            rounds.append(one)
    rounds = rounds[2:]  # the toy, and a first round that warms the disk's cache
    print(
        f"{rounds[0]['bytes'] / 1e9:.2f} GB of {arguments.dtype} weights, largest shard {rounds[0]['shard'] / 1e9:.2f}"
    )
    print(f"{'':8}{'GB/s':>22}{'of the copy':>24}{'peak memory / largest shard':>32}")
    for program in ("copy", "export", "import"):
        speed = [one["bytes"] / one[program]["seconds"] / 1e9 for one in rounds]
        share = [one["copy"]["seconds"] / one[program]["seconds"] for one in rounds]
        peak = [(one[program]["peak"] - floor[program]["peak"]) / one["shard"] for one in rounds]
        print(f"{program:8}{spread(speed):>22}{spread(share):>24}{spread(peak):>32}")


def spread(values: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
