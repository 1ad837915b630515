"""Fit features to a log, encode its splits, and reuse the results until the log or the settings change.

    <work>/features/
        manifest.json          fingerprint, log digest, times, skipped files, skipped checks, rows and labels of
                               each split
        files.json             included and skipped files of the logs (see `IncludedFiles`)
        serving/               fitted features, event stores at the log's end, latest attributes
        counts/                counts behind the fitted features, to add days later (`extend`)
        requests/              requests.parquet: times and users of requests, to recognize later rows of a request;
                               rows.parquet: hashes of all rows, to recognize repeated rows
        encoded/layout.json    order of the rows' inputs and labels
        encoded/{train,validation,test}/part-00000.parquet

The folder is written atomically.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from mmoe_rec.atomic import atomic_folder
from mmoe_rec.errors import UserError
from mmoe_rec.features.layout import Layout
from mmoe_rec.features.pipeline import FORMAT, FeaturePipeline
from mmoe_rec.locks import read_lock, write_lock
from mmoe_rec.log.checks import format_time
from mmoe_rec.point_in_time.join import Window
from mmoe_rec.preprocessing.build_inputs import BuildInputs, FileChanges, IncludedFiles, Logs, check_work_outside_logs
from mmoe_rec.preprocessing.build_steps import BuildSteps
from mmoe_rec.preprocessing.count_and_encode import LogCounts, SplitCounts
from mmoe_rec.progress import say
from mmoe_rec.settings.log_columns import SplitColumn
from mmoe_rec.settings.schema import Schema
from mmoe_rec.settings.sections import Settings

# Texts for messages about the lock: the activity of the process that holds it, and advice for the other process.
BUILD_LOCK_TEXTS = ("a build of features", "set `data.work_dir` to another folder")


@dataclass(frozen=True)
class FeatureFolder:
    """A folder of fitted features and encoded rows.

    Attributes:
        folder: Path of the folder.
        left_out: Features and tasks to hide from readers (see `Layout.without`).
    """

    folder: Path
    left_out: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())

    @property
    def layout(self) -> Layout:
        """Order of the rows' inputs and labels."""
        return Layout.read(self.folder / "encoded").without(*self.left_out)

    @property
    def manifest(self) -> dict[str, Any]:
        """Content of `manifest.json`: the inputs and results of the build."""
        return json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))

    @property
    def serving(self) -> Path:
        """Folder of the fitted features, their event stores, and the latest attributes of users and candidates."""
        return self.folder / "serving"

    def split(self, name: str) -> Path:
        """Return the folder with the encoded rows of the split `name`."""
        return self.folder / "encoded" / name

    @property
    def is_extended(self) -> bool:
        """Whether `extend` added files. A rebuild could then lose rows of files that no longer exist."""
        return "extends" in self._manifest_or_none

    def is_up_to_date(self, logs: Logs, windows: dict[str, Window], allow_missing_files: bool) -> bool:
        """Return whether the features match the logs, the schema and the splits, and passed the checks in the options.

        Args:
            logs: Logs with the schema and the options.
            windows: Time windows of the splits.
            allow_missing_files: Whether features count as up to date although included files were deleted. This applies
                only if the settings still name the log that the features were built from.
        """
        manifest, options, changes = self._manifest_or_none, logs.options, self._changes(logs)
        if not changes or manifest.get("settings") != _settings_fingerprint(logs.schema, windows):
            return False
        if any(log.changed or log.new for log in changes):
            return False
        allow_missing_files = allow_missing_files and manifest["log"] == logs.log.source
        if not allow_missing_files and any(log.missing or log.bad for log in changes):
            return False
        if options.on_conflicting_times == "error" and (manifest["requests"] or {}).get("conflicting_times"):
            return False
        if not set(manifest["skipped_checks"]) <= set(options.skipped_checks):
            return False
        # Features that skipped bad files are built again once `skip_bad_files` is off. Extended features are kept. A
        # rebuild could lose the added days, and the extension may have skipped a file only because of its times.
        return options.skip_bad_files or self.is_extended or not any(log.skipped for log in changes)

    def missing(self, logs: Logs) -> list[str]:
        """Return the URIs of included files that are no longer in `logs`."""
        return [uri for log in self._changes(logs) for uri in log.missing]

    def _changes(self, logs: Logs) -> list[FileChanges]:
        """Return the changes of each log since the build, an empty list without features."""
        try:
            return IncludedFiles.read(self.folder).changes(logs)
        except UserError:
            return []

    def require_rows(self, *splits: str) -> None:
        """Raise UserError if one of `splits` has no rows, which can happen after an extension."""
        counts = self.manifest["splits"]
        for name in splits:
            if name in counts and not counts[name]["rows"]:
                raise UserError(empty_split_message(name, self.folder))

    @property
    def _manifest_or_none(self) -> dict[str, Any]:
        try:
            manifest = self.manifest
        except (OSError, ValueError):
            return {}
        return manifest if isinstance(manifest, dict) else {}


