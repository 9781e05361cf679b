"""Which figures a report has, and what each one says."""

from dataclasses import dataclass

from frankenstein.evaluation import plots
from frankenstein.evaluation.curves import Curve
from frankenstein.evaluation.evaluate import Evaluation


@dataclass(frozen=True)
class Figure:
    """A picture with a title and a caption; `name` is its file name and unique in a report."""

    name: str
    title: str
    caption: str
    svg: str


def figures(evaluation: Evaluation, pretraining: list[Curve], fine_tuning: list[Curve]) -> list[Figure]:
    """Every figure there is data for, in the order of the report."""
    drawn = []
    for protocol, facts in evaluation.facts["protocols"].items():
        caption = "Main metric on test with its 95 % interval. Dashed line: the best baseline."
        drawn.append(Figure(f"results_{protocol}", f"Results, {protocol}", caption, plots.results(facts["tasks"])))
    embed = evaluation.of("embed")
    for table in (t for t in embed if not t.splits.task.labels):
        caption = f"Test pairs of {table.splits.name}; at most {plots.SCATTER_ITEMS} are drawn, all are counted."
        drawn.append(
            Figure(f"similarity_{table.splits.name}", "Cosine and gold score", caption, plots.similarity(table))
        )
    if curves := [t for t in embed if t.curves]:
        caption = "Accuracy on dev as the upper threshold moves; the dot is the chosen one. Test pairs play no part."
        drawn.append(Figure("thresholds", "Choice of thresholds", caption, plots.thresholds(curves)))
    if classes := [t for t in evaluation.of("probe") if t.splits.task.labels]:
        caption = "Accuracy on test by confidence, ten bins; small ones are left out. The diagonal is honest."
        drawn.append(Figure("calibration", "Calibration of the probe", caption, plots.calibration(classes)))
    if pretraining:
        caption = (
            "Masked-language-model loss in nats a masked token; training loss is averaged over neighbouring steps."
        )
        drawn.append(Figure("pretraining", "Pretraining", caption, plots.pretraining(pretraining)))
    if fine_tuning:
        caption = "Loss, averaged over neighbouring steps, and mean Spearman correlation on dev pairs."
        drawn.append(Figure("fine_tuning", "Sentence fine-tuning", caption, plots.fine_tuning(fine_tuning)))
    return drawn
