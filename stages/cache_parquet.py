"""Clean the corpus and check the evaluation pairs; everything later reads the cache."""

from pathlib import Path

from frankenstein.params import Params
from stages.runner import run


def main(params: Params, *, cache: Path, metrics: Path) -> None:
    """Clean the corpus and check the evaluation pairs; everything later reads the cache."""
    from frankenstein.artifact import write_json
    from frankenstein.text.cache import cache_parquet
    from frankenstein.text.sources.hub import HubAccess

    counts = cache_parquet(
        params.data,
        seed=params.seed,
        max_samples=params.training.max_samples,
        dataset_batch_size=params.training.dataset_batch_size,
        stream_local_parquet=params.training.stream_local_parquet,
        hub=HubAccess(
            cache_dir=params.training.cache_dir,
            local_parquet_dir=params.training.local_parquet_dir,
            prefer_local_cache=params.training.prefer_local_cache,
        ),
        out=cache,
    )
    write_json(metrics, counts)


if __name__ == "__main__":
    run(main)
