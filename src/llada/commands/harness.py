"""lm-evaluation-harness's own program with our models in it: python -m llada.commands.harness run --model llada ...

--model_args workdir=DIR[,step=N][,dtype=bfloat16][,template=plain] and any field of `inference/settings.py` that says
how texts are written, or of `LikelihoodConfig`: draws=32,cfg_scale=0.5,block_length=32. All other flags are lm-eval's;
--batch_size changes nothing, as batches are ours.
Its --cache_requests keeps rendered dialogues as plain text, which is not what a chat template means: use it without
--apply_chat_template. `llada lm_eval` has presets, all checkpoints, and several processes besides.
"""

import os
import sys
from typing import Any

from llada import processes
from llada.commands import environment, opening
from llada.config import MeshConfig
from llada.errors import UserError

_OF_LM_EVAL = ("batch_size", "max_batch_size", "device", "chat_template_args")


def register() -> None:
    """Make lm-eval know the model `llada`. UserError where the extra `eval` is not installed."""
    from llada.commands import lm_eval_flags

    lm_eval_flags.require_lm_eval()
    from llada.evaluation.lm_eval import HarnessModel  # before lm-eval, whose surroundings it sets

    from lm_eval.api.registry import register_model  # isort: skip

    class FromWorkdir(HarnessModel):
        """A checkpoint of a workdir, by lm-eval's --model_args."""

        def __init__(self, workdir: str, step: int | None = None, template: str | None = None, **arguments: Any):
            super().__init__(*_opened(str(workdir), step, template, arguments))

    register_model("llada")(FromWorkdir)


def _opened(workdir: str, step: int | None, template: str | None, arguments: dict[str, Any]):
    """Harness, settings and facts for `HarnessModel`. UserError for an argument that there is not."""
    from llada.commands.lm_eval import facts_of, identity_of
    from llada.data.chat_template import ChatTemplate
    from llada.evaluation.harness import Harness, Settings
    from llada.inference.chat import Options, template_source
    from llada.inference.likelihood import LikelihoodConfig, check_settings
    from llada.training import run as run_lib

    given = {name: value for name, value in arguments.items() if name not in _OF_LM_EVAL}
    dtype = given.pop("dtype", opening.DTYPE.default)
    scoring = {name: given[name] for name in LikelihoodConfig.__annotations__ if name in given}
    writing = {name: given[name] for name in Options._fields if name in given}
    own = {name: given.pop(name) for name in ("window", "greedy") if name in given}
    unknown = given.keys() - scoring.keys() - writing.keys()
    if unknown:
        known = ["workdir", "step", "template", "dtype", "window", "greedy"]
        known += [*LikelihoodConfig.__annotations__, *Options._fields]
        raise UserError(f"--model_args has {min(unknown)}, which is none of {', '.join(dict.fromkeys(known))}")
    opened = run_lib.load(workdir, step, MeshConfig(), dtype)
    settings = Settings(LikelihoodConfig(**scoring), Options(**writing), writing.get("gen_length"), **own)
    check_settings(opened.config.model, settings.scoring)
    rendering = None
    if template is not None:
        rendering = ChatTemplate(opened.tokenizer, *template_source(template, "--model_args template"))
    elif opened.tokenizer.template is not None:
        rendering = ChatTemplate(opened.tokenizer)
    facts = identity_of(opened, dtype) | facts_of(opened, {"all": settings})
    return Harness(opened, rendering), lambda task: settings, facts


def main() -> int:
    """Register, and run lm-eval's program on the words of the command line; one process of several writes."""
    try:
        environment.pin_jax_settings()
        environment.use_compilation_cache()
        processes.start()
        register()
        from lm_eval.__main__ import cli_evaluate

        if not processes.is_first():
            sys.argv[1:] = without_output(sys.argv[1:])
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # until the process ends
        with processes.ending_together(UserError, SystemExit):
            cli_evaluate()
    except UserError as error:
        print(f"llada: {error}", file=sys.stderr)
        return error.status
    return 0


def without_output(words: list[str]) -> list[str]:
    """The words without --output_path and its value: lm-eval then writes no file."""
    kept, skip = [], False
    for word in words:
        if not skip and word.partition("=")[0] not in ("--output_path", "-o"):
            kept.append(word)
        skip = not skip and word in ("--output_path", "-o")
    return kept


if __name__ == "__main__":
    from llada.commands import endings

    sys.exit(endings.run(main))
