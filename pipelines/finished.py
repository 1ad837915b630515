"""What a training leaves beside its checkpoints: what marks its run from the beginning, and what it gave at the end."""

from __future__ import annotations

import json
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmoe_rec.atomic import atomic_file
from mmoe_rec.settings import Settings

if TYPE_CHECKING:
    from mmoe_rec.training.validation import Validation

CHALLENGER = "challenger"  # alias of a model that is no better than the one it was started from


@dataclass(frozen=True)
class Trained:
    """A finished training: the artifact folder and the address in the registry.

    started_from: validation of the model that it was started from; promoted: whether it is better than that one;
    before: whether it was at its end before.
    """

    artifact: Path
    address: str
    best: Validation
    best_step: int
    rows_per_s: float
    waiting: float
    started_from: Validation | None = None
    promoted: bool = True
    before: bool = False


@dataclass(frozen=True)
class Finished:
    """What a training that came to its end gave, as a file, so that it is not gone on with."""

    best: dict[str, Any]
    best_step: int
    rows_per_s: float
    waiting: float
    alias: str
    started_from: dict[str, Any] | None = None

    @staticmethod
    def read(folder: Path) -> Finished | None:
        """None where the training has not come to its end."""
        try:
            return Finished(**json.loads((folder / "finished.json").read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None

    @staticmethod
    def forget(folder: Path) -> None:
        """A new training begins; what is left of one that came to its end is not gone on with."""
        if (folder / "finished.json").is_file():
            (folder / "latest.json").unlink(missing_ok=True)
            (folder / "finished.json").unlink()

    def write(self, folder: Path) -> None:
        """Writes the file."""
        with atomic_file(folder / "finished.json") as file:
            file.write_text(json.dumps(asdict(self)), encoding="utf-8")

    def trained(self, settings: Settings) -> Trained:
        """With the places of the model."""
        from mmoe_rec.training.validation import Validation

        address = f"models:/{settings.registered_model}@{self.alias}"
        best = Validation.from_dict(self.best)
        artifact = Path(settings.data.work) / "model"
        before = None if self.started_from is None else Validation.from_dict(self.started_from)
        promoted = self.alias != CHALLENGER
        return Trained(artifact, address, best, self.best_step, self.rows_per_s, self.waiting, before, promoted)


def training_key(folder: Path, new: bool) -> str:
    """What marks the run of a training, also before its first checkpoint; a killed one finds it again, unless `new`."""
    file = folder / "key.json"
    if new or not file.is_file():
        with atomic_file(file) as path:
            path.write_text(json.dumps({"key": uuid.uuid4().hex}), encoding="utf-8")
    key: str = json.loads(file.read_text(encoding="utf-8"))["key"]
    return key
