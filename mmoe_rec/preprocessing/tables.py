"""New tables for an existing model: what its counters and histories remember, and latest values, of another moment.

`extend_tables` makes the tables of a model's features (`<artifact>/features`) go on with new files; `remake_tables`
makes them of all files, or of all rows before a moment. Both encode by the model's own features: an id that has become
frequent meanwhile stays in its hashed bucket. From the same rows both give the same files, to the last byte of what
they hold, but for a history of a model whose features were extended: one that went on keeps an item in the bucket that
it was in before its id got a row of its own, and one that is made anew has that row. Weights and calibration stay
right.

    <features>/
        pipeline.json, NAME.KEY.parquet    what encoders have learnt
        NAME.memory/                       what counters and histories remember
        latest.{user,candidate}.parquet    latest values; their times are in latest.{user,candidate}.times.parquet
        files.json                         the files that the tables hold (see `mmoe_rec.preprocessing.files`)
        requests/                          their requests, so that rows of one that come later have its time
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmoe_rec.errors import UserError
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.log.checks import format_time
from mmoe_rec.preprocessing.count import LogCounts
from mmoe_rec.preprocessing.extend import Holder, NewFiles
from mmoe_rec.preprocessing.files import HeldFiles
from mmoe_rec.preprocessing.logs import Logs
from mmoe_rec.preprocessing.prepare import add_latest, save_latest
from mmoe_rec.preprocessing.steps import Steps

ANEW = "make the tables anew with --anew, which reads all files of the log"


@dataclass(frozen=True)
class Tables:
    """What was made. files: that were read; rows: of the interaction log, events: of its logs of events, that were
    added; as_of: microseconds of the last request that the tables know; digest: tells the files that they hold from any
    others, None where these are not known; journal: what of a journal they hold, see `HeldFiles.journal`; gone: files
    that the tables before hold and the log does not."""

    files: int
    rows: int
    events: int
    as_of: int
    digest: str | None
    journal: Mapping[str, Any] | None
    gone: Sequence[str] = ()


def read_held_files(features: Path) -> HeldFiles | None:
    """The files that the tables in a folder hold; None where an earlier version wrote it, or they were made as of a
    moment. Raises UserError for a damaged record."""
    return HeldFiles.read(features) if (features / "files.json").is_file() else None


def extend_tables(features: Path, last: int, logs: Logs, taken: HeldFiles, out: Path) -> Tables | None:
    """Writes features whose tables go on with the new files of logs into an empty folder; None where none has a row.

    features: of the model; last: microseconds of the last request that its tables know; logs: to be read by the model's
    schema, with the types of `taken`. Raises UserError as `extend`.
    """
    holder = Holder("the model's tables", ANEW, last)
    files, requests = NewFiles(logs, taken, holder), features / "requests"
    new = zip(logs.all, files.changes, strict=True)
    if not any(file.rows for log, changes in new for file in log.files if file.address in changes.new):
        return None
    if logs.schema.columns.request is not None and not requests.is_dir():
        raise UserError(f"'{requests}', the requests that the model's tables hold, is missing; {ANEW}")
    with Steps(files.only(events_alone=True), {}, out / "scratch") as steps:
        counted = files.count(steps, statistics=False, kept=out / "requests", before=requests)
        add_latest(counted, logs.schema, features)
        as_of = max(last, counted.last[0])
        taken = taken.with_new(steps.logs, counted.spans)
        return _write(steps, counted, features, out, as_of, taken, files.gone, before=features.resolve())


def remake_tables(features: Path, logs: Logs, out: Path, until: int | None = None) -> Tables:
    """Writes features with tables of all rows of logs into an empty folder.

    features: of the model, without a need for its tables; until: requests and events at or after that moment
    (microseconds) don't count, None for none. Tables as of a moment don't know their files, so they don't go on.

    Raises UserError where the log can't be used, or has no request before that moment.
    """
    with Steps(logs, {}, out / "scratch", until) as steps:
        kept = out / "requests" if until is None else None
        counted = steps.count(statistics=False, kept=kept)
        if until is not None and counted.last[0] < counted.first[0]:
            raise UserError(f"the log '{logs.log.source}' has no request before {format_time(until)}")
        taken = None if until is not None else HeldFiles.of(steps.logs, counted.spans)
        return _write(steps, counted, features, out, counted.last[0], taken)


def _write(
    steps: Steps,
    counted: LogCounts,
    features: Path,
    out: Path,
    as_of: int,
    taken: HeldFiles | None,
    gone: Sequence[str] = (),
    before: Path | None = None,
) -> Tables:
    """Writes memories as of just after the last request, latest attributes, and what was fitted."""
    pipeline = FeaturePipeline.load(features, memories=False)
    steps.look_up(pipeline, out, end=steps.logs.options.earliest_look_up(as_of), training=None, before=before)
    pipeline.save(out)
    save_latest(counted, out)
    for log in steps.logs.all:
        log.check_unchanged()
    shutil.rmtree(out / "scratch", ignore_errors=True)
    if taken is not None:
        taken.write(out)
    files, rows = sum(len(log.files) for log in steps.logs.all), counted.seen[None]
    digest, journal = (None, None) if taken is None else (taken.digest, taken.journal)
    return Tables(files, rows, sum(counted.seen.values()) - rows, as_of, digest, journal, gone)
