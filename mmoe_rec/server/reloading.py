"""When another model is to be taken up: because the alias has moved, or because someone asked."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mmoe_rec.errors import UserError, one_line

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Where a model lies. address: permanent, of the registry or the folder's path; run_id: of the run that made it."""

    folder: Path
    address: str
    run_id: str | None = None


class Finder(Protocol):
    """Finds the model at the server's address. It can be sent to another process."""

    def state(self) -> str:
        """What changes whenever another model lies at the address, found at little cost. Raises UserError."""

    def find(self) -> Source:
        """The model that lies there now. Raises UserError."""


class NotFoundError(UserError):
    """No model was found at the address, or it could not be fetched: the next attempt may find one."""


class Reloads:
    """Finds the model at the address and takes it up, again and again, one attempt after the other.

    An attempt looks for a model only once the one before has ended, so that a slow download never puts an older model
    in the place of a newer one. One attempt is under way and at most one is to come, which all who ask meanwhile share.
    take_up: loads a model and serves it; raises UserError for one that can't be loaded.
    """

    def __init__(self, finder: Finder, take_up: Callable[[Source], None]) -> None:
        self._finder, self._take_up = finder, take_up
        self._lock = threading.Lock()
        self._coming: Future[None] | None = None
        self._is_running = False

    def ask(self) -> Future[None]:
        """An attempt that begins after this call; it ends once its model is served.

        Its error is NotFoundError where there is none, or another UserError where that can't be loaded.
        """
        with self._lock:
            if self._coming is None:
                if not self._is_running:
                    threading.Thread(target=self._run, name="reloads", daemon=True).start()
                    self._is_running = True
                self._coming = Future()
                self._coming.set_running_or_notify_cancel()  # so that nobody cancels it for the others
            return self._coming

    def _run(self) -> None:
        while (attempt := self._next()) is not None:
            try:
                self._reload()
            except Exception as error:
                attempt.set_exception(error)
            else:
                attempt.set_result(None)

    def _next(self) -> Future[None] | None:
        with self._lock:
            attempt, self._coming = self._coming, None
            self._is_running = attempt is not None
            return attempt

    def _reload(self) -> None:
        try:
            source = self._finder.find()
        except Exception as error:
            raise NotFoundError(sentence_of(error)) from error
        try:
            self._take_up(source)
        except Exception as error:
            _log.warning("the previous model goes on serving: %s", sentence_of(error))
            raise


def sentence_of(error: BaseException) -> str:
    """What is told of an error: a sentence that was written for people, or else its kind as well, in one line."""
    return str(error) if isinstance(error, UserError) else one_line(error)


class Watch:
    """Looks every few seconds whether another model lies at the address, and has it taken up.

    One that can't be loaded is not tried again until the address's state changes. seconds: between looks, 0 for none.
    """

    def __init__(self, finder: Finder, reloads: Reloads, seconds: float) -> None:
        self._finder, self._reloads, self._seconds = finder, reloads, seconds
        self._known: str | None = None
        self._told: str | None = None

    def start(self, known: str) -> None:
        """Looks from now on, in a thread of its own. known: the state before the model was found that is served now."""
        if self._seconds > 0:
            self._known = known
            threading.Thread(target=self._run, name="watch", daemon=True).start()

    def _run(self) -> None:
        while True:
            threading.Event().wait(self._seconds)
            self.look()

    def look(self) -> None:
        """Looks once."""
        try:
            state = self._finder.state()
            if state == self._known:
                self._told = None
                return
            found = self._reloads.ask().exception()
        except Exception as error:  # whatever it is, the next look may succeed, and nobody else would look
            found = NotFoundError(sentence_of(error))
        if isinstance(found, NotFoundError):
            if str(found) != self._told:
                _log.warning("can't look for another model: %s", found)
            self._told = str(found)
            return
        self._known, self._told = state, None  # an attempt that failed has been told of
