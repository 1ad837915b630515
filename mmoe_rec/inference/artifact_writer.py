"""How an artifact folder (see `artifact`) is written: whole or not at all, with what tells if it changed.

When all other files are there, the model scores its example once from the folder, as a server would: what it gives is
what every later load has to give again.
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

EXAMPLE_CANDIDATES = 8  # of the example


def write_artifact(
    folder: Path,
    *,
    settings: Settings,
    prepared: FeatureFolder,
    state_dict: Mapping[str, Tensor],
    trees: Trees | None = None,
    calibration: Calibration | None = None,
    undertraining: str | None = None,
) -> None:
    """Writes an artifact folder; an existing one is replaced.

    prepared: the features that the model was trained on; state_dict: `RankingModel.state_dict()` of the whole model
    with plain tables; trees: of a model that has some beside the network; calibration: of the model's tasks, None
    leaves their logits as they are; early_end: as in `ArtifactInfo`. Raises UserError where a weight, or a prediction
    for the example, is not a finite number.
    """
    taken = IncludedFiles.read(prepared.folder)
    info = ArtifactInfo(
        name=settings.name,
        model=settings.model.model_dump(mode="json"),
        layout=ModelLayout.of(prepared.layout, settings),
        max_candidates=settings.serving.max_candidates,
        matmul_backend=settings.serving.matmul_backend,
        stale_after_days=settings.serving.stale_after_days,
        fingerprint=prepared.manifest["fingerprint"],
        tables_as_of=iso_time(prepared.manifest["request_microseconds"][1]) if settings.columns.has_time else None,
        files_digest=taken.digest,
        journal=taken.journal,
        undertraining=undertraining,
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
        write_artifact_info(target, info)
        if calibration is not None and calibration.tasks:
            _write_json(target / "calibration.json", calibration.to_dict())
        _write_json(target / EXAMPLE_FILE, {"inputs": [build_example_request(target / "features", info.tables_as_of)]})
        finalize_artifact(target)


def write_with_weights(folder: Path, target: Path, model: Model, state_dict: Mapping[str, Tensor]) -> None:
    """Writes the artifact of a folder with another structure and other weights; an existing target is replaced.

    model: the `model` section that the weights fit. A calibration stays. Raises UserError for a folder that is not as
    it was written, and as `write_artifact` does.
    """
    info = replace(read_artifact(folder), model=model.model_dump(mode="json"))
    settings = load_settings(folder / "settings.yaml").model_copy(update={"model": model})
    with atomic_folder(target) as out:
        copy_files(folder, out)
        _write_weights(out, state_dict)
        (out / "settings.yaml").write_text(settings.to_yaml(), encoding="utf-8")
        write_artifact_info(out, info)
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
    """Writes the artifact of a folder with other tables; an existing target is replaced.

    features: a folder that `mmoe_rec.preprocessing.extend` has written for the model; tables_as_of: microseconds
    of the last request that it knows; files, journal: as in `ArtifactInfo`.

    Raises UserError for a folder that is not as it was written, and where the model can't score its example.
    """
    info, moment = read_artifact(folder), iso_time(tables_as_of)
    trained = info.trained_as_of or info.tables_as_of
    info = replace(info, tables_as_of=moment, trained_as_of=None if trained == moment else trained)
    info = replace(info, files_digest=files_digest, journal=None if journal is None else dict(journal))
    with atomic_folder(target) as out:
        copy_files(folder, out, exclude_prefix="features/")
        shutil.copytree(features, out / "features")
        write_artifact_info(out, info)
        _write_json(out / EXAMPLE_FILE, {"inputs": [build_example_request(out / "features", info.tables_as_of)]})
        finalize_artifact(out)


def copy_files(folder: Path, out: Path, exclude_prefix: str | None = None) -> None:
    """Copies the files of an artifact folder that its manifest names. but: the start of names that are left out."""
    for name in read_manifest(folder):
        if exclude_prefix is None or not name.startswith(exclude_prefix):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, out / name)


def finalize_artifact(folder: Path) -> None:
    """Scores the example with the model in a folder, and writes what it gave and the manifest.

    For a folder whose other files are all there, or were changed on purpose. Raises UserError for a model that can't be
    loaded or that can't score its example.
    """
    try:
        scores = Ranker(folder, read_artifact(folder, verify=False)).score_example(folder)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"the model can't score its own example: {reason}; where training diverged, lower the learning rates"
        ) from None
    _write_json(folder / EXAMPLE_SCORES_FILE, asdict(scores))
    write_manifest(folder)


def write_artifact_info(folder: Path, info: ArtifactInfo) -> None:
    """Writes what an artifact says of itself, but for its layout."""
    tree = asdict(info)
    del tree["layout"]  # which is a file of its own
    _write_json(folder / "model.json", {"format": FORMAT, **tree})


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=1, ensure_ascii=False), encoding="utf-8")


def _write_weights(folder: Path, state_dict: Mapping[str, Tensor]) -> None:
    for name, weight in state_dict.items():
        if not weight.isfinite().all():
            raise UserError(f"weight '{name}' holds NaN or infinity: training diverged; lower the learning rates")
    write_tensors({name: weight.float() for name, weight in state_dict.items()}, folder / "weights.safetensors")


# The example: a realistic request made from what a model knows, to try the server with and to document it


def build_example_request(features: Path, tables_as_of: str | None) -> dict[str, Any]:
    """Arguments of `Ranker.rank`: a frequent user, frequent candidates, a usual context, a minute after the log's end;
    of a plain table, what is frequent in its columns. features: serving state; tables_as_of: as in `ArtifactInfo`.
    """
    pipeline = FeaturePipeline.load(features, stores=False)
    names = pipeline.schema.columns
    user = {column: values[0] for column, values in _usual(pipeline, "user").items()}
    if names.has_user:
        user = {names.user: _frequent(pipeline, features, "user", names.user)[0]}
    candidates = _usual(pipeline, "candidate")
    if names.has_candidate:
        candidates = {names.candidate: _frequent(pipeline, features, "candidate", names.candidate)}
    context = {column: values[0] for column, values in _usual(pipeline, "context").items() if values[0] is not None}
    if tables_as_of is not None:
        moment = datetime.fromisoformat(tables_as_of).replace(microsecond=0) + timedelta(minutes=1)
        context[names.time] = moment.isoformat()
    return {"user": user, "context": context, "candidates": candidates}


def _frequent(pipeline: FeaturePipeline, features: Path, role: Role, key: str) -> list[Any]:
    """The most frequent ids, or any known ones where no feature has counted them."""
    known = pq.read_table(features / f"latest.{role}.parquet", columns=[key]).column(key)
    return _vocabulary(pipeline, key) or known[:EXAMPLE_CANDIDATES].to_pylist()


def _vocabulary(pipeline: FeaturePipeline, column: str) -> list[Any]:
    for name, feature in pipeline.schema.features.items():
        if isinstance(feature, VocabularyFeature) and feature.column == column:
            return list(pipeline.vocabularies[feature.table_owner or name].ids[:EXAMPLE_CANDIDATES].to_pylist())
    return []


def _usual(pipeline: FeaturePipeline, role: Role) -> dict[str, list[Any]]:
    """Some values of each column of a role: the most frequent ids, or a mean number; null where no feature of a kind
    that knows one reads it."""
    usual: dict[str, list[Any]] = {}
    uses, own = column_uses(pipeline.schema), pipeline.schema.columns.names
    for column, its in pipeline.schema.input_columns().items():
        if its != role or column in own:
            continue
        readers = [name for name, feature in pipeline.schema.features.items() if [*feature.reads()] == [column]]
        values = (pipeline.encoders[name].example_value(uses[column]) for name in readers)
        usual[column] = [next((value for value in values if value is not None), None)] * EXAMPLE_CANDIDATES
        if uses[column] == "key" and (known := _vocabulary(pipeline, column)):
            usual[column] = [known[place % len(known)] for place in range(EXAMPLE_CANDIDATES)]
    return usual
