"""The artifact folder: all that is needed to score, as plain data, and how it is read.

    <folder>/
        manifest.json          size and SHA-256 of every other file
        model.json             format, name, model section, limits, origin of the features, time of the tables
        layout.json            order of the model's inputs and outputs, widths of tables, weights of tasks
        weights.safetensors    float32 weights by name; in a small model int8 and bfloat16 (`mmoe_rec.model.tables`)
        calibration.json       what turns the model's logits into probabilities, where it was calibrated
        settings.yaml          the resolved settings that the model was trained with
        example_request.json   a request that can be sent as it is
        example_scores.json    what the model gave for it when the folder was written, and the versions that computed it
        features/              what encoders have learnt, and tables: what counters and histories remember, latest
                               values, and which files of the log these hold (see `mmoe_rec.preprocessing.logs`)

The folder appears whole or not at all (`mmoe_rec.inference.writing`). Whoever takes it up checks it against the
manifest: a lost file of a counter, a missing calibration or one changed bit of a weight would give other scores
without an error.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmoe_rec.devices import usable_cores
from mmoe_rec.errors import UserError
from mmoe_rec.model.layout import ModelLayout, ModelTask

if TYPE_CHECKING:
    from torch import Tensor

    from mmoe_rec.model.mmoe import RankingModel
    from mmoe_rec.model.score import Calibration

FORMAT = 5
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Artifact:
    """What `model.json` says, and the layout of the model.

    model: the settings' `model` section as JSON values; fingerprint: of the features that the model was trained on;
    tables_as_of: ISO time of the last logged request that counters, histories and latest values know, None where the
    log has no times; stale_after_days:
    how much later a request may lie before replies warn, None is any time (the default is that of the settings, for
    artifacts of before there was one); trained_as_of: as tables_as_of, of the features that the model was trained on,
    None where the tables are still these; files: digest of the files of the log that the tables hold, None where it is
    unknown; journal: what of the journal of live events the tables hold, {"id": ..., "through": number of the last
    segment}, None for nothing.
    """

    name: str
    model: dict[str, Any]
    layout: ModelLayout
    max_candidates: int
    products: str
    fingerprint: str
    tables_as_of: str | None
    stale_after_days: float | None = 7
    trained_as_of: str | None = None
    files: str | None = None
    journal: dict[str, Any] | None = None

    @property
    def tasks(self) -> tuple[ModelTask, ...]:
        """The tasks that the model predicts."""
        return self.layout.tasks


def read_artifact(folder: Path, verify: bool = True) -> Artifact:
    """What an artifact folder says about itself.

    verify: check its files first, as `check_files` does. Raises UserError where there is no model, one of another
    format, or one that is not as it was written.
    """
    tree = _read_object(folder / "model.json")
    if tree is None and not (folder / MANIFEST).is_file():
        raise UserError(f"'{folder}' holds no model (model.json)")
    if tree is not None and tree.get("format") != FORMAT:
        raise UserError(
            f"'{folder}' holds a model of another format than this version reads ({FORMAT}): train it again, or use "
            "the version of mmoe_rec that wrote it"
        )
    if verify:
        check_files(folder)
    if tree is None:
        raise UserError(f"'{folder}' holds no model (model.json)")
    del tree["format"]
    return Artifact(layout=ModelLayout.read(folder), **tree)


def read_weights(path: Path) -> dict[str, Tensor]:
    """All weights of an artifact by name, float32, from its file of weights.

    Raises UserError for a missing or damaged file.
    """
    from mmoe_rec.model.tables import in_float32

    return in_float32(read_stored(path))


def read_stored(path: Path) -> dict[str, Tensor]:
    """What a file of weights holds by name, as it is stored. Raises UserError for a missing or damaged file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        # Copies: the file is mapped, and a model must not change with it when another one is written over it.
        return {name: each.clone() for name, each in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"'{path}' can't be read: {error}") from None


def read_model(about: Artifact, folder: Path) -> RankingModel:
    """The model with its weights. Raises UserError where its file is missing, damaged or of another model."""
    from mmoe_rec.model.mmoe import build_model
    from mmoe_rec.model.tables import PlainTables, in_float32, take_table
    from mmoe_rec.settings.model import Model

    layout, path = about.layout, folder / "weights.safetensors"
    stored = read_stored(path)
    # Tables of one row each: drawing initial weights only to overwrite them takes minutes for large tables.
    tables = PlainTables(replace(layout, tables=tuple(replace(table, rows=1) for table in layout.tables)))
    for table in layout.tables:
        if table.name in tables.embedding_bags:
            bag = take_table(stored, f"tables.embedding_bags.{table.name}.weight")
            if bag is None or (bag.num_embeddings, bag.embedding_dim) != (table.rows, table.dim):
                raise UserError(f"'{path}' does not hold the weights of table '{table.name}'")
            tables.embedding_bags[table.name] = bag
    model = build_model(layout, Model.model_validate(about.model), tables)
    dense = {name.removeprefix("mixture."): each for name, each in in_float32(stored).items()}
    try:
        model.mixture.load_state_dict(dense)
    except RuntimeError as error:
        raise UserError(f"'{path}' does not fit the model's settings: {' '.join(str(error).split())}") from None
    return model


