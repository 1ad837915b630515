"""Score the rows of a log in batch, and write predictions, scores and ranks as Parquet.

    1. Score each part (consecutive rows) of the log, and put each row's request and score into a database.
    2. Compute each row's rank within its request in the database, because a request may have rows in several parts.
    3. Write the rows of each part with predictions, scores and ranks.

One thread scores a fixed number of rows at a time, so results don't depend on the settings `data.engine` and
`data.workers`. The output is written atomically:

    <output>/_manifest.json            the input, the model and the settings
    <output>/part-00000.parquet       the scored rows, in the input's order
"""

import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec.atomic import atomic_folder
from mmoe_rec.devices import limit_threads
from mmoe_rec.errors import UserError
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.inference.artifact import ResolvedModel, artifact_version, read_artifact, tables_as_of_us
from mmoe_rec.inference.ranking import ROW_NUMBER_COLUMN, prediction_columns, scored_table
from mmoe_rec.inference.scored_files import (
    FORMAT,
    check_output,
    describe_training_overlap,
    find_training_rows,
    has_split,
    is_complete,
    part_file_name,
    read_manifest,
    write_manifest,
)
from mmoe_rec.locks import write_lock
from mmoe_rec.log.checks import format_time, read_column_names
from mmoe_rec.log.columns import column_uses
from mmoe_rec.log.database import Database, open_database
from mmoe_rec.log.files import find_files, is_remote
from mmoe_rec.log.reader import LogPart, LogReader
from mmoe_rec.log.rows import FEATURE_BATCH_ROWS, LogRows, compute_labels
from mmoe_rec.point_in_time.join import Window, in_window
from mmoe_rec.preprocessing.build_inputs import BuildOptions, Logs, key_types
from mmoe_rec.preprocessing.build_steps import (
    MIN_ROWS_FOR_PROCESSES,
    BuildSteps,
    open_engine,
    open_reader,
    open_results,
)
from mmoe_rec.preprocessing.look_up import COMPARED_GROUP, ResultExchange, ResultReader
from mmoe_rec.preprocessing.prepare import compute_fingerprint
from mmoe_rec.progress import bar
from mmoe_rec.settings.load import load_settings, parse_overrides
from mmoe_rec.settings.log_columns import ColumnUse
from mmoe_rec.settings.schema import EventFeature, Schema
from mmoe_rec.settings.sections import Settings, Split, Tracking
from mmoe_rec.tracking.registry import resolve_model

if TYPE_CHECKING:
    from mmoe_rec.inference.ranker import Ranker

_REPORTED_KEYS = {"model", "model_version", "rows", "meaning", "seen_in_training"}
"""Keys of the manifest that the command `score` reports. If a manifest lacks one, rows are scored again."""
AsOf = Literal["log", "tables"]
"""Source of counters and histories: the log as of each request, or the model's own tables."""
ALL_TIMES: Window = (None, None)
# Replace these settings of the model, because they were chosen for the machines that trained it.
_LOCAL_OPTIONS = ("--data.engine", "local", "--data.workers", "null")


@dataclass(frozen=True)
class ScoredLog:
    """A folder of scores.

    Attributes:
        folder: Folder of scores.
        manifest: Contents of its manifest.
        reused: Whether the folder already had these scores, so nothing was scored.
    """

    folder: Path
    manifest: dict[str, Any]
    reused: bool = False


