from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.journal.kafka.mock_brokers import Brokers, mock_brokers


@pytest.fixture
def brokers(tmp_path: Path) -> Iterator[Brokers]:
    pytest.importorskip("confluent_kafka")
    with mock_brokers(tmp_path) as found:
        yield found
