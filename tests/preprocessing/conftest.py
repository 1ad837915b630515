import pytest

from mmoe_rec.log import reader
from mmoe_rec.preprocessing import build_steps as steps
from mmoe_rec.preprocessing import count, exchange, splits


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts, blocks and row groups of some dozen rows; partitions are divided by time again and again."""
    for module in (steps, count):
        monkeypatch.setattr(module, "ROWS_PER_PART", 60)
    monkeypatch.setattr(exchange, "ROWS_PER_BLOCK", 64)
    monkeypatch.setattr(splits, "ROWS_PER_GROUP", 32)
    monkeypatch.setattr(reader, "ROWS_AT_A_TIME", 50)
