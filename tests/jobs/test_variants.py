"""Variants of a setting, trained on the same encoded rows, beside the same settings written out and built anew."""

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.comparison import find_differences
from mmoe_rec.evaluation.intervals import Difference
from mmoe_rec.evaluation.summary import summarise
from mmoe_rec.features.layout import DenseInput, Layout, TaskOutput
from mmoe_rec.inference.artifact import Source
from mmoe_rec.jobs import seeds
from mmoe_rec.jobs.evaluate import scored_rows
from mmoe_rec.jobs.train import train_model
from mmoe_rec.jobs.variants import Variant, VariantTrainings, open_variants
from mmoe_rec.settings.load import load_settings
from mmoe_rec.settings.sections import Settings
from mmoe_rec.training import loop
from mmoe_rec.training.choices import Choices
from tests.fork_server import MULTIPROCESSING
from tests.pipelines.learnable_log import settings_tree
from tests.pipelines.short_trainings import FIRST_DAY, LENIENT, RATES, SMALL, World, dying_after


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Its histories look at the candidate, whose table they share."""
    made = World.of(tmp_path_factory.mktemp("variants"))
    tree = settings_tree(made.folder, split=FIRST_DAY, training=SMALL | RATES, evaluation=LENIENT)
    tree["features"]["clicked"]["pooling"] = "attention"
    (made.folder / "first.yaml").write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def settings(world: World) -> Settings:
    return load_settings(world.folder / "first.yaml")


def predict_built_anew(world: World, features: Sequence[str] = (), tasks: Sequence[str] = ()) -> np.ndarray:
    """What a model predicts whose settings lack features and tasks, by the commands."""
    tree = copy.deepcopy(yaml.safe_load((world.folder / "first.yaml").read_text()))
    for section, names in (("features", features), ("tasks", tasks)):
        for name in names:
            del tree[section][name]
    tree["data"]["work"] = str(world.folder / f"without_{'_'.join([*features, *tasks])}")
    path = world.folder / "anew.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    settings = load_settings(path)
    train_model(settings, register=False)
    artifact = Path(tree["data"]["work"]) / "model"
    return scored_rows(settings, Source(artifact, str(artifact)), "model").predictions


def read_predictions(trainings: VariantTrainings, variant: Variant, seed: int = 17) -> np.ndarray:
    table = pq.read_table(trainings.trained / f"{variant.key(seed, 'test')}.parquet")
    return np.column_stack([table.column(name) for name in table.column_names if name != "score"])


@pytest.mark.parametrize(
    ("features", "tasks"),
    [
        pytest.param((), (), marks=pytest.mark.thorough),
        (("price", "item_click"), ("liked",)),
        pytest.param(("clicked", "slot"), (), marks=pytest.mark.thorough),
        pytest.param(("user", "item", "slot", "clicked"), (), marks=pytest.mark.thorough),
    ],
)
def test_what_is_left_out_was_never_there(
    world: World, settings: Settings, features: tuple[str, ...], tasks: tuple[str, ...]
) -> None:
    """Bit for bit, also without placement, without tables, and with one task."""
    variant = Variant("smaller", settings, features, tasks)
    with open_variants(settings, "structures", "test") as trainings:
        trainings.train([variant], [17])
    expected = predict_built_anew(world, features, tasks)
    np.testing.assert_array_equal(read_predictions(trainings, variant), expected)


def test_a_history_without_its_candidate_is_pooled_by_its_mean(settings: Settings) -> None:
    """Its table stays, although the candidate's feature, whose table it shares, is left out."""
    history = settings.features["clicked"].model_copy(update={"pooling": "mean"})
    by_mean = settings.model_copy(update={"features": settings.features | {"clicked": history}})
    variants = [Variant("attention", settings, ("item",)), Variant("mean", by_mean, ("item",))]
    with open_variants(settings, "structures", "test") as trainings:
        trainings.train(variants, [17])
    one, other = (read_predictions(trainings, each) for each in variants)
    np.testing.assert_array_equal(one, other)


