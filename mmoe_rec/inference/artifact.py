"""Read the artifact folder, which contains everything that scoring needs and no pickle files.

    <folder>/
        manifest.json          SHA-256 of every other file
        model.json             version of this format, and the fields of `ArtifactInfo` except the layout
        layout.json            order of the model's inputs and outputs, sizes of embedding tables, weights of tasks
        weights.safetensors    float32 weights by name; int8 and bfloat16 after `mmoe_rec.inference.export.write_int8`
        trees/                 only if the model has trees: the trees and their blend weights (`mmoe_rec.model.trees`)
        calibration.json       only if the model is calibrated: maps logits to calibrated logits
        settings.yaml          the resolved settings that the model was trained with
        example_request.json   an example body for /invocations and for `predict` of the MLflow model
        example_scores.json    the model's scores of the example at writing time, and the versions that computed them
        features/              fitted encoders; tables of counters, histories and latest values; the list of log
                               files in these tables (see `mmoe_rec.preprocessing.build_inputs`)

Every load checks the folder against the manifest, because a lost counter file, a missing calibration or one flipped bit
would change scores without an error.
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
# Accepted relative difference between predictions for the example. Libraries and processors round differently, so
# logits differ by about 1e-6 in fp32. In half precision they would differ by 1e-2, which isn't accepted.
TOLERANCE = 1e-4
_MIN_DIFFERENCE = 1e-30  # Smaller differences always count as equal, because tiny probabilities may round to 0.


@dataclass(frozen=True)
class ResolvedModel:
    """A model that was found and downloaded.

    Attributes:
        folder: Local artifact folder.
        uri: Permanent URI without an alias, or the folder's path.
        run_id: ID of the run that made the model. None if it is unknown or the run was deleted.
    """

    folder: Path
    uri: str
    run_id: str | None = None


@dataclass(frozen=True)
class ArtifactInfo:
    """Contents of `model.json`, and the layout of the model.

    Attributes:
        name: Name of the model.
        model: Section `model` of the settings, as JSON values.
        layout: Inputs, outputs and tables of the model.
        max_candidates: Maximum number of candidates per request.
        matmul_backend: Value of `serving.matmul_backend`.
        fingerprint: Fingerprint of the features that the model was trained on.
        tables_as_of: ISO time of the last logged request in the tables of features. None if the log has no times.
        stale_after_days: Days after the last event in counters and histories until replies warn. None never warns.
        trained_as_of: `tables_as_of` at training time. None if it is still the same.
        files_digest: Digest of the log files that the tables contain. None if it is unknown.
        journal: `id` of the journal whose live events the tables contain, and `through`, the number of the last segment
            that they contain. None if the tables contain no live events.
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

    @property
    def tasks(self) -> tuple[ModelTask, ...]:
        """Tasks of the model."""
        return self.layout.tasks


def read_artifact(folder: Path, verify: bool = True) -> ArtifactInfo:
    """Read the metadata of an artifact folder.

    Args:
        folder: Artifact folder.
        verify: Whether to check all files first (`check_files`).

    Raises:
        UserError: The folder has no model, modified files, or a model that another version of this package wrote.
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
    """Return the time of the last request in the artifact's tables, in microseconds, 0 if the log has no times."""
    return 0 if info.tables_as_of is None else parse_microseconds("tables_as_of", info.tables_as_of)


