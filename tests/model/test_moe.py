"""The mixture of experts: routing by hand, the dense sum as an oracle, balance, capacity, padding."""

import copy

import pytest
import torch

from frankenstein.model import moe
from frankenstein.model.encoder import Encoder
from frankenstein.model.feed_forward import FeedForward
from frankenstein.model.moe import MixtureOfExperts, balance_loss, route
from frankenstein.model.options import ModelOptions
from frankenstein.optimizers.groups import parameter_groups

F64 = torch.float64


def experts(num_experts: int = 4, top_k: int = 2, **values: object) -> MixtureOfExperts:
    torch.manual_seed(0)
    options = ModelOptions(
        hidden_size=8, ffn_hidden_size=12, num_experts=num_experts, top_k_experts=top_k, use_moe=True, **values
    )
    layer = MixtureOfExperts(options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
    return layer.eval()


def tokens(rows: int = 3, length: int = 7, dtype: torch.dtype = F64) -> torch.Tensor:
    return torch.randn(rows, length, 8, generator=torch.Generator().manual_seed(1), dtype=dtype)


def dense(layer: MixtureOfExperts, x: torch.Tensor) -> torch.Tensor:
    """Every expert on every token; the K largest probabilities as weights, the rest 0."""
    p = (x @ layer.router.T).softmax(-1)
    threshold = p.topk(layer.top_k, dim=-1).values[..., -1:]
    weights = torch.where(p >= threshold, p, 0.0)
    if layer.top_k > 1:
        weights = weights / weights.sum(-1, keepdim=True)
    return sum(weights[..., i, None] * expert(x) for i, expert in enumerate(layer.experts))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_grouped_tokens_equal_the_dense_weighted_sum_with_gradients(top_k: int, training: bool) -> None:
    layer = experts(top_k=top_k, expert_capacity_factor=4.0).double().train(training)
    results = []
    for function in (layer, lambda x: dense(layer, x)):
        x = tokens().requires_grad_()
        y = function(x)
        inputs = [x, *layer.parameters()]
        results.append((y, *torch.autograd.grad(y.sin().sum(), inputs)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_gates_by_hand() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.6, 0.3], [0.25, 0.25, 0.5]]))
    _, chosen, gates = route(logits, 2)
    assert chosen.tolist() == [[1, 2], [2, 0]]  # equal experts: the first one
    torch.testing.assert_close(gates, torch.tensor([[2 / 3, 1 / 3], [2 / 3, 1 / 3]]))
    _, chosen, gates = route(logits, 1)
    assert chosen.tolist() == [[1], [2]]
    torch.testing.assert_close(gates, torch.tensor([[0.6], [0.5]]))


def test_with_one_choice_the_router_still_learns_from_the_task() -> None:
    layer = experts(top_k=1).train()
    layer(tokens(dtype=torch.float32)).sin().sum().backward()
    assert layer.router.grad.abs().max() > 1e-3


def test_balance_is_one_when_even_and_the_number_of_experts_when_collapsed() -> None:
    even = torch.full((8, 4), 0.25)
    loss, importance, load = balance_loss(even, torch.tensor([[i % 4, (i + 1) % 4] for i in range(8)]))
    assert loss.item() == pytest.approx(1.0)
    assert importance.tolist() == load.tolist() == [0.25] * 4
    one_hot = torch.nn.functional.one_hot(torch.zeros(8, dtype=torch.long), 4).float()
    loss, _, load = balance_loss(one_hot, torch.zeros(8, 1, dtype=torch.long))
    assert loss.item() == pytest.approx(4.0) and load.tolist() == [1.0, 0.0, 0.0, 0.0]


def test_balance_is_the_equation_of_the_paper() -> None:
    layer, x = experts(num_experts=3, top_k=1, expert_balance_weight=0.5), tokens(dtype=torch.float32)
    layer(x)
    p = (x.flatten(0, 1) @ layer.router.T).softmax(-1)
    share = torch.stack([(p.argmax(-1) == i).float().mean() for i in range(3)])
    torch.testing.assert_close(layer.routing.balance, 0.5 * 3 * (share * p.mean(0)).sum())


