"""Strict, documented settings: one YAML file per data set plus command-line overrides.

`load_settings("configs/x.yaml", ["--model.experts.count", "16"])` gives a frozen `Settings`. Every key is checked; an
unknown or ill-typed key is a `UserError` that names it and the nearest valid key. `describe()` is the text of `--help`.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from mmoe_rec.errors import UserError
from mmoe_rec.schema import Columns, Feature, Roles, Schema, Section, Task


class Split(Section):
    """Training rows lie before `train_end`, validation rows before `validation_end`, test rows before `test_end`."""

    train_start: datetime | None = Field(None, description="first request time to train on; null is the log's begin")
    train_end: datetime = Field(description="end of training (exclusive), UTC unless an offset is given")
    validation_end: datetime = Field(description="end of validation (exclusive)")
    test_end: datetime | None = Field(None, description="end of test (exclusive); null is the log's end")

    @field_validator("*")
    @classmethod
    def _utc(cls, value: datetime | None) -> datetime | None:
        return value.replace(tzinfo=UTC) if value is not None and value.tzinfo is None else value

    @model_validator(mode="after")
    def _ordered(self) -> Split:
        times = [t for t in (self.train_start, self.train_end, self.validation_end, self.test_end) if t is not None]
        if any(a >= b for a, b in zip(times, times[1:], strict=False)):
            raise ValueError("train_start, train_end, validation_end and test_end must follow each other in time")
        return self

    def windows(self) -> dict[str, tuple[int | None, int | None]]:
        """Request times [start, end) of each split in microseconds since 1970 UTC."""
        edges = [self.train_start, self.train_end, self.validation_end, self.test_end]
        start, train, validation, test = (None if t is None else round(t.timestamp() * 1e6) for t in edges)
        return {"train": (start, train), "validation": (train, validation), "test": (validation, test)}


class Data(Section):
    """Where the log is and where what is built from it goes."""

    log: str = Field(description="interaction log: a folder of Parquet files, one file, or a glob")
    work: str = Field(description="folder for encoded features, checkpoints and models")


class Bottom(Section):
    """The shared hidden layer under the experts and gates."""

    units: tuple[int, ...] = Field((256,), min_length=1, description="widths of the shared bottom's layers")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout after each layer of the bottom")


class Experts(Section):
    """The shared experts."""

    count: int = Field(8, ge=1, le=1024, description="number of experts")
    units: tuple[int, ...] = Field((128, 64), min_length=1, description="widths of an expert's layers")


class Gates(Section):
    """One softmax gate per task."""

    dropout: float = Field(
        0.0, ge=0, lt=1, description="probability of leaving an expert out of a gate in training, then renormalised"
    )


class Towers(Section):
    """One tower per task, on the gated sum of the experts."""

    units: tuple[int, ...] = Field((32,), description="widths of a tower's hidden layers")


class Placement(Section):
    """The shallow tower that absorbs placement bias in training and is absent in serving."""

    units: tuple[int, ...] = Field((16,), description="widths of the placement tower's hidden layers")
    dropout: float = Field(0.1, ge=0, lt=1, description="share of training rows whose placement is hidden")


class Model(Section):
    """Structure of the multi-gate mixture of experts."""

    bottom: Bottom = Bottom()
    experts: Experts = Experts()
    gates: Gates = Gates()
    towers: Towers = Towers()
    placement: Placement = Placement()


class Training(Section):
    """How the model is trained."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes CUDA where there is a GPU")
    precision: Literal["auto", "bf16", "fp32"] = Field("auto", description="auto takes bf16 where the device has it")
    epochs: int = Field(1, ge=1, description="passes over the training rows")
    batch_size: int = Field(4096, ge=2, description="rows a step, over all ranks together")
    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate of AdamW on the dense part")
    table_learning_rate: float = Field(0.05, gt=0, description="peak learning rate of row-wise Adagrad on the tables")
    weight_decay: float = Field(1e-4, ge=0, description="decoupled weight decay of the dense part")
    warmup_share: float = Field(0.05, ge=0, lt=1, description="share of all steps in which the learning rates rise")
    clip_gradient: float = Field(1.0, gt=0, description="largest norm of the dense part's gradient")
    shuffle_window: int = Field(262_144, ge=1, description="rows that are shuffled together; bounds memory")
    validations_per_epoch: int = Field(2, ge=1, description="times an epoch that the validation rows are scored")
    patience: int = Field(4, ge=1, description="validations without a better result until training stops")
    select_by: Literal["auc", "loss"] = Field(
        "auc", description="best model: highest mean AUC over the binary tasks, or lowest weighted loss"
    )
    seed: int = Field(17, ge=0, description="seed of initial weights, shuffling and dropout")


