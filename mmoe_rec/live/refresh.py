"""A new version of the model that holds an alias, with tables that know the newest files of the log; and a training
when one is due, for a scheduler.

A kill between any two steps leaves something whole: the artifact is written beside the features, registered, and only
then the alias moves, if the version that was refreshed still holds it. The run in MLflow is found again by the version
and the files that it is made of, so the same command, started again, registers nothing twice.

A training is due by the log's own time: the features in `data.work` end where the newest training ended, and the tables
of the model that holds the alias end where the log does. The settings' split is that of the first training; here the
newest days validate, and all rows since the newest training before them train.

Adding days replaces the rows that features hold encoded, so these are kept as they were in `data.work`/before_training
until the training on the new ones has ended, whatever became of its model. While that folder is there, a training is
under way: the same command goes on with it, or begins it anew from there where files have come meanwhile, since a
training needs features that hold all files of the log.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mmoe_rec.atomic import atomic_folder
from mmoe_rec.errors import UserError
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.inference.artifact import Artifact, read_artifact, version_of
from mmoe_rec.jobs.run_page import as_code, command
from mmoe_rec.jobs.train import train_model
from mmoe_rec.live import journal_files as files
from mmoe_rec.live.journal import Journal
from mmoe_rec.locks import writing
from mmoe_rec.log.checks import format_time
from mmoe_rec.log.files import find_checksum, find_files
from mmoe_rec.log.given import iso_time, microseconds
from mmoe_rec.log.rows import MICROSECONDS_PER_DAY, require_all
from mmoe_rec.preprocessing.checks import check_apart
from mmoe_rec.preprocessing.extend import REMAKE, Tables, extend, extend_tables, remake_tables
from mmoe_rec.preprocessing.logs import BuildInputs, HeldFiles, Logs, logs_for, read_held_files, read_journal_name
from mmoe_rec.preprocessing.prepare import BUILD, FeatureFolder, existing
from mmoe_rec.progress import say
from mmoe_rec.settings.sections import Settings, Split, differences
from mmoe_rec.tracking import registry, runs
from mmoe_rec.tracking.outbox import UnreachableError, list_waiting_runs
from mmoe_rec.tracking.registry import Version, describe_version, fetch_model, find_holder, move_alias

_KEPT = "before_training"
_FROM_TAG = "refreshed.from"  # of a version that a refresh made


@dataclass(frozen=True)
class AliasHolder:
    """The version that holds an alias, and what its artifact says."""

    alias: str
    version: Version
    folder: Path
    about: Artifact

    @staticmethod
    def at(address: str, uri: str) -> AliasHolder:
        """Raises UserError for anything but models:/NAME@ALIAS with a version that can be served."""
        name, _, alias = address.removeprefix("models:/").rpartition("@")
        if not address.startswith("models:/") or not name or not alias or "/" in name:
            raise UserError(
                f"'{address}' can't be refreshed: a new version takes over an alias of a registered model, so give "
                "models:/NAME@ALIAS"
            )
        version = find_holder(name, alias, uri)
        if version is None:
            raise UserError(f"no version of the model '{name}' holds the alias '{alias}': train one first")
        folder = fetch_model(version.address, uri)
        return AliasHolder(alias, version, folder, read_artifact(folder))


@dataclass(frozen=True)
class RefreshResult:
    """A refresh. before: what held the alias; after: the version that holds it now; number: of the new version, None
    where there was nothing new; tables: of that version."""

    before: AliasHolder
    after: Version | None
    number: str | None = None
    tables: Tables | None = None


def refresh(
    settings: Settings,
    address: str,
    *,
    anew: bool = False,
    journal: str | None = None,
    remove_events: bool = False,
    other_journal: bool = False,
) -> RefreshResult:
    """Registers a version with new tables of the model that holds an alias, moves the alias, and removes old versions.

    anew: make the tables of all rows of the log, instead of going on; journal, remove_events, other_journal: see
    `write_journal`. One refresh at a time in `data.work`: another one waits. Raises UserError as `write_journal` and
    `renew_tables`, and where MLflow is away or refuses.
    """
    uri, work = settings.tracking.address, Path(settings.data.work)
    check_apart(settings.data.log, settings.schema_, work)
    runs.check_server(uri, settings.experiment, unsent=work / "unsent")
    out = work / "refreshed"
    with writing(out, "a refresh", "set `data.work` to another folder", queue=True):
        served = AliasHolder.at(address, uri)
        artifact = out / "model"
        try:
            known = None
            if journal is not None:
                known = write_journal(served, settings, journal, remove_events, other_journal)
            tables = renew_tables(served.folder, settings, artifact, anew=anew, journal=known)
            if tables is None or version_of(artifact) == version_of(served.folder):
                return RefreshResult(served, served.version)
            return _register(settings, served, tables, artifact)
        finally:
            shutil.rmtree(out, ignore_errors=True)


def _register(settings: Settings, served: AliasHolder, made: Tables, artifact: Path) -> RefreshResult:
    uri, version = settings.tracking.address, served.version
    text = f"{version.address} {version_of(served.folder)} {version_of(artifact)}"
    key = f"refresh-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    after = iso_time(made.as_of)
    tags = {
        _FROM_TAG: version.address,
        "refreshed.run": version.run_id or "unknown",
        "refreshed.rows": str(made.rows),
        "tables_as_of": after,
    }
    try:
        with runs.open_run(uri, settings.experiment, run_name="refresh", key=key) as run:
            run.set_tags({**tags, "refreshed.tables_as_of": served.about.tables_as_of})
            run.log_metrics({"refresh/files": made.files, "refresh/rows": made.rows, "refresh/events": made.events})
            number = registry.find_registered(run, artifact, version.name)
            if number is None:
                number = registry.register_model(run, artifact, version.name, tags=tags)
            told = f"The tables of {version.address} as of {after}, with {made.rows:,} more rows, by\n\n"
            describe_version(Version(version.name, number, run.run_id), told + as_code(command()), {}, uri)
            now = find_holder(version.name, served.alias, uri)
            if now == version:
                # The way back leads to the model that a promotion replaced, not to older tables of the same one.
                before = now.find_replaced(served.alias)
                replaced = None if before is None else Version(version.name, before, None)
                move_alias(version.name, served.alias, number, uri, replaced)
                now = Version(version.name, number, run.run_id)
            run.set_tags({"refreshed.holds": f"{served.alias}: {now is not None and now.number == number}"})
    except UnreachableError as error:
        raise UserError(
            f"{error}: '{served.alias}' stays where it was, and the same command makes the version once MLflow answers"
        ) from None
    keep = settings.tracking.keep_versions
    try:
        if keep is not None and (removed := registry.remove_versions(version.name, _FROM_TAG, keep, uri)):
            what = f"version{'s' * (len(removed) > 1)} {', '.join(removed)} of earlier refreshes"
            say(f"removed, with all files: {what} (tracking.keep_versions: {keep})")
    except UserError as error:
        say(f"{error}: older versions of refreshes are removed by the next refresh")
    return RefreshResult(served, now, number, made)


def write_journal(
    served: AliasHolder, settings: Settings, address: str, remove: bool = False, other: bool = False
) -> Mapping[str, Any]:
    """Writes files of what the journal holds and the served tables do not; gives the journal's "id", and the position
    "through" which the logs' files hold it then.

    remove: batches that the tables hold already are removed; other: the model may know another journal, of which
    nothing is to come any more. Raises UserError where there is no journal, it is damaged, the model knows another one,
    or the logs' places take no files.
    """
    schema, known = settings.schema_, served.about.journal
    taken, journal = read_held_files(served.folder / "features"), Journal(address, create=False)
    if known is not None and known["id"] != journal.id:
        if not other:
            raise UserError(
                f"the model's tables hold another journal ({known['id']}) than '{journal.name}' ({journal.id}): give "
                "the address of that one, as what it has not told them yet would be lost; if it is gone, and this one "
                "takes its place, add --other-journal"
            )
        known = None
    held = 0 if known is None else int(known["through"])
    if files.find_removed_logs(journal, schema, held):
        raise UserError(
            f"the journal '{journal.name}' begins after position {journal.removed()}, and the model's tables know "
            f"it up to {held} only: what was removed is in the log's files, so run refresh without --journal first,"
            " and then with it"
        )
    _check_one_way(settings, taken)
    through = files.cut_journal(journal)
    after = max(held, journal.removed())
    # Else the tables may hold what is no later than they are, by files that another program wrote.
    later_than = None if known is not None else as_of(served.about)
    written = files.write_files(journal, schema, through, settings.data.log, after, later_than)
    for log, rows in written.unknown.items():
        say(f"{rows:,} rows of a log of events '{log}' are in no file: the settings have no such log")
    for source, counts in written.counts.items():
        if counts["conflict"]:
            name = "the interaction log" if source is None else f"log '{source}'"
            say(f"{counts['conflict']:,} rows of {name} came again with other labels: the first ones count")
    if written.early:
        say(
            f"{written.early:,} rows of the journal are no later than the model's tables "
            f"({served.about.tables_as_of}), which know nothing of this journal: they are taken for known, as by a "
            "server, and are in no file"
        )
    if remove and held:
        files.remove_batches(journal, held)
    journal.close()
    return {"id": journal.id, "through": through}


def _check_one_way(settings: Settings, taken: HeldFiles | None) -> None:
    """Raises UserError for new files of another program where rows that came both ways could not be told.

    Where requests have ids, the tables tell such rows.
    """
    if settings.schema_.columns.request is not None or taken is None:
        return
    held = taken.logs[0]
    recorded, known = held.files.keys() | held.left_out.keys(), {each.checksum for each in held.files.values()} - {None}
    for file in find_files(settings.data.log):
        if file.address in recorded or read_journal_name(file.address) is not None:
            continue
        if find_checksum(file) not in known:  # of another name, place or time
            raise UserError(
                f"'{file.address}' is new in the log, and no file of the journal: as requests have no ids, rows that "
                "came both ways would count twice; if none did, run refresh without --journal once, which takes the "
                "file in, else remove it"
            )


def renew_tables(
    artifact: Path,
    settings: Settings,
    out: Path,
    *,
    anew: bool = False,
    until: int | None = None,
    journal: Mapping[str, Any] | None = None,
) -> Tables | None:
    """Writes the artifact of a folder to `out` with tables that go on with new files of the settings' log; gives None,
    and writes nothing, where there are none.

    anew: make the tables of all rows of the log instead; until: make them anew as of this moment (microseconds):
    requests and events then or later don't count. Such tables don't know their files, so they can't go on; journal:
    what of a journal the files of the log hold, see `Artifact`; None for what their names say, or what the model knew
    before, as segments without a row that counts leave no file. Raises UserError as `extend_tables` or `remake_tables`,
    and where the features are not those of the settings, or it is not known which files the tables hold.
    """
    about, features = read_artifact(artifact), artifact / "features"
    taken, anew = read_held_files(features), anew or until is not None
    if taken is None and not anew:
        raise UserError(
            f"the model in '{artifact}' does not say which files its tables hold, as they are of a moment: {REMAKE}"
        )
    logs = _logs(features, settings, None if anew else taken)
    changes = taken.changes(logs) if anew and until is None and taken is not None else []
    if gone := [address for each in changes for address in each.gone]:
        such_as = f"({len(gone):,}, such as '{gone[0]}')"
        say(f"files that the model's tables hold are gone {such_as}: the tables are made anew without them")
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent) as scratch:
        (tables := Path(scratch, "tables")).mkdir()
        if anew or taken is None:
            made: Tables | None = remake_tables(features, logs, tables, until)
        else:
            made = extend_tables(features, as_of(about), logs, taken, tables)
        if made is not None:
            if journal is None and until is None:
                journal = _carry_on(about.journal, made.journal)
            from mmoe_rec.inference.writing import write_with_tables  # which imports torch

            write_with_tables(artifact, out, tables, tables_as_of=made.as_of, files=made.digest, journal=journal)
    return made


def as_of(about: Artifact) -> int:
    """Microseconds of the last request that an artifact's tables know."""
    return microseconds("tables_as_of", about.tables_as_of)


