"""From a log to encoded rows: fits the features, encodes each split, keeps both until what they depend on changes.

    <work>/features/
        manifest.json          fingerprint, log digest, times, files left out, what was not checked, rows and labels of
                               each split
        files.json             the files of the logs that were taken in or left out (see `IncludedFiles`)
        serving/               fitted features, what requests after the log's end can ask for, latest attributes
        counts/                what was counted to fit them, so that days can be added (`extend`)
        requests/              requests.parquet: times and users of requests, so that rows of one that come later
                               are recognised; rows.parquet: hashes of all rows, so that those that come again are
        encoded/layout.json    order of the rows' inputs and labels
        encoded/{train,validation,test}/part-00000.parquet

The folder appears whole or not at all.
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

# For those that come while features are built, and for those who would build them while they are read.
BUILD_LOCK_TEXTS = ("a build of features", "set `data.work_dir` to another folder")


@dataclass(frozen=True)
class FeatureFolder:
    """A folder of fitted features and encoded rows. left_out: features and tasks that its readers never see, see
    `Layout.without`."""

    folder: Path
    left_out: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())

    @property
    def layout(self) -> Layout:
        """Order of the rows' inputs and labels."""
        return Layout.read(self.folder / "encoded").without(*self.left_out)

    @property
    def manifest(self) -> dict[str, Any]:
        """What was built from what."""
        return json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))

    @property
    def serving(self) -> Path:
        """Folder of the fitted features, with what they remember and latest attributes."""
        return self.folder / "serving"

    def split(self, name: str) -> Path:
        """Folder of a split's encoded rows."""
        return self.folder / "encoded" / name

    @property
    def is_extended(self) -> bool:
        """Whether days were added, so that there may be no log from which these features could be built anew."""
        return "extends" in self._manifest_or_none

    def is_up_to_date(self, logs: Logs, windows: dict[str, Window], allow_missing_files: bool) -> bool:
        """Whether these are features of the log by this schema and these splits, with all its files as they are and all
        the checks that are asked for.

        allow_missing_files: whether files may be gone that they hold, if the log has the same address.
        """
        manifest, options, changes = self._manifest_or_none, logs.options, self._changes(logs)
        if not changes or manifest.get("settings") != settings_fingerprint(logs.schema, windows):
            return False
        if any(each.changed or each.new for each in changes):
            return False
        allow_missing_files = allow_missing_files and manifest["log"] == logs.log.source
        if not allow_missing_files and any(each.missing or each.bad for each in changes):
            return False
        if options.on_conflicting_times == "error" and (manifest["requests"] or {}).get("conflicting_times"):
            return False
        if not set(manifest["skipped_checks"]) <= set(options.skipped_checks):
            return False
        # A file that an extension left out may be fine by now but for its times, and is no reason to lose days.
        return options.skip_bad_files or self.is_extended or not any(each.skipped for each in changes)

    def missing(self, logs: Logs) -> list[str]:
        """Files that these features hold and the logs don't."""
        return [uri for each in self._changes(logs) for uri in each.missing]

    def _changes(self, logs: Logs) -> list[FileChanges]:
        """What has become of the files; none where there are no features."""
        try:
            return IncludedFiles.read(self.folder).changes(logs)
        except UserError:
            return []

    def require_rows(self, *splits: str) -> None:
        """Raises UserError where a split has no rows, as it may be after an extension."""
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
    """Fitted features and encoded rows; existing ones are taken if they are still right."""
    return prepare(BuildInputs.of(settings))


