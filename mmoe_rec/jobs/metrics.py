"""Metrics of predictions that lie in Parquet files, whoever made them.

    parts of files -> rows, checked, to partitions of users through files
    all rows       -> checks of requests, and bins of predicted values, in a database
    partitions     -> sums of metrics, which have no user in common

A partition is held in memory; all rows of a user lie in one, wherever they stand in the files.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds

from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.comparison import Results
from mmoe_rec.evaluation.metrics.tasks import bin_edges
from mmoe_rec.evaluation.slices import MOST_VALUES, SliceBy, Slices
from mmoe_rec.evaluation.summary import MeasuredModel, find_objective
from mmoe_rec.evaluation.sums import MOST_UNITS, EvaluationSums, MeasuredTask, join_sums, measure
from mmoe_rec.jobs.places import check_out, short_names
from mmoe_rec.jobs.prediction_files import JOINED, WEIGHT, Footer, PredictionColumns, find_key_types, read_rows
from mmoe_rec.jobs.score_files import learnt_from
from mmoe_rec.locks import writing
from mmoe_rec.log.checks import BadFile
from mmoe_rec.log.database import Database, open_database
from mmoe_rec.log.files import FoundFile, find_files, is_remote
from mmoe_rec.log.reader import LogPart, cut
from mmoe_rec.preprocessing.engines import Engine, open_engine
from mmoe_rec.preprocessing.exchange import Exchange, partition_of
from mmoe_rec.preprocessing.logs import DEFAULTS, BuildOptions
from mmoe_rec.progress import bar
from mmoe_rec.settings.sections import Evaluation

ROWS_PER_PART, ROWS_PER_PARTITION = 524_288, 262_144
ROWS_FOR_PROCESSES = 2_000_000
"""With so many rows or more, processes are worth their start where there are more workers than threads suit."""


def measure_predictions(
    columns: PredictionColumns,
    source: str,
    out: str | Path,
    rules: Evaluation,
    options: BuildOptions = DEFAULTS,
    against: Sequence[str] = (),
    placement: Collection[str] = (),
    against_columns: Sequence[str] = (),
) -> Results:
    """Measures rows of Parquet files; writes `metrics.json` and other files to a folder.

    source: a folder of Parquet files, one file or a glob; rules: of intervals and comparisons; options: engine,
    workers and memory; against: further files with other predictions of the same rows, which are compared with these;
    placement: columns of placement; against_columns: PART=COLUMN, where columns of `against` are called otherwise.
    Raises UserError for a wrong file, column or value.
    """
    from mmoe_rec.report.evaluation import write_results

    if is_remote(str(out)):
        raise UserError(f"--out '{out}' must be a folder of this machine, or one mounted like one")
    out = Path(os.path.abspath(out))
    check_out(out)
    names = short_names([source, *against])
    find_objective(rules.decide_by)
    listed = {each: find_files(each, "--predictions" if each == source else "--against") for each in (source, *against)}
    _check_places(listed, out)
    files = {each: [Footer.read(file) for file in those] for each, those in listed.items()}
    mine = {source: _match_columns(columns, files[source])}
    for each in against:
        try:
            mine[each] = _match_columns(columns.with_columns(against_columns, "--against-columns"), files[each])
        except BadFile as error:
            raise BadFile(str(error).replace("--columns", "--against-columns"), error.address) from None
    _check_columns(mine)
    with writing(out, "an evaluation", "give another folder with --out", queue=True):
        measured = {
            names[each]: _measure_files(mine[each], those, each, out, rules.resamples, options)
            for each, those in files.items()
        }
        judged = tuple(task.name for task in mine[source].tasks if task.name not in columns.outcomes)
        facts = {"predictions": source, "files": f"{len(files[source]):,}"}
        facts |= {"columns": ", ".join(f"{part}={name}" for part, name in mine[source].by_part().items() if name)}
        results = Results(measured, judged, rules, f"Evaluation of {names[source]}", facts, placement)
        write_results(results, out)
    return results


def _check_places(listed: Mapping[str, list[FoundFile]], out: Path) -> None:
    """Raises UserError where results would lie among predictions or over them, or predictions are given twice."""
    real, sources = Path(os.path.realpath(out)), dict[frozenset[str], str]()
    for each, files in listed.items():
        places = frozenset(it.address if is_remote(it.address) else os.path.realpath(it.address) for it in files)
        is_inside = os.path.isdir(each) and real.is_relative_to(os.path.realpath(each))
        if is_inside or any(Path(place).is_relative_to(real) for place in places):
            raise UserError(f"--out '{out}' lies in '{each}', where the predictions are, or holds them; name another")
        if places in sources:
            raise UserError(f"'{sources[places]}' and '{each}' are the same predictions; give others with --against")
        sources[places] = each


def _check_columns(by_source: Mapping[str, PredictionColumns]) -> None:
    """Raises UserError where only some predictions have candidates, by which rows are told to be the same."""
    candidates = {each: columns.names.get("candidate") for each, columns in by_source.items()}
    if None in candidates.values() and (named := [name for name in candidates.values() if name is not None]):
        without = next(each for each, name in candidates.items() if name is None)
        lacks = f"'{without}' has no column '{named[0]}', and the predictions that it is compared with have one"
        raise UserError(f"{lacks}: either all need it, or none")


def _match_columns(columns: PredictionColumns, files: list[Footer]) -> PredictionColumns:
    """The columns as the files have them. Raises UserError where they lack something, or differ."""
    columns = columns.match({name for each in files for name in each.schema.names})
    types: dict[str, tuple[Any, str]] = {}
    for each in files:
        for name, kind in find_key_types(columns, each).items():
            first, where = types.setdefault(name, (kind, each.file.address))
            if first != kind:
                raise UserError(f"column '{name}' holds {first} in '{where}', and {kind} in '{each.file.address}'")
    return columns


def _measure_files(
    columns: PredictionColumns, files: list[Footer], source: str, out: Path, resamples: int, options: BuildOptions
) -> MeasuredModel:
    from mmoe_rec.evaluation.summary import summarise

    parts = cut([each.file for each in files], ROWS_PER_PART)
    rows = sum(part.rows for part in parts)
    if not rows:
        raise UserError(f"'{files[0].file.address}'{' and the other files' * (len(files) > 1)} hold no row to evaluate")
    # Each holds whole groups of users, whose number is a power of two as well.
    partitions = min(1 << (-(-rows // ROWS_PER_PARTITION) - 1).bit_length(), MOST_UNITS)
    scratch = out.with_name(f".{out.name}.measuring")
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    job = MeasureJob(columns, Exchange(scratch, partitions))
    try:
        with open_engine(options.engine, options.workers, rows >= ROWS_FOR_PROCESSES) as engine:
            sums, slices = _measure_parts(engine, job, parts, rows, options)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    weights = {task.name: task.weight for task in columns.tasks}
    facts = {"predictions": source, "files": len(files), "columns": columns.by_part(), "relevance_weights": weights}
    summary = replace(summarise(sums, resamples), facts=facts)
    return MeasuredModel(sums, summary, source, seen=learnt_from(file.file.address for file in files), slices=slices)


def _measure_parts(
    engine: Engine, job: MeasureJob, parts: list[LogPart], rows: int, options: BuildOptions
) -> tuple[EvaluationSums, SlicedSums]:
    with bar() as progress:
        task = progress.add_task("reading", total=rows)
        for part, _ in zip(parts, engine.map(partial(send_part, job), list(enumerate(parts))), strict=True):
            progress.advance(task, part.rows)
        with open_database(job.rows.folder / "database", options.memory_gib, options.workers) as database:
            users = check_requests(database, job)
            edges = dict(_find_edges(database, job))
            slices = tuple(_find_slices(database, number, by) for number, by in enumerate(job.columns.slices))
        job = replace(job, edges=edges, grouped=users > MOST_UNITS, slices=slices)
        partitions = range(job.rows.receivers)
        task = progress.add_task("measuring", total=len(partitions))
        keys = [WHOLE, *((each.by.name, name) for each in slices for name in each.names)]
        parts_of: dict[tuple[str, str], list[EvaluationSums]] = {key: [] for key in keys}
        for measured in engine.map(partial(measure_partition, job), partitions):
            progress.advance(task)
            for key, sums in measured.items():
                parts_of[key].append(sums)
    joined = {key: join_sums(each) for key, each in parts_of.items() if each}
    return joined.pop(WHOLE), joined


ROWS = "rows"  # the channel
ROWS_AT_A_TIME = 131_072


@dataclass(frozen=True)
class MeasureJob:
    """What the tasks share.

    edges: of the bins of each binary task's predictions; grouped: whether users are measured in groups; slices: of the
    rows; all known once all was read.
    """

    columns: PredictionColumns
    rows: Exchange
    edges: dict[str, np.ndarray] | None = None
    grouped: bool = False
    slices: tuple[Slices, ...] = ()


def send_part(job: MeasureJob, number_and_part: tuple[int, LogPart]) -> None:
    """Reads a part, checks its rows and sends them. Raises BadFile for a wrong value."""
    number, part = number_and_part
    tables = (
        (table.drop_columns(["hash"]), partition_of(table["hash"].to_numpy(), job.rows.receivers))
        for piece in part.pieces
        for table in read_rows(job.columns, piece, ROWS_AT_A_TIME)
    )
    job.rows.send_in_turns(ROWS, (number, 0), tables)


SlicedSums = dict[tuple[str, str], EvaluationSums]
WHOLE = ("", "")  # no slice


def measure_partition(job: MeasureJob, number: int) -> SlicedSums:
    """The sums of a partition's rows, as `WHOLE`, and of their slices; nothing if there are no rows."""
    table = job.rows.receive_all(ROWS, number)
    if table is None:
        return {}
    slices = {
        (each.by.name, name): _measure_rows(job, table.take(pa.array(rows)))
        for place, each in enumerate(job.slices)
        for name, rows in each.rows(table[f"s{place}"].combine_chunks()).items()
    }
    return {WHOLE: _measure_rows(job, table), **slices}


