"""`--help` and mistakes are answered before anything is imported that takes long."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.pipelines.imports import ROOT, answer

PIPELINES = sorted(path.parent.name for path in (ROOT / "pipelines").glob("*/__main__.py"))


@pytest.mark.parametrize("name", PIPELINES)
def test_help(name: str) -> None:
    found = answer(f"pipelines.{name}", "--help")
    assert (found.code, found.imported) == (0, ())
    assert f"python -m pipelines.{name}" in found.out


@pytest.mark.parametrize("name", ["features", "train", "evaluate", "inspect", "tune"])
def test_a_missing_log_or_model(tmp_path: Path, name: str) -> None:
    mistake = ["--model", "no/model"] if name == "evaluate" else ["--data.log", "no/log"]
    work = ["--data.work", str(tmp_path / "work")]
    found = answer("mmoe_rec", name, "--config", "configs/template.yaml", *mistake, *work)
    assert (found.code, found.imported) == (2, ())
    assert found.err.startswith("error: ")
    assert len(found.err.splitlines()) == 1


def test_scoring_without_a_model_or_a_log(tmp_path: Path) -> None:
    for mistake in (["--model", "no/model", "--input", str(tmp_path)], ["--model", "no/model"]):
        found = answer("mmoe_rec", "score", "--output", str(tmp_path / "out"), *mistake)
        assert (found.code, found.imported) == (2, ())
        assert found.err.startswith("error: ")
        assert len(found.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "words", "told"),
    [
        ("refresh", "--validation-days 3", "--validation-days belongs to --train-every-days N, which is missing"),
        ("refresh", "--remove-events", "--remove-events belongs to --journal A, which is missing"),
        (
            "replay",
            "--from 2024-01-01 --to 2024-01-02 --requests requests --ids-only",
            "--ids-only says what an own server is sent, and --requests needs none: leave one of them out",
        ),
    ],
)
def test_options_that_do_not_go_together(name: str, words: str, told: str) -> None:
    """It would do nothing, without a word."""
    found = answer("mmoe_rec", name, "--config", "configs/template.yaml", *words.split())
    assert (found.code, found.imported) == (2, ())
    assert found.err == f"error: {told}\n"


def test_a_wrong_setting(tmp_path: Path) -> None:
    tree = yaml.safe_load((ROOT / "configs" / "template.yaml").read_text(encoding="utf-8"))
    tree["model"]["expert"] = {"count": 3}
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    found = answer("mmoe_rec", "train", "--config", str(tmp_path / "wrong.yaml"))
    assert (found.code, found.imported) == (2, ())
    assert "model.expert" in found.err
