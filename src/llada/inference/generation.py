"""Requests for text, answered by either family: canvases, batches, sampler, text.

Requests that can share one compiled loop run as one batch, padded to the longest; what a request gets does not depend
on the others.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from llada import mesh as mesh_lib
from llada.config import Config
from llada.data.tokenizer import Tokenizer, unicode_text
from llada.errors import UserError
from llada.inference import canvas as canvas_lib
from llada.inference import sampler
from llada.inference import settings as settings_lib
from llada.inference.ancestral import ancestral
from llada.inference.compiled_loop import Observer, Sample
from llada.model import transformer

BATCH = 16  # requests that run together


class Request(NamedTuple):
    """What to write: continue `prompt` or `prompt_ids` by `gen_length` tokens, or fill the marks of `infill`.

    `prompt_ids` are integers, or text such as "12,7,99". `gen_length` None is what the context leaves, at most 64. The
    fields from `steps` on, without `temperature` and `seed`, are for the reverse process (`settings.SamplerConfig`):
    None is one step per token, one block, no guidance, low confidence, end tokens as they come, no speculation, no
    cache, no threshold.
    """

    prompt: str | None = None
    prompt_ids: Sequence[int] | str | None = None
    infill: str | None = None
    gen_length: int | None = None
    steps: int | None = None
    block_length: int | None = None
    temperature: float = 0.0
    cfg_scale: float | None = None
    remasking: str | None = None
    eos: str | None = None
    speculate: int | None = None
    cache: str | None = None
    confidence_threshold: float | None = None
    seed: int = 0


class Generated(NamedTuple):
    """The answer to a request.

    ids         the canvas, filled
    text        of the ids up to the first end token after the prompt; of all of them for an infilled text
    step        at which step each of `ids` was written, -1 where it is the request's or follows an ARM's end token
    gen_length  how many positions were open
    The figures of cost are those of the batch that the request was in: forward passes, seconds of the compiled loop and
    of compiling it before, tokens written per second.
    """

    ids: list[int]
    text: str
    step: list[int]
    gen_length: int
    forward_passes: int
    seconds: float
    compile_seconds: float
    tokens_per_second: float


class _Job(NamedTuple):
    """A request ready to run. Jobs that agree in settings (None for an ARM) and in `shape` may share a batch.

    `shape`: of a diffusion model the number of blocks; of an ARM temperature and number of tokens.
    """

    request: Request
    canvas_L: np.ndarray
    prompt_length: int
    open_count: int
    settings: settings_lib.SamplerConfig | None
    shape: tuple


def generate(
    config: Config,
    params: transformer.Parameters,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    observe: Observer | None = None,
) -> list[Generated]:
    """Answer the requests, in their order. UserError for one that cannot be answered, before any is run.

    `observe` sees the first row of every batch after each step. `seconds` excludes compilation.
    """
    jobs = [_job(config, tokenizer, request) for request in requests]
    groups: dict[tuple, list[int]] = {}
    for index, job in enumerate(jobs):
        groups.setdefault((job.settings, job.shape), []).append(index)
    answers: dict[int, Generated] = {}
    for indices in groups.values():
        # Neighbours in length share a batch, so that little of it is padding.
        indices.sort(key=lambda i: len(jobs[i].canvas_L))
        for start in range(0, len(indices), BATCH):
            batch = indices[start : start + BATCH]
            generated = _run_batch(config, params, tokenizer, [jobs[i] for i in batch], observe)
            answers |= dict(zip(batch, generated, strict=True))
    return [answers[index] for index in range(len(jobs))]


def total_steps(config: Config, tokenizer: Tokenizer, request: Request) -> int:
    """The last step that a request can take, counted from 1. UserError as in `generate`."""
    job = _job(config, tokenizer, request)
    return job.open_count if job.settings is None else job.settings.steps


def check(config: Config, request: Request) -> None:
    """UserError for what is wrong with a request whatever its tokens are, so that no model need be read to tell."""
    settings_lib.check_types(request._asdict(), Request.__annotations__)
    prompts = [name for name in ("prompt", "prompt_ids", "infill") if getattr(request, name) is not None]
    if len(prompts) != 1:
        names = " and ".join(f"--{name}" for name in prompts)
        raise UserError(f"give one of --prompt, --prompt_ids, --infill, not {names or 'none'}")
    if prompts[0] != "prompt_ids":
        unicode_text(getattr(request, prompts[0]), f"--{prompts[0]}")
    if not 0 <= request.seed < 1 << 32:
        raise UserError(f"--seed={request.seed} must be between 0 and {(1 << 32) - 1}")
    settings_lib.check_temperature(request.temperature)
    if request.infill is not None and request.gen_length is not None:
        raise UserError(f"--gen_length={request.gen_length} is for prompts; --infill's marks say how many tokens")
    if request.gen_length is not None and not 1 <= request.gen_length <= config.model.max_length:
        raise UserError(
            f"--gen_length={request.gen_length} must be at least 1, and with the prompt at most "
            f"model.max_length={config.model.max_length}"
        )
    if not config.model.causal:
        return
    if request.infill is not None:
        raise UserError("--infill needs a diffusion model; this one is an ARM, which writes left to right")
    for name in _OF_DIFFUSION:
        if getattr(request, name) is not None:
            raise UserError(f"--{name} needs a diffusion model; this one is an ARM, written left to right")


_OF_DIFFUSION = ("steps", "block_length", "cfg_scale", "remasking", "eos", "speculate", "cache", "confidence_threshold")


def _run_batch(
    config: Config,
    params: transformer.Parameters,
    tokenizer: Tokenizer,
    jobs: list[_Job],
    observe: Observer | None,
) -> list[Generated]:
    """The answers to the requests of one batch."""
    # The last job is repeated until the batch divides over the devices of the mesh.
    B = mesh_lib.local_batch(len(jobs), jax.sharding.get_abstract_mesh())
    sample = _sample(config, params, tokenizer, jobs + [jobs[-1]] * (B - len(jobs)), observe)
    written = int(np.sum(sample.step_BL[: len(jobs)] >= 0))
    answers = []
    for job, tokens_L, step_L in zip(jobs, sample.tokens_BL, sample.step_BL, strict=False):
        ids, step = (x[: len(job.canvas_L)].tolist() for x in (tokens_L, step_L))
        infilled = job.request.infill is not None
        shown = ids if infilled else canvas_lib.until_end(ids, tokenizer.special.ends, job.prompt_length)
        answers.append(
            Generated(
                ids=ids,
                text=tokenizer.decode(shown),
                step=step,
                gen_length=job.open_count,
                forward_passes=sample.forward_passes,
                seconds=sample.seconds,
                compile_seconds=sample.compile_seconds,
                tokens_per_second=written / sample.seconds,
            )
        )
    return answers


def _sample(
    config: Config,
    params: transformer.Parameters,
    tokenizer: Tokenizer,
    jobs: list[_Job],
    observe: Observer | None,
) -> Sample:
    """The canvases of a batch, padded to the longest, and filled by the family's sampler."""
    lengths_B = np.array([len(job.canvas_L) for job in jobs])
    canvas_BL = np.full((len(jobs), lengths_B.max()), tokenizer.pad_id, np.int32)
    for row_L, job in zip(canvas_BL, jobs, strict=True):
        row_L[: len(job.canvas_L)] = job.canvas_L
    seed_B = np.array([job.request.seed for job in jobs])
    forbidden_V = canvas_lib.forbidden_ids(tokenizer, config.model.vocab_size)
    model, special, settings = config.model, tokenizer.special, jobs[0].settings
    if settings is None:
        prompt_length_B = np.array([job.prompt_length for job in jobs])
        temperature = jobs[0].request.temperature
        return ancestral(model, params, canvas_BL, prompt_length_B, special, forbidden_V, temperature, seed_B, observe)
    padded_B = None if lengths_B.min() == lengths_B.max() else lengths_B
    return sampler.reverse_process(model, params, canvas_BL, settings, special, forbidden_V, seed_B, padded_B, observe)