def test_following_the_balance_loss_evens_the_load() -> None:
    layer, x = experts().train(), tokens(8, 16, torch.float32) + 0.5
    with torch.no_grad():
        layer.router[0] += 0.8
    optimizer = torch.optim.Adam([layer.router], lr=0.05)
    spread = []
    for _ in range(60):
        layer(x)
        spread.append(layer.routing.load.max().item())
        optimizer.zero_grad()
        layer.routing.balance.backward()
        optimizer.step()
    assert spread[0] > 0.4 and spread[-1] < 0.3


def test_padding_is_not_routed_not_counted_and_takes_no_room() -> None:
    layer, x = experts().double().train(), tokens(2, 9)
    mask = torch.arange(9)[None] < torch.tensor([[9], [5]])
    x = x.masked_fill(~mask[..., None], 50.0).requires_grad_()
    y = layer(x, mask)
    padded = copy.deepcopy(layer.routing)
    alone = layer(x[mask][None])
    assert torch.equal(y[mask], alone[0]) and y[~mask].abs().max() == 0
    for name in ("importance", "load", "dropped", "balance"):
        assert torch.equal(getattr(padded, name), getattr(layer.routing, name))
    (y.sin().sum() + layer.routing.balance).backward()
    assert x.grad[~mask].abs().max() == 0


def test_a_full_expert_serves_first_choices_first_and_leaves_the_rest_to_the_residual() -> None:
    layer = experts(num_experts=2, top_k=2, expert_capacity_factor=1.0).double().train()
    with torch.no_grad():
        layer.router.copy_(torch.eye(2, 8))
    x = torch.zeros(1, 4, 8, dtype=F64)
    x[0, :, 0], x[0, :, 1] = torch.tensor([1.0, 1.0, 1.0, -1.0]), torch.tensor([0.0, 0.0, 0.0, 1.0])
    layer(x)
    assert layer.routing.dropped.item() == 0.0  # four assignments each: exactly the room
    narrow = experts(num_experts=2, top_k=1, expert_capacity_factor=1.0).double().train()
    with torch.no_grad():
        narrow.router.copy_(torch.eye(2, 8))
    y = narrow(x)
    gate = x[0, :, :2].softmax(-1).amax(-1)[:, None]
    torch.testing.assert_close(y[0, :2], gate[:2] * narrow.experts[0](x[0, :2]))
    assert y[0, 2].abs().max() == 0  # expert 0 has room for two of its three tokens
    torch.testing.assert_close(y[0, 3:], gate[3:] * narrow.experts[1](x[0, 3:]))
    assert narrow.routing.dropped.item() == pytest.approx(0.25)


def test_second_choices_wait_for_first_ones() -> None:
    layer = experts(num_experts=3, top_k=2, expert_capacity_factor=1.0).double().train()
    with torch.no_grad():
        layer.router.copy_(10 * torch.eye(3, 8))
    x = torch.zeros(1, 3, 8, dtype=F64)
    x[0, :, :3] = torch.tensor([[0.5, 1.0, 0.0], [0.5, 1.0, 0.0], [1.0, 0.0, 0.5]])
    y = layer(x)
    # Expert 0 has room for two: the first choice of token 2, then the second choice of token 0; token 1's is dropped.
    gates = torch.tensor([10.0, 5.0], dtype=F64).softmax(-1)
    torch.testing.assert_close(y[0, 0], gates[0] * layer.experts[1](x[0, 0]) + gates[1] * layer.experts[0](x[0, 0]))
    torch.testing.assert_close(y[0, 1], gates[0] * layer.experts[1](x[0, 1]))
    torch.testing.assert_close(y[0, 2], gates[0] * layer.experts[0](x[0, 2]) + gates[1] * layer.experts[2](x[0, 2]))


def test_without_training_there_is_no_capacity_and_rows_do_not_meet() -> None:
    layer, x = experts(expert_capacity_factor=1.0).double(), tokens(6, 5)
    with torch.no_grad():
        layer.router[1] += 5.0 * x.flatten(0, 1).mean(0)
    together = layer(x)
    assert layer.routing.dropped.item() == 0.0
    for row in range(6):
        torch.testing.assert_close(together[row], layer(x[row : row + 1])[0])
    layer.train()
    layer(x)
    assert layer.routing.dropped.item() > 0.0


