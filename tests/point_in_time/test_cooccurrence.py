"""Counts of pairs of candidates against the reference: in any order of arrival, cut at any moment, in any way asked."""

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from mmoe_rec.features import kinds
from mmoe_rec.features.kinds.cooccurrence import CooccurrenceEncoder
from mmoe_rec.features.pipeline import FeaturePipeline, LiveUpdates
from mmoe_rec.log.columns import UTC_MICROSECONDS, hash_column
from mmoe_rec.log.rows import LogRows
from mmoe_rec.point_in_time import join
from mmoe_rec.point_in_time.join import Lookups
from tests.reference import features
from tests.reference.log import DAY, Log

START = 1_700_000_000_000_000
COLUMNS = {"user": "user", "candidate": "item", "time": "time"}


class Drawn:
    """A log of few users, items and times with the only task `click`, and its reference."""

    def __init__(self, seed: int) -> None:
        self.random = random = np.random.default_rng(seed)
        size, last = int(random.integers(1, 60)), int(random.integers(1, 6))
        feature = {"kind": "cooccurrence", "task": "click", "last": last, "max_events": last + int(random.integers(5))}
        feature |= {"window_days": float(random.choice([1, 5, 20]))} if random.random() < 0.5 else {}
        click = {"label": "click", "objective": "engagement", "label_delay_days": float(random.choice([0, 2]))}
        item = {"kind": "id", "column": "item"}
        tree = {"columns": COLUMNS, "tasks": {"click": click}, "features": {"item": item, "pairs": feature}}
        self.schema = kinds.parse_schema(tree)
        self.frame = pd.DataFrame(
            {
                "user": random.integers(0, int(random.integers(1, 5)), size),
                "item": random.integers(0, int(random.integers(1, 6)), size),
                "time": START + DAY * random.integers(0, int(random.integers(1, 21)), size),
                "click": random.integers(0, 2, size).astype(float),
            }
        ).drop_duplicates(["user", "item", "time"], ignore_index=True)
        self.tree = tree

    def rows(self, frame: pd.DataFrame) -> LogRows:
        columns: dict[str, Any] = {name: pa.array(frame[name].to_numpy()) for name in frame}
        return LogRows(pa.table(columns | {"time": columns["time"].cast(UTC_MICROSECONDS)}), self.schema)

    def reference(self, asked: pd.DataFrame, log: pd.DataFrame | None = None) -> np.ndarray:
        """(N, 3) sum, largest and normalized sum of counts."""
        naive = Log(self.tree, self.frame if log is None else log)
        codes = dict(zip(range(6), (hash_column(pa.array(range(6))) >> np.uint64(32)).tolist(), strict=True))
        answers = features.cooccurrence(naive, "pairs", codes, asked.to_dict("records"))
        return np.array([[*answer.values()] for answer in answers])


def _encoder(pipeline: FeaturePipeline) -> CooccurrenceEncoder:
    encoder = pipeline.encoders["pairs"]
    assert isinstance(encoder, CooccurrenceEncoder)
    return encoder


def _table(results: Any, inverse: np.ndarray) -> np.ndarray:
    return np.stack([values[inverse] for values in results.values()], axis=1)


@pytest.mark.parametrize("seed", range(100))
def test_counts_are_those_of_a_loop_over_all_events(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build counts some pairs, a server all, and a live server changes of counts, after a cut at any moment."""
    for name, value in {"MIN_LEVEL_SIZE": 6, "_GROWTH": 2, "_LARGE_LEVEL_SIZE": 12}.items():
        monkeypatch.setattr(join, name, value)
    drawn = Drawn(seed)
    frame, random = drawn.frame, drawn.random
    cut = START + int(random.integers(0, 22)) * DAY
    asked = frame.iloc[random.integers(0, len(frame), 40)].reset_index(drop=True)
    asked["time"] = np.maximum(cut, asked["time"] + DAY * random.integers(0, 9, 40))
    expected = drawn.reference(asked)
    assert seed % 10 or frame["click"].sum() < 9 or expected.any()
    rows, pipeline = drawn.rows(asked), FeaturePipeline(drawn.schema)
    encoder = _encoder(pipeline)
    # Some rows come after the cut, although they are earlier.
    late = random.random(len(frame)) < random.choice([0, 0.3, 1])
    built = encoder.extended(encoder.empty(), encoder.events(drawn.rows(frame[~late])))
    encoder.store = encoder.compacted(built, cut)
    assert encoder.store.counts.events.available_at.min(initial=cut) >= cut, "a server has one count of each pair"
    live = LiveUpdates(pipeline.point_in_time_encoders)
    later = frame[late].sample(frac=1, random_state=seed)
    for part in np.array_split(np.arange(len(later)), 5):
        live = live.extended({None: drawn.rows(later.iloc[part])})
    served = _encoder(pipeline.with_live(live))
    # Whoever keeps only the last events of a user may not need the late ones, so both count all the same.
    extended = encoder.extended(encoder.store, encoder.events(drawn.rows(later)))
    whole = encoder.extended(encoder.empty(), encoder.events(drawn.rows(frame)))
    keys, times = encoder.keys(rows), rows.times()
    answers = []
    for store, owner in ((served.store, served), (extended, encoder), (whole, encoder)):
        for ask in (Lookups.sort, Lookups.one_per_row):
            lookups = ask(keys, times)
            answers.append(_table(owner.distinct_results(store, lookups), lookups.inverse))
    for answer in answers:
        np.testing.assert_allclose(answer, expected, atol=1e-12)
        np.testing.assert_array_equal(answer, answers[0])


@pytest.mark.parametrize("seed", range(20))
def test_no_later_event_changes_a_count(seed: int) -> None:
    drawn = Drawn(seed)
    encoder, moment = _encoder(FeaturePipeline(drawn.schema)), START + 8 * DAY
    available = drawn.frame["time"] + max(1, encoder.label_delay_us) <= moment
    asked = drawn.frame.assign(time=moment)
    lookups = encoder.lookups(drawn.rows(asked))
    changed = drawn.frame.copy()
    changed.loc[~available, "click"] = 1.0
    changed.loc[~available, "item"] = 0
    before, after = (
        encoder.distinct_results(encoder.extended(encoder.empty(), encoder.events(drawn.rows(log))), lookups)
        for log in (drawn.frame, changed)
    )
    np.testing.assert_array_equal(_table(before, lookups.inverse), _table(after, lookups.inverse))


def test_a_build_in_slices_is_a_build_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = Drawn(1)
    encoder = _encoder(FeaturePipeline(drawn.schema))
    store = encoder.extended(encoder.empty(), encoder.events(drawn.rows(drawn.frame)))
    lookups = encoder.lookups(drawn.rows(drawn.frame.assign(time=START + 30 * DAY)))
    at_once = encoder.distinct_results(store, lookups)
    monkeypatch.setattr("mmoe_rec.features.kinds.cooccurrence._LOOKUPS_AT_ONCE", 3)
    assert len(lookups) > 3
    for name, values in encoder.distinct_results(store, lookups).items():
        np.testing.assert_array_equal(values, at_once[name])
    assert at_once["pairs_sum"].any()


def test_a_list_longer_than_the_events_that_count_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`last` 30 is larger than `max_events` 20\. Set a lower `last`"):
        kinds.parse_schema(
            {
                **Drawn(0).tree,
                "features": {"f": {"kind": "cooccurrence", "task": "click", "last": 30, "max_events": 20}},
            }
        )
