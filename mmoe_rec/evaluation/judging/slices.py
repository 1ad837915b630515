"""How well a model does on parts of the rows: what it gives some users while the mean hides it.

A slice is compared with all rows, by the same redraws of users, or with another model on the rows of the slice. Slices
with fewer than FEWEST rows of either label are counted, not judged; p-values are corrected for all that are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc

from mmoe_rec.auc import FEWEST
from mmoe_rec.evaluation.closed import ClosedSums
from mmoe_rec.evaluation.judging.differences import difference, effective_users, holm
from mmoe_rec.evaluation.judging.objective import SCORE, rarer
from mmoe_rec.evaluation.metrics.resampling import Values, user_counts
from mmoe_rec.evaluation.summary import evaluate, sums_by_user

METRICS = ("auc", "calibration", "r2", "ndcg_at_10")
"""That are measured of slices: of binary tasks, of regressions, and of the score."""
ALL = "all rows"


@dataclass(frozen=True)
class SlicedModel:
    """The sums of a model: of all rows, and of each slice, (what slices are by, value) -> sums, in the same units."""

    whole: ClosedSums
    slices: Mapping[tuple[str, str], ClosedSums]


def sliced(models: Mapping[str, SlicedModel], model: str, resamples: int, seed: int = 0) -> list[dict[str, Any]]:
    """A record for each slice, task or `score`, metric, and what the slice is compared with.

    Of one model: `by`, `slice`, `group`, `metric`, `rows`, and `labels` of the rarer kind (None of the score), `value`
    of the model in the slice, `beside`, which is `ALL` or the name of another model, and `apart`, `low`, `high`, `p`,
    `p_corrected`: by how much the value differs from that of the model on all rows, or of the other model in the slice.
    Where labels are too few to judge by, these and the value are None.
    """
    found: list[dict[str, Any]] = []
    for key in models[model].slices:
        found += _records(key, models, model, resamples, seed)
    judged = [each for each in found if each["p"] is not None]
    for each, corrected in zip(judged, holm([each["p"] for each in judged]), strict=True):
        each["p_corrected"] = corrected
    return found


def worst_first(records: Sequence[Mapping[str, Any]], level: float) -> list[Mapping[str, Any]]:
    """Those of AUC, R2 and NDCG that are shown to be worse, by their size; then the others in their order."""
    ranked = [each for each in records if each["metric"] != "calibration" and each["value"] is not None]
    worse = [
        each for each in ranked if (each["p_corrected"] or 0) < level and each["apart"] < 0 and each["p"] is not None
    ]
    return [*sorted(worse, key=lambda each: each["apart"]), *(each for each in ranked if each not in worse)]


def _records(
    key: tuple[str, str], models: Mapping[str, SlicedModel], model: str, resamples: int, seed: int
) -> Iterator[dict[str, Any]]:
    mine = models[model]
    here = mine.slices[key]
    units = mine.whole.tables["ranking"]["user"].combine_chunks()
    sides = {(model, ALL): mine.whole} | {
        (name, key[1]): each.slices[key] for name, each in models.items() if key in each.slices
    }
    groups = {side: sums_by_user(sums, METRICS) for side, sums in sides.items()}
    places = {
        side: pc.index_in(sums.tables["ranking"]["user"].combine_chunks(), value_set=units).to_numpy()
        for side, sums in sides.items()
    }

    def at(counts: np.ndarray) -> dict[tuple[str, str], Values]:
        return {side: evaluate(groups[side], np.ascontiguousarray(counts[places[side]])) for side in sides}

    once, effective = at(np.ones((len(units), 1))), effective_users(here)
    redrawn = [at(counts) for counts in user_counts(len(units), resamples, seed)]
    for group, metric in once[model, key[1]]:
        labels = None if group == SCORE else rarer(here, group)
        rows = int(here.tables["ranking" if group == SCORE else f"{group}.users"]["rows"].to_numpy().sum())
        told = {"by": key[0], "slice": key[1], "group": group, "metric": metric, "rows": rows, "labels": labels}
        is_judged = labels is None or labels >= FEWEST
        for other in sides:
            if other == (model, key[1]) or (group, metric) not in once[other]:
                continue
            pair = [(model, key[1]), other]
            values = [float(once[side][group, metric][0]) for side in pair]
            resampled = [np.concatenate([each[side][group, metric] for each in redrawn]) for side in pair]
            count = len(here.tables["ranking"])
            apart = difference(values[0], values[1], resampled[0], resampled[1], count, effective[group])
            value = values[0]
            yield {
                **told,
                "value": value if is_judged and np.isfinite(value) else None,
                "beside": ALL if other[1] == ALL and other[0] == model else other[0],
                "apart": apart["value"] if is_judged else None,
                **{name: apart[name] if is_judged else None for name in ("low", "high", "p")},
                "p_corrected": None,
            }
