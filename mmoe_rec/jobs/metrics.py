"""Metrics of predictions that lie in Parquet files, whoever made them.

    parts of files -> rows, checked, to partitions of users through files; which values there are
    all rows       -> checks of requests, in a database
    partitions     -> sums of metrics, which have no user in common

A partition is held in memory; all rows of a user lie in one, wherever they stand in the files.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds

from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.comparison import find_objective
from mmoe_rec.evaluation.metrics.binary import bin_edges, counts_by_value
from mmoe_rec.evaluation.results import Results
from mmoe_rec.evaluation.slices import MOST_VALUES, SliceBy, Slices
from mmoe_rec.evaluation.summary import MeasuredModel
from mmoe_rec.evaluation.sums import MOST_UNITS, EvaluationSums, join_sums, measure
from mmoe_rec.jobs.places import build_options, check_names, check_out, log_and_place, logs_for, short_names
from mmoe_rec.jobs.prediction_files import (
    JOINED,
    WEIGHT,
    Footer,
    PredictionColumns,
    find_key_types,
    find_precision,
    read_rows,
)
from mmoe_rec.jobs.score_files import learnt_from
from mmoe_rec.locks import reading, writing
from mmoe_rec.log.checks import BadFile
from mmoe_rec.log.database import MEMORY_GIB, Database, open_database
from mmoe_rec.log.files import FoundFile, find_files, is_remote
from mmoe_rec.log.reader import LogPart, cut
from mmoe_rec.preprocessing.engines import Engine, open_engine
from mmoe_rec.preprocessing.exchange import Exchange, partition_of
from mmoe_rec.preprocessing.logs import Logs
from mmoe_rec.preprocessing.prepare import Prepared, encode_with, existing, fingerprint_of
from mmoe_rec.progress import bar, say
from mmoe_rec.settings.schema import Schema
from mmoe_rec.settings.sections import EngineName, Evaluation, Settings, differences

if TYPE_CHECKING:
    from mmoe_rec.evaluation.scoring import ScoredRows
    from mmoe_rec.inference.ranker import Ranker
    from mmoe_rec.model.layout import ModelLayout
    from mmoe_rec.model.mmoe import RankingModel
    from mmoe_rec.model.score import Calibration


@contextmanager
def rows_to_measure(settings: Settings, artifact: Path, ranker: Ranker, split: str = "test") -> Iterator[Path]:
    """Encoded test rows, which nobody replaces meanwhile: the existing ones if the model's features made them, else
    rows freshly encoded by those.

    artifact: the folder that the ranker was loaded from; split: of the rows. Raises UserError where its tasks mean
    something else than those of the settings.
    """
    check_tasks(settings, ranker.pipeline.schema)
    work, what = Path(settings.data.work), "an evaluation"
    with reading(work / "features", what):
        prepared = existing(*log_and_place(settings))
        if prepared is not None and prepared.manifest["fingerprint"] == ranker.about.fingerprint:
            prepared.require_rows(split)
            yield prepared.split(split)
            return
    logs, encoded = logs_for(settings, ranker.pipeline), work / "evaluation" / "encoded"
    if gone := Prepared(work / "features").gone(logs):
        told = f"1 is gone, '{gone[0]}'" if len(gone) == 1 else f"{len(gone):,} are gone, such as '{gone[0]}'"
        say(
            "the features that the model was trained on are not there, so counters and histories are rebuilt from the "
            f"files that are left in the log: {told}"
        )
    with writing(encoded, what, "set `data.work` to another folder", queue=True):
        encode_with(artifact / "features", logs, {split: settings.split.windows()[split]}, encoded)
        yield encoded / split


def are_its_own(settings: Settings, artifact: Path) -> bool:
    """Whether the settings have the very log and split that a model was trained with, so that their test rows are those
    of its training."""
    from mmoe_rec.inference.artifact import read_artifact

    fingerprint = read_artifact(artifact, verify=False).fingerprint
    prepared = existing(*log_and_place(settings))
    if prepared is not None and prepared.manifest["fingerprint"] == fingerprint:
        return True
    logs = Logs(settings.data.log, settings.schema_, build_options(settings))
    return fingerprint_of(logs, settings.split.windows()) == fingerprint


def score_by(
    settings: Settings, model: RankingModel, layout: ModelLayout, rows: Path, calibration: Calibration
) -> ScoredRows:
    """Encoded rows as a model scores them, to be measured against what the settings say that labels are worth.

    layout: the model's. Raises NotFiniteError.
    """
    from mmoe_rec.batches.encoded_rows import EncodedRows
    from mmoe_rec.evaluation.scoring import score_rows

    scored = score_rows(
        model,
        layout,
        EncodedRows(rows, layout),
        settings.evaluation.batch_size,
        calibration=calibration,
        relevance={name: task.score_weight for name, task in settings.tasks.items()},
        weighted=settings.training.sampling_correction == "weights",
    )
    return scored if settings.columns.has_candidate else replace(scored, candidates=None, row=scored.candidates)


def check_tasks(settings: Settings, schema: Schema) -> None:
    """Raises UserError where a model's schema has other tasks than the settings, or ones that mean something else."""
    if set(schema.tasks) != set(settings.tasks):
        raise UserError(f"the model predicts {', '.join(schema.tasks)}; the settings have {', '.join(settings.tasks)}")
    its, ours = ({"tasks": each.identity()["tasks"]} for each in (schema, settings.schema_))
    for where, before, now in differences(its, ours):
        raise UserError(
            f"the model was trained with '{where}' {before}, and it is {now} in the settings, so it predicts something "
            "else than these labels: set it back, or train a model with it"
        )


