"""The artifact folder: all that is needed to score, as plain data, and how it is read.

    <folder>/
        manifest.json          SHA-256 of every other file
        model.json             format, name, model section, limits, origin of the features, time of the tables
        layout.json            order of the model's inputs and outputs, widths of tables, weights of tasks
        weights.safetensors    float32 weights by name; in a small model int8 and bfloat16 (`mmoe_rec.model.tables`)
        trees/                 where the model has trees: these, and how much they count (`mmoe_rec.model.trees`)
        calibration.json       what turns the model's logits into probabilities, where it was calibrated
        settings.yaml          the resolved settings that the model was trained with
        example_request.json   the body of a call to /invocations, which `predict` of the MLflow model takes as well
        example_scores.json    what the model gave for it when the folder was written, and the versions that computed it
        features/              what encoders have learnt, and tables: what counters and histories remember, latest
                               values, and which files of the log these hold (see `mmoe_rec.preprocessing.build_inputs`)

The folder appears whole or not at all (`mmoe_rec.inference.artifact_writer`). Whoever takes it up checks it against the
manifest: a lost file of a counter, a missing calibration or one changed bit of a weight would give other scores
without an error.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import TypeAdapter

from mmoe_rec.devices import usable_cores
from mmoe_rec.errors import UserError
from mmoe_rec.log.request_values import parse_microseconds
from mmoe_rec.model.model_layout import ModelLayout, ModelTask

if TYPE_CHECKING:
    from torch import Tensor

    from mmoe_rec.model.mmoe import RankingModel
    from mmoe_rec.model.score import Calibration

FORMAT = 6
MANIFEST_FILE = "manifest.json"
EXAMPLE_FILE = "example_request.json"
EXAMPLE_SCORES_FILE = "example_scores.json"
# Libraries and processors round otherwise: fp32 logits then differ by some 1e-6, half precision by 1e-2.
TOLERANCE = 1e-4
_NOTHING = 1e-30  # Probabilities below are 0, as rounding has it.


@dataclass(frozen=True)
class ResolvedModel:
    """Where a model lies. address: permanent, unlike one with an alias, or the folder's path; run_id: of the run that
    made it, where that is known and was not deleted."""

    folder: Path
    uri: str
    run_id: str | None = None


@dataclass(frozen=True)
class ArtifactInfo:
    """What `model.json` says, and the layout of the model.

    model: the settings' `model` section as JSON values; fingerprint: of the features that the model was trained on;
    tables_as_of: ISO time of the last logged request that counters, histories and latest values know, None where the
    log has no times; stale_after_days: how much later a request may lie before replies warn, None is any time;
    trained_as_of: as tables_as_of, of the features that the model was trained on, None where the tables are still
    these; files: digest of the files of the log that the tables hold, None where it is unknown; journal: what of the
    journal of live events the tables hold, {"id": ..., "through": number of the last segment}, None for nothing;
    undertraining: what `mmoe_rec.training.validation.find_undertraining` says of its training.
    """

    name: str
    model: dict[str, Any]
    layout: ModelLayout
    max_candidates: int
    matmul_backend: str
    fingerprint: str
    tables_as_of: str | None
    stale_after_days: float | None
    trained_as_of: str | None = None
    files_digest: str | None = None
    journal: dict[str, Any] | None = None
    undertraining: str | None = None

    @property
    def tasks(self) -> tuple[ModelTask, ...]:
        return self.layout.tasks


def read_artifact(folder: Path, verify: bool = True) -> ArtifactInfo:
    """What an artifact folder says about itself. verify: check its files first, as `check_files` does.

    Raises UserError where there is no model, one that another version made, or one that is not as it was written.
    """
    tree = _read_object(folder / "model.json")
    if tree is not None and tree.get("format") != FORMAT:
        raise UserError(f"The model in '{folder}' was made by another version of mmoe_rec. Train it again.")
    if verify and (tree is not None or (folder / MANIFEST_FILE).is_file()):
        check_files(folder)
    if tree is None:
        raise UserError(f"'{folder}' holds no model (model.json)")
    del tree["format"]
    return ArtifactInfo(layout=ModelLayout.read(folder), **tree)


def tables_as_of_us(info: ArtifactInfo) -> int:
    """Return the time of the last request that the tables of an artifact know, microseconds."""
    return 0 if info.tables_as_of is None else parse_microseconds("tables_as_of", info.tables_as_of)


def read_example(folder: Path) -> dict[str, Any]:
    """Return the request in the example of an artifact folder, as arguments of `Ranker.rank`."""
    return json.loads((folder / EXAMPLE_FILE).read_text(encoding="utf-8"))["inputs"][0]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """What a file of weights holds by name, as it is stored. Raises UserError for a missing or damaged file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        # Copies: the file is mapped, and a model must not change with it when another one is written over it.
        return {name: each.clone() for name, each in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"'{path}' can't be read: {error}") from None


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes a file of tensors that everyone may read who may read other new files: safetensors leaves it to its owner
    alone, and a server may run as someone else."""
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    # Copies, as safetensors refuses tensors that share memory.
    save_file({name: each.detach().cpu().contiguous().clone() for name, each in tensors.items()}, path)
    path.chmod(mode)


def read_model(info: ArtifactInfo, folder: Path) -> RankingModel:
    """The model with its weights. Raises UserError where a file is missing, damaged or of another model."""
    from mmoe_rec.model.mmoe import build_model
    from mmoe_rec.model.tables import PlainTables, pop_table, table_weight_name, to_float32
    from mmoe_rec.model.trees import Trees
    from mmoe_rec.settings.model import Model

    layout, path = info.layout, folder / "weights.safetensors"
    stored = read_tensors(path)
    # Tables of one row each: drawing initial weights only to overwrite them takes minutes for large tables.
    tables = PlainTables(replace(layout, tables=tuple(replace(table, rows=1) for table in layout.tables)))
    for table in layout.tables:
        if table.name in tables.embedding_bags:
            bag = pop_table(stored, table_weight_name(table.name))
            if bag is None or (bag.num_embeddings, bag.embedding_dim) != (table.rows, table.dim):
                raise UserError(f"'{path}' does not hold the weights of table '{table.name}'")
            tables.embedding_bags[table.name] = bag
    settings = Model.model_validate(info.model)
    model = build_model(layout, settings, tables)
    dense = {name.removeprefix("mixture."): each for name, each in to_float32(stored).items()}
    try:
        model.mixture.load_state_dict(dense)
    except RuntimeError as error:
        raise UserError(f"'{path}' does not fit the model's settings: {' '.join(str(error).split())}") from None
    if settings.trees is not None:
        model.trees = Trees.read(folder, len(model.dense_columns), len(model.tree_id_names))
    return model


def read_calibration(folder: Path) -> Calibration:
    """The calibration in an artifact folder, `UNCALIBRATED` where it has none. Raises UserError for a damaged file."""
    from mmoe_rec.model.score import UNCALIBRATED, Calibration, TaskCalibration

    path = folder / "calibration.json"
    try:
        return Calibration(TypeAdapter(dict[str, TaskCalibration]).validate_json(path.read_bytes()))
    except FileNotFoundError:
        return UNCALIBRATED
    except (OSError, ValueError):
        raise UserError(f"'{path}' is damaged: it does not hold the calibration of tasks") from None


# What a model gives for its example, by which every load tells whether it still computes what it did


@dataclass(frozen=True)
class ExampleScores:
    """What a model gives for its example, in the request's order.

    predictions: task -> (N,), which scores follow from; computed_with: package, or "processor" -> version of it.
    """

    predictions: Mapping[str, Sequence[float]]
    computed_with: Mapping[str, str]

    @staticmethod
    def of(ranking: Any, tasks: Sequence[ModelTask]) -> ExampleScores:
        """The scores of a `Ranking` of all candidates, computed in this process."""
        back = np.argsort(ranking.order)
        return ExampleScores(
            {task.name: np.array(ranking.predictions[task.name])[back].tolist() for task in tasks},
            {name: version(name) for name in ("torch", "numpy", "pyarrow")} | {"processor": platform.machine()},
        )

    @staticmethod
    def read(folder: Path) -> ExampleScores:
        return ExampleScores(**json.loads((folder / EXAMPLE_SCORES_FILE).read_text(encoding="utf-8")))

    def describe_difference(
        self, now: ExampleScores, tasks: Sequence[ModelTask], calibration: Calibration
    ) -> str | None:
        """Return a part of a sentence on a prediction of `now` that rounding does not explain, None without one.

        A prediction may be off by TOLERANCE of its task's scale: the largest one in the example, or a regression's
        deviation where that is larger. A calibration may be steep, which multiplies what rounding does to logits.
        """
        for task in tasks:
            before, after = np.array(self.predictions[task.name]), np.array(now.predictions[task.name])
            scale = max(np.abs(before).max(), task.std if task.kind.is_linear else 0.0)
            max_slope = calibration.tasks[task.name].max_slope if task.name in calibration.tasks else 1.0
            fits = np.abs(after - before) <= TOLERANCE * scale * max(1.0, max_slope) + _NOTHING
            if not fits.all():
                place = int(np.argmin(fits))
                return f"'{task.name}' of candidate {place + 1} is {after[place]:.6g} instead of {before[place]:.6g}"
        return None


# The manifest. SHA-256, as everyone can compute it (`sha256sum`) and processors have instructions for it: the 132 MB of
# the model for Complete Journey take 0.04 s on two cores, 0.1 s without those instructions.


def write_manifest(folder: Path) -> None:
    """Writes the manifest of a folder that holds all the other files by now."""
    files = _sum_files(folder, sorted(name for name in _names(folder) if name != MANIFEST_FILE))
    tree = {"sha256": _sum(files), "files": files}
    (folder / MANIFEST_FILE).write_text(json.dumps(tree, indent=1, ensure_ascii=False), encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, str]:
    """The SHA-256 of an artifact's files by their names in the folder. Raises UserError without a whole manifest."""
    tree = _read_object(folder / MANIFEST_FILE) or {}
    files = tree.get("files")
    if not isinstance(files, dict) or tree.get("sha256") != _sum(files):
        raise _damaged(folder, MANIFEST_FILE)
    return files


