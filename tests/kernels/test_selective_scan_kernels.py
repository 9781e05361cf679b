"""The Triton kernels of the selective scan, run by Triton's interpreter on the CPU; on a GPU see tests/test_gpu.py."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import torch
from frankenstein.kernels import selective_scan as scan_kernels
from frankenstein.mixers.tiled_scan import tiled_scan

scan_kernels.CHUNK, scan_kernels.STATES = 16, 1 << 16
for rows, length, width, states, reverse in [(2, 37, 70, 5, False), (1, 37, 40, 16, True), (2, 16, 33, 4, True)]:
    torch.manual_seed(0)
    tensors = [
        torch.randn(rows, length, width), torch.rand(rows, length, width), -4 * torch.rand(width, states),
        torch.randn(rows, length, states), torch.randn(rows, length, states),
    ]
    weights, last_weights = torch.randn(rows, length, width), torch.randn(rows, width, states)
    found = []
    for scan in (tiled_scan, scan_kernels.scan):
        leaves = [x.clone().requires_grad_() for x in tensors]
        y, last = scan(*leaves, reverse=reverse)
        ((y * weights).sum() + (last * last_weights).sum()).backward()
        found.append([y, last, *(x.grad for x in leaves)])
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
def test_outputs_and_gradients_equal_those_of_the_form_for_cpus() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
