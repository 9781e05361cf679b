"""frankenstein.params: the shipped file loads, every wrong key is named, nothing is silently ignored."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from dvc.utils.serialize import load_yaml

from frankenstein import load_params
from frankenstein.options import plain
from frankenstein.params import ParamsError, committed_schema, read_yaml

ROOT = Path(__file__).resolve().parent.parent


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def faults(tmp_path: Path, text: str) -> list[str]:
    with pytest.raises(ParamsError) as caught:
        load_params(write(tmp_path, text))
    return [str(f).replace(str(tmp_path) + "/", "") for f in caught.value.faults]


def test_the_shipped_file_is_short_and_needs_nothing_from_outside() -> None:
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 80
    shipped = load_params(ROOT / "params.yaml")
    assert shipped.training.optimizer.optimizer_class == "adamw"
    assert shipped.data.source == "sample"


def test_the_compact_preset_says_what_the_defaults_say() -> None:
    compact, defaults = load_params(ROOT / "frankenstein/presets/compact.yaml"), load_params()
    assert dataclasses.replace(
        compact, training=dataclasses.replace(compact.training, optimizer=defaults.training.optimizer)
    ) == dataclasses.replace(defaults)


def test_params_are_frozen_and_typed() -> None:
    params = load_params(overrides={"training.grad_clip_max_norm": 1})
    assert isinstance(params.training.grad_clip_max_norm, float)
    assert params.model.layer_pattern == ("retnet", "standard_attn")
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.seed = 1  # type: ignore[misc]


def test_overrides_win_and_are_validated() -> None:
    params = load_params(ROOT / "params.yaml", {"model.layer_pattern": ["sigmoid_attn"], "model.hidden_size": 64})
    assert (params.model.layer_pattern, params.model.hidden_size) == (("sigmoid_attn",), 64)
    with pytest.raises(ParamsError, match=r"override: model.hidden_size: found 0; expected at least 1"):
        load_params(overrides={"model.hidden_size": 0})


WRONG = {
    "unknown top-level key": (
        "modell:\n  hidden_size: 8\n",
        "params.yaml:1:1: modell: unknown key; did you mean 'model'",
    ),
    "unknown nested key": (
        "model:\n  hiden_size: 8\n",
        "params.yaml:2:3: model.hiden_size: unknown key in model; did you mean 'hidden_size'",
    ),
    "wrong type": (
        "model:\n  hidden_size: many\n",
        'params.yaml:2:3: model.hidden_size: found "many" (string); expected integer',
    ),
    "a boolean is no integer": ("model:\n  num_heads: true\n", "found true (boolean); expected integer"),
    "out of range": (
        "training:\n  mlm_probability: 1.5\n",
        "training.mlm_probability: found 1.5; expected at most 1.0",
    ),
    "unknown mixer": (
        "model:\n  layer_pattern:\n    - retnet\n    - glaa_attn\n",
        'params.yaml:4:7: model.layer_pattern[1]: found "glaa_attn"; allowed: ',
    ),
    "mixer that cannot be trained": (
        "model:\n  layer_pattern: [standard_attn, sparge_attn]\n",
        'model.layer_pattern[1]: "sparge_attn" only runs in evaluation; train with standard_attn',
    ),
    "positions that a mixer cannot use": (
        "model:\n  positions: hope\n  layer_pattern: [standard_attn, retnet]\n",
        "params.yaml:1:1: model: positions: hope does not work in every mixer of the layer_pattern; it works in ",
    ),
    "positions that the default pattern cannot use": ("model:\n  positions: hope\n", "positions: hope does not work"),
    "HoPE where no mixer takes it": (
        "model:\n  use_hope: true\n",
        "use_hope: true needs titan_attn in the layer_pattern",
    ),
    "feature of later work": (
        "sbert:\n  loss: mnrl\n",
        'params.yaml:2:3: sbert.loss: "mnrl" is not built yet',
    ),
    "GaLore around what it cannot wrap": (
        "training:\n  use_galore: true\n  optimizer:\n    optimizer_class: lamb\n",
        "params.yaml:1:1: training: use_galore: lamb cannot be wrapped: its step is scaled by the norm",
    ),
    "key of another optimizer": (
        "training:\n  optimizer:\n    optimizer_class: adamw\n    parameters:\n      lion-lr: 1e-4\n",
        "params.yaml:5:7: training.optimizer.parameters.lion-lr: not a key of this optimizer.",
    ),
    "key the method does not have": (
        "training:\n  optimizer:\n    optimizer_class: sgd_momentum\n    parameters:\n      sgd_momentum-eps: 1e-4\n",
        "sgd_momentum-eps: not a key of this optimizer.",
    ),
    "unprefixed optimizer key": (
        "training:\n  optimizer:\n    parameters:\n      lr: 1e-4\n",
        "training.optimizer.parameters.lr: not a key of this optimizer.",
    ),
    "heads do not divide": ("model:\n  hidden_size: 128\n  num_heads: 5\n", "params.yaml:3:3: model.num_heads"),
    "not finite": (
        "training:\n  grad_clip_max_norm: .nan\n",
        "training.grad_clip_max_norm: found nan; expected a finite number",
    ),
    "empty section": ("model:\n", "params.yaml:1:1: model: found null (null); expected object"),
    "empty list": ("model:\n  layer_pattern: []\n", "model.layer_pattern: found []; expected at least 1 item(s)"),
    "a rule between sections": (
        "quantize:\n  weights: none\n",
        "export.model: 'ternary' needs quantize.weights: ternary",
    ),
    "not a mapping": ("- a\n- b\n", "found a CommentedSeq; expected a mapping"),
    "empty file": ("", "found nothing; expected a mapping"),
    "bad YAML": ("model: [a\n", "not valid YAML"),
    "duplicate key": ("seed: 1\nseed: 2\n", "not valid YAML"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_configuration_names_place_key_value_and_what_is_allowed(tmp_path: Path, case: str) -> None:
    text, expected = WRONG[case]
    assert any(expected in fault for fault in faults(tmp_path, text)), faults(tmp_path, text)


def test_all_faults_are_reported_at_once(tmp_path: Path) -> None:
    found = faults(tmp_path, "seed: -1\nmodel:\n  hidden_size: 0\n  use_moe: maybe\ntraining:\n  batch: 3\n")
    assert len(found) == 4


def test_a_foreign_optimizer_key_explains_the_prefix_rule(tmp_path: Path) -> None:
    [fault] = faults(tmp_path, "training:\n  optimizer:\n    parameters:\n      adamw-lr_norm: 1e-4\n")
    assert "adamw-" in fault
    assert "lr_norms" in fault


MORE = [".5", "+1", "-0.0", "12:30:45", "1e", "1.5e+3", "'1e-4'"]


@pytest.mark.parametrize(
    "scalar",
    [
        *["1e-4", "1E5", "1.e3", "1_000", "0o17", "0x1F", "no", "yes", "on", "off", "~", "null", "", "true", "False"],
        *MORE,
    ],
)
def test_scalars_read_as_dvc_reads_them(tmp_path: Path, scalar: str) -> None:
    path = write(tmp_path, f"a: {scalar}\n")
    ours, dvcs = plain(read_yaml(path)), load_yaml(str(path))
    assert ours == dvcs
    assert type(ours["a"]) is type(dvcs["a"]) or isinstance(ours["a"], type(dvcs["a"]))


def test_every_field_of_the_schema_is_titled_described_and_closed() -> None:
    def visit(node: dict, path: str) -> None:
        for key, entry in node.get("properties", {}).items():
            assert entry.get("title"), f"{path}.{key} has no title"
            assert entry.get("description"), f"{path}.{key} has no description"
            visit(entry, f"{path}.{key}")
        if node.get("type") == "object" and "properties" in node:
            assert node["additionalProperties"] is False, path

    visit(committed_schema(), "params")


def test_the_schema_has_every_field_of_the_inventories() -> None:
    properties = committed_schema()["properties"]
    model = """vocab_size hidden_size num_layers num_loops num_heads retention_heads num_experts top_k_experts dropout
        layer_pattern ode_solver ode_steps use_bitnet norm_type use_factorized_embedding factorized_embedding_dim
        use_embedding_conv embedding_conv_kernel hope_base hope_damping use_hope use_moe ffn_hidden_size
        ffn_activation"""
    training = """batch_size dataloader_workers max_length mlm_probability max_samples dataset_batch_size num_workers
        cache_dir local_parquet_dir prefer_local_cache stream_local_parquet use_amp gradient_accumulation_steps
        optimizer
        scheduler_total_steps scheduler_warmup_ratio scheduler_type grad_clip_max_norm inf_post_clip_threshold
        max_nan_retries checkpoint_every_n_steps max_rolling_checkpoints num_best_checkpoints nan_check_interval
        log_gradient_stats gradient_log_interval csv_log_path csv_rotate_on_schema_change gpu_metrics_backend
        nvml_device_index enable_block_grad_norms telemetry_log_interval use_galore galore_rank galore_update_interval
        galore_scale galore_max_dim"""
    assert set(model.split()) <= set(properties["model"]["properties"])
    assert set(training.split()) <= set(properties["training"]["properties"])


def test_loading_imports_no_torch() -> None:
    code = "import sys, frankenstein as fk; fk.load_params('params.yaml'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


PLUGIN = '''
"""A norm of one's own. Source: http://example.org."""
from torch import nn
from frankenstein import NORMS

@NORMS.register("my_norm")
class MyNorm(nn.LayerNorm):
    """Layer norm under another name."""
'''


def test_a_plugin_extends_the_schema(tmp_path: Path) -> None:
    (tmp_path / "my_plugin.py").write_text(PLUGIN)
    code = (
        "import frankenstein as fk\n"
        "p = fk.load_params(overrides={'plugins': ['my_plugin'], 'model.norm_type': 'my_norm'})\n"
        "print(p.model.norm_type)\n"
        "try: fk.load_params(overrides={'plugins': ['no_such_plugin']})\n"
        "except fk.ParamsError as e: print(e)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{ROOT}:{tmp_path}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.splitlines()[0] == "my_norm"
    assert "plugins[0]: cannot import 'no_such_plugin'" in run.stdout
