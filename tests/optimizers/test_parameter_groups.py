import pytest
import torch
from torch import nn

from frankenstein.errors import FrankensteinError
from frankenstein.model.encoder import Encoder
from frankenstein.model.options import ModelOptions
from frankenstein.optimizers.galore import GaLore
from frankenstein.optimizers.groups import build_optimizer, parameter_groups
from frankenstein.params import load_params
from frankenstein.quantization.bitlinear import BitLinear
from frankenstein.training.options import OptimizerOptions, TrainingOptions


class Recurrent(nn.Module):
    parameter_group = "mamba"

    def __init__(self) -> None:
        super().__init__()
        self.decay, self.filter = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(4, 3))
        self.inside, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)


class Inherits(Recurrent):
    """Takes its parameter group from its base class."""


class Odd(nn.Module):
    parameter_group = "attentoin"

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(2, 2)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mixer = nn.Embedding(7, 4), Inherits()
        self.ffn, self.final_norm, self.head = nn.Linear(4, 4), nn.RMSNorm(4), nn.Linear(4, 7)
        self.head.weight = self.embedding.weight


def names(model: nn.Module) -> dict[str, list[str]]:
    known = {id(p): name for name, p in model.named_parameters()}
    return {group: [known[id(p)] for p in members] for group, members in parameter_groups(model).items()}


def build(parameters: dict, name: str = "adamw", model: nn.Module | None = None) -> torch.optim.Optimizer:
    return build_optimizer(model or Model(), TrainingOptions(optimizer=OptimizerOptions(name, parameters)))


def by_name(optimizer: torch.optim.Optimizer) -> dict[str, dict]:
    return {group["name"]: group for group in optimizer.param_groups}


def test_every_parameter_has_one_group_and_a_tied_head_comes_once() -> None:
    assert names(Model()) == {
        "embeddings": ["embedding.weight", "head.bias"],
        "norms": ["mixer.norm.weight", "mixer.norm.bias", "final_norm.weight"],
        "mamba": ["mixer.decay", "mixer.filter", "mixer.inside.weight", "mixer.inside.bias"],
        "other": ["ffn.weight", "ffn.bias"],
    }


def test_the_encoder_is_split_by_its_parts() -> None:
    options = ModelOptions(
        vocab_size=20, hidden_size=8, num_layers=2, num_heads=2, retention_heads=2, ffn_hidden_size=12
    )
    encoder = Encoder(options)
    groups = names(encoder)
    assert set(groups) == {"embeddings", "norms", "retnet", "attention", "other"}
    assert sorted(n for members in groups.values() for n in members) == sorted(n for n, _ in encoder.named_parameters())
    assert all(n.startswith("blocks.0.mixer.") for n in groups["retnet"])
    assert all(n.startswith("blocks.1.mixer.") for n in groups["attention"])
    assert all(".ffn." in n for n in groups["other"])
    assert "embedding.weight" in groups["embeddings"] and "final_norm.weight" in groups["norms"]


def test_frozen_parameters_are_left_out_and_a_model_without_any_is_an_error() -> None:
    model = Model()
    for p in model.mixer.parameters():
        p.requires_grad_(False)
    assert set(names(model)) == {"embeddings", "norms", "other"}
    with pytest.raises(FrankensteinError, match="no trainable parameters"):
        build({}, model=model.requires_grad_(False))


def test_published_defaults_hold_where_a_key_is_absent() -> None:
    for group in build({}).param_groups:
        assert (group["lr"], group["weight_decay"], group["betas"], group["eps"]) == (1e-3, 0.01, (0.9, 0.999), 1e-8)


def test_a_class_key_sets_all_groups_and_a_group_key_overrides_it() -> None:
    keys = {"lr": 0.1, "lr_norms": 0.2, "wd": 0.3, "wd_norms": 0.0, "betas_mamba": [0.5, 0.6], "eps_other": 1e-3}
    groups = by_name(build({f"adamw-{key}": value for key, value in keys.items()}))
    assert {n: g["lr"] for n, g in groups.items()} == {"embeddings": 0.1, "norms": 0.2, "mamba": 0.1, "other": 0.1}
    assert {n: g["weight_decay"] for n, g in groups.items()} == {
        "embeddings": 0.3,
        "norms": 0,
        "mamba": 0.3,
        "other": 0.3,
    }
    assert groups["mamba"]["betas"] == (0.5, 0.6) and groups["other"]["betas"] == (0.9, 0.999)
    assert groups["other"]["eps"] == 1e-3 and groups["norms"]["eps"] == 1e-8


def test_a_key_for_a_group_that_the_model_lacks_changes_nothing() -> None:
    assert "ode" not in by_name(build({"adamw-lr_ode": 5.0}))


def test_own_suffixes_reach_the_constructor() -> None:
    optimizer = build({"sgd_momentum-momentum": 0.5, "sgd_momentum-nesterov": True}, "sgd_momentum")
    assert all(g["momentum"] == 0.5 and g["nesterov"] for g in optimizer.param_groups)


