"""llada likelihood --workdir=DIR --prompt=TEXT --answer=TEXT [--draws=128 --cfg_scale=0.5 --estimator=chain_rule]

log p(answer | prompt) in nats, as JSON with its standard error. A LLaDA's is a likelihood bound (LLaDA Eq. (6), on
masks fixed by the prompt) or a chain rule; an ARM's is exact. --requests scores a JSONL file of prompts and answers
in batches, a line of JSON for each; --rolling scores a text longer than the context.
"""

import json
import math
from pathlib import Path

from absl import flags

from llada.commands import progress
from llada.errors import UserError

WORKDIR = flags.DEFINE_string("workdir", None, "a workdir of llada train")
STEP = flags.DEFINE_integer("step", None, "checkpoint to use; default the latest")
PROMPT = flags.DEFINE_string("prompt", None, "what the answer is conditioned on; default nothing")
ANSWER = flags.DEFINE_string("answer", None, "the text whose likelihood is asked")
PROMPT_IDS = flags.DEFINE_string("prompt_ids", None, "the prompt as token ids: 12,7,99")
ANSWER_IDS = flags.DEFINE_string("answer_ids", None, "the answer as token ids")
REQUESTS = flags.DEFINE_string(
    "requests", None, 'JSONL file of requests: {"prompt": ..., "answer": ...} or prompt_ids, answer_ids as lists'
)
ESTIMATOR = flags.DEFINE_string(
    "estimator", "l_of_L", "l_of_L (Eq. (6)), bernoulli (Eq. (4)), chain_rule or confidence_ordered"
)
DRAWS = flags.DEFINE_integer("draws", 128, "masks per answer; answers with fewer masks than that are enumerated")
CFG_SCALE = flags.DEFINE_float("cfg_scale", 0.0, "classifier-free guidance w of LLaDA Eq. (16); 0 is off")
ROLLING = flags.DEFINE_bool("rolling", False, "score a long answer window by window, each given what came before it")
WINDOW = flags.DEFINE_integer("window", None, "tokens per window of --rolling; default half the context")
BATCH_TOKENS = flags.DEFINE_integer("batch_tokens", None, "tokens per forward pass; default by device", lower_bound=1)


def run() -> int:
    """Score and print."""
    if not WORKDIR.value:
        raise UserError("--workdir is missing; give a workdir of llada train")
    requests = _requests()
    if WINDOW.value is not None and not ROLLING.value:
        raise UserError(f"--window={WINDOW.value} is for --rolling")
    import jax

    from llada.inference import likelihood
    from llada.training import workdir as workdir_lib

    opened = workdir_lib.load(WORKDIR.value, STEP.value)
    settings = likelihood.LikelihoodConfig(
        estimator=ESTIMATOR.value,
        draws=DRAWS.value,
        cfg_scale=CFG_SCALE.value,
        batch_tokens=BATCH_TOKENS.value,
    )
    pairs = [_pair(opened.tokenizer, request) for request in requests]
    common = (opened.tokenizer.special, settings)
    with jax.set_mesh(opened.mesh), progress.bar("rows scored") as show:
        if ROLLING.value:
            if any(pair.prompt for pair in pairs):
                raise UserError("--rolling scores a text by itself; put the prompt into --answer")
            found = [
                likelihood.rolling(opened.config.model, opened.params, pair.answer, *common, WINDOW.value, show)
                for pair in pairs
            ]
        else:
            found = likelihood.log_likelihoods(opened.config.model, opened.params, pairs, *common, show)
    for result in found:
        values = result._asdict() | {"nats_per_token": -result.log_likelihood / result.tokens}
        values["stderr"] = None if math.isnan(result.stderr) else result.stderr
        print(json.dumps({"step": opened.step, **values}, indent=None if REQUESTS.value else 2))
    return 0


def _requests() -> list[dict]:
    single = {"prompt": PROMPT.value, "answer": ANSWER.value, "prompt_ids": PROMPT_IDS.value}
    single = {k: v for k, v in (single | {"answer_ids": ANSWER_IDS.value}).items() if v is not None}
    if REQUESTS.value is None:
        if "prompt" in single and "prompt_ids" in single:
            raise UserError("give one of --prompt and --prompt_ids, not both")
        if ("answer" in single) == ("answer_ids" in single):
            raise UserError("give one of --answer and --answer_ids (or --requests=FILE.jsonl)")
        return [single]
    if single:
        raise UserError(f"--{next(iter(single))} and --requests exclude each other")
    path = Path(REQUESTS.value)
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--requests={path} cannot be read: {error}") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            request = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"--requests={path} line {number} is not JSON ({error})") from error
        known = {"prompt": str, "answer": str, "prompt_ids": list, "answer_ids": list}
        right = isinstance(request, dict) and all(isinstance(v, known.get(k, ())) for k, v in request.items())
        if not right or ("answer" in request) == ("answer_ids" in request):
            raise UserError(
                f"--requests={path} line {number} must be an object with an answer (or answer_ids) and perhaps a "
                "prompt (or prompt_ids); texts are strings, ids are lists"
            )
        found.append(request)
    if not found:
        raise UserError(f"--requests={path} holds no request")
    return found


def _pair(tokenizer, request: dict):
    from llada.inference.canvas import parse_ids
    from llada.inference.likelihood import Pair

    def ids(name):
        if name in request:
            return tokenizer.encode(request[name])
        given = request.get(f"{name}_ids", "")
        text = given if isinstance(given, str) else " ".join(map(str, given))
        return parse_ids(f"--{name}_ids", text, tokenizer.vocab_size)

    return Pair(ids("prompt"), ids("answer"))
