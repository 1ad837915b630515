"""The model registry: models by their address, versions and aliases, and how a model gets there."""

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

CHALLENGER_ALIAS = "challenger"  # alias of a model that is no better than the one that holds the alias
_REPLACED_TAG = "replaced"  # of a version: which one held an alias before it
_LONGEST_DESCRIPTION, _LONGEST_TAG = 4900, 4000  # what databases behind MLflow take is 5,000
_NO_VERSION, _MISSING = "2147483647", "RESOURCE_DOES_NOT_EXIST"


def load_ranker(model: str | Path, tracking_uri: str | None = None) -> "Ranker":
    """Load the ranker of a model, wherever the model is.

    Args:
        model: The model's folder, or a URI that `fetch_model` takes, such as `models:/NAME@ALIAS`.
        tracking_uri: URI of the MLflow server or store. By default the URI that `mlflow.set_tracking_uri` was given,
            or else the default of the setting `tracking.uri`.

    Returns:
        The ranker. Loading has checked that its files and its predictions are those that were written.

    Raises:
        UserError: The URI leads to no model, or the model can't be loaded here.
    """
    from mmoe_rec.inference.ranker import Ranker
    from mmoe_rec.settings.sections import Tracking

    mlflow = sys.modules.get("mlflow")
    own = mlflow.get_tracking_uri() if mlflow is not None and mlflow.is_tracking_uri_set() else None
    return Ranker.load(fetch_model(str(model), tracking_uri or own or Tracking().resolved_uri))


# The packages whose installed versions the served model asks for; scoring needs neither torchrec nor fbgemm. tzdata is
# for images and systems without time zones of their own.
SERVED_PACKAGES = ("mlflow", "numpy", "pandas", "pyarrow", "pydantic", "safetensors", "torch", "tzdata")
# The parts of this package that scoring imports.
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
    """The model at an address: an artifact folder's path, or an address that MLflow accepts (see `fetch_model`).

    What moves, such as an alias, is looked up once. Raises UserError for an address without a model.
    """
    pinned = pin_model_uri(model_uri, tracking_uri)
    return ResolvedModel(fetch_model(pinned, tracking_uri), pinned, find_run_id(pinned, tracking_uri))


def fetch_model(model_uri: str, tracking_uri: str) -> Path:
    """The artifact folder at an address.

    model_uri: a folder's path, of the artifact or of the MLflow model that holds it; `models:/NAME@ALIAS`,
    `models:/NAME/VERSION`, `models:/NAME/latest`, `models:/m-ID`; `runs:/RUN/PATH`; or an address of files that MLflow
    can download, such as `mlflow-artifacts:/...`, `file:///...` and `s3://...`.

    Raises UserError for a folder without a model, or an address that MLflow at `tracking_uri` does not know or can't
    read.
    """
    if Path(model_uri).exists() or _read_scheme(model_uri) is None:
        folder = _find_artifact(Path(model_uri))
        if folder is None:
            raise UserError(f"'{model_uri}' holds no model (model.json); give an artifact folder or models:/NAME@ALIAS")
        return folder
    artifact = _find_artifact(_download(model_uri, tracking_uri))
    if artifact is None:
        raise UserError(f"'{model_uri}' is not a ranking model: it holds no model.json")
    return artifact


def _download(model_uri: str, tracking_uri: str) -> Path:
    """The files at an address. MLflow copies nothing that lies on this machine."""
    _require_store(model_uri, tracking_uri)
    mlflow = connect(tracking_uri)
    with client_timeouts(MODEL_TIMEOUTS), translate_errors(tracking_uri, model_uri, catch_all=True):
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=model_uri))


