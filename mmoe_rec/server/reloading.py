"""When another model is to be taken up: because the alias has moved, or because someone asked."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mmoe_rec.errors import UserError

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


class Watch:
    """Looks every few seconds whether another model lies at the address, and has it taken up.

    take_up: loads a model; raises UserError for one that can't be loaded, which is not tried again until it changes.
    seconds: between looks, 0 for none at all.
    """

    def __init__(self, finder: Finder, take_up: Callable[[Source], None], seconds: float) -> None:
        self._finder, self._take_up, self._seconds = finder, take_up, seconds
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
                return
            source = self._finder.find()
        except UserError as error:
            if str(error) != self._told:
                _log.warning("can't look for another model: %s", error)
            self._told = str(error)
            return
        self._known, self._told = state, None
        try:
            self._take_up(source)
        except UserError as error:
            _log.warning("the model before goes on serving: %s", error)
