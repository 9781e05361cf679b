import subprocess
import sys

import pytest

from frankenstein.model.options import ModelOptions


def faults(**values: object) -> dict[str, str]:
    return dict(ModelOptions(**values).faults())


def test_the_defaults_have_no_faults() -> None:
    assert faults() == {}


@pytest.mark.parametrize(
    ("values", "key", "message"),
    [
        ({"hidden_size": 130}, "num_heads", "hidden_size=130 is not a multiple of num_heads=4"),
        ({"retention_heads": 3}, "retention_heads", "hidden_size=128 is not a multiple of retention_heads=3"),
        ({"hidden_size": 12}, "num_heads", "positions: rope needs an even number of channels a head"),
        ({"top_k_experts": 5}, "top_k_experts", "found 5; expected at most num_experts=4"),
        ({"layer_pattern": ()}, "layer_pattern", "expected at least one mixer"),
        ({"num_kv_heads": 3}, "num_kv_heads", "num_heads=4 is not a multiple of num_kv_heads=3"),
        ({"hidden_size": 12, "positions": "hope"}, "num_heads", "positions: hope needs an even number of channels"),
        ({"positions": "hope", "hope_base": 0.0}, "hope_base", "found 0; HoPE needs more than 0"),
        (
            {"use_embedding_conv": True, "embedding_conv_kernel": 4},
            "embedding_conv_kernel",
            "a centred filter has an odd size",
        ),
        ({"use_bitnet_embedding": True}, "use_bitnet_embedding", "needs use_bitnet: true"),
    ],
)
def test_contradictions_are_named(values: dict, key: str, message: str) -> None:
    assert message in faults(**values)[key]


def test_odd_heads_are_fine_without_rotary_positions() -> None:
    assert faults(hidden_size=12, positions="none") == {}
    assert faults(hidden_size=20, num_heads=2, retention_heads=4, positions="hope") == {}


def test_causal_filters_take_any_size() -> None:
    assert faults(use_embedding_conv=True, embedding_conv_kernel=4, causal=True) == {}


def test_reading_the_options_imports_no_torch() -> None:
    code = "import sys, frankenstein.model.options; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
