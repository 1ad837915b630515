"""A run: what it logs becomes messages, which MLflow gets now or once it answers again."""

import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmoe_rec.errors import StoppedError, UserError
from mmoe_rec.progress import say
from mmoe_rec.tracking.client import (
    BRIEF,
    connect,
    hide_password,
    limit_waiting,
    make_store,
    read_sqlite_path,
    shorten,
    translate_errors,
)
from mmoe_rec.tracking.outbox import Message, Outbox, UnreachableError, list_waiting_runs

_KEY_TAG = "training_key"
_NOTE = "mlflow.note.content"  # the tag that MLflow shows as a run's description, in Markdown
_LONGEST_SECTION = 1900  # MLflow cuts a description at 8,000 characters, from the end
# By this tag MLflow knows an experiment as one of model trainings, and not of applications of LLMs.
_KIND = ("mlflow.experimentKind", "custom_model_development")


@dataclass
class Run:
    """A run that is being recorded; without an outbox every call does nothing.

    address: where to look at it; params, steps, note: settings, last step of each metric, and description that a
    resumed run knew already, so that these may be logged again.
    """

    run_id: str | None
    outbox: Outbox | None = None
    address: str = ""
    params: Mapping[str, str] = field(default_factory=dict)
    steps: Mapping[str, int] = field(default_factory=dict)
    note: str = ""

    def record(
        self,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
        files: Mapping[str, str | Mapping[str, Any]] | None = None,
        inputs: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Settings, tags, files by name and the rows that the run reads, in one call."""
        self.log_params(params or {})
        self.set_tags(tags or {})
        for name, content in (files or {}).items():
            self.log_text(content, name)
        self.log_inputs(inputs)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Settings, nested ones under names such as `model.experts.count`.

        In a resumed run, values that have changed go to the tag `resumed.NAME`: MLflow keeps the first ones.
        """
        given = {name: str(value) for name, value in _flatten(params)}
        self._put("params", {name: value for name, value in given.items() if name not in self.params})
        changed = {name: value for name, value in given.items() if self.params.get(name, value) != value}
        self.set_tags({f"resumed.{name}": value for name, value in changed.items()})

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Numbers at a step. In a resumed run, those of steps that it has already are left out."""
        new = {name: float(each) for name, each in metrics.items() if step is None or step > self.steps.get(name, -1)}
        if new:
            # A number that is sent twice with one time and step counts once.
            self._put("metrics", {"time": _now(), "step": step or 0, "metrics": new})

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        self._put("tags", {name: str(value) for name, value in tags.items()})

    def describe(self, heading: str, text: str) -> None:
        """Puts a section, in Markdown, into the description, in place of one of that heading; text above all stays."""
        above, sections = _read_sections(self.note)
        sections[heading] = shorten(hide_password(text.strip()), _LONGEST_SECTION)
        self.note = "\n\n".join(filter(None, [above, *(f"### {each}\n\n{its}" for each, its in sections.items())]))
        self.set_tags({_NOTE: self.note})

    def log_inputs(self, sets: Sequence[Mapping[str, Any]]) -> None:
        """Logs which rows the run reads.

        sets: name and digest of each; source: the log's address; rows: how many; context: what for; split: which rows.
        """
        known = [{**each, "source": hide_password(each["source"])} for each in sets]
        self._put("inputs", {"sets": known} if sets else {})

    def log_text(self, content: str | Mapping[str, Any], name: str) -> None:
        """Logs a text, or values as JSON, as a file."""
        text = content if isinstance(content, str) else json.dumps(content, indent=2)
        self._put_file(name, lambda file: file.write_text(text, encoding="utf-8"))

    def log_figure(self, figure: Any, name: str) -> None:
        if self.outbox is not None:
            self._put_file(name, figure.savefig)

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        self._put("file", {"folder": folder}, Path(path))

    def end(self, status: str) -> None:
        """The run has ended as FINISHED, KILLED or FAILED. Sends what is kept for it."""
        self._put("end", {"status": status, "time": _now()})
        self.flush()

    def flush(self, seconds: float = 0.0) -> None:
        """Sends what is kept, for so long while MLflow does not answer."""
        if self.outbox is not None:
            self.outbox.flush(seconds)

    def _put_file(self, name: str, write: Callable[[Path], object]) -> None:
        if self.outbox is None:
            return
        folder, _, name = name.rpartition("/")
        with tempfile.TemporaryDirectory() as scratch:
            write(Path(scratch, name))
            self.log_artifact(Path(scratch, name), folder or None)

    def _put(self, kind: Any, values: dict[str, Any], file: Path | None = None) -> None:
        if self.outbox is not None and values:
            self.outbox.put(Message(kind, values, file))


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
    Raises UserError where the address can't be used, the experiment was deleted, or there is no such run.
    """
    if not active:
        yield Run(run_id)
        return
    with limit_waiting(BRIEF):
        mlflow = connect(uri)
        experiment_id = _wait_for_experiment(mlflow, uri, experiment, patience)
        if unsent is not None:
            _send_waiting(mlflow, uri, unsent)
        with translate_errors(uri):
            if run_id is None and key is not None:
                where = f"tags.{_KEY_TAG} = '{key}'"
                found = mlflow.search_runs([experiment_id], where, max_results=1, output_format="list")
                run_id = found[0].info.run_id if found else None
            known = () if run_id is None else _read_run(mlflow, run_id)
            new: dict[str, Any] = {"experiment_id": experiment_id, "run_name": run_name, "parent_run_id": parent}
            new["tags"] = None if key is None else {_KEY_TAG: key}
            wanted = new if run_id is None else {"run_id": run_id}
            info = mlflow.start_run(**wanted, nested=parent is not None, log_system_metrics=False).info
        address = f"{info.run_id} of experiment '{experiment}' in {uri}"
        if uri.startswith(("http://", "https://")):
            # Without what follows the question mark, MLflow shows a browser that is new to it its menu for LLMs.
            page = f"#/experiments/{info.experiment_id}/runs/{info.run_id}?workflowType=machine_learning"
            address = f"{uri.rstrip('/')}/{page}"
        run = Run(info.run_id, _open_outbox(mlflow, uri, info.run_id, unsent), hide_password(address), *known)
        status = "FAILED"
        try:
            yield run
            status = "FINISHED"
        except (StoppedError, KeyboardInterrupt):
            status = "KILLED"
            raise
        finally:
            with nullcontext() if status == "FINISHED" else suppress(UserError):  # it would hide the original error
                run.end(status)
            with suppress(Exception), translate_errors(uri, anything=True):
                mlflow.end_run(status)  # the process has no open run any more


def _wait_for_experiment(mlflow: Any, uri: str, name: str, patience: float) -> str:
    """The id of an experiment, which is made if it is not there; waits so many seconds for MLflow to answer."""
    until, pause = time.monotonic() + patience, 1.0
    while True:
        try:
            with translate_errors(uri):
                make_store(uri)
                return _open_experiment(mlflow, uri, name)
        except UnreachableError:
            if time.monotonic() + pause > until:
                raise
            time.sleep(pause)
            pause = min(2 * pause, 30.0)


def _open_experiment(mlflow: Any, uri: str, name: str) -> str:
    experiment = mlflow.get_experiment_by_name(name)
    if experiment is None:
        store = read_sqlite_path(uri)
        place = None if store is None else (store.resolve().parent / "mlartifacts").as_uri()
        return mlflow.create_experiment(name, artifact_location=place, tags=dict([_KIND]))
    if experiment.lifecycle_stage != "active":
        raise UserError(f"MLflow experiment '{name}' was deleted: restore it, or set another tracking.experiment")
    if _KIND[0] not in experiment.tags:  # made by hand
        mlflow.MlflowClient().set_experiment_tag(experiment.experiment_id, *_KIND)
    return experiment.experiment_id


def _read_run(mlflow: Any, run_id: str) -> tuple[dict[str, str], dict[str, int], str]:
    """The settings that a run knows, the last step of each metric, and its description."""
    run = mlflow.get_run(run_id)
    if run.info.lifecycle_stage != "active":
        restore = f"restore it with `mlflow runs restore --run-id {run_id}`"
        raise UserError(f"MLflow run '{run_id}' was deleted: {restore}, or train from the start, without --resume")
    client = mlflow.MlflowClient()
    history = {name: client.get_metric_history(run_id, name) for name in run.data.metrics}
    last = {name: max(each.step for each in steps) for name, steps in history.items() if steps}
    return run.data.params, last, run.data.tags.get(_NOTE, "")


def check_server(uri: str, experiment: str, *, unsent: Path) -> None:
    """Raises UserError where nobody answers at an address, or MLflow refuses the experiment, which is made if need be.

    unsent: as in `open_run`.
    """
    with limit_waiting(BRIEF):
        mlflow = connect(uri)
        _wait_for_experiment(mlflow, uri, experiment, 0.0)
        _send_waiting(mlflow, uri, unsent)


def _send_waiting(mlflow: Any, uri: str, unsent: Path) -> None:
    for run_id in list_waiting_runs(unsent):
        box = _open_outbox(mlflow, uri, run_id, unsent)
        box.flush()
        if isinstance(box.trouble, UnreachableError):
            raise box.trouble


def _open_outbox(mlflow: Any, uri: str, run_id: str, unsent: Path | None) -> Outbox:
    def send(message: Message) -> None:
        try:
            with translate_errors(uri, anything=True):
                _deliver(mlflow, run_id, message)
        except UnreachableError:
            raise
        except UserError as error:
            if message.kind != "inputs":
                raise
            say(f"{error}: the run goes on without data sets")  # an old server does not know them

    return Outbox(None if unsent is None else unsent / f"{run_id}.jsonl", send)


def _deliver(mlflow: Any, run_id: str, message: Message) -> None:
    client, entities, values = mlflow.MlflowClient(), mlflow.entities, message.values
    match message.kind:
        case "params":
            client.log_batch(run_id, params=[entities.Param(*each) for each in values.items()])
        case "metrics":
            at, step = values["time"], values["step"]
            numbers = [entities.Metric(name, value, at, step) for name, value in values["metrics"].items()]
            client.log_batch(run_id, metrics=numbers)
        case "tags":
            client.log_batch(run_id, tags=[entities.RunTag(*each) for each in values.items()])
        case "inputs":
            client.log_inputs(run_id, datasets=[_make_input(entities, each) for each in values["sets"]])
        case "file":
            client.log_artifact(run_id, str(message.file), values["folder"])
        case "end":
            client.set_terminated(run_id, values["status"], values["time"])


def _make_input(entities: Any, values: Mapping[str, Any]) -> Any:
    remote = "://" in values["source"]
    data_set = entities.Dataset(
        name=values["name"],
        digest=values["digest"],
        source_type=values["source"].partition("://")[0] if remote else "local",
        source=json.dumps({"uri": values["source"]}),
        profile=json.dumps({"num_rows": values["rows"]}),
    )
    tags = {"mlflow.data.context": values["context"], "split": values["split"]}
    return entities.DatasetInput(data_set, [entities.InputTag(*each) for each in tags.items()])


def _read_sections(note: str) -> tuple[str, dict[str, str]]:
    """What stands above the sections of a description, and these by heading."""
    above, *parts = re.split(r"^### (.+)$", note, flags=re.MULTILINE)
    return above.strip(), {heading: text.strip() for heading, text in zip(parts[::2], parts[1::2], strict=True)}


def _now() -> int:
    return time.time_ns() // 1_000_000


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