ROWS_PER_PART, ROWS_PER_PARTITION = 524_288, 262_144
ROWS_FOR_PROCESSES = 2_000_000
"""From so many rows on, processes are worth their start where there are more workers than threads suit."""


@dataclass(frozen=True)
class MeasureOptions:
    """How to measure. resamples: of users for the intervals, from a seed; engine, and workers: tasks at a time, None is
    one a core; memory_gib: in which requests are checked."""

    resamples: int = 1000
    seed: int = 0
    engine: EngineName = "local"
    workers: int | None = None
    memory_gib: float = MEMORY_GIB


def measure_predictions(
    columns: PredictionColumns,
    source: str,
    out: str | Path,
    options: MeasureOptions = MeasureOptions(),
    against: Sequence[str] = (),
    rules: Evaluation | None = None,
) -> Results:
    """Measures rows of Parquet files; writes `metrics.json` and the sums to a folder.

    source: a folder of Parquet files, one file or a glob; against: further ones with other predictions of the same
    rows, which are compared with these; rules: by which. Raises UserError for a wrong file, column or value.
    """
    from mmoe_rec.report.documents import write_results

    if is_remote(str(out)):
        raise UserError(f"--out '{out}' must be a folder of this machine, or one mounted like one")
    out = Path(os.path.abspath(out))
    check_out(out)
    check_names([source, *against], "--against")
    find_objective((rules or Evaluation()).decide_by)
    listed = {each: find_files(each, _option(each, source)) for each in (source, *against)}
    _check_places(listed, out)
    files = {each: [Footer.read(file) for file in those] for each, those in listed.items()}
    mine = {source: _match_columns(columns, files[source])}
    for each in against:
        try:
            mine[each] = _match_columns(columns, files[each])
        except BadFile as error:
            message = f"{error}; those of --against are read by the same names, so rename the column there if need be"
            raise BadFile(message, error.address) from None
    _check_columns(mine)
    with writing(out, "an evaluation", "give another folder with --out", queue=True):
        names = dict(zip(files, short_names(list(files)), strict=True))
        measured = {names[each]: _measure_files(mine[each], those, each, out, options) for each, those in files.items()}
        optional = columns.optional
        judged = tuple(task.name for task in mine[source].tasks if task.name not in optional)
        facts = {"predictions": source, "files": f"{len(files[source]):,}"}
        facts |= {"columns": ", ".join(f"{part}={name}" for part, name in mine[source].by_part().items() if name)}
        results = Results(measured, judged, rules or Evaluation(), f"Evaluation of {names[source]}", facts)
        write_results(results, out)
    return results