def _job(config: Config, tokenizer: Tokenizer, request: Request) -> _Job:
    """A request made ready to run. UserError if it cannot be answered."""
    check(config, request)
    canvas_L, prompt_length, open_count = _canvas(config, tokenizer, request)
    if config.model.causal:
        return _Job(request, canvas_L, prompt_length, open_count, None, (request.temperature, open_count))
    chosen = {name: getattr(request, name) for name in _OF_DIFFUSION if getattr(request, name) is not None}
    settings = settings_lib.SamplerConfig(
        **{"steps": open_count, "block_length": open_count, **chosen}, temperature=request.temperature
    )
    settings_lib.check(settings, open_count)
    return _Job(request, canvas_L, prompt_length, open_count, settings, (-(-open_count // settings.block_length),))


def _canvas(config: Config, tokenizer: Tokenizer, request: Request) -> tuple[np.ndarray, int, int]:
    """The canvas `(L,)`, the length of its prompt, and how many positions are open."""
    longest = config.model.max_length
    if request.infill is not None:
        canvas_L = canvas_lib.from_infill(request.infill, tokenizer, longest)
        return canvas_L, 0, int(np.sum(canvas_L == tokenizer.mask_id))
    if request.prompt_ids is None:
        ids = canvas_lib.encode_text(tokenizer, request.prompt or "", "--prompt")
    else:
        ids = canvas_lib.parse_ids("--prompt_ids", request.prompt_ids, tokenizer.vocab_size)
        if tokenizer.mask_id in ids:
            raise UserError(f"--prompt_ids holds the mask token {tokenizer.mask_id}; use --infill to fill gaps")
    length = min(64, max(1, longest - len(ids))) if request.gen_length is None else int(request.gen_length)
    # An ARM needs no mask: what stands where it will write is never read.
    filler = tokenizer.eos_id if config.model.causal else tokenizer.special.mask_id
    return canvas_lib.from_prompt(ids, length, filler, longest), len(ids), length
