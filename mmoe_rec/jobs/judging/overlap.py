"""Whether a model has seen the labels that it is measured by."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml

from mmoe_rec.settings import Settings
from mmoe_rec.settings.split import Split


def overlap(settings: Settings, artifact: Path) -> list[str]:
    """What the training of a model made of requests of the settings' test rows, if anything, to be read after its name.

    artifact: its folder, whose settings say what it was trained on.
    """
    try:
        tree = yaml.safe_load((artifact / "settings.yaml").read_text(encoding="utf-8"))
        split = Split.model_validate(tree["split"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return []
    begin = settings.split.validation_end
    if settings.split.column is not None:
        return list(_by_column(settings.split, split))
    if begin is None or split.train_end is None or split.validation_end is None:
        return []
    found = []
    for end, what in ((split.train_end, "trained"), (split.validation_end, "chosen and calibrated")):
        if end > begin:
            found.append(
                f"was {what} on requests before {end:%Y-%m-%d %H:%M}, and the rows that it is measured on "
                f"begin at {begin:%Y-%m-%d %H:%M} UTC: it has seen labels that it is measured by"
            )
    return found[:1]


def _by_column(now: Split, its: Split) -> Iterator[str]:
    for values, what in ((its.train, "trained"), (its.validation, "chosen and calibrated")):
        if now.column == its.column and (both := [each for each in now.test if each in values]):
            yield (
                f"was {what} on rows with {', '.join(map(repr, both))} in column '{now.column}', which are those that "
                "it is measured on: it has seen labels that it is measured by"
            )
