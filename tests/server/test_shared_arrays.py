"""A model that is mapped scores as the one that was written does, from the same memory, or says that it is damaged."""

from __future__ import annotations

import mmap
import pickle
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from mmoe_rec.server.sharing import arrays, preparing
from torch import nn

from mmoe_rec.errors import UserError
from mmoe_rec.features.memories import MemoriesTogether
from mmoe_rec.features.vocabulary import Vocabulary
from mmoe_rec.inference.export.compare import drawn_requests
from mmoe_rec.inference.export.small import write_small
from mmoe_rec.inference.loaded import LoadedRanker
from mmoe_rec.log.request_rows import StoredColumn
from mmoe_rec.model.products import Products
from mmoe_rec.server.limits import Limits
from mmoe_rec.server.models import Models, Served
from mmoe_rec.server.options import Options
from mmoe_rec.server.reloading import Source
from tests.inference.small_model import SmallModel
from tests.log.small_logs import ALL_KINDS, BASE, random_log

OPTIONS: list[dict[str, Any]] = [
    {},
    {"explain": True},
    {"gate_top_k": 1, "mask_experts": [0]},
    {"task_weights": {"click": 0.3}, "top_k": 3},
]


def log_with_vectors(rows: int = 600, strings: bool = False) -> pa.Table:
    """A random log with a column for a feature of vectors."""
    table = random_log(1, rows=rows, strings=strings)
    looks = np.random.default_rng(2).normal(size=(rows, 2)).tolist()
    return table.append_column("look", pa.array([None if row % 9 == 0 else look for row, look in enumerate(looks)]))


def model_of_every_kind(work: Path, rows: int = 600, strings: bool = False) -> SmallModel:
    """A small model with every kind of feature."""
    roles = BASE["roles"] | {"candidate": [*BASE["roles"]["candidate"], "look"]}
    features = ALL_KINDS | {"look": {"kind": "vector", "column": "look", "size": 2}}
    return SmallModel(work, log=[log_with_vectors(rows, strings)], features=features, roles=roles)


