"""The model that is served, when another one is to take its place, and how it does.

A new model is loaded and answers its own example beside the old one, which goes on serving until then, and from then on
only where a pass is under way. A model that can't be loaded changes nothing but `Models.failure`.
"""

import logging
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from mmoe_rec.errors import RequestError, UserError, one_line
from mmoe_rec.inference.artifact import Source, read_example
from mmoe_rec.server.options import Options

if TYPE_CHECKING:
    from mmoe_rec.inference.ranker import Ranker
    from mmoe_rec.live.learning import Learning

_REGISTERED = re.compile(r"models:/+([^/@]+)/(\d+)")

_log = logging.getLogger(__name__)


class Finder(Protocol):
    """Finds the model at the server's address. It can be sent to another process."""

    def state(self) -> str | None:
        """What changes whenever another model lies at the address, found at little cost. None if that can't be told
        without fetching the model. Raises UserError."""

    def find(self) -> Source:
        """The model that lies there now. Raises UserError."""


class NotFoundError(UserError):
    """No model was found at the address, or it could not be fetched: the next attempt may find one."""


@dataclass(frozen=True, eq=False)
class ServedModel:
    """A loaded model, ready to answer. example: a request that can be sent as it is; learning: how it learns events,
    None without a journal."""

    ranker: "Ranker"
    source: Source
    example: dict[str, Any]
    learning: "Learning | None" = None

    def about(self) -> dict[str, str | None]:
        """What tells this model from others; name and version are those of the registry, where it comes from there, and
        artifact is the version that rankings carry."""
        registered = _REGISTERED.match(self.source.address)
        about = self.ranker.about
        return {
            "model": registered[1] if registered else about.name,
            "version": registered[2] if registered else None,
            "address": self.source.address,
            "artifact": self.ranker.version,
            "run_id": self.source.run_id,
            "tables_as_of": about.tables_as_of,
            "products": self.ranker.scorer.products,
        }


class Models:
    """The current model. failure: why a newer model does not take its place, None if there is none."""

    def __init__(self, options: Options, first: Source | ServedModel) -> None:
        """Opens the first model, unless it is open. Raises UserError as `open` does."""
        self.options = options
        self.failure: str | None = None
        self.current = self.open(first) if isinstance(first, Source) else first

    def exchange(self, served: ServedModel) -> None:
        """Serve a model that was opened, once it has learnt all that the one before has, so that callers who saw events
        counted will still see that."""
        before, learning = self.current.learning, served.learning
        if before is None or learning is None:
            self.current = served
            return
        while self.current is not served:
            learning.catch_up()
            with before.pause():
                if learning.position >= before.position:
                    self.current = served
                    before.close()

    def open(self, source: Source) -> ServedModel:
        """Load a model; the current one goes on. Raises UserError for one that can't be loaded or can't answer."""
        from mmoe_rec.inference.ranker import Ranker

        try:
            ranker = Ranker.load(source.folder)
            ranker.take_settings(self.options.instead)
            ranker.use_products()
            ranker.keeps_seen = self.options.log is not None
            example = read_example(source.folder)
            learning = None
            if self.options.journal is not None:
                from mmoe_rec.live.learning import Learning

                most_rows = self.options.limits.max_events
                learning = Learning(ranker, self.options.journal, most_rows)
                learning.catch_up()
            ranker.rank(**example)
        except RequestError as error:
            raise UserError(f"the model at '{source.address}' refuses its own example: {error}") from None
        except UserError:
            raise
        except Exception as error:  # whatever it is, the model before goes on
            raise UserError(f"the model at '{source.address}' can't be loaded ({one_line(error)})") from error
        return ServedModel(ranker, source, example, learning)


def sentence_of(error: BaseException) -> str:
    """A sentence that was written for people, or else an error's kind and text in one line."""
    return str(error) if isinstance(error, UserError) else one_line(error)


class Reloads:
    """Finds the model at the address and takes it up, again and again, one attempt after the other.

    An attempt looks for a model only once the one before has ended, so that a slow download never puts an older model
    in the place of a newer one. take_up: loads a model and serves it; raises UserError for one that can't be loaded.
    """

    def __init__(self, finder: Finder, take_up: Callable[[Source], None]) -> None:
        self._finder, self._take_up = finder, take_up
        self._lock = threading.Lock()
        self._next: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, "reloads")
        self._state: str | None = None
        self._served_state: str | None = None  # of the finder, before it found the model that is served
        self._reported: str | None = None

    def ask(self) -> Future[None]:
        """The next attempt, which all share who ask before it begins; it ends once its model is served.

        Its error is NotFoundError where there is none, or another UserError where that can't be loaded. Nobody may
        cancel it.
        """
        with self._lock:
            if self._next is None:
                self._next = self._thread.submit(self._reload)
            return self._next

    def _reload(self) -> None:
        with self._lock:
            self._next = None
        try:
            if (state := self._finder.state()) is not None and state == self._served_state:
                return
            source = self._finder.find()
        except Exception as error:
            raise NotFoundError(sentence_of(error)) from error
        self._served_state = None  # A failure is on record until a model is loaded.
        try:
            self._take_up(source)
        except Exception as error:
            _log.warning("the previous model goes on serving: %s", sentence_of(error))
            raise
        self._served_state = state

    def watch(self, state: str | None, seconds: float) -> None:
        """Looks every so many seconds from now on, in a thread of its own; 0: never. state: before the model was found
        that is served now."""
        self._state = self._served_state = state

        def look() -> None:
            while True:
                time.sleep(seconds)
                self.look()

        if seconds > 0:
            threading.Thread(target=look, name="watch", daemon=True).start()

    def look(self) -> None:
        """Takes up the model at the address if it is another one. One that can't be loaded is not tried again until the
        address's state changes."""
        try:
            state = self._finder.state()
            error = None if state == self._state else self.ask().exception()
        except Exception as problem:  # whatever it is, the next look may succeed, and nobody else would look
            error = NotFoundError(sentence_of(problem))
        if not isinstance(error, NotFoundError):
            self._state, self._reported = state, None  # an attempt that failed has been reported
        elif str(error) != self._reported:
            self._reported = str(error)
            _log.warning("can't look for another model: %s", error)
