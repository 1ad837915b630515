"""The rules of time zones, which come from the machine's time zone database and change with it."""

from __future__ import annotations

import hashlib
from functools import cache

import numpy as np
import pandas as pd

from mmoe_rec.settings.schema import Schema

# Years in which a time of any log is likely to lie; all databases have rules up to the latter.
FIRST, LAST = "1970-01-01", "2037-12-31"


def zone_rules(schema: Schema) -> dict[str, str]:
    """Time zone -> digest of the rules that give hours and weekdays, for each zone of a schema but UTC."""
    zones = {zone for feature in schema.features.values() for zone in feature.time_zones} - {"UTC"}
    return {zone: _digest(zone) for zone in sorted(zones)}


@cache
def _digest(zone: str) -> str:
    """The same wherever the zone's offsets from UTC are the same in every hour."""
    hours = pd.date_range(FIRST, LAST, freq="h", unit="s")
    local = hours.tz_localize("UTC").tz_convert(zone).tz_localize(None)
    offsets = (local.asi8 - hours.asi8).astype(np.int32)
    changes = np.flatnonzero(np.diff(offsets, prepend=offsets[0] + 1))
    return hashlib.sha256(np.stack([changes, offsets[changes]]).tobytes()).hexdigest()[:16]
