"""llada sample --workdir=DIR (--prompt=TEXT | --prompt_ids=12,7 | --infill='x = [MASK:4](y)') [--gen_length=48 ...]

Text from a trained model. A LLaDA starts from masks and fills a quota of them per step; an ARM continues the prompt
token by token. --infill fills the marks [MASK] (one token) and [MASK:N] (N tokens) anywhere in a text.
"""

import json

from absl import flags

from llada.errors import UserError

WORKDIR = flags.DEFINE_string("workdir", None, "a workdir of llada train")
STEP = flags.DEFINE_integer("step", None, "checkpoint to sample from; default the latest")
JSON = flags.DEFINE_bool("json", False, "print ids, text, forward_passes and seconds as JSON")
# One flag per field of `generation.Request`, under the same name.
REQUEST = (
    flags.DEFINE_string("prompt", None, "text to continue; may be empty"),
    flags.DEFINE_string("prompt_ids", None, "the same as token ids: 12,7,99"),
    flags.DEFINE_string("infill", None, "text with [MASK] or [MASK:N] where tokens are to be filled in"),
    flags.DEFINE_integer("gen_length", None, "tokens after the prompt; default what the context leaves, at most 64"),
    flags.DEFINE_integer("steps", None, "steps of the reverse process; default one per token"),
    flags.DEFINE_integer("block_length", None, "fill block by block, left to right; default one block"),
    flags.DEFINE_float("temperature", 0.0, "0: most likely tokens; 1: the model's own law"),
    flags.DEFINE_float("cfg_scale", None, "classifier-free guidance w of LLaDA Eq. (16); default none"),
    flags.DEFINE_string("remasking", None, "which guesses to keep: low_confidence (default) or random"),
    flags.DEFINE_integer("seed", 0, "of the sampling noise"),
)


def run() -> int:
    """Sample once and print."""
    if not WORKDIR.value:
        raise UserError("--workdir is missing; give a workdir of llada train")
    from llada.inference.generation import Request, generate
    from llada.training import workdir as workdir_lib

    opened = workdir_lib.load(WORKDIR.value, STEP.value)
    request = Request(**{flag.name: flag.value for flag in REQUEST})
    generated = generate(opened.config, opened.params, opened.tokenizer, request)
    print(json.dumps(generated._asdict(), ensure_ascii=False) if JSON.value else generated.text)
    return 0
