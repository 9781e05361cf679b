import math

import pytest

from frankenstein.errors import FrankensteinError
from frankenstein.training.schedules import lr_factor


def factors(kind: str, ratio: float, steps: int = 10) -> list[float]:
    return [lr_factor(s, total_steps=steps, warmup_ratio=ratio, kind=kind) for s in range(steps)]


def test_cosine_rises_over_the_warmup_and_falls_to_zero_after_the_last_step() -> None:
    want = [0.5, 1.0] + [0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(8)]
    assert factors("cosine", 0.2) == pytest.approx(want)
    assert lr_factor(6, total_steps=10, warmup_ratio=0.2, kind="cosine") == pytest.approx(0.5)
    assert lr_factor(10, total_steps=10, warmup_ratio=0.2, kind="cosine") == pytest.approx(0.0)
    assert lr_factor(99, total_steps=10, warmup_ratio=0.2, kind="cosine") == pytest.approx(0.0)


def test_linear_warmup_then_constant_stays_at_one() -> None:
    assert factors("linear_warmup_then_constant", 0.4) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1])


def test_constant_has_no_warmup() -> None:
    assert factors("constant", 0.4) == [1.0] * 10


def test_a_warmup_over_all_steps_and_no_warmup_are_allowed() -> None:
    assert factors("cosine", 1.0) == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert factors("cosine", 0.0)[0] == 1.0


def test_an_unknown_schedule_is_an_error() -> None:
    with pytest.raises(FrankensteinError, match=r"scheduler_type 'linear': expected cosine, constant or"):
        lr_factor(5, total_steps=10, warmup_ratio=0.1, kind="linear")
