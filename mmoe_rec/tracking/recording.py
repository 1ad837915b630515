"""A run that is being recorded: what it logs becomes messages, which MLflow gets now or once it answers again."""

from __future__ import annotations

import json
import math
import re
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmoe_rec.errors import UserError
from mmoe_rec.progress import say
from mmoe_rec.tracking.outbox import Message, Outbox, UnreachableError

NOTE = "mlflow.note.content"
"""The tag that MLflow shows as a run's description, in Markdown."""
_LONGEST_SECTION = 1900  # MLflow cuts a description at 8,000 characters, from the end


@dataclass(frozen=True)
class DataSet:
    """Rows that a run reads. source: the log's address; context: what they are for; split: which of its rows."""

    name: str
    digest: str
    source: str
    rows: int
    context: str
    split: str


class Run:
    """A run that is being recorded; without an outbox every call does nothing.

    address: where to look at it; params, steps, note: settings, last step of each metric, and description that a
    resumed run knew already, so that these may be logged again.
    """

    def __init__(
        self,
        run_id: str | None,
        outbox: Outbox | None = None,
        address: str = "",
        params: Mapping[str, str] | None = None,
        steps: Mapping[str, int] | None = None,
        note: str = "",
    ) -> None:
        self.run_id, self.outbox, self.address = run_id, outbox, address
        self._params, self._steps, self._note = params or {}, steps or {}, note

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Settings, nested ones under names such as `model.experts.count`.

        In a resumed run, values that have changed go to the tag `resumed.NAME`: MLflow keeps the first ones.
        """
        given = {name: str(value) for name, value in _flat(params)}
        self._put("params", {name: value for name, value in given.items() if name not in self._params})
        changed = {name: value for name, value in given.items() if self._params.get(name, value) != value}
        self.set_tags({f"resumed.{name}": value for name, value in changed.items()})

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Numbers at a step. In a resumed run, those of steps that it has already are left out."""
        new = {name: float(each) for name, each in metrics.items() if step is None or step > self._steps.get(name, -1)}
        if new:
            # A number that is sent twice with one time and step counts once.
            self._put("metrics", {"time": _now(), "step": step or 0, "metrics": new})

    def forget_metrics(self, prefix: str, kept: Collection[str]) -> None:
        """Metrics of a resumed run with names that begin so, but for some, become NaN: they are undefined by now."""
        gone = [name for name in self._steps if name.startswith(prefix) and name not in kept]
        self._put("metrics", {"time": _now(), "step": 0, "metrics": dict.fromkeys(gone, math.nan)} if gone else {})

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Names and values that describe the run."""
        self._put("tags", {name: str(value) for name, value in tags.items()})

    def describe(self, heading: str, text: str) -> None:
        """A section of the run's description, in Markdown, in the place of one with that heading; what people wrote
        above the sections stays."""
        above, sections = _parts(self._note)
        sections[heading] = shortened(text.strip(), _LONGEST_SECTION)
        self._note = "\n\n".join(filter(None, [above, *(f"### {each}\n\n{its}" for each, its in sections.items())]))
        self.set_tags({NOTE: self._note})

    def is_described(self, heading: str) -> bool:
        """Whether the description has a section of that heading."""
        return heading in _parts(self._note)[1]

    def log_inputs(self, sets: Sequence[DataSet]) -> None:
        """The rows that the run reads."""
        self._put("inputs", {"sets": [asdict(each) for each in sets]} if sets else {})

    def log_text(self, text: str, name: str) -> None:
        """A text file."""
        self._put_file(name, lambda file: file.write_text(text, encoding="utf-8"))

    def log_dict(self, values: Mapping[str, Any], name: str) -> None:
        """A JSON file."""
        self.log_text(json.dumps(values, indent=2), name)

    def log_figure(self, figure: Any, name: str) -> None:
        """A matplotlib figure."""
        if self.outbox is not None:
            self._put_file(name, figure.savefig)

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """A file."""
        self._put("file", {"folder": folder}, Path(path))

    def end(self, status: str) -> None:
        """The run has ended as FINISHED, KILLED or FAILED."""
        self._put("end", {"status": status, "time": _now()})

    def flush(self, seconds: float = 0.0) -> None:
        """Sends what waits, for so long while MLflow does not answer."""
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


def sender(mlflow: Any, run_id: str, calling: Callable[[], AbstractContextManager[None]]) -> Callable[[Message], None]:
    """What delivers a run's messages to MLflow. calling: the context of each call, in which errors are translated."""
    client, entities = mlflow.MlflowClient(), mlflow.entities

    def send(message: Message) -> None:
        if message.kind != "inputs":
            deliver(message)
            return
        try:
            deliver(message)
        except UnreachableError:
            raise
        except UserError as error:  # of a server that does not know them: nothing else should wait for that
            say(f"{error}: the run goes on without data sets")

    def deliver(message: Message) -> None:
        values = message.values
        with calling():
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
                    client.log_inputs(run_id, datasets=[_input(entities, each) for each in values["sets"]])
                case "file":
                    client.log_artifact(run_id, str(message.file), values["folder"])
                case "end":
                    client.set_terminated(run_id, values["status"], values["time"])

    return send


def _input(entities: Any, values: Mapping[str, Any]) -> Any:
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


def shortened(markdown: str, most: int) -> str:
    """A text of at most so many characters; a block of code that is cut is closed."""
    if len(markdown) <= most:
        return markdown
    cut = markdown[: most - 10].rstrip()
    return f"{cut} …" + ("\n```" if cut.count("```") % 2 else "")


def _parts(note: str) -> tuple[str, dict[str, str]]:
    """What stands above the sections of a description, and these by heading."""
    above, *parts = re.split(r"^### (.+)$", note, flags=re.MULTILINE)
    return above.strip(), {heading: text.strip() for heading, text in zip(parts[::2], parts[1::2], strict=True)}


def _now() -> int:
    return time.time_ns() // 1_000_000


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
