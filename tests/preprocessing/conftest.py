import pytest

from mmoe_rec.log import reader
from mmoe_rec.preprocessing import build_steps as steps
from mmoe_rec.preprocessing import count_and_encode, look_up


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts, blocks and row groups of some dozen rows; partitions are divided by time again and again."""
    for module in (steps, count_and_encode):
        monkeypatch.setattr(module, "ROWS_PER_PART", 60)
    monkeypatch.setattr(look_up, "ROWS_PER_BLOCK", 64)
    monkeypatch.setattr(count_and_encode, "ROWS_PER_GROUP", 32)
    monkeypatch.setattr(reader, "READ_BATCH_ROWS", 50)
