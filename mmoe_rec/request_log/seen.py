"""What features saw of a request, held until it is logged; and the rows of the log that it becomes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from mmoe_rec.errors import UserError
from mmoe_rec.features.encoder import Inputs
from mmoe_rec.features.layout import Layout
from mmoe_rec.log.columns import UTC_MICROSECONDS
from mmoe_rec.log.request_rows import RequestRows
from mmoe_rec.point_in_time.lists import Ragged
from mmoe_rec.request_log import names
from mmoe_rec.request_log.digest import digests


@dataclass(frozen=True, eq=False)
class Seen:
    """A request of a pass.

    rows: of the whole pass; inputs: of its R requests, and of its N candidates, as `request_inputs` gives them; layout:
    of the model; integer_ids: whether ids of requests are integers in the log; number: of the request; first, end: its
    rows.
    """

    rows: RequestRows
    inputs: tuple[Inputs, Inputs]
    layout: Layout
    integer_ids: bool
    number: int
    first: int
    end: int

    @property
    def user(self) -> int | str:
        """The user's id."""
        return self.rows.shared.column(self.rows.schema.columns.user)[self.number].as_py()

    @property
    def request(self) -> int | str | None:
        """The request's id, where the caller gave one."""
        name = self.rows.schema.columns.request
        if name is None or not self.rows.shared.has(name):
            return None
        return self.rows.shared.column(name)[self.number].as_py()

    def digests(self, places: np.ndarray) -> dict[str, np.ndarray]:
        """Feature -> (M,) int32 hashes of what the model read of the candidates at these (M,) rows of the pass."""
        shared, own = self.inputs
        request = np.full(len(places), self.number)

        def values(mine: Mapping[str, Any], spread: Mapping[str, Any]) -> dict[str, Any]:
            found = [*((name, each, places) for name, each in mine.items())]
            found += [(name, each, request) for name, each in spread.items()]
            return {name: each.take(at) if isinstance(each, Ragged) else each[at] for name, each, at in found}

        return digests(values(own.ids, shared.ids), values(own.dense, shared.dense), self.layout)


class Reply(Protocol):
    """What is logged of a reply: see `mmoe_rec.inference.ranking.Ranking`."""

    @property
    def scores(self) -> list[float]:
        """The candidates' scores, best first."""

    @property
    def order(self) -> list[int]:
        """Their positions in the request."""

    @property
    def predictions(self) -> dict[str, list[float]]:
        """Name -> values."""


@dataclass(frozen=True, eq=False)
class Record:
    """A reply to be logged. weights: the caller's `task_weights`; served_at: microseconds since 1970 UTC; about: column
    -> its value in all rows, such as the model's name."""

    reply: Reply
    seen: Seen
    request: int | str
    weights: Mapping[str, Any] | None
    served_at: int
    about: Mapping[str, str | float | None]

    def __len__(self) -> int:
        return len(self.reply.scores)

    def table(self) -> pa.Table:
        """A row for each candidate of the reply, best first; see `mmoe_rec.request_log.names`.

        Raises UserError where a column of the log has the name of one that is added.
        """
        reply, seen, count = self.reply, self.seen, len(self)
        places = seen.first + np.array(reply.order, np.int64)
        inputs = seen.rows.schema.input_columns()
        columns = {name: seen.rows.taken(name, places) for name, role in inputs.items() if role != "placement"}
        weights = None if self.weights is None else json.dumps(self.weights, sort_keys=True)
        added = {
            names.REQUEST: pa.repeat(self.request, count),
            names.AT: pa.repeat(pa.scalar(self.served_at, UTC_MICROSECONDS), count),
            names.RANK: pa.array(np.arange(1, count + 1, dtype=np.int32)),
            names.CANDIDATES: pa.repeat(pa.scalar(seen.end - seen.first, pa.int32()), count),
            names.SCORE: pa.array(reply.scores, pa.float64()),
        }
        for name, values in reply.predictions.items():
            added[f"{names.PREDICTED}{name}"] = pa.array(np.array(values, np.float32))
        added[names.WEIGHTS] = pa.repeat(pa.scalar(weights, pa.string()), count)
        for name, hashes in seen.digests(places).items():
            added[f"{names.DIGEST}{name}"] = pa.array(hashes)
        for name, value in self.about.items():
            kind = pa.float64() if isinstance(value, float) else pa.string()
            added[name] = pa.repeat(pa.scalar(value, kind), count)
        if both := columns.keys() & added.keys():
            raise UserError(f"column '{min(both)}' has a name that logged requests use for their own; rename it")
        return pa.table(columns | added)
