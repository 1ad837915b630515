"""What an artifact has that the one it was made from has not, and how a ranker takes it up without reading the rest.

    <artifact>/delta/
        delta.json             versions of the artifact and of the one before it; checksums of the results
        manifest.json          size and SHA-256 of every other file here
        model.json, ...        the artifact's files beside its weights, trees and features, as they are
        weights.safetensors    where the model is another: dense weights, and of tables the rows that are others
        trees/                 where they are others
        features/              latest values and `files.json`, as they are; what was fitted, where it is another
            NAME.memory/       of what a counter or history remembers, the rows that are gone and those that have come

A delta that does not follow what is served, is damaged or leads to something else than the artifact is refused; what is
served stays as it is whatever happens, since a delta makes a ranker beside it. Both share all that is equal, but
for the table of counters that requests ask, which each ranker makes for itself.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from mmoe_rec.errors import UserError, one_line
from mmoe_rec.features.encoder import MemoryEncoder
from mmoe_rec.features.pipeline import FeaturePipeline, read_memory
from mmoe_rec.inference.artifact import (
    DELTA,
    DELTA_FORMAT,
    Artifact,
    Delta,
    read_artifact,
    read_calibration,
    read_manifest,
    read_model,
    read_stored,
    version_of,
    write_manifest,
    write_tensors,
)
from mmoe_rec.inference.scorer import Scorer
from mmoe_rec.log.columns import combine, mix
from mmoe_rec.model.tables import ROWS, PlainTables, name_weight, some_in_int8
from mmoe_rec.model.trees import FOLDER
from mmoe_rec.point_in_time.join import sorted_order
from mmoe_rec.point_in_time.memory import Memory

_WEIGHTS, _FITTED = "weights.safetensors", "pipeline.json"
Columns = Mapping[str, np.ndarray]


# Writing


def write_delta(base: Path, folder: Path) -> Delta:
    """Writes the delta of a sealed artifact folder from another one into it. Raises UserError as `read_artifact`."""
    from mmoe_rec.atomic import atomic_folder  # which no server needs

    before, now = read_manifest(base), read_manifest(folder)
    changed = {name for name in before.keys() | now.keys() if before.get(name) != now.get(name)}
    with atomic_folder(folder / DELTA) as target:
        (target / "features").mkdir()
        was_fitted = any(map(_is_fitted, changed))
        for name in now:
            parts = name.split("/")
            is_whole = (
                (len(parts) == 1 and name != _WEIGHTS)
                or (_is_of_trees(name) and any(map(_is_of_trees, changed)))
                or (_is_fitted(name) and was_fitted)
                or (parts[0] == "features" and len(parts) == 2 and not _is_fitted(name))
            )
            if is_whole:
                (target / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(folder / name, target / name)
        tables: dict[str, str] = {}
        if _is_another_model(read_artifact(base, False), read_artifact(folder, False), changed):
            tables = _write_weights(base, folder, target)
        memories = {}
        pipelines = [FeaturePipeline.load(each / "features", memories=False) for each in (base, folder)]
        for name, encoder in pipelines[1].memory_encoders.items():
            if any(each.startswith(f"features/{name}.memory/") for each in changed):
                old = read_memory(pipelines[0].memory_encoders[name], base / "features")
                memories[name] = _write_rows(old, read_memory(encoder, folder / "features"), target / "features", name)
        delta = Delta(version_of(base), version_of(folder), tables, memories)
        text = json.dumps({"format": DELTA_FORMAT, **asdict(delta)}, indent=1)
        (target / "delta.json").write_text(text, encoding="utf-8")
        write_manifest(target)
    return delta


def _is_fitted(name: str) -> bool:
    """Whether a file holds what encoders were fitted with, not what was known last."""
    folder, _, file = name.rpartition("/")
    return folder == "features" and not file.startswith("latest.") and file != "files.json"


def _is_of_trees(name: str) -> bool:
    return name.startswith(f"{FOLDER}/")


def _is_another_model(before: Artifact, now: Artifact, changed: set[str]) -> bool:
    """Whether anything differs from which logits, and what is made of them, come, or how they are computed."""
    is_other = changed & {_WEIGHTS, "layout.json", "calibration.json"} or any(map(_is_of_trees, changed))
    said = [(each.model, each.name, each.products) for each in (before, now)]
    return bool(is_other) or said[0] != said[1]


def _write_weights(base: Path, folder: Path, target: Path) -> dict[str, str]:
    """Writes dense weights, and the rows of tables that are others; gives the checksums of these tables."""
    before, now = read_stored(base / _WEIGHTS), read_stored(folder / _WEIGHTS)
    written, sums = dict(now), dict[str, str]()
    is_coarse = some_in_int8(now) or some_in_int8(before)  # whose rows share scales
    for table in [] if is_coarse else read_artifact(folder, verify=False).layout.tables:
        name = name_weight(table.name)
        old, weight = before.get(name), now.get(name)
        if old is None or weight is None or old.shape[1] != weight.shape[1] or len(old) > len(weight):
            continue
        is_other = torch.ones(len(weight), dtype=torch.bool)
        # By their bits, as 0.0 is -0.0 otherwise.
        is_other[: len(old)] = (old.view(torch.int32) != weight[: len(old)].view(torch.int32)).any(1)
        rows = is_other.nonzero()[:, 0]
        del written[name]
        if len(rows):
            written |= {name: weight[rows], name + ROWS: rows}
            sums[table.name] = _sum_bytes(weight.numpy())
    write_tensors(written, target / _WEIGHTS)
    return sums


def _write_rows(before: Memory, now: Memory, features: Path, name: str) -> str:
    """Writes how a memory has changed; gives the checksum of what it is now."""
    columns = now.to_columns()
    gone, places = _find_changes(_like(before.to_columns(), columns), columns)
    folder = features / f"{name}.memory"
    folder.mkdir()
    come = {"place": places, **{each: values[places] for each, values in columns.items()}}
    metadata = None if now.floor is None else {"floor": str(now.floor)}
    for file, rows in (("gone", {"place": gone}), ("come", come)):
        table = pa.table({each: pa.array(values) for each, values in rows.items()}).replace_schema_metadata(metadata)
        whole = [each.name for each in table.schema if each.type in (pa.int32(), pa.int64())]
        encoding = dict.fromkeys(whole, "DELTA_BINARY_PACKED")
        path = folder / f"{file}.parquet"
        pq.write_table(table, path, compression="zstd", use_dictionary=False, column_encoding=encoding)
    return _sum_columns(columns)


def _find_changes(before: Columns, now: Columns) -> tuple[np.ndarray, np.ndarray]:
    """Which rows of two tables, in order, are in one alone: (G,) int64 rising places of those that are there no more,
    and (C,) int64 of those, in the result, that were not there. Rows that are equal and in another order count."""
    one, other = _hash_rows(before), _hash_rows(now)
    orders = [sorted_order(each, np.zeros(len(each), np.int64)) for each in (one, other)]
    old, new = one[orders[0]], other[orders[1]]
    # Of several equal rows, the first is found for the first, the second for the second.
    begins = np.append(True, new[1:] != new[:-1])[: len(new)]
    number = np.arange(len(new)) - np.flatnonzero(begins)[np.cumsum(begins) - 1]
    found = np.searchsorted(old, new) + number
    is_there = found < np.searchsorted(old, new, side="right")
    place = np.full(len(new), -1)
    place[orders[1][is_there]] = orders[0][found[is_there]]
    rows = np.flatnonzero(place >= 0)
    for name, values in now.items():  # hashes may be equal by chance
        rows = rows[_bits(before[name])[place[rows]] == _bits(values)[rows]]
    kept = place[rows]
    in_order = kept > np.append(-1, np.maximum.accumulate(kept))[: len(kept)]
    rows, kept = rows[in_order], kept[in_order]
    gone, come = np.ones(len(one), bool), np.ones(len(other), bool)
    gone[kept], come[rows] = False, False
    return np.flatnonzero(gone), np.flatnonzero(come)


def _hash_rows(columns: Columns) -> np.ndarray:
    return combine([mix(_bits(values).astype(np.uint64)) for values in columns.values()])


def _bits(values: np.ndarray) -> np.ndarray:
    """Numbers as unsigned ones of the same bits."""
    return values.view(f"u{values.itemsize}")


def _like(before: Columns, columns: Columns) -> dict[str, np.ndarray]:
    """The columns of a memory by the names and types of another one's; one that it lacks is zeros, as in files."""
    rows = len(before["key"])
    return {name: before.get(name, np.zeros(rows, values.dtype)) for name, values in columns.items()}


