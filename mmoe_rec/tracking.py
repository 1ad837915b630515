"""Runs, metrics and the model registry: the only place of training and evaluation that talks to MLflow.

With a SQLite address, such as `sqlite:///mlflow.db`, everything lies beside the database file: runs, metrics and the
registry in the file itself, files of runs and models in `mlartifacts/` in the same folder (MLflow's own default would
be `mlruns/` in whatever folder the command was started from). Another address is a server's, which has its own place.
"""

from __future__ import annotations

import io
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from mmoe_rec.atomic import atomic_file
from mmoe_rec.errors import StoppedError, UserError

# What they say below these levels is about MLflow's insides (migrations of its database, type hints, environment
# files); a user cannot act on it.
QUIET_LOGGERS = {
    "alembic": logging.WARNING,
    "mlflow.store.db.utils": logging.WARNING,
    "mlflow.tracking.fluent": logging.WARNING,
    "mlflow.pyfunc": logging.ERROR,
    "mlflow.models": logging.ERROR,
    "mlflow.types": logging.ERROR,
    "mlflow.utils.environment": logging.ERROR,
}
KEY_TAG = "training_key"
_AT_ONCE = 100  # parameters that MLflow takes in one call


class Run:
    """A run that is being recorded; without MLflow (`mlflow` None) every call does nothing.

    resumed: whether it was recorded before, so that it may be told again what it knows.
    """

    def __init__(self, run_id: str | None, mlflow: Any = None, resumed: bool = False) -> None:
        self.run_id = run_id
        self._mlflow, self._resumed = mlflow, resumed
        self._known_until: dict[str, int] = {}

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Settings, nested ones under names such as `model.experts.count`.

        In a resumed run, values that have changed go to the tag `resumed.NAME`: MLflow keeps the first ones.
        """
        if not self._mlflow:
            return
        params = dict(_flat(params))
        known = self._mlflow.get_run(self.run_id).data.params
        new = {name: str(value) for name, value in params.items() if name not in known}
        names = list(new)
        for start in range(0, len(names), _AT_ONCE):
            self._mlflow.log_params({name: new[name] for name in names[start : start + _AT_ONCE]})
        for name, value in params.items():
            if name in known and known[name] != str(value):
                self._mlflow.set_tag(f"resumed.{name}", str(value))

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Numbers at a step. In a resumed run those of steps that it knows are left out, as it took them before."""
        if self._mlflow:
            new = {name: value for name, value in metrics.items() if step is None or step > self._last_step(name)}
            self._mlflow.log_metrics(new, step=step)

    def _last_step(self, name: str) -> int:
        """The last one of which the run knew a metric when it was resumed, -1 for none."""
        if not self._resumed:
            return -1
        if name not in self._known_until:
            known = self._mlflow.MlflowClient().get_metric_history(self.run_id, name)
            self._known_until[name] = max((each.step for each in known), default=-1)
        return self._known_until[name]

    def log_text(self, text: str, name: str) -> None:
        """A text file."""
        if self._mlflow:
            self._mlflow.log_text(text, name)

    def log_dict(self, values: Mapping[str, Any], name: str) -> None:
        """A JSON or YAML file, by the name's ending."""
        if self._mlflow:
            self._mlflow.log_dict(dict(values), name)

    def log_figure(self, figure: Any, name: str) -> None:
        """A matplotlib figure."""
        if self._mlflow:
            self._mlflow.log_figure(figure, name)

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """A file."""
        if self._mlflow:
            self._mlflow.log_artifact(str(path), folder)

    def log_artifacts(self, path: str | Path, folder: str | None = None) -> None:
        """All files of a folder."""
        if self._mlflow:
            self._mlflow.log_artifacts(str(path), folder)

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Names and values that describe the run."""
        if self._mlflow:
            self._mlflow.set_tags(dict(tags))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


@contextmanager
def open_run(
    uri: str,
    experiment: str,
    *,
    run_name: str | None = None,
    run_id: str | None = None,
    key: str | None = None,
    parent: str | None = None,
    active: bool = True,
) -> Iterator[Run]:
    """Records a run, or goes on with run `run_id`; it ends as finished, killed (if told to stop) or failed.

    key: marks the run from its first moment on; the next one with this key goes on with it. parent: id of the open run
    that this one is a part of. active: False, on every rank but the first, gives a run that records nothing.

    Raises:
        UserError: the address can't be used, the experiment was deleted, or there is no such run.
    """
    if not active:
        yield Run(run_id)
        return
    mlflow = connect(uri)
    with calling(uri):
        _make_store(mlflow, uri)
        experiment_id = _experiment(mlflow, uri, experiment)
        tags = None if key is None else {KEY_TAG: key}
        if run_id is None and key is not None:
            run_id = _run_with(mlflow, experiment_id, key)
        started = (
            mlflow.start_run(run_id=run_id)
            if run_id is not None
            else mlflow.start_run(
                experiment_id=experiment_id,
                run_name=run_name,
                tags=tags,
                parent_run_id=parent,
                nested=parent is not None,
            )
        )
    with started:
        try:
            yield Run(started.info.run_id, mlflow, resumed=run_id is not None)
        except StoppedError:
            mlflow.end_run("KILLED")
            raise


def mark_killed(uri: str, run_id: str) -> None:
    """Says of a run that was left open that it was killed."""
    mlflow = connect(uri)
    with calling(uri):
        mlflow.MlflowClient().set_terminated(run_id, "KILLED")


def _run_with(mlflow: Any, experiment_id: str, key: str) -> str | None:
    found = mlflow.search_runs([experiment_id], f"tags.{KEY_TAG} = '{key}'", max_results=1, output_format="list")
    return found[0].info.run_id if found else None


def register(run: Run, artifact_folder: Path, name: str, alias: str | None = None) -> str:
    """Logs an artifact folder as the run's model, registers it and points an alias at it; gives the new version.

    Raises:
        UserError: the artifact can't be loaded, the run records nothing, or the registry refuses name or alias.
    """
    mlflow = run._mlflow
    if mlflow is None:
        raise UserError("a model can be registered from a recorded run only")
    import torch
    from mlflow.models import set_signature

    from mmoe_rec.serving import mlflow_package
    from mmoe_rec.serving.ranker import Ranker

    # MLflow runs the example too, but registers a model that fails at it.
    Ranker.load(artifact_folder)
    threads = torch.get_num_threads()

    # Progress bars of local copies and "Successfully registered" come from no logger.
    uri, unread = mlflow.get_tracking_uri(), io.StringIO()
    with calling(uri), redirect_stderr(unread), _no_bytecode(), tempfile.TemporaryDirectory() as scratch:
        arguments = mlflow_package.arguments(artifact_folder, Path(scratch))
        logged = mlflow.pyfunc.log_model(name="ranking_model", **arguments)
        torch.set_num_threads(threads)  # the served model, which MLflow has just tried out, sets it for its server
        set_signature(logged.model_uri, mlflow_package.with_params(logged.signature, artifact_folder))
        registered = mlflow.register_model(logged.model_uri, name)
        if alias is not None:
            mlflow.MlflowClient().set_registered_model_alias(name, alias, registered.version)
    return str(registered.version)


def sqlite_file(uri: str) -> Path | None:
    """The database file of a SQLite address; None for any other address."""
    parsed = urlparse(uri)
    # As in SQLAlchemy: three slashes are followed by a relative path, four by an absolute one.
    return Path(parsed.path[1:]) if parsed.scheme == "sqlite" else None


def connect(uri: str) -> Any:
    """The mlflow module, set to an address."""
    store = sqlite_file(uri)
    if store is not None:
        try:
            store.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"folder '{store.parent}' of the MLflow store can't be made: {error.strerror}") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of MLflow's own imports
        import mlflow
        import mlflow.pyfunc

    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    return mlflow


def _make_store(mlflow: Any, uri: str) -> None:
    """Makes a SQLite store with all its tables at once, as MLflow can't use one that a kill left half made."""
    store = sqlite_file(uri)
    if store is not None and not store.exists():
        with atomic_file(store, replace=False) as temporary:
            mlflow.MlflowClient(f"sqlite:///{temporary}").search_experiments(max_results=1)


