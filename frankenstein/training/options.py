"""Options of the training loop."""

from dataclasses import dataclass
from typing import Any

from frankenstein.options import option


@dataclass(frozen=True)
class OptimizerOptions:
    """Which optimizer, and its hyperparameters under the prefix contract `<class>-<suffix>`."""

    optimizer_class: str = option("adamw", "Optimizer name.")
    parameters: dict[str, Any] = option(
        {},
        "Hyperparameters of the chosen class, as <class>-<suffix>; "
        "a group key such as adamw-lr_norms overrides adamw-lr.",
    )


@dataclass(frozen=True)
class TrainingOptions:
    """Masked-language-model pretraining: batches, optimizer, schedule, stability, checkpoints, telemetry."""

    batch_size: int = option(32, "Rows in one micro-batch, shared out among all processes.", minimum=1)
    distributed: str = option(
        "ddp",
        "How several processes (torchrun) train: ddp, each with the whole model, or fsdp2, each with a part of it. "
        "One process takes no notice.",
        enum=["ddp", "fsdp2"],
    )
    compile: bool = option(
        False,
        "Compile the layers for pretraining with torch.compile. The first steps take seconds to minutes longer, less "
        "where an earlier run left its code in data/.compiled; whether the others pay for it depends on the mixers and "
        "the machine.",
    )
    dataloader_workers: int = option(
        0, "Background threads that prepare batches; the order never depends on it.", minimum=0
    )
    max_length: int = option(128, "Tokens in one packed row.", minimum=8)
    mlm_probability: float = option(0.2, "Share of tokens chosen for prediction.", minimum=0.0, maximum=1.0)
    whole_word_masking: bool = option(False, "Choose whole words (piece boundary) instead of single tokens.")
    max_samples: int = option(
        1_000_000, "Most source documents that are cached; from local files an even, seeded sample of all.", minimum=1
    )
    dataset_batch_size: int = option(1024, "Rows read from the source at once.", minimum=1)
    num_workers: int = option(
        0, "Processes that tokenize; 0 works in the main process. The bytes never depend on it.", minimum=0
    )
    cache_dir: str = option("data/.hub", "Folder where hub datasets are cached.", minLength=1)
    local_parquet_dir: str | None = option(None, "Folder with an earlier parquet copy of the hub dataset.")
    prefer_local_cache: bool = option(True, "Use local_parquet_dir instead of the hub when it has data.")
    stream_local_parquet: bool = option(True, "Read parquet in batches instead of whole files.")
    use_amp: bool = option(False, "Mixed precision: autocast to amp_dtype.")
    amp_dtype: str = option(
        "bfloat16", "Autocast type; float16 scales the loss (GradScaler).", enum=["bfloat16", "float16"]
    )
    gradient_accumulation_steps: int = option(1, "Micro-batches in one optimizer step.", minimum=1)
    optimizer: OptimizerOptions = option(OptimizerOptions, "Optimizer and its parameters.")
    scheduler_total_steps: int = option(400, "Optimizer steps of the run, and horizon of the schedule.", minimum=1)
    scheduler_warmup_ratio: float = option(
        0.1, "Share of the steps with a linearly rising learning rate.", minimum=0.0, maximum=1.0
    )
    scheduler_type: str = option(
        "cosine",
        "Learning-rate schedule after the warm-up.",
        enum=["cosine", "constant", "linear_warmup_then_constant"],
    )
    max_seconds: float | None = option(
        None,
        "Seconds of training, resumed parts included, after which pretraining ends with the running step; "
        "the result then depends on the machine's speed. The schedule keeps its horizon.",
        exclusiveMinimum=0.0,
    )
    max_tokens: int | None = option(
        None,
        "Pretraining ends with the first step that brings the tokens trained on (without padding) to this number; "
        "the schedule keeps its horizon.",
        minimum=1,
    )
    grad_clip_max_norm: float = option(
        1.0, "Global gradient norm is clipped to this; 0 turns clipping off.", minimum=0.0
    )
    inf_post_clip_threshold: float = option(
        1000.0,
        "A gradient norm above this after clipping counts as an instability; 0 turns the check off.",
        minimum=0.0,
    )
    max_nan_retries: int = option(
        3,
        "Unstable steps that are skipped, or undone by going back to a checkpoint's weights, before training stops.",
        minimum=0,
    )
    eval_every_n_steps: int = option(100, "Optimizer steps between validation losses.", minimum=1)
    eval_batches: int = option(8, "Most batches in one validation loss; their masks never change.", minimum=1)
    checkpoint_every_n_steps: int = option(100, "Optimizer steps between rolling checkpoints.", minimum=1)
    max_rolling_checkpoints: int = option(2, "Rolling checkpoints kept.", minimum=1)
    max_epoch_checkpoints: int | None = option(
        None, "Checkpoints of epoch ends kept; null keeps all, 0 writes none.", minimum=0
    )
    num_best_checkpoints: int = option(1, "Best checkpoints kept, by validation loss.", minimum=1)
    nan_check_interval: int = option(1, "Steps between checks for NaN and Inf.", minimum=1)
    log_gradient_stats: bool = option(False, "Write gradient statistics to the CSV log.")
    gradient_log_interval: int = option(10, "Steps between gradient statistics.", minimum=1)
    csv_log_path: str = option(
        "reports/logs/pretrain.csv", "Step log; throughput and times stand only here.", minLength=1
    )
    csv_rotate_on_schema_change: bool = option(True, "Start a new file when the log's columns change.")
    gpu_metrics_backend: str = option(
        "none", "Source of the GPU's load, memory, temperature and power.", enum=["nvml", "none"]
    )
    nvml_device_index: int = option(0, "GPU that nvml reads, by the driver's numbering.", minimum=0)
    enable_block_grad_norms: bool = option(False, "Log the gradient norm of every block, after clipping.")
    telemetry_log_interval: int = option(
        50, "Optimizer steps between heavy telemetry: memory, MFU, block gradient norms, nvml.", minimum=1
    )
    use_galore: bool = option(False, "Wrap the optimizer in GaLore: it steps large matrices at low rank.")
    galore_rank: int = option(128, "Rank of the GaLore projection.", minimum=1)
    galore_update_interval: int = option(200, "Steps between refreshes of the projection.", minimum=1)
    galore_scale: float = option(0.25, "Scale of the projected step.", minimum=0.0)
    galore_max_dim: int = option(4096, "Largest tensor dimension that is projected.", minimum=1)
