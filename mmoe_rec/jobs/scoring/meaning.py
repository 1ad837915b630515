"""What the features of scored rows knew, in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmoe_rec.inference.artifact import iso_time
from mmoe_rec.inference.freshness import Freshness
from mmoe_rec.jobs.scoring.inputs import AsOf
from mmoe_rec.log.checks import format_time

if TYPE_CHECKING:
    from mmoe_rec.jobs.scoring.parts import PartScored


@dataclass(frozen=True)
class Meaning:
    """What is known before rows are scored.

    first: time of the log's first request, microseconds, None where tables are asked; events: names of the logs of
    events; tables_as_of, exact_from, freshness: of the model's tables, the first of which is None where it was trained
    on a log without times; lacking: columns that the model completes.
    """

    as_of: AsOf
    first: int | None
    events: Sequence[str]
    tables_as_of: str | None
    exact_from: int | None
    freshness: Freshness
    lacking: Sequence[str]

    def of(self, whole: PartScored) -> str:
        """Of all rows that were scored."""
        if self.tables_as_of is None:
            return "the model was trained on a plain table: its features know nothing but the row itself"
        if self.as_of == "log":
            assert self.first is not None
            events = "".join(f" and in events '{name}'" for name in self.events)
            return (
                "counters and histories know what was known before each request in the log that was given (its first "
                f"request: {format_time(self.first)}){events}, and nothing of the past besides"
            )
        sentence = f"counters and histories know what the model knew at {self.tables_as_of}"
        if exact := whole.early - whole.inexact:
            sentence += (
                f", and of it only what was known before each request for {exact:,} of {whole.rows:,} rows, which were "
                "requested earlier"
            )
        if whole.inexact:
            assert self.exact_from is not None
            sentence += (
                f"; {whole.inexact:,} of {whole.rows:,} rows were requested before {iso_time(self.exact_from)}, from "
                "when on they are exact, so their features know their future: to judge a model by them, score with "
                "--as-of log"
            )
        if self.freshness.is_stale(whole.last):
            sentence += (
                f"; the last row was requested at {format_time(whole.last)}, more than {self.freshness.days:g} days "
                "later, when these are stale (setting `serving.stale_after_days`)"
            )
        if self.lacking:
            names = ", ".join(map(repr, self.lacking))
            sentence += (
                f"; the input has no column {names}: of each user and candidate the model's latest value is taken"
            )
        return sentence
