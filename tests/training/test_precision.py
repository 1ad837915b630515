"""Which precision is chosen from which times, what a run keeps of it, and that measuring leaves a model as it was."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mmoe_rec.errors import UserError
from mmoe_rec.model import matmul as products_module
from mmoe_rec.model.mmoe import RankingModel, build_model
from mmoe_rec.model.tables import PlainTables
from mmoe_rec.preprocessing.prepare import FeatureFolder
from mmoe_rec.settings.load import load_settings
from mmoe_rec.settings.model import Model
from mmoe_rec.training import steps as choices_module
from mmoe_rec.training.checkpoint import latest_checkpoint
from mmoe_rec.training.steps import MIN_TIMED_RUNS, PrecisionChoice, choose_precision, time_alternatives
from mmoe_rec.training.train import train_model
from tests.model.examples import LAYOUT
from tests.pipelines.learnable_log import write_files
from tests.training.learnable import MODEL, write_prepared
from tests.training.ranks import CPU, join, spawn
from tests.training.resuming import CrashError, crash, train

TOP_K = MODEL.model_dump() | {"gates": {"routing": "top_k", "top_k": 2}}


def built(settings: Model = MODEL) -> RankingModel:
    return build_model(LAYOUT, settings, PlainTables(LAYOUT))


def with_times(monkeypatch: pytest.MonkeyPatch, *times: Mapping[str, float]) -> list[list[str]]:
    """Steps take the given milliseconds, at the last measurement and before; gives the list of what was compared."""
    compared: list[list[str]] = []

    def message(options: Mapping[str, Callable[[], object]], *_: object) -> dict[str, float]:
        for option in options.values():
            option()
        compared.append(list(options))
        return dict(times[min(len(compared), len(times)) - 1])

    monkeypatch.setattr(choices_module, "time_alternatives", message)
    return compared


@pytest.mark.parametrize(("fp32", "precision"), [(11.9, "fp32"), (12.1, "bf16"), (5.0, "fp32")])
def test_bf16_has_to_be_clearly_faster(monkeypatch: pytest.MonkeyPatch, fp32: float, precision: str) -> None:
    compared = with_times(monkeypatch, {"fp32": fp32, "bf16": 10.0})
    precision_choice = choose_precision(built().mixture, LAYOUT, CPU, 64)
    assert precision_choice == PrecisionChoice(precision, {"fp32": fp32, "bf16": 10.0})  # type: ignore[arg-type]
    assert compared == [["fp32", "bf16"]] * 2


def test_bf16_that_is_emulated_is_not_tried_on_more_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"fp32": 1.0, "bf16": 4.1}
    compared = with_times(monkeypatch, few, {"fp32": 9.0, "bf16": 1.0})
    assert choose_precision(built().mixture, LAYOUT, CPU, 4096) == PrecisionChoice("fp32", few)
    assert len(compared) == 1


def test_choices_are_reported_with_their_times() -> None:
    assert str(PrecisionChoice("bf16", {"fp32": 10.0, "bf16": 5.0})) == "bf16 (5.0 ms, fp32 10.0)"
    assert str(PrecisionChoice("fp32")) == "fp32"


def choose_on_a_rank(rank: int, world: int, port: int, folder: Path) -> None:
    """Choose a precision where bf16 is fast on the first rank alone."""
    choices_module.time_alternatives = lambda *_: {"fp32": 10.0, "bf16": (5.0, 9.0)[rank]}  # type: ignore[assignment]
    with join(rank, world, port):
        actual = choose_precision(built().mixture, LAYOUT, CPU, 64)
    (folder / f"{rank}.json").write_text(json.dumps([actual.precision, actual.step_ms["bf16"]]), encoding="utf-8")


@pytest.mark.thorough
def test_ranks_choose_by_the_slowest_of_them(tmp_path: Path) -> None:
    spawn(choose_on_a_rank, tmp_path)
    assert [json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2)] == [
        ["fp32", 9.0],
        ["fp32", 9.0],
    ]


def test_what_is_not_on_offer_is_reported_before_features_are_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products_module, "has_onednn", lambda: False)
    settings = load_settings(write_files(tmp_path), ["--training.matmul_backend", "onednn"])
    with pytest.raises(
        UserError, match=r"^training\.matmul_backend is onednn, which torch doesn't support in fp32 here"
    ):
        train_model(settings)
    assert not Path(settings.data.work_dir, "features").exists()


@pytest.mark.parametrize("structure", [MODEL, Model.model_validate(TOP_K)])
def test_measuring_leaves_model_and_random_states_alone(structure: Model) -> None:
    model, before, state = built(structure), built(structure).state_dict(), torch.get_rng_state()
    threads = torch.get_num_threads()
    precision_choice = choose_precision(model.mixture, LAYOUT, CPU, 64)
    assert precision_choice.precision in ("fp32", "bf16")
    assert min(precision_choice.step_ms.values()) > 0
    assert all(map(torch.equal, model.state_dict().values(), before.values()))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


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
    assert time_alternatives(options, 0) == pytest.approx({"a": 10, "b": 8})  # first runs are not counted
    assert clock.calls == ["a", "b"] * (1 + MIN_TIMED_RUNS)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> FeatureFolder:
    return write_prepared(tmp_path_factory.mktemp("prepared"), LAYOUT)


def test_a_checkpoint_holds_them_and_resuming_measures_nothing(
    prepared: FeatureFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_times(monkeypatch, {"fp32": 10.0, "bf16": 5.0})
    with pytest.raises(CrashError):
        train(prepared, tmp_path, crash(60), MODEL, precision="auto")
    before = latest_checkpoint(tmp_path)
    assert before is not None
    assert before.state.precision_choice == PrecisionChoice("bf16", {"fp32": 10.0, "bf16": 5.0})
    compared = with_times(monkeypatch, {"fp32": 1.0, "bf16": 5.0})
    train(prepared, tmp_path, None, MODEL, precision="auto")
    after = latest_checkpoint(tmp_path)
    assert after is not None
    assert after.state.step > before.state.step
    assert after.state.precision_choice == before.state.precision_choice
    with pytest.raises(CrashError):
        train(prepared, tmp_path / "set", crash(60), MODEL, precision="bf16")
    actual = latest_checkpoint(tmp_path / "set")
    assert actual is not None
    assert actual.state.precision_choice == PrecisionChoice("bf16")
    assert compared == []
