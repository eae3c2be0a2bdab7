"""llada import --source=DIR --workdir=DIR [--objective=diffusion|autoregressive] [--mask_token=T] [--config.key=value]

A Hugging Face directory as a workdir that train, evaluate, sample, likelihood and export accept: the released LLaDA
layout, iLLaDA, Llama, Mistral, Qwen3; or another workdir. Only safetensors are read, and no code of the directory is
run. --objective=diffusion starts a mask predictor from an ARM's weights. --config.key=value sets what the source does
not know: the corpus, the mesh, the optimizer; llada train --workdir=DIR goes on from there.
"""

import sys

from llada import json_files
from llada.commands import experiment, progress
from llada.commands.command_flags import CommandFlags, required
from llada.config import CAUSAL
from llada.errors import UserError
from llada.paths import user_path

FLAGS = CommandFlags()
SOURCE = FLAGS.define_string("source", None, "Hugging Face directory (or workdir) to read")
WORKDIR = FLAGS.define_string("workdir", None, "workdir to create")
OBJECTIVE = FLAGS.define_enum("objective", None, list(CAUSAL), "family that the model becomes; default its own")
MASK_TOKEN = FLAGS.define_string("mask_token", None, "token that is to mask, where the source names none")
ALLOW_NONFINITE = FLAGS.define_bool(
    "allow_nonfinite", False, "import weights that hold NaN, infinity or values beyond 1e18"
)


def run(overrides: dict[str, str]) -> int:
    """Import and print what was imported."""
    path, workdir = (
        user_path(required(flag, "see llada import --help"), f"--{flag.name}") for flag in (SOURCE, WORKDIR)
    )
    if workdir.resolve().is_relative_to(path.resolve()):
        raise UserError(f"--workdir={workdir} is --source={path} or in it; choose a directory elsewhere")
    from llada import accounting
    from llada.interop import importing

    source = importing.open_source(path, OBJECTIVE.value, MASK_TOKEN.value, ALLOW_NONFINITE.value)
    for note in source.notes:
        print(f"llada import: {note}", file=sys.stderr)
    config = experiment.override(source.config, overrides)
    with progress.bar("parameters imported") as show:
        importing.write(source, config, workdir, show)
    facts = {
        "workdir": str(workdir),
        "objective": config.objective.name,
        "parameters": accounting.parameters(config.model).total,
        "vocab_size": config.model.vocab_size,
        "mask_id": source.tokenizer.mask_id,
        "eos_id": source.tokenizer.eos_id,
        "bos_id": source.tokenizer.bos_id,
    }
    print(json_files.dumps(facts))
    return 0