def test_wrong_keys_and_classes_are_named() -> None:
    with pytest.raises(FrankensteinError, match="lion-lr: a key of lion, but optimizer_class is adamw"):
        build({"lion-lr": 1.0})
    with pytest.raises(FrankensteinError, match=r"unknown optimizer 'muo'; .*did you mean 'muon'"):
        build({}, "muo")
    with pytest.raises(FrankensteinError, match=r"Odd\.parameter_group is 'attentoin'; expected one of embeddings, "):
        parameter_groups(Odd())


def test_whole_configurations_and_single_sections_are_accepted() -> None:
    params = load_params(overrides={"training.optimizer.parameters": {"adamw-lr": 0.25}})
    for options in (params, params.training, params.training.optimizer):
        assert {g["lr"] for g in build_optimizer(Model(), options).param_groups} == {0.25}


def test_the_muons_take_weights_of_linear_layers_and_tables_go_to_adamw() -> None:
    model = Model()
    known = {id(p): name for name, p in model.named_parameters()}
    for name in ("muon", "turbo_muon", "softmuon"):
        optimizer = build({}, name, model)
        hidden = {known[id(p)] for g in optimizer.param_groups if g["matrix"] for p in g["params"] if p.ndim == 2}
        tables = {known[id(p)] for g in optimizer.param_groups if not g["matrix"] for p in g["params"]}
        assert hidden == {"mixer.inside.weight", "ffn.weight"} and tables == {"embedding.weight", "mixer.filter"}
        assert sum(len(g["params"]) for g in optimizer.param_groups) == len(known)


def test_the_muons_rate_is_for_matrices_and_tables_take_a_share_of_it_or_their_own() -> None:
    def rate(parameters: dict) -> float:
        groups = build(parameters, "muon").param_groups
        return next(g["lr"] for g in groups if g["name"] == "embeddings" and not g["matrix"])

    assert rate({}) == pytest.approx(0.02 * 0.015)
    assert rate({"muon-lr": 0.1, "muon-fallback_lr_ratio": 0.5}) == pytest.approx(0.05)
    assert rate({"muon-lr_embeddings": 0.004}) == 0.004


def test_ternary_layers_are_matrices_too() -> None:
    model = Model()
    model.ffn = BitLinear.from_linear(model.ffn)
    optimizer = build({}, "muon", model)
    assert any(model.ffn.weight is p for g in optimizer.param_groups if g["matrix"] for p in g["params"])


def test_both_halves_of_a_split_group_take_its_settings() -> None:
    optimizer = build({"muon-lr_mamba": 0.5}, "muon")
    rates = {(g["name"], g["matrix"]): g["lr"] for g in optimizer.param_groups}
    assert rates["mamba", True] == 0.5 and rates["other", True] == 0.02
    assert rates["mamba", False] == pytest.approx(0.5 * 0.015)


def test_softening_follows_from_the_length_of_the_run_unless_it_is_given() -> None:
    def switch(name: str, parameters: dict) -> list:
        options = TrainingOptions(optimizer=OptimizerOptions(name, parameters), scheduler_total_steps=500)
        group = build_optimizer(Model(), options).param_groups[0]
        return [group["sign_steps"], group["transition_steps"]]

    for name in ("softsignum", "softmuon"):
        assert switch(name, {}) == [450, 50]
        assert switch(name, {f"{name}-alpha_sign": 0.3}) == [150, 350]
        assert switch(name, {f"{name}-sign_steps": 7, f"{name}-transition_steps": 9}) == [7, 9]
    alone = build_optimizer(Model(), OptimizerOptions("softsignum", {})).param_groups[0]
    assert [alone["sign_steps"], alone["transition_steps"]] == [9000, 1000]


def test_softsignum_leaves_untouched_words_out_of_its_statistics() -> None:
    optimizer = build({}, "softsignum")
    assert {g["name"]: g["ignore_zeros"] for g in optimizer.param_groups} == {
        "embeddings": True, "norms": False, "mamba": False, "other": False,
    }  # fmt: skip


def test_galore_wraps_the_configured_optimizer_or_refuses_by_name() -> None:
    def wrapped(name: str, **galore: int) -> torch.optim.Optimizer:
        options = TrainingOptions(optimizer=OptimizerOptions(name, {}), use_galore=True, galore_rank=3, **galore)
        return build_optimizer(Model(), options)

    optimizer = wrapped("adan", galore_update_interval=5)
    assert isinstance(optimizer, GaLore)
    assert [tuple(p.shape) for p in optimizer.projected] == [(4, 4), (4, 4)]
    with pytest.raises(FrankensteinError, match="use_galore: lamb cannot be wrapped: its step is scaled by the norm"):
        wrapped("lamb")
    with pytest.raises(FrankensteinError, match="none above galore_max_dim=3"):
        wrapped("adamw", galore_max_dim=3)
