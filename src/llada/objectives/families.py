"""What a family of models is, once: LLaDA (a diffusion model) and the ARM beside it.

Everything that depends on the family asks here by attribute; no other file compares names. A third family is a file in
this room with the functions below, an entry below, and its name with its attention in `config.CAUSAL`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from llada.config import CAUSAL, Config, ObjectiveConfig
from llada.objectives import autoregressive, corruption, diffusion


@dataclass(frozen=True)
class Family:
    """One family; the signatures of its functions are those of `objectives/diffusion.py`.

    name           `objective.name` of its configs
    title          in tables and pictures
    prefix         of the names of its runs and workdirs
    masks          whether it needs the tokenizer's mask token
    estimators     of held-out nats, the default first; "exact" is the log-likelihood itself
    loss           what training minimises
    held_out_nats  `nats_MB`, M estimates of each row's nats
    head_fraction  expected share of positions that meet the vocabulary head, by ObjectiveConfig and row length
    bound_trained  whether the training loss estimates what is held out, the bound or the NLL, by ObjectiveConfig
    answer_loss    what fine-tuning minimises
    counted        the tokens of `Examples` that it counts
    """

    name: str
    title: str
    prefix: str
    masks: bool
    estimators: tuple[str, ...]
    loss: Callable
    held_out_nats: Callable
    head_fraction: Callable[[ObjectiveConfig, int], float]
    bound_trained: Callable[[ObjectiveConfig], bool]
    answer_loss: Callable
    counted: Callable

    @property
    def causal(self) -> bool:
        """Whether attention is to the left only."""
        return CAUSAL[self.name]

    @property
    def exact(self) -> bool:
        """Whether its held-out figure is the NLL itself, not a bound on it."""
        return self.estimators == ("exact",)

    @property
    def measure(self) -> str:
        """What its held-out figure is: "NLL" or "bound"."""
        return "NLL" if self.exact else "bound"


DIFFUSION = Family(
    name="diffusion",
    title="LLaDA",
    prefix="llada",
    masks=True,
    estimators=diffusion.ESTIMATORS,
    loss=diffusion.loss,
    held_out_nats=diffusion.held_out_nats,
    head_fraction=corruption.head_fraction,
    bound_trained=corruption.estimates_bound,
    answer_loss=diffusion.answer_loss,
    counted=diffusion.counted,
)
AUTOREGRESSIVE = Family(
    name="autoregressive",
    title="ARM",
    prefix="arm",
    masks=False,
    estimators=("exact",),
    loss=autoregressive.loss,
    held_out_nats=autoregressive.held_out_nats,
    head_fraction=lambda objective, length: 1.0,
    bound_trained=lambda objective: objective.input_masking == 0,
    answer_loss=autoregressive.answer_loss,
    counted=autoregressive.counted,
)
FAMILIES = {family.name: family for family in (DIFFUSION, AUTOREGRESSIVE)}


def variant(config: Config) -> str:
    """What a config changes of the paper's objective, and whether its loss is the bound; "" for the paper's own."""
    o = config.objective
    if not o.variant:
        return ""
    known = of(config).bound_trained(o)
    return f"{o.variant}; its training loss is {'the bound' if known else 'not a bound, held-out figures are'}"


def of(config: Config) -> Family:
    """The family of a config."""
    return FAMILIES[config.objective.name]