def artifact_version(folder: Path) -> str:
    """What tells an artifact from any other: 16 hexadecimal digits that follow from all of its files."""
    return _sum(read_manifest(folder))[:16]


def check_files(folder: Path) -> None:
    """Raises UserError unless a folder holds the files that were written, and nothing else that loading reads: what an
    operating system, MLflow or Python leave beside them may lie there."""
    files = read_manifest(folder)
    there = _sum_files(folder, [name for name in files if (folder / name).exists()])
    for name, checksum in files.items():
        if there.get(name) != checksum:
            raise _damaged(folder, name)
    for name in sorted(set(_names(folder)) - files.keys()):
        if name == "calibration.json" or (name.startswith("features/") and name.endswith((".parquet", ".json"))):
            raise UserError(f"the model in '{folder}' is not as it was written: '{name}' is no part of it; remove it")


def _sum_files(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Return the SHA-256 of files in hexadecimal."""

    def sum_file(name: str) -> str:
        with (folder / name).open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()

    with ThreadPoolExecutor(min(8, usable_cores())) as pool:
        return dict(zip(names, pool.map(sum_file, names), strict=True))


def _names(folder: Path) -> Iterator[str]:
    """Names of all files in a folder, relative to it, without what an operating system or Python leaves."""
    for path in folder.rglob("*"):
        parts = path.relative_to(folder).parts
        left = {"__pycache__", ".ipynb_checkpoints"}.intersection(parts) or parts[-1].startswith("._")
        if not left and parts[-1] not in (".DS_Store", "Thumbs.db", "desktop.ini") and path.is_file():
            yield "/".join(parts)


def _sum(files: Mapping[str, str]) -> str:
    return hashlib.sha256("\n".join(f"{name} {files[name]}" for name in sorted(files)).encode()).hexdigest()


def _damaged(folder: Path, name: str) -> UserError:
    return UserError(
        f"the model in '{folder}' is not as it was written: '{name}' is missing or has changed; copy the whole folder "
        "again from where it came, or train again"
    )


def _read_object(path: Path) -> dict[str, Any] | None:
    """A JSON object, None for a file that is missing or holds something else."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return tree if isinstance(tree, dict) else None