def score_log(
    model: str | Path,
    source: str | Path,
    output: str | Path,
    as_of: AsOf = "log",
    window: Window = ALL_TIMES,
    overrides: Sequence[str] = (),
    labels: bool = False,
    keep: Sequence[str] = (),
) -> ScoredLog:
    """Score each row of a log with a model, and write its keys, predictions, score and rank to a folder.

    If the folder already has these scores of the same input, model and settings, nothing is scored again.

    Args:
        model: URI of the model, see `resolve_model`.
        source: Log to score: a folder of Parquet files, a file or a glob.
        output: New or empty folder, or a folder of scores. Old scores are replaced when the new ones are complete.
        as_of: `log` computes each row's counters and histories from the log and the event logs before its request.
            `tables` takes them from the tables of the model.
        window: First request time to score and end (exclusive), in microseconds. Earlier rows only feed the features.
        overrides: Overrides of the settings that the model was trained with, such as `--data.workers 2`.
        labels: Whether to write the labels too. A label that isn't observed yet at the log's last request is null.
        keep: Further columns of the log to write, such as columns for slices of an evaluation.

    Raises:
        UserError: The input, the model or a setting is wrong, or a folder contains something else.
    """
    model, source, out = str(model), str(source), Path(output)
    parsed = list(parse_overrides(overrides))
    for key, _ in parsed:
        if key[0] != "data" and key not in (["serving", "matmul_backend"], ["tracking", "uri"]):
            raise UserError(
                f"--{'.'.join(key)} has no effect on scoring. Only section data, serving.matmul_backend and "
                "tracking.uri can be set. All other settings are from training."
            )
    uri = next((value for key, value in reversed(parsed) if key == ["tracking", "uri"]), None)
    start, end = window
    if start is not None and end is not None and start >= end:
        raise UserError(f"--start {format_time(start)} is not before --end {format_time(end)}. Change them.")
    if labels and as_of != "log":
        raise UserError(f"--labels needs --as-of log. Leave it out with --as-of {as_of}.")
    artifact = resolve_model(model, Tracking(uri=uri).resolved_uri)  # The model's own settings aren't loaded yet.
    read_artifact(artifact.folder)  # Raises UserError if the model is damaged.
    settings = load_settings(artifact.folder / "settings.yaml", [*_LOCAL_OPTIONS, *overrides])
    if is_remote(str(output)):
        raise UserError(f"--output '{output}' must be a local or mounted folder.")
    check_output(out, source)
    with write_lock(out, "a scoring", "give another folder with --output"):
        check_output(out, source)
        scoring = _Scoring(artifact, settings, source, as_of, window, labels, keep)
        manifest = read_manifest(out) or {}
        is_current = manifest.get("fingerprint") == scoring.fingerprint and manifest.keys() >= _REPORTED_KEYS
        if is_current and is_complete(out, manifest):
            return ScoredLog(out, manifest, reused=True)
        with atomic_folder(out) as folder:
            manifest = scoring.write(folder)
    return ScoredLog(out, manifest)


