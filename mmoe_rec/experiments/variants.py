"""Variants of settings: those of the command line, and the architectures that `compare --architectures` tries."""

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mmoe_rec.errors import UserError
from mmoe_rec.settings.load import override_settings
from mmoe_rec.settings.model import Experts, Gates, Model
from mmoe_rec.settings.sections import Settings, differences

MAX_UNITS = 4096
"""Most units of a shared bottom's first layer."""


@dataclass(frozen=True)
class Variant:
    """A name and what it changes in the settings.

    Attributes:
        name: Name that no other variant of the comparison has.
        overrides: Overrides of the settings, such as `model.experts.count=1`.
        without_features: Features that the model never sees. They need no features of their own.
        without_tasks: Tasks that the model doesn't learn. Features made from their labels stay.
        trees_alone: Whether to grow boosted trees instead of training a network.
        simpler: Whether the variant is worth adopting if it loses nothing.
    """

    name: str
    overrides: tuple[str, ...] = ()
    without_features: tuple[str, ...] = ()
    without_tasks: tuple[str, ...] = ()
    trees_alone: bool = False
    simpler: bool = False

    def apply(self, settings: Settings) -> Settings:
        """Return the settings with the overrides. Raises UserError for an unknown key or a wrong value."""
        words = [f"--{override}" for override in self.overrides]
        return override_settings(settings, words, f"variant '{self.name}'") if words else settings

    @property
    def change(self) -> str:
        """The options that adopt the variant in another command."""
        words = [*self.overrides, *(f"features.{name}=null" for name in self.without_features)]
        return " ".join(shlex.quote(f"--{word}") for word in words)


BASE = Variant("these settings")


def parse_variants(words: Sequence[str]) -> list[Variant]:
    """Read the variants of a command line.

    Args:
        words: A name, then its overrides such as `training.epochs=2`, then the next name. `features.NAME=null` leaves
            a feature out.

    Raises:
        UserError: A name is missing, comes twice, or has no overrides.
    """
    named: dict[str, list[str]] = {}
    for word in words:
        if "=" in word:
            if not named:
                raise UserError(f"--variant '{word}' has no name. Write --variant NAME {word}.")
            named[list(named)[-1]].append(word)
        elif word in named:
            raise UserError(f"--variant '{word}' is given twice. Give each variant another name.")
        else:
            named[word] = []
    variants = []
    for name, overrides in named.items():
        if not overrides:
            raise UserError(f"--variant '{name}' changes nothing. Give it overrides, such as training.epochs=2.")
        left_out = [word for word in overrides if word.startswith("features.") and word.endswith("=null")]
        left_out = [word for word in left_out if word.count(".") == 1]
        features = tuple(word.removeprefix("features.").removesuffix("=null") for word in left_out)
        variants.append(Variant(name, tuple(word for word in overrides if word not in left_out), features))
    return variants


def list_architectures(settings: Settings) -> list[Variant]:
    """List the architectures of one budget, each task alone, each task left out, and trees alone.

    The first variant has the settings' own architecture, under its standard name if it has one. Trees beside the
    network take no part, because they would hide the differences. All networks have the same rows, steps, and rates,
    and as many units in the first layer of their experts.
    """
    own, tasks = settings.model.model_copy(update={"trees": None}), tuple(settings.tasks)
    base = () if settings.model.trees is None else ("model.trees=null",)
    models = dict(_list_models(own, len(tasks)))
    name = next((name for name, model in models.items() if model == own), "these settings")
    order = list(models)
    variants = [Variant(name, base)]
    for other, model in models.items():
        if other != name:
            simpler = name not in order or order.index(other) < order.index(name)
            variants.append(Variant(other, (*base, *_describe_change(own, model)), simpler=simpler))
    if len(tasks) > 1:
        for task in tasks:
            others = tuple(other for other in tasks if other != task)
            variants.append(Variant(f"only {task}", base, without_tasks=others))
    if len(tasks) > 2:
        variants += [Variant(f"without {task}", base, without_tasks=(task,)) for task in tasks]
    return [*variants, Variant("trees alone", base, trees_alone=True)]


def _describe_change(own: Model, model: Model) -> Iterator[str]:
    for section in ("experts", "gates"):
        before, after = (getattr(each, section).model_dump(mode="json") for each in (own, model))
        for name, *_ in differences(before, after):
            yield f"model.{section}.{name}={json.dumps(after[name])}"


def _list_models(own: Model, tasks: int) -> Iterator[tuple[str, Model]]:
    """Yield architectures with as many units in the first layer of their experts, the simplest first."""
    experts, gates = own.experts, own.gates
    total = experts.count + experts.task_count * tasks
    if gates.routing == "soft":
        gates = gates.model_copy(update={"serving_top_k": None})
    else:  # The budget is what a row takes.
        total = min(total, gates.serving_top_k or gates.top_k)
        gates = Gates(dropout=gates.dropout)
    width, (first, *rest) = min(total * experts.units[0], MAX_UNITS), experts.units
    if total == 1:  # A shared bottom is divided into experts.
        total = max(2, min(Experts().count, first // 8))
        first = max(1, first // total)
    one_level = {"task_count": 0, "levels": 1}
    mixture = experts.model_copy(update={**one_level, "count": total, "units": (first, *rest)})
    bottom = experts.model_copy(update={**one_level, "count": 1, "units": (width, *rest)})
    count = max(1, round(total / (tasks + 1)))
    ple = mixture.model_copy(update={"count": count, "task_count": count, "levels": 2})
    per_task, shared = (gates.model_copy(update={"per_task": value}) for value in (True, False))
    yield "shared bottom", _with(own, bottom, per_task.model_copy(update={"dropout": 0.0}))
    if tasks > 1:
        yield "one gate", _with(own, mixture, shared)
    yield "MMoE", _with(own, mixture, per_task)
    if tasks > 1:
        yield "PLE", _with(own, ple, per_task)


def _with(own: Model, experts: Experts, gates: Gates) -> Model:
    return own.model_copy(update={"experts": experts, "gates": gates})
