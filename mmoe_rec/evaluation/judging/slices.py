"""How well a model does on parts of the rows: what it gives some users while the mean hides it.

A slice is compared with all rows, by the same redraws of users, or with another model on the rows of the slice, where
these are the same for it. Slices with fewer than FEWEST rows of either label, or requests that rank anything, are
counted, not judged; p-values are corrected for all that are. Where slices cut requests, their lists are shorter than
those of all rows, whose NDCG is no measure for theirs: they are compared between models alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc

from mmoe_rec.auc import FEWEST
from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.closed import ClosedSums
from mmoe_rec.evaluation.judging.differences import check_same_rows, difference, holm
from mmoe_rec.evaluation.judging.influence import Resampling
from mmoe_rec.evaluation.judging.objective import SCORE, rarer
from mmoe_rec.evaluation.metrics.resampling import Values, user_counts
from mmoe_rec.evaluation.summary import effective_by_metric, evaluate, sums_by_user

_NDCG = "ndcg_at_10"
METRICS = ("auc", "calibration", "r2", _NDCG)
"""That are measured of slices: of binary tasks, of regressions, and of the score."""
ALL = "all rows"


@dataclass(frozen=True)
class SlicedModel:
    """The sums of a model: of all rows, and of each slice, (what slices are by, value) -> sums, in the same units."""

    whole: ClosedSums
    slices: Mapping[tuple[str, str], ClosedSums]


def sliced(models: Mapping[str, SlicedModel], model: str, resamples: int, seed: int = 0) -> list[dict[str, Any]]:
    """A record for each slice, task or `score`, metric, and what the slice is compared with.

    Of one model: `by`, `slice`, `group`, `metric`, `rows`, `labels` of the rarer kind (None of the score) and, of NDCG,
    `requests` that rank anything; `value`
    of the model in the slice, `beside`, which is `ALL` or the name of another model, and `apart`, `low`, `high`, `p`,
    `p_corrected`: by how much the value differs from that of the model on all rows, or of the other model in the slice.
    Where labels are too few to judge by, these and the value are None.
    """
    found: list[dict[str, Any]] = []
    cut = _that_cut_requests(models[model])
    for key in models[model].slices:
        found += _records(key, models, model, resamples, seed, key[0] in cut)
    judged = [each for each in found if each["p"] is not None]
    for each, corrected in zip(judged, holm([each["p"] for each in judged]), strict=True):
        each["p_corrected"] = corrected
    return found


def worst_first(records: Sequence[Mapping[str, Any]], level: float) -> list[Mapping[str, Any]]:
    """Those that are shown to be worse: AUC, R2 and NDCG by their size, then probabilities by how far they are off;
    then the others of the former in their order."""
    ranked = [each for each in records if each["metric"] != "calibration" and each["value"] is not None]
    worse = [each for each in ranked if is_worse(each, level)]
    off = [each for each in records if each["metric"] == "calibration" and is_worse(each, level)]
    return [
        *sorted(worse, key=lambda each: each["apart"]),
        *sorted(off, key=lambda each: -_off(each["value"])),
        *(each for each in ranked if each not in worse),
    ]


def is_worse(record: Mapping[str, Any], level: float) -> bool:
    """Whether it is shown to be lower, or its probabilities to be further off."""
    if record["value"] is None or record["p_corrected"] is None or record["p_corrected"] >= level:
        return False
    if record["metric"] != "calibration":
        return bool(record["apart"] < 0)
    return _off(record["value"]) > _off(record["value"] - record["apart"])


def told_of_slices(records: Sequence[Mapping[str, Any]], level: float, most: int = 3) -> Iterator[str]:
    """The worst that are shown to be, as sentences."""
    worse = [each for each in worst_first(records, level) if is_worse(each, level)]
    for each in worse[:most]:
        beside = "that of all rows" if each["beside"] == ALL else f"that of '{each['beside']}' there"
        other = each["value"] - each["apart"]
        yield (
            f"slice {each['by']}: {each['slice']} ({each['rows']:,} rows): {each['metric']} of {each['group']} is "
            f"{each['value']:.3f}, and {beside} is {other:.3f}"
        )
    if len(worse) > most:
        yield f"{len(worse) - most} more slices are shown to be worse; the report has them"


def _off(ratio: float) -> float:
    return abs(math.log(ratio)) if ratio > 0 else math.inf


def of_other_rows(models: Mapping[str, SlicedModel], model: str) -> Iterator[str]:
    """What slices are by that hold other rows for another model, as those of a rank do, so that it is not compared."""
    for by in dict.fromkeys(by for by, _ in models[model].slices):
        mine = {key: sums for key, sums in models[model].slices.items() if key[0] == by}
        # Of a model that is not sliced by it, nothing was asked.
        others = [
            each.slices for name, each in models.items() if name != model and any(by == key[0] for key in each.slices)
        ]
        if not all(_has_the_rows_of(sums, each.get(key)) for each in others for key, sums in mine.items()):
            yield by


def _has_the_rows_of(sums: ClosedSums, other: ClosedSums | None) -> bool:
    try:
        if other is not None:
            check_same_rows("", sums, "", other)
    except UserError:
        return False
    return other is not None


def _that_cut_requests(model: SlicedModel) -> set[str]:
    """What slices are by whose requests are more than there are, together."""
    requests: dict[str, int] = {}
    for (by, _), sums in model.slices.items():
        requests[by] = requests.get(by, 0) + int(sums.tables["ranking"]["requests"].to_numpy().sum())
    whole = int(model.whole.tables["ranking"]["requests"].to_numpy().sum())
    return {by for by, count in requests.items() if count > whole}


def _records(
    key: tuple[str, str], models: Mapping[str, SlicedModel], model: str, resamples: int, seed: int, cut: bool
) -> Iterator[dict[str, Any]]:
    """cut: whether requests have rows in other slices too."""
    mine = models[model]
    here = mine.slices[key]
    units = mine.whole.tables["ranking"]["user"].combine_chunks()
    sides = {(model, ALL): mine.whole} | {
        (name, key[1]): each.slices[key]
        for name, each in models.items()
        if _has_the_rows_of(here, each.slices.get(key))
    }
    groups = {side: sums_by_user(sums, METRICS) for side, sums in sides.items()}
    places = {
        side: pc.index_in(sums.tables["ranking"]["user"].combine_chunks(), value_set=units).to_numpy()
        for side, sums in sides.items()
    }

    def at(side: tuple[str, str], counts: np.ndarray) -> Values:
        return evaluate(groups[side], np.ascontiguousarray(counts[places[side]]))

    effective = effective_by_metric(groups[model, key[1]])
    resampling = {side: Resampling(at(side, np.ones((len(units), 1))), len(units)) for side in sides}
    for counts in user_counts(len(units), resamples, seed):
        for side, each in resampling.items():
            each.add(counts, at(side, counts))
    found = {side: each.found() for side, each in resampling.items()}
    for group, metric in found[model, key[1]]:
        labels = None if group == SCORE else rarer(here, group)
        table = here.tables["ranking" if group == SCORE else f"{group}.users"]
        rows, ranks = int(table["rows"].to_numpy().sum()), metric == _NDCG
        requests = int(table["ranked_requests"].to_numpy().sum()) if ranks else None
        told = {"by": key[0], "slice": key[1], "group": group, "metric": metric, "rows": rows, "labels": labels}
        told |= {"requests": requests}
        is_judged = min(each for each in (labels, requests, FEWEST) if each is not None) >= FEWEST
        for other in sides:
            if other == (model, key[1]) or (group, metric) not in found[other]:
                continue
            if ranks and cut and other == (model, ALL) and len(sides) > 2:
                continue  # another model is what it can be compared with
            its, beside = (found[side][group, metric] for side in ((model, key[1]), other))
            apart = difference(its, beside, effective[group, metric], len(here.tables["ranking"]))
            value = its.value
            is_compared = is_judged and not (ranks and cut and other == (model, ALL))
            yield {
                **told,
                "value": value if is_judged and np.isfinite(value) else None,
                "beside": ALL if other[1] == ALL and other[0] == model else other[0],
                "apart": apart["value"] if is_compared else None,
                **{name: apart[name] if is_compared else None for name in ("low", "high", "p")},
                "p_corrected": None,
            }
