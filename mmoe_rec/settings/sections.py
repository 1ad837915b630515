"""The sections of a settings file, each key with its type, default and meaning; and the YAML that it is written in.

YAML 1.1, which PyYAML reads, takes 1e-3 for text, 1:30 for ninety and 017 for fifteen. Here the first is a number, and
the others are text; no key is written twice.
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
    """A date or time of YAML, or text in ISO 8601; UTC unless it has an offset."""
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
    """Training rows lie before `train_end`, validation rows before `validation_end`, test rows before `test_end`; of a
    plain table without times, a column says it."""

    train_start: Time | None = Field(None, description="first request time to train on; null is the log's start")
    train_end: Time | None = Field(None, description="end of training (exclusive), UTC unless an offset is given")
    validation_end: Time | None = Field(None, description="end of validation (exclusive)")
    test_end: Time | None = Field(None, description="end of test (exclusive); null is the log's end")
    column: str | None = Field(None, description="without columns.time, instead of times: column of each row's split")
    train: _Values = Field(("train",), min_length=1, description="values of `column` in training rows")
    validation: _Values = Field(("validation",), min_length=1, description="values of `column` in validation rows")
    test: _Values = Field(("test",), min_length=1, description="values of `column` in test rows")

    @model_validator(mode="after")
    def _one_way(self) -> "Split":
        if self.column is None:
            lacking = [name for name in ("train_end", "validation_end") if getattr(self, name) is None]
            if lacking:
                raise ValueError(f"needs {lacking[0]}: give the times of the split, or `column` in a plain table")
            values = [name for name in SPLITS if getattr(self, name) != (name,)]
            if values:
                raise ValueError(f"has {values[0]}, values of a column, but no column")
            times = [t for name in _TIMES if (t := getattr(self, name)) is not None]
            if any(a >= b for a, b in itertools.pairwise(times)):
                raise ValueError("train_start, train_end, validation_end and test_end must follow each other in time")
            return self
        if given := [name for name in _TIMES if getattr(self, name) is not None]:
            raise ValueError(f"has both {given[0]} and column, but rows are split by times or a column: leave one out")
        seen: dict[Scalar, str] = {}
        for name in SPLITS:
            for value in getattr(self, name):
                if (other := seen.setdefault(value, name)) != name:
                    raise ValueError(f"value {value!r} is both in {other} and in {name}")
        return self

    def check(self, columns: Columns) -> None:
        """Raises ValueError where the log has times and is split by a column, or the other way round."""
        if self.column is None and not columns.has_time:
            raise ValueError("columns.time is left out, so the rows can't be split by time: set it, or split.column")
        if self.column is not None and columns.has_time:
            raise ValueError(
                f"split.column is '{self.column}', but columns.time is '{columns.time}': split a log with times by "
                "split.train_end and split.validation_end, so that training sees nothing of later rows"
            )

    @property
    def split_column(self) -> SplitColumn | None:
        """The column that splits the rows, None where times do."""
        if self.column is None:
            return None
        return SplitColumn(column=self.column, **{name: getattr(self, name) for name in SPLITS})

    def windows(self) -> dict[str, tuple[int | None, int | None]]:
        """Request times [start, end) of each split in microseconds since 1970 UTC; by a column, the times that
        `mmoe_rec.log.rows` gives to the rows of each."""
        if self.column is not None:
            return {name: (place, place + 1) for place, name in enumerate(SPLITS)}
        start, train, validation, test = (
            None if (time := getattr(self, name)) is None else round(time.timestamp() * 1e6) for name in _TIMES
        )
        return {"train": (start, train), "validation": (train, validation), "test": (validation, test)}


class SearchRange(Section):
    """Values that tuning tries for one setting: `choices`, or all between `low` and `high`."""

    choices: tuple[Any, ...] | None = Field(None, min_length=1, description="the values to choose from")
    low: int | float | None = Field(None, description="lowest number; whole numbers only where both ends are whole")
    high: int | float | None = Field(None, description="highest number")
    log: bool = Field(False, description="try numbers evenly by their logarithm, as suits learning rates")

    @model_validator(mode="after")
    def _check_one_kind(self) -> "SearchRange":
        ends = self.low is not None and self.high is not None
        if ends == (self.choices is not None) or ((self.low is None) != (self.high is None)):
            raise ValueError("give either `choices`, or both `low` and `high`")
        if self.low is not None and self.high is not None:
            if self.low >= self.high:
                raise ValueError(f"low ({self.low}) must be below high ({self.high})")
            if self.log and self.low <= 0:
                raise ValueError(f"low ({self.low}) must be above 0 where log is true")
        return self


# Settings that can be tried without building features anew, and that trials are judged with.
_SEARCHED = r"(model(?!\.trees)|training(?!\.calibration))\..+|tasks\.[^.]+\.loss_weight|features\.[^.]+\.dim"


class Tuning(Section):
    """The search for better settings by `mmoe-rec tune`."""

    search: dict[str, SearchRange] = Field({}, description="a setting such as model.experts.count -> values to try")
    startup_trials: int = Field(5, ge=1, description="trials with random values, none of which is cut short")

    @field_validator("search")
    @classmethod
    def _check_names(cls, search: dict[str, SearchRange]) -> dict[str, SearchRange]:
        for name in search:
            if not re.fullmatch(_SEARCHED, name):
                raise ValueError(
                    f"'{name}' can't be tried; only settings of model and training can, without model.trees and "
                    "training.calibration, and tasks.NAME.loss_weight and features.NAME.dim"
                )
        return search


def diff_settings(one: Any, other: Any, path: str = "") -> Iterator[tuple[str, str, str]]:
    """Name of each setting that differs, such as `model.experts.count`, and both values, as text."""
    if isinstance(one, dict) and isinstance(other, dict):
        for name in one | other:
            yield from diff_settings(one.get(name), other.get(name), f"{path}.{name}" if path else name)
    elif one != other:
        yield path, _text(one), _text(other)


def _text(value: Any) -> str:
    if value is None:
        return "missing"
    return "there" if isinstance(value, dict) else json.dumps(value, ensure_ascii=False)


EngineName = Literal["local", "ray"]
ErrorOrKeep = Literal["error", "keep"]
FirstOrError = Literal["first", "error"]


class Data(Section):
    """Where the log is, and where what is built from it goes."""

    log: str = Field(description="interaction log: folder of Parquet files, a file or a glob; a path or s3:// address")
    events: dict[str, EventLog] = Field({}, description="name -> a further log of events for counters and histories")
    work_dir: str = Field(description="folder for encoded features, checkpoints and models")
    engine: EngineName = Field("local", description="what builds features: threads or processes, or a Ray cluster")
    workers: int | None = Field(None, ge=1, description="threads for features (processes above 4); null: one per core")
    rows_in_memory: int = Field(1_048_576, ge=1024, description="rows of a counter or history that a worker holds")
    memory_gib: float = Field(4, ge=0.25, description="GiB in which whole logs are joined; more goes through files")
    skip_bad_files: bool = Field(False, description="leave out files that cannot be used, and record them; false stops")
    on_duplicates: ErrorOrKeep = Field("error", description="what to do if a candidate occurs twice in a request")
    on_future_times: ErrorOrKeep = Field(
        "error", description="what to do about times after now, likely in another unit"
    )
    on_conflicting_times: FirstOrError = Field(
        "first", description="what to do if rows of a request have several times"
    )

    @field_validator("work_dir")
    @classmethod
    def _local(cls, work: str) -> str:
        if "://" in work:
            raise ValueError("must be a folder of this machine, or one that is mounted like one")
        return work


class Evaluation(Section):
    """How the trained model is judged."""

    batch_size: int = Field(16_384, ge=1, description="rows scored at a time")
    resamples: int = Field(1000, ge=20, description="bootstrap resamples over users for the 95% intervals")
    primary_metric: str = Field(
        "auc",
        description="which of two models is better: a metric of tasks, as the mean over those with 50 rows of either "
        "label (R2, if there are none), or one of the score, such as score.ndcg_at_10",
    )
    max_metric_drop: float = Field(
        0.005, ge=0, description="AUC, or R2, that a model may lose for any task, with its interval"
    )
    max_calibration_ratio: float = Field(
        1.25, gt=1, description="factor by which probabilities may be off, or the other's are"
    )
    slices: tuple[str, ...] = Field(
        (),
        description="what reports slice rows by, besides new users and candidates and activity: columns of the log, or "
        "bucket(COLUMN, N) of a number",
    )
    guardrail_slices: tuple[str, ...] | None = Field(
        None,
        description="slices of which none may be shown to lose more than `margin`: by user, candidate, training rows "
        "of the user, or what `slices` names; null takes all of them",
    )


class Serving(Section):
    """How a model is served: limits of a request (max_candidates) and of calls to the command `serve` (the others),
    when it says that it is out of date (stale_after_days), and what multiplies (products)."""

    matmul_backend: Literal["auto", "blas", "onednn"] = Field(
        "auto",
        description="library of fp32 products when serving and scoring; auto takes onednn where torch has it; scores "
        "are equal but for rounding",
    )
    max_candidates: int = Field(10_000, ge=1, description="longest candidate list that a request may hold")
    stale_after_days: float | None = Field(7, gt=0, description="days until replies warn of old counters; null: never")
    max_total_candidates: int = Field(100_000, ge=1, description="candidates of all elements of a call together")
    max_elements: int = Field(256, ge=1, description="elements of `inputs` in a call")
    max_events: int = Field(10_000, ge=1, description="rows of a call that sends events")
    max_body_mib: int = Field(8, ge=1, le=1024, description="largest body of a call, MiB")
    max_depth: int = Field(16, ge=6, le=100, description="deepest nesting of lists and objects in a body")
    max_concurrent_calls: int = Field(
        64, ge=1, description="calls of /invocations at a time in a worker, as many of /events"
    )
    read_timeout_seconds: float = Field(10, gt=0, description="time for a caller to send a call, or to take its reply")
    call_timeout_seconds: float = Field(30, gt=0, description="time to answer a call once it has been read")


class Tracking(Section):
    """Where MLflow keeps runs and models."""

    uri: str | None = Field(
        None,
        min_length=1,
        description="MLflow tracking and registry address; null takes the environment's MLFLOW_TRACKING_URI, else "
        "sqlite:///mlflow.db",
    )
    experiment: str | None = Field(None, description="MLflow experiment; null takes the settings' `name`")
    registered_model: str | None = Field(None, description="name in the registry; null takes the settings' `name`")
    alias: str = Field("champion", description="alias that a new model gets if it is better than the one that holds it")
    keep_versions: int | None = Field(
        14, ge=1, description="versions of refreshes that stay besides those that an alias needs; null keeps all"
    )
    system_metrics: bool = Field(True, description="log processors, memory, disk and network while a model is trained")

    @property
    def resolved_uri(self) -> str:
        """MLflow's address. That of the environment is not kept with the settings: it may hold a password."""
        return self.uri or os.environ.get("MLFLOW_TRACKING_URI", "").strip() or "sqlite:///mlflow.db"


