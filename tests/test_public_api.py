"""The public Python API, as a user has it: from a wheel, outside the repository."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import frankenstein as fk

ROOT = Path(__file__).resolve().parent.parent
SMALL = {
    "model.hidden_size": 32,
    "model.num_heads": 2,
    "model.retention_heads": 2,
    "model.num_layers": 2,
    "model.ffn_hidden_size": 48,
}


def test_an_encoder_is_built_run_converted_packed_and_loaded(tmp_path: Path) -> None:
    params = fk.load_params(overrides=SMALL)
    encoder = fk.build_encoder(params).eval()
    ids = torch.randint(5, params.model.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 6:] = False
    hidden = encoder(ids, mask)
    assert hidden.shape == (2, 9, 32)
    assert hidden[1, 6:].abs().max() == 0
    assert encoder.mlm_logits(hidden[mask]).shape == (15, params.model.vocab_size)
    assert encoder.parameter_count()["total"] == sum(p.numel() for p in encoder.parameters())
    assert isinstance(fk.build_optimizer(encoder, params), torch.optim.AdamW)
    fk.convert_to_bitlinear(encoder)
    fk.pack(encoder, tmp_path / "packed")
    packed = fk.load_packed(tmp_path / "packed", backend="reference")
    assert packed(ids, mask).shape == (2, 9, 32)


def test_the_same_seed_builds_the_same_encoder() -> None:
    one, two = (fk.build_encoder(fk.load_params(overrides=SMALL)) for _ in range(2))
    other = fk.build_encoder(fk.load_params(overrides={**SMALL, "seed": 1}))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("registry", ["MIXERS", "OPTIMIZERS", "NORMS", "TASKS"])
def test_an_unknown_name_lists_the_known_ones(registry: str) -> None:
    with pytest.raises(fk.FrankensteinError, match="known: "):
        vars(fk).get(registry, fk.__getattr__(registry))["nonesuch"]


def test_an_unknown_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonesuch'"):
        fk.nonesuch  # noqa: B018


USE = """
import sys, frankenstein as fk
assert "torch" not in sys.modules
params = fk.load_params(overrides={"model.hidden_size": 32, "model.num_heads": 2, "model.retention_heads": 2})
assert "torch" not in sys.modules
print(fk.__file__)
print(fk.build_encoder(params).parameter_count()["total"])
try:
    fk.load_params(overrides={"model.norm_type": "rmsnorm"})
except fk.ParamsError as error:
    print(error)
"""


def test_the_wheel_works_outside_the_repository(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    site = tmp_path / "site"
    build = ["install", "--no-deps", "--no-build-isolation", "--no-compile", "--target", str(site), str(ROOT)]
    subprocess.run([*pip, *build], check=True, cwd=tmp_path)
    environment = {"PYTHONPATH": str(site), "PATH": ""}
    run = subprocess.run(
        [sys.executable, "-c", USE], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    file, count, error = run.stdout.splitlines()
    assert file.startswith(str(site))
    assert int(count) > 0
    assert "did you mean 'rms_norm'" in error
    script = (site / "bin" / "frankenstein-transformer").read_text()
    assert "frankenstein.cli" in script