class _Scoring:
    """Arguments and steps of one call of `score_log`."""

    def __init__(
        self,
        model: ResolvedModel,
        settings: Settings,
        source: str,
        as_of: AsOf,
        window: Window,
        labels: bool,
        keep: Sequence[str],
    ) -> None:
        self.settings, self.source = settings, source
        self.as_of, self.window, self.labels, self.artifact = as_of, window, labels, model.folder
        self.extra_columns = tuple(keep)
        self.pipeline = FeaturePipeline.load(model.folder / "features", stores=False)
        self.has_time = self.pipeline.schema.columns.has_time
        if window != ALL_TIMES and not self.has_time:
            raise UserError("--start and --end need request times, but the model's table has none. Leave them out.")
        self.logs, self.missing_attributes = _open_logs(source, self.pipeline, settings, as_of, labels, keep)
        self.split = settings.split if labels and has_split(self.logs, settings.split) else None
        info = read_artifact(model.folder, verify=False)
        self.tables_as_of, self.tables_as_of_us = info.tables_as_of, tables_as_of_us(info)
        self.constants = {"model": model.uri, "model_version": artifact_version(model.folder)}
        build, self.matmul_backend = self.logs.options, settings.serving.matmul_backend
        options = [build.on_duplicates, build.on_conflicting_times, build.rows_in_memory]
        split = settings.split.model_dump(mode="json") if labels else None
        choices = [as_of, window, options, split, self.matmul_backend, self.extra_columns]
        self.fingerprint = compute_fingerprint(self.logs, [FORMAT, self.constants, self.tables_as_of, *choices])

    def write(self, folder: Path) -> dict[str, Any]:
        """Write the files of the output to a folder, and return the manifest."""
        options, scratch = self.logs.options, folder / "scratch"
        with BuildSteps(self.logs, {"scored": self.window}, scratch) as steps:
            facts = self._look_up_features(steps)
            with open_database(scratch / "database", options.memory_gib, options.workers) as database:
                database.create_table("rows", _RANK_KEYS, self._score_parts(steps, scratch, facts))
                filters = ("true", f"time <= {self.tables_as_of_us}", "seen_in_training")
                counts = database.row(f"SELECT {', '.join(f'count(*) FILTER ({sql})' for sql in filters)} FROM rows")
                facts |= zip(("rows", "early", "seen_in_training"), counts, strict=True)
                if not facts["rows"]:
                    raise self._no_rows()
                for log in self.logs.all:
                    log.check_unchanged()
                parts = write_ranked(database, scratch, folder, self.constants)
        manifest = self._manifest(parts, facts)
        write_manifest(folder, manifest)
        return manifest

    def _look_up_features(self, steps: BuildSteps) -> dict[str, Any]:
        """With `as_of` "log", look up counters and histories. Returns the log's `first` and `last` request time."""
        if self.as_of == "tables":
            steps.find_requests()
            steps.compare(self.pipeline, prepare=partial(_look_up_in_tables, self.artifact))
            return {"first": None}
        counted, stores = steps.count(statistics=False), steps.scratch / "compacted"
        if not counted.rows["scored"]:
            raise self._no_rows()
        stores.mkdir(parents=True)
        steps.look_up(self.pipeline, stores, end=counted.last + 1, training=None)
        return {"first": counted.first, "last": counted.last}

    def _no_rows(self) -> UserError:
        start, end = ("any time" if bound is None else format_time(bound) for bound in self.window)
        return UserError(f"no row of '{self.source}' was requested from {start} to {end}. Change --start and --end.")

    def _score_parts(self, steps: BuildSteps, scratch: Path, facts: Mapping[str, Any]) -> Iterator[pa.Table]:
        """Write the scored rows of each part of the log to a file, and yield the part's table of `_RANK_KEYS`."""
        options, total, tasks = self.logs.options, self.logs.log.rows, list(enumerate(steps.parts))
        processes = total >= MIN_ROWS_FOR_PROCESSES and not self.source.startswith("memory://")
        job = _ScoreJob(
            model=self.artifact,
            version=self.constants["model_version"],
            matmul_backend=self.matmul_backend,
            reader=open_reader(scratch, self.logs.log),
            results=open_results(scratch, self.logs.log),
            window=self.window,
            labels_as_of=facts["last"] if self.labels else None,
            extra_columns=self.extra_columns,
            split=self.split,
            folder=scratch,
        )
        # Matrix products may depend on the number of threads that compute them.
        with limit_threads(1), open_engine(options.engine, options.workers, processes) as engine, bar() as progress:
            task = progress.add_task("scoring", total=total)
            try:
                for (_, part), ranked in zip(tasks, engine.map(partial(_score_part, job), tasks), strict=True):
                    progress.advance(task, part.rows)
                    yield ranked
            finally:
                _load.cache_clear()  # Free the model's memory.

    def _manifest(self, parts: Mapping[str, int], facts: Mapping[str, Any]) -> dict[str, Any]:
        from mmoe_rec.model.matmul import choose_serving_backend

        return {
            "fingerprint": self.fingerprint,
            **self.constants,
            "tables_as_of": self.tables_as_of,
            "as_of": self.as_of,
            "matmul_backend": choose_serving_backend(self.matmul_backend),
            "meaning": self._describe_past(facts),
            "seen_in_training": self._describe_training_rows(facts["seen_in_training"], facts["rows"]),
            "input": self.source,
            "rows": facts["rows"],
            "rows_before_tables_as_of": facts["early"] if self.has_time else 0,
            "parts": dict(parts),
        }

    def _describe_past(self, facts: Mapping[str, Any]) -> str:
        """Return sentences about the data that counters and histories of the scored rows include, for the manifest."""
        if self.tables_as_of is None:
            return "the model was trained on a plain table, so its features depend only on the row itself"
        if self.as_of == "log":
            begin = format_time(facts["first"])
            return f"counters and histories include the given log from its first request at {begin} on"
        sentence = f"counters and histories are the model's own, as of {self.tables_as_of}"
        if facts["early"]:
            sentence += (
                f". {facts['early']:,} of {facts['rows']:,} rows were not requested later, so their features include "
                "their future. To judge a model by them, score with --as-of log"
            )
        if self.missing_attributes:
            names = ", ".join(map(repr, self.missing_attributes))
            sentence += f". The input has no column {names}, so the latest values of users and candidates are used"
        return sentence

    def _describe_training_rows(self, training_rows: int, num_rows: int) -> str | None:
        """Return a warning about rows that the model may have seen in training, as in `describe_training_overlap`."""
        if self.labels and self.split is None:
            return (
                f"was trained on some rows of the log, and the input lacks the split column "
                f"'{self.settings.split.column}'. Metrics are too optimistic if it contains these rows"
            )
        return describe_training_overlap(self.split, training_rows, num_rows)


@dataclass(frozen=True)
class _ScoreJob:
    """Arguments that are the same for all parts of a log."""

    model: Path
    version: str
    matmul_backend: str
    reader: LogReader
    results: ResultExchange  # Relative features of the rows, and counters and histories unless the model has them.
    window: Window
    labels_as_of: int | None  # Labels not final at this time (microseconds) are null. None: no labels.
    extra_columns: tuple[str, ...]
    split: Split | None  # Splits of the model, to find rows that it was trained on. None: skip this.
    folder: Path


