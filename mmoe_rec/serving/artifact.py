"""The artifact folder: all that is needed to score, as plain data.

    <folder>/
        model.json             format, name, model section, limits, origin of the features, time of the tables
        layout.json            order of the model's inputs and outputs, widths of tables, weights of tasks
        weights.safetensors    float32 weights by name
        calibration.json       what turns the model's logits into probabilities, where it was calibrated
        settings.yaml          the resolved settings that the model was trained with
        example_request.json   a request that can be sent as it is
        features/              what encoders have learnt, what counters and histories remember, latest values

The folder appears whole or not at all.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmoe_rec.atomic import atomic_folder
from mmoe_rec.errors import UserError
from mmoe_rec.model.layout import ModelLayout, ModelTask
from mmoe_rec.serving.example import example_request

if TYPE_CHECKING:
    from torch import Tensor

    from mmoe_rec.build.prepare import Prepared
    from mmoe_rec.model.calibration import Calibration
    from mmoe_rec.settings import Model, Settings

FORMAT = 4


@dataclass(frozen=True)
class Artifact:
    """What `model.json` says, and the layout of the model.

    model: the settings' `model` section as JSON values; fingerprint: of the features that the model was trained on;
    tables_as_of: ISO time of the last logged request that counters, histories and latest values know.
    """

    name: str
    model: dict[str, Any]
    layout: ModelLayout
    max_candidates: int
    fingerprint: str
    tables_as_of: str

    @property
    def tasks(self) -> tuple[ModelTask, ...]:
        """The tasks that the model predicts."""
        return self.layout.tasks


def write_artifact(
    folder: Path,
    *,
    settings: Settings,
    prepared: Prepared,
    state_dict: Mapping[str, Tensor],
    calibration: Calibration | None = None,
) -> None:
    """Writes an artifact folder; an existing one is replaced.

    Args:
        prepared: the features that the model was trained on.
        state_dict: `RankingModel.state_dict()` of the whole model with plain tables.
        calibration: of the model's tasks; None leaves their logits as they are.

    Raises:
        UserError: a weight is not a finite number.
    """
    about = Artifact(
        name=settings.name,
        model=settings.model.model_dump(mode="json"),
        layout=ModelLayout.of(prepared.layout, settings),
        max_candidates=settings.serving.max_candidates,
        fingerprint=prepared.manifest["fingerprint"],
        tables_as_of=iso_time(prepared.manifest["request_microseconds"][1]),
    )
    with atomic_folder(folder) as target:
        _write_weights(target / "weights.safetensors", state_dict)
        shutil.copytree(prepared.serving, target / "features")
        (target / "layout.json").write_text(about.layout.to_json(), encoding="utf-8")
        (target / "settings.yaml").write_text(settings.to_yaml(), encoding="utf-8")
        _write_about(target, about)
        if calibration is not None and calibration.tasks:
            _write_json(target / "calibration.json", calibration.to_dict())
        _write_json(target / "example_request.json", example_request(target / "features", about.tables_as_of))


def rewrite_artifact(folder: Path, target: Path, model: Model, state_dict: Mapping[str, Tensor]) -> None:
    """Writes the artifact of a folder with another structure and other weights; an existing target is replaced.

    model: the `model` section that the weights fit. A calibration stays. Raises UserError for a folder without an
    artifact.
    """
    from mmoe_rec.settings import load_settings

    about = replace(read_artifact(folder), model=model.model_dump(mode="json"))
    settings = load_settings(folder / "settings.yaml").model_copy(update={"model": model})
    with atomic_folder(target) as made:
        shutil.copytree(folder, made, dirs_exist_ok=True)
        _write_weights(made / "weights.safetensors", state_dict)
        (made / "settings.yaml").write_text(settings.to_yaml(), encoding="utf-8")
        _write_about(made, about)


def read_artifact(folder: Path) -> Artifact:
    """What an artifact folder says about itself. Raises UserError where there is no model, or one of another format."""
    try:
        tree = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"'{folder}' holds no model (model.json)") from None
    if tree.pop("format", None) != FORMAT:
        raise UserError(f"'{folder}' holds a model of another format than this version reads ({FORMAT})")
    return Artifact(layout=ModelLayout.read(folder), **tree)


def read_weights(path: Path) -> dict[str, Tensor]:
    """All weights of an artifact by name, from its file of weights. Raises UserError for a missing or damaged file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"'{path}' can't be read: {error}") from None


def read_calibration(folder: Path) -> Calibration:
    """The calibration in an artifact folder, `UNCALIBRATED` where it has none.

    Raises UserError for a damaged file.
    """
    from mmoe_rec.model.calibration import UNCALIBRATED, Calibration

    path = folder / "calibration.json"
    try:
        return Calibration.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return UNCALIBRATED
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"'{path}' is damaged: it does not hold the calibration of tasks") from None


def _write_about(folder: Path, about: Artifact) -> None:
    tree = asdict(about)
    del tree["layout"]  # which is a file of its own
    _write_json(folder / "model.json", {"format": FORMAT, **tree})


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=1, ensure_ascii=False), encoding="utf-8")


def _write_weights(path: Path, state_dict: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    weights = {}
    for name, weight in state_dict.items():
        # A copy of its own: safetensors refuses tensors that share memory.
        weights[name] = weight.detach().cpu().float().contiguous().clone()
        if not weights[name].isfinite().all():
            raise UserError(f"weight '{name}' holds NaN or infinity: training diverged; lower the learning rates")
    save_file(weights, path)


def iso_time(microseconds: int) -> str:
    """Microseconds since 1970 UTC as ISO 8601."""
    seconds, rest = divmod(microseconds, 1_000_000)
    return datetime.fromtimestamp(seconds, UTC).replace(microsecond=rest).isoformat()
