"""A model in int8: an artifact folder like any other; and how near another form of a model is to the model itself.

Tables stay int8 in memory; matrices are computed with in float32.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow.parquet as pq

from mmoe_rec.errors import UserError
from mmoe_rec.inference.artifact import read_manifest, read_stored
from mmoe_rec.inference.example import EXAMPLE
from mmoe_rec.inference.ranking import Ranking
from mmoe_rec.inference.writing import seal, write_tensors

if TYPE_CHECKING:
    from mmoe_rec.inference.ranker import Ranker

WEIGHTS = "weights.safetensors"
Dense = Literal["bfloat16", "int8", "float32"]
"""How the matrices of the dense part are stored."""
REQUESTS, CANDIDATES, BEST = 50, 200, 10
Answers = Mapping[str, np.ndarray]
"""Of one request's N candidates, in its order: name of a prediction, or `score` -> (N,) float64."""


def write_int8(folder: Path, made: Path, dense: Dense) -> None:
    """Writes the artifact of a folder in int8 to an empty folder.

    Biases stay as they are, and so do gates, which choose experts: rounded ones may choose others.

    Raises UserError for a folder that is not as it was written, whose weights are in int8 already, or not finite.
    """
    from mmoe_rec.model.int8 import SCALES, quantised, some_in_int8

    stored, smaller = read_stored(folder / WEIGHTS), {}
    if some_in_int8(stored):
        raise UserError(f"the model in '{folder}' is in int8 already: name the model that it was made of")
    for name, weight in stored.items():
        if not weight.isfinite().all():
            raise UserError(f"weight '{name}' holds NaN or infinity, which int8 can't hold: train the model again")
        matrix = name.endswith(".weight") and ".gates." not in name
        if name.startswith("tables.") or (matrix and dense == "int8"):
            smaller[name], smaller[name + SCALES] = quantised(weight)
        else:
            smaller[name] = weight.bfloat16() if matrix and dense == "bfloat16" else weight
    for name in read_manifest(folder):
        if name != WEIGHTS:
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, made / name)
    write_tensors(smaller, made / WEIGHTS)
    seal(made)


def draw_requests(folder: Path, ranker: Ranker, requests: int = REQUESTS) -> Iterator[dict[str, Any]]:
    """Arguments of `Ranker.rank`: users and candidates that the model knows, in the context of its folder's example.

    The same ones at every call. Of a model that knows no users or candidates only the example.
    """
    random = np.random.default_rng(0)
    example = json.loads((folder / EXAMPLE).read_text(encoding="utf-8"))
    names = ranker.pipeline.schema.columns
    users, candidates = (
        pq.read_table(folder / "features" / f"latest.{role}.parquet", columns=[key]).column(key).combine_chunks()
        for role, key in (("user", names.user), ("candidate", names.candidate))
    )
    if not len(users) or not len(candidates):  # a plain table's, which knows no ids
        yield example
        return
    for _ in range(requests):
        user = users[int(random.integers(len(users)))].as_py()
        count = min(CANDIDATES, len(candidates), ranker.about.max_candidates)
        shown = candidates.take(random.choice(len(candidates), count, replace=False)).to_pylist()
        yield example | {"user": {names.user: user}, "candidates": {names.candidate: shown}}


def answers_of(ranking: Ranking) -> Answers:
    """From a ranking of all candidates."""
    back = np.argsort(ranking.order)
    values = {**ranking.predictions, "score": ranking.scores}
    return {name: np.array(each, np.float64)[back] for name, each in values.items()}


def agreement(pairs: Sequence[tuple[Answers, Answers]]) -> dict[str, Any]:
    """How near two forms are to each other, of R requests with up to N candidates each.

    Returns:
        `requests`, `candidates`; `max_difference` of predictions, by task or outcome; `top_10_shared`, the mean share
        of the 10 best of the first form that are among those of the other.
    """
    best = [[set(np.argsort(-each["score"], kind="stable")[:BEST].tolist()) for each in pair] for pair in pairs]
    return {
        "requests": len(pairs),
        "candidates": max(len(one["score"]) for one, _ in pairs),
        "max_difference": {
            name: max(float(np.abs(one[name] - other[name]).max()) for one, other in pairs)
            for name in pairs[0][0]
            if name != "score"
        },
        "top_10_shared": float(np.mean([len(one & other) / len(one) for one, other in best])),
    }
