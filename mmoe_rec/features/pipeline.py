"""The feature pipeline, which is fitted once to a log and encodes rows in training, batch jobs and the model server."""

import json
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmoe_rec.errors import UserError, first_line
from mmoe_rec.features.encoder import Encoder, EncoderContext, Inputs, PointInTimeEncoder, State, StatisticsEncoder
from mmoe_rec.features.kinds import FEATURE_KINDS, parse_schema
from mmoe_rec.features.kinds.counter import MAX_LABEL_SUM
from mmoe_rec.features.kinds.relative import RelativeEncoder
from mmoe_rec.features.layout import DenseInput, EncodedInputs, IdInput, Layout, TableSpec, TaskOutput
from mmoe_rec.features.numeric_statistics import NumberHistogram
from mmoe_rec.features.vocabulary import Vocabulary, VocabularyFeature
from mmoe_rec.log.columns import column_uses, type_name
from mmoe_rec.log.rows import LogRows, RequestRows
from mmoe_rec.point_in_time.arrays import Ragged
from mmoe_rec.point_in_time.join import EventStore, add_level
from mmoe_rec.settings.log_columns import NO_CANDIDATE, NO_USER
from mmoe_rec.settings.schema import Schema

FORMAT = 11
_KEY_TYPES = {str(kind): kind for kind in (pa.int64(), pa.string())}
_KEY_TYPES |= {f"list<{name}>": pa.list_(kind) for name, kind in _KEY_TYPES.items()}


@dataclass(frozen=True)
class LiveUpdates:
    """Events that a server ingested after the event stores of a pipeline were built.

    This object never changes. Requests use it while `extended` builds the next object for
    `FeaturePipeline.with_live`. Features are bitwise equal to features from event stores that contain these events.

    Attributes:
        encoders: Counters and histories of the pipeline by name, with the event stores that were built.
        rows: Number of ingested rows of all logs.
        levels: Additional event stores of each counter and history by name, largest first.
    """

    encoders: Mapping[str, PointInTimeEncoder[Any]]
    rows: int = 0
    levels: Mapping[str, tuple[EventStore, ...]] = field(default_factory=dict)

    def extended(self, rows: Mapping[str | None, LogRows]) -> "LiveUpdates":
        """Return a copy with additional rows, by the name of their log. None stands for the interaction log.

        Raises:
            UserError: Ids have another type than the vocabulary, or sums of labels are out of range.
        """
        levels = dict(self.levels)
        for name, encoder in self.encoders.items():
            if encoder.source in rows and len(events := encoder.events(rows[encoder.source])):
                new = encoder.live_level(self.live_encoder(name).store, events)
                try:
                    levels[name] = add_level(levels.get(name, ()), new, type(new).merged)
                except OverflowError:
                    problem = f"Counter '{name}': a sum of labels exceeds {MAX_LABEL_SUM:.1e}"
                    raise UserError(f"{problem}. Send events in a larger unit.") from None
        return replace(self, rows=self.rows + sum(map(len, rows.values())), levels=levels)

    def live_encoder(self, name: str) -> PointInTimeEncoder[Any]:
        """Return a copy of the encoder of the counter or history `name`, with these events added to its event store."""
        encoder = copy(self.encoders[name])
        encoder.store = encoder.store.with_levels(self.levels.get(name, ()))
        return encoder


