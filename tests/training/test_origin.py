"""By what a training is known again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mmoe_rec.errors import UserError
from mmoe_rec.settings.sections import Settings
from mmoe_rec.training.origin import Origin, Start, fixed_settings, result_settings
from tests.pipelines.learnable_log import settings_tree

ALIAS = Start("models:/shop@champion", "models:/shop/3", "weights", "run")


def settings(path: str = "", value: Any = None) -> Settings:
    """Those of the learnable log, with one changed, such as `training.seed`."""
    tree = settings_tree(Path("somewhere"))
    *sections, name = path.split(".")
    section = tree
    for each in sections:
        section = section.setdefault(each, {})
    if path:
        section[name] = value
    return Settings.model_validate(tree)


def origin(path: str = "", value: Any = None) -> Origin:
    return Origin(fixed_settings(settings(path, value)), "features", 7, "run", ALIAS)


def test_a_training_may_go_on_with_its_tables_in_another_way() -> None:
    """Results differ by rounding alone, and trainings begun by a version without this setting have none."""
    assert origin().difference(origin("training.tables", "torch")) is None
    assert "tables" not in {**fixed_settings(settings()), **result_settings(settings())}["training"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("training.device", "cuda"),
        ("training.calibration", "isotonic"),
        ("evaluation.resamples", 60),
        ("split.validation_end", "2024-03-09T14:00:00+02:00"),  # the same instant
    ],
)
def test_what_does_not_matter_to_the_steps_may_change(name: str, value: Any, tmp_path: Path) -> None:
    origin().check(origin(name, value), tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("training.learning_rate", 0.5, "it was begun with training.learning_rate 0.01, now it is 0.5; set it back"),
        ("tasks.liked.objective", "engagement", 'objective "satisfaction", now it is "engagement"'),
        ("features.user.dim", 16, "begun with features.user.dim 8, now it is 16"),
        ("split.train_end", "2024-03-07", 'split.train_end "2024-03-08T00:00:00.00:00", now it is "2024-03-07T'),
        ("columns.sampling_rate", "rate", 'columns.sampling_rate missing, now it is "rate"'),
    ],
)
def test_a_changed_setting_is_named(name: str, value: Any, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"can't go on: .*{sentence}.*or train from the start, without --resume"):
        origin().check(origin(name, value), tmp_path)
    with pytest.raises(UserError, match="its features are not those"):
        origin().check(replace(origin(), features="others"), tmp_path)


def test_starts_are_the_same_by_their_weights() -> None:
    one = origin()
    assert one.difference(replace(one, start=Start("some/folder", "some/folder", "weights"))) is None
    found = one.difference(replace(one, start=Start("models:/shop@champion", "models:/shop/4", "others")))
    assert found is not None
    assert found.endswith(
        "--from models:/shop@champion (models:/shop/3), now it is --from models:/shop@champion (models:/shop/4); "
        "give --from models:/shop/3"
    )
    found = one.difference(replace(one, start=None))
    assert found is not None
    assert "now there is none; give --from models:/shop@champion" in found
    found = replace(one, start=None).difference(one)
    assert found is not None
    assert found.startswith("it was begun without --from, now it is --from models:/shop@champion")


@pytest.mark.parametrize(
    ("name", "value"),
    [("training.calibration", "isotonic"), ("serving.max_candidates", 7), ("tracking.alias", "best"), ("name", "new")],
)
def test_what_is_made_of_the_result_is_known_too(name: str, value: Any) -> None:
    one, other = (replace(origin(), settings=result_settings(each)) for each in (settings(), settings(name, value)))
    found = one.difference(other)
    assert found is not None
    assert f"begun with {name} " in found
