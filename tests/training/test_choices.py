"""What is chosen from which times, what a training keeps of it, and that measuring leaves a model as it was."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import linear

from mmoe_rec.batches.batch import KeyedIds, make_batch
from mmoe_rec.errors import UserError
from mmoe_rec.jobs.train import train_model
from mmoe_rec.model import products as products_module
from mmoe_rec.model.levels import Experts
from mmoe_rec.model.mmoe import RankingModel, build_model
from mmoe_rec.model.products import Linear, StackedLinear, has_onednn
from mmoe_rec.model.tables import PlainTables
from mmoe_rec.preprocessing.prepare import FeatureFolder
from mmoe_rec.settings.load import load_settings
from mmoe_rec.settings.model import Model
from mmoe_rec.settings.training import Training
from mmoe_rec.training import choices as choices_module
from mmoe_rec.training.checkpoint import latest_checkpoint
from mmoe_rec.training.choices import GIVE_UP, Choices, Chooser, faster, keep_choices, time_options
from mmoe_rec.training.loop import Trainer
from tests.model.examples import LAYOUT, random_rows, small_model
from tests.pipelines.learnable_log import write_files
from tests.training.learnable import MODEL, write_prepared
from tests.training.ranks import CPU, join, spawn
from tests.training.resuming import CrashError, crash, train

CHOICES = Choices("bf16", "torch", "grouped", 3, "blas", {"precision": {"fp32": 9.0, "bf16": 3.0}})
TOP_K = MODEL.model_dump() | {"gates": {"routing": "top_k", "top_k": 2}}


def built(settings: Model = MODEL) -> RankingModel:
    return build_model(LAYOUT, settings, PlainTables(LAYOUT))


def ids(rows: int = 50) -> KeyedIds:
    encoded, _ = random_rows(rows, seed=1)
    return make_batch(encoded, LAYOUT, torchrec=False).ids


def chooser(model: RankingModel, rows: int = 64) -> Chooser:
    return Chooser(model.mixture, LAYOUT, CPU, rows, ids())


@pytest.fixture(autouse=True)
def _onednn_everywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where torch does not multiply by oneDNN, its own product stands in, as options are run."""
    if has_onednn():
        yield
        return
    monkeypatch.setattr(products_module, "by_onednn", lambda left, right, bias=None: linear(left, right.t(), bias))
    has_onednn.cache_clear()
    yield
    has_onednn.cache_clear()


def with_times(monkeypatch: pytest.MonkeyPatch, times: Mapping[str, float]) -> list[list[str]]:
    """Options take the given milliseconds; gives the list of what was compared."""
    compared: list[list[str]] = []

    def told(options: Mapping[str, Callable[[], object]], *_: object) -> dict[str, float]:
        for option in options.values():
            option()
        compared.append(list(options))
        return {name: times[name] for name in options}

    monkeypatch.setattr(choices_module, "time_options", told)
    return compared


TIMES = {"fp32": 10.0, "blas": 10.0, "onednn": 9.9, "bf16": 5.0}
TIMES |= {"fbgemm": 4.0, "torch": 2.0, "auto": 1.0, "dense": 2.0}
TIMES |= {"grouped": 0.5}


def test_the_default_stays_unless_another_is_clearly_faster() -> None:
    assert faster({"fp32": 11.9, "bf16": 10.0}, "fp32", 1.2) == "fp32"
    assert faster({"fp32": 12.1, "bf16": 10.0}, "fp32", 1.2) == "bf16"
    assert faster({"a": 3.0, "b": 1.0, "c": 2.0}, "c", 1.2) == "b"
    assert faster({"a": 3.0, "b": 1.0}, "not there", 1.2) == "b"


def test_what_is_clearly_faster_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    with_times(monkeypatch, TIMES)
    choices = chooser(built(Model.model_validate(TOP_K))).choose(Training())
    assert (choices.precision, choices.tables, choices.experts) == ("bf16", "torch", "grouped")
    assert choices.measured["precision"] == {"fp32": 10.0, "bf16": 5.0}
    assert str(choices).startswith(
        "bf16 (5.0 ms, fp32 10.0), tables by torch (2.0 ms, fbgemm 4.0), experts grouped (0.5"
    )


