"""Adds new files of a log to existing features: the state of the days before and the new rows give the next state.

README.md says what stays as it was, and what becomes of rows that come late or again.

The tables of a model (`<artifact>/features`) move on by themselves, by the model's own features: `extend_tables` adds
new files to them; `remake_tables` makes them of all files. From the same rows both give the same files to the last
byte, but for a history that remembers an item in the hashed bucket where it was before its id got a row: one that is
made anew has that row.
"""

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec.atomic import atomic_folder
from mmoe_rec.errors import UserError, first_line
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.locks import writing
from mmoe_rec.log.checks import format_time
from mmoe_rec.log.rows import require_all
from mmoe_rec.point_in_time.join import Window
from mmoe_rec.preprocessing.build_steps import Steps
from mmoe_rec.preprocessing.count_and_encode import LogCounts
from mmoe_rec.preprocessing.logs import BuildInputs, HeldFiles, Logs, check_apart, read_journal_name, say_copies
from mmoe_rec.preprocessing.prepare import BUILD, FeatureFolder, fingerprint_of, write_features, write_manifest
from mmoe_rec.preprocessing.requests import Requests
from mmoe_rec.progress import say
from mmoe_rec.settings.schema import Schema
from mmoe_rec.settings.sections import differences


class NewFiles:
    """The new files of logs. taken: those that `holder` knows, in the plural, such as "the features in 'work'", with
    requests up to `last`, microseconds; anew: what to do where files can't be added; gone: those that the logs lack.

    Raises UserError where a file that was taken in has changed, or no new file can be used.
    """

    def __init__(self, logs: Logs, taken: HeldFiles, holder: str, last: int, anew: str) -> None:
        self.logs, self.holder, self.last, self.anew = logs, holder, last, anew
        self.changes = taken.changes(logs)
        self.taken = HeldFiles([each.held for each in self.changes])
        self._check_unchanged()
        self.gone = [address for each in self.changes for address in each.gone]
        say_copies([each.copies for each in self.changes])
        if not self.any and (bad := [left for each in self.changes for left in each.bad]):
            raise UserError(
                f"none of the new files of the log '{logs.log.source}' can be used; the first: {bad[0].reason}"
            )

    @property
    def any(self) -> bool:
        """Whether there is a new file."""
        return any(each.new for each in self.changes)

    def only(self) -> Logs:
        """The logs with only their new files to read. Raises UserError where there are no rows to read."""
        old = [log.found.keys() - each.new for log, each in zip(self.logs.all, self.changes, strict=True)]
        return self.logs.rest(old)

    def count(self, steps: Steps, statistics: bool, kept: Path, before: Path) -> LogCounts:
        """Counts the rows of the new files. kept, before: folders of requests, see `Steps.count`. Raises UserError
        where rows can't be added."""
        counted = steps.count(statistics=statistics, kept=kept, before=before)
        self._check_late(counted, steps)
        self._check_events(counted, steps.logs)
        return counted

    def begin(self, counted: LogCounts, requests: Requests) -> int:
        """Microseconds of the first new request."""
        return requests.begin if self.logs.schema.columns.request is not None else counted.first

    def _check_unchanged(self) -> None:
        reasons = {each.address: each.reason for log in self.logs.all for each in log.left_out}
        for address in (address for each in self.changes for address in each.changed):
            what = f"can't be used any more ({reasons[address]})" if address in reasons else "has changed"
            raise UserError(f"'{address}' {what} since {self.holder} were built from it; put it back, or {self.anew}")

    def _check_late(self, counted: LogCounts, steps: Steps) -> None:
        """Tells of requests that are no later than those held. Raises UserError where they may be the same ones."""
        first, known = self.begin(counted, steps.requests), self.last
        spans = {file.address: counted.spans.get((None, file.address)) for file in steps.logs.log.files}
        late = [address for address, span in spans.items() if span is not None and span[0] <= known]
        if first > known or not late:
            return
        earlier = steps.requests.earlier
        if earlier is not None and any(read_journal_name(address) is None for address in late):
            raise UserError(
                f"'{late[0]}' holds a row requested at {format_time(earlier)}, which is earlier than rows of its "
                f"request that {self.holder} hold already. They would get its time. Take such rows out of the log, or "
                f"{self.anew}"
            )
        such_as = f"'{late[0]}'" + (f" and {len(late) - 1:,} other new files" if len(late) > 1 else "")
        say(
            f"{such_as} came late, with requests from {format_time(first)} on, as {self.holder} know requests up to "
            f"{format_time(known)} already: the late rows count, but are no rows to train on, as what they could have "
            "known is no longer remembered"
        )

    def _check_events(self, counted: LogCounts, new: Logs) -> None:
        """Raises UserError where new files may hold all events of a file that is gone: as many, of its times. Tells of
        those that may hold the events of a file that is still there."""
        if new.options.on_duplicates == "keep":
            return
        for log, changes in zip(new.events, self.changes[1:], strict=True):
            spans = {file: counted.spans.get((log.name, file.address)) for file in log.files}  # None without rows
            for old in changes.held.files.values():
                if old.first is None or old.last is None:
                    continue
                near = [file for file, span in spans.items() if span and span[0] <= old.last and span[1] >= old.first]
                times = [time for file in near for time in spans[file] or ()]
                covered = near and min(times) <= old.first and max(times) >= old.last
                if not covered or sum(file.rows for file in near) < old.rows:
                    continue
                told = f"new files of events '{log.name}', such as '{near[0].address}', may hold the events of "
                told += f"'{old.address}': they are of its times, and at least as many. "
                if old.address not in changes.gone:
                    say(f"{told}If they are the same, they count twice: remove the new files, and {self.anew}")
                    continue
                raise UserError(
                    f"{told}It is gone: put it back and remove the new ones, or {self.anew}. If they are others, set "
                    "data.on_duplicates to keep"
                )


