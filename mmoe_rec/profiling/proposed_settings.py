"""Propose features, split, model and training for an inferred schema, as sections of a settings file with comments.

Counters and histories improve predictions most. Counters are proposed for the user, the candidate, the pair and their
attributes, for each task and each event log. Their number is limited, so a log of 300 columns can be trained on, too.
Comparisons are proposed between user and candidate, and between the candidates of a request.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from itertools import product
from typing import Any

from mmoe_rec.errors import UserError
from mmoe_rec.log.rows import MICROSECONDS_PER_DAY
from mmoe_rec.profiling.inferred_schema import InferredSchema, InferredTask
from mmoe_rec.profiling.name_hints import CODE_WORDS, ID_WORDS, KEY_WORDS, TIME_WORDS, has_word, split_words
from mmoe_rec.profiling.profile import Column, Profile, to_days

_WINDOWS = (91, 28, 7, 1, 0.125)
_MAX_ATTRIBUTES, _MAX_CONTEXTS, _MAX_GROUPS = 4, 3, 2
_MAX_CONTEXT_VALUES = 5000
"""A context column with more values than this (such as a session) gets counters by user but not by candidate."""
_MAX_PAIRS, _ROWS_PER_PAIR = 4, 20
"""Maximum number of counters by a user and a candidate attribute, and log rows needed per pair of values."""
_MIN_LIST_ROWS, _MAX_COMPARED = 3, 8
"""Minimum mean number of rows of a request to compare candidates, and maximum number of columns and of counters."""
_MAX_MATCHES, _MIN_SHARED_FRACTION, _MIN_VALUES, _MAX_HASHES = 8, 0.5, 5, 10_000
"""Maximum number of matches. Minimum fraction of values that two columns of IDs share, and minimum number of values of
each column. Maximum number of values to compare, by hash."""
_MIN_ENGAGEMENTS, _LAST_EVENTS, _MAX_EVENT_PAIRS = 2, 20, 20_000_000
"""Minimum mean number of engagements of a user, and of a candidate, to count pairs of candidates. Default of `last`.
Maximum number of pairs, which take about 800 MB in a server."""
_TEST_FRACTION, _VALIDATION_FRACTION = 0.2, 0.1


@dataclass
class CommentedSetting:
    """A value in the settings file, with a comment and the reason to check it."""

    value: Any
    note: str = ""
    check: str = ""


@dataclass
class EventLog:
    """An event log, its time column, and why a person should check the choice of the time column."""

    name: str
    path: str
    profile: Profile
    time: str
    check: str = ""


class ProposedSettings:
    """Features, split, model and training for a log, as sections of a settings file."""

    def __init__(self, schema: InferredSchema, events: Sequence[EventLog], timezone: str | None) -> None:
        """Propose all sections.

        Args:
            schema: Inferred schema of the log.
            events: Event logs.
            timezone: Time zone of the users, None if not given.

        Raises:
            UserError: The rows can't be split by time.
        """
        self.profile, self.schema, self.events, self.timezone = schema.profile, schema, events, timezone
        self.columns, self.keys = schema.columns, schema.keys
        self.features, self.split, self.training, self.model = (dict[str, CommentedSetting]() for _ in range(4))
        self._has_requests = schema.rows_per_request > 1.05
        self._train_days = 0.0  # Days from the first to the last training row.
        self._propose_split()
        self._propose_columns()
        self._propose_matches()
        if "time" in self.keys:
            self._propose_histories()
            self._propose_counters()
        if schema.rows_per_request >= _MIN_LIST_ROWS and schema.sampling_rate is None:
            self._propose_relative()
        self._propose_training()

    def _add(self, name: str, value: Mapping[str, Any], note: str = "", check: str = "") -> None:
        name = re.sub(r"\W+", "_", name).strip("_") or "feature"
        taken = {feature.casefold() for feature in self.features}
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
        delay_days = max((task.label_delay_days for task in schema.tasks), default=0.0)
        end = last - round(delay_days * MICROSECONDS_PER_DAY) if delay_days else last + 1
        usable = f"{t} < {end}"
        if end <= first or self.profile.count_rows(usable) < 0.2 * self.profile.rows:
            raise UserError(
                f"labels of '{self.profile.name}' are final after {delay_days:g} days, but the log spans only "
                f"{to_days(last - first):.1f} days. Use a longer log."
            )
        ends = self._cut(t, first, end)
        note = f"the first {self.profile.fraction(f'{t} < {ends[0]}'):.0%} of the rows"
        split["train_end"] = CommentedSetting(_as_time(ends[0]), note)
        split["validation_end"] = CommentedSetting(_as_time(ends[1]), "these rows choose the best state of the model")
        if delay_days:
            note = f"labels are final {delay_days:g} days later, when the log ends"
            split["test_end"] = CommentedSetting(_as_time(end), note)
        self._train_days = to_days(ends[0] - first)

    def _cut(self, t: str, first: int, end: int) -> tuple[int, int]:
        """Return when validation and test rows start, in microseconds: midnights (UTC) in long logs, else row times."""
        usable, goals = f"{t} < {end}", (1 - _TEST_FRACTION - _VALIDATION_FRACTION, 1 - _TEST_FRACTION)
        quantiles = [int(self.profile.quantile(t, goal, usable)) for goal in goals]
        midnights = [round(time / MICROSECONDS_PER_DAY) * MICROSECONDS_PER_DAY for time in quantiles]
        if to_days(end - first) >= 20 and not self._find_unfair(t, midnights, usable):
            return midnights[0], midnights[1]
        groups = f"SELECT {t} AS t, count(*) AS n FROM log WHERE {usable} GROUP BY 1"
        times = f"SELECT t, sum(n) OVER w - n before, row_number() OVER w nth FROM ({groups}) WINDOW w AS (ORDER BY t)"
        # The loop first cuts where the test rows start, then where the validation rows start.
        number, cuts = goals[1] * self.profile.count_rows(usable), [end]
        for min_nth, fraction in ((3, 1.0), (2, goals[0] / goals[1])):
            best = f"WHERE nth >= {min_nth} AND t < {cuts[0]} ORDER BY abs(before - {number * fraction}), t LIMIT 1"
            cut, number = self.profile.row(f"SELECT min(t), min(before) FROM (SELECT * FROM ({times}) {best})")
            if cut is None:
                raise UserError(f"'{self.profile.name}' has fewer than three different times. Use a finer time column")
            number, cuts = float(number), [int(cut), *cuts]
        if parts := self._find_unfair(t, cuts, usable):
            why = f"{parts} of the rows are for training, validation and test, because many rows have the same time"
            self.schema.warnings.append(f"{why}. Write finer times.")
        return cuts[0], cuts[1]

    def _find_unfair(self, t: str, cuts: Sequence[int], usable: str) -> str:
        """Return the fractions of rows in the splits as text, "" if each is half to twice the intended fraction."""
        train, both = (self.profile.fraction(f"{t} < {cut}", usable) for cut in cuts[:2])
        parts = (train, both - train, 1 - both)
        goals = (1 - _TEST_FRACTION - _VALIDATION_FRACTION, _VALIDATION_FRACTION, _TEST_FRACTION)
        is_fair = all(0.5 < part / goal < 2 for part, goal in zip(parts, goals, strict=True))
        return "" if is_fair else ", ".join(f"{part:.0%}" for part in parts)

    # Features of single columns

    def _propose_columns(self) -> None:
        for key_name in ("user", "candidate"):
            if key_name in self.keys:
                self._propose_key(key_name)
        for role in ("user", "candidate", "context", "placement"):
            for name in list(self.schema.roles[role]):
                if not self._propose_column(self.columns[name], role):
                    self.schema.roles[role].remove(name)
        time = self.keys.get("time")
        parts = ["hour"] * (time is not None and self._has_hours(time)) + ["weekday"] * (self._train_days >= 14)
        if parts:
            zone = {"timezone": self.timezone} if self.timezone else {}
            check = "" if zone else "UTC is assumed. Name the users' time zone with --timezone, such as Europe/Berlin"
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

    def _has_hours(self, name: str) -> bool:
        """Return whether times are finer than days."""
        t = self.columns[name].time_sql
        return self.columns[name].type != "DATE" and self.profile.fraction(f"{t} % {MICROSECONDS_PER_DAY} <> 0") > 0.5

    def _propose_column(self, column: Column, role: str) -> bool:
        """Add the features of a column. Returns False, and leaves the column out, if it allows no feature."""
        doubt, unit = "", column.unit
        if column.kind == "number" and not {"id", "ids", "code", "zip", "plz"}.isdisjoint(split_words(column.name)):
            doubt = f"values of type {column.type} are read as amounts. If they are IDs, cast them"
        elif unit is not None and not has_word(column.name, TIME_WORDS):
            doubt = f"read as amounts: if they are {unit} since 1970, write timestamps, and if they are IDs, text"
        check = "; ".join(filter(None, (doubt, self.schema.checks.get(column.name))))
        features, key = self._features_of(column), self.columns.get(self.keys.get(role, ""))
        if features is None:
            self.schema.left_out[column.name] = "it has too many, too rare values to learn from"
            return False
        # In a plain table, all columns have the role candidate, so a region need not be the name of a job.
        may_be_name = key is not None and column.kind == "text" and not self.schema.is_plain_table
        if key is not None and may_be_name and column.distinct > max(50, 0.9 * key.distinct):
            self.schema.left_out[column.name] = f"it looks like the name of {key.name}, so it adds no information"
            return False
        for suffix, value, note in features:
            self._add(column.name + suffix, value, note, check)
        return True

    def _features_of(self, column: Column) -> list[tuple[str, dict[str, Any], str]] | None:  # noqa: PLR0911 - one line a case reads best
        """Return a column's features as (name suffix, settings, comment). None: unusable. []: only counters read it."""
        source, values = {"column": column.name}, column.rows - column.nulls
        if column.kind == "time" or (column.unit is not None and has_word(column.name, TIME_WORDS)):
            value, note = {"kind": "time", **source, "parts": ["age"]}, "days from it to the request"
            return [("_age", value, note)] if "time" in self.keys else None
        if column.kind == "keys":
            longest = {"max_length": column.length_range[1]} if column.length_range[1] < 50 else {}
            return [("", {"kind": "ids", **source, "dim": 8, **longest}, "")]
        if column.kind == "vector":
            return [("", {"kind": "vector", **source, "size": column.length_range[0]}, "")]
        if column.kind == "number" or (column.kind == "integer" and not self._is_code(column)):
            return [("", {"kind": "numeric", **source, **self._shape(column)}, "")]
        if column.distinct > max(1000, 0.5 * values):
            return None
        if column.distinct > max(1000, 0.1 * values):
            return []  # Only counters read such a column, for example a session.
        return [("", {"kind": "id", **source, **self._sizes(column)}, f"about {column.distinct:,} values")]

    def _is_code(self, column: Column) -> bool:
        """Return whether integers are codes rather than amounts, by name or because few values have a wide range."""
        if has_word(column.name, CODE_WORDS):
            return True
        if column.unit is not None:  # Such integers are probably times.
            return False
        return 20 <= column.distinct < 100_000 and column.high - column.low > 10_000 * column.distinct

    def _sizes(self, column: Column) -> dict[str, Any]:
        if self.schema.is_plain_table:
            return {"min_count": 8, "oov_buckets": 1}
        if column.distinct <= 50:
            return {"dim": 4, "min_count": 1, "oov_buckets": 1}
        return {"dim": 8} if column.distinct <= 1000 else {}

    def _shape(self, column: Column) -> dict[str, Any]:
        """Return the settings `transform` and `values` of a numeric feature, if they help with this column."""
        shape: dict[str, Any] = {}
        middle, high = (float(self.profile.quantile(f"{column.sql}::DOUBLE", fraction)) for fraction in (0.5, 0.99))
        if column.low >= 0 and not column.is_binary and high > 20 * max(middle, high / 1e6):
            shape["transform"] = "log"
        if column.kind == "integer" or column.distinct <= 1000:
            shape["values"] = "auto"
        return shape

    # Comparisons of the user or context with the candidate

    def _propose_matches(self) -> None:
        roles, features = self.schema.roles, [entry.value for entry in self.features.values()]
        others = {self.keys.get("user"), *roles["user"], *roles["context"]}
        own = {self.keys.get("candidate"), *roles["candidate"]}
        pairs = product(*([item for item in features if item.get("column", "") in side] for side in (others, own)))
        hashes = cache(lambda name: self.profile.value_hashes(name, _MAX_HASHES))
        matches = filter(None, (self._match(first, second, hashes) for first, second in pairs))
        for _, pair, setting in sorted(matches, key=lambda match: match[:2])[:_MAX_MATCHES]:
            self._add("_".join(pair), {"kind": "match", "columns": pair, **setting.value}, setting.note, setting.check)

    def _value_type(self, feature: Mapping[str, Any]) -> str:
        """Return the type of values that the feature of a column reads: text or integer (IDs), or its kind and size."""
        if feature["kind"] in ("id", "ids"):
            return "text" if re.match("VARCHAR|ENUM", self.columns[feature["column"]].type) else "integer"
        return f"{feature['kind']}{feature.get('size', '')}"

    def _match(
        self, first: Mapping[str, Any], second: Mapping[str, Any], hashes: Callable[[str], set[int]]
    ) -> tuple[float, list[str], CommentedSetting] | None:
        """Return sort key (smallest first), columns and settings of a comparison. None if the columns don't fit."""
        value_type, pair = self._value_type(first), [first["column"], second["column"]]
        columns, names_agree = [self.columns[name] for name in pair], _have_same_words(*pair)
        # Any two columns of integers share small numbers, so their names must agree, too.
        if value_type != self._value_type(second) or (value_type == "integer" and not names_agree):
            return None
        if value_type == "numeric" and names_agree:
            outputs = ["difference", "ratio"] if min(column.low for column in columns) >= 0 else "difference"
            return 1.0, pair, CommentedSetting({"compare": outputs}, check="are both numbers in the same unit?")
        if value_type.startswith("vector"):
            value: dict[str, Any] = {"compare": "cosine", "size": first["size"]}
            return 2.0, pair, CommentedSetting(value, check="are both vectors from the same model?")
        shared = _shared_fraction(*map(hashes, pair)) if value_type in ("text", "integer") else 0.0
        lists = sum(column.kind == "keys" for column in columns)
        pair.sort(key=lambda name: self.columns[name].kind != "keys")  # `contains` takes the list first.
        value = {"compare": ("equal", "contains", ["overlap", "coverage", "jaccard"])[lists]}
        note = f"{shared:.0%} of the values of one also occur in the other"
        return (-shared, pair, CommentedSetting(value, note)) if shared >= _MIN_SHARED_FRACTION else None

    # Counters and histories

    def _groups(self, role: str, limit: int, min_distinct: int, max_distinct: float) -> list[str]:
        """Return up to `limit` columns of a role that counters can count by, the column with most values first."""
        fitting = []
        for name in self.schema.roles[role]:  # type: ignore[index]
            column = self.columns[name]
            usable = column.kind in ("text", "integer", "boolean") and column.unit is None
            # Skip columns with a check, except context columns if requests have one row, which then all have one.
            must_be_sure = role == "candidate" or (role == "context" and self._has_requests)
            usable &= not must_be_sure or name not in self.schema.checks
            if usable and column.kind == "integer" and not self._is_code(column) and column.distinct > 100:
                usable = False
            if usable and column.nulls < 0.5 * column.rows and min_distinct <= column.distinct <= max_distinct:
                fitting.append((-column.distinct, name))
        return [name for _, name in sorted(fitting)[:limit]]

    def _windows(self, many: bool, events: bool = False) -> list[float | None]:
        """Return a counter's windows in days: None (the whole past), then windows of at most half the training span."""
        has_hours = self._has_hours(self.keys["time"])
        usable = [days for days in _WINDOWS if days <= self._train_days / 2 and (has_hours or days >= 1)]
        usable = usable if events else [days for days in usable if days <= 28]
        return [None, *(usable if many else usable[: 1 + events])]

    def _counter_keys(self, columns: Mapping[str, Any], has_few_labels: bool = False) -> list[tuple[list[str], bool]]:
        """Return the columns to count by of each counter on a log with `columns`, and whether it gets many windows."""
        user, candidate = self.keys.get("user"), self.keys.get("candidate")
        candidates = self.columns[candidate].distinct if candidate else 0
        of_candidate = self._groups("candidate", _MAX_ATTRIBUTES, 3, 0.5 * candidates)
        of_context = self._groups("context", _MAX_CONTEXTS, 2, _MAX_CONTEXT_VALUES)
        finer = self._groups("context", 1, _MAX_CONTEXT_VALUES + 1, 0.2 * self.profile.rows)
        of_user = self._groups("user", _MAX_GROUPS, 2, 200)
        keys: list[tuple[str | None, ...]] = [(user,), (candidate,), (user, candidate)]
        for attribute in of_candidate:
            keys += [(attribute,), (user, attribute)]
        # For a new user, only the preferences of similar users, such as users of a country, are available.
        pairs = [(group, attribute) for group in of_user for attribute in of_candidate]
        sizes = {pair: self.columns[pair[0]].distinct * self.columns[pair[1]].distinct for pair in pairs}
        pairs = [pair for pair in pairs if sizes[pair] * _ROWS_PER_PAIR <= self.profile.rows]
        keys += sorted(pairs, key=lambda pair: (sizes[pair], pair))[: 1 if has_few_labels else _MAX_PAIRS]
        if not has_few_labels:
            keys += [(user, context) for context in finer]
            for context in of_context:
                # Within a request, a counter by context alone is equal for all candidates.
                alone = [] if self._has_requests else [(context,)]
                keys += [*alone, (candidate, context), (user, context)]
            keys += [(candidate, group) for group in of_user]
        complete = [[name for name in key if name in columns and name] for key in keys if set(key) <= columns.keys()]
        return [(key, key in ([user], [candidate])) for key in complete]

    def _propose_counters(self) -> None:
        for task in self.schema.tasks:
            if task.kind != "binary" and len(self.schema.tasks) > 1:
                continue
            is_rare = task.observed_when is not None
            for by, many in self._counter_keys(self.columns, is_rare):
                windows, options = self._windows(many), dict[str, Any]()
                if is_rare:
                    options = {"outputs": ["log_count", "rate"], "smoothing": 5}
                    windows = windows[:2] if many else [None]
                self._add_counter("task", task.name, by, windows, options)
        for log in self.events:
            for by, many in self._counter_keys(log.profile.columns):
                windows = self._windows(many, events=True)
                self._add_counter("events", log.name, by, windows, {"outputs": ["log_sum", "recency"]})

    def _add_counter(
        self, source: str, name: str, by: list[str], windows: list[float | None], options: Mapping[str, Any]
    ) -> None:
        window_days = {"window_days": windows} if windows != [None] else {}
        self._add("_".join((*by, name)), {"kind": "counter", source: name, "by": by, **options, **window_days})

    def _propose_histories(self) -> None:
        user, candidate = self.keys.get("user"), self.keys.get("candidate")
        if user is None or candidate is None:
            return
        of = next(name for name, feature in self.features.items() if feature.value.get("column") == candidate)
        for task in self.schema.tasks[:2]:
            if task.kind == "binary":
                self._add(f"last_{task.name}", {"kind": "history", "task": task.name, "of": of})
        for log in self.events:
            if {user, candidate} <= set(log.profile.columns):
                self._add(f"last_{log.name}", {"kind": "history", "events": log.name, "of": of, "length": 30})
        self._propose_cooccurrence(self.columns[user].sql, self.columns[candidate].sql)

    def _propose_cooccurrence(self, user: str, candidate: str) -> None:
        """Propose counts of pairs for the most frequent engagement, if users and candidates have several each."""
        distinct = f"count(DISTINCT {user}), count(DISTINCT {candidate})"
        engagements = []
        for task in self.schema.tasks:
            if task.kind == "binary" and task.objective == "engagement":
                where = self.columns[task.column].positive_sql
                rows, users, candidates = self.profile.row(f"SELECT count(*), {distinct} FROM log WHERE {where}")
                fits = rows * min(_LAST_EVENTS, rows / max(1, users)) <= _MAX_EVENT_PAIRS
                engagements.append((rows, task.name, fits and rows >= _MIN_ENGAGEMENTS * max(users, candidates)))
        if engagements and max(engagements)[2]:
            task_name = max(engagements)[1]
            self._add(f"{task_name}_together", {"kind": "cooccurrence", "task": task_name})

    def _propose_relative(self) -> None:
        """Propose to compare numbers and counters of the candidates within each request."""
        candidate, roles = self.keys.get("candidate"), self.schema.roles
        of_candidates = {candidate, *roles["candidate"]}
        numbers, counters = list[str](), list[str]()
        for name, feature in self.features.items():
            kind, value = feature.value["kind"], feature.value
            if kind == "numeric" and value["column"] in roles["candidate"]:
                numbers.append(value["column"])
            if kind == "counter" and of_candidates & set(value["by"]):
                counters.append(f"{name}_{'log_sum' if 'events' in value else 'rate'}")
        compared = {"columns": numbers[:_MAX_COMPARED], "counters": counters[:_MAX_COMPARED]}
        if compared := {key: names for key, names in compared.items() if names}:
            check = "does the log have all candidates that the server will rank? If not, remove this feature"
            self._add("in_request", {"kind": "relative", **compared}, check=check)

    # Model and training

    def _propose_training(self) -> None:
        self.model["trees"] = CommentedSetting({}, "network and trees together rank better than either alone")
        if self.schema.is_plain_table:
            self.model["bottom"] = CommentedSetting({"dropout": 0.3})
            self.model["experts"] = CommentedSetting({"units": [64, 32]})
            self.training["learning_rate"] = CommentedSetting(0.002)
            self.training["table_learning_rate"] = CommentedSetting(0.1)
        self.training["calibration"] = CommentedSetting(
            "temperature", "makes probabilities right on average, not only their order"
        )


