"""What a call may cost, and the refusal of one that costs more or is wrong."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmoe_rec.settings.sections import Settings

MOST_CHARACTERS = 400
MEBIBYTE = 2**20
MOST_HEADER_BYTES = 64 * 2**10
OF_MODELS = ("max_candidates", "stale_after_days", "products")
"""Settings of section `serving` that each model has for itself, as another one may take its place."""
INVALID, INTERNAL = "INVALID_PARAMETER_VALUE", "INTERNAL_ERROR"  # as MLflow's server says


@dataclass(frozen=True)
class Limits:
    """Limits of a call; the settings of section `serving` say what each means.

    max_depth: of nested lists and objects, the outermost object is at depth 1; instead: of the settings that stay with
    each model (`OF_MODELS`), those that go for every model that is served instead of its own.
    """

    max_total_candidates: int = 100_000
    max_elements: int = 256
    max_events: int = 10_000
    max_body_mib: int = 8
    max_depth: int = 16
    max_waiting: int = 64
    read_seconds: float = 10
    answer_seconds: float = 30
    instead: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(settings: Settings, given: Collection[str] = ()) -> Limits:
        """The limits in settings.

        given: names of those that the command line gives, which alone go before those of models that are loaded later.
        """
        names = [each.name for each in fields(Limits) if each.name != "instead"]
        instead = {name: getattr(settings.serving, name) for name in OF_MODELS if name in given}
        return Limits(**{name: getattr(settings.serving, name) for name in names}, instead=instead)

    @property
    def max_body_bytes(self) -> int:
        """Size of the largest body."""
        return self.max_body_mib * MEBIBYTE


class Refused(Exception):  # noqa: N818 - an answer, as HTTP has it
    """A call that gets no rankings: an HTTP status and one sentence for the caller.

    reason: one of few words, for the metrics; retry_after: seconds after which the same call may succeed.
    """

    def __init__(
        self, status: int, sentence: str, reason: str, error_code: str = INVALID, retry_after: int | None = None
    ) -> None:
        super().__init__(sentence)
        self.status = status
        self.sentence = shortened(sentence)
        self.reason = reason
        self.error_code = error_code
        self.retry_after = retry_after

    def body(self) -> dict[str, str]:
        """The reply, in MLflow's form."""
        return {"error_code": self.error_code, "message": self.sentence}


class Places:
    """So many calls of a page are let in at a time as a worker takes (`max_waiting`); each page has its own."""

    def __init__(self, limits: Limits, calls: str, show: Callable[[int], object] = lambda taken: None) -> None:
        """calls: what they are, for people; show: is told whenever another number of places is taken."""
        self._limits, self._calls, self._show = limits, calls, show
        self.taken = 0

    @contextmanager
    def take(self) -> Iterator[None]:
        """A place for a call, from its headers on: its body takes memory long before it is answered. Raises Refused."""
        if self.taken >= self._limits.max_waiting:
            sentence = f"{self.taken} {self._calls} are under way, as many as this server takes at a time"
            hint = "(setting `serving.max_waiting`); come again"
            raise Refused(503, f"{sentence} {hint}", "busy", "RESOURCE_EXHAUSTED", 1)
        self.taken += 1
        self._show(self.taken)
        try:
            yield
        finally:
            self.taken -= 1
            self._show(self.taken)


def large_headers() -> Refused:
    """The refusal of a request with too many headers, or too long ones."""
    sentence = f"the request's headers have more than {MOST_HEADER_BYTES // 2**10} KiB"
    return Refused(431, sentence, "too_large", "REQUEST_TOO_LARGE")


def shortened(sentence: str) -> str:
    """A sentence of bounded length: it may quote a value or name of the caller's, which can be as long as the body."""
    return sentence if len(sentence) <= MOST_CHARACTERS else f"{sentence[: MOST_CHARACTERS - 3]}..."
