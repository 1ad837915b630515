"""What identifies features: what rows mean does, what a model makes of them does not."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mmoe_rec.errors import UserError
from mmoe_rec.model.model_layout import ModelLayout
from mmoe_rec.preprocessing.build_inputs import BuildInputs
from mmoe_rec.preprocessing.extend import extend
from mmoe_rec.preprocessing.prepare import FeatureFolder, find_existing_features, prepare
from mmoe_rec.settings.sections import Settings
from tests.inference.small_model import small_settings
from tests.log.small_logs import ALL_KINDS, BASE, random_log, write_log

EVENTS = {"seen": {"kind": "counter", "events": "views", "by": ["item"], "outputs": ["log_count"]}}


def settings_of(work: Path, path: str = "log", **sections: Any) -> Settings:
    """Settings of the log in a folder, whose rows are read as events too, from a path in it."""
    features = {**sections.pop("features", ALL_KINDS), **EVENTS}
    events = {"views": {"path": str(work / path), "time": "time"}}
    data = {"log": str(work / "log"), "work_dir": str(work), "events": events}
    return small_settings(work, data=data, features=features, **sections)


def changed(section: str, name: str, **keys: Any) -> dict[str, Any]:
    """A section with other keys of one task or feature."""
    whole = {"tasks": BASE["tasks"], "features": ALL_KINDS}[section]
    return {section: {**whole, name: {**whole[name], **keys}}}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a log, and its features."""
    folder = tmp_path_factory.mktemp("identity")
    write_log(folder / "log", random_log(1, rows=600))
    settings = settings_of(folder)
    prepare(replace(BuildInputs.of(settings), work=folder))
    return folder


def find_features(work: Path, settings: Settings) -> FeatureFolder | None:
    return find_existing_features(replace(BuildInputs.of(settings), work=work))


@pytest.mark.parametrize(
    "sections",
    [
        changed("tasks", "click", loss_weight=0.25),
        changed("tasks", "liked", score_weight=3.0),
        changed("tasks", "spent", objective="satisfaction"),
        *(changed("features", name, dim=6) for name in ("item", "tags", "price_bucket", "when", "user_brand", "slot")),
        {"path": "log/*.parquet"},
    ],
    ids=str,
)
def test_another_choice_of_the_model_leaves_features_as_they_are(work: Path, sections: dict[str, Any]) -> None:
    settings = settings_of(work, **sections)
    assert find_features(work, settings) is not None
    assert extend(replace(BuildInputs.of(settings), work=work)) is None, "nothing is new"


@pytest.mark.parametrize(
    "sections",
    [
        changed("tasks", "liked", label_delay_days=1),
        changed("tasks", "liked", conditional_on="click"),
        {"tasks": dict(reversed(BASE["tasks"].items()))},
        {"features": dict(reversed(ALL_KINDS.items()))},
        changed("features", "item", oov_buckets=5),
        changed("features", "when", timezone="UTC"),
        {"roles": {**BASE["roles"], "placement": [], "context": ["born", "slot"]}},
    ],
    ids=str,
)
def test_another_meaning_of_rows_takes_other_features(work: Path, sections: dict[str, Any]) -> None:
    assert find_features(work, settings_of(work, **sections)) is None


def test_a_model_takes_widths_and_weights_from_its_settings(work: Path) -> None:
    sections = changed("tasks", "click", loss_weight=0.25, score_weight=2.0) | changed("features", "when", dim=6)
    settings = settings_of(work, **sections)
    prepared = find_features(work, settings)
    layout = ModelLayout.of(prepared.layout, settings)
    dims = {table.name: table.dim for table in layout.tables}
    others = dict.fromkeys(("item", "brand", "tags", "price_bucket", "user_brand", "slot"), 16)
    assert dims == {"when_hour": 6, "when_weekday": 6, "born_weekday": 4, **others}
    weights = [(task.name, task.objective, task.loss_weight, task.score_weight) for task in layout.tasks]
    assert weights == [
        ("click", "engagement", 0.25, 2.0),
        ("liked", "satisfaction", 1.0, 1.0),
        ("spent", "engagement", 1.0, 1.0),
    ]
    assert layout.row_layout() == prepared.layout
    (work / "layout.json").write_text(layout.to_json())
    assert ModelLayout.read(work) == layout


def test_features_in_another_order_of_tasks_are_not_extended(work: Path) -> None:
    settings = settings_of(work, tasks=dict(reversed(BASE["tasks"].items())))
    with pytest.raises(UserError, match=r"'tasks' is in the order click, liked, spent .* in the order spent, liked"):
        extend(replace(BuildInputs.of(settings), work=work))


def test_settings_of_other_features_are_reported(work: Path) -> None:
    settings = settings_of(work, features={name: item for name, item in ALL_KINDS.items() if name != "when"})
    with pytest.raises(UserError, match=r"include the feature 'when', but the settings don't"):
        ModelLayout.of(FeatureFolder(work / "features").layout, settings)
