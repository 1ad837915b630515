"""What `tune --preset` tries: alternatives to values of a settings file, and groups of features that it may do without.

All are trained on rows that are encoded once: those of the file, or with further inputs (`widen`), which only the
alternatives see that ask for them. How often a training is validated is none of them: the best of more states looks
better on the rows that choose it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mmoe_rec.features.kinds.counter import CounterFeature, suffix_of
from mmoe_rec.features.kinds.numeric import NumericFeature
from mmoe_rec.settings.sections import Settings

Preset = Literal["small", "medium", "large"]
MINUTES: dict[Preset, float] = {"small": 20, "medium": 120, "large": 480}
"""Of each preset, on two cores."""


@dataclass(frozen=True)
class Alternative:
    """One thing that may be done otherwise than the file does it.

    name: in words; part: of the settings, of which a training takes one alternative at most; values: a setting such as
    `training.epochs` -> its value; without: features, or inputs of features, that a training never sees; adds: inputs
    that it alone sees; simpler: whether it takes less to train or to serve, so that it is taken where nothing is lost;
    cost: times that a training takes as long, by a guess.
    """

    name: str
    part: str
    values: Mapping[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    adds: tuple[str, ...] = ()
    simpler: bool = False
    cost: float = 1.0


def list_alternatives(settings: Settings, rows: int, preset: Preset, inputs: Collection[str] = ()) -> list[Alternative]:
    """Those that go with the settings, what gives most on most logs first. rows: for training; inputs: names of all."""
    found = []
    of_features = (*_of_features(settings), *_of_inputs(settings, inputs))
    for each in (*_of_training(settings, rows, preset), *of_features, *_of_model(settings, preset)):
        try:
            apply_alternatives(settings, [each])
        except ValueError:  # it does not go with the rest of the file
            continue
        found.append(each)
    order = ["epochs", "dropout", "batch", "learning rate", "trees", "ids", "histories", "values", "windows"]
    order += ["counters of other pairs", "counters of users with something else", "counters of attributes"]
    return sorted(found, key=lambda each: order.index(each.part) if each.part in order else len(order))


def _of_training(settings: Settings, rows: int, preset: Preset) -> Iterator[Alternative]:
    training = settings.training
    for times in (2, 4) if preset != "small" else (2,):
        yield _other("epochs", "training.epochs", training.epochs * times, cost=times)
    if training.epochs > 1:
        yield _other("epochs", "training.epochs", training.epochs // 2, simpler=True, cost=0.5)
    batch = training.rows_of_step(rows)
    for size, cost in ((batch // 2, 1.6), (batch * 2, 0.7)):
        if 2 <= size <= rows // 4:
            yield _other("batch", "training.batch_size", size, cost=cost)
    for factor in (2, 0.5):
        yield _other("learning rate", "training.learning_rate", _rounded(training.learning_rate * factor))
    for factor in (0.4, 2):
        yield _other(
            "learning rate of tables",
            "training.table_learning_rate",
            _rounded(training.table_learning_rate * factor),
        )
    if preset != "small" and training.weight_decay < 0.01:
        yield _other("weight decay", "training.weight_decay", 0.01)


def _of_model(settings: Settings, preset: Preset) -> Iterator[Alternative]:
    model = settings.model
    dropouts = [each for each in (0.1, 0.3, 0.0) if each != model.bottom.dropout]
    for dropout in dropouts[:2]:
        yield _other("dropout", "model.bottom.dropout", dropout)
    if model.trees is None:
        yield _other("trees", "model.trees", {}, cost=1.3)
    else:
        yield Alternative("no trees", "trees", {"model.trees": None}, simpler=True, cost=0.7)
        yield _other("trees", "model.trees.leaves", 15 if model.trees.leaves > 15 else 31, simpler=True)
        yield _other("trees", "model.trees.learning_rate", _rounded(model.trees.learning_rate * 0.6), cost=1.2)
    if model.experts.count > 1:
        yield _other("experts", "model.experts.count", 1, simpler=True, cost=0.8)
    if preset != "small":
        yield _other("experts", "model.experts.count", max(4, model.experts.count * 2), cost=1.3)
    if model.bottom.cross_layers:
        yield _other("crosses", "model.bottom.cross_layers", 0, simpler=True, cost=0.8)
    else:
        yield _other("crosses", "model.bottom.cross_layers", 2, cost=1.2)
    if model.bottom.units and preset != "small":
        units = [each * 2 for each in model.bottom.units]
        yield _other("bottom", "model.bottom.units", units, cost=1.3)
    for times, name in ((0.5, "half"), (2, "twice")):
        widths = {feature: getattr(each, "dim", 0) for feature, each in settings.features.items() if each.has_dim}
        dims = {f"features.{feature}.dim": int(dim * times) for feature, dim in widths.items() if dim > 4}
        if dims:
            yield Alternative(f"vectors {name} as wide", "dims", dims, simpler=times < 1, cost=times**0.2)


def _of_features(settings: Settings) -> Iterator[Alternative]:
    features, columns = settings.features, settings.columns

    def left_out(part: str, name: str, names: Collection[str]) -> Iterator[Alternative]:
        """Without features, where others remain and none of those reads them."""
        rest = {each: feature for each, feature in features.items() if each not in names}
        if names and rest and not (set(_read_by(rest.values())) & set(names)):
            yield Alternative(f"without {name} ({_some(names)})", part, without=tuple(names), simpler=True)

    def of_kind(kind: str, **equal: Any) -> list[str]:
        each_of = {name: each for name, each in features.items() if each.kind == kind}
        return [name for name, each in each_of.items() if all(getattr(each, k) == v for k, v in equal.items())]

    histories = of_kind("history")
    yield from left_out("histories", "histories", histories)
    for what, column in (("user", columns.user), ("candidate", columns.candidate)):
        ids = of_kind("id", column=column)
        yield from left_out("ids", f"ids of {what}s", ids)
        readers = [name for name in histories if set(_read_by([features[name]])) & set(ids)]
        if readers:
            yield from left_out("histories", f"ids of {what}s and histories of them", [*ids, *readers])
    yield from left_out("crosses of columns", "crosses", of_kind("cross"))
    counters = {name: each.by for name, each in features.items() if isinstance(each, CounterFeature)}
    kinds = {
        "counters of users with something else": [
            n for n, by in counters.items() if columns.user in by and len(by) > 1
        ],
        "counters of other pairs": [n for n, by in counters.items() if columns.user not in by and len(by) > 1],
        "counters of attributes": [
            n for n, by in counters.items() if len(by) == 1 and not {*by} & {columns.user, columns.candidate}
        ],
    }
    for name, names in kinds.items():
        if len(names) < len(counters):
            yield from left_out(name, name, names)
    for task in settings.tasks:
        yield from left_out(f"counters of {task}", f"counters of {task}", of_kind("counter", task=task))
    for events in settings.data.events:
        yield from left_out(f"counters of {events}", f"counters of {events}", of_kind("counter", events=events))


def _of_inputs(settings: Settings, inputs: Collection[str]) -> Iterator[Alternative]:
    """Without some inputs of features that otherwise stay."""
    counters = {name: each for name, each in settings.features.items() if isinstance(each, CounterFeature)}

    def left_out(part: str, name: str, values: Mapping[str, Any], names: Iterable[str]) -> Iterator[Alternative]:
        seen = tuple(each for one in names for each in (one, f"{one}_missing") if each in inputs)
        if seen:
            yield Alternative(name, part, values, seen, simpler=True)

    recent = {name: each for name, each in counters.items() if "recency" in each.outputs and len(each.outputs) > 1}
    yield from left_out(
        "recency",
        f"no recency of {_some(recent)}",
        {f"features.{n}.outputs": [o for o in each.outputs if o != "recency"] for n, each in recent.items()},
        (f"{name}_recency" for name in recent),
    )
    ways: dict[str, Callable[[float | None], bool]] = {
        "all of the past alone, without windows, of": lambda days: days is None,
        "windows alone, without all of the past, of": lambda days: days is not None,
        "no windows of a day or less, of": lambda days: days is None or days > 1,
    }
    for name, stays in ways.items():
        kept = {n: [days for days in each.window_days if stays(days)] for n, each in counters.items()}
        kept = {n: windows for n, windows in kept.items() if 0 < len(windows) < len(counters[n].window_days)}
        gone = (
            f"{n}_{output}{suffix_of(days)}"
            for n in kept
            for output in counters[n].outputs
            for days in counters[n].window_days
            if output != "recency" and not stays(days)
        )
        values = {f"features.{n}.window_days": windows for n, windows in kept.items()}
        yield from left_out("windows", f"{name} {_some(kept)}", values, gone)
    valued = [name for name, each in settings.features.items() if getattr(each, "values", None) is not None]
    yield from left_out(
        "values",
        f"no exact values of {_some(valued)}",
        {f"features.{name}.values": None for name in valued},
        (f"{name}_value" for name in valued),
    )


WINDOWS = (7, 28)
"""Days, of counters that have none."""


def widen(settings: Settings) -> list[Alternative]:
    """Alternatives that take further inputs of features, which are not among `adds` as long as these are not built."""
    numbers, counters = list[str](), list[str]()
    for name, each in settings.features.items():
        if isinstance(each, NumericFeature) and each.values is None and each.transform != "buckets":
            numbers.append(name)
        if isinstance(each, CounterFeature) and each.window_days == (None,):
            counters.append(name)
    found = []
    if numbers:
        values = {f"features.{name}.values": "auto" for name in numbers}
        found.append(Alternative(f"exact values of {_some(numbers)}", "values", values))
    if counters:
        windows = {f"features.{name}.window_days": [None, *WINDOWS] for name in counters}
        days = " and ".join(map(str, WINDOWS))
        found.append(Alternative(f"windows of {days} days too, of {_some(counters)}", "windows", windows))
    return found


def _read_by(features: Iterable[Any]) -> Iterator[str]:
    """Names of the features that others read."""
    for each in features:
        yield from filter(None, (getattr(each, "of", None), getattr(each, "table", None)))
        yield from getattr(each, "attributes", ())


def _some(names: Collection[str]) -> str:
    """The first of some names, and how many more there are."""
    first = list(names)[:3]
    return ", ".join(first) + (f" and {len(names) - len(first)} more" if len(names) > len(first) else "")


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def _other(part: str, setting: str, value: Any, *, simpler: bool = False, cost: float = 1.0) -> Alternative:
    shown = "with trees" if value == {} else f"{setting} {value}"
    return Alternative(shown, part, {setting: value}, simpler=simpler, cost=cost)


def apply_alternatives(settings: Settings, taken: Iterable[Alternative]) -> tuple[Settings, tuple[str, ...]]:
    """Settings with other values, and the features that are left out, which the settings still have.

    Raises ValueError (pydantic's ValidationError is one) where they don't go together, or leave no input to rank by.
    """
    tree, without = settings.model_dump(), list[str]()
    for each in taken:
        without += each.without
        for name, value in each.values.items():
            *path, last = name.split(".")
            section = tree
            for key in path:
                section = section[key]
            section[last] = value
    changed = Settings.model_validate(tree)
    if not changed.schema_.can_rank_without(without):
        raise ValueError("no feature of user, candidate or context is left")
    return changed, tuple(without)


def keys_of(settings: Settings, without: Collection[str]) -> list[list[str]]:
    """Where a settings file speaks of features: themselves, and what a search for other settings says of them. without:
    features; single inputs of others are of no key."""
    without = [name for name in without if name in settings.features]
    begins = tuple(f"features.{name}." for name in without)
    searched = [["tuning", "search", name] for name in settings.tuning.search if name.startswith(begins)]
    return [["features", name] for name in without] + searched


def leave_out(settings: Settings, without: Collection[str]) -> Settings:
    """The settings without features, and without what else they say of them."""
    tree = settings.model_dump()
    for *path, last in keys_of(settings, without):
        section = tree
        for key in path:
            section = section[key]
        del section[last]
    return Settings.model_validate(tree)
