"""Predictions, scores and ranks of a log's rows, as Parquet.

    parts of the log -> their rows with predictions and scores, and the keys that rank them
    all keys         -> rank within the request, in a database
    parts            -> their rows with the ranks

A process loads the model once, for all its tasks and threads. Rows are scored a fixed number at a time, by one thread
each, so that no bit depends on the engine or the number of workers. The output appears whole:

    <output>/_manifest.json            what was scored by which model
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
from mmoe_rec.features.encoder import LookupResults
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
from mmoe_rec.preprocessing.look_up import ResultExchange, ResultReader
from mmoe_rec.preprocessing.prepare import compute_fingerprint
from mmoe_rec.progress import bar
from mmoe_rec.settings.load import load_settings, parse_overrides
from mmoe_rec.settings.log_columns import ColumnUse
from mmoe_rec.settings.schema import EventFeature, Schema
from mmoe_rec.settings.sections import Settings, Split, Tracking
from mmoe_rec.tracking.registry import resolve_model

if TYPE_CHECKING:
    from mmoe_rec.inference.ranker import Ranker

AsOf = Literal["log", "tables"]
"""Where counters and histories come from: the log, as of each request, or what the model itself remembers."""
ALL_TIMES: Window = (None, None)
_HERE = ("--data.engine", "local", "--data.workers", "null")  # not those of the machines that trained the model


@dataclass(frozen=True)
class ScoredLog:
    """Scores in a folder: what its manifest says of them, and whether they were there before."""

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
    """Score each row of a log with a model, and write keys, predictions, score and rank to a folder.

    If the folder already has these scores of the same input, model and settings, nothing is scored again.

    Args:
        model: An address as `resolve_model` takes it.
        source: A folder of Parquet files, one file or a glob.
        output: A folder, new or empty, or with scores that are replaced once the new ones are whole.
        as_of: `log` gives each row what the log, and the logs of events, knew before its request; `tables` what the
            model itself remembers.
        window: Request times to score, microseconds; other rows of the log are only its past.
        overrides: Overrides of the settings that the model was trained with, such as `--data.workers 2`.
        labels: Whether to write the labels too, as they are known at the log's last request.
        keep: Further columns of the log to write, such as columns to slice by.

    Raises:
        UserError: The input, the model or a setting is wrong, or a folder holds something else.
    """
    model, source, out = str(model), str(source), Path(output)
    given = list(parse_overrides(overrides))
    for key, _ in given:
        if key[0] != "data" and key not in (["serving", "matmul_backend"], ["tracking", "uri"]):
            raise UserError(
                f"--{'.'.join(key)} changes nothing here: scoring takes settings of section data, "
                "serving.matmul_backend "
                "and tracking.uri; all others are those that the model was trained with"
            )
    uri = next((value for key, value in reversed(given) if key == ["tracking", "uri"]), None)
    start, end = window
    if start is not None and end is not None and start >= end:
        raise UserError(f"--start {format_time(start)} is not before --end {format_time(end)}: no request lies between")
    if labels and as_of != "log":
        raise UserError(f"--labels writes what the log says of its rows; leave it out with --as-of {as_of}")
    artifact = resolve_model(model, Tracking(uri=uri).resolved_uri)  # before the model's own settings are known
    read_artifact(artifact.folder)  # which says what is wrong with a damaged one
    settings = load_settings(artifact.folder / "settings.yaml", [*_HERE, *overrides])
    if is_remote(str(output)):
        raise UserError(f"--output '{output}' must be a folder of this machine, or one mounted like one")
    check_output(out, source)
    with write_lock(out, "a scoring", "give another folder with --output"):
        check_output(out, source)
        scoring = _Scoring(artifact, settings, source, as_of, window, labels, keep)
        reused = read_manifest(out)
        if reused is not None and reused["fingerprint"] == scoring.fingerprint and is_complete(out, reused):
            return ScoredLog(out, reused, reused=True)
        with atomic_folder(out) as folder:
            manifest = scoring.write(folder)
    return ScoredLog(out, manifest)


class _Scoring:
    """One run of the command."""

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
            raise UserError("--start and --end need times, which the model's table does not have: leave them out")
        self.logs, self.lacking = open_logs(source, self.pipeline, settings, as_of, labels, keep)
        self.split = settings.split if labels and has_split(self.logs, settings.split) else None
        self.tables_as_of = (info := read_artifact(model.folder, verify=False)).tables_as_of
        self.known = tables_as_of_us(info)
        self.constants = {"model": model.uri, "model_version": artifact_version(model.folder)}
        built = self.logs.options
        options = [built.on_duplicates, built.on_conflicting_times, built.rows_in_memory]
        split = settings.split.model_dump(mode="json") if labels else None
        self.matmul_backend = settings.serving.matmul_backend
        how = [options, split, self.matmul_backend, self.extra_columns]
        self.fingerprint = compute_fingerprint(
            self.logs, [FORMAT, self.constants, self.tables_as_of, as_of, window, *how]
        )

    def write(self, folder: Path) -> dict[str, Any]:
        """Write the files of the output to a folder, and return the manifest."""
        options, scratch = self.logs.options, folder / "scratch"
        with BuildSteps(self.logs, {"scored": self.window}, scratch) as steps:
            facts = self._look_up(steps)
            with open_database(scratch / "database", options.memory_gib, options.workers) as database:
                database.create_table("rows", _RANKED, self._score_parts(steps, scratch, facts))
                facts["rows"], facts["early"], facts["learnt"] = database.row(
                    f"SELECT count(*), count(*) FILTER (time <= {self.known}), count(*) FILTER (learnt) FROM rows"
                )
                if not facts["rows"]:
                    raise self._no_rows()
                for log in self.logs.all:
                    log.check_unchanged()
                parts = write_ranked(database, scratch, folder, self.constants)
        manifest = self._manifest(parts, facts)
        write_manifest(folder, manifest)
        return manifest

    def _look_up(self, steps: BuildSteps) -> dict[str, Any]:
        """Look up what counters and histories know of the rows, and return facts for the manifest."""
        facts: dict[str, Any] = {"first": None}
        if self.as_of == "tables":
            steps.find_requests()
        else:
            counted, stores = steps.count(statistics=False), steps.scratch / "compacted"
            if not counted.rows["scored"]:
                raise self._no_rows()
            stores.mkdir(parents=True)
            steps.look_up(self.pipeline, stores, end=counted.last + 1, training=None)
            facts |= {"first": counted.first, "last": counted.last}
        return facts

    def _no_rows(self) -> UserError:
        start, end = ("any time" if each is None else format_time(each) for each in self.window)
        return UserError(f"no row of '{self.source}' was requested from {start} to {end}; change --start and --end")

    def _score_parts(self, steps: BuildSteps, scratch: Path, facts: Mapping[str, Any]) -> Iterator[pa.Table]:
        """Score the parts of the log into files, and yield the keys that rank their rows, see `_RANKED`."""
        options, total, tasks = self.logs.options, self.logs.log.rows, list(enumerate(steps.parts))
        processes = total >= MIN_ROWS_FOR_PROCESSES and not self.source.startswith("memory://")
        job = ScoreJob(
            model=self.artifact,
            version=self.constants["model_version"],
            matmul_backend=self.matmul_backend,
            reader=open_reader(scratch, self.logs.log),
            results=open_results(scratch, self.logs.log) if self.as_of == "log" else None,
            window=self.window,
            labels_as_of=facts["last"] if self.labels else None,
            extra_columns=self.extra_columns,
            split=self.split,
            folder=scratch,
        )
        # What a product gives may depend on the number of threads that share it.
        with limit_threads(1), open_engine(options.engine, options.workers, processes) as engine, bar() as progress:
            task = progress.add_task("scoring", total=total)
            try:
                for (_, part), ranked in zip(tasks, engine.map(partial(score_part, job), tasks), strict=True):
                    progress.advance(task, part.rows)
                    yield ranked
            finally:
                _load.cache_clear()  # which frees the memory of the model

    def _manifest(self, parts: Mapping[str, int], facts: Mapping[str, Any]) -> dict[str, Any]:
        from mmoe_rec.model.matmul import choose_serving_backend

        return {
            "fingerprint": self.fingerprint,
            **self.constants,
            "tables_as_of": self.tables_as_of,
            "as_of": self.as_of,
            "matmul_backend": choose_serving_backend(self.matmul_backend),
            "meaning": self._describe_past(facts),
            "learnt": self._describe_learnt(facts["learnt"], facts["rows"]),
            "input": self.source,
            "rows": facts["rows"],
            "rows_before_tables_as_of": facts["early"] if self.has_time else 0,
            "parts": dict(parts),
        }

    def _describe_past(self, facts: Mapping[str, Any]) -> str:
        """What the features of all scored rows knew."""
        if self.tables_as_of is None:
            return "the model was trained on a plain table: its features know nothing but the row itself"
        if self.as_of == "log":
            begin = format_time(facts["first"])
            return f"counters and histories know the log that was given, from its first request at {begin} on"
        sentence = f"counters and histories know what the model knew at {self.tables_as_of}"
        if facts["early"]:
            sentence += (
                f"; {facts['early']:,} of {facts['rows']:,} rows were not requested later, so their features know "
                "their future: to judge a model by them, score with --as-of log"
            )
        if self.lacking:
            names = ", ".join(map(repr, self.lacking))
            sentence += f"; the input has no column {names}: of each user and candidate the latest value is taken"
        return sentence

    def _describe_learnt(self, learnt: int, rows: int) -> str | None:
        """Return the sentence about rows that the model has learnt from, after the model's name, if there may be."""
        if self.labels and self.split is None:
            return (
                f"was trained on some of the rows that column '{self.settings.split.column}' splits, which the input "
                "lacks: metrics of such rows flatter it, and it can't be told whether there are any"
            )
        return describe_training_overlap(self.split, learnt, rows)


