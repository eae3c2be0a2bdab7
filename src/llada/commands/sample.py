"""llada sample --workdir=DIR (--prompt=TEXT | --prompt_ids=12,7 | --infill='x = [MASK:4](y)') [--gen_length=64 ...]

Text from a trained model. A LLaDA starts from masks and fills a quota of them per step; an ARM continues the prompt
token by token. --infill fills the marks [MASK] (one token) and [MASK:N] (N tokens) anywhere in a text.
"""

import json
import time

import numpy as np
from absl import flags

from llada.errors import UserError

WORKDIR = flags.DEFINE_string("workdir", None, "a workdir of llada train")
STEP = flags.DEFINE_integer("step", None, "checkpoint to sample from; default the latest")
PROMPT = flags.DEFINE_string("prompt", None, "text to continue; may be empty")
PROMPT_IDS = flags.DEFINE_string("prompt_ids", None, "the same as token ids: 12,7,99")
INFILL = flags.DEFINE_string("infill", None, "text with [MASK] or [MASK:N] where tokens are to be filled in")
GEN_LENGTH = flags.DEFINE_integer("gen_length", 64, "tokens to generate after a prompt")
STEPS = flags.DEFINE_integer("steps", None, "steps of the reverse process; default one per token")
BLOCK_LENGTH = flags.DEFINE_integer("block_length", None, "fill block by block, left to right; default one block")
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0: most likely tokens; 1: the model's own law")
CFG_SCALE = flags.DEFINE_float("cfg_scale", 0.0, "classifier-free guidance w of LLaDA Eq. (16); 0 is off")
REMASKING = flags.DEFINE_string("remasking", "low_confidence", "which guesses to keep: low_confidence or random")
SEED = flags.DEFINE_integer("seed", 0, "of the sampling noise")
JSON = flags.DEFINE_bool("json", False, "print ids, text, forward_passes and seconds as JSON")


def run() -> int:
    """Sample once and print."""
    if not WORKDIR.value:
        raise UserError("--workdir is missing; give a workdir of llada train")
    given = [name for name in ("prompt", "prompt_ids", "infill") if flags.FLAGS[name].value is not None]
    if len(given) != 1:
        raise UserError(f"give one of --prompt, --prompt_ids, --infill, not {' and '.join(given) or 'none'}")
    from llada.inference import canvas as canvas_lib
    from llada.inference import sampler
    from llada.training import workdir as workdir_lib

    opened = workdir_lib.load(WORKDIR.value, STEP.value)
    config, tokenizer = opened.config, opened.tokenizer
    causal = config.objective.name == "autoregressive"
    if INFILL.value is not None:
        if causal:
            raise UserError("--infill needs a diffusion model; this workdir holds an ARM, which writes left to right")
        canvas_BL, prompt_length = canvas_lib.from_infill(INFILL.value, tokenizer, config.model.max_length), 0
    else:
        ids = (
            tokenizer.encode(PROMPT.value)
            if PROMPT.value is not None
            else canvas_lib.parse_ids(PROMPT_IDS.value, config.model.vocab_size)
        )
        canvas_BL = canvas_lib.from_prompt(ids, GEN_LENGTH.value, tokenizer.mask_id, config.model.max_length)
        prompt_length = len(ids)
    forbidden_V = canvas_lib.forbidden_ids(tokenizer, config.model.vocab_size)
    start = time.perf_counter()
    if causal:
        for name in ("cfg_scale", "steps", "block_length"):
            if flags.FLAGS[name].present:
                raise UserError(f"--{name} needs a diffusion model; this workdir holds an ARM")
        sample = sampler.ancestral(
            config.model, opened.params, canvas_BL, prompt_length, opened.special, forbidden_V, TEMPERATURE.value, SEED.value
        )
    else:
        count = int((canvas_BL == tokenizer.mask_id).sum())
        settings = sampler.SamplerConfig(
            steps=count if STEPS.value is None else STEPS.value,
            block_length=count if BLOCK_LENGTH.value is None else BLOCK_LENGTH.value,
            temperature=TEMPERATURE.value,
            cfg_scale=CFG_SCALE.value,
            remasking=REMASKING.value,
        )
        sample = sampler.reverse_process(
            config.model, opened.params, canvas_BL, settings, opened.special, forbidden_V, SEED.value
        )
    ids = np.asarray(sample.tokens_BL)[0].tolist()
    seconds = time.perf_counter() - start
    shown = ids if INFILL.value is not None else canvas_lib.until_eos(ids, tokenizer.eos_id, prompt_length)
    text = tokenizer.decode(shown)
    if JSON.value:
        record = {"ids": ids, "text": text, "forward_passes": sample.forward_passes, "seconds": seconds}
        print(json.dumps(record, ensure_ascii=False))
    else:
        print(text)
    return 0
