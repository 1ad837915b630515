"""Whether a model has seen the labels that it is measured by."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from mmoe_rec.jobs.judging.training_rows import TrainingRows
from mmoe_rec.jobs.scoring.learnt import text_of
from mmoe_rec.settings.sections import Settings, Split

if TYPE_CHECKING:
    from mmoe_rec.evaluation.scoring import ScoredRows


def overlap(settings: Settings, artifact: Path) -> list[str]:
    """What the training of a model made of requests of the settings' test rows, if anything, to be read after its name.

    artifact: its folder, whose settings say what it was trained on.
    """
    try:
        tree = yaml.safe_load((artifact / "settings.yaml").read_text(encoding="utf-8"))
        split = Split.model_validate(tree["split"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return ["does not say on which rows it was trained, so it may have seen labels that it is measured by"]
    begin = settings.split.validation_end
    if settings.split.column != split.column:
        ways = ["times" if each is None else f"column '{each}'" for each in (split.column, settings.split.column)]
        return [
            f"was trained on rows that {ways[0]} split, and those that it is measured on {ways[1]}: it may have seen "
            "labels that it is measured by"
        ]
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


def users_in_both(settings: Settings, artifact: Path, scored: ScoredRows, training: TrainingRows | None) -> list[str]:
    """What is to be said, after a model's name, of users that a column splits into training and test rows alike. Times
    do so too, and by right: what is asked then is how the same users go on.

    training: rows of the settings' split, which only a model of the same features was trained on.
    """
    from mmoe_rec.inference.artifact import read_artifact

    if training is None or settings.split.column is None:
        return []
    if read_artifact(artifact, verify=False).fingerprint != training.fingerprint:
        return []
    both, users = training.of_users_in_both(scored)
    if not both:
        return []
    return [
        f"was trained on rows of {both:,} of the {users:,} users that it is measured on, as column "
        f"'{settings.split.column}' splits rows of the same users: it tells nothing of how users that it has not seen "
        "are predicted; give all rows of a user one split"
    ]


def _by_column(now: Split, its: Split) -> Iterator[str]:
    for values, what in ((its.train, "trained"), (its.validation, "chosen and calibrated")):
        known = {text_of(each) for each in values}
        if both := [each for each in now.test if text_of(each) in known]:
            yield (
                f"was {what} on rows with {', '.join(map(repr, both))} in column '{now.column}', which are those that "
                "it is measured on: it has seen labels that it is measured by"
            )