@dataclass(frozen=True)
class ScoreJob:
    """Arguments that all tasks of a scoring share.

    Attributes:
        model: Artifact folder.
        version: Checksum of the artifact.
        matmul_backend: Value of `serving.matmul_backend`.
        reader: Reads the log.
        results: Values of counters and histories for the rows, None if the model's own tables are asked.
        window: Request times to score, microseconds.
        labels_as_of: Time as of which labels are written, microseconds, None for no labels.
        kept: Further columns of the log to write.
        split: Tells which rows the model has learned from, None if nobody asks.
        folder: Folder that gets a file for each part.
    """

    model: Path
    version: str
    matmul_backend: str
    reader: LogReader
    results: ResultExchange | None
    window: Window
    labels_as_of: int | None
    extra_columns: tuple[str, ...]
    split: Split | None
    folder: Path


_LOADING = threading.Lock()


@lru_cache(maxsize=1)
def _load(folder: Path) -> "Ranker":
    from mmoe_rec.inference.ranker import Ranker

    return Ranker.load(folder)


_RANKED = pa.schema(
    {
        "part": pa.int32(),
        "request": pa.uint64(),
        "score": pa.float64(),
        "number": pa.int64(),
        "time": pa.int64(),
        "learnt": pa.bool_(),
    }
)
"""Of a scored row the number of its part, the hash of its request, its log score, its number in the log, the time of
its request in microseconds, and whether the model has learnt from it."""


