"""Metrics of predictions that lie in Parquet files, whoever made them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.comparison import find_objective
from mmoe_rec.evaluation.results import MeasuredModel, Results
from mmoe_rec.evaluation.sums import MOST_UNITS, ClosedSums, join_sums
from mmoe_rec.jobs.measuring.asked import WEIGHT, Asked
from mmoe_rec.jobs.measuring.parts import MeasureJob, Read, Sliced, check_requests, measure_partition, send_part
from mmoe_rec.jobs.measuring.reading import Footer, key_types, precision_of
from mmoe_rec.jobs.places import check_names, check_out, short_names
from mmoe_rec.jobs.score_files import learnt_from
from mmoe_rec.locks import writing
from mmoe_rec.log.checks import BadFile
from mmoe_rec.log.files import FoundFile, find_files, is_remote
from mmoe_rec.log.parts import LogPart, cut
from mmoe_rec.preprocessing.engines import Engine, open_engine
from mmoe_rec.preprocessing.exchange import Exchange
from mmoe_rec.progress import bar
from mmoe_rec.settings.sections import EngineName, Evaluation

ROWS_PER_PART, ROWS_PER_PARTITION = 524_288, 262_144
ROWS_FOR_PROCESSES = 2_000_000
"""From so many rows on, processes are worth their start where there are more workers than threads suit."""


@dataclass(frozen=True)
class How:
    """resamples of users for the intervals, from a seed; engine, and workers: tasks at a time, None for one a core."""

    resamples: int = 1000
    seed: int = 0
    engine: EngineName = "local"
    workers: int | None = None


def measure_predictions(
    asked: Asked,
    source: str,
    out: str | Path,
    how: How = How(),
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
    found = {each: find_files(each, _option(each, source)) for each in (source, *against)}
    _check_places(found, out)
    files = {each: [Footer.read(file) for file in those] for each, those in found.items()}
    present = {source: _present(asked, files[source])}
    for each in against:
        try:
            present[each] = _present(asked, files[each])
        except BadFile as error:
            told = f"{error}; those of --against are read by the same names, so rename the column there if need be"
            raise BadFile(told, error.address) from None
    _check_columns(present)
    with writing(out, "an evaluation", "give another folder with --out", queue=True):
        names = dict(zip(files, short_names(list(files)), strict=True))
        measured = {names[each]: _measured(present[each], found, each, out, how) for each, found in files.items()}
        optional = asked.optional
        judged = tuple(task.name for task in present[source].tasks if task.name not in optional)
        facts = {"predictions": source, "files": f"{len(files[source]):,}"}
        facts |= {"columns": ", ".join(f"{part}={name}" for part, name in present[source].told().items() if name)}
        results = Results(measured, judged, rules or Evaluation(), f"Evaluation of {names[source]}", facts)
        write_results(results, out)
    return results


def _check_places(found: Mapping[str, list[FoundFile]], out: Path) -> None:
    """Raises UserError where results would lie among predictions or over them, or predictions are given twice."""
    real, known = Path(os.path.realpath(out)), dict[frozenset[str], str]()
    for each, files in found.items():
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


def _check_columns(present: Mapping[str, Asked]) -> None:
    """Raises UserError where only some predictions have candidates, by which rows are told to be the same."""
    without = [each for each, asked in present.items() if asked.candidate is None]
    if 0 < len(without) < len(present):
        candidate = next(asked.candidate for asked in present.values() if asked.candidate is not None)
        raise UserError(
            f"'{without[0]}' has no column '{candidate}', and the predictions that it is compared with have: all need "
            "the candidates, or none"
        )


def _measured(asked: Asked, files: list[Footer], source: str, out: Path, how: How) -> MeasuredModel:
    from mmoe_rec.evaluation.summary import summarise

    sums, slices = _sums(asked, files, out.with_name(f".{out.name}.measuring"), how)
    weights = {task.name: task.weight for task in asked.tasks}
    facts = {"predictions": source, "files": len(files), "columns": asked.told(), "relevance_weights": weights}
    summary = replace(summarise(sums, how.resamples, how.seed), facts=facts)
    return MeasuredModel(sums, summary, source, seen=learnt_from(file.file.address for file in files), slices=slices)


def _present(asked: Asked, files: list[Footer]) -> Asked:
    """What is asked for of what the files have. Raises UserError where they lack something, or differ."""
    first, there = files[0].file.address, {name for each in files for name in each.schema.names}
    # What one file has, all must have: a task, or the score, would else be of some of the rows.
    lacking = [name for name in asked.optional if not {asked.predicted[name], asked.labels[name]} & there]
    asked = asked.without(lacking)
    asked = asked.by_usual_names(there)
    if asked.score is None and "score" in there:
        asked = replace(asked, score="score")
    if asked.candidate is None and asked.usual_candidate in there:
        asked = replace(asked, candidate=asked.usual_candidate)
    if asked.weight == asked.usual_weight and asked.weight not in there and WEIGHT in there:
        asked = replace(asked, weight=WEIGHT)  # as `score --labels` and `evaluate --predictions` call it
    if asked.score is None and len(asked.tasks) > 1:
        raise UserError(
            f"'{first}' has no column 'score', by which the candidates of a request are ranked; name it with "
            "--columns score=COLUMN"
        )
    types: dict[str, tuple[Any, str]] = {}
    for each in files:
        for name, kind in key_types(asked, each).items():
            known, where = types.setdefault(name, (kind, each.file.address))
            if known != kind:
                raise UserError(f"column '{name}' holds {known} in '{where}', and {kind} in '{each.file.address}'")
    return asked


def _sums(asked: Asked, files: list[Footer], scratch: Path, how: How) -> tuple[ClosedSums, Sliced]:
    parts = cut([each.file for each in files], ROWS_PER_PART)
    rows = sum(part.rows for part in parts)
    if not rows:
        raise UserError(f"'{files[0].file.address}'{' and the other files' * (len(files) > 1)} hold no row to evaluate")
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    # Each holds whole groups of users, whose number is a power of two as well.
    partitions = min(1 << (-(-rows // ROWS_PER_PARTITION) - 1).bit_length(), MOST_UNITS)
    precisions = [precision_of(asked, each) for each in files]
    precision = {name: max(each[name] for each in precisions) for name in precisions[0]}
    job = MeasureJob(asked, Exchange(scratch, partitions), precision)
    try:
        with open_engine(how.engine, how.workers, rows >= ROWS_FOR_PROCESSES) as engine:
            return _measured_parts(engine, job, parts, rows)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _measured_parts(engine: Engine, job: MeasureJob, parts: list[LogPart], rows: int) -> tuple[ClosedSums, Sliced]:
    with bar() as progress:
        task = progress.add_task("reading", total=rows)
        read = []
        for each in engine.map(partial(send_part, job), list(enumerate(parts))):
            read.append(each)
            progress.advance(task, each.rows)
        by = job.asked.slices
        whole = Read.all(read, by)
        slices = tuple(each.slices(counts) for each, counts in zip(by, whole.sliced, strict=True))
        job = replace(job, edges=whole.edges(), grouped=len(whole.users) > MOST_UNITS, slices=slices)
        partitions = range(job.rows.receivers)
        task = progress.add_task("measuring", total=len(partitions))
        sums, requests = [], []
        sliced: dict[tuple[str, str], list[ClosedSums]] = {
            (each.by.name, name): [] for each in slices for name in each.names
        }
        for found in engine.map(partial(measure_partition, job), partitions):
            progress.advance(task)
            if found is not None:
                sums.append(found[0])
                for key, of_slice in found[1].items():
                    sliced[key].append(of_slice)
                requests.append(found[2])
    check_requests(job, requests)
    return join_sums(sums), {key: join_sums(found) for key, found in sliced.items() if found}
