import pytest
import torch
from torch import nn

from frankenstein.errors import FrankensteinError
from frankenstein.model.encoder import Encoder
from frankenstein.model.options import ModelOptions
from frankenstein.optimizers.groups import build_optimizer, parameter_groups
from frankenstein.params import load_params
from frankenstein.training.options import OptimizerOptions, TrainingOptions


class Recurrent(nn.Module):
    parameter_group = "mamba"

    def __init__(self) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.zeros(3))
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
        "mamba": ["mixer.decay", "mixer.inside.weight", "mixer.inside.bias"],
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
    with pytest.raises(FrankensteinError, match="optimizer 'muon' is not built yet"):
        build({}, "muon")
    with pytest.raises(FrankensteinError, match=r"Odd\.parameter_group is 'attentoin'; expected one of embeddings, "):
        parameter_groups(Odd())


def test_whole_configurations_and_single_sections_are_accepted() -> None:
    params = load_params(overrides={"training.optimizer.parameters": {"adamw-lr": 0.25}})
    for options in (params, params.training, params.training.optimizer):
        assert {g["lr"] for g in build_optimizer(Model(), options).param_groups} == {0.25}
