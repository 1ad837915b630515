"""The model that is served, and how another one takes its place.

A new model is loaded and answers its own example beside the old one, which goes on serving until then, and from then on
only where a pass is under way. A model that can't be loaded changes nothing but `Models.failure`.
"""

from __future__ import annotations

import json
import os
import re
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmoe_rec.errors import UserError
from mmoe_rec.server.limits import Limits
from mmoe_rec.server.reloading import Source
from mmoe_rec.serving.ranking import Ranking
from mmoe_rec.serving.requests.envelope import ranked

if TYPE_CHECKING:
    from mmoe_rec.serving.loaded import LoadedRanker

_REGISTERED = re.compile(r"models:/+([^/@]+)/(\d+)")


@dataclass(frozen=True, eq=False)
class Served:
    """A loaded model, ready to answer. example: a request that can be sent as it is."""

    ranker: LoadedRanker
    source: Source
    example: dict[str, Any]

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
        }

    def tasks(self) -> list[dict[str, Any]]:
        """What the score is made of: each task's name, kind, objective and weight."""
        names = ("name", "kind", "objective", "score_weight")
        return [{name: getattr(task, name) for name in names} for task in self.ranker.about.tasks]


class Models:
    """The current model. failure: why the last other one did not take its place, None if it did.

    shared: a folder of all workers, where the first of them notes what it multiplies by; None for a single one.
    """

    def __init__(self, limits: Limits, shared: Path | None = None) -> None:
        self.limits, self._shared = limits, shared
        self.current: Served | None = None
        self.failure: str | None = None
        self._loading = threading.Lock()

    def load(self, source: Source) -> Served:
        """Loads a model and makes it the current one. Raises UserError for one that can't be loaded or can't answer."""
        with self._loading:
            try:
                served = self._loaded(source)
            except UserError as error:
                self.failure = str(error)
                raise
            self.current, self.failure = served, None
            return served

    def _loaded(self, source: Source) -> Served:
        from mmoe_rec.serving.ranker import Ranker

        try:
            ranker = Ranker.load(source.folder)
            self._serve_faster(ranker)
            if self.limits.max_candidates is not None:
                ranker.reader.max_candidates = self.limits.max_candidates
            example = json.loads((source.folder / "example_request.json").read_text(encoding="utf-8"))
            (answer,) = ranked(ranker, [example], {})
        except UserError:
            raise
        except Exception as error:  # whatever it is, the model before goes on
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(f"the model at '{source.address}' can't be loaded ({reason})") from error
        if not isinstance(answer, Ranking):
            raise UserError(f"the model at '{source.address}' refuses its own example: {answer}")
        return Served(ranker, source, example)

    def _serve_faster(self, ranker: LoadedRanker) -> None:
        """Multiplies by what is faster here. Workers that measured otherwise would give other last bits of scores."""
        if self._shared is None or ranker.about.products != "auto":
            ranker.serve_faster()
            return
        note = self._shared / "products"
        if not note.exists():
            own = self._shared / f"products.{os.getpid()}"
            own.write_text(ranker.best_products(), encoding="utf-8")
            with suppress(FileExistsError):  # another worker was first
                os.link(own, note)
        ranker.scorer.multiply_by("onednn" if note.read_text(encoding="utf-8") == "onednn" else "blas")
