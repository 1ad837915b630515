"""python -m tests.benchmarks.freshness

What are features worth that are fresh, and what does it cost to keep them so? Complete Journey, the model of the
quickstart (`python -m pipelines.quickstart` comes first), whose weights know weeks 1 to 32; test weeks 37 to 45.

frozen  counters and histories as of the start of week 37;
daily   as of the start of each day, from all that was requested before it, as `mmoe-rec refresh` has them;
live    all that happened until a second before the request, as a server with a journal has them;
fresh   all that was known before the request, as a feature build gives it: what training and evaluation see.

All but `fresh` are computed by what a server looks up in its tables and in what it has learnt since. How that comes
about is measured by a replay, and by load on four servers with two workers each, one after the other:

compared, mismatches   a replay of weeks 37 to 40: all events, and all requests beside the offline values;
visible_s_p99          from the acknowledgement of an event until all of several connections, which lie with both
                       workers, say that their worker knows it;
p50_added_ms           how much longer a request of 500 candidates takes while 2,000 events a second come in, at 20
                       requests a second; both in turns, in all servers together;
p50_added_ms_95        an interval that holds it with 95%;
p50_learnt_ms          how much longer it takes a ranker that has learnt 100,000 of the rows, with none under way;
events_per_s           of the events that are sent beside these requests as fast as two senders get them accepted.

AUC and predicted / observed by task and week are printed; the last line is JSON.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

CONFIG = "configs/complete_journey.yaml"
DAY, WEEK = 86_400_000_000, 7 * 86_400_000_000
LAG = 1_000_000
"""Microseconds until an event is visible."""
WAYS = ("fresh", "live", "daily", "frozen")
REPLAYED_WEEKS = 4
LEARNT = 100_000


@dataclass(frozen=True)
class Test:
    """The rows of the test weeks. predicted: way -> (N, T) predictions; labels: (N, T), NaN where unobserved; week:
    (N,) from 0."""

    tasks: tuple[str, ...]
    labels: np.ndarray
    week: np.ndarray
    predicted: dict[str, np.ndarray]

    def auc(self, way: str, task: int, rows: np.ndarray) -> float:
        """Of one task in some of the rows."""
        from sklearn.metrics import roc_auc_score

        rows = rows & ~np.isnan(self.labels[:, task])
        return float(roc_auc_score(self.labels[rows, task], self.predicted[way][rows, task]))

    def ratio(self, way: str, task: int, rows: np.ndarray) -> float:
        """Predicted over observed."""
        rows = rows & ~np.isnan(self.labels[:, task])
        return float(self.predicted[way][rows, task].sum(dtype=np.float64) / self.labels[rows, task].sum())

    def figures(self) -> dict[str, Any]:
        """AUC of all rows, and the greatest loss of a week against `fresh`, by task."""
        found: dict[str, Any] = {}
        every, weeks = np.ones(len(self.week), bool), range(int(self.week.max()) + 1)
        for number, task in enumerate(self.tasks):
            found[f"auc_{task}"] = {way: round(self.auc(way, number, every), 5) for way in WAYS}
            found[f"predicted_to_observed_{task}"] = {way: round(self.ratio(way, number, every), 4) for way in WAYS}
            by_week = {way: np.array([self.auc(way, number, self.week == week) for week in weeks]) for way in WAYS}
            losses = {way: round(float((by_week["fresh"] - by_week[way]).max()), 5) for way in WAYS[1:]}
            found["worst_week_loss" if number == 0 else f"worst_week_loss_{task}"] = losses
            for week in weeks:
                auc = ", ".join(f"{way} {by_week[way][week]:.4f}" for way in WAYS)
                ratio = ", ".join(f"{way} {self.ratio(way, number, self.week == week):.3f}" for way in WAYS)
                _say(f"{task}, week {37 + week}: AUC {auc}; predicted / observed {ratio}")
        return found


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Benchmark:
    """model: an artifact folder; frozen: the same with tables as of the start of the test rows."""

    def __init__(self, model: Path, scratch: Path) -> None:
        from mmoe_rec.settings.load import load_settings

        self.settings, self.model, self.scratch = load_settings(CONFIG), model, scratch
        start, end = self.settings.split.windows()["test"]
        assert start is not None
        assert end is not None
        self.start, self.end = start, end
        self.frozen = scratch / "frozen"

    def run(self, seconds: float) -> dict[str, Any]:
        """All figures."""
        from mmoe_rec.features.pipeline import FeaturePipeline
        from mmoe_rec.jobs.places import logs_for
        from mmoe_rec.live.refresh import renew_tables
        from mmoe_rec.live.replay import read_period
        from tests.benchmarks.live_events import learnt_ms, live_events

        pipeline = FeaturePipeline.load(self.model / "features", memories=False)
        logs, offline = logs_for(self.settings, pipeline), self.scratch / "offline"
        offline.mkdir()
        period = read_period(logs, self.model, (self.start, self.end), offline)
        renew_tables(self.model, self.settings, self.frozen, until=self.start)
        found = self._accuracy(period, logs)
        rows, time_column = period.logs[0].table, self.settings.schema_.columns.time
        found["p50_learnt_ms"] = learnt_ms(self.frozen, time_column, rows.slice(0, LEARNT))
        found |= live_events(self.frozen, rows, time_column, self.scratch, seconds)
        return found | self._replayed()

    def _replayed(self) -> dict[str, int]:
        from mmoe_rec.live.replay import replay

        data = self.settings.data.model_copy(update={"work": str(self.scratch / "work")})
        settings = self.settings.model_copy(update={"data": data})
        found = replay(settings, self.start, self.start + REPLAYED_WEEKS * WEEK, str(self.model))
        _say(f"replayed {found['rows']:,} rows of {found['requests']:,} requests in {found['seconds']:,.0f} s")
        return {name: found[name] for name in ("mismatches", "compared")}

    def _accuracy(self, period: Any, logs: Any) -> dict[str, Any]:
        """AUC and calibration of all ways."""
        from mmoe_rec.inference.ranker import Ranker
        from mmoe_rec.live.request_log import PREDICTED

        ranker = Ranker.load(self.frozen)
        fresh = [period.rows.table[f"{PREDICTED}{name}"].to_numpy() for name in ranker.names]
        predicted = {"fresh": np.stack(fresh, axis=1), **self._by_live(ranker, period, logs)}
        schema, rows = ranker.pipeline.schema, period.rows
        known_by = np.iinfo(np.int64).max
        labels = np.stack([rows.labels(schema.tasks[name], known_by) for name in ranker.names], axis=1)
        week = np.minimum((rows.times() - self.start) // WEEK, (self.end - self.start) // WEEK - 1)
        return Test(tuple(ranker.names), labels, week, predicted).figures()

    def _by_live(self, ranker: Any, period: Any, logs: Any) -> dict[str, np.ndarray]:
        """Predictions by tables as of the start together with what was learnt since, day by day."""
        from mmoe_rec.devices import limit_threads
        from mmoe_rec.features.pipeline import Live

        pipeline = ranker.pipeline
        nothing = daily = live = Live(pipeline.memory_encoders)
        found: dict[str, list[np.ndarray]] = {"frozen": [], "daily": [], "live": []}
        rows_of = [(None, period.rows)] + [(log.name, rows) for log in logs.events for rows in log.stream()]
        with limit_threads(1):
            for start, end in self._days():
                _say(f"scoring {np.datetime64(start, 'us')}")
                live = _learnt(pipeline, live, rows_of, start, end, LAG)
                rows = _plain(period.rows, start, end)
                for name, state in (("frozen", nothing), ("daily", daily), ("live", live)):
                    ranker._knowledge = replace(ranker._knowledge, pipeline=pipeline.with_live(state))
                    found[name].append(ranker.score(ranker.reader.completed(rows))[0])
                daily = _learnt(pipeline, daily, rows_of, start, end)
        return {name: np.concatenate(each) for name, each in found.items()}

    def _days(self) -> Iterator[tuple[int, int]]:
        edges = [*range(self.start, self.end - DAY, DAY), self.end]  # the last day has an hour more
        yield from pairwise(edges)


def _plain(rows: Any, start: int, end: int) -> Any:
    """The rows of a period that were requested from `start` to `end`, without what was looked up for them."""
    from mmoe_rec.log.rows import LogRows
    from mmoe_rec.point_in_time.join import in_window

    inside = in_window(rows.times(), (start, end))
    return LogRows(rows.table, rows.schema).filter(inside)


def _learnt(pipeline: Any, live: Any, rows_of: Any, start: int, end: int, lag: int = 0) -> Any:
    """What is known with the rows and events of a time as well, which come so much later (microseconds)."""
    for source, rows in rows_of:
        inside = _plain(rows, start, end)
        live = live.extended({source: inside.with_times(inside.times() + lag)})
    return live


def main() -> None:
    """Runs all; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("data/complete_journey/work/model"))
    parser.add_argument("--seconds", type=float, default=30.0, help="of each way of load (default: %(default)s)")
    options = parser.parse_args()
    if not (options.model / "model.json").is_file():
        parser.error(f"'{options.model}' holds no model; run python -m pipelines.quickstart first")
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(Benchmark(options.model, Path(folder)).run(options.seconds)))


if __name__ == "__main__":
    main()
