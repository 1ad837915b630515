"""Counters, histories and labels of logs drawn at random equal a naive reference, however they are built."""

from pathlib import Path

import pytest

from tests.point_in_time.compared_logs import compare

LOGS, TESTS = 200, 10


@pytest.mark.parametrize("first", range(0, LOGS, LOGS // TESTS))
def test_counters_histories_and_labels_equal_a_naive_loop(first: int, tmp_path: Path) -> None:
    compared = [compare(seed, tmp_path / str(seed)) for seed in range(first, first + LOGS // TESTS)]
    # Nearly every log can be built.
    assert sum(each > 100 for each in compared) > 0.8 * len(compared)
