"""Strict, documented settings: one YAML file per data set plus command-line overrides.

`load_settings("configs/x.yaml", ["--model.experts.count", "16"])` gives a frozen `Settings`. Every key is checked; an
unknown or ill-typed key is a `UserError` that names it and the nearest valid key. `describe()` is the text of `--help`.
"""

from __future__ import annotations

import builtins
import difflib
import itertools
import json
import types
import typing
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from mmoe_rec.errors import UserError
from mmoe_rec.schema import Columns, EventLog, Feature, Roles, Schema, Section, Task

Width = Annotated[int, Field(ge=1, le=65_536)]


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
        if any(a >= b for a, b in itertools.pairwise(times)):
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
    events: dict[str, EventLog] = Field(
        default_factory=dict, description="name -> a further log of events, which counters and histories may read"
    )
    work: str = Field(description="folder for encoded features, checkpoints and models")


class Bottom(Section):
    """The shared hidden layer under the experts and gates."""

    units: tuple[Width, ...] = Field((256,), min_length=1, description="widths of the shared bottom's layers")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout after each layer of the bottom")
    piecewise: bool = Field(
        True, description="encode each number piecewise-linearly between quantiles, so that the model can bend there"
    )
    cross_layers: int = Field(2, ge=0, le=8, description="DCN-v2 feature crosses on the inputs; 0 leaves them out")
    cross_rank: int = Field(32, ge=1, description="rank of a cross layer's weights")


class Experts(Section):
    """The shared experts."""

    count: int = Field(8, ge=1, le=1024, description="number of experts")
    units: tuple[Width, ...] = Field((128, 64), min_length=1, description="widths of an expert's layers")


class Gates(Section):
    """One softmax gate per task."""

    dropout: float = Field(
        0.0, ge=0, lt=1, description="probability of leaving an expert out of a gate in training, then renormalised"
    )


class Towers(Section):
    """One tower per task, on the gated sum of the experts."""

    units: tuple[Width, ...] = Field((32,), description="widths of a tower's hidden layers")