def _have_same_words(first: str, second: str) -> bool:
    """Return whether the words of one name include those of the other, without words for users, candidates and IDs."""
    ignored = KEY_WORDS["user"] | KEY_WORDS["candidate"] | ID_WORDS
    words = [
        {word.removesuffix("s") for word in (*split_words(name), *re.findall(r"\d+", name)) if word not in ignored}
        for name in (first, second)
    ]
    return all(words) and (words[0] <= words[1] or words[1] <= words[0])


def _shared_fraction(first: set[int], second: set[int]) -> float:
    """Return the fraction of the smaller set of values that is in both, 0 if it is too small to tell.

    Args:
        first: Smallest hashes of the values of a column.
        second: Smallest hashes of the values of another column.
    """
    limit = min((max(hashes) for hashes in (first, second) if len(hashes) == _MAX_HASHES), default=math.inf)
    first, second = ({value for value in hashes if value <= limit} for hashes in (first, second))
    fewer = min(len(first), len(second))
    return len(first & second) / fewer if fewer >= _MIN_VALUES else 0.0


def _as_time(microseconds: int) -> datetime:
    return datetime.fromtimestamp(microseconds / 1e6, UTC)


def task_section(task: InferredTask) -> dict[str, Any]:
    """Return the settings section of a task."""
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
    """Find the time column of an event log and check that the log has users or candidates.

    Args:
        path: Path of the event log.
        name: Name of the log in the settings.
        profile: Statistics of the event log.
        schema: Inferred schema of the main log. Its time unit is set if it was unknown.

    Raises:
        UserError: The event log has no times, times in another unit, or neither users nor candidates.
    """
    keys = [schema.keys[key_name] for key_name in ("user", "candidate") if key_name in schema.keys]
    log_time = schema.keys.get("time")
    times = [time for time in profile.columns.values() if log_time and time.may_be_time]
    times = [time for time in times if not time.nulls and time.distinct > 1]
    times = [time for time in times if time.kind == "time" or time.name == log_time or has_word(time.name, TIME_WORDS)]
    if not times:
        raise UserError(f"--events '{path}': the events and the log both need a column of times without nulls.")
    best = min(times, key=lambda time: (time.name != log_time, time.kind != "time", -time.distinct, time.name))
    if best.kind != "time":
        if schema.time_unit not in (None, best.unit):
            units = f"times of '{best.name}' are in {best.unit}, but times of the log in {schema.time_unit}"
            raise UserError(f"--events '{path}': {units}. Use one unit.")
        schema.time_unit = best.unit
    if not set(keys) & set(profile.columns):
        raise UserError(f"--events '{path}' has none of the columns {', '.join(keys)}. Name them as in the log.")
    rivals = ", ".join(sorted(time.name for time in times if time is not best))
    return EventLog(name, path, profile, best.name, f"or is it {rivals}?" if rivals else "")
