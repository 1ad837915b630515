"""Every input finds its feature, also where one feature's name begins with another's."""

import pytest

from mmoe_rec.features.layout import DenseInput, IdInput, Layout, TaskOutput
from mmoe_rec.inspection.ids import Meaning
from mmoe_rec.inspection.inputs import feature_inputs, meaning_of
from mmoe_rec.schema import Schema

SCHEMA = Schema.model_validate(
    {
        "columns": {"user": "u", "candidate": "c", "time": "t"},
        "roles": {"candidate": ["price", "age", "text"]},
        "tasks": {"click": {"label": "clicked", "objective": "engagement"}},
        "features": {
            "a": {"kind": "id", "column": "c", "oov_buckets": 3},
            "a_b": {"kind": "counter", "task": "click", "by": ["c"], "window_days": [None, 0.5]},
            "a_b_rows": {"kind": "id", "column": "c", "table": "a"},
            "price": {"kind": "numeric", "column": "price"},
            "price_0": {"kind": "vector", "column": "text", "size": 2},
            "price_missing": {"kind": "numeric", "column": "age"},
            "coarse": {"kind": "numeric", "column": "age", "transform": "buckets"},
            "seen": {"kind": "history", "task": "click", "of": "a"},
            "both": {"kind": "cross", "columns": ["u", "c"]},
            "when": {"kind": "time", "parts": ["hour", "weekday"]},
        },
    }
)
IDS = ("a", "a_b_rows", "coarse", "seen", "both", "when_hour", "when_weekday")
DENSE = (
    "a_b_positives a_b_rate a_b_positives_0p5d a_b_rate_0p5d a_b_recency a_b_recency_missing "
    "price price_0_0 price_0_1 price_missing price_missing_missing"
)


def layout(dense: list[str]) -> Layout:
    """A layout with these dense inputs."""
    numbers = tuple(DenseInput(name) for name in dense)
    return Layout((), tuple(IdInput(name, name) for name in IDS), numbers, (TaskOutput("click", "binary"),))


def test_inputs_find_their_features():
    features = {each.name: each for each in feature_inputs(SCHEMA, layout(DENSE.split()))}
    assert list(features) == list(SCHEMA.features)
    numbers = {name: [each.name for each in feature.numbers] for name, feature in features.items() if feature.numbers}
    assert numbers == {
        "a_b": ["a_b_positives", "a_b_rate", "a_b_positives_0p5d", "a_b_rate_0p5d", "a_b_recency"],
        "price": ["price"],
        "price_0": ["price_0_0", "price_0_1"],
        "price_missing": ["price_missing"],
    }
    ids = {name: [each.name for each in feature.ids] for name, feature in features.items() if feature.ids}
    assert ids == {**{name: [name] for name in IDS[:5]}, "when": ["when_hour", "when_weekday"]}
    (price,), (age,) = features["price"].numbers, features["price_missing"].numbers
    assert price.indicator is None
    assert (age.place, age.indicator) == (9, 10)
    assert features["a_b"].numbers[-1].indicator == 5
    assert features["seen"].columns == ("u", "c")
    assert features["when"].columns == ("t",)


def test_an_input_of_no_feature_is_refused():
    with pytest.raises(ValueError, match="input 'other' belongs to none of the features"):
        feature_inputs(SCHEMA, layout(["other"]))


@pytest.mark.parametrize(
    ("feature", "meaning"),
    [
        ("a", Meaning(missing=True, unknown=3)),
        ("a_b_rows", Meaning(missing=True, unknown=3)),
        ("seen", Meaning(missing=True, unknown=3)),
        ("coarse", Meaning(missing=True, unknown=0)),
        ("when", Meaning(missing=True, unknown=0)),
        ("both", Meaning(missing=False, unknown=0)),
    ],
)
def test_what_rows_of_tables_stand_for(feature, meaning):
    assert meaning_of(SCHEMA, feature) == meaning
