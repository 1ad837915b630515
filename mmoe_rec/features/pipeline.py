"""`FeaturePipeline`: fitted once on a log, then the same encoder in training, batch jobs and the model server.

State is plain data: `pipeline.json` and one Parquet file for each table that an encoder has learnt.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec.errors import UserError
from mmoe_rec.features.columns import column_uses
from mmoe_rec.features.counter import CounterEncoder
from mmoe_rec.features.encoded import Encoded, Ragged
from mmoe_rec.features.encoder import Encoder, Inputs, State
from mmoe_rec.features.history import HistoryEncoder
from mmoe_rec.features.ids import CrossEncoder, IdEncoder, IdsEncoder, VocabularyOwner
from mmoe_rec.features.layout import DenseInput, IdInput, Layout, Table, TaskOutput
from mmoe_rec.features.numbers import NumberHistogram
from mmoe_rec.features.numeric import NumericEncoder, TimeEncoder, VectorEncoder
from mmoe_rec.features.rows import LogRows
from mmoe_rec.schema import (
    CounterFeature,
    CrossFeature,
    HistoryFeature,
    IdFeature,
    IdsFeature,
    NumericFeature,
    Schema,
    TimeFeature,
    VectorFeature,
)

FORMAT = 4


EventStreams = Mapping[str, Callable[[], Iterable[LogRows]]]


class FeaturePipeline:
    """Encoders of all features, in the order of the settings."""

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self.owners = {
            name: VocabularyOwner(name, feature)
            for name, feature in schema.features.items()
            if isinstance(feature, IdFeature | IdsFeature) and feature.table is None
        }
        self.encoders = {name: self._encoder(name) for name in schema.features}
        # Column -> "int64" or "string", of the log's key columns: a request must give the same.
        self.key_types: dict[str, str] = {}
        # Regression task -> mean and deviation of its training labels.
        self.label_scales: dict[str, tuple[float, float]] = {}
        self._check_names()

    def _check_names(self) -> None:
        """Raises UserError where two features give inputs of the same name, or an input has the name of a column."""
        givers: dict[str, str] = {}
        uses = column_uses(self.schema)
        for name, encoder in self.encoders.items():
            outline = encoder.outline()
            computed = isinstance(encoder, HistoryEncoder | CounterEncoder)
            dense = [each.name for each in outline.dense]
            inputs = [each for each, _, _ in outline.ids] + dense + [f"{each}_missing" for each in dense]
            for each in inputs:
                if (other := givers.setdefault(each, name)) != name:
                    raise UserError(f"features '{other}' and '{name}' both give an input '{each}'; rename one of them")
                if computed and each in uses:
                    raise UserError(
                        f"feature '{name}' gives an input '{each}', which is also a column; rename the feature"
                    )

    def _encoder(self, name: str) -> Encoder:  # noqa: PLR0911 - one line a kind reads best
        feature = self.schema.features[name]
        match feature:
            case IdsFeature():
                return IdsEncoder(name, feature, self.owners[self.schema.table_of(name)])
            case IdFeature():
                return IdEncoder(name, feature, self.owners[self.schema.table_of(name)])
            case NumericFeature():
                return NumericEncoder(name, feature)
            case VectorFeature():
                return VectorEncoder(name, feature)
            case TimeFeature():
                return TimeEncoder(name, feature)
            case CrossFeature():
                return CrossEncoder(name, feature)
            case HistoryFeature():
                return HistoryEncoder(name, feature, self.schema.source_task(feature), self.owners[feature.of])
            case CounterFeature():
                return CounterEncoder(name, feature, self.schema.source_task(feature))

    @staticmethod
    def fit(
        schema: Schema,
        stream: Callable[[], Iterable[LogRows]],
        training: tuple[int | None, int],
        events: EventStreams | None = None,
    ) -> FeaturePipeline:
        """Fits all features to a log.

        Statistics (vocabularies, means, quantiles, overall rates) come from rows requested in `training`, [start, end)
        in microseconds. Counters and histories remember the whole log, and look only at what was known before a row.

        Args:
            stream: gives all rows of the log, each time it is called.
            events: name -> gives all rows of a further log of events.

        Raises:
            UserError: no row lies in the training time.
        """
        pipeline = FeaturePipeline(schema)
        encoders = pipeline.encoders.values()
        regressions = {name: task for name, task in schema.tasks.items() if task.kind == "regression"}
        labels = {name: NumberHistogram() for name in regressions}
        total = 0
        for rows in stream():
            pipeline._learn_types(rows)
            inside = rows.filter(in_window(rows.times(), training))
            total += len(inside)
            for name, task in regressions.items():
                labels[name].add(inside.labels(task, known_by=training[1]))
            for encoder in encoders:
                encoder.learn(inside, known_by=training[1])
            pipeline._remember(rows, None)
        if total == 0:
            raise UserError(
                "no row of the log lies in the training time; see `split.train_start` and `split.train_end`"
            )
        for name, histogram in labels.items():
            scale = histogram.standardiser()
            pipeline.label_scales[name] = (scale.mean, scale.deviation)
        for encoder in encoders:
            encoder.finish()
        pipeline._finish_memory(events or {})
        if any(isinstance(encoder, CounterEncoder) for encoder in encoders):
            for rows in stream():
                inside = rows.filter(in_window(rows.times(), training))
                for encoder in encoders:
                    encoder.learn_numbers(inside)
        for encoder in encoders:
            encoder.finish_numbers()
        return pipeline

    def remember(self, stream: Iterable[LogRows], events: EventStreams | None = None) -> None:
        """Replaces what counters and histories remember by other logs; vocabularies and statistics stay.

        So a trained model's features are computed for a log that it was not fitted to.
        """
        for rows in stream:
            self._remember(rows, None)
        self._finish_memory(events or {})

    def _learn_types(self, rows: LogRows) -> None:
        for field in rows.table.schema:
            if pa.types.is_int64(field.type) or pa.types.is_string(field.type):
                self.key_types[field.name] = str(field.type)

    def _remember(self, rows: LogRows, source: str | None) -> None:
        for encoder in self.encoders.values():
            if encoder.source == source:
                encoder.remember(rows)

    def _finish_memory(self, events: EventStreams) -> None:
        for source, stream in events.items():
            for rows in stream():
                self._remember(rows, source)
        for encoder in self.encoders.values():
            encoder.finish_memory()

    @cached_property
    def layout(self) -> Layout:
        """The inputs that `encode` gives and the tasks that the model predicts; asked for once all is fitted."""
        tables: list[Table] = []
        ids: list[IdInput] = []
        dense: list[DenseInput] = []
        for name, encoder in self.encoders.items():
            placement = self.schema.role_of(name) == "placement"
            outline = encoder.outline()
            tables += outline.tables
            ids += [IdInput(each, table, many, placement) for each, table, many in outline.ids]
            dense += [replace(each, placement=placement) for each in outline.dense]
        tasks = [
            TaskOutput(
                name, task.kind, task.objective, task.loss_weight, task.score_weight, *self.label_scales.get(name, ())
            )
            for name, task in self.schema.tasks.items()
        ]
        return Layout(tuple(tables), tuple(ids), tuple(dense), tuple(tasks))

    def encode(self, rows: LogRows) -> Encoded:
        """Encodes N rows; inputs as in `layout`. Placement columns may be absent, as they are in serving."""
        ids, dense = {}, {}
        for name, encoder in self.encoders.items():
            inputs = encoder.encode(rows) if self._has_columns(name, rows) else _absent(encoder, len(rows))
            ids.update(inputs.ids)
            dense.update(inputs.dense)
        layout = self.layout
        matrix = np.empty((len(rows), len(layout.dense)), np.float32)
        for index, each in enumerate(layout.dense):
            matrix[:, index] = dense[each.name]
        return Encoded({each.name: ids[each.name] for each in layout.ids}, matrix)

    def _has_columns(self, name: str, rows: LogRows) -> bool:
        if name not in self._placement:
            return True
        feature = self.schema.features[name]
        columns = feature.columns if isinstance(feature, CrossFeature) else (getattr(feature, "column", None),)
        return all(column is None or rows.has(column) for column in columns)

    @cached_property
    def _placement(self) -> frozenset[str]:
        return frozenset(name for name in self.encoders if self.schema.role_of(name) == "placement")

    def save(self, folder: Path, latest_at: int | None = None) -> None:
        """Writes the state into an existing folder; with `latest_at`, only what requests from then on can ask for."""
        values = {}
        for name, encoder in self.encoders.items():
            state = encoder.state() if latest_at is None else encoder.latest(latest_at)
            values[name] = {"values": state.values, "tables": sorted(state.tables)}
            for key, table in state.tables.items():
                pq.write_table(table, folder / f"{name}.{key}.parquet", compression="zstd")
        schema = self.schema.model_dump(mode="json")
        learnt = {"key_types": self.key_types, "label_scales": self.label_scales}
        text = {"format": FORMAT, "schema": schema, **learnt, "encoders": values}
        (folder / "pipeline.json").write_text(json.dumps(text, indent=1), encoding="utf-8")

    @staticmethod
    def load(folder: Path) -> FeaturePipeline:
        """Reads a saved state. Raises UserError for a folder that holds none, or one of another format."""
        try:
            text = json.loads((folder / "pipeline.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise UserError(f"'{folder}' holds no feature state (pipeline.json)") from None
        if text.get("format") != FORMAT:
            raise UserError(f"'{folder}' has feature state of format {text.get('format')}, this version reads {FORMAT}")
        pipeline = FeaturePipeline(Schema.model_validate(text["schema"]))
        pipeline.key_types = text["key_types"]
        pipeline.label_scales = {name: (mean, deviation) for name, (mean, deviation) in text["label_scales"].items()}
        for name, saved in text["encoders"].items():
            try:
                tables = {key: pq.read_table(folder / f"{name}.{key}.parquet") for key in saved["tables"]}
            except (OSError, pa.ArrowException) as error:
                reason = str(error).splitlines()[0]
                raise UserError(f"the feature state in '{folder}' is damaged, prepare it again: {reason}") from None
            pipeline.encoders[name].restore(State(saved["values"], tables))
        return pipeline


def in_window(times: np.ndarray, window: tuple[int | None, int | None]) -> np.ndarray:
    """(N,) bool: start <= time < end, either open."""
    start, end = window
    inside = np.ones(len(times), bool)
    if start is not None:
        inside &= times >= start
    if end is not None:
        inside &= times < end
    return inside


def _absent(encoder: Encoder, rows: int) -> Inputs:
    outline = encoder.outline()
    ids: Iterator[tuple[str, np.ndarray | Ragged]] = (
        (name, Ragged(np.empty(0, np.int64), np.zeros(rows, np.int32)) if many else np.zeros(rows, np.int64))
        for name, _, many in outline.ids
    )
    return Inputs(dict(ids), {each.name: np.zeros(rows, np.float32) for each in outline.dense})
