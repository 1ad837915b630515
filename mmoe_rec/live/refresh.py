"""A new version of the model that holds an alias, with tables that know the newest files of the log.

The artifact is written beside the features, registered, and only then the alias moves, if the version that was
refreshed still holds it. After a kill the same command starts over. It may then register a second version.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mmoe_rec.errors import UserError
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.inference.artifact import ArtifactInfo, artifact_version, read_artifact
from mmoe_rec.inference.artifact_writer import write_with_tables
from mmoe_rec.live.journal import Journal
from mmoe_rec.live.journal_rows import write_journal_files
from mmoe_rec.locks import write_lock
from mmoe_rec.log.request_values import iso_time, parse_microseconds
from mmoe_rec.log.rows import reject_plain_table
from mmoe_rec.preprocessing.build_inputs import (
    IncludedFiles,
    Logs,
    check_work_outside_logs,
    open_model_logs,
    parse_journal_name,
)
from mmoe_rec.preprocessing.extend import WrittenTables, extend_tables, rebuild_tables
from mmoe_rec.progress import say
from mmoe_rec.settings.sections import Settings, diff_settings
from mmoe_rec.tracking import registry, runs
from mmoe_rec.tracking.client import UnreachableError
from mmoe_rec.tracking.registry import ModelVersion, describe_version, fetch_model, find_champion, move_alias
from mmoe_rec.tracking.runs import code_block, command_line

_FROM_TAG = "refreshed.from"  # of a version that a refresh made


@dataclass(frozen=True)
class CurrentModel:
    """The version that holds an alias, and what its artifact says."""

    alias: str
    version: ModelVersion
    folder: Path
    artifact: ArtifactInfo

    @staticmethod
    def load(model_uri: str, tracking_uri: str) -> "CurrentModel":
        """Raises UserError for anything but models:/NAME@ALIAS with a version that can be served."""
        name, _, alias = model_uri.removeprefix("models:/").rpartition("@")
        if not model_uri.startswith("models:/") or not name or not alias or "/" in name:
            raise UserError(
                f"'{model_uri}' can't be refreshed: a new version takes over an alias of a registered model, so give "
                "models:/NAME@ALIAS"
            )
        version = find_champion(name, alias, tracking_uri)
        if version is None:
            raise UserError(f"no version of the model '{name}' holds the alias '{alias}': train one first")
        folder = fetch_model(version.uri, tracking_uri)
        return CurrentModel(alias, version, folder, read_artifact(folder))


@dataclass(frozen=True)
class RefreshResult:
    """A refresh. before: what held the alias; after: the version that holds it now; number: of the new version, None
    where there was nothing new; tables: of that version."""

    previous: CurrentModel
    current: ModelVersion | None
    number: str | None = None
    tables: WrittenTables | None = None


def refresh(
    settings: Settings,
    model_uri: str,
    *,
    rebuild: bool = False,
    journal: str | None = None,
    remove_events: bool = False,
    other_journal: bool = False,
) -> RefreshResult:
    """Registers a version with new tables of the model that holds an alias, moves the alias, and removes old versions.

    rebuild: make the tables of all rows of the log, instead of going on; journal, remove_events, other_journal: see
    `export_journal`. One refresh at a time in `data.work_dir`: another one waits. Raises UserError as `export_journal`
    and `update_tables`, and where MLflow is away or refuses.
    """
    tracking_uri, work = settings.tracking.resolved_uri, Path(settings.data.work_dir)
    check_work_outside_logs(settings.data.log, settings.schema_, work)
    runs.check_server(tracking_uri, settings.experiment, outbox_folder=work / "unsent")
    out = work / "refreshed"
    with write_lock(out, "a refresh", "set `data.work_dir` to another folder", wait=True):
        served = CurrentModel.load(model_uri, tracking_uri)
        artifact = out / "model"
        try:
            known = None
            if journal is not None:
                known = export_journal(served, settings, journal, remove_events, other_journal)
            tables = update_tables(served.folder, settings, artifact, rebuild=rebuild, journal=known)
            if tables is None or artifact_version(artifact) == artifact_version(served.folder):
                return RefreshResult(served, served.version)
            return _register(settings, served, tables, artifact)
        finally:
            shutil.rmtree(out, ignore_errors=True)


def _register(settings: Settings, served: CurrentModel, made: WrittenTables, artifact: Path) -> RefreshResult:
    tracking_uri, version, after = settings.tracking.resolved_uri, served.version, iso_time(made.as_of)
    tags = {
        _FROM_TAG: version.uri,
        "refreshed.run": version.run_id or "unknown",
        "refreshed.rows": str(made.rows),
        "tables_as_of": after,
    }
    try:
        with runs.open_run(tracking_uri, settings.experiment, run_name="refresh") as run:
            run.set_tags({**tags, "refreshed.tables_as_of": served.artifact.tables_as_of})
            run.log_metrics({"refresh/files": made.files, "refresh/rows": made.rows, "refresh/events": made.events})
            number = registry.register_model(run, artifact, version.name, tags=tags)
            told = f"The tables of {version.uri} as of {after}, with {made.rows:,} more rows, by\n\n"
            describe_version(
                ModelVersion(version.name, number, run.run_id), told + code_block(command_line()), {}, tracking_uri
            )
            now = find_champion(version.name, served.alias, tracking_uri)
            if now == version:
                # The way back leads to the model that a promotion replaced, not to older tables of the same one.
                before = now.find_previous_champion(served.alias)
                previous = None if before is None else ModelVersion(version.name, before, None)
                move_alias(version.name, served.alias, number, tracking_uri, previous)
                now = ModelVersion(version.name, number, run.run_id)
            run.set_tags({"refreshed.holds": f"{served.alias}: {now is not None and now.number == number}"})
    except UnreachableError as error:
        raise UserError(
            f"{error}: '{served.alias}' stays where it was, and the same command makes the version once MLflow answers"
        ) from None
    keep = settings.tracking.keep_versions
    try:
        if keep is not None and (removed := registry.delete_old_versions(version.name, _FROM_TAG, keep, tracking_uri)):
            what = f"version{'s' * (len(removed) > 1)} {', '.join(removed)} of earlier refreshes"
            say(f"removed, with all files: {what} (tracking.keep_versions: {keep})")
    except UserError as error:
        say(f"{error}: older versions of refreshes are removed by the next refresh")
    return RefreshResult(served, now, number, made)


def export_journal(
    served: CurrentModel, settings: Settings, journal_url: str, remove_events: bool = False, other_journal: bool = False
) -> Mapping[str, Any]:
    """Writes files of what the journal holds and the served tables do not; gives the journal's "id", and the position
    "through" which the logs' files hold it then.

    remove: batches that the tables hold already are removed; other: the model may know another journal, of which
    nothing is to come any more. Raises UserError where there is no journal, it is damaged, the model knows another one,
    or the logs' places take no files.
    """
    schema, known = settings.schema_, served.artifact.journal
    journal = Journal(journal_url, create=False)
    if known is not None and known["id"] != journal.id:
        if not other_journal:
            raise UserError(
                f"the model's tables hold another journal ({known['id']}) than '{journal.name}' ({journal.id}): give "
                "the address of that one, as what it has not told them yet would be lost; if it is gone, and this one "
                "takes its place, add --other-journal"
            )
        known = None
    held, removed_until = 0 if known is None else int(known["through"]), journal.removed_until()
    if held < removed_until:
        raise UserError(
            f"the journal '{journal.name}' begins after position {removed_until}, and the model's tables know it up to "
            f"{held} only: what was removed is in the log's files, so run refresh without --journal first, and then "
            "with it"
        )
    if schema.columns.request is None:  # else the tables tell rows that came both ways
        features = served.folder / "features"
        new = (taken := IncludedFiles.read(features)).changes(_logs(features, settings, taken))[0].new
        if theirs := sorted(each for each in new if parse_journal_name(each) is None):
            raise UserError(
                f"'{theirs[0]}' is new in the log, and no file of the journal: as requests have no ids, rows that came "
                "both ways would count twice; if none did, run refresh without --journal once, which takes the file "
                "in, else remove it"
            )
    journal.forget_old_keys()
    # Else the tables may hold what is no later than they are, by files that another program wrote.
    later_than = None if known is not None else tables_time(served.artifact)
    through = write_journal_files(journal, schema, settings.data.log, held, later_than)
    if remove_events and held:
        journal.remove_until(held)
    journal.close()
    return {"id": journal.id, "through": through}


def update_tables(
    artifact: Path,
    settings: Settings,
    out: Path,
    *,
    rebuild: bool = False,
    journal: Mapping[str, Any] | None = None,
) -> WrittenTables | None:
    """Writes the artifact of a folder to `out` with tables that go on with new files of the settings' log; gives None,
    and writes nothing, where there are none.

    rebuild: make the tables of all rows of the log instead; journal: what of a journal the files of the log hold, see
    `ArtifactInfo`; None for what their names say, or what the model knew before, as segments without a row that counts
    leave no file. Raises UserError as `extend_tables` or `rebuild_tables`, and where the features are not those of the
    settings.
    """
    about, features = read_artifact(artifact), artifact / "features"
    taken = IncludedFiles.read(features)
    logs = _logs(features, settings, None if rebuild else taken)
    if missing := [uri for each in taken.changes(logs) for uri in each.missing] if rebuild else None:
        such_as = f"({len(missing):,}, such as '{missing[0]}')"
        say(f"files that the model's tables hold are gone {such_as}: the tables are made anew without them")
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent) as scratch:
        (tables := Path(scratch, "tables")).mkdir()
        if rebuild:
            made: WrittenTables | None = rebuild_tables(features, logs, tables)
        else:
            made = extend_tables(features, tables_time(about), logs, taken, tables)
        if made is not None:
            if journal is None:
                journal = _carry_on(about.journal, made.journal)
            write_with_tables(artifact, out, tables, tables_as_of=made.as_of, files_digest=made.digest, journal=journal)
    return made


def tables_time(about: ArtifactInfo) -> int:
    """Microseconds of the last request that an artifact's tables know."""
    return parse_microseconds("tables_as_of", about.tables_as_of)


def _carry_on(before: Mapping[str, Any] | None, named: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """What of a journal tables hold by the names of their files, but no less than those before them did."""
    if before is None or named is None or before["id"] != named["id"]:
        return before if named is None else named
    return max(before, named, key=lambda each: int(each["through"]))


def _logs(features: Path, settings: Settings, taken: IncludedFiles | None) -> Logs:
    """Raises UserError where the settings have other features than the model."""
    pipeline = FeaturePipeline.load(features, stores=False)
    reject_plain_table(pipeline.schema, "a refresh of a model's tables")
    logs = open_model_logs(settings, pipeline, None if taken is None else [log.types for log in taken.logs])
    schema = settings.schema_
    for where, before, now in diff_settings(logs.schema.identity(), schema.identity()):
        raise UserError(
            f"setting '{where}' is {before} in the model's features and {now} in the settings, so its tables would "
            "hold something else: restore the setting, or train a model with it"
        )
    return logs