def score_part(job: ScoreJob, task: tuple[int, LogPart]) -> pa.Table:
    """Score part number `task[0]` of a log into a file, and return the keys that rank its rows, see `_RANKED`."""
    import torch

    from mmoe_rec.model.matmul import choose_serving_backend

    number, part = task
    torch.set_num_threads(1)
    with _LOADING:
        ranker = _load(job.model)
    if ranker.version != job.version:
        raise UserError(f"the model in '{job.model}' was replaced while rows were scored: start the command again")
    ranker.scorer.set_matmul_backend(choose_serving_backend(job.matmul_backend))
    results = None if job.results is None else ResultReader(job.results, list(ranker.pipeline.key_groups))
    writer, ranked = None, [_RANKED.empty_table()]
    with pa.OSFile(str(scored_file(job.folder, number)), "wb") as file:
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
            learnt = np.zeros(len(rows), bool) if job.split is None else find_training_rows(job.split, rows)
            part_number = np.full(len(rows), number, np.int32)
            its = [part_number, rows.request_hashes(), log_scores, rows.row_numbers, rows.times(), learnt]
            ranked.append(pa.table(its, schema=_RANKED))
        if writer is not None:
            writer.close()
    return pa.concat_tables(ranked)


def scored_file(folder: Path, number: int) -> Path:
    """The file of a part's rows with their keys, predictions and scores, before they are ranked."""
    return folder / f"{number}.arrow"


ROWS_PER_GROUP = 131_072


