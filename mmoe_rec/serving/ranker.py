"""`Ranker`: an artifact folder -> ranked candidates. It needs torch alone: no torchrec, torch.distributed or mlflow.

What takes long to import is imported when a model is loaded, see `mmoe_rec.serving.loaded`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from mmoe_rec.log.rows import LogRows
    from mmoe_rec.serving.loaded import LoadedRanker


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
        """The ranking as JSON values."""
        return asdict(self)


class Ranker(ABC):
    """A model with its features and calibration, as `load` gives it."""

    @staticmethod
    def load(folder: str | Path) -> LoadedRanker:
        """Reads an artifact folder. Raises UserError for one that is incomplete, damaged or of another format."""
        from mmoe_rec.serving.loaded import LoadedRanker

        return LoadedRanker.read(Path(folder))

    @abstractmethod
    def rank(
        self,
        user: Mapping[str, Any],
        context: Mapping[str, Any],
        candidates: Mapping[str, Any],
        task_weights: Mapping[str, Any] | None = None,
        top_k: int | None = None,
        gate_top_k: int | None = None,
        mask_experts: Sequence[int] | None = None,
    ) -> Ranking:
        """Ranks the candidates of one request.

        Args:
            user: column -> value; the user's id is required.
            context: column -> value; the request's time is now unless given.
            candidates: column -> list of N values; the candidates' ids are required.
            task_weights: task or objective -> weight, see `mmoe_rec.serving.weights`.
            top_k: give only this many best candidates.
            gate_top_k: experts a candidate and gate, instead of the model's own number.
            mask_experts: numbers of experts to score without.

        Raises:
            RequestError: naming the column or option that the caller has to change.
        """

    @abstractmethod
    def score(self, rows: LogRows | pa.Table, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Predictions (N, T) and log scores (N,) float64 of rows in canonical types (see `mmoe_rec.log.columns`).

        Predictions are float32, or float64 where a task is a regression.
        Counters and histories are as of `tables_as_of` for rows requested earlier, as of the row's request for later
        ones. weights: (T,) weights of the tasks in the score; None takes the settings' `score_weight`.
        """
