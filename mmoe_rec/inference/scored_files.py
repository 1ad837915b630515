"""What a scoring reads of a log, and the folder that gets the scores.

It reads the columns of the model's features, and labels only where these are remembered (`open_logs`). The output
appears whole:

<output>/_manifest.json            what was scored by which model
<output>/part-00000.parquet       the scored rows, in the input's order

`LearntRows` counts the rows that the model has learnt from, whose metrics flatter it.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyarrow.types as pt

from mmoe_rec.errors import UserError
from mmoe_rec.features.encoder import Results
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.inference.ranking import ROW, prediction_columns
from mmoe_rec.log.checks import columns_of
from mmoe_rec.log.columns import column_uses
from mmoe_rec.log.files import find_files, is_remote, local_path, takes_in
from mmoe_rec.log.reader import LogPart, LogReader
from mmoe_rec.log.rows import ROWS_AT_A_TIME, LogRows
from mmoe_rec.point_in_time.join import Window, in_window
from mmoe_rec.preprocessing.logs import BuildOptions, Logs, key_types
from mmoe_rec.preprocessing.look_up import ResultReader
from mmoe_rec.settings.log_columns import Scalar, Use
from mmoe_rec.settings.schema import Remembering, Schema
from mmoe_rec.settings.sections import Settings, Split

AsOf = Literal["log", "tables"]
"""Where counters and histories come from: the log, as of each request, or what the model itself remembers."""


def open_logs(
    source: str,
    pipeline: FeaturePipeline,
    settings: Settings,
    as_of: AsOf,
    labels: bool,
    keep: Sequence[str] = (),
) -> "tuple[Logs, list[str], LearntRows | None]":
    """The log to score with the logs of events that its features remember, in the types of the fitted features.

    pipeline: the model's features; labels: whether those of all tasks are read; keep: further columns that are read.
    Gives also the attributes of users and candidates that no file has a column for: the model, as in the server,
    completes them by what it last knew of each; and, with labels, how rows are told that the model has learnt from.
    Raises UserError for a log that is not there, has no rows, or lacks another column, the columns of labels among
    them, and for a key or a kept column that is called like a column that scoring adds.
    """
    files = {each.address: columns_of(each.address) for each in find_files(source, "--input")}
    schema, columns, lacking, learnt = pipeline.schema, pipeline.schema.columns, list[str](), None
    if as_of == "tables":
        has = {"user": columns.has_user, "candidate": columns.has_candidate}
        attributes = [name for name, role in schema.input_columns().items() if has.get(role)]
        there = set(columns.names).union(*files.values())
        lacking = [name for name in attributes if name not in there]
    if labels:
        column = settings.split.column
        learnt = LearntRows(settings.split, column is not None and not all(column in each for each in files.values()))
    read = _read_schema(schema, settings, as_of, lacking, labels)
    if as_of == "log" and not labels:
        _check_labels(*next(iter(files.items())), read)
    options = replace(BuildOptions.of(settings.data), skip_bad_files=False)
    if as_of == "tables":  # requests that are yet to come may be scored by what is known now
        options = replace(options, future_times="keep")
    split_column = None if learnt is None else learnt.column
    of_log, *of_events = key_types(pipeline, read)
    of_log = {name: each for name, each in of_log.items() if name != split_column}  # no feature reads that one
    more: dict[str, Use] = {name: "any" for name in keep if name not in column_uses(read)}
    if split_column is not None:
        more[split_column] = "any"
    predicted = prediction_columns(pipeline.layout)
    added = {*predicted, *(each.replace("predicted", "label", 1) for each in predicted), "score", "rank"}
    added |= {"model", "model_version"} if columns.has_candidate else {"model", "model_version", ROW}
    if taken := next((name for name in (*schema.columns.names, *keep) if name in added), None):
        raise UserError(f"column '{taken}' of the log has the name of a column that scoring writes; rename it")
    return Logs(source, read, options, [of_log, *of_events], more), lacking, learnt


def _read_schema(schema: Schema, settings: Settings, as_of: AsOf, lacking: Collection[str], labels: bool) -> Schema:
    """The part of a model's schema that scoring reads: neither placement, which is absent in serving, nor what rows
    count or are split to, nor what the log lacks, and only those labels and events that counters and histories
    remember, unless all `labels` are asked for."""
    scored = [name for name in schema.features if schema.role_of(name) != "placement"]
    kept = {*scored, *(schema.features[name].shares for name in scored)}
    features = {
        name: feature
        for name, feature in schema.features.items()
        if name in kept and not feature.reads().keys() & set(lacking)
    }
    tasks = set[str | None]()
    if as_of == "log":
        tasks.update(each.task for each in features.values() if isinstance(each, Remembering))
        tasks |= {task.given for name, task in schema.tasks.items() if name in tasks}
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


def _check_labels(address: str, there: Collection[str], schema: Schema) -> None:
    """Raises UserError where a file lacks labels."""
    for task in schema.tasks.values():
        for column in (task.label, *([task.observed_when.column] if task.observed_when else [])):
            if column not in there:
                raise UserError(
                    f"'{address}' has no column '{column}', a label, and counters and histories count what happened "
                    "before: give a log that has it (null in rows of which nothing is known yet), or score with "
                    "--as-of tables, by what the model itself remembers"
                )


FORMAT = 1
_MANIFEST = "_manifest.json"


def finished_name(number: int) -> str:
    """The name of the file of a part of the log."""
    return f"part-{number:05d}.parquet"


def check_output(folder: Path, source: str) -> None:
    """Raise UserError if the output would be read as input, or the folder holds files that are no scores."""
    if takes_in(source, [folder / finished_name(0)]):
        raise UserError(f"--input '{source}' takes in the files of --output '{folder}'; give a folder outside it")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output '{folder}' is a file; give a new or empty folder")
    ours = set[str]() if (manifest := read_manifest(folder)) is None else {_MANIFEST, *manifest["parts"]}
    if others := {each.name for each in folder.iterdir()} - ours if folder.exists() else None:
        raise UserError(
            f"--output '{folder}' holds files that are no scores, such as '{min(others)}'; give a new or empty "
            "folder, or one with scores that may be replaced"
        )


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Read the manifest of a folder of scores. Returns None if there are no scores."""
    try:
        tree = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_ours = isinstance(tree, dict) and tree.get("format") == FORMAT and isinstance(tree.get("parts"), dict)
    return tree if is_ours and "fingerprint" in tree else None


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest of a folder of scores."""
    (folder / _MANIFEST).write_text(json.dumps({"format": FORMAT, **manifest}, indent=1), encoding="utf-8")


def is_whole(folder: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether the files of a manifest are there, with as many rows as it says."""
    try:
        return all(pq.read_metadata(folder / name).num_rows == rows for name, rows in manifest["parts"].items())
    except (OSError, pa.ArrowException):
        return False


