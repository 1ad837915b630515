"""The model registry: find, register, describe and remove versions of models, and move aliases.

Functions with a `tracking_uri` raise UnreachableError if MLflow does not answer, and UserError if MLflow refuses.
"""

import io
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmoe_rec.errors import UserError
from mmoe_rec.inference.artifact import ResolvedModel, read_artifact, read_example
from mmoe_rec.model.model_layout import ModelTask
from mmoe_rec.progress import say
from mmoe_rec.tracking.client import (
    MODEL_TIMEOUTS,
    client_timeouts,
    connect,
    hide_password,
    make_store,
    open_client,
    read_sqlite_path,
    summarize,
    translate_errors,
    truncate_markdown,
)
from mmoe_rec.tracking.runs import Run

if TYPE_CHECKING:
    from mmoe_rec.inference.ranker import Ranker

CHALLENGER_ALIAS = "challenger"  # Alias of a new model that is not better than the champion.
# The tag `replaced.ALIAS` of a version contains the number of the version that had ALIAS before.
_REPLACED_TAG = "replaced"
_MAX_DESCRIPTION_CHARS, _MAX_TAG_CHARS = 4900, 4000  # Databases of MLflow accept 5,000 characters.
_UNUSED_VERSION, _NOT_FOUND = "2147483647", "RESOURCE_DOES_NOT_EXIST"


def load_ranker(model: str | Path, tracking_uri: str | None = None) -> "Ranker":
    """Load a ranker from a folder or from MLflow, and check the files and example predictions of its model.

    Args:
        model: Folder of the model, or a URI that `fetch_model` takes, such as `models:/NAME@ALIAS`.
        tracking_uri: URI of the MLflow server or store. Defaults to the URI set by `mlflow.set_tracking_uri`, or else
            to the default of the setting `tracking.uri`.

    Raises:
        UserError: The URI leads to no model, or the model can't be loaded here.
    """
    from mmoe_rec.inference.ranker import Ranker
    from mmoe_rec.settings.sections import Tracking

    mlflow = sys.modules.get("mlflow")
    configured_uri = mlflow.get_tracking_uri() if mlflow is not None and mlflow.is_tracking_uri_set() else None
    return Ranker.load(fetch_model(str(model), tracking_uri or configured_uri or Tracking().resolved_uri))


# A registered model requires the installed versions of these packages. tzdata is for systems without time zones.
SERVED_PACKAGES = ("mlflow", "numpy", "pandas", "pyarrow", "pydantic", "safetensors", "torch", "tzdata")
# Files and folders of this package that a registered model contains, because scoring imports them.
SERVED_CODE = (
    "__init__.py",
    "errors.py",
    "task_kinds",
    "settings",
    "atomic.py",
    "devices.py",
    "log",
    "point_in_time",
    "features",
    "batches",
    "model",
    "inference",
)


def resolve_model(model_uri: str, tracking_uri: str) -> ResolvedModel:
    """Find and download a model. An alias is looked up only once, so all fields of the result are of one version.

    Args:
        model_uri: Path or URI of the model, as for `fetch_model`.
        tracking_uri: URI of the MLflow server or store.
    """
    pinned = pin_model_uri(model_uri, tracking_uri)
    return ResolvedModel(fetch_model(pinned, tracking_uri), pinned, find_run_id(pinned, tracking_uri))


def fetch_model(model_uri: str, tracking_uri: str) -> Path:
    """Return the artifact folder of a model, downloading it if necessary.

    Args:
        model_uri: Path of the artifact folder or of the MLflow model that contains it. Or a URI: `models:/NAME@ALIAS`,
            `models:/NAME/VERSION`, `models:/NAME/latest`, `models:/m-ID`, `runs:/RUN/PATH`, or a URI of files that
            MLflow can download, such as `mlflow-artifacts:/...`, `file:///...` and `s3://...`.
        tracking_uri: URI of the MLflow server or store.

    Raises:
        UserError: The folder has no model, or MLflow can't find or read the URI.
    """
    if Path(model_uri).exists() or _read_scheme(model_uri) is None:
        folder = _find_artifact(Path(model_uri))
        if folder is None:
            raise UserError(
                f"'{model_uri}' holds no model (model.json). Give an artifact folder or models:/NAME@ALIAS."
            )
        return folder
    _require_store(model_uri, tracking_uri)
    mlflow = connect(tracking_uri)
    with client_timeouts(MODEL_TIMEOUTS), translate_errors(tracking_uri, model_uri, catch_all=True):
        folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=model_uri))
    artifact = _find_artifact(folder)
    if artifact is None:
        raise UserError(f"'{model_uri}' is not a ranking model: it holds no model.json")
    return artifact