def find_run_id(model_uri: str, tracking_uri: str) -> str | None:
    """The run that made a model of the registry, None for any other address and where it was deleted.

    Raises UserError for an unknown name or alias.
    """
    if _read_scheme(model_uri) != "models":
        return None
    from mlflow.exceptions import MlflowException
    from mlflow.store.artifact.utils.models import get_model_name_and_version

    _require_store(model_uri, tracking_uri)
    with open_client(tracking_uri, model_uri, MODEL_TIMEOUTS) as client:
        name, *version = get_model_name_and_version(client, model_uri)
        made = client.get_model_version(name, *version) if version else client.get_logged_model(name)
        run_id: str | None = made.run_id if version else made.source_run_id
    with open_client(tracking_uri, timeouts=MODEL_TIMEOUTS) as client:
        try:
            return run_id if run_id and client.get_run(run_id).info.lifecycle_stage == "active" else None
        except MlflowException as error:
            if error.error_code == _MISSING:
                return None
            raise


def pin_model_uri(model_uri: str, tracking_uri: str) -> str:
    """An address of the registry that does not move, any other one as it is: fetches nothing.

    Raises UserError for an unknown name or alias.
    """
    if _read_scheme(model_uri) != "models" or Path(model_uri).exists():
        return model_uri
    _require_store(model_uri, tracking_uri)
    with open_client(tracking_uri, model_uri, MODEL_TIMEOUTS) as client:
        from mlflow.store.artifact.utils.models import get_model_name_and_version

        return "/".join(["models:", *map(str, get_model_name_and_version(client, model_uri))])


def _require_store(model_uri: str, tracking_uri: str) -> None:
    """Raises UserError where mlflow is not installed, or there is no store yet: looking up would make one."""
    if find_spec("mlflow") is None:
        raise UserError(f"'{model_uri}' is looked up by mlflow, which is not installed: install it, or give a folder")
    file = read_sqlite_path(tracking_uri)
    if _read_scheme(model_uri) in ("models", "runs") and file is not None and not file.is_file():
        raise UserError(
            f"there is no MLflow store '{file}' to look up '{model_uri}' in; train first or set tracking.uri"
        )


def _find_artifact(folder: Path) -> Path | None:
    """The folder itself if it is an artifact, or the one in the MLflow model that it holds."""
    files = [*folder.glob("model.json"), *sorted(folder.glob("artifacts/*/model.json"))]
    return files[0].parent if files else None


def _read_scheme(model_uri: str) -> str | None:
    """What stands before the colon of an address, None for a path."""
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", model_uri)
    return scheme[1].lower() if scheme else None


@dataclass(frozen=True)
class ModelVersion:
    """A version of a registered model. run_id: of the run that made it; tags: what it had when it was looked up."""

    name: str
    number: str
    run_id: str | None
    tags: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def uri(self) -> str:
        """Its permanent address, unlike one with an alias."""
        return f"models:/{self.name}/{self.number}"

    def find_previous_champion(self, alias: str) -> str | None:
        """The number of the version that held an alias before this one took it; None where that is unknown."""
        return self.tags.get(f"{_REPLACED_TAG}.{alias}")


def list_aliases(name: str, tracking_uri: str) -> dict[str, str]:
    """Alias -> number of the version that holds it, of a registered model; none where there is no such model.

    Raises UserError where MLflow does not answer, as all that follow do.
    """
    from mlflow.exceptions import MlflowException

    with open_client(tracking_uri) as client:
        try:
            aliases = client.get_registered_model(name).aliases
        except MlflowException as error:
            if error.error_code == _MISSING:
                return {}
            raise
    return {str(alias): str(number) for alias, number in aliases.items()}


def find_champion(name: str, alias: str, tracking_uri: str) -> ModelVersion | None:
    """The version that holds an alias, None where none does."""
    number = list_aliases(name, tracking_uri).get(alias)
    return None if number is None else get_version(name, number, tracking_uri)


def get_version(name: str, number: str, tracking_uri: str) -> ModelVersion:
    """A version by its number. Raises UserError where there is none."""
    with open_client(tracking_uri, f"models:/{name}/{number}") as client:
        found = client.get_model_version(name, number)
    return ModelVersion(name, str(found.version), found.run_id, found.tags)


def move_alias(name: str, alias: str, number: str, tracking_uri: str, previous: ModelVersion | None = None) -> None:
    """Makes a version the one that holds an alias. Raises UserError where the registry refuses.

    previous: the one that held it, which is kept with the version (`ModelVersion.find_previous_champion`).
    """
    with open_client(tracking_uri) as client:
        if previous is not None and previous.number != number:
            client.set_model_version_tag(name, number, f"{_REPLACED_TAG}.{alias}", previous.number)
        client.set_registered_model_alias(name, alias, number)


