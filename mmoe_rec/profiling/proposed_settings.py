"""Which features, split and training a log's meaning suggests, as the tree of a settings file with a note to each part.

Counters and histories carry most: of the user, the candidate, both, and of what describes them, for each task and each
log of events. How many there are is bounded, so a log of 300 columns trains as well.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from mmoe_rec.errors import UserError
from mmoe_rec.log.rows import MICROSECONDS_PER_DAY
from mmoe_rec.profiling.inferred_schema import InferredSchema, InferredTask
from mmoe_rec.profiling.name_hints import CODE_WORDS, TIME_WORDS, has_word, split_words
from mmoe_rec.profiling.profile import Column, Profile, to_days

_WINDOWS = (91, 28, 7, 1, 0.125)
_MOST_ATTRIBUTES, _MOST_CONTEXTS, _MOST_GROUPS = 4, 3, 2
_MOST_SHARED = 5000
"""Values of a context's column for which it is counted with candidates; a finer one, as a session, with users alone."""
_MOST_PAIRS, _ROWS_OF_CELL = 4, 20
"""Pairs of what describes users and candidates that are counted together, and rows that each of their values has."""
_TEST, _VALIDATION = 0.2, 0.1


@dataclass
class CommentedSetting:
    """A key of a section, with its value, a comment, and why a person should check it."""

    value: Any
    note: str = ""
    check: str = ""


@dataclass
class EventLog:
    """A log of events. name: of it in settings; time: its column."""

    name: str
    path: str
    profile: Profile
    time: str
    check: str = ""


