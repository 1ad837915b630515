"""The messages to a run: one that MLflow can't be sent now is kept in a file, and sent at the end of the run.

`unsent/RUN.jsonl` holds a message in each line, files among them. While nobody answers, all messages go there, so that
their order stays. If MLflow is away at the end of the run, too, the next command in the same folder sends the file. A
command that is killed while it sends leaves the file whole: MLflow takes a message twice without an effect.
"""

import base64
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmoe_rec.atomic import write_text
from mmoe_rec.errors import UserError
from mmoe_rec.locks import writing
from mmoe_rec.progress import say

PATIENCE_SECONDS = 120.0  # how long a command that has nothing else to do waits for an answer
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0


class UnreachableError(UserError):
    """Nobody answers, or not in time, which may pass by itself."""


@dataclass(frozen=True)
class Message:
    """values: JSON; file: sent with them, under its own name."""

    kind: Literal["params", "metrics", "tags", "inputs", "file", "end"]
    values: dict[str, Any]
    file: Path | None = None


class Outbox:
    """The messages of one run."""

    def __init__(self, file: Path | None, send: Callable[[Message], None]) -> None:
        """Take messages for a run.

        Args:
            file: File for messages that can't be sent. Without one, `put` raises the errors of `send`.
            send: Delivers one message. Raises UnreachableError if nobody answers, UserError if it is refused.
        """
        self.file, self._send = file, send
        self._told: set[str] = set()
        self.trouble: UserError | None = None

    def put(self, message: Message) -> None:
        """Send a message, or keep it. Raises UserError if it can't be kept."""
        if not isinstance(self.trouble, UnreachableError):
            try:
                self._send(message)
                return
            except UserError as error:
                if self.file is None:
                    raise
                self._note(error)
        self._keep(message)

    def flush(self, seconds: float = 0.0) -> None:
        """Send the kept messages, trying for some seconds while nobody answers. The rest stays: see `trouble`."""
        until, pause = time.monotonic() + seconds, _FIRST_PAUSE
        self._send_kept()
        while isinstance(self.trouble, UnreachableError) and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, pause))
            pause = min(2 * pause, _LONGEST_PAUSE)
            self._send_kept()

    def _send_kept(self) -> None:
        """Send until nobody answers. A refused message stays, and the next ones are sent."""
        if self.file is None or not self.file.exists():
            return
        with self._locked():
            kept, left, self.trouble = _read(self.file), list[str](), None
            for line, tree in kept:
                if not isinstance(self.trouble, UnreachableError):
                    try:
                        self._deliver(tree)
                        continue
                    except UserError as error:
                        self._note(error)
                left.append(line)
            if not left:
                self.file.unlink(missing_ok=True)
                self._told.clear()
                say(f"MLflow has received the messages that were kept in '{self.file}'")
            elif len(left) < len(kept):
                write_text(self.file, "\n".join(left))

    def _deliver(self, tree: dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            file = None
            if "name" in tree:
                file = Path(scratch, tree["name"])
                file.write_bytes(base64.b64decode(tree["content"]))
            self._send(Message(tree["kind"], tree["values"], file))

    def _note(self, error: UserError) -> None:
        self.trouble = error
        if str(error) not in self._told:
            self._told.add(str(error))
            say(f"{error}. The command goes on: messages for MLflow are kept in '{self.file}'")

    def _keep(self, message: Message) -> None:
        assert self.file is not None
        tree: dict[str, Any] = {"kind": message.kind, "values": message.values}
        try:
            if message.file is not None:
                content = base64.b64encode(message.file.read_bytes()).decode()
                tree |= {"name": message.file.name, "content": content}
            with self._locked(), self.file.open("a", encoding="utf-8") as file:
                file.write(f"\n{json.dumps(tree)}")  # A line that a kill cut off harms no other.
        except OSError as error:
            raise UserError(f"{self.trouble}, nor can it be kept in '{self.file}': {error.strerror}") from None

    def _locked(self) -> AbstractContextManager[None]:
        assert self.file is not None
        return writing(self.file, "messages for MLflow", "wait for the other command", queue=True)


def _read(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """Read the whole lines of a file of messages, if it is still there."""
    found = []
    for line in file.read_text(encoding="utf-8").split("\n") if file.exists() else []:
        with suppress(ValueError):
            found.append((line, json.loads(line)))
    return found


def list_waiting_runs(folder: Path) -> list[str]:
    """List the runs with kept messages in a folder."""
    return [each.stem for each in sorted(folder.glob("*.jsonl"))]
