"""Looks up what requests ask of all counters and histories together."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from mmoe_rec.features.encoder import MemoryEncoder
from mmoe_rec.features.kinds.counter import CounterEncoder
from mmoe_rec.features.memories.live import Live
from mmoe_rec.log.request_rows import FewRows, RequestRows
from mmoe_rec.point_in_time.memory import Memory
from mmoe_rec.point_in_time.together import CountersTogether, TogetherIndex


class MemoriesTogether:
    """The memories of a pipeline's counters and histories, as they are now."""

    def __init__(self, encoders: Mapping[str, MemoryEncoder[Any]]) -> None:
        self._encoders = encoders
        self._memories: list[Memory] = [each.memory for each in encoders.values()]
        # Sums of fractions go by limbs, so such counters answer for themselves.
        self._counters = {
            name: each for name, each in encoders.items() if isinstance(each, CounterEncoder) and not each.has_fractions
        }
        self._index = TogetherIndex([memory.events for memory in self._memories])
        self._together = CountersTogether([each.memory for each in self._counters.values()])

    def are_current(self) -> bool:
        """Whether the encoders still have the memories that they had."""
        return all(each.memory is own for each, own in zip(self._encoders.values(), self._memories, strict=True))

    def look_up(self, rows: RequestRows, of_requests: Collection[str], live: Live | None = None) -> None:
        """Notes in rows the results of counters, and for histories where the rows' keys are, or results.

        of_requests: names of the encoders that ask once a request; live: what is known besides the memories. What the
        rows give themselves is not looked up.
        """
        asking: dict[str, FewRows] = {}
        for name, encoder in self._encoders.items():
            asked = rows.shared if name in of_requests else rows
            if not all(map(asked.has, encoder.precomputed())):
                asking[name] = asked
        self._index.find(
            [
                (self._encoders[name].memory.events, each.look_ups(self._encoders[name].by))
                for name, each in asking.items()
            ]
        )
        alone = {name for name in asking if live is not None and live.answers_alone(name)}
        together = asking.keys() - alone
        counters = [(encoder, asking[name]) for name, encoder in self._counters.items() if name in together]
        questions = [encoder.question(each.look_ups(encoder.by)) for encoder, each in counters]
        answers = self._together.answer(questions)
        if live is not None:
            live.add([encoder.name for encoder, _ in counters], questions, answers)
            for name in alone:
                encoder, asked = self._encoders[name], asking[name]
                asked.results |= encoder.results(live.memory(name), asked.look_ups(encoder.by))
        for (encoder, asked), found in zip(counters, answers, strict=True):
            asked.results |= encoder.answered(found)
