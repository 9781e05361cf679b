import math

import pytest
import torch
from scipy import stats

from frankenstein.errors import FrankensteinError
from frankenstein.optimizers.softmuon import SoftMuon
from frankenstein.optimizers.softsignum import SoftSignum
from frankenstein.optimizers.temperature import Softening, folded_cauchy_quantiles, switch_steps, temperatures

every_softening = pytest.mark.parametrize("cls", [SoftSignum, SoftMuon])


@pytest.mark.parametrize(
    ("alpha_sign", "total", "expected"),
    [(0.9, 10000, (9000, 1000)), (0.0, 7, (0, 7)), (1.0, 7, (7, 1)), (0.29, 100, (29, 71)), (0.9, 1, (1, 1))],
)
def test_alpha_sign_is_the_share_of_the_run_before_softening(
    alpha_sign: float, total: int, expected: tuple[int, int]
) -> None:
    assert switch_steps(alpha_sign, total) == expected


def test_quantiles_of_a_centred_distribution_have_a_closed_form() -> None:
    p = torch.arange(50, dtype=torch.float64) / 50
    torch.testing.assert_close(folded_cauchy_quantiles(0.0, 3.0, 50, 10), 3 * torch.tan(math.pi / 2 * p))


@pytest.mark.parametrize(("m", "s"), [(0.3, 0.05), (-2.0, 1.0), (1.0, 1.0), (-1e-4, 3e-4)])
def test_quantiles_of_any_folded_cauchy_distribution_solve_their_equation(m: float, s: float) -> None:
    q = folded_cauchy_quantiles(m, s, 40, 30).numpy()
    cauchy = stats.cauchy(m, s)
    share = cauchy.cdf(q) - cauchy.cdf(-q)
    torch.testing.assert_close(torch.tensor(share), torch.arange(40.0).double() / 40, rtol=0, atol=1e-4)
    assert q[0] < 1e-12 and (q[1:] > q[:-1]).all()


def test_the_schedule_of_a_normal_sample() -> None:
    x = torch.tensor(stats.norm.ppf((torch.arange(20001).numpy() + 0.5) / 20001))
    saturation = math.atanh(1 - 1e-4)
    # atanh(0.9999) / (0.67449 tan(pi k / 10)): 0.67449 is the median distance from the median
    expected = torch.tensor([1e9, 22.594, 10.1046, 5.3339, 2.3854], dtype=torch.float64)
    for scale in (1.0, 0.01):
        found = temperatures(scale * x, saturation, steps=5, newton_steps=10, t_max=1e9)
        torch.testing.assert_close(found[1:], expected[1:] / scale, rtol=2e-3, atol=0)
        assert found[0] == 1e9
    capped = temperatures(x, saturation, steps=5, newton_steps=10, t_max=6.0)
    torch.testing.assert_close(capped, expected.clamp_max(6.0), rtol=2e-3, atol=0)
    assert temperatures(100 * x, saturation, steps=5, newton_steps=10, t_max=1e9)[-1] == 1.0


def test_medians_are_the_lower_ones() -> None:
    x = torch.tensor([4.0, -1.0, 1.0, 2.0])  # median 1, distances 0, 1, 2, 3: median 1
    expected = (5.0 / folded_cauchy_quantiles(1.0, 1.0, 6, 10)).clamp(1.0, 1e9)
    assert torch.equal(temperatures(x, 5.0, steps=6, newton_steps=10, t_max=1e9), expected)


@pytest.mark.parametrize("x", [[], [3.0], [0.0, 0.0, 0.0, 5.0], [2.0, 2.0, 1.0, 2.0]])
def test_without_spread_the_group_stays_at_the_highest_temperature(x: list[float]) -> None:
    found = temperatures(torch.tensor(x), 5.0, steps=4, newton_steps=10, t_max=1e6)
    assert found.tolist() == [1e6] * 4


def test_half_precision_is_widened() -> None:
    x = torch.randn(999, generator=torch.Generator().manual_seed(0)).bfloat16()
    found, wide = (temperatures(t, 5.0, steps=9, newton_steps=10, t_max=1e9) for t in (x, x.float()))
    assert torch.equal(found, wide) and found.dtype == torch.float64


def members(count: int) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(4, 3, generator=generator)) for _ in range(count)]


@every_softening
def test_steps_are_counted_once_for_all_groups_and_each_has_its_schedule(cls: type[Softening]) -> None:
    params = members(3)
    optimizer = cls(  # type: ignore[call-arg]
        [{"params": [params[0]]}, {"params": [params[1]], "sign_steps": 1, "transition_steps": 2}],
        sign_steps=2,
        transition_steps=3,
    )
    one, other = optimizer.param_groups

    def walk() -> list[bool]:
        optimizer.step()
        return [group["schedule"] is not None for group in optimizer.param_groups]

    params[0].grad = torch.randn(4, 3)
    assert walk() == [False, False] and [one["step"], other["step"]] == [1, 1]
    params[0].grad, params[1].grad = None, torch.randn(4, 3)  # counts although it has no gradient
    assert walk() == [False, True] and len(other["schedule"]) == 2
    assert walk() == [False, True]  # sign_steps are over, but nothing to build from
    params[0].grad = 100 * torch.randn(4, 3)
    assert walk() == [True, True] and len(one["schedule"]) == 3
    assert not torch.equal(one["schedule"][1:2], other["schedule"][1:])
    optimizer.add_param_group({"params": [params[2]]})
    assert optimizer.param_groups[2]["step"] == 4


@every_softening
def test_the_last_temperature_is_held(cls: type[Softening]) -> None:
    (p,) = members(1)
    optimizer = cls([p], sign_steps=1, transition_steps=3)  # type: ignore[call-arg]
    group, found = optimizer.param_groups[0], []
    for step in range(6):
        p.grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
        optimizer.step()
        found.append(optimizer.temperature({**group, "step": step}))
    schedule = group["schedule"].tolist()
    assert found == [None, *schedule, schedule[-1], schedule[-1]]


@every_softening
def test_arguments_that_the_optimizer_cannot_use_are_errors(cls: type[Softening]) -> None:
    with pytest.raises(TypeError, match="alpha_sign"):
        cls(members(1), alpha_sign=0.9)  # type: ignore[call-arg]
    with pytest.raises(FrankensteinError, match=f"{cls.name}: alpha_sign: .*expected sign_steps"):
        cls([{"params": members(1), "alpha_sign": 0.9}])  # type: ignore[call-arg]
    with pytest.raises(FrankensteinError, match=f"{cls.name}: transition_steps: found none beside sign_steps=3"):
        cls([{"params": members(1), "sign_steps": 3, "transition_steps": None}])  # type: ignore[call-arg]
    with pytest.raises(FrankensteinError, match=f"{cls.name}: t_max: found 0.5"):
        cls(members(1), t_max=0.5)  # type: ignore[call-arg]
