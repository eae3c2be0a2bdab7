"""Flags of llada evaluate --task=reversal: the pairs, and how they are asked."""

from typing import TYPE_CHECKING, Any

from llada import processes
from llada.commands import progress
from llada.commands.command_flags import CommandFlags
from llada.errors import UserError
from llada.paths import readable_file

if TYPE_CHECKING:  # at run time these would import JAX, before the flags are parsed
    from llada.config import Config
    from llada.evaluation.reversal import Asking, Item
    from llada.inference.likelihood import LikelihoodConfig
    from llada.training.run import Run

FLAGS = CommandFlags()
FACTS = FLAGS.define_string(
    "facts", None, 'reversal: JSON list or JSONL of pairs, {"first": ..., "second": ...}, asked for either by the other'
)
ASKED = FLAGS.define_enum(
    "ask",
    "text",
    ["text", "chat", "blank"],
    "reversal: continue --forward and --backward; answer them as a user's, through the chat template, by default the "
    "published prompts for couplets; or fill the gap in the statement --forward",
)
FORWARD = FLAGS.define_string(
    "forward", None, "reversal: the text that asks for the second, such as '{first} is {second}.'"
)
BACKWARD = FLAGS.define_string(
    "backward", None, "reversal: the text that asks for the first, such as '{second} is {first}.'"
)
CANDIDATES = FLAGS.define_integer(
    "candidates", 10, "reversal: answers that likelihood chooses among", lower_bound=2, upper_bound=2**16
)
SCORING = FLAGS.define_enum(
    "scoring", "both", ["both", "generation", "likelihood"], "reversal: what is written, or the most likely candidate"
)
OPTIONS = (FACTS, ASKED, FORWARD, BACKWARD, CANDIDATES, SCORING)


def given() -> list[str]:
    """Names of the flags that were given."""
    return [flag.name for flag in OPTIONS if flag.present]


def asking() -> "Asking":
    """How the flags have pairs asked."""
    from llada.evaluation import reversal

    texts = {flag.name: flag.value for flag in (FORWARD, BACKWARD) if flag.value is not None}
    if ASKED.value == "chat":
        texts = reversal.PUBLISHED | texts
    return reversal.Asking(ASKED.value, texts, CANDIDATES.value, SCORING.value)


def read(config: "Config", settings: "LikelihoodConfig") -> "tuple[list[Item], Asking]":
    """The pairs and how they are asked. UserError for what cannot be asked of this model."""
    from llada.evaluation import reversal
    from llada.inference import likelihood

    if FACTS.value is None:
        raise UserError('--facts is missing: a JSON file of pairs, {"first": ..., "second": ...}')
    reversal.check(config, asking())
    likelihood.check_settings(config.model, settings)
    return reversal.read_items(readable_file(FACTS.value, "--facts")), asking()


def evaluate(opened: "Run", settings: "LikelihoodConfig", options: dict[str, Any]) -> dict[str, Any]:
    """Ask all pairs both ways; `options` say how answers are written."""
    import jax

    from llada.evaluation import reversal

    with processes.agreement():
        items, how = read(opened.config, settings)
    with jax.set_mesh(opened.mesh), processes.ending_together(UserError), progress.bar("rows scored") as show:
        return reversal.evaluate(opened, items, how, options, settings, show)
