"""The ways of tables on a CPU: choosing one, the same steps by each, directly or through torchrec, of any width."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from mmoe_rec.batches.batch import make_batch
from mmoe_rec.errors import UserError
from mmoe_rec.model.tables import PlainTables, initial_rows, torchrec_tables
from mmoe_rec.settings.training import Training
from mmoe_rec.training import table_backends as tables_module
from mmoe_rec.training.checkpoint import load_unsharded
from mmoe_rec.training.distributed import process_group, training_process_group
from mmoe_rec.training.sharding import shard
from mmoe_rec.training.table_backends import TableBackend, choose_table_backend
from tests.model.examples import LAYOUT, random_rows, small_model
from tests.reference.model import adagrad
from tests.training.ranks import CPU, save_weights


def test_the_setting_takes_what_there_is() -> None:
    choices = get_args(Training.model_fields["table_backend"].annotation)
    assert choices == ("auto", *get_args(TableBackend))
    assert [choose_table_backend(choice, "cpu") for choice in choices] == ["fbgemm", "fbgemm", "torch"]
    for device, ranks in (("cpu", 2), ("cuda", 1)):
        assert choose_table_backend("auto", device, ranks) == "fbgemm"
        with pytest.raises(UserError, match=r"^training\.table_backend is torch, which trains in one process on a CPU"):
            choose_table_backend("torch", device, ranks)


def test_plain_tables_are_not_spread() -> None:
    settings = Training(device="cpu", table_backend="torch", sharding="column_wise")
    with (
        pytest.raises(UserError, match=r"sharding is column_wise, but .* Set either"),
        training_process_group(settings),
    ):
        pass


def test_without_torchrec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables_module, "torchrec_installed", lambda: False)
    assert choose_table_backend("auto", "cpu") == "torch"
    with pytest.raises(
        UserError, match=r"table_backend is fbgemm, but torchrec and fbgemm are not installed\. .* torch\.$"
    ):
        choose_table_backend("fbgemm", "cpu")
    with pytest.raises(
        UserError, match=r"^training on several processes needs torchrec.*, or start it without torchrun\.$"
    ):
        choose_table_backend("auto", "cpu", ranks=2)
    with pytest.raises(UserError, match=r"^training on a GPU needs torchrec.*, or set training\.device to cpu\.$"):
        choose_table_backend("auto", "cuda")


@pytest.mark.parametrize(
    ("error", "actual"),
    [
        (ModuleNotFoundError("No module named 'torchrec'", name="torchrec"), False),
        (ModuleNotFoundError("No module named 'fbgemm_gpu.x'", name="fbgemm_gpu.x"), False),
        (ModuleNotFoundError("No module named 'tensordict'", name="tensordict"), None),
        (OSError("libnvidia-ml.so.1: cannot open shared object file"), None),
    ],
)
def test_what_does_not_load_is_not_taken_for_what_is_not_there(
    monkeypatch: pytest.MonkeyPatch, error: Exception, actual: bool | None
) -> None:
    def failing(name: str) -> Any:
        raise error

    monkeypatch.setattr(tables_module.importlib, "import_module", failing)
    asked = tables_module.torchrec_installed.__wrapped__
    if actual is None:
        with pytest.raises(UserError, match="are installed, but do not load"):
            asked()
    else:
        assert asked() is actual


# Inputs that share a table lie apart, and a table is wider than its neighbours.
MIXED = replace(
    LAYOUT,
    ids=(*LAYOUT.ids[3:], *LAYOUT.ids[:3]),
    tables=tuple(replace(item, dim=12 if index == 1 else item.dim) for index, item in enumerate(LAYOUT.tables)),
)


def test_a_batch_has_ids_of_one_table_side_by_side() -> None:
    encoded, _ = random_rows(8)
    ids = make_batch(encoded, MIXED, torchrec=True).ids
    names = ids.keys()
    tables = [
        next(lookup_input.table for lookup_input in MIXED.lookup_inputs() if lookup_input.name == name)
        for name in names
    ]
    assert tables == sorted(tables, key=[item.name for item in MIXED.tables].index)
    assert [item.table for item in MIXED.ids] != tables
    for name, table in zip(names, tables, strict=True):
        assert (ids[name].values() < MIXED.table(table).rows).all()


RATE = 0.05


# One width that kernels take, and all remainders.
WIDTHS = {"t0": 1, "t1": 2, "item": 7, "city": 8, "ages": 3, "t4": 5}


def test_tables_of_any_width_are_trained_by_row_wise_adagrad(tmp_path: Path) -> None:
    layout = replace(LAYOUT, tables=tuple(replace(table, dim=WIDTHS[table.name]) for table in LAYOUT.tables))
    plain = small_model(PlainTables(layout, 3), layout)
    assert isinstance(plain.tables, PlainTables)
    momentum = {name: torch.zeros(len(weight)) for name, weight in plain.tables.named_parameters()}
    with process_group(CPU):
        sharded = shard(
            small_model(torchrec_tables(layout), layout),
            layout,
            CPU,
            batch_size=32,
            settings=Training(table_learning_rate=RATE, seed=3),
        )
        for step in range(6):
            encoded, labels = random_rows(32, seed=step, layout=layout)
            first = plain(make_batch(encoded, layout, labels, torchrec=False)).logits
            second = sharded.model(make_batch(encoded, layout, labels, torchrec=True)).logits
            torch.testing.assert_close(second, first, atol=1e-5, rtol=1e-4)
            for logits in (first, second):
                (logits - 1).square().sum().backward()
            for name, weight in plain.tables.named_parameters():
                assert weight.grad is not None
                adagrad(weight.data, momentum[name], weight.grad, RATE)
                weight.grad = None
            sharded.table_optimizer.step()
        save_weights(sharded.model, tmp_path / "trained")
    loaded = small_model(PlainTables(layout, 99), layout)
    load_unsharded(loaded, tmp_path / "trained")
    for table in layout.tables:
        name = f"tables.embedding_bags.{table.name}.weight"
        trained = loaded.state_dict()[name]
        assert trained.shape == (table.rows, table.dim)
        assert (trained - initial_rows(table, 3, 0, table.rows)).abs().max() > RATE
        torch.testing.assert_close(trained, plain.state_dict()[name], atol=1e-5, rtol=1e-4)


# fbgemm's CPU kernels know the processor.


CODE = """
import ctypes, pathlib, sys
from mmoe_rec.training import table_backends
if sys.argv[1] == "share":
    print(table_backends.copy_cpuinfo_to_fbgemm(), table_backends.copy_cpuinfo_to_fbgemm())
import fbgemm_gpu
# What fbgemm's kernels ask before they choose.
ask = ctypes.CDLL(str(pathlib.Path(fbgemm_gpu.__file__).with_name("fbgemm.so")))._ZN6fbgemm20fbgemmHasAvx2SupportEv
ask.restype = ctypes.c_bool
print(ask())
"""


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="the libraries are others elsewhere")
def test_the_kernels_know_the_processor() -> None:
    actual = {}
    for way in ("share", "leave"):
        done = subprocess.run([sys.executable, "-c", CODE, way], capture_output=True, text=True, check=True)
        actual[way] = done.stdout.split()
    shared, again, known = actual["share"]
    assert again == "False", "there is nothing left to share"
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    assert known == str("avx2" in flags)
    if shared == "True":  # this build of torch has two copies
        assert actual["leave"] == ["False"]