def test_trainings_that_ended_stay_and_differences_are_of_means(
    settings: Settings, capsys: pytest.CaptureFixture
) -> None:
    """After a kill in the second of four trainings; nothing of weights is left."""
    bottom = settings.model.experts.model_copy(update={"count": 1})
    variants = [
        Variant("as they are", settings),
        Variant("bottom", settings.model_copy(update={"model": settings.model.model_copy(update={"experts": bottom})})),
    ]
    with open_variants(settings, "ablate", "validation") as trainings:
        with dying_after(10, seed=18):
            trainings.train(variants[:1], [17, 18])
        (first,) = trainings.trained.glob("*.parquet")
        kept = first.stat().st_mtime_ns
        found = trainings.train(variants, [17, 18])
        assert first.stat().st_mtime_ns == kept
        assert capsys.readouterr().err.count("steps of 64 rows") == 5, "one that was killed, and four"
        again = trainings.train(variants, [18, 17])
    assert "steps of" not in capsys.readouterr().err
    assert sorted(each.name for each in trainings.folder.iterdir()) == ["trainings"]
    mine, other = found["as they are"], found["bottom"]
    sums, others = mine.measure(), other.measure()
    assert again["bottom"].measure() == others[::-1]
    assert mine.facts[0]["parameters"] > other.facts[0]["parameters"]
    differences = find_differences(sums, [("bottom", others)], resamples=100)
    means = [np.mean([summarise(s, 20).tasks["click"].get("auc").value for s in each]) for each in (sums, others)]
    apart = differences["bottom", "click", "auc"]
    assert apart.value == pytest.approx(means[0] - means[1], abs=1e-9)
    alone: Difference = find_differences(sums[:1], [("x", others)], resamples=100)["x", "click", "auc"]
    assert alone.error < apart.error, "of a single training the interval is over users alone"


def test_all_variants_compute_in_what_the_first_one_chose(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a later command, whatever a busy machine would choose by then."""
    tree = settings.model_dump()
    tree["training"]["precision"] = "auto"
    tree["data"]["work"] = str(tmp_path)
    settings, chosen = Settings.model_validate(tree), list[Choices]()

    def busy(*_: object) -> Choices:
        chosen.append(Choices("bf16" if chosen else "fp32"))
        return chosen[-1]

    monkeypatch.setattr(loop, "choose_precision", busy)
    for without in ((), ("price",)):
        with open_variants(settings, "structures", "test") as trainings:
            found = trainings.train([Variant("x", settings, without)], [17, 18])
        assert [each["precision"] for each in found["x"].facts] == ["fp32", "fp32"]
    assert len(chosen) == 1


def test_a_task_or_feature_that_there_is_not_is_refused(settings: Settings) -> None:
    with open_variants(settings, "ablate", "validation") as trainings:
        for variant, told in (
            (Variant("x", settings, ("prize",)), "there is no feature 'prize' to leave out"),
            (Variant("x", settings, (), ("click", "liked")), "all tasks are left out"),
            (
                Variant("x", settings, tuple(each for each in settings.features if each != "slot")),
                "no feature describes",
            ),
        ):
            with pytest.raises(UserError, match=told):
                trainings.train([variant], [17])


def test_a_task_is_learnt_from_its_own_label_where_the_given_one_is_left_out() -> None:
    tasks = (TaskOutput("clicked", "binary"), TaskOutput("bought", "binary", given="clicked"))
    layout = Layout((), (), (DenseInput("price"),), tasks)
    assert [each.learnt_from for each in layout.without(tasks=["clicked"]).tasks] == ["bought"]
    assert layout.without(tasks=["bought"]).tasks == tasks[:1]
    assert layout.without() is layout


@pytest.mark.thorough
def test_trainings_side_by_side_are_those_one_after_the_other(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seeds, "multiprocessing", MULTIPROCESSING)
    variants = [Variant("as they are", settings), Variant("smaller", settings, ("price",), ("liked",))]
    found = []
    for at_once in (2, 1):
        with open_variants(settings, f"at_once_{at_once}", "validation", at_once) as trainings:
            trained = trainings.train(variants, [17])
        files = [file for each in trained.values() for file in each.files]
        found.append([pq.read_table(file).to_pydict() for file in files])
        assert len(list(trainings.trained.glob("*.parquet"))) == 2
    assert found[0] == found[1]
