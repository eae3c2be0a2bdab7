"""llada likelihood --workdir=DIR --prompt=TEXT --answer=TEXT [--draws=128 --cfg_scale=0.5 --estimator=chain_rule]

log p(answer | prompt) in nats, as JSON with its standard error, and of what `kind` it is. A LLaDA's is a likelihood
bound (LLaDA Eq. (6), on masks fixed by the prompt), a chain rule, or with --estimator=sampler the exact log-probability
that llada sample --remasking=top_probability writes the answer with: --steps, --block_length, --confidence_threshold,
--cfg_scale as there, --temperature=1 unless another is given. An ARM's is exact. --requests scores a JSONL file of
prompts and answers in batches, a line of JSON for each; --rolling scores a text longer than the context. Prompt and
answer are encoded as one text, and spaces that end the prompt count to the answer. --config.mesh.* and --dtype say how
the model lies on the devices, and several processes may share it.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from llada import json_files, processes
from llada.commands import joining, opening, progress, sampling
from llada.commands.command_flags import CommandFlags
from llada.errors import UserError
from llada.paths import readable_file

if TYPE_CHECKING:  # at run time these would import JAX, before the flags are parsed
    from llada.inference.likelihood import Pair
    from llada.training.run import Run

FLAGS = CommandFlags(opening.FLAGS, joining.FLAGS, sampling.ORDER_FLAGS)
WORKDIR = FLAGS.define_string("workdir", None, "a workdir of llada train")
STEP = FLAGS.define_integer("step", None, "checkpoint to use; default the latest")
PROMPT = FLAGS.define_string("prompt", None, "what the answer is conditioned on; default nothing")
ANSWER = FLAGS.define_string("answer", None, "the text whose likelihood is asked")
PROMPT_IDS = FLAGS.define_string("prompt_ids", None, "the prompt as token ids: 12,7,99")
ANSWER_IDS = FLAGS.define_string("answer_ids", None, "the answer as token ids")
REQUESTS = FLAGS.define_string(
    "requests",
    None,
    'JSONL file of requests: {"prompt": ..., "answer": ...} or prompt_ids, answer_ids as lists; -: standard input',
)
ESTIMATOR = FLAGS.define_string(
    "estimator",
    "l_of_L",
    "l_of_L (Eq. (6)), bernoulli (Eq. (4)), chain_rule, chain_rule_reversed, confidence_ordered, sampler, or upper: "
    "the bound from the other side, for short answers",
)
DRAWS = FLAGS.define_integer(
    "draws", 128, "masks per answer (upper: orders); answers with fewer masks than that are enumerated"
)
TEMPERATURE = FLAGS.define_float("temperature", 1.0, "of the draws of --estimator=sampler; above 0")
CFG_SCALE = FLAGS.define_float("cfg_scale", 0.0, "classifier-free guidance w of LLaDA Eq. (16); 0 is off")
ROLLING = FLAGS.define_bool("rolling", False, "score a long answer window by window, each given what came before it")
WINDOW = FLAGS.define_integer("window", None, "tokens per window of --rolling; default half the context")
OF_SAMPLER = (sampling.STEPS, sampling.BLOCK_LENGTH, sampling.CONFIDENCE_THRESHOLD)
BATCH_TOKENS = FLAGS.define_integer("batch_tokens", None, "tokens per forward pass; default by device", lower_bound=1)


_FIELDS = {"prompt": str, "answer": str, "prompt_ids": list, "answer_ids": list}


class _Request(NamedTuple):
    """A prompt and an answer, each as text or ids; what errors call these two, and the line they came from."""

    prompt: str | list
    answer: str | list
    names: tuple[str, str]
    source: str


def run(overrides: dict[str, str]) -> int:
    """Score and print."""
    if not WORKDIR.value:
        raise UserError("--workdir is missing; give a workdir of llada train")
    if WINDOW.value is not None and not ROLLING.value:
        raise UserError(f"--window={WINDOW.value} is for --rolling")
    mesh = opening.mesh(overrides)
    joining.join()
    with processes.agreement():
        requests = list(_requests())
    import jax

    from llada.inference import canvas, likelihood
    from llada.training import run as run_lib

    settings = likelihood.LikelihoodConfig(
        estimator=ESTIMATOR.value,
        draws=DRAWS.value,
        cfg_scale=CFG_SCALE.value,
        batch_tokens=BATCH_TOKENS.value,
        steps=sampling.STEPS.value,
        block_length=sampling.BLOCK_LENGTH.value,
        temperature=TEMPERATURE.value,
        confidence_threshold=sampling.CONFIDENCE_THRESHOLD.value,
    )
    with processes.agreement():
        model = run_lib.read_config(WORKDIR.value).model
        likelihood.check_settings(model, settings)
        _refuse_idle_flags(model.causal)
        if ROLLING.value:
            likelihood.window_of(model, WINDOW.value)
    opening.require_same([mesh, STEP.value, opening.DTYPE.value, settings, ROLLING.value, WINDOW.value, requests])
    opened = opening.open_run(WORKDIR.value, STEP.value, mesh)
    pairs = [_pair(opened, request) for request in requests]
    params, special = opened.params, opened.tokenizer.special
    never = canvas.forbidden_ids(opened.tokenizer, model.vocab_size)
    with jax.set_mesh(opened.mesh), processes.ending_together(UserError), progress.bar("rows scored") as show:
        if ROLLING.value:
            results = [
                likelihood.rolling(model, params, pair.answer, special, settings, WINDOW.value, show, never)
                for pair in pairs
            ]
        else:
            passes = 0 if model.causal else sum(likelihood.passes(settings, len(pair.answer)) for pair in pairs)
            show = progress.with_cost(show, f"{len(pairs):,} answers", passes)
            results = likelihood.log_likelihoods(model, params, pairs, special, settings, show, never)
    for result in results if processes.is_first() else ():
        nats_per_token = -result.log_likelihood / result.tokens
        values = result._asdict() | {"nats_per_token": nats_per_token, "kind": result.kind}
        print(json_files.dumps({"step": opened.step, **values}, indent=None if REQUESTS.value else 2))
    return 0


def _pair(opened: "Run", request: _Request) -> "Pair":
    """A request's ids. UserError, naming where it came from, for one that cannot be scored."""
    from llada.inference import canvas, likelihood

    with _named(request.source):
        pair = likelihood.Pair(*canvas.encode_pair(opened.tokenizer, request.prompt, request.answer, request.names))
        if not ROLLING.value:
            likelihood.check_pair(opened.config.model, pair, opened.tokenizer.special)
        elif pair.prompt or not pair.answer:
            raise UserError("--rolling scores a text by itself, which is not empty; put the prompt into --answer")
        return pair


