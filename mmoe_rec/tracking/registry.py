"""Models by their address: which folder holds the artifact, which run made it, and a ranker from there."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmoe_rec.errors import UserError
from mmoe_rec.tracking.client import FOR_MODELS, calling, connect, limits, sqlite_file

if TYPE_CHECKING:
    from mmoe_rec.inference.loaded import LoadedRanker


class Ranker:
    """Where a model comes from: `Ranker.load(address).rank(user, context, candidates)`.

    A model server, which has a folder, takes `mmoe_rec.inference.ranker`: that needs no MLflow.
    """

    @staticmethod
    def load(address: str | Path, uri: str | None = None) -> LoadedRanker:
        """The model at an address: a folder's path, or an address that MLflow accepts (see `local_model`).

        uri: where MLflow looks the address up; None is what `mlflow.set_tracking_uri` was told, or else what settings
        without `tracking.uri` have. Raises UserError for an address without a model, or one that is damaged or of
        another format.
        """
        from mmoe_rec.inference.ranker import Ranker as OfFolder

        if Path(address).exists() or _scheme(str(address)) is None:
            return OfFolder.load(_artifact_in(Path(address)) or address)
        from mmoe_rec.settings.sections import Tracking

        return OfFolder.load(local_model(str(address), uri or _told() or Tracking().address))


@dataclass(frozen=True)
class FoundModel:
    """The artifact folder of a model, and the run that made it, where that is known and was not deleted.

    address: permanent, unlike one with an alias.
    """

    address: str
    folder: Path
    run_id: str | None


def find_model(address: str, uri: str) -> FoundModel:
    """The model at an address: an artifact folder's path, or an address that MLflow accepts (see `local_model`).

    What moves, such as an alias, is looked up once. Raises UserError for an address without a model.
    """
    pinned = permanent_address(address, uri)
    return FoundModel(pinned, local_model(pinned, uri), run_of(pinned, uri))


def check_address(address: str, uri: str) -> None:
    """Raises UserError for an address of the registry or a folder without a model, at little cost: fetches nothing."""
    if Path(address).exists() or _scheme(address) is None:
        local_model(address, uri)
    permanent_address(address, uri)


def local_model(address: str, uri: str) -> Path:
    """The artifact folder at an address.

    address: a folder's path, of the artifact or of the MLflow model that holds it; `models:/NAME@ALIAS`,
    `models:/NAME/VERSION`, `models:/NAME/latest`, `models:/m-ID`; `runs:/RUN/PATH`; or an address of files that MLflow
    can download, such as `mlflow-artifacts:/...`, `file:///...` and `s3://...`.

    Raises UserError for a folder without a model, or an address that MLflow at `uri` does not know or can't read.
    """
    if Path(address).exists() or _scheme(address) is None:
        found = _artifact_in(Path(address))
        if found is None:
            raise UserError(f"'{address}' holds no model (model.json); give an artifact folder or models:/NAME@ALIAS")
        return found
    mlflow = _registry(address, uri)
    try:
        with limits(FOR_MODELS), calling(uri, address):
            folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=address))
    except UserError:
        raise
    except Exception as error:  # from a storage's client, or because that is not installed
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"'{address}' can't be loaded ({reason})") from None
    found = _artifact_in(folder)
    if found is None:
        raise UserError(f"'{address}' is not a ranking model: it holds no model.json")
    return found


def run_of(address: str, uri: str) -> str | None:
    """The run that made a model of the registry, None for any other address and where it was deleted.

    Raises UserError for an unknown name or alias.
    """
    if _scheme(address) != "models":
        return None
    mlflow = _registry(address, uri)
    with limits(FOR_MODELS), calling(uri, address):
        name, version, _ = _resolved(mlflow, address)
        client = mlflow.MlflowClient()
        run_id: str | None = (
            client.get_logged_model(name).source_run_id
            if version is None
            else client.get_model_version(name, version).run_id
        )
    return run_id if run_id and _is_there(mlflow, uri, run_id) else None


def permanent_address(address: str, uri: str) -> str:
    """An address of the registry that does not move, any other one as it is: fetches nothing.

    Raises UserError for an unknown name or alias.
    """
    if _scheme(address) != "models" or Path(address).exists():
        return address
    mlflow = _registry(address, uri)
    with limits(FOR_MODELS), calling(uri, address):
        return "/".join(["models:", *filter(None, _resolved(mlflow, address))])


def _resolved(mlflow: Any, address: str) -> tuple[str, str | None, str]:
    """Name and version of a registered model, or the id of a model and None; and a path in it, which may be empty."""
    from mlflow.store.artifact.models_artifact_repo import ModelsArtifactRepository
    from mlflow.store.artifact.utils.models import get_model_name_and_version

    model, path = ModelsArtifactRepository.split_models_uri(address)
    name, *version = get_model_name_and_version(mlflow.MlflowClient(), model)
    return name, str(version[0]) if version else None, path


def _registry(address: str, uri: str) -> Any:
    store = sqlite_file(uri)
    if _scheme(address) in ("models", "runs") and store is not None and not store.is_file():
        raise UserError(
            f"there is no MLflow store '{store}' to look up '{address}' in; train first or set tracking.uri"
        )
    try:
        return connect(uri)
    except ModuleNotFoundError as error:
        if error.name != "mlflow":
            raise
        raise UserError(
            f"'{address}' is looked up by mlflow, which is not installed: install it, or give an artifact folder"
        ) from None


def _told() -> str | None:
    """The address that this process has set MLflow to."""
    mlflow = sys.modules.get("mlflow")
    return mlflow.get_tracking_uri() if mlflow is not None and mlflow.is_tracking_uri_set() else None


def _is_there(mlflow: Any, uri: str, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    with limits(FOR_MODELS), calling(uri):
        try:
            return bool(mlflow.get_run(run_id).info.lifecycle_stage == "active")
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise


def _artifact_in(folder: Path) -> Path | None:
    """The folder itself if it is an artifact, or the one in the MLflow model that it holds."""
    found = [*folder.glob("model.json"), *sorted(folder.glob("artifacts/*/model.json"))]
    return found[0].parent if found else None


def _scheme(address: str) -> str | None:
    """What stands before the colon of an address, None for a path."""
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", address)
    return found[1].lower() if found else None
