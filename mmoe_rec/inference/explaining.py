"""What a candidate's predictions come from: calibration, gates, counters and histories; for the option `explain`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.inference.artifact import iso_time
from mmoe_rec.inference.ranking import Explanation
from mmoe_rec.inference.scorer import Scored
from mmoe_rec.log.request_rows import RequestRows


class Explainer:
    """Explains candidates of a pass, whose rows are looked up once for all of them.

    scored: of the pass's rows, with `inside`; tasks: names.
    """

    def __init__(self, pipeline: FeaturePipeline, rows: RequestRows, scored: Scored, tasks: Sequence[str]) -> None:
        assert scored.inside is not None
        self._tasks, self._scored, self._inside = tasks, scored, scored.inside
        self._numbers, self._lists = pipeline.found(rows)

    def explanations(self, places: Sequence[int], moments: Mapping[str, str]) -> list[Explanation]:
        """Of the candidates of a request at these rows of the pass, in the given order; moments: as `as_of` gives."""
        chosen = np.array(places, np.int64)
        after, before = (each[chosen].astype(np.float64) for each in (self._scored.values, self._inside.values))
        numbers = {name: _or_null(each[chosen]) for name, each in self._numbers.items()}
        lists = {name: each[chosen].tolist() for name, each in self._lists.items()}
        rows = zip(before.tolist(), after.tolist(), self._inside.gates[chosen].tolist(), strict=True)
        return [
            Explanation(
                uncalibrated=dict(zip(self._tasks, uncalibrated, strict=True)),
                calibrated=dict(zip(self._tasks, calibrated, strict=True)),
                gates=dict(zip(self._tasks, gates, strict=True)),
                counters={name: each[row] for name, each in numbers.items()},
                histories={name: each[row] for name, each in lists.items()},
                as_of=dict(moments),
            )
            for row, (uncalibrated, calibrated, gates) in enumerate(rows)
        ]


def as_of(floors: Mapping[str, int | None], time: int) -> dict[str, str]:
    """The moment, ISO time, as of which counters and histories answer a request at a time (microseconds).

    floors: of those that are read from a memory, as `FeaturePipeline.memories_read` gives them.
    """
    moments = {floor: iso_time(time if floor is None else max(time, floor)) for floor in set(floors.values())}
    return {name: moments[floor] for name, floor in floors.items()}


def _or_null(values: np.ndarray) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]