def _measure_rows(job: MeasureJob, table: pa.Table) -> EvaluationSums:
    """The sums of rows."""
    columns, names = job.columns, job.columns.names
    predictions, labels = ({task.name: table[f"{kind}{n}"] for n, task in enumerate(columns.tasks)} for kind in "pl")
    return measure(
        columns.tasks,
        table["user"],
        table["request"],
        predictions,
        labels,
        score=table["score"] if "score" in names else _fuse(columns.tasks, list(predictions.values())),
        weight=table[WEIGHT] if WEIGHT in names else None,
        candidates=table["candidate"] if "candidate" in names else None,
        edges=job.edges,
        grouped=job.grouped,
    )


def _fuse(tasks: Sequence[MeasuredTask], predictions: Sequence[pa.ChunkedArray]) -> np.ndarray:
    """(N,) what ranks rows without a score: one task's prediction, or sum of weight x log(prediction) as in a model."""
    values = np.stack([each.to_numpy() for each in predictions], axis=1)
    if len(tasks) == 1:
        return values[:, 0]
    least = [1e-12 if task.kind == "binary" else 1e-6 for task in tasks]
    return np.log(np.maximum(values, least)) @ np.array([task.weight for task in tasks])


def _find_edges(database: Database, job: MeasureJob) -> Iterator[tuple[str, np.ndarray]]:
    """Each binary task with the edges of the bins of its predicted values."""
    for number, task in enumerate(job.columns.tasks):
        if task.kind == "binary":
            query = (
                f"SELECT p{number}::DOUBLE, count(*) FILTER (l{number} = 1), count(*) FILTER (l{number} = 0) FROM rows "
                f"WHERE l{number} IN (0, 1) GROUP BY 1 ORDER BY 1"
            )
            tables = list(database.read(query, ROWS_AT_A_TIME))
            columns = pa.concat_tables(tables).columns if tables else [pa.chunked_array([[]], pa.float64())] * 3
            yield task.name, bin_edges(*(each.to_numpy() for each in columns))


