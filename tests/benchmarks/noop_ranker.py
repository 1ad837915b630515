"""A ranker that does nothing: replies of the same size as a model's, of which no number is computed.

It shows what a server costs by itself. As a script it serves such a ranker by our own server:

    python -m tests.benchmarks.noop_ranker PORT ARTIFACT
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mmoe_rec.errors import RequestError
from mmoe_rec.inference.artifact import read_artifact
from mmoe_rec.inference.ranking import Ranking
from mmoe_rec.inference.reader import Request


class NoopRanker:
    """Gives back the candidates in the order in which they came, with the same numbers for all.

    names: of the predictions in a reply.
    """

    exact_from = None

    def __init__(self, names: Sequence[str], key: str, tables_as_of: str) -> None:
        self.names, self.key, self.tables_as_of = tuple(names), key, tables_as_of

    @staticmethod
    def like(artifact: Path) -> NoopRanker:
        """Replies as the model of an artifact does."""
        about = read_artifact(artifact)
        example = json.loads((artifact / "example_request.json").read_text(encoding="utf-8"))["inputs"][0]
        names = [*(task.name for task in about.tasks), *about.layout.outcomes]
        return NoopRanker(names, next(iter(example["candidates"])), about.tables_as_of)

    def rank_many(self, requests: Sequence[Request | RequestError]) -> list[Any]:
        """One answer a request."""
        return [self._answer(each.candidates[self.key]) if isinstance(each, Request) else each for each in requests]

    def _answer(self, ids: Any) -> Ranking:
        numbers = [0.12345678901234567] * len(ids)
        predictions = dict.fromkeys(self.names, numbers)
        order = list(range(len(ids)))
        return Ranking(list(ids), numbers, numbers, predictions, order, self.tables_as_of, self.tables_as_of)


def main() -> None:
    """Serves at a port until SIGTERM."""
    from mmoe_rec.inference.artifact import Source
    from mmoe_rec.server.app import Application
    from mmoe_rec.server.models import Models, ServedModel
    from mmoe_rec.server.options import Options, listening_socket
    from mmoe_rec.server.running import Server
    from mmoe_rec.settings.load import load_settings

    port, folder = int(sys.argv[1]), Path(sys.argv[2])
    ranker: Any = NoopRanker.like(folder)
    ranker.about = SimpleNamespace(name="noop", tables_as_of=ranker.tables_as_of)
    example = json.loads((folder / "example_request.json").read_text(encoding="utf-8"))["inputs"][0]
    served = ServedModel(ranker, Source(folder, "noop", None), example)

    class Noop(Models):
        def open(self, source: Source) -> ServedModel:
            return served

    models = Noop(Options(load_settings(folder / "settings.yaml").serving), served.source)
    server = Server(Application(models))
    server.serve_on(listening_socket("127.0.0.1", port), lambda: None)


if __name__ == "__main__":
    main()