def test_bf16_competes_with_the_faster_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = with_times(monkeypatch, TIMES | {"onednn": 5.5})
    choices = chooser(built()).choose(Training(tables="torch", threads=1))
    assert (choices.precision, choices.products) == ("fp32", "onednn")
    assert choices.measured == {"products": {"blas": 10.0, "onednn": 5.5}, "precision": {"fp32": 5.5, "bf16": 5.0}}
    assert compared == [["fp32", "bf16"], ["blas", "onednn", "bf16"]]
    assert str(choices) == "fp32 (5.5 ms, bf16 5.0), products by onednn (5.5 ms, blas 10.0), tables by torch, 1 thread"


@pytest.mark.thorough
def test_ranks_of_which_one_lacks_a_library_take_another_together(tmp_path: Path) -> None:
    spawn(choose_on_a_rank, tmp_path)
    found = [json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]
    assert found == [["blas", ["blas"], "blas"]] * 2


@pytest.mark.parametrize("offered", [True, False])
def test_a_library_of_products_that_is_not_here_gives_way(monkeypatch: pytest.MonkeyPatch, offered: bool) -> None:
    monkeypatch.setattr(choices_module, "has_onednn", lambda: offered)
    before = replace(CHOICES, products="onednn")
    assert keep_choices(before, Training(), CPU).products == ("onednn" if offered else "blas")
    assert keep_choices(before, Training(products="blas"), CPU).products == "blas"


def test_what_is_not_on_offer_is_told_before_features_are_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products_module, "has_onednn", lambda: False)
    settings = load_settings(write_files(tmp_path), ["--training.products", "onednn"])
    with pytest.raises(
        UserError, match=r"^training\.products is onednn, but torch does not multiply by it in fp32 here"
    ):
        train_model(settings)
    assert not Path(settings.data.work, "features").exists()


@pytest.mark.parametrize(
    ("settings", "offered", "compared"),
    [
        ({"precision": "bf16"}, True, []),
        ({"precision": "fp32"}, True, [["blas", "onednn"]]),
        ({"precision": "fp32"}, False, [["blas"]]),
        ({"precision": "fp32", "products": "onednn"}, True, []),
        ({"products": "onednn"}, True, [["fp32", "bf16"], ["onednn", "bf16"]]),
    ],
)
def test_only_what_matters_and_is_there_is_measured(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], offered: bool, compared: list[list[str]]
) -> None:
    monkeypatch.setattr(choices_module, "has_onednn", lambda: offered)
    found = with_times(monkeypatch, TIMES)
    choices = chooser(built()).choose(Training.model_validate(settings | {"tables": "torch", "threads": 1}))
    assert found == compared
    assert choices.products == settings.get("products", "blas")
    assert ("products" in choices.measured) == (["blas", "onednn"] in compared)


@pytest.mark.parametrize("structure", [MODEL, Model.model_validate(TOP_K)])
def test_measuring_leaves_model_and_random_states_alone(structure: Model) -> None:
    model, before, state = built(structure), built(structure).state_dict(), torch.get_rng_state()
    threads, way = torch.get_num_threads(), [each.compute for each in model.modules() if isinstance(each, Experts)]
    choices = chooser(model).choose(Training())
    assert set(choices.measured["products"]) == {"blas", "onednn"}
    assert choices.precision in ("fp32", "bf16")
    assert set(choices.measured["tables"]) >= {"fbgemm", "torch"}
    assert all(map(torch.equal, model.state_dict().values(), before.values()))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert [each.compute for each in model.modules() if isinstance(each, Experts)] == way
    assert {each.products for each in model.modules() if isinstance(each, Linear | StackedLinear)} == {"blas"}


