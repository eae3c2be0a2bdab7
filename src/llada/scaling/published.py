"""Compute-optimal laws of other papers, as data: what a sweep's own laws are shown beside.

A line holds where it was fitted: `low` to `high` FLOPs. Losses of other papers (other corpora and tokenizers) do not
compare with a sweep's, so only their exponents are here. C = 6 N D, so D* = C / (6 N*).
Units as in `laws`: FLOPs, parameters, tokens, nats per token. SMDM counts N without embeddings; Chinchilla counts all
parameters, which matters for small models; for Quokka and GIDD see the papers.
Sources: SMDM arXiv 2410.18514 (section 4), Quokka arXiv 2510.03280 (section on compute-optimal laws), GIDD arXiv
2512.10858, Chinchilla arXiv 2203.15556 (Table 3).
"""

from typing import NamedTuple

from llada.scaling.laws import PowerLaw, power_law


class Published(NamedTuple):
    """The laws of one paper for one family. None: the paper's figure is not at hand."""

    name: str
    family: str  # diffusion | autoregressive
    arxiv: str
    parameters_exponent: float
    tokens_exponent: float
    loss_exponent: float | None = None  # of L*(C) as a plain power law, no irreducible loss
    parameters: PowerLaw | None = None  # N*(C)
    tokens: PowerLaw | None = None  # D*(C)
    low: float | None = None  # FLOPs, of the budgets the law was fitted at
    high: float | None = None
    note: str = ""


def tokens_of(parameters: PowerLaw) -> PowerLaw:
    """D*(C) = C / (6 N*(C))."""
    return PowerLaw(1 / (6 * parameters.coefficient), 1 - parameters.exponent)


# Digitised from SMDM's figures: N* within about 2%, losses within about 0.003 nats per token.
SMDM_BUDGETS = (6e18, 1e19, 3e19, 6e19, 1e20)
SMDM_ARM_PARAMETERS = (0.15e9, 0.23e9, 0.45e9, 0.63e9, 1.01e9)
SMDM_MDM_PARAMETERS = (0.084e9, 0.11e9, 0.23e9, 0.36e9, 0.48e9)
SMDM_ARM_LOSS = (2.85, 2.75, 2.55, 2.45, 2.38)
SMDM_MDM_LOSS = (3.38, 3.26, 3.04, 2.92, 2.83)

# Chinchilla's Table 3 (approach 1): FLOPs, parameters, tokens. What lies above some 3e21 is its own extrapolation.
CHINCHILLA_TABLE_3 = (
    (1.92e19, 400e6, 8.0e9),
    (1.21e20, 1e9, 20.2e9),
    (1.23e22, 10e9, 205.1e9),
    (5.76e23, 67e9, 1.5e12),
)


def _smdm(name: str, family: str, parameters: tuple[float, ...], exponent: float, loss_exponent: float) -> Published:
    """SMDM's exponents as printed; the line is the one through its five optima."""
    line = PowerLaw(*map(float, power_law(SMDM_BUDGETS, parameters)))
    note = "optima and loss digitised from the figures"
    ends = SMDM_BUDGETS[0], SMDM_BUDGETS[-1]
    return Published(
        name, family, "2410.18514", exponent, 1 - exponent, loss_exponent, line, tokens_of(line), *ends, note
    )


def _chinchilla() -> Published:
    budgets, parameters, tokens = zip(*CHINCHILLA_TABLE_3, strict=True)
    n, d = (PowerLaw(*map(float, power_law(budgets, column))) for column in (parameters, tokens))
    note = "line through the points of its Table 3"
    return Published(
        "Chinchilla", "autoregressive", "2203.15556", n.exponent, d.exponent, None, n, d, budgets[0], budgets[-1], note
    )


PUBLISHED = (
    _smdm("SMDM MDM", "diffusion", SMDM_MDM_PARAMETERS, 0.63, -0.063),
    Published(
        "Quokka",
        "diffusion",
        "2510.03280",
        0.514,
        0.486,
        None,
        PowerLaw(0.0216, 0.514),
        PowerLaw(7.7, 0.486),
        3e18,
        1e21,
    ),
    Published("GIDD masked", "diffusion", "2512.10858", 0.566, 0.434, -0.0496, note="exponents only"),
    _smdm("SMDM ARM", "autoregressive", SMDM_ARM_PARAMETERS, 0.64, -0.064),
    _chinchilla(),
)

# SMDM's own reading of its two loss lines: how many times the FLOPs an MDM needs at an ARM's loss.
SMDM_GAP = 16.0
# GIDD: the share of its loss that a checkpoint before annealing would still lose by it.
GIDD_ANNEALING_GAIN = 0.0245
