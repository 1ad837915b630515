"""What the model registry of MLflow says of a model's versions, and which of them holds an alias."""

from __future__ import annotations

from dataclasses import dataclass

from mmoe_rec.tracking import _calling, _connect


@dataclass(frozen=True)
class Version:
    """A version of a registered model. run_id: that made it."""

    name: str
    number: str
    run_id: str | None

    @property
    def address(self) -> str:
        """Which stands for it for good, unlike an alias."""
        return f"models:/{self.name}/{self.number}"


def version_at(address: str, uri: str) -> Version | None:
    """The version that `models:/NAME@ALIAS`, `models:/NAME/VERSION` or `.../latest` stands for; None for any other.

    Raises UserError for an unknown name or alias.
    """
    name, at, alias = address.removeprefix("models:/").partition("@")
    model, slash, number = name.partition("/")
    if not address.startswith("models:/") or not (at or slash):
        return None
    mlflow = _connect(uri)
    with _calling(uri, address):
        client = mlflow.MlflowClient()
        if at:
            found = client.get_model_version_by_alias(name, alias)
        elif number == "latest":
            versions = client.search_model_versions(f"name='{model}'", order_by=["version_number DESC"], max_results=1)
            found = versions[0] if versions else client.get_model_version(model, "1")  # which says what is missing
        else:
            found = client.get_model_version(model, number)
    return Version(found.name, str(found.version), found.run_id)


def holder_of(name: str, alias: str, uri: str) -> Version | None:
    """The version that holds an alias, None where none does. Raises UserError where MLflow does not answer."""
    mlflow = _connect(uri)
    with _calling(uri):
        client = mlflow.MlflowClient()
        try:
            number = client.get_registered_model(name).aliases.get(alias)
        except Exception as error:
            if getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        if number is None:
            return None
        found = client.get_model_version(name, str(number))
    return Version(name, str(number), found.run_id)


def point(name: str, alias: str, number: str, uri: str) -> None:
    """Makes a version the one that holds an alias. Raises UserError where the registry refuses."""
    mlflow = _connect(uri)
    with _calling(uri):
        mlflow.MlflowClient().set_registered_model_alias(name, alias, number)
