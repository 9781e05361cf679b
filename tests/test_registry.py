"""frankenstein.registry: names are found, announced ones refused, unknown ones explained."""

import pytest

from frankenstein.errors import NotBuiltYetError
from frankenstein.registry import Registry, UnknownNameError


def make() -> Registry[type]:
    registry: Registry[type] = Registry("mixer", "frankenstein.tasks", announced=("mamba",))
    registry.register("glow", "glow_attn")(dict)
    return registry


def test_an_entry_answers_to_all_its_names() -> None:
    registry = make()
    assert registry["glow"] is registry["glow_attn"] is dict
    assert list(registry) == ["glow", "glow_attn"]
    assert len(registry) == 2


def test_an_unknown_name_lists_the_known_ones_and_the_nearest() -> None:
    with pytest.raises(
        UnknownNameError, match=r"unknown mixer 'glowattn'; known: glow, glow_attn; did you mean 'glow_attn'"
    ):
        make()["glowattn"]


def test_an_announced_name_says_it_is_not_built_yet() -> None:
    with pytest.raises(NotBuiltYetError, match="mixer 'mamba' is not built yet; built: glow, glow_attn"):
        make()["mamba"]


def test_an_announced_name_that_got_built_is_no_longer_announced() -> None:
    registry = make()
    registry.register("mamba")(list)
    assert registry["mamba"] is list
    assert registry.announced == ()


def test_registering_a_name_twice_is_an_error() -> None:
    with pytest.raises(ValueError, match="'glow' is registered twice"):
        make().register("glow")(list)