def _carry_on(before: Mapping[str, Any] | None, named: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """What of a journal tables hold by the names of their files, but no less than those before them did."""
    if before is None or named is None or before["id"] != named["id"]:
        return before if named is None else named
    return max(before, named, key=lambda each: int(each["through"]))


def _logs(features: Path, settings: Settings, taken: HeldFiles | None) -> Logs:
    """Raises UserError where the settings have other features than the model."""
    pipeline = FeaturePipeline.load(features, memories=False)
    require_all(pipeline.schema, "a refresh of a model's tables")
    logs = logs_for(settings, pipeline, None if taken is None else [log.types for log in taken.logs])
    schema = settings.schema_
    for where, before, now in differences(logs.schema.identity(), schema.identity()):
        raise UserError(
            f"setting '{where}' is {before} in the model's features and {now} in the settings, so its tables would "
            "hold something else: restore the setting, or train a model with it"
        )
    return logs


def choose_validation_days(settings: Settings, address: str, every: int, days: int | None) -> int:
    """How many of the newest days validate. days: as asked for, None for one more than labels take to mature.

    Raises UserError for what can't be: another model than that of the settings, or no day to train on.
    """
    own = f"models:/{settings.registered_model}@{settings.tracking.alias}"
    if address != own:
        raise UserError(
            f"--train-every-days trains the settings' own model, {own}, and --model is {address}: leave that out, or "
            "set tracking.registered_model and tracking.alias"
        )
    mature = max((task.matures_after_days for task in settings.tasks.values()), default=0)
    newest = 1 + math.ceil(mature) if days is None else days
    if newest >= every:
        why = f" (a label takes {mature:g} to mature)" if days is None and mature else ""
        raise UserError(
            f"--train-every-days {every} leaves no day to train on, as the newest {newest:,} validate{why}: train less "
            "often, or set --validation-days"
        )
    return newest


def train_when_due(settings: Settings, address: str, every: int, days: int) -> Iterator[str]:
    """Goes on with a training that is under way, or begins one if it is due; gives sentences on what was done.

    every: days between the last requests of two trainings' features; days: newest ones that validate. Raises UserError
    where a part of it fails, which leaves the alias as it was.
    """
    work = Path(settings.data.work)
    kept, prepared = work / _KEPT, FeatureFolder(work / "features")
    with writing(kept, "a scheduled training", "set `data.work` to another folder", queue=True):
        served = AliasHolder.at(address, settings.tracking.address)
        newest = as_of(served.about)
        if not kept.is_dir():
            if not (prepared.folder / "manifest.json").is_file():
                raise UserError(f"'{prepared.folder}' holds no features to which days could be added: train once first")
            last = prepared.manifest["request_microseconds"][1]
            behind = (newest - last) / MICROSECONDS_PER_DAY
            if behind < every:
                yield (
                    f"no training is due: the newest one knows requests up to {format_time(last)}, "
                    f"{max(0, behind):.1f} days behind the tables of '{served.alias}', and one is due after {every}"
                )
                return
            with writing(prepared.folder, *BUILD, queue=True), atomic_folder(kept) as folder:
                _link(prepared.folder, folder / "features")
        elif _has_ended(prepared, kept, work):
            _forget(kept)
            yield "the training that was under way has ended"
            return
        end = datetime.fromtimestamp(newest // 1_000_000 + 1, UTC)
        split = Split.model_validate({"train_end": end - timedelta(days=days), "validation_end": end})
        now = settings.model_copy(update={"split": split})
        if existing(BuildInputs.of(now)) is None:
            _add_days(now, served, kept, prepared)
        yield from _train(now, address, prepared, work)
        _forget(kept)


def _train(settings: Settings, address: str, prepared: FeatureFolder, work: Path) -> Iterator[str]:
    rows, end = prepared.manifest["splits"], settings.split.train_end
    assert end is not None, "days were added, so the log has times"
    yield (
        f"training on {rows['train']['rows']:,} rows before {end.isoformat()}, judged by "
        f"{rows['validation']['rows']:,} since"
    )
    trained = train_model(settings, address, resume=True)
    assert trained is not None, "one process has the first rank"
    yield from trained.compared
    yield f"model: {trained.artifact}, registered as {trained.address}"
    if list_waiting_runs(work / "unsent"):
        raise UserError("the training has ended, but MLflow has not got all of it: start the same command again")


def _add_days(settings: Settings, served: AliasHolder, kept: Path, prepared: FeatureFolder) -> None:
    """Makes features that hold all files of the log.

    The features of before come back first: others, to which days were added, may lack rows of the first of these.
    """
    from mmoe_rec.training.checkpoint import FinishedTraining, forget_training

    with writing(prepared.folder, *BUILD, queue=True), atomic_folder(prepared.folder) as folder:
        _link(kept / "features", folder)
    if FinishedTraining.read(Path(settings.data.work)) is None:
        forget_training(Path(settings.data.work) / "checkpoints")  # of features that are gone
    if extend(BuildInputs.of(settings)) is None:
        raise UserError(
            f"'{settings.data.log}' has no files that the features in '{prepared.folder}' do not hold, but the tables "
            f"of '{served.version.address}' know later requests: put back the files that these come from"
        )
    _check_all_there(served, prepared)


def _check_all_there(served: AliasHolder, prepared: FeatureFolder) -> None:
    """Raises UserError where the tables of the model that serves hold files that the features could not take in."""
    its = read_held_files(served.folder / "features")
    if its is None:
        return
    lacking = [
        file.address
        for mine, others in zip(HeldFiles.read(prepared.folder).logs, its.logs, strict=True)
        for file in others.files.values()
        if file.address not in mine.files
        and file.checksum not in {each.checksum for each in mine.files.values() if each.checksum is not None}
    ]
    if lacking:
        raise UserError(
            f"files are gone that the tables of '{served.alias}' hold and the features in '{prepared.folder}' do not "
            f"({len(lacking):,}, such as '{lacking[0]}'), so a model trained on these would know less: put them back, "
            "and keep files until a training has taken them in"
        )


def _has_ended(prepared: FeatureFolder, kept: Path, work: Path) -> bool:
    """Whether the training on features to which days were added since they were kept has ended."""
    from mmoe_rec.training.checkpoint import FinishedTraining

    finished, now = FinishedTraining.read(work), prepared.manifest["fingerprint"]
    added = now != FeatureFolder(kept / "features").manifest["fingerprint"]
    return added and finished is not None and finished.origin.features == now


def _forget(kept: Path) -> None:
    gone = kept.with_name(f".{kept.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    kept.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _link(source: Path, target: Path) -> None:
    """Copies a folder whose files are replaced and never changed: as links, where the file system has them."""

    def link(one: str, other: str) -> None:
        with suppress(OSError):
            os.link(one, other)
            return
        shutil.copy2(one, other)

    shutil.copytree(source, target, copy_function=link, dirs_exist_ok=True)
