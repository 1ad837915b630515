"""Results of evaluations as the files have them, which tests read by the documented keys."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from mmoe_rec.evaluation import comparison, off_policy, slices, summary, tradeoffs, trainings
from mmoe_rec.report.documents import comparison_tree, estimate_tree, summary_tree


def summarise(*arguments: Any, **options: Any) -> dict[str, Any]:
    return summary_tree(summary.summarise(*arguments, **options))


def find_differences(*arguments: Any, **options: Any) -> dict[str, Any]:
    return comparison_tree(comparison.find_differences(*arguments, **options))


def compare_slices(*arguments: Any, **options: Any) -> list[dict[str, Any]]:
    return [asdict(each) for each in slices.compare_slices(*arguments, **options)]


def estimate(*arguments: Any, **options: Any) -> dict[str, Any]:
    return estimate_tree(off_policy.estimate(*arguments, **options))


def find_front(*arguments: Any, **options: Any) -> list[dict[str, Any]]:
    return [asdict(each) for each in tradeoffs.find_front(*arguments, **options)]


def average_trainings(*arguments: Any, **options: Any) -> dict[str, dict[str, dict[str, Any]]]:
    found = trainings.average_trainings(*arguments, **options)
    return {group: {metric: asdict(each) for metric, each in metrics.items()} for group, metrics in found.items()}


def compare_trainings(*arguments: Any, **options: Any) -> dict[str, dict[str, Any]]:
    found = trainings.compare_trainings(*arguments, **options)
    return {name: asdict(each) for name, each in found.items()}
