"""What each of the 21 optimizer classes takes: families, own suffixes, bounds and published defaults, as data.

A plugin adds an entry to CONTRACTS for the class that it registers.
Source: Transformer Encoder Frankenstein, section 3.5; the defaults are those of the methods' published implementations.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

GROUPS = ("embeddings", "norms", "ode", "retnet", "mamba", "attention", "other")
FAMILIES = {"lr": "lr", "wd": "weight_decay", "betas": "betas", "eps": "eps"}  # suffix -> constructor argument
Schema = dict[str, Any]


@dataclass(frozen=True)
class Contract:
    """What one class takes: published defaults of its families (None: the method has none), its own suffixes.

    `elementwise`: every number of a weight is updated from its own gradient and state alone, so that a part of a tensor
    is updated as the whole one would be.
    """

    lr: float
    wd: float = 0.0
    betas: tuple[float, ...] | None = (0.9, 0.999)
    eps: float | None = 1e-8
    own: Mapping[str, Schema] = field(default_factory=dict)
    last_beta_one: bool = False
    elementwise: bool = False

    @property
    def families(self) -> dict[str, Any]:
        """Family -> published default, of the families that the method has."""
        values = {"lr": self.lr, "wd": self.wd, "betas": self.betas, "eps": self.eps}
        return {name: value for name, value in values.items() if value is not None}

    def family_schema(self, family: str) -> Schema:
        """JSON Schema of one family's value."""
        if family == "betas":
            count = len(self.betas or ())
            beta = {"type": "number", "minimum": 0, "exclusiveMaximum": 1}
            last = {"type": "number", "minimum": 0, "maximum": 1} if self.last_beta_one else beta
            items = [dict(beta) for _ in range(count - 1)] + [dict(last)]
            return {"type": "array", "prefixItems": items, "minItems": count, "maxItems": count}
        return {"type": "number", "exclusiveMinimum": 0} if family == "eps" else {"type": "number", "minimum": 0}


def _number(description: str, default: Any = None, **bounds: Any) -> Schema:
    return {"description": description, "type": "number", **bounds, **_default(default)}


def _integer(description: str, default: Any = None, minimum: int = 1) -> Schema:
    return {"description": description, "type": "integer", "minimum": minimum, **_default(default)}


def _boolean(description: str, default: bool) -> Schema:
    return {"description": description, "type": "boolean", "default": default}


def _choice(description: str, default: str, *values: str) -> Schema:
    return {"description": description, "type": "string", "enum": list(values), "default": default}


def _default(value: Any) -> Schema:
    return {} if value is None else {"default": value}


def _share(description: str, default: Any = None) -> Schema:
    return _number(description, default, minimum=0, exclusiveMaximum=1)


def _momentum(default: float) -> Schema:
    return _share("Decay rate of the momentum buffer.", default)


_NESTEROV = "Look one momentum step ahead."
_PLAIN = "AdamW, which takes the parameters that are no hidden matrices"
_ROOTS = _integer("Steps between refreshes of the preconditioner's roots.", 1)


def _newton_schulz(steps: int, eps: float) -> dict[str, Schema]:
    """Suffixes that the orthogonalizing methods share; their betas and eps belong to the AdamW inside them."""
    return {
        "momentum": _momentum(0.95),
        "nesterov": _boolean(_NESTEROV, True),
        "ns_steps": _integer("Newton-Schulz iterations.", steps),
        "ns_eps": _number("Lower bound of the norm that the iteration divides by.", eps, exclusiveMinimum=0),
        "ns_dtype": _choice("Number type of the iteration.", "bfloat16", "bfloat16", "float32"),
        "fallback_lr_ratio": _number(f"Learning rate of {_PLAIN}, as a share of lr.", 0.015, minimum=0),
    }


def _softening(sign_steps: int | None, transition_steps: int | None) -> dict[str, Schema]:
    """Suffixes of the two methods that soften from sign-like to proportional steps."""
    return {
        "alpha_sign": _number(
            "Share of the run before softening, when sign_steps is absent.", 0.9, minimum=0, maximum=1
        ),
        "sign_steps": _integer("Steps before softening; derived from alpha_sign when absent.", sign_steps, 0),
        "transition_steps": _integer("Steps of the softening; derived from alpha_sign when absent.", transition_steps),
        "sat_eps": _share("How far from saturation the kept coordinates may be.", 1e-4),
        "newton_steps": _integer("Newton iterations of the temperature schedule.", 10),
        "t_max": _number("Highest temperature.", 1e9, minimum=1),
    }


