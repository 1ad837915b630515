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
from mmoe_rec.profiling.guess import guess
from mmoe_rec.profiling.meaning import Corrections, Meaning
from mmoe_rec.profiling.profile import open_profile
from mmoe_rec.profiling.proposal import Entry, Events, Proposal, describe_task, read_events
from mmoe_rec.settings.sections import dump_flow

CHECK = "# check"
_CHECKSUM = "# checksum: "
_MADE_BY = "# made by: "
_WIDTH = 118
_NO_NAME = frozenset({"log", "logs", "data", "parquet", "part", "interactions", "events"})


def name_of(path: str, passed: frozenset[str] = _NO_NAME) -> str:
    """Name a data set after its path, whose words in `passed` say nothing."""
    parts = [part.removesuffix(".parquet") for part in Path(path).parts]
    said = (each for each in reversed(parts) if each.lower() not in passed and not set(each) & set("*?[=:"))
    return re.sub(r"[^\w.-]+", "_", next(said, "log")).strip("._-") or "log"


def draft_settings(
    name: str, log: str, work: str, event_logs: Sequence[str], said: Corrections, timezone: str | None
) -> tuple[str, Meaning]:
    """Read a log and write settings for it. Returns the text of the file, and the guesses."""
    with ExitStack() as open_logs:
        folder = Path(open_logs.enter_context(tempfile.TemporaryDirectory()))
        meaning = guess(open_logs.enter_context(open_profile(log, folder / "log", "LOG")), said)
        events = dict[str, Events]()
        for place, path in enumerate(event_logs):
            other = open_logs.enter_context(open_profile(path, folder / f"events-{place}", "--events"))
            own = re.sub(r"\W+", "_", name_of(path, _NO_NAME - {"events"}))
            own = own if own not in events else f"{own}_{place + 1}"
            events[own] = read_events(path, own, other, meaning)
        proposal = Proposal(meaning, [*events.values()], timezone)
        return _settings_text(name, log, work, meaning, proposal), meaning


def describe_guesses(meaning: Meaning) -> Iterator[Any]:
    """Yield the guesses for the terminal."""
    if "user" not in meaning.keys:
        yield f"warning: {meaning.key_checks['user']}"
    table = Table(box=None, show_header=False, pad_edge=False)
    for purpose in ("user", "candidate", "request", "time"):
        if purpose in meaning.keys:
            table.add_row(purpose, meaning.keys[purpose], meaning.key_checks.get(purpose, ""))
    for task in meaning.tasks:
        seen = f"where {task.observed_when[0]}" if task.observed_when else ""
        late = f"final after {task.label_delay_days:g} days" if task.label_delay_days else ""
        table.add_row("task", task.column, ", ".join(filter(None, (task.objective, seen, late))))
    for role, names in meaning.roles.items():
        if names:
            table.add_row(f"describe {role}s" if role in ("user", "candidate") else role, ", ".join(names), "")
    for why in dict.fromkeys(meaning.left_out.values()):
        names = [name for name, reason in meaning.left_out.items() if reason == why]
        table.add_row("left out", ", ".join(names), escape(why))
    yield table
    yield from (f"warning: {each}" for each in meaning.warnings)


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


def _settings_text(name: str, log: str, work: str, meaning: Meaning, proposal: Proposal) -> str:
    body = "\n\n".join("\n".join(lines) for lines in _parts(name, log, work, meaning, proposal) if lines) + "\n"
    span = ""
    if "time" in meaning.keys:
        span = ", {} to {}".format(*map(format_time, meaning.profile.row_of_times(meaning.time)))
    header = [
        f"# Settings for '{name}', as they were read from its log: {meaning.profile.rows:,} rows{span}.",
        f'# What a person should check is marked "{CHECK}". To correct a guess, repeat the command with a further',
        "# option (--user, --candidate, --request, --time, --task, --leave-out, --placement), or edit this file: after",
        "# that, the command leaves it as it is. configs/template.yaml explains every setting.",
        f"{_MADE_BY}mmoe-rec {_one_line(shlex.join(sys.argv[1:]))}",
        _CHECKSUM + _checksum(body),
    ]
    return "\n".join(header) + "\n" + body


def _parts(name: str, log: str, work: str, meaning: Meaning, proposal: Proposal) -> list[list[str]]:
    """Lines of each section; none where there is no such section."""
    checks, data = meaning.checks, ["data:", f"  log: {_flow(log)}"]
    data += ["  events:"] if proposal.events else []
    for each in proposal.events:
        data += _lines(2, each.name, Entry({"path": each.path, "time": each.time}, check=each.check))
    data.append(f"  work: {_flow(work)}")
    if "duplicates" in meaning.key_checks:
        data += _lines(1, "on_duplicates", Entry("keep", check=meaning.key_checks["duplicates"]))
    roles: dict[str, Entry] = {
        role: Entry(names, check="see the features" if set(names) & set(checks) else "")
        for role, names in meaning.roles.items()
        if names
    }
    columns = _section("columns", _columns(meaning)) or ["columns: {} # each row is a request of its own"]
    if "user" not in meaning.keys:
        columns.insert(1, f"  {CHECK}: {_one_line(meaning.key_checks['user'])}")
    left_out = [
        f"#   {_one_line(column)}: {_one_line(why)}{f'  {CHECK}' if column in checks else ''}"
        for column, why in meaning.left_out.items()
    ]
    tasks = {
        task.name: Entry(describe_task(task), "; ".join(task.notes), "; ".join(task.checks)) for task in meaning.tasks
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


def _columns(meaning: Meaning) -> dict[str, Entry]:
    found: dict[str, Entry] = {
        purpose: Entry(meaning.keys[purpose], check=meaning.key_checks.get(purpose, ""))
        for purpose in ("request", "user", "candidate", "time")
        if purpose in meaning.keys
    }
    if meaning.request_scope != "log":
        found["request_scope"] = Entry(meaning.request_scope)
    if meaning.time_unit is not None:
        found["time_unit"] = Entry(meaning.time_unit)
    for key in ("sampling_rate", "weight"):
        column = getattr(meaning, key)
        if column is not None:
            found[key] = Entry(column, check=meaning.checks.get(column, ""))
    return found


def _section(name: str, entries: Mapping[str, Entry]) -> list[str]:
    lines = [line for key, entry in entries.items() for line in _lines(1, key, entry)]
    return [f"{name}:", *lines] if lines else []


def _lines(depth: int, key: str, entry: Entry) -> Iterable[str]:
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
    return dump_flow(value)
