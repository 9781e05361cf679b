"""Score the models against free baselines, and write metrics, predictions, figures and the report."""

from pathlib import Path

from frankenstein.params import Params
from stages.runner import run


def main(
    params: Params,
    *,
    sbert: Path,
    encoder: Path,
    cache: Path,
    pretrain_curve: Path,
    sbert_curve: Path,
    corpus_metrics: Path,
    tokenizer_metrics: Path,
    pretrain_metrics: Path,
    quantize_metrics: Path,
    sbert_metrics: Path,
    embed: Path,
    probe: Path,
    results: Path,
    similarity: Path,
    thresholds: Path,
    report: Path,
) -> None:
    """Score the models against free baselines, and write metrics, predictions, figures and the report."""
    from frankenstein.evaluation.curves import read_curves
    from frankenstein.evaluation.evaluate import evaluate
    from frankenstein.evaluation.figures import figures
    from frankenstein.evaluation.files import write_metrics, write_points, write_results
    from frankenstein.evaluation.report import write_report
    from frankenstein.runtime import prepare_torch

    prepare_torch(params.threads)
    evaluation = evaluate(sbert=sbert, encoder=encoder, cache=cache, options=params.evaluate, seed=params.seed)
    drawn = figures(evaluation, read_curves(pretrain_curve), read_curves(sbert_curve))
    write_metrics(evaluation, embed=embed, probe=probe)
    write_results(evaluation, drawn, results)
    write_points(evaluation, similarity=similarity, thresholds=thresholds)
    earlier = {
        "corpus": corpus_metrics,
        "tokenizer": tokenizer_metrics,
        "pretrain": pretrain_metrics,
        "quantize": quantize_metrics,
        "sbert": sbert_metrics,
    }
    write_report(report, evaluation, drawn, encoder=encoder, metrics=earlier)


if __name__ == "__main__":
    run(main)