def clear_previous_champion(version: ModelVersion, alias: str, tracking_uri: str) -> None:
    """Removes a version's note of the one that it replaced at an alias; it may get that again from another one."""
    with open_client(tracking_uri) as client:
        client.delete_model_version_tag(version.name, version.number, f"{_REPLACED_TAG}.{alias}")


def delete_old_versions(name: str, tag: str, keep: int, tracking_uri: str) -> list[str]:
    """Removes versions of a model that have a tag, with their files, but for the newest `keep`; gives their numbers.

    Those stay that hold an alias or have a stage, that a holder has replaced, and that others are copies of. Raises
    UserError where MLflow refuses. Files go first, so a version of which they are gone is removed by the next call.
    """
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    removed = []
    with open_client(tracking_uri, timeouts=MODEL_TIMEOUTS) as client, translate_errors(tracking_uri, catch_all=True):
        versions = sorted(client.search_model_versions(f"name = '{name}'"), key=lambda each: -int(each.version))
        held = {*list_aliases(name, tracking_uri).values()}
        staged = {str(each.version) for each in versions if each.current_stage not in (None, "None")}
        of_holders = [each.tags.items() for each in versions if str(each.version) in held]
        held |= {number for tags in of_holders for key, number in tags if key.startswith(f"{_REPLACED_TAG}.")}
        # A copy of a version has its tags, and another's files.
        made = [each for each in versions if tag in each.tags and each.source.startswith("models:/m-")]
        for each in [each for each in made if str(each.version) not in held | staged][keep:]:
            sources = (each.source, f"models:/{name}/{each.version}")
            users = [one for source in sources for one in client.search_model_versions(f"source_path = '{source}'")]
            if len(users) > 1 or client.get_model_version(name, each.version).aliases:
                continue
            logged = client.get_logged_model(each.source.removeprefix("models:/"))
            get_artifact_repository(logged.artifact_location).delete_artifacts()
            client.delete_model_version(name, each.version)
            client.delete_logged_model(logged.model_id)
            removed.append(str(each.version))
    return removed


def describe_version(version: ModelVersion, text: str, tags: Mapping[str, str], tracking_uri: str) -> None:
    """Writes the description of a version, in Markdown, and tags. What the registry refuses is said, and not needed."""
    text = truncate_markdown(hide_password(text), _LONGEST_DESCRIPTION)
    try:
        tag_version(version, {name: hide_password(value)[:_LONGEST_TAG] for name, value in tags.items()}, tracking_uri)
        with open_client(tracking_uri) as client:
            if text:
                client.update_model_version(version.name, version.number, text)
    except UserError as error:
        say(f"{error}: {version.uri} is not described in the registry")


def tag_version(version: ModelVersion, tags: Mapping[str, str], tracking_uri: str) -> None:
    """Writes tags of a version. Raises UserError where the registry refuses."""
    with open_client(tracking_uri) as client:
        for name, value in tags.items():
            client.set_model_version_tag(version.name, version.number, name, value)


def check_registry_names(tracking_uri: str, model: str, alias: str) -> None:
    """Raises UserError where the registry would refuse to register a model under a name and an alias, by asking it."""
    given = f"'tracking.registered_model' (by default the settings' `name`) '{model}' with 'tracking.alias' '{alias}'"
    if not re.fullmatch(r"[^/:?#]+", model) or not alias:
        raise UserError(f"{given}: 'models:/{model}@{alias}' would not be the address of this model; rename one")
    if re.fullmatch(r"latest|v\d+", alias, re.IGNORECASE):
        raise UserError(f"{given}: MLflow keeps this alias for itself; choose another one")
    from mlflow.exceptions import MlflowException

    make_store(tracking_uri)
    with open_client(tracking_uri) as client:
        try:  # a version that nobody has: names are looked at first
            client.set_registered_model_alias(model, alias, _NO_VERSION)
        except MlflowException as error:
            if error.error_code == "INVALID_PARAMETER_VALUE":
                raise UserError(f"MLflow refuses {given}: {summarize(error)}") from None
            if error.error_code != _MISSING:
                raise


