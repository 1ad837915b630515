"""The loop as a user closes it: a server logs what it ranks, a simulated user acts, the join's rows are trained on."""

import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from mmoe_rec import atomic
from mmoe_rec.inference.artifact_writer import write_artifact
from mmoe_rec.live import label_join
from mmoe_rec.live.request_log import RequestLogOptions
from mmoe_rec.log.columns import UTC_MICROSECONDS
from mmoe_rec.model.mmoe import build_model
from mmoe_rec.model.model_layout import ModelLayout
from mmoe_rec.model.tables import PlainTables
from mmoe_rec.preprocessing.build_inputs import BuildInputs
from mmoe_rec.preprocessing.prepare import prepare
from mmoe_rec.settings.load import load_settings
from tests import commands
from tests.fork_server import call
from tests.pipelines.learnable_log import settings_tree, write_files
from tests.processes import until
from tests.server.asking import ask, logging_app

BEGIN = datetime(2024, 3, 11, 6, tzinfo=UTC)
HALF_AN_HOUR, BETWEEN = timedelta(minutes=30), timedelta(minutes=75)
TASKS = {
    "click": {"label": "click", "objective": "engagement", "label_delay_days": 0.021},
    "liked": {
        "label": "liked",
        "objective": "satisfaction",
        "observed_when": {"column": "click", "equals": 1},
        "label_delay_days": 2,
    },
}
OUTCOMES = {
    "events": {
        "impressions": {"time": "at", "request": "page"},
        "clicks": {"time": "at", "request": "page"},
        "ratings": {"time": "at"},
    },
    "shown": {"events": "impressions", "attribution_days": 0.02},
    "sources": {
        "click": {"events": "clicks", "attribution_days": 1 / 48},
        "liked": {"events": "ratings", "attribution_days": 2, "value": "liked", "default": None},
    },
    "wait_days": 0,
}


@dataclass
class Loop:
    """Where all lies, and the true rows: (request, item) -> slot, click, liked."""

    folder: Path
    truth: dict[tuple[int, int], Any]

    @property
    def out(self) -> Path:
        return self.folder / "served"

    def words(self) -> list[str]:
        words = {"config": "settings.yaml", "requests": "requests", "events": "events", "out": "served"}
        return [word for name, path in words.items() for word in (f"--{name}", str(self.folder / path))]

    def rows(self) -> pa.Table:
        return pa.concat_tables([pq.read_table(path) for path in sorted(self.out.glob("run-*/*.parquet"))])

    def events(self, name: str, rows: list[dict[str, Any]]) -> None:
        folder = self.folder / "events" / name
        folder.mkdir(parents=True, exist_ok=True)
        table = pa.Table.from_pylist(rows)
        table = table.set_column(table.column_names.index("at"), "at", table["at"].cast(UTC_MICROSECONDS))
        pq.write_table(table, folder / f"{len([*folder.iterdir()])}.parquet")

    def live(self, app: Any, first: int, count: int) -> None:
        """Requests one after the other, and what the user does then: looks at five candidates, wants multiples of
        three most, and the less, the further down they are; clicks within 45 minutes, and may rate what was clicked."""
        draw = np.random.default_rng(first)
        acts: dict[str, list[dict[str, Any]]] = {"impressions": [], "clicks": [], "ratings": []}
        for number in range(first, first + count):
            user, at = int(draw.integers(80)), BEGIN + number * BETWEEN
            items = [int(entry) for entry in draw.choice(40, 8, replace=False)]
            context = {"time": at.isoformat()} | ({"request": number + 10**6} if number % 2 else {})
            prices = [round(float(entry), 3) for entry in draw.normal(size=8)]
            element = {"user": {"user": user}, "context": context, "candidates": {"item": items, "price": prices}}
            (ranking,) = ask(app, {"inputs": [element]}).tree["predictions"]
            page = ranking["request_id"]
            assert not number % 2 or page == number + 10**6
            for slot, item in enumerate(ranking["candidates"][:5]):
                row = {"user": user, "item": item, "page": page, "at": at + timedelta(seconds=slot)}
                acts["impressions"].append({**row, "slot": slot})
                wants = draw.random() < (0.9 if item % 3 == 0 else 0.3) / (1 + slot)
                delay = timedelta(minutes=float(draw.uniform(1, 45)))
                clicked, liked = wants and delay <= HALF_AN_HOUR, None
                if wants:
                    acts["clicks"].append({**row, "at": at + delay})
                if clicked and draw.random() < 0.7:
                    acts["clicks"].append({**row, "at": at + delay})  # sent twice
                    liked = int(draw.random() < 0.5)
                    acts["ratings"].append({**row, "at": at + delay + timedelta(minutes=5), "liked": liked})
                self.truth[page, item] = slot, int(clicked), liked
        for name, rows in acts.items():
            self.events(name, rows)

    def end(self, days: int) -> None:
        """Something happens days later, so that all before is known."""
        at = BEGIN + timedelta(days=days)
        row = {"user": -1, "item": -1, "page": -1, "at": at}
        for name, more in (("impressions", {"slot": 0}), ("clicks", {}), ("ratings", {"liked": 0})):
            self.events(name, [{**row, **more}])


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Loop:
    """A server has ranked 150 requests, and a user has acted."""
    folder = tmp_path_factory.mktemp("loop")
    path = write_files(folder, tasks=TASKS, labels=OUTCOMES)
    settings = load_settings(path)
    prepared = prepare(replace(BuildInputs.of(settings), work=folder / "work"))
    layout = ModelLayout.of(prepared.layout, settings)
    model = build_model(layout, settings.model, PlainTables(layout))
    write_artifact(folder / "model", settings=settings, prepared=prepared, state_dict=model.state_dict())
    loop = Loop(folder, {})
    with logging_app(folder / "model", RequestLogOptions(folder / "requests", fraction=1.0)) as app:
        loop.live(app, 0, 150)
    loop.end(30)
    return loop


