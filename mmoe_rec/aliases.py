"""Which version of a registered model holds an alias, and how an alias moves."""

from __future__ import annotations

from dataclasses import dataclass

from mmoe_rec.mlflow_client import BRIEF, calling, connect, limits


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


def holder_of(name: str, alias: str, uri: str) -> Version | None:
    """The version that holds an alias, None where none does. Raises UserError where MLflow does not answer."""
    mlflow = connect(uri)
    with limits(BRIEF), calling(uri):
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
    mlflow = connect(uri)
    with limits(BRIEF), calling(uri):
        mlflow.MlflowClient().set_registered_model_alias(name, alias, number)
