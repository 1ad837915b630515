"""Numbers as a reader sees them."""

import pytest

from mmoe_rec.report.formatting import rate
from mmoe_rec.task_kinds import KINDS


@pytest.mark.parametrize(
    ("value", "kind", "told"),
    [
        (0.0059, "binary", "0.59%"),
        (3.14159, "regression", "3.142"),
        (-0.00012345, "regression", "-0.0001234"),
        (1_699_999_997.9, "regression", "1,699,999,998"),
        (-12_345.6, "regression", "-12,346"),
        (1e300, "regression", "1e+300"),
        (None, "regression", "-"),
    ],
)
def test_a_mean_is_told_to_the_unit(value: float | None, kind: str, told: str) -> None:
    """Means of times lie close together beside their size."""
    assert rate(value, kind) == told


def test_a_regression_has_a_mean_and_no_positives() -> None:
    binary, regression = KINDS["binary"], KINDS["regression"]
    assert binary.describe_labels(1103.0, 2218) == "1,103 positive of 2,218 observed"
    assert binary.describe_labels(0.0, 0) == "0 positive of 0 observed"
    assert regression.describe_labels(3_770_599_999_065.0, 2218) == "2,218 observed, mean 1,700,000,000"
    assert regression.describe_labels(0.0, 0) == "0 observed"