class ProposedSettings:
    """Features, split, model and training for a log: sections of a settings file. Raises UserError where its rows can't
    be split by time.

    train_days: between the first and the last training row.
    """

    def __init__(self, schema: InferredSchema, events: Sequence[EventLog], timezone: str | None) -> None:
        self.profile, self.schema, self.events, self.timezone = schema.profile, schema, events, timezone
        self.columns, self.keys = schema.columns, schema.keys
        self.features, self.split, self.training, self.model = (dict[str, CommentedSetting]() for _ in range(4))
        self.lists = schema.rows_per_request > 1.05
        self.train_days = 0.0
        self._propose_split()
        self._propose_columns()
        if "time" in self.keys:
            self._propose_histories()
            self._propose_counters()
        self._propose_training()

    def _add(self, name: str, value: Mapping[str, Any], note: str = "", check: str = "") -> None:
        name = re.sub(r"\W+", "_", name).strip("_") or "feature"
        taken = {each.casefold() for each in self.features}
        unique, number = name, 2
        while unique.casefold() in taken:
            unique, number = f"{name}_{number}", number + 1
        self.features[unique] = CommentedSetting(dict(value), note, check)

    # The split

    def _propose_split(self) -> None:
        schema, split = self.schema, self.split
        if schema.split is not None:
            column, parts = schema.split
            split["column"] = CommentedSetting(column)
            for name, values in parts.items():
                if values != [name]:
                    split[name] = CommentedSetting(values)
            return
        t = self.columns[self.keys["time"]].time_sql
        first, last = self.profile.time_range(t)
        mature = max((each.label_delay_days for each in schema.tasks), default=0.0)
        end = last - round(mature * MICROSECONDS_PER_DAY) if mature else last + 1
        usable = f"{t} < {end}"
        if end <= first or self.profile.count_rows(usable) < 0.2 * self.profile.rows:
            raise UserError(
                f"labels of '{self.profile.name}' are final after {mature:g} days, and the log spans "
                f"{to_days(last - first):.1f}: too little of it is known"
            )
        ends = self._cut(t, first, end)
        split["train_end"] = CommentedSetting(
            _as_time(ends[0]), f"the first {self.profile.fraction(f'{t} < {ends[0]}'):.0%} of the rows"
        )
        split["validation_end"] = CommentedSetting(_as_time(ends[1]), "these rows choose the best state of the model")
        if mature:
            split["test_end"] = CommentedSetting(
                _as_time(end), f"labels are final {mature:g} days later, when the log ends"
            )
        self.train_days = to_days(ends[0] - first)

    def _cut(self, t: str, first: int, end: int) -> tuple[int, int]:
        """Return the first times of validation and test rows: midnights (UTC) if these are fair, else times of rows."""
        usable, goals = f"{t} < {end}", (1 - _TEST - _VALIDATION, 1 - _TEST)
        at = [int(self.profile.quantile(t, goal, usable)) for goal in goals]
        midnights = [round(each / MICROSECONDS_PER_DAY) * MICROSECONDS_PER_DAY for each in at]
        if to_days(end - first) >= 20 and not self._find_unfair(t, midnights, usable):
            return midnights[0], midnights[1]
        groups = f"SELECT {t} AS t, count(*) AS n FROM log WHERE {usable} GROUP BY 1"
        times = (
            f"SELECT t, sum(n) OVER w - n before, row_number() OVER w place FROM ({groups}) WINDOW w AS (ORDER BY t)"
        )
        number, found = goals[1] * self.profile.count_rows(usable), [end]
        for place, kept in ((3, 1.0), (2, goals[0] / goals[1])):  # first where the test rows begin
            best = f"WHERE place >= {place} AND t < {found[0]} ORDER BY abs(before - {number * kept}), t LIMIT 1"
            cut, number = self.profile.row(f"SELECT min(t), min(before) FROM (SELECT * FROM ({times}) {best})")
            if cut is None:
                raise UserError(f"'{self.profile.name}' has fewer than three different times. Split it by finer times")
            number, found = float(number), [int(cut), *found]
        if parts := self._find_unfair(t, found, usable):
            why = f"{parts} of the rows are for training, validation and test, because many have the same time"
            self.schema.warnings.append(f"{why}. Write finer times.")
        return found[0], found[1]

    def _find_unfair(self, t: str, cuts: Sequence[int], usable: str) -> str:
        """Return the fractions of training, validation and test rows, "" if each is between half and twice its goal."""
        train, both = (self.profile.fraction(f"{t} < {cut}", usable) for cut in cuts[:2])
        parts, goals = (train, both - train, 1 - both), (1 - _TEST - _VALIDATION, _VALIDATION, _TEST)
        is_fair = all(0.5 < part / goal < 2 for part, goal in zip(parts, goals, strict=True))
        return "" if is_fair else ", ".join(f"{part:.0%}" for part in parts)

    # Columns as they are

    def _propose_columns(self) -> None:
        for key_name in ("user", "candidate"):
            if key_name in self.keys:
                self._propose_key(key_name)
        for role in ("user", "candidate", "context", "placement"):
            for name in list(self.schema.roles[role]):
                if not self._propose_column(self.columns[name], role):
                    self.schema.roles[role].remove(name)
        time = self.keys.get("time")
        parts = ["hour"] * (time is not None and self._tells_hours(time)) + ["weekday"] * (self.train_days >= 14)
        if parts:
            zone = {"timezone": self.timezone} if self.timezone else {}
            check = "" if zone else "in which time zone do users live? UTC, unless --timezone says, as Europe/Berlin"
            self._add("request_time", {"kind": "time", "parts": parts, **zone}, check=check)

    def _propose_key(self, key_name: str) -> None:
        column = self.columns[self.keys[key_name]]
        rows = self.profile.rows_per_key([column.name])
        value: dict[str, Any] = {"kind": "id", "column": column.name}
        note = f"about {column.distinct:,} values, {rows:.3g} rows each"
        if key_name == "candidate":
            value |= {"min_count": 5, "oov_buckets": 64} if column.distinct > 500 else {"min_count": 2}
        if column.distinct > 1_000_000:
            value |= {"dim": 32, "max_size": 2_000_000}
        self._add(column.name, value, note)

    def _tells_hours(self, name: str) -> bool:
        """Whether times are finer than days."""
        t = self.columns[name].time_sql
        return self.columns[name].type != "DATE" and self.profile.fraction(f"{t} % {MICROSECONDS_PER_DAY} <> 0") > 0.5

    def _propose_column(self, each: Column, role: str) -> bool:
        """Adds the features of a column; False where there is none."""
        check = self.schema.checks.get(each.name, "")
        doubt = ""
        if each.kind == "number" and not {"id", "ids", "code", "zip", "plz"}.isdisjoint(split_words(each.name)):
            doubt = f"if they are ids, cast them: values of type {each.type} are read as amounts"
        elif each.unit is not None and not has_word(each.name, TIME_WORDS):
            doubt = f"read as amounts: if they are {each.unit} since 1970, write timestamps, and if they are ids, text"
        check = "; ".join(filter(None, (doubt, check)))
        made, whose = self._kind_of(each), self.columns.get(self.keys.get(role, ""))
        if made is None:
            self.schema.left_out[each.name] = "its values are too many and too rare to learn from"
            return False
        # A plain table's columns are no candidate's own: a region does not name the job that it stands beside.
        is_own = whose is not None and each.kind == "text" and not self.schema.is_plain_table
        if whose is not None and is_own and each.distinct > max(50, 0.9 * whose.distinct):
            self.schema.left_out[each.name] = f"as a name, it says the same as {whose.name}"
            return False
        for suffix, value, note in made:
            self._add(each.name + suffix, value, note, check)
        return True

    def _kind_of(self, each: Column) -> list[tuple[str, dict[str, Any], str]] | None:  # noqa: PLR0911 - one line a case reads best
        """Ends of names, settings and comments of its features; None where it can't be one."""
        column, values = {"column": each.name}, each.rows - each.nulls
        if each.kind == "time" or (each.unit is not None and has_word(each.name, TIME_WORDS)):
            value, note = {"kind": "time", **column, "parts": ["age"]}, "days from it to the request"
            return [("_age", value, note)] if "time" in self.keys else None
        if each.kind == "keys":
            longest = {"max_length": each.length_range[1]} if each.length_range[1] < 50 else {}
            return [("", {"kind": "ids", **column, "dim": 8, **longest}, "")]
        if each.kind == "vector":
            return [("", {"kind": "vector", **column, "size": each.length_range[0]}, "")]
        if each.kind == "number" or (each.kind == "integer" and not self._is_code(each)):
            return [("", {"kind": "numeric", **column, **self._shape(each)}, "")]
        if each.distinct > max(1000, 0.5 * values):
            return None
        if each.distinct > max(1000, 0.1 * values):
            return []  # as a session, which counters may read
        return [("", {"kind": "id", **column, **self._sizes(each)}, f"about {each.distinct:,} values")]

    def _is_code(self, each: Column) -> bool:
        """Whether integers are names of things rather than amounts: by a word, or as they are few and far apart."""
        if has_word(each.name, CODE_WORDS):
            return True
        if each.unit is not None:  # moments, rather
            return False
        return each.distinct >= 20 and each.high - each.low > 10_000 * each.distinct and each.distinct < 100_000

    def _sizes(self, each: Column) -> dict[str, Any]:
        if self.schema.is_plain_table:
            return {"min_count": 8, "oov_buckets": 1}
        if each.distinct <= 50:
            return {"dim": 4, "min_count": 1, "oov_buckets": 1}
        return {"dim": 8} if each.distinct <= 1000 else {}

    def _shape(self, each: Column) -> dict[str, Any]:
        """How a number is brought to a common size."""
        shape: dict[str, Any] = {}
        middle, high = (float(self.profile.quantile(f"{each.sql}::DOUBLE", fraction)) for fraction in (0.5, 0.99))
        if each.low >= 0 and not each.is_binary and high > 20 * max(middle, high / 1e6):
            shape["transform"] = "log"
        if each.kind == "integer" or each.distinct <= 1000:
            shape["values"] = "auto"
        return shape

    # What was known before the request

    def _groups(self, role: str, most: int, least: int, limit: float) -> list[str]:
        """Columns of a role whose values many rows share, the finest first."""
        fitting = []
        for name in self.schema.roles[role]:  # type: ignore[index]
            each = self.columns[name]
            usable = each.kind in ("text", "integer", "boolean") and each.unit is None
            # Without lists the whole context is in doubt, and an input nevertheless.
            doubts = role == "candidate" or (role == "context" and self.lists)
            usable &= not doubts or name not in self.schema.checks
            if usable and each.kind == "integer" and not self._is_code(each) and each.distinct > 100:
                usable = False
            if usable and each.nulls < 0.5 * each.rows and least <= each.distinct <= limit:
                fitting.append((-each.distinct, name))
        return [name for _, name in sorted(fitting)[:most]]

    def _windows(self, many: bool, events: bool = False) -> list[float | None]:
        """Trailing windows that fit into the training rows twice or more; of labels none of a quarter of a year, since
        these mature and are few."""
        fine = self._tells_hours(self.keys["time"])
        usable = [each for each in _WINDOWS if each <= self.train_days / 2 and (fine or each >= 1)]
        usable = usable if events else [each for each in usable if each <= 28]
        return [None, *(usable if many else usable[: 1 + events])]

    def _counter_keys(self, columns: Mapping[str, Any], has_few_labels: bool = False) -> list[tuple[list[str], bool]]:
        """Keys, and whether many windows are worth it, for a log with these columns.

        has_few_labels: of the user, the candidate and what describes it alone, for a task with few labels.
        """
        user, candidate = self.keys.get("user"), self.keys.get("candidate")
        things = self.columns[candidate].distinct if candidate else 0
        of_candidate = self._groups("candidate", _MOST_ATTRIBUTES, 3, 0.5 * things)
        of_context = self._groups("context", _MOST_CONTEXTS, 2, _MOST_SHARED)
        finer = self._groups("context", 1, _MOST_SHARED + 1, 0.2 * self.profile.rows)
        of_user = self._groups("user", _MOST_GROUPS, 2, 200)
        keys: list[tuple[str | None, ...]] = [(user,), (candidate,), (user, candidate)]
        for each in of_candidate:
            keys += [(each,), (user, each)]
        # What users of a country like: all that is known of a user who is new.
        pairs = [(group, each) for group in of_user for each in of_candidate]
        cells = {pair: self.columns[pair[0]].distinct * self.columns[pair[1]].distinct for pair in pairs}
        pairs = [pair for pair in pairs if cells[pair] * _ROWS_OF_CELL <= self.profile.rows]
        keys += sorted(pairs, key=lambda pair: (cells[pair], pair))[: 1 if has_few_labels else _MOST_PAIRS]
        if not has_few_labels:
            keys += [(user, each) for each in finer]
            for each in of_context:
                own = [] if self.lists else [(each,)]  # within a list it is the same for all
                keys += [*own, (candidate, each), (user, each)]
            keys += [(candidate, each) for each in of_user]
        there = [[name for name in key if name in columns and name] for key in keys if set(key) <= columns.keys()]
        return [(key, key in ([user], [candidate])) for key in there]

    def _propose_counters(self) -> None:
        for task in self.schema.tasks:
            if task.kind != "binary" and len(self.schema.tasks) > 1:
                continue
            later = task.observed_when is not None
            for by, many in self._counter_keys(self.columns, later):
                windows, more = self._windows(many), dict[str, Any]()
                if later:
                    windows, more = windows[:2] if many else [None], {"outputs": ["log_count", "rate"], "smoothing": 5}
                self._add_counter("task", task.name, by, windows, more)
        for log in self.events:
            for by, many in self._counter_keys(log.profile.columns):
                windows = self._windows(many, events=True)
                self._add_counter("events", log.name, by, windows, {"outputs": ["log_sum", "recency"]})

    def _add_counter(
        self, source: str, name: str, by: list[str], windows: list[float | None], more: Mapping[str, Any]
    ) -> None:
        trailing = {"window_days": windows} if windows != [None] else {}
        self._add("_".join((*by, name)), {"kind": "counter", source: name, "by": by, **more, **trailing})

    def _propose_histories(self) -> None:
        user, candidate = self.keys.get("user"), self.keys.get("candidate")
        if user is None or candidate is None:
            return
        of = next(name for name, each in self.features.items() if each.value.get("column") == candidate)
        for task in self.schema.tasks[:2]:
            if task.kind == "binary":
                self._add(f"last_{task.name}", {"kind": "history", "task": task.name, "of": of})
        for log in self.events:
            if {user, candidate} <= set(log.profile.columns):
                self._add(f"last_{log.name}", {"kind": "history", "events": log.name, "of": of, "length": 30})

    # Model and training

    def _propose_training(self) -> None:
        self.model["trees"] = CommentedSetting({}, "network and trees together rank above either")
        if self.schema.is_plain_table:
            self.model["bottom"] = CommentedSetting({"dropout": 0.3})
            self.model["experts"] = CommentedSetting({"units": [64, 32]})
            self.training["epochs"] = CommentedSetting(6)
            self.training["learning_rate"] = CommentedSetting(0.002)
            self.training["table_learning_rate"] = CommentedSetting(0.1)
        self.training["calibration"] = CommentedSetting(
            "temperature", "probabilities right on average, not the order alone"
        )


