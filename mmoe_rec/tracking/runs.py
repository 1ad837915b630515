"""Runs, metrics and the model registry: the only place of training and evaluation that talks to MLflow."""

from __future__ import annotations

import hashlib
import io
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path
from typing import Any

from mmoe_rec.errors import StoppedError, UserError
from mmoe_rec.tracking.client import (
    BRIEF,
    FOR_MODELS,
    calling,
    connect,
    first_line,
    limits,
    make_store,
    shown,
    sqlite_file,
)
from mmoe_rec.tracking.outbox import PATIENCE_SECONDS, Outbox, UnreachableError, runs_waiting
from mmoe_rec.tracking.recording import NOTE, Run, sender
from mmoe_rec.training.origin import checksum

KEY_TAG = "training_key"
_FILES_TAG = "files"  # of a version in the registry
# By this tag MLflow knows an experiment as one of model trainings, and not of applications of LLMs.
_KIND = ("mlflow.experimentKind", "custom_model_development")


def check(uri: str, experiment: str, model: str | None = None, alias: str = "champion", *, unsent: Path) -> None:
    """Raises UserError where nobody answers at an address, or MLflow would refuse a name: before any work is done.

    unsent: as in `open_run`.
    """
    check_names(experiment, model, alias)
    with limits(BRIEF):
        mlflow = connect(uri)
        with calling(uri):
            make_store(mlflow, uri)
            _existing(mlflow, experiment)
        _send_left(mlflow, uri, unsent)