def _experiment(mlflow: Any, uri: str, name: str) -> str:
    found = mlflow.get_experiment_by_name(name)
    if found is None:
        store = sqlite_file(uri)
        place = None if store is None else (store.resolve().parent / "mlartifacts").as_uri()
        created: str = mlflow.create_experiment(name, artifact_location=place)
        return created
    if found.lifecycle_stage != "active":
        raise UserError(
            f"MLflow experiment '{name}' was deleted: restore it, or set tracking.experiment to another name"
        )
    existing: str = found.experiment_id
    return existing


@contextmanager
def calling(uri: str, address: str | None = None) -> Iterator[None]:
    """Quiet MLflow; what it raises becomes a UserError."""
    import sqlalchemy.exc
    from mlflow.exceptions import MlflowException

    try:
        with _quiet():
            yield
    except MlflowException as error:
        what = f"'{address}' can't be loaded from MLflow at '{uri}'" if address else f"MLflow at '{uri}' refuses"
        raise UserError(f"{what}: {str(error).splitlines()[0]}") from None
    except (sqlalchemy.exc.SQLAlchemyError, OSError) as error:
        raise UserError(f"MLflow at '{uri}' can't be used: {str(error).splitlines()[0]}") from None


@contextmanager
def _no_bytecode() -> Iterator[None]:
    """MLflow tries a model out where it lies, which would leave compiled files of this Python in it."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


@contextmanager
def _quiet() -> Iterator[None]:
    before = {name: logging.getLogger(name).level for name in QUIET_LOGGERS}
    for name, level in QUIET_LOGGERS.items():
        logging.getLogger(name).setLevel(level)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"mlflow\..*")
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
