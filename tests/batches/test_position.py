import json
from dataclasses import replace

import pytest

from mmoe_rec.batches.order import Position
from mmoe_rec.errors import UserError

POSITION = Position(epoch=2, row=40, seed=5, shuffle_window=30, rows=75, fingerprint="0af3")


def test_survives_json() -> None:
    assert Position.from_dict(json.loads(json.dumps(POSITION.to_dict()))) == POSITION


@pytest.mark.parametrize(
    ("name", "value"), [("row", "40"), ("row", None), ("seed", 5.0), ("epoch", True), ("fingerprint", 3)]
)
def test_a_field_of_another_type(name: str, value: object) -> None:
    with pytest.raises(UserError, match=f"has {value!r} as '{name}', expected one (int|str).*damaged"):
        Position.from_dict(POSITION.to_dict() | {name: value})


def test_fields_missing_and_unknown() -> None:
    tree = POSITION.to_dict()
    del tree["rows"]
    with pytest.raises(UserError, match="has None as 'rows'"):
        Position.from_dict(tree)
    with pytest.raises(UserError, match="unknown field 'speed'"):
        Position.from_dict(POSITION.to_dict() | {"speed": 3})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rows": 80}, "at row 40 of epoch 2: the checkpoint was made with 75 encoded rows, now there are 80; bring"),
        ({"fingerprint": "ffff"}, r"not those that the checkpoint was made with \(fingerprint ffff, expected 0af3\)"),
        ({"seed": 6}, r"made with training\.seed 5, now it is 6; set it to 5 or train from the start"),
        ({"shuffle_window": 31}, r"made with training\.shuffle_window 30, now it is 31; set it to 30 or train"),
    ],
)
def test_another_order_is_refused(changes: dict, sentence: str) -> None:
    POSITION.check(replace(POSITION, epoch=0, row=0))
    with pytest.raises(UserError, match=sentence):
        POSITION.check(replace(POSITION, **changes))


@pytest.mark.parametrize("changes", [{"row": -1}, {"row": 76}, {"epoch": -1}])
def test_outside_an_epoch(changes: dict) -> None:
    with pytest.raises(UserError, match="an epoch has 75 rows"):
        replace(POSITION, **changes).check(POSITION)
