"""Register a new version of the current model, whose tables of counters and histories include the newest log files.

The new artifact is written next to the features and registered. The alias moves last, and only if the refreshed version
still has it. If a refresh is killed, run the same command again. It starts over, and may register a second version.
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

_FROM_TAG = "refreshed.from"  # Tag of versions that a refresh made. Its value is the URI of the version before.


@dataclass(frozen=True)
class CurrentModel:
    """The version that has an alias, with its downloaded artifact.

    Attributes:
        alias: The alias, such as champion.
        version: The registered version.
        folder: Folder with the artifact.
        artifact: Content of the artifact's main file.
    """

    alias: str
    version: ModelVersion
    folder: Path
    artifact: ArtifactInfo

    @staticmethod
    def load(model_uri: str, tracking_uri: str) -> "CurrentModel":
        """Find and download the version that has an alias.

        Args:
            model_uri: URI of the form `models:/NAME@ALIAS`.
            tracking_uri: URI of the MLflow server.

        Raises:
            UserError: The URI doesn't have this form, no version has the alias, or the version can't be served.
        """
        name, _, alias = model_uri.removeprefix("models:/").rpartition("@")
        if not model_uri.startswith("models:/") or not name or not alias or "/" in name:
            raise UserError(f"'{model_uri}' has no alias that a new version could take over. Give models:/NAME@ALIAS.")
        version = find_champion(name, alias, tracking_uri)
        if version is None:
            raise UserError(f"no version of the model '{name}' has the alias '{alias}'. Train one first.")
        folder = fetch_model(version.uri, tracking_uri)
        return CurrentModel(alias, version, folder, read_artifact(folder))


@dataclass(frozen=True)
class RefreshResult:
    """Result of a refresh.

    Attributes:
        previous: Version that had the alias before.
        current: Version that has the alias now.
        new_version: Number of the new version, None if the tables would not change.
        tables: Tables of the new version, None without a new version.
    """

    previous: CurrentModel
    current: ModelVersion | None
    new_version: str | None = None
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
    """Register the current model with newer tables, move the alias and delete old versions.

    Only one refresh at a time runs in `data.work_dir`. A second refresh waits.

    Args:
        settings: Settings of the model.
        model_uri: URI of the form `models:/NAME@ALIAS`.
        rebuild: Whether to rebuild the tables from all rows of the log.
        journal: URL of a journal whose new rows are first written to files of the logs. None writes no files.
        remove_events: Whether to delete the journal's batches that the previous version's tables include.
        other_journal: Whether to accept a journal other than the one that the model's tables include. Events of the
            old journal that are not in the tables yet are then lost.

    Returns:
        The versions before and after the refresh.

    Raises:
        UserError: The journal or the log can't be used, or MLflow is unreachable or refuses a request.
    """
    tracking_uri, work = settings.tracking.resolved_uri, Path(settings.data.work_dir)
    check_work_outside_logs(settings.data.log, settings.schema_, work)
    runs.check_server(tracking_uri, settings.experiment, outbox_folder=work / "unsent")
    out = work / "refreshed"
    with write_lock(out, "a refresh", "set `data.work_dir` to another folder", wait=True):
        served = CurrentModel.load(model_uri, tracking_uri)
        artifact = out / "model"
        try:
            included = None
            if journal is not None:
                included = _export_journal(served, settings, journal, remove_events, other_journal)
            tables = update_tables(served.folder, settings, artifact, rebuild=rebuild, journal=included)
            if tables is None or artifact_version(artifact) == artifact_version(served.folder):
                return RefreshResult(served, served.version)
            return _register(settings, served, tables, artifact)
        finally:
            shutil.rmtree(out, ignore_errors=True)


def _register(settings: Settings, served: CurrentModel, tables: WrittenTables, artifact: Path) -> RefreshResult:
    tracking_uri, version, as_of = settings.tracking.resolved_uri, served.version, iso_time(tables.as_of)
    tags = {
        _FROM_TAG: version.uri,
        "refreshed.run": version.run_id or "unknown",
        "refreshed.rows": str(tables.rows),
        "tables_as_of": as_of,
    }
    try:
        with runs.open_run(tracking_uri, settings.experiment, run_name="refresh") as run:
            run.set_tags({**tags, "refreshed.tables_as_of": served.artifact.tables_as_of})
            run.log_metrics({f"refresh/{name}": getattr(tables, name) for name in ("files", "rows", "events")})
            number = registry.register_model(run, artifact, version.name, tags=tags)
            new_version = ModelVersion(version.name, number, run.run_id)
            summary = f"The tables of {version.uri} as of {as_of}, with {tables.rows:,} more rows, made by\n\n"
            describe_version(new_version, summary + runs.code_block(runs.command_line()), {}, tracking_uri)
            current = find_champion(version.name, served.alias, tracking_uri)
            if current == version:
                # A rollback must return to the model that the last promotion replaced, and not to a version of the
                # same model with older tables.
                rollback = current.find_previous_champion(served.alias)
                previous = None if rollback is None else ModelVersion(version.name, rollback, None)
                move_alias(version.name, served.alias, number, tracking_uri, previous)
                current = new_version
            run.set_tags({"refreshed.holds": f"{served.alias}: {current is not None and current.number == number}"})
    except UnreachableError as error:
        problem = f"{error}: '{served.alias}' is unchanged"
        raise UserError(f"{problem}. Run the same command again once MLflow answers.") from None
    keep = settings.tracking.keep_versions
    try:
        if keep is not None and (removed := registry.delete_old_versions(version.name, _FROM_TAG, keep, tracking_uri)):
            versions = f"version{'s' * (len(removed) > 1)} {', '.join(removed)} of earlier refreshes"
            say(f"removed, with all files: {versions} (tracking.keep_versions: {keep})")
    except UserError as error:
        say(f"{error}: old model versions of earlier refreshes may remain, and the next refresh removes them")
    return RefreshResult(served, current, number, tables)


def _export_journal(
    served: CurrentModel, settings: Settings, journal_url: str, remove_events: bool = False, other_journal: bool = False
) -> Mapping[str, Any]:
    """Write the journal's batches that the model's tables lack to files of the logs.

    Returns the journal's `id`, and as `through` the position up to which the files now include the journal.
    """
    schema, included = settings.schema_, served.artifact.journal
    journal = Journal(journal_url, create=False)
    if included is not None and included["id"] != journal.id:
        if not other_journal:
            raise UserError(
                f"the model's tables include journal {included['id']}, not '{journal.name}' ({journal.id}). Give the "
                "model's journal, or its later events are lost. If it no longer exists, add --other-journal."
            )
        included = None
    included_through, removed_until = 0 if included is None else int(included["through"]), journal.removed_until()
    if included_through < removed_until:
        raise UserError(
            f"the journal '{journal.name}' begins after position {removed_until}, and the model's tables include only "
            f"positions up to {included_through}. The removed events are in the log's files. Run refresh without "
            "--journal first, and then with it."
        )
    # Without request IDs, a row that is in a new file and in the journal would count twice. With IDs, it is recognized.
    if schema.columns.request is None:
        features = served.folder / "features"
        new = (files := IncludedFiles.read(features)).changes(_open_logs(features, settings, files))[0].new
        if foreign := sorted(uri for uri in new if parse_journal_name(uri) is None):
            raise UserError(
                f"'{foreign[0]}' is new in the log, but not a file of the journal. Requests have no IDs, so rows that "
                "are also in the journal would count twice. Remove the file, or if it has no such rows, run refresh "
                "once without --journal."
            )
    journal.forget_old_keys()
    # If the tables include no batch of this journal, other programs may have written its rows to files that the tables
    # include. Skip all rows up to the time of the tables.
    later_than = None if included is not None else tables_time(served.artifact)
    through = write_journal_files(journal, schema, settings.data.log, included_through, later_than)
    if remove_events and included_through:
        journal.remove_until(included_through)
    journal.close()
    return {"id": journal.id, "through": through}


def update_tables(
    artifact: Path, settings: Settings, out: Path, *, rebuild: bool = False, journal: Mapping[str, Any] | None = None
) -> WrittenTables | None:
    """Write an artifact whose tables of counters and histories include the new files of the log.

    Args:
        artifact: Folder of the artifact to update.
        settings: Settings with the log. Their features must equal the artifact's.
        out: Folder of the new artifact. It isn't written if the log has no new files.
        rebuild: Whether to rebuild the tables from all rows of the log.
        journal: Journal that the log's files include, as in `ArtifactInfo.journal`: its `id`, and the position
            `through` of its last batch there. None derives both from the artifact and the names of the files.

    Returns:
        The new tables, None if the log has no new files.

    Raises:
        UserError: The settings have other features than the artifact, or `extend_tables` or `rebuild_tables` failed.
    """
    info, features = read_artifact(artifact), artifact / "features"
    included_files = IncludedFiles.read(features)
    logs = _open_logs(features, settings, None if rebuild else included_files)
    if missing := [uri for changes in included_files.changes(logs) for uri in changes.missing] if rebuild else None:
        examples = f"({len(missing):,}, such as '{missing[0]}')"
        say(f"files in the model's tables are gone {examples}: rebuilding the tables without them")
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent) as scratch:
        (tables := Path(scratch, "tables")).mkdir()
        if rebuild:
            written: WrittenTables | None = rebuild_tables(features, logs, tables)
        else:
            written = extend_tables(features, tables_time(info), logs, included_files, tables)
        if written is not None:
            if journal is None:
                journal = _latest_journal(info.journal, written.journal)
            as_of, digest = written.as_of, written.digest
            write_with_tables(artifact, out, tables, tables_as_of=as_of, files_digest=digest, journal=journal)
    return written


def tables_time(info: ArtifactInfo) -> int:
    """Return the time of the last request in an artifact's tables, in microseconds."""
    return parse_microseconds("tables_as_of", info.tables_as_of)


def _latest_journal(before: Mapping[str, Any] | None, named: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Return the journal that updated tables include, as in `ArtifactInfo.journal`.

    `before` is the journal of the previous tables, and `named` the one in the names of the updated tables' files. The
    later position counts, because batches of only duplicates leave no file. If the IDs differ, `named` counts.
    """
    if before is None or named is None or before["id"] != named["id"]:
        return before if named is None else named
    return max(before, named, key=lambda part: int(part["through"]))


def _open_logs(features: Path, settings: Settings, included_files: IncludedFiles | None) -> Logs:
    """Open the settings' logs for the model's features. Raise UserError if the settings define other features."""
    pipeline = FeaturePipeline.load(features, stores=False)
    reject_plain_table(pipeline.schema, "a refresh of a model's tables")
    types = None if included_files is None else [log.types for log in included_files.logs]
    logs = open_model_logs(settings, pipeline, types)
    for name, before, now in diff_settings(logs.schema.identity(), settings.schema_.identity()):
        raise UserError(
            f"setting '{name}' is {before} in the model's features and {now} in the settings. Restore the setting, "
            "or train a model with it."
        )
    return logs