def _refuse_idle_flags(causal: bool) -> None:
    """UserError for flags that were given and would change nothing."""
    for flag in (DRAWS, ESTIMATOR, TEMPERATURE, *OF_SAMPLER):
        if causal and flag.present:
            raise UserError(f"--{flag.name}={flag.value} is for diffusion models; this ARM's likelihood is exact")
    from llada.inference import likelihood

    if DRAWS.present and ESTIMATOR.value not in likelihood.DRAWN:
        raise UserError(
            f"--draws={DRAWS.value} is for --estimator={', '.join(likelihood.DRAWN)}; {ESTIMATOR.value} draws nothing"
        )


def _requests() -> Iterator[_Request]:
    """Those of the flags, or of the lines of --requests."""
    from llada.inference.canvas import listed

    single: dict[str, Any] = {flag.name: flag.value for flag in (PROMPT, ANSWER) if flag.value is not None}
    single |= {flag.name: listed(flag.value) for flag in (PROMPT_IDS, ANSWER_IDS) if flag.value is not None}
    if REQUESTS.value is None:
        yield _request(single, "--", "")
        return
    if single:
        raise UserError(f"--{next(iter(single))} and --requests exclude each other")
    name, empty = f"--requests={REQUESTS.value}", True
    if REQUESTS.value == "-":
        if sys.stdin is None:
            raise UserError("--requests=- reads standard input, which is closed")
        lines = json_files.lines(sys.stdin.buffer.read(), name)
    else:
        lines = json_files.read_lines(readable_file(REQUESTS.value, "--requests"), name)
    for number, values in lines:
        source, empty = f"{name} line {number}", False
        for key, value in values.items():
            if not isinstance(value, _FIELDS.get(key, ())):
                raise UserError(
                    f"{source} has {key!r}, which must be one of prompt, answer (texts), prompt_ids, answer_ids (lists)"
                )
        yield _request(values, "", source)
    if empty:
        raise UserError(f"{name} holds no request")


def _request(fields: dict[str, Any], dashes: str, source: str) -> _Request:
    """One request. UserError unless it has an answer and perhaps a prompt, each as text or as ids."""
    with _named(source):
        if "prompt" in fields and "prompt_ids" in fields:
            raise UserError(f"give one of {dashes}prompt and {dashes}prompt_ids, not both")
        if ("answer" in fields) == ("answer_ids" in fields):
            instead = " (or --requests=FILE.jsonl)" if dashes else ""
            raise UserError(f"give one of {dashes}answer and {dashes}answer_ids{instead}")
    prompt = fields.get("prompt", fields.get("prompt_ids", ""))
    answer = fields["answer"] if "answer" in fields else fields["answer_ids"]
    return _Request(prompt, answer, (f"{dashes}prompt", f"{dashes}answer"), source)


@contextlib.contextmanager
def _named(source: str) -> Iterator[None]:
    """A block whose UserErrors begin with where the request came from."""
    try:
        yield
    except UserError as error:
        if not source:
            raise
        raise type(error)(f"{source}: {error}") from error
