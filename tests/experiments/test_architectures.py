"""The architectures that `compare --architectures` tries, and verdicts in words."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mmoe_rec.evaluation.intervals import Difference
from mmoe_rec.experiments.compare import (
    ExperimentResult,
    MetricMean,
    VariantResult,
    correct_p_values,
    list_architectures,
    parse_variants,
)
from mmoe_rec.experiments.runner import Variant
from mmoe_rec.settings.sections import Settings
from tests.pipelines.learnable_log import settings_tree


def settings_of(tmp_path: Path, tasks: int = 2, **model: Any) -> Settings:
    tree = settings_tree(tmp_path)
    tree["tasks"]["third"] = tree["tasks"]["click"] | {"label": "third"}
    tree["tasks"] = dict(list(tree["tasks"].items())[:tasks])
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
def test_the_settings_own_architecture_comes_first_under_its_name(
    tmp_path: Path, tasks: int, model: dict[str, Any], names: list[str]
) -> None:
    settings = settings_of(tmp_path, tasks, **model)
    variants = list_architectures(settings)
    assert [variant.name for variant in variants][: len(names)] == names
    for variant in variants:
        theirs = variant.apply(settings).model
        assert theirs.trees is None
        if theirs.experts.levels == 1:
            units = 16 if theirs.gates.routing == "soft" and model.get("gates", {}).get("routing") else 24
            assert theirs.experts.units[0] * theirs.experts.count == units, (
                "as many units, of which a row takes two experts"
            )
    order = [
        name for name in ("shared bottom", "one gate", "MMoE", "PLE") if name in {variant.name for variant in variants}
    ]
    if names[0] in order:
        assert [variant.name for variant in variants if variant.is_simpler] == order[: order.index(names[0])]
    if tasks == 3:
        assert [variant.without_tasks for variant in variants[4:10]] == [
            ("liked", "third"),
            ("click", "third"),
            ("click", "liked"),
            ("click",),
            ("liked",),
            ("third",),
        ]


def test_variants_of_the_command_line() -> None:
    words = [
        "wide",
        "model.experts.count=16",
        "training.epochs=4",
        "plain",
        "features.price=null",
        "features.x.dim=null",
    ]
    assert parse_variants(words) == [
        Variant("wide", ("model.experts.count=16", "training.epochs=4")),
        Variant("plain", ("features.x.dim=null",), ("price",)),
    ]
    assert parse_variants(words)[1].cli_options == "--features.x.dim=null --features.price=null"


def build_difference(value: float, half: float, p: float) -> Difference:
    return Difference(value, value - half, value + half, half / 2, 50.0, p)


def report_of(difference: Difference, better: str = "higher", is_simpler: bool = False) -> ExperimentResult:
    name = "auc of bought"
    base = VariantResult("MMoE", "", False, {name: MetricMean(better, 0.7)}, (), 10, 1.0)
    second = VariantResult("PLE", "--x=1", is_simpler, {name: MetricMean(better, 0.7, difference)}, (name,), 10, 1.0)
    return ExperimentResult("Title", (1, 2), 100, "users", {}, correct_p_values([base, second]), 0.005)


@pytest.mark.parametrize(
    ("report", "says", "recommended"),
    [
        (
            report_of(build_difference(0.01, 0.005, 0.001)),
            "`PLE` is better than `MMoE`: auc of bought differs by +0.01",
            True,
        ),
        (report_of(build_difference(0.01, 0.005, 0.001)), "adopt `--x=1`, since `PLE` is better", True),
        (
            report_of(build_difference(-0.01, 0.005, 0.001)),
            "`PLE` is worse than `MMoE`: auc of bought differs by -0.01",
            False,
        ),
        (report_of(build_difference(-0.01, 0.005, 0.001), "lower"), "`PLE` is better than `MMoE`", True),
        (report_of(build_difference(0.0, 0.004, 0.9)), "`PLE` does not differ significantly from `MMoE`: ", False),
        (
            report_of(build_difference(0.0, 0.004, 0.9), is_simpler=True),
            "since `PLE` is simpler and loses at most 0.0040",
            True,
        ),
        (report_of(build_difference(0.002, 0.006, 0.9), "lower", True), "nothing to adopt", False),
        (report_of(build_difference(0.0, 0.006, 0.9), is_simpler=True), "nothing to adopt", False),
        (report_of(build_difference(0.01, 0.009, 0.06)), ", once corrected for the number of comparisons", False),
        (report_of(Difference(None)), "`PLE` can't be compared with `MMoE`", False),
    ],
)
def test_verdicts_in_words(report: ExperimentResult, says: str, recommended: bool) -> None:
    message = [report.headline, *report.sentences]
    assert any(says in sentence for sentence in message), message
    assert (report.recommended is not None) == recommended


def test_verdicts_are_corrected_for_all_variants() -> None:
    """p of .03 is significant alone and not beside two others (Holm); the best variant is adopted."""
    base, second = report_of(build_difference(0.01, 0.005, 0.03)).variants
    third = replace(
        second,
        name="third",
        metric_means={"auc of bought": MetricMean("higher", 0.7, build_difference(0.02, 0.005, 0.001))},
    )
    fourth = replace(
        second,
        name="fourth",
        metric_means={"auc of bought": MetricMean("higher", 0.7, build_difference(0.0, 0.005, 0.9))},
    )
    report = replace(report_of(Difference(None)), variants=correct_p_values([base, second, third, fourth]))
    corrected = [variant.metric_means["auc of bought"].difference.corrected_p_value for variant in report.variants[1:]]
    assert corrected == pytest.approx([0.06, 0.003, 0.9])
    assert report.recommended.name == "third"