CONTRACTS: dict[str, Contract] = {
    "sgd_momentum": Contract(
        0.01,
        betas=None,
        eps=None,
        own={"momentum": _momentum(0.9), "nesterov": _boolean(_NESTEROV, False)},
        elementwise=True,
    ),
    "adamw": Contract(1e-3, 0.01, elementwise=True),
    "adafactor": Contract(
        0.01,
        betas=None,
        eps=None,
        own={
            "beta2_decay": _number("Exponent of the second moment's decay, 1 - step^beta2_decay.", -0.8, maximum=0),
            "clip_threshold": _number("Largest root mean square of an update.", 1.0, minimum=1),
            "eps1": _number("Lower bound of the second moment; by number type when absent.", exclusiveMinimum=0),
            "eps2": _number("Lower bound of the parameter scale.", 1e-3, exclusiveMinimum=0),
        },
    ),
    "galore_adamw": Contract(
        1e-3,
        eps=1e-6,
        own={
            "rank": _integer("Rank of the projected gradient; absent projects nothing."),
            "update_proj_gap": _integer("Steps between refreshes of the projection.", 200),
            "scale": _number("Factor of the projected step.", 0.25, minimum=0),
        },
    ),
    "prodigy": Contract(
        1.0,
        own={
            "d0": _number("First estimate of the distance to the solution.", 1e-6, exclusiveMinimum=0),
            "d_coef": _number("Factor of the estimate.", 1.0, exclusiveMinimum=0),
            "growth_rate": _number("Largest growth of the estimate in a step; unbounded when absent.", minimum=1),
            "use_bias_correction": _boolean("Adam's bias correction.", False),
            "safeguard_warmup": _boolean("Keep a learning-rate warm-up from inflating the estimate.", False),
        },
    ),
    "lion": Contract(1e-4, betas=(0.9, 0.99), eps=None, elementwise=True),
    "sophia": Contract(
        1e-4,
        0.1,
        (0.965, 0.99),
        None,
        {
            "rho": _number("Threshold of the clipped step.", 0.04, exclusiveMinimum=0),
            "bs": _integer("Terms averaged in the Hessian's loss.", 5120),
            "update_k": _integer("Steps between Hessian estimates.", 10),
        },
        elementwise=True,
    ),
    "muon": Contract(
        0.02,
        betas=(0.9, 0.95),
        eps=1e-10,
        own={
            **_newton_schulz(5, 1e-7),
            "adjust_lr_fn": _choice("Scaling of the step by shape.", "original", "original", "match_rms_adamw"),
        },
    ),
    "turbo_muon": Contract(0.02, betas=(0.9, 0.95), eps=1e-10, own=_newton_schulz(4, 1e-6)),
    "radam": Contract(1e-3, elementwise=True),
    "adan": Contract(1e-3, betas=(0.98, 0.92, 0.99), elementwise=True),
    "adopt": Contract(1e-3, betas=(0.9, 0.9999), eps=1e-6, elementwise=True),
    "ademamix": Contract(
        1e-3,
        betas=(0.9, 0.999, 0.9999),
        own={
            "alpha": _number("Weight of the slow average.", 2.0, minimum=0),
            "alpha_warmup": _integer("Steps over which alpha rises; none when absent."),
            "beta3_warmup": _integer("Steps over which the third beta rises; none when absent."),
        },
        elementwise=True,
    ),
    "mars_adamw": Contract(
        3e-3,
        betas=(0.95, 0.99),
        own={
            "gamma": _number("Weight of the variance-reduction term.", 0.025, minimum=0),
            "optimize_1d": _boolean("Use the method for vectors too, instead of AdamW.", False),
            "lr_1d": _number("Learning rate of vectors.", 3e-3, minimum=0),
            "betas_1d": {
                "description": "Decay rates of vectors.",
                **Contract(0.0, betas=(0.9, 0.95)).family_schema("betas"),
                "default": [0.9, 0.95],
            },
            "weight_decay_1d": _number("Weight decay of vectors.", 0.1, minimum=0),
        },
    ),
    "cautious_adamw": Contract(
        1e-3,
        eps=1e-6,
        own={
            "cautious_clip": _number(
                "Lower bound of the mean of the mask that it is divided by.", 1e-3, exclusiveMinimum=0, maximum=1
            )
        },
    ),
    "lamb": Contract(1e-3, 0.01, eps=1e-6),
    "schedulefree_adamw": Contract(
        2.5e-3,
        own={
            "warmup_steps": _integer("Steps with a rising learning rate.", 0, 0),
            "r": _number("Exponent of the step in the average's weights.", 0.0, minimum=0),
            "weight_lr_power": _number("Exponent of the learning rate in the average's weights.", 2.0, minimum=0),
        },
        elementwise=True,
    ),
    "shampoo": Contract(
        1e-3,
        eps=1e-5,
        last_beta_one=True,
        own={
            "bias_correction": _boolean("Adam's bias correction.", True),
            "grafting": {"description": "Take the step's norm from Adam.", "enum": ["adam", None], "default": "adam"},
            "graft_eps": _number("Added to the denominator of the grafted step.", 1e-8, exclusiveMinimum=0),
            "graft_beta2": _share("Second decay rate of the grafted step.", 0.999),
            "precondition_frequency": _ROOTS,
            "max_precond_dim": _integer("Larger dimensions are not preconditioned.", 8192),
        },
    ),
    "soap": Contract(
        3e-3,
        0.01,
        (0.95, 0.95),
        own={
            "shampoo_beta": _share("Decay rate of the factors; the second beta when absent."),
            "precondition_frequency": {**_ROOTS, "default": 10},
            "max_precond_dim": _integer("Larger dimensions are not preconditioned.", 10000),
            "precondition_1d": _boolean("Precondition vectors too.", False),
        },
    ),
    "softsignum": Contract(
        1e-3,
        betas=None,
        eps=None,
        own={
            "momentum": _momentum(0.9),
            "dampening": _share("Damping of the gradient in the buffer.", 0.0),
            "nesterov": _boolean(_NESTEROV, False),
            **_softening(9000, 1000),
        },
        elementwise=True,
    ),
    "softmuon": Contract(0.02, betas=(0.9, 0.95), eps=1e-10, own={**_newton_schulz(5, 1e-7), **_softening(None, None)}),
}