@pytest.fixture(scope="module", params=["integers", "strings", "int8"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("every_kind")
    model = model_of_every_kind(work, strings=request.param == "strings")
    if request.param == "int8":
        made = work / "int8"
        made.mkdir()
        write_small(model.folder, made, "bfloat16")
        return made
    return model.folder


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Served:
    return Models(Limits()).load(Source(folder, "models:/small/7"))


@pytest.fixture
def written(loaded: Served, tmp_path: Path) -> Path:
    with (tmp_path / "shared").open("wb") as file:
        arrays.write(loaded, file)
    return tmp_path / "shared"


def mapped(path: Path) -> Served:
    """The model in a file."""
    with path.open("r+b") as file:
        return Models(Limits()).map(file)


def test_scores_the_same_bits(written: Path, loaded: Served, folder: Path) -> None:
    found = mapped(written)
    rankers = (loaded.ranker, found.ranker)
    requests = list(drawn_requests(folder, loaded.ranker, 40))
    answers = [[repr(each.rank(**one, **option)) for one in requests for option in OPTIONS] for each in rankers]
    assert answers[0] == answers[1]
    assert len(set(answers[0])) > len(requests), "requests and options differ"
    table = log_with_vectors(200, strings=pa.types.is_string(loaded.ranker.reader.users.table["user"].type))
    scored = [each.score(table) for each in rankers]
    for one, other in zip(*scored, strict=True):
        assert one.tobytes() == other.tobytes()
    assert (found.source, found.example, found.about()) == (loaded.source, loaded.example, loaded.about())


@pytest.mark.parametrize("products", ["blas", "onednn"])
def test_multiplies_by_what_was_chosen_where_it_was_loaded(
    loaded: Served, tmp_path: Path, products: Products, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded.ranker.scorer.multiply_by(products)
    try:
        expected = loaded.ranker.scorer.products
        with (tmp_path / "shared").open("wb") as file:
            arrays.write(loaded, file)
    finally:
        loaded.ranker.serve_faster()
    # Workers that measured otherwise would give other last bits of scores.
    monkeypatch.setattr(LoadedRanker, "best_products", lambda self: pytest.fail("a worker measures"))
    found = mapped(tmp_path / "shared").ranker
    layers = {each.products for each in found.model.modules() if hasattr(each, "products")}
    assert {found.scorer.products, *layers} == {expected}


def test_no_array_is_copied(written: Path, loaded: Served) -> None:
    """Memory of all arrays and tensors of a mapped model lies in the map of the file, however it is reached."""
    found = mapped(written)
    found.ranker.rank(**found.example)
    own: list[pickle.PickleBuffer] = []
    arrays._Pickler(BytesIO(), protocol=5, buffer_callback=own.append).dump(found)
    ranges = maps_of(written)
    outside = [buffer.raw().nbytes for buffer in own if buffer.raw().nbytes and not lies_in(ranges, buffer)]
    assert len(own) > 100
    # What it makes for itself is small: the index of a vocabulary holds the ids once more.
    assert sum(outside) < 0.05 * sum(buffer.raw().nbytes for buffer in own), outside


def maps_of(path: Path) -> list[range]:
    """Where a file is mapped in this process."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(f" {path}"):
            start, end = (int(each, 16) for each in line.split()[0].split("-"))
            found.append(range(start, end))
    return found


def lies_in(ranges: list[range], buffer: pickle.PickleBuffer) -> bool:
    start = np.frombuffer(buffer.raw(), np.uint8).__array_interface__["data"][0]
    return any(start in each for each in ranges)


@pytest.mark.parametrize("strings", [False, True])
def test_what_each_worker_holds_does_not_grow_with_the_log(tmp_path: Path, strings: bool) -> None:
    own, whole = [], []
    for rows in (600, 6_000):
        folder = model_of_every_kind(tmp_path / str(rows), rows, strings).folder
        with (tmp_path / f"{rows}.shared").open("wb") as file:
            own.append(arrays.write(Models(Limits()).load(Source(folder, "x")), file))
            whole.append(file.tell())
    grown = whole[1] - whole[0]
    assert grown > 50_000, "memories of ten times the rows"
    assert own[1] - own[0] < 0.05 * grown


def test_indexes_are_there_at_once_and_whole(written: Path, loaded: Served) -> None:
    ranker = mapped(written).ranker
    together = ranker.pipeline._together
    assert isinstance(together, MemoriesTogether)
    assert together.are_current()
    for each in (together._index, together._together):
        assert each._place == {memory: place for place, memory in enumerate(each.memories)}
        assert each._place
    memory = together._together.memories[0]
    assert np.shares_memory(memory.events.known, together._together._known), "written once"
    before = {id(each): len(each._made) for each in stored_columns(ranker)}
    assert sum(before.values()) == sum(len(each._made) for each in stored_columns(loaded.ranker)) > 0
    ranker.rank(**loaded.example)
    assert {id(each): len(each._made) for each in stored_columns(ranker)} == before, "found, and not made again"
    assert ranker.pipeline._together is together


def stored_columns(ranker: LoadedRanker) -> Iterator[StoredColumn]:
    for latest in (ranker.reader.users, ranker.reader.candidates):
        yield from latest.columns.values()


def test_a_vocabulary_that_is_sent_has_its_index_whole_or_not_at_all() -> None:
    for ids in (pa.array([5, 3, 9]), pa.array(["a", "b"])):
        vocabulary = Vocabulary(ids, 4)
        assert "_index" not in pickle.loads(pickle.dumps(vocabulary)).__dict__
        expected = vocabulary.encode(ids)
        found = pickle.loads(pickle.dumps(vocabulary))
        assert "_index" in found.__dict__, "so that no request waits for it"
        assert found._index._engine.is_mapping_populated
        np.testing.assert_array_equal(found.encode(ids), expected)


# Damage


def test_damage_is_noticed_wherever_it_is(written: Path, loaded: Served) -> None:
    whole = written.read_bytes()
    random = np.random.default_rng(5)
    places = {0, len(whole) - 1, len(whole) - 40, *random.integers(0, len(whole), 40).tolist()}
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(random.integers(8))
        written.write_bytes(damaged)
        with pytest.raises(UserError, match="the model that workers share can't be mapped \\(DamagedError: "):
            mapped(written)
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        written.write_bytes(whole[:size])
        with pytest.raises(UserError, match="can't be mapped"):
            mapped(written)
    written.write_bytes(whole)
    mapped(written)


def test_another_answer_than_where_it_was_loaded_is_refused(loaded: Served, tmp_path: Path) -> None:
    scores = loaded.scores
    other = replace(loaded, scores=replace(scores, scores=tuple(1.01 * each for each in scores.scores)))
    with (tmp_path / "shared").open("wb") as file:
        arrays.write(other, file)
    models = Models(Limits())
    before = models.load(loaded.source)
    with (tmp_path / "shared").open("r+b") as file, pytest.raises(UserError, match="computes something else here"):
        models.map(file)
    assert models.current is before
    assert "computes something else" in (models.failure or "")


def test_what_one_process_writes_others_do_not_see(written: Path, loaded: Served) -> None:
    whole = written.read_bytes()
    one, other = mapped(written), mapped(written)
    before = repr(other.ranker.rank(**other.example))
    with torch.no_grad():
        for parameter in one.ranker.model.parameters():
            parameter.mul_(1.5)
    assert repr(one.ranker.rank(**one.example)) != before
    assert repr(other.ranker.rank(**other.example)) == before
    assert written.read_bytes() == whole


def test_a_full_disk_is_told_in_one_sentence(small: SmallModel) -> None:
    threads = torch.get_num_threads()
    with pytest.raises(UserError) as told, Path("/dev/full").open("wb", buffering=0) as full:
        preparing._write(Source(small.folder, "x"), Options(Limits()), full, "its folder")
    torch.set_num_threads(threads)
    assert "the temporary folder 'its folder' can't take" in str(told.value)
    assert "No space left on device): set TMPDIR" in str(told.value)


# Arrays and tensors


def test_arrays_and_tensors_of_any_kind(tmp_path: Path) -> None:
    matrix = np.arange(24.0).reshape(4, 6)
    half = torch.arange(12, dtype=torch.bfloat16)
    tied = nn.Parameter(torch.ones(3, 2), requires_grad=False)
    things = {
        "plain": matrix,
        "transposed": matrix.T,
        "gaps": matrix[::2, ::3],
        "backwards": matrix[::-1],
        "nothing": np.empty((0, 3), np.int32),
        "scalar": np.array(7, np.int8),
        "flags": np.array([True, False]),
        "times": np.array(["2020-01-01"], "datetime64[us]"),
        "objects": np.array([None, "a"], object),
        "tensor": torch.arange(6).reshape(2, 3),
        "transposed tensor": torch.arange(6).reshape(2, 3).t(),
        "half": half,
        "part": half[3:7:2],
        "one": torch.tensor(2.5),
        "no tensor": torch.empty(0, 4),
        "tied": [tied, tied],
        "strings": pa.array(["a", None, "ç" * 100])[1:],
        "table": pa.table({"lists": [[1, 2], None], "codes": pa.array(["x", "x"]).dictionary_encode()}),
    }
    with (tmp_path / "shared").open("wb") as file:
        arrays.write(things, file)
    with (tmp_path / "shared").open("r+b") as file:
        found = arrays.read(file.fileno())
    for name, thing in things.items():
        if isinstance(thing, np.ndarray):
            assert (found[name].dtype, found[name].shape) == (thing.dtype, thing.shape)
            np.testing.assert_array_equal(found[name], thing)
        elif isinstance(thing, torch.Tensor):
            assert (found[name].dtype, found[name].stride()) == (thing.dtype, thing.stride())
            assert torch.equal(found[name], thing)
        elif name != "tied":
            assert found[name].equals(thing)
    assert found["tied"][0] is found["tied"][1]
    assert type(found["tied"][0]) is nn.Parameter
    assert not found["tied"][0].requires_grad
    found["half"][5] = -1
    assert found["part"][1] == -1, "views of one memory stay so"
    found["plain"][0, 1] = -1
    assert found["transposed"][1, 0] == -1


def test_arrays_are_aligned_and_written_once(tmp_path: Path) -> None:
    column = pa.array(np.arange(100_000))
    things = [np.ones(3, np.int8), column, column[10:], column.to_numpy(), torch.from_numpy(np.arange(5))]
    things += [column.to_numpy()[5:90_000], column.to_numpy()[70_000:]]  # parts that overlap
    gaps = np.arange(5_000)[::2]
    with (tmp_path / "shared").open("wb") as file:
        own = arrays.write([*things, gaps], file)
        assert file.tell() < 1.1 * column.nbytes
    assert own < 2_000 < gaps.nbytes
    with (tmp_path / "shared").open("r+b") as file:
        found = arrays.read(file.fileno())
    for one, other in zip(found[3:], things[3:], strict=False):
        assert np.array_equal(one, other)
    places = [found[0].ctypes.data, found[1].buffers()[1].address, found[3].ctypes.data, found[4].data_ptr()]
    assert {place % arrays.ALIGNED_TO for place in places} == {0}
    assert mmap.PAGESIZE % arrays.ALIGNED_TO == 0


def test_a_tensor_elsewhere_than_in_memory_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "shared").open("wb") as file, pytest.raises(TypeError, match="on meta"):
        arrays.write(torch.empty(3, device="meta"), file)
