"""The model that is served, and how another one takes its place.

A new model is loaded and answers its own example beside the old one, which goes on serving until then, and from then on
only where a pass is under way. A model that can't be loaded changes nothing but `Models.failure`.
"""

from __future__ import annotations

import json
import re
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmoe_rec.errors import UserError, one_line
from mmoe_rec.inference.example import ExampleScores
from mmoe_rec.inference.ranking import Ranking
from mmoe_rec.inference.requests.envelope import ranked
from mmoe_rec.server.limits import Limits
from mmoe_rec.server.reloading import Source

if TYPE_CHECKING:
    from mmoe_rec.inference.loaded import LoadedRanker
    from mmoe_rec.live.learning import Learning

_REGISTERED = re.compile(r"models:/+([^/@]+)/(\d+)")


@dataclass(frozen=True, eq=False)
class Served:
    """A loaded model, ready to answer. example: a request that can be sent as it is; scores: what it answered it when
    it was loaded; learning: how it learns events, None without a journal."""

    ranker: LoadedRanker
    source: Source
    example: dict[str, Any]
    scores: ExampleScores
    learning: Learning | None = None

    def about(self) -> dict[str, str | None]:
        """Which model this is; name and version are those of the registry, where it comes from there, and artifact is
        the version that rankings carry."""
        found = _REGISTERED.match(self.source.address)
        about = self.ranker.about
        return {
            "model": found[1] if found else about.name,
            "version": found[2] if found else None,
            "address": self.source.address,
            "artifact": self.ranker.version,
            "run_id": self.source.run_id,
            "tables_as_of": about.tables_as_of,
            "exact_from": self.ranker.exact_from,
        }

    def tasks(self) -> list[dict[str, Any]]:
        """What the score is made of: each task's name, kind, objective and weight."""
        names = ("name", "kind", "objective", "score_weight")
        return [{name: getattr(task, name) for name in names} for task in self.ranker.about.tasks]


class Models:
    """The current model. failure: why the last other one did not take its place, None if it did.

    keeps_seen: whether rankings hold what features saw, for the log of requests; journal: address of the journal of
    events that models learn, None for none.
    """

    def __init__(self, limits: Limits, journal: str | None = None, keeps_seen: bool = False) -> None:
        self.limits, self.journal, self.keeps_seen = limits, journal, keeps_seen
        self.current: Served | None = None
        self.failure: str | None = None
        self._loading = threading.Lock()

    def load(self, source: Source) -> Served:
        """Loads a model and makes it the current one. Raises UserError for one that can't be loaded or can't answer."""
        with self._loading:
            try:
                served = self._loaded(source)
                if self.keeps_seen:
                    served.ranker.keep_seen()
                self._replace(served)
            except UserError as error:
                self.failure = str(error)
                raise
            self.failure = None
            return served

    def _replace(self, served: Served) -> None:
        """Serves a model once it has learnt all that the one before has, so that callers who saw events counted will
        still see that."""
        before = None if self.current is None else self.current.learning
        while served.learning is not None:
            served.learning.catch_up()
            if before is None:
                break
            with before.held():
                if served.learning.position >= before.position:
                    self.current = served
                    before.close()
                    return
        self.current = served

    def _loaded(self, source: Source) -> Served:
        from mmoe_rec.inference.ranker import Ranker

        try:
            ranker = Ranker.load(source.folder)
            ranker.take_settings(self.limits.instead)
            ranker.serve_faster()
            example = json.loads((source.folder / "example_request.json").read_text(encoding="utf-8"))
            scores = _answered(ranker, source, example)
            learning = None
            if self.journal is not None:
                from mmoe_rec.live.learning import Learning

                learning = Learning(ranker, self.journal, source.folder / "features")
                learning.catch_up()
                scores = _answered(ranker, source, example)  # which the events may have changed
        except UserError:
            raise
        except Exception as error:  # whatever it is, the model before goes on
            raise UserError(f"the model at '{source.address}' can't be loaded ({one_line(error)})") from error
        return Served(ranker, source, example, scores, learning)


def _answered(ranker: LoadedRanker, source: Source, example: dict[str, Any]) -> ExampleScores:
    """What a model gives for its example."""
    (answer,) = ranked(ranker, [example], {})
    if not isinstance(answer, Ranking):
        raise UserError(f"the model at '{source.address}' refuses its own example: {answer}")
    return ExampleScores.of(answer, ranker.about.tasks)
