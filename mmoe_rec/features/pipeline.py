"""`FeaturePipeline`: fitted once on a log, then the same encoder in training, batch jobs and the model server.

State is plain data: `pipeline.json`, a Parquet file for each table that an encoder was fitted with, and a folder of
Parquet files for what each counter and history remembers.
"""

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
from mmoe_rec.features.encoder import Encoder, EncoderContext, Inputs, PointInTimeEncoder, State
from mmoe_rec.features.kinds import FEATURE_KINDS, parse_schema
from mmoe_rec.features.kinds.counter import MAX_LABEL_SUM
from mmoe_rec.features.layout import DenseInput, EncodedInputs, IdInput, Layout, TableSpec, TaskOutput
from mmoe_rec.features.numeric_statistics import NumberHistogram
from mmoe_rec.features.vocabulary import Vocabulary, VocabularyFeature
from mmoe_rec.log.columns import column_uses
from mmoe_rec.log.rows import LogRows, RequestRows
from mmoe_rec.point_in_time.arrays import Ragged
from mmoe_rec.point_in_time.join import EventStore, add_level
from mmoe_rec.settings.log_columns import NO_CANDIDATE, NO_USER
from mmoe_rec.settings.schema import Schema

FORMAT = 10


@dataclass(frozen=True)
class LiveUpdates:
    """Events that a pipeline has learnt since its memories were made, as levels beside the memories.

    It never changes. A further one is made beside it (`extended`) while requests are answered, and then takes its place
    at once (`FeaturePipeline.with_live`). Look-ups in memories and levels give, to the bit, what the memories would
    give if they had been extended by these events, at all times that are no earlier than the memories' `floor`.

    Attributes:
        encoders: `point_in_time_encoders` of a pipeline.
        rows: Number of rows learnt, of all logs.
        levels: Levels of each counter and history by name, the largest first.
    """

    encoders: Mapping[str, PointInTimeEncoder[Any]]
    rows: int = 0
    levels: Mapping[str, tuple[EventStore, ...]] = field(default_factory=dict)

    def extended(self, rows: Mapping[str | None, LogRows]) -> "LiveUpdates":
        """Return a copy that knows further rows of the interaction log (None) and of logs of events.

        Args:
            rows: Rows by log, with only the columns that counters and histories read of events.

        Raises:
            UserError: Ids have another type than those of the vocabulary, or sums of labels are out of range.
        """
        levels = dict(self.levels)
        for name, encoder in self.encoders.items():
            if encoder.source in rows and len(events := encoder.events(rows[encoder.source])):
                new = encoder.extended(encoder.empty(), events)
                try:
                    levels[name] = add_level(levels.get(name, ()), new, type(new).merged)
                except OverflowError:
                    what = f"counter '{name}' sums labels beyond {MAX_LABEL_SUM:.1e}"
                    raise UserError(f"{what}: send events in a larger unit") from None
        return replace(self, rows=self.rows + sum(map(len, rows.values())), levels=levels)

    def live_encoder(self, name: str) -> PointInTimeEncoder[Any]:
        """Return a counter or history that knows these events besides those in its memory."""
        encoder = copy(self.encoders[name])
        encoder.store = encoder.store.with_levels(self.levels.get(name, ()))
        return encoder


