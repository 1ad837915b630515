"""What a join reads: the columns of requests and events that the settings ask for, and the files that have them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from mmoe_rec.errors import UserError
from mmoe_rec.log.checks import BadFile
from mmoe_rec.log.columns import column_uses
from mmoe_rec.log.files import is_remote
from mmoe_rec.outcomes.reading import Source, has_column
from mmoe_rec.request_log import names
from mmoe_rec.settings.columns import Role, Use
from mmoe_rec.settings.outcomes import OutcomeEvents, Outcomes, label_columns
from mmoe_rec.settings.sections import Settings

EVENT_ID = "event_id"


@dataclass(frozen=True)
class Events:
    """A log of events: its settings, its files, whether rows have an `event_id`, and the longest window in which they
    count, microseconds."""

    settings: OutcomeEvents
    source: Source
    has_ids: bool
    window: int


@dataclass(frozen=True)
class Plan:
    """The settings, and what is read. inputs: columns that features read, with their roles; placement: of them, those
    that events say; labels: columns of labels."""

    settings: Settings
    requests: Source
    events: dict[str, Events]
    inputs: dict[str, Role]
    placement: list[str]

    @property
    def outcomes(self) -> Outcomes:
        """The section of the settings."""
        return self.settings.outcomes

    @property
    def window(self) -> int:
        """The longest window, microseconds."""
        return max(each.microseconds for each in self.outcomes.windows)


def plan_of(settings: Settings, requests: str, events: str | None) -> Plan:
    """Opens all files. requests, events: addresses of folders. Raises UserError where something is missing."""
    outcomes, schema = settings.outcomes, settings.schema_
    for column, tasks in label_columns(schema).items():
        if column not in outcomes.labels:
            raise UserError(
                f"outcomes.labels does not say where column '{column}' comes from, which task '{tasks[0]}' reads; add "
                f"outcomes.labels.{column} with the log of events and within_days"
            )
    inputs, uses = schema.input_columns(), column_uses(schema)
    placement = [name for name, role in inputs.items() if role == "placement"]
    if outcomes.shown is None and (unknown := [name for name in placement if name != outcomes.rank]):
        raise UserError(
            f"features read column '{unknown[0]}' of role placement, but nothing says where candidates were shown: set "
            "outcomes.shown to a log of events with that column, or outcomes.rank where it is the rank in the reply"
        )
    opened = _open_requests(settings, requests, {name: uses[name] for name in inputs if name not in placement})
    found = {}
    for name in dict.fromkeys(each.events for each in outcomes.windows):
        found[name] = _open_events(settings, name, events, {column: uses[column] for column in placement})
        _check_types(settings, name, found[name], opened)
    return Plan(settings, opened, found, inputs, placement)


def _open_requests(settings: Settings, address: str, columns: Mapping[str, Use]) -> Source:
    own: dict[str, Use] = {
        names.REQUEST: "key",
        names.AT: "time",
        names.RANK: "number",
        names.SHARE: "number",
        names.ARTIFACT: "key",
    }
    time = settings.columns.time
    try:
        return Source.open(
            address, "--requests", {**columns, **own}, time, settings.columns.time_unit, settings.data.skip_bad_files
        )
    except BadFile as problem:
        raise BadFile(
            f"{problem}. These are requests as `serve --log-requests` writes them, with the columns that the features "
            "of the model read that ranked them; the settings ask for others, so move requests of other models away, "
            "or join with the settings of that model",
            problem.address,
        ) from None


def _open_events(settings: Settings, name: str, folder: str | None, placement: Mapping[str, Use]) -> Events:
    outcomes, columns = settings.outcomes, settings.columns
    section = outcomes.events[name]
    address, setting = _address(settings, name, folder)
    uses: dict[str, Use] = {columns.user: "key", columns.candidate: "key"}
    if section.request is not None:
        uses[section.request] = "key"
    for source in outcomes.labels.values():
        if source.events == name and source.value is not None:
            uses[source.value] = "number"
    if outcomes.shown is not None and outcomes.shown.events == name:
        uses |= placement
    if section.time in uses:
        raise UserError(f"column '{section.time}' of events '{name}' is the time and something else; add a column")
    has_ids = has_column(address, setting, EVENT_ID)
    if has_ids:
        uses[EVENT_ID] = "key"
    uses[section.time] = "time"
    opened = Source.open(address, setting, uses, section.time, columns.time_unit, settings.data.skip_bad_files)
    window = max(each.microseconds for each in outcomes.windows if each.events == name)
    return Events(section, opened, has_ids, window)


def _address(settings: Settings, name: str, folder: str | None) -> tuple[str, str]:
    """Where a log of events lies, and the argument or setting that says so."""
    if folder is not None and is_remote(folder):
        return f"{folder.rstrip('/')}/{name}", "--events"
    if folder is not None and Path(folder, name).exists():
        return str(Path(folder, name)), "--events"
    if name in settings.data.events:
        return settings.data.events[name].path, f"data.events.{name}.path"
    where = "give --events FOLDER with a" if folder is None else f"--events '{folder}' has no"
    raise UserError(f"{where} folder '{name}' of Parquet files; or say where they are in data.events.{name}.path")


def _check_types(settings: Settings, name: str, events: Events, requests: Source) -> None:
    """Raises UserError where a column by which events are joined has another type than in the requests."""
    columns = settings.columns
    pairs = {columns.user: columns.user, columns.candidate: columns.candidate}
    if events.settings.request is not None:
        pairs[events.settings.request] = names.REQUEST
    for mine, theirs in pairs.items():
        one, other = events.source.types.get(mine), requests.types.get(theirs)
        if one is not None and other is not None and not pa.types.is_null(one) and one != other:
            raise UserError(
                f"column '{mine}' of events '{name}' holds {one}, and column '{theirs}' of the requests {other}: no "
                "event would belong to any request; write both with one type"
            )
