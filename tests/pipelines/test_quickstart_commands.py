"""What the quickstart prints to be typed next."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from pipelines import quickstart


@pytest.mark.parametrize(
    ("uri", "ui"),
    [
        ("sqlite:////a b/mlflow.db", "mlflow ui --backend-store-uri 'sqlite:////a b/mlflow.db'"),
        ("postgresql://me@db/runs?sslmode=require", "mlflow ui --backend-store-uri 'postgresql://me@db/runs?ssl"),
        ("http://mlflow.example:5000", "see the runs at http://mlflow.example:5000"),
    ],
)
@pytest.mark.parametrize("by_variable", [False, True])
def test_commands_fit_the_address(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    uri: str,
    ui: str,
    by_variable: bool,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri if by_variable else "http://another")
    settings = quickstart.quickstart_settings(True, tmp_path, [] if by_variable else ["--tracking.uri", uri])
    quickstart._next_commands(settings, "models:/shop@champion", {})
    _, _, serve, curl, see = capsys.readouterr().out.splitlines()
    assert shlex.split(serve)[:5] == [f"MLFLOW_TRACKING_URI={uri}", "mlflow", "models", "serve", "-m"]
    assert Path(shlex.split(curl)[-1].removeprefix("@")).is_file()
    assert see.strip().startswith(ui)
