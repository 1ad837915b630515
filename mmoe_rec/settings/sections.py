"""Sections of a settings file with all types, defaults and descriptions, and the YAML dialect of the file.

In YAML 1.1, which PyYAML reads, 1e-3 is text, 1:30 is 90 and 017 is 15. Here 1e-3 is a number, 1:30 and 017 are text,
and repeated keys are errors.
"""

import itertools
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, date, datetime
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, field_validator, model_validator

from mmoe_rec.features.kinds import FeatureSettings, parse_schema
from mmoe_rec.settings.label_rules import LabelRules
from mmoe_rec.settings.log_columns import (
    MODEL_CHOICES,
    SPLITS,
    Columns,
    EventLog,
    Roles,
    Scalar,
    Section,
    SplitColumn,
    TaskSettings,
)
from mmoe_rec.settings.model import Model
from mmoe_rec.settings.schema import Schema
from mmoe_rec.settings.training import Training


def _as_time(value: Any) -> datetime | None:
    """Convert a date or time of YAML, or ISO 8601 text. A time without an offset is UTC. None stays None.

    Raises:
        ValueError: The value is not a time.
    """
    if isinstance(value, str) and not value.isdigit():
        with suppress(ValueError):
            value = datetime.fromisoformat(value)
    elif isinstance(value, date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    if value is None:
        return None
    if not isinstance(value, datetime):
        raise ValueError("must be a time such as 2024-01-31 or 2024-01-31T18:00:00")
    return value if value.tzinfo else value.replace(tzinfo=UTC)


Time = Annotated[datetime, BeforeValidator(_as_time)]
_TIMES = ("train_start", "train_end", "validation_end", "test_end")
_Values = tuple[bool | str | Annotated[int, Field(ge=-(2**63), lt=2**63)], ...]


class Split(Section):
    """Split of the rows into training, validation and test.

    Training rows are before `train_end`, validation rows before `validation_end`, test rows before `test_end`. In a
    plain table without times, `column` names the split of each row.
    """

    train_start: Time | None = Field(None, description="first request time of training; null: the log's start")
    train_end: Time | None = Field(None, description="end of training (exclusive), in UTC without an offset")
    validation_end: Time | None = Field(None, description="end of validation (exclusive)")
    test_end: Time | None = Field(None, description="end of test (exclusive); null: the log's end")
    column: str | None = Field(None, description="column with each row's split, for tables without times")
    train: _Values = Field(("train",), min_length=1, description="values of `column` in training rows")
    validation: _Values = Field(("validation",), min_length=1, description="values of `column` in validation rows")
    test: _Values = Field(("test",), min_length=1, description="values of `column` in test rows")

    @model_validator(mode="after")
    def _check_consistent(self) -> "Split":
        if self.column is None:
            lacking = [name for name in ("train_end", "validation_end") if getattr(self, name) is None]
            if lacking:
                raise ValueError(f"{lacking[0]} is missing. Set the times, or set `column` for a table without times.")
            values = [name for name in SPLITS if getattr(self, name) != (name,)]
            if values:
                raise ValueError(f"{values[0]} lists values of a column, but `column` is missing. Set `column`.")
            times = [(time, name) for name in _TIMES if (time := getattr(self, name)) is not None]
            for (start, name), (end, next_name) in itertools.pairwise(times):
                if start >= end:
                    raise ValueError(
                        f"{name} ({start:%Y-%m-%d %H:%M}) must be before {next_name} ({end:%Y-%m-%d %H:%M})"
                    )
            return self
        if times_given := [name for name in _TIMES if getattr(self, name) is not None]:
            raise ValueError(f"{times_given[0]} and `column` can't be combined. Remove one of them.")
        seen: dict[Scalar, str] = {}
        for name in SPLITS:
            for value in getattr(self, name):
                if (first := seen.setdefault(value, name)) != name:
                    raise ValueError(f"both {first} and {name} list the value {value!r}. Remove it from one of them.")
        return self

    def check(self, columns: Columns) -> None:
        """Raise ValueError if a log with times is split by a column, or a log without times by time."""
        if self.column is None and not columns.has_time:
            raise ValueError("columns.time is null, so rows can't be split by time: set columns.time or split.column")
        if self.column is not None and columns.has_time:
            raise ValueError(
                f"split.column ('{self.column}') can't be combined with columns.time ('{columns.time}'), because "
                "training could see later rows. Replace split.column by split.train_end and split.validation_end."
            )

    @property
    def split_column(self) -> SplitColumn | None:
        """Column that splits the rows, None for a split by time."""
        if self.column is None:
            return None
        return SplitColumn(column=self.column, **{name: getattr(self, name) for name in SPLITS})

    def windows(self) -> dict[str, tuple[int | None, int | None]]:
        """Return the request times [start, end) of each split in microseconds since 1970 UTC.

        None means no limit. Rows that are split by a column have substitute times (see `mmoe_rec.log.rows`).
        """
        if self.column is not None:
            return {name: (index, index + 1) for index, name in enumerate(SPLITS)}
        start, train, validation, test = (
            None if (time := getattr(self, name)) is None else round(time.timestamp() * 1e6) for name in _TIMES
        )
        return {"train": (start, train), "validation": (train, validation), "test": (validation, test)}


class SearchRange(Section):
    """Values to try for one setting: `choices`, or a range from `low` to `high`."""

    choices: tuple[Any, ...] | None = Field(None, min_length=1, description="values to try")
    low: int | float | None = Field(None, description="lowest number; only whole numbers are tried if both ends are")
    high: int | float | None = Field(None, description="highest number")
    log: bool = Field(False, description="even sampling of logarithms, for example of learning rates")

    @model_validator(mode="after")
    def _check_one_kind(self) -> "SearchRange":
        has_range = self.low is not None and self.high is not None
        if has_range == (self.choices is not None) or ((self.low is None) != (self.high is None)):
            raise ValueError("give either `choices`, or both `low` and `high`")
        if self.low is not None and self.high is not None:
            if self.low >= self.high:
                raise ValueError(f"low ({self.low}) must be below high ({self.high})")
            if self.log and self.low <= 0:
                raise ValueError(f"low ({self.low}) must be above 0 if log is true")
        return self


# Settings that a search may change, because they affect neither the features nor how trials are compared.
_SEARCHED = r"(model(?!\.trees)|training(?!\.calibration))\..+|tasks\.[^.]+\.loss_weight|features\.[^.]+\.dim"


class Tuning(Section):
    """Search for better settings by `mmoe-rec tune`."""

    search: dict[str, SearchRange] = Field({}, description="setting, such as model.experts.count -> values to try")
    startup_trials: int = Field(5, ge=1, description="number of random trials at the start, never stopped early")

    @field_validator("search")
    @classmethod
    def _check_names(cls, search: dict[str, SearchRange]) -> dict[str, SearchRange]:
        for name in search:
            if not re.fullmatch(_SEARCHED, name):
                raise ValueError(
                    f"'{name}' can't be searched. Search settings of model (except model.trees), training (except "
                    "training.calibration), tasks.NAME.loss_weight or features.NAME.dim"
                )
        return search


def diff_settings(first: Any, second: Any, path: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield the name of each setting that differs, such as `model.experts.count`, with both values as text.

    Args:
        first: Settings as parsed from YAML.
        second: Settings to compare with.
        path: Name of the section that contains the settings, for recursive calls. Empty for whole settings.
    """
    if isinstance(first, dict) and isinstance(second, dict):
        for name in first | second:
            yield from diff_settings(first.get(name), second.get(name), f"{path}.{name}" if path else name)
    elif first != second:
        yield path, _text(first), _text(second)


def _text(value: Any) -> str:
    if value is None:
        return "missing"
    return "present" if isinstance(value, dict) else json.dumps(value, ensure_ascii=False)


EngineName = Literal["local", "ray"]
ErrorOrKeep = Literal["error", "keep"]
FirstOrError = Literal["first", "error"]


class Data(Section):
    """Location of the log, and the folder for features, checkpoints and models."""

    log: str = Field(description="interaction log: folder of Parquet files, a file or a glob; a path or s3:// URI")
    events: dict[str, EventLog] = Field({}, description="name -> event log for counters and histories")
    work_dir: str = Field(description="folder for encoded features, checkpoints and models")
    engine: EngineName = Field("local", description="backend that builds features: this machine or a Ray cluster")
    workers: int | None = Field(
        None, ge=1, description="workers that build features: threads if at most 4, else processes; null: one per core"
    )
    rows_in_memory: int = Field(
        1_048_576, ge=1024, description="rows per chunk of counters and histories; less saves memory"
    )
    memory_gib: float = Field(4, ge=0.25, description="GiB of memory for joins of whole logs; larger joins use files")
    skip_bad_files: bool = Field(False, description="whether to skip and record unusable files instead of stopping")
    on_duplicates: ErrorOrKeep = Field("error", description="action if a candidate occurs twice in a request")
    on_future_times: ErrorOrKeep = Field(
        "error", description="action for times in the future, which suggest a wrong unit"
    )
    on_conflicting_times: FirstOrError = Field("first", description="action if rows of a request have several times")

    @field_validator("work_dir")
    @classmethod
    def _local(cls, work: str) -> str:
        if "://" in work:
            raise ValueError("must be a local or mounted folder")
        return work


class Evaluation(Section):
    """Rules for comparing models."""

    batch_size: int = Field(16_384, ge=1, description="rows per batch of scoring")
    resamples: int = Field(1000, ge=20, description="bootstrap resamples over users for the 95% intervals")
    primary_metric: str = Field(
        "auc",
        description="metric that decides between models. A task metric is averaged over tasks with 50 rows of each "
        "label (R2 if there are none). A ranking metric of the score has a name such as score.ndcg_at_10.",
    )
    max_metric_drop: float = Field(
        0.005, ge=0, description="largest loss of AUC (or R2) for any task, including its interval"
    )
    max_calibration_ratio: float = Field(
        1.25,
        gt=1,
        description="largest ratio of mean prediction and mean label, unless the compared model exceeds it",
    )
    slices: tuple[str, ...] = Field(
        (),
        description="columns of the log, or bucket(COLUMN, N) of a number, for slices in reports. Reports also slice "
        "by new users, new candidates and activity.",
    )
    guardrail_slices: tuple[str, ...] | None = Field(
        None,
        description="slices that must not lose more than `max_metric_drop` significantly: user, candidate, training "
        "rows of the user, or names in `slices`. null takes all slices.",
    )


class Serving(Section):
    """Limits for requests and for HTTP calls to the server, and the backend of matrix products."""

    matmul_backend: Literal["auto", "blas", "onednn"] = Field(
        "auto",
        description="library of fp32 matrix products in serving and scoring. auto takes onednn if torch has it. Scores "
        "differ only by rounding.",
    )
    max_candidates: int = Field(10_000, ge=1, description="maximum number of candidates in a request")
    stale_after_days: float | None = Field(7, gt=0, description="days until replies warn of old counters; null: never")
    max_total_candidates: int = Field(100_000, ge=1, description="maximum number of candidates in a call")
    max_elements: int = Field(256, ge=1, description="maximum number of elements of `inputs` in a call")
    max_events: int = Field(10_000, ge=1, description="maximum number of rows in a call that sends events")
    max_body_mib: int = Field(8, ge=1, le=1024, description="maximum size of a call's body in MiB")
    max_depth: int = Field(16, ge=6, le=100, description="maximum nesting of lists and objects in a body")
    max_concurrent_calls: int = Field(
        64, ge=1, description="maximum number of concurrent calls of /invocations in a worker, and of /events"
    )
    read_timeout_seconds: float = Field(10, gt=0, description="time limit for sending a call or receiving the reply")
    call_timeout_seconds: float = Field(30, gt=0, description="time limit for answering a call after reading it")


class Tracking(Section):
    """MLflow store of runs and models."""

    uri: str | None = Field(
        None,
        min_length=1,
        description="MLflow tracking and registry URI. null takes MLFLOW_TRACKING_URI from the environment, or else "
        "sqlite:///mlflow.db.",
    )
    experiment: str | None = Field(None, description="MLflow experiment; null: `name`")
    registered_model: str | None = Field(None, description="name in the registry; null: `name`")
    alias: str = Field("champion", description="alias of the current model, which a better model gets")
    keep_versions: int | None = Field(
        14, ge=1, description="versions made by `refresh` to keep, besides versions that an alias needs; null: all"
    )
    system_metrics: bool = Field(True, description="whether to log processors, memory, disk and network in training")

    @property
    def resolved_uri(self) -> str:
        """MLflow URI. The URI from the environment isn't saved with the settings, since it may contain a password."""
        return self.uri or os.environ.get("MLFLOW_TRACKING_URI", "").strip() or "sqlite:///mlflow.db"


class Settings(Section):
    """All settings of one data set."""

    name: str = Field(description="name of the data set, and by default of experiment and registered model")
    data: Data
    columns: Columns = Columns()
    roles: Roles = Roles()
    tasks: dict[str, TaskSettings] = Field(min_length=1, description="name -> task")
    features: dict[str, FeatureSettings] = Field(min_length=1, description="name -> feature")
    split: Split
    model: Model = Model()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    serving: Serving = Serving()
    tuning: Tuning = Tuning()
    tracking: Tracking = Tracking()
    labels: LabelRules = LabelRules()

    @model_validator(mode="after")
    def _check_schema(self) -> "Settings":
        self.labels.check(self.schema_)
        self.split.check(self.columns)
        for name in self.tuning.search:
            section, key, *_ = name.split(".")
            if section == "tasks" and key not in self.tasks:
                raise ValueError(f"tuning.search names the unknown task '{key}'. Tasks are: {', '.join(self.tasks)}")
            if section == "features" and (key not in self.features or not self.features[key].has_own_table):
                names = ", ".join(feature for feature, settings in self.features.items() if settings.has_own_table)
                raise ValueError(
                    f"tuning.search names '{name}', but the features with a table of their own are: {names}"
                )
        if self.training.sampling_correction != "none" and self.columns.sampling_rate is None:
            raise ValueError("training.sampling_correction needs a sampling rate: set columns.sampling_rate")
        return self

    @property
    def schema_(self) -> Schema:
        """Schema of the log, without choices of the model."""
        sections = self.model_dump(include={"columns", "roles", "tasks", "features"})
        return parse_schema({**sections, "events": self.data.events, "split": self.split.split_column})

    @property
    def model_choices(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Values of the keys in `MODEL_CHOICES`: `tasks` or `features` -> name of task or feature -> key -> value."""
        sections = self.model_dump(mode="json", include=set(MODEL_CHOICES))
        return {
            section: {
                name: {key: value for key, value in entry.items() if key in MODEL_CHOICES[section]}
                for name, entry in entries.items()
            }
            for section, entries in sections.items()
        }

    @property
    def experiment(self) -> str:
        """Name of the MLflow experiment."""
        return self.tracking.experiment or self.name

    @property
    def registered_model(self) -> str:
        """Name of the model in the MLflow registry."""
        return self.tracking.registered_model or self.name

    def to_yaml(self) -> str:
        """Return the resolved settings as YAML that `load_settings` reads."""
        return dump_yaml(self.model_dump(mode="json"))


_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_DIGITS, _EXPONENT = "[0-9][0-9_]*", "[eE][-+]?[0-9]+"
_NUMBERS = {
    _INT: re.compile("[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$"),
    _FLOAT: re.compile(
        rf"[-+]?({_DIGITS}{_EXPONENT}|({_DIGITS}\.[0-9_]*|\.{_DIGITS})({_EXPONENT})?|\.(inf|Inf|INF))$"
        r"|\.(nan|NaN|NAN)$"
    ),
}


def _with_numbers(base: type) -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """Return the rules by which PyYAML guesses the type of an unquoted value, with `_NUMBERS` for numbers.

    Each rule is: possible first character of a value -> pairs of a type's tag and the pattern of its values.
    """
    rules = {
        first: [(tag, rule) for tag, rule in tags if tag not in _NUMBERS]
        for first, tags in base.yaml_implicit_resolvers.items()  # type: ignore[attr-defined]
    }
    for first in "-+.0123456789":
        rules[first] = [*rules.get(first, []), *_NUMBERS.items()]
    return rules


class _Loader(yaml.SafeLoader):
    """YAML loader that rejects repeated keys, where PyYAML silently takes the last value."""

    yaml_implicit_resolvers = _with_numbers(yaml.SafeLoader)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.MarkedYAMLError(None, None, f"key '{key.value}' is written twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """YAML dumper that quotes text with line breaks and text that `_Loader` would read as a number."""

    yaml_implicit_resolvers = _with_numbers(yaml.SafeDumper)


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, None if text.isprintable() else '"'),
)


def load_yaml(text: str) -> Any:
    """Parse a YAML text, or raise yaml.YAMLError if it is invalid."""
    return yaml.load(text, _Loader)


def dump_yaml(tree: Any) -> str:
    """Return YAML that `load_yaml` reads."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def dump_inline_yaml(value: Any) -> str:
    """Return a value as YAML in one line, for use after a key."""
    text = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=math.inf, sort_keys=False
    )
    return str(text).strip().removesuffix("...").strip()
