"""What a finding costs: roughly the share of the test rows' predictions that it harms, from 0 to 1.

    share of the rows that it spoils x how much the feature matters in them

A feature matters as much as it alone ranks validation rows (2 AUC - 1, of the task that it ranks best). The id of the
user or the candidate matters fully where it is unknown, as all that was learnt of it is missing there; another id at
least `LEAST`, since rows of unknown ids are among those that its AUC is measured on. Of a drift, only the rows where
training had less than half as many count. A label rate that changes is in all rows. What only takes space costs 0.

It puts the findings in order; it does not measure what a model would gain.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LEAST = 0.3
_SELDOM = 2.0  # times as often as in training


def importance(feature: Mapping[str, Any]) -> float:
    """How well a feature alone ranks the task that it ranks best: 0 is chance, 1 perfect."""
    known = [auc for auc in feature["auc"].values() if auc is not None]
    return max(0.0, 2 * max(known, default=0.5) - 1)


def of_unknown(feature: Mapping[str, Any]) -> float:
    """Of ids that training does not know."""
    share = float(feature["unknown"]["test"] or 0.0)
    return share * (1.0 if feature["is_key"] else max(importance(feature), LEAST))


def of_drift(feature: Mapping[str, Any], each: Mapping[str, Any]) -> float:
    """Of an input whose values have other shares than in training."""
    apart = (part["test"] - part["train"] for part in each["bins"] if part["test"] > _SELDOM * part["train"])
    return sum(apart) * importance(feature)


def of_missing(feature: Mapping[str, Any], each: Mapping[str, Any]) -> float:
    """Of an input that has values in few test rows although training had more."""
    train, test = (each["coverage"][split] for split in ("train", "test"))
    return 0.0 if train is None or test is None else max(0.0, train - test) * importance(feature)


def of_rates(low: float, high: float) -> float:
    """Of a label rate that differs between splits."""
    return 1 - low / high if high > 0 else 0.0
