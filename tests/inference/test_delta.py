"""A delta gives what the whole artifact gives, to the bit, or is refused."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mmoe_rec.errors import UserError
from mmoe_rec.inference.artifact import (
    DELTA,
    Delta,
    check_files,
    read_stored,
    version_of,
    write_manifest,
    write_tensors,
)
from mmoe_rec.inference.delta import _find_changes, write_delta
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.inference.writing import seal, write_artifact
from mmoe_rec.live.refresh import renew_tables
from mmoe_rec.log.given import iso_time
from mmoe_rec.model.layout import ModelLayout
from mmoe_rec.model.mmoe import build_model
from mmoe_rec.model.tables import ROWS, PlainTables
from mmoe_rec.preprocessing.extend import extend
from mmoe_rec.training.warm_start import WarmStart
from tests.inference.small_model import ITEMS, SmallModel
from tests.log.small_logs import DAY, START, random_log, times_of, with_column

USERS = range(12)


@dataclass(frozen=True)
class Versions:
    """A model and two that come from it, one after the other: by a refresh, and by a training on grown features."""

    first: Path
    refreshed: Path
    trained: Path


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> Versions:
    work = tmp_path_factory.mktemp("versions")
    small = SmallModel(work)
    later = random_log(5, rows=200, days=2.0)
    times = pa.array(times_of(later) + 11 * DAY + np.arange(len(later))).cast(later["time"].type)
    items = [item + 5 if item < 0 else item for item in later["item"].to_pylist()]  # which are new
    pq.write_table(with_column(with_column(later, "time", times), "item", items), work / "log" / "later.parquet")
    refreshed = work / "refreshed"
    renew_tables(small.folder, small.settings, refreshed)
    grown = extend(small.settings.data.log, small.settings.schema_, {"train": (START, START + 30 * DAY)}, work)
    assert grown is not None
    layout, model = ModelLayout.of(grown.features.layout, small.settings), small.settings.model
    started = build_model(layout, model, PlainTables(layout))
    WarmStart(refreshed, model, grown.features, layout, model).fill(started)
    state = {name: each.clone() for name, each in started.state_dict().items()}
    for name, each in state.items():
        touched = slice(0, 2) if name.startswith("tables.") else slice(None)
        each[touched] = each[touched] * 1.01
    trained = work / "trained"
    write_artifact(trained, settings=small.settings, prepared=grown.features, state_dict=state)
    return Versions(small.folder, refreshed, trained)


def answers(ranker: Ranker) -> list[Any]:
    """Rankings of some requests, with all that they show."""
    items = [*ITEMS, 5 - 10**17]
    found = [
        ranker.rank({"user": user}, {"time": iso_time(START + 60 * DAY), "born": None}, {"item": items}, explain=True)
        for user in USERS
    ]
    return [replace(each, request_id=None, seen=None) for each in found]


def steps(versions: Versions) -> Sequence[tuple[Path, Path]]:
    return (versions.first, versions.refreshed), (versions.refreshed, versions.trained)


def test_deltas_one_after_the_other_give_what_the_whole_models_give(versions: Versions) -> None:
    ranker = Ranker.load(versions.first)
    for before, after in steps(versions):
        delta = write_delta(before, after)
        assert (delta.base, delta.version) == (version_of(before), version_of(after))
        check_files(after)  # which a delta is no part of
        ranker.learn(random_log(3, rows=9).slice(0, 1))  # is part of what is served, not of the tables
        found, whole = ranker.with_delta(after / DELTA), Ranker.load(after)
        assert found.version == whole.version
        assert answers(found) == answers(whole)
        assert answers(found) != answers(ranker)
        for name, encoder in whole.pipeline.memory_encoders.items():
            its = found.pipeline.memory_encoders[name].memory
            assert its.floor == encoder.memory.floor
            for column, values in encoder.memory.to_columns().items():
                assert its.to_columns()[column].tobytes() == values.tobytes(), (name, column)
        for name, weight in whole.model.state_dict().items():
            assert torch.equal(found.model.state_dict()[name], weight), name
        ranker = found


def test_what_does_not_change_is_in_no_delta_and_shared(versions: Versions) -> None:
    for before, after in steps(versions):
        write_delta(before, after)
    before = Ranker.load(versions.first)
    found = before.with_delta(versions.refreshed / DELTA)
    assert not (versions.refreshed / DELTA / "weights.safetensors").exists()
    assert found.scorer is before.scorer
    assert found.pipeline.vocabularies is before.pipeline.vocabularies
    weights = read_stored(versions.trained / DELTA / "weights.safetensors")
    rows = {name: each.tolist() for name, each in weights.items() if name.endswith(ROWS)}
    assert rows["tables.embedding_bags.item.weight.rows"][:2] == [0, 1]
    known = len(before.model.state_dict()["tables.embedding_bags.item.weight"])
    assert rows["tables.embedding_bags.item.weight.rows"][2] == known, "those of new items follow"
    assert not (versions.trained / DELTA / "features" / "requests").exists()


def test_a_training_whose_start_is_gone_keeps_its_model(
    small: SmallModel, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    parts = {"prepared": small.prepared, "state_dict": small.model.state_dict()}
    write_artifact(tmp_path / "m", settings=small.settings, before=tmp_path / "gone", **parts)
    assert "no delta is written" in capsys.readouterr().err
    assert [*tmp_path.glob("m/*delta*")] == []
    Ranker.load(tmp_path / "m")


def test_what_does_not_fit_is_refused(versions: Versions, tmp_path: Path) -> None:
    for before, after in steps(versions):
        write_delta(before, after)
    ranker = Ranker.load(versions.first)
    known = answers(ranker)
    with pytest.raises(UserError, match=r"follows version \w+, not version \w+, which is served: it does not fit"):
        ranker.with_delta(versions.trained / DELTA)

    def refuse(change: Any, sentence: str) -> None:
        folder = tmp_path / "delta"
        shutil.copytree(versions.refreshed / DELTA, folder)
        change(folder)
        with pytest.raises(UserError, match=sentence):
            ranker.with_delta(folder)
        shutil.rmtree(folder)

    memory = next((versions.refreshed / DELTA / "features").glob("*.memory"))

    def flip(folder: Path) -> None:
        path = folder / "features" / memory.name / "come.parquet"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    def forge(folder: Path) -> None:
        tree = json.loads((folder / "delta.json").read_text())
        tree["memories"][memory.stem] = "0" * 64
        (folder / "delta.json").write_text(json.dumps(tree))
        write_manifest(folder)

    refuse(flip, "come.parquet' has changed")
    refuse(lambda folder: (folder / "features" / "files.json").unlink(), "files.json' is missing")
    refuse(lambda folder: (folder / "manifest.json").unlink(), "manifest.json' is missing")
    refuse(forge, f"leads to something else than was published: what '{memory.stem}' remembers has another checksum")
    assert answers(ranker) == known


def test_rows_of_another_table_lead_to_nothing(versions: Versions, tmp_path: Path) -> None:
    write_delta(versions.refreshed, versions.trained)
    other = tmp_path / "other"
    shutil.copytree(versions.refreshed, other)
    weights = read_stored(other / "weights.safetensors")
    weights["tables.embedding_bags.item.weight"][-1] += 1
    write_tensors(weights, other / "weights.safetensors")
    seal(other)
    ranker = Ranker.load(other)
    ranker.version = version_of(versions.refreshed)
    with pytest.raises(UserError, match="table 'item' has another checksum"):
        ranker.with_delta(versions.trained / DELTA)


@pytest.mark.parametrize("more", [{"format": 0}, {"parts": {}}])
def test_a_delta_of_another_format_can_not_be_read(versions: Versions, more: dict[str, object]) -> None:
    write_delta(versions.first, versions.refreshed)
    file = versions.refreshed / DELTA / "delta.json"
    tree = json.loads(file.read_text())
    file.write_text(json.dumps(tree | more))
    with pytest.raises(UserError, match="holds no delta of a format"):
        Delta.read(versions.refreshed / DELTA, verify=False)


@pytest.mark.parametrize("seed", range(20))
def test_changes_of_drawn_tables_lead_from_one_to_the_other(seed: int) -> None:
    random = np.random.default_rng(seed)

    def draw(rows: int) -> dict[str, np.ndarray]:
        return {
            "key": np.sort(random.integers(0, 4, rows).astype(np.uint64)),
            "rows": random.integers(0, 2, rows).astype(np.int32),
            "sum": random.choice([0.0, -0.0, np.nan], rows),
        }

    before = draw(int(random.integers(0, 30)))
    now = draw(int(random.integers(0, 30)))
    if seed % 2:  # rows that go, come, and come twice
        kept = np.sort(random.integers(0, max(1, len(before["key"])), 20)) if len(before["key"]) else []
        now = {name: each[kept] for name, each in before.items()}
    gone, come = _find_changes(before, now)
    for name, values in now.items():
        made = np.empty_like(values)
        is_new = np.isin(np.arange(len(values)), come)
        made[is_new], made[~is_new] = values[is_new], np.delete(before[name], gone)
        assert made.tobytes() == values.tobytes()
