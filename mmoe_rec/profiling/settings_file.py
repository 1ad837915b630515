"""The settings file that `mmoe-rec init` writes: YAML with comments on the guesses.

The header holds the command and a checksum of the rest, so `init` never replaces a file that a person has edited.
"""

import hashlib
import re
import shlex
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from rich.markup import escape
from rich.table import Table

from mmoe_rec.errors import UserError
from mmoe_rec.log.checks import format_time
from mmoe_rec.profiling.infer_schema import infer_schema
from mmoe_rec.profiling.inferred_schema import Corrections, InferredSchema
from mmoe_rec.profiling.profile import open_profile
from mmoe_rec.profiling.proposed_settings import (
    CommentedSetting,
    EventLog,
    ProposedSettings,
    infer_event_log,
    task_section,
)
from mmoe_rec.settings.sections import dump_inline_yaml

CHECK_MARK = "# check"
_CHECKSUM = "# checksum: "
_COMMAND = "# made by: "
_LINE_WIDTH = 118
_GENERIC_NAMES = frozenset({"log", "logs", "data", "parquet", "part", "interactions", "events"})


def name_from_path(path: str, ignored_words: frozenset[str] = _GENERIC_NAMES) -> str:
    """Return a name for a data set, taken from its path.

    Args:
        path: Path or glob of the files.
        ignored_words: Lowercase parts of the path that are too generic for a name.
    """
    parts = [part.removesuffix(".parquet") for part in Path(path).parts]
    names = (part for part in reversed(parts) if part.lower() not in ignored_words and not set(part) & set("*?[=:"))
    return re.sub(r"[^\w.-]+", "_", next(names, "log")).strip("._-") or "log"


def draft_settings(
    name: str, log: str, work: str, event_logs: Sequence[str], corrections: Corrections, timezone: str | None
) -> tuple[str, InferredSchema]:
    """Infer the schema of a log and write settings for it.

    Args:
        name: Name of the data set.
        log: Path of the log.
        work: Folder for the results (`data.work_dir`).
        event_logs: Paths of event logs.
        corrections: Columns that the user named. They replace guesses.
        timezone: Time zone of the users, None if not given.

    Returns:
        The text of the settings file, and the inferred schema.

    Raises:
        UserError: The log or an event log can't be used, or a correction doesn't fit.
    """
    with ExitStack() as open_logs:
        folder = Path(open_logs.enter_context(tempfile.TemporaryDirectory()))
        schema = infer_schema(open_logs.enter_context(open_profile(log, folder / "log", "LOG")), corrections)
        events = dict[str, EventLog]()
        for index, path in enumerate(event_logs):
            profile = open_logs.enter_context(open_profile(path, folder / f"events-{index}", "--events"))
            event_name = re.sub(r"\W+", "_", name_from_path(path, _GENERIC_NAMES - {"events"}))
            event_name = event_name if event_name not in events else f"{event_name}_{index + 1}"
            events[event_name] = infer_event_log(path, event_name, profile, schema)
        proposal = ProposedSettings(schema, [*events.values()], timezone)
        return _settings_text(name, log, work, schema, proposal), schema


def describe_guesses(schema: InferredSchema) -> Iterator[Any]:
    """Yield the guesses as text and a table for the terminal."""
    if "user" not in schema.keys:
        yield f"warning: {schema.key_checks['user']}"
    table = Table(box=None, show_header=False, pad_edge=False)
    for key_name in ("user", "candidate", "request", "time"):
        if key_name in schema.keys:
            table.add_row(key_name, schema.keys[key_name], schema.key_checks.get(key_name, ""))
    for task in schema.tasks:
        condition = f"where {task.observed_when[0]}" if task.observed_when else ""
        delay = f"final after {task.label_delay_days:g} days" if task.label_delay_days else ""
        table.add_row("task", task.column, ", ".join(filter(None, (task.objective, condition, delay))))
    for role, names in schema.roles.items():
        if names:
            table.add_row(f"describe {role}s" if role in ("user", "candidate") else role, ", ".join(names), "")
    for why in dict.fromkeys(schema.left_out.values()):
        names = [name for name, reason in schema.left_out.items() if reason == why]
        table.add_row("left out", ", ".join(names), escape(why))
    yield table
    yield from (f"warning: {warning}" for warning in schema.warnings)


def check_replaceable(path: Path, log: str) -> str:
    """Check that `init` may replace a settings file. Returns the command that wrote the file, "" if there is no file.

    Args:
        path: Path of the settings file.
        log: Path of the log.

    Raises:
        UserError: A person wrote or edited the file, or it belongs to another log.
    """
    if not path.exists():
        return ""
    try:
        header, separator, rest = path.read_text(encoding="utf-8").partition(_CHECKSUM)
    except (OSError, UnicodeDecodeError):
        separator, rest = "", ""
    checksum, _, body = rest.partition("\n")
    if not separator or checksum.strip() != _checksum(body):
        raise UserError(f"'{path}' has been edited since mmoe-rec init wrote it. Name another --out, or move the file.")
    file_log = yaml.safe_load(body)["data"]["log"]
    if file_log.rstrip("/") != log.rstrip("/"):
        raise UserError(f"'{path}' has the settings of '{file_log}'. Name another --out for '{log}'.")
    return header.rpartition(_COMMAND)[2].strip()