def register_model(
    run: Run, artifact_folder: Path, name: str, alias: str | None = None, tags: Mapping[str, str] | None = None
) -> str:
    """Logs an artifact folder as the run's model, registers it and points an alias at it; gives the new version.

    tags: of the version. Raises UnreachableError where MLflow does not answer, and UserError where the
    artifact can't be loaded, the run records nothing, or the registry refuses name or alias.
    """
    if run.outbox is None:
        raise UserError("a model can be registered from a recorded run only")
    import mlflow
    import torch

    from mmoe_rec.inference.ranker import Ranker

    # MLflow runs the example too, but registers even a model that fails it.
    Ranker.load(artifact_folder)
    threads = torch.get_num_threads()

    # Progress bars of local copies and "Successfully registered" come from no logger.
    tracking_uri, unread = mlflow.get_tracking_uri(), io.StringIO()
    with (
        client_timeouts(MODEL_TIMEOUTS),
        translate_errors(tracking_uri, catch_all=True),
        redirect_stderr(unread),
        _no_bytecode(),
        tempfile.TemporaryDirectory() as scratch,
    ):
        arguments = build_log_model_args(artifact_folder, Path(scratch))
        logged = mlflow.pyfunc.log_model(name="ranking_model", **arguments)
        torch.set_num_threads(threads)  # the served model, which MLflow has just tried out, sets it for its server
        registered = mlflow.register_model(logged.model_uri, name, tags=dict(tags or {}))
        if alias is not None:
            mlflow.MlflowClient().set_registered_model_alias(name, alias, registered.version)
    return str(registered.version)


def build_log_model_args(artifact_folder: Path, scratch: Path) -> dict[str, Any]:
    """Arguments of `mlflow.pyfunc.log_model`. scratch: an empty folder that lives until the model is logged."""
    package = Path(__file__).parents[1]

    def leave_out(folder: str, names: list[str]) -> set[str]:
        return {*names} - {*SERVED_CODE} if Path(folder) == package else {"__pycache__"}

    code = shutil.copytree(package, scratch / "mmoe_rec", ignore=leave_out)
    example, about = read_example(artifact_folder), read_artifact(artifact_folder, verify=False)
    return {
        "python_model": str(code / "inference" / "mlflow_model.py"),
        "artifacts": {"model": str(artifact_folder)},
        "code_paths": [str(code)],
        "pip_requirements": [f"{package}=={metadata.version(package).split('+')[0]}" for package in SERVED_PACKAGES],
        "signature": _signature(about.tasks),
        "input_example": ([example], {"task_weights": {task.objective: 1.0 for task in about.tasks}, "top_k": 5}),
        # MLflow takes a uv.lock and pyproject.toml of the working folder for the model's, and then builds that project
        # instead of installing the requirements. It is told to look for them where none are.
        "uv_project_path": str(scratch),
    }


def _signature(tasks: Sequence[ModelTask]) -> Any:
    """The signature: the optional parameters of `mmoe_rec.inference.request_reader.OPTIONS`, and inputs of any kind.

    MLflow derives parameters from the example: its values become everyone's defaults, and every weight in it required.
    """
    from mlflow.models import ModelSignature
    from mlflow.types.schema import AnyType, DataType, Object, ParamSchema, ParamSpec, Property

    names = dict.fromkeys([*(task.name for task in tasks), *(task.objective for task in tasks)])
    # The model checks the weights itself: its errors are one sentence, MLflow's repeat the schema.
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
    """The version as which a run has registered its model already; None where it has not."""
    import mlflow

    with open_client(mlflow.get_tracking_uri()) as client:
        versions = client.search_model_versions(f"run_id = '{run.run_id}'")
    return next((str(each.version) for each in versions if each.name == name), None)


@contextmanager
def _no_bytecode() -> Iterator[None]:
    """MLflow tries a model out where it lies, which would leave compiled files of this Python in it."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before
