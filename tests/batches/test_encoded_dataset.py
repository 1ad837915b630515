from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmoe_rec.batches.encoded_dataset import EncodedDataset, LabeledRows, ValidationPart
from mmoe_rec.errors import UserError
from mmoe_rec.log.columns import hash_column
from tests.batches.encoded_files import LAYOUT, assert_values, row_numbers, table, write


def test_rows_of_a_group_come_in_the_order_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "rows", [[3, 0, 2], [], [4]])
    rows = EncodedDataset(tmp_path / "rows", LAYOUT)
    assert [file for file, _ in rows.row_groups] == [0, 0, 2]
    assert (rows.rows, rows.row_group_sizes.tolist()) == (9, [3, 2, 4])
    *_, second, third = rows.row_groups
    read = rows.read_row_group(second)
    assert row_numbers(read).tolist() == [3, 4]
    assert_values(read)
    some = rows.read_row_group(third, np.array([3, 0, 0, 1]))
    assert row_numbers(some).tolist() == [8, 5, 5, 6]
    assert_values(some)
    assert len(rows.read_row_group(third, np.array([], np.int64))) == 0


@pytest.mark.parametrize("batch_size", [1, 4, 7, 23, 100])
def test_stream_gives_all_rows_in_file_order(tmp_path: Path, batch_size: int) -> None:
    total = write(tmp_path / "rows", [[5, 0, 4], [], [0], [9, 5]])
    parts = list(EncodedDataset(tmp_path / "rows", LAYOUT).stream(batch_size, ["user", "id.item"]))
    assert [len(rows) for rows, _ in parts[:-1]] == [batch_size] * ((total - 1) // batch_size)
    assert np.concatenate([row_numbers(rows) for rows, _ in parts]).tolist() == list(range(total))
    for rows, extra in parts:
        assert_values(rows)
        assert extra.column_names == ["user", "id.item"]
        assert extra.column("user").to_pylist() == [f"user {row}" for row in row_numbers(rows)]


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_parts_have_each_row_once_by_its_user(tmp_path: Path, batch_size: int) -> None:
    """In streams and in row groups, and a user is in the same part of any folder."""
    total = write(tmp_path / "rows", [[15, 0, 4], [], [1], [19, 5]])
    parts = {part: EncodedDataset(tmp_path / "rows", LAYOUT, part=part) for part in ValidationPart}
    actual = {}
    for part, rows in parts.items():
        assert rows.uses_part
        read = [row_numbers(rows.read_row_group(group)) for group in rows.row_groups]
        assert [len(item) for item in read] == rows.row_group_sizes.tolist()
        streamed = np.concatenate([row_numbers(item) for item, _ in rows.stream(batch_size, ["user"])])
        assert streamed.tolist() == np.concatenate(read).tolist()
        assert len(streamed) == rows.rows
        for group, item in zip(rows.row_groups, read, strict=True):
            assert row_numbers(rows.read_row_group(group, np.arange(len(item))[::-1])).tolist() == item[::-1].tolist()
        users = pa.array([f"user {row}" for row in streamed])
        assert part.contains(users).all()
        assert part.contains(users.dictionary_encode()).all()
        actual[part] = set(streamed.tolist())
    assert actual[ValidationPart.SELECTION] | actual[ValidationPart.EVALUATION] == set(range(total))
    assert not actual[ValidationPart.SELECTION] & actual[ValidationPart.EVALUATION]


@pytest.mark.parametrize("users", [np.arange(20_000), np.arange(20_000).astype(str)])
def test_half_of_the_users_judge(users: np.ndarray) -> None:
    """Also among users of a sample, which the same hash draws."""
    is_judging, is_drawn = ValidationPart.EVALUATION.contains(pa.array(users)), hash_column(pa.array(users)) < 1 << 63
    for some in (is_judging, is_judging[is_drawn], is_judging[~is_drawn]):
        assert abs(some.mean() - 0.5) < 0.02  # four standard errors


@pytest.mark.parametrize("part", ValidationPart)
def test_rows_are_not_divided_if_a_part_has_no_label(tmp_path: Path, part: ValidationPart) -> None:
    rows = table(range(40))
    for name in [column_name for column_name in rows.column_names if column_name.startswith("label.")]:
        labels = pa.array(
            rows.column(name).to_numpy(), mask=ValidationPart.EVALUATION.contains(rows.column("user").combine_chunks())
        )
        rows = rows.set_column(rows.column_names.index(name), name, labels)
    (tmp_path / "rows").mkdir()
    pq.write_table(rows, tmp_path / "rows" / "0.parquet")
    actual = EncodedDataset(tmp_path / "rows", LAYOUT, part=part)
    assert (actual.rows, actual.uses_part) == (40, False)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, r"no \.parquet file"),
        ([], r"no \.parquet file"),
        ([table(range(0))] * 2, "have no rows"),
        *(
            ([table(range(5)).drop_columns([name])], rf"0\.parquet' lacks the column '{name}'")
            for name in ("id.item", "dense.age", "label.stars")
        ),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, rows: list[pa.Table] | None, message: str) -> None:
    if rows is not None:
        (tmp_path / "rows").mkdir()
    for number, item in enumerate(rows or []):
        pq.write_table(item, tmp_path / "rows" / f"{number}.parquet")
    with pytest.raises(UserError, match=message):
        EncodedDataset(tmp_path / "rows", LAYOUT).read_row_group((0, 0))


