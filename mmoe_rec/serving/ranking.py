"""The answer to a request."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Ranking:
    """Candidates, best first. Equal scores keep the request's order.

    candidates: ids; scores: exp(sum of weight x log prediction); predictions: name -> values, as `with_outcomes` gives;
    order: positions of the candidates in the request; request_time and tables_as_of: ISO times of the request and of
    the last logged request that the model's tables know; warnings: what went wrong with experts, see
    `mmoe_rec.serving.experts`.
    """

    candidates: list[int] | list[str]
    scores: list[float]
    predictions: dict[str, list[float]]
    order: list[int]
    request_time: str
    tables_as_of: str
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The ranking as JSON values, whose lists are its own."""
        return {each.name: getattr(self, each.name) for each in fields(self)}
