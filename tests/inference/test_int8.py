"""A model in int8: served like any other, by what its rounded weights say, and refused where rounding would harm."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mmoe_rec.errors import UserError
from mmoe_rec.inference.artifact import read_tensors, write_manifest
from mmoe_rec.inference.artifact_writer import write_with_weights
from mmoe_rec.inference.export import max_relative_differences, outputs_in_request_order, write_int8
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.model.tables import Int8EmbeddingBag, to_float32
from mmoe_rec.model.warm_start import WarmStart
from tests.inference.small_model import CONTEXT, ITEMS, USER, SmallModel

REQUEST = {
    "user": {"user": USER},
    "context": CONTEXT,
    "candidates": {"item": ITEMS, "tags": [["a"], [], None, ["b", "a"], ["c"]], "price": [1.0, None, 3.5, 0.1, 2.0]},
}


@pytest.fixture(scope="module")
def folder(small: SmallModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("small") / "int8"
    made.mkdir()
    write_int8(small.folder, made)
    return made


def test_is_near_the_model(folder: Path, small: SmallModel, ranker: Ranker) -> None:
    """All kinds of features, by requests and by rows."""
    served = Ranker.load(folder)
    first, second = (outputs_in_request_order(item.rank(**REQUEST)) for item in (ranker, served))
    assert first.keys() == second.keys()
    differs = False
    for name, values in first.items():
        np.testing.assert_allclose(second[name], values, rtol=2e-3)
        differs |= bool((second[name] != values).any())
    assert differs
    rows = small.later_rows()[0]
    for before, now in zip(ranker.score(rows), served.score(rows), strict=True):
        np.testing.assert_allclose(now, before, rtol=2e-3)


def test_computes_with_the_weights_that_it_holds(folder: Path, small: SmallModel, tmp_path: Path) -> None:
    """A model of these weights as floats, such as editing experts would write, gives the same."""
    weights = to_float32(read_tensors(folder / "weights.safetensors"))
    write_with_weights(folder, tmp_path / "floats", small.settings.model, weights)
    served, plain = Ranker.load(folder), Ranker.load(tmp_path / "floats")
    assert {value.dtype for value in load_file(tmp_path / "floats" / "weights.safetensors").values()} == {torch.float32}
    assert served.rank(**REQUEST).order == plain.rank(**REQUEST).order
    for name, values in plain.rank(**REQUEST).predictions.items():
        np.testing.assert_allclose(served.rank(**REQUEST).predictions[name], values, rtol=1e-6)
    rows = small.later_rows()[0]
    np.testing.assert_allclose(served.score(rows)[0], plain.score(rows)[0], rtol=1e-6)


def test_tables_stay_int8_in_memory(folder: Path, small: SmallModel) -> None:
    tables = Ranker.load(folder).model.tables.embedding_bags
    assert tables
    assert all(isinstance(table, Int8EmbeddingBag) and table.codes.dtype == torch.int8 for table in tables.values())
    stored, before = load_file(folder / "weights.safetensors"), load_file(small.folder / "weights.safetensors")
    sizes = [sum(item.nbytes for name, item in file.items() if "tables." in name) for file in (stored, before)]
    assert sizes[0] <= 0.3 * sizes[1]
    kept = {name for name, item in stored.items() if item.dtype == torch.float32}
    assert all(".gates." in name or not name.endswith("weight") for name in kept)
    assert all(torch.equal(stored[name], before[name]) for name in kept)


def test_is_no_model_to_round_again_or_to_train_on(folder: Path, small: SmallModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is in int8 already"):
        write_int8(folder, tmp_path)
    layout = Ranker.load(folder).layout
    with pytest.raises(UserError, match="is an int8 export, which is too coarse for training"):
        WarmStart(folder, small.settings.model, small.prepared, layout, small.settings.model)


def test_weights_that_are_not_finite_are_named(small: SmallModel, tmp_path: Path) -> None:
    broken, name = tmp_path / "broken", "tables.embedding_bags.brand.weight"
    shutil.copytree(small.folder, broken)
    weights = load_file(broken / "weights.safetensors")
    weights[name][0, 0] = torch.nan
    save_file(weights, broken / "weights.safetensors")
    (tmp_path / "made").mkdir()
    with pytest.raises(UserError, match=f"weight '{name}' holds NaN or infinity"):
        write_int8(broken, tmp_path / "made")


def test_a_table_without_its_scales_is_damage(small: SmallModel, tmp_path: Path) -> None:
    write_int8(small.folder, tmp_path)
    weights = load_file(tmp_path / "weights.safetensors")
    del weights["tables.embedding_bags.brand.weight.scales"]
    save_file(weights, tmp_path / "weights.safetensors")
    write_manifest(tmp_path)
    with pytest.raises(UserError, match=r"can't be loaded .*brand\.weight\.scales"):
        Ranker.load(tmp_path)


def test_differences_against_loops() -> None:
    random = np.random.default_rng(0)
    first = {"x": random.random(9), "score": 1e6 * random.random(9)}
    second = {name: values * (1 + 1e-3 * random.normal(size=9)) for name, values in first.items()}
    for name, actual in max_relative_differences(first, second).items():
        pairs = zip(first[name], second[name], strict=True)
        assert actual == pytest.approx(max(abs(a - b) / max(1.0, abs(a)) for a, b in pairs))
    assert np.isnan(max_relative_differences(first, first | {"x": np.full(9, np.nan)})["x"])
