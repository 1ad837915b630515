"""Results of evaluations as the files have them, which tests read by the documented keys."""

from __future__ import annotations

from typing import Any

from mmoe_rec.evaluation import comparison, off_policy, summary
from mmoe_rec.report.documents import comparison_tree, estimate_tree, summary_tree


def summarise(*arguments: Any, **options: Any) -> dict[str, Any]:
    return summary_tree(summary.summarise(*arguments, **options))


def find_differences(*arguments: Any, **options: Any) -> dict[str, Any]:
    return comparison_tree(comparison.find_differences(*arguments, **options))


def estimate(*arguments: Any, **options: Any) -> dict[str, Any]:
    return estimate_tree(off_policy.estimate(*arguments, **options))
