"""Adds new files of a log to existing features: the state of the days before and the new rows give the next state.

Only rows of the new files are read. What a trained model relies on stays: rows of known ids, statistics, scales of
labels; ids that have become frequent get rows at the end of their tables. Counters and histories go on from what they
remember, so new requests must be later than all earlier ones, while events of other logs may come late. So may rows of
an earlier request: they have its time, so counters and histories take their labels, but they are not encoded, as what
they could have known is no longer remembered; users and candidates keep later attributes. A history
remembers table rows: an item that was in a hashed bucket when it was remembered stays there, and a model that starts
from the one before (see `mmoe_rec.training.warm_start`) begins with the same weights in the bucket and the new row. Of
a user's items that become known in one instant, a history takes those with the greatest rows, whatever these are by
then.

Only new rows are encoded, into the splits of the settings. Earlier rows whose labels have matured since are not encoded
again, but counters and histories see these labels on time. Nothing looks for a request that has the same
candidate in an old and in a new file.

No old file is needed, see `mmoe_rec.preprocessing.added.new_files`, which also says what can't be added.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from mmoe_rec.atomic import atomic_folder, one_at_a_time
from mmoe_rec.errors import UserError
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.locks import writing
from mmoe_rec.log.checks import format_time
from mmoe_rec.log.stand_ins import require_all
from mmoe_rec.point_in_time.join import Window
from mmoe_rec.preprocessing.added.new_files import Holder, NewFiles
from mmoe_rec.preprocessing.added.taken import Taken
from mmoe_rec.preprocessing.checks import check_apart
from mmoe_rec.preprocessing.count import Counted
from mmoe_rec.preprocessing.logs import DEFAULTS, BuildOptions, Logs
from mmoe_rec.preprocessing.prepare import ADVICE, BUILD, Prepared, fingerprint_of, settings_of
from mmoe_rec.preprocessing.requests import Requests
from mmoe_rec.preprocessing.saved import add_latest, describe, load_counts, save_counts, save_latest, vocabularies
from mmoe_rec.preprocessing.splits import SplitCounts
from mmoe_rec.preprocessing.steps import Steps
from mmoe_rec.settings.schema import Schema
from mmoe_rec.settings.sections import differences

ANEW = "build the features anew, without --extend"


@dataclass(frozen=True)
class Extended:
    """Features after new files were added.

    rows: of the interaction log that were new; new_ids: by feature; gone: files that the features hold and the log
    does not.
    """

    prepared: Prepared
    files: int
    rows: int
    new_ids: Mapping[str, int]
    gone: Sequence[str]


def extend(
    log_source: str, schema: Schema, windows: dict[str, Window], work: Path, options: BuildOptions = DEFAULTS
) -> Extended | None:
    """Adds new files to the features in `work`; None where there are none, and nothing changes.

    The folder is replaced at the end; before that, and after an error, it is the old one.

    Args:
        windows: request times [start, end) in microseconds of each split. They may differ from those before: they say
            what becomes of the new rows.

    Raises:
        UserError: there are no features to extend, or they are of another schema; an old file has changed; new requests
            are not later than old ones, or in no split; new events may be those of a file that is gone; no new file can
            be used, or the log can't be read.
    """
    require_all(schema, "adding days to features")
    check_apart(log_source, schema, work)
    prepared = Prepared(work / "features")
    if not (prepared.folder / "manifest.json").is_file():
        raise UserError(f"'{prepared.folder}' holds no features that could be extended; build them without --extend")
    with one_at_a_time(prepared.folder), writing(prepared.folder, BUILD, ADVICE, queue=True):
        _check_schema(prepared, schema)
        taken = Taken.read(prepared.folder)
        logs = Logs(log_source, schema, options, [log.types for log in taken.logs])
        last = prepared.manifest["request_microseconds"][1]
        files = NewFiles(logs, taken, Holder("the features", f"the features in '{prepared.folder}'", ANEW, last))
        if not files.any:
            return None
        with atomic_folder(prepared.folder) as folder:
            extension = _Extension(prepared, files, windows, folder)
            new_ids = extension.build()
    prepared.say_exact_from(options)
    new = extension.new
    return Extended(prepared, sum(len(each.files) for each in new.all), new.log.rows, new_ids, files.gone)


def _check_schema(prepared: Prepared, schema: Schema) -> None:
    before = FeaturePipeline.load(prepared.serving, memories=False).schema
    found = next(differences(before.identity(), schema.identity()), None)
    for section in ("tasks", "features", "events"):  # layouts, look-ups and files follow their order
        old_order, order = list(getattr(before, section)), list(getattr(schema, section))
        if found is None and old_order != order:
            found = (section, f"in the order {', '.join(old_order)}", f"in the order {', '.join(order)}")
    if found is not None:
        where, old, new = found
        raise UserError(
            f"setting '{where}' is {old} in the features in '{prepared.folder}' and {new} now; {ANEW}, or "
            "restore the setting"
        )


class _Extension:
    """One extension. new: the logs, of which only new files are read."""

    def __init__(self, before: Prepared, files: NewFiles, windows: dict[str, Window], folder: Path) -> None:
        self.before, self.files, self.logs, self.taken = before, files, files.logs, files.taken
        self.windows, self.folder = windows, folder
        self.new = files.only()
        self.manifest = before.manifest
        self.first, self.last = self.manifest["request_microseconds"]

    def build(self) -> dict[str, int]:
        """Writes the new folder; gives the number of new ids of each feature."""
        serving, counts = self.folder / "serving", self.folder / "counts"
        for each in (serving, counts):
            each.mkdir()
        with Steps(self.new, self._new_windows, self.folder / "scratch") as steps:
            kept, before_requests = self.folder / "requests", self.before.folder / "requests"
            counted = self.files.count(steps, statistics=True, kept=kept, before=before_requests)
            self.new, requests = steps.logs, steps.requests
            self.taken = self.taken.with_new(self.new, counted.spans)
            self._check_splits(counted, requests)
            pipeline = self._load()
            pipeline.merge(counted.counts, counted.key_types)
            new_ids = pipeline.grow()
            save_counts(pipeline, counts)
            end, before = self.logs.options.asked_from(counted.last[0]), self.before.serving.resolve()
            steps.look_up(pipeline, serving, end=end, training=None, before=before)
            pipeline.save(serving)
            add_latest(counted, self.logs.schema, self.before.serving, self.last)
            save_latest(counted, serving)
            train_end = self.windows["train"][1]
            assert train_end is not None
            known_by = {"train": train_end, "validation": counted.last[0], "test": counted.last[0]}
            splits = steps.encode(serving, self.folder / "encoded", known_by)
        self.taken.write(self.folder)
        self._write_manifest(pipeline, counted, requests, splits, new_ids)
        return new_ids

    @property
    def _new_windows(self) -> dict[str, Window]:
        """The splits without the time of old requests."""
        later = self.last + 1
        return {
            name: (later if start is None else max(start, later), end) for name, (start, end) in self.windows.items()
        }

    def _load(self) -> FeaturePipeline:
        pipeline = FeaturePipeline.load(self.before.serving, memories=False)
        try:
            load_counts(pipeline, self.before.folder / "counts")
        except (OSError, pa.ArrowException) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"the features in '{self.before.folder}' are damaged: {reason}; {ANEW}") from None
        return pipeline

    def _check_splits(self, counted: Counted, requests: Requests) -> None:
        if any(counted.rows.values()):
            return
        first, rows = self.files.begin(counted, requests), self.new.log.rows
        if first > counted.last[0]:  # no request is new
            raise UserError(
                f"all {rows:,} new rows belong to requests of the files before, by column "
                f"'{self.logs.schema.columns.request}', so none of them would be encoded: give each request an id of "
                "its own if ids were used again, or add these rows together with those of new requests"
            )
        raise UserError(
            f"none of the {rows:,} new rows lies in a split: they were requested from {format_time(first)} to "
            f"{format_time(counted.last[0])}; set `split.train_start`, `split.train_end`, `split.validation_end` and "
            "`split.test_end` around them"
        )

    def _write_manifest(
        self,
        pipeline: FeaturePipeline,
        counted: Counted,
        requests: Requests,
        splits: dict[str, SplitCounts],
        new_ids: dict[str, int],
    ) -> None:
        counted.first = (self.first, 0)
        stands_for, before = fingerprint_of(self.logs, self.windows), self.manifest["fingerprint"]
        # Not that of a build of all files, whose ids have other rows: a model knows its features by the fingerprint.
        fingerprint = hashlib.sha256(f"{before} {stands_for}".encode()).hexdigest()[:16]
        manifest = {
            "fingerprint": fingerprint,
            "settings": settings_of(self.logs.schema, self.windows),
            **describe(self.logs, self.taken, counted, requests, splits),
            "unchecked": sorted({*self.manifest["unchecked"], *self.logs.options.unchecked}),
            "vocabularies": vocabularies(pipeline),
            "extends": {
                "fingerprint": before,
                "stands_for": stands_for,
                "rows_before": self.manifest["rows"],
                "new_ids": new_ids,
            },
        }
        (self.folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
