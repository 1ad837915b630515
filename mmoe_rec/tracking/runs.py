"""Record runs as messages to MLflow. Messages that can't be sent are saved and sent later."""

import hashlib
import json
import logging
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mmoe_rec.atomic import write_text
from mmoe_rec.errors import StoppedError, UserError
from mmoe_rec.locks import write_lock
from mmoe_rec.progress import quiet_loggers, say
from mmoe_rec.settings.sections import Settings
from mmoe_rec.tracking.client import (
    SHORT_TIMEOUTS,
    UnreachableError,
    client_timeouts,
    connect,
    hide_password,
    make_store,
    read_sqlite_path,
    translate_errors,
    truncate_markdown,
)

MAX_WAIT_SECONDS = 120.0  # Time to wait for MLflow, for commands that can do nothing without it.
_PAUSE_SECONDS = 5.0  # Pause between attempts to reach MLflow.
_RESUME_KEY_TAG = "training_key"
_DESCRIPTION_TAG = "mlflow.note.content"  # MLflow shows this tag as the run's description, in Markdown.
_MAX_SECTION_CHARS = 1900  # Four sections fit into 8,000 characters, to which MLflow truncates a description.
# This tag marks an experiment as model training, not as an LLM application.
_EXPERIMENT_KIND = ("mlflow.experimentKind", "custom_model_development")
_CONTEXTS = {"train": "training", "validation": "validation", "test": "test"}
_QUIET_LOGGERS = {"mlflow.system_metrics": logging.CRITICAL}  # Hide its messages about an unreachable server.


# Messages that can't be sent are saved in `unsent/RUN.jsonl`, one per line, with the contents of files to upload. Once
# MLflow does not answer, all later messages are saved too, to keep the order. The saved messages are sent at the end of
# the run, or else by the next command in the same folder. If a command is killed while it sends them, the next command
# sends all of them again. MLflow ignores repeated messages.


@dataclass(frozen=True)
class Message:
    """A change to a run that MLflow should record, such as new metrics.

    Attributes:
        kind: Part of the run to change.
        values: Values to record, in the form that the function `_deliver` expects for each kind.
        file: File to upload, for the kind `file`.
    """

    kind: Literal["params", "metrics", "tags", "inputs", "file", "end"]
    values: dict[str, Any]
    file: Path | None = None


class Outbox:
    """Sends the messages of one run to MLflow, and saves messages that can't be sent.

    Args:
        file: File for messages that can't be sent. Without a file, `put` raises the errors of `send`.
        send: Sends one message. Raises UnreachableError if MLflow does not answer, UserError if MLflow refuses.

    Attributes:
        last_error: Last error of sending a message, None without one. `flush` resets it before it sends.
    """

    def __init__(self, file: Path | None, send: Callable[[Message], None]) -> None:
        self.file, self._send = file, send
        self.last_error: UserError | None = None

    def put(self, message: Message) -> None:
        """Send a message. If this fails, save the message to the file, or raise UserError if it can't be saved."""
        if self.file is None:
            self._send(message)
        elif not self._deliver(message):
            file = None if message.file is None else (message.file.name, message.file.read_bytes().hex())
            tree = {"kind": message.kind, "values": message.values, "file": file}
            if not self.file.exists():
                say(f"{self.last_error}. The command continues. Messages for MLflow are saved in '{self.file}'")
            try:
                with self._lock(self.file), self.file.open("a", encoding="utf-8") as output:
                    # Begin a new line, because a killed command may have cut off the last line.
                    output.write(f"\n{json.dumps(tree)}")
            except OSError as error:
                raise UserError(
                    f"{self.last_error}, and it can't be saved in '{self.file}': {error.strerror}"
                ) from None

    def flush(self, seconds: float = 0.0) -> None:
        """Send the saved messages. Retry for `seconds` if MLflow doesn't answer, and store an error in `last_error`."""
        deadline = time.monotonic() + seconds
        while self.file is not None and self.file.exists():
            with self._lock(self.file):
                if self.file.exists():  # Another command may have sent the messages in the meantime.
                    self._send_saved(self.file)
            remaining = deadline - time.monotonic()
            if not isinstance(self.last_error, UnreachableError) or remaining <= 0:
                return
            time.sleep(min(remaining, _PAUSE_SECONDS))

    def _send_saved(self, file: Path) -> None:
        """Send saved messages until MLflow stops answering. Unsent and refused messages stay in the file."""
        unsent, self.last_error = list[str](), None
        with tempfile.TemporaryDirectory() as scratch:
            for line in file.read_text(encoding="utf-8").split("\n"):
                with suppress(ValueError):  # Skip a line that a killed command cut off.
                    tree, path = json.loads(line), None
                    if tree["file"] is not None:
                        path = Path(scratch, tree["file"][0])
                        path.write_bytes(bytes.fromhex(tree["file"][1]))
                    if not self._deliver(Message(tree["kind"], tree["values"], path)):
                        unsent.append(line)
        if unsent:
            write_text(file, "\n".join(unsent))
        else:
            file.unlink()
            say(f"MLflow has received the messages saved in '{file}'")

    def _deliver(self, message: Message) -> bool:
        """Send a message unless MLflow has stopped answering. Return whether the message was sent."""
        if isinstance(self.last_error, UnreachableError):
            return False
        try:
            self._send(message)
            return True
        except UserError as error:
            self.last_error = error
            return False

    @staticmethod
    def _lock(file: Path) -> AbstractContextManager[None]:
        return write_lock(file, "messages for MLflow", "wait for the other command", wait=True)


