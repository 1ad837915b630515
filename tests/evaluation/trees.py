"""Results of evaluations as the files have them, which tests read by the documented keys."""

from collections.abc import Mapping, Sequence
from typing import Any

from mmoe_rec.evaluation import comparison, summary
from mmoe_rec.evaluation.results_report import comparison_tree, summary_tree
from mmoe_rec.evaluation.sums import EvaluationSums
from mmoe_rec.settings.sections import Evaluation


def summarise(*arguments: Any, **options: Any) -> dict[str, Any]:
    return summary_tree(summary.summarise(*arguments, **options))


def compare(
    sums: Mapping[str, EvaluationSums], model: str, tasks: Sequence[str] = (), resamples: int = 20
) -> dict[str, Any]:
    """tasks: those that decide, by their AUC."""
    models = {name: summary.MeasuredModel(each, summary.summarise(each, 1)) for name, each in sums.items()}
    compared = comparison.compare(models, model, tasks, Evaluation().model_copy(update={"resamples": resamples}))
    return comparison_tree(compared)
