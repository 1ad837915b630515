"""What a training was begun with: its settings, features and start, by which a command recognises it."""

from dataclasses import dataclass, field
from typing import Any

from mmoe_rec.settings.sections import Settings, diff_settings

# Where and how safely a training runs, and what is done after it, not what comes of its steps.
_FREE = {
    "checkpoint_steps",
    "keep_checkpoints",
    "device",
    "threads",
    "timeout_minutes",
}


@dataclass(frozen=True)
class WarmStartSource:
    """The model that a training started from.

    uri: as it was given; exact: a lasting address of the same model, where that is an alias; weights: their
    checksum; run: that made them.
    """

    uri: str
    pinned_uri: str
    weights_checksum: str
    run_id: str | None = None


@dataclass(frozen=True)
class Provenance:
    """What a training was begun with.

    settings: as `fixed_settings` gives them; result: as `artifact_settings` does; features: fingerprint of the fitted
    ones; until: microseconds of the last request that they know; run_id: the MLflow run; start: None where the first
    weights were random.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    features: str = ""
    last_request_us: int = 0
    run_id: str | None = None
    start: WarmStartSource | None = None
    artifact_settings: dict[str, Any] = field(default_factory=dict)

    def describe_mismatch(self, settings: dict[str, Any], features: str, uri: str | None) -> str | None:
        """Return what differs from a training of these settings, features and start, as the end of a sentence.

        Args:
            settings: As `fixed_settings` gives them.
            features: Fingerprint of the features.
            uri: Address of the model to start from.
        """
        for where, before, found in diff_settings(self.settings, settings):
            return f"it was begun with {where} {before}, now it is {found}; set it back"
        if self.features != features:
            return "its features are not those of this log, these features and this split; bring those back"
        begun = None if self.start is None else self.start.uri
        if uri not in (begun, self.start and self.start.pinned_uri):
            given, now = (f"--from {each}" if each else "no --from" for each in (begun, uri))
            return f"it was begun with {given}, now it is {now}"
        return None


def fixed_settings(settings: Settings) -> dict[str, Any]:
    """The settings on which a training's result depends."""
    sections = {"columns", "roles", "tasks", "features", "model", "training", "split"}
    tree = settings.model_dump(mode="json", include=sections)
    events = {name: each.model_dump(mode="json") for name, each in settings.data.events.items()}
    training = {name: value for name, value in tree["training"].items() if name not in _FREE}
    return {**tree, "training": training, "data": {"events": events}}


def artifact_settings(settings: Settings) -> dict[str, Any]:
    """The settings on which only the finished model depends: how it is called, served and registered."""
    tracking = {"registered_model": settings.registered_model, "alias": settings.tracking.alias}
    return {"name": settings.name, "serving": settings.serving.model_dump(mode="json"), "tracking": tracking}