def build_features(settings: Settings) -> FeatureFolder:
    """Return fitted features and encoded rows for `settings`. Reuse existing features that are up to date."""
    return prepare(BuildInputs.of(settings))


def prepare(inputs: BuildInputs, *, keep_existing: bool = False) -> FeatureFolder:
    """Build features, or reuse existing features if log, schema and splits are the same.

    If included files have been deleted since, extended features are reused and other features are rebuilt.

    Args:
        inputs: Logs, schema and options of the build.
        keep_existing: Whether to reuse the features even if files were deleted. A resumed or warm-started training
            needs the same features.

    Raises:
        UserError: The log can't be read or contains the output folder, a split is empty, or a binary task has one class
            in training. Also raised if a rebuild would lose rows of deleted files.
    """
    check_work_outside_logs(inputs.source, inputs.schema, inputs.work)
    features, logs, windows = FeatureFolder(inputs.work / "features"), inputs.logs, inputs.windows

    def is_current() -> bool:
        return features.is_up_to_date(logs, windows, allow_missing_files=keep_existing or features.is_extended)

    if not is_current():
        with write_lock(features.folder, *BUILD_LOCK_TEXTS, wait=True):
            # Another process may have built the features while this process waited for the lock.
            if not is_current():
                _check_replaceable(features, logs)
                with atomic_folder(features.folder) as folder:
                    _build(logs, windows, folder)
    return features


def _check_replaceable(features: FeatureFolder, logs: Logs) -> None:
    """Raise UserError if extended features have rows of deleted files. For other features, print a message."""
    missing = features.missing(logs)
    if missing and not features.is_extended:
        say(f"Rebuilding the features without {len(missing):,} deleted files, such as '{missing[0]}'.")
    elif missing:
        raise UserError(
            f"the features in '{features.folder}' don't match this log and these settings, and a rebuild would lose "
            f"the rows of {len(missing):,} deleted files, such as '{missing[0]}'. To keep the features, add new files "
            "with --extend or restore the settings. To rebuild them from the current log, remove that folder first."
        )


def find_existing_features(inputs: BuildInputs) -> FeatureFolder | None:
    """Return existing features that match `inputs`, or None.

    The features may also contain rows of deleted files.

    Raises:
        UserError: The log can't be read or contains the output folder.
    """
    check_work_outside_logs(inputs.source, inputs.schema, inputs.work)
    features = FeatureFolder(inputs.work / "features")
    return features if features.is_up_to_date(inputs.logs, inputs.windows, allow_missing_files=True) else None


@contextmanager
def lock_features(
    inputs: BuildInputs, what: str, splits: Sequence[str] = (), keep_existing: bool = False
) -> Iterator[FeatureFolder]:
    """Build or reuse features (see `prepare`) and keep other processes from replacing them in the `with` block.

    Args:
        inputs: Logs, schema and options of the build.
        what: Activity of this process, such as "a training run", for the messages of other processes.
        splits: Splits that must have rows.
        keep_existing: Whether to reuse the features although files were deleted.

    Yields:
        The locked features.

    Raises:
        UserError: The features can't be built, or a split has no rows.
    """
    while True:
        features = prepare(inputs, keep_existing=keep_existing)
        with read_lock(features.folder, what):
            # Another process may have replaced the features before this process got the lock.
            if find_existing_features(inputs) is not None:
                features.require_rows(*splits)
                yield features
                return