def rows_by_candidate(rows: pa.Table) -> dict[tuple[int, int], Any]:
    return {
        (row["request"], row["item"]): (
            row["slot"],
            int(row["click"]),
            None if row["liked"] is None else int(row["liked"]),
        )
        for row in rows.to_pylist()
    }


def test_labels_are_the_truth_and_a_second_run_adds_new_requests(loop: Loop) -> None:
    commands.run("join-labels", *loop.words())
    rows = loop.rows()
    assert len(rows) == 150 * 5
    labels = rows_by_candidate(rows)
    assert labels == loop.truth
    assert 50 < sum(click for _, click, _ in labels.values()) < 500
    assert {liked for _, _, liked in labels.values()} == {None, 0, 1}
    first = [*loop.out.glob("run-*")]
    commands.run("join-labels", *loop.words())
    assert [*loop.out.glob("run-*")] == first
    with logging_app(loop.folder / "model", RequestLogOptions(loop.folder / "requests", fraction=1.0)) as app:
        loop.live(app, 600, 50)
    loop.end(60)
    commands.run("join-labels", *loop.words())
    assert len(loop.rows()) == 200 * 5
    assert loop.rows().slice(0, len(rows)) == rows
    assert rows_by_candidate(loop.rows()) == loop.truth


def test_training_takes_the_rows_as_they_are(loop: Loop) -> None:
    """As further days of the log that the model was trained on, and as a log of their own."""
    if not loop.out.exists():
        commands.run("join-labels", *loop.words())
    added = loop.folder / "log" / "served"
    for run in sorted(loop.out.glob("run-*")):
        (added / run.name).mkdir(parents=True)
        for file in run.glob("*.parquet"):
            (added / run.name / file.name).write_bytes(file.read_bytes())
    split = {"train_end": "2024-03-16", "validation_end": "2024-03-18"}
    tree = settings_tree(loop.folder, tasks=TASKS, labels=OUTCOMES, split=split)
    config = loop.folder / "next.yaml"
    config.write_text(yaml.safe_dump(tree), encoding="utf-8")
    commands.run("features", "--config", str(config), "--extend")
    tree["data"] = {"log": str(loop.out), "work_dir": str(loop.folder / "own")}
    config.write_text(yaml.safe_dump(tree), encoding="utf-8")
    commands.run("train", "--config", str(config), "--training.batch_size", "32")


def join_and_stop(moment: str, marker: Path, words: list[str]) -> None:
    """Joins up to a moment, and waits there to be killed. It is called in a process of its own."""
    module: Any
    module, name = {
        "joining": (label_join._Join, "_find_candidates"),
        "writing": (label_join.pq, "write_table"),
        "rename": (atomic, "_put_folder"),
    }[moment]

    def stop(*arguments: object, **options: object) -> None:
        marker.touch()
        time.sleep(600)

    setattr(module, name, stop)
    commands.run("join-labels", *words)


@pytest.mark.parametrize("moment", ["joining", "writing", "rename"])
def test_a_run_that_is_killed_leaves_nothing_and_the_next_one_does_the_same(
    loop: Loop, tmp_path: Path, moment: str
) -> None:
    expected, killed = tmp_path / "expected", tmp_path / "killed"
    commands.run("join-labels", *loop.words()[:-1], str(expected))
    marker = tmp_path / "reached"
    process = call(join_and_stop, moment, marker, [*loop.words()[:-1], str(killed)])
    until(lambda: marker.exists() or process.poll() is not None)
    assert process.poll() is None
    process.kill()
    assert all(path.name.startswith(".") for path in killed.iterdir())
    commands.run("join-labels", *loop.words()[:-1], str(killed))
    names = {str(path.relative_to(expected)) for path in expected.rglob("*")}
    assert names == {str(path.relative_to(killed)) for path in killed.rglob("*")}
    for name in names:
        if (expected / name).is_file():
            assert (expected / name).read_bytes() == (killed / name).read_bytes()
