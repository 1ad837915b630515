"""What keeps features from being extended leaves them as they were, and is named."""

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmoe_rec.errors import UserError
from mmoe_rec.features import kinds
from mmoe_rec.preprocessing import extend as extend_module
from mmoe_rec.preprocessing.steps import Steps
from tests.log.small_logs import DAY, START, files_of, times_of
from tests.preprocessing.growing_log import WINDOWS, Growing


@pytest.fixture
def growing(tmp_path: Path) -> Growing:
    """Eight days, prepared."""
    return Growing.of_eight_days(tmp_path)


# Refusals


def _rewrite(log: Growing) -> None:
    path = log.folder / "log" / "100.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)


def _rename(log: Growing) -> None:
    path = log.folder / "events" / "100.parquet"
    path.rename(path.with_name("renamed.parquet"))
    log.add(8, 9)


def _write_early(log: Growing) -> None:
    early = log.table.filter(pa.array(times_of(log.table) < START + 8 * DAY)).slice(0, 20)
    late = log.table.filter(pa.array(times_of(log.table) > START + 9 * DAY)).slice(0, 20)
    pq.write_table(pa.concat_tables([late, early]), log.folder / "log" / "early.parquet")


def _write_last_again(log: Growing) -> None:
    last = times_of(log.table)[times_of(log.table) < START + 8 * DAY].max()
    row = log.table.filter(pa.array(times_of(log.table) == last)).slice(0, 1)
    pq.write_table(row, log.folder / "log" / "last.parquet")


def _change_schema(log: Growing) -> None:
    tree = log.schema.model_dump()
    tree["features"]["item"]["oov_buckets"] = 3
    log.schema = kinds.schema_of(tree)


def _drop_feature(log: Growing) -> None:
    tree = log.schema.model_dump()
    del tree["features"]["price"]
    log.schema = kinds.schema_of(tree)


def _swap_features(log: Growing) -> None:
    tree = log.schema.model_dump()
    tree["features"] = dict(reversed(tree["features"].items()))
    log.schema = kinds.schema_of(tree)


def _change_type(log: Growing) -> None:
    items = pa.array([str(each) for each in log.table["item"].to_pylist()])
    pq.write_table(log.table.set_column(1, "item", items), log.folder / "log" / "strings.parquet")


def _only_events(log: Growing) -> None:
    pq.write_table(log.events, log.folder / "events" / "more.parquet")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _rewrite,
            r"log/100.parquet' has changed since the features in '.*' were built from it; put it back, or build",
        ),
        (_rename, r"events/renamed.parquet' holds events .* of the time of '.*events/100.parquet', which is gone"),
        (_write_early, r"row 20 of '.*early.parquet' was requested .*; take them out of the log, or build .*anew"),
        (_write_last_again, r"row 0 of '.*last.parquet' was requested .* hold requests up to"),
        (
            _change_schema,
            r"setting 'features.item.oov_buckets' is 4 in the features in '.*' and 3 now; build the features anew",
        ),
        (_drop_feature, r"setting 'features.price' is there in the features in '.*' and missing now"),
        (
            _swap_features,
            r"'features' is in the order item, brand, .* in the features in '.*' and in the order n, bought",
        ),
        (_change_type, r"column 'item' changes its type"),
        (_only_events, r"the new files of the log '.*' have no rows"),
        (lambda log: (log.work / "features" / "files.json").unlink(), r"no record of the log's files \(files.json\)"),
        (lambda log: shutil.rmtree(log.work / "features"), r"holds no features that could be extended; build them"),
        (lambda log: (log.work / "features/counts/feature.item.parquet").unlink() or log.add(8, 9), r"are damaged: "),
    ],
)
def test_refusals_leave_all_as_it_was(growing, change, message):
    change(growing)
    before = files_of(growing.work)
    with pytest.raises(UserError, match=message):
        growing.extend()
    assert files_of(growing.work) == before


def test_new_rows_outside_of_all_splits(growing):
    growing.add(8, 9)
    windows = {**WINDOWS, "test": (START + 6 * DAY, START + 7 * DAY)}
    with pytest.raises(
        UserError, match=r"none of the \d+ new rows lies in a split: they were requested from 2023-11-2"
    ):
        growing.extend(windows)


# Failures


@pytest.mark.parametrize(("owner", "step"), [(Steps, "look_up"), (Steps, "encode"), (extend_module, "write_manifest")])
def test_a_failed_extension_leaves_the_old_folder(growing, monkeypatch, owner, step):
    growing.add(8, 12.1)
    before = files_of(growing.work)

    def fail(*_args: object, **_named: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(owner, step, fail)
        with pytest.raises(OSError, match="no space"):
            growing.extend()
    assert files_of(growing.work) == before
    assert growing.extend() is not None
