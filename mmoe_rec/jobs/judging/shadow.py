"""What two models would have answered to requests that a server has logged: no label is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec.errors import UserError
from mmoe_rec.log.files import find_files, open_file
from mmoe_rec.request_log import names

if TYPE_CHECKING:
    from mmoe_rec.inference.loaded import LoadedRanker

FIRST = 5  # rows of a list that are compared
MOST_ROWS = 200_000


def shadow(mine: LoadedRanker, its: LoadedRanker, source: str) -> dict[str, Any]:
    """Ranks logged requests with both, by what each knows now.

    source: the folder in which a server logs requests; of more than MOST_ROWS rows, the newest files.

    Returns:
        `requests`, `rows`; `compared`, those of the requests that have several candidates; of these, `same_first`, the
        share with the same best candidate, and `same_first_5`, the mean share of the first five that both have, of
        lists of more; both None where there are none; and under `predictions`, for each task of both, the mean `before`
        and `now`, and the 50th, 95th and 100th percentile of how far they are apart.

    Raises:
        UserError: there are no logged requests, or a column is missing that a model reads.
    """
    rows = _logged(source)
    request = rows[names.REQUEST].combine_chunks().dictionary_encode().indices.to_numpy()
    sides = [ranker.score_table(rows) for ranker in (mine, its)]
    scores = [side["score"].to_numpy() for side in sides]
    compared, same, shared = _agreement(request, *scores)
    predictions = {}
    for name in sides[0].column_names:
        if name.startswith("predicted_") and name in sides[1].column_names:
            now, before = (side[name].to_numpy().astype(np.float64) for side in sides)
            apart = np.abs(now - before)
            predictions[name.removeprefix("predicted_")] = {
                "before": float(before.mean()),
                "now": float(now.mean()),
                **{f"apart_{each}": float(np.percentile(apart, each)) for each in (50, 95, 100)},
            }
    return {
        "requests": int(request.max()) + 1,
        "rows": len(rows),
        "compared": compared,
        "same_first": same,
        f"same_first_{FIRST}": shared,
        "predictions": predictions,
    }


def told(found: dict[str, Any]) -> list[str]:
    """Sentences."""
    lines, shared = [], found[f"same_first_{FIRST}"]
    if found["same_first"] is not None:
        alone = found["requests"] - found["compared"]
        left_out = f" ({alone:,} more have one candidate)" if alone else ""
        lines.append(
            f"of {found['compared']:,} logged requests{left_out}, {found['same_first']:.1%} would have the same best "
            "candidate" + ("" if shared is None else f", and {shared:.1%} of the first {FIRST} are the same")
        )
    else:
        lines.append(f"all {found['requests']:,} logged requests have one candidate, so none is ranked")
    for task, each in found["predictions"].items():
        lines.append(
            f"{task}: {each['now']:.4g} on average, {each['before']:.4g} before; apart by {each['apart_50']:.2g} in "
            f"the median, {each['apart_95']:.2g} in 95%, {each['apart_100']:.2g} at most"
        )
    return lines


def _logged(source: str) -> pa.Table:
    tables: list[pa.Table] = []
    for file in reversed(find_files(source, "--shadow")):
        with open_file(file.address) as opened:
            table = pq.read_table(opened)
        if names.REQUEST not in table.column_names:
            raise UserError(f"'{file.address}' has no column '{names.REQUEST}': expected requests that a server logged")
        tables.append(table)
        if sum(map(len, tables)) >= MOST_ROWS:
            break
    rows = pa.concat_tables(reversed(tables), promote_options="permissive").combine_chunks()
    if not len(rows):
        raise UserError(f"'{source}' holds no logged request yet")
    return rows


def _agreement(request: np.ndarray, mine: np.ndarray, its: np.ndarray) -> tuple[int, float | None, float | None]:
    """How many requests have several rows; shares of these with the same first row, and of the first rows that both
    have, where there are more. Rows of equal scores are in a random order, as nothing tells which is first."""
    first, random = [], np.random.default_rng(0)
    for score in (mine, its):
        order = np.lexsort((random.random(len(score)), -score, request))
        place = np.arange(len(order)) - np.searchsorted(request[order], request[order])
        rank = np.empty(len(order), np.int64)
        rank[order] = place
        first.append(rank)
    rows = np.bincount(request)
    both = [rank < FIRST for rank in first]
    shared = (np.bincount(request, both[0] & both[1]) / FIRST)[rows > FIRST]
    same = np.bincount(request, (first[0] == 0) & (first[1] == 0))[rows > 1]
    return len(same), float(same.mean()) if len(same) else None, float(shared.mean()) if len(shared) else None