def check_requests(database: Database, job: MeasureJob) -> int:
    """The number of users. Raises UserError where a request has rows of several, or a candidate twice."""
    columns = job.columns
    database.copy("rows", ds.dataset(job.rows.folder / ROWS, format="ipc"))
    (strange,) = database.row(
        'SELECT min(row(request, one, other)) FROM (SELECT request, min("user") AS one, max("user") AS other FROM rows '
        "GROUP BY request HAVING one <> other)"
    )
    if strange is not None:
        request, first, other = strange
        raise UserError(
            f"{_request(columns, request)} has rows of more than one user, {first!r} and {other!r}: a request is one "
            "list shown to one user; name columns that tell lists apart with --columns "
            f"request={JOINED.join((columns.names['user'], *columns.request))}"
        )
    if "candidate" in columns.names and columns.duplicates == "error":
        repeated = "SELECT request, candidate FROM rows GROUP BY ALL HAVING count(*) > 1"
        (twice,) = database.row(f"SELECT min(row(request, candidate)) FROM ({repeated})")
        if twice is not None:
            raise UserError(
                f"{_request(columns, twice[0])} has candidate {twice[1]!r} more than once, as where files of two "
                "models, or a file and its copy, lie together; --keep-duplicates counts all rows"
            )
    (users,) = database.row('SELECT count(DISTINCT "user") FROM rows')
    return int(users)


def _find_slices(database: Database, number: int, by: SliceBy) -> Slices:
    """The slices of the rows, once their requests were checked. Raises UserError where a column has too many values."""
    name = f"s{number}"
    if by.buckets is not None:
        edges, *ends = database.row(f"SELECT quantile_disc({name}, {by.shares}), min({name}), max({name}) FROM rows")
        return Slices(by, ()) if edges is None else by.of_numbers(edges, *ends)
    query = f"SELECT {name}, count(*) FROM rows WHERE {name} IS NOT NULL GROUP BY 1 ORDER BY 1 LIMIT {MOST_VALUES + 1}"
    counts = [
        row for table in database.read(query, MOST_VALUES) for row in zip(*table.to_pydict().values(), strict=True)
    ]
    return by.of_values([value for value, _ in counts], [rows for _, rows in counts])


def _request(columns: PredictionColumns, value: object) -> str:
    which = f"request {value!r}" if len(columns.request) == 1 else "a request"
    return f"{which} by '{columns.names['request']}'"
