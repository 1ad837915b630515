"""`Ranker`: an artifact folder -> ranked candidates. It needs torch alone: no torchrec, torch.distributed or mlflow."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from mmoe_rec.errors import UserError

if TYPE_CHECKING:
    from mmoe_rec.inference.loaded import LoadedRanker


class Ranker:
    """Where a model comes from: `Ranker.load(folder).rank(user, context, candidates)`.

    Slow imports wait until a model is loaded.
    """

    @staticmethod
    def load(folder: str | Path) -> LoadedRanker:
        """Reads an artifact folder, and checks that it is as it was written.

        Raises UserError for one that is incomplete, changed or of another format, or that computes something else here.
        """
        from mmoe_rec.inference.loaded import LoadedRanker

        if re.match(r"(models|runs):/", str(folder)) and not Path(folder).exists():
            raise UserError(f"'{folder}' is an address of MLflow, and this takes folders: use mmoe_rec.Ranker.load")
        return LoadedRanker.read(Path(folder))
