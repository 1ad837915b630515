"""A run: what it logs becomes messages, which MLflow gets now or once it answers again."""

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

MAX_WAIT_SECONDS = 120.0  # how long a command that has nothing else to do waits for an answer
_PAUSE_SECONDS = 5.0  # between two tries
_KEY_TAG = "training_key"
_NOTE = "mlflow.note.content"  # the tag that MLflow shows as a run's description, in Markdown
_LONGEST_SECTION = 1900  # MLflow cuts a description at 8,000 characters, from the end
# By this tag MLflow knows an experiment as one of model trainings, and not of applications of LLMs.
_KIND = ("mlflow.experimentKind", "custom_model_development")
_CONTEXTS = {"train": "training", "validation": "validation", "test": "test"}
_QUIET = {"mlflow.system_metrics": logging.CRITICAL}  # says that it stops where a server is away


# The messages to a run: one that MLflow can't be sent now is kept in a file, and sent at the end of the run.
#
# `unsent/RUN.jsonl` holds a message in each line, files among them. While nobody answers, all messages go there, so
# their order stays. If MLflow is away at the end of the run, too, the next command in the same folder sends the file. A
# command that is killed while it sends leaves the file whole: MLflow takes a message twice without an effect.


@dataclass(frozen=True)
class Message:
    """values: JSON; file: sent with them, under its own name."""

    kind: Literal["params", "metrics", "tags", "inputs", "file", "end"]
    values: dict[str, Any]
    file: Path | None = None


class Outbox:
    """The messages of one run. trouble: why the last one could not be sent, None if it was."""

    def __init__(self, file: Path | None, send: Callable[[Message], None]) -> None:
        """Take messages for a run.

        Args:
            file: File for messages that can't be sent. Without one, `put` raises the errors of `send`.
            send: Delivers one message. Raises UnreachableError if nobody answers, UserError if it is refused.
        """
        self.file, self._send = file, send
        self.last_error: UserError | None = None

    def put(self, message: Message) -> None:
        """Send a message, or keep it. Raises UserError if it can't be kept."""
        if self.file is None:
            self._send(message)
        elif not self._deliver(message):
            file = None if message.file is None else (message.file.name, message.file.read_bytes().hex())
            tree = {"kind": message.kind, "values": message.values, "file": file}
            if not self.file.exists():
                say(f"{self.last_error}. The command goes on: messages for MLflow are kept in '{self.file}'")
            try:
                with self._locked(self.file), self.file.open("a", encoding="utf-8") as kept:
                    kept.write(f"\n{json.dumps(tree)}")  # A line that a kill cut off harms no other.
            except OSError as error:
                raise UserError(f"{self.last_error}, nor can it be kept in '{self.file}': {error.strerror}") from None

    def flush(self, seconds: float = 0.0) -> None:
        """Send the kept messages, trying for some seconds while nobody answers. The rest stays: see `last_error`."""
        until = time.monotonic() + seconds
        while self.file is not None and self.file.exists():
            with self._locked(self.file):
                if self.file.exists():  # another command may have sent it meanwhile
                    self._send_kept(self.file)
            left = until - time.monotonic()
            if not isinstance(self.last_error, UnreachableError) or left <= 0:
                return
            time.sleep(min(left, _PAUSE_SECONDS))

    def _send_kept(self, file: Path) -> None:
        """Send until nobody answers. A refused message stays, and the next ones are sent."""
        left, self.last_error = list[str](), None
        with tempfile.TemporaryDirectory() as scratch:
            for line in file.read_text(encoding="utf-8").split("\n"):
                with suppress(ValueError):  # of a line that a kill cut off
                    tree, path = json.loads(line), None
                    if tree["file"] is not None:
                        path = Path(scratch, tree["file"][0])
                        path.write_bytes(bytes.fromhex(tree["file"][1]))
                    if not self._deliver(Message(tree["kind"], tree["values"], path)):
                        left.append(line)
        if left:
            write_text(file, "\n".join(left))
        else:
            file.unlink()
            say(f"MLflow has received the messages that were kept in '{file}'")

    def _deliver(self, message: Message) -> bool:
        """Send a message, unless nobody answers. Returns whether it was sent."""
        if isinstance(self.last_error, UnreachableError):
            return False
        try:
            self._send(message)
            return True
        except UserError as error:
            self.last_error = error
            return False

    @staticmethod
    def _locked(file: Path) -> AbstractContextManager[None]:
        return write_lock(file, "messages for MLflow", "wait for the other command", wait=True)