def _check_places(listed: Mapping[str, list[FoundFile]], out: Path) -> None:
    """Raises UserError where results would lie among predictions or over them, or predictions are given twice."""
    real, known = Path(os.path.realpath(out)), dict[frozenset[str], str]()
    for each, files in listed.items():
        places = frozenset(
            file.address if is_remote(file.address) else os.path.realpath(file.address) for file in files
        )
        local = [Path(place) for place in places if not is_remote(place)]
        folder = () if is_remote(each) or not os.path.isdir(each) else (Path(os.path.realpath(each)),)
        if any(place.is_relative_to(real) for place in local) or any(real.is_relative_to(place) for place in folder):
            raise UserError(
                f"--out '{out}' lies in '{each}', where the predictions are, or holds them; name another folder"
            )
        if places in known:
            raise UserError(f"'{known[places]}' and '{each}' are the same predictions; give others with --against")
        known[places] = each


def _option(each: str, source: str) -> str:
    return "--predictions" if each == source else "--against"


def _check_columns(by_source: Mapping[str, PredictionColumns]) -> None:
    """Raises UserError where only some predictions have candidates, by which rows are told to be the same."""
    without = [each for each, columns in by_source.items() if columns.candidate is None]
    if 0 < len(without) < len(by_source):
        candidate = next(columns.candidate for columns in by_source.values() if columns.candidate is not None)
        raise UserError(
            f"'{without[0]}' has no column '{candidate}', and the predictions that it is compared with have: all need "
            "the candidates, or none"
        )


def _measure_files(
    columns: PredictionColumns, files: list[Footer], source: str, out: Path, options: MeasureOptions
) -> MeasuredModel:
    from mmoe_rec.evaluation.summary import summarise

    sums, slices = _sum_files(columns, files, out.with_name(f".{out.name}.measuring"), options)
    weights = {task.name: task.weight for task in columns.tasks}
    facts = {"predictions": source, "files": len(files), "columns": columns.by_part(), "relevance_weights": weights}
    summary = replace(summarise(sums, options.resamples, options.seed), facts=facts)
    return MeasuredModel(sums, summary, source, seen=learnt_from(file.file.address for file in files), slices=slices)


def _match_columns(columns: PredictionColumns, files: list[Footer]) -> PredictionColumns:
    """The columns as the files have them. Raises UserError where they lack something, or differ."""
    first, there = files[0].file.address, {name for each in files for name in each.schema.names}
    # What one file has, all must have: a task, or the score, would else be of some of the rows.
    lacking = [name for name in columns.optional if not {columns.predicted[name], columns.labels[name]} & there]
    columns = columns.without(lacking)
    columns = columns.by_usual_names(there)
    if columns.score is None and "score" in there:
        columns = replace(columns, score="score")
    if columns.candidate is None and columns.usual_candidate in there:
        columns = replace(columns, candidate=columns.usual_candidate)
    if columns.weight == columns.usual_weight and columns.weight not in there and WEIGHT in there:
        columns = replace(columns, weight=WEIGHT)  # as `score --labels` and `evaluate --predictions` call it
    if columns.score is None and len(columns.tasks) > 1:
        raise UserError(
            f"'{first}' has no column 'score', by which the candidates of a request are ranked; name it with "
            "--columns score=COLUMN"
        )
    types: dict[str, tuple[Any, str]] = {}
    for each in files:
        for name, kind in find_key_types(columns, each).items():
            known, where = types.setdefault(name, (kind, each.file.address))
            if known != kind:
                raise UserError(f"column '{name}' holds {known} in '{where}', and {kind} in '{each.file.address}'")
    return columns


