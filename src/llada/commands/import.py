"""llada import --source=DIR --workdir=DIR [--objective=diffusion|autoregressive] [--mask_token=T] [--config.key=value]

A Hugging Face directory as a workdir that train, evaluate, sample, likelihood and export accept: the released LLaDA
layout, iLLaDA, Llama, Mistral, Qwen3; or another workdir. Only safetensors are read, and no code of the directory is
run. --objective=diffusion starts a mask predictor from an ARM's weights. --config.key=value sets what the source does
not know: the corpus, the mesh, the optimizer; llada train --workdir=DIR goes on from there.
"""

import json
from pathlib import Path

from absl import flags

from llada.commands import experiment, progress
from llada.errors import UserError

SOURCE = flags.DEFINE_string("source", None, "Hugging Face directory (or workdir) to read")
WORKDIR = flags.DEFINE_string("workdir", None, "workdir to make")
OBJECTIVE = flags.DEFINE_enum(
    "objective", None, ["diffusion", "autoregressive"], "family to make of it; default its own"
)
MASK_TOKEN = flags.DEFINE_string("mask_token", None, "token that is to mask, where the source names none")


def run(overrides: dict[str, str]) -> int:
    """Import and say what came."""
    for flag in (SOURCE, WORKDIR):
        if not flag.value:
            raise UserError(f"--{flag.name} is missing; see llada import --help")
    from llada import accounting
    from llada.interop import importing

    source = importing.open_source(Path(SOURCE.value), OBJECTIVE.value, MASK_TOKEN.value)
    config = experiment.override(source.config, overrides)
    with progress.bar("parameters imported") as show:
        importing.write(source, config, Path(WORKDIR.value), show)
    facts = {
        "workdir": WORKDIR.value,
        "objective": config.objective.name,
        "parameters": accounting.parameters(config.model).total,
        "vocab_size": config.model.vocab_size,
        "mask_id": source.tokenizer.mask_id,
        "eos_id": source.tokenizer.eos_id,
    }
    print(json.dumps(facts))
    return 0
