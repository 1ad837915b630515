"""What a server answered, compared with what the log says: each counter and history to the bit, scores nearly so."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec.errors import UserError
from mmoe_rec.features.encoder import MemoryEncoder
from mmoe_rec.features.kinds.counter import CounterEncoder, CounterFeature
from mmoe_rec.features.kinds.history import HistoryEncoder
from mmoe_rec.features.layout import Layout
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.inference.artifact import iso_time
from mmoe_rec.jobs.replay.offline import Period
from mmoe_rec.model.score import with_outcomes
from mmoe_rec.point_in_time.lists import SharedRagged

TOLERANCE = 1e-5
"""Of predictions and scores, times their size where that is above 1: how products are summed depends on the library."""
RELATIVE_TOLERANCE = 1e-3
"""Of probabilities and scores made of these besides: small ones would be nearly the same number whatever they are."""
EXAMPLES = 3
_ROWS_WAITING = 65_536
_MISMATCHES = pa.schema(
    [
        ("value", pa.string()),
        ("request", pa.string()),
        ("user", pa.string()),
        ("candidate", pa.string()),
        ("time", pa.string()),
        ("served", pa.string()),
        ("offline", pa.string()),
        ("difference", pa.float64()),
    ]
)


@dataclass
class Compared:
    """One value of all rows: a statistic of a counter, a history, a prediction or the score.

    kind: one of these; source: what it is computed from; largest: greatest difference, None where there is none or it
    is not a number; examples: the first mismatches.
    """

    name: str
    kind: str
    source: str
    compared: int = 0
    mismatches: int = 0
    largest: float | None = None
    examples: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Served:
    """What a server said of N candidates, in the order in which they were asked for.

    counters: name -> (N,) float64, NaN where missing; histories: name -> N lists of ids, or None; predictions: name ->
    (N,) float64, with the score under `score`.
    """

    counters: dict[str, np.ndarray]
    histories: dict[str, list[list[Any] | None]]
    predictions: dict[str, np.ndarray]

    @staticmethod
    def of(ranking: Mapping[str, Any]) -> Served:
        """Reads a reply's ranking, whose candidates are explained."""
        order = np.array(ranking["order"])
        explained = ranking["explanations"]
        back = np.argsort(order).tolist()

        def numbers(values: Sequence[float | None]) -> np.ndarray:
            found = np.empty(len(order))
            found[order] = np.array(values, np.float64)  # None becomes NaN
            return found

        first = explained[0]
        return Served(
            {name: numbers([each["counters"][name] for each in explained]) for name in first["counters"]},
            {name: [explained[place]["histories"][name] for place in back] for name in first["histories"]},
            {name: numbers(each) for name, each in ranking["predictions"].items()}
            | {"score": numbers(ranking["scores"])},
        )


