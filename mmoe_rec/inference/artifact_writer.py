"""Write artifact folders (see `artifact`) atomically, with checksums and example scores.

The last step loads the model from the folder, as a server would, and stores its scores of the example request. Every
later load must reproduce these scores.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from torch import Tensor

from mmoe_rec.atomic import atomic_folder
from mmoe_rec.errors import UserError
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.features.vocabulary import VocabularyFeature
from mmoe_rec.inference.artifact import (
    EXAMPLE_FILE,
    EXAMPLE_SCORES_FILE,
    FORMAT,
    ArtifactInfo,
    read_artifact,
    read_manifest,
    write_manifest,
    write_tensors,
)
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.log.columns import column_uses
from mmoe_rec.log.request_values import iso_time
from mmoe_rec.model.model_layout import ModelLayout
from mmoe_rec.model.score import Calibration
from mmoe_rec.model.trees import Trees
from mmoe_rec.preprocessing.build_inputs import IncludedFiles
from mmoe_rec.preprocessing.prepare import FeatureFolder
from mmoe_rec.settings.load import load_settings
from mmoe_rec.settings.log_columns import Role
from mmoe_rec.settings.model import Model
from mmoe_rec.settings.sections import Settings

EXAMPLE_CANDIDATES = 8  # Number of candidates in the example request.


def write_artifact(
    folder: Path,
    *,
    settings: Settings,
    prepared: FeatureFolder,
    state_dict: Mapping[str, Tensor],
    trees: Trees | None = None,
    calibration: Calibration | None = None,
) -> None:
    """Write an artifact folder, replacing an existing one.

    Args:
        folder: Artifact folder to write.
        settings: Settings of the run.
        prepared: Features that the model was trained on.
        state_dict: `RankingModel.state_dict()` of the whole model with unsharded tables (`PlainTables`).
        trees: Trees of the model besides its network, if there are any.
        calibration: Calibration of the tasks. None leaves their logits unchanged.

    Raises:
        UserError: A weight or a prediction for the example is NaN or infinite.
    """
    included = IncludedFiles.read(prepared.folder)
    info = ArtifactInfo(
        name=settings.name,
        model=settings.model.model_dump(mode="json"),
        layout=ModelLayout.of(prepared.layout, settings),
        max_candidates=settings.serving.max_candidates,
        matmul_backend=settings.serving.matmul_backend,
        stale_after_days=settings.serving.stale_after_days,
        fingerprint=prepared.manifest["fingerprint"],
        tables_as_of=iso_time(prepared.manifest["request_microseconds"][1]) if settings.columns.has_time else None,
        files_digest=included.digest,
        journal=included.journal,
    )
    with atomic_folder(folder) as target:
        _write_weights(target, state_dict)
        if trees is not None:
            trees.write(target)
        shutil.copytree(prepared.serving, target / "features")
        shutil.copyfile(prepared.folder / "files.json", target / "features" / "files.json")
        if (prepared.folder / "requests").is_dir():
            shutil.copytree(prepared.folder / "requests", target / "features" / "requests")
        (target / "layout.json").write_text(info.layout.to_json(), encoding="utf-8")
        (target / "settings.yaml").write_text(settings.to_yaml(), encoding="utf-8")
        _write_info(target, info)
        if calibration is not None and calibration.tasks:
            _write_json(target / "calibration.json", calibration.to_dict())
        _write_json(target / EXAMPLE_FILE, {"inputs": [_build_example_request(target / "features", info.tables_as_of)]})
        finalize_artifact(target)


def write_with_weights(folder: Path, target: Path, model: Model, state_dict: Mapping[str, Tensor]) -> None:
    """Write a copy of an artifact with a different architecture and weights, but the same features and calibration.

    Args:
        folder: Artifact folder to copy.
        target: Artifact folder to write. An existing one is replaced.
        model: Section `model` of the settings that fits the weights.
        state_dict: Weights of the new model, as in `write_artifact`.

    Raises:
        UserError: The copied folder was modified, or a weight or prediction is NaN or infinite.
    """
    info = replace(read_artifact(folder), model=model.model_dump(mode="json"))
    settings = load_settings(folder / "settings.yaml").model_copy(update={"model": model})
    with atomic_folder(target) as out:
        copy_files(folder, out)
        _write_weights(out, state_dict)
        (out / "settings.yaml").write_text(settings.to_yaml(), encoding="utf-8")
        _write_info(out, info)
        finalize_artifact(out)


def write_with_tables(
    folder: Path,
    target: Path,
    features: Path,
    *,
    tables_as_of: int,
    files_digest: str | None,
    journal: Mapping[str, Any] | None,
) -> None:
    """Write a copy of an artifact with newer tables of counters, histories and latest values.

    Args:
        folder: Artifact folder to copy.
        target: Artifact folder to write. An existing one is replaced.
        features: Folder that `mmoe_rec.preprocessing.extend` wrote for the model.
        tables_as_of: Time of the last request in the tables, in microseconds.
        files_digest: Digest of the log files in the tables, as in `ArtifactInfo`.
        journal: Which events of a server's journal the tables contain, as in `ArtifactInfo`.

    Raises:
        UserError: The copied folder was modified, or the model can't score its example.
    """
    info, as_of = read_artifact(folder), iso_time(tables_as_of)
    trained_as_of = info.trained_as_of or info.tables_as_of
    info = replace(info, tables_as_of=as_of, trained_as_of=None if trained_as_of == as_of else trained_as_of)
    info = replace(info, files_digest=files_digest, journal=None if journal is None else dict(journal))
    with atomic_folder(target) as out:
        copy_files(folder, out, exclude_prefix="features/")
        shutil.copytree(features, out / "features")
        _write_info(out, info)
        _write_json(out / EXAMPLE_FILE, {"inputs": [_build_example_request(out / "features", info.tables_as_of)]})
        finalize_artifact(out)


def copy_files(folder: Path, out: Path, exclude_prefix: str | None = None) -> None:
    """Copy the files that the manifest of an artifact folder lists, without the manifest.

    Args:
        folder: Artifact folder to copy.
        out: Folder that gets the files.
        exclude_prefix: Start of the relative paths to leave out, such as `features/`. None copies all files.
    """
    for name in read_manifest(folder):
        if exclude_prefix is None or not name.startswith(exclude_prefix):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, out / name)


def finalize_artifact(folder: Path) -> None:
    """Score the example request with the model in a folder, and write its predictions and the manifest.

    Call this when all other files are complete, or after changing them on purpose.

    Raises:
        UserError: The model can't be loaded or can't score its example.
    """
    try:
        scores = Ranker(folder, read_artifact(folder, verify=False)).score_example(folder)
    except RuntimeError as error:
        reason = f"The model can't score its own example: {' '.join(str(error).split())}"
        raise UserError(f"{reason}. If training diverged, lower the learning rates.") from None
    _write_json(folder / EXAMPLE_SCORES_FILE, asdict(scores))
    write_manifest(folder)


def _write_info(folder: Path, info: ArtifactInfo) -> None:
    """Write `model.json`. It leaves out the layout, which is in `layout.json`."""
    tree = asdict(info)
    del tree["layout"]
    _write_json(folder / "model.json", {"format": FORMAT, **tree})


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=1, ensure_ascii=False), encoding="utf-8")


def _write_weights(folder: Path, state_dict: Mapping[str, Tensor]) -> None:
    for name, weight in state_dict.items():
        if not weight.isfinite().all():
            raise UserError(f"weight '{name}' holds NaN or infinity: training diverged. Lower the learning rates.")
    write_tensors({name: weight.float() for name, weight in state_dict.items()}, folder / "weights.safetensors")


# The example request documents the server's input and lets users try it.


def _build_example_request(features: Path, tables_as_of: str | None) -> dict[str, Any]:
    """Build a request of a frequent user, frequent candidates and a usual context, a minute after `tables_as_of`."""
    pipeline = FeaturePipeline.load(features, stores=False)
    names = pipeline.schema.columns
    user = {column: values[0] for column, values in _example_values(pipeline, "user").items()}
    if names.has_user:
        user = {names.user: _frequent_ids(pipeline, features, "user", names.user)[0]}
    candidates = _example_values(pipeline, "candidate")
    if names.has_candidate:
        candidates = {names.candidate: _frequent_ids(pipeline, features, "candidate", names.candidate)}
    examples = _example_values(pipeline, "context")
    context = {column: values[0] for column, values in examples.items() if values[0] is not None}
    if tables_as_of is not None:
        request_time = datetime.fromisoformat(tables_as_of).replace(microsecond=0) + timedelta(minutes=1)
        context[names.time] = request_time.isoformat()
    return {"user": user, "context": context, "candidates": candidates}


def _frequent_ids(pipeline: FeaturePipeline, features: Path, role: Role, key: str) -> list[Any]:
    """Return up to `EXAMPLE_CANDIDATES` IDs of column `key`: the most frequent ones, or any if it has no vocabulary."""
    seen = pq.read_table(features / f"latest.{role}.parquet", columns=[key]).column(key)
    return _vocabulary_ids(pipeline, key) or seen[:EXAMPLE_CANDIDATES].to_pylist()


def _vocabulary_ids(pipeline: FeaturePipeline, column: str) -> list[Any]:
    for name, feature in pipeline.schema.features.items():
        if isinstance(feature, VocabularyFeature) and feature.column == column:
            return list(pipeline.vocabularies[feature.table_owner or name].ids[:EXAMPLE_CANDIDATES].to_pylist())
    return []


def _example_values(pipeline: FeaturePipeline, role: Role) -> dict[str, list[Any]]:
    """Return column -> `EXAMPLE_CANDIDATES` typical values, None if unknown, for the columns with this role."""
    examples: dict[str, list[Any]] = {}
    uses, keys = column_uses(pipeline.schema), pipeline.schema.columns.names
    for column, column_role in pipeline.schema.input_columns().items():
        if column_role != role or column in keys:
            continue
        readers = [name for name, feature in pipeline.schema.features.items() if [*feature.reads()] == [column]]
        values = (pipeline.encoders[name].example_value(uses[column]) for name in readers)
        examples[column] = [next((value for value in values if value is not None), None)] * EXAMPLE_CANDIDATES
        if uses[column] == "key" and (ids := _vocabulary_ids(pipeline, column)):
            examples[column] = [ids[index % len(ids)] for index in range(EXAMPLE_CANDIDATES)]
    return examples
