"""Which model inputs belong to which feature, and what they mean."""

from __future__ import annotations

from dataclasses import dataclass

from mmoe_rec.features.layout import DenseInput, IdInput, Layout
from mmoe_rec.schema import Meaning, Schema


@dataclass(frozen=True)
class NumberInput:
    """A dense input, its place in the layout and that of the indicator of its missing values, if it has one."""

    name: str
    place: int
    indicator: int | None
    edges: tuple[float, ...]


@dataclass(frozen=True)
class FeatureInputs:
    """A feature with its inputs in the order of the layout."""

    name: str
    kind: str
    role: str
    meaning: Meaning
    ids: tuple[IdInput, ...]
    numbers: tuple[NumberInput, ...]


def feature_inputs(schema: Schema, layout: Layout) -> list[FeatureInputs]:
    """All features in the order of the settings. Raises ValueError for an input that belongs to none of them."""
    owner = {each.name: each.feature or each.name for each in layout.ids}
    owner |= {each.name: each.feature or each.name for each in layout.dense}
    for name, feature_name in owner.items():
        if feature_name not in schema.features:
            raise ValueError(f"input '{name}' belongs to none of the features {', '.join(schema.features)}")
    return [
        FeatureInputs(
            name,
            feature.kind,
            schema.role_of(name),
            feature.meaning(schema),
            tuple(each for each in layout.ids if owner[each.name] == name),
            _numbers(layout.dense, {each.name for each in layout.dense if owner[each.name] == name}),
        )
        for name, feature in schema.features.items()
    ]


def _numbers(dense: tuple[DenseInput, ...], names: set[str]) -> tuple[NumberInput, ...]:
    places = {each.name: place for place, each in enumerate(dense)}
    indicators = {name: f"{name}_missing" for name in names if f"{name}_missing" in names}
    return tuple(
        NumberInput(each.name, places[each.name], places.get(indicators.get(each.name, "")), each.edges)
        for each in dense
        if each.name in names.difference(indicators.values())
    )
