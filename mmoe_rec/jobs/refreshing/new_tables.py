"""An artifact with the same weights, calibration, vocabularies and statistics, and tables of another moment."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmoe_rec.errors import UserError
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.inference.artifact import Artifact, read_artifact
from mmoe_rec.jobs.places import logs_for
from mmoe_rec.log.stand_ins import require_all
from mmoe_rec.preprocessing.files import Taken
from mmoe_rec.preprocessing.logs import Logs
from mmoe_rec.preprocessing.tables import ANEW, Tables, advanced, made_anew, taken_by
from mmoe_rec.progress import say
from mmoe_rec.settings.sections import Settings, differences


def tables_from_log(artifact: Path, settings: Settings, until: int | None, out: Path) -> Tables:
    """Writes the artifact of a folder to `out` with tables of all rows of the settings' log, as of a moment.

    until: microseconds; requests and events then or later don't count, None for all that there are. Tables as of a
    moment don't know their files, so they can't go on. Raises UserError as `made_anew`, and where the model's features
    are not those of the settings.
    """
    about = read_artifact(artifact)
    logs, taken = _logs(artifact, settings), taken_by(artifact / "features")
    if until is None and taken is not None and (gone := [each for c in taken.changes(logs) for each in c.gone]):
        such_as = f"({len(gone):,}, such as '{gone[0]}')"
        say(f"files that the model's tables hold are gone {such_as}: the tables are made anew without them")
    scratch = _scratch(out)
    try:
        made = made_anew(artifact / "features", logs, scratch, until)
        _write(artifact, out, scratch, made, _carried(about.journal, made.journal) if until is None else made.journal)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return made


def advanced_tables(
    artifact: Path, settings: Settings, out: Path, journal: Mapping[str, Any] | None = None
) -> Tables | None:
    """Writes the artifact of a folder to `out` with tables that go on with new files of the settings' log; gives None,
    and writes nothing, where there are none.

    journal: what of a journal the files of the log hold, see `Artifact`; None for what their names say, or what the
    model knew before, as segments without a row that counts leave no file.

    Raises UserError as `advanced`, where the model's features are not those of the settings, and where it is not known
    which files its tables hold.
    """
    about = read_artifact(artifact)
    taken = taken_by(artifact / "features")
    if taken is None:
        raise UserError(
            f"the model in '{artifact}' does not say which files its tables hold (an earlier version wrote it, or they "
            f"are as of a moment): {ANEW}"
        )
    logs = _logs(artifact, settings, taken)
    scratch = _scratch(out)
    try:
        made = advanced(artifact / "features", as_of(about), logs, taken, scratch)
        if made is not None:
            journal = _carried(about.journal, made.journal) if journal is None else journal
            _write(artifact, out, scratch, made, journal)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return made


def as_of(about: Artifact) -> int:
    """Microseconds of the last request that an artifact's tables know."""
    from mmoe_rec.log.given import microseconds

    return microseconds("tables_as_of", about.tables_as_of)


def _carried(before: Mapping[str, Any] | None, named: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """What of a journal tables hold by the names of their files, but no less than those before them did."""
    if before is None or named is None or before["id"] != named["id"]:
        return before if named is None else named
    return max(before, named, key=lambda each: int(each["through"]))


def _logs(artifact: Path, settings: Settings, taken: Taken | None = None) -> Logs:
    """Raises UserError where the settings have other features than the model."""
    pipeline = FeaturePipeline.load(artifact / "features", memories=False)
    require_all(pipeline.schema, "a refresh of a model's tables")
    logs = logs_for(settings, pipeline, None if taken is None else [log.types for log in taken.logs])
    schema = settings.schema_
    for where, before, now in differences(logs.schema.identity(), schema.identity()):
        raise UserError(
            f"setting '{where}' is {before} in the model's features and {now} in the settings, so its tables would "
            "hold something else: restore the setting, or train a model with it"
        )
    return logs


def _scratch(out: Path) -> Path:
    """An empty folder beside the artifact that is written."""
    scratch = out.with_name(f".{out.name}.tables")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    return scratch


def _write(artifact: Path, out: Path, tables: Path, made: Tables, journal: Mapping[str, Any] | None) -> None:
    from mmoe_rec.inference.writing import write_with_tables  # which imports torch

    write_with_tables(
        artifact,
        out,
        tables,
        tables_as_of=made.as_of,
        files=made.digest,
        journal=journal,
    )
