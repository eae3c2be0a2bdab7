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
from llada.inference.compiled_loop import Observer
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
    """`ids` is the whole canvas; `text` ends before the first end token after the prompt; `step` says at which step
    each of `ids` was written, -1 where it was given, or stands behind an ARM's end token. `gen_length` tokens were
    open. Passes and seconds are those of the batch it was in, and so are the tokens written per second.
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
    """A request ready to run. Jobs that agree in settings (None for an ARM) and `together` may share a batch."""

    request: Request
    canvas_L: np.ndarray
    prompt_length: int
    count: int  # open positions
    settings: settings_lib.SamplerConfig | None
    together: tuple


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
        groups.setdefault((job.settings, job.together), []).append(index)
    answers: dict[int, Generated] = {}
    for indices in groups.values():
        # Neighbours in length share a batch, so that little of it is padding.
        indices.sort(key=lambda i: len(jobs[i].canvas_L))
        for start in range(0, len(indices), BATCH):
            batch = indices[start : start + BATCH]
            found = _run(config, params, tokenizer, [jobs[i] for i in batch], observe)
            answers |= dict(zip(batch, found, strict=True))
    return [answers[index] for index in range(len(jobs))]


def total_steps(config: Config, tokenizer: Tokenizer, request: Request) -> int:
    """The last step that a request can take, counted from 1. UserError as in `generate`."""
    job = _job(config, tokenizer, request)
    return job.count if job.settings is None else job.settings.steps


def check(config: Config, request: Request) -> None:
    """UserError for what is wrong with a request whatever its text's tokens are: seen before a model is read."""
    settings_lib.check_types(request._asdict(), Request.__annotations__)
    given = [name for name in ("prompt", "prompt_ids", "infill") if getattr(request, name) is not None]
    if len(given) != 1:
        names = " and ".join(f"--{name}" for name in given)
        raise UserError(f"give one of --prompt, --prompt_ids, --infill, not {names or 'none'}")
    if given[0] != "prompt_ids":
        unicode_text(getattr(request, given[0]), f"--{given[0]}")
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


def _padded(jobs: list[_Job]) -> list[_Job]:
    """The jobs, the last repeated until they divide over the devices of the mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    count = len(jobs) if mesh.empty else mesh_lib.local_batch(len(jobs), mesh)
    return jobs + [jobs[-1]] * (count - len(jobs))


def _run(config, params, tokenizer, jobs: list[_Job], observe) -> list[Generated]:
    """One batch."""
    asked, jobs = jobs, _padded(jobs)
    lengths_B = np.array([len(job.canvas_L) for job in jobs])
    canvas_BL = np.full((len(jobs), lengths_B.max()), tokenizer.pad_id, np.int32)
    for row_L, job in zip(canvas_BL, jobs, strict=True):
        row_L[: len(job.canvas_L)] = job.canvas_L
    seed_B = np.array([job.request.seed for job in jobs])
    special = tokenizer.special
    common = (special, canvas_lib.forbidden_ids(tokenizer, config.model.vocab_size))
    if jobs[0].settings is None:
        prompt_B = np.array([job.prompt_length for job in jobs])
        temperature = jobs[0].request.temperature
        sample = ancestral(config.model, params, canvas_BL, prompt_B, *common, temperature, seed_B, observe)
    else:
        padded = None if lengths_B.min() == lengths_B.max() else lengths_B
        sample = sampler.reverse_process(
            config.model, params, canvas_BL, jobs[0].settings, *common, seed_B, padded, observe
        )
    written = int(np.sum(sample.step_BL[: len(asked)] >= 0))
    found = []
    for b, job in enumerate(asked):
        ids, step = (x[b, : lengths_B[b]].tolist() for x in (sample.tokens_BL, sample.step_BL))
        whole = job.request.infill is not None
        shown = ids if whole else canvas_lib.until_end(ids, special.ends, job.prompt_length)
        found.append(
            Generated(
                ids=ids,
                text=tokenizer.decode(shown),
                step=step,
                gen_length=job.count,
                forward_passes=sample.forward_passes,
                seconds=sample.seconds,
                compile_seconds=sample.compile_seconds,
                tokens_per_second=written / sample.seconds,
            )
        )
    return found


def _job(config: Config, tokenizer: Tokenizer, request: Request) -> _Job:
    """Check one request. UserError if it cannot be answered."""
    check(config, request)
    canvas_L, prompt_length, count = _canvas(config, tokenizer, request)
    if config.model.causal:
        return _Job(request, canvas_L, prompt_length, count, None, (request.temperature, count))
    given = {name: getattr(request, name) for name in _OF_DIFFUSION if getattr(request, name) is not None}
    settings = settings_lib.SamplerConfig(
        **{"steps": count, "block_length": count, **given}, temperature=request.temperature
    )
    settings_lib.check(settings, count)
    return _Job(request, canvas_L, prompt_length, count, settings, (-(-count // settings.block_length),))


def _canvas(config: Config, tokenizer: Tokenizer, request: Request) -> tuple[np.ndarray, int, int]:
    """The canvas `(L,)`, the length of its prompt, and how many positions are open."""
    longest = config.model.max_length
    if request.infill is not None:
        canvas_L = canvas_lib.from_infill(request.infill, tokenizer, longest)
        return canvas_L, 0, int(np.sum(canvas_L == tokenizer.mask_id))
    if request.prompt is not None:
        ids = canvas_lib.encode_text(tokenizer, request.prompt, "--prompt")
    else:
        ids = canvas_lib.parse_ids("--prompt_ids", request.prompt_ids, tokenizer.vocab_size)
        if tokenizer.mask_id in ids:
            raise UserError(f"--prompt_ids holds the mask token {tokenizer.mask_id}; use --infill to fill gaps")
    length = min(64, max(1, longest - len(ids))) if request.gen_length is None else int(request.gen_length)
    # An ARM needs no mask: what stands where it will write is never read.
    filler = tokenizer.eos_id if config.model.causal else tokenizer.mask_id
    return canvas_lib.from_prompt(ids, length, filler, longest), len(ids), length
