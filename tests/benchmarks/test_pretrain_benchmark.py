"""What the pretraining benchmark compares: the same batch and loss on every side, turns, ratios, counted FLOPs."""

import argparse
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from benchmarks import pretrain as benchmark
from benchmarks.pretrain import Batch, disturbed, draw_batch, options_of, ours, product_flops, ratios, take_turns

CPU = torch.device("cpu")
ROWS, LENGTH, VOCAB, WIDTH = 3, 16, 40, 32


def arguments(**changes: object) -> argparse.Namespace:
    values = {"vocab_size": VOCAB, "width": WIDTH, "heads": 2, "layers": 1, "length": LENGTH, "threads": 1}
    return argparse.Namespace(**{**values, "device": "cpu", "clock": "wall", **changes})


@pytest.fixture
def batch() -> Batch:
    return draw_batch(ROWS, LENGTH, VOCAB, 0.3, CPU)


def test_both_forms_of_the_labels_ask_for_the_same_tokens(batch: Batch) -> None:
    flat = batch.all_labels.flatten()
    assert torch.equal(flat[batch.positions], batch.labels)
    assert int((flat != -100).sum()) == len(batch.positions) == len(batch.labels) > ROWS
    assert batch.inputs.min() >= benchmark.MASK_ID and (batch.inputs == benchmark.MASK_ID).any()


@pytest.mark.parametrize("name", ["standard_attn", "default"])
def test_our_loss_equals_the_loss_over_all_tokens_that_transformers_takes(name: str, batch: Batch) -> None:
    side = ours(name, batch, arguments())
    logits = side.model.mlm_logits(side.model(batch.inputs).flatten(0, 1))
    expected = F.cross_entropy(logits, batch.all_labels.flatten(), ignore_index=-100)
    torch.testing.assert_close(side.loss(), expected)


def test_the_stable_stack_has_24_ternary_layers_with_experts_and_finite_bfloat16_gradients(batch: Batch) -> None:
    args = arguments()
    options = options_of("seed002", args)
    assert options["num_layers"] * options["num_loops"] == 24 and options["use_bitnet"] and options["use_moe"]
    assert all(torch.isfinite(torch.tensor(benchmark.bfloat16_norms("seed002", batch, args, steps=1))))


def test_a_step_moves_the_weights_and_gives_the_norm_before_clipping(batch: Batch) -> None:
    side = ours("standard_attn", batch, arguments())
    before = side.loss().item()
    norm = side.step(nullcontext())
    left = torch.nn.utils.get_total_norm([p.grad for p in side.model.parameters()])
    torch.testing.assert_close(left, norm.clamp(max=benchmark.CLIP), rtol=1e-4, atol=0)
    assert side.loss().item() < before


def test_counted_flops_are_those_of_the_matrices_and_of_attention(batch: Batch) -> None:
    side = ours("standard_attn", batch, arguments())
    tokens, predicted = ROWS * LENGTH, len(batch.positions)
    everywhere, masked_only = 4 * WIDTH**2, 2 * WIDTH * 4 * WIDTH + VOCAB * WIDTH
    attention = (2 + 5) * 2 * LENGTH * WIDTH  # products forward and backward, which computes one of them again
    expected = 6 * (everywhere * tokens + masked_only * predicted) + attention * tokens
    norm_products = 3 * 2 * 2 * tokens * WIDTH  # two products with a vector in each of three norms' backward pass
    found = product_flops(side, nullcontext())
    assert expected <= found <= expected + norm_products


def test_each_round_starts_with_another_one_and_the_warm_up_is_not_counted() -> None:
    calls: list[str] = []
    works = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = take_turns(works, 2, CPU)
    assert "".join(calls) == "abc" + "bca" + "cab" + "abc"
    assert {name: len(taken) for name, taken in times.items()} == dict.fromkeys("abc", 2)


def test_figures_and_ratios_compare_medians_by_the_chosen_clock(batch: Batch) -> None:
    side = ours("standard_attn", batch, arguments())
    side.flops = 600
    taken = [benchmark.Taken(wall, cpu) for wall, cpu in ((4.0, 1.0), (2.0, 1.5), (90.0, 2.0))]
    wall, cpu = (benchmark.figures(side, taken, 12, 1000.0, arguments(clock=clock)) for clock in ("wall", "cpu"))
    assert (wall["tokens_per_s"], wall["mfu"], wall["step_s_lowest"]) == (3.0, 0.15, 2.0)
    assert (cpu["tokens_per_s"], cpu["mfu"]) == (8.0, 0.4)
    assert wall["threads_used"] == 0.375
    rows = [{"model": "default", "step_s": 2.0}, {"model": "BERT", "step_s": 3.0}]
    assert ratios(rows) == {"default": {"BERT": 1.5}}
    assert ratios(rows[:1]) == {}


def test_a_side_that_had_half_of_its_threads_is_disturbed_but_not_by_cpu_time() -> None:
    rows = [
        {"model": "a", "threads_used": 0.5},
        {"model": "b", "threads_used": 0.9},
        {"model": "c", "threads_used": None},
    ]
    assert disturbed(rows, "wall") == ["a"]
    assert disturbed(rows, "cpu") == []
