"""Which ways there are for tables on a CPU, choosing one, and small tables to time them by."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from mmoe_rec.batches.batch import make_batch
from mmoe_rec.errors import UserError
from mmoe_rec.model.layout import ModelLayout
from mmoe_rec.model.tables import torchrec_tables
from mmoe_rec.settings.sections import Training
from mmoe_rec.training import fbgemm, measure
from mmoe_rec.training import tables as tables_module
from mmoe_rec.training.ranks import process_group
from mmoe_rec.training.sharding import shard
from mmoe_rec.training.tables import Way, table_batches, use_way, way_of, ways_on_offer
from tests.model.examples import LAYOUT, random_rows, small_model
from tests.training.ranks import CPU


def test_the_setting_takes_what_there_is() -> None:
    choices = get_args(Training.model_fields["tables"].annotation)
    assert choices == ("auto", *get_args(Way))
    assert ways_on_offer()[0] == way_of("auto", "cpu") == "fbgemm"
    assert ways_on_offer()[-1] == "torch"


def test_fbgemm_that_cannot_be_kept_from_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with the CPU build of torch."""
    monkeypatch.setattr(tables_module, "can_be_withheld", lambda: False)
    assert ways_on_offer() == ("fbgemm", "torch")
    with pytest.raises(
        UserError, match=r"^training\.tables is fbgemm_reference, but .*: set it to auto, or .*\(fbgemm, t"
    ):
        way_of("fbgemm_reference", "cpu")


def test_without_torchrec(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (fbgemm, tables_module):
        monkeypatch.setattr(module, "torchrec_installed", lambda: False)
    assert ways_on_offer() == ("torch",)
    assert way_of("auto", "cpu") == "torch"
    with pytest.raises(UserError, match=r"tables is fbgemm, but torchrec and fbgemm are not installed: .* \(torch\)$"):
        way_of("fbgemm", "cpu")
    with pytest.raises(
        UserError, match=r"^training on several processes needs torchrec.*; or start it without torchrun$"
    ):
        way_of("auto", "cpu", ranks=2)
    with pytest.raises(UserError, match=r"^training on a GPU needs torchrec.*; or set training\.device to cpu$"):
        way_of("auto", "cuda")


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (ModuleNotFoundError("No module named 'torchrec'", name="torchrec"), False),
        (ModuleNotFoundError("No module named 'fbgemm_gpu.x'", name="fbgemm_gpu.x"), False),
        (ModuleNotFoundError("No module named 'tensordict'", name="tensordict"), None),
        (OSError("libnvidia-ml.so.1: cannot open shared object file"), None),
    ],
)
def test_what_does_not_load_is_not_taken_for_what_is_not_there(
    monkeypatch: pytest.MonkeyPatch, error: Exception, found: bool | None
) -> None:
    def failing(name: str) -> Any:
        raise error

    monkeypatch.setattr(fbgemm.importlib, "import_module", failing)
    asked = fbgemm.torchrec_installed.__wrapped__
    if found is None:
        with pytest.raises(UserError, match="are installed, but do not load"):
            asked()
    else:
        assert asked() is found


def test_a_sharded_model_changes_its_way_between_steps() -> None:
    """Each step, by whichever way, adds to the same weights and the same momentum."""
    encoded, labels = random_rows(64)
    batch = make_batch(encoded, LAYOUT, labels, torchrec=True)
    found = {}
    for name, taken in (("one", ["fbgemm"] * 4), ("all", ["torch", "fbgemm", ways_on_offer()[-2], "torch"])):
        with process_group(CPU):
            sharded = shard(
                small_model(torchrec_tables(LAYOUT)), LAYOUT, CPU, batch_size=64, table_learning_rate=0.1, way="fbgemm"
            )
            assert sharded.way == "fbgemm"
            (module,) = table_batches(sharded.model)
            for way in taken:
                use_way(sharded.model, way)
                assert ("forward" in vars(module)) == (way == "torch")
                sharded.table_optimizer.zero_grad()
                sharded.model(batch).logits.square().sum().backward()
            found[name] = (module.weights_host.detach().clone(), module.momentum1_host.clone())
    for one, other in zip(*found.values(), strict=True):
        assert one.any()
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("torchrec", [True, False])
@pytest.mark.parametrize("there", [True, False])
def test_a_trial_looks_up_and_updates_once(monkeypatch: pytest.MonkeyPatch, torchrec: bool, there: bool) -> None:
    if not there:
        for module in (measure, tables_module):
            monkeypatch.setattr(module, "torchrec_installed", lambda: False)
    encoded, _ = random_rows(50)
    ids = make_batch(encoded, LAYOUT, torchrec=torchrec).ids
    looked_up = []
    backward = torch.Tensor.backward

    def counted(pooled: torch.Tensor, gradient: torch.Tensor) -> None:
        looked_up.append(pooled.detach().clone())
        backward(pooled, gradient)

    for way in ways_on_offer():
        once = measure.trial(way, LAYOUT, ids, rows_at_most=20)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "backward", counted)
            once()
            once()
        first, second = looked_up[-2:]
        assert first.shape == (50, sum(LAYOUT.table(each.table).dim for each in LAYOUT.ids))
        assert not torch.equal(first, second), "the tables were updated"
    assert len(looked_up) == 2 * len(ways_on_offer())
    measure.trial(ways_on_offer()[0], ModelLayout((), (), LAYOUT.dense, LAYOUT.tasks), None)()