def find_run_id(model_uri: str, tracking_uri: str) -> str | None:
    """Return the ID of the run that made a model. None if the run was deleted or is unknown.

    Args:
        model_uri: Path or URI of the model. Only URIs with `models:` lead to a run.
        tracking_uri: URI of the MLflow server or store.
    """
    if _read_scheme(model_uri) != "models":
        return None
    from mlflow.exceptions import MlflowException
    from mlflow.store.artifact.utils.models import get_model_name_and_version

    _require_store(model_uri, tracking_uri)
    with open_client(tracking_uri, model_uri, MODEL_TIMEOUTS) as client:
        name, *version = get_model_name_and_version(client, model_uri)
        record = client.get_model_version(name, *version) if version else client.get_logged_model(name)
        run_id: str | None = record.run_id if version else record.source_run_id
    with open_client(tracking_uri, timeouts=MODEL_TIMEOUTS) as client:
        try:
            return run_id if run_id and client.get_run(run_id).info.lifecycle_stage == "active" else None
        except MlflowException as error:
            if error.error_code == _NOT_FOUND:
                return None
            raise


def pin_model_uri(model_uri: str, tracking_uri: str) -> str:
    """Replace an alias, `latest` or a stage in a `models:` URI by the version number that it stands for now.

    Args:
        model_uri: Path or URI of the model. Any other path or URI is returned as it is.
        tracking_uri: URI of the MLflow server or store.
    """
    if _read_scheme(model_uri) != "models" or Path(model_uri).exists():
        return model_uri
    _require_store(model_uri, tracking_uri)
    with open_client(tracking_uri, model_uri, MODEL_TIMEOUTS) as client:
        from mlflow.store.artifact.utils.models import get_model_name_and_version

        return "/".join(["models:", *map(str, get_model_name_and_version(client, model_uri))])


def _require_store(model_uri: str, tracking_uri: str) -> None:
    """Raise UserError if mlflow isn't installed, or if the SQLite store doesn't exist, which a lookup would create."""
    if find_spec("mlflow") is None:
        raise UserError(f"'{model_uri}' needs mlflow, which is not installed. Install it or give a folder.")
    file = read_sqlite_path(tracking_uri)
    if _read_scheme(model_uri) in ("models", "runs") and file is not None and not file.is_file():
        raise UserError(
            f"there is no MLflow store '{file}' to look up '{model_uri}' in. Train first or set tracking.uri."
        )


def _find_artifact(folder: Path) -> Path | None:
    """Return the folder itself if it is an artifact, or else the artifact in an MLflow model."""
    files = [*folder.glob("model.json"), *sorted(folder.glob("artifacts/*/model.json"))]
    return files[0].parent if files else None


def _read_scheme(model_uri: str) -> str | None:
    """Return the scheme of a URI. None for a path."""
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", model_uri)
    return scheme[1].lower() if scheme else None


@dataclass(frozen=True)
class ModelVersion:
    """A version of a registered model.

    Attributes:
        name: Name of the registered model.
        number: Version number.
        run_id: ID of the run that made the version.
        tags: Tags of the version when it was looked up.
    """

    name: str
    number: str
    run_id: str | None
    tags: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def uri(self) -> str:
        """Permanent URI of the version, without an alias."""
        return f"models:/{self.name}/{self.number}"

    def find_previous_champion(self, alias: str) -> str | None:
        """Return the number of the version that had `alias` directly before this version. None if it is unknown."""
        return self.tags.get(f"{_REPLACED_TAG}.{alias}")


