"""A kind of feature: all that belongs to it, so that nothing can be left out."""

from __future__ import annotations

import typing
from dataclasses import dataclass

from mmoe_rec.features.encoder import Encoder, MemoryEncoder
from mmoe_rec.settings.columns import CHOICES
from mmoe_rec.settings.schema import Feature, Remembering


@dataclass(frozen=True)
class Kind:
    """A kind is one file of `mmoe_rec.features.kinds`, which ends with its `Kind`.

    feature: its settings without what a model chooses, with the columns that they read and what the health report says;
    settings: the same with what a model chooses, `dim`, if it has an embedding table; encoder: its partial fit, inputs,
    sizes, state, and what a request may give.

    Raises TypeError naming what is missing.
    """

    feature: type[Feature]
    settings: type[Feature]
    encoder: type[Encoder]

    def __post_init__(self) -> None:
        for part, of in ((self.feature, Feature), (self.settings, self.feature), (self.encoder, Encoder)):
            if not issubclass(part, of):
                raise TypeError(f"{part.__name__} must be a subclass of {of.__name__}")
            if missing := sorted(getattr(part, "__abstractmethods__", ())):
                raise TypeError(f"{part.__name__} lacks {', '.join(missing)}")
        if issubclass(self.encoder, MemoryEncoder) != issubclass(self.feature, Remembering):
            raise TypeError(
                f"{self.encoder.__name__} does not fit {self.feature.__name__}: a MemoryEncoder needs a Remembering "
                "feature, whose events are read and checked, and no other encoder can have one"
            )
        if (file := self.feature.__module__.rpartition(".")[2]) not in _literals(self.feature):
            raise TypeError(f"{self.feature.__name__} lacks the name of its file: kind: Literal['{file}']")
        if added := set(self.settings.model_fields) - set(self.feature.model_fields) - CHOICES["features"]:
            raise TypeError(
                f"{self.settings.__name__} adds {', '.join(sorted(added))}; only {', '.join(CHOICES['features'])} is a "
                f"model's choice, so others belong to {self.feature.__name__}"
            )


def _literals(feature: type[Feature]) -> tuple[str, ...]:
    field = feature.model_fields.get("kind")
    return () if field is None else typing.get_args(field.annotation)
