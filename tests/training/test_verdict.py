"""What is said of validations: which rule chose the state, and what is wrong with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from mmoe_rec.model.utilisation import Utilisation
from mmoe_rec.training.validation import FEWEST, Validation, warnings_of, why_chosen

EVEN = Utilisation(torch.full((1, 2), 0.5), torch.full((1, 2), 0.5))


def found(**changes: dict) -> Validation:
    """A validation of two tasks without anything to say, but for what is changed."""
    good = {"gauc": {}, "calibration": {"click": 1.1, "like": 0.9}, "rarer": {"click": 900, "like": 500}}
    return Validation({"click": 0.4}, **{"auc": {"click": 0.7, "like": 0.8}, "experts": EVEN, **good, **changes})


def test_the_rule_that_chose_is_named() -> None:
    assert why_chosen(found(), 7, "auc") == [
        "best validation, at step 7: the mean AUC of click and like is the highest"
    ]
    three = {"click": 0.7, "like": 0.8, "stay": 0.6}
    assert why_chosen(found(auc=three), 7, "auc") == [
        "best validation, at step 7: the mean AUC of click, like and stay is the highest"
    ]
    assert why_chosen(found(), 7, "loss") == ["best validation, at step 7: the weighted loss is the lowest"]
    few = found(rarer={"click": 13, "like": 500})
    assert why_chosen(few, 7, "auc") == [
        "best validation, at step 7: the AUC of like is the highest",
        f"the AUC of 'click' had no say: 13 validation rows have its rarer label, and it takes {FEWEST}",
    ]
    alone = why_chosen(found(auc={"click": 0.478}, rarer={"click": 13}), 7, "auc")
    assert alone[0] == "best validation, at step 7: the weighted loss is the lowest"
    assert len(alone) == 2
    assert len(why_chosen(few, 7, "loss")) == 1


def test_an_auc_below_chance_is_told_of() -> None:
    (good,) = warnings_of(found(auc={"click": 0.998, "like": 0.8}, rarer={"click": 500, "like": 500}))
    assert "the validation AUC of 'click' is 0.9980, too good to be true" in good
    assert warnings_of(found(auc={"click": 0.998}, rarer={"click": 13})) == []
    (few,) = warnings_of(found(auc={"click": 0.478, "like": 0.8}, rarer={"click": 13, "like": 500}))
    assert few.startswith("the validation AUC of 'click' is 0.478, below .5; with 13 rows of its rarer label")
    (many,) = warnings_of(found(auc={"click": 0.478, "like": 0.8}, rarer={"click": 9000, "like": 500}))
    assert "worse than chance" in many


@pytest.mark.parametrize("rows", [50, 97, 900])
def test_random_scores_are_seldom_said_to_rank_worse_than_chance(rows: int) -> None:
    rng = np.random.default_rng(rows)
    label = np.repeat([0, 1], rows)
    aucs = [roc_auc_score(label, rng.random(2 * rows)) for _ in range(300)]
    told = [warnings_of(found(auc={"click": auc}, rarer={"click": rows})) for auc in aucs if auc < 0.5]
    assert len(told) > 100
    assert 0 < sum("worse than chance" in each for (each,) in told) < 0.05 * len(aucs)


@pytest.mark.parametrize(
    ("ratio", "rows", "told"),
    [(11.0, 130, True), (0.3, 130, True), (1.9, 10_000, False), (0.55, 10_000, False), (2.5, 3, False), (0.0, 9, True)],
)
def test_probabilities_far_from_what_was_observed_are_told_of(ratio: float, rows: int, told: bool) -> None:
    """2.5 times 3 rows may be chance."""
    validation = found(calibration={"click": ratio}, rarer={"click": rows})
    warnings = warnings_of(validation)
    assert bool(warnings) == told
    assert all("probabilities of 'click'" in each and f"{ratio:.2f} times" in each for each in warnings)
    assert warnings_of(validation, calibrated={"click"}) == []
