"""The table of a training's validations: every step and task, the chosen one marked, dashes for what is undefined."""

import io
from pathlib import Path

import torch
from rich.console import Console

from mmoe_rec.model.utilization import ExpertUtilization
from mmoe_rec.report.parts import to_rich
from mmoe_rec.training.checkpoint import FinishedRun
from mmoe_rec.training.provenance import Provenance
from mmoe_rec.training.training_report import make_report, validations_table
from mmoe_rec.training.validation import Validation
from tests.inference.small_model import SmallModel

EVEN = ExpertUtilization(torch.full((1, 2), 0.5), torch.full((1, 2), 0.5))


def test_every_validation_is_shown_and_the_chosen_one_marked() -> None:
    history = [
        (step, Validation({"click": 0.5, "stars": 1.25}, {"click": 0.6 + step / 1e4}, EVEN, {"click": 0.95}))
        for step in (100, 1200, 1300)
    ]
    console = Console(width=80, file=io.StringIO(), record=True)
    served = Validation({"click": 0.45}, {"click": 0.8}, EVEN, {"click": 1.01})
    console.print(to_rich(validations_table(history, 1200, served)))
    lines = [line.split() for line in console.export_text().splitlines() if line.strip()]
    assert ["100", "click", "0.5000", "0.6100", "0.9500"] in lines
    assert ["1,200", "chosen", "click", "0.5000", "0.7200", "0.9500"] in lines
    assert ["1,300", "click", "0.5000", "0.7300", "0.9500"] in lines
    assert lines.count(["stars", "1.2500", "-", "-"]) == 3
    assert ["served", "click", "0.4500", "0.8000", "1.0100"] in lines


def test_what_should_worry_about_the_served_model_is_reported(tmp_path: Path) -> None:
    small = SmallModel(tmp_path)
    best = Validation({"click": 0.5}, {"click": 0.42}, EVEN, {"click": 11.0}, {"click": 9_000})
    trained = FinishedRun(small.folder, "models:/small/1", best, 300, 0.0, 0.0, (), Provenance())
    report = make_report(trained, small.settings)
    assert {sentence.mark for sentence in report.sentences} == {"warning"}
    assert report.headline == "validation AUC of the model at step 300: click 0.4200"
    assert [sentence.text.partition(", which")[0].partition(";")[0] for sentence in report.sentences] == [
        "the validation AUC of 'click' is 0.420, below .5",
        "the probabilities of 'click' are too high: 11.00 times the mean label on validation rows",
    ]
