"""`Ranker`: an artifact folder -> ranked candidates. It needs torch alone: no torchrec, torch.distributed or mlflow."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmoe_rec.serving.loaded import LoadedRanker


class Ranker:
    """Where a model comes from: `Ranker.load(folder).rank(user, context, candidates)`.

    Slow imports wait until a model is loaded.
    """

    @staticmethod
    def load(folder: str | Path) -> LoadedRanker:
        """Reads an artifact folder. Raises UserError for one that is incomplete, damaged or of another format."""
        from mmoe_rec.serving.loaded import LoadedRanker

        return LoadedRanker.read(Path(folder))
