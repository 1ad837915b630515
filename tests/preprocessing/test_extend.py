"""Features that are extended day by day: the state of all days before and a new day give the state of all days; what
keeps them from being extended leaves them as they were, and is named."""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmoe_rec.errors import UserError
from mmoe_rec.features import kinds
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.preprocessing import extend as extend_module
from mmoe_rec.preprocessing.build_inputs import BuildInputs
from mmoe_rec.preprocessing.build_steps import BuildSteps
from mmoe_rec.preprocessing.prepare import FeatureFolder, find_existing_features
from mmoe_rec.profiling.data_health import measure_health
from tests.log.small_logs import ALL_KINDS, DAY, START, files_of, times_of, windows_of
from tests.preprocessing.growing_log import WINDOWS, Growing, training_items


@pytest.fixture
def growing(tmp_path: Path) -> Growing:
    """Eight days, prepared."""
    return Growing.of_eight_days(tmp_path)


def _known(prepared: FeatureFolder, feature: str = "item") -> list:
    return FeaturePipeline.load(prepared.serving, stores=False).vocabularies[feature].ids.to_pylist()


def test_ids_never_move_and_new_ones_follow_by_count(tmp_path):
    log = Growing(tmp_path, 2, 600)
    log.add(0, 8)
    first = log.prepare()
    known = _known(first)
    counted = Counter(training_items(log, WINDOWS, 0, 8))
    assert known == [item for item, n in sorted(counted.items(), key=lambda each: (-each[1], each[0])) if n >= 3]
    for start, end in ((8, 8.3), (8.3, 9), (9, 12.1)):
        log.add(start, end)
        windows = windows_of(end - 0.1, end)
        extended = log.extend(windows)
        assert extended is not None
        counted.update(training_items(log, windows, start, end))
        new = [item for item, n in counted.items() if n >= 3 and item not in known]
        known += sorted(new, key=lambda item: (-counted[item], item))
        assert extended.new_ids["item"] == len(new)
        assert extended.features.layout.dense == first.layout.dense, "statistics stay"
        assert _known(extended.features) == known
        assert extended.features.layout.table("item").rows == 1 + 4 + len(known)
        counts = pq.read_table(extended.features.folder / "counts" / "feature.item.parquet").to_pydict()
        assert dict(zip(counts["id"], counts["count"], strict=True)) == counted
        assert extended.features.manifest["vocabularies"]["item"] == {"distinct": len(counted), "known": len(known)}
    assert len(known) > 12


def test_a_vocabulary_grows_up_to_its_largest_size(tmp_path):
    log = Growing(tmp_path, 2, 600)
    _with_features(log, lambda features: {**features, "item": {**ALL_KINDS["item"], "max_size": 14}})
    log.add(0, 7)
    assert len(_known(log.prepare())) == 12
    log.add(7, 12.1)
    extended = log.extend(windows_of(11, 11.5))
    assert extended is not None
    assert extended.new_ids["item"] == 2
    assert len(_known(extended.features)) == 14


def test_the_manifest_and_what_is_at_hand(growing):
    before = growing.prepare().manifest
    growing.add(8, 12.1)
    windows = windows_of(10, 11)
    extended = growing.extend(windows)
    after = extended.features.manifest
    assert after["extends"] == before["fingerprint"]
    assert after["rows"] == before["rows"] + extended.rows == growing.table.num_rows
    assert after["files"] == 2
    assert after["first_request"] == before["first_request"]
    assert after["request_microseconds"] == [times_of(growing.table).min(), times_of(growing.table).max()]
    taken = find_existing_features(BuildInputs(growing.source, growing.schema, windows, growing.work))
    assert taken is not None
    assert taken.manifest == after
    built = growing.prepare("whole", windows)
    for name in ("latest.user.parquet", "latest.candidate.parquet"):
        mine, theirs = (pq.read_table(item.serving / name) for item in (extended.features, built))
        assert mine.equals(theirs)
    whole = built.manifest
    # A model of the one must not be scored on rows of the other: their ids have other rows.
    assert whole["fingerprint"] != after["fingerprint"] != before["fingerprint"]
    assert whole["digest"] == after["digest"]
    assert whole["events"] == after["events"]


def test_what_is_advised_where_a_split_has_no_rows_helps(growing):
    growing.add(8, 10)
    prepared = growing.extend().features
    assert prepared.manifest["splits"]["train"]["rows"] == 0
    message = r"have no train rows: .* Set `split` around the requests of the next new files .*, or set another `data"

    def count(features: FeatureFolder) -> None:
        measure_health("log", features, growing.schema, growing.folder / "scratch")

    for needs_rows in (
        lambda: prepared.require_rows("train", "validation"),
        lambda: count(prepared),
    ):
        with pytest.raises(UserError, match=message):
            needs_rows()
    prepared.require_rows("test")
    count(growing.prepare("another"))
    growing.add(10, 12.1)
    count(growing.extend(windows_of(11, 11.5)).features)


# Refusals


def _write_last_again(log: Growing) -> None:
    last = times_of(log.table)[times_of(log.table) < START + 8 * DAY].max()
    row = log.table.filter(pa.array(times_of(log.table) == last)).slice(0, 1)
    pq.write_table(row, log.folder / "log" / "last.parquet")


def _with_features(log: Growing, change: Callable[[dict], dict]) -> None:
    tree = log.schema.model_dump()
    log.schema = kinds.parse_schema({**tree, "features": change(tree["features"])})


def _change_schema(log: Growing) -> None:
    _with_features(log, lambda features: {**features, "item": {**features["item"], "oov_buckets": 3}})


def _drop_feature(log: Growing) -> None:
    _with_features(log, lambda features: {name: item for name, item in features.items() if name != "price"})


def _swap_features(log: Growing) -> None:
    _with_features(log, lambda features: dict(reversed(features.items())))


def _change_type(log: Growing) -> None:
    items = pa.array([str(value) for value in log.table["item"].to_pylist()])
    pq.write_table(log.table.set_column(1, "item", items), log.folder / "log" / "strings.parquet")


def _only_events(log: Growing) -> None:
    pq.write_table(log.events, log.folder / "events" / "more.parquet")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_write_last_again, r"^none of the 1 new rows is of a new request later than 2023"),
        (_change_schema, r"setting 'features.item.oov_buckets' is 4 in the features in '.*' and 3 now; build the fe"),
        (_drop_feature, r"setting 'features.price' is present in the features in '.*' and missing now"),
        (
            _swap_features,
            r"'features' is in the order item, brand, .* in the features in '.*' and in the order pairs, n, b",
        ),
        (_change_type, r"column 'item' has the type int64 when"),
        (_only_events, r"^none of the 0 new rows is of a new request later than 2023"),
        (
            lambda log: (log.work / "features/files.json").unlink(),
            r"no readable record of the log's files \(files.json\)",
        ),
        (lambda log: shutil.rmtree(log.work / "features"), r"has no features to extend\. Build them"),
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
    with pytest.raises(UserError, match=r"none of the \d+ new rows lies in a split: they were requested from 2023-11"):
        growing.extend({**WINDOWS, "test": (START + 6 * DAY, START + 7 * DAY)})


# Failures


@pytest.mark.parametrize(
    ("owner", "step"), [(BuildSteps, "look_up"), (BuildSteps, "encode"), (extend_module, "write_manifest")]
)
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
