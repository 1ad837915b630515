"""What a server knows of the requests that its model's tables hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmoe_rec.errors import UserError
from mmoe_rec.log.columns import UTC_MICROSECONDS
from mmoe_rec.log.rows import LogRows
from mmoe_rec.server.live.held import HeldRequests
from tests.log.small_logs import ALL_KINDS, BASE, DAY, START, schema_of

SCHEMA = schema_of(ALL_KINDS, columns=BASE["columns"] | {"request": "request"})


def _rows(requests: np.ndarray, users: np.ndarray, times: np.ndarray) -> LogRows:
    time = pa.array(times).cast(UTC_MICROSECONDS)
    return LogRows(pa.table({"request": requests, "user": users, "item": np.arange(len(users)), "time": time}), SCHEMA)


def test_further_rows_have_a_requests_time_and_user(tmp_path: Path) -> None:
    """Requests in several files and row groups, some older than 30 days, one of two users; against a loop."""
    rng = np.random.default_rng(0)
    requests, users = np.arange(400), rng.integers(0, 9, 400)
    times = START + rng.integers(0, 90 * DAY, 400)
    held = _rows(requests, users, times)
    user = held.hashes(["user"])
    columns = {"request": held.request_hashes(), "first": times, "last": times, "least": user, "greatest": user.copy()}
    columns["greatest"][7] += np.uint64(1)
    (tmp_path / "requests").mkdir()
    for part in range(2):
        table = pa.table({name: values[part::2] for name, values in columns.items()}).sort_by("request")
        pq.write_table(table, tmp_path / "requests" / f"part-{part}.parquet", row_group_size=60)
    as_of = START + 90 * DAY
    known = HeldRequests.of(tmp_path, as_of)
    again = rng.integers(0, 500, 1000)
    new_users, new_times = rng.integers(0, 9, 1000), START + rng.integers(80 * DAY, 99 * DAY, 1000)
    rest = known.rest(_rows(again, new_users, new_times))
    expected = []
    for row, (request, own, time) in enumerate(
        zip(again.tolist(), new_users.tolist(), new_times.tolist(), strict=True)
    ):
        if request >= 400 or request == 7 or times[request] < as_of - 30 * DAY:
            expected.append((row, time))
        elif users[request] == own:
            expected.append((row, int(times[request])))
    assert list(zip(rest.column("item").to_pylist(), rest.times().tolist(), strict=True)) == expected
    assert len(known) == (times >= as_of - 30 * DAY).sum() - (times[7] >= as_of - 30 * DAY)
    assert len(HeldRequests.of(tmp_path / "nothing", as_of)) == 0
    (tmp_path / "requests" / "part-1.parquet").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"part-1\.parquet' is damaged"):
        HeldRequests.of(tmp_path, as_of)
