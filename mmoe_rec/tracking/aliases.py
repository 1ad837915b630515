"""Which version of a registered model holds an alias, and how an alias moves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mmoe_rec.errors import UserError
from mmoe_rec.progress import say
from mmoe_rec.tracking.client import BRIEF, calling, connect, limits
from mmoe_rec.tracking.recording import shortened

_REPLACED = "replaced"  # tag of a version: which one held an alias before it
_LONGEST_DESCRIPTION, _LONGEST_TAG = 4900, 4000  # what databases behind MLflow take is 5,000


@dataclass(frozen=True)
class Version:
    """A version of a registered model. run_id: of the run that made it."""

    name: str
    number: str
    run_id: str | None

    @property
    def address(self) -> str:
        """Its permanent address, unlike one with an alias."""
        return f"models:/{self.name}/{self.number}"


def aliases_of(name: str, uri: str) -> dict[str, str]:
    """Alias -> number of the version that holds it, of a registered model; none where there is no such model.

    Raises UserError where MLflow does not answer.
    """
    mlflow = connect(uri)
    with limits(BRIEF), calling(uri):
        try:
            found = mlflow.MlflowClient().get_registered_model(name).aliases
        except Exception as error:
            if getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST":
                return {}
            raise
    return {str(alias): str(number) for alias, number in found.items()}


def holder_of(name: str, alias: str, uri: str) -> Version | None:
    """The version that holds an alias, None where none does. Raises UserError where MLflow does not answer."""
    number = aliases_of(name, uri).get(alias)
    return None if number is None else version_of(name, number, uri)


def version_of(name: str, number: str, uri: str) -> Version:
    """A version by its number. Raises UserError where there is none, or MLflow does not answer."""
    mlflow = connect(uri)
    with limits(BRIEF), calling(uri, f"models:/{name}/{number}"):
        found = mlflow.MlflowClient().get_model_version(name, number)
    return Version(name, str(found.version), found.run_id)


def point(name: str, alias: str, number: str, uri: str, replaced: Version | None = None) -> None:
    """Makes a version the one that holds an alias. Raises UserError where the registry refuses.

    replaced: the one that held it, which is kept with the version, see `replaced_by`.
    """
    mlflow = connect(uri)
    with limits(BRIEF), calling(uri):
        client = mlflow.MlflowClient()
        if replaced is not None and replaced.number != number:
            client.set_model_version_tag(name, number, f"{_REPLACED}.{alias}", replaced.number)
        client.set_registered_model_alias(name, alias, number)


def replaced_by(version: Version, alias: str, uri: str) -> str | None:
    """The number of the version that held an alias before this one took it; None where that is unknown."""
    mlflow = connect(uri)
    with limits(BRIEF), calling(uri):
        tags = mlflow.MlflowClient().get_model_version(version.name, version.number).tags
    found = tags.get(f"{_REPLACED}.{alias}")
    return None if found is None else str(found)


def forget_replaced(version: Version, alias: str, uri: str) -> None:
    """Of a version that an alias has left for the one before: if it comes back, it comes in another way."""
    mlflow = connect(uri)
    with limits(BRIEF), calling(uri):
        mlflow.MlflowClient().delete_model_version_tag(version.name, version.number, f"{_REPLACED}.{alias}")


def describe(version: Version, text: str, tags: Mapping[str, str], uri: str) -> None:
    """Writes the description of a version, in Markdown, and tags. What the registry refuses is said, and not needed."""
    mlflow = connect(uri)
    try:
        with limits(BRIEF), calling(uri):
            client = mlflow.MlflowClient()
            for name, value in tags.items():
                client.set_model_version_tag(version.name, version.number, name, value[:_LONGEST_TAG])
            if text:
                client.update_model_version(version.name, version.number, shortened(text, _LONGEST_DESCRIPTION))
    except UserError as error:
        say(f"{error}: {version.address} is not described in the registry")


def tag(version: Version, tags: Mapping[str, str], uri: str) -> None:
    """Writes tags of a version. Raises UserError where the registry refuses."""
    mlflow = connect(uri)
    with limits(BRIEF), calling(uri):
        for name, value in tags.items():
            mlflow.MlflowClient().set_model_version_tag(version.name, version.number, name, value)