def _sum_files(
    columns: PredictionColumns, files: list[Footer], scratch: Path, options: MeasureOptions
) -> tuple[EvaluationSums, SlicedSums]:
    parts = cut([each.file for each in files], ROWS_PER_PART)
    rows = sum(part.rows for part in parts)
    if not rows:
        raise UserError(f"'{files[0].file.address}'{' and the other files' * (len(files) > 1)} hold no row to evaluate")
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    # Each holds whole groups of users, whose number is a power of two as well.
    partitions = min(1 << (-(-rows // ROWS_PER_PARTITION) - 1).bit_length(), MOST_UNITS)
    precisions = [find_precision(columns, each) for each in files]
    precision = {name: max(each[name] for each in precisions) for name in precisions[0]}
    job = MeasureJob(columns, Exchange(scratch, partitions), precision)
    try:
        with open_engine(options.engine, options.workers, rows >= ROWS_FOR_PROCESSES) as engine:
            return _measure_parts(engine, job, parts, rows, options)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _measure_parts(
    engine: Engine, job: MeasureJob, parts: list[LogPart], rows: int, options: MeasureOptions
) -> tuple[EvaluationSums, SlicedSums]:
    with bar() as progress:
        task = progress.add_task("reading", total=rows)
        counts = []
        for each in engine.map(partial(send_part, job), list(enumerate(parts))):
            counts.append(each)
            progress.advance(task, each.rows)
        whole = PartCounts.merge(counts)
        with open_database(job.rows.folder / "database", options.memory_gib, options.workers) as database:
            users = check_requests(database, job)
            slices = tuple(_find_slices(database, number, by) for number, by in enumerate(job.columns.slices))
        job = replace(job, edges=whole.edges(), grouped=users > MOST_UNITS, slices=slices)
        partitions = range(job.rows.receivers)
        task = progress.add_task("measuring", total=len(partitions))
        sums: list[EvaluationSums] = []
        sliced: dict[tuple[str, str], list[EvaluationSums]] = {
            (each.by.name, name): [] for each in slices for name in each.names
        }
        for measured in engine.map(partial(measure_partition, job), partitions):
            progress.advance(task)
            if measured is not None:
                sums.append(measured[0])
                for key, of_slice in measured[1].items():
                    sliced[key].append(of_slice)
    return join_sums(sums), {key: join_sums(each) for key, each in sliced.items() if each}


ROWS = "rows"  # the channel
ROWS_AT_A_TIME = 131_072


@dataclass(frozen=True)
class MeasureJob:
    """What the tasks share.

    precision: task -> machine precision of its least precise predictions; edges: of the bins of each binary task's
    predictions; grouped: whether users are measured in groups; slices: of the rows; all known once all was read.
    """

    columns: PredictionColumns
    rows: Exchange
    precision: dict[str, float]
    edges: dict[str, np.ndarray] | None = None
    grouped: bool = False
    slices: tuple[Slices, ...] = ()


@dataclass(frozen=True)
class PartCounts:
    """What a part holds. values: binary task -> some of the predicted values, rising, with the numbers of positive and
    of negative rows that they stand for."""

    rows: int
    values: dict[str, Values]

    @staticmethod
    def merge(parts: Sequence[PartCounts]) -> PartCounts:
        """That of all parts."""
        values = {
            name: tuple(np.concatenate(each) for each in zip(*(part.values[name] for part in parts), strict=True))
            for name in parts[0].values
        }
        merged = {name: counts_by_value(*each) for name, each in values.items()}
        return PartCounts(sum(part.rows for part in parts), merged)

    def edges(self) -> dict[str, np.ndarray]:
        """Of bins for all."""
        return {name: bin_edges(*values) for name, values in self.values.items()}


Values = tuple[np.ndarray, np.ndarray, np.ndarray]


def _fewer(values: np.ndarray, positives: np.ndarray, negatives: np.ndarray) -> Values:
    """At most `MOST_BINS` of the values, each of which stands for those up to the next one."""
    place = np.searchsorted(bin_edges(values, positives, negatives), values, side="right")
    _, first = np.unique(place, return_index=True)
    return values[first], np.bincount(place, positives), np.bincount(place, negatives)


def send_part(job: MeasureJob, number_and_part: tuple[int, LogPart]) -> PartCounts:
    """Reads a part, checks its rows and sends them. Raises BadFile for a wrong value."""
    number, part = number_and_part
    binary = [task.name for task in job.columns.tasks if task.kind == "binary"]
    seen: dict[str, list[Values]] = {name: [] for name in binary}

    def tables() -> Iterator[tuple[pa.Table, np.ndarray]]:
        for piece in part.pieces:
            for table in read_rows(job.columns, piece, ROWS_AT_A_TIME):
                hashes = table["hash"].to_numpy()
                for name in binary:
                    value, label = table[f"p.{name}"].to_numpy(), table[f"l.{name}"].to_numpy()
                    seen[name].append((value, label == 1, label == 0))
                yield table.drop_columns(["hash"]), partition_of(hashes, job.rows.receivers)

    sent = job.rows.send_in_turns(ROWS, (number, 0), tables())
    values = {}
    for name, batches in seen.items():
        value, positive, negative = (np.concatenate(each) for each in zip(*batches, strict=True))
        known = positive | negative
        values[name] = _fewer(*counts_by_value(value[known], positive[known], negative[known]))
    return PartCounts(int(sent.sum()), values)


SlicedSums = dict[tuple[str, str], EvaluationSums]


def measure_partition(job: MeasureJob, number: int) -> tuple[EvaluationSums, SlicedSums] | None:
    """The sums of a partition's rows and of their slices; None if there are no rows."""
    table = job.rows.receive_all(ROWS, number)
    if table is None:
        return None
    slices = {
        (each.by.name, name): _measure_rows(job, table.take(pa.array(rows)))
        for place, each in enumerate(job.slices)
        for name, rows in each.rows(table[f"s.{place}"].combine_chunks()).items()
    }
    return _measure_rows(job, table), slices


def _measure_rows(job: MeasureJob, table: pa.Table) -> EvaluationSums:
    """The sums of rows."""
    columns = job.columns
    predictions = {task.name: table[f"p.{task.name}"] for task in columns.tasks}
    return measure(
        columns.tasks,
        table["user"],
        table["request"],
        predictions,
        {task.name: table[f"l.{task.name}"] for task in columns.tasks},
        score=table["score"] if columns.score is not None else next(iter(predictions.values())),
        weight=table["weight"] if columns.weight is not None else None,
        candidates=table["candidate"] if columns.candidate is not None else None,
        precision=job.precision,
        edges=job.edges,
        grouped=job.grouped,
    )


def check_requests(database: Database, job: MeasureJob) -> int:
    """The number of users. Raises UserError where a request has rows of several, or a candidate twice."""
    columns = job.columns
    database.register("rows", ds.dataset(job.rows.folder / ROWS, format="ipc"))
    (strange,) = database.row(
        'SELECT min(row(request, one, other)) FROM (SELECT request, min("user") AS one, max("user") AS other FROM rows '
        "GROUP BY request HAVING one <> other)"
    )
    if strange is not None:
        request, first, other = strange
        raise UserError(
            f"{_request(columns, request)} has rows of more than one user, {first!r} and {other!r}: a request is one "
            "list shown to one user; name columns that tell lists apart with --columns "
            f"request={JOINED.join((columns.user, *columns.request))}"
        )
    if columns.candidate is not None and columns.duplicates == "error":
        (twice,) = database.row(
            "SELECT min(row(request, candidate)) FROM "
            "(SELECT request, candidate FROM rows GROUP BY ALL HAVING count(*) > 1)"
        )
        if twice is not None:
            raise UserError(
                f"{_request(columns, twice[0])} has candidate {twice[1]!r} more than once, as where files of two "
                "models, or a file and its copy, lie together; --keep-duplicates counts all rows"
            )
    (users,) = database.row('SELECT count(DISTINCT "user") FROM rows')
    return int(users)


def _find_slices(database: Database, number: int, by: SliceBy) -> Slices:
    """The slices of the rows, once their requests were checked. Raises UserError where a column has too many values."""
    column = f'"s.{number}"'
    if by.buckets is not None:
        edges, *ends = database.row(
            f"SELECT quantile_disc({column}, {by.shares}), min({column}), max({column}) FROM rows"
        )
        return Slices(by, ()) if edges is None else by.of_numbers(edges, *ends)
    counted = (
        f"SELECT {column}, count(*) FROM rows WHERE {column} IS NOT NULL GROUP BY 1 ORDER BY 1 LIMIT {MOST_VALUES + 1}"
    )
    found = [
        row for table in database.read(counted, MOST_VALUES) for row in zip(*table.to_pydict().values(), strict=True)
    ]
    return by.of_values([value for value, _ in found], [rows for _, rows in found])


def _request(columns: PredictionColumns, value: object) -> str:
    which = f"request {value!r}" if len(columns.request) == 1 else "a request"
    return f"{which} by '{JOINED.join(columns.request)}'"