ANEW = "build the features anew, without --extend"


@dataclass(frozen=True)
class Extension:
    """Features with `files` that were added. rows: new ones of the interaction log; new_ids: by feature; gone: files
    that the features hold and the log does not."""

    features: FeatureFolder
    files: int
    rows: int
    new_ids: Mapping[str, int]
    gone: Sequence[str]


def extend(inputs: BuildInputs) -> Extension | None:
    """Add new files to the features in `work`. An error leaves the old features.

    Args:
        inputs: Log, schema and folder, with the splits of the new rows.

    Returns:
        The extension, None without new files.

    Raises:
        UserError: There are no features of this schema. An old file has changed. New rows may repeat old requests, or
            new events those of a removed file. No new request is later than the old ones, or none lies in a split. A
            file can't be read.
    """
    schema = inputs.schema
    require_all(schema, "adding days to features")
    check_apart(inputs.source, schema, inputs.work)
    features = FeatureFolder(inputs.work / "features")
    if not (features.folder / "manifest.json").is_file():
        raise UserError(f"'{features.folder}' holds no features that could be extended; build them without --extend")
    with writing(features.folder, *BUILD, queue=True):
        _check_schema(features, schema)
        taken = HeldFiles.read(features.folder)
        logs = Logs(inputs.source, schema, inputs.options, [log.types for log in taken.logs])
        last = features.manifest["request_microseconds"][1]
        files = NewFiles(logs, taken, f"the features in '{features.folder}'", last, ANEW)
        if not files.any:
            return None
        with atomic_folder(features.folder) as folder:
            extended = _extend(features, files, inputs.windows, folder)
    return extended


def _check_schema(features: FeatureFolder, schema: Schema) -> None:
    before = FeaturePipeline.load(features.serving, memories=False).schema
    found = next(differences(before.identity(), schema.identity()), None)
    for section in ("tasks", "features", "events"):  # layouts, look-ups and files follow their order
        old_order, order = list(getattr(before, section)), list(getattr(schema, section))
        if found is None and old_order != order:
            found = (section, f"in the order {', '.join(old_order)}", f"in the order {', '.join(order)}")
    if found is not None:
        where, old, new = found
        raise UserError(
            f"setting '{where}' is {old} in the features in '{features.folder}' and {new} now; {ANEW}, or "
            "restore the setting"
        )


def _extend(before: FeatureFolder, files: NewFiles, windows: dict[str, Window], folder: Path) -> Extension:
    logs, new, was = files.logs, files.only(), before.manifest
    first, last = was["request_microseconds"]
    # The splits without the time of old requests.
    later = {name: (last + 1 if start is None else max(start, last + 1), end) for name, (start, end) in windows.items()}
    with Steps(new, later, folder / "scratch") as steps:
        counted = files.count(steps, statistics=True, kept=folder / "requests", before=before.folder / "requests")
        new = steps.logs
        taken = files.taken.with_new(new, counted.spans)
        _check_splits(files, counted, steps)
        pipeline = FeaturePipeline.load(before.serving, memories=False)
        try:
            for name, counts in pipeline.counts.items():
                counts.merge(type(counts).from_table(pq.read_table(before.folder / "counts" / f"{name}.parquet")))
        except (OSError, pa.ArrowException, KeyError) as error:
            raise UserError(f"'{before.folder}/counts' is lost or damaged ({first_line(error)}): {ANEW}") from None
        pipeline.merge(counted.counts, counted.key_types)
        new_ids = pipeline.grow()
        counted.add_latest_of(before.serving, logs.schema)
        counted.first = min(first, counted.first)
        manifest = write_features(steps, pipeline, counted, taken, windows, folder, before.serving.resolve())
    whole = fingerprint_of(logs, windows)
    # Not that of a build of all files, whose ids have other rows: a model knows its features by the fingerprint.
    fingerprint = hashlib.sha256(f"{was['fingerprint']} {whole}".encode()).hexdigest()[:16]
    manifest["unchecked"] = sorted({*was["unchecked"], *logs.options.unchecked})
    write_manifest(folder, {"fingerprint": fingerprint, **manifest, "extends": was["fingerprint"]})
    return Extension(before, sum(len(each.files) for each in new.all), counted.seen[None], new_ids, files.gone)


