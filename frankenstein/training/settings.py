"""How a training loop runs."""

from dataclasses import dataclass

from frankenstein.training.options import TrainingOptions


@dataclass(frozen=True)
class LoopSettings:
    """How a loop runs; the fields mean what they mean in TrainingOptions.

    `steps` counts optimizer steps, skipped ones too; `amp` autocasts to bfloat16; `steps_per_epoch` is only logged.
    """

    steps: int
    seed: int = 0
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
    num_best_checkpoints: int = 1
    amp: bool = False
    dataloader_workers: int = 0
    log_gradient_stats: bool = False
    gradient_log_interval: int = 10
    telemetry_log_interval: int = 50
    csv_rotate_on_schema_change: bool = True
    steps_per_epoch: int | None = None

    @classmethod
    def from_training(
        cls, options: TrainingOptions, seed: int, *, steps_per_epoch: int | None = None
    ) -> "LoopSettings":
        """The settings that the training section asks for."""
        return cls(
            steps=options.scheduler_total_steps,
            seed=seed,
            gradient_accumulation_steps=options.gradient_accumulation_steps,
            warmup_ratio=options.scheduler_warmup_ratio,
            scheduler_type=options.scheduler_type,
            grad_clip_max_norm=options.grad_clip_max_norm,
            inf_post_clip_threshold=options.inf_post_clip_threshold,
            max_nan_retries=options.max_nan_retries,
            nan_check_interval=options.nan_check_interval,
            eval_every_n_steps=options.eval_every_n_steps,
            checkpoint_every_n_steps=options.checkpoint_every_n_steps,
            max_rolling_checkpoints=options.max_rolling_checkpoints,
            num_best_checkpoints=options.num_best_checkpoints,
            amp=options.use_amp,
            dataloader_workers=options.dataloader_workers,
            log_gradient_stats=options.log_gradient_stats,
            gradient_log_interval=options.gradient_log_interval,
            telemetry_log_interval=options.telemetry_log_interval,
            csv_rotate_on_schema_change=options.csv_rotate_on_schema_change,
            steps_per_epoch=steps_per_epoch,
        )
