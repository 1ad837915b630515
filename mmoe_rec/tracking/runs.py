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
from mmoe_rec.locks import writing
from mmoe_rec.progress import quiet_loggers, say
from mmoe_rec.settings.sections import Settings
from mmoe_rec.tracking.client import (
    BRIEF,
    UnreachableError,
    connect,
    hide_password,
    limit_waiting,
    make_store,
    read_sqlite_path,
    shorten,
    translate_errors,
)

PATIENCE_SECONDS = 120.0  # how long a command that has nothing else to do waits for an answer
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
        self.trouble: UserError | None = None

    def put(self, message: Message) -> None:
        """Send a message, or keep it. Raises UserError if it can't be kept."""
        if self.file is None:
            self._send(message)
        elif not self._deliver(message):
            file = None if message.file is None else (message.file.name, message.file.read_bytes().hex())
            tree = {"kind": message.kind, "values": message.values, "file": file}
            if not self.file.exists():
                say(f"{self.trouble}. The command goes on: messages for MLflow are kept in '{self.file}'")
            try:
                with self._locked(self.file), self.file.open("a", encoding="utf-8") as kept:
                    kept.write(f"\n{json.dumps(tree)}")  # A line that a kill cut off harms no other.
            except OSError as error:
                raise UserError(f"{self.trouble}, nor can it be kept in '{self.file}': {error.strerror}") from None

    def flush(self, seconds: float = 0.0) -> None:
        """Send the kept messages, trying for some seconds while nobody answers. The rest stays: see `trouble`."""
        until = time.monotonic() + seconds
        while self.file is not None and self.file.exists():
            with self._locked(self.file):
                if self.file.exists():  # another command may have sent it meanwhile
                    self._send_kept(self.file)
            left = until - time.monotonic()
            if not isinstance(self.trouble, UnreachableError) or left <= 0:
                return
            time.sleep(min(left, _PAUSE_SECONDS))

    def _send_kept(self, file: Path) -> None:
        """Send until nobody answers. A refused message stays, and the next ones are sent."""
        left, self.trouble = list[str](), None
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
        if isinstance(self.trouble, UnreachableError):
            return False
        try:
            self._send(message)
            return True
        except UserError as error:
            self.trouble = error
            return False

    @staticmethod
    def _locked(file: Path) -> AbstractContextManager[None]:
        return writing(file, "messages for MLflow", "wait for the other command", queue=True)


def list_waiting_runs(folder: Path) -> list[str]:
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
    watch_machine: bool = False,
) -> Iterator[Run]:
    """Records a run, or goes on with run `run_id`; it ends as finished, killed (if told to stop) or failed.

    key: marks the run from its first moment on; the next one with this key goes on with it. parent: id of the open run
    that this one is a part of. active: False, on every rank but the first, gives a run that records nothing. unsent:
    folder in which messages wait while MLflow does not answer; those left there by any run are sent first. Without one,
    a message that can't be sent raises UserError. patience: seconds to wait for MLflow to answer at the beginning.
    watch_machine: have MLflow log what processors, memory, disk, network and GPUs do meanwhile.

    Raises UserError where the address can't be used, the experiment was deleted, or there is no such run.
    """
    if not active:
        yield Run(run_id)
        return
    with limit_waiting(BRIEF), quiet_loggers(_QUIET):
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
            info = mlflow.start_run(**wanted, nested=parent is not None, log_system_metrics=watch_machine).info
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
    until = time.monotonic() + patience
    while True:
        try:
            with translate_errors(uri):
                make_store(uri)
                return _open_experiment(mlflow, uri, name)
        except UnreachableError:
            if time.monotonic() + _PAUSE_SECONDS > until:
                raise
            time.sleep(_PAUSE_SECONDS)


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
    last = {each.key: each.step for each in run.data._metric_objs}  # of the largest step
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
        if box.trouble is not None:
            say(f"{box.trouble}: messages for MLflow stay in '{box.file}'")


def _open_outbox(mlflow: Any, uri: str, run_id: str, unsent: Path | None) -> Outbox:
    def send(message: Message) -> None:
        with translate_errors(uri, anything=True):
            _deliver(mlflow, run_id, message)

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


# The words and data sets of a run's page in MLflow.


def command() -> str:
    """The command line of this process, without passwords."""
    first, *words = sys.argv
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = None if spec is None else spec.name.removesuffix(".__main__")
    start = f"python -m {name}" if name else shlex.quote(Path(first).name)
    return hide_password(" ".join([start, *(shlex.quote(word) for word in words)]))


def name_training(settings: Settings, start: str | None = None) -> str:
    """What a training is called: until when its rows go, its start and its seed."""
    end = settings.split.train_end
    until = "" if end is None else f" until {end:%Y-%m-%d}"
    begun = "" if start is None else f" from {start}"
    return f"train{until}{begun}, seed {settings.training.seed}"


def data_sets(settings: Settings, manifest: Mapping[str, Any], *splits: str) -> list[dict[str, Any]]:
    """Splits of a log as the inputs of a run, by the manifest of its features.

    MLflow tells data sets apart by name and digest, so each split has a digest of its own.
    """
    sets, windows, by_column = [], settings.split.windows(), settings.split.by_column
    for split in splits:
        text = f"{manifest['digest']} {split} {windows[split]} {by_column} {settings.columns.weight}"
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        about = {"name": settings.name, "digest": digest, "source": str(manifest["log"]), "context": _CONTEXTS[split]}
        sets.append(about | {"rows": int(manifest["splits"][split]["rows"]), "split": split})
    return sets


def quoted(sentences: Iterable[str]) -> str:
    """Sentences as a list of Markdown."""
    return "\n".join(f"- {sentence}" for sentence in sentences)


def as_code(text: str) -> str:
    """A block of Markdown."""
    return f"```sh\n{text}\n```"
