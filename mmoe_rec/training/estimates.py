"""torchrec's estimate of the time that parts of tables take, asked once for parts of one size.

It needs half a millisecond a part, and a table that is spread by rows has as many parts as there are ranks.
"""

from __future__ import annotations

import copy
from typing import Any

from torchrec.distributed.planner.types import Shard, ShardEstimator, ShardingOption


class OncePerSize(ShardEstimator):
    """Gives all parts of a table that have the same size the time of the first of them.

    estimator: whose estimate of a part depends on the table, the way it is spread and the part's size alone.
    """

    def __init__(self, estimator: ShardEstimator) -> None:
        self._estimator = estimator

    def estimate(self, sharding_options: list[ShardingOption], sharder_data_map: Any = None) -> None:
        """Sets `perf` of every part."""
        for option in sharding_options:
            shards = option.shards
            first: dict[tuple[int, ...], Shard] = {}
            for shard in shards:
                first.setdefault(tuple(shard.size), shard)
            option.shards = list(first.values())
            try:
                self._estimator.estimate([option], sharder_data_map)
            finally:
                option.shards = shards
            for shard in shards:
                shard.perf = copy.copy(first[tuple(shard.size)].perf)