def list_unsent_runs(folder: Path) -> list[str]:
    """Return the IDs of runs that have saved messages in a folder."""
    return [file.stem for file in sorted(folder.glob("*.jsonl"))]


@dataclass
class Run:
    """A run whose settings, metrics and files are recorded in MLflow. Without an outbox, all methods do nothing.

    Attributes:
        run_id: ID of the run.
        outbox: Sender of the run's messages.
        url: URL of the run's page, or a description of the run if its store has no pages.
        params: Settings that were logged before the run was resumed.
        last_steps: Metric name -> last step that was logged before the run was resumed.
        description: Description of the run, in Markdown.
    """

    run_id: str | None
    outbox: Outbox | None = None
    url: str = ""
    params: Mapping[str, str] = field(default_factory=dict)
    last_steps: Mapping[str, int] = field(default_factory=dict)
    description: str = ""

    def log_all(
        self,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
        files: Mapping[str, str | Mapping[str, Any]] | None = None,
        inputs: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Log settings, tags, files and data sets.

        Args:
            params: Settings, as for `log_params`.
            tags: Tags by name.
            files: Texts or JSON values by file name.
            inputs: Data sets, as for `log_inputs`.
        """
        self.log_params(params or {})
        self.set_tags(tags or {})
        for name, content in (files or {}).items():
            self.log_text(content, name)
        self.log_inputs(inputs)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log nested settings under names such as `model.experts.count`.

        MLflow can't change a logged setting. Changed values of a resumed run are logged as tags `resumed.NAME`.
        """
        texts = {name: str(value) for name, value in _flatten(params)}
        self._queue("params", {name: value for name, value in texts.items() if name not in self.params})
        changed = {name: value for name, value in texts.items() if self.params.get(name, value) != value}
        self.set_tags({f"resumed.{name}": value for name, value in changed.items()})

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics, except steps that were logged before the run was resumed.

        Args:
            metrics: Values by name.
            step: Training step. None for metrics without steps, which are logged as step 0.
        """
        new = {
            name: float(value)
            for name, value in metrics.items()
            if step is None or step > self.last_steps.get(name, -1)
        }
        if new:
            # The time lets MLflow ignore a value that is sent again, because its time and step are the same.
            self._queue("metrics", {"time": _now(), "step": step or 0, "metrics": new})

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags of the run."""
        self._queue("tags", {name: str(value) for name, value in tags.items()})

    def write_section(self, heading: str, text: str) -> None:
        """Write a section of the run's description, replacing a section with the same heading.

        Args:
            heading: Heading of the section.
            text: Contents in Markdown.
        """
        preamble, sections = _read_sections(self.description)
        sections[heading] = truncate_markdown(hide_password(text.strip()), _MAX_SECTION_CHARS)
        self.description = "\n\n".join(
            filter(None, [preamble, *(f"### {title}\n\n{body}" for title, body in sections.items())])
        )
        self.set_tags({_DESCRIPTION_TAG: self.description})

    def log_inputs(self, datasets: Sequence[Mapping[str, Any]]) -> None:
        """Log the data sets that the run reads, as `describe_datasets` returns them."""
        masked = [{**dataset, "source": hide_password(dataset["source"])} for dataset in datasets]
        self._queue("inputs", {"datasets": masked} if datasets else {})

    def log_text(self, content: str | Mapping[str, Any], name: str) -> None:
        """Log a file with a text or with JSON values.

        Args:
            content: Text or JSON values.
            name: Path of the file among the run's files.
        """
        text = content if isinstance(content, str) else json.dumps(content, indent=2)
        self._queue_file(name, lambda file: file.write_text(text, encoding="utf-8"))

    def log_figure(self, figure: Any, name: str) -> None:
        """Log a figure as an image file.

        Args:
            figure: Matplotlib figure.
            name: Path of the file among the run's files.
        """
        if self.outbox is not None:
            self._queue_file(name, figure.savefig)

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Log a local file.

        Args:
            path: Path of the file.
            folder: Folder among the run's files. None is the top folder.
        """
        self._queue("file", {"folder": folder}, Path(path))

    def end(self, status: str) -> None:
        """End the run as `status` (FINISHED, KILLED or FAILED), and send its saved messages."""
        self._queue("end", {"status": status, "time": _now()})
        self.flush()

    def flush(self, seconds: float = 0.0) -> None:
        """Send saved messages, retrying for some seconds while MLflow does not answer."""
        if self.outbox is not None:
            self.outbox.flush(seconds)

    def _queue_file(self, name: str, write: Callable[[Path], object]) -> None:
        if self.outbox is None:
            return
        folder, _, name = name.rpartition("/")
        with tempfile.TemporaryDirectory() as scratch:
            write(Path(scratch, name))
            self.log_artifact(Path(scratch, name), folder or None)

    def _queue(self, kind: Any, values: dict[str, Any], file: Path | None = None) -> None:
        if self.outbox is not None and values:
            self.outbox.put(Message(kind, values, file))


@contextmanager
def open_run(
    tracking_uri: str,
    experiment: str,
    *,
    run_name: str | None = None,
    run_id: str | None = None,
    resume_key: str | None = None,
    parent_run_id: str | None = None,
    enabled: bool = True,
    outbox_folder: Path | None = None,
    max_wait_seconds: float = 0.0,
    log_system_metrics: bool = False,
) -> Iterator[Run]:
    """Start or continue a run. It ends with the context: FINISHED, KILLED (by a request to stop) or FAILED.

    Args:
        tracking_uri: URI of the MLflow server or store.
        experiment: Name of the experiment. It is created if necessary.
        run_name: Name of a new run.
        run_id: ID of a run to continue.
        resume_key: Key of the run. A later call with the same key continues the run.
        parent_run_id: ID of the open run to nest this run under.
        enabled: Whether to record the run. If false, the yielded `Run` does nothing. Only one rank should record.
        outbox_folder: Folder for messages that can't be sent. Messages that any run left there are sent first. Without
            a folder, a message that can't be sent raises UserError.
        max_wait_seconds: Seconds to retry at the beginning while MLflow does not answer.
        log_system_metrics: Whether MLflow logs the use of processors, memory, disk, network and GPUs.

    Raises:
        UserError: MLflow does not answer or can't be used, the experiment was deleted, or there is no such run.
    """
    if not enabled:
        yield Run(run_id)
        return
    with client_timeouts(SHORT_TIMEOUTS), quiet_loggers(_QUIET_LOGGERS):
        mlflow = connect(tracking_uri)
        experiment_id = _wait_for_experiment(mlflow, tracking_uri, experiment, max_wait_seconds)
        if outbox_folder is not None:
            _send_waiting(mlflow, tracking_uri, outbox_folder)
        with translate_errors(tracking_uri):
            if run_id is None and resume_key is not None:
                where = f"tags.{_RESUME_KEY_TAG} = '{resume_key}'"
                runs = mlflow.search_runs([experiment_id], where, max_results=1, output_format="list")
                run_id = runs[0].info.run_id if runs else None
            previous = () if run_id is None else _read_run(mlflow, run_id)
            arguments: dict[str, Any] = {"run_id": run_id}
            if run_id is None:
                tags = None if resume_key is None else {_RESUME_KEY_TAG: resume_key}
                arguments = {"experiment_id": experiment_id, "run_name": run_name, "tags": tags}
                arguments["parent_run_id"] = parent_run_id
            nested = parent_run_id is not None
            info = mlflow.start_run(**arguments, nested=nested, log_system_metrics=log_system_metrics).info
        url = f"{info.run_id} of experiment '{experiment}' in {tracking_uri}"
        if tracking_uri.startswith(("http://", "https://")):
            # Without this query parameter, MLflow shows new users its LLM menu.
            page = f"#/experiments/{info.experiment_id}/runs/{info.run_id}?workflowType=machine_learning"
            url = f"{tracking_uri.rstrip('/')}/{page}"
        outbox = _open_outbox(mlflow, tracking_uri, info.run_id, outbox_folder)
        run = Run(info.run_id, outbox, hide_password(url), *previous)
        status = "FAILED"
        try:
            yield run
            status = "FINISHED"
        except (StoppedError, KeyboardInterrupt):
            status = "KILLED"
            raise
        finally:
            with nullcontext() if status == "FINISHED" else suppress(UserError):  # Don't hide the error of the run.
                run.end(status)
            with suppress(Exception), translate_errors(tracking_uri, catch_all=True):
                mlflow.end_run(status)  # Close the run in this process too.


def _wait_for_experiment(mlflow: Any, tracking_uri: str, name: str, max_wait_seconds: float) -> str:
    """Return an experiment's ID, creating the experiment if necessary. Retry while MLflow does not answer."""
    deadline = time.monotonic() + max_wait_seconds
    while True:
        try:
            with translate_errors(tracking_uri):
                make_store(tracking_uri)
                return _open_experiment(mlflow, tracking_uri, name)
        except UnreachableError:
            if time.monotonic() + _PAUSE_SECONDS > deadline:
                raise
            time.sleep(_PAUSE_SECONDS)


def _open_experiment(mlflow: Any, tracking_uri: str, name: str) -> str:
    experiment = mlflow.get_experiment_by_name(name)
    if experiment is None:
        store = read_sqlite_path(tracking_uri)
        location = None if store is None else (store.resolve().parent / "mlartifacts").as_uri()
        return mlflow.create_experiment(name, artifact_location=location, tags=dict([_EXPERIMENT_KIND]))
    if experiment.lifecycle_stage != "active":
        raise UserError(f"MLflow experiment '{name}' was deleted. Restore it, or set another tracking.experiment.")
    if _EXPERIMENT_KIND[0] not in experiment.tags:  # Someone has created the experiment by hand.
        mlflow.MlflowClient().set_experiment_tag(experiment.experiment_id, *_EXPERIMENT_KIND)
    return experiment.experiment_id


def _read_run(mlflow: Any, run_id: str) -> tuple[dict[str, str], dict[str, int], str]:
    """Return the logged settings of a run, the last step of each metric, and the description."""
    run = mlflow.get_run(run_id)
    if run.info.lifecycle_stage != "active":
        restore = f"Restore it with `mlflow runs restore --run-id {run_id}`"
        raise UserError(f"MLflow run '{run_id}' was deleted. {restore}, or train from the start without --resume.")
    # MLflow returns only the last step of each metric.
    last_steps = {metric.key: metric.step for metric in run.data._metric_objs}
    return run.data.params, last_steps, run.data.tags.get(_DESCRIPTION_TAG, "")


def check_server(tracking_uri: str, experiment: str, *, outbox_folder: Path) -> None:
    """Check that MLflow accepts the experiment, create it if necessary, and send saved messages.

    Args:
        tracking_uri: URI of the MLflow server or store.
        experiment: Name of the experiment.
        outbox_folder: Folder of the saved messages of all runs.

    Raises:
        UserError: MLflow does not answer, or refuses the experiment.
    """
    with client_timeouts(SHORT_TIMEOUTS):
        mlflow = connect(tracking_uri)
        _wait_for_experiment(mlflow, tracking_uri, experiment, 0.0)
        _send_waiting(mlflow, tracking_uri, outbox_folder)


def _send_waiting(mlflow: Any, tracking_uri: str, outbox_folder: Path) -> None:
    for run_id in list_unsent_runs(outbox_folder):
        outbox = _open_outbox(mlflow, tracking_uri, run_id, outbox_folder)
        outbox.flush()
        if isinstance(outbox.last_error, UnreachableError):
            raise outbox.last_error
        if outbox.last_error is not None:
            say(f"{outbox.last_error}. Messages for MLflow stay in '{outbox.file}'")


def _open_outbox(mlflow: Any, tracking_uri: str, run_id: str, outbox_folder: Path | None) -> Outbox:
    def send(message: Message) -> None:
        with translate_errors(tracking_uri, catch_all=True):
            _deliver(mlflow, run_id, message)

    return Outbox(None if outbox_folder is None else outbox_folder / f"{run_id}.jsonl", send)


def _deliver(mlflow: Any, run_id: str, message: Message) -> None:
    client, entities, values = mlflow.MlflowClient(), mlflow.entities, message.values
    match message.kind:
        case "params":
            client.log_batch(run_id, params=[entities.Param(*item) for item in values.items()])
        case "metrics":
            at, step = values["time"], values["step"]
            numbers = [entities.Metric(name, value, at, step) for name, value in values["metrics"].items()]
            client.log_batch(run_id, metrics=numbers)
        case "tags":
            client.log_batch(run_id, tags=[entities.RunTag(*item) for item in values.items()])
        case "inputs":
            client.log_inputs(run_id, datasets=[_make_input(entities, item) for item in values["datasets"]])
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
    return entities.DatasetInput(data_set, [entities.InputTag(*tag) for tag in tags.items()])


def _read_sections(description: str) -> tuple[str, dict[str, str]]:
    """Split a description into the text above its sections, and the sections by heading."""
    preamble, *parts = re.split(r"^### (.+)$", description, flags=re.MULTILINE)
    return preamble.strip(), {heading: text.strip() for heading, text in zip(parts[::2], parts[1::2], strict=True)}


def _now() -> int:
    return time.time_ns() // 1_000_000


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


# Texts and data sets for a run's page in MLflow.


def command_line() -> str:
    """Return the command line of this process, without passwords."""
    first, *words = sys.argv
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = None if spec is None else spec.name.removesuffix(".__main__")
    start = f"python -m {name}" if name else shlex.quote(Path(first).name)
    return hide_password(" ".join([start, *(shlex.quote(word) for word in words)]))


def name_run(settings: Settings, start: str | None = None) -> str:
    """Return the name of a training run, such as "train until 2026-03-01 from models:/clicks/2, seed 0".

    Args:
        settings: Settings of the run.
        start: URI of the model to start from, None for random weights.
    """
    end = settings.split.train_end
    until = "" if end is None else f" until {end:%Y-%m-%d}"
    start_text = "" if start is None else f" from {start}"
    return f"train{until}{start_text}, seed {settings.training.seed}"


def describe_datasets(settings: Settings, manifest: Mapping[str, Any], *splits: str) -> list[dict[str, Any]]:
    """Describe splits of a log as data sets, for `Run.log_inputs`. MLflow tells the splits apart by their digests.

    Args:
        settings: Settings of the run.
        manifest: Manifest of the features.
        splits: Names of the splits.
    """
    datasets, windows, split_column = [], settings.split.windows(), settings.split.split_column
    for split in splits:
        identity = f"{manifest['digest']} {split} {windows[split]} {split_column} {settings.columns.weight}"
        digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
        rows = int(manifest["splits"][split]["rows"])
        description = {"name": settings.name, "digest": digest, "source": str(manifest["log"])}
        datasets.append(description | {"context": _CONTEXTS[split], "rows": rows, "split": split})
    return datasets


def bullet_list(sentences: Iterable[str]) -> str:
    """Format sentences as a Markdown list."""
    return "\n".join(f"- {sentence}" for sentence in sentences)


def code_block(text: str) -> str:
    """Format shell commands as a Markdown code block."""
    return f"```sh\n{text}\n```"
