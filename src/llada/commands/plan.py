"""llada plan --config=FILE --topology=v5p:4x4x8 [--slices=2] [--config.key=value ...] [--program=sample] [--search]

Compiles the real program of a config for a TPU slice, on any machine, and says what it would need and do there: HBM per
chip, matrix FLOPs, bytes of every collective and how much of them other work hides, a projection of its speed (never a
measurement), days and chip-hours for the config's tokens. --search looks for mesh, remat and batch per chip. Needs
libtpu: pip install 'llada-jax[tpu]'.
"""

import os
import sys
from pathlib import Path

from llada import files, json_files, paths
from llada.commands import experiment
from llada.commands.command_flags import CommandFlags, required
from llada.errors import UserError

FLAGS = CommandFlags(experiment.FLAGS)
TOPOLOGY = FLAGS.define_string("topology", None, "the slice: v5e:16x16, v5p:4x4x8, v4, v6e or tpu7x likewise")
SLICES = FLAGS.define_integer("slices", 1, "so many equal slices, joined by the data-centre network")
PROGRAM = FLAGS.define_enum("program", "train", ["train", "evaluate", "sample", "likelihood"], "what is compiled")
SEARCH = FLAGS.define_bool("search", False, "try meshes, remat and batches per chip; print the best trade-offs")
JSON = FLAGS.define_string("json", None, "write all figures to this file too")
BATCH = FLAGS.define_integer(
    "batch", None, "sample, likelihood: sequences at once; default one per device", lower_bound=1
)
ESTIMATOR = FLAGS.define_string(
    "estimator",
    None,
    "likelihood, evaluate: as there; also is_greedy, which lm_eval finds out beside; all but sampler, "
    "confidence_ordered and is_greedy run one program",
)
PROMPT = FLAGS.define_integer("prompt_length", None, "sample, likelihood: tokens of the prompt; default 0", 0)
LENGTH = FLAGS.define_integer(
    "gen_length", None, "sample: tokens to write, default 64; likelihood: tokens to score, default the context", 1
)
STEPS = FLAGS.define_integer("steps", None, "of the reverse process: sample, --estimator=sampler; default one a token")
BLOCK = FLAGS.define_integer("block_length", None, "its positions of a block; default one block")
CACHE = FLAGS.define_string("cache", None, "sample: none, prefix or dual")
DTYPE = FLAGS.define_enum(
    "dtype", None, ["float32", "bfloat16"], "evaluate, sample, likelihood: of the parameters in memory; default float32"
)


def run(overrides: dict[str, str]) -> int:
    """Compile, analyse, report."""
    topology_name = required(TOPOLOGY, "for example --topology=v5p:4x4x8")
    if SEARCH.value and PROGRAM.value != "train":
        raise UserError(f"--search is for --program=train, not {PROGRAM.value}")
    target = None if JSON.value is None else paths.writable_target(JSON.value, "--json")
    config = experiment.read(experiment.CONFIG.value, overrides)
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs on this machine's own devices
    from llada import mesh as mesh_lib
    from llada.commands import progress
    from llada.planning import fitting, programs, report, search, topology

    hardware = topology.describe(topology_name, SLICES.value)
    if SEARCH.value:
        with progress.line() as line:
            result = search.search(config, hardware, line.now, line.done)
        _write(search.text(result), result.figures, target)
        return 0
    workload = programs.Workload(
        batch=BATCH.value,
        prompt_length=PROMPT.value,
        gen_length=LENGTH.value,
        steps=STEPS.value,
        block_length=BLOCK.value,
        cache=CACHE.value,
        dtype=DTYPE.value,
        estimator=ESTIMATOR.value,
    )
    mesh = mesh_lib.make(config.mesh, hardware.devices)
    program = programs.make(config, mesh, PROGRAM.value, workload)
    with progress.line() as line:
        line.now(f"compiling {PROGRAM.value} for {hardware.chips} chips of {hardware.name}")
        compiled = programs.lower_and_compile(program, mesh)
    if compiled.refusal:
        raise UserError(fitting.refusal(config, hardware, mesh.shape, program, compiled.refusal))
    figures = report.figures(config, hardware, mesh, program, compiled)
    _write(report.text(figures), figures, target)
    return 0


def _write(text: str, figures: dict, target: Path | None) -> None:
    """Print, then write the file if there is to be one: in this order, so that a full disk takes nothing away."""
    print(text)
    sys.stdout.flush()
    if target is not None:
        files.write_atomically(target, f"{json_files.dumps(figures, indent=2)}\n".encode())