class FeaturePipeline:
    """Encoders of all features, in the order of the settings.

    `mmoe_rec.preprocessing.prepare` fits a pipeline in four steps. First, it calls `partial_fit` with training rows and
    then `finish_fit`. Second, it builds the event stores of counters and histories. Third, it calls the
    `partial_fit_results` of these encoders and of relative features with values for training rows. Last, it calls
    `finish_fit_results`.

    Attributes:
        key_types: Type of each column of ids or lists of ids in the log, a name in `_KEY_TYPES`. A request must have
            the same types.
        booleans: Columns whose values are true and false in the logs.
        label_scales: Mean and standard deviation of the training labels of each regression task.
        live: Events that were ingested after the event stores were built.
    """

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self.vocabularies = {
            name: Vocabulary(name, feature)
            for name, feature in schema.features.items()
            if isinstance(feature, VocabularyFeature) and feature.table is None
        }
        context = EncoderContext(schema, self.vocabularies)
        self.encoders: dict[str, Encoder] = {
            name: FEATURE_KINDS[feature.kind].encoder(name, feature, context)
            for name, feature in schema.features.items()
        }
        roles = {name: schema.role_of(name) for name in self.encoders}
        self._request_features = {name for name, role in roles.items() if role in ("user", "context")}
        self._placement_features = {name for name, role in roles.items() if role == "placement"}
        self.key_types: dict[str, str] = {}
        self.booleans: set[str] = set()
        self.label_scales: dict[str, tuple[float, float]] = {}
        self._label_histograms = {name: NumberHistogram() for name, task in schema.tasks.items() if task.kind.is_linear}
        self.live = LiveUpdates(self.point_in_time_encoders)
        self._check_names()

    def _check_names(self) -> None:
        """Raise UserError if two features write inputs of the same name.

        An input of a counter or history must also differ from all columns of the log, because a request may send it.
        """
        owners: dict[str, str] = {}
        uses = column_uses(self.schema)
        for name, encoder in self.encoders.items():
            input_spec = encoder.input_spec()
            dense = [number.name for number in input_spec.dense]
            inputs = [key for key, _, _ in input_spec.ids] + dense + [f"{number}_missing" for number in dense]
            for key in inputs:
                if (owner := owners.setdefault(key, name)) != name:
                    raise UserError(f"Features '{owner}' and '{name}' both have an input '{key}'. Rename a feature.")
                if isinstance(encoder, PointInTimeEncoder) and key in uses:
                    raise UserError(f"Feature '{name}': its input '{key}' is also a column. Rename the feature.")

    @cached_property
    def point_in_time_encoders(self) -> dict[str, PointInTimeEncoder[Any]]:
        """Features of earlier events by name, such as counters and histories."""
        return {name: encoder for name, encoder in self.encoders.items() if isinstance(encoder, PointInTimeEncoder)}

    @property
    def relative_encoders(self) -> list[RelativeEncoder]:
        """Features of kind `relative`, which compare the candidates of a request."""
        return [encoder for encoder in self.encoders.values() if isinstance(encoder, RelativeEncoder)]

    @property
    def key_groups(self) -> dict[str, list[PointInTimeEncoder[Any]]]:
        """Counters and histories in groups with the same key, by the name of each group's first feature."""
        groups: dict[Any, list[PointInTimeEncoder[Any]]] = {}
        for encoder in self.point_in_time_encoders.values():
            groups.setdefault((encoder.key_columns, encoder.needs_all_keys), []).append(encoder)
        return {group[0].name: group for group in groups.values()}

    @property
    def counts(self) -> dict[str, Any]:
        """Statistics that `partial_fit` collects and workers merge, named `feature.NAME` and `label.TASK`."""
        encoders, labels = self.encoders.items(), self._label_histograms.items()
        features = {f"feature.{name}{end}": part for name, encoder in encoders for end, part in encoder.counts.items()}
        return features | {f"label.{name}": histogram for name, histogram in labels}

    def partial_fit(self, rows: LogRows, label_cutoff: int) -> None:
        """Add training rows to `counts`.

        Args:
            rows: Training rows.
            label_cutoff: Time in microseconds. Labels that become available later don't count.
        """
        self.record_key_types(rows)
        for name, histogram in self._label_histograms.items():
            histogram.add(rows.labels(self.schema.tasks[name], label_cutoff))
        for encoder in self.encoders.values():
            encoder.partial_fit(rows, label_cutoff)

    def record_key_types(self, rows: LogRows) -> None:
        """Record whether the key columns of `rows`, or their lists, contain integers or strings."""
        for column in rows.table.schema:
            kind = type_name(column.type)
            if kind in _KEY_TYPES and column.name not in (NO_USER, NO_CANDIDATE):
                self.key_types[column.name] = kind

    def column_types(self) -> dict[str, pa.DataType]:
        """Return column -> Arrow type in the log, for columns whose use allows several types, such as ids."""
        return {name: _KEY_TYPES[kind] for name, kind in self.key_types.items()}

    def merge(self, counts: Mapping[str, Any], key_types: Mapping[str, str]) -> None:
        """Add the `counts` of another pipeline with the same schema.

        Args:
            counts: `counts` of the other pipeline.
            key_types: `key_types` of the other pipeline.
        """
        for name, own_counts in self.counts.items():
            own_counts.merge(counts[name])
        self.key_types |= key_types

    def finish_fit(self) -> None:
        """Compute vocabularies, means and standard deviations from `counts`."""
        for name, histogram in self._label_histograms.items():
            standardizer = histogram.standardizer()
            self.label_scales[name] = (standardizer.mean, standardizer.std)
        for encoder in self.encoders.values():
            encoder.finish_fit()

    def grow(self) -> dict[str, int]:
        """Add ids that have become frequent to the vocabularies. Return feature -> number of new ids.

        Table rows of existing ids, statistics and label scales stay the same, because a trained model relies on them.
        """
        self.__dict__.pop("layout", None)
        return {name: vocabulary.grow() for name, vocabulary in self.vocabularies.items()}

    def finish_fit_results(self) -> None:
        """Compute the mean and standard deviation of each statistic of a counter and of each relative feature."""
        for encoder in self.encoders.values():
            if isinstance(encoder, StatisticsEncoder):
                encoder.finish_fit_results()

    @cached_property
    def layout(self) -> Layout:
        """Inputs that `encode` writes, and all tasks. Read the layout only after fitting, because it is cached."""
        tables: list[TableSpec] = []
        ids: list[IdInput] = []
        dense: list[DenseInput] = []
        for name, encoder in self.encoders.items():
            placement = self.schema.role_of(name) == "placement"
            input_spec = encoder.input_spec()
            tables += input_spec.tables
            ids += [IdInput(key, table, is_list, placement, feature=name) for key, table, is_list in input_spec.ids]
            dense += [replace(number, placement=placement, feature=name) for number in input_spec.dense]
        tasks = []
        for name, task in self.schema.tasks.items():
            mean, std = self.label_scales.get(name, (0.0, 1.0))
            tasks.append(TaskOutput(name, task.kind, mean=mean, std=std, conditional_on=task.conditional_on))
        return Layout(tuple(tables), tuple(ids), tuple(dense), tuple(tasks))

    def inputs(self, rows: LogRows) -> Inputs:
        """Return the inputs of N rows by name. Columns of `roles.placement` may be absent, as in serving."""
        # Encoders add results to rows. Keep them out of the caller's rows, because later events can change them.
        all_inputs, rows = Inputs(), rows.with_own_results()
        for encoder in self._in_order:
            all_inputs.add(self._encode(encoder, rows))
        return all_inputs.standardized()

    @property
    def _in_order(self) -> list[Encoder]:
        """All encoders. Relative features come last, because they read the results of counters."""
        return sorted(self.encoders.values(), key=lambda encoder: isinstance(encoder, RelativeEncoder))

    def numbers_to_compare(self, rows: LogRows) -> dict[str, np.ndarray]:
        """Return the numbers that relative features compare, each (N,) float64, by column or output of a counter.

        The results of the counters are added to `rows.results`.
        """
        encoders = self.relative_encoders
        counters = {counter for encoder in encoders for counter in encoder.feature.counters}
        for counter in self.point_in_time_encoders.values():
            if counters & counter.numbers.keys():
                counter.encode(rows)
        return {name: values for encoder in encoders for name, values in encoder.numbers_to_compare(rows).items()}

    def compare_candidates(self, rows: LogRows) -> LogRows:
        """Return rows with the values of relative features in `results`. `rows` must have all rows of each request."""
        encoders = [encoder for encoder in self.relative_encoders if not rows.results.keys() >= encoder.numbers.keys()]
        if encoders:
            rows = rows.with_own_results()
            numbers, requests = self.numbers_to_compare(rows), rows.request_codes()
            for encoder in encoders:
                rows.results |= encoder.compare(numbers, requests)
        return rows

    def request_inputs(self, rows: RequestRows) -> tuple[Inputs, Inputs]:
        """Return the inputs of R requests (features of user and context) and of N candidates (other features)."""
        of_requests, of_candidates = Inputs(), Inputs()
        for encoder in self._in_order:
            in_request = encoder.name in self._request_features
            inputs, source = (of_requests, rows.shared) if in_request else (of_candidates, rows)
            inputs.add(self._encode(encoder, source))
        return of_requests.standardized(), of_candidates.standardized()

    def _encode(self, encoder: Encoder, rows: LogRows) -> Inputs:
        if encoder.name not in self._placement_features or all(map(rows.has_column, encoder.feature.reads())):
            return encoder.encode(rows)
        input_spec = encoder.input_spec()
        missing, no_ids = np.zeros(len(rows), np.int64), np.empty(0, np.int64)
        ids = {
            name: Ragged(no_ids, missing.astype(np.int32)) if is_list else missing
            for name, _, is_list in input_spec.ids
        }
        return Inputs(ids, {number.name: np.zeros(len(rows), np.float32) for number in input_spec.dense})

    def explain(self, rows: RequestRows) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Return (N,) float64 statistics of counters and (N,) lists of histories for N candidates, both by name.

        Statistics are not standardized, and lists have ids of the log (see `PointInTimeEncoder.explain`).
        """
        numbers: dict[str, np.ndarray] = {}
        lists: dict[str, np.ndarray] = {}
        for name, encoder in self.point_in_time_encoders.items():
            in_request = name in self._request_features
            for result, values in encoder.explain(rows.shared if in_request else rows).items():
                results = lists if values.dtype == object else numbers
                results[result] = values[rows.request_index] if in_request else values
        return numbers, lists

    def with_live(self, live: LiveUpdates) -> "FeaturePipeline":
        """Return a copy whose counters and histories also see the events in `live`."""
        pipeline = copy(self)
        pipeline.__dict__.pop("point_in_time_encoders", None)
        pipeline.live = live
        pipeline.encoders = self.encoders | {name: live.live_encoder(name) for name in self.point_in_time_encoders}
        return pipeline

    def encode(self, rows: LogRows) -> EncodedInputs:
        """Encode N rows, with the inputs of each row in the order of `layout`.

        Columns of `roles.placement` (where a candidate was shown) may be absent, as in serving.
        """
        inputs, layout = self.inputs(rows), self.layout
        matrix = np.empty((len(rows), len(layout.dense)), np.float32, order="F")
        for index, number in enumerate(layout.dense):
            matrix[:, index] = inputs.dense[number.name]
        return EncodedInputs({key.name: inputs.ids[key.name] for key in layout.ids}, matrix)

    def save(self, folder: Path) -> None:
        """Write the fitted state to an existing folder, without event stores (see `write_event_store`)."""
        values = {}
        for name, encoder in self.encoders.items():
            state = encoder.state()
            values[name] = {"values": state.values, "tables": sorted(state.tables)}
            for key, table in state.tables.items():
                pq.write_table(table, folder / f"{name}.{key}.parquet", compression="zstd")
        text = {"format": FORMAT, "schema": self.schema.model_dump(mode="json"), "key_types": self.key_types}
        text |= {"booleans": sorted(self.booleans), "label_scales": self.label_scales, "encoders": values}
        (folder / "pipeline.json").write_text(json.dumps(text, indent=1), encoding="utf-8")

    @staticmethod
    def load(folder: Path, stores: bool = True) -> "FeaturePipeline":
        """Read a saved pipeline.

        Args:
            folder: Folder that `save` wrote.
            stores: Whether to read the event stores of counters and histories.

        Raises:
            UserError: The folder has no state, damaged state, or state of another version.
        """
        try:
            text = json.loads((folder / "pipeline.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise UserError(f"'{folder}' holds no feature state (pipeline.json)") from None
        if text.get("format") != FORMAT:
            raise UserError(f"The features in '{folder}' were made by another version of mmoe_rec. Build them again.")
        pipeline = FeaturePipeline(parse_schema(text["schema"]))
        pipeline.key_types, pipeline.booleans = text["key_types"], set(text["booleans"])
        pipeline.label_scales = {name: (mean, std) for name, (mean, std) in text["label_scales"].items()}
        try:
            for name, saved in text["encoders"].items():
                tables = {key: pq.read_table(folder / f"{name}.{key}.parquet") for key in saved["tables"]}
                pipeline.encoders[name].restore(State(saved["values"], tables))
            if stores:
                for encoder in pipeline.point_in_time_encoders.values():
                    encoder.store = read_event_store(encoder, folder)
        except (OSError, pa.ArrowException) as error:
            problem = f"The feature state in '{folder}' is damaged ({first_line(error)})"
            raise UserError(f"{problem}. Run mmoe-rec features again.") from None
        return pipeline


def max_layout(schema: Schema) -> Layout:
    """Return the layout of `schema` before fitting, with each embedding table at its largest possible size.

    Raises:
        UserError: A vocabulary has no `max_size`.
    """
    pipeline = FeaturePipeline(schema)
    largest = {name: encoder.max_tables() for name, encoder in pipeline.encoders.items()}
    if unbounded := [name for name, tables in largest.items() if tables is None]:
        raise UserError(
            f"The features are not built yet, and {', '.join(unbounded)} can have any number of ids. "
            "Set `max_size`, or run mmoe-rec features first."
        )
    return replace(pipeline.layout, tables=tuple(table for tables in largest.values() for table in tables or ()))


def write_event_store(store: EventStore, folder: Path, feature: str, part: int = 0) -> None:
    """Write an event store, or a part with some of its keys, to a folder of feature state.

    Args:
        store: Store to write.
        folder: Folder of the feature state.
        feature: Name of the feature.
        part: Index of the part, which names the file.
    """
    metadata = None if store.compacted_at is None else {"floor": str(store.compacted_at)}
    columns = {name: pa.array(column) for name, column in store.to_columns().items()}
    # Non-nullable columns are written faster. `read_event_store` uses Parquet's statistics to filter by key.
    schema = pa.schema([pa.field(name, column.type, nullable=False) for name, column in columns.items()], metadata)
    parts = folder / f"{feature}.memory"
    parts.mkdir(exist_ok=True)
    table, path = pa.table(list(columns.values()), schema=schema), parts / f"part-{part:05d}.parquet"
    pq.write_table(table, path, compression="lz4", use_dictionary=False, write_statistics=["key"])


def read_event_store(encoder: PointInTimeEncoder[Any], folder: Path, keys: pc.Expression | None = None) -> EventStore:
    """Read the event store of a feature from a folder of feature state.

    Args:
        encoder: Encoder of the feature.
        folder: Folder of the feature state.
        keys: Filter on the column `key`. None reads all keys.
    """
    parts = sorted((folder / f"{encoder.name}.memory").glob("part-*.parquet"))
    if not parts:
        raise FileNotFoundError(f"There is no event store of feature '{encoder.name}'.")
    table = pa.concat_tables([pq.read_table(part, filters=keys, use_threads=False) for part in parts])
    compacted_at = (pq.read_schema(parts[0]).metadata or {}).get(b"floor")
    columns = {name: table[name].to_numpy() for name in table.column_names}
    return encoder.empty().with_columns(columns, None if compacted_at is None else int(compacted_at))