class Placement(Section):
    """The shallow tower that absorbs placement bias in training and is absent in serving."""

    units: tuple[Width, ...] = Field((16,), description="widths of the placement tower's hidden layers")
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
    registered_model: str | None = Field(
        None, description="name in the model registry; null takes the settings' `name`"
    )
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
        return Schema(
            columns=self.columns,
            roles=self.roles,
            tasks=self.tasks,
            features=self.features,
            events=self.data.events,
        )

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
        what = "is a folder" if file.is_dir() else "does not exist"
        raise UserError(f"settings file '{path}' {what}; start from configs/template.yaml")
    try:
        tree = yaml.load(file.read_text(encoding="utf-8"), _StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"settings file '{path}' is not valid YAML: {_yaml_problem(error)}") from None
    except OSError as error:
        raise UserError(f"settings file '{path}' cannot be read: {error.strerror}") from None
    if not isinstance(tree, dict):
        raise UserError(f"settings file '{path}' must hold keys such as name, data, columns, tasks, features, split")
    for key, value in parse_overrides(overrides):
        _set(tree, key, value)
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        raise UserError("; ".join(explain(error, tree, str(path)))) from None


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that is written twice, where YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.MarkedYAMLError(None, None, f"key '{key.value}' is written twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _yaml_problem(error: Exception) -> str:
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    mark = error.problem_mark
    return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"


def parse_overrides(arguments: Sequence[str]) -> Iterator[tuple[list[str], Any]]:
    """`--a.b value` and `--a.b=value` as (["a", "b"], value read as YAML)."""
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            raise UserError(f"'{argument}' is not a setting; write --section.key value")
        key, equals, text = argument[2:].partition("=")
        if not all(key.split(".")):
            raise UserError(f"'{argument}' is not a setting; write --section.key value")
        if not equals:
            if not rest:
                raise UserError(f"'--{key}' needs a value")
            text = rest.pop(0)
        try:
            yield key.split("."), yaml.load(text, _StrictLoader)
        except yaml.YAMLError:
            raise UserError(f"the value '{text}' of '--{key}' is not valid YAML") from None


def _set(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    for depth, key in enumerate(keys[:-1], start=1):
        if tree.get(key) is None:
            tree[key] = {}
        tree = tree[key]
        if not isinstance(tree, dict):
            raise UserError(f"'--{'.'.join(keys)}' goes below '{'.'.join(keys[:depth])}', which is a single value")
    tree[keys[-1]] = value


def explain(error: ValidationError, tree: Any, where: str) -> Iterator[str]:
    """One sentence per problem: where it is, what was expected, what was found, the nearest valid key."""
    told = set()
    for problem in error.errors():
        if problem["type"] == "too_short" and len(problem["input"]) >= problem["ctx"]["min_length"]:
            continue  # It is long enough, but for an entry that has a sentence of its own.
        # A tagged union puts the tag into the location, where the user's file has no such key.
        location = [str(part) for part in _user_location(problem["loc"], tree)]
        sentence = _sentence(problem["type"], location, problem, tree)
        # A union reports each of its members.
        if sentence not in told:
            told.add(sentence)
            yield f"{where}: {sentence}"


def _sentence(kind: str, location: list[str], problem: Any, tree: Any) -> str:
    name, found, context = ".".join(location), _found(problem["input"]), problem.get("ctx", {})
    if location[-1:] == ["[key]"]:
        return f"'{'.'.join(location[:-2])}' has the key {location[-2]}, which is not text; put it in quotes"
    if location[-2:-1] == ["equals"]:
        return f"'{name.rpartition('.')[0]}' must be a number, text, true or false{found}"
    match kind:
        case "extra_forbidden":
            keys = valid_keys(location[:-1], tree)
            text = f"unknown key '{name}'{_nearest(location[-1], keys)} (valid here: {', '.join(keys)})"
        case "missing":
            text = f"key '{name}' is missing ({_meaning(location, tree)})"
        case "union_tag_not_found":
            text = f"'{name}' needs a kind: {', '.join(_feature_kinds())}"
        case "union_tag_invalid":
            kinds, tag = list(_feature_kinds()), context["tag"]
            text = f"'{name}.kind' must be one of {', '.join(kinds)}, found '{tag}'{_nearest(tag, kinds)}"
        case "literal_error":
            values = [str(value) for value in _literals(location, tree)]
            text = f"'{name}' must be one of {', '.join(values)}{found}{_nearest(str(problem['input']), values)}"
        case "dict_type":
            text = f"'{name}' must hold a section for each name{found}"
        case "model_type" | "model_attributes_type":
            text = f"'{name}' must hold keys ({', '.join(valid_keys(location, tree)) or 'kind and others'}){found}"
        case _ if kind in _EXPECTED:
            text = f"'{name}' must be {_EXPECTED[kind].format(**context)}{found}"
        case _:
            message = problem["msg"].removeprefix("Value error, ")
            joint = " " if message.startswith(("must", "lists")) else ": "
            text = f"'{name}'{joint}{message}{found}" if name else message
    return text


_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text, in quotes where it looks like a number or a date",
    "tuple_type": "a list, such as [a, b]",
    "list_type": "a list, such as [a, b]",
    "greater_than_equal": "at least {ge}",
    "greater_than": "greater than {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "less than {lt}",
    "too_short": "longer: at least {min_length} needed",
    "datetime_type": "a time such as 2024-01-31 or 2024-01-31T18:00:00",
    "datetime_parsing": "a time such as 2024-01-31 or 2024-01-31T18:00:00",
    "datetime_from_date_parsing": "a time such as 2024-01-31 or 2024-01-31T18:00:00",
}


def _found(value: Any) -> str:
    if value is None:
        return ", found nothing (null)"
    return f", found {value!r}" if isinstance(value, str | int | float | list | tuple) and len(repr(value)) < 80 else ""


def _nearest(word: str, words: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""


def _meaning(location: Sequence[str], tree: Any) -> str:
    field = _field(location, tree)
    if field is None or field.description is None:
        return f"it holds {', '.join(valid_keys(location, tree)) or 'a value'}"
    return field.description


def _field(location: Sequence[str], tree: Any) -> FieldInfo | None:
    model = _model_at(location[:-1], tree)
    return model.model_fields.get(location[-1]) if model is not None else None


def _literals(location: Sequence[str], tree: Any) -> Iterator[Any]:
    names = list(location)
    while names and names[-1].isdigit():
        names.pop()
    field = _field(names, tree)
    waiting = [field.annotation] if field is not None else []
    while waiting:
        annotation = waiting.pop(0)
        if typing.get_origin(annotation) is Literal:
            yield from typing.get_args(annotation)
        else:
            waiting += typing.get_args(annotation)


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
    model = _model_at(location, tree)
    return list(model.model_fields) if model is not None else []


def _model_at(location: Sequence[str], tree: Any) -> type[BaseModel] | None:
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
        else:
            model = None
        model = _without_none(model)
    return model if isinstance(model, type) and issubclass(model, BaseModel) else None


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
        elif name == "events" and model is Data:
            yield f"\ndata.events.NAME: {(EventLog.__doc__ or '').strip()}"
            yield from _describe(EventLog, "data.events.NAME.")
        elif name == "features":
            for kind, section in _feature_kinds().items():
                yield f"\nfeatures.NAME (kind: {kind}): {(section.__doc__ or '').strip()}"
                yield from _describe(section, "features.NAME.")
        elif name != "kind" or model is Task:
            yield f"  --{prefix}{name}  {_default(field)}\n        {field.description}"


def _default(field: FieldInfo) -> str:
    kind = _words(field.annotation)
    if field.is_required():
        return f"<{kind}> (required)"
    default = list(field.default) if isinstance(field.default, tuple) else field.default
    return f"<{kind}> (default {json.dumps(default)})"


def _words(annotation: Any) -> str:
    """A type as a user would say it."""
    simple = {int: "whole number", float: "number", str: "text", bool: "true or false", datetime: "time"}
    if annotation in simple:
        return simple[annotation]
    if annotation is type(None):
        return "null"
    parts = typing.get_args(annotation)
    match typing.get_origin(annotation):
        case typing.Literal:
            return " | ".join(map(str, parts))
        case typing.Annotated:
            return _words(parts[0])
        case builtins.tuple:
            return f"list of {_words(parts[0])}"
    return " | ".join(map(_words, parts))