def read_example(folder: Path) -> dict[str, Any]:
    """Return the example request of an artifact folder, as arguments of `Ranker.rank`."""
    return json.loads((folder / EXAMPLE_FILE).read_text(encoding="utf-8"))["inputs"][0]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name, with stored types. Raises UserError if it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        # Copy the tensors because the file is memory-mapped. Overwriting it must not change a loaded model.
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"'{path}' can't be read: {error}") from None


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors to a file that other users can read, unlike the files that safetensors creates.

    Args:
        tensors: Tensors by name.
        path: File to write.
    """
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    # Copy the tensors because safetensors refuses tensors that share memory.
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, path)
    path.chmod(mode)


def read_model(info: ArtifactInfo, folder: Path) -> RankingModel:
    """Build the model and load its weights.

    Args:
        info: Metadata of the artifact.
        folder: Artifact folder.

    Raises:
        UserError: A file is missing, damaged or from another model.
    """
    from mmoe_rec.model.mmoe import build_model
    from mmoe_rec.model.tables import PlainTables, pop_table, table_weight_name, to_float32
    from mmoe_rec.model.trees import Trees
    from mmoe_rec.settings.model import Model

    layout, path = info.layout, folder / "weights.safetensors"
    stored = read_tensors(path)
    # Build tables with one row, because initializing large tables takes minutes and the weights are replaced anyway.
    tables = PlainTables(replace(layout, tables=tuple(replace(table, rows=1) for table in layout.tables)))
    for table in layout.tables:
        if table.name in tables.embedding_bags:
            bag = pop_table(stored, table_weight_name(table.name))
            if bag is None or (bag.num_embeddings, bag.embedding_dim) != (table.rows, table.dim):
                problem = f"does not contain the weights of table '{table.name}'"
                raise UserError(f"'{path}' {problem}. Train the model again.")
            tables.embedding_bags[table.name] = bag
    settings = Model.model_validate(info.model)
    model = build_model(layout, settings, tables)
    dense = {name.removeprefix("mixture."): weight for name, weight in to_float32(stored).items()}
    try:
        model.mixture.load_state_dict(dense)
    except RuntimeError as error:
        raise UserError(f"'{path}' does not fit the model's settings: {' '.join(str(error).split())}") from None
    if settings.trees is not None:
        model.trees = Trees.read(folder, len(model.dense_columns), len(model.tree_id_names))
    return model


def read_calibration(folder: Path) -> Calibration:
    """Read the calibration in an artifact folder, `UNCALIBRATED` if there is none. Raises UserError if damaged."""
    from mmoe_rec.model.score import UNCALIBRATED, Calibration, TaskCalibration

    path = folder / "calibration.json"
    try:
        return Calibration(TypeAdapter(dict[str, TaskCalibration]).validate_json(path.read_bytes()))
    except FileNotFoundError:
        return UNCALIBRATED
    except (OSError, ValueError):
        raise UserError(f"'{path}' is damaged. Copy the model again from its source, or train it again.") from None


# Scores of the example request. Every load checks that the model still computes them.


@dataclass(frozen=True)
class ExampleScores:
    """A model's predictions for its example request, in the order of the request.

    Attributes:
        predictions: Predictions (N,) by task. Scores are computed from predictions, so they are not stored.
        computed_with: Package -> version, and `processor` -> its architecture, of the process that computed them.
    """

    predictions: Mapping[str, Sequence[float]]
    computed_with: Mapping[str, str]

    @staticmethod
    def of(ranking: Any, tasks: Sequence[ModelTask]) -> ExampleScores:
        """Record the predictions that this process computed for the example, with its package versions.

        Args:
            ranking: `Ranking` of all candidates of the example.
            tasks: Tasks of the model.
        """
        ranks = np.argsort(ranking.order)
        return ExampleScores(
            {task.name: np.array(ranking.predictions[task.name])[ranks].tolist() for task in tasks},
            {name: version(name) for name in ("torch", "numpy", "pyarrow")} | {"processor": platform.machine()},
        )

    @staticmethod
    def read(folder: Path) -> ExampleScores:
        """Read the scores from an artifact folder."""
        return ExampleScores(**json.loads((folder / EXAMPLE_SCORES_FILE).read_text(encoding="utf-8")))

    def describe_difference(
        self, scores: ExampleScores, tasks: Sequence[ModelTask], calibration: Calibration
    ) -> str | None:
        """Return a clause on the first prediction that differs from `scores` by more than rounding, None if all agree.

        The tolerance is TOLERANCE times the scale of the task. The scale is the largest prediction in the example, or a
        regression's standard deviation if that is larger. A steep calibration multiplies rounding errors of logits, so
        the tolerance grows with its slope.

        Args:
            scores: Predictions of the example by the current process. This object has the expected ones.
            tasks: Tasks of the model.
            calibration: Calibration of the model.
        """
        for task in tasks:
            expected, actual = np.array(self.predictions[task.name]), np.array(scores.predictions[task.name])
            scale = max(np.abs(expected).max(), task.std if task.kind.is_linear else 0.0)
            max_slope = calibration.tasks[task.name].max_slope if task.name in calibration.tasks else 1.0
            is_close = np.abs(actual - expected) <= TOLERANCE * scale * max(1.0, max_slope) + _MIN_DIFFERENCE
            if not is_close.all():
                index = int(np.argmin(is_close))
                return f"'{task.name}' of candidate {index + 1} is {actual[index]:.6g} instead of {expected[index]:.6g}"
        return None


# The manifest uses SHA-256 because `sha256sum` can check it and processors have instructions for it. The 132 MB of the
# model for Complete Journey take 0.04 s on two cores, and 0.1 s without these instructions.


def write_manifest(folder: Path) -> None:
    """Write the manifest of a folder whose other files are complete."""
    files = _compute_checksums(folder, sorted(name for name in _list_files(folder) if name != MANIFEST_FILE))
    tree = {"sha256": _checksum(files), "files": files}
    (folder / MANIFEST_FILE).write_text(json.dumps(tree, indent=1, ensure_ascii=False), encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, str]:
    """Return relative path -> SHA-256 of an artifact's files. Raises UserError if the manifest is damaged."""
    tree = _read_object(folder / MANIFEST_FILE) or {}
    files = tree.get("files")
    if not isinstance(files, dict) or tree.get("sha256") != _checksum(files):
        raise _modified_error(folder, MANIFEST_FILE)
    return files


