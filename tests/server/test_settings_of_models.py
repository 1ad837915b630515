"""Settings that stay with each model, and go for every model that is served if the command line gives them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import pytest

from mmoe_rec.jobs.serve import limits_of
from mmoe_rec.model.products import has_onednn
from mmoe_rec.server.app import Application
from mmoe_rec.server.models import Models, Source
from tests.inference.small_model import SmallModel
from tests.server.asking import ask, element


class Serving:
    """A server in this process, started with settings on the command line."""

    def __init__(self, small: SmallModel, overrides: Sequence[str]) -> None:
        self.source = Source(small.folder, "models:/small/1")
        self.limits = limits_of(small.folder, overrides)
        self.models = Models(self.limits)
        self.models.load(self.source)

    def ask(self, later: timedelta, candidates: int = 3) -> Any:
        """The reply to a request so much later than what the model knows."""
        assert self.models.current is not None
        moment = datetime.fromisoformat(self.models.current.ranker.about.tables_as_of) + later
        asked = element(context={"time": moment.isoformat()}, candidates={"item": [*range(candidates)]})
        return ask(Application(self.models, self.limits), {"inputs": [asked]})

    def is_stale(self, days: float) -> bool:
        """Whether replies say so."""
        (ranking,) = self.ask(timedelta(days=days)).tree["predictions"]
        return "they are stale" in " ".join(ranking["warnings"])

    def reload(self) -> None:
        """Loads the model again."""
        self.models.load(self.source)


@pytest.mark.parametrize(
    ("overrides", "stale"),
    [
        ([], [False, False, True, True]),
        (["--serving.stale_after_days", "0.5"], [False, True, True, True]),
        (["--serving.stale_after_days=100"], [False, False, False, True]),
        (["--serving.stale_after_days", "null"], [False, False, False, False]),
        (["--serving", "{stale_after_days: 0.5}"], [False, True, True, True]),
    ],
    ids=str,
)
def test_when_replies_say_that_counters_are_stale(small: SmallModel, overrides: list[str], stale: list[bool]) -> None:
    serving = Serving(small, overrides)
    for further in (lambda: None, serving.reload):
        further()
        assert [serving.is_stale(days) for days in (0.4, 0.6, 8, 200)] == stale


@pytest.mark.parametrize(
    ("overrides", "products"),
    [
        ([], "blas"),
        (["--serving.products", "onednn"], "onednn"),
        (["--serving.max_elements", "3"], "blas"),
    ],
    ids=str,
)
def test_what_multiplies(small: SmallModel, overrides: list[str], products: str) -> None:
    assert small.settings.serving.products == "blas"
    serving = Serving(small, overrides)
    for further in (lambda: None, serving.reload):
        further()
        assert serving.models.current is not None
        ranker = serving.models.current.ranker
        assert ranker.best_products() == products
        assert ranker.scorer.products == (products if has_onednn() else "blas")


def test_how_many_candidates_a_request_may_have(small: SmallModel) -> None:
    assert small.settings.serving.max_candidates == 50
    for overrides, most in (([], 50), (["--serving.max_candidates", "9"], 9)):
        serving = Serving(small, overrides)
        for further in (lambda: None, serving.reload):
            further()
            moment = timedelta(days=1)
            assert [serving.ask(moment, most + more).status for more in (0, 1)] == [200, 400]
