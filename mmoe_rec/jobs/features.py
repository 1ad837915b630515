"""The features of a log."""

from __future__ import annotations

from mmoe_rec.build.extend import Extended, extend
from mmoe_rec.build.prepare import Prepared, prepare
from mmoe_rec.jobs.places import log_and_place
from mmoe_rec.settings import Settings


def build_features(settings: Settings) -> Prepared:
    """Fitted features and encoded rows; what is there already is taken if it is still right."""
    return prepare(*log_and_place(settings))


def extend_features(settings: Settings) -> Extended | None:
    """Adds new files of the log to the features at hand; None where there are none."""
    return extend(*log_and_place(settings))
