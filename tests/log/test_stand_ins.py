"""What stands in for users, candidates and times of a plain table, and what can't be had of one."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from mmoe_rec.errors import UserError
from mmoe_rec.log.reader import Log
from mmoe_rec.preprocessing.build_inputs import BuildInputs
from mmoe_rec.preprocessing.extend import extend
from mmoe_rec.preprocessing.prepare import build_features
from mmoe_rec.settings.load import load_settings
from mmoe_rec.settings.log_columns import NO_CANDIDATE, NO_USER
from mmoe_rec.settings.sections import Settings
from tests.log.plain_tables import SPLIT_VALUES, plain_settings, plain_table
from tests.log.small_logs import with_column, with_values

HISTORY = {"kind": "history", "task": "label", "of": "code"}
COUNTER = {"kind": "counter", "task": "label", "by": ["word"]}
PAIRS = {"kind": "cooccurrence", "task": "label"}
AGE = {"kind": "time", "column": "x", "parts": ["age"]}
LATE = {"label": "label", "objective": "engagement", "label_delay_days": 1}
TIMED = {
    "columns": {"time": "at", "candidate": "code"},
    "split": {"train_end": "2024-01-01", "validation_end": "2024-01-02"},
}
FEATURES = {"code": {"kind": "id", "column": "code", "min_count": 1}}


def read(settings: Settings, rows_per_part: int) -> pa.Table:
    log = Log(settings.data.log, settings.schema_)
    parts = log.parts(rows_per_part)
    return pa.concat_tables([rows.table for part in parts for rows in log.reader.read(part)]).combine_chunks()


@pytest.mark.parametrize("rows_per_part", [1, 100, 10**6])
def test_rows_are_users_and_candidates_by_their_number(tmp_path: Path, rows_per_part: int) -> None:
    """Whatever files and parts they lie in; and their time is the place of their split."""
    tables = [plain_table(seed, rows) for seed, rows in ((0, 70), (1, 1), (2, 130))]
    rows = read(plain_settings(tmp_path, *tables), rows_per_part)
    assert rows[NO_USER].to_pylist() == rows[NO_CANDIDATE].to_pylist() == list(range(201))
    folds = pa.concat_tables(tables)["fold"].to_numpy()
    expected = np.select([folds <= 2, folds == 3, folds == 4], [0, 1, 2])
    assert np.array_equal(rows["\0time"].cast(pa.int64()).to_numpy(), expected)


def test_a_request_is_the_user_where_there_is_no_other(tmp_path: Path) -> None:
    table = plain_table(3)
    rows = read(plain_settings(tmp_path, table, columns={"request": "group"}), 50)
    users, groups = rows[NO_USER].to_numpy(), table["group"].to_numpy()
    assert len(np.unique(users)) == len(np.unique(groups))
    assert len(np.unique(np.stack([users, groups]), axis=1).T) == len(np.unique(groups))


def test_a_users_rows_of_a_split_are_one_request(tmp_path: Path) -> None:
    table = plain_table(3)
    settings = plain_settings(tmp_path, table, columns={"user": "person"})
    log = Log(settings.data.log, settings.schema_)
    (rows,) = (item for part in log.parts() for item in log.reader.read(part))
    split = np.select([table["fold"].to_numpy() <= 2, table["fold"].to_numpy() == 3], [0, 1], 2)
    pairs = {(person, item) for person, item in zip(table["person"].to_pylist(), split, strict=True)}
    assert len(np.unique(rows.request_hashes())) == len(pairs)


PLAIN = plain_table(0)
STRANGE = with_values(PLAIN, "fold", {7: 5, 9: 6})
OF_TEXT = with_column(STRANGE, "fold", [f"f{item}" for item in STRANGE["fold"].to_pylist()])
TEXTS = {name: [f"f{item}" for item in listed] for name, listed in SPLIT_VALUES.items()}
FIRST, SECOND, *_ = np.flatnonzero(PLAIN["group"].to_numpy() == 5).tolist()
DIVIDED = with_values(PLAIN, "fold", {SECOND: 1 if PLAIN["fold"][FIRST].as_py() > 2 else 4})
HELD_OUT = PLAIN.append_column("held_out", pa.array(np.arange(400) % 3 == 0))
WORDS = {
    "roles": {"candidate": ["x"]},
    "features": {"x": {"kind": "numeric", "column": "x"}},
    "split": {"column": "word", "train": ["a"], "validation": ["b"], "test": [1]},
}
NO_WEIGHT = r"column 'weight' holds .* which is not from 1e-20 to 1e\+20. Fix the data"


@pytest.mark.parametrize(
    ("table", "sections", "message"),
    [
        (STRANGE, {}, "'fold' .split.column. has the unexpected value 5 .expected: 1, 2, 3, 4.*row 7"),
        (OF_TEXT, {"split": {"column": "fold", **TEXTS}}, "value 'f5' .expected: 'f1', 'f2', 'f3', 'f4'.*row 7"),
        (with_values(PLAIN, "fold", {0: None}), {}, "value null .expected: 1, 2, 3, 4.*row 0"),
        (
            PLAIN,
            {"split": {"column": "fold", **SPLIT_VALUES, "test": ["4"]}},
            "'fold' holds numbers, but split.test compares it with '4'. .* without quotes",
        ),
        (PLAIN, WORDS, "'word' holds text, but split.test compares it with 1. Write the value in quotes."),
        (  # true and false are 1 and 0
            HELD_OUT,
            {"split": {"column": "held_out", "train": [False], "validation": [True], "test": [2]}},
            "the test split is empty: no row of the log .* has 2 in column 'held_out'",
        ),
        (
            DIVIDED,
            {"columns": {"request": "group"}},
            r"belong to one request \(column 'group'\) but differ in column 'fold'",
        ),
        *(
            (with_values(PLAIN, "weight", {3: value}), {"columns": {"weight": "weight"}}, NO_WEIGHT)
            for value in (0.0, -1.0, 1e-40, float("nan"), float("inf"), None)
        ),
    ],
)
def test_a_table_that_is_refused(tmp_path: Path, table: pa.Table, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_features(plain_settings(tmp_path, table, **sections))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"features": {**FEATURES, "last": HISTORY}},
            "feature 'last' needs columns.time, because it reads",
        ),
        (
            {"features": {**FEATURES, "rate": COUNTER}},
            "feature 'rate' needs columns.time, because it reads",
        ),
        (
            {"features": {"when": {"kind": "time"}}},
            "feature 'when' needs columns.time, because it has no `",
        ),
        (
            {"features": {"f": AGE}},
            "feature 'f' needs columns.time, because its part `age` ends at the r",
        ),
        ({"tasks": {"label": LATE}}, "task 'label' has label_delay_days, which needs columns.time"),
        ({"columns": {"request": "group", "request_scope": "user"}}, "request_scope user needs columns.user"),
        ({"features": {"fold": {"kind": "numeric", "column": "fold"}}}, "reads column 'fold', which is split.column"),
        ({"split": {"column": "label"}}, "split.column and tasks.label.label both name column 'label'"),
        ({"split": {"train_end": "2024-01-01", "validation_end": "2024-01-02"}}, "columns.time is null, so rows can"),
        (
            {"columns": {"time": "at"}},
            "split.column ('fold') can't be combined with columns.time ('at'), because training",
        ),
        ({"split": {"column": "fold", "train_end": "2024-01-01"}}, "train_end and `column` can't be combined"),
        ({"split": {"column": "fold", "train": [1], "test": [1]}}, "both train and test list the value 1"),
        ({"split": {}}, "train_end is missing"),
        ({"columns": {"weight": "label"}}, "columns.weight and tasks.label.label both name column 'label'"),
        ({"columns": {"user": "person", "weight": "person"}}, "columns.user and columns.weight both name column"),
        (
            {**TIMED, "roles": {}, "features": {**FEATURES, "last": HISTORY}},
            "feature 'last' needs columns.user, because it lists events of a user",
        ),
        (
            {**TIMED, "roles": {}, "features": {**FEATURES, "pairs": PAIRS}},
            "feature 'pairs' needs columns.user, because it counts candidates of the same user",
        ),
        (
            {**TIMED, "columns": {"time": "at", "user": "person"}, "features": {**FEATURES, "pairs": PAIRS}},
            "feature 'pairs' needs columns.candidate, because it counts",
        ),
    ],
)
def test_what_a_plain_table_can_not_have(tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as error:
        plain_settings(tmp_path, **sections)
    assert message in str(error.value)


def test_settings_of_a_plain_table_stay_as_they_are(tmp_path: Path) -> None:
    """Through YAML and through the schema of a model; no stand-in is written anywhere."""
    settings = plain_settings(tmp_path, columns={"weight": "weight"})
    (tmp_path / "settings.yaml").write_text(settings.to_yaml(), encoding="utf-8")
    assert load_settings(tmp_path / "settings.yaml") == settings
    text = settings.schema_.model_dump_json()
    assert "u0000" not in text
    assert "\0" not in settings.to_yaml()
    again = settings.schema_.identity()
    assert again["split"]["column"] == "fold"
    assert again["columns"]["user"] is None


def test_a_log_of_times_without_users_is_split_by_time(tmp_path: Path) -> None:
    """Each row is then a request of its own."""
    table = plain_table(0)
    days = np.datetime64("2024-01-01", "us") + np.arange(len(table)).astype("timedelta64[h]")
    settings = plain_settings(
        tmp_path,
        table.append_column("at", pa.array(days)),
        columns={"time": "at"},
        split={"train_end": "2024-01-10", "validation_end": "2024-01-14"},
    )
    counts = build_features(settings).manifest["splits"]
    assert [counts[name]["rows"] for name in ("train", "validation", "test")] == [216, 96, 88]


def test_days_can_not_be_added(tmp_path: Path) -> None:
    settings = plain_settings(tmp_path)
    build_features(settings)
    with pytest.raises(UserError, match=r"adding days to features needs columns.user and columns.candidate and colu"):
        extend(BuildInputs.of(settings))