def list_aliases(name: str, tracking_uri: str) -> dict[str, str]:
    """Return the version number of each alias of a registered model, empty if there is no such model.

    Args:
        name: Name of the registered model.
        tracking_uri: URI of the MLflow server or store.
    """
    from mlflow.exceptions import MlflowException

    with open_client(tracking_uri) as client:
        try:
            aliases = client.get_registered_model(name).aliases
        except MlflowException as error:
            if error.error_code == _NOT_FOUND:
                return {}
            raise
    return {str(alias): str(number) for alias, number in aliases.items()}


def find_champion(name: str, alias: str, tracking_uri: str) -> ModelVersion | None:
    """Return the version that has an alias. None if no version has it.

    Args:
        name: Name of the registered model.
        alias: The alias.
        tracking_uri: URI of the MLflow server or store.
    """
    number = list_aliases(name, tracking_uri).get(alias)
    return None if number is None else get_version(name, number, tracking_uri)


def get_version(name: str, number: str, tracking_uri: str) -> ModelVersion:
    """Look up a version by its number.

    Args:
        name: Name of the registered model.
        number: Version number.
        tracking_uri: URI of the MLflow server or store.
    """
    with open_client(tracking_uri, f"models:/{name}/{number}") as client:
        version = client.get_model_version(name, number)
    return ModelVersion(name, str(version.version), version.run_id, version.tags)


def move_alias(name: str, alias: str, number: str, tracking_uri: str, previous: ModelVersion | None = None) -> None:
    """Give an alias to a version.

    Args:
        name: Name of the registered model.
        alias: The alias.
        number: Number of the version.
        tracking_uri: URI of the MLflow server or store.
        previous: Version that had the alias, to record for `ModelVersion.find_previous_champion`. None records nothing.
    """
    with open_client(tracking_uri) as client:
        if previous is not None and previous.number != number:
            client.set_model_version_tag(name, number, f"{_REPLACED_TAG}.{alias}", previous.number)
        client.set_registered_model_alias(name, alias, number)


def clear_previous_champion(version: ModelVersion, alias: str, tracking_uri: str) -> None:
    """Remove the record of the version that had an alias before, so that `find_previous_champion` returns None.

    Args:
        version: Version that has the record.
        alias: The alias.
        tracking_uri: URI of the MLflow server or store.
    """
    with open_client(tracking_uri) as client:
        client.delete_model_version_tag(version.name, version.number, f"{_REPLACED_TAG}.{alias}")


def delete_old_versions(name: str, tag: str, keep: int, tracking_uri: str) -> list[str]:
    """Delete old versions of a model, with their files, and return the numbers of the deleted versions.

    Versions stay if they have an alias or a stage, if they had an alias directly before its current version (so that
    the alias can move back), or if another version uses their files.

    Args:
        name: Name of the registered model.
        tag: Name of a tag. Only versions with this tag are deleted.
        keep: Number of further versions with the tag to keep, newest first.
        tracking_uri: URI of the MLflow server or store.
    """
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    removed = []
    with open_client(tracking_uri, timeouts=MODEL_TIMEOUTS) as client, translate_errors(tracking_uri, catch_all=True):
        versions = sorted(client.search_model_versions(f"name = '{name}'"), key=lambda version: -int(version.version))
        in_use = {*list_aliases(name, tracking_uri).values()}
        staged = {str(version.version) for version in versions if version.current_stage not in (None, "None")}
        champion_tags = [version.tags.items() for version in versions if str(version.version) in in_use]
        in_use |= {number for tags in champion_tags for key, number in tags if key.startswith(f"{_REPLACED_TAG}.")}
        # A copy of a version has the tags of the original but no files, and its source isn't `models:/m-...`.
        candidates = [
            version for version in versions if tag in version.tags and version.source.startswith("models:/m-")
        ]
        for version in [version for version in candidates if str(version.version) not in in_use | staged][keep:]:
            sources = (version.source, f"models:/{name}/{version.version}")
            sharing = [copy for source in sources for copy in client.search_model_versions(f"source_path = '{source}'")]
            if len(sharing) > 1 or client.get_model_version(name, version.version).aliases:
                continue
            logged_model = client.get_logged_model(version.source.removeprefix("models:/"))
            # Delete the files before the version. After an interruption, the next call still finds the version.
            get_artifact_repository(logged_model.artifact_location).delete_artifacts()
            client.delete_model_version(name, version.version)
            client.delete_logged_model(logged_model.model_id)
            removed.append(str(version.version))
    return removed


