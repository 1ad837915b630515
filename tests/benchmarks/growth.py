"""python -m tests.benchmarks.growth MODEL 10

By how much a request's median time grows where ten times as many events are remembered, in one thread, without HTTP.
Both models answer the same requests in turns. The further events have keys of their own, as further users have.
"""

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmoe_rec.features.kinds.history import HistoryMemory
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.inference.reader import Request
from tests.benchmarks.serving_models import Bodies

TURNS = 200


def grow(ranker: Ranker, times: int) -> None:
    """Adds events to each memory, at the times of its own, until it has `times` as many."""
    random = np.random.default_rng(0)
    for encoder in ranker.pipeline.memory_encoders.values():
        memory: Any = encoder.memory
        more = (times - 1) * len(memory.events)
        keys = random.integers(0, 2**64, more, np.uint64)
        known = random.choice(memory.events.known, more)
        if isinstance(memory, HistoryMemory):
            encoder.memory = memory.extended(
                keys, known, *(random.choice(each, more) for each in (memory.items, *memory.attributes))
            )
        else:
            labels = None if memory.label_sum is None else random.integers(0, 2, more).astype(np.float64)
            encoder.memory = memory.extended(keys, known, labels)
    ranker.pipeline.live.groups.clear()  # which hold what they remembered


def main() -> None:
    """Prints the ratio."""
    torch.set_num_threads(1)
    model, times = Path(sys.argv[1]), int(sys.argv[2])
    few, many = Ranker.load(model), Ranker.load(model)
    grow(many, times)
    requests = [Request(**each) for each in Bodies(model).elements(500, 20)]
    taken: dict[str, list[float]] = {"few": [], "many": []}
    for turn in range(-20, TURNS):
        for name, ranker in (("few", few), ("many", many)):
            start = time.thread_time()
            ranker.rank_many([requests[turn % len(requests)]])
            if turn >= 0:
                taken[name].append(time.thread_time() - start)
    print(float(np.median(taken["many"]) / np.median(taken["few"])))


if __name__ == "__main__":
    main()
