"""Whether a request's time fits what counters and histories know, as a sentence for the reply's warnings."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from mmoe_rec.inference.artifact import Artifact, iso_time
from mmoe_rec.log.given import microseconds
from mmoe_rec.log.rows import MICROSECONDS_PER_DAY


@dataclass(frozen=True)
class Freshness:
    """known: microseconds of the last request up to which counters and histories know what happened; days: how much
    later a request may lie before they are stale, None is any time."""

    known: int
    days: float | None

    @staticmethod
    def of(about: Artifact) -> Freshness:
        """What an artifact says."""
        if about.tables_as_of is None:
            return Freshness(0, None)
        return Freshness(microseconds("tables_as_of", about.tables_as_of), about.stale_after_days)

    def up_to(self, moment: int) -> Freshness:
        """The same where what happened up to a moment (microseconds) has become known besides."""
        return self if moment <= self.known else replace(self, known=moment)

    def is_stale(self, time: int) -> bool:
        """Whether a request at this time (microseconds) is so much later."""
        return self.days is not None and time > self.known + self.days * MICROSECONDS_PER_DAY

    def warnings(self, time: int, floors: Iterable[int | None]) -> list[str]:
        """At most one sentence about a request at this time (microseconds).

        floors: of the memories that it reads, each the moment from which on it is exact, None for any.
        """
        read = list(floors)
        exact = latest(read)
        if exact is not None and time < exact:
            return [
                f"the request's time {iso_time(time)} is before {iso_time(exact)}, from when on counters and histories "
                "are exact: they are answered as of then, so they know its future, and predictions look better than "
                "they are"
            ]
        if read and self.is_stale(time):
            return [
                f"the request's time {iso_time(time)} is more than {self.days:g} days after {iso_time(self.known)}, up "
                "to which counters and histories count what happened: they are stale (setting "
                "`serving.stale_after_days`)"
            ]
        return []


def latest(floors: Iterable[int | None]) -> int | None:
    """The latest moment from which on memories are exact, None for any moment."""
    return max((each for each in floors if each is not None), default=None)
