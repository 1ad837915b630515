"""The models that the benchmark of serving has MLflow serve."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path


def save_pyfunc(model: Path, target: Path, noop: bool) -> None:
    """Writes the MLflow model of an artifact, or the no-op one that replies as it does."""
    import mlflow

    from mmoe_rec.inference.mlflow_package import arguments

    with tempfile.TemporaryDirectory() as scratch:
        told = arguments(model, Path(scratch))
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
        each.column: owner
        for name, owner in ranker.pipeline.owners.items()
        if isinstance(each := owner.feature, VocabularyFeature) and ranker.pipeline.schema.role_of(name) != "placement"
    }
    settings = ranker.about.model
    about = {
        "packages": str(Path(found.stdout.strip()).parent),
        "tasks": ranker.names,
        "ids": {column: owner.vocabulary.ids.to_pylist() for column, owner in features.items()},
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
