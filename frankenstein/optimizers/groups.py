"""Parameter groups: every parameter belongs to one of seven, each with its own learning rate, decay, betas and eps.

Weight decay follows the contract without exceptions: the class's published default, or `<class>-wd`, holds for every
group, norms included; `<class>-wd_norms: 0` exempts them.
Source: Transformer Encoder Frankenstein, section 3.5.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.optim import Optimizer

from frankenstein.errors import FrankensteinError
from frankenstein.model.norms import NORMS
from frankenstein.optimizers.base import OPTIMIZERS, Method
from frankenstein.optimizers.contract import GROUPS, contract, split
from frankenstein.optimizers.galore import GaLore
from frankenstein.optimizers.temperature import switch_steps
from frankenstein.params import Params
from frankenstein.quantization.bitlinear import BitLinear
from frankenstein.training.options import OptimizerOptions, TrainingOptions

_TORCH_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
_EMBEDDING_NAMES = ("embedding", "head")
_ALPHA_SIGN = 0.9  # the published share of the run before softening


def parameter_groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Group -> its parameters in the model's order; empty groups are left out and a shared tensor appears once.

    A module decides for itself and all modules inside it: embeddings and the output head go to `embeddings`, a mixer
    to its `parameter_group`. Norms go to `norms` wherever they stand. What is left (feed-forward, ...) is `other`.
    """
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in GROUPS}
    seen: set[int] = set()
    for group, parameter in _walk(model, "", "other"):
        if parameter.requires_grad and id(parameter) not in seen:
            seen.add(id(parameter))
            groups[group].append(parameter)
    return {name: members for name, members in groups.items() if members}


def _walk(module: nn.Module, name: str, inherited: str) -> Iterator[tuple[str, nn.Parameter]]:
    group = _group_of(module, name, inherited)
    for parameter in module.parameters(recurse=False):
        yield group, parameter
    for child_name, child in module.named_children():
        yield from _walk(child, child_name, group)


def _group_of(module: nn.Module, name: str, inherited: str) -> str:
    if isinstance(module, (*_TORCH_NORMS, *NORMS.values())):
        return "norms"
    if isinstance(module, nn.Embedding) or name in _EMBEDDING_NAMES:
        return "embeddings"
    declared = (vars(cls)["parameter_group"] for cls in type(module).__mro__ if "parameter_group" in vars(cls))
    group = next(declared, inherited)
    if group not in GROUPS:
        raise FrankensteinError(
            f"{type(module).__name__}.parameter_group is {group!r}; expected one of {', '.join(GROUPS)}"
        )
    return str(group)


def build_optimizer(model: nn.Module, options: Params | TrainingOptions | OptimizerOptions) -> Optimizer:
    """The configured optimizer over the model's trainable parameters.

    Each group carries its name under "name". Where a key is absent, the class's published default holds. A method that
    treats hidden matrices by themselves (muon, ...) gets a group twice where it has both: weights of linear layers
    outside of `embeddings`, and vectors, with matrix=True; tables, convolutions and state matrices with matrix=False.
    Its learning rate is one for matrices, so the latter take fallback_lr_ratio of it, except an `lr_embeddings`.
    Of full training options also `use_galore` holds, and sign_steps and transition_steps of the softening methods
    follow from the run's length unless they are given.
    Raises:
        FrankensteinError: for a key of another class, one the method does not have, a senseless value, or a method that
            GaLore cannot wrap, by its name.
    """
    training = options.training if isinstance(options, Params) else options
    chosen = training.optimizer if isinstance(training, TrainingOptions) else training
    name, cls = chosen.optimizer_class, OPTIMIZERS[chosen.optimizer_class]
    common, by_group = split(name, chosen.parameters)
    if "alpha_sign" in contract(name).own:
        alpha = common.pop("alpha_sign", _ALPHA_SIGN)
        if isinstance(training, TrainingOptions) and not {"sign_steps", "transition_steps"} & set(common):
            steps = switch_steps(alpha, training.scheduler_total_steps)
            common["sign_steps"], common["transition_steps"] = steps
    flags = cls.flags if issubclass(cls, Method) else ()
    groups = [{**by_group[str(group["name"])], **group} for group in _flagged(model, flags)]
    if "matrix" in flags:
        _lower_rates(name, groups, common, explicit="lr" in by_group["embeddings"])
    if not groups:
        raise FrankensteinError("the model has no trainable parameters; expected at least one")
    if isinstance(training, TrainingOptions) and training.use_galore:
        return GaLore(
            name,
            groups,
            common,
            rank=training.galore_rank,
            update_interval=training.galore_update_interval,
            scale=training.galore_scale,
            max_dim=training.galore_max_dim,
        )
    return cls(groups, **common)


def _flagged(model: nn.Module, flags: tuple[str, ...]) -> list[dict[str, Any]]:
    """The groups as torch takes them, with the flags that the method reads."""
    groups: list[dict[str, Any]] = []
    hidden = {id(p) for p in _linear_weights(model)}
    for name, members in parameter_groups(model).items():
        common: dict[str, Any] = {"name": name}
        if "ignore_zeros" in flags:
            common["ignore_zeros"] = name == "embeddings"  # rows of words that were never met
        if "matrix" not in flags:
            groups.append({**common, "params": members})
            continue
        for matrix in (True, False):
            part = [p for p in members if (p.ndim < 2 or (name != "embeddings" and id(p) in hidden)) == matrix]
            if part:
                groups.append({**common, "matrix": matrix, "params": part})
    return groups


def _lower_rates(name: str, groups: list[dict[str, Any]], common: dict[str, Any], *, explicit: bool) -> None:
    """Give the groups without hidden matrices the rate that AdamW has for the vectors of the others."""
    rules = contract(name)
    ratio = common.get("fallback_lr_ratio", rules.own["fallback_lr_ratio"]["default"])
    for group in groups:
        if not group["matrix"] and not (group["name"] == "embeddings" and explicit):
            group["lr"] = ratio * group.get("lr", common.get("lr", rules.lr))


def _linear_weights(model: nn.Module) -> Iterator[nn.Parameter]:
    """Weights of linear layers, ternary ones included; convolutions, state matrices and tables are none."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, BitLinear)):
            yield module.get_parameter("weight")
