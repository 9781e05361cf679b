"""Parameter groups: every parameter belongs to one of seven, each with its own learning rate, decay, betas and eps.

Weight decay follows the contract without exceptions: the class's published default, or `<class>-wd`, holds for every
group, norms included; `<class>-wd_norms: 0` exempts them.
Source: Transformer Encoder Frankenstein, section 3.5.
"""

from collections.abc import Iterator

from torch import nn
from torch.optim import Optimizer

from frankenstein.errors import FrankensteinError
from frankenstein.model.norms import NORMS
from frankenstein.optimizers.base import OPTIMIZERS
from frankenstein.optimizers.contract import GROUPS, split
from frankenstein.params import Params
from frankenstein.training.options import OptimizerOptions, TrainingOptions

_TORCH_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
_EMBEDDING_NAMES = ("embedding", "head")


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

    Each group carries its name under "name". Where a key is absent, the class's published default holds.
    Raises:
        FrankensteinError: for a key of another class, one the method does not have, or a senseless value, by its name.
    """
    training = options.training if isinstance(options, Params) else options
    chosen = training.optimizer if isinstance(training, TrainingOptions) else training
    cls = OPTIMIZERS[chosen.optimizer_class]
    common, by_group = split(chosen.optimizer_class, chosen.parameters)
    groups = [{"params": members, "name": name, **by_group[name]} for name, members in parameter_groups(model).items()]
    if not groups:
        raise FrankensteinError("the model has no trainable parameters; expected at least one")
    return cls(groups, **common)
