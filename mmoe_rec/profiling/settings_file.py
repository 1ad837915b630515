"""The settings file that `mmoe-rec init` writes: YAML with a comment to what was guessed, and how it was made.

Its header holds the command and a checksum of the rest, so `init` never replaces what a person has written.
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
_MADE_BY = "# made by: "
_WIDTH = 118
_NO_NAME = frozenset({"log", "logs", "data", "parquet", "part", "interactions", "events"})


def name_from_path(path: str, ignored_words: frozenset[str] = _NO_NAME) -> str:
    """Name a data set after its path, whose words in `ignored_words` say nothing."""
    parts = [part.removesuffix(".parquet") for part in Path(path).parts]
    said = (each for each in reversed(parts) if each.lower() not in ignored_words and not set(each) & set("*?[=:"))
    return re.sub(r"[^\w.-]+", "_", next(said, "log")).strip("._-") or "log"


def draft_settings(
    name: str, log: str, work: str, event_logs: Sequence[str], corrections: Corrections, timezone: str | None
) -> tuple[str, InferredSchema]:
    """Read a log and write settings for it. Returns the text of the file, and the guesses."""
    with ExitStack() as open_logs:
        folder = Path(open_logs.enter_context(tempfile.TemporaryDirectory()))
        schema = infer_schema(open_logs.enter_context(open_profile(log, folder / "log", "LOG")), corrections)
        events = dict[str, EventLog]()
        for place, path in enumerate(event_logs):
            other = open_logs.enter_context(open_profile(path, folder / f"events-{place}", "--events"))
            own = re.sub(r"\W+", "_", name_from_path(path, _NO_NAME - {"events"}))
            own = own if own not in events else f"{own}_{place + 1}"
            events[own] = infer_event_log(path, own, other, schema)
        proposal = ProposedSettings(schema, [*events.values()], timezone)
        return _settings_text(name, log, work, schema, proposal), schema


def describe_guesses(schema: InferredSchema) -> Iterator[Any]:
    """Yield the guesses for the terminal."""
    if "user" not in schema.keys:
        yield f"warning: {schema.key_checks['user']}"
    table = Table(box=None, show_header=False, pad_edge=False)
    for key_name in ("user", "candidate", "request", "time"):
        if key_name in schema.keys:
            table.add_row(key_name, schema.keys[key_name], schema.key_checks.get(key_name, ""))
    for task in schema.tasks:
        seen = f"where {task.observed_when[0]}" if task.observed_when else ""
        late = f"final after {task.label_delay_days:g} days" if task.label_delay_days else ""
        table.add_row("task", task.column, ", ".join(filter(None, (task.objective, seen, late))))
    for role, names in schema.roles.items():
        if names:
            table.add_row(f"describe {role}s" if role in ("user", "candidate") else role, ", ".join(names), "")
    for why in dict.fromkeys(schema.left_out.values()):
        names = [name for name, reason in schema.left_out.items() if reason == why]
        table.add_row("left out", ", ".join(names), escape(why))
    yield table
    yield from (f"warning: {each}" for each in schema.warnings)


def check_replaceable(path: Path, log: str) -> str:
    """Return the command that made the file at a path, empty without a file.

    Raises:
        UserError: A person has written or changed the file, or it has the settings of another log.
    """
    if not path.exists():
        return ""
    try:
        header, found, rest = path.read_text(encoding="utf-8").partition(_CHECKSUM)
    except (OSError, UnicodeDecodeError):
        found, rest = "", ""
    told, _, body = rest.partition("\n")
    if not found or told.strip() != _checksum(body):
        raise UserError(f"'{path}' is not as mmoe-rec init wrote it. Name another --out, or move the file away")
    of = yaml.safe_load(body)["data"]["log"]
    if of.rstrip("/") != log.rstrip("/"):
        raise UserError(f"'{path}' has the settings of '{of}'. Name another --out for '{log}'")
    return header.rpartition(_MADE_BY)[2].strip()


def _checksum(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()[:16]


def _settings_text(name: str, log: str, work: str, schema: InferredSchema, proposal: ProposedSettings) -> str:
    body = "\n\n".join("\n".join(lines) for lines in _parts(name, log, work, schema, proposal) if lines) + "\n"
    span = ""
    if "time" in schema.keys:
        span = ", {} to {}".format(*map(format_time, schema.profile.time_range(schema.time_sql)))
    header = [
        f"# Settings for '{name}', as they were read from its log: {schema.profile.rows:,} rows{span}.",
        f'# What a person should check is marked "{CHECK_MARK}". To correct a guess, repeat the command with a further',
        "# option (--user, --candidate, --request, --time, --task, --leave-out, --placement), or edit this file: after",
        "# that, the command leaves it as it is. configs/template.yaml explains every setting.",
        f"{_MADE_BY}mmoe-rec {_one_line(shlex.join(sys.argv[1:]))}",
        _CHECKSUM + _checksum(body),
    ]
    return "\n".join(header) + "\n" + body


def _parts(name: str, log: str, work: str, schema: InferredSchema, proposal: ProposedSettings) -> list[list[str]]:
    """Lines of each section; none where there is no such section."""
    checks, data = schema.checks, ["data:", f"  log: {_flow(log)}"]
    data += ["  events:"] if proposal.events else []
    for each in proposal.events:
        data += _lines(2, each.name, CommentedSetting({"path": each.path, "time": each.time}, check=each.check))
    data.append(f"  work_dir: {_flow(work)}")
    if "duplicates" in schema.key_checks:
        data += _lines(1, "on_duplicates", CommentedSetting("keep", check=schema.key_checks["duplicates"]))
    roles: dict[str, CommentedSetting] = {
        role: CommentedSetting(names, check="see the features" if set(names) & set(checks) else "")
        for role, names in schema.roles.items()
        if names
    }
    columns = _section("columns", _columns(schema)) or ["columns: {} # each row is a request of its own"]
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
        [f"name: {_flow(name)}"],
        data,
        columns,
        _section("roles", roles),
        ["# No inputs:", *left_out] if left_out else [],
        _section("tasks", tasks),
        *(_section(key, getattr(proposal, key)) for key in ("features", "split", "model", "training")),
    ]


def _columns(schema: InferredSchema) -> dict[str, CommentedSetting]:
    found: dict[str, CommentedSetting] = {
        key_name: CommentedSetting(schema.keys[key_name], check=schema.key_checks.get(key_name, ""))
        for key_name in ("request", "user", "candidate", "time")
        if key_name in schema.keys
    }
    if schema.request_scope != "log":
        found["request_scope"] = CommentedSetting(schema.request_scope)
    if schema.time_unit is not None:
        found["time_unit"] = CommentedSetting(schema.time_unit)
    for key in ("sampling_rate", "weight"):
        column = getattr(schema, key)
        if column is not None:
            found[key] = CommentedSetting(column, check=schema.checks.get(column, ""))
    return found


def _section(name: str, entries: Mapping[str, CommentedSetting]) -> list[str]:
    lines = [line for key, entry in entries.items() for line in _lines(1, key, entry)]
    return [f"{name}:", *lines] if lines else []


def _lines(depth: int, key: str, entry: CommentedSetting) -> Iterable[str]:
    """A key with its value and comment, the comment above where the line would be long."""
    indent = "  " * depth
    comment = entry.note if not entry.check else f"check: {entry.check}" + (f"; {entry.note}" if entry.note else "")
    comment = _one_line(comment)
    line = f"{indent}{_flow(key)}: {_flow(entry.value)}"
    if comment and len(line) + len(comment) + 3 <= _WIDTH:
        yield f"{line} # {comment}"
        return
    if comment:
        yield f"{indent}# {comment}"
    yield line


def _one_line(text: str) -> str:
    """Text of a comment, without what would end it."""
    return " ".join("".join(each if each.isprintable() else " " for each in text).split())


def _flow(value: Any) -> str:
    """A value in one line of YAML."""
    if isinstance(value, datetime):
        return value.strftime("%Y-%m-%dT%H:%M:%S.%fZ" if value.microsecond else "%Y-%m-%dT%H:%M:%SZ")
    return dump_inline_yaml(value)