def encode_splits(pipeline_dir: Path, logs: Logs, windows: dict[str, Window], folder: Path) -> dict[str, SplitCounts]:
    """Encode splits of a log with features that were fitted to another log, and print the skipped files.

    Counters and histories start empty and contain only events of the encoded logs.

    Args:
        pipeline_dir: Folder of the fitted features.
        logs: Logs to read. Rows outside the splits count as events.
        windows: Time windows of the splits to encode (validation or test).
        folder: Output folder, with a subfolder for each split.

    Returns:
        Number of rows and labels of each split.

    Raises:
        UserError: A split has no rows.
    """
    with atomic_folder(folder) as encoded, BuildSteps(logs, windows, encoded / "scratch") as steps:
        counted = steps.count(statistics=False)
        _check_splits(counted, windows, logs.log.source, logs.schema.split)
        stores = encoded / "scratch" / "compacted"
        stores.mkdir(parents=True)
        last = counted.last
        steps.look_up(FeaturePipeline.load(pipeline_dir, stores=False), stores, last + 1, None)
        counts = steps.encode(pipeline_dir, encoded, dict.fromkeys(windows, last))
        for file in (file for log in steps.logs.all for file in log.skipped):
            say(f"left out: {file.reason}")
    return counts


def compute_fingerprint(logs: Logs, windows: object) -> str:
    """Return a fingerprint of the features' inputs.

    The fingerprint changes if a file is rewritten, even with the same size, or if the features or the splits change.
    Settings of the model don't affect the fingerprint.

    Args:
        logs: Logs with the schema.
        windows: Time windows of the splits, or other values that the rows depend on. They must be JSON values.
    """
    files = [
        [
            [(file.uri, file.bytes, file.version, file.path_columns) for file in log.files],
            [file.uri for file in log.skipped],
        ]
        for log in logs.all
    ]
    # Don't sort keys: the order of features and tasks in the settings is their order in the layout.
    return _digest(FORMAT, files, logs.schema.identity(), windows)


def _settings_fingerprint(schema: Schema, windows: dict[str, Window]) -> str:
    """Return a fingerprint of the schema and the splits, without the logs."""
    return _digest(FORMAT, schema.identity(), windows)


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _build(logs: Logs, windows: dict[str, Window], folder: Path) -> None:
    with BuildSteps(logs.without_copies(), windows, folder / "scratch") as steps:
        counted = steps.count(statistics=True, requests_dir=folder / "requests")
        _check_splits(counted, windows, logs.log.source, logs.schema.split)
        pipeline = FeaturePipeline(logs.schema)
        pipeline.merge(counted.counts, counted.key_types)
        pipeline.finish_fit()
        manifest = write_features(
            steps, pipeline, counted, IncludedFiles.of(steps.logs, counted.spans), windows, folder
        )
    write_manifest(folder, {"fingerprint": compute_fingerprint(logs, windows), **manifest})


def _check_splits(counted: LogCounts, windows: Mapping[str, Window], log: str, split: SplitColumn | None) -> None:
    """Raise UserError if one of the splits in `windows` has no rows."""
    for name in windows:
        if counted.rows[name] == 0 and split is not None:
            listed = ", ".join(map(repr, split.values[name]))
            raise UserError(
                f"the {name} split is empty: no row of the log '{log}' has {listed} in column '{split.column}'; "
                f"list its values under split.{name}"
            )
        if counted.rows[name] == 0:
            raise UserError(
                f"the {name} split is empty: the log '{log}' has requests from {format_time(counted.first)} to "
                f"{format_time(counted.last)}; set `split.train_end`, `split.validation_end` and `split.test_end` "
                "inside that span (and `columns.time_unit`, if these times are wrong)"
            )


def empty_split_message(split: str, folder: Path) -> str:
    """Return the error message for a split without rows, which only an extension can cause.

    Args:
        split: Name of the split.
        folder: Folder of the features.
    """
    return (
        f"the features in '{folder}' have no {split} rows: days were added, so only the new rows are encoded, and no "
        "new row is in that split. Set `split` around the requests of the next new files before you add them with "
        "--extend, or set another `data.work_dir` to rebuild the features from all files of the log"
    )