def prepare(inputs: BuildInputs, *, keep_existing: bool = False) -> FeatureFolder:
    """Fits and encodes, or takes what is there if log, schema and split are the same.

    Features to which days were added stay where files have gone since, as `find_existing_features` says; others are
    built anew.

    keep_existing: whether a model goes on from the existing features, so that these stay although files are gone.

    Raises UserError where the log can't be read or would take in what is built, a split is empty, a binary task has one
    class in training, or features would be replaced that hold rows of files that are gone.
    """
    check_work_outside_logs(inputs.source, inputs.schema, inputs.work)
    features, logs, windows = FeatureFolder(inputs.work / "features"), inputs.logs, inputs.windows

    def stand() -> bool:
        return features.is_up_to_date(logs, windows, allow_missing_files=keep_existing or features.is_extended)

    if not stand():
        with write_lock(features.folder, *BUILD_LOCK_TEXTS, wait=True):
            # Another process may have built them while this one waited.
            if not stand():
                _check_replaceable(features, logs)
                with atomic_folder(features.folder) as folder:
                    _build(logs, windows, folder)
    return features


def _check_replaceable(features: FeatureFolder, logs: Logs) -> None:
    """Raises UserError where files are gone that extended features hold; for others it only says so."""
    missing = features.missing(logs)
    if missing and not features.is_extended:
        such_as = f"({len(missing):,}, such as '{missing[0]}')"
        say(f"files that the features hold are gone {such_as}: the features are built anew without them")
    elif missing:
        raise UserError(
            f"the features in '{features.folder}' are not of this log and these settings, and hold rows of files that "
            f"are gone ({len(missing):,}, such as '{missing[0]}'), which building them anew would lose. To go "
            "on from them, "
            "add new files with --extend, or restore the settings; to build features from the log as it is, remove "
            "that folder first"
        )


def find_existing_features(inputs: BuildInputs) -> FeatureFolder | None:
    """Features of this schema and these splits that hold all files of the log as they are, or None.

    They may also hold rows of files that are gone. Raises UserError if the log can't be read or takes in what is built.
    """
    check_work_outside_logs(inputs.source, inputs.schema, inputs.work)
    features = FeatureFolder(inputs.work / "features")
    return features if features.is_up_to_date(inputs.logs, inputs.windows, allow_missing_files=True) else None


@contextmanager
def lock_features(
    inputs: BuildInputs, what: str, splits: Sequence[str] = (), keep_existing: bool = False
) -> Iterator[FeatureFolder]:
    """Features, newly built or existing (see `prepare`), that nobody replaces meanwhile.

    what: uses them, such as "a training"; splits: that must have rows.
    """
    while True:
        features = prepare(inputs, keep_existing=keep_existing)
        with read_lock(features.folder, what):
            # Before the lock was taken, another process may have built others.
            if find_existing_features(inputs) is not None:
                features.require_rows(*splits)
                yield features
                return


def encode_splits(pipeline_dir: Path, logs: Logs, windows: dict[str, Window], folder: Path) -> dict[str, SplitCounts]:
    """Encodes splits of a log with features that were fitted to another one, as `folder`/SPLIT.

    pipeline_dir: folder of the fitted features; windows: of validation or test. Counters and histories remember the log
    that is encoded. Files that are left out are said. Raises UserError for a split without rows.
    """
    with atomic_folder(folder) as encoded, BuildSteps(logs, windows, encoded / "scratch") as steps:
        counted = steps.count(statistics=False)
        check_splits(counted, windows, logs.log.source, logs.schema.split)
        stores = encoded / "scratch" / "compacted"
        stores.mkdir(parents=True)
        last = counted.last
        steps.look_up(FeaturePipeline.load(pipeline_dir, stores=False), stores, last + 1, None)
        counts = steps.encode(pipeline_dir, encoded, dict.fromkeys(windows, last))
        for each in (left for log in steps.logs.all for left in log.skipped):
            say(f"left out: {each.reason}")
    return counts


def compute_fingerprint(logs: Logs, windows: object) -> str:
    """Changes when a file of the logs is written again, even with the same size, and with what identifies features in
    the schema, or with splits (`windows`, or what else rows depend on, as JSON); not with what a model makes of
    features."""
    found = [
        [
            [(file.uri, file.bytes, file.version, file.path_columns) for file in each.files],
            [left.uri for left in each.skipped],
        ]
        for each in logs.all
    ]
    # Keys in the order of the settings: that of features and tasks is the order of the layout.
    return _digest(FORMAT, found, logs.schema.identity(), windows)