def list_unsent_runs(folder: Path) -> list[str]:
    """List the runs with kept messages in a folder."""
    return [each.stem for each in sorted(folder.glob("*.jsonl"))]


@dataclass
class Run:
    """A run that is being recorded; without an outbox every call does nothing.

    address: where to look at it; params, steps, note: settings, last step of each metric, and description that a
    resumed run knew already, so that these may be logged again.
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
        new = {
            name: float(each) for name, each in metrics.items() if step is None or step > self.last_steps.get(name, -1)
        }
        if new:
            # A number that is sent twice with one time and step counts once.
            self._put("metrics", {"time": _now(), "step": step or 0, "metrics": new})

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        self._put("tags", {name: str(value) for name, value in tags.items()})

    def write_section(self, heading: str, text: str) -> None:
        """Puts a section, in Markdown, into the description, in place of one of that heading; text above all stays."""
        above, sections = _read_sections(self.description)
        sections[heading] = truncate_markdown(hide_password(text.strip()), _LONGEST_SECTION)
        self.description = "\n\n".join(
            filter(None, [above, *(f"### {each}\n\n{its}" for each, its in sections.items())])
        )
        self.set_tags({_NOTE: self.description})

    def log_inputs(self, datasets: Sequence[Mapping[str, Any]]) -> None:
        """Logs which rows the run reads.

        datasets: name and digest of each; source: the log's address; rows: how many; context: what for; split: which
        rows.
        """
        known = [{**each, "source": hide_password(each["source"])} for each in datasets]
        self._put("inputs", {"datasets": known} if datasets else {})

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
    """Records a run, or goes on with run `run_id`; it ends as finished, killed (if told to stop) or failed.

    resume_key: marks the run from its first moment on; the next one with this key goes on with it. parent: id of the
    open run that this one is a part of. active: False, on every rank but the first, gives a run that records nothing.
    unsent: folder in which messages wait while MLflow does not answer; those left there by any run are sent first.
    Without one, a message that can't be sent raises UserError. patience: seconds to wait for MLflow to answer at the
    beginning. log_system_metrics: have MLflow log what processors, memory, disk, network and GPUs do meanwhile.

    Raises UserError where the address can't be used, the experiment was deleted, or there is no such run.
    """
    if not enabled:
        yield Run(run_id)
        return
    with client_timeouts(SHORT_TIMEOUTS), quiet_loggers(_QUIET):
        mlflow = connect(tracking_uri)
        experiment_id = _wait_for_experiment(mlflow, tracking_uri, experiment, max_wait_seconds)
        if outbox_folder is not None:
            _send_waiting(mlflow, tracking_uri, outbox_folder)
        with translate_errors(tracking_uri):
            if run_id is None and resume_key is not None:
                where = f"tags.{_KEY_TAG} = '{resume_key}'"
                found = mlflow.search_runs([experiment_id], where, max_results=1, output_format="list")
                run_id = found[0].info.run_id if found else None
            known = () if run_id is None else _read_run(mlflow, run_id)
            new: dict[str, Any] = {"experiment_id": experiment_id, "run_name": run_name, "parent_run_id": parent_run_id}
            new["tags"] = None if resume_key is None else {_KEY_TAG: resume_key}
            wanted = new if run_id is None else {"run_id": run_id}
            info = mlflow.start_run(
                **wanted, nested=parent_run_id is not None, log_system_metrics=log_system_metrics
            ).info
        url = f"{info.run_id} of experiment '{experiment}' in {tracking_uri}"
        if tracking_uri.startswith(("http://", "https://")):
            # Without what follows the question mark, MLflow shows a browser that is new to it its menu for LLMs.
            page = f"#/experiments/{info.experiment_id}/runs/{info.run_id}?workflowType=machine_learning"
            url = f"{tracking_uri.rstrip('/')}/{page}"
        run = Run(
            info.run_id, _open_outbox(mlflow, tracking_uri, info.run_id, outbox_folder), hide_password(url), *known
        )
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
            with suppress(Exception), translate_errors(tracking_uri, catch_all=True):
                mlflow.end_run(status)  # the process has no open run any more


def _wait_for_experiment(mlflow: Any, tracking_uri: str, name: str, max_wait_seconds: float) -> str:
    """The id of an experiment, which is made if it is not there; waits so many seconds for MLflow to answer."""
    until = time.monotonic() + max_wait_seconds
    while True:
        try:
            with translate_errors(tracking_uri):
                make_store(tracking_uri)
                return _open_experiment(mlflow, tracking_uri, name)
        except UnreachableError:
            if time.monotonic() + _PAUSE_SECONDS > until:
                raise
            time.sleep(_PAUSE_SECONDS)


def _open_experiment(mlflow: Any, tracking_uri: str, name: str) -> str:
    experiment = mlflow.get_experiment_by_name(name)
    if experiment is None:
        store = read_sqlite_path(tracking_uri)
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
    last = {each.key: each.step for each in run.data._metric_objs}  # of the largest step
    return run.data.params, last, run.data.tags.get(_NOTE, "")


def check_server(tracking_uri: str, experiment: str, *, outbox_folder: Path) -> None:
    """Raises UserError where nobody answers at an address, or MLflow refuses the experiment, which is made if need be.

    outbox_folder: as in `open_run`.
    """
    with client_timeouts(SHORT_TIMEOUTS):
        mlflow = connect(tracking_uri)
        _wait_for_experiment(mlflow, tracking_uri, experiment, 0.0)
        _send_waiting(mlflow, tracking_uri, outbox_folder)


def _send_waiting(mlflow: Any, tracking_uri: str, outbox_folder: Path) -> None:
    for run_id in list_unsent_runs(outbox_folder):
        box = _open_outbox(mlflow, tracking_uri, run_id, outbox_folder)
        box.flush()
        if isinstance(box.last_error, UnreachableError):
            raise box.last_error
        if box.last_error is not None:
            say(f"{box.last_error}: messages for MLflow stay in '{box.file}'")


def _open_outbox(mlflow: Any, tracking_uri: str, run_id: str, outbox_folder: Path | None) -> Outbox:
    def send(message: Message) -> None:
        with translate_errors(tracking_uri, catch_all=True):
            _deliver(mlflow, run_id, message)

    return Outbox(None if outbox_folder is None else outbox_folder / f"{run_id}.jsonl", send)


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
            client.log_inputs(run_id, datasets=[_make_input(entities, each) for each in values["datasets"]])
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


def _read_sections(description: str) -> tuple[str, dict[str, str]]:
    """What stands above the sections of a description, and these by heading."""
    above, *parts = re.split(r"^### (.+)$", description, flags=re.MULTILINE)
    return above.strip(), {heading: text.strip() for heading, text in zip(parts[::2], parts[1::2], strict=True)}


def _now() -> int:
    return time.time_ns() // 1_000_000


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


# The words and data sets of a run's page in MLflow.


def command_line() -> str:
    """The command line of this process, without passwords."""
    first, *words = sys.argv
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = None if spec is None else spec.name.removesuffix(".__main__")
    start = f"python -m {name}" if name else shlex.quote(Path(first).name)
    return hide_password(" ".join([start, *(shlex.quote(word) for word in words)]))


def name_run(settings: Settings, start: str | None = None) -> str:
    """What a training is called: until when its rows go, its start and its seed."""
    end = settings.split.train_end
    until = "" if end is None else f" until {end:%Y-%m-%d}"
    begun = "" if start is None else f" from {start}"
    return f"train{until}{begun}, seed {settings.training.seed}"


def describe_datasets(settings: Settings, manifest: Mapping[str, Any], *splits: str) -> list[dict[str, Any]]:
    """Splits of a log as the inputs of a run, by the manifest of its features.

    MLflow tells data sets apart by name and digest, so each split has a digest of its own.
    """
    datasets, windows, split_column = [], settings.split.windows(), settings.split.split_column
    for split in splits:
        text = f"{manifest['digest']} {split} {windows[split]} {split_column} {settings.columns.weight}"
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        about = {"name": settings.name, "digest": digest, "source": str(manifest["log"]), "context": _CONTEXTS[split]}
        datasets.append(about | {"rows": int(manifest["splits"][split]["rows"]), "split": split})
    return datasets


def bullet_list(sentences: Iterable[str]) -> str:
    """Sentences as a list of Markdown."""
    return "\n".join(f"- {sentence}" for sentence in sentences)


def code_block(text: str) -> str:
    """A block of Markdown."""
    return f"```sh\n{text}\n```"