def test_idle_experts_get_gradients_of_zeros_in_training() -> None:
    layer = experts(top_k=1).train()
    with torch.no_grad():
        layer.router.zero_()  # equal experts: all tokens go to the first
    layer(tokens(dtype=torch.float32)).sum().backward()
    assert layer.experts[0].up.weight.grad.abs().max() > 0
    assert all(e.up.weight.grad.abs().max() == 0 for e in list(layer.experts)[1:])


def test_the_router_stays_in_full_precision_under_autocast() -> None:
    layer, x = experts(), tokens(dtype=torch.float32)
    full = layer(x)
    exact = layer.routing
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(x)
    assert torch.equal(layer.routing.importance, exact.importance) and low.dtype == torch.float32
    torch.testing.assert_close(low, full, rtol=0.05, atol=0.05)


def test_one_expert_is_the_dense_feed_forward() -> None:
    layer, x = experts(num_experts=1, top_k=1), tokens(dtype=torch.float32)
    plain = FeedForward(8, 12)
    plain.load_state_dict(layer.experts[0].state_dict())
    torch.testing.assert_close(layer(x), plain(x))


def encoder(**values: object) -> Encoder:
    torch.manual_seed(0)
    options = ModelOptions(
        vocab_size=40, hidden_size=16, num_layers=2, num_loops=2, ffn_hidden_size=24, use_moe=True, **values
    )
    return Encoder(options, max_length=32)


def test_the_encoder_sums_balance_over_its_traversals_and_shows_how_experts_are_used() -> None:
    model = encoder(expert_balance_weight=0.1).train()
    ids = torch.arange(5, 35).view(2, 15)
    mask = torch.arange(15)[None] < torch.tensor([[15], [9]])
    model(ids, mask)
    stats = model.expert_stats()
    assert {name: tuple(value.shape) for name, value in stats.items()} == {
        "importance": (4, 4),
        "load": (4, 4),
        "dropped": (4,),
    }
    assert not any(value.requires_grad for value in stats.values())
    torch.testing.assert_close(stats["load"].sum(1), torch.ones(4))
    torch.testing.assert_close(model.losses()["balance"], 0.1 * 4 * (stats["importance"] * stats["load"]).sum())
    model.losses()["balance"].backward()
    assert all(block.ffn.router.grad.abs().max() > 0 for block in model.blocks)
    assert Encoder(ModelOptions(vocab_size=40, hidden_size=16, ffn_hidden_size=24)).expert_stats() == {}


def test_experts_start_as_the_dense_layers_do_and_are_counted_and_grouped_with_them() -> None:
    torch.manual_seed(0)
    model = Encoder(ModelOptions(vocab_size=40, num_layers=4, num_loops=2, use_moe=True))
    for block in model.blocks:
        assert block.ffn.router.std().item() == pytest.approx(0.02, rel=0.1)
        for expert in block.ffn.experts:
            assert expert.up.weight.std().item() == pytest.approx(0.02, rel=0.05)
            assert expert.out.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert model.parameter_count()["ffn"] == 4 * (4 * 2 * 128 * 384 + 4 * 128)
    other = {id(p) for p in parameter_groups(model)["other"]}
    assert other == {id(p) for block in model.blocks for p in block.ffn.parameters()}


def test_filled_up_groups_under_autocast_change_nothing_but_the_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = experts().float().train(), tokens(dtype=torch.float32)
    found, counts = [], []
    for expert in layer.experts:
        expert.register_forward_pre_hook(lambda _, inputs: counts.append(len(inputs[0])))
    for fill in (moe._fill, lambda *_: 0):
        monkeypatch.setattr(moe, "_fill", fill)
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(leaf)
        found.append([y, *torch.autograd.grad(y.square().sum(), [leaf, *layer.parameters()])])
    assert all(n % 64 == 0 for n in counts[:4]) and not any(n % 64 == 0 for n in counts[4:])
    for filled, plain in zip(*found, strict=True):
        torch.testing.assert_close(filled, plain, rtol=1e-2, atol=1e-2)
