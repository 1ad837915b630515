"""What a training was begun with: its settings, features and start, by which a command recognises it."""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from mmoe_rec.errors import UserError
from mmoe_rec.settings.log_columns import SPLITS
from mmoe_rec.settings.sections import Settings, differences
from mmoe_rec.settings.training import SPLIT_COLUMNS

# Where and how safely a training runs, and what is done after it, not what comes of its steps.
_FREE = {
    "calibration",
    "checkpoint_steps",
    "checkpoints_kept",
    "device",
    "products",
    "tables",
    "threads",
    "timeout_minutes",
}


@dataclass(frozen=True)
class Start:
    """The model that a training started from.

    address: as it was given; exact: a lasting address of the same model, where that is an alias; weights: their
    checksum; run: that made them.
    """

    address: str
    exact: str
    weights: str
    run: str | None = None

    @property
    def moves(self) -> bool:
        """Whether the address may stand for another model by now, not least for the one that the training gave."""
        return self.address.startswith("models:/") and ("@" in self.address or self.address.endswith("/latest"))

    def __str__(self) -> str:
        return self.address if self.exact == self.address else f"{self.address} ({self.exact})"


@dataclass(frozen=True)
class Origin:
    """What a training was begun with.

    settings: as `fixed_settings` gives them; features: fingerprint of the fitted ones; until: microseconds of the last
    request that they know; run_id: the MLflow run; start: None where the first weights were random.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    features: str = ""
    until: int = 0
    run_id: str | None = None
    start: Start | None = None

    def difference(self, now: Self) -> str | None:
        """What is different now, as the end of a sentence on the training; None where all is the same."""
        for where, before, found in differences(self.settings, now.settings):
            return f"it was begun with {where} {before}, now it is {found}; set it back"
        if self.features != now.features:
            return "its features are not those of this log, these features and this split; bring those back"
        one, other = self.start, now.start
        if one is None:
            return None if other is None else f"it was begun without --from, now it is --from {other}; leave that out"
        if other is None:
            return f"it was begun with --from {one}, now there is none; give --from {one.address}"
        if one.weights != other.weights:
            return f"it was begun with --from {one}, now it is --from {other}; give --from {one.exact}"
        return None

    def check(self, now: Self, folder: Path) -> None:
        """Raises UserError where anything differs from the checkpoint in a folder."""
        if (found := self.difference(now)) is not None:
            raise UserError(
                f"the training of '{folder}' can't go on: {found}, or train from the start, without --resume"
            )


def fixed_settings(settings: Settings) -> dict[str, Any]:
    """The settings on which a training's result depends."""
    sections = {"columns", "roles", "tasks", "features", "model", "training"}
    tree = settings.model_dump(mode="json", include=sections)
    split: dict[str, Any] = {}
    for name, each in settings.split:
        if isinstance(each, datetime):
            split[name] = each.astimezone(UTC).isoformat()
        elif name not in ("column", *SPLITS):
            split[name] = each
        elif settings.split.column is not None:  # without one its values say nothing
            split[name] = list(each) if isinstance(each, tuple) else each
    events = {name: each.model_dump(mode="json") for name, each in settings.data.events.items()}
    training = {name: value for name, value in tree["training"].items() if name not in _FREE}
    if settings.training.sharding not in SPLIT_COLUMNS:  # others change no result
        training = {name: value for name, value in training.items() if name not in ("sharding", "shard_columns")}
    return {**tree, "training": training, "split": split, "data": {"events": events}}


def result_settings(settings: Settings) -> dict[str, Any]:
    """These, and the settings of what is made of a training's result."""
    tree = fixed_settings(settings)
    tree["training"]["calibration"] = settings.training.calibration
    tree |= settings.model_dump(mode="json", include={"name", "serving", "tracking"})
    del tree["tracking"]["system_metrics"]  # no result
    return tree
