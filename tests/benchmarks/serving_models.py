"""The models that the benchmark of serving has MLflow serve, and requests to try a server with."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq


def save_pyfunc(model: Path, target: Path, noop: bool) -> None:
    """Writes the MLflow model of an artifact, or the no-op one that replies as it does."""
    import mlflow

    from mmoe_rec.tracking.registry import describe_model

    with tempfile.TemporaryDirectory() as scratch:
        told = describe_model(model, Path(scratch))
        if noop:
            told |= {"python_model": "tests/benchmarks/noop_model.py", "code_paths": ["mmoe_rec", "tests"]}
        mlflow.pyfunc.save_model(path=target, **told)


def save_rechub(model: Path, target: Path, peers: Path) -> None:
    """Writes the MLflow model of torch-rechub's MMOE with the ids, and the experts, of an artifact."""
    import mlflow

    from mmoe_rec.features.vocabulary import VocabularyFeature
    from mmoe_rec.inference.ranker import Ranker
    from tests.benchmarks.peers.environment import peers_environment

    python = peers_environment(peers)
    words = [python, "-c", "import torch_rechub; print(torch_rechub.__path__[0])"]
    found = subprocess.run(words, check=True, capture_output=True, text=True)
    ranker = Ranker.load(model)
    features = {
        each.column: vocabulary
        for name, vocabulary in ranker.pipeline.vocabularies.items()
        if isinstance(each := vocabulary.feature, VocabularyFeature)
        and ranker.pipeline.schema.role_of(name) != "placement"
    }
    settings = ranker.about.model
    about = {
        "packages": str(Path(found.stdout.strip()).parent),
        "tasks": ranker.names,
        "ids": {column: each.ids.to_pylist() for column, each in features.items()},
        "dim": max(table.dim for table in ranker.layout.tables),  # which it wants to be the same for all
        "experts": settings["experts"]["count"],
        "units": settings["experts"]["units"],
        "towers": settings["towers"]["units"],
    }
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "about.json").write_text(json.dumps(about), encoding="utf-8")
        mlflow.pyfunc.save_model(
            path=target,
            python_model="tests/benchmarks/rechub_model.py",
            artifacts={"about": str(Path(scratch) / "about.json")},
            pip_requirements=[],
        )


class Bodies:
    """Requests drawn from the users and candidates that a model knows."""

    def __init__(self, model: Path) -> None:
        self._example = json.loads((model / "example_request.json").read_text(encoding="utf-8"))["inputs"][0]
        self._random = np.random.default_rng(0)
        latest = {role: pq.read_table(model / "features" / f"latest.{role}.parquet") for role in ("user", "candidate")}
        self._users, self._candidates = latest["user"], latest["candidate"]
        (self._user,), (self._candidate,) = self._example["user"], self._example["candidates"]

    def elements(self, count: int, elements: int) -> list[dict[str, Any]]:
        """Requests of so many candidates each, as JSON values."""
        return [self._element(count, []) for _ in range(elements)]

    def ids(self, count: int, elements: int = 1) -> bytes:
        """A call with such requests."""
        return self._body(self.elements(count, elements))

    def given(self, count: int) -> bytes:
        """One element whose candidates come with all of their columns."""
        return self._body([self._element(count, [n for n in self._candidates.column_names if n != self._candidate])])

    def _element(self, count: int, columns: list[str]) -> dict[str, Any]:
        user = self._users[self._user][int(self._random.integers(len(self._users)))].as_py()
        rows = self._candidates.take(self._random.integers(0, len(self._candidates), count))
        candidates = {name: rows[name].to_pylist() for name in (self._candidate, *columns)}
        return {"user": {self._user: user}, "context": self._example["context"], "candidates": candidates}

    @staticmethod
    def _body(elements: list[dict[str, Any]]) -> bytes:
        return json.dumps({"inputs": elements}).encode()