def _checksum(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()[:16]


def _settings_text(name: str, log: str, work: str, schema: InferredSchema, proposal: ProposedSettings) -> str:
    body = "\n\n".join("\n".join(lines) for lines in _section_lines(name, log, work, schema, proposal) if lines) + "\n"
    span = ""
    if "time" in schema.keys:
        span = ", {} to {}".format(*map(format_time, schema.profile.time_range(schema.time_sql)))
    header = [
        f"# Settings for '{name}', inferred from its log: {schema.profile.rows:,} rows{span}.",
        f'# Guesses to check are marked "{CHECK_MARK}". To correct a guess, repeat the command with an option (--user,',
        "# --candidate, --request, --time, --task, --leave-out, --placement), or edit this file. The command never",
        "# replaces an edited file. configs/template.yaml explains every setting.",
        f"{_COMMAND}mmoe-rec {_one_line(shlex.join(sys.argv[1:]))}",
        _CHECKSUM + _checksum(body),
    ]
    return "\n".join(header) + "\n" + body


def _section_lines(
    name: str, log: str, work: str, schema: InferredSchema, proposal: ProposedSettings
) -> list[list[str]]:
    """Return a list of lines for each section, empty for an absent section."""
    checks, data = schema.checks, ["data:", f"  log: {_to_yaml(log)}"]
    data += ["  events:"] if proposal.events else []
    for events in proposal.events:
        entry = CommentedSetting({"path": events.path, "time": events.time}, check=events.check)
        data += _entry_lines(2, events.name, entry)
    data.append(f"  work_dir: {_to_yaml(work)}")
    if "duplicates" in schema.key_checks:
        data += _entry_lines(1, "on_duplicates", CommentedSetting("keep", check=schema.key_checks["duplicates"]))
    roles: dict[str, CommentedSetting] = {
        role: CommentedSetting(names, check="see the features" if set(names) & set(checks) else "")
        for role, names in schema.roles.items()
        if names
    }
    columns = _section("columns", _columns(schema)) or ["columns: {} # each row is its own request"]
    if "user" not in schema.keys:
        columns.insert(1, f"  {CHECK_MARK}: {_one_line(schema.key_checks['user'])}")
    left_out = [
        f"#   {_one_line(column)}: {_one_line(why)}{f'  {CHECK_MARK}' if column in checks else ''}"
        for column, why in schema.left_out.items()
    ]
    tasks = {
        task.name: CommentedSetting(task_section(task), "; ".join(task.notes), "; ".join(task.checks))
        for task in schema.tasks
    }
    return [
        [f"name: {_to_yaml(name)}"],
        data,
        columns,
        _section("roles", roles),
        ["# Columns left out:", *left_out] if left_out else [],
        _section("tasks", tasks),
        *(_section(key, getattr(proposal, key)) for key in ("features", "split", "model", "training")),
    ]


def _columns(schema: InferredSchema) -> dict[str, CommentedSetting]:
    columns: dict[str, CommentedSetting] = {
        key_name: CommentedSetting(schema.keys[key_name], check=schema.key_checks.get(key_name, ""))
        for key_name in ("request", "user", "candidate", "time")
        if key_name in schema.keys
    }
    if schema.request_scope != "log":
        columns["request_scope"] = CommentedSetting(schema.request_scope)
    if schema.time_unit is not None:
        columns["time_unit"] = CommentedSetting(schema.time_unit)
    for key in ("sampling_rate", "weight"):
        if (column := getattr(schema, key)) is not None:
            columns[key] = CommentedSetting(column, check=schema.checks.get(column, ""))
    return columns


def _section(name: str, entries: Mapping[str, CommentedSetting]) -> list[str]:
    lines = [line for key, entry in entries.items() for line in _entry_lines(1, key, entry)]
    return [f"{name}:", *lines] if lines else []


def _entry_lines(depth: int, key: str, entry: CommentedSetting) -> Iterable[str]:
    """Yield one line with a key, its value and a comment, or the comment on its own line first if this is too long."""
    indent = "  " * depth
    comment = entry.note if not entry.check else f"check: {entry.check}" + (f"; {entry.note}" if entry.note else "")
    comment = _one_line(comment)
    line = f"{indent}{_to_yaml(key)}: {_to_yaml(entry.value)}"
    if comment and len(line) + len(comment) + 3 <= _LINE_WIDTH:
        yield f"{line} # {comment}"
        return
    if comment:
        yield f"{indent}# {comment}"
    yield line


def _one_line(text: str) -> str:
    """Return a comment's text on one line, without unprintable characters."""
    return " ".join("".join(character if character.isprintable() else " " for character in text).split())


def _to_yaml(value: Any) -> str:
    if isinstance(value, datetime):
        return value.strftime("%Y-%m-%dT%H:%M:%S.%fZ" if value.microsecond else "%Y-%m-%dT%H:%M:%SZ")
    return dump_inline_yaml(value)
