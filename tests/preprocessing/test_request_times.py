"""One request has one time, its first, wherever its rows lie; a request of several users is refused."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmoe_rec.errors import UserError
from mmoe_rec.preprocessing.build_inputs import DEFAULT_OPTIONS, BuildInputs, BuildOptions, Logs
from mmoe_rec.preprocessing.extend import Extension, extend
from mmoe_rec.preprocessing.prepare import FeatureFolder, encode_splits, find_existing_features, prepare
from mmoe_rec.report.formatting import describe_conflicting_times
from mmoe_rec.settings.schema import Schema
from tests.log.small_logs import (
    ALL_KINDS,
    DAY,
    START,
    at_times,
    files_of,
    random_log,
    schema_of,
    times_of,
    windows_of,
    with_column,
    with_requests,
    write_log,
)

COLUMNS = {"user": "user", "candidate": "item", "time": "time", "request": "request"}
SCHEMA = schema_of(ALL_KINDS, columns=COLUMNS)
WINDOWS = windows_of(6, 8, start=1)


def _with_first_times(table: pa.Table) -> pa.Table:
    """The same with each request's first time in all its rows, by pandas."""
    frame = pd.DataFrame({"request": table["request"].to_pylist(), "time": times_of(table)})
    return at_times(table, frame.groupby("request")["time"].transform("min").to_numpy())


def _cut(table: pa.Table, rows: int) -> list[pa.Table]:
    return [table.slice(start, rows) for start in range(0, table.num_rows, rows)]


def _build(folder: Path, *tables: pa.Table, schema: Schema = SCHEMA, **options: Any) -> FeatureFolder:
    source = str(write_log(folder / "log", *tables))
    return prepare(BuildInputs(source, schema, WINDOWS, folder / "work", BuildOptions(**options)))


def _encoded_and_state(prepared: FeatureFolder) -> dict[str, bytes]:
    return files_of(prepared.folder / "encoded") | files_of(prepared.serving)


@pytest.mark.parametrize(("workers", "rows_in_memory", "rows"), [(1, 20, 37), (2, 150, 11), (1, 10**6, 400)])
def test_all_is_that_of_a_log_with_the_first_times(
    tmp_path: Path, small_pieces: None, workers: int, rows_in_memory: int, rows: int
) -> None:
    """Features, splits, labels, statistics, latest attributes and memories, to the last byte."""
    table = with_requests(random_log(3))
    options = {"workers": workers, "rows_in_memory": rows_in_memory}
    actual = _build(tmp_path / "it's [found]?*", *_cut(table, rows), **options)
    expected = _build(tmp_path / "expected", *_cut(_with_first_times(table), rows), **options)
    assert _encoded_and_state(actual) == _encoded_and_state(expected)
    message, plain = actual.manifest["requests"], expected.manifest["requests"]
    frame = pd.DataFrame({"request": table["request"].to_pylist(), "time": times_of(table)}).groupby("request")["time"]
    assert message["count"] == plain["count"] == frame.ngroups
    assert (message["conflicting_times"], plain["conflicting_times"]) == ((frame.nunique() > 1).sum(), 0)
    assert message["longest_microseconds"] == (frame.max() - frame.min()).max()
    assert describe_conflicting_times(plain) is None
    assert describe_conflicting_times(message) == (
        f"{message['conflicting_times']} of {message['count']} requests have rows with several times, up to 48.0 "
        "hours apart. All rows of a request take its first time. Are request IDs reused?"
    )