class Clock:
    """Time that passes only where an option lets it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.calls: list[str] = []
        monkeypatch.setattr(choices_module, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def option(self, name: str, *seconds: float) -> Callable[[], None]:
        """What takes so long at its first call, its second, and so on; then what the last took."""
        left = list(seconds)

        def run() -> None:
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


def test_options_run_in_turns_and_the_fastest_run_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    options = {"a": clock.option("a", 0.001, 0.02, 0.01, 0.03), "b": clock.option("b", 0.5, 0.008, 0.012, 0.009)}
    assert time_options(options, 0) == pytest.approx({"a": 10, "b": 8})  # first runs are not counted
    assert clock.calls == ["a", "b"] * 4


def test_a_hopeless_option_is_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    times = time_options({"fast": clock.option("fast", 1), "slow": clock.option("slow", 1.01 * GIVE_UP)}, 100)
    assert clock.calls.count("slow") == 2  # once to prepare, once to be timed
    assert times["slow"] == pytest.approx(1010 * GIVE_UP)


def test_a_training_that_goes_on_keeps_them() -> None:
    now = keep_choices(CHOICES, Training(threads=2), CPU)
    assert (now.precision, now.tables, now.experts, now.threads) == ("bf16", "torch", "grouped", 2)
    assert keep_choices(CHOICES, Training(), CPU).threads == min(3, torch.get_num_threads())
    assert keep_choices(CHOICES, Training(tables="fbgemm"), CPU).tables == "fbgemm"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> FeatureFolder:
    return write_prepared(tmp_path_factory.mktemp("prepared"), LAYOUT)


def test_a_checkpoint_holds_them_and_resuming_measures_nothing(
    prepared: FeatureFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    auto = {"precision": "auto", "products": "auto", "tables": "auto"}
    with_times(monkeypatch, TIMES | {"onednn": 3.0})
    with pytest.raises(CrashError):
        train(prepared, tmp_path, crash(60), MODEL, **auto)
    before = latest_checkpoint(tmp_path)
    assert before.state.choices is not None
    choices = before.state.choices
    assert (choices.precision, choices.products, choices.tables) == ("fp32", "onednn", "torch")
    compared = with_times(monkeypatch, {name: 1 / time for name, time in TIMES.items()})
    train(prepared, tmp_path, None, MODEL, **auto)
    after = latest_checkpoint(tmp_path)
    assert after.state.step > before.state.step
    assert after.state.choices == before.state.choices
    assert compared == []


@pytest.mark.parametrize(("set_by_hand", "expected"), [("auto", "grouped"), ("dense", "dense")])
def test_experts_are_computed_as_chosen_or_as_set(
    prepared: FeatureFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, set_by_hand: str, expected: str
) -> None:
    with_times(monkeypatch, TIMES)
    experts = MODEL.experts.model_dump() | {"compute": set_by_hand}
    found: list[str] = []

    def look(trainer: Trainer) -> None:
        modules = trainer.sharded.model.modules()
        found.extend(each.compute for each in modules if isinstance(each, Experts))
        raise CrashError

    with pytest.raises(CrashError):
        train(prepared, tmp_path, look, Model.model_validate(TOP_K | {"experts": experts}), precision="fp32")
    assert set(found) == {expected}


def choose_on_a_rank(rank: int, world: int, port: int, folder: Path) -> None:
    """Chooses the library of products, and keeps an earlier choice, where ranks after the first have no oneDNN."""
    choices_module.has_onednn = lambda: rank == 0  # type: ignore[assignment, misc]
    ids = make_batch(random_rows(50)[0], LAYOUT, torchrec=False).ids
    settings = Training(precision="fp32", tables="torch", threads=1)
    with join(rank, world, port):
        chosen = Chooser(small_model(PlainTables(LAYOUT)).mixture, LAYOUT, CPU, 64, ids).choose(settings)
        again = keep_choices(Choices("fp32", "torch", "auto", 1, "onednn"), settings, CPU)
    timed = list(chosen.measured.get("products", {"blas": 0.0}))
    found = [chosen.products, timed, again.products]
    (folder / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
