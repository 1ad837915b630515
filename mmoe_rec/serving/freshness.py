"""Whether a request's time fits what counters and histories know, as a sentence for the reply's warnings."""

from __future__ import annotations

from dataclasses import dataclass

from mmoe_rec.log.rows import MICROSECONDS_PER_DAY
from mmoe_rec.serving.artifact import Artifact, iso_time
from mmoe_rec.serving.requests.values import microseconds


@dataclass(frozen=True)
class Freshness:
    """known: microseconds of the last logged request that counters and histories know; days: how much later a request
    may lie before they are stale, None is any time."""

    known: int
    days: float | None

    @staticmethod
    def of(about: Artifact) -> Freshness:
        """What an artifact says."""
        return Freshness(microseconds("tables_as_of", about.tables_as_of), about.stale_after_days)

    def is_stale(self, time: int) -> bool:
        """Whether a request at this time (microseconds) is so much later."""
        return self.days is not None and time > self.known + self.days * MICROSECONDS_PER_DAY

    def warnings(self, time: int) -> list[str]:
        """At most one sentence about a request at this time (microseconds) that reads counters or histories."""
        about = f"the request's time {iso_time(time)} is"
        if time <= self.known:
            return [
                f"{about} no later than {iso_time(self.known)}, up to which counters and histories count what "
                "happened: they know its future, and predictions look better than they are"
            ]
        if self.is_stale(time):
            return [
                f"{about} more than {self.days:g} days after {iso_time(self.known)}, up to which counters and "
                "histories count what happened: they are stale (setting `serving.stale_after_days`)"
            ]
        return []