def learnt_from(files: Iterable[str]) -> list[str]:
    """What is to be said, after a model's name, of rows that it has learnt from, where `score` wrote them to files."""
    folders = {Path(local_path(each)).parent for each in files if not is_remote(each)}
    sentences = [(read_manifest(each) or {}).get("learnt") for each in sorted(folders)]
    return [each for each in sentences if each is not None]


def text_of(value: Scalar) -> str:
    """A value of a column of splits, so that numbers equal the same as text."""
    return value if isinstance(value, str) else str(int(value))


@dataclass(frozen=True)
class LearntRows:
    """How rows are told that a model was trained, or its best state chosen, on.

    split: that it was trained with; lacks_column: whether the rows lack the column that splits them.
    """

    split: Split
    lacks_column: bool

    @property
    def column(self) -> str | None:
        """The column that has to be read, None where none is needed or it is not there."""
        return None if self.lacks_column else self.split.column

    @property
    def values(self) -> list[str]:
        """Those of the column, as text, by which rows were trained on or chose the best state."""
        return [text_of(each) for each in (*self.split.train, *self.split.validation)]

    def find(self, rows: LogRows) -> np.ndarray:
        """(N,) bool, which rows it has learnt from, as far as that can be told."""
        if self.lacks_column:
            return np.zeros(len(rows), bool)
        if self.column is None:
            windows = self.split.windows()
            return in_window(rows.times(), (windows["train"][0], windows["validation"][1]))
        # As text: a column may hold numbers in one log, and the same as strings in another.
        values = rows.coded(self.column)
        values = (values.cast(pa.int8()) if pt.is_boolean(values.type) else values).cast(pa.string())
        return np.asarray(pc.is_in(values, value_set=pa.array(self.values)).to_numpy(zero_copy_only=False))

    def describe(self, learnt: int, rows: int) -> str | None:
        """What is to be said of them, after the model's name; None where there are none.

        learnt: how many of that many rows it has learnt from.
        """
        if self.lacks_column:
            return (
                f"was trained on some of the rows that column '{self.split.column}' splits, which the input lacks: "
                "metrics of such rows flatter it, and it can't be told whether there are any"
            )
        if not learnt:
            return None
        if self.column is not None:
            rows_told, fix = f"rows with {', '.join(self.values)} in column '{self.column}'", "a file without them"
        else:
            start, end = self.split.train_start, self.split.validation_end
            assert end is not None, "times split the rows"
            since = "" if start is None else f" from {start.isoformat()}"
            rows_told, fix = f"requests{since} before {end.isoformat()}", f"with --start {end.isoformat()}"
        return (
            f"was trained, or its best state chosen, on {rows_told}, as {learnt:,} of the {rows:,} rows are that were "
            f"scored: metrics of them flatter it; score {fix}"
        )


def known_rows(reader: LogReader, results: ResultReader | None, window: Window, part: LogPart) -> Iterator[LogRows]:
    """The rows of a part that lie in the window, some at a time.

    results: what `Steps` looked up for the window, None where rows come without.
    """
    for rows in reader.read(part):
        inside = rows.filter(in_window(rows.times(), window))
        if len(inside):
            looked_up: Results = {} if results is None else results.of(inside.row_numbers)
            yield from LogRows(inside.table, rows.schema, looked_up, inside.row_numbers).cut(ROWS_AT_A_TIME)
