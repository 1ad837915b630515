"""Second step of a feature build: in each partition of keys, what counters and histories knew at the time of each row.

A partition holds all events of its keys and all look-ups of them, so no partition needs another one. One that is too
large for memory, as a key may have most of a log's rows, is taken in chunks of time: the memory, compacted to what
later requests can ask for, is carried from one to the next.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmoe_rec.features.encoder import MemoryEncoder
from mmoe_rec.features.memories import read_memory, write_memory
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.point_in_time.join import Window, in_window
from mmoe_rec.point_in_time.lists import SharedRagged
from mmoe_rec.point_in_time.memory import Memory
from mmoe_rec.preprocessing.chunks import Received, chunks
from mmoe_rec.preprocessing.exchange import Exchange, key_range
from mmoe_rec.preprocessing.results import ResultExchange, take


@dataclass(frozen=True)
class LookUpJob:
    """What the tasks of this step share.

    state: folder of the fitted vocabularies; before: folder with the memories to go on from, or None; windows: of the
    splits; training: request times whose results make statistics, None where these are known; memories: folder that
    gets what requests at `end` or later can ask for; events, results: where events and look-ups come from, and where
    results go; rows_in_memory: of a partition at a time; scratch: folder for those of partitions that have more.
    """

    state: Path
    before: Path | None
    windows: Mapping[str, Window]
    training: Window | None
    memories: Path
    end: int
    events: Exchange
    results: ResultExchange
    rows_in_memory: int
    scratch: Path


@dataclass(frozen=True)
class Partition:
    """A group of counters and histories that ask by the same key, a partition of its keys, and the rows sent there."""

    group: str
    number: int
    rows: int


def look_up_partition(job: LookUpJob, partition: Partition) -> dict[str, dict[str, Any]]:
    """Makes a partition's look-ups and keeps its part of the memories; gives counts of each feature's results."""
    group = fitted(job.state).key_groups[partition.group]
    counting = FeaturePipeline(fitted(job.state).schema).memory_encoders
    memories: dict[str, Memory] = {encoder.name: _memory_before(job, encoder, partition) for encoder in group}
    received = Received(job.events, partition.number, group, (None, None), partition.rows)
    scratch = job.scratch / partition.group / f"{partition.number}"
    splits = list(job.windows.values())

    def held() -> int:
        return max((len(memory.events) for memory in memories.values()), default=0)

    for turn, chunk in enumerate(chunks(received, splits, job.rows_in_memory, scratch, held)):
        inside = None if job.training is None else np.flatnonzero(in_window(chunk.times, job.training))
        found: dict[str, np.ndarray | SharedRagged] = {}
        for encoder in group:
            memory = chunk.extended(encoder, memories.pop(encoder.name))
            results = encoder.results(memory, chunk.asked)
            if inside is not None and encoder.result_counts:
                counting[encoder.name].learn_results(take(results, inside))
            found |= results
            if chunk.until is not None:
                # No later than the next requests: labels may become known long after the last row.
                memories[encoder.name] = encoder.compacted(memory, min(chunk.until, job.end))
            else:
                write_memory(encoder.compacted(memory, job.end), job.memories, encoder.name, partition.number)
        if len(chunk.rows):
            job.results.send(partition.group, (partition.number, turn), chunk.rows, found)
    return {encoder.name: counting[encoder.name].result_counts for encoder in group}


def fitted(state: Path) -> FeaturePipeline:
    """The pipeline saved in a folder, without memories; kept for the next task of this process."""
    return _fitted(state, (state / "pipeline.json").stat().st_mtime_ns)


@lru_cache(maxsize=1)
def _fitted(state: Path, written: int) -> FeaturePipeline:
    return FeaturePipeline.load(state, memories=False)


def _memory_before(job: LookUpJob, encoder: MemoryEncoder[Any], partition: Partition) -> Memory:
    if job.before is None:
        return encoder.memory
    least, end = key_range(partition.number, job.events.receivers)
    inside = pc.field("key") >= pa.scalar(least, pa.uint64())
    if end < 2**64:
        inside &= pc.field("key") < pa.scalar(end, pa.uint64())
    return read_memory(encoder, job.before, inside)