def check_names(experiment: str, model: str | None = None, alias: str = "champion") -> None:
    """Raises UserError for a name that MLflow would refuse, by MLflow's own rules."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of MLflow's own imports
        from mlflow.exceptions import MlflowException
        from mlflow.store.artifact.utils.models import _parse_model_uri
        from mlflow.utils import validation

    def addressed(name: str) -> None:
        if _parse_model_uri(address := f"models:/{name}@{alias}").name != name:
            raise MlflowException(f"MLflow would look for another model at '{address}'")

    of_alias = (validation._validate_model_alias_name, validation._validate_model_alias_name_reserved)
    rules: list[tuple[str, str, tuple[Callable[[str], object], ...]]] = [
        ("tracking.experiment", experiment, (validation._validate_experiment_name,))
    ]
    if model is not None:
        rules.append(("tracking.alias", alias, of_alias))
        rules.append(("tracking.registered_model", model, (validation._validate_model_name, addressed)))
    for setting, name, each_rule in rules:
        try:
            for rule in each_rule:
                rule(name)
        except MlflowException as error:
            default = "" if setting == "tracking.alias" else " (by default the settings' `name`)"
            raise UserError(f"'{setting}'{default} can't be '{name}' in MLflow: {first_line(error)}") from None


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
    unsent: Path | None = None,
    patience: float = 0.0,
) -> Iterator[Run]:
    """Records a run, or goes on with run `run_id`; it ends as finished, killed (if told to stop) or failed.

    key: marks the run from its first moment on; the next one with this key goes on with it. parent: id of the open run
    that this one is a part of. active: False, on every rank but the first, gives a run that records nothing. unsent:
    folder in which messages wait while MLflow does not answer; those left there by any run are sent first. Without one,
    a message that can't be sent raises UserError. patience: seconds to wait for MLflow to answer at the beginning.

    Raises:
        UserError: the address can't be used, the experiment was deleted, or there is no such run.
    """
    if not active:
        yield Run(run_id)
        return
    with limits(BRIEF):
        run = _started(uri, experiment, run_name, run_id, key, parent, unsent, patience)
        try:
            yield run
        except BaseException as error:
            with suppress(UserError):  # it would hide the original error
                run.end("KILLED" if isinstance(error, StoppedError | KeyboardInterrupt) else "FAILED")
            raise
        else:
            run.end("FINISHED")
        finally:
            _leave(str(run.run_id))


def _started(
    uri: str,
    experiment: str,
    run_name: str | None,
    run_id: str | None,
    key: str | None,
    parent: str | None,
    unsent: Path | None,
    patience: float,
) -> Run:
    mlflow = connect(uri)
    until, pause = time.monotonic() + patience, 1.0
    while True:
        try:
            with calling(uri):
                make_store(mlflow, uri)
                experiment_id = _experiment(mlflow, uri, experiment)
            break
        except UnreachableError:
            if time.monotonic() + pause > until:
                raise
            time.sleep(pause)
            pause = min(2 * pause, 30.0)
    if unsent is not None:
        _send_left(mlflow, uri, unsent)
    params: dict[str, str] = {}
    steps: dict[str, int] = {}
    note = ""
    with calling(uri):
        if run_id is None and key is not None:
            run_id = _run_with(mlflow, experiment_id, key)
        if run_id is not None:
            params, steps, note = _known(mlflow, run_id)
        started = (
            mlflow.start_run(run_id=run_id, nested=parent is not None)
            if run_id is not None
            else mlflow.start_run(
                experiment_id=experiment_id,
                run_name=run_name,
                tags=None if key is None else {KEY_TAG: key},
                parent_run_id=parent,
                nested=parent is not None,
            )
        )
    run_id = started.info.run_id
    # Without what follows the question mark, MLflow shows a browser that is new to it its menu for LLMs.
    page = f"#/experiments/{started.info.experiment_id}/runs/{run_id}?workflowType=machine_learning"
    place = f"{uri.rstrip('/')}/{page}"
    served = uri.startswith(("http://", "https://"))
    address = shown(place) if served else f"{run_id} of experiment '{experiment}' in {shown(uri)}"
    return Run(run_id, _outbox(mlflow, uri, run_id, unsent), address, params, steps, note)


def _known(mlflow: Any, run_id: str) -> tuple[dict[str, str], dict[str, int], str]:
    """The settings that a run knows, the last step of each metric, and its description."""
    found = mlflow.get_run(run_id)
    if found.info.lifecycle_stage != "active":
        raise UserError(
            f"MLflow run '{run_id}' was deleted: restore it with `mlflow runs restore --run-id {run_id}`, or "
            "train from the start, without --resume"
        )
    client = mlflow.MlflowClient()
    history = {name: client.get_metric_history(run_id, name) for name in found.data.metrics}
    last = {name: max(each.step for each in steps) for name, steps in history.items() if steps}
    return found.data.params, last, found.data.tags.get(NOTE, "")


def _send_left(mlflow: Any, uri: str, unsent: Path) -> None:
    for run_id in runs_waiting(unsent):
        box = _outbox(mlflow, uri, run_id, unsent)
        box.flush()
        if isinstance(box.trouble, UnreachableError):
            raise box.trouble


def _outbox(mlflow: Any, uri: str, run_id: str, unsent: Path | None) -> Outbox:
    folder = None if unsent is None else unsent / run_id
    return Outbox(folder, sender(mlflow, run_id, lambda: calling(uri, anything=True)))


def _leave(run_id: str) -> None:
    """Ends MLflow's own notion of an open run, without the call to the server that its `end_run` makes."""
    from mlflow.tracking import fluent

    open_runs = fluent._active_run_stack.get()
    open_runs[:] = [each for each in open_runs if each.info.run_id != run_id]
    monitor = fluent.run_id_to_system_metrics_monitor.pop(run_id, None)
    if monitor is not None:
        monitor.finish()


def mark_killed(uri: str, run_id: str) -> None:
    """Marks a run that was left open as killed."""
    mlflow = connect(uri)
    with limits(BRIEF), calling(uri):
        mlflow.MlflowClient().set_terminated(run_id, "KILLED")


def _run_with(mlflow: Any, experiment_id: str, key: str) -> str | None:
    found = mlflow.search_runs([experiment_id], f"tags.{KEY_TAG} = '{key}'", max_results=1, output_format="list")
    return found[0].info.run_id if found else None