def test_a_damaged_file_or_a_further_column_that_is_missing_is_named(tmp_path: Path) -> None:
    write(tmp_path / "rows", [[5], [500]])
    with pytest.raises(UserError, match="lacks the column 'request'"):
        next(EncodedDataset(tmp_path / "rows", LAYOUT).stream(2, ["request"]))
    file = tmp_path / "rows" / "001.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[:4] + b"\xff" * 1996 + whole[2000:])
    rows = EncodedDataset(tmp_path / "rows", LAYOUT)
    for read in (lambda: rows.read_row_group(rows.row_groups[1]), lambda: list(rows.stream(100))):
        with pytest.raises(UserError, match=r"001\.parquet' cannot be read"):
            read()
    file.write_bytes(whole[:-20])
    with pytest.raises(UserError, match=r"001\.parquet' cannot be read"):
        EncodedDataset(tmp_path / "rows", LAYOUT)


def test_weights_are_read_where_they_are_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "rows", [[3, 2], [4]])
    assert EncodedDataset(tmp_path / "rows", LAYOUT).read_row_group((0, 0)).weights is None
    rows = EncodedDataset(tmp_path / "rows", LAYOUT, weighted=True)
    read = LabeledRows.concatenate([rows.read_row_group((0, 0)), rows.read_row_group((1, 0))])
    joined = LabeledRows.concatenate([read.slice(1, 6).slice(1, 4), read.slice(4, 4), read.take(np.array([6, 0, 6]))])
    streamed = next(rows.stream(9))[0]
    for item, expected in ((read, [0, 1, 2, 5, 6, 7, 8]), (joined, [2, 5, 6, 8, 0, 8]), (streamed, list(range(9)))):
        assert row_numbers(item).tolist() == expected
        assert_values(item)
        assert item.weights.dtype == np.float64
        assert item.weights.tolist() == pytest.approx([1 + row % 4 for row in expected])


def test_what_a_task_is_learnt_from_is_read_where_it_is_asked_for(tmp_path: Path) -> None:
    click, stars = LAYOUT.tasks
    layout = replace(LAYOUT, tasks=(click, replace(stars, kind="binary", conditional_on="click")))
    both = pa.array([0.0, 1.0, None], pa.float32())
    (tmp_path / "rows").mkdir()
    rows = table(range(3)).append_column("label.click_and_stars", both)
    place = rows.schema.get_field_index("label.stars")
    rows = rows.set_column(place, "label.stars", rows["label.stars"].cast(pa.float32()))  # binary here
    pq.write_table(rows, tmp_path / "rows" / "0.parquet")
    own, learnt = (EncodedDataset(tmp_path / "rows", layout, joint_labels=number) for number in (False, True))
    np.testing.assert_equal(own.read_row_group((0, 0)).labels[:, 1], [np.nan, 1.0, 2.0])
    np.testing.assert_equal(learnt.read_row_group((0, 0)).labels, [[0.0, 0.0], [1.0, 1.0], [2.0, np.nan]])
    write(tmp_path / "old", [[3]])
    with pytest.raises(UserError, match=r"lacks the column 'label\.click_and_stars'\. Run mmoe-rec features again"):
        EncodedDataset(tmp_path / "old", layout, joint_labels=True)