def check_classes(schema: Schema, counts: SplitCounts) -> None:
    """Raise UserError if a task has no observed label in training, or a binary task only one class.

    Args:
        schema: Schema with the tasks.
        counts: Label counts of the training split.
    """
    for name, task in schema.tasks.items():
        observed, positive = counts.observed[name], counts.label_sum[name]
        if observed == 0:
            reasons = [f"column '{task.label}' is null in all training rows"]
            if task.observed_when is not None:
                reasons.append(f"column '{task.observed_when.column}' never equals {task.observed_when.equals!r}")
            if task.conditional_on is not None:
                reasons.append(f"task '{task.conditional_on}' never happened where it has a value")
            if task.label_delay_days:
                reasons.append(f"no label had matured by split.train_end, {task.label_delay_days:g} days after it")
            raise UserError(
                f"task '{name}' has no observed label in training: {', or '.join(reasons)}; "
                "give it labels, train on a longer period, or remove the task"
            )
        if task.kind.is_binary and positive in (0, observed):
            raise UserError(
                f"task '{name}' has one class in training: all {observed} observed labels in column '{task.label}' "
                f"are {positive / observed:g}; a task needs both 0 and 1, so train on a longer period or remove it"
            )


def write_features(
    steps: BuildSteps,
    pipeline: FeaturePipeline,
    counted: LogCounts,
    included: IncludedFiles,
    windows: dict[str, Window],
    folder: Path,
    previous: Path | None = None,
) -> dict[str, Any]:
    """Write fitted features and encoded rows to an empty folder.

    Args:
        steps: Open steps of the build.
        pipeline: Features with complete vocabularies.
        counted: Counts of the log.
        included: All files whose rows the features contain.
        windows: Time windows of the splits.
        folder: Output folder.
        previous: `serving` folder with the event stores to extend, None for a new build.

    Returns:
        Content of the manifest without the fingerprint.

    Raises:
        UserError: In a new build, a task has no observed label in training, or a binary task only one class.
    """
    serving, counts, logs, train = folder / "serving", folder / "counts", steps.logs, windows["train"]
    for subfolder in (serving, counts):
        subfolder.mkdir()
    for name, value_counts in pipeline.counts.items():
        pq.write_table(value_counts.to_table(), counts / f"{name}.parquet", compression="zstd")
    counted.save_latest(serving)
    first, last = counted.first, counted.last
    steps.look_up(pipeline, serving, end=last + 1, training=train if previous is None else None, previous=previous)
    if previous is None:
        pipeline.finish_fit_results()
    pipeline.booleans.update(*(file.booleans for log in logs.all for file in log.files))
    pipeline.save(serving)
    assert train[1] is not None
    # Training may use only labels that were final when the training split ended. Evaluation may use all labels that are
    # final at the log's end.
    splits = steps.encode(serving, folder / "encoded", {"train": train[1], "validation": last, "test": last})
    if previous is None:
        check_classes(logs.schema, splits["train"])
    included.write(folder)
    (log, *events), columns = included.logs, logs.schema.columns
    return {
        "settings": _settings_fingerprint(logs.schema, windows),
        "log": logs.log.source,
        "digest": log.digest,
        "files": len(log.files),
        "rows": log.rows,
        "events": {
            log_files.name: {"files": len(event_log.files), "rows": event_log.rows}
            for log_files, event_log in zip(logs.events, events, strict=True)
        },
        "skipped": [{"file": file.uri, "reason": file.reason} for file in included.skipped],
        "skipped_checks": logs.options.skipped_checks,
        "first_request": format_time(first) if columns.has_time else None,
        "last_request": format_time(last) if columns.has_time else None,
        "request_microseconds": [first, last],
        "requests": None if columns.request is None else steps.requests.describe(),
        "splits": {name: asdict(split_counts) for name, split_counts in splits.items()},
        # distinct: number of IDs in the training rows. known: number of IDs in the vocabulary.
        "vocabularies": {
            name: {"distinct": vocabulary.counts.to_table().num_rows, "known": len(vocabulary.ids)}
            for name, vocabulary in pipeline.vocabularies.items()
        },
    }


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest as `manifest.json`.

    Args:
        folder: Existing folder for the file.
        manifest: Manifest of the features.
    """
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