_LOAD_LOCK = threading.Lock()


@lru_cache(maxsize=1)
def _load(folder: Path) -> "Ranker":
    from mmoe_rec.inference.ranker import Ranker

    return Ranker.load(folder)


def _look_up_in_tables(folder: Path, rows: LogRows) -> LogRows:
    """Add absent attributes, and the counters that relative features compare, from the tables of a model."""
    with _LOAD_LOCK:
        ranker = _load(folder)
    rows = ranker.reader.fill_attributes(rows)
    ranker.pipeline.numbers_to_compare(rows)
    return rows


_RANK_KEYS = pa.schema(
    {
        "part": pa.int32(),  # Number of the part of the log.
        "request": pa.uint64(),  # Hash of the request.
        "score": pa.float64(),  # Logarithm of the score.
        "number": pa.int64(),  # Number of the row in the log.
        "time": pa.int64(),  # Time of the request in microseconds.
        "seen_in_training": pa.bool_(),  # Whether the row was in the training or validation split of the model.
    }
)
"""Columns of the table `rows`, from which the database computes ranks, and counts for the manifest."""


def _score_part(job: _ScoreJob, task: tuple[int, LogPart]) -> pa.Table:
    """Score one part of a log, write its rows to a file, and return its `_RANK_KEYS`. `task` is (part number, part)."""
    import torch

    from mmoe_rec.model.matmul import choose_serving_backend

    number, part = task
    torch.set_num_threads(1)
    with _LOAD_LOCK:
        ranker = _load(job.model)
    if ranker.version != job.version:
        raise UserError(f"The model in '{job.model}' was replaced while rows were scored. Start the command again.")
    ranker.scorer.set_matmul_backend(choose_serving_backend(job.matmul_backend))
    results = ResultReader(job.results, [*ranker.pipeline.key_groups, COMPARED_GROUP])
    writer, ranked = None, [_RANK_KEYS.empty_table()]
    with pa.OSFile(str(_scored_file(job.folder, number)), "wb") as file:
        for rows in read_window(job.reader, results, job.window, part):
            values, log_scores = ranker.score(ranker.reader.fill_attributes(rows))
            table = scored_table(rows, values, log_scores, ranker.layout)
            if job.labels_as_of is not None:
                for name, values in compute_labels(rows, job.labels_as_of).items():
                    table = table.append_column(f"label_{name}", pa.array(values, from_pandas=True))
                if (weight := rows.schema.columns.weight) is not None:
                    table = table.append_column("weight", pa.array(rows.numbers(weight)))
            for name in job.extra_columns:
                if name not in table.column_names:
                    table = table.append_column(name, rows.column(name))
            writer = writer or pa.ipc.new_file(file, table.schema)
            writer.write_table(table)
            seen = np.zeros(len(rows), bool) if job.split is None else find_training_rows(job.split, rows)
            part_number = np.full(len(rows), number, np.int32)
            columns = [part_number, rows.request_hashes(), log_scores, rows.row_numbers, rows.times(), seen]
            ranked.append(pa.table(columns, schema=_RANK_KEYS))
        if writer is not None:
            writer.close()
    return pa.concat_tables(ranked)


def _scored_file(folder: Path, number: int) -> Path:
    return folder / f"{number}.arrow"


ROWS_PER_GROUP = 131_072


def write_ranked(database: Database, scored: Path, folder: Path, constants: Mapping[str, str]) -> dict[str, int]:
    """Rank the rows of all requests and write the files of the output.

    The best row of a request has rank 1. Equal scores keep the order of the rows.

    Args:
        database: Database with a table `rows` that has the columns of `_RANK_KEYS`.
        scored: Folder of the scored but unranked parts.
        folder: Folder that gets the files.
        constants: Columns to add -> their value, which is the same in all rows.

    Returns:
        Number of rows by file name.
    """
    database.run(
        "CREATE TABLE ranks AS SELECT part, number, "
        "row_number() OVER (PARTITION BY request ORDER BY score DESC, number)::INTEGER AS rank FROM rows"
    )
    written = {}
    with bar() as progress:
        parts = [part for (part,) in database.rows("SELECT DISTINCT part FROM ranks ORDER BY part")]
        for part in progress.track(parts, description="writing"):
            ranks = database.table(f"SELECT rank FROM ranks WHERE part = {part} ORDER BY number")
            with pa.memory_map(str(_scored_file(scored, part))) as file:
                table = pa.ipc.open_file(file).read_all().append_column("rank", ranks["rank"])
                for name, value in constants.items():
                    table = table.append_column(name, pa.repeat(value, len(table)))
                pq.write_table(table, folder / part_file_name(part), row_group_size=ROWS_PER_GROUP, compression="zstd")
            written[part_file_name(part)] = len(table)
    return written