def describe_version(version: ModelVersion, text: str, tags: Mapping[str, str], tracking_uri: str) -> None:
    """Write the description and tags of a version. Print errors instead of raising them.

    Args:
        version: The version.
        text: Description in Markdown.
        tags: Tags by name.
        tracking_uri: URI of the MLflow server or store.
    """
    text = truncate_markdown(hide_password(text), _MAX_DESCRIPTION_CHARS)
    masked = {name: hide_password(value)[:_MAX_TAG_CHARS] for name, value in tags.items()}
    try:
        tag_version(version, masked, tracking_uri)
        with open_client(tracking_uri) as client:
            if text:
                client.update_model_version(version.name, version.number, text)
    except UserError as error:
        say(f"{error}: {version.uri} is not described in the registry")


def tag_version(version: ModelVersion, tags: Mapping[str, str], tracking_uri: str) -> None:
    """Write tags of a version.

    Args:
        version: The version.
        tags: Tags by name.
        tracking_uri: URI of the MLflow server or store.
    """
    with open_client(tracking_uri) as client:
        for name, value in tags.items():
            client.set_model_version_tag(version.name, version.number, name, value)


def check_registry_names(tracking_uri: str, model: str, alias: str) -> None:
    """Check that the registry would accept a model name and an alias. Create a missing SQLite store.

    Args:
        tracking_uri: URI of the MLflow server or store.
        model: Name of the registered model.
        alias: The alias.

    Raises:
        UserError: The registry would refuse the name or the alias.
    """
    names = f"'tracking.registered_model' (by default the settings' `name`) '{model}' with 'tracking.alias' '{alias}'"
    if not re.fullmatch(r"[^/:?#]+", model) or not alias:
        raise UserError(f"{names}: 'models:/{model}@{alias}' would not be the URI of this model. Rename one.")
    if re.fullmatch(r"latest|v\d+", alias, re.IGNORECASE):
        raise UserError(f"{names}: MLflow reserves this alias. Choose another alias.")
    from mlflow.exceptions import MlflowException

    make_store(tracking_uri)
    with open_client(tracking_uri) as client:
        try:  # MLflow checks both names before it finds that version `_UNUSED_VERSION` doesn't exist.
            client.set_registered_model_alias(model, alias, _UNUSED_VERSION)
        except MlflowException as error:
            if error.error_code == "INVALID_PARAMETER_VALUE":
                raise UserError(f"MLflow refuses {names}: {summarize(error)}") from None
            if error.error_code != _NOT_FOUND:
                raise


