"""The progress bar: a step with nothing to do does not stand at 0% for ever."""

import io
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console

from mmoe_rec import progress
from mmoe_rec.preprocessing.prepare import prepare
from tests.log.small_logs import ALL_KINDS, DAY, START, random_log, schema_of, write_log


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What bars write on a terminal."""
    text = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=text, force_terminal=True, width=100))
    return text


def test_a_step_with_nothing_to_do_shows_no_bar(shown: io.StringIO) -> None:
    with progress.bar() as bar:
        done = bar.add_task("encoding", total=2)
        nothing = bar.add_task("counters and histories", total=0)
        bar.advance(done, 2)
    assert bar.finished
    assert not bar.tasks[nothing].visible
    assert "100%" in shown.getvalue()
    assert "counters" not in shown.getvalue()
    assert " 0%" not in shown.getvalue().splitlines()[-1]


def test_a_step_that_knows_no_total_and_one_that_is_hidden_stay_as_they_are(shown: io.StringIO) -> None:
    with progress.bar() as bar:
        waiting, silent = bar.add_task("waiting", total=None), bar.add_task("silent", total=3, visible=False)
        assert bar.tasks[waiting].visible
        assert not bar.tasks[silent].visible
    assert "waiting" in shown.getvalue()
    assert "silent" not in shown.getvalue()


def test_a_build_without_counters_and_histories_shows_no_bar_for_them(shown: io.StringIO, tmp_path: Path) -> None:
    schema = schema_of({"item": ALL_KINDS["item"]})
    edges = [START, START + 5 * DAY, START + 7 * DAY, None]
    windows = dict(zip(("train", "validation", "test"), pairwise(edges), strict=True))
    prepare(str(write_log(tmp_path / "log", random_log(0))), schema, windows, tmp_path)
    assert "encoding" in shown.getvalue()
    assert "counters and histories" not in shown.getvalue()
    assert "\n\n" not in shown.getvalue().replace("\r", "")
