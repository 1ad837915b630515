"""What a scoring reads of a log: the columns of the model's features, and labels only where these are remembered."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import reduce
from typing import Literal

from mmoe_rec.errors import UserError
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.inference.ranking import ROW, key_columns, prediction_columns
from mmoe_rec.log.files import find_files
from mmoe_rec.log.values import columns_of
from mmoe_rec.preprocessing.logs import BuildOptions, Logs
from mmoe_rec.settings.schema import Remembering, Schema

ADDED = ("score", "rank", "model", "model_version")
AsOf = Literal["log", "tables"]
"""Where counters and histories come from: the log, as of each request, or what the model itself remembers."""


def logs_to_score(
    source: str,
    pipeline: FeaturePipeline,
    schema: Schema,
    options: BuildOptions,
    as_of: AsOf,
    lacking: Collection[str] = (),
    labels: bool = False,
    split_column: str | None = None,
) -> Logs:
    """The log to score with the logs of events that its features remember, in the types of the fitted features.

    pipeline: the model's features; schema: theirs, with the paths of the logs of events; lacking: columns that the
    model completes, as `attributes_lacking` gives them; labels: whether those of all tasks are read; split_column:
    one to be read besides. Raises UserError for a log that is not there, has no rows, or lacks another column, the
    columns of labels among them.
    """
    find_files(source, "--input")  # in words of this command
    read = read_schema(schema, as_of, lacking, labels)
    if as_of == "log":
        _check_labels(source, read)
    # Requests that are yet to come may be scored by what is known now.
    future_times = "keep" if as_of == "tables" else options.future_times
    options = replace(options, skip_bad_files=False, future_times=future_times)
    kinds = pipeline.key_types
    # The time column of events may be named like a key of the log.
    of_log = {name: each for name, each in kinds.items() if name != split_column}  # no feature reads that one
    types = [of_log, *({name: kinds[name] for name in kinds if name != each.time} for each in read.events.values())]
    return Logs(source, read, options, types, None if split_column is None else {split_column: "any"})


def label_column(task: str) -> str:
    """The column that holds a task's labels, or an outcome's, where they are written."""
    return f"label_{task}"


def check_names(pipeline: FeaturePipeline) -> None:
    """Raises UserError where a key of the log is called like a column that scoring adds."""
    added = ADDED if pipeline.schema.columns.has_candidate else (*ADDED, ROW)
    for name in key_columns(pipeline.schema):
        predicted = prediction_columns(pipeline.layout)
        if name in {*predicted, *(label_column(each.removeprefix("predicted_")) for each in predicted), *added}:
            raise UserError(f"column '{name}' of the log has the name of a column that scoring writes; rename it")


def attributes_lacking(source: str, schema: Schema) -> list[str]:
    """Attributes of users and candidates that no file of a log has a column for: the model, as in the server, completes
    them by what it last knew of each."""
    columns = schema.columns
    known = {"user": columns.has_user, "candidate": columns.has_candidate}
    left = [name for name, role in schema.input_columns().items() if known.get(role) and name not in columns.names]
    for file in find_files(source, "--input"):
        if not left:
            break
        there = columns_of(file.address)
        left = [name for name in left if name not in there]
    return left


def columns_of_all(source: str) -> set[str]:
    """Those that all files of a log have."""
    return reduce(set.intersection, (columns_of(file.address) for file in find_files(source, "--input")))


def read_schema(schema: Schema, as_of: AsOf, lacking: Collection[str] = (), labels: bool = False) -> Schema:
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
    tasks: set[str | None] = set()
    if as_of == "log":
        tasks = {each.task for each in features.values() if isinstance(each, Remembering)}
        tasks |= {task.given for name, task in schema.tasks.items() if name in tasks}
    if labels:
        tasks = set(schema.tasks)
    return schema.model_copy(
        update={
            "features": features,
            "tasks": {name: task for name, task in schema.tasks.items() if name in tasks},
            "events": schema.events if as_of == "log" else {},
            "columns": schema.columns.model_copy(
                update={"sampling_rate": None, "weight": schema.columns.weight if labels else None}
            ),
            "split": None,
        }
    )


def _check_labels(source: str, schema: Schema) -> None:
    """Raises UserError where the first file of a log has no labels to count."""
    first = find_files(source)[0].address
    there = columns_of(first)
    for column, feature in _labels(schema):
        if column not in there:
            raise UserError(
                f"'{first}' has no column '{column}', a label by which feature '{feature}' knows what happened before: "
                "give a log that has it (null in rows of which nothing is known yet), or score with --as-of tables, by "
                "what the model itself remembers"
            )


def _labels(schema: Schema) -> Iterator[tuple[str, str]]:
    """Columns of labels, each with a feature that remembers it."""
    for name, feature in schema.features.items():
        if isinstance(feature, Remembering) and feature.task is not None:
            task = schema.tasks[feature.task]
            for each in (task, *([schema.tasks[task.given]] if task.given else [])):
                yield each.label, name
                if each.observed_when is not None:
                    yield each.observed_when.column, name
