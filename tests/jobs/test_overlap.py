"""Whether a model has seen the labels that it is measured by, as far as its settings tell."""

from __future__ import annotations

from pathlib import Path

import yaml

from mmoe_rec.jobs.slicing import overlap
from tests.log.plain_tables import plain_settings


def test_values_of_a_split_are_compared_as_text(tmp_path: Path) -> None:
    settings = plain_settings(tmp_path)
    tree = {"split": settings.split.model_dump(mode="json") | {"train": ["1", "4"], "validation": ["2"], "test": ["3"]}}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    (told,) = overlap(settings, tmp_path)
    assert told.startswith("was trained, or its best state chosen, on rows with 4 in column 'fold'")


def test_rows_that_another_column_splits_may_have_been_seen(tmp_path: Path) -> None:
    settings = plain_settings(tmp_path)
    tree = {"split": settings.split.model_dump(mode="json") | {"column": "person"}}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    (told,) = overlap(settings, tmp_path)
    assert "on rows that column 'person' split" in told
    assert "it may have seen" in told


def test_what_can_not_be_told_is_said(tmp_path: Path) -> None:
    settings = plain_settings(tmp_path)
    for text in (None, "split: {column: fold, from: 3}", "split"):
        if text is not None:
            (tmp_path / "settings.yaml").write_text(text, encoding="utf-8")
        (told,) = overlap(settings, tmp_path)
        assert told.startswith("does not say on which rows it was trained")
