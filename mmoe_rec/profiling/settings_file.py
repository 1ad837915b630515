"""The settings file that `mmoe-rec init` writes: YAML with a comment to what was guessed, and how it was made.

Its header holds the command and a checksum of the rest, so the command finds what it was told before, and never
replaces what a person has written.
"""

import hashlib
import shlex
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from mmoe_rec.errors import UserError
from mmoe_rec.log.checks import format_time
from mmoe_rec.profiling.meaning import Meaning
from mmoe_rec.profiling.proposal import Entry, Events, Proposal, describe_task
from mmoe_rec.settings.sections import dump_flow

CHECK = "# check"
_COMMAND, _CHECKSUM = "# made by: mmoe-rec init ", "# checksum: "
_WIDTH = 118


def words_before(path: Path) -> list[str]:
    """The words that an earlier command had after `mmoe-rec init`, none where there is no such file. Raises UserError
    where a person has written or changed the file."""
    if not path.exists():
        return []
    other = "name another --out, or move it away"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"'{path}' is there already and can't be read ({error}): {other}") from None
    head, found, body = text.partition(_CHECKSUM)
    if not found or _COMMAND not in head:
        raise UserError(f"'{path}' is there already, and mmoe-rec init has not written it: {other}")
    told, _, body = body.partition("\n")
    if told.strip() != _checksum(body):
        raise UserError(f"'{path}' was changed by hand since mmoe-rec init wrote it: {other}")
    line = next(each for each in head.splitlines() if each.startswith(_COMMAND))
    return shlex.split(line.removeprefix(_COMMAND))


def _checksum(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()[:16]


def settings_text(
    name: str,
    log: str,
    work: str,
    words: Sequence[str],
    meaning: Meaning,
    proposal: Proposal,
    events: Sequence[Events],
) -> str:
    """The whole file. words: of the command, after `mmoe-rec init`."""
    parts = _parts(name, log, work, meaning, proposal, events)
    body = "\n\n".join("\n".join(lines) for lines in parts if lines) + "\n"
    span = ""
    if "time" in meaning.keys:
        first, last = meaning.profile.row_of_times(meaning.time)
        span = f", {format_time(first)} to {format_time(last)}"
    header = [
        f"# Settings for '{name}', as they were read from its log: {meaning.profile.rows:,} rows{span}.",
        f'# What a person should check is marked "{CHECK}". To correct a guess, type the command again with what is',
        "# right (--user, --candidate, --request, --time, --task, --leave-out, --placement), or edit this file: after",
        "# that, the command leaves it as it is. configs/template.yaml explains every setting.",
        _COMMAND + shlex.join(words),
        _CHECKSUM + _checksum(body),
    ]
    return "\n".join(header) + "\n" + body


def _parts(
    name: str, log: str, work: str, meaning: Meaning, proposal: Proposal, events: Sequence[Events]
) -> list[list[str]]:
    """Lines of each section; none where there is no such section."""
    checks, data = meaning.checks, ["data:", f"  log: {_flow(log)}"]
    data += ["  events:"] if events else []
    for each in events:
        data += _lines(2, each.name, Entry({"path": each.path, "time": each.time}, check=each.check))
    data.append(f"  work: {_flow(work)}")
    if "duplicates" in meaning.key_checks:
        data += _lines(1, "duplicates", Entry("keep", check=meaning.key_checks["duplicates"]))
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
    if entry.heading:
        yield from ("", f"{indent}# {entry.heading}")
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
