"""What a training's validations say in words: why a state was chosen, and what of it should worry its owner."""

from __future__ import annotations

import math
from collections.abc import Collection

from mmoe_rec.training.validation import FEWEST, Validation

FURTHEST = 2.0  # predictions over labels, or the other way round, beyond which one is told
_ERRORS = 1.96


def why_chosen(best: Validation, step: int, select_by: str) -> list[str]:
    """One sentence, then one for each binary task whose AUC had no say although it was asked for."""
    told = best.told_by_auc(select_by)
    how = "the weighted loss is the lowest"
    if told:
        how = f"the {'mean ' if len(told) > 1 else ''}AUC of {_listed(told)} is the highest"
    return [f"best validation, at step {step}: {how}", *_too_few(best, select_by)]


def warnings_of(best: Validation, calibrated: Collection[str] = ()) -> list[str]:
    """A sentence for each task that ranks worse than chance, and for each whose probabilities are far off.

    calibrated: tasks whose probabilities are corrected after training.
    """
    found = []
    for task, auc in best.auc.items():
        if auc < 0.5:
            rows = best.rarer.get(task, FEWEST)
            why = (
                f"with {rows} rows of its rarer label that may be chance, but nothing shows that it ranks at all"
                if rows < FEWEST or _may_be_chance(auc, rows)
                else "it ranks worse than chance: the label may be turned round, or validation unlike training"
            )
            found.append(f"the validation AUC of '{task}' is {auc:.3f}, below .5; {why}")
    for task, ratio in best.calibration.items():
        if task not in calibrated and _far(ratio, best.rarer.get(task, 0)):
            too = "high" if ratio > 1 else "low"
            found.append(
                f"the probabilities of '{task}' are too {too}: {ratio:.2f} times what was observed on validation rows; "
                "train longer (training.epochs, a smaller batch_size), or correct them by training.calibration"
            )
    return found


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _may_be_chance(auc: float, rows: int) -> bool:
    """Whether random scores come so far from .5 in one of 20 validations, with so many rows of the rarer label.

    Their AUC has the variance (m + n + 1) / (12 m n), for m and n rows of the labels (Mann and Whitney, 1947); how many
    have the other label is not known here, and no more would make it smaller than half of that with as many.
    """
    return abs(auc - 0.5) <= _ERRORS * math.sqrt((2 * rows + 1) / (12 * rows**2))


def _far(ratio: float, rows: int) -> bool:
    """Whether a ratio is beyond FURTHEST, and its 95% interval for so many rows of the rarer label does not hold 1."""
    apart = abs(math.log(ratio)) if ratio > 0 else math.inf
    return apart > math.log(FURTHEST) and apart > _ERRORS / math.sqrt(max(rows, 1))


def _too_few(best: Validation, select_by: str) -> list[str]:
    return [
        f"the AUC of '{task}' had no say: {rows} validation rows have its rarer label, and it takes {FEWEST}"
        for task, rows in best.rarer.items()
        if select_by == "auc" and rows < FEWEST
    ]
