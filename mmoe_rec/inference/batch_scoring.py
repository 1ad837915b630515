"""Predictions, scores and ranks of a log's rows, as Parquet.

    parts of the log -> their rows with predictions and scores, and the keys that rank them
    all keys         -> rank within the request, in a database
    parts            -> their rows with the ranks

A process loads the model once, for all its tasks and threads. Rows are scored a fixed number at a time, by one thread
each, so that no bit depends on the engine or the number of workers.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec.atomic import atomic_folder
from mmoe_rec.errors import UserError
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.inference.artifact import Source, read_artifact, version_of
from mmoe_rec.inference.ranking import Freshness, scored_table
from mmoe_rec.inference.scored_files import (
    FORMAT,
    AsOf,
    LearntRows,
    check_output,
    finished_name,
    is_whole,
    known_rows,
    open_logs,
    read_manifest,
    write_manifest,
)
from mmoe_rec.locks import writing
from mmoe_rec.log.checks import format_time
from mmoe_rec.log.database import Database, open_database
from mmoe_rec.log.files import is_remote
from mmoe_rec.log.reader import LogPart, LogReader
from mmoe_rec.log.rows import labels_of
from mmoe_rec.point_in_time.join import Window
from mmoe_rec.preprocessing.build_steps import ROWS_FOR_PROCESSES, Steps, kept_reader, kept_results, open_engine
from mmoe_rec.preprocessing.look_up import ResultExchange, ResultReader
from mmoe_rec.preprocessing.prepare import fingerprint_of
from mmoe_rec.progress import bar
from mmoe_rec.settings.load import load_settings, parse_overrides
from mmoe_rec.settings.sections import Settings, Tracking
from mmoe_rec.tracking.registry import find_model

if TYPE_CHECKING:
    from mmoe_rec.inference.ranker import Ranker


ALL: Window = (None, None)
_HERE = ("--data.engine", "local", "--data.workers", "null")  # not those of the machines that trained the model


@dataclass(frozen=True)
class ScoredLog:
    """Scores in a folder: what its manifest says of them, and whether they were there before."""

    folder: Path
    manifest: dict[str, Any]
    before: bool = False


def score_log(
    model: str | Path,
    source: str | Path,
    output: str | Path,
    as_of: AsOf = "log",
    window: Window = ALL,
    overrides: Sequence[str] = (),
    labels: bool = False,
    keep: Sequence[str] = (),
) -> ScoredLog:
    """Score each row of a log with a model, and write keys, predictions, score and rank to a folder.

    If the folder already has these scores of the same input, model and settings, nothing is scored again.

    Args:
        model: An address as `find_model` takes it.
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
        if key[0] != "data" and key not in (["serving", "products"], ["tracking", "uri"]):
            raise UserError(
                f"--{'.'.join(key)} changes nothing here: scoring takes settings of section data, serving.products "
                "and tracking.uri; all others are those that the model was trained with"
            )
    uri = next((value for key, value in reversed(given) if key == ["tracking", "uri"]), None)
    start, end = window
    if start is not None and end is not None and start >= end:
        raise UserError(f"--start {format_time(start)} is not before --end {format_time(end)}: no request lies between")
    if labels and as_of != "log":
        raise UserError(f"--labels writes what the log says of its rows; leave it out with --as-of {as_of}")
    artifact = find_model(model, Tracking(uri=uri).address)  # before the model's own settings are known
    read_artifact(artifact.folder)  # which says what is wrong with a damaged one
    settings = load_settings(artifact.folder / "settings.yaml", [*_HERE, *overrides])
    if is_remote(str(output)):
        raise UserError(f"--output '{output}' must be a folder of this machine, or one mounted like one")
    check_output(out, source)
    with writing(out, "a scoring", "give another folder with --output"):
        check_output(out, source)
        scoring = _Scoring(artifact, settings, source, as_of, window, labels, keep)
        before = read_manifest(out)
        if before is not None and before["fingerprint"] == scoring.fingerprint and is_whole(out, before):
            return ScoredLog(out, before, before=True)
        with atomic_folder(out) as folder:
            manifest = scoring.write(folder)
    return ScoredLog(out, manifest)


