"""Comparisons of user and candidate that `init` proposes: columns that share values, or whose names agree."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mmoe_rec.settings.sections import Settings
from tests.profiling.test_infer_schema import draft
from tests.profiling.worlds import draw_job_board

Proposed = dict[tuple[str, ...], tuple[str, ...]]


@pytest.fixture(scope="module")
def board() -> pa.Table:
    return draw_job_board(0, 12_000, 800, 300)


def proposed(settings: Settings) -> Proposed:
    """Columns -> outputs of each feature of kind match, in the order of the file."""
    features = [feature.model_dump() for feature in settings.schema_.features.values() if feature.kind == "match"]
    return {feature["columns"]: feature["compare"] for feature in features}


def draft_board(folder: Path, board: pa.Table, **columns: Any) -> tuple[str, Proposed]:
    """The settings file of a job board with other columns (None removes one), and the comparisons that it has."""
    table = {name: board[name] for name in board.column_names if name not in columns}
    _, text, settings = draft(folder, table | {name: values for name, values in columns.items() if values is not None})
    return text, proposed(settings)


def of_users(board: pa.Table, values: list[Any]) -> list[Any]:
    """The value of each row's user, drawn from a list."""
    return [values[int(user[1:]) % len(values)] for user in board["user_id"].to_pylist()]


def of_jobs(board: pa.Table, values: list[Any]) -> list[Any]:
    """The value of each row's job, drawn from a list."""
    return [values[int(job[1:]) % len(values)] for job in board["job_id"].to_pylist()]


BOARD: Proposed = {
    ("user_city", "job_city"): ("equal",),
    ("user_skills", "job_main_skill"): ("contains",),
    ("user_skills", "job_skills"): ("overlap", "coverage", "jaccard"),
    ("user_salary", "job_salary"): ("difference", "ratio"),
}


def test_a_job_board_is_compared(tmp_path: Path, board: pa.Table) -> None:
    text, actual = draft_board(tmp_path, board)
    assert actual == BOARD
    assert [*actual] == [*BOARD], "shared values come first"
    for pair in ([name for name in BOARD if name != ("user_salary", "job_salary")])[:3]:
        entry = re.search(rf"# (\d+)% of the values of one also occur in the other\n  {'_'.join(pair)}: {{kind", text)
        assert entry is not None
        assert int(entry[1]) == 100
    assert re.search(r"# check: are both numbers in the same unit\?\n  user_salary_job_salary: ", text)


def test_columns_of_other_values_are_not_compared(tmp_path: Path, board: pa.Table) -> None:
    """Other texts, two values, small integers, numbers of other names, times, and users who are no candidates."""
    others = [f"other {number}" for number in range(30)]
    columns = {
        "user_skills": of_users(board, [others[number : number + 5] for number in range(25)]),
        "user_city": of_users(board, others),
        "job_city": of_jobs(board, [f"city {number}" for number in range(30)]),
        "user_salary": None,
        "user_remote": of_users(board, ["yes", "no"]),
        "job_remote": of_jobs(board, ["yes", "no", "yes"]),
        "user_segment_id": of_users(board, [*range(25)]),
        "job_branch_id": of_jobs(board, [*range(25)]),
    }
    assert draft_board(tmp_path, board, **columns)[1] == {}


def test_half_of_the_values_must_be_shared(tmp_path: Path, board: pa.Table) -> None:
    """The fraction is of the smaller vocabulary: 20 of 40 values, and 19 of 40."""
    jobs = of_jobs(board, [f"city {number}" for number in range(100)])
    for shared in (20, 19):
        cities = [f"city {number if number < shared else 200 + number}" for number in range(40)]
        text, actual = draft_board(tmp_path, board, user_city=of_users(board, cities), job_city=jobs)
        assert (("user_city", "job_city") in actual) == (shared == 20)
        assert ("50% of the values" in text) == (shared == 20)


def test_integers_need_names_that_agree(tmp_path: Path, board: pa.Table) -> None:
    lists = [[number, number + 1] for number in range(40)]
    columns = {
        "user_skills": of_users(board, lists),
        "job_skills": None,
        "job_skill_id": of_jobs(board, [*range(40)]),
        "job_main_skill": of_jobs(board, [*range(40)]),
        "job_levels": of_jobs(board, lists),
        "user_salary": of_users(board, [-5.0, 2.5, 7.25] * 9),
    }
    _, actual = draft_board(tmp_path, board, **columns)
    expected = {
        ("user_city", "job_city"): ("equal",),
        ("user_skills", "job_skill_id"): ("contains",),
        ("user_salary", "job_salary"): ("difference",),
    }
    assert actual == expected


def test_lists_come_first_and_vectors_of_one_length_are_compared(tmp_path: Path, board: pa.Table) -> None:
    rng = np.random.default_rng(0)
    vectors = {size: rng.normal(size=(50, size)).round(2).tolist() for size in (3, 4)}
    columns = {
        "user_city": of_users(board, [f"city {number}" for number in range(12)]),
        "job_city": of_jobs(board, [[f"city {number}", f"city {number + 3}"] for number in range(9)]),
        "user_text": of_users(board, vectors[3]),
        "job_text": of_jobs(board, vectors[3]),
        "job_image": of_jobs(board, vectors[4]),
    }
    text, actual = draft_board(tmp_path, board, **columns)
    assert actual[("job_city", "user_city")] == ("contains",)
    assert actual[("user_text", "job_text")] == ("cosine",)
    assert len(actual) == 5
    assert "check: are both vectors from the same model?" in text
    assert re.search(r"user_text_job_text: {kind: match, .*compare: cosine, size: 3}", text)


def test_a_few_are_proposed(tmp_path: Path, board: pa.Table) -> None:
    """Of ten pairs with shared values, the names decide; numbers come after them."""
    more = {f"user_tag_{index}": of_users(board, [f"{index} {number}" for number in range(9)]) for index in range(9)}
    more |= {f"job_tag_{index}": of_jobs(board, [f"{index} {number}" for number in range(9)]) for index in range(9)}
    _, actual = draft_board(tmp_path, board, **more)
    assert len(actual) == 8
    assert ("user_salary", "job_salary") not in actual
