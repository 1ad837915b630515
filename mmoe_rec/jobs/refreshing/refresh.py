"""A new version of the model that holds an alias, with tables that know the newest files of the log.

The order of steps is such that a kill between any two leaves something whole: the artifact is written beside the
features, registered (which is when a version exists), and only then the alias moves, if the version that was refreshed
still holds it. The run in MLflow is found again by the version and the files that it is made of, so the same command,
started again, ends what was begun, and registers nothing twice. Rows can't be counted twice: which files the tables
hold lies in the artifact, so whatever came to nothing never happened.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmoe_rec.errors import UserError
from mmoe_rec.inference.artifact import Artifact, iso_time, read_artifact, version_of
from mmoe_rec.jobs.refreshing.new_tables import advanced_tables, tables_from_log
from mmoe_rec.jobs.run_page import as_code, command
from mmoe_rec.locks import writing
from mmoe_rec.preprocessing.checks import check_apart
from mmoe_rec.preprocessing.tables import Tables
from mmoe_rec.settings.sections import Settings
from mmoe_rec.tracking import registry, runs
from mmoe_rec.tracking.outbox import UnreachableError
from mmoe_rec.tracking.registry import Version, describe_version, fetch_model, find_holder, move_alias


@dataclass(frozen=True)
class Served:
    """The version that holds an alias, and what its artifact says."""

    alias: str
    version: Version
    folder: Path
    about: Artifact

    @staticmethod
    def at(address: str, uri: str) -> Served:
        """Raises UserError for anything but models:/NAME@ALIAS with a version that can be served."""
        name, alias = _name_and_alias(address)
        version = find_holder(name, alias, uri)
        if version is None:
            raise UserError(f"no version of the model '{name}' holds the alias '{alias}': train one first")
        folder = fetch_model(version.address, uri)
        return Served(alias, version, folder, read_artifact(folder))


Journal = Callable[[Served], Mapping[str, Any]]
"""Puts what a journal holds into files of the logs, before these are looked at, and gives what they hold then: the
journal's "id", and the position "through" which they do.
"""


@dataclass(frozen=True)
class Refreshed:
    """A refresh. before: what held the alias; after: the version that holds it now; number: of the new version, None
    where there was nothing new; tables: of that version."""

    before: Served
    after: Version | None
    number: str | None = None
    tables: Tables | None = None


def refresh(settings: Settings, address: str, *, anew: bool = False, journal: Journal | None = None) -> Refreshed:
    """Registers a version with new tables of the model that holds an alias, and moves the alias.

    anew: make the tables of all rows of the log, instead of going on; journal: see `Journal`. One refresh at a time in
    `data.work`: another one waits. Raises UserError as `advanced_tables` or `tables_from_log`, and where MLflow is away
    or refuses.
    """
    uri, work = settings.tracking.address, Path(settings.data.work)
    check_apart(settings.data.log, settings.schema_, work)
    runs.check_server(settings.tracking.address, settings.experiment, unsent=Path(settings.data.work) / "unsent")
    out = work / "refreshed"
    with writing(out, "a refresh", "set `data.work` to another folder", queue=True):
        served = Served.at(address, uri)
        artifact = out / "model"
        try:
            through = None if journal is None else journal(served)
            if anew:
                made: Tables | None = tables_from_log(served.folder, settings, None, artifact)
            else:
                made = advanced_tables(served.folder, settings, artifact, through)
            if made is None or version_of(artifact) == version_of(served.folder):
                return Refreshed(served, served.version)
            return _registered(settings, served, made, artifact)
        finally:
            shutil.rmtree(out, ignore_errors=True)


def _registered(settings: Settings, served: Served, made: Tables, artifact: Path) -> Refreshed:
    uri, version = settings.tracking.address, served.version
    text = f"{version.address} {version_of(served.folder)} {version_of(artifact)}"
    key = f"refresh-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    after = iso_time(made.as_of)
    tags = {
        "refreshed.from": version.address,
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
                move_alias(version.name, served.alias, number, uri)
                now = Version(version.name, number, run.run_id)
            run.set_tags({"refreshed.holds": f"{served.alias}: {now is not None and now.number == number}"})
    except UnreachableError as error:
        raise UserError(
            f"{error}: '{served.alias}' is what it was, and the same command makes the version once MLflow answers"
        ) from None
    return Refreshed(served, now, number, made)


def _name_and_alias(address: str) -> tuple[str, str]:
    name, _, alias = address.removeprefix("models:/").rpartition("@")
    if not address.startswith("models:/") or not name or not alias or "/" in name:
        raise UserError(
            f"'{address}' is not what can be refreshed, as a new version takes over an alias of a registered model: "
            "give models:/NAME@ALIAS"
        )
    return name, alias
