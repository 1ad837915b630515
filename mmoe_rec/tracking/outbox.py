"""The messages to a run: one that MLflow can't be sent now is kept in a file, and sent at the end of the run.

`unsent/RUN.jsonl` holds a message in each line, files among them. While nobody answers, all messages go there, so that
their order stays. If MLflow is away at the end of the run, too, the next command in the same folder sends the file. A
command that is killed while it sends leaves the file whole: MLflow takes a message twice without an effect.
"""

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
    """The messages of one run. trouble: why the last one could not be sent, None if it was."""

    def __init__(self, file: Path | None, send: Callable[[Message], None]) -> None:
        """Take messages for a run.

        Args:
            file: File for messages that can't be sent. Without one, `put` raises the errors of `send`.
            send: Delivers one message. Raises UnreachableError if nobody answers, UserError if it is refused.
        """
        self.file, self._send = file, send
        self.trouble: UserError | None = None
        self._told = ""

    def put(self, message: Message) -> None:
        """Send a message, or keep it. Raises UserError if it can't be kept."""
        if self.file is None:
            self._send(message)
        elif not self._deliver(message):
            try:
                file = None if message.file is None else (message.file.name, message.file.read_bytes().hex())
                tree = {"kind": message.kind, "values": message.values, "file": file}
                with self._locked(self.file), self.file.open("a", encoding="utf-8") as kept:
                    kept.write(f"\n{json.dumps(tree)}")  # A line that a kill cut off harms no other.
            except OSError as error:
                raise UserError(f"{self.trouble}, nor can it be kept in '{self.file}': {error.strerror}") from None

    def flush(self, seconds: float = 0.0) -> None:
        """Send the kept messages, trying for some seconds while nobody answers. The rest stays: see `trouble`."""
        until, pause = time.monotonic() + seconds, _FIRST_PAUSE
        while self.file is not None and self.file.exists():
            with self._locked(self.file):
                self._send_kept(self.file)
            left = until - time.monotonic()
            if not isinstance(self.trouble, UnreachableError) or left <= 0:
                return
            time.sleep(min(left, pause))
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _send_kept(self, file: Path) -> None:
        """Send until nobody answers. A refused message stays, and the next ones are sent."""
        left, self.trouble = list[str](), None
        with tempfile.TemporaryDirectory() as scratch:
            for line, tree in _read(file):
                path = None
                if tree["file"] is not None:
                    name, content = tree["file"]
                    path = Path(scratch, name)
                    path.write_bytes(bytes.fromhex(content))
                if not self._deliver(Message(tree["kind"], tree["values"], path)):
                    left.append(line)
        if left:
            write_text(file, "\n".join(left))
        else:
            file.unlink(missing_ok=True)
            self._told = ""
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
            if str(error) != self._told:
                self._told = str(error)
                say(f"{error}. The command goes on: messages for MLflow are kept in '{self.file}'")
            return False

    @staticmethod
    def _locked(file: Path) -> AbstractContextManager[None]:
        return writing(file, "messages for MLflow", "wait for the other command", queue=True)


def _read(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """Read the whole lines of a file of messages, if it is still there."""
    found = []
    for line in file.read_text(encoding="utf-8").split("\n") if file.exists() else []:
        with suppress(ValueError):  # of a line that a kill cut off
            found.append((line, json.loads(line)))
    return found


def list_waiting_runs(folder: Path) -> list[str]:
    """List the runs with kept messages in a folder."""
    return [each.stem for each in sorted(folder.glob("*.jsonl"))]