class Evaluation(Section):
    """How the trained model is judged."""

    batch_size: int = Field(16_384, ge=1, description="rows scored at a time")
    resamples: int = Field(1000, ge=20, description="bootstrap resamples over users for the 95% intervals")


class Serving(Section):
    """Limits of the served model."""

    max_candidates: int = Field(10_000, ge=1, description="longest candidate list that a request may hold")


class Tracking(Section):
    """Where MLflow keeps runs and models."""

    uri: str = Field("sqlite:///mlflow.db", description="MLflow tracking and registry address")
    experiment: str | None = Field(None, description="MLflow experiment; null takes the settings' `name`")
    registered_model: str | None = Field(None, description="name in the model registry; null takes the settings' `name`")
    alias: str = Field("champion", description="alias that a newly registered model gets")


class Settings(Section):
    """All settings of one data set."""

    name: str = Field(description="name of the data set: experiment and registered model are called so by default")
    data: Data
    columns: Columns
    roles: Roles = Roles()
    tasks: dict[str, Task] = Field(min_length=1, description="name -> task")
    features: dict[str, Feature] = Field(min_length=1, description="name -> feature")
    split: Split
    model: Model = Model()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    serving: Serving = Serving()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _check_schema(self) -> Settings:
        _ = self.schema_
        return self

    @property
    def schema_(self) -> Schema:
        """The part that says what the log means."""
        return Schema(columns=self.columns, roles=self.roles, tasks=self.tasks, features=self.features)

    @property
    def registered_model(self) -> str:
        """Name in the MLflow registry."""
        return self.tracking.registered_model or self.name

    def to_yaml(self) -> str:
        """The resolved settings as YAML; `load_settings` reads it back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def load_settings(path: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Reads a YAML file, applies overrides such as `--model.experts.count 16`, and checks every key.

    Raises UserError with one sentence per wrong key.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"settings file '{path}' does not exist; start from configs/template.yaml")
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"settings file '{path}' is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"settings file '{path}' must hold keys such as name, data, columns, tasks, features, split")
    for key, value in parse_overrides(overrides):
        _set(tree, key, value)
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        raise UserError("; ".join(explain(error, tree, str(path)))) from None


def parse_overrides(arguments: Sequence[str]) -> Iterator[tuple[list[str], Any]]:
    """`--a.b value` and `--a.b=value` as (["a", "b"], value read as YAML)."""
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            raise UserError(f"'{argument}' is not a setting; write --section.key value")
        key, equals, text = argument[2:].partition("=")
        if not equals:
            if not rest:
                raise UserError(f"'--{key}' needs a value")
            text = rest.pop(0)
        try:
            yield key.split("."), yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"the value '{text}' of '--{key}' is not valid YAML") from None


def _set(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    for depth, key in enumerate(keys[:-1], start=1):
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise UserError(f"'--{'.'.join(keys)}' goes below '{'.'.join(keys[:depth])}', which is a single value")
    tree[keys[-1]] = value


def explain(error: ValidationError, tree: Any, where: str) -> Iterator[str]:
    """One sentence per problem: where it is, what was found, and the nearest valid key for an unknown one."""
    for problem in error.errors():
        # A tagged union puts the tag into the location, where the user's file has no such key.
        location = [str(part) for part in _user_location(problem["loc"], tree)]
        name = ".".join(location)
        if problem["type"] == "extra_forbidden":
            keys = valid_keys(location[:-1], tree)
            near = difflib.get_close_matches(location[-1], keys, n=1, cutoff=0.0)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            valid = f" (valid here: {', '.join(keys)})" if keys else ""
            yield f"{where}: unknown key '{name}'{hint}{valid}"
        elif problem["type"] == "missing":
            yield f"{where}: key '{name}' is missing"
        elif problem["type"] == "union_tag_not_found":
            yield f"{where}: '{name}' needs a kind: {', '.join(_feature_kinds())}"
        else:
            message = problem["msg"].removeprefix("Value error, ")
            found = f", found {problem['input']!r}" if isinstance(problem["input"], Scalar) else ""
            yield f"{where}: '{name}': {message}{found}" if name else f"{where}: {message}"


Scalar = (str, int, float, bool, type(None))


def _user_location(location: tuple[int | str, ...], tree: Any) -> Iterator[int | str]:
    for index, part in enumerate(location):
        if isinstance(tree, dict) and part not in tree and part == tree.get("kind"):
            continue
        yield part
        if isinstance(tree, dict):
            tree = tree.get(part)
        elif isinstance(tree, list | tuple) and isinstance(part, int) and part < len(tree):
            tree = tree[part]
        elif index < len(location) - 1:
            tree = None


def valid_keys(location: Sequence[str], tree: Any) -> list[str]:
    """Keys that are valid at a place of the settings."""
    model: Any = Settings
    for part in location:
        tree = tree.get(part) if isinstance(tree, dict) else None
        if isinstance(model, type) and issubclass(model, BaseModel):
            model = model.model_fields[part].annotation if part in model.model_fields else None
        elif typing.get_origin(model) is dict:
            model = typing.get_args(model)[1]
            if typing.get_origin(model) is typing.Annotated:
                kind = tree.get("kind") if isinstance(tree, dict) else None
                model = _feature_kinds().get(str(kind))
        model = _without_none(model)
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def _without_none(annotation: Any) -> Any:
    if isinstance(annotation, types.UnionType):
        rest = [part for part in typing.get_args(annotation) if part is not type(None)]
        return rest[0] if len(rest) == 1 else annotation
    return annotation


def _feature_kinds() -> dict[str, type[Section]]:
    union = typing.get_args(Feature)[0]
    return {typing.get_args(m.model_fields["kind"].annotation)[0]: m for m in typing.get_args(union)}


def describe() -> str:
    """Every setting with its type, default and meaning: the body of `--help`."""
    return "\n".join(_describe(Settings, ""))


def _describe(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        inner = _without_none(field.annotation)
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield f"\n{prefix}{name}: {(inner.__doc__ or '').strip()}"
            yield from _describe(inner, f"{prefix}{name}.")
        elif name == "tasks":
            yield f"\ntasks.NAME: {(Task.__doc__ or '').strip()}"
            yield from _describe(Task, "tasks.NAME.")
        elif name == "features":
            for kind, section in _feature_kinds().items():
                yield f"\nfeatures.NAME (kind: {kind}): {(section.__doc__ or '').strip()}"
                yield from _describe(section, "features.NAME.")
        elif name != "kind" or model is Task:
            yield f"  --{prefix}{name}  {_default(field)}\n        {field.description}"


def _default(field: FieldInfo) -> str:
    kind = str(field.annotation) if not isinstance(field.annotation, type) else field.annotation.__name__
    kind = kind.replace("typing.", "").replace("NoneType", "null").replace("None", "null").replace("datetime.", "")
    if field.is_required():
        return f"<{kind}> (required)"
    default = list(field.default) if isinstance(field.default, tuple) else field.default
    return f"<{kind}> (default {'null' if default is None else default})"
