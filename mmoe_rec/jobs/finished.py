"""What a training leaves beside its checkpoints: the key of its run from the beginning, and its result at the end."""

from __future__ import annotations

import hashlib
import json
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmoe_rec.atomic import atomic_file
from mmoe_rec.errors import UserError
from mmoe_rec.settings.sections import Settings
from mmoe_rec.training.origin import Origin

if TYPE_CHECKING:
    from mmoe_rec.training.validation import Validation

CHALLENGER = "challenger"  # alias of a model that is no better than the one that holds the alias
FORMAT = 2


@dataclass(frozen=True)
class Trained:
    """A finished training: the artifact folder and the address in the registry.

    compared: sentences on how it did beside the model that held the alias, and on who holds it now; started_from:
    validation of the model that it was started from; before: whether it had already ended.
    """

    artifact: Path
    address: str
    best: Validation
    best_step: int
    rows_per_s: float
    waiting: float
    compared: tuple[str, ...] = ()
    started_from: Validation | None = None
    before: bool = False


@dataclass(frozen=True)
class Finished:
    """The result of a training that has ended, as a file; such a training is not resumed.

    origin: what it was begun with, its settings with those of `result_settings`; weights: checksum of the model's; the
    rest as in `Trained`.
    """

    origin: Origin
    weights: str
    address: str
    best: dict[str, Any]
    best_step: int
    rows_per_s: float
    waiting: float
    compared: tuple[str, ...]
    started_from: dict[str, Any] | None = None

    @staticmethod
    def read(folder: Path) -> Finished | None:
        """None where the training has not ended. Raises UserError for a file that can't be read."""
        file = folder / "finished.json"
        try:
            tree = json.loads(file.read_text(encoding="utf-8"))
            if tree.pop("format") != FORMAT:
                raise ValueError("another format")
            tree["origin"] = Origin.from_dict(tree["origin"])
            return Finished(**{**tree, "compared": tuple(tree["compared"])})
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"'{file}' is damaged or of another version, so it is unknown what the training there was; "
                "train from the start, without --resume"
            ) from None

    @staticmethod
    def forget(folder: Path) -> None:
        """A new training begins; what is left of another one is not resumed."""
        (folder / "latest.json").unlink(missing_ok=True)
        (folder / "finished.json").unlink(missing_ok=True)

    def write(self, folder: Path) -> None:
        """Writes the file."""
        with atomic_file(folder / "finished.json") as file:
            file.write_text(json.dumps({"format": FORMAT, **asdict(self)}), encoding="utf-8")

    def trained(self, settings: Settings, before: bool = False) -> Trained:
        """The result with the model's folder. before: as in `Trained`."""
        from mmoe_rec.training.validation import Validation

        return Trained(
            Path(settings.data.work) / "model",
            self.address,
            Validation.from_dict(self.best),
            self.best_step,
            self.rows_per_s,
            self.waiting,
            self.compared,
            None if self.started_from is None else Validation.from_dict(self.started_from),
            before,
        )


def training_key(folder: Path, origin: Origin, new: bool) -> str:
    """The key of a training's run, even before its first checkpoint; a killed training finds it again, unless `new`.

    A training begun with something else gets another key.
    """
    file = folder / "key.json"
    begun = hashlib.sha256(json.dumps(asdict(origin), sort_keys=True).encode()).hexdigest()
    if not new:
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            if found.get("origin") == begun:
                return str(found["key"])
        except (OSError, ValueError, KeyError, AttributeError):
            pass  # none, or one that means nothing any more
    key = uuid.uuid4().hex
    with atomic_file(file) as path:
        path.write_text(json.dumps({"key": key, "origin": begun}), encoding="utf-8")
    return key