def write_ranked(database: Database, scored: Path, folder: Path, constants: Mapping[str, str]) -> dict[str, int]:
    """Rank the rows of all requests and write the files of the output.

    The best row of a request has rank 1. Equal scores keep the order of the rows.

    Args:
        database: Its table `rows` has the columns of `_RANKED`.
        scored: Folder of the scored parts.
        folder: Folder that gets the files.
        constants: Columns with one value in all rows.

    Returns:
        Name of each file -> its rows.
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
            with pa.memory_map(str(scored_file(scored, part))) as file:
                rows = pa.ipc.open_file(file).read_all()
                table = rows.append_column("rank", ranks["rank"])
                for name, value in constants.items():
                    table = table.append_column(name, pa.repeat(value, len(rows)))
                pq.write_table(table, folder / part_file_name(part), row_group_size=ROWS_PER_GROUP, compression="zstd")
            written[part_file_name(part)] = len(rows)
    return written


def open_logs(
    source: str, pipeline: FeaturePipeline, settings: Settings, as_of: AsOf, labels: bool, keep: Sequence[str] = ()
) -> tuple[Logs, list[str]]:
    """Open the log to score with the logs of events that its features remember, in the types of the fitted features.

    With `as_of` "tables", attributes of users and candidates may lack in all files: the model completes them.

    Args:
        source: The log.
        pipeline: The model's features.
        settings: Settings that the model was trained with.
        as_of: Where counters and histories come from.
        labels: Whether the labels of all tasks are read.
        keep: Further columns that are read.

    Returns:
        The logs, and the attributes that all files lack.

    Raises:
        UserError: The log is not there, has no rows or lacks a column, or a column has the name of one that scoring
            adds.
    """
    files = [set(read_column_names(each.uri)) for each in find_files(source, "--input")]
    schema, columns, lacking = pipeline.schema, pipeline.schema.columns, list[str]()
    if as_of == "tables":
        has = {"user": columns.has_user, "candidate": columns.has_candidate}
        attributes = [name for name, role in schema.input_columns().items() if has.get(role)]
        there = set(columns.names).union(*files)
        lacking = [name for name in attributes if name not in there]
    read = _read_schema(schema, settings, as_of, lacking, labels)
    options = replace(BuildOptions.of(settings.data), skip_bad_files=False)
    if as_of == "tables":  # requests that are yet to come may be scored by what is known now
        options = replace(options, on_future_times="keep")
    of_log, *of_events = key_types(pipeline, read)
    more: dict[str, ColumnUse] = {name: "any" for name in keep if name not in column_uses(read)}
    split = settings.split.column
    if labels and split is not None and all(split in names for names in files):
        of_log = {name: each for name, each in of_log.items() if name != split}  # no feature reads that one
        more[split] = "any"
    predicted = prediction_columns(pipeline.layout)
    added = {*predicted, *(each.replace("predicted", "label", 1) for each in predicted), "score", "rank"}
    added |= {"model", "model_version"} if columns.has_candidate else {"model", "model_version", ROW_NUMBER_COLUMN}
    if taken := next((name for name in (*schema.columns.names, *keep) if name in added), None):
        raise UserError(f"column '{taken}' of the log has the name of a column that scoring writes; rename it")
    return Logs(source, read, options, [of_log, *of_events], more), lacking


def _read_schema(schema: Schema, settings: Settings, as_of: AsOf, lacking: Collection[str], labels: bool) -> Schema:
    """The part of a model's schema that scoring reads: neither placement, which is absent in serving, nor what rows
    count or are split to, nor what the log lacks, and only those labels and events that counters and histories
    remember, unless all `labels` are asked for."""
    scored = [name for name in schema.features if schema.role_of(name) != "placement"]
    kept = {*scored, *(schema.features[name].table_owner for name in scored)}
    features = {
        name: feature
        for name, feature in schema.features.items()
        if name in kept and not feature.reads().keys() & set(lacking)
    }
    tasks = set[str | None]()
    if as_of == "log":
        tasks.update(each.task for each in features.values() if isinstance(each, EventFeature))
        tasks |= {task.conditional_on for name, task in schema.tasks.items() if name in tasks}
    if labels:
        tasks = set(schema.tasks)
    events = {name: settings.data.events.get(name, each) for name, each in schema.events.items()}
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


def read_window(reader: LogReader, results: ResultReader | None, window: Window, part: LogPart) -> Iterator[LogRows]:
    """The rows of a part that lie in the window, some at a time.

    results: what `BuildSteps` looked up for the window, None where rows come without.
    """
    for rows in reader.read(part):
        inside = rows.filter(in_window(rows.times(), window))
        if len(inside):
            looked_up: LookupResults = {} if results is None else results.of(inside.row_numbers)
            yield from LogRows(inside.table, rows.schema, looked_up, inside.row_numbers).iter_batches(
                FEATURE_BATCH_ROWS
            )
