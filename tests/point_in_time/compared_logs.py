"""Builds features of a drawn log, extends them, and compares what they are with the naive reference."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.progress import Progress

from mmoe_rec.errors import UserError
from mmoe_rec.features import kinds
from mmoe_rec.features.encoder import PointInTimeEncoder
from mmoe_rec.features.kinds.cooccurrence import CooccurrenceEncoder
from mmoe_rec.features.kinds.counter import CounterEncoder
from mmoe_rec.features.kinds.history import HistoryEncoder
from mmoe_rec.features.layout import EncodedInputs
from mmoe_rec.features.numeric_statistics import CLIP
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.features.vocabulary import Vocabulary
from mmoe_rec.log import reader as log
from mmoe_rec.log.columns import hash_column
from mmoe_rec.log.rows import LogRows
from mmoe_rec.point_in_time.arrays import Ragged
from mmoe_rec.preprocessing import build_steps as steps
from mmoe_rec.preprocessing import count_and_encode
from mmoe_rec.preprocessing import look_up as answers
from mmoe_rec.preprocessing import prepare as build
from mmoe_rec.preprocessing.build_inputs import BuildInputs, BuildOptions
from mmoe_rec.preprocessing.extend import extend
from mmoe_rec.preprocessing.prepare import FeatureFolder, prepare
from tests.log.small_logs import raw_results
from tests.point_in_time.drawn_logs import DrawnLog, draw
from tests.reference import features
from tests.reference.log import DAY, Log, inside

_NO_NEW_REQUEST = "new rows is of a new request later than"
TOLERANCE = 1e-5  # of the largest value, if that is above 1: answers are exchanged as float32
# What a log that is drawn may lack.
_LACKS = ("split is empty", "lies in a split", "have no rows")


@contextmanager
def _small_pieces(drawn: DrawnLog) -> Iterator[None]:
    with ExitStack() as stack:
        for module in (steps, count_and_encode):
            stack.enter_context(patch.object(module, "ROWS_PER_PART", drawn.small["part"]))
        stack.enter_context(patch.object(log, "READ_BATCH_ROWS", drawn.small["batch"]))
        stack.enter_context(patch.object(answers, "ROWS_PER_BLOCK", drawn.small["block"]))
        stack.enter_context(patch.object(count_and_encode, "ROWS_PER_GROUP", 16))
        # A task that nothing can be learnt of has labels to compare too.
        stack.enter_context(patch.object(build, "check_classes", lambda *_: None))
        # Thousands of small builds, of which nothing is to be seen and nothing has to last.
        stack.enter_context(patch.object(steps, "bar", lambda: Progress(disable=True)))
        stack.enter_context(patch.object(os, "fsync", lambda _: None))
        yield


def compare(seed: int, folder: Path) -> int:
    """Numbers of values compared in the log of a seed, 0 where it has too little to build features of.

    Raises AssertionError where one differs.
    """
    drawn = draw(seed)
    drawn.settings["events"]["bought"]["path"] = str(folder / "events")
    schema = kinds.parse_schema(drawn.settings)
    compared, means = 0, {}
    with _small_pieces(drawn):
        for stage in range(drawn.stages):
            drawn.write(folder, stage)
            if stage > 0:
                drawn.deliver_again(folder, stage)
            options = BuildOptions(**drawn.options)
            place = str(folder / "log"), schema, drawn.windows, folder / "work", options
            try:
                if stage == 0:
                    prepared = prepare(BuildInputs(*place))
                elif (extended := extend(BuildInputs(*place))) is None:
                    continue
                else:
                    prepared = extended.features
            except UserError as error:
                if any(lack in str(error) for lack in _LACKS):
                    return compared
                if _NO_NEW_REQUEST in str(error) and not _Rows(drawn, stage).new:
                    return compared
                raise AssertionError(f"log {seed}: {error}") from error
            comparison = _Comparison(drawn, stage, prepared)
            means = means or comparison.overall_means()
            compared += comparison.compare(means)
    return compared


class _Rows:
    """The reference for all rows written so far. new: those of a stage whose requests did not begin before it."""

    def __init__(self, drawn: DrawnLog, stage: int) -> None:
        log, events = (item[item["stage"] <= stage] for item in (drawn.log, drawn.events))
        self.naive = Log(drawn.settings, log, {"bought": events})
        seen = {self.naive.request(row) for row in self.naive.rows if row["stage"] < stage}
        self.new = [row for row in self.naive.rows if row["stage"] == stage and self.naive.request(row) not in seen]


class _Comparison(_Rows):
    """Encoded rows of a stage beside the reference for all rows written so far."""

    def __init__(self, drawn: DrawnLog, stage: int, prepared: FeatureFolder) -> None:
        super().__init__(drawn, stage)
        self.drawn, self.prepared = drawn, prepared
        self.pipeline = FeaturePipeline.load(prepared.serving, stores=False)
        self.place = {row["row"]: place for place, row in enumerate(self.naive.rows)}
        self.last = max(row["time"] for row in self.naive.rows)
        self.compared = 0

    def overall_means(self) -> dict[str, float]:
        """Of each counter's task."""
        means = {}
        for name, encoder in self.pipeline.point_in_time_encoders.items():
            if isinstance(encoder, CounterEncoder):
                task = encoder.feature.task
                mean = 0.0 if task is None else self.naive.overall_mean(task, self.drawn.windows["train"])
                self._close(encoder.prior, mean, f"overall mean of {name}", 0.0)
                means[name] = encoder.prior
        return means

    def compare(self, means: dict[str, float]) -> int:
        """Compares all splits, and what memories say of requests to come; gives the number of values."""
        counters: dict[str, list[dict]] = {
            name: features.counter(self.naive, name, mean) for name, mean in means.items()
        }
        counters["pairs"] = features.cooccurrence(self.naive, "pairs", self._codes())
        histories = {
            name: features.history(self.naive, name, self._table_rows(encoder))
            for name, encoder in self.pipeline.point_in_time_encoders.items()
            if isinstance(encoder, HistoryEncoder)
        }
        for split, window in self.drawn.windows.items():
            expected = [row for row in self.new if inside(row["time"], window)]
            table = self._encoded(split)
            rows = table["sampling_rate"].to_pylist() if table.num_rows else []
            assert rows == [row["row"] for row in expected], self._says(f"rows of {split}")
            if not rows:
                continue
            places = [self.place[row] for row in rows]
            encoded = EncodedInputs.from_arrow(table, self.prepared.layout)
            self._labels(table, expected, split)
            for name, values in counters.items():
                self._counter(name, [values[place] for place in places], encoded)
            for name, lists in ((part, item) for parts in histories.values() for part, item in parts.items()):
                expected_lists = [lists[place] for place in places]
                self._same_lists(name, encoded.ids[name], expected_lists)
        self._requests_to_come(means)
        return self.compared

    def _requests_to_come(self, means: dict[str, float]) -> None:
        """What is remembered for the server."""
        asking = self.naive.at_moments(6, [self.last + after for after in (1, DAY // 2, 4 * DAY)])
        columns = {name: [row[name] for row in asking] for name in ("user", "item", "brand", "time")}
        table = pa.table({name: pa.array(item, self.drawn.types[name]) for name, item in columns.items()})
        rows = LogRows(table, self.pipeline.schema)
        for name, encoder in FeaturePipeline.load(self.prepared.serving).point_in_time_encoders.items():
            actual = raw_results(encoder, rows)
            if isinstance(encoder, HistoryEncoder):
                lists = features.history(self.naive, name, self._table_rows(encoder), asking)
                assert actual.keys() == lists.keys()
                for part, item in lists.items():
                    self._same_lists(part, actual[part], item)
            else:
                statistics: list[dict] = (
                    features.cooccurrence(self.naive, name, self._codes(), asking)
                    if isinstance(encoder, CooccurrenceEncoder)
                    else features.counter(self.naive, name, means[name], asking)
                )
                for answer, values in self._by_name(encoder, statistics).items():
                    scale = np.maximum(1, np.abs(values))
                    self._close(actual[answer] / scale, values / scale, f"{answer} later", TOLERANCE)

    def _encoded(self, split: str) -> pa.Table:
        folder = self.prepared.split(split)
        return pq.read_table(folder) if folder.is_dir() else pa.table({})

    def _table_rows(self, encoder: HistoryEncoder) -> dict[str, dict[Any, int]]:
        actual = {}
        for vocabulary in encoder.parts.values():
            if not isinstance(vocabulary, Vocabulary):
                continue
            column = vocabulary.feature.column
            every = (row[column] for rows in (self.naive.rows, *self.naive.events.values()) for row in rows)
            values = list(dict.fromkeys(every))
            rows = vocabulary.encode(pa.array(values, self.drawn.types[column])).tolist()
            actual[vocabulary.name] = dict(zip(values, rows, strict=True))
        return actual

    def _labels(self, table: pa.Table, rows: list[dict], split: str) -> None:
        label_cutoff = self.drawn.windows["train"][1] if split == "train" else self.last
        for task in self.drawn.settings["tasks"]:
            expected = [self.naive.label_known_by(row, task, label_cutoff) for row in rows]
            assert table[f"label.{task}"].to_pylist() == expected, self._says(f"labels {task} of {split}")
            self.compared += len(rows)

    def _counter(self, name: str, expected: list[dict], encoded: EncodedInputs) -> None:
        encoder = self.pipeline.encoders[name]
        assert isinstance(encoder, PointInTimeEncoder)
        names = [item.name for item in self.prepared.layout.dense]
        for answer, statistics in self._by_name(encoder, expected).items():
            values, numbers = statistics, encoder.numbers[answer].standardizer
            if (
                isinstance(encoder, CounterEncoder)
                and encoder.task.kind == "regression"
                and answer.startswith(f"{name}_rate")
            ):
                values = statistics - encoder.prior  # which rates of a regression are kept as distances from
            scaled = np.nan_to_num(np.clip((values - numbers.mean) / numbers.std, -CLIP, CLIP))
            actual = encoded.dense[:, names.index(answer)]
            # A number is exchanged as float32, and its distance from the mean is encoded as such.
            distances = scaled * numbers.std
            largest = max(1, np.nan_to_num(np.abs(values)).max(), np.abs(distances).max())
            self._close(actual * numbers.std, distances, answer, TOLERANCE * largest)
            if numbers.has_missing:
                missing = encoded.dense[:, names.index(f"{answer}_missing")]
                assert (missing == np.isnan(values)).all(), self._says(f"{answer}_missing")

    def _codes(self) -> dict[Any, int]:
        """The order of candidates of one moment: the upper halves of their hashes."""
        tables = (self.naive.rows, *self.naive.events.values())
        items = list({row["item"] for rows in tables for row in rows} - {None})
        return dict(zip(items, (hash_column(pa.array(items)) >> np.uint64(32)).tolist(), strict=True))

    def _by_name(self, encoder: PointInTimeEncoder, rows: list[dict]) -> dict[str, np.ndarray]:
        """The statistics of N rows under the names of a feature's results."""
        feature = encoder.feature
        if isinstance(encoder, CooccurrenceEncoder):
            return {f"{encoder.name}_{output}": np.array([row[output] for row in rows]) for output in rows[0]}
        totals = [output for output in feature.outputs if output != "recency"]
        keys = [(output, days) for days in feature.window_days for output in totals]
        keys += [("recency", None)] * ("recency" in feature.outputs)
        return {
            name: np.array([np.nan if row[key] is None else row[key] for row in rows], float)
            for name, key in zip(encoder.result_columns(), keys, strict=True)
        }

    def _same_lists(self, name: str, actual: Any, expected: list[list[int]]) -> None:
        assert isinstance(actual, Ragged)
        ends = np.cumsum(actual.lengths)
        lists = [actual.values[end - length : end].tolist() for end, length in zip(ends, actual.lengths, strict=True)]
        assert lists == expected, self._says(name)
        self.compared += len(lists)

    def _close(self, actual: Any, expected: Any, what: str, tolerance: float) -> None:
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12 + tolerance, err_msg=self._says(what))
        self.compared += np.size(actual)

    def _says(self, what: str) -> str:
        seed = self.drawn.seed
        return f"{what} of log {seed}; again: compare({seed}, folder)"
