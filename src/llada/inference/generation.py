"""One request for text, answered by either family: canvas, sampler, text."""

import time
from typing import NamedTuple

import numpy as np

from llada.config import Config
from llada.data.tokenizer import Tokenizer
from llada.errors import UserError
from llada.inference import canvas as canvas_lib
from llada.inference import sampler
from llada.model import transformer
from llada.objectives.contract import SpecialTokens


class Request(NamedTuple):
    """What to write: continue `prompt` or `prompt_ids` by `gen_length` tokens, or fill the marks of `infill`.

    `gen_length` None is what the context leaves, at most 64. `steps`, `block_length`, `cfg_scale`, `remasking` are for
    the reverse process (`sampler.SamplerConfig`): None is one step per token, one block, no guidance, low confidence.
    """

    prompt: str | None = None
    prompt_ids: str | None = None
    infill: str | None = None
    gen_length: int | None = None
    steps: int | None = None
    block_length: int | None = None
    temperature: float = 0.0
    cfg_scale: float | None = None
    remasking: str | None = None
    seed: int = 0


class Generated(NamedTuple):
    """`ids` is the whole canvas; `text` ends before the first end-of-text token after the prompt."""

    ids: list[int]
    text: str
    forward_passes: int
    seconds: float


def generate(config: Config, params: transformer.Parameters, tokenizer: Tokenizer, request: Request) -> Generated:
    """Answer `request`; UserError for what cannot be answered. `seconds` includes compilation."""
    causal = config.objective.name == "autoregressive"
    if causal:
        for name in ("infill", "steps", "block_length", "cfg_scale", "remasking"):
            if getattr(request, name) is not None:
                raise UserError(f"--{name} needs a diffusion model; this one is an ARM, which writes left to right")
    canvas_BL, prompt_length = _canvas(config, tokenizer, request)
    forbidden_V = canvas_lib.forbidden_ids(tokenizer, config.model.vocab_size)
    special = SpecialTokens(mask=tokenizer.mask_id, eos=tokenizer.eos_id)
    start = time.perf_counter()
    if causal:
        sample = sampler.ancestral(
            config.model, params, canvas_BL, prompt_length, special, forbidden_V, request.temperature, request.seed
        )
    else:
        count = int(np.sum(canvas_BL == tokenizer.mask_id))
        settings = sampler.SamplerConfig(
            steps=count if request.steps is None else request.steps,
            block_length=count if request.block_length is None else request.block_length,
            temperature=request.temperature,
            cfg_scale=request.cfg_scale or 0.0,
            remasking=request.remasking or "low_confidence",
        )
        sample = sampler.reverse_process(config.model, params, canvas_BL, settings, special, forbidden_V, request.seed)
    ids = np.asarray(sample.tokens_BL)[0].tolist()
    shown = ids if request.infill is not None else canvas_lib.until_eos(ids, tokenizer.eos_id, prompt_length)
    return Generated(ids, tokenizer.decode(shown), sample.forward_passes, time.perf_counter() - start)


def _canvas(config: Config, tokenizer: Tokenizer, request: Request) -> tuple[np.ndarray, int]:
    """The canvas and the length of its prompt."""
    given = [name for name in ("prompt", "prompt_ids", "infill") if getattr(request, name) is not None]
    if len(given) != 1:
        names = " and ".join(f"--{name}" for name in given)
        raise UserError(f"give one of --prompt, --prompt_ids, --infill, not {names or 'none'}")
    longest = config.model.max_length
    if request.infill is not None:
        return canvas_lib.from_infill(request.infill, tokenizer, longest), 0
    if request.prompt is not None:
        ids = tokenizer.encode(request.prompt)
    else:
        ids = canvas_lib.parse_ids(request.prompt_ids, tokenizer.vocab_size)
        if tokenizer.mask_id in ids:
            raise UserError(f"--prompt_ids holds the mask token {tokenizer.mask_id}; use --infill to fill gaps")
    length = min(64, max(1, longest - len(ids))) if request.gen_length is None else request.gen_length
    return canvas_lib.from_prompt(ids, length, tokenizer.mask_id, longest), len(ids)
