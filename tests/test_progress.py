"""The progress bar and consoles: a step with nothing to do does not stand at 0% for ever, and no stream is needed."""

import io
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console

from mmoe_rec import progress
from mmoe_rec.preprocessing.logs import BuildInputs
from mmoe_rec.preprocessing.prepare import prepare
from tests.log.small_logs import ALL_KINDS, DAY, START, random_log, schema_of, write_log


def test_a_build_without_counters_and_histories_shows_no_bar_for_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=shown, force_terminal=True, width=100))
    schema = schema_of({"item": ALL_KINDS["item"]})
    edges = [START, START + 5 * DAY, START + 7 * DAY, None]
    windows = dict(zip(("train", "validation", "test"), pairwise(edges), strict=True))
    prepare(BuildInputs(str(write_log(tmp_path / "log", random_log(0))), schema, windows, tmp_path))
    assert "encoding" in shown.getvalue()
    assert "counters and histories" not in shown.getvalue()
    assert "\n\n" not in shown.getvalue().replace("\r", "")


def test_without_a_terminal_lines_are_wide_and_a_closed_stream_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    for stream in (io.StringIO(), None):  # None as Python has it after `2>&-`
        monkeypatch.setattr("sys.stderr", stream)
        console = progress.open_console(stderr=True)
        console.print("x" * 150)
        assert console.width == 160
