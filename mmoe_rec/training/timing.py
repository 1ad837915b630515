"""How long options take, beside each other."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

RUNS_AT_LEAST = 3
GIVE_UP = 3.0
"""An option that takes so many times as long as the fastest is not run again."""


def milliseconds(
    options: Mapping[str, Callable[[], object]], seconds: float, synchronise: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """What each option takes: the fastest of its runs, which come in turns, so that all meet the same machine.

    Each runs once before that, which is not counted: libraries prepare themselves at their first call. Turns begin
    until `seconds` have passed, but at least `RUNS_AT_LEAST` times.
    """

    def run(name: str) -> float:
        started = time.perf_counter()
        options[name]()
        synchronise()
        return time.perf_counter() - started

    found = dict.fromkeys(options, math.inf)
    for name in options:
        run(name)
    begun, turns = time.perf_counter(), 0
    while turns < RUNS_AT_LEAST or time.perf_counter() - begun < seconds:
        best = min(found.values(), default=0.0)
        for name in options:
            if turns == 0 or found[name] <= GIVE_UP * best:
                found[name] = min(found[name], run(name))
        turns += 1
    return {name: 1000 * shortest for name, shortest in found.items()}
