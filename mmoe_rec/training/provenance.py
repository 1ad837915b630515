"""Provenance of a training run: its settings, features and starting model."""

from dataclasses import dataclass, field
from typing import Any

from mmoe_rec.settings.sections import Settings, diff_settings

# Settings in the section `training` that may change when a run is resumed, because they don't affect the weights.
_IGNORED = {
    "checkpoint_steps",
    "keep_checkpoints",
    "device",
    "threads",
    "timeout_minutes",
}


@dataclass(frozen=True)
class WarmStartSource:
    """The model that a run started from.

    Attributes:
        uri: URI as given, possibly with an alias.
        pinned_uri: URI with the version number instead of an alias, which always names the same model.
        weights_checksum: Checksum of the model's weights.
        run_id: ID of the MLflow run that trained the model, None if it is unknown.
    """

    uri: str
    pinned_uri: str
    weights_checksum: str
    run_id: str | None = None


@dataclass(frozen=True)
class Provenance:
    """Settings, features and starting model of a run.

    Attributes:
        settings: Settings that determine the weights, from `fixed_settings`.
        features: Fingerprint of the features, which changes with their settings, their log or the split.
        last_request_us: Time of the last request in the features, in microseconds since 1970.
        run_id: ID of the MLflow run, if any.
        start: Model that the run started from, None for random weights.
        artifact_settings: Settings that affect only the finished model, from `artifact_settings`.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    features: str = ""
    last_request_us: int = 0
    run_id: str | None = None
    start: WarmStartSource | None = None
    artifact_settings: dict[str, Any] = field(default_factory=dict)

    def describe_mismatch(self, settings: dict[str, Any], features: str, uri: str | None) -> str | None:
        """Describe how this run differs from a run with the given settings, features and starting model.

        Args:
            settings: Settings of the other run, from `fixed_settings`.
            features: Fingerprint of the other run's features.
            uri: URI of the model that the other run starts from, None for random weights.

        Returns:
            The first difference and how to undo it, as the end of an error message. None if nothing differs.
        """
        for name, old, new in diff_settings(self.settings, settings):
            return f"it was started with {name} {old}, and now it is {new}. Restore the setting"
        if self.features != features:
            return "the log, the feature settings or the split have changed. Restore them"
        start = None if self.start is None else self.start.uri
        if uri not in (start, self.start and self.start.pinned_uri):
            old, new = (f"--from {model}" if model else "no --from" for model in (start, uri))
            return f"it was started with {old}, and now it is {new}. Restore the option"
        return None


def fixed_settings(settings: Settings) -> dict[str, Any]:
    """Return the settings that determine the weights of a run."""
    sections = {"columns", "roles", "tasks", "features", "model", "training", "split"}
    tree = settings.model_dump(mode="json", include=sections)
    events = {name: source.model_dump(mode="json") for name, source in settings.data.events.items()}
    training = {name: value for name, value in tree["training"].items() if name not in _IGNORED}
    return {**tree, "training": training, "data": {"events": events}}


def artifact_settings(settings: Settings) -> dict[str, Any]:
    """Return the settings that affect the finished model but not its weights: name, serving and registration."""
    tracking = {"registered_model": settings.registered_model, "alias": settings.tracking.alias}
    return {"name": settings.name, "serving": settings.serving.model_dump(mode="json"), "tracking": tracking}
