"""On a GPU, where there is one: every mixer against the CPU in double precision, in float32 and under bfloat16."""

import copy
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from frankenstein.mixers.base import MIXERS, Mixer, MixerContext
from frankenstein.mixers.fasa import FasaAttention
from frankenstein.model.positions import Rotary
from frankenstein.runtime import prepare_torch
from frankenstein.training.mlm import MlmObjective
from tests.training.tiny_language import pretrain_tiny, write_language

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("default"),  # of compilers
]

WIDTH, HEADS, LENGTH = 128, 2, 700
OPTIONS = {
    "longformer_attn": {"window_size": 96, "num_global": 2},
    "bigbird_attn": {"num_random": 1},
    "sparge_attn": {"topk": 0.3, "cdfthreshd": None, "simthreshd1": -1.0},
    "fasa_attn": {"n_fac": 64},
    "nsa_attn": {"block_counts": 4, "window_size": 64},
}
NAMES = [name for name in MIXERS if name != "retnet_attn"]
SELECTING = ("nsa_attn", "sparge_attn", "fasa_attn", "sparsek_attn")


@pytest.fixture(autouse=True)
def as_in_training() -> Iterator[None]:
    """Deterministic operations, where there are any."""
    deterministic, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    prepare_torch(threads)
    yield
    torch.use_deterministic_algorithms(deterministic)


def build(name: str, causal: bool) -> Mixer:
    torch.manual_seed(0)
    context = MixerContext(WIDTH, HEADS, HEADS, 0.0, causal, LENGTH, 0, Rotary())
    mixer = MIXERS[name](context, MIXERS[name].Options(**OPTIONS.get(name, {})))
    for module in mixer.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.05)
    mixer.initialize()
    if isinstance(mixer, FasaAttention):
        mixer.calibrated.fill_(True)
    return mixer.train(mixer.trainable)


def results(mixer: Mixer, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """Output and, of a trainable mixer, the gradients, as float64 on the CPU."""
    x = x.clone().requires_grad_(mixer.trainable)
    with torch.set_grad_enabled(mixer.trainable):
        y = mixer(x, mask)
    y = y if mask is None else y.masked_fill(~mask[..., None], 0.0)
    found = {"output": y.detach()}
    if mixer.trainable:
        probe = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        (y.double() * probe.to(y.device)).sum().backward()
        found |= {"input": x.grad, **{n: p.grad for n, p in mixer.named_parameters() if p.grad is not None}}
    return {name: value.double().cpu() for name, value in found.items()}


def largest_error(got: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative L2 error and where it is; gradients are measured together."""
    assert got.keys() == expected.keys()
    errors = {"output": ((got["output"] - expected["output"]).norm() / expected["output"].norm()).item()}
    gradients = [name for name in got if name != "output"]
    if gradients:
        wrong = sum((got[n] - expected[n]).square().sum() for n in gradients)
        errors["gradients"] = (wrong / sum(expected[n].square().sum() for n in gradients)).sqrt().item()
    return max((error, name) for name, error in errors.items())


def cases(name: str) -> Iterator[tuple[Mixer, Tensor, Tensor | None]]:
    x = torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mask = torch.arange(LENGTH) < torch.tensor([[LENGTH], [401]])
    for causal in (False, True):
        for padded in (None, mask):
            yield build(name, causal), x, padded


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_on_the_gpu_computes_what_it_computes_on_the_cpu(name: str) -> None:
    for mixer, x, mask in cases(name):
        expected = results(copy.deepcopy(mixer).double(), x, mask)
        moved = (x.float().cuda(), None if mask is None else mask.cuda())
        error, where = largest_error(results(mixer.cuda(), *moved), expected)
        assert error < 2e-5, (where, error)


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_under_bfloat16_stays_close(name: str) -> None:
    """Through the kernels of others, where they are installed. What is selected can differ by rounding alone."""
    for mixer, x, mask in cases(name):
        expected = results(copy.deepcopy(mixer).double(), x, mask)
        moved = (x.float().cuda(), None if mask is None else mask.cuda())
        mixer = mixer.cuda()
        with torch.autocast("cuda", torch.bfloat16):
            got = results(mixer, *moved)
        error, where = largest_error(got, expected)
        assert error < (0.2 if name in SELECTING else 0.03), (where, error)


PRECISIONS = [{}, {"use_amp": True}, {"use_amp": True, "amp_dtype": "float16"}]


@pytest.mark.parametrize("precision", PRECISIONS, ids=["float32", "bfloat16", "float16"])
def test_a_training_on_the_gpu_that_breaks_off_ends_with_the_same_bits(
    precision: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_language(tmp_path)
    pretrain_tiny(tmp_path, tmp_path / "straight", **precision)
    make = MlmObjective.batch

    def broken(self: MlmObjective, step: int, micro: int) -> Any:
        if step == 9:
            raise RuntimeError("lights out")
        return make(self, step, micro)

    with monkeypatch.context() as once, pytest.raises(RuntimeError, match="lights out"):
        once.setattr(MlmObjective, "batch", broken)
        pretrain_tiny(tmp_path, tmp_path / "resumed", **precision)
    pretrain_tiny(tmp_path, tmp_path / "resumed", **precision)
    first, second = (load_file(tmp_path / x / "encoder" / "model.safetensors") for x in ("straight", "resumed"))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.isfinite(value).all() and torch.equal(value, second[name]), name
    rows = list(csv.DictReader((tmp_path / "straight" / "log.csv").read_text(encoding="utf-8").splitlines()))
    assert len(rows) == 12 and any(row["gpu_memory_gb"] not in ("", "0.0") for row in rows)
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
