"""Requests for text, answered by either family: canvases, batches, sampler, text.

Requests that can share one compiled loop run as one batch, padded to the longest; what a request gets does not depend
on the others.
"""

from collections.abc import Callable, Sequence
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
from llada.inference.compiled_loop import Relay, Sample
from llada.model import transformer

BATCH = 16  # requests that run together
_SHORTEST = 64  # tokens: `round_up` makes lengths multiples of it

# Called after every step for each request of a batch: (index of the request, tokens_L, step_L, step), of its own canvas
# only. It may raise, which ends the batch.
Watcher = Callable[[int, np.ndarray, np.ndarray, int], None]

_RELAY = Relay()  # the observer of all watched programs


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
    observe: Watcher | None = None,
    round_up: bool = False,
    full: bool = False,
) -> list[Generated]:
    """Answer the requests, in their order. UserError for one that cannot be answered, before any is run.

    `observe` sees the canvases of a batch after each of its steps; what it raises is raised here. `seconds` excludes
    compilation. With `round_up` lengths are padded to 64, 128, 192, 256, 384, 512, 768 ... tokens and batches to powers
    of two: requests of many lengths then share a few programs, and get what they get without it. With `full` all
    batches have one size, BATCH: requests of one rounded length get the same bits whatever the others.
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
            batch_jobs = [jobs[i] for i in batch]
            # The last job is repeated until the batch divides over the devices of the mesh.
            B = BATCH if full else 1 << (len(batch) - 1).bit_length() if round_up else len(batch)
            B = mesh_lib.local_batch(B, jax.sharding.get_abstract_mesh())
            rows = batch_jobs + [batch_jobs[-1]] * (B - len(batch))
            if observe is None:
                sample = _sample(config, params, tokenizer, rows, None, round_up)
            else:
                listener = _Listener(observe, batch, batch_jobs)
                with _RELAY.to(listener):
                    sample = _sample(config, params, tokenizer, rows, _RELAY, round_up)
                if listener.raised is not None:
                    raise listener.raised
            answers |= dict(zip(batch, _answers(tokenizer, batch_jobs, sample), strict=True))
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


class _Listener:
    """An observer of a batch that shows `observe` the canvas of each request, and ends the loop if that raises."""

    raised: BaseException | None = None

    def __init__(self, observe: Watcher, indices: list[int], jobs: list[_Job]):
        self._observe, self._indices, self._jobs = observe, indices, jobs

    def __call__(self, tokens_BL: np.ndarray, step_BL: np.ndarray, step: int) -> bool:
        if self.raised is None:
            try:
                for index, job, tokens_L, step_L in zip(self._indices, self._jobs, tokens_BL, step_BL, strict=False):
                    L = len(job.canvas_L)
                    self._observe(index, tokens_L[:L], step_L[:L], step)
            except BaseException as error:  # raised again where the loop was started
                self.raised = error
        return self.raised is not None


def _answers(tokenizer: Tokenizer, jobs: list[_Job], sample: Sample) -> list[Generated]:
    """The answers to the requests of one batch, whose first rows are theirs."""
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
    observe: Relay | None,
    round_up: bool,
) -> Sample:
    """The canvases of a batch, padded to the longest or beyond it, and filled by the family's sampler."""
    model, special, settings = config.model, tokenizer.special, jobs[0].settings
    lengths_B = np.array([len(job.canvas_L) for job in jobs])
    prompt_length_B = np.array([job.prompt_length for job in jobs])
    # Positions of an ARM are counted from the end of the longest prompt.
    behind = 0 if settings else jobs[0].open_count
    longest = int(prompt_length_B.max() if settings is None else lengths_B.max())
    if round_up:
        longest = max(longest, min(rounded_up(longest), model.max_length - behind))
    canvas_BL = np.full((len(jobs), longest + behind), tokenizer.pad_id, np.int32)
    for row_L, job in zip(canvas_BL, jobs, strict=True):
        row_L[: len(job.canvas_L)] = job.canvas_L
    seed_B = np.array([job.request.seed for job in jobs])
    forbidden_V = canvas_lib.forbidden_ids(tokenizer, model.vocab_size)
    if settings is None:
        temperature = jobs[0].request.temperature
        return ancestral(
            model, params, canvas_BL, prompt_length_B, special, forbidden_V, temperature, seed_B, observe, longest
        )
    padded_B = None if not round_up and lengths_B.min() == lengths_B.max() else lengths_B
    return sampler.reverse_process(model, params, canvas_BL, settings, special, forbidden_V, seed_B, padded_B, observe)


def rounded_up(length: int) -> int:
    """The next of 64, 128, and from there on two lengths an octave."""
    unit = max(_SHORTEST, 1 << max(0, (length - 1).bit_length() - 2))
    return -(-length // unit) * unit


def _job(config: Config, tokenizer: Tokenizer, request: Request) -> _Job:
    """A request made ready to run. UserError if it cannot be answered."""
    check(config, request)
    canvas_L, prompt_length, open_count = _canvas(config, tokenizer, request)
    if config.model.causal:
        return _Job(request, canvas_L, prompt_length, open_count, None, (request.temperature, open_count))
    settings = sampler_settings(request, open_count)
    return _Job(request, canvas_L, prompt_length, open_count, settings, (-(-open_count // settings.block_length),))


def sampler_settings(request: Request, open_count: int) -> settings_lib.SamplerConfig:
    """How a diffusion model fills `open_count` positions for this request. UserError if it cannot."""
    chosen = {name: getattr(request, name) for name in _OF_DIFFUSION if getattr(request, name) is not None}
    settings = settings_lib.SamplerConfig(
        **{"steps": open_count, "block_length": open_count, **chosen}, temperature=request.temperature
    )
    settings_lib.check(settings, open_count)
    return settings


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