def test_rows_encoded_with_features_of_another_log_have_the_first_times_too(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    table = with_requests(random_log(3))
    state = _build(tmp_path / "other", _with_first_times(with_requests(random_log(5)))).serving
    encoded = []
    for name, rows in (("found", table), ("expected", _with_first_times(table))):
        log = write_log(tmp_path / name, *_cut(rows, 100))
        if name == "found":
            (log / "bad.parquet").write_bytes(b"not Parquet")
        logs = Logs(str(log), SCHEMA, BuildOptions(skip_bad_files=True))
        encode_splits(state, logs, {"test": WINDOWS["test"]}, tmp_path / f"{name}.encoded")
        encoded.append(files_of(tmp_path / f"{name}.encoded"))
    assert encoded[0] == encoded[1]
    assert capsys.readouterr().err.replace("\n", "").count("left out: '") == 1


def test_a_split_without_rows_is_not_encoded(tmp_path: Path) -> None:
    table = with_requests(random_log(3))
    state = _build(tmp_path / "other", table).serving
    logs = Logs(str(write_log(tmp_path / "log", table)), SCHEMA, BuildOptions())
    with pytest.raises(UserError, match=r"the test split is empty: the log .* has requests from 2023-11-14"):
        encode_splits(state, logs, {"test": (0, 1)}, tmp_path / "encoded")
    assert not (tmp_path / "encoded").exists()


def test_the_first_time_is_not_that_of_a_file_left_out(tmp_path: Path) -> None:
    table = with_requests(random_log(3))
    bad = table.slice(0, 120)
    bad = with_column(bad, "click", pa.array(np.full(120, 7.0)))
    rest = table.slice(120)
    actual = _build(tmp_path / "found", bad, *_cut(rest, 90), skip_bad_files=True)
    assert len(actual.manifest["skipped"]) == 1
    expected = _build(tmp_path / "expected", *_cut(_with_first_times(rest), 90))
    assert _encoded_and_state(actual) == _encoded_and_state(expected)


def test_several_times_can_be_refused_also_of_features_at_hand(tmp_path: Path) -> None:
    table = random_log(3).slice(0, 40).append_column("request", pa.array(np.repeat(np.arange(10), 4)))
    table = table.set_column(0, "user", pa.array(np.repeat(np.arange(10), 4)))
    times = START + np.repeat(np.arange(10), 4) * DAY + np.where(np.arange(40) == 6, 5_000_000, 0)
    log_folder = write_log(tmp_path / "log", at_times(table, times).slice(0, 5), at_times(table, times).slice(5))
    place = str(log_folder), SCHEMA, WINDOWS, tmp_path / "work"
    keep = BuildOptions(on_duplicates="keep")
    refused = BuildOptions(on_duplicates="keep", on_conflicting_times="error")
    prepare(BuildInputs(*place, keep))
    assert find_existing_features(BuildInputs(*place, keep)) is not None
    assert find_existing_features(BuildInputs(*place, refused)) is None
    with pytest.raises(UserError) as caught:
        prepare(BuildInputs(*place, refused))
    assert str(caught.value) == (
        f"row 4 of '{log_folder}/0.parquet' and row 1 of '{log_folder}/1.parquet' belong to one request (column "
        "'request') but differ in column 'time'. This affects 1 request. Write the request's time into all its "
        "rows, or set data.on_conflicting_times to first."
    )
    assert find_existing_features(BuildInputs(*place, keep)) is not None


def _of_several_users() -> pa.Table:
    """Users number their requests themselves."""
    table = with_requests(random_log(3))
    frame = pd.DataFrame({"user": table["user"].to_pylist(), "request": table["request"].to_pylist()})
    own = frame.groupby("user")["request"].transform(lambda each: pd.factorize(each, sort=True)[0])
    return with_column(table, "request", pa.array(own.to_numpy()))


def test_a_request_of_several_users_is_refused(tmp_path: Path, small_pieces: None) -> None:
    table = _of_several_users()
    frame = pd.DataFrame({"user": table["user"].to_pylist(), "request": table["request"].to_pylist()})
    mixed = frame.groupby("request")["user"].nunique() > 1
    with pytest.raises(UserError) as caught:
        _build(tmp_path, *_cut(table, 100))
    place = r"row (\d+) of '([^']+)'"
    actual = re.fullmatch(
        rf"{place} and {place} belong to one request \(column 'request'\) but differ in column 'user'\. This affects "
        r"(\d+) requests\. A request has one user: give every request its own id, or set columns.request_scope to "
        r"user if ids are unique only for one user\.",
        str(caught.value),
    )
    *rows, count = actual.groups()
    assert int(count) == mixed.sum()
    first, second = (pq.read_table(file).slice(int(row), 1).to_pylist()[0] for row, file in (rows[:2], rows[2:]))
    assert first["request"] == second["request"]
    assert first["user"] != second["user"]


def test_ids_of_a_user_make_requests_with_the_user(tmp_path: Path, small_pieces: None) -> None:
    own = SCHEMA.model_copy(update={"columns": SCHEMA.columns.model_copy(update={"request_scope": "user"})})
    actual = _build(tmp_path / "found", *_cut(_of_several_users(), 100), schema=own)
    expected = _build(tmp_path / "expected", *_cut(with_requests(random_log(3)), 100))
    for split in WINDOWS:
        first, second = (pq.read_table(item.split(split)) for item in (actual, expected))
        assert first.drop_columns(["request"]) == second.drop_columns(["request"])
        pairs = set(zip(first["request"].to_pylist(), second["request"].to_pylist(), strict=True))
        assert len(pairs) == len(set(first["request"].to_pylist())) == len(set(second["request"].to_pylist()))
    assert actual.manifest["requests"] == expected.manifest["requests"]


def test_without_a_request_column_there_is_nothing_to_find(tmp_path: Path) -> None:
    prepared = _build(tmp_path, random_log(3), schema=schema_of(ALL_KINDS))
    assert prepared.manifest["requests"] is None
    assert [path.name for path in (prepared.folder / "requests").iterdir()] == ["rows.parquet"]


class _Days:
    """Nine days, to which files are added."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.table = with_requests(random_log(6, rows=400, days=12), spread=DAY // 24)
        self.first = times_of(_with_first_times(self.table))
        self.old = self.table.filter(pa.array(self.first < START + 9 * DAY))
        self.new = self.table.filter(pa.array(self.first >= START + 9 * DAY))
        self.last = int(self.first[self.first < START + 9 * DAY].max())

    def extend(
        self, new: pa.Table, old: pa.Table | None = None, options: BuildOptions = DEFAULT_OPTIONS
    ) -> FeatureFolder:
        self.before = _build(self.folder, self.old if old is None else old)
        return self.add(new, options).features

    def add(self, new: pa.Table, options: BuildOptions = DEFAULT_OPTIONS) -> Extension:
        pq.write_table(new, self.folder / "log" / "new.parquet")
        extended = extend(BuildInputs(str(self.folder / "log"), SCHEMA, WINDOWS, self.folder / "work", options))
        assert extended is not None
        return extended


def test_rows_of_a_request_of_days_before_are_reported_and_not_encoded(tmp_path: Path) -> None:
    days = _Days(tmp_path)
    late = np.flatnonzero((times_of(days.old) > times_of(_with_first_times(days.old))) & (times_of(days.old) > START))
    late = late[-7:]
    rest = np.setdiff1d(np.arange(days.old.num_rows), late)
    moved = days.old.take(pa.array(late))
    prepared = days.extend(pa.concat_tables([moved, days.new]), days.old.take(pa.array(rest)))
    message = prepared.manifest["requests"]
    assert (message["continued"], message["continued_rows"]) == (len(set(moved["request"].to_pylist())), 7)
    whole = pd.DataFrame({"request": days.table["request"].to_pylist(), "time": times_of(days.table)})
    assert message["count"] == whole["request"].nunique()
    assert message["conflicting_times"] == (whole.groupby("request")["time"].nunique() > 1).sum()
    assert prepared.manifest["splits"]["test"]["rows"] == days.new.num_rows
    encoded = pq.read_table(prepared.split("test"))["request"].to_pylist()
    assert set(encoded) == set(days.new["request"].to_pylist())


def _deliver_again(days: _Days, how: str, rng: np.random.Generator) -> int:
    """Writes the new rows, and old ones once more, in other files; gives the number of the latter."""
    log = days.folder / "log"
    old = days.old.take(pa.array(rng.permutation(days.old.num_rows)))
    if how == "some":
        old = old.slice(0, 29)
    if how == "compacted":
        (log / "0.parquet").unlink()
        pq.write_table(pa.concat_tables([old, days.new]), log / "all.parquet", row_group_size=37)
        return old.num_rows
    for number, part in enumerate(_cut(old, 150 if how == "split" else 1000)):
        pq.write_table(part, log / f"again {number}.parquet", compression="zstd")
    if how == "journal":
        (log / "again 0.parquet").rename(log / f"journal-{'ab' * 16}-000000000002.parquet")
    pq.write_table(days.new, log / "new.parquet")
    return old.num_rows


@pytest.mark.parametrize("how", ["written again", "compacted", "split", "some", "journal"])
def test_rows_that_came_before_count_once(
    tmp_path: Path, small_pieces: None, capsys: pytest.CaptureFixture, how: str
) -> None:
    days, only = _Days(tmp_path / "found"), _Days(tmp_path / "expected")
    expected = only.extend(only.new)
    _build(days.folder, days.old)
    repeated = _deliver_again(days, how, np.random.default_rng(7))
    capsys.readouterr()
    place = str(days.folder / "log"), SCHEMA, WINDOWS, days.folder / "work"
    extended = extend(BuildInputs(*place))
    assert (
        f"skipped {repeated:,} rows of new files that repeat rows of earlier files, such as row "
        in capsys.readouterr().err
    )
    assert extended.rows == days.new.num_rows
    actual = extended.features
    assert files_of(actual.serving) == files_of(expected.serving)
    assert pq.read_table(actual.split("test")) == pq.read_table(expected.split("test"))
    assert [path.name for path in (actual.folder / "encoded").iterdir() if path.is_dir()] == ["test"]
    assert actual.manifest["requests"] == expected.manifest["requests"]
    kept = [pq.read_table(item.folder / "requests" / "rows.parquet") for item in (actual, expected)]
    assert kept[0] == kept[1]
    assert len(kept[0]) == days.old.num_rows + days.new.num_rows
    # Nothing is new on the day after, when rows of the day before come again.
    pq.write_table(days.new.slice(5, 9), days.folder / "log" / "zz.parquet")
    with pytest.raises(UserError, match=r"^none of the \d+ new rows is of a new request later than"):
        extend(BuildInputs(*place))
    assert "skipped 9 rows of new files that repeat rows of earlier files, such as row 0 of " in capsys.readouterr().err


def test_rows_that_came_before_are_kept_if_that_is_meant(tmp_path: Path) -> None:
    days = _Days(tmp_path)
    new = pa.concat_tables([days.new, days.old.slice(40, 7)])
    prepared = days.extend(new, options=BuildOptions(on_duplicates="keep"))
    assert (prepared.manifest["rows"], prepared.manifest["requests"]["continued_rows"]) == (407, 7)


def test_ids_that_are_all_used_again_are_reported(tmp_path: Path) -> None:
    days = _Days(tmp_path)
    again = days.new.slice(0, 20)
    for column in ("user", "request"):
        values = days.old[column].slice(0, 20).combine_chunks()
        again = with_column(again, column, values)
    again = at_times(again, times_of(again) + np.arange(20))
    with pytest.raises(UserError, match=r"^none of the 20 new rows is of a new request later .* new ids"):
        days.extend(again, options=BuildOptions(on_duplicates="keep"))


def test_a_row_before_a_request_of_days_before_is_refused(tmp_path: Path) -> None:
    days = _Days(tmp_path)
    early = at_times(with_column(days.old.slice(3, 1), "item", pa.array([77])), times_of(days.old)[3:4] - DAY)
    with pytest.raises(
        UserError, match=r"^'.*new.parquet' has a row requested at .*, which is earlier than all rows of the same"
    ):
        days.extend(pa.concat_tables([early, days.new]))


def test_a_request_of_another_user_of_days_before_is_refused(tmp_path: Path) -> None:
    """Ids that begin anew each day are no requests of days before."""
    days = _Days(tmp_path)
    again = with_column(days.new, "request", np.zeros(days.new.num_rows, int))
    user = days.old["user"].to_pylist()[days.old["request"].to_pylist().index(0)]
    second = pa.array([value for value in set(days.new["user"].to_pylist()) if value != user][:1] * 2)
    again = again.slice(0, 2).set_column(0, "user", second)
    with pytest.raises(UserError) as caught:
        days.extend(pa.concat_tables([again, days.new]))
    said = r"a row of an earlier file and row 0 of '.*new.parquet' belong to one request .* differ in column 'user'"
    assert re.match(said, str(caught.value))
    assert days.before.manifest["rows"] == days.old.num_rows  # all stays


@pytest.mark.parametrize("file", ["requests/requests.parquet", "requests/rows.parquet", "counts/*.parquet"])
@pytest.mark.parametrize("content", [None, b"PAR1 no Parquet PAR1"])
def test_a_lost_record_of_the_days_before_is_named(tmp_path: Path, file: str, content: bytes | None) -> None:
    days = _Days(tmp_path)
    record = next(_build(tmp_path, days.old).folder.glob(file))
    record.unlink()
    if content is not None:
        record.write_bytes(content)
    with pytest.raises(UserError, match=f"{Path(file).parent}.*' is missing or damaged .*[Bb]uild the features again"):
        days.add(days.new)