class Settings(Section):
    """All settings of one data set."""

    name: str = Field(description="name of the data set; by default also of experiment and registered model")
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
            section, asked, *_ = name.split(".")
            if section == "tasks" and asked not in self.tasks:
                raise ValueError(f"tuning.search names '{name}'; tasks are: {', '.join(self.tasks)}")
            if section == "features" and (asked not in self.features or not self.features[asked].has_own_table):
                known = ", ".join(feature for feature, settings in self.features.items() if settings.has_own_table)
                raise ValueError(f"tuning.search names '{name}'; features with a table of their own are: {known}")
        if self.training.sampling_correction != "none" and self.columns.sampling_rate is None:
            raise ValueError("training.sampling_correction needs `columns.sampling_rate`, the column with the rate")
        return self

    @property
    def schema_(self) -> Schema:
        """The part that says what the log means."""
        sections = self.model_dump(include={"columns", "roles", "tasks", "features"})
        return parse_schema({**sections, "events": self.data.events, "split": self.split.split_column})

    @property
    def model_choices(self) -> dict[str, dict[str, dict[str, Any]]]:
        """What the model makes of tasks and features: `tasks` or `features` -> name -> key -> value."""
        sections = self.model_dump(mode="json", include=set(MODEL_CHOICES))
        return {
            section: {
                name: {key: value for key, value in each.items() if key in MODEL_CHOICES[section]}
                for name, each in named.items()
            }
            for section, named in sections.items()
        }

    @property
    def experiment(self) -> str:
        """Name of the MLflow experiment."""
        return self.tracking.experiment or self.name

    @property
    def registered_model(self) -> str:
        """Name in the MLflow registry."""
        return self.tracking.registered_model or self.name

    def to_yaml(self) -> str:
        """The resolved settings as YAML; `load_settings` reads it back."""
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
    """PyYAML's rules for what plain text is, by its first letter, with those of YAML 1.2 for numbers."""
    rules = {
        first: [(tag, rule) for tag, rule in found if tag not in _NUMBERS]
        for first, found in base.yaml_implicit_resolvers.items()  # type: ignore[attr-defined]
    }
    for first in "-+.0123456789":
        rules[first] = [*rules.get(first, []), *_NUMBERS.items()]
    return rules


class _Loader(yaml.SafeLoader):
    """Refuses a key that is written twice, where YAML would silently take the last."""

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
    """Quotes text that `_Loader` would take for a number, and text that holds the end of a line."""

    yaml_implicit_resolvers = _with_numbers(yaml.SafeDumper)


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, None if text.isprintable() else '"'),
)


def load_yaml(text: str) -> Any:
    """The values of a YAML text. Raises yaml.YAMLError where it is not valid."""
    return yaml.load(text, _Loader)


def dump_yaml(tree: Any) -> str:
    """YAML that `load_yaml` reads back."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def dump_inline_yaml(value: Any) -> str:
    """A value in one line, as it may stand behind a key."""
    text = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=math.inf, sort_keys=False
    )
    return str(text).strip().removesuffix("...").strip()