def _sum_columns(columns: Columns) -> str:
    lines = "\n".join(f"{name} {_sum_bytes(columns[name])}" for name in sorted(columns))
    return hashlib.sha256(lines.encode()).hexdigest()


def _sum_bytes(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()


# Taking up


class Parts(NamedTuple):
    """What a ranker is made of."""

    pipeline: FeaturePipeline
    scorer: Scorer


def apply_delta(delta: Delta, folder: Path, about: Artifact, pipeline: FeaturePipeline, scorer: Scorer) -> Parts:
    """The parts to which a delta leads. pipeline, scorer: of the version that it follows, which stay
    as they are. Raises UserError where the result is not that of the artifact."""
    try:
        changed = _changed_features(delta, folder / "features", pipeline)
        if not (folder / _WEIGHTS).is_file():
            return Parts(changed, scorer)
        model = read_model(about, folder, scorer.model)
        assert isinstance(model.tables, PlainTables)
        for name, expected in delta.tables.items():
            weight: Any = model.tables.embedding_bags[name].weight
            if _sum_bytes(weight.detach().numpy()) != expected:
                raise _other_result(delta, f"table '{name}'")
        return Parts(changed, Scorer(about, model, read_calibration(folder)))
    except (OSError, pa.ArrowException, LookupError, ValueError) as error:
        raise UserError(f"the delta in '{folder}' can't be applied ({one_line(error)})") from error


def _changed_features(delta: Delta, features: Path, before: FeaturePipeline) -> FeaturePipeline:
    is_fitted = (features / _FITTED).is_file()
    pipeline, memories = FeaturePipeline.load(features, memories=False) if is_fitted else before, dict[str, Memory]()
    for name, encoder in before.live.encoders.items():  # their memories are without what was learnt since
        memories[name] = encoder.memory
        if name in delta.memories:
            memories[name] = _changed_memory(delta, features, pipeline.memory_encoders[name], encoder.memory)
    return pipeline.with_memories(memories)


def _changed_memory(delta: Delta, features: Path, encoder: MemoryEncoder[Any], before: Memory) -> Memory:
    folder = features / f"{encoder.name}.memory"
    gone, come = (pq.read_table(folder / f"{file}.parquet", use_threads=False) for file in ("gone", "come"))
    added: dict[str, np.ndarray] = {name: come[name].to_numpy() for name in come.column_names}
    places, floor = added.pop("place"), (come.schema.metadata or {}).get(b"floor")
    old = _like(before.to_columns(), added)
    is_kept = np.ones(len(old["key"]), bool)
    is_kept[gone["place"].to_numpy()] = False
    is_new = np.zeros(int(is_kept.sum()) + len(places), bool)
    is_new[places] = True
    columns = {}
    for name, values in added.items():
        columns[name] = column = np.empty(len(is_new), values.dtype)
        column[~is_new] = old[name][is_kept] if len(gone) else old[name]
        column[is_new] = values
    if _sum_columns(columns) != delta.memories[encoder.name]:
        raise _other_result(delta, f"what '{encoder.name}' remembers")
    return encoder.empty().with_columns(columns, None if floor is None else int(floor))


def _other_result(delta: Delta, what: str) -> UserError:
    return UserError(
        f"the delta to version {delta.version} leads to something else than was published: {what} has another checksum"
    )
