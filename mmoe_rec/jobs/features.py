"""The features of a log."""

from __future__ import annotations

from mmoe_rec.jobs.places import log_and_place
from mmoe_rec.preprocessing.added.extend import Extended, extend
from mmoe_rec.preprocessing.prepare import Prepared, prepare
from mmoe_rec.settings.sections import Settings


def build_features(settings: Settings) -> Prepared:
    """Fitted features and encoded rows; existing ones are taken if they are still right."""
    return prepare(*log_and_place(settings))


def extend_features(settings: Settings) -> Extended | None:
    """Adds new files of the log to existing features; None where there are no new files."""
    return extend(*log_and_place(settings))
