"""What is logged of a request: the rows that it becomes.

The columns of user, candidate, context and time have their names of the interaction log, as features saw them. What the
server adds has names that begin with `served_` (files of earlier versions lack some of them):

| column | type | meaning |
|---|---|---|
| `served_request` | int64 or string | the request's id: the caller's own, or the one that the reply holds |
| `served_at` | timestamp | when the reply was made, UTC |
| `served_rank` | int32 | place in the reply; 1 is best |
| `served_candidates` | int32 | candidates of the request, of which `top_k` may have left some out of the reply |
| `served_score` | float64 | the score |
| `served_predicted_NAME` | float32 | the prediction of each task and outcome |
| `served_weights` | string | the caller's `task_weights` as JSON, null where none were given |
| `served_digest_NAME` | int32 | a hash of what the model read of each feature, see `hash_features` |
| `served_model`, `served_version` | string | the model's name, and its version in the registry, null without one |
| `served_artifact` | string | the artifact's version, as in replies |
| `served_tables_as_of` | string | the time of the last logged request that the model's tables know, ISO 8601 |
| `served_journal_position` | string | up to where of the journal the model knew events, null without a journal |
| `served_share` | float64 | the share of all requests that were logged |
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
import pyarrow as pa

from mmoe_rec.errors import UserError
from mmoe_rec.features.layout import IdInput, Layout
from mmoe_rec.inference.ranking import RankedRequest, Ranking
from mmoe_rec.log.columns import UTC_MICROSECONDS, mix
from mmoe_rec.point_in_time.arrays import Ragged

REQUEST = "served_request"
AT = "served_at"
RANK = "served_rank"
CANDIDATES = "served_candidates"
SCORE = "served_score"
PREDICTED = "served_predicted_"
WEIGHTS = "served_weights"
DIGEST = "served_digest_"
MODEL = "served_model"
VERSION = "served_version"
ARTIFACT = "served_artifact"
TABLES_AS_OF = "served_tables_as_of"
JOURNAL_POSITION = "served_journal_position"
SHARE = "served_share"


@dataclass(frozen=True, eq=False)
class Record:
    """A reply to be logged. weights: the caller's `task_weights`; name, version: of the registered model, None where it
    is not known; share: of requests that are logged; served_at: microseconds since 1970 UTC."""

    reply: Ranking
    weights: Mapping[str, Any] | None
    name: str | None
    version: str | None
    share: float
    served_at: int

    def __len__(self) -> int:
        return len(self.reply.scores)

    @property
    def artifact(self) -> str:
        """The version of the artifact that ranked."""
        return self.reply.model["version"]

    def table(self) -> pa.Table:
        """A row for each candidate of the reply, best first; see the head of this file.

        Raises UserError where a column of the log has the name of one that is added.
        """
        reply, seen, count = self.reply, self.reply.seen, len(self)
        places = seen.first + np.array(reply.order, np.int64)
        inputs = seen.rows.schema.input_columns()
        columns = {name: seen.rows.taken(name, places) for name, role in inputs.items() if role != "placement"}
        weights = None if self.weights is None else json.dumps(self.weights, sort_keys=True)
        added = {
            REQUEST: pa.repeat(reply.request_id, count),
            AT: pa.repeat(pa.scalar(self.served_at, UTC_MICROSECONDS), count),
            RANK: pa.array(np.arange(1, count + 1, dtype=np.int32)),
            CANDIDATES: pa.repeat(pa.scalar(seen.end - seen.first, pa.int32()), count),
            SCORE: pa.array(reply.scores, pa.float64()),
        }
        for name, values in reply.predictions.items():
            added[f"{PREDICTED}{name}"] = pa.array(np.array(values, np.float32))
        added[WEIGHTS] = pa.repeat(pa.scalar(weights, pa.string()), count)
        for name, hashes in _hash_seen(seen, places).items():
            added[f"{DIGEST}{name}"] = pa.array(hashes)
        texts = {MODEL: self.name, VERSION: self.version, ARTIFACT: self.artifact}
        texts |= {TABLES_AS_OF: reply.tables_as_of, JOURNAL_POSITION: reply.journal_position}
        added |= {name: pa.repeat(pa.scalar(value, pa.string()), count) for name, value in texts.items()}
        added[SHARE] = pa.repeat(float(self.share), count)
        if both := columns.keys() & added.keys():
            raise UserError(f"column '{min(both)}' has a name that logged requests use for their own; rename it")
        return pa.table(columns | added)


def _hash_seen(seen: RankedRequest, places: np.ndarray) -> dict[str, np.ndarray]:
    """Feature -> (M,) int32 hashes of what the model read of the candidates at these (M,) rows of the pass."""
    shared, own = seen.inputs
    request = np.full(len(places), seen.number)

    def take(mine: Mapping[str, Any], spread: Mapping[str, Any]) -> dict[str, Any]:
        values = [*((name, each, places) for name, each in mine.items())]
        values += [(name, each, request) for name, each in spread.items()]
        return {name: each.take(at) if isinstance(each, Ragged) else each[at] for name, each, at in values}

    return hash_features(take(own.ids, shared.ids), take(own.dense, shared.dense), seen.layout)


def hash_features(
    ids: Mapping[str, np.ndarray | Ragged], dense: Mapping[str, np.ndarray], layout: Layout
) -> dict[str, np.ndarray]:
    """Feature -> (N,) int32 hashes of what a model reads of N rows, so that served and offline rows can be compared.

    Placement is left out, which is absent in serving. The hashes are computed from encoded inputs, ids as integers and
    numbers by the bits of their float32, so they agree exactly if every input does. A hash is multilinear (Lemire and
    Kaser 2014): the sum over inputs of value times a fixed odd number, modulo 2^64, then mixed.

    ids: name of an input -> (N,) integers, or `Ragged`; dense: name -> (N,) float32.
    """
    of_ids = [each for each in layout.ids if not each.placement]
    inputs = [*of_ids, *(each for each in layout.dense if not each.placement)]
    inputs.sort(key=attrgetter("feature"))
    columns = [_numbers(ids[each.name] if isinstance(each, IdInput) else dense[each.name]) for each in inputs]
    names, starts = np.unique([each.feature for each in inputs], return_index=True)
    factors = mix(np.arange(len(inputs), dtype=np.uint64)) | np.uint64(1)
    with np.errstate(over="ignore"):
        hashes = mix(np.add.reduceat((np.column_stack(columns) + np.uint64(1)) * factors, starts, axis=1))
    return dict(zip(names.tolist(), (hashes >> np.uint64(32)).astype(np.uint32).view(np.int32).T, strict=True))


def _numbers(values: np.ndarray | Ragged) -> np.ndarray:
    """(N,) uint64, one for each row."""
    if not isinstance(values, Ragged):
        if values.dtype == np.float32:
            return np.ascontiguousarray(values).view(np.uint32).astype(np.uint64)
        return values.astype(np.int64).view(np.uint64)
    ends = np.cumsum(values.lengths, dtype=np.int64)
    starts = ends - values.lengths
    within = np.arange(len(values.values)) - np.repeat(starts, values.lengths)
    with np.errstate(over="ignore"):
        each = mix(values.values.astype(np.int64).view(np.uint64) + mix(within.astype(np.uint64)))
        sums = np.append(np.uint64(0), np.cumsum(each, dtype=np.uint64))
        return mix(sums[ends] - sums[starts] + values.lengths.astype(np.uint64))
