"""How a training loop runs."""

from dataclasses import dataclass, fields

from frankenstein.training.options import TrainingOptions


@dataclass(frozen=True)
class LoopSettings:
    """How a loop runs; the fields mean what they mean in TrainingOptions.

    `steps` counts optimizer steps, skipped ones too; `amp` autocasts to `amp_dtype`; `steps_per_epoch` says where
    epochs end, None that there are none.
    """

    steps: int
    seed: int = 0
    max_tokens: int | None = None
    max_seconds: float | None = None
    gradient_accumulation_steps: int = 1
    warmup_ratio: float = 0.1
    scheduler_type: str = "cosine"
    grad_clip_max_norm: float = 1.0
    inf_post_clip_threshold: float = 1000.0
    max_nan_retries: int = 3
    nan_check_interval: int = 1
    eval_every_n_steps: int = 100
    checkpoint_every_n_steps: int = 100
    max_rolling_checkpoints: int = 2
    max_epoch_checkpoints: int | None = None
    num_best_checkpoints: int = 1
    amp: bool = False
    amp_dtype: str = "bfloat16"
    dataloader_workers: int = 0
    log_gradient_stats: bool = False
    gradient_log_interval: int = 10
    gpu_metrics_backend: str = "none"
    nvml_device_index: int = 0
    enable_block_grad_norms: bool = False
    telemetry_log_interval: int = 50
    csv_rotate_on_schema_change: bool = True
    steps_per_epoch: int | None = None

    @classmethod
    def from_training(
        cls, options: TrainingOptions, seed: int, *, steps_per_epoch: int | None = None
    ) -> "LoopSettings":
        """The settings that the training section asks for."""
        own = {f.name for f in fields(cls)}
        return cls(
            steps=options.scheduler_total_steps,
            seed=seed,
            warmup_ratio=options.scheduler_warmup_ratio,
            amp=options.use_amp,
            steps_per_epoch=steps_per_epoch,
            **{name: value for name, value in vars(options).items() if name in own},
        )

    def ended_by(self, step: int, tokens: int, seconds: float) -> str:
        """Which limit these counts have reached: steps, max_tokens or max_seconds; empty while there is room."""
        if step >= self.steps:
            return "steps"
        if self.max_tokens is not None and tokens >= self.max_tokens:
            return "max_tokens"
        if self.max_seconds is not None and seconds >= self.max_seconds:
            return "max_seconds"
        return ""

    def ends_epoch(self, step: int) -> bool:
        """Whether an epoch ends with this many finished steps."""
        return self.steps_per_epoch is not None and step % self.steps_per_epoch == 0