class _Scoring:
    """One run of the command."""

    def __init__(
        self,
        model: Source,
        settings: Settings,
        source: str,
        as_of: AsOf,
        window: Window,
        labels: bool,
        keep: Sequence[str],
    ) -> None:
        self.settings, self.source = settings, source
        self.as_of, self.window, self.labels, self.artifact = as_of, window, labels, model.folder
        self.kept = tuple(keep)
        self.pipeline = FeaturePipeline.load(model.folder / "features", memories=False)
        self.has_time = self.pipeline.schema.columns.has_time
        if window != ALL and not self.has_time:
            raise UserError("--start and --end need times, which the model's table does not have: leave them out")
        self.logs, self.lacking, self.learnt = open_logs(source, self.pipeline, settings, as_of, labels, keep)
        about = read_artifact(model.folder, verify=False)
        self.tables_as_of, self.freshness = about.tables_as_of, Freshness.of(about)
        self.constants = {"model": model.address, "model_version": version_of(model.folder)}
        built = self.logs.options
        options = [built.duplicates, built.several_times, built.rows_in_memory]
        split = settings.split.model_dump(mode="json") if labels else None
        self.products = settings.serving.products
        how = [options, split, self.products, self.kept]
        self.fingerprint = fingerprint_of(self.logs, [FORMAT, self.constants, self.tables_as_of, as_of, window, *how])

    def write(self, folder: Path) -> dict[str, Any]:
        """Write the files of the output to a folder, and return the manifest."""
        options, scratch = self.logs.options, folder / "scratch"
        with Steps(self.logs, {"scored": self.window}, scratch) as steps:
            facts = self._look_up(steps)
            with open_database(scratch / "database", options.memory_gib, options.workers) as database:
                database.fill("rows", _RANKED, self._score_parts(steps, scratch, facts))
                counts = database.row(
                    f"SELECT count(*), count(*) FILTER (time <= {self.freshness.known}), count(*) FILTER (learnt), "
                    "min(time), max(time) FROM rows"
                )
                names = ("rows", "early", "learnt", "first_request", "last_request")
                facts |= dict(zip(names, counts, strict=True))
                if not facts["rows"]:
                    raise self._no_rows()
                for log in self.logs.all:
                    log.check_unchanged()
                parts = write_ranked(database, scratch, folder, self.constants)
        manifest = self._manifest(parts, facts)
        write_manifest(folder, manifest)
        return manifest

    def _look_up(self, steps: Steps) -> dict[str, Any]:
        """Look up what counters and histories know of the rows, and return facts for the manifest."""
        facts: dict[str, Any] = {"first": None}
        if self.as_of == "tables":
            steps.find_requests()
        else:
            counted, memories = steps.count(statistics=False), steps.scratch / "compacted"
            if not counted.rows["scored"]:
                raise self._no_rows()
            memories.mkdir(parents=True)
            steps.look_up(self.pipeline, memories, end=counted.last + 1, training=None)
            facts |= {"first": counted.first, "last": counted.last}
        return facts

    def _no_rows(self) -> UserError:
        start, end = ("any time" if each is None else format_time(each) for each in self.window)
        return UserError(f"no row of '{self.source}' was requested from {start} to {end}; change --start and --end")

    def _score_parts(self, steps: Steps, scratch: Path, facts: Mapping[str, Any]) -> Iterator[pa.Table]:
        """Score the parts of the log into files, and yield the keys that rank their rows, see `_RANKED`."""
        from mmoe_rec.devices import limit_threads

        options, total, tasks = self.logs.options, self.logs.log.rows, list(enumerate(steps.parts))
        processes = total >= ROWS_FOR_PROCESSES and not self.source.startswith("memory://")
        job = ScoreJob(
            model=self.artifact,
            version=self.constants["model_version"],
            products=self.products,
            reader=kept_reader(scratch, self.logs.log),
            results=kept_results(scratch, self.logs.log) if self.as_of == "log" else None,
            window=self.window,
            labels_known_by=facts["last"] if self.labels else None,
            kept=self.kept,
            learnt=self.learnt,
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
        from mmoe_rec.model.products import serving_products

        return {
            "fingerprint": self.fingerprint,
            **self.constants,
            "tables_as_of": self.tables_as_of,
            "as_of": self.as_of,
            "products": serving_products(self.products),
            "known_from": format_time(facts["first"]) if self.has_time and facts["first"] is not None else None,
            "labels_known_by": format_time(facts["last"]) if self.has_time and self.labels else None,
            "meaning": self._describe_past(facts),
            "learnt": None if self.learnt is None else self.learnt.describe(facts["learnt"], facts["rows"]),
            "input": self.source,
            "files": [file.address for file in self.logs.log.files],
            "events": {log.name: [file.address for file in log.files] for log in self.logs.events},
            "rows": facts["rows"],
            "first_request": format_time(facts["first_request"]) if self.has_time else None,
            "last_request": format_time(facts["last_request"]) if self.has_time else None,
            "rows_before_tables_as_of": facts["early"] if self.has_time else 0,
            "parts": dict(parts),
        }

    def _describe_past(self, facts: Mapping[str, Any]) -> str:
        """What the features of all scored rows knew."""
        rows, early, last = facts["rows"], facts["early"], facts["last_request"]
        if self.tables_as_of is None:
            return "the model was trained on a plain table: its features know nothing but the row itself"
        if self.as_of == "log":
            begin = format_time(facts["first"])
            events = "".join(f" and in events '{log.name}'" for log in self.logs.events)
            return (
                "counters and histories know what was known before each request in the log that was given (its first "
                f"request: {begin}){events}, and nothing of the past besides"
            )
        sentence = f"counters and histories know what the model knew at {self.tables_as_of}"
        if early:
            sentence += (
                f"; {early:,} of {rows:,} rows were not requested later, so their features know their future: to judge "
                "a model by them, score with --as-of log"
            )
        if self.freshness.is_stale(last):
            sentence += (
                f"; the last row was requested at {format_time(last)}, more than {self.freshness.days:g} days "
                "later, when these are stale (setting `serving.stale_after_days`)"
            )
        if self.lacking:
            names = ", ".join(map(repr, self.lacking))
            sentence += f"; the input has no column {names}: of each user and candidate the latest value is taken"
        return sentence


@dataclass(frozen=True)
class ScoreJob:
    """Arguments that all tasks of a scoring share.

    Attributes:
        model: Artifact folder.
        version: Checksum of the artifact.
        products: Value of `serving.products`.
        reader: Reads the log.
        results: Values of counters and histories for the rows, None if the model's own tables are asked.
        window: Request times to score, microseconds.
        labels_known_by: Time as of which labels are written, microseconds, None for no labels.
        kept: Further columns of the log to write.
        learnt: Tells which rows the model has learned from, None if nobody asks.
        folder: Folder that gets a file for each part.
    """

    model: Path
    version: str
    products: str
    reader: LogReader
    results: ResultExchange | None
    window: Window
    labels_known_by: int | None
    kept: tuple[str, ...]
    learnt: LearntRows | None
    folder: Path


_LOADING = threading.Lock()


def load_ranker(folder: Path, version: str) -> Ranker:
    """The model of a folder, loaded once by this process. Raises UserError where another one lies there by now."""
    with _LOADING:
        return _load(folder, version)


@lru_cache(maxsize=1)
def _load(folder: Path, version: str) -> Ranker:
    from mmoe_rec.inference.ranker import Ranker

    ranker = Ranker.load(folder)
    if ranker.version != version:
        raise UserError(
            f"another model (version {ranker.version}) took the place of the one in '{folder}' (version {version}) "
            "while rows were scored: start the command again, which scores with the new one"
        )
    return ranker


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

    from mmoe_rec.model.products import serving_products

    number, part = task
    torch.set_num_threads(1)
    ranker = load_ranker(job.model, job.version)
    ranker.scorer.multiply_by(serving_products(job.products))
    results = None if job.results is None else ResultReader(job.results, list(ranker.pipeline.key_groups))
    writer, ranked = None, [_RANKED.empty_table()]
    with pa.OSFile(str(scored_file(job.folder, number)), "wb") as file:
        for rows in known_rows(job.reader, results, job.window, part):
            values, log_scores = ranker.score(ranker.reader.completed(rows))
            table = scored_table(rows, values, log_scores, ranker.layout)
            if job.labels_known_by is not None:
                for name, values in labels_of(rows, job.labels_known_by).items():
                    table = table.append_column(f"label_{name}", pa.array(values, from_pandas=True))
                if (weight := rows.schema.columns.weight) is not None:
                    table = table.append_column("weight", pa.array(rows.numbers(weight)))
            for name in job.kept:
                if name not in table.column_names:
                    table = table.append_column(name, rows.column(name))
            writer = writer or pa.ipc.new_file(file, table.schema)
            writer.write_table(table)
            learnt = np.zeros(len(rows), bool) if job.learnt is None else job.learnt.find(rows)
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
                its = {
                    "rank": ranks["rank"],
                    **{name: pa.repeat(value, len(rows)) for name, value in constants.items()},
                }
                table = pa.table([*rows.columns, *its.values()], names=[*rows.column_names, *its])
                pq.write_table(table, folder / finished_name(part), row_group_size=ROWS_PER_GROUP, compression="zstd")
            written[finished_name(part)] = len(rows)
    return written


def microseconds(time: str) -> int:
    """An ISO time (in UTC, without an offset) in microseconds since 1970 UTC. Raises UserError for another text."""
    try:
        moment = datetime.fromisoformat(time)
    except ValueError:
        raise UserError(f"'{time}' is no time; write it like 2017-09-04 or 2017-09-04T04:00:00+00:00") from None
    since = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - datetime(1970, 1, 1, tzinfo=UTC)
    return since // timedelta(microseconds=1)
