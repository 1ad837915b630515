"""Whether a model is better than another, in words: the one rule by which models are compared, reported and promoted.

A model is better where its objective is (its 95% interval lies above 0), and no guardrail holds it back: for no task
may the interval of what it loses reach beyond a margin, nor may its probabilities be far off where they were not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import t as student

from mmoe_rec.auc import FEWEST
from mmoe_rec.evaluation.judging.differences import LEVEL, POWER
from mmoe_rec.evaluation.judging.numbers import number, numbers, once_corrected, with_interval
from mmoe_rec.evaluation.judging.objective import SCORE
from mmoe_rec.settings.sections import Evaluation

BETTER, HELD_BACK, NOT_SHOWN, WORSE, UNDECIDED = "better", "held back", "not shown", "worse", "undecided"
_GUARDED = {"binary": "auc", "regression": "r2"}


@dataclass(frozen=True)
class Rule:
    """margin: of AUC, or R2, that no task may lose; calibration: largest factor by which probabilities may be off."""

    margin: float = 0.005
    calibration: float = 1.25

    @staticmethod
    def of(settings: Evaluation) -> Rule:
        """That of the settings."""
        return Rule(settings.margin, settings.calibration)


def verdict(
    compared: Mapping[str, Any],
    other: str,
    summaries: Mapping[str, Mapping[str, Any]],
    judged: Sequence[str],
    rule: Rule,
) -> dict[str, Any]:
    """What a model is beside another one.

    compared: of `differences`; other: one that the model is compared with; summaries: of both, by name; judged: tasks
    with labels enough.

    Returns:
        `kind`: `better`, `held back` (better, but for guardrails), `not shown`, `worse`, or `undecided`, where the
        objective is undefined; `sentence`; `detectable`, the gain, the same for all tasks, with which nine of ten
        evaluations like this one would call a model better; and `guards`, each with its `task`, `metric`, whether it
        has `passed`, and a `sentence`.
    """
    name, against, objective, found = compared["model"], other, compared["objective"], compared["against"][other]
    apart = found["objective"]
    guards = [
        guard
        for task in judged
        for guard in (_loss(task, found, summaries[name], rule), _calibration(task, name, against, summaries, rule))
        if guard is not None
    ]
    told: dict[str, Any] = {"guards": guards, "detectable": None}
    if objective is None or apart["p"] is None:
        why = f"no task has labels enough ({FEWEST} rows of either)"
        if objective is not None:
            alone = "has no interval, as one user decides nearly alone, or many redraws leave it undefined"
            why = f"{objective['name']} {'is undefined' if apart['value'] is None else alone}"
        return {"kind": UNDECIDED, "sentence": f"'{name}' and '{against}' can't be told apart: {why}", **told}
    gain, low, high = apart["value"], apart["low"], apart["high"]
    if objective["better"] == "lower":
        gain, low, high = -gain, -high, -low
    what, detectable = objective["name"], _detectable(compared, found, summaries[name], judged, rule)
    told["detectable"] = detectable
    if apart["p_corrected"] >= LEVEL or not (low > 0 or high < 0):
        if apart["low"] == apart["high"] == 0:
            return {
                "kind": NOT_SHOWN,
                "sentence": f"'{name}' and '{against}' do not differ{_others(found)}: {what} is the same",
                **told,
            }
        sentence = (
            f"no difference is shown between '{name}' and '{against}'{once_corrected(apart)}: {what} differs by "
            f"{with_interval(apart)}; nine of ten evaluations like this one would show a gain of "
            f"{number(detectable, sign=False)}{_besides(objective, summaries[name], judged)}"
        )
        return {"kind": NOT_SHOWN, "sentence": sentence, **told}
    which = "higher" if apart["value"] > 0 else "lower"
    ends = sorted(abs(each) for each in (apart["low"], apart["high"]))
    size, *shown = numbers(abs(gain), *ends, sign=False)
    size = f"{size} ({' to '.join(shown)})"
    if gain < 0:
        return {"kind": WORSE, "sentence": f"'{name}' is worse than '{against}': {what} is {which} by {size}", **told}
    if failed := [guard["sentence"] for guard in guards if not guard["passed"]]:
        although = f"'{name}' is held back, although {what} is {which} than that of '{against}' by {size}"
        return {"kind": HELD_BACK, "sentence": f"{although}: {'; '.join(failed)}", **told}
    return {"kind": BETTER, "sentence": f"'{name}' is better than '{against}': {what} is {which} by {size}", **told}


def _detectable(
    compared: Mapping[str, Any],
    found: Mapping[str, Any],
    summary: Mapping[str, Any],
    judged: Sequence[str],
    rule: Rule,
) -> float:
    """The gain, the same for all tasks, with which nine of ten evaluations would call a model better.

    The objective and all guardrails of its metric have to hold at once, so each has to fail that much more rarely; and
    where several models are looked at, the first p-value has to be that much smaller.
    """
    objective = compared["objective"]
    guarded = [
        (found["groups"][task][metric]["error"], found["groups"][task][metric]["effective_users"])
        for task in judged
        if (metric := _GUARDED[summary["tasks"][task]["kind"]]) == objective["metric"]
        and found["groups"].get(task, {}).get(metric, {}).get("error")
    ]
    power = 1 - (1 - POWER) / (1 + len(guarded))
    own = found["objective"]["error"]
    levels = [1 - LEVEL / len(compared["against"]) / 2, power]
    sizes = [own * sum(student.ppf(levels, found["objective"]["effective_users"] - 1))] if own else [0.0]
    # What the guardrail of a task asks for.
    sizes += [error * sum(student.ppf([1 - LEVEL / 2, power], users - 1)) - rule.margin for error, users in guarded]
    return float(max(sizes))


def _others(found: Mapping[str, Any]) -> str:
    """Which other metrics are shown to differ where what decides is the same."""
    shown = [
        f"{metric} of {'the score' if group == SCORE else group}"
        for group, metrics in found["groups"].items()
        for metric, each in metrics.items()
        if each["p_corrected"] is not None and each["p_corrected"] < LEVEL
    ]
    more = f" and {len(shown) - 2} more" if len(shown) > 2 else ""
    return f" in what decides, though in {', '.join(shown[:2])}{more}" if shown else ""


def _besides(objective: Mapping[str, Any], summary: Mapping[str, Any], judged: Sequence[str]) -> str:
    """What else may hold a model back, where guardrails are of another metric than the objective."""
    metrics = {_GUARDED[summary["tasks"][task]["kind"]] for task in judged} - {objective["metric"]}
    return f", if guardrails of {' and '.join(sorted(metrics))} allow it" if metrics else ""


def _loss(task: str, found: Mapping[str, Any], summary: Mapping[str, Any], rule: Rule) -> dict[str, Any]:
    metric = _GUARDED[summary["tasks"][task]["kind"]]
    apart = found["groups"].get(task, {}).get(metric)
    told = {"task": task, "metric": metric}
    if apart is None or apart["low"] is None:
        missing = "is undefined" if apart is None or apart["value"] is None else "has no interval"
        limit = f"a loss of more than {rule.margin:g} (evaluation.margin) can't be ruled out"
        return {**told, "passed": False, "sentence": f"the difference in {metric} of {task} {missing}, so {limit}"}
    passed = apart["low"] >= -rule.margin
    changes = f"{metric} of {task} changes by {with_interval(apart)}"
    limit = f"loss of more than {rule.margin:g} (evaluation.margin)"
    shown = f"which is a {limit}" if apart["high"] < -rule.margin else f"so a {limit} can't be ruled out"
    end = f"so a {limit} is ruled out" if passed else shown
    return {**told, "passed": passed, "sentence": f"{changes}, {end}"}


def _calibration(
    task: str, name: str, against: str, summaries: Mapping[str, Mapping[str, Any]], rule: Rule
) -> dict[str, Any] | None:
    mine, its = (summaries[each]["tasks"][task].get("calibration") for each in (name, against))
    if mine is None or its is None or mine["value"] is None or its["value"] is None:
        return None  # of a regression, or without a positive label
    low, high = (mine["value"], mine["value"]) if mine["low"] is None else (mine["low"], mine["high"])
    outside = low > rule.calibration or high < 1 / rule.calibration
    passed = not (outside and _off(mine["value"]) > _off(its["value"]))
    where = "beyond" if outside else "not shown to be beyond"
    sentence = (
        f"the probabilities of {task} are {mine['value']:.2f} times what was observed ({low:.2f} to {high:.2f}), which "
        f"is {where} a factor of {rule.calibration:g} (evaluation.calibration); those of '{against}' are "
        f"{its['value']:.2f} times"
    )
    return {"task": task, "metric": "calibration", "passed": passed, "sentence": sentence}


def _off(ratio: float) -> float:
    return abs(math.log(ratio)) if ratio > 0 else math.inf
