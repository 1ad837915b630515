"""Which model inputs belong to which feature, and what they mean."""

from __future__ import annotations

from dataclasses import dataclass

from mmoe_rec.features.layout import DenseInput, IdInput, Layout
from mmoe_rec.settings.schema import Meaning, Schema


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
    for each in (*layout.ids, *layout.dense):
        if each.feature not in schema.features:
            raise ValueError(f"input '{each.name}' belongs to none of the features {', '.join(schema.features)}")
    return [
        FeatureInputs(
            name,
            feature.kind,
            schema.role_of(name),
            feature.meaning(schema),
            tuple(each for each in layout.ids if each.feature == name),
            _numbers(layout.dense, name),
        )
        for name, feature in schema.features.items()
    ]


def _numbers(dense: tuple[DenseInput, ...], feature: str) -> tuple[NumberInput, ...]:
    places = {each.name: place for place, each in enumerate(dense) if each.feature == feature}
    indicators = {f"{name}_missing" for name in places}.intersection(places)
    return tuple(
        NumberInput(name, place, places.get(f"{name}_missing"), dense[place].edges)
        for name, place in places.items()
        if name not in indicators
    )
