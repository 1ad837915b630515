"""Multi-task ranking with a multi-gate mixture of experts, from Parquet logs to a served model.

    settings = mmoe_rec.load_settings("configs/complete_journey.yaml")
    features = mmoe_rec.build_features(settings)
    trained = mmoe_rec.train(settings)
    evaluated = mmoe_rec.evaluate(settings, trained.model_uri, "metrics")
    ranker = mmoe_rec.load_ranker(trained.model_uri)
    mmoe_rec.score(trained.model_uri, "data/complete_journey/log", "scores")

A function is imported at its first use, so `import mmoe_rec` is fast.

The import sets how OpenMP threads wait for each other, which must happen before torch is loaded. By default, waiting
threads spin (check again and again) for milliseconds. Training is then three times slower if other programs use the
machine. If threads sleep at once, training is a quarter slower on an idle machine. As a compromise, GNU OpenMP, which
torch includes, spins for microseconds here.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmoe_rec.evaluation.evaluate import evaluate_model as evaluate
    from mmoe_rec.inference.batch_scoring import score_log as score
    from mmoe_rec.inference.ranker import Ranker
    from mmoe_rec.preprocessing.prepare import build_features
    from mmoe_rec.settings.load import load_settings
    from mmoe_rec.tracking.registry import load_ranker
    from mmoe_rec.training.train import train_model as train

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

__all__ = ["Ranker", "__version__", "build_features", "evaluate", "load_ranker", "load_settings", "score", "train"]

_EXPORTS = {  # Public name -> the module of the function, and its name in this module.
    "Ranker": ("mmoe_rec.inference.ranker", "Ranker"),
    "build_features": ("mmoe_rec.preprocessing.prepare", "build_features"),
    "evaluate": ("mmoe_rec.evaluation.evaluate", "evaluate_model"),
    "load_ranker": ("mmoe_rec.tracking.registry", "load_ranker"),
    "load_settings": ("mmoe_rec.settings.load", "load_settings"),
    "score": ("mmoe_rec.inference.batch_scoring", "score_log"),
    "train": ("mmoe_rec.training.train", "train_model"),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("mmoe-rec")
    if name not in _EXPORTS:
        raise AttributeError(f"module 'mmoe_rec' has no attribute '{name}'")
    module, attribute = _EXPORTS[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