class Comparison:
    """Compares what is served with a period's offline values, request by request.

    predictions, scores: (N, T) and (N,) offline, of all rows of the period; file: gets every mismatch, as Parquet.
    """

    def __init__(
        self,
        pipeline: FeaturePipeline,
        layout: Layout,
        period: Period,
        predictions: np.ndarray,
        scores: np.ndarray,
        file: Path | None = None,
    ) -> None:
        self._pipeline, self._period = pipeline, period
        self._predictions = {**with_outcomes(predictions, layout), "score": scores}
        numbers = {task.name for task in layout.tasks if task.kind != "binary"}
        self._probabilities = self._predictions.keys() - numbers - ({"score"} if numbers else set())
        self._encoders = {
            name: encoder for encoder in pipeline.memory_encoders.values() for name in encoder.result_names
        }
        self.values = {each.name: each for each in _values(self._encoders, self._predictions)}
        self._waiting: list[dict[str, Any]] = []
        self._file = None if file is None else pq.ParquetWriter(file, _MISMATCHES, compression="zstd")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._flush()
        if self._file is not None:
            self._file.close()

    @property
    def compared(self) -> int:
        """Values compared."""
        return sum(each.compared for each in self.values.values())

    @property
    def mismatches(self) -> int:
        """Values that differ."""
        return sum(each.mismatches for each in self.values.values())

    def add(self, start: int, served: Served) -> None:
        """Compares the rows of the period from number `start` on. Raises UserError where the server has other values.

        What is served in float64 is exchanged as a build does, and must then be equal to the bit.
        """
        found = {*served.counters, *served.histories, *served.predictions}
        if odd := found ^ self.values.keys():
            raise UserError(
                f"the server and the model do not have the same features and tasks ('{min(odd)}' is missing in one): "
                "give the model that is served with --model"
            )
        rows = len(served.predictions["score"])
        for name, numbers in served.counters.items():
            self._add_counter(name, start, numbers)
        for name, lists in served.histories.items():
            self._add_history(name, start, lists)
        for name, numbers in served.predictions.items():
            offline = self._predictions[name][start : start + rows].astype(np.float64)
            difference = np.abs(numbers - offline)
            allowed = TOLERANCE * np.maximum(1.0, np.abs(offline))
            if name in self._probabilities:
                allowed = np.minimum(allowed, RELATIVE_TOLERANCE * offline)
            wrong = ~(difference <= allowed)
            self._note(self.values[name], start, wrong, numbers, offline, difference)

    def _add_counter(self, name: str, start: int, numbers: np.ndarray) -> None:
        offline = self._period.results[name]
        assert isinstance(offline, np.ndarray)
        offline = offline[start : start + len(numbers)]
        served = self._encoders[name].exchanged(name, numbers)
        wrong = (served.view(np.uint32) != offline.view(np.uint32)) & ~(np.isnan(served) & np.isnan(offline))
        difference = np.abs(served.astype(np.float64) - offline)
        self._note(self.values[name], start, wrong, served, offline, difference)

    def _add_history(self, name: str, start: int, lists: Sequence[list[Any] | None]) -> None:
        encoder, results = self._encoders[name], self._period.results[name]
        assert isinstance(encoder, HistoryEncoder)
        assert isinstance(results, SharedRagged)
        number = results.number[start : start + len(lists)]
        distinct, place = np.unique(number, return_inverse=True)
        known = results.lists.take(distinct)
        ids, offsets = encoder.owner.vocabulary.decode(known.values), known.offsets
        offline = [ids[offsets[each] : offsets[each + 1]] or None for each in place.tolist()]
        served = [each or None for each in lists]
        wrong = np.array([one != other for one, other in zip(served, offline, strict=True)])
        self._note(self.values[name], start, wrong, served, offline, None)

    def _note(
        self, value: Compared, start: int, wrong: np.ndarray, served: Any, offline: Any, difference: np.ndarray | None
    ) -> None:
        value.compared += len(wrong)
        if difference is not None and (known := difference[np.isfinite(difference)]).size:
            value.largest = max(value.largest or 0.0, float(known.max()))
        if not wrong.any():
            return
        value.mismatches += int(wrong.sum())
        places = np.flatnonzero(wrong)
        if self._file is None:
            places = places[: max(0, EXAMPLES - len(value.examples))]
        for place in places.tolist():
            both = {"served": _plain(served[place]), "offline": _plain(offline[place])}
            example = self._described(start + place) | both
            if len(value.examples) < EXAMPLES:
                value.examples.append(example)
            far = None if difference is None else float(difference[place])
            if self._file is not None:
                self._waiting.append({"value": value.name, **example, "difference": far})
        if len(self._waiting) >= _ROWS_WAITING:
            self._flush()

    def _described(self, row: int) -> dict[str, Any]:
        """Which request and candidate a row of the period is."""
        rows, names = self._period.rows, self._period.rows.schema.columns
        time = iso_time(rows.table[names.time][row].value)
        user, candidate = (rows.table[name][row].as_py() for name in (names.user, names.candidate))
        request = f"{user} at {time}" if names.request is None else rows.table[names.request][row].as_py()
        return {"request": request, "user": user, "candidate": candidate, "time": time}

    def _flush(self) -> None:
        if self._file is None or not self._waiting:
            return
        columns = {field.name: [_cell(field.name, each[field.name]) for each in self._waiting] for field in _MISMATCHES}
        self._file.write_table(pa.table(columns, schema=_MISMATCHES))
        self._waiting = []

    def to_dict(self) -> dict[str, Any]:
        """All values, as JSON has them."""
        return {
            "compared": self.compared,
            "mismatches": self.mismatches,
            "values": [asdict(each) for each in self.values.values()],
        }


def _values(encoders: Mapping[str, MemoryEncoder[Any]], predictions: Mapping[str, Any]) -> Iterator[Compared]:
    for name, encoder in encoders.items():
        yield Compared(name, "counter" if isinstance(encoder, CounterEncoder) else "history", source_of(encoder))
    for name in predictions:
        yield Compared(name, "score" if name == "score" else "prediction", "the model")


def source_of(encoder: MemoryEncoder[Any]) -> str:
    """What a counter or history is computed from: its feature, task or log of events, key columns and windows."""
    feature = encoder.feature
    source = f"task '{feature.task}'" if encoder.source is None else f"events '{encoder.source}'"
    told = f"'{encoder.name}': {source} by {', '.join(encoder.by)}"
    if isinstance(feature, CounterFeature):
        windows = ("all of the past" if each is None else f"{each:g} days" for each in feature.window_days)
        return f"{told}, over {', '.join(windows)}"
    return f"{told}, the last {feature.length} of '{feature.of}'"


def _plain(value: Any) -> Any:
    """A value as JSON has it; a missing number is null."""
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _cell(column: str, value: Any) -> Any:
    if value is None or column in ("difference", "value", "time"):
        return value
    return value if isinstance(value, str) and column not in ("served", "offline") else json.dumps(value)
