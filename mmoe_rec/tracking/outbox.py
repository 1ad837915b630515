"""The messages to a run, in order, even while nobody answers: those that can't be sent wait in files until they can.

    unsent/RUN/
        00000001.json           a message: its kind and its values
        00000002.json
        00000002.file/NAME      the file that the second one brings

A message is sent at once where none is waiting. Otherwise it joins those that wait, and the first of them is tried
again from time to time, so rarely that at most a tenth of the time goes into it.
"""

import json
import math
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmoe_rec.atomic import atomic_file, write_text
from mmoe_rec.errors import UserError
from mmoe_rec.progress import say

PATIENCE_SECONDS = 120.0  # how long a command that has nothing else to do waits for an answer
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0
_SHARE = 9  # pauses are so many times as long as the try before them took
_SECONDS_AT_ONCE = 2.0


class UnreachableError(UserError):
    """Nobody answers, or not in time, which may pass by itself."""


@dataclass(frozen=True)
class Message:
    """values: JSON; file: sent with them, under its own name."""

    kind: Literal["params", "metrics", "tags", "inputs", "file", "end"]
    values: dict[str, Any]
    file: Path | None = None


class Outbox:
    """The messages of one run. Other processes may send those that wait, too.

    folder: where they wait; None: nothing waits, and what `send` raises is raised. send: delivers one message, or
    raises UnreachableError where nobody answers, UserError where the message is refused.
    """

    def __init__(self, folder: Path | None, send: Callable[[Message], None]) -> None:
        self.folder, self._send = folder, send
        self._waiting = [] if folder is None else sorted(int(file.stem) for file in folder.glob("*.json"))
        self._pause, self._next_try = 0.0, 0.0
        self._told: set[str] = set()
        self.trouble: UserError | None = None

    def __len__(self) -> int:
        """Messages that wait."""
        return len(self._waiting)

    def put(self, message: Message) -> None:
        """Sends the message after those that wait, or keeps it. Raises UserError where it can't be kept."""
        if self.folder is None:
            self._send(message)
        elif self._waiting or not self._try_to_send(message):
            self._keep(message)
            if time.monotonic() >= self._next_try:
                self._send_waiting(time.monotonic() + _SECONDS_AT_ONCE)

    def flush(self, seconds: float = 0.0) -> None:
        """Sends what waits, trying for `seconds` while nobody answers. The rest goes on waiting: see `trouble`."""
        until = time.monotonic() + seconds
        while self._waiting:
            self._send_waiting()
            left = until - time.monotonic()
            if left <= 0 or not isinstance(self.trouble, UnreachableError):
                return
            time.sleep(min(left, max(0.0, self._next_try - time.monotonic())))

    def _send_waiting(self, until: float = math.inf) -> None:
        """Sends until nobody answers, or it is too late. What is refused stays, and the next ones are sent."""
        assert self.folder is not None
        refused = None
        for number in list(self._waiting):
            if time.monotonic() > until:
                return
            message = self._read(number)
            if message is None:
                self._waiting.remove(number)
            elif self._try_to_send(message):
                self._waiting.remove(number)
                self._place(number).unlink(missing_ok=True)
                shutil.rmtree(self._place(number).with_suffix(".file"), ignore_errors=True)
            elif isinstance(self.trouble, UnreachableError):
                return
            else:
                refused = self.trouble
        self.trouble = refused
        if not self._waiting:
            with suppress(OSError):  # what another process puts there meanwhile stays
                self.folder.rmdir()
            self._told.clear()
            say(f"MLflow has received all that was kept for it in '{self.folder}'")

    def _try_to_send(self, message: Message) -> bool:
        """Tries once. Where it fails: says why, if that is news, and sets the time of the next try."""
        started = time.monotonic()
        try:
            self._send(message)
        except UserError as error:
            ended = time.monotonic()
            self._pause = min(max(2 * self._pause, _FIRST_PAUSE), _LONGEST_PAUSE)
            self._next_try = ended + max(self._pause, _SHARE * (ended - started))
            self.trouble = error
            if str(error) not in self._told:
                self._told.add(str(error))
                say(f"{error}. The command goes on: messages for MLflow are kept in '{self.folder}'")
            return False
        self._pause, self.trouble = 0.0, None
        return True

    def _keep(self, message: Message) -> None:
        number = self._waiting[-1] + 1 if self._waiting else 1
        place = self._place(number)
        tree: dict[str, Any] = {"kind": message.kind, "values": message.values}
        try:
            if message.file is not None:
                tree["file"] = message.file.name
                with atomic_file(place.with_suffix(".file") / message.file.name) as copy:
                    shutil.copy(message.file, copy)
            write_text(place, json.dumps(tree))
        except OSError as error:
            raise UserError(f"{self.trouble}, nor can it be kept in '{self.folder}': {error.strerror}") from None
        self._waiting.append(number)

    def _read(self, number: int) -> Message | None:
        """None where another process has found it waiting and sent it."""
        place = self._place(number)
        try:
            tree = json.loads(place.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        file = place.with_suffix(".file") / tree["file"] if "file" in tree else None
        return Message(tree["kind"], tree["values"], file)

    def _place(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{number:08d}.json"


def list_waiting_runs(folder: Path) -> list[str]:
    """The runs whose messages wait in a folder."""
    return [each.name for each in sorted(folder.glob("*")) if any(each.glob("*.json"))]