def settings_fingerprint(schema: Schema, windows: dict[str, Window]) -> str:
    """A fingerprint of all that features depend on besides the logs."""
    return _digest(FORMAT, schema.identity(), windows)


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _build(logs: Logs, windows: dict[str, Window], folder: Path) -> None:
    with BuildSteps(logs.without_copies(), windows, folder / "scratch") as steps:
        counted = steps.count(statistics=True, requests_dir=folder / "requests")
        check_splits(counted, windows, logs.log.source, logs.schema.split)
        pipeline = FeaturePipeline(logs.schema)
        pipeline.merge(counted.counts, counted.key_types)
        pipeline.finish_fit()
        manifest = write_features(
            steps, pipeline, counted, IncludedFiles.of(steps.logs, counted.spans), windows, folder
        )
    write_manifest(folder, {"fingerprint": compute_fingerprint(logs, windows), **manifest})


def check_splits(counted: LogCounts, windows: Mapping[str, Window], log: str, split: SplitColumn | None = None) -> None:
    """Raises UserError where a split has no rows. split: the column that says it, None where times do."""
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
    """The sentence on features that have no rows of a split, which only an extension leaves behind."""
    return (
        f"the features in '{folder}' have no {split} rows: days were added to them, so only the new rows are encoded, "
        "and none of these lies in that split. Set `split` around the requests of the next new files before you add "
        "them with --extend, or set another `data.work_dir`, where features are built anew from all files of the log"
    )


def check_classes(schema: Schema, counts: SplitCounts) -> None:
    """Raises UserError where a task has nothing to learn from in the training rows."""
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
    """Writes what was fitted and encodes the rows, into an empty folder; gives what a manifest says of that.

    pipeline: with complete vocabularies; taken: all files whose rows the features hold; before: folder with the
    memories to go on from, whose statistics stay. Raises UserError where a new task has nothing to learn from.
    """
    serving, counts, logs, train = folder / "serving", folder / "counts", steps.logs, windows["train"]
    for each in (serving, counts):
        each.mkdir()
    for name, its in pipeline.counts.items():
        pq.write_table(its.to_table(), counts / f"{name}.parquet", compression="zstd")
    counted.save_latest(serving)
    first, last = counted.first, counted.last
    steps.look_up(pipeline, serving, end=last + 1, training=train if previous is None else None, previous=previous)
    if previous is None:
        pipeline.finish_fit_results()
    pipeline.booleans.update(*(file.booleans for log in logs.all for file in log.files))
    pipeline.save(serving)
    assert train[1] is not None
    # Training may use only labels that had matured when training ended; evaluation waits until the log's end.
    splits = steps.encode(serving, folder / "encoded", {"train": train[1], "validation": last, "test": last})
    if previous is None:
        check_classes(logs.schema, splits["train"])
    included.write(folder)
    (log, *events), columns = included.logs, logs.schema.columns
    return {
        "settings": settings_fingerprint(logs.schema, windows),
        "log": logs.log.source,
        "digest": log.digest,
        "files": len(log.files),
        "rows": log.rows,
        "events": {
            each.name: {"files": len(included.files), "rows": included.rows}
            for each, included in zip(logs.events, events, strict=True)
        },
        "skipped": [{"file": each.uri, "reason": each.reason} for each in included.skipped],
        "skipped_checks": logs.options.skipped_checks,
        "first_request": format_time(first) if columns.has_time else None,
        "last_request": format_time(last) if columns.has_time else None,
        "request_microseconds": [first, last],
        "requests": None if columns.request is None else steps.requests.describe(),
        "splits": {name: asdict(each) for name, each in splits.items()},
        # The ids of each vocabulary that training rows held, and those that have a row of their own.
        "vocabularies": {
            name: {"distinct": each.counts.to_table().num_rows, "known": len(each.ids)}
            for name, each in pipeline.vocabularies.items()
        },
    }


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes `manifest.json`."""
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