def _open_logs(
    source: str, pipeline: FeaturePipeline, settings: Settings, as_of: AsOf, labels: bool, keep: Sequence[str]
) -> tuple[Logs, list[str]]:
    """Open the log to score and the event logs that its features need. Returns also the attributes that the log lacks.

    With `as_of` "tables", the log may lack attributes of users and candidates. The model's latest values replace them.
    """
    files = [set(read_column_names(file.uri)) for file in find_files(source, "--input")]
    schema, columns, missing = pipeline.schema, pipeline.schema.columns, list[str]()
    options = replace(BuildOptions.of(settings.data), skip_bad_files=False)
    if as_of == "tables":
        has_ids = {"user": columns.has_user, "candidate": columns.has_candidate}
        available = set(columns.names).union(*files)
        attributes = [name for name, role in schema.input_columns().items() if has_ids.get(role)]
        missing = [name for name in attributes if name not in available]
        options = replace(options, on_future_times="keep")  # Rows to score with tables may be future requests.
    read_schema = _read_schema(schema, settings, as_of, missing, labels)
    log_types, *event_types = key_types(pipeline, read_schema)
    more_uses: dict[str, ColumnUse] = {name: "any" for name in keep if name not in column_uses(read_schema)}
    split = settings.split.column
    if labels and split is not None and all(split in names for names in files):
        log_types = {name: kind for name, kind in log_types.items() if name != split}  # The split may have any type.
        more_uses[split] = "any"
    predicted = prediction_columns(pipeline.layout)
    added = {*predicted, *(column.replace("predicted", "label", 1) for column in predicted), "score", "rank"}
    added |= {"model", "model_version"} if columns.has_candidate else {"model", "model_version", ROW_NUMBER_COLUMN}
    if taken := next((name for name in (*schema.columns.names, *keep) if name in added), None):
        raise UserError(f"column '{taken}' of the log has the name of a column that scoring writes. Rename it.")
    return Logs(source, read_schema, options, [log_types, *event_types], more_uses), missing


def _read_schema(schema: Schema, settings: Settings, as_of: AsOf, missing: Collection[str], labels: bool) -> Schema:
    """Return the part of a model's schema that scoring reads.

    This leaves out placement (absent in serving), sampling rates, the split, and features of `missing` attributes. With
    `as_of` "log", labels and events stay if counters or histories need them. `labels` keeps all labels.
    """
    scored = [name for name in schema.features if schema.role_of(name) != "placement"]
    needed = {*scored, *(schema.features[name].table_owner for name in scored)}
    features = {
        name: feature
        for name, feature in schema.features.items()
        if name in needed and not feature.reads().keys() & set(missing)
    }
    tasks = set[str | None]()
    if as_of == "log":
        tasks.update(feature.task for feature in features.values() if isinstance(feature, EventFeature))
        tasks |= {task.conditional_on for name, task in schema.tasks.items() if name in tasks}
    if labels:
        tasks = set(schema.tasks)
    events = {name: settings.data.events.get(name, event_log) for name, event_log in schema.events.items()}
    weights = {"sampling_rate": None, "weight": schema.columns.weight if labels else None}
    return schema.model_copy(
        update={
            "features": features,
            "tasks": {name: task for name, task in schema.tasks.items() if name in tasks},
            "events": events if as_of == "log" else {},
            "columns": schema.columns.model_copy(update=weights),
            "split": None,
        }
    )


def read_window(reader: LogReader, results: ResultReader, window: Window, part: LogPart) -> Iterator[LogRows]:
    """Yield the rows of a part that are in the window, in batches.

    Args:
        reader: Reader of the log.
        results: Reader of the results of features that `BuildSteps` computed.
        window: First request time and end (exclusive) in microseconds, None for no bound.
        part: Part of the log.
    """
    for rows in reader.read(part):
        inside = rows.filter(in_window(rows.times(), window))
        if len(inside):
            inside = LogRows(inside.table, rows.schema, results.of(inside.row_numbers), inside.row_numbers)
            yield from inside.iter_batches(FEATURE_BATCH_ROWS)
