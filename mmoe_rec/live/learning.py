"""What a served model has learnt of the journal, and how it learns what is new.

Its tables hold a part of the journal already, up to a position that the artifact names; of a journal that it does not
name, what is no later than its tables. The rest it learns in the journal's order, so that every worker, and a server
that starts again, comes to the same.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mmoe_rec.inference.ranker import Knowledge, Ranker
from mmoe_rec.live.event_rows import MOST_ROWS, RowChecks
from mmoe_rec.live.journal import ROWS_AT_A_TIME, Journal
from mmoe_rec.live.journal_rows import join_by_log
from mmoe_rec.log.rows import LogRows, require_all

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelUpdate:
    """What was read of the journal and is to be learnt. prepared: what the model can take; position: up to where;
    accepted_at: of the batches, microseconds; counts: rows by outcome."""

    prepared: Knowledge
    position: int
    accepted_at: list[int]
    counts: Mapping[str, int]


class Learning:
    """What one model learns. `read` and `take` alternate, in whatever thread. position: up to where the model knows the
    journal; gap: what it does not know of it and can't learn, as a sentence; checks: of rows that are to come.

    Raises UserError for an address that holds no journal.
    """

    def __init__(self, ranker: Ranker, address: str, most_rows: int = MOST_ROWS) -> None:
        """address: of the journal; most_rows: of a batch to come."""
        self.ranker, self.journal = ranker, Journal(address, create=False)
        self.schema = ranker.pipeline.schema
        require_all(self.schema, "a journal of events")
        self.checks = RowChecks(ranker.pipeline, most_rows)
        about = ranker.about.journal
        self._is_known = about is not None and about["id"] == self.journal.id
        if about is not None and not self._is_known:
            _log.warning(
                "the model's tables hold another journal than '%s': rows of this one that are no later than the tables "
                "(%s) are taken for known",
                self.journal.name,
                ranker.about.tables_as_of,
            )
        through = int(about["through"]) if about is not None and self._is_known else 0
        self.position = max(through, self.journal.removed())
        self.gap: str | None = None
        if through < self.position:
            self.gap = (
                f"the journal begins after position {self.position}, and the model's tables know it up to "
                f"{through} only: what was removed is in the logs' files, and mmoe-rec refresh --config FILE --model "
                "models:/NAME@ALIAS, without --journal, makes a version that knows it"
            )
            _log.warning("%s", self.gap)

    def catch_up(self) -> None:
        """Learns all that there is; for a model that nobody asks yet."""
        while (learnt := self.read()) is not None:
            self.take(learnt)

    def read(self, most_rows: int = ROWS_AT_A_TIME) -> ModelUpdate | None:
        """Reads what is new, and prepares what the model is to take; None where nothing is new.

        Raises UserError where the journal is damaged.
        """
        if not (batches := self.journal.read(self.position, most_rows)):
            return None
        counts, rows = Counter(duplicate=sum(batch.duplicates for batch in batches)), dict[str | None, LogRows]()
        for source, new in join_by_log(batches, self.schema).items():
            known = new.rows(self.schema)
            rows[source] = known if self._is_known else known.filter(known.times() > self.ranker.tables_known)
            counts.update(accepted=len(known), in_tables=len(known) - len(rows[source]))
        accepted_at = [batch.accepted_at for batch in batches]
        return ModelUpdate(self.ranker.prepare(rows), batches[-1].position, accepted_at, +counts)

    def count_known(self, times: np.ndarray) -> int:
        """How many rows of (N,) times, microseconds, the tables may hold, so that they are not learnt."""
        return 0 if self._is_known else int(np.sum(times <= self.ranker.tables_known))

    def take(self, learnt: ModelUpdate) -> None:
        """Has the model take what was prepared; no pass may be under way."""
        self.ranker.take(learnt.prepared)
        self.position = learnt.position
