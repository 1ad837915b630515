"""The SQL tables of a journal, which are the same in SQLite and in PostgreSQL."""

from __future__ import annotations

from typing import Any

import numpy as np
import sqlalchemy as sql
from sqlalchemy.engine import Connection

METADATA = sql.MetaData()
NEVER = int(np.iinfo(np.int64).min)
_BIG = sql.BigInteger().with_variant(sql.Integer, "sqlite")
_INT, _TEXT, _BLOB = sql.Integer, sql.Text, sql.LargeBinary


def _table(name: str, keys: str, /, **columns: Any) -> sql.Table:
    """Define a table whose primary key has the columns that `keys` lists, divided by spaces."""
    made = [
        sql.Column(column, kind, primary_key=column in keys.split(), autoincrement=False, nullable=False)
        for column, kind in columns.items()
    ]
    return sql.Table(f"journal_{name}", METADATA, *made)


ABOUT = _table("about", "id", id=sql.String(32), removed=_BIG)
BATCHES = _table(
    "batches",
    "position",
    position=_BIG,
    log=_TEXT,
    accepted_at=_BIG,
    rows=_INT,
    duplicates=_INT,
    conflicts=_INT,
    out_of_order=_INT,
    checksum=_BIG,
    payload=_BLOB,
)
COLUMNS = _table("columns", "log name", log=_TEXT, name=_TEXT, type=_TEXT)
CUTS = _table("cuts", "position", position=_BIG)
LOGS = _table("logs", "log", log=_TEXT, newest=_BIG, written=_BIG, removed=_BIG)
KEYS = _table("keys", "key", key=_BIG, content=_BIG, day=_INT)
REQUESTS = _table("requests", "request", request=_BIG, user=_BIG, time=_BIG, day=_INT)


def add_log(connection: Connection, log: str) -> None:
    """Insert a log's row into `LOGS`, unless it is there."""
    if connection.execute(sql.select(LOGS.c.log).where(LOGS.c.log == log)).first() is None:
        connection.execute(sql.insert(LOGS).values(log=log, newest=NEVER, written=0, removed=0))
