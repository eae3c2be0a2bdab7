"""Series of a sweep: a family as it is, or a named variant of its objective. Readings are grouped by them.

A series has a key, which is its name in fits: "diffusion", or "diffusion:bell" of the variant `bell`.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from llada.objectives.families import FAMILIES, Family

NAME = re.compile(r"[A-Za-z0-9_-]{1,40}")  # of a variant: a part of directories' names, of tables and legends
NAME_RULE = "a variant's name must be up to 40 letters, digits, - and _"


class Series(NamedTuple):
    """A family, and which variant of its objective; None: the plain one."""

    family: Family
    variant: str | None = None

    @property
    def key(self) -> str:
        """Its name in fits."""
        return f"{self.family.name}:{self.variant}" if self.variant else self.family.name

    @property
    def title(self) -> str:
        """In tables and pictures: "LLaDA", or "LLaDA, bell"."""
        return f"{self.family.title}, {self.variant}" if self.variant else self.family.title

    @property
    def prefix(self) -> str:
        """Of the names of its runs."""
        return f"{self.family.prefix}-{self.variant}" if self.variant else self.family.prefix

    @property
    def plain(self) -> "Series":
        """The family as it is."""
        return Series(self.family)

    @property
    def exact(self) -> bool:
        """Whether its held-out figure is the NLL itself, not a bound on it."""
        return self.family.exact


def compared_by(series: Series, reference: Series) -> str:
    """What the two are compared by, for the line that compares them; "" where both figures are bounds, or both exact.

    Every series has the bound of its family; only the reference's figure is the NLL itself.
    """
    if series.exact == reference.exact:
        return ""
    return f"{series.title} by its bound, {reference.title} by its exact NLL"


# Every series is compared with the family whose likelihood is exact.
REFERENCE = Series(next(family for family in FAMILIES.values() if family.exact))


def of_key(key: str) -> Series:
    """The series that has this key."""
    family, _, variant = key.partition(":")
    return Series(FAMILIES[family], variant or None)


def ordered(keys: Iterable[str]) -> list[Series]:
    """All plain families, present or not, each before those of its variants that are among `keys`, as they come."""
    variants = [series for series in map(of_key, dict.fromkeys(keys)) if series.variant]
    return [
        series
        for family in FAMILIES.values()
        for series in (Series(family), *(each for each in variants if each.family is family))
    ]


def pairs(keys: Iterable[str]) -> list[tuple[Series, Series]]:
    """What is compared with what: every series with the reference, and after these every variant with its family."""
    series = ordered(keys)
    with_reference = [(each, REFERENCE) for each in series if each != REFERENCE]
    with_family = [(each, each.plain) for each in series if each.variant and each.plain != REFERENCE]
    return with_reference + with_family
