"""The memory of a model is free once another one is served."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable

import pytest

from mmoe_rec.server.app import Application
from mmoe_rec.server.limits import Limits
from mmoe_rec.server.models import Models
from mmoe_rec.server.reloading import Source
from tests.processes import until
from tests.server.asking import ask, element
from tests.serving.small_model import SmallModel


def nothing(app: Application) -> None:
    """Asks nothing."""


def schema(app: Application) -> None:
    """Asks for the page that holds the model's example."""
    assert ask(app, b"", page="/openapi.json", method="GET").status == 200


def call(app: Application) -> None:
    """Asks for a ranking."""
    assert ask(app, {"inputs": [element()]}).status == 200


@pytest.mark.parametrize("asked", [nothing, schema, call])
def test_a_model_is_gone_once_another_one_is_served(small: SmallModel, asked: Callable[[Application], None]) -> None:
    models = Models(Limits())
    models.load(Source(small.folder, "models:/small/1"))
    app = Application(models, Limits())
    asked(app)
    assert models.current is not None
    before = weakref.ref(models.current.ranker)
    models.load(Source(small.folder, "models:/small/2"))

    def is_gone() -> bool:
        gc.collect()
        return before() is None

    until(is_gone)
    assert any(each.name == "ranking" for each in threading.enumerate())
    asked(app)