class FeaturePipeline:
    """Encoders of all features, in the order of the settings.

    Fitting goes through `partial_fit` over training rows, `finish_fit`, then for counters and histories through
    memories: their `partial_fit_results` over training rows, `finish_fit_results`. `mmoe_rec.preprocessing.prepare`
    does so for logs of any size.
    """

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self.vocabularies = {
            name: Vocabulary(name, feature)
            for name, feature in schema.features.items()
            if isinstance(feature, VocabularyFeature) and feature.table is None
        }
        shared = EncoderContext(schema, self.vocabularies)
        self.encoders: dict[str, Encoder] = {
            name: FEATURE_KINDS[feature.kind].encoder(name, feature, shared)
            for name, feature in schema.features.items()
        }
        roles = {name: schema.role_of(name) for name in self.encoders}
        self._of_requests = {name for name, role in roles.items() if role in ("user", "context")}
        self._placement = {name for name, role in roles.items() if role == "placement"}
        # Column -> "int64" or "string", of the log's key columns: a request must give the same.
        self.key_types: dict[str, str] = {}
        # Columns in which the logs hold true and false.
        self.booleans: set[str] = set()
        # Regression task -> mean and deviation of its training labels.
        self.label_scales: dict[str, tuple[float, float]] = {}
        self._labels = {name: NumberHistogram() for name, task in schema.tasks.items() if task.kind.is_linear}
        self.live = LiveUpdates(self.point_in_time_encoders)
        """What has been learnt besides the memories."""
        self._check_names()

    def _check_names(self) -> None:
        """Raises UserError where two features give inputs of the same name, or an input has the name of a column."""
        givers: dict[str, str] = {}
        uses = column_uses(self.schema)
        for name, encoder in self.encoders.items():
            input_spec = encoder.input_spec()
            dense = [each.name for each in input_spec.dense]
            inputs = [each for each, _, _ in input_spec.ids] + dense + [f"{each}_missing" for each in dense]
            for each in inputs:
                if (other := givers.setdefault(each, name)) != name:
                    raise UserError(f"features '{other}' and '{name}' both give an input '{each}'; rename one of them")
                if isinstance(encoder, PointInTimeEncoder) and each in uses:
                    raise UserError(
                        f"feature '{name}' gives an input '{each}', which is also a column; rename the feature"
                    )

    @cached_property
    def point_in_time_encoders(self) -> dict[str, PointInTimeEncoder[Any]]:
        """The counters and histories."""
        return {name: encoder for name, encoder in self.encoders.items() if isinstance(encoder, PointInTimeEncoder)}

    @property
    def key_groups(self) -> dict[str, list[PointInTimeEncoder[Any]]]:
        """The counters and histories that share a key, under the name of the first of them."""
        groups: dict[tuple[str, ...], list[PointInTimeEncoder[Any]]] = {}
        for encoder in self.point_in_time_encoders.values():
            groups.setdefault(encoder.key_columns, []).append(encoder)
        return {group[0].name: group for group in groups.values()}

    @property
    def counts(self) -> dict[str, Any]:
        """What the first pass counts, by `feature.NAME` and `label.TASK`: partial fits, which can be merged."""
        features = {f"feature.{name}": encoder.counts for name, encoder in self.encoders.items()}
        labels = {f"label.{name}": histogram for name, histogram in self._labels.items()}
        return {name: counts for name, counts in (features | labels).items() if counts is not None}

    def partial_fit(self, rows: LogRows, label_cutoff: int) -> None:
        """Counts training rows. Labels that become known later than `label_cutoff` (microseconds) don't count."""
        self.record_key_types(rows)
        for name, histogram in self._labels.items():
            histogram.add(rows.labels(self.schema.tasks[name], label_cutoff))
        for encoder in self.encoders.values():
            encoder.partial_fit(rows, label_cutoff)

    def record_key_types(self, rows: LogRows) -> None:
        """Notes whether key columns hold integers or strings."""
        for column in rows.table.schema:
            name, kind = column.name, column.type.value_type if pa.types.is_dictionary(column.type) else column.type
            if (pa.types.is_int64(kind) or pa.types.is_string(kind)) and name not in (NO_USER, NO_CANDIDATE):
                self.key_types[name] = str(kind)

    def column_types(self) -> dict[str, pa.DataType]:
        """The types of columns as the fitted log had them, where more is known than how they are read."""
        types = {name: pa.type_for_alias(kind) for name, kind in self.key_types.items()}
        for encoder in self.encoders.values():  # the log's own columns tell more than a vocabulary
            types |= encoder.column_types()
        return types

    def merge(self, counts: Mapping[str, Any], key_types: Mapping[str, str]) -> None:
        """Adds what another pipeline of the same schema counted and noted."""
        for name, mine in self.counts.items():
            mine.merge(counts[name])
        self.key_types |= key_types

    def finish_fit(self) -> None:
        """Makes vocabularies and statistics of what was counted."""
        for name, histogram in self._labels.items():
            fitted = histogram.standardizer()
            self.label_scales[name] = (fitted.mean, fitted.std)
        for encoder in self.encoders.values():
            encoder.finish_fit()

    def grow(self) -> dict[str, int]:
        """Adds ids that have become frequent to the vocabularies: feature -> number of new ids.

        Rows of known ids, statistics and the scales of labels stay: a trained model relies on them.
        """
        self.__dict__.pop("layout", None)
        return {name: vocabulary.grow() for name, vocabulary in self.vocabularies.items()}

    def finish_fit_results(self) -> None:
        """Makes statistics of the results that were counted."""
        for encoder in self.point_in_time_encoders.values():
            for number in encoder.numbers.values():
                number.finish_fit()

    @cached_property
    def layout(self) -> Layout:
        """The inputs that `encode` gives and the tasks that rows have labels of; asked for once all is fitted."""
        tables: list[TableSpec] = []
        ids: list[IdInput] = []
        dense: list[DenseInput] = []
        for name, encoder in self.encoders.items():
            placement = self.schema.role_of(name) == "placement"
            input_spec = encoder.input_spec()
            tables += input_spec.tables
            ids += [IdInput(each, table, is_list, placement, feature=name) for each, table, is_list in input_spec.ids]
            dense += [replace(each, placement=placement, feature=name) for each in input_spec.dense]
        tasks = []
        for name, task in self.schema.tasks.items():
            mean, std = self.label_scales.get(name, (0.0, 1.0))
            tasks.append(TaskOutput(name, task.kind, mean=mean, std=std, conditional_on=task.conditional_on))
        return Layout(tuple(tables), tuple(ids), tuple(dense), tuple(tasks))

    def inputs(self, rows: LogRows) -> Inputs:
        """Inputs of N rows, by name. Placement columns may be absent, as they are in serving."""
        all_inputs = Inputs()
        for encoder in self.encoders.values():
            all_inputs.add(self._encode(encoder, rows))
        return all_inputs.standardized()

    def request_inputs(self, rows: RequestRows) -> tuple[Inputs, Inputs]:
        """Inputs of R requests, of the features that describe user or context, and of N candidates, of the others.

        Columns of candidates stay as they are: what has none of them is the same for all candidates of a request.
        """
        shared, own = Inputs(), Inputs()
        for name, encoder in self.encoders.items():
            part, asked = (shared, rows.shared) if name in self._of_requests else (own, rows)
            part.add(self._encode(encoder, asked))
        return shared.standardized(), own.standardized()

    def _encode(self, encoder: Encoder, rows: LogRows) -> Inputs:
        if encoder.name not in self._placement or all(map(rows.has_column, encoder.feature.reads())):
            return encoder.encode(rows)
        input_spec = encoder.input_spec()
        one, none = np.zeros(len(rows), np.int64), np.empty(0, np.int64)
        ids = {name: Ragged(none, one.astype(np.int32)) if is_list else one for name, _, is_list in input_spec.ids}
        return Inputs(ids, {each.name: np.zeros(len(rows), np.float32) for each in input_spec.dense})

    def explain(self, rows: RequestRows) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """What counters, and histories, say of N candidates, see `PointInTimeEncoder.explain`: by result, (N,) each."""
        numbers: dict[str, np.ndarray] = {}
        lists: dict[str, np.ndarray] = {}
        for name, encoder in self.point_in_time_encoders.items():
            of_requests = name in self._of_requests
            for each, values in encoder.explain(rows.shared if of_requests else rows).items():
                part = lists if values.dtype == object else numbers
                part[each] = values[rows.request_index] if of_requests else values
        return numbers, lists

    def with_live(self, live: LiveUpdates) -> "FeaturePipeline":
        """A pipeline that answers everything by the memories together with `live`.

        This one, and passes that are under way with it, stay as they are.
        """
        pipeline = copy(self)
        pipeline.__dict__.pop("point_in_time_encoders", None)
        pipeline.live = live
        pipeline.encoders = self.encoders | {name: live.live_encoder(name) for name in self.point_in_time_encoders}
        return pipeline

    def encode(self, rows: LogRows) -> EncodedInputs:
        """Encodes N rows; inputs as in `layout`. Placement columns may be absent, as they are in serving."""
        inputs, layout = self.inputs(rows), self.layout
        matrix = np.empty((len(rows), len(layout.dense)), np.float32, order="F")
        for index, each in enumerate(layout.dense):
            matrix[:, index] = inputs.dense[each.name]
        return EncodedInputs({each.name: inputs.ids[each.name] for each in layout.ids}, matrix)

    def save(self, folder: Path) -> None:
        """Writes what was fitted into an existing folder; memories are written by `write_event_store`."""
        values = {}
        for name, encoder in self.encoders.items():
            state = encoder.state()
            values[name] = {"values": state.values, "tables": sorted(state.tables)}
            for key, table in state.tables.items():
                pq.write_table(table, folder / f"{name}.{key}.parquet", compression="zstd")
        schema = self.schema.model_dump(mode="json")
        fitted = {
            "key_types": self.key_types,
            "booleans": sorted(self.booleans),
            "label_scales": self.label_scales,
        }
        text = {"format": FORMAT, "schema": schema, **fitted, "encoders": values}
        (folder / "pipeline.json").write_text(json.dumps(text, indent=1), encoding="utf-8")

    @staticmethod
    def load(folder: Path, stores: bool = True) -> "FeaturePipeline":
        """Reads a saved state, with what counters and histories remember unless told otherwise.

        Raises UserError for a folder that holds none, or one that another version made.
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
            what = f"the feature state in '{folder}' is damaged"
            raise UserError(f"{what}, prepare it again: {first_line(error)}") from None
        return pipeline


def max_layout(schema: Schema) -> Layout:
    """The layout with every vocabulary at its `max_size`.

    Raises UserError naming the features whose vocabulary has no such bound.
    """
    pipeline = FeaturePipeline(schema)
    largest = {name: encoder.max_tables() for name, encoder in pipeline.encoders.items()}
    if unbounded := [name for name, tables in largest.items() if tables is None]:
        raise UserError(
            f"features are not built yet, and nothing bounds the number of ids of {', '.join(unbounded)}: give each a "
            "`max_size`, or run mmoe-rec features first"
        )
    return replace(pipeline.layout, tables=tuple(table for tables in largest.values() for table in tables or ()))


def write_event_store(store: EventStore, folder: Path, feature: str, part: int = 0) -> None:
    """Writes a memory, or part number `part` of it by key, into a folder of feature state."""
    metadata = None if store.compacted_at is None else {"floor": str(store.compacted_at)}
    columns = {name: pa.array(column) for name, column in store.to_columns().items()}
    # Columns declared to have no nulls are written faster; the statistics are for `read_event_store` by keys.
    schema = pa.schema([pa.field(name, column.type, nullable=False) for name, column in columns.items()], metadata)
    parts = folder / f"{feature}.memory"
    parts.mkdir(exist_ok=True)
    table, path = pa.table(list(columns.values()), schema=schema), parts / f"part-{part:05d}.parquet"
    pq.write_table(table, path, compression="lz4", use_dictionary=False, write_statistics=["key"])


def read_event_store(encoder: PointInTimeEncoder[Any], folder: Path, keys: pc.Expression | None = None) -> EventStore:
    """The memory of a feature that was written into a folder of state, or the events of some keys of it."""
    parts = sorted((folder / f"{encoder.name}.memory").glob("part-*.parquet"))
    if not parts:
        raise FileNotFoundError(f"there is nothing that feature '{encoder.name}' remembers")
    table = pa.concat_tables([pq.read_table(part, filters=keys, use_threads=False) for part in parts])
    compacted_at = (pq.read_schema(parts[0]).metadata or {}).get(b"floor")
    columns = {name: table[name].to_numpy() for name in table.column_names}
    return encoder.empty().with_columns(columns, None if compacted_at is None else int(compacted_at))
