"""Our models for lm-evaluation-harness (extra `eval`): its class `LM`, over `harness.Harness`.

lm-eval sees one process (world_size 1, rank 0): of several JAX processes all get all requests, share each batch, and
only the first is to write results.

`is_greedy` of a log-likelihood says whether the answer is what the model writes by itself; of a mask predictor that is
the reverse process on as many masks as the answer has tokens: see `inference/greedy.py`.
"""

import hashlib
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from llada.data.chat_template import ChatTemplate, Rendered
from llada.errors import UserError
from llada.evaluation.harness import Harness, Settings, Text, Until
from llada.inference.chat import Options

# lm-eval and its libraries read these: no bars in a log, and no processes forked beside JAX's threads.
os.environ.setdefault("DISABLE_MULTIPROC", "1")
if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

from lm_eval.api.model import LM

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # lm-eval's, in its order
_DEFAULT_LENGTH = 256  # lm-eval's, where a task names none
_HARMLESS = {"do_sample", "top_p", "top_k", "num_beams", "repetition_penalty"}


class HarnessModel(LM):
    """An opened model as lm-eval's `LM`; `settings_of(task name)` says how the requests of a task are answered."""

    def __init__(
        self,
        harness: Harness,
        settings_of: Callable[[str], Settings] = lambda task: Settings(),
        facts: Mapping[str, Any] | None = None,
    ):
        """`facts`: what results say of the model, beside what happened to requests."""
        super().__init__()
        self.harness, self.settings_of, self._facts = harness, settings_of, dict(facts or {})
        self._rendered: dict[str, Rendered] = {}
        self._ignored: set[str] = set()

    def loglikelihood(self, requests) -> list[tuple[float, bool]]:
        """(log p(answer | context), is_greedy) of each request: a bound of a mask predictor, exact of an ARM."""
        scored = self.harness.score(*self._pairs(requests))
        return [(each.log_likelihood, each.is_greedy) for each in scored]

    def loglikelihood_rolling(self, requests) -> list[float]:
        """log p of each text, window by window."""
        texts = [request.args[0] for request in requests]
        return [each.log_likelihood for each in self.harness.score_texts(texts, self._settings(requests))]

    def generate_until(self, requests) -> list[str]:
        """The text behind each context, up to the first of its stops."""
        return self.harness.write(self._untils(requests), self._settings(requests))

    def planned(self, kind: str, requests) -> dict[str, int]:
        """`Harness.planned` for requests of one kind of lm-eval's."""
        if kind == "generate_until":
            return self.harness.planned("write", self._untils(requests), self._settings(requests))
        if kind == "loglikelihood_rolling":
            texts = [request.args[0] for request in requests]
            return self.harness.planned("score_texts", texts, self._settings(requests))
        return self.harness.planned("score", *self._pairs(requests))

    # Dialogues: lm-eval hands contexts on as texts; the ids of those that were rendered here are kept.

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The dialogue as text, up to where the answer begins; or, without the prompt, with the beginning of it."""
        template = self._template()
        if add_generation_prompt:
            rendered = template.rendered(chat_history)
        else:
            before, begun = template.rendered(chat_history[:-1]), chat_history[-1]["content"]
            ids = before.ids + template.answer_ids(before, begun)
            rendered = Rendered(before.text + begun, ids, before.after_text or bool(begun))
        known = self._rendered.setdefault(rendered.text, rendered)
        if known.ids != rendered.ids:
            raise UserError(
                f"two dialogues look alike and are not: {rendered.text[:80]!r} spells control tokens as text"
            )
        return rendered.text

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The Jinja source of the template; False, and None, are none. UserError for a name: it is chosen before."""
        if isinstance(chat_template, str) and chat_template not in ("", "default"):
            raise UserError(
                f"--apply_chat_template={chat_template}: a template is chosen by the model's arg template=NAME"
            )
        return self._template().source if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """Names tokenizer and template, for lm-eval's own cache of prompts."""
        source = self.harness.template.source if self.harness.template is not None else ""
        return f"{self.harness.run.tokenizer.sha256[:16]}-{_digest(source)}"

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into results: the model, and what happened to requests so far."""
        tally = self.harness.tally
        return self._facts | {"requests": vars(tally) | {"ignored_arguments": sorted(self._ignored)}}

    def _template(self) -> ChatTemplate:
        if self.harness.template is None:
            raise UserError(
                "the model's tokenizer has no chat template; give one: --template=plain, --template=llada or "
                "--template=FILE, the one that it was tuned with"
            )
        return self.harness.template

    def _settings(self, requests) -> list[Settings]:
        return [self.settings_of(request.task_name or "") for request in requests]

    def _pairs(self, requests) -> tuple[list[tuple[Text, str]], list[Settings]]:
        pairs = [(self._text(request.args[0]), request.args[1]) for request in requests]
        return pairs, self._settings(requests)

    def _text(self, context: str) -> Text:
        return self._rendered.get(context, context)

    def _untils(self, requests) -> list[Until]:
        """Requests for text, equal ones numbered."""
        seen: dict[str, int] = {}
        untils = []
        for request in requests:
            context, arguments = request.args[:2]
            name = repr((context, arguments))
            seen[name] = seen.get(name, -1) + 1
            untils.append(self._until(self._text(context), dict(arguments), seen[name]))
        return untils

    def _until(self, prompt: Text, arguments: dict[str, Any], repeat: int) -> Until:
        """One request for text from a task's generation_kwargs, which may hold fields of `Options`, too."""
        until = arguments.pop("until", None) or []
        until = [until] if isinstance(until, str) else until
        lengths = [int(value) for name in _LENGTHS if (value := arguments.pop(name, None)) is not None]
        own = {name: arguments.pop(name) for name in list(arguments) if name in Options._fields}
        if arguments.get("do_sample") is False:  # greedy, whatever the temperature
            own["temperature"] = 0.0
        if arguments.get("do_sample") and "temperature" not in own:
            own["temperature"] = 1.0
        if "temperature" in own:
            own["temperature"] = float(own["temperature"])
        for name, value in arguments.items():
            self._ignore(name, value, own.get("temperature", 0.0))
        length = lengths[0] if lengths else _DEFAULT_LENGTH
        return Until(prompt, tuple(until), length, repeat, tuple(sorted(own.items())))

    def _ignore(self, name: str, value: Any, temperature: float) -> None:
        """Note an argument that our samplers have not, with a line where it would matter."""
        if name == "do_sample" or name in self._ignored:
            return
        self._ignored.add(name)
        if name not in _HARMLESS or temperature > 0:
            sys.stderr.write(f"generation_kwargs has {name}={value}, which no sampler here has: it is ignored\n")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
