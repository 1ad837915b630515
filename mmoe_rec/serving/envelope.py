"""The outer shape of a request: its parts, not yet their columns."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError


class Envelope(BaseModel):
    """A user, a context and columns of candidates, with what to make of them; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", strict=True)

    user: dict[str, Any]
    context: dict[str, Any] = Field(default_factory=dict)
    candidates: dict[str, list[Any]]
    task_weights: dict[str, Any] | None = None
    top_k: int | None = None
    gate_top_k: int | None = None
    mask_experts: list[int] | None = None


def explain_envelope(error: ValidationError) -> str:
    """One sentence for the first problem."""
    problem = error.errors()[0]
    names = [str(part) for part in problem["loc"]]
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(names[0], Envelope.model_fields, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"valid are {', '.join(Envelope.model_fields)}"
        return f"a request has no key '{names[0]}'; {hint}"
    if problem["type"] == "missing":
        return f"a request needs the key '{names[0]}'"
    if len(names) > 1 and names[0] == "candidates":
        return f"column '{names[1]}' in 'candidates' must be a list with one value per candidate"
    wanted = {"user": "an object", "context": "an object", "candidates": "an object of lists", "top_k": "an integer"}
    wanted |= {"gate_top_k": "an integer", "mask_experts": "a list of integers"}
    return f"'{names[0]}' must be {wanted.get(names[0], 'an object of numbers')}"
