"""Metrics of predictions that lie in Parquet files, whoever made them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.comparison import Results
from mmoe_rec.evaluation.prediction_files import PredictionColumns, PredictionFile, match_columns, read_predictions
from mmoe_rec.evaluation.summary import MeasuredModel, find_objective
from mmoe_rec.inference.scored_files import learnt_from
from mmoe_rec.locks import writing
from mmoe_rec.log.checks import BadFile
from mmoe_rec.log.files import FoundFile, find_files, is_remote
from mmoe_rec.preprocessing.places import check_out, short_names
from mmoe_rec.settings.sections import Evaluation


def measure_predictions(
    columns: PredictionColumns,
    source: str,
    out: str | Path,
    rules: Evaluation,
    against: Sequence[str] = (),
    against_columns: Sequence[str] = (),
) -> Results:
    """Measure rows of Parquet files and write `metrics.json` and other files to a folder.

    Args:
        columns: Tasks and the names of columns.
        source: A folder of Parquet files, one file or a glob.
        out: Folder for the results.
        rules: Rules of intervals and comparisons.
        against: Other predictions of the same rows, to compare with.
        against_columns: PART=COLUMN for columns that have other names in `against`.

    Raises:
        UserError: A file, a column or a value is wrong.
    """
    from mmoe_rec.evaluation.results_report import write_results

    if is_remote(str(out)):
        raise UserError(f"--out '{out}' must be a folder of this machine, or one mounted like one")
    out = Path(os.path.abspath(out))
    check_out(out)
    names = short_names([source, *against])
    find_objective(rules.decide_by)
    listed = {each: find_files(each, "--predictions" if each == source else "--against") for each in (source, *against)}
    _check_places(listed, out)
    files = {each: [PredictionFile.read(file) for file in those] for each, those in listed.items()}
    mine = {source: match_columns(columns, files[source])}
    for each in against:
        try:
            mine[each] = match_columns(columns.with_columns(against_columns, "--against-columns"), files[each])
        except BadFile as error:
            raise BadFile(str(error).replace("--columns", "--against-columns"), error.address) from None
    _check_candidates(mine)
    with writing(out, "an evaluation", "give another folder with --out", queue=True):
        measured = {
            names[each]: _measure_files(mine[each], those, each, rules.resamples) for each, those in files.items()
        }
        judged = tuple(task.name for task in mine[source].tasks if task.name not in columns.outcomes)
        facts = {"predictions": source, "files": f"{len(files[source]):,}"}
        facts |= {"columns": ", ".join(f"{part}={name}" for part, name in mine[source].by_part().items() if name)}
        results = Results(measured, judged, rules, f"Evaluation of {names[source]}", facts)
        write_results(results, out)
    return results


def _measure_files(
    columns: PredictionColumns, files: Sequence[PredictionFile], source: str, resamples: int
) -> MeasuredModel:
    rows, slices = read_predictions(columns, files)
    weights = {task.name: task.weight for task in columns.tasks}
    facts = {"predictions": source, "files": len(files), "columns": columns.by_part(), "relevance_weights": weights}
    seen = learnt_from(file.address for file in files)
    return rows.measure(resamples, slices, facts, address=source, seen=seen)


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


def _check_candidates(by_source: Mapping[str, PredictionColumns]) -> None:
    """Raises UserError where only some predictions have candidates, by which rows are told to be the same."""
    candidates = {each: columns.names.get("candidate") for each, columns in by_source.items()}
    if None in candidates.values() and (named := [name for name in candidates.values() if name is not None]):
        without = next(each for each, name in candidates.items() if name is None)
        lacks = f"'{without}' has no column '{named[0]}', and the predictions that it is compared with have one"
        raise UserError(f"{lacks}: either all need it, or none")
