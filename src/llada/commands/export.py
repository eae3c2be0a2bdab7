"""llada export --workdir=DIR --out=DIR [--step=N] [--dtype=float32|bfloat16] [--shard_bytes=N] [--overwrite]

A checkpoint as a Hugging Face directory: config.json, safetensors shards and index, tokenizer, generation_config.json,
a model card. A LLaDA comes with its PyTorch code and loads with trust_remote_code=True; an ARM is a native
LlamaForCausalLM (Qwen3ForCausalLM with qk-norm). Memory stays at one tensor, whatever the model's size.
"""

import sys

from llada import json_files
from llada.commands import progress
from llada.commands.command_flags import CommandFlags, required
from llada.paths import user_path

FLAGS = CommandFlags()
WORKDIR = FLAGS.define_string("workdir", None, "a workdir of llada train or llada import")
OUT = FLAGS.define_string("out", None, "directory to create")
STEP = FLAGS.define_integer("step", None, "checkpoint to export; default the latest")
DTYPE = FLAGS.define_string("dtype", "float32", "of the weights: float32 (exact) or bfloat16 (half the size)")
SHARD_BYTES = FLAGS.define_integer("shard_bytes", 5_000_000_000, "most data per safetensors file", lower_bound=1)
OVERWRITE = FLAGS.define_bool("overwrite", False, "replace an earlier export at --out")


def run() -> int:
    """Export and print what was written."""
    workdir, out = (user_path(required(flag, "see llada export --help"), f"--{flag.name}") for flag in (WORKDIR, OUT))
    from llada.interop.export import export

    with progress.bar("weights exported") as show:
        exported = export(workdir, out, STEP.value, DTYPE.value, SHARD_BYTES.value, OVERWRITE.value, show)
    print(json_files.dumps({"out": str(out)} | exported._asdict()))
    code = ", trust_remote_code=True" if exported.architecture == "LLaDAModelLM" else ""
    print(f"PyTorch: AutoModelForCausalLM.from_pretrained({json_files.dumps(str(out))}{code})", file=sys.stderr)
    return 0
