import dataclasses
import inspect
import math
import subprocess
import sys

import pytest
from jsonschema import Draft202012Validator

from frankenstein.errors import FrankensteinError
from frankenstein.optimizers import OPTIMIZERS
from frankenstein.optimizers.base import Method
from frankenstein.optimizers.contract import (
    CONTRACTS,
    FAMILIES,
    GROUPS,
    check_arguments,
    contract,
    parameters_schema,
    prefix_rule,
    split,
)
from frankenstein.options import plain

SEED_CLASSES = [
    "sgd_momentum", "adamw", "adafactor", "galore_adamw", "prodigy", "lion", "sophia", "muon", "turbo_muon", "radam",
    "adan", "adopt", "ademamix", "mars_adamw", "cautious_adamw", "lamb", "schedulefree_adamw", "shampoo", "soap",
    "softsignum", "softmuon",
]  # fmt: skip
SEED_SUFFIXES = {
    "sgd_momentum": "momentum nesterov",
    "adafactor": "beta2_decay clip_threshold eps1 eps2",
    "galore_adamw": "rank update_proj_gap",
    "prodigy": "d_coef",
    "sophia": "rho update_k",
    "muon": "momentum nesterov ns_steps ns_eps",
    "turbo_muon": "momentum nesterov ns_steps ns_eps",
    "cautious_adamw": "cautious_clip",
}


def test_the_contract_has_the_21_classes_and_every_suffix_that_the_papers_name() -> None:
    assert list(CONTRACTS) == SEED_CLASSES
    for name, suffixes in SEED_SUFFIXES.items():
        assert set(suffixes.split()) <= set(CONTRACTS[name].own), name


def test_the_registry_has_every_class() -> None:
    assert sorted(OPTIMIZERS) == sorted(SEED_CLASSES) and not OPTIMIZERS.announced


@pytest.mark.parametrize("name", SEED_CLASSES)
def test_every_schema_is_valid_documented_and_accepts_its_own_defaults(name: str) -> None:
    schema = parameters_schema(name)
    Draft202012Validator.check_schema(schema)
    assert schema["additionalProperties"] is False and schema["x-prefix-rule"] == prefix_rule(name)
    for key, entry in schema["properties"].items():
        assert key.startswith(f"{name}-") and entry["title"] and entry["description"].endswith("."), key
        if "default" in entry:
            Draft202012Validator(entry).validate(entry["default"])


@pytest.mark.parametrize("name", SEED_CLASSES)
def test_families_come_once_for_all_groups_and_once_for_each(name: str) -> None:
    properties = parameters_schema(name)["properties"]
    for family in FAMILIES:
        keys = [f"{name}-{family}", *(f"{name}-{family}_{group}" for group in GROUPS)]
        assert [k in properties for k in keys] == [family in contract(name).families] * 8


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_the_contract_names_the_constructor_arguments_and_their_defaults(name: str) -> None:
    signature = inspect.signature(OPTIMIZERS[name].__init__).parameters.values()
    found = {p.name: p.default for p in signature if p.kind is inspect.Parameter.KEYWORD_ONLY}
    rules, cls = contract(name), OPTIMIZERS[name]
    want = {FAMILIES[family]: value for family, value in rules.families.items()}
    want |= {suffix: plain(schema.get("default")) for suffix, schema in rules.own.items()}
    want.pop("alpha_sign", None)  # a share of the run, which only the training knows
    for flag in cls.flags if issubclass(cls, Method) else ():
        assert isinstance(found.pop(flag), bool)
    if name == "prodigy":
        assert found.pop("growth_rate") == math.inf and want.pop("growth_rate") is None
    assert {argument: plain(value) for argument, value in found.items()} == {a: plain(v) for a, v in want.items()}


def test_three_betas_for_adan_and_ademamix_and_two_for_the_others() -> None:
    counts = {name: len(rules.betas) for name, rules in CONTRACTS.items() if rules.betas}
    assert {name for name, count in counts.items() if count == 3} == {"adan", "ademamix"}
    assert set(counts.values()) == {2, 3}


def test_methods_without_a_family_say_so() -> None:
    assert prefix_rule("lion").endswith("; lion has no eps.")
    assert prefix_rule("sgd_momentum").endswith("; sgd_momentum has no betas and no eps.")
    assert "has no" not in prefix_rule("adamw")


def test_keys_become_arguments_and_a_group_key_stands_apart() -> None:
    common, groups = split(
        "adamw", {"adamw-lr": 0.1, "adamw-betas": [0.8, 0.9], "adamw-wd_norms": 0, "adamw-lr_mamba": 0.2}
    )
    assert common == {"lr": 0.1, "betas": (0.8, 0.9)}
    assert {k: v for k, v in groups.items() if v} == {"norms": {"weight_decay": 0}, "mamba": {"lr": 0.2}}


def test_own_suffixes_that_look_like_a_family_are_not_taken_for_one() -> None:
    common, groups = split("mars_adamw", {"mars_adamw-lr_1d": 0.1, "mars_adamw-betas_1d": [0.5, 0.6]})
    assert common == {"lr_1d": 0.1, "betas_1d": (0.5, 0.6)} and not any(groups.values())


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("adamw", {"lion-lr": 1}, r"parameters\.lion-lr: a key of lion, but optimizer_class is adamw\."),
        ("lion", {"lion-eps": 1}, r"parameters\.lion-eps: not a key of lion.*; lion has no eps\."),
        ("adamw", {"lr": 1}, r"parameters\.lr: the class name is missing from the key; write adamw-lr\."),
        ("adamw", {"adamw-lr_norm": 1}, r"adamw-lr_norm: not a key of adamw; did you mean 'adamw-lr_norms'\?"),
        ("adamw", {"adamw-lr": -1}, r"parameters\.adamw-lr: found -1: -1 is less than the minimum of 0"),
        ("adamw", {"adamw-betas": [0.9]}, r"adamw-betas: found \[0\.9\]: \[0\.9\] is too short"),
        ("adamw", {"adamw-betas_ode": [0.9, 1.0]}, r"adamw-betas_ode: found \[0\.9, 1\.0\]: 1\.0 is greater than"),
        ("adamw", {"adamw-lr": "fast"}, r"adamw-lr: found 'fast': 'fast' is not of type 'number'"),
        ("sgd_momentum", {"sgd_momentum-nesterov": 1}, r"nesterov: found 1: 1 is not of type 'boolean'"),
    ],
)
def test_a_wrong_key_or_value_is_named(name: str, parameters: dict, message: str) -> None:
    with pytest.raises(FrankensteinError, match=message):
        split(name, parameters)


def test_an_unknown_class_lists_the_known_ones() -> None:
    with pytest.raises(
        FrankensteinError, match=r"unknown optimizer 'adamww'; known: adafactor, .*did you mean 'adamw'"
    ):
        contract("adamww")


def test_only_shampoo_takes_a_last_beta_of_one() -> None:
    check_arguments("shampoo", {"betas": (0.9, 1.0)})
    for name, betas in (("shampoo", (1.0, 1.0)), ("adamw", (0.9, 1.0))):
        with pytest.raises(FrankensteinError, match="betas: found"):
            check_arguments(name, {"betas": betas})


def test_a_plugin_adds_its_class_to_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONTRACTS, "mine", dataclasses.replace(CONTRACTS["lion"], lr=0.5))
    assert split("mine", {"mine-lr_ode": 1.0})[1]["ode"] == {"lr": 1.0}


def test_reading_the_contract_imports_no_torch() -> None:
    code = "import frankenstein.optimizers.contract, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