def register(
    run: Run,
    artifact_folder: Path,
    name: str,
    alias: str | None = None,
    tags: Mapping[str, str] | None = None,
) -> str:
    """Logs an artifact folder as the run's model, registers it and points an alias at it; gives the new version.

    tags: of the version, besides ours.

    Raises:
        UnreachableError: MLflow does not answer.
        UserError: the artifact can't be loaded, the run records nothing, or the registry refuses name or alias.
    """
    if run.outbox is None:
        raise UserError("a model can be registered from a recorded run only")
    import mlflow
    import torch
    from mlflow.models import set_signature

    from mmoe_rec.inference import mlflow_package
    from mmoe_rec.inference.ranker import Ranker

    # MLflow runs the example too, but registers even a model that fails it.
    Ranker.load(artifact_folder)
    threads = torch.get_num_threads()

    # Progress bars of local copies and "Successfully registered" come from no logger.
    uri, unread = mlflow.get_tracking_uri(), io.StringIO()
    with (
        limits(FOR_MODELS),
        calling(uri, anything=True),
        redirect_stderr(unread),
        _no_bytecode(),
        tempfile.TemporaryDirectory() as scratch,
    ):
        arguments = mlflow_package.arguments(artifact_folder, Path(scratch))
        logged = mlflow.pyfunc.log_model(name="ranking_model", **arguments)
        torch.set_num_threads(threads)  # the served model, which MLflow has just tried out, sets it for its server
        set_signature(logged.model_uri, mlflow_package.with_params(logged.signature, artifact_folder))
        registered = mlflow.register_model(
            logged.model_uri, name, tags={**(tags or {}), _FILES_TAG: _files(artifact_folder)}
        )
        if alias is not None:
            mlflow.MlflowClient().set_registered_model_alias(name, alias, registered.version)
    return str(registered.version)


def registered_before(run: Run, artifact_folder: Path, name: str) -> str | None:
    """The version as which a run has registered an artifact already; None where it has not, or the files differ."""
    import mlflow

    uri = mlflow.get_tracking_uri()
    with limits(BRIEF), calling(uri):
        found = mlflow.MlflowClient().search_model_versions(f"run_id = '{run.run_id}'")
    files = _files(artifact_folder)
    return next((str(each.version) for each in found if each.name == name and each.tags.get(_FILES_TAG) == files), None)


def _files(artifact_folder: Path) -> str:
    """A checksum of an artifact's files except the features, whose fingerprint is in one of them.

    Nor does it count what another machine rounds otherwise: the scores of the example, and the manifest with theirs.
    """
    left = ("example_scores.json", "manifest.json")
    files = sorted(file for file in artifact_folder.iterdir() if file.is_file() and file.name not in left)
    return hashlib.sha256("\n".join(f"{file.name} {checksum(file)}" for file in files).encode()).hexdigest()[:32]


@contextmanager
def or_later(run: Run, artifact_folder: Path) -> Iterator[None]:
    """Around the registration of a trained model: first waits for MLflow, if it is away, and sends what waits.

    Raises:
        StoppedError, UserError: it does not answer, or refuses; says that the model is not registered and how to do it.
    """
    run.flush(PATIENCE_SECONDS)
    what = (
        f"the trained model in '{artifact_folder}' is whole but not registered: the same command with --resume does it"
    )
    try:
        yield
    except UnreachableError as error:
        raise StoppedError(f"{error}; {what} once MLflow answers") from None
    except UserError as error:
        raise UserError(f"{error}; {what} once that is put right") from None


def _experiment(mlflow: Any, uri: str, name: str) -> str:
    found = _existing(mlflow, name)
    if found is None:
        store = sqlite_file(uri)
        place = None if store is None else (store.resolve().parent / "mlartifacts").as_uri()
        created: str = mlflow.create_experiment(name, artifact_location=place, tags=dict([_KIND]))
        return created
    existing: str = found.experiment_id
    if _KIND[0] not in found.tags:  # of before there were kinds, or made by hand
        mlflow.MlflowClient().set_experiment_tag(existing, *_KIND)
    return existing


def _existing(mlflow: Any, name: str) -> Any:
    found = mlflow.get_experiment_by_name(name)
    if found is not None and found.lifecycle_stage != "active":
        raise UserError(
            f"MLflow experiment '{name}' was deleted: restore it, or set tracking.experiment to another name"
        )
    return found


@contextmanager
def _no_bytecode() -> Iterator[None]:
    """MLflow tries a model out where it lies, which would leave compiled files of this Python in it."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before
