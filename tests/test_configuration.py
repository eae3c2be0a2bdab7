"""docs/configuration.md is what the config declares, and every key says what it means."""

import configuration

from llada import config, knobs
from llada.objectives.families import FAMILIES


def test_the_page_is_what_the_config_declares():
    assert configuration.PAGE.read_text() == configuration.page(), "run python tests/configuration.py"


def test_every_key_has_a_meaning():
    assert not [key.name for key in knobs.keys(config.Config) if not key.knob.meaning]


def test_the_families_of_the_config_are_those_of_the_objectives():
    assert list(config.CAUSAL) == list(FAMILIES)
    for name, family in FAMILIES.items():
        assert (family.name, family.causal, family.exact) == (name, config.CAUSAL[name], not family.masks)