def read_calibration(folder: Path) -> Calibration:
    """The calibration in an artifact folder, `UNCALIBRATED` where it has none.

    Raises UserError for a damaged file.
    """
    from mmoe_rec.model.score import UNCALIBRATED, Calibration

    path = folder / "calibration.json"
    try:
        return Calibration.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return UNCALIBRATED
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"'{path}' is damaged: it does not hold the calibration of tasks") from None


# The manifest. SHA-256, as everyone can compute it (`sha256sum`) and processors have instructions for it: the 132 MB of
# the model for Complete Journey take 0.04 s on two cores, 0.1 s without those instructions.


@dataclass(frozen=True)
class StoredFile:
    """bytes: size; sha256: of the content, in hexadecimal."""

    bytes: int
    sha256: str

    @staticmethod
    def of(path: Path) -> StoredFile:
        with path.open("rb") as content:
            return StoredFile(path.stat().st_size, hashlib.file_digest(content, "sha256").hexdigest())


def write_manifest(folder: Path) -> None:
    """Writes the manifest of a folder that holds all the other files by now."""
    names = sorted(name for name in _names(folder) if name != MANIFEST)
    with _pool() as pool:
        files = dict(zip(names, pool.map(StoredFile.of, (folder / name for name in names)), strict=True))
    tree = {"sha256": _sum(files), "files": {name: asdict(file) for name, file in files.items()}}
    (folder / MANIFEST).write_text(json.dumps(tree, indent=1, ensure_ascii=False), encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, StoredFile]:
    """The files of an artifact by their names relative to the folder. Raises UserError without a whole manifest."""
    if not (folder / MANIFEST).is_file():
        raise _damaged(folder, f"'{MANIFEST}' is missing")
    try:
        tree = _read_object(folder / MANIFEST) or {}
        files = {name: StoredFile(**each) for name, each in tree["files"].items()}
        whole = tree["sha256"] == _sum(files)
    except (KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise _damaged(folder, f"'{MANIFEST}' has changed")
    return files


def version_of(folder: Path) -> str:
    """What tells an artifact from any other: 16 hexadecimal digits that follow from all of its files.

    Raises UserError without a whole manifest.
    """
    return _sum(read_manifest(folder))[:16]


def check_files(folder: Path) -> None:
    """Raises UserError unless an artifact folder holds the files that were written, with the content that was written.

    The first one that does not fit is named. What an operating system, MLflow or Python leave beside them may lie
    there, but no file that loading would read.
    """
    files = read_manifest(folder)
    with _pool() as pool:
        # The largest first, so that no thread is left with it in the end.
        largest = sorted(files, key=lambda name: -files[name].bytes)
        wrong = dict(zip(largest, pool.map(lambda name: _wrong(folder / name, files[name]), largest), strict=True))
    for name in files:
        if reason := wrong[name]:
            raise _damaged(folder, f"'{name}' {reason}")
    for name in sorted(set(_names(folder)) - files.keys()):
        if name == "calibration.json" or (name.startswith("features/") and name.endswith((".parquet", ".json"))):
            raise UserError(f"the model in '{folder}' is not as it was written: '{name}' is no part of it; remove it")


def _wrong(path: Path, expected: StoredFile) -> str | None:
    """What is wrong with a file, as the end of a sentence."""
    try:
        if (size := path.stat().st_size) != expected.bytes:
            return f"has {size:,} bytes instead of {expected.bytes:,}"
        return None if StoredFile.of(path) == expected else "has changed (its checksum is another one)"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"can't be read ({error.strerror})"


def _names(folder: Path) -> Iterator[str]:
    """Names of all files in a folder, relative to it, without what an operating system or Python leaves there."""
    for path in folder.rglob("*"):
        parts = path.relative_to(folder).parts
        left = {"__pycache__", ".ipynb_checkpoints"}.intersection(parts) or parts[-1].startswith("._")
        if not left and parts[-1] not in (".DS_Store", "Thumbs.db", "desktop.ini") and path.is_file():
            yield "/".join(parts)


def _sum(files: Mapping[str, StoredFile]) -> str:
    lines = (f"{name} {file.bytes} {file.sha256}" for name, file in sorted(files.items()))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, usable_cores()))


def _damaged(folder: Path, what: str) -> UserError:
    return UserError(
        f"the model in '{folder}' is not as it was written: {what}; copy the whole folder again from where it came, or "
        "train again"
    )


def _read_object(path: Path) -> dict[str, Any] | None:
    """A JSON object, None for a file that is missing or holds something else."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return tree if isinstance(tree, dict) else None