def _as_time(microseconds: int) -> datetime:
    return datetime.fromtimestamp(microseconds / 1e6, UTC)


def task_section(task: InferredTask) -> dict[str, Any]:
    """The section of a task."""
    value: dict[str, Any] = {"label": task.column, "objective": task.objective}
    if task.kind != "binary":
        value["kind"] = task.kind
    if task.observed_when is not None:
        value["observed_when"] = dict(zip(("column", "equals"), task.observed_when, strict=True))
    if task.label_delay_days:
        value["label_delay_days"] = task.label_delay_days
    if task.score_weight != 1:
        value["score_weight"] = task.score_weight
    return value


def infer_event_log(path: str, name: str, profile: Profile, schema: InferredSchema) -> EventLog:
    """Find the times, users and candidates of a log of events. Raises UserError if it has no times, or none of both."""
    own, keys = schema.keys.get("time"), [schema.keys[each] for each in ("user", "candidate") if each in schema.keys]
    times = [
        each for each in profile.columns.values() if own and each.may_be_time and not each.nulls and each.distinct > 1
    ]
    times = [each for each in times if each.kind == "time" or each.name == own or has_word(each.name, TIME_WORDS)]
    if not times:
        raise UserError(f"--events '{path}': these events, and the log, need a column of times without nulls")
    time = min(times, key=lambda each: (each.name != own, each.kind != "time", -each.distinct, each.name))
    if time.kind != "time":
        if schema.time_unit not in (None, time.unit):
            units = f"times of '{time.name}' are in {time.unit}, those of the log in {schema.time_unit}"
            raise UserError(f"--events '{path}': {units}; write both in one")
        schema.time_unit = time.unit
    if not set(keys) & set(profile.columns):
        raise UserError(f"--events '{path}' has none of the columns {', '.join(keys)}: name them as in the log")
    others = ", ".join(sorted(each.name for each in times if each is not time))
    return EventLog(name, path, profile, time.name, f"or is it {others}?" if others else "")
