"""The command `structures`, its numbers beside plain ones, and what it says of calls."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from sklearn.metrics import roc_auc_score

from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.intervals import Difference
from mmoe_rec.jobs import baselines
from mmoe_rec.jobs.structures import _describe_change, list_variants
from mmoe_rec.report.structures import Answer, StructuresReport
from mmoe_rec.settings.load import load_settings
from mmoe_rec.settings.model import Model
from mmoe_rec.settings.sections import Settings
from tests.commands import refuse, run, run_and_read
from tests.pipelines.learnable_log import settings_tree
from tests.pipelines.short_trainings import World, dying_after
from tests.report.parsed import Page


@pytest.mark.thorough
def test_the_command_goes_on_after_a_kill_and_its_numbers_are_plain_ones(tmp_path: Path) -> None:
    world = World.of(tmp_path)
    words = ["structures", "--config", world.folder / "first.yaml", "--seeds", "2"]
    with dying_after(10, seed=18):
        run(*words)
    folder = world.work / "structures"
    kept = {file: file.stat().st_mtime_ns for file in (folder / "trainings").rglob("*.parquet")}
    assert len(kept) == 6, "all networks that were trained with the first seed"
    printed = run_and_read(*words)
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    found = json.loads((folder / "structures.json").read_text())
    assert next(iter(found)) == "sentences"
    words_of_page = " ".join(Page((folder / "report.html").read_text(encoding="utf-8")).words.split())
    for sentence in found["sentences"]:
        assert sentence in printed
        assert sentence.replace("`", "")[1:] in words_of_page
    names = ["MMoE", "shared bottom", "one gate", "PLE", "only click", "only liked", "trees alone"]
    assert [each["name"] for each in found["table"]] == names
    settings = load_settings(world.folder / "first.yaml")
    rows = pq.read_table(world.work / "features" / "encoded" / "test")
    manifest = json.loads((world.work / "features" / "manifest.json").read_text())
    means: dict[tuple[str, str], float] = {}
    for variant in list_variants(settings):
        for task in ("click", "liked"):
            areas = []
            for seed in (17, 18):
                file = folder / "trainings" / manifest["fingerprint"] / f"{variant.key(seed, 'test')}.parquet"
                table = pq.read_table(file)
                if task in table.column_names:
                    label = rows.column(f"label.{task}").to_numpy()
                    observed = ~np.isnan(label)
                    areas.append(roc_auc_score(label[observed], table.column(task).to_numpy()[observed]))
            if areas:
                assert len(areas) == 2
                assert areas[0] != areas[1] or variant.trees_alone, "seeds differ; a tree looks at all of few columns"
                means[variant.name, task] = float(np.mean(areas))
    told = {(row["name"], task): cell["mean"] for row in found["table"] for task, cell in row["cells"].items()}
    assert told == pytest.approx(means, abs=1e-6)
    for answer in found["answers"]:
        tasks = ("click", "liked") if answer["task"] is None else (answer["task"],)
        apart = np.mean([means["MMoE", task] - means[answer["other"], task] for task in tasks])
        assert answer["apart"]["value"] == pytest.approx(apart, abs=1e-6)
        assert answer["apart"]["p_corrected"] >= answer["apart"]["p"]
    _check_runs(world.client)


def _check_runs(client: mlflow.MlflowClient) -> None:
    """One run with one for each training, none of which is left open, and no registered model."""
    runs = client.search_runs([client.get_experiment_by_name("learnable").experiment_id])
    (parent,) = [each for each in runs if "mlflow.parentRunId" not in each.data.tags]
    assert len(runs) == 15
    assert {each.info.status for each in runs} == {"FINISHED"}
    assert {each.path for each in client.list_artifacts(parent.info.run_id)} == {"report.html", "structures.json"}
    assert not client.search_registered_models()


def settings_of(tmp_path: Path, tasks: int = 2, **model: Any) -> Settings:
    tree = settings_tree(tmp_path)
    tree["tasks"]["third"] = tree["tasks"]["click"] | {"label": "third"}
    tree["tasks"] = dict(list(tree["tasks"].items())[:tasks])
    if tasks == 1:
        tree["tasks"]["click"] |= {"objective": "engagement"}
    for section, values in model.items():
        tree["model"][section] = values if values is None else tree["model"].get(section, {}) | values
    return Settings.model_validate(tree)


@pytest.mark.parametrize(
    ("tasks", "model", "names"),
    [
        (1, {}, ["MMoE", "shared bottom", "trees alone"]),
        (2, {"trees": {}}, ["MMoE", "shared bottom", "one gate", "PLE", "only click", "only liked", "trees alone"]),
        (3, {"gates": {"per_task": False}}, ["one gate", "shared bottom", "MMoE", "PLE", "only click", "only liked"]),
        (2, {"experts": {"count": 1, "units": [24]}}, ["shared bottom", "one gate", "MMoE", "PLE", "only click"]),
        (2, {"gates": {"routing": "top_k", "dropout": 0.1}}, ["these settings", "shared bottom", "one gate", "MMoE"]),
        (2, {"experts": {"count": 1, "task_count": 1, "levels": 2}}, ["PLE", "shared bottom", "one gate", "MMoE"]),
        (2, {"gates": {"serving_top_k": 3}}, ["these settings", "shared bottom", "one gate", "MMoE", "PLE"]),
    ],
)
def test_the_settings_own_structure_comes_first_under_its_name(
    tmp_path: Path, tasks: int, model: dict[str, Any], names: list[str]
) -> None:
    variants = list_variants(settings_of(tmp_path, tasks, **model))
    assert [each.name for each in variants][: len(names)] == names
    assert len({each.key(17, "test") for each in variants}) == len(variants), "none comes twice"
    for each in variants:
        its: Model = each.settings.model
        assert its.trees is None
        assert its == Model.model_validate(its.model_dump())
        changed = variants[0].settings.model.model_dump()
        for section, values in yaml.safe_load(_describe_change(variants[0], each))["model"].items():
            changed[section] |= values
        assert Model.model_validate(changed | {"experts": _tuples(changed["experts"])}) == its, "the change makes it"
        if its.experts.levels == 1:
            units = 16 if its.gates.routing == "soft" and model.get("gates", {}).get("routing") else 24
            assert its.experts.units[0] * its.experts.count == units, "as many units, of which a row takes two experts"
    if tasks == 3:
        assert [each.without_tasks for each in variants[4:10]] == [
            ("liked", "third"),
            ("click", "third"),
            ("click", "liked"),
            ("click",),
            ("liked",),
            ("third",),
        ]


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def report_of(*answers: Answer, **more: Any) -> StructuresReport:
    report = StructuresReport(
        "Structures", "MMoE", (1, 2), 100, "users", "auc of bought", [], answers, {"bought": "auc"}, {}, 0.005, False
    )
    return replace(report, **more)


def apart(value: float, half: float, p: float) -> Difference:
    return Difference(value, value - half, value + half, half / 2, 50.0, p, p, half)


def answer(kind: str, other: str, difference: Difference, better: str = "higher") -> Answer:
    tasks = (None, ()) if kind in ("structure", "trees") else ("bought", ("clicked",))
    return Answer(kind, other, *tasks, "auc", better, "model: {}", difference)


@pytest.mark.parametrize(
    ("one", "says"),
    [
        (answer("alone", "only bought", apart(0.01, 0.005, 0.001)), "`clicked` beside it helps `bought`: its auc"),
        (answer("alone", "only bought", apart(-0.01, 0.005, 0.001)), "`clicked` beside it harms `bought`: its auc"),
        (answer("alone", "only bought", apart(-0.01, 0.005, 0.001), "lower"), "`clicked` beside it helps `bought`"),
        (answer("without", "without clicked", apart(0.0, 0.005, 0.9)), "is not shown to help or harm `bought` here"),
        (
            answer("alone", "only bought", apart(0.01, 0.009, 0.06)),
            ", once corrected for the number of comparisons",
        ),
        (answer("alone", "only bought", Difference(None)), "can't be told: too few labels, or users"),
        (answer("structure", "PLE", apart(-0.01, 0.005, 0.001)), "MMoE is worse than PLE here: auc of bought"),
        (answer("structure", "PLE", apart(-0.01, 0.005, 0.001)), "what to write: `model: {}`, since PLE is better"),
        (answer("structure", "shared bottom", apart(0.001, 0.003, 0.6)), "simpler and loses no more than 0.0040 auc"),
        (answer("structure", "shared bottom", apart(0.001, 0.006, 0.6)), "nothing simpler than MMoE is shown to be as"),
        (answer("structure", "shared bottom", apart(0.01, 0.006, 0.001)), "MMoE is better than a shared bottom here"),
        (answer("structure", "PLE", apart(0.0, 0.003, 0.9)), "nothing to change in `model`"),
        (answer("trees", "trees alone", apart(-0.01, 0.005, 0.001)), "what to write: `model: {trees: {}}`"),
        (answer("alone", "only bought", apart(-0.01, 0.005, 0.001)), "for `bought`: lower `tasks.clicked.loss_weight`"),
        (answer("structure", "PLE", apart(0.0, 0.003, 0.9)), "would show a difference of 0.0030 auc of bought"),
    ],
)
def test_verdicts_in_words(one: Answer, says: str) -> None:
    assert any(says in sentence for sentence in report_of(one).sentences), report_of(one).sentences


def test_what_cannot_be_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    world = World.of(tmp_path)
    config = world.folder / "first.yaml"
    assert "1 is not in the range x>=2" in refuse(capsys, "structures", "--config", config, "--seeds", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    told = refuse(capsys, "structures", "--config", config)
    assert told == "error: structures trains in one process: start it without torchrun"


@pytest.mark.thorough
def test_trees_that_have_nothing_to_learn_from_are_left_out_with_the_reason(tmp_path: Path) -> None:
    """Networks of lists of ids alone, and one task; the verdict on the networks stands."""
    world = World.of(tmp_path)
    tree = yaml.safe_load((world.folder / "first.yaml").read_text())
    tree["features"] = {name: tree["features"][name] for name in ("item", "clicked")}
    tree["features"]["item"]["dim"] = 4
    del tree["tasks"]["liked"]
    (world.folder / "lists.yaml").write_text(yaml.safe_dump(tree))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "boost_trees", refuse_to_learn)
        printed = run_and_read("structures", "--config", world.folder / "lists.yaml", "--seeds", "2")
    assert "warning: trees alone were left out: no baseline can learn task 'click': no input" in printed
    assert "MMoE is not shown to differ from a shared bottom" in printed
    assert "boosted" not in printed


def refuse_to_learn(*_: object) -> None:
    raise UserError("no input")