def _check_splits(files: NewFiles, counted: LogCounts, steps: Steps) -> None:
    if any(counted.rows.values()):
        return
    first, rows = files.begin(counted, steps.requests), steps.logs.log.rows
    if not counted.seen[None] or first > counted.last or counted.last <= files.last:
        raise UserError(
            f"none of the {rows:,} new rows is of a new request later than {format_time(files.last)}, up to when "
            f"{files.holder} hold requests, so none of them would be encoded: add them together with those of later "
            f"requests, with ids that were not used before, or {files.anew}"
        )
    raise UserError(
        f"none of the {rows:,} new rows lies in a split: they were requested from {format_time(first)} to "
        f"{format_time(counted.last)}; set `split.train_start`, `split.train_end`, `split.validation_end` and "
        "`split.test_end` around them"
    )


REMAKE = "make the tables anew with --rebuild, which reads all files of the log"


@dataclass(frozen=True)
class Tables:
    """Tables that were written.

    Attributes:
        files: Number of files that were read.
        rows: Rows of the interaction log that were added.
        events: Rows of logs of events that were added.
        as_of: Time of the last request that the tables know, microseconds.
        digest: Checksum of the files that the tables hold.
        journal: Part of a journal that the tables hold, see `HeldFiles.journal`.
        gone: Files that the tables hold and the log lacks.
    """

    files: int
    rows: int
    events: int
    as_of: int
    digest: str
    journal: Mapping[str, Any] | None
    gone: Sequence[str] = ()


def extend_tables(features: Path, last: int, logs: Logs, taken: HeldFiles, out: Path) -> Tables | None:
    """Writes features whose tables go on with the new files of logs into an empty folder; None where none has a row.

    features: of the model; last: microseconds of the last request that its tables know; logs: to be read by the model's
    schema, with the types of `taken`. Raises UserError as `extend`.
    """
    files, requests = NewFiles(logs, taken, "the model's tables", last, REMAKE), features / "requests"
    new = zip(logs.all, files.changes, strict=True)
    if not any(file.rows for log, changes in new for file in log.files if file.address in changes.new):
        return None
    if logs.schema.columns.request is not None and not requests.is_dir():
        raise UserError(f"'{requests}', the requests that the model's tables hold, is missing; {REMAKE}")
    with Steps(files.only(), {}, out / "scratch") as steps:
        counted = files.count(steps, statistics=False, kept=out / "requests", before=requests)
        if not any(counted.seen.values()):  # all came before
            return None
        counted.add_latest_of(features, logs.schema)
        as_of = max(last, counted.last)
        taken = files.taken.with_new(steps.logs, counted.spans)
        return _write_tables(steps, counted, features, out, as_of, taken, files.gone, before=features.resolve())


def remake_tables(features: Path, logs: Logs, out: Path) -> Tables:
    """Writes features with tables of all rows of logs into an empty folder.

    features: of the model, without a need for its tables. Raises UserError where the log can't be used.
    """
    with Steps(logs.without_copies(), {}, out / "scratch") as steps:
        counted = steps.count(statistics=False, kept=out / "requests")
        taken = HeldFiles.of(steps.logs, counted.spans)
        return _write_tables(steps, counted, features, out, counted.last, taken)


def _write_tables(
    steps: Steps,
    counted: LogCounts,
    features: Path,
    out: Path,
    as_of: int,
    taken: HeldFiles,
    gone: Sequence[str] = (),
    before: Path | None = None,
) -> Tables:
    """Writes memories as of just after the last request, latest attributes, and what was fitted."""
    pipeline = FeaturePipeline.load(features, memories=False)
    steps.look_up(pipeline, out, end=as_of + 1, training=None, before=before)
    pipeline.save(out)
    counted.save_latest(out)
    for log in steps.logs.all:
        log.check_unchanged()
    shutil.rmtree(out / "scratch", ignore_errors=True)
    taken.write(out)
    for each in taken.left_out:
        say(f"left out, until it is written again: {each.reason}")
    files, rows = sum(len(log.files) for log in steps.logs.all), counted.seen[None]
    return Tables(files, rows, sum(counted.seen.values()) - rows, as_of, taken.digest, taken.journal, gone)
