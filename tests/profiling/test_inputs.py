"""Every input finds its feature, also where one feature's name begins with another's."""

import pytest

from mmoe_rec.features import kinds
from mmoe_rec.features.layout import DenseInput, Layout, TaskOutput
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.profiling.data_health import find_dense_inputs

SCHEMA = kinds.parse_schema(
    {
        "columns": {"user": "u", "candidate": "c", "time": "t"},
        "roles": {"candidate": ["price", "age", "text"]},
        "tasks": {"click": {"label": "clicked", "objective": "engagement"}},
        "features": {
            "a": {"kind": "id", "column": "c", "oov_buckets": 3},
            "a_b": {"kind": "counter", "task": "click", "by": ["c"], "window_days": [None, 0.5]},
            "a_b_rows": {"kind": "id", "column": "c", "table": "a"},
            "item": {"kind": "counter", "task": "click", "by": ["c"]},
            "item_rate": {"kind": "counter", "task": "click", "by": ["u"]},
            "price": {"kind": "numeric", "column": "price"},
            "price_0": {"kind": "vector", "column": "text", "size": 2},
            "coarse": {"kind": "numeric", "column": "age", "transform": "buckets"},
            "years": {"kind": "numeric", "column": "age", "values": "auto"},
            "seen": {"kind": "history", "task": "click", "of": "a"},
            "both": {"kind": "cross", "columns": ["u", "c"]},
            "when": {"kind": "time", "parts": ["hour", "weekday"]},
            "when_old": {"kind": "time", "parts": ["age"], "column": "t"},
        },
    }
)


def test_numbers_of_a_pipeline_find_their_features():
    """The counter 'item' has an input 'item_rate', which is also the name of another counter."""
    layout = FeaturePipeline(SCHEMA).layout
    places = {name: find_dense_inputs(layout, name) for name in SCHEMA.features}
    numbers = {name: [layout.dense[place].name for place in theirs] for name, theirs in places.items() if theirs}
    assert numbers == {
        "a_b": ["a_b_log_sum", "a_b_rate", "a_b_log_sum_0p5d", "a_b_rate_0p5d", "a_b_recency"],
        "item": ["item_log_sum", "item_rate", "item_recency"],
        "item_rate": ["item_rate_log_sum", "item_rate_rate", "item_rate_recency"],
        "price": ["price"],
        "price_0": ["price_0_0", "price_0_1"],
        "years": ["years"],
        "when_old": ["when_old_age"],
    }


def test_an_indicator_belongs_to_the_number_of_its_feature():
    names = ("price", "price_missing", "price_missing_missing")
    dense = (*map(DenseInput, names[:2]), DenseInput(names[2], feature="price_missing"))
    layout = Layout((), (), dense, (TaskOutput("click", "binary"),))
    assert find_dense_inputs(layout, "price") == {0: None}
    assert find_dense_inputs(layout, "price_missing") == {1: 2}


def test_rows_of_tables_have_names_and_features_have_columns():
    meanings = {name: feature.semantics(SCHEMA) for name, feature in SCHEMA.features.items()}
    others = meanings["years"]
    assert (others.first_seen_row, others.unknown) == (0, 0), "a number that is not frequent is no unknown id"
    assert others.row_name is not None
    assert [others.row_name("years_value", row) for row in range(2)] == ["others", "frequent value 1"]
    assert meanings["seen"].columns == ("u", "c")
    assert meanings["when"].columns == ("t",)


@pytest.mark.parametrize(
    ("feature", "missing", "unknown"),
    [("a", 1, 3), ("a_b_rows", 1, 3), ("seen", 1, 3), ("coarse", 1, 0), ("when", 1, 0), ("both", 0, 0)],
)
def test_what_rows_of_tables_stand_for(feature, missing, unknown):
    semantics = SCHEMA.features[feature].semantics(SCHEMA)
    assert (semantics.missing, semantics.unknown, semantics.first_seen_row) == (missing, unknown, missing + unknown)