def register_model(
    run: Run, artifact_folder: Path, name: str, alias: str | None = None, tags: Mapping[str, str] | None = None
) -> str:
    """Log an artifact folder as the run's model, register the model, and return the number of the new version.

    Args:
        run: A run that is recorded in MLflow, so it has an outbox.
        artifact_folder: Artifact folder of the model.
        name: Name of the registered model.
        alias: Alias for the new version. None sets no alias.
        tags: Tags of the new version.

    Raises:
        UnreachableError: MLflow does not answer.
        UserError: The artifact can't be loaded, the run isn't recorded, or the registry refuses the name or alias.
    """
    if run.outbox is None:
        raise UserError("Models can only be registered from a recorded run.")
    import mlflow
    import torch

    from mmoe_rec.inference.ranker import Ranker

    # Check the model here, because MLflow would register a model even if its example fails.
    Ranker.load(artifact_folder)
    threads = torch.get_num_threads()

    # MLflow prints progress bars and "Successfully registered" to stderr without a logger. Hide them.
    tracking_uri, ignored_output = mlflow.get_tracking_uri(), io.StringIO()
    with (
        client_timeouts(MODEL_TIMEOUTS),
        translate_errors(tracking_uri, catch_all=True),
        redirect_stderr(ignored_output),
        _no_bytecode(),
        tempfile.TemporaryDirectory() as scratch,
    ):
        arguments = build_log_model_args(artifact_folder, Path(scratch))
        logged = mlflow.pyfunc.log_model(name="ranking_model", **arguments)
        torch.set_num_threads(threads)  # MLflow has just run the served model, which sets 1 thread.
        registered = mlflow.register_model(logged.model_uri, name, tags=dict(tags or {}))
        if alias is not None:
            mlflow.MlflowClient().set_registered_model_alias(name, alias, registered.version)
    return str(registered.version)


def build_log_model_args(artifact_folder: Path, scratch: Path) -> dict[str, Any]:
    """Build the arguments of `mlflow.pyfunc.log_model`.

    Args:
        artifact_folder: Artifact folder of the model.
        scratch: Empty folder for a copy of this package's code. Keep it until the model is logged.
    """
    package = Path(__file__).parents[1]

    def leave_out(folder: str, names: list[str]) -> set[str]:
        return {*names} - {*SERVED_CODE} if Path(folder) == package else {"__pycache__"}

    code = shutil.copytree(package, scratch / "mmoe_rec", ignore=leave_out)
    example, info = read_example(artifact_folder), read_artifact(artifact_folder, verify=False)
    return {
        "python_model": str(code / "inference" / "mlflow_model.py"),
        "artifacts": {"model": str(artifact_folder)},
        "code_paths": [str(code)],
        "pip_requirements": [f"{package}=={metadata.version(package).split('+')[0]}" for package in SERVED_PACKAGES],
        "signature": _signature(info.tasks),
        "input_example": ([example], {"task_weights": {task.objective: 1.0 for task in info.tasks}, "top_k": 5}),
        # With uv.lock and pyproject.toml in the working folder, MLflow would build that project instead of installing
        # the requirements. Point it to a folder without these files.
        "uv_project_path": str(scratch),
    }


def _signature(tasks: Sequence[ModelTask]) -> Any:
    """Build MLflow's signature, whose parameters are the options of a request (`request_reader.REQUEST_OPTIONS`).

    Without a signature, MLflow would take the example's parameters as defaults and require all task weights.
    """
    from mlflow.models import ModelSignature
    from mlflow.types.schema import AnyType, DataType, Object, ParamSchema, ParamSpec, Property

    names = dict.fromkeys([*(task.name for task in tasks), *(task.objective for task in tasks)])
    # Accept any weights here. The model checks them and raises shorter errors than MLflow.
    weights = Object([Property(name, AnyType(), required=False) for name in names])
    params = ParamSchema(
        [
            ParamSpec("task_weights", weights, {}),
            ParamSpec("top_k", DataType.long, None),
            ParamSpec("gate_top_k", DataType.long, None),
            ParamSpec("mask_experts", DataType.long, [], shape=(-1,)),
            ParamSpec("explain", DataType.boolean, None),
        ]
    )
    return ModelSignature(params=params)


def find_registered_version(run: Run, name: str) -> str | None:
    """Return the number of the version of a model that a run has already registered. None without such a version.

    Args:
        run: Run that may have registered the model.
        name: Name of the registered model.
    """
    import mlflow

    with open_client(mlflow.get_tracking_uri()) as client:
        versions = client.search_model_versions(f"run_id = '{run.run_id}'")
    return next((str(version.version) for version in versions if version.name == name), None)


@contextmanager
def _no_bytecode() -> Iterator[None]:
    """Turn off Python's bytecode cache within the context, because MLflow would register `__pycache__` too."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before