def artifact_version(folder: Path) -> str:
    """Return a version ID that depends on all files of the artifact, 16 hexadecimal digits."""
    return _checksum(read_manifest(folder))[:16]


def check_files(folder: Path) -> None:
    """Raise UserError if files in the manifest are missing or changed, or loading would read files that it lacks."""
    files = read_manifest(folder)
    checksums = _compute_checksums(folder, [name for name in files if (folder / name).exists()])
    for name, checksum in files.items():
        if checksums.get(name) != checksum:
            raise _modified_error(folder, name)
    for name in sorted(set(_list_files(folder)) - files.keys()):
        if name == "calibration.json" or (name.startswith("features/") and name.endswith((".parquet", ".json"))):
            raise UserError(f"The model in '{folder}' was modified: '{name}' is not part of it. Remove this file.")


def _compute_checksums(folder: Path, names: Sequence[str]) -> dict[str, str]:
    def compute(name: str) -> str:
        with (folder / name).open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()

    with ThreadPoolExecutor(min(8, usable_cores())) as pool:
        return dict(zip(names, pool.map(compute, names), strict=True))


def _list_files(folder: Path) -> Iterator[str]:
    """Yield the relative paths of all files, except those that an operating system or Python creates."""
    for path in folder.rglob("*"):
        parts = path.relative_to(folder).parts
        ignored = {"__pycache__", ".ipynb_checkpoints"}.intersection(parts) or parts[-1].startswith("._")
        if not ignored and parts[-1] not in (".DS_Store", "Thumbs.db", "desktop.ini") and path.is_file():
            yield "/".join(parts)


def _checksum(files: Mapping[str, str]) -> str:
    return hashlib.sha256("\n".join(f"{name} {files[name]}" for name in sorted(files)).encode()).hexdigest()


def _modified_error(folder: Path, name: str) -> UserError:
    return UserError(
        f"The model in '{folder}' was modified: '{name}' is missing or has changed. Copy the whole folder again from "
        "its source, or train the model again."
    )


def _read_object(path: Path) -> dict[str, Any] | None:
    """Read a JSON object. Returns None if the file is missing or has other contents."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return tree if isinstance(tree, dict) else None
